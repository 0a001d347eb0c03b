"""Small networks for the tests of this folder, as ONNX graphs with batch normalization."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.model.graph import Graph
from zsq_deploy.model.model import Model


class Builder:
    """Nodes and constants, one call a layer."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.number = 0

    def constant(self, array, name=None):
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op, *inputs, **attrs):
        self.number += 1
        out = f"{op.lower()}_{self.number}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"node_{out}", **attrs))
        return out

    def conv(self, x, cin, cout, k=3, stride=1, group=1, bias=False, pad=None):
        w = self.rng.normal(0, (2.0 / (cin // group * k * k)) ** 0.5, (cout, cin // group, k, k)).astype(np.float32)
        names = [self.constant(w, f"w{self.number}")]
        if bias:
            names.append(self.constant(self.rng.normal(0, 0.3, cout).astype(np.float32), f"b{self.number}"))
        p = k // 2 if pad is None else pad
        return self.node("Conv", x, *names, strides=[stride] * 2, pads=[p] * 4, group=group)

    def bn(self, x, c):
        arrays = (
            self.rng.uniform(0.5, 1.5, c),
            self.rng.normal(0, 0.4, c),
            self.rng.normal(0, 0.3, c),
            self.rng.uniform(0.5, 1.5, c),
        )
        return self.node("BatchNormalization", x, *(self.constant(a.astype(np.float32)) for a in arrays))

    def gemm(self, x, cin, cout):
        w = self.rng.normal(0, cin**-0.5, (cout, cin)).astype(np.float32)
        b = self.rng.normal(0, 0.2, cout).astype(np.float32)
        return self.node("Gemm", x, self.constant(w), self.constant(b), transB=1)

    def graph(self, outputs, size=12, channels=3, opset=17):
        proto = helper.make_model(
            helper.make_graph(
                self.nodes,
                "net",
                [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", channels, size, size])],
                [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
                self.constants,
            ),
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=8,
        )
        proto = onnx.shape_inference.infer_shapes(proto)
        onnx.checker.check_model(proto)
        return Graph(proto)


def small_net(seed=0):
    """Residual blocks, a depthwise convolution with ReLU6, a concatenation, max and average pooling, a matrix product."""
    b = Builder(seed)
    zero, six = b.constant(np.float32(0)), b.constant(np.float32(6))
    x = b.node("Relu", b.bn(b.conv("image", 3, 8), 8))
    y = b.bn(b.conv(b.node("Relu", b.bn(b.conv(x, 8, 8), 8)), 8, 8), 8)
    x = b.node("Relu", b.node("Add", y, x))
    x = b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    left = b.node("Clip", b.bn(b.conv(x, 8, 8, group=8), 8), zero, six)
    right = b.node("Relu", b.conv(x, 8, 4, k=1, bias=True))
    x = b.node("Concat", left, right, axis=1)
    x = b.node("Relu", b.bn(b.conv(x, 12, 16, k=1), 16))
    x = b.node("Flatten", b.node("GlobalAveragePool", x))
    return b.graph([b.gemm(x, 16, 10)])


def small_model(seed=0):
    return Model(small_net(seed), name="small")


def images(n, seed=0, size=12, channels=3):
    return np.random.default_rng(seed).normal(0, 1, (n, channels, size, size)).astype(np.float32)
