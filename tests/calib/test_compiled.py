"""torch.compile in synthesis: the same loss, the same bits on every run, and a clear word where it cannot be had."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from zsq_deploy.calib.parts.moments import watch, watch_plainly
from zsq_deploy.errors import CalibrationError, InterruptedRunError, StaleArtifactError
from zsq_deploy.model import Model

from . import method_checks as checks
from .method_checks import random

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="torch.compile needs a C++ compiler"
)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bounds", [None, (0.0, math.inf), (0.0, 6.0)])
def test_the_plain_watch_is_the_watch(per_sample: bool, unbiased: bool, bounds: tuple[float, float] | None) -> None:
    sides = []
    for measure in (watch, watch_plainly):
        y = (torch.randn(3, 5, 4, 6, generator=random(1)) * 3 + 1).contiguous(memory_format=torch.channels_last)
        more = torch.randn(3, 5, 4, 6, generator=random(2)).contiguous(memory_format=torch.channels_last)
        y.requires_grad_(), more.requires_grad_()
        affine = torch.linspace(0.5, 2, 5), torch.linspace(-1, 1, 5)
        passed, mean, var = measure(
            y, per_sample=per_sample, unbiased=unbiased, affine=affine, addend=more, bounds=bounds
        )
        (passed.square().sum() + (3 * mean).sin().sum() + var.sqrt().sum()).backward()
        sides.append((passed, mean, var, y.grad, more.grad))
    for mine, plain in zip(*sides, strict=True):
        torch.testing.assert_close(plain, mine, rtol=2e-5, atol=2e-5)


@needs_compiler
def test_compiled_images_are_the_same_and_resume(
    classifier: Callable[..., Model], recorder: Callable, tmp_path: Path
) -> None:
    """One network, one method with statistics, classes and terms: compiled twice, interrupted and resumed, and plain."""
    model, given = classifier(), {"parameters": {"steps": 6}, "images": 4, "batch_size": 4}
    plain = checks.made(model, "deepinversion", **given)
    made = checks.made(model, "deepinversion", **given, compiled=True)
    assert made.manifest.parameters["outcome"]["compiled"] is True
    assert plain.manifest.parameters["outcome"]["compiled"] is False
    for moment in ("first", "last"):
        losses = [side.manifest.parameters["outcome"][moment][0] for side in (made, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    with pytest.raises(InterruptedRunError):
        checks.made(model, "deepinversion", **given, compiled=True, workdir=tmp_path, progress=recorder(3))
    with pytest.raises(StaleArtifactError, match="compiled"):
        checks.made(model, "deepinversion", **given, workdir=tmp_path, resume=True)
    again = checks.made(model, "deepinversion", **given, compiled=True, workdir=tmp_path, resume=True)
    assert np.array_equal(again.arrays()["image"], made.arrays()["image"])


def test_a_compiler_that_fails_is_named(classifier: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    def compiling(function: Callable, **options: object) -> Callable:
        assert options["fullgraph"] is True

        def fail(*_: object) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more lines")

        return fail

    monkeypatch.setattr(torch, "compile", compiling)
    with pytest.raises(CalibrationError, match=r"No working C\+\+ compiler found") as caught:
        checks.made(classifier(), "zeroq", parameters={"steps": 2}, compiled=True)
    assert "and more lines" not in str(caught.value)
    assert "g++" in (caught.value.remedy or "")


def test_swing_convolution_is_not_compiled_and_that_is_said(
    classifier: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("nothing was to be compiled"))
    made = checks.made(classifier(), "genie", parameters={"steps": 2}, compiled=True)
    assert made.manifest.parameters["outcome"]["compiled"] is False
    assert any("swing convolution" in note for note in made.manifest.notes)
