"""Building blocks of the families that the op table promises, exported by torch, against torch itself in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from zsq_deploy.model import load_model
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin

sys.path.insert(0, str(Path(__file__).parent / "ops"))
from one_node import by_runtime, by_twin


class UNet(nn.Module):
    """One level down and up, a skip connection, both ways of upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.1), nn.MaxPool2d(2))
        self.middle = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=2, dilation=2), nn.InstanceNorm2d(8, affine=True), nn.SiLU()
        )
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(4 + 8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.down(x))
        smooth = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        return torch.sigmoid(self.out(torch.cat([self.up(y), smooth], 1)))


class SuperResolution(nn.Module):
    """FSRCNN and ESPCN endings: PReLU, transposed convolution with output padding, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.PReLU(8))
        self.deconvolution = nn.ConvTranspose2d(8, 1, 9, stride=3, padding=4, output_padding=2)
        self.shuffle = nn.Sequential(nn.Conv2d(8, 9, 3, padding=1), nn.PixelShuffle(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.deconvolution(y) + self.shuffle(y) + F.interpolate(x, scale_factor=3, mode="bicubic")


class Mobile(nn.Module):
    """Inverted residual with squeeze and excitation, a channel shuffle, and cheap "ghost" maps."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.cheap = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        y = torch.cat([y, self.cheap(y)], 1) + x
        n, c, h, w = y.shape
        left, right = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
        return torch.cat([left, F.gelu(right)], 1).mean((2, 3))


class ShiftedWindow(nn.Module):
    """Swin's attention: cyclic shift, window partition, relative position bias, layer norm, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(49, 2))
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        relative = places[:, :, None] - places[:, None, :] + 3
        self.register_buffer("index", relative[0] * 7 + relative[1])
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
        y = (((q * 0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        y = x + torch.roll(y, (2, 2), (1, 2))
        return (y + self.mlp(y)).flatten(1, 2)


class ClassToken(nn.Module):
    """A vision transformer's stem and block with torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 17, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.position
        z = self.norm(y)
        return (y + self.attention(z, z, z, need_weights=False)[0])[:, 0]


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "unet": (UNet, (3, 16, 16)),
    "super-resolution": (SuperResolution, (1, 8, 9)),
    "mobile": (Mobile, (8, 12, 12)),
    "shifted-window": (ShiftedWindow, (8, 8, 8)),
    "class-token": (ClassToken, (3, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exported_network(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    twin = load_model(network, input_shape=(1, *shape)).twin(dtype=torch.float64, device="cpu")
    for batch in (1, 3):
        x = torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True)
        expected = network.double()(x)
        found = twin(x)
        assert found.shape == expected.shape
        assert float((found - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-6
        ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-6


def test_detector_head() -> None:
    """A YOLO-style head with its decoding, best-class choice and suppression, against ONNX Runtime."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(1, 36, 2).astype(np.float32)
    constants: dict[str, Any] = {
        "w": rng.standard_normal((9, 4, 1, 1)).astype(np.float32),
        "flat": np.array([0, 9, -1], np.int64),
        "parts": np.array([2, 2, 1, 4], np.int64),
        "grid": grid,
        "two": np.array(2, np.float32),
        "half": np.array(0.5, np.float32),
        "stride": np.array(8, np.float32),
        "most": np.array([5], np.int64),
        "overlap": np.array([0.45], np.float32),
        "score": np.array([0.1], np.float32),
        "column": np.array(2, np.int64),
        "first": np.array([0], np.int64),
        "k": np.array([3], np.int64),
        "last": np.array([-1], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Reshape", ["c", "flat"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Sigmoid", ["t"], ["p"]),
        helper.make_node("Split", ["p", "parts"], ["xy", "wh", "object", "kinds"], axis=2),
        helper.make_node("Mul", ["xy", "two"], ["xy2"]),
        helper.make_node("Sub", ["xy2", "half"], ["xy3"]),
        helper.make_node("Add", ["xy3", "grid"], ["xy4"]),
        helper.make_node("Mul", ["xy4", "stride"], ["centre"]),
        helper.make_node("Mul", ["wh", "two"], ["wh2"]),
        helper.make_node("Pow", ["wh2", "two"], ["wh3"]),
        helper.make_node("Mul", ["wh3", "stride"], ["extent"]),
        helper.make_node("Concat", ["centre", "extent"], ["boxes"], axis=-1),
        helper.make_node("Mul", ["object", "kinds"], ["scores"]),
        helper.make_node("Transpose", ["scores"], ["ordered"], perm=[0, 2, 1]),
        helper.make_node(
            "NonMaxSuppression", ["boxes", "ordered", "most", "overlap", "score"], ["kept"], center_point_box=1
        ),
        helper.make_node("Gather", ["kept", "column"], ["which"], axis=1),
        helper.make_node("Squeeze", ["boxes", "first"], ["one"]),
        helper.make_node("Gather", ["one", "which"], ["chosen"], axis=0),
        helper.make_node("ReduceMax", ["scores"], ["best"], axes=[-1], keepdims=0),
        helper.make_node("ArgMax", ["scores"], ["kind"], axis=-1, keepdims=0),
        helper.make_node("TopK", ["best", "k"], ["top", "place"]),
        helper.make_node("GatherElements", ["kind", "place"], ["names"], axis=1),
    ]
    outputs = ["kept", "chosen", "top", "place", "names"]
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    head = Graph(onnx.shape_inference.infer_shapes(model))
    x = rng.standard_normal((1, 4, 6, 6)).astype(np.float32)
    expected, found = by_runtime(head, {"x": x}), by_twin(head, {"x": x})
    assert len(expected["kept"]) > 3
    for name in outputs:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
    # the part before the suppression has a gradient
    points = torch.from_numpy(x).requires_grad_()
    Twin(head, device="cpu").run({"x": points}, ["chosen"])["chosen"].sum().backward()
    assert points.grad is not None
    assert points.grad.abs().sum() > 0
