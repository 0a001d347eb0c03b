"""TexQ: calibration centres, a generator led by them, images drawn from it; and the low-pass filter and stages of SynQ's images in their own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.bn_loss import Observed
from zsq_deploy.calib.parts.centres import ClassPixels, centre_statistics
from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.parametrisations import Start
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Preparation, stages
from zsq_deploy.calib.parts.terms.base import Context, Look
from zsq_deploy.calib.parts.terms.centres import CentreStatistics
from zsq_deploy.calib.parts.terms.texture import texture_energies
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model import Model, Twin

from . import method_checks as checks
from .method_checks import random

CPU = torch.device("cpu")
QUICK = {"centre_steps": 4, "generator_steps": 6, "generator_batch": 4, "latent": 8}


def context(model: Model, prepared: Mapping[str, torch.Tensor] | None = None) -> Context:
    space, labels = InputSpace.of(model.inputs[0], model.preprocess), find_labels(model.graph, model.outputs)
    return Context(model, prepare(model), model.inputs[0], space, labels, CPU, torch.float32, prepared=prepared or {})


def centres(model: Model, *batches: torch.Tensor) -> dict[str, torch.Tensor]:
    return centre_statistics(Preparation(context(model), 4, 4, [{"images": images} for images in batches]))


def test_centres_are_the_moments_of_all_images_together(classifier: Callable[..., Model]) -> None:
    """Batches of different sizes count by their images."""
    model = classifier()
    batches = [torch.randn((n, 3, 12, 10), generator=random(n)) * 1.5 + n for n in (3, 5)]
    found = centres(model, *batches)
    twin = Twin(model.graph, dtype=torch.float64, device="cpu")
    for index, layer in enumerate(prepare(model).layers):
        z = twin.run({"image": torch.cat(batches)}, fetch=(layer.value,))[layer.value]
        torch.testing.assert_close(found[f"centre.mean.{index}"], z.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        expected = z.var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(found[f"centre.var.{index}"], expected, rtol=1e-4, atol=1e-6)
    fixed = classifier(batch=2)
    pairs = [batches[0][:2], batches[1][:4]]
    torch.testing.assert_close(centres(fixed, *pairs)["centre.mean.1"], centres(model, *pairs)["centre.mean.1"])


def test_the_distance_from_the_centre(classifier: Callable[..., Model]) -> None:
    model = classifier()
    prepared = centres(model, torch.randn((6, 3, 12, 10), generator=random()))
    found = context(model, prepared)
    observed, expected = {}, {}
    for index, layer in enumerate(found.network.layers):
        mean, var = (torch.rand(layer.mean.shape, generator=random(index + k)) for k in (1, 9))
        observed[layer.value] = Observed(mean.requires_grad_(), var)
        a, b = prepared[f"centre.mean.{index}"].numpy(), prepared[f"centre.var.{index}"].numpy()
        gap = np.square(mean.detach().numpy() - a).mean() + np.square(var.numpy() - b).mean()
        expected[index] = gap / len(found.network.layers)
    images = torch.zeros(5, 3, 2, 2)
    look = Look(images, images, {}, observed, None, 0, 1, 5, 0, {})
    values = {
        name: float(CentreStatistics(layers=name, per_image=each).bind(found)(look).detach())
        for name, each in (("one", False), ("shallow_0_deep_1", True))
    }
    assert len(expected) == 2
    assert values["one"] == pytest.approx(sum(expected.values()), rel=1e-5)
    assert values["shallow_0_deep_1"] == pytest.approx(expected[1] / 5, rel=1e-5)
    CentreStatistics().bind(found)(look).backward()
    shallow, deep = (observed[layer.value].mean.grad for layer in found.network.layers)
    assert float(shallow.abs().sum()) == 0
    assert float(deep.abs().sum()) > 0


def test_each_image_has_the_class_of_its_place() -> None:
    from zsq_deploy.calib.parts.labels import LabelSpace

    start = Start((3, 3, 4, 4), random(), CPU, labels=LabelSpace("out", 5, ""), offset=4)
    assert ClassPixels(start, 100).targets.classes.tolist() == [4, 0, 1]
    # Of five classes three: the first, and two more at even distances.
    start = Start((4, 3, 4, 4), random(), CPU, labels=LabelSpace("out", 5, ""), offset=0)
    assert ClassPixels(start, 3).targets.classes.tolist() == [0, 1, 3, 0]


def test_stages_make_what_they_should(classifier: Callable[..., Model]) -> None:
    made = checks.made(classifier(classes=5), "texq", 7, parameters=QUICK)
    said = made.manifest.parameters
    first, second = (stage["outcome"] for stage in said["earlier_stages"])
    assert first["batches"] == [3, 2]  # one image a class, in batches of at most 3
    assert second["batches"] == [4]  # one generator, whatever the batch size
    assert said["outcome"]["batches"] == [3, 2, 2]
    assert said["outcome"]["steps"] == [0, 0, 0]
    assert any("drawn" in note for note in made.manifest.notes)
    assert made.arrays()["image"].shape == (7, 3, 12, 10)
    few = checks.made(classifier(classes=5), "texq", 4, parameters={**QUICK, "centres": 2}).manifest.parameters
    assert few["earlier_stages"][0]["outcome"]["batches"] == [2]


def test_every_loss_falls(classifier: Callable[..., Model]) -> None:
    parameters = {**QUICK, "centre_steps": 40, "generator_steps": 60, "generator_batch": 8}
    said = checks.made(classifier(), "texq", batch_size=None, parameters=parameters).manifest.parameters
    for stage, share in zip(said["earlier_stages"], (0.6, 0.6), strict=True):
        first, last = stage["outcome"]["first"][0], stage["outcome"]["last"][0]
        assert last["loss"] < share * first["loss"]


def test_the_texture_loss_has_effect(classifier: Callable[..., Model]) -> None:
    """With a large weight the centres' textures are shared out; without it they are not."""
    model, found = classifier(shape=(16, 16)), {}
    recipe = stages(METHODS["texq"].run({**METHODS["texq"].defaults, **QUICK}))[0]  # type: ignore[misc]
    for weight in (0.0, 50.0):
        terms = tuple(replace(term, weight=weight) if term.name == "texture" else term for term in recipe.terms)
        from zsq_deploy.calib.parts.engine import BatchRun, Objective

        there = context(model)
        objective = Objective(
            replace(recipe, terms=terms), there.network, there.spec, there.space, device=CPU, context=there
        )
        run = BatchRun(objective, (4, 3, 16, 16), 0, 0)
        for _ in range(30):
            run.advance()
        energies = texture_energies(run.parametrisation.images().detach())
        shares = energies / energies.sum(1, keepdim=True)
        found[weight] = float((0.5 - shares.topk(3, 1).values.sum(1)).clamp_min(0).mean())
    assert found[50.0] < 0.5 * found[0.0]


