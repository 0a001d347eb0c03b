"""Label losses against plain numpy in float64, in pieces, and their gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from zsq_deploy.calib.parts.labels import LabelSpace, Softened, Targets, uniform
from zsq_deploy.calib.parts.terms import CrossEntropy, Look, OwnProbability

CONTEXT: Any = SimpleNamespace(labels=LabelSpace("scores", 5, "head"))
TERMS = [CrossEntropy(), CrossEntropy(2.0), CrossEntropy(focus=2.0), CrossEntropy(focus=0.5), OwnProbability()]
COUNT, CLASSES = 7, 5


def look(scores: torch.Tensor, targets: Targets, first: int = 0, batch: int = COUNT) -> Look:
    nothing = torch.zeros(len(scores), 1)
    return Look(
        images=nothing,
        seen=nothing,
        values={"scores": scores},
        observed={},
        targets=targets,
        number=0,
        steps=1,
        batch=batch,
        first=first,
        memory={},
    )


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(COUNT, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(rule: Any) -> Targets:
    return rule(COUNT, CLASSES, torch.Generator().manual_seed(3))


def reference(term: Any, given: np.ndarray, targets: Targets) -> float:
    total = 0.0
    for row, label, wanted in zip(
        given, targets.classes.tolist(), targets.probabilities(CLASSES).double(), strict=True
    ):
        p = np.exp(row) / np.exp(row).sum()
        if isinstance(term, OwnProbability):
            total += (p[label] - float(wanted[label])) ** 2
        else:
            entropy = -sum(float(w) * np.log(q) for w, q in zip(wanted, p, strict=True))
            hit = sum(float(w) * q for w, q in zip(wanted, p, strict=True))
            total += (1 - hit) ** term.focus * entropy
    return total / len(given)


@pytest.mark.parametrize("term", TERMS, ids=repr)
@pytest.mark.parametrize("rule", [uniform, Softened(0.4)], ids=["hard", "soft"])
def test_against_numpy_in_pieces_and_with_gradients(term: Any, rule: Any) -> None:
    targets, x = drawn(rule), scores().requires_grad_()
    bound = term.bind(CONTEXT)
    assert bound.fetch == ("scores",)
    whole = bound(look(x, targets))
    assert float(whole.detach()) == pytest.approx(reference(term, x.detach().numpy(), targets), rel=1e-6)
    parts = [bound(look(x[a:b], targets.rows(a, b - a), a)) for a, b in ((0, 2), (2, 7))]
    assert term.separable
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
    assert torch.autograd.gradcheck(lambda y: bound(look(y, targets)), x)


def test_plain_cross_entropy_is_torchs() -> None:
    targets, x = drawn(uniform), scores()
    expected = torch.nn.functional.cross_entropy(x, targets.classes)
    assert float(CrossEntropy().bind(CONTEXT)(look(x, targets))) == pytest.approx(float(expected), rel=1e-12)


def test_focus_leaves_alone_what_is_recognised() -> None:
    """The share of an image's gradient falls with its certainty, and stays finite where it is certain to the last bit."""
    classes = torch.zeros(3, dtype=torch.int64)
    x = torch.tensor([[0.0, 1, 0, 0, 0], [4.0, 0, 0, 0, 0], [200.0, 0, 0, 0, 0]]).requires_grad_()
    slopes = {}
    for focus in (0.0, 0.5, 2.0):
        loss = CrossEntropy(focus=focus).bind(CONTEXT)(look(x, Targets(classes), batch=3))
        (slope,) = torch.autograd.grad(loss, x)
        assert bool(torch.isfinite(slope).all())
        slopes[focus] = slope.norm(dim=1)
    assert float(slopes[2.0][1] / slopes[2.0][0]) < 0.2 * float(slopes[0.0][1] / slopes[0.0][0])
    assert float(slopes[2.0][2]) == 0


def test_the_soft_label_asks_for_no_more_than_it_says() -> None:
    targets = Targets(torch.tensor([1]), torch.tensor([[0.0, 0.7, 0.0]]))
    bound = OwnProbability().bind(CONTEXT)
    x = torch.log(torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64)).requires_grad_()
    loss = bound(look(x, targets, batch=1))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    more = torch.log(torch.tensor([[0.1, 0.8, 0.1]], dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(bound(look(more, targets, batch=1)), more)
    assert float(slope[0, 1]) > 0  # too certain: back


def test_scores_with_axes_of_one() -> None:
    targets, x = drawn(uniform), scores()
    bound = CrossEntropy().bind(CONTEXT)
    assert torch.equal(bound(look(x[:, :, None, None], targets)), bound(look(x, targets)))
