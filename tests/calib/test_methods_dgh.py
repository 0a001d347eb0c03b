"""DGH: moments over all images in pieces, framed pixels, and the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.all_images import MomentTable
from zsq_deploy.calib.parts.bn_loss import BNLoss, Observed
from zsq_deploy.calib.parts.engine import BatchRun, Objective
from zsq_deploy.calib.parts.framed import FramedPixels, SmoothedWindow, margins, smoothed
from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.parametrisations import Start, pixels
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Plateau, ScheduleState
from zsq_deploy.calib.parts.terms import CrossEntropy, TotalVariation
from zsq_deploy.calib.parts.terms.base import Context, Look
from zsq_deploy.calib.parts.terms.output import OutputRange
from zsq_deploy.model import Model, Twin

from . import method_checks as checks
from .method_checks import random

CPU = torch.device("cpu")
QUICK = {"steps": 7, "piece": 2}


def moments(x: torch.Tensor) -> Observed:
    return Observed(x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), at=st.integers(0, 4), offset=st.sampled_from([0, 50]))
def test_the_table_gives_the_moments_of_the_whole(sizes: list[int], at: int, offset: float) -> None:
    """Against torch over the whole batch, with the gradient in one piece; also where the mean is large."""
    at %= len(sizes)
    values = {
        name: torch.randn((sum(sizes), c, 3, 2), generator=random(c), dtype=torch.float64) + offset
        for name, c in (("a", 2), ("b", 3))
    }
    pieces = {name: list(torch.split(x, sizes)) for name, x in values.items()}
    table = MomentTable(tuple(sizes), CPU, torch.float64)
    assert not table.filled
    for number in range(len(sizes)):
        table.keep(number, {name: moments(parts[number]) for name, parts in pieces.items()})
    assert table.filled
    live = {name: parts[at].clone().requires_grad_() for name, parts in pieces.items()}
    whole = {name: x.clone().requires_grad_() for name, x in values.items()}
    found = table.whole(at, {name: moments(x) for name, x in live.items()})
    start = sum(sizes[:at])
    for name in values:
        expected = moments(whole[name])
        torch.testing.assert_close(found[name].mean, expected.mean)
        torch.testing.assert_close(found[name].var, expected.var)
        for a, b in ((found[name].mean, expected.mean), (found[name].var, expected.var)):
            (ours,) = torch.autograd.grad(a.square().sum(), live[name], retain_graph=True)
            (theirs,) = torch.autograd.grad(b.square().sum(), whole[name], retain_graph=True)
            torch.testing.assert_close(ours, theirs[start : start + sizes[at]])
    other = MomentTable(tuple(sizes), CPU, torch.float64)
    other.load(table.state())
    again = other.whole(at, {name: moments(x) for name, x in live.items()})
    assert all(torch.equal(again[name].var, found[name].var) for name in values)


def objective(model: Model, recipe: Recipe, piece: int | None) -> Objective:
    space = InputSpace(None, None, None, None, None, None)
    network, labels = prepare(model), find_labels(model.graph, model.outputs)
    context = Context(model, network, model.inputs[0], space, labels, CPU, torch.float64)
    return Objective(
        recipe, network, model.inputs[0], space, device=CPU, dtype=torch.float64, piece=piece, context=context
    )


def all_images(loss: BNLoss, steps: int = 1, **more: object) -> Recipe:
    fields: dict = {"terms": (OutputRange(0.1),), "clip": False, "piece": 2, **more}
    return Recipe(loss, pixels, {"images": Group(0.1)}, steps, 7, **fields)


@pytest.mark.parametrize("input_layer", [False, True])
def test_the_first_step_in_pieces_is_that_of_the_whole_batch(
    classifier: Callable[..., Model], input_layer: bool
) -> None:
    """The table is filled before, so that loss and gradient are exact; memory is that of a piece."""
    loss = BNLoss(moment="std", norm="l2sq", divide_by="channels", eps=1e-6, reduce="mean", input_layer=input_layer)
    found = {}
    for piece in (2, None):
        run = BatchRun(objective(classifier(), all_images(loss), piece), (7, 3, 12, 10), 1, 0)
        run.parametrisation.pixels.data = run.parametrisation.pixels.data.double()
        values = run.advance()
        found[piece] = values, run.parametrisation.pixels.grad.clone()
    for name, value in found[None][0].items():
        assert found[2][0][name] == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(found[2][1], found[None][1], rtol=1e-8, atol=1e-12)
    assert found[2][0]["decided"] < 0


def test_the_input_counts_as_a_layer(classifier: Callable[..., Model]) -> None:
    """With it, the loss of the network is one of three layers, and the image's own moments are the third."""
    model = classifier()
    parts = {"moment": "std", "norm": "l2sq", "divide_by": "channels", "eps": 1e-6, "reduce": "mean"}
    x = torch.randn((4, 3, 12, 10), generator=random(3), dtype=torch.float64) * 1.7 + 0.4
    values = []
    for input_layer in (False, True):
        recipe = all_images(BNLoss(**parts, input_layer=input_layer), terms=())
        made = objective(model, recipe, None).backward(x.clone().requires_grad_())
        values.append(made["mean"] + made["spread"])
    mean, std = x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + 1e-6).sqrt()
    own = float((mean.square().sum() + (std - (1 + 1e-6) ** 0.5).square().sum()) / 3)
    assert values[1] == pytest.approx((2 * values[0] + own) / 3, rel=1e-9)


