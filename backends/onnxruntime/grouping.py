"""Integer kernels from a Q/DQ graph, by the meaning of the file alone: the runtime is not asked.

A group is an operator whose inputs come out of DequantizeLinear and whose output goes into QuantizeLinear. It stands for one
integer kernel on the codes. :func:`group` rewrites every group that has one; the result is a graph of QLinear operators in the
file's own layout. What the runtime fuses is *its* choice; this is a second opinion, with which the first must agree bit for bit
wherever both find integer kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from zsq_deploy.model.graph import Graph, attributes

__all__ = ["group"]

_MOVING = ("Expand", "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
_CODES = (np.dtype(np.uint8), np.dtype(np.int8))


@dataclass(frozen=True)
class _Coded:
    """A quantized tensor: names of its codes, scale and zero point."""

    codes: str
    scale: str
    zero: str


class _Grouper:
    """One pass over a graph in topological order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.taken: set[str] = set()

    def coded(self, value: str) -> _Coded | None:
        """The codes behind a value that DequantizeLinear makes."""
        node = self.graph.producer(value)
        if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
            return None
        return _Coded(*node.input[:3])

    def eight_bit(self, item: _Coded | None) -> bool:
        """Whether a quantized tensor has 8-bit codes."""
        zero = self.graph.constant(item.zero) if item is not None else None
        return zero is not None and zero.dtype in _CODES

    def result(self, node: onnx.NodeProto) -> tuple[_Coded, list[onnx.NodeProto]] | None:
        """Where the codes of a node's output go, and the nodes in between and including QuantizeLinear.

        A ReLU or Clip in between that the range of the codes implies is part of the group.
        """
        passed: list[onnx.NodeProto] = []
        value = node.output[0]
        while True:
            consumers = self.graph.consumers(value)
            if self.graph.is_output(value) or len(consumers) != 1:
                return None
            after = consumers[0]
            passed.append(after)
            if after.op_type == "QuantizeLinear" and after.input[0] == value and len(after.input) > 2:
                return _Coded(after.output[0], after.input[1], after.input[2]), passed
            if after.op_type not in ("Relu", "Clip") or not self._implied(after):
                return None
            value = after.output[0]

    def _implied(self, clamp: onnx.NodeProto) -> bool:
        """Whether the QuantizeLinear behind a ReLU or Clip clamps at least as tightly."""
        consumers = self.graph.consumers(clamp.output[0])
        if len(consumers) != 1 or consumers[0].op_type != "QuantizeLinear" or len(consumers[0].input) < 3:
            return False
        scale, zero = (self.graph.constant(name) for name in consumers[0].input[1:3])
        if scale is None or zero is None or scale.size != 1 or zero.dtype not in _CODES:
            return False
        limits = np.iinfo(zero.dtype)
        lowest = (limits.min - int(zero.reshape(-1)[0])) * float(scale.reshape(-1)[0])
        highest = (limits.max - int(zero.reshape(-1)[0])) * float(scale.reshape(-1)[0])
        bounds: list[Any] = [0.0, np.inf]
        if clamp.op_type == "Clip":
            found = attributes(clamp)
            bounds = [found.get("min", -np.inf), found.get("max", np.inf)]
            for position, name in enumerate(clamp.input[1:3]):
                if name:
                    constant = self.graph.constant(name)
                    if constant is None:
                        return False
                    bounds[position] = float(constant)
        return bool(lowest >= bounds[0] and highest <= bounds[1])

    def same_scale(self, a: _Coded, b: _Coded) -> bool:
        """Whether two quantized tensors share scale and zero point."""
        pairs = [(self.graph.constant(a.scale), self.graph.constant(b.scale))]
        pairs.append((self.graph.constant(a.zero), self.graph.constant(b.zero)))
        return all(x is not None and y is not None and np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)

    def emit(
        self, node: onnx.NodeProto, op: str, inputs: Sequence[str], output: str, domain: str, **extra: Any
    ) -> None:
        """Add the kernel of a group."""
        made = helper.make_node(op, list(inputs), [output], f"{node.name}_integer", domain=domain)
        made.attribute.extend(node.attribute)
        for key, value in extra.items():
            made.attribute.append(helper.make_attribute(key, value))
        self.nodes.append(made)

    def bias(self, node: onnx.NodeProto, x: _Coded, w: _Coded) -> str | None:
        """The int32 codes of a bias with scale ``sx * sw``; ``""`` for no bias, ``None`` for one that does not fit."""
        if len(node.input) < 3 or not node.input[2]:
            return ""
        producer = self.graph.producer(node.input[2])
        if producer is None or producer.op_type != "DequantizeLinear":
            return None
        scales = [self.graph.constant(name) for name in (producer.input[1], x.scale, w.scale)]
        codes = self.graph.constant(producer.input[0])
        if codes is None or codes.dtype != np.int32 or any(scale is None for scale in scales):
            return None
        found, sx, sw = (np.asarray(scale, np.float32) for scale in scales)
        return str(producer.input[0]) if np.allclose(found, sx * sw, rtol=1e-6) else None

    # One method a family; each returns whether it made a kernel of the node.

    def convolution(self, node: onnx.NodeProto) -> bool:
        x, w, after = self.coded(node.input[0]), self.coded(node.input[1]), self.result(node)
        if x is None or w is None or after is None or not (self.eight_bit(x) and self.eight_bit(w)):
            return False
        bias = self.bias(node, x, w)
        if bias is None:
            return False
        y, passed = after
        inputs = [x.codes, x.scale, x.zero, w.codes, w.scale, w.zero, y.scale, y.zero, *([bias] if bias else [])]
        self.emit(node, "QLinearConv", inputs, y.codes, "")
        self.take(node, passed)
        return True

    def product(self, node: onnx.NodeProto) -> bool:
        a, b, after = self.coded(node.input[0]), self.coded(node.input[1]), self.result(node)
        if a is None or b is None or not (self.eight_bit(a) and self.eight_bit(b)):
            return False
        if node.op_type == "Gemm":
            bias = self.bias(node, a, b)
            if bias is None or attributes(node).get("beta", 1.0) != 1.0:
                return False
            inputs = [a.codes, a.scale, a.zero, b.codes, b.scale, b.zero, bias]
            kept = [item for item in node.attribute if item.name != "beta"]
            del node.attribute[:]
            node.attribute.extend(kept)
            if after is None:
                self.emit(node, "QGemm", inputs, node.output[0], "com.microsoft")
                self.take(node, [])
                return True
            self.emit(node, "QGemm", [*inputs, after[0].scale, after[0].zero], after[0].codes, "com.microsoft")
        elif after is None:
            inputs = [a.codes, b.codes, a.scale, b.scale, a.zero, b.zero]
            self.emit(node, "MatMulIntegerToFloat", inputs, node.output[0], "com.microsoft")
            self.take(node, [])
            return True
        else:
            y = after[0]
            inputs = [a.codes, a.scale, a.zero, b.codes, b.scale, b.zero, y.scale, y.zero]
            self.emit(node, "QLinearMatMul", inputs, y.codes, "")
        self.take(node, after[1])
        return True

    def binary(self, node: onnx.NodeProto) -> bool:
        a, b, after = self.coded(node.input[0]), self.coded(node.input[1]), self.result(node)
        if a is None or b is None or after is None or not (self.eight_bit(a) and self.eight_bit(b)):
            return False
        y = after[0]
        inputs = [a.codes, a.scale, a.zero, b.codes, b.scale, b.zero, y.scale, y.zero]
        self.emit(node, f"QLinear{node.op_type}", inputs, y.codes, "com.microsoft")
        self.take(node, after[1])
        return True

    def unary(self, node: onnx.NodeProto) -> bool:
        x, after = self.coded(node.input[0]), self.result(node)
        if x is None or after is None or not self.eight_bit(x):
            return False
        y = after[0]
        extra = {"opset": self.graph.opset} if node.op_type == "Softmax" else {}
        inputs = [x.codes, x.scale, x.zero, y.scale, y.zero]
        self.emit(node, f"QLinear{node.op_type}", inputs, y.codes, "com.microsoft", **extra)
        self.take(node, after[1])
        return True

    def concatenation(self, node: onnx.NodeProto) -> bool:
        parts, after = [self.coded(name) for name in node.input], self.result(node)
        if after is None or not all(self.eight_bit(part) for part in parts):
            return False
        y = after[0]
        inputs = [y.scale, y.zero]
        for part in parts:
            assert part is not None
            inputs += [part.codes, part.scale, part.zero]
        self.emit(node, "QLinearConcat", inputs, y.codes, "com.microsoft")
        self.take(node, after[1])
        return True

    def moving(self, node: onnx.NodeProto) -> bool:
        x, after = self.coded(node.input[0]), self.result(node)
        if x is None or after is None or len(node.output) != 1 or not self.eight_bit(x):
            return False
        y, passed = after
        if len(passed) != 1 or not self.same_scale(x, y):
            return False
        self.emit(node, node.op_type, [x.codes, *node.input[1:]], y.codes, "")
        self.take(node, passed)
        return True

    def take(self, node: onnx.NodeProto, passed: Sequence[onnx.NodeProto]) -> None:
        """Leave the nodes of a group out."""
        self.taken.update([node.name, *(item.name for item in passed)])


