"""Letting OpenVINO add a residual inside the convolution's kernel, without changing a number.

The Q/DQ graphs of this project do not round between a convolution and the Add behind it. OpenVINO's CPU plugin then runs an Add whose
other operand is an older activation as a kernel of its own, on float numbers that the convolution has to write out. With a
Quantize/Dequantize pair in between (as NNCF and ONNX Runtime place it) the plugin merges all of it into the convolution, and in
there the pair only scales and saturates: it does not round.

So a pair that can neither saturate nor round is a request for fusion. Its step is a power of two, and its range is so wide that what
it cuts off is cut off behind the Add as well: below ``y_low - skip_high`` and above ``y_high - skip_low`` the sum lies outside of
the output's range, whatever the other operand is.

This holds for the fused kernels of the CPU plugin only. Where the pair is not merged it rounds to a coarse grid, so an engine made
from such a graph has to be compared with the plain one before it is used (:func:`same_outputs`), and runs without low-precision
transformations have to read the plain graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import QuantizedTensor, read_qdq

__all__ = ["fuse_residuals", "same_outputs"]

Array = npt.NDArray[Any]

_FUSED = ("Relu", "Clip")


def fuse_residuals(qdq: Graph) -> Graph:
    """The Q/DQ graph with a pair that asks for fusion behind every convolution whose output is added to an activation.

    Args:
        qdq: A Q/DQ graph without rounding between convolution and Add.

    Returns:
        The graph for the engine; `qdq` itself if there is nothing to fuse.
    """
    rounded = {tensor.output: tensor for tensor in read_qdq(qdq) if not tensor.is_weight and tensor.axis is None}
    behind = {tensor.name: tensor for tensor in rounded.values() if tensor.quantize is not None}
    places: list[tuple[onnx.NodeProto, int, float]] = []
    for node in qdq:
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
            continue
        output = _rounded_output(qdq, node, behind)
        for index in (1, 0):
            maker = qdq.producer(node.input[index])
            skip = rounded.get(node.input[1 - index])
            if (
                output is not None
                and skip is not None
                and maker is not None
                and maker.op_type == "Conv"
                and maker.input[0] != node.input[1 - index]  # the sum is made in place of the other operand
                and not _projected(qdq, skip)  # then the plugin adds inside the other convolution, asked or not
                and len(qdq.consumers(node.input[index])) == 1
                and not qdq.is_output(node.input[index])
            ):
                places.append((node, index, max((skip.high - output.low) / 128.0, (output.high - skip.low) / 127.0)))
                break
    if not places:
        return qdq
    net = Net(qdq.proto)
    nodes = {node.name: node for node in net.nodes}
    for add, index, step in places:
        node, source = nodes[add.name], add.input[index]
        scale = net.add_constant(f"{source}_fusing_scale", np.asarray(2.0 ** math.ceil(math.log2(step)), np.float32))
        zero = net.add_constant(f"{source}_fusing_zero_point", np.asarray(0, np.int8))
        codes, value = net.fresh(f"{source}_fusing_codes"), net.fresh(f"{source}_fusing")
        net.insert_before(
            node,
            net.new_node("QuantizeLinear", [source, scale, zero], [codes], f"{source}_fusing_QuantizeLinear"),
            net.new_node("DequantizeLinear", [codes, scale, zero], [value], f"{source}_fusing_DequantizeLinear"),
        )
        node.input[index] = value
    net.touch()
    return Graph(net.proto())


def _projected(graph: Graph, tensor: QuantizedTensor) -> bool:
    """Whether a rounded tensor comes straight from a convolution for this sum alone (a projection shortcut)."""
    maker = graph.producer(tensor.name)
    alone = len(graph.consumers(tensor.output)) == 1 and len(graph.consumers(tensor.name)) == 1
    return alone and maker is not None and maker.op_type == "Conv"


def _rounded_output(graph: Graph, add: onnx.NodeProto, behind: Mapping[str, QuantizedTensor]) -> QuantizedTensor | None:
    """What rounds the sum, directly or behind a Relu or Clip; ``None`` where anything else reads it."""
    value = str(add.output[0])
    for _ in range(2):
        readers = graph.consumers(value)
        if len(readers) != 1 or graph.is_output(value):
            return None
        if value in behind:
            return behind[value]
        if readers[0].op_type not in _FUSED or readers[0].input[0] != value:
            return None
        value = str(readers[0].output[0])
    readers = graph.consumers(value)
    return behind.get(value) if len(readers) == 1 and not graph.is_output(value) else None


def same_outputs(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    """Whether two engines gave the same numbers, bit for bit (of equal names and shapes)."""
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
