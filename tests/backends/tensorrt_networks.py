"""Small networks for the tests of TensorRT's graphs: one for each rule of placement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.model.graph import Graph
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin

__all__ = ["NETWORKS", "Net", "images", "network", "outputs", "ranges_of"]


class Net:
    """Nodes and random constants, one call a node."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def op(self, kind: str, *inputs: str, name: str = "", **attrs: Any) -> str:
        name = name or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"n_{name}", **attrs))
        return name

    def weight(self, *shape: int, fan: int) -> str:
        return self.constant(self.rng.normal(0, (2 / fan) ** 0.5, shape).astype(np.float32))

    def bias(self, *shape: int) -> str:
        return self.constant(self.rng.normal(0, 0.2, shape).astype(np.float32))

    def conv(self, x: str, cin: int, cout: int, k: int = 3, group: int = 1, name: str = "") -> str:
        weight = self.weight(cout, cin // group, k, k, fan=cin // group * k * k)
        return self.op("Conv", x, weight, self.bias(cout), name=name, pads=[k // 2] * 4, group=group)

    def linear(self, x: str, cin: int, cout: int, name: str = "") -> str:
        return self.op("Add", self.op("MatMul", x, self.weight(cin, cout, fan=cin), name=name), self.bias(cout))

    def model(self, output: str, shape: tuple[int, ...] = (3, 8, 8), opset: int = 17) -> Model:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.constants,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        return Model(Graph(onnx.shape_inference.infer_shapes(proto)), name="net")


def _head(net: Net, x: str, channels: int) -> str:
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x, name="pool"), name="flat")
    weight = net.weight(5, channels, fan=channels)
    return net.op("Gemm", pooled, weight, net.bias(5), name="logits", transB=1)


def residual() -> Model:
    net = Net(1)
    first = net.op("Relu", net.conv("image", 3, 8, name="stem"), name="stem_relu")
    inner = net.op("Relu", net.conv(first, 8, 8, name="left"), name="left_relu")
    total = net.op("Add", net.conv(inner, 8, 8, name="right"), first, name="sum")
    return net.model(_head(net, net.op("Relu", total, name="out"), 8))


def projection() -> Model:
    net = Net(2)
    first = net.op("Relu", net.conv("image", 3, 8, name="stem"), name="stem_relu")
    total = net.op("Add", net.conv(first, 8, 12, name="main"), net.conv(first, 8, 12, 1, name="side"), name="sum")
    return net.model(_head(net, net.op("Relu", total, name="out"), 12))


def concat() -> Model:
    net = Net(3)
    first = net.op("Relu", net.conv("image", 3, 8, name="stem"), name="stem_relu")
    small = net.op("Relu", net.conv(first, 8, 6, 1, name="small"), name="small_relu")
    wide = net.op("Relu", net.conv(first, 8, 6, name="wide"), name="wide_relu")
    pooled = net.op("MaxPool", net.op("Concat", small, wide, name="both", axis=1), name="max", kernel_shape=[2, 2])
    last = net.op("Relu", net.conv(pooled, 12, 8, name="last"), name="last_relu")
    return net.model(_head(net, last, 8))


def depthwise() -> Model:
    net = Net(4)
    low, high = net.constant(np.float32(0)), net.constant(np.float32(6))
    first = net.op("Clip", net.conv("image", 3, 8, name="stem"), low, high, name="stem_relu")
    deep = net.op("Clip", net.conv(first, 8, 8, group=8, name="deep"), low, high, name="deep_relu")
    return net.model(_head(net, net.conv(deep, 8, 10, 1, name="point"), 10))


def transposed() -> Model:
    net = Net(5)
    first = net.op("Relu", net.conv("image", 3, 8, name="stem"), name="stem_relu")
    weight = net.weight(8, 4, 2, 2, fan=8)
    up = net.op("Relu", net.op("ConvTranspose", first, weight, net.bias(4), name="up", strides=[2, 2]), name="up_relu")
    return net.model(net.conv(up, 4, 3, name="last"))


def transformer() -> Model:
    net = Net(6)
    tokens = net.op("LayerNormalization", "image", net.constant(np.ones(64, np.float32)), axis=-1)
    query, key, value = (net.linear(tokens, 64, 64, name=name) for name in ("q", "k", "v"))
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1]), name="scores")
    scaled = net.op("Softmax", net.op("Mul", scores, net.constant(np.float32(0.125))), axis=-1)
    mixed = net.linear(net.op("MatMul", scaled, value, name="mix"), 64, 64, name="project")
    total = net.op("Add", "image", mixed, name="sum")
    hidden = net.op("Relu", net.linear(total, 64, 128, name="fc1"))
    return net.model(net.op("Add", total, net.linear(hidden, 128, 64, name="fc2"), name="end"), shape=(6, 64))


NETWORKS: dict[str, Callable[[], Model]] = {
    made.__name__: made for made in (residual, projection, concat, depthwise, transposed, transformer)
}


def network(name: str) -> Model:
    """One of :data:`NETWORKS`."""
    return NETWORKS[name]()


def images(model: Model, count: int = 8, seed: int = 7) -> np.ndarray[Any, Any]:
    shape = model.graph.inputs[0].with_batch(count)
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def outputs(graph: Graph, x: np.ndarray[Any, Any], fetch: list[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    with torch.no_grad():
        found = Twin(graph, device="cpu").run({"image": torch.from_numpy(x)}, fetch=fetch)
    return {name: value.numpy() for name, value in found.items()}


def ranges_of(model: Model) -> dict[str, tuple[float, float]]:
    """Smallest and largest number of every value on a few images."""
    graph = model.folded().graph
    names = ["image", *(value for node in graph for value in node.output)]
    found = outputs(graph, images(model), [name for name in names if graph.constant(name) is None])
    return {name: (float(value.min()), float(value.max())) for name, value in found.items()}
