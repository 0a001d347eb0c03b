"""Mixed precision: what is rounded, what is not, and that images come out as good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.engine import Objective
from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.precision import resolved
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Recipe
from zsq_deploy.calib.parts.terms.base import Context
from zsq_deploy.errors import InterruptedRunError, StaleArtifactError, UsageError
from zsq_deploy.model import Model, Twin

from . import method_checks as checks
from .method_checks import random

CPU = torch.device("cpu")


class Watched(TorchDispatchMode):
    """Types of the first argument of every convolution and matrix product, and of everything else that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[torch.dtype] = set()
        self.sums: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if "convolution" in name or "aten.mm" in name or "addmm" in name:
            self.products.add(args[0].dtype)
        elif "mean" in name or "sum" in name or "log_softmax" in name:
            self.sums.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def objective(model: Model, method: str, **more: Any) -> Objective:
    made = METHODS[method]
    assert made.run is not None
    recipe = made.run(made.defaults)
    assert isinstance(recipe, Recipe)
    space = InputSpace.of(model.inputs[0], model.preprocess)
    network, labels = prepare(model), find_labels(model.graph, model.outputs)
    context = Context(model, network, model.inputs[0], space, labels, CPU, torch.float32)
    return Objective(recipe, network, model.inputs[0], space, device=CPU, context=context, **more)


def smooth(count: int = 8) -> torch.Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=random(3))
    return torch.nn.functional.interpolate(coarse, size=(12, 10), mode="bilinear")


@pytest.mark.parametrize("method", ["zeroq", "deepinversion", "dgh", "fast"])
def test_products_are_rounded_and_sums_are_not(classifier: Callable[..., Model], method: str) -> None:
    """Forward and backward; loss and gradient stay near those in float32, without being the same."""
    model, found = classifier(), {}
    for precision in ("float32", "bfloat16"):
        images = smooth().requires_grad_()
        made = objective(model, method, precision=precision)
        with Watched() as watched:
            value = made.backward(images, made.rehearsal((8, 3, 12, 10)))["loss"]
        assert images.grad is not None
        assert images.grad.dtype == torch.float32
        found[precision] = value, images.grad, watched
    exact, rounded = found["float32"], found["bfloat16"]
    assert exact[2].products == {torch.float32}
    assert torch.bfloat16 in rounded[2].products
    assert torch.bfloat16 not in rounded[2].sums
    assert rounded[0] != exact[0]
    assert rounded[0] == pytest.approx(exact[0], rel=0.02)
    assert float(torch.cosine_similarity(exact[1].flatten(), rounded[1].flatten(), 0)) > 0.98


def test_float32_is_what_it_was(classifier: Callable[..., Model]) -> None:
    """The default opens no block of mixed precision."""
    model = classifier()
    plain = checks.pixels(model, "fast", {"steps": 5})
    assert np.array_equal(plain, checks.pixels(model, "fast", {"steps": 5}, precision="float32"))
    assert np.array_equal(plain, checks.pixels(model, "fast", {"steps": 5}, precision="auto"))  # no GPU: the same
    assert not np.array_equal(plain, checks.pixels(model, "fast", {"steps": 5}, precision="bfloat16"))


def distance(model: Model, images: np.ndarray) -> float:
    """Root mean square gap of mean and deviation over all images, in float64, in stored standard deviations."""
    network, twin = prepare(model, fast=False), Twin(model.graph, device="cpu", dtype=torch.float64)
    found = twin.run({"image": torch.tensor(images, dtype=torch.float64)}, fetch=[x.value for x in network.layers])
    gaps = []
    for layer in network.layers:
        z, std = found[layer.value].numpy(), np.sqrt(layer.var)
        gaps += [np.square((z.mean((0, 2, 3)) - layer.mean) / std), np.square(z.std((0, 2, 3)) / std - 1)]
    return float(np.sqrt(np.concatenate(gaps).mean()))


def test_the_images_are_as_near_to_the_statistics(classifier: Callable[..., Model]) -> None:
    model, common = classifier(), {"images": 16, "batch_size": 16}
    start, exact, rounded = (
        distance(
            model, checks.pixels(model, "fast", {"steps": steps, "warmup": 2, "rate": rate}, **common, precision=p)
        )
        for steps, rate, p in ((1, 0.0, "float32"), (40, 0.1, "float32"), (40, 0.1, "bfloat16"))
    )
    assert rounded < 0.3 * start
    assert rounded < exact + 0.03  # bfloat16 keeps 8 bits


def test_it_is_said_and_belongs_to_the_run(
    classifier: Callable[..., Model], recorder: Callable, tmp_path: Path
) -> None:
    model, given = classifier(), {"parameters": {"steps": 6}}
    said = checks.made(model, "fast", **given, precision="bfloat16").manifest.parameters
    assert said["outcome"]["precision"] == "bfloat16"
    assert checks.made(model, "fast", **given).manifest.parameters["outcome"]["precision"] == "float32"
    with pytest.raises(InterruptedRunError):
        checks.made(model, "fast", **given, workdir=tmp_path, progress=recorder(3))
    with pytest.raises(StaleArtifactError):
        checks.made(model, "fast", **given, workdir=tmp_path, resume=True, precision="bfloat16")


def test_words() -> None:
    assert resolved("auto", CPU) == resolved("float32", CPU) == "float32"
    assert resolved("bfloat16", CPU) == "bfloat16"
    with pytest.raises(UsageError, match="half"):
        resolved("half", CPU)
    for able, wanted in ((True, "bfloat16"), (False, "float32")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
            assert resolved("auto", torch.device("cuda")) == wanted