def test_the_centre_has_effect(classifier: Callable[..., Model]) -> None:
    model = classifier()
    led, alone = (checks.pixels(model, "texq", {**QUICK, "centre_weight": weight}) for weight in (5.0, 0.0))
    assert not np.allclose(led, alone)


def test_same_seed_same_bits(classifier: Callable[..., Model]) -> None:
    checks.check_same_seed_same_bits(classifier(), "texq", QUICK)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 99))
def test_it_resumes_exactly(
    at: int, classifier: Callable[..., Model], recorder: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In any of its stages, with the generator's next latents."""
    checks.check_resumes_exactly(classifier(), "texq", QUICK, recorder, Path(tmp_path_factory.mktemp("texq")), at)


def test_any_picture(classifier: Callable[..., Model]) -> None:
    checks.check_any_picture(classifier, "texq", QUICK)


def test_what_it_cannot_do_is_refused(classifier: Callable[..., Model]) -> None:
    checks.check_needs_classes(checks.without_classes(classifier()), "texq")
    with pytest.raises(CalibrationError, match="5 x 5"):
        checks.made(classifier(shape=(4, 12)), "texq", parameters=QUICK)


def test_a_network_with_one_batch_size(classifier: Callable[..., Model]) -> None:
    made = checks.made(classifier(batch=2), "texq", 5, batch_size=None, parameters=QUICK)
    assert len(made) == 5
    assert made.manifest.parameters["earlier_stages"][1]["outcome"]["batches"] == [2]


@pytest.mark.parametrize("method", ["texq", "synq"])
def test_gaps_in_units_of_the_spread(classifier: Callable[..., Model], method: str) -> None:
    """A network that takes 0..255 then weighs its layers much like one whose input is normalised."""
    from zsq_deploy.model import Preprocess

    quick = {**QUICK, "relative": True} if method == "texq" else {"centre_steps": 2, "steps": 2, "relative": True}
    found = []
    for preprocess in (Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)), Preprocess(raw_pixels=True)):
        first, _ = checks.losses(classifier(preprocess), method, quick, 0)
        found.append(first["mean"] + first["spread"])
    assert found[1] < 20 * found[0]
    absolute, _ = checks.losses(classifier(Preprocess(raw_pixels=True)), method, {**quick, "relative": False}, 0)
    assert absolute["mean"] + absolute["spread"] > 1e3 * found[1]