def group(graph: Graph) -> Graph:
    """A Q/DQ graph with every group that has an integer kernel replaced by it.

    Groups without one (an operator that the runtime has no integer kernel for, a bias of another scale, 16-bit codes) stay as they
    are: dequantized, computed in float, quantized.
    """
    grouper = _Grouper(Graph(graph.editable()))
    families: dict[str, Callable[[onnx.NodeProto], bool]] = {
        "Conv": grouper.convolution,
        "Gemm": grouper.product,
        "MatMul": grouper.product,
        "Concat": grouper.concatenation,
        **dict.fromkeys(("Add", "Mul"), grouper.binary),
        **dict.fromkeys(("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"), grouper.unary),
        **dict.fromkeys(_MOVING, grouper.moving),
    }
    for node in grouper.graph:
        if node.name in grouper.taken:
            continue
        family = families.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if family is None or not family(node):
            grouper.nodes.append(node)
    proto = grouper.graph.editable()
    del proto.graph.node[:]
    del proto.graph.value_info[:]
    proto.graph.node.extend(_needed(grouper.nodes, [value.name for value in proto.graph.output]))
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    if grouper.graph.domain_version("com.microsoft") is None:
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return Graph(proto)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs depend on, in order: dequantizations that no float operator reads any more are gone."""
    wanted = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(name for name in node.input if name)
    return kept[::-1]
