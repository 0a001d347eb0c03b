"""Synthesis on real networks: the loss against hooked torch modules, dead channels, and what comes out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts import native
from zsq_deploy.calib.parts.engine import Objective
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.model import Model, Preprocess, load_model

pytestmark = pytest.mark.assets

IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CENTRED = Preprocess(mean=(0.5,), std=(0.5,))


def objective(method: str, model: Model, *, fast: bool, dtype: torch.dtype = torch.float32) -> Objective:
    chosen = METHODS[method]
    assert chosen.run is not None
    recipe = chosen.run({**chosen.defaults, "clip": False, **({"swing": 0} if method == "genie" else {})})
    space = InputSpace(None, None, None, None, None, None)
    network = prepare(model, fast=fast)
    return Objective(recipe, network, model.inputs[0], space, device=torch.device("cpu"), dtype=dtype)


def eager(method: str, module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The loss of the paper's code: hooked batch-norm inputs, torch.var, plain layout."""
    seen: list[tuple[nn.BatchNorm2d, torch.Tensor]] = []
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(lambda part, given: seen.append((part, given[0]))) for norm in norms]
    module(images)
    for hook in hooks:
        hook.remove()
    axes = (2, 3) if method == "zeroq" else (0, 2, 3)
    prior = images.mean((2, 3)).square().sum() + ((images.var((2, 3)) + 1e-6).sqrt() - 1).square().sum()
    total = prior / len(images) if method == "zeroq" else prior
    for norm, z in seen:
        gap = (z.mean(axes) - norm.running_mean).square().sum()
        gap = gap + ((z.var(axes) + 1e-6).sqrt() - (norm.running_var + 1e-6).sqrt()).square().sum()
        total = total + gap / z.shape[1]
    return total


@pytest.mark.parametrize("method", ["zeroq", "genie"])
@pytest.mark.parametrize(
    ("file", "maker", "weights", "size"),
    [
        ("cifar_resnet", "resnet20", "resnet20_cifar10", 32),
        ("mobilenet", "mobilenet_v1_025", "mobilenet_v1_025_imagenet", 224),
    ],
)
def test_onnx_form_gives_the_loss_of_the_torch_module(
    assets: Path, monkeypatch: pytest.MonkeyPatch, method: str, file: str, maker: str, weights: str, size: int
) -> None:
    monkeypatch.syspath_prepend(str(assets / "models"))
    module = getattr(__import__(file), maker)()
    module.load_state_dict(load_file(assets / "models" / f"{weights}.safetensors"))
    module.eval().requires_grad_(requires_grad=False)
    model = load_model(assets / "models" / f"{weights}.onnx")
    noise = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    x = noise.contiguous(memory_format=torch.channels_last).requires_grad_()
    value = objective(method, model, fast=True).backward(x)["loss"]
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        y = noise.clone().to(dtype).requires_grad_()
        expected = eager(method, module.to(dtype), y)
        expected.backward()
        gradients[dtype] = y.grad.double()
    sys.modules.pop(file, None)
    exact = gradients[torch.float64]
    assert value == pytest.approx(expected.item(), rel=1e-4)
    # Rectifiers flip where rounding decides, in the eager float32 form just as well.
    own = float((gradients[torch.float32] - exact).norm() / exact.norm())
    assert float((x.grad - exact).norm() / exact.norm()) < max(1e-3, 2 * own)
    assert own < 1e-2


NETWORKS = {
    "mlperf_tiny_resnet8_cifar10": Preprocess(raw_pixels=True),
    "mlperf_tiny_mobilenet_v1_025_vww": Preprocess(),
    "ultraface_rfb320": Preprocess(mean=(127 / 255,), std=(128 / 255,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_and_plain_graphs_agree(assets: Path, name: str) -> None:
    model = load_model(assets / "models" / f"{name}.onnx", preprocess=NETWORKS[name])
    shape = model.inputs[0].with_batch(2)
    results = []
    for fast in (True, False):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        value = objective("zeroq", model, fast=fast, dtype=torch.float64).backward(x)["loss"]
        results.append((value, x.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert float((results[0][1] - results[1][1]).norm() / results[1][1].norm()) < 1e-5


@pytest.mark.parametrize("method", ["zeroq", "genie"])
@pytest.mark.parametrize("loops", [True, False])
def test_what_comes_out(assets: Path, method: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the compiled loops: valid images, closer to the stored statistics than noise by far."""
    if not loops:
        monkeypatch.setattr(native, "kernels", lambda: None)
    model = load_model(assets / "models" / "mlperf_tiny_resnet8_cifar10.onnx", preprocess=Preprocess(raw_pixels=True))
    parameters = {"steps": 40}
    made = synthesize(model, method=method, images=16, device="cpu", parameters=parameters)
    images = made.arrays()["input_1"] if "input_1" in made.input_names else next(iter(made.arrays().values()))
    assert np.isfinite(images).all()
    assert images.min() >= 0
    assert images.max() <= 255
    outcome = made.manifest.parameters["outcome"]
    assert outcome["last"][0]["loss"] < 0.1 * outcome["first"][0]["loss"]
