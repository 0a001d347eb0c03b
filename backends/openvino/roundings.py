"""Leaving out roundings that no integer kernel reads.

NNCF and POT round nearly every activation, also where only float operators read it: in front of a layer normalization or of a
residual sum between two of them. No kernel gets faster by that, and it costs twice:

* The rounded stream carries every code that float32 noise moves, by a whole step, into all layers that follow.
* OpenVINO takes the scale of such a rounding (without a zero point, or of one operand of a sum) through the layer normalization behind
  it and leaves the normalization's epsilon as it is (measured, 2026.4.1): the engine normalizes with ``epsilon * scale**2``, which is
  not what the graph says.

So a rounding stays for integer kernels alone, and float operators read the number as it was before. The scales of what stays are the
vendor's.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.qdq import TRANSPARENT

__all__ = ["Lean", "drop_float_roundings"]

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

_ISLANDS = frozenset(
    {"LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "LpNormalization"}
    | {"MeanVarianceNormalization", "Softmax", "LogSoftmax", "Shape", "Size"}
)
"""Operators that the CPU plugin computes in float whatever they read (the last two read no numbers at all)."""

_ROUND = ("QuantizeLinear", "DequantizeLinear")

_MOVES = TRANSPARENT | {"Concat"}

_CARRY = _MOVES | {"AveragePool", "GlobalAveragePool", "ReduceMean", "Relu", "Clip"}
"""Operators through which a dequantization is taken to the kernel behind them."""


@dataclass(frozen=True)
class Lean:
    """A Q/DQ graph whose roundings all serve integer kernels.

    Attributes:
        graph: The graph; the one given if nothing changed.
        dropped: Tensors that are not rounded any more.
        bypassed: Tensors that are rounded for integer kernels, and not for the float operators that read them too.
    """

    graph: Graph
    dropped: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()

    def notes(self, vendor: str) -> tuple[str, ...]:
        """What the user should read about it: one sentence, none if nothing changed."""
        if not self.dropped and not self.bypassed:
            return ()
        told = (
            f"{len(self.dropped)} activations that only float operators read are not rounded, though {vendor} rounds them, and "
            f"{len(self.bypassed)} are rounded for integer kernels alone"
        )
        return (told,)


def drop_float_roundings(qdq: Graph) -> Lean:
    """Let float operators read activations unrounded, and take away roundings that nobody reads then.

    An integer kernel is a sum of products whose two operands are both rounded, and an operator in front of such a kernel (or one that
    only moves numbers, in front of an output) all of whose operands are rounded, or computed by an integer kernel that it can be fused
    into. A layer normalization or a softmax is none, nor is what leads to nothing else.

    Args:
        qdq: Any Q/DQ graph.
    """
    integer = _integer_nodes(qdq)
    sources = {
        str(reader.output[0]): str(node.input[0])
        for node in qdq
        if node.op_type == "QuantizeLinear" and qdq.constant(node.input[0]) is None
        for reader in qdq.consumers(node.output[0])
        if reader.op_type == "DequantizeLinear"
    }
    net = Net(qdq.proto)
    seen: dict[str, bool] = {}  # tensor -> whether an integer kernel or an output reads it rounded
    moved: set[str] = set()
    for output, source in sources.items():
        seen[source] = seen.get(source, False) or qdq.is_output(output)
    for node in net.nodes:
        for index, value in enumerate(node.input):
            if value not in sources:
                continue
            if node.name in integer:
                seen[sources[value]] = True
                continue
            moved.add(sources[value])
            while node.input[index] in sources:
                node.input[index] = sources[node.input[index]]
    if not moved:
        return Lean(qdq)
    net.touch()
    net.sweep()
    dropped = tuple(name for name, used in seen.items() if not used)
    bypassed = tuple(name for name, used in seen.items() if used and name in moved)
    return Lean(Graph(net.proto()), dropped, bypassed)


def _integer_nodes(graph: Graph) -> frozenset[str]:
    """Names of the nodes that read codes: integer kernels, and roundings and moves on the way to them."""
    rounded = _rounded_values(graph)

    def product(node: onnx.NodeProto) -> bool:
        return node.op_type in _PRODUCTS and rounded.issuperset(node.input[:2])

    def fused(value: str) -> bool:
        """Whether a value comes straight from an integer kernel that computes its one reader too."""
        maker = graph.producer(value)
        return maker is not None and product(maker) and len(graph.consumers(value)) == 1 and not graph.is_output(value)

    found: set[str] = set()
    for node in reversed(list(graph)):
        if node.op_type in _ISLANDS or (node.op_type in _PRODUCTS and not product(node)):
            continue
        operands = _operands(graph, node)
        if len(operands) > 1 and not all(value in rounded or fused(value) for value in operands):
            continue
        read = any(reader.name in found for value in node.output for reader in graph.consumers(value))
        shown = node.op_type in _MOVES and any(graph.is_output(value) for value in node.output)
        if node.op_type in _PRODUCTS or read or shown:
            found.add(node.name)
    return frozenset(found)


def _rounded_values(graph: Graph) -> set[str]:
    """Values that hold rounded numbers: what a DequantizeLinear gives, and what is moved, pooled or scaled out of it."""
    found: set[str] = set()
    for node in graph:
        carries = node.op_type in _CARRY or (node.op_type in ("Mul", "Div") and _scalar(graph, node.input[1]))
        if node.op_type == "DequantizeLinear" or (carries and found.issuperset(_operands(graph, node))):
            found.update(node.output)
    return found


def _scalar(graph: Graph, value: str) -> bool:
    """Whether a value is one constant number."""
    constant = graph.constant(value)
    return constant is not None and constant.size == 1


def _operands(graph: Graph, node: onnx.NodeProto) -> list[str]:
    """The inputs that hold computed numbers."""
    values = node.input[:1] if node.op_type in TRANSPARENT or node.op_type in _ROUND else node.input
    return [value for value in values if value and graph.constant(value) is None]
