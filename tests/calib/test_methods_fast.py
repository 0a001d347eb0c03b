"""The method `fast`: where it starts, what it matches, and what every method keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.fractal import fractal
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.parametrisations import Start
from zsq_deploy.calib.parts.pictured import PicturedPixels, drawn
from zsq_deploy.calib.parts.recipe import Recipe
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.model import Model, Preprocess, Twin
from zsq_deploy.model.graph import TensorSpec

from . import method_checks as checks
from .method_checks import random

CPU = torch.device("cpu")
QUICK = {"steps": 7, "warmup": 2, "piece": 2}


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_standard_space_are_those_of_the_baseline(channels: int) -> None:
    """Standard space and back through the network's own preprocessing gives the `fractal` baseline's input."""
    spec = TensorSpec("image", (None, channels, 12, 10), np.dtype(np.float32))
    expected = fractal(spec, 4, seed=11, preprocess=Preprocess(raw_pixels=True))
    found = drawn((4, channels, 12, 10), 11).numpy().astype(np.float64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    if channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    levels = 255 * (found * std[:, None, None] + mean[:, None, None])
    np.testing.assert_allclose(levels, expected, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0, 1), count=st.integers(1, 9))
def test_a_share_of_the_images_starts_as_pictures(share: float, count: int) -> None:
    """That many of them, spread evenly; the others are the noise that they would have been anyway."""
    shape = (count, 3, 8, 8)
    made = PicturedPixels(Start(shape, random(3), CPU), share).pixels.detach()
    noise = torch.randn(shape, generator=random(3))
    changed = [k for k in range(count) if not torch.equal(made[k], noise[k])]
    assert len(changed) == int(count * share)
    gaps = np.diff(changed)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    low, high = -0.485 / 0.229, (1 - 0.406) / 0.225  # of the darkest and of the brightest pixel, over the channels
    assert all(made[k].min() >= low - 1e-5 and made[k].max() <= high + 1e-5 for k in changed)


@pytest.mark.parametrize("shape", [(4, 6, 8, 8), (4, 3, 20)])
def test_what_is_no_picture_starts_as_noise(shape: tuple[int, ...]) -> None:
    made = PicturedPixels(Start(shape, random(3), CPU), 1.0).pixels.detach()
    assert torch.equal(made, torch.randn(shape, generator=random(3)))


def test_same_seed_same_bits(classifier: Callable[..., Model]) -> None:
    checks.check_same_seed_same_bits(classifier(), "fast", QUICK)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 99))
def test_it_resumes_exactly(
    at: int, classifier: Callable[..., Model], recorder: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checks.check_resumes_exactly(classifier(), "fast", QUICK, recorder, Path(tmp_path_factory.mktemp("fast")), at)


def test_any_picture(classifier: Callable[..., Model]) -> None:
    checks.check_any_picture(classifier, "fast", QUICK)


def test_a_network_without_classes_will_do(classifier: Callable[..., Model]) -> None:
    images = checks.pixels(checks.without_classes(classifier()), "fast", QUICK)
    assert images.shape == (6, 3, 12, 10)


def test_a_network_without_batch_norm_gets_pictures(classifier: Callable[..., Model]) -> None:
    model = classifier()
    folded = Model(model.folded().graph, model.preprocess, "folded", "folded.onnx", model.dynamic_batch)
    made = synthesize(folded, method="fast", images=2, device="cpu")
    assert made.manifest.method == "fractal"


def distance(model: Model, images: np.ndarray) -> float:
    """Squared gaps of mean and deviation over all images in units of each layer's mean variance, mean over layers."""
    network, twin = prepare(model, fast=False), Twin(model.graph, device="cpu", dtype=torch.float64)
    found = twin.run({"image": torch.tensor(images, dtype=torch.float64)}, fetch=[x.value for x in network.layers])
    gaps = []
    for layer in network.layers:
        z = found[layer.value].numpy()
        first = np.square(z.mean((0, 2, 3)) - layer.mean).mean()
        gaps.append((first + np.square(z.std((0, 2, 3)) - np.sqrt(layer.var)).mean()) / layer.var.mean())
    return float(np.mean(gaps))


def test_a_few_steps_bring_the_pictures_to_the_statistics(classifier: Callable[..., Model]) -> None:
    """Over all images, and computed apart from the loss; from pictures it gets nearer than from noise."""
    model = classifier()
    given = {"piece": 4, "warmup": 2}
    images = {
        name: checks.pixels(model, "fast", {**given, **more}, images=12, batch_size=12)
        for name, more in (
            ("start", {"steps": 1, "rate": 0.0}),
            ("fast", {"steps": 40}),
        )
    }
    pictures, made = (distance(model, images[name]) for name in ("start", "fast"))
    assert made < 0.1 * pictures
    assert not np.allclose(images["start"], images["fast"])


def test_an_input_of_any_scale_takes_the_same_steps(classifier: Callable[..., Model]) -> None:
    """The same network behind another preprocessing gives the same pictures: steps are taken in standard space, gaps in units of the layer."""
    plain = classifier(Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3))
    first, last = checks.losses(plain, "fast", {"steps": 30, "warmup": 2, "piece": 2})
    raw_first, raw_last = checks.losses(
        classifier(Preprocess(raw_pixels=True)), "fast", {"steps": 30, "warmup": 2, "piece": 2}
    )
    for a, b in ((first, last), (raw_first, raw_last)):
        assert b["mean"] + b["spread"] < 0.5 * (a["mean"] + a["spread"])


def test_every_parameter_has_an_effect(classifier: Callable[..., Model]) -> None:
    model = classifier()
    base = checks.pixels(model, "fast", QUICK)
    for change in ({"pictures": 0.5}, {"jitter": 0.0}, {"mirror": 0.0}, {"rate": 0.2}, {"warmup": 5}, {"clip": False}):
        assert not np.allclose(checks.pixels(model, "fast", {**QUICK, **change}), base), change


def test_it_is_short() -> None:
    """What it is for: a twentieth of Genie's published work an image, and less; no labels, no generator."""
    run = METHODS["fast"].run
    assert run is not None
    made = run(METHODS["fast"].defaults)
    assert isinstance(made, Recipe)
    assert made.steps * 50 <= 4000
    assert not made.needs_labels