def test_pieces_need_sums_over_images() -> None:
    for loss, terms in (
        (BNLoss(per_sample=True), ()),
        (BNLoss(unbiased=True), ()),
        (BNLoss(), (TotalVariation(),)),
        (None, (CrossEntropy(),)),
    ):
        with pytest.raises(ValueError, match="remembered moments"):
            all_images(loss, terms=terms)


def test_smoothing_is_a_gaussian_and_windows_are_cut_out() -> None:
    x = torch.randn((2, 3, 9, 8), generator=random(), dtype=torch.float64)
    side = np.exp(-(np.arange(-1, 2) ** 2) / (2 * 1.25**2))
    kernel = np.outer(side, side) / side.sum() ** 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    expected = sum(kernel[a, b] * padded[:, :, a : a + 9, b : b + 8] for a in range(3) for b in range(3))
    np.testing.assert_allclose(smoothed(x, 1.25).numpy(), expected, rtol=1e-12, atol=1e-12)
    assert margins((1, 3, 224, 224), 1 / 7) == (32, 32)

    window = SmoothedWindow(margin=0.4)
    corners = set()
    for seed in range(60):
        plan = window.draw((2, 3, 7, 6), random(seed), 0, 1)
        top, left, height, width = plan["window"][0].tolist()
        corners.add((top, left))
        assert (height, width) == (7, 6)
        torch.testing.assert_close(window.apply(x, plan), smoothed(x, 1.25)[:, :, top : top + 7, left : left + 6])
        assert window.apply(x[:, :, :7, :6], plan).shape == (2, 3, 7, 6)
    assert corners == {(a, b) for a in range(3) for b in range(3)}
    assert torch.autograd.gradcheck(lambda y: window.apply(y, plan), x.requires_grad_())


def test_finished_images_are_the_smoothed_middle() -> None:
    made = FramedPixels(Start((2, 3, 7, 10), random(), CPU), margin=0.3, sigma=1.25)
    assert made.pixels.shape == (2, 3, 9, 13)
    torch.testing.assert_close(made.finished(), smoothed(made.pixels.detach(), 1.25)[:, :, 1:8, 1:11])


def test_decided_outputs(classifier: Callable[..., Model]) -> None:
    model = classifier()
    space = InputSpace(None, None, None, None, None, None)
    bound = OutputRange().bind(Context(model, prepare(model), model.inputs[0], space, None, CPU, torch.float32))
    out = torch.tensor([[1.0, -2.0, 0.0], [5.0, 5.0, 4.0]], requires_grad=True)
    images = torch.zeros(2, 1, 1, 1)
    look = Look(images, images, {bound.fetch[0]: out}, {}, None, 0, 1, 4, 0, {})
    value = bound(look)
    assert float(value.detach()) == -(3 + 1) / 4  # a piece of a batch of four
    value.backward()
    assert out.grad[0].tolist() == [-0.25, 0.25, 0.0]


