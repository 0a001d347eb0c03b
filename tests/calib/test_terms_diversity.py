"""How much images' gradients agree with the closest other one: against double loops, memory, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zsq_deploy.calib.parts.student import Answer
from zsq_deploy.calib.parts.terms.diversity import closest_other

from .method_checks import random


def answer(count: int, seed: int) -> Answer:
    return Answer(
        torch.randn((count, 6), generator=random(seed), dtype=torch.float64),
        torch.randn((count, 4), generator=random(seed + 1), dtype=torch.float64),
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("earlier", [0, 3])
def test_it_is_the_loop_over_pairs(earlier: int) -> None:
    here, before = answer(5, 0), answer(earlier, 7) if earlier else None
    found = closest_other(here, before)
    for i in range(5):
        f, r = here.features[i].numpy(), here.residuals[i].numpy()
        others = [(here.features[j], here.residuals[j]) for j in range(5) if j != i]
        if before is not None:
            others += list(zip(before.features, before.residuals, strict=True))
        expected = max(abs(cosine(f, a.numpy()) * cosine(r, b.numpy())) for a, b in others)
        assert float(found[i]) == pytest.approx(expected, rel=1e-12)


def test_an_image_alone_has_no_other() -> None:
    assert closest_other(answer(1, 0)).tolist() == [0.0]


def test_a_copy_agrees_wholly_and_is_pushed_away() -> None:
    one = answer(3, 2)
    features = torch.cat([one.features, one.features[:1] + 0.01]).requires_grad_()
    residuals = torch.cat([one.residuals, one.residuals[:1]])
    total = closest_other(Answer(features, residuals))
    assert float(total[0].detach()) > 0.999
    total.sum().backward()
    with torch.no_grad():
        moved = closest_other(Answer(features - 0.1 * features.grad, residuals))
    assert float(moved.sum()) < float(total.sum().detach())


def test_no_gradient_goes_through_the_other_image() -> None:
    """Twice the pull on one side would be the gradient of the pair; the definition holds the other image."""
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    residuals = torch.ones(2, 3, dtype=torch.float64)
    found = closest_other(Answer(features, residuals))
    (to_first,) = torch.autograd.grad(found[0], features)
    assert torch.count_nonzero(to_first[1]) == 0
    # d cos(f, a) / df at |f| = |a| = 1 is a - cos f
    torch.testing.assert_close(to_first[0], torch.tensor([0.0, 0.8], dtype=torch.float64))
