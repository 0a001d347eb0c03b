"""SynQ's images: the low-pass filter, and the method's stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.parts.lowpass import FilteredPixels, low_pass
from zsq_deploy.calib.parts.parametrisations import Start
from zsq_deploy.model import Model

from . import method_checks as checks
from .method_checks import random

QUICK = {"centre_steps": 4, "steps": 6}


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (7, 5)])
def test_each_frequency_is_multiplied(size: tuple[int, int]) -> None:
    """Against numpy's full, centred transform."""
    x = torch.randn((2, 3, *size), generator=random(), dtype=torch.float64)
    down, right = (np.arange(n) - n // 2 for n in size)
    gain = np.exp(-(down[:, None] ** 2 + right[None, :] ** 2) / (2 * 1.7**2))
    spectrum = np.fft.fftshift(np.fft.fft2(x.numpy()), axes=(-2, -1)) * gain
    expected = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))).real
    np.testing.assert_allclose(low_pass(x, 1.7).numpy(), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(low_pass(x, 1.7).mean((2, 3)), x.mean((2, 3)), atol=1e-12)
    np.testing.assert_allclose(low_pass(x, 1e6).numpy(), x.numpy(), atol=1e-9)


def test_a_wave_shrinks_by_its_frequency() -> None:
    """At 3 periods down and 4 across the distance is 5."""
    at = torch.arange(32, dtype=torch.float64)
    wave = torch.cos(2 * torch.pi * (3 * at[:, None] + 4 * at[None, :]) / 32)
    torch.testing.assert_close(low_pass(wave, 6.0), wave * np.exp(-25 / 72))


def test_only_finished_images_are_filtered() -> None:
    start = Start((2, 3, 8, 8), random(), torch.device("cpu"))
    made = FilteredPixels(start, 2.0)
    assert made.images() is made.pixels
    torch.testing.assert_close(made.finished(), low_pass(made.pixels.detach(), 2.0))
    plain = FilteredPixels(start, 0.0)
    assert torch.equal(plain.finished(), plain.pixels)


def test_the_filter_and_the_centre_have_effect(classifier: Callable[..., Model]) -> None:
    model = classifier()
    base = checks.pixels(model, "synq", {**QUICK, "cutoff": 0.0})
    sharp = checks.pixels(model, "synq", {**QUICK, "cutoff": 2.0})

    def fine(x: np.ndarray) -> float:
        return float(np.square(np.diff(x, axis=3)).mean())

    assert fine(sharp) < 0.5 * fine(base)
    led = checks.pixels(model, "synq", {**QUICK, "cutoff": 0.0, "centre_weight": 50.0})
    assert not np.allclose(led, base)
    assert not np.allclose(checks.pixels(model, "synq", {**QUICK, "cutoff": 0.0, "focus": 3.0}), base)


def test_every_loss_falls(classifier: Callable[..., Model]) -> None:
    parameters = {"centre_steps": 40, "steps": 40, "crop": 0.0}
    for stage in (0, 1):
        first, last = checks.losses(classifier(), "synq", parameters, stage)
        assert last["loss"] < 0.7 * first["loss"]


def test_classes_come_in_the_first_stage_and_are_drawn_in_the_second(classifier: Callable[..., Model]) -> None:
    said = checks.made(classifier(classes=5), "synq", 4, parameters=QUICK).manifest.parameters
    assert said["earlier_stages"][0]["outcome"]["batches"] == [3, 2]
    assert sum(said["outcome"]["batches"]) == 4
    assert all(0 <= label < 5 for batch in said["outcome"]["targets"] for label in batch)


def test_same_seed_same_bits(classifier: Callable[..., Model]) -> None:
    checks.check_same_seed_same_bits(classifier(), "synq", QUICK)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 99))
def test_it_resumes_exactly(
    at: int, classifier: Callable[..., Model], recorder: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checks.check_resumes_exactly(classifier(), "synq", QUICK, recorder, Path(tmp_path_factory.mktemp("synq")), at)


def test_any_picture(classifier: Callable[..., Model]) -> None:
    checks.check_any_picture(classifier, "synq", QUICK)


def test_a_network_without_classes_is_refused(classifier: Callable[..., Model]) -> None:
    checks.check_needs_classes(checks.without_classes(classifier()), "synq")