def test_same_seed_same_bits(classifier: Callable[..., Model]) -> None:
    checks.check_same_seed_same_bits(classifier(), "dgh", QUICK)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 99))
def test_it_resumes_exactly(
    at: int, classifier: Callable[..., Model], recorder: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The table of moments belongs to the state: without it the steps behind the interruption would differ."""
    checks.check_resumes_exactly(classifier(), "dgh", QUICK, recorder, Path(tmp_path_factory.mktemp("dgh")), at)


def test_any_picture(classifier: Callable[..., Model]) -> None:
    checks.check_any_picture(classifier, "dgh", QUICK)


def test_it_lowers_its_loss(classifier: Callable[..., Model]) -> None:
    first, last = checks.losses(classifier(), "dgh", {"steps": 50, "piece": 2})
    assert last["mean"] + last["spread"] < 0.4 * (first["mean"] + first["spread"])


def test_all_images_share_their_statistics(classifier: Callable[..., Model]) -> None:
    """Over the set the statistics are nearer to the stored ones than those of its pieces are; with pieces alone it is the other way round."""
    model = classifier()
    network, twin = prepare(model, fast=False), Twin(model.graph, device="cpu")

    def distance(images: np.ndarray) -> float:
        found = twin.run({"image": torch.tensor(images)}, fetch=[layer.value for layer in network.layers])
        gaps = [np.square(found[layer.value].mean((0, 2, 3)).numpy() - layer.mean).mean() for layer in network.layers]
        return float(np.mean(gaps))

    common = {"images": 8, "batch_size": 8}
    together = checks.pixels(model, "dgh", {"steps": 60, "piece": 2}, **common)
    alone = checks.pixels(model, "dgh", {"steps": 60, "piece": 2}, images=8, batch_size=2)
    parts = {
        name: np.mean([distance(x[i : i + 2]) for i in range(0, 8, 2)])
        for name, x in (("together", together), ("alone", alone))
    }
    assert distance(together) < 0.6 * parts["together"]
    assert parts["together"] > 1.5 * parts["alone"]


def test_the_weak_loss_and_the_frame_have_effect(classifier: Callable[..., Model]) -> None:
    model = classifier()
    base = checks.pixels(model, "dgh", QUICK)
    for change in ({"output_weight": 1.0}, {"margin": 0.4}, {"smoothing": 3.0}):
        assert not np.allclose(checks.pixels(model, "dgh", {**QUICK, **change}), base)


def test_a_network_with_one_batch_size(classifier: Callable[..., Model]) -> None:
    """Pieces are what it takes; the statistics are still those of all images."""
    made = checks.made(classifier(batch=2), "dgh", 6, batch_size=None, parameters=QUICK)
    outcome = made.manifest.parameters["outcome"]
    assert outcome["piece"] == 2
    assert sum(outcome["batches"]) == 6
    assert len(outcome["batches"]) == 1


def test_the_plateau_forgets_its_best_loss() -> None:
    """Sony's schedule: after a fall of the step size, a loss worse than the best one ever is progress again."""
    rates = {}
    for reset in (False, True):
        schedule, state = Plateau(1, 0.5, 1e-4, reset=reset), ScheduleState()
        rates[reset] = [schedule.after(0, loss, 8.0, state) for loss in (1.0, 2.0, 2.0, 1.9, 1.8, 1.7)]
    assert rates[False] == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0]
    assert rates[True] == [8.0, 8.0, 4.0, 4.0, 4.0, 4.0]


def test_published_values() -> None:
    recipe = METHODS["dgh"].run(METHODS["dgh"].defaults)  # type: ignore[misc]
    assert isinstance(recipe, Recipe)
    group = recipe.groups["images"]
    assert (group.optimiser, group.rate, recipe.piece) == ("radam", 16.0, 32)
    assert (recipe.terms[0].weight, recipe.loss.input_layer, recipe.clip_seen) == (1e-5, True, True)
