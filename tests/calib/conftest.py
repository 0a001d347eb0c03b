"""A small classifier, made by hand so that tests stay quick, and a progress that counts steps and interrupts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn import functional as F

from zsq_deploy.calib.parts.priors import NATURAL_MEAN, NATURAL_STD, InputSpace
from zsq_deploy.model import Graph, Model, Preprocess, TensorSpec
from zsq_deploy.progress import Silent, Task

NORMALISED = Preprocess(mean=NATURAL_MEAN, std=NATURAL_STD)


def _classifier(
    preprocess: Preprocess = NORMALISED,
    channels: int = 3,
    shape: tuple[int, int] = (12, 10),
    batch: object = "N",
    classes: int = 4,
    *,
    softmax: bool = False,
) -> Model:
    """Two strided convolutions with batch norm, global pooling, and a matrix; its statistics are those of smooth pictures."""
    generator, random = torch.Generator().manual_seed(7), np.random.default_rng(7)
    spec = TensorSpec("image", (None, channels, *shape), np.dtype(np.float32))
    pictures = F.interpolate(torch.randn(64, channels, 4, 4, generator=generator), size=shape, mode="bilinear")
    x = InputSpace.of(spec, preprocess).to_network(pictures)
    nodes, constants, value = [], [], "image"
    for number, (before, after, stride) in enumerate([(channels, 8, 2), (8, 6, 1)]):
        weight = torch.randn(after, before, 3, 3, generator=generator) * 0.25
        x = F.conv2d(x, weight, stride=stride, padding=1)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        gamma, beta = random.uniform(0.5, 1.5, after), random.normal(0, 0.3, after)
        parts = {"w": weight.numpy(), "g": gamma, "b": beta, "m": mean.numpy(), "v": var.numpy()}
        x = F.relu(F.batch_norm(x, mean, var, torch.as_tensor(gamma).float(), torch.as_tensor(beta).float()))
        constants += [numpy_helper.from_array(v.astype(np.float32), f"{k}{number}") for k, v in parts.items()]
        norm = [f"z{number}", *(f"{k}{number}" for k in "gbmv")]
        window = {"pads": [1] * 4, "strides": [stride] * 2}
        nodes += [
            helper.make_node("Conv", [value, f"w{number}"], [f"z{number}"], f"conv{number}", **window),
            helper.make_node("BatchNormalization", norm, [f"y{number}"], f"bn{number}"),
            helper.make_node("Relu", [f"y{number}"], [f"r{number}"], f"relu{number}"),
        ]
        value = f"r{number}"
    constants.append(numpy_helper.from_array(random.normal(size=(6, classes)).astype(np.float32) * 2, "head"))
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["features"], "flatten"),
        helper.make_node("MatMul", ["features", "head"], ["scores" if softmax else "out"], "matmul"),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["scores"], ["out"], "softmax", axis=1))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [batch, channels, *shape])],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [batch, classes])],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Model(Graph(proto), preprocess, "classifier", "classifier.onnx", batch == "N")


class _Recorder(Silent):
    """Counts steps, and interrupts at the one that it is told."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.values, self.said = at, list[dict[str, Any]](), list[str]()

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        outer = self

        class Counting:
            def advance(self, steps: float = 1, **values: float | str) -> None:
                if values:
                    outer.values.append(values)
                    if len(outer.values) == outer.at:
                        raise KeyboardInterrupt

        yield Counting()

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="session")
def classifier() -> Callable[..., Model]:
    """Makes a classifier (preprocessing, channels, height and width, batch, classes)."""
    return _classifier


@pytest.fixture(scope="session")
def recorder() -> Callable[..., _Recorder]:
    """Makes a progress that remembers what it was told, and interrupts at a step."""
    return _Recorder
