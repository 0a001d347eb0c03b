"""Which nodes are quantized: integer arithmetic where it pays, float where an 8-bit value would only be rounded and unrounded.

A convolution or matrix product is quantized unless it is excluded. Anything else is quantized only when it stands *between* integer
nodes: one of its inputs comes out of one, and one of its outputs goes into one. An Add in front of a LayerNormalization, a Softmax
behind the last matrix product, or the decoding of boxes stay in float then, and lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from zsq_deploy.backends.onnxruntime.options import MAC_OPS, BuildOptions
from zsq_deploy.errors import EngineError
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["MOVEMENT", "Placement", "float_activation", "place"]

MOVEMENT = frozenset(
    ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Pad", "MaxPool", "Expand")
)
"""Operators that only move values: the 8-bit codes pass through with the scale that they have."""

_ABSORBED = ("Relu", "Clip")
_NEVER = frozenset(("LayerNormalization", "InstanceNormalization", "BatchNormalization", "ConvTranspose"))


@dataclass(frozen=True)
class Placement:
    """The result of :func:`place`.

    Attributes:
        nodes: Names of the nodes to quantize, in graph order.
        tails: Values that the last convolutions and matrix products give to the float end of the network.
        skipped: Node name -> why a node stays in float, for convolutions, matrix products and what could be quantized.
    """

    nodes: tuple[str, ...]
    tails: tuple[str, ...]
    skipped: dict[str, str]


def float_activation(graph: Graph, value: str) -> bool:
    """Whether a value is a float tensor that is computed (not a constant)."""
    if not value or graph.constant(value) is not None:
        return False
    dtype = graph.dtype(value)
    return dtype is not None and bool(np.issubdtype(dtype, np.floating))


def _clip_bounds(graph: Graph, node: onnx.NodeProto) -> tuple[float, float] | None:
    """The bounds of a Relu or Clip, or ``None`` when they are computed."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    found = attributes(node)
    bounds = [float(found.get("min", "-inf")), float(found.get("max", "inf"))]
    for slot in (1, 2):
        if len(node.input) > slot and node.input[slot]:
            constant = graph.constant(node.input[slot])
            if constant is None:
                return None
            bounds[slot - 1] = float(np.asarray(constant).reshape(-1)[0])
    return bounds[0], bounds[1]


def clip_bounds(graph: Graph, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Bounds of a Relu or Clip that an integer type can take over: they must enclose zero, which is always representable."""
    bounds = _clip_bounds(graph, node)
    return bounds if bounds is not None and bounds[0] <= 0.0 <= bounds[1] and bounds[0] < bounds[1] else None


def _mac_problem(graph: Graph, node: onnx.NodeProto) -> str:
    """Why a convolution or matrix product cannot run in an integer kernel; empty if it can."""
    if not float_activation(graph, node.input[0]):
        return "its first input is not a computed float tensor"
    weight = graph.constant(node.input[1])
    if node.op_type == "Conv":
        if weight is None:
            return "its weights are computed, not constant"
        if weight.ndim not in (3, 4, 5):
            return f"its weights have {weight.ndim} dimensions"
    if node.op_type == "Gemm":
        found = attributes(node)
        if found.get("transA", 0):
            return "its first input is transposed (transA)"
        if float(found.get("alpha", 1)) != 1 or float(found.get("beta", 1)) != 1:
            return "alpha or beta is not 1 and its weights are computed"
        if len(node.input) > 2 and node.input[2] and graph.constant(node.input[2]) is None:
            return "its bias is computed, not constant"
        if len(node.input) > 2 and node.input[2] and weight is not None:
            bias = graph.constant(node.input[2])
            outputs = weight.shape[0] if found.get("transB", 0) else weight.shape[1]
            if bias is not None and bias.size != outputs:
                return "its bias is not one value per output"
    if node.op_type == "MatMul" and weight is None and not float_activation(graph, node.input[1]):
        return "its second input is neither a weight nor a computed float tensor"
    return ""


def place(graph: Graph, options: BuildOptions) -> Placement:
    """Decide what is quantized.

    Raises:
        EngineError: Nothing in the graph can be quantized, or an excluded name is not in the graph.
    """
    unknown = [name for name in options.exclude if name not in graph]
    ops = frozenset(options.ops) - _NEVER
    excluded = frozenset(options.exclude)
    skipped: dict[str, str] = {}
    macs: set[str] = set()
    for node in graph:
        if node.op_type in MAC_OPS and node.domain in ("", "ai.onnx"):
            problem = _mac_problem(graph, node)
            if node.name in excluded:
                skipped[node.name] = "excluded by the options"
            elif node.op_type not in ops:
                skipped[node.name] = f"{node.op_type} is not among the operators to quantize"
            elif problem:
                skipped[node.name] = problem
            else:
                macs.add(node.name)
        elif node.op_type == "ConvTranspose":
            skipped[node.name] = "ONNX Runtime has no integer kernel for ConvTranspose"
    if not macs:
        raise EngineError(
            "no convolution or matrix product of this network can be quantized"
            + (f" (excluded nodes that do not exist: {', '.join(unknown)})" if unknown else ""),
            where=f"{len(graph.nodes)} nodes; {'; '.join(f'{k}: {v}' for k, v in list(skipped.items())[:5])}",
            remedy="check the exclusions, or deploy the float model",
        )
    chosen = set(macs)
    for node in graph:
        if node.name in chosen or node.op_type not in ops or node.op_type in MAC_OPS:
            continue
        if node.domain not in ("", "ai.onnx") or not node.input or not float_activation(graph, node.input[0]):
            continue
        if node.name in excluded:
            skipped[node.name] = "excluded by the options"
        elif node.op_type in _ABSORBED and clip_bounds(graph, node) is None:
            skipped[node.name] = "its bounds do not enclose zero, or are computed"
        elif node.op_type == "Pad" and not _zero_pad(graph, node):
            skipped[node.name] = "it pads with something else than zero"
        else:
            chosen.add(node.name)

    by_name = {node.name: node for node in graph}
    absorbed = {
        node.name
        for node in graph
        if node.op_type in _ABSORBED
        and node.name in chosen
        and (maker := graph.producer(node.input[0])) is not None
        and maker.op_type == "Conv"
        and maker.name in macs
        and len(graph.consumers(node.input[0])) == 1
        and not graph.is_output(node.input[0])
    }

    def between(node: onnx.NodeProto) -> bool:
        before = any(
            (maker := graph.producer(name)) is not None and maker.name in chosen for name in node.input if name
        )
        after = any(reader.name in chosen for name in node.output for reader in graph.consumers(name))
        after = after or (options.quantize_outputs and any(graph.is_output(name) for name in node.output))
        return before and after

    while True:
        idle = {name for name in chosen - macs - absorbed if not between(by_name[name])}
        if not idle:
            break
        chosen -= idle
        skipped.update(dict.fromkeys(idle, "it does not stand between integer kernels"))

    tails = tuple(
        value
        for node in graph
        if node.name in macs
        for value in node.output
        if not any(reader.name in chosen for reader in graph.consumers(value))
    )
    return Placement(tuple(node.name for node in graph if node.name in chosen), tails, skipped)


def _zero_pad(graph: Graph, node: onnx.NodeProto) -> bool:
    if str(attributes(node).get("mode", "constant")) != "constant":
        return True
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = graph.constant(node.input[2])
    return value is not None and float(np.asarray(value).reshape(-1)[0]) == 0.0
