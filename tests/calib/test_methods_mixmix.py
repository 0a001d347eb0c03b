"""MixMix: pasting, mixed labels, several networks, and the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from zsq_deploy.calib.methods.deepinversion import LOSS
from zsq_deploy.calib.parts.bn_loss import BNMatcher
from zsq_deploy.calib.parts.labels import Targets, find_labels
from zsq_deploy.calib.parts.mixing import Paste, pasted
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.terms.base import Context, Look
from zsq_deploy.calib.parts.terms.networks import Zoo
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model import Model, Preprocess, Twin

from . import method_checks as checks
from .method_checks import random

CPU = torch.device("cpu")
QUICK = {"steps": 7, "warmup": 2}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=random(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    box=st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(1, 9), st.integers(1, 11)), seed=st.integers(0, 9)
)
def test_pasting_is_interpolating_into_the_box(box: tuple[int, int, int, int], seed: int) -> None:
    top, left, tall, wide = box[0], box[1], min(box[2], 9 - box[0]), min(box[3], 11 - box[1])
    images, others = noise(2, 3, 9, 11, seed=seed), noise(2, 3, 9, 11, seed=seed + 1)
    boxes = torch.tensor([[top, left, tall, wide], [0, 0, 0, 0]])
    made = pasted(images, others, boxes)
    expected = images.clone()
    expected[0, :, top : top + tall, left : left + wide] = F.interpolate(
        others[:1], size=(tall, wide), mode="bilinear", align_corners=False
    )[0]
    torch.testing.assert_close(made, expected)


def test_gradients_go_into_both_images() -> None:
    boxes = torch.tensor([[1, 0, 3, 4], [0, 2, 5, 2]])
    images, others = noise(2, 1, 6, 5).requires_grad_(), noise(2, 1, 6, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: pasted(a, b, boxes), (images, others))


def test_labels_are_mixed_by_area() -> None:
    paste, targets = Paste(1.0, 0.3, 0.9), Targets(torch.tensor([0, 2, 1, 1]))
    seen = set()
    for seed in range(20):
        plan = paste.draw((4, 3, 10, 8), random(seed), 0, 1)
        mixed = paste.mix(targets, plan, 3)
        assert mixed.soft is not None
        partners = plan["partner"].tolist()
        assert sorted(partners) == [0, 1, 2, 3]
        assert all(partner != own for own, partner in enumerate(partners))
        for i, (top, left, tall, wide) in enumerate(plan["box"].tolist()):
            assert top + tall <= 10
            assert left + wide <= 8
            assert 3 <= tall <= 9
            expected = torch.zeros(3)
            share = tall * wide / 80
            expected[targets.classes[i]] += 1 - share
            expected[targets.classes[partners[i]]] += share
            torch.testing.assert_close(mixed.soft[i], expected)
            seen.add((tall, wide))
    assert len(seen) > 8


def test_unmixed_steps_leave_images_and_labels_alone() -> None:
    targets, images = Targets(torch.tensor([0, 1])), noise(2, 3, 8, 8)
    for paste, count in ((Paste(0.0), 2), (Paste(1.0), 1)):  # never; and an image alone has no partner
        plan = paste.draw((count, 3, 8, 8), random(), 0, 1)
        assert paste.apply(images[:count], plan) is not None
        assert torch.equal(paste.apply(images[:count], plan), images[:count])
        assert paste.mix(targets.rows(0, count), plan, 2).soft is None
    always = Paste(1.0)
    plan = {name: rows[:1] for name, rows in always.draw((2, 3, 8, 8), random(), 0, 1).items()}
    with pytest.raises(ValueError, match="whole batches"):
        always.apply(images[:1], plan)
    with pytest.raises(ValueError, match="share"):
        Paste(least=0.8, most=0.2)


def context(model: Model, *others: Model) -> Context:
    space = InputSpace.of(model.inputs[0], model.preprocess)
    labels = find_labels(model.graph, model.outputs)
    return Context(model, prepare(model), model.inputs[0], space, labels, CPU, torch.float32, others=others)


def alone(model: Model, images: torch.Tensor, targets: Targets) -> float:
    """DeepInversion's loss of one network, operator by operator."""
    space, network = InputSpace.of(model.inputs[0], model.preprocess), prepare(model, fast=False)
    names = [layer.value for layer in network.layers]
    (input_name,), (output,) = ([spec.name for spec in part] for part in (model.inputs, model.outputs))
    found = Twin(model.graph, device="cpu").run({input_name: space.to_network(images)}, fetch=[*names, output])
    total = 0.0
    for index, layer in enumerate(network.layers):
        z = found[layer.value].double()
        mean, var = z.mean((0, 2, 3)).numpy(), z.var((0, 2, 3), unbiased=False).numpy()
        gap = np.sqrt(np.square(mean - layer.mean).sum()) + np.sqrt(np.square(var - layer.var).sum())
        total += (10 if index == 0 else 1) * gap
    wanted = targets.probabilities(4).double()
    return 3.0 * total + 2.0 * float(-(wanted * found[output].double().log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("count", [0, 2])
def test_the_term_is_the_mean_over_networks(classifier: Callable[..., Model], count: int) -> None:
    """Also where the others take raw pixels or end in a softmax."""
    first = classifier()
    others = [classifier(Preprocess(raw_pixels=True)), classifier()][:count]
    found = context(first, *others)
    bound = Zoo(LOSS, 3.0, 2.0).bind(found)
    images = torch.randn((5, 3, 12, 10), generator=random(2)).requires_grad_()
    targets = Targets(torch.tensor([0, 1, 2, 3, 0]), F.softmax(torch.randn(5, 4, generator=random(3)), 1))
    store: dict = {}
    taps = BNMatcher(LOSS, found.network.layers, affine=found.network.affine, bounds=found.network.bounds).taps(store)
    twin = Twin(found.network.graph, device="cpu")
    values = twin.run({"image": found.space.to_network(images)}, fetch=bound.fetch, taps=taps)
    value = bound(Look(images, images, values, store, targets, 0, 1, 5, 0, {}))
    with torch.no_grad():
        expected = np.mean([alone(model, images, targets) for model in (first, *others)])
    assert float(value.detach()) == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert float(images.grad.abs().sum()) > 0


def test_networks_that_do_not_fit_are_refused(classifier: Callable[..., Model]) -> None:
    first = classifier()
    for other, reason in (
        (classifier(shape=(8, 8)), "input"),
        (classifier(classes=5), "5 classes"),
        (replace_graph(first), "no batch-norm"),
    ):
        with pytest.raises(CalibrationError, match=reason):
            checks.made(first, "mixmix", parameters=QUICK, others=[other])
    with pytest.raises(UsageError, match="one network"):
        checks.made(first, "synq", others=[first])


def replace_graph(model: Model) -> Model:
    return replace(model, graph=model.folded().graph)


def test_another_network_changes_the_images(classifier: Callable[..., Model]) -> None:
    first = classifier()
    alone = checks.pixels(first, "mixmix", QUICK)
    assert not np.allclose(
        checks.pixels(first, "mixmix", QUICK, others=[classifier(Preprocess(raw_pixels=True))]), alone
    )
    # A copy of itself is one more voice that says the same.
    assert np.allclose(checks.pixels(first, "mixmix", QUICK, others=[first]), alone, atol=1e-3)


def test_mixing_changes_the_images(classifier: Callable[..., Model]) -> None:
    model = classifier()
    mixed, whole = (checks.pixels(model, "mixmix", {**QUICK, "mix": share}) for share in (1.0, 0.0))
    assert not np.allclose(mixed, whole)


def test_it_lowers_its_loss(classifier: Callable[..., Model]) -> None:
    first, last = checks.losses(classifier(), "mixmix", {"steps": 60, "warmup": 5, "mix": 0.0})
    assert last["loss"] < 0.5 * first["loss"]


def test_same_seed_same_bits(classifier: Callable[..., Model]) -> None:
    checks.check_same_seed_same_bits(classifier(), "mixmix", QUICK)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 99))
def test_it_resumes_exactly(
    at: int, classifier: Callable[..., Model], recorder: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checks.check_resumes_exactly(classifier(), "mixmix", QUICK, recorder, Path(tmp_path_factory.mktemp("mixmix")), at)


def test_any_picture(classifier: Callable[..., Model]) -> None:
    checks.check_any_picture(classifier, "mixmix", {"steps": 12, "warmup": 2})


def test_a_network_without_classes_is_refused(without_classes: Model) -> None:
    checks.check_needs_classes(without_classes, "mixmix")


@pytest.fixture(scope="module")
def without_classes(classifier: Callable[..., Model]) -> Model:
    return checks.without_classes(classifier())
