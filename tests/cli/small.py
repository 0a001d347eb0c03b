"""A network that is deployed in a second or two, as ONNX and as torch code, and labelled images for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

CLASSES = 5
SIZE = 8

TORCH_CODE = """
from torch import nn


def build(channels=3, classes=5):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )


def gray():
    return build(1)
"""


def network(channels: int = 3, seed: int = 0) -> nn.Sequential:
    """The network with batch-norm statistics of noise."""
    scope: dict[str, object] = {}
    exec(TORCH_CODE, scope)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Sequential = scope["build"](channels, CLASSES)  # type: ignore[operator]
        net.train()
        for _ in range(30):
            net(torch.rand(64, channels, SIZE, SIZE))
        with torch.no_grad():  # well separated logits: 8 bits must not decide between classes
            net[8].weight.mul_(8)
    return net.eval()


def onnx_model(channels: int = 3, seed: int = 0, *, shape: tuple[object, ...] | None = None) -> onnx.ModelProto:
    """The same network, batch norm kept, written without any exporter."""
    net = network(channels, seed)
    weights = {name: tensor.detach().numpy() for name, tensor in net.state_dict().items() if tensor.ndim}
    nodes = []
    value = "input"
    for place, (conv, norm, stride) in enumerate((("0", "1", 1), ("3", "4", 2))):
        nodes.append(
            helper.make_node(
                "Conv", [value, f"{conv}.weight"], [f"c{place}"], name=f"conv{place}", kernel_shape=[3, 3],
                pads=[1, 1, 1, 1], strides=[stride, stride],
            )
        )  # fmt: skip
        names = [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        nodes.append(helper.make_node("BatchNormalization", [f"c{place}", *names], [f"n{place}"], name=f"norm{place}"))
        nodes.append(helper.make_node("Relu", [f"n{place}"], [f"r{place}"], name=f"relu{place}"))
        value = f"r{place}"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "8.weight", "8.bias"], ["logits"], name="classifier", transB=1))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape or ("n", channels, SIZE, SIZE))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", CLASSES))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def write_onnx(path: Path, channels: int = 3, seed: int = 0, **more: object) -> Path:
    onnx.save(onnx_model(channels, seed, **more), str(path))  # type: ignore[arg-type]
    return path


def write_eval(path: Path, channels: int = 3, images: int = 40, size: int = SIZE, labels: object = None) -> Path:
    """Labelled images: noise, labelled by the float network itself (its accuracy is 100 %)."""
    x = np.random.default_rng(5).integers(0, 256, (images, size, size, channels), dtype=np.uint8)
    if labels is None:
        with torch.no_grad():
            labels = network(channels)(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255).argmax(1).numpy()
    np.savez(path, x=x, y=np.asarray(labels))
    return path


def zsq(
    *arguments: object, timeout: float = 240, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    return subprocess.run(
        [executable(), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        check=False,
    )


def executable() -> str:
    """The installed command, beside the interpreter that runs the tests."""
    return str(Path(sys.executable).parent / "zsq")


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
