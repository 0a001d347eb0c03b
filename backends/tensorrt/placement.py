"""Our own placement of Q/DQ for TensorRT, by NVIDIA's rules for explicit quantization.

* Both operands of a convolution or matrix product are rounded directly in front of it: activations per tensor, weights per output
  channel, signed and without a zero point. Its bias stays a float number.
* Nothing is rounded between a convolution and the activation behind it: they are one kernel.
* Of a residual Add, the operand that comes straight from a convolution stays as it is, and the other one is rounded: then convolution,
  Add and activation are one kernel that reads and writes 8 bits.
* All inputs of a concatenation have one scale, and what reads its output has the same.
* Pooling and nodes that only move numbers are transparent: a scale holds on both of their sides.
* The network's outputs stay in float, and so do Adds, pooling and concatenation that do not stand between integer kernels.

Source: NVIDIA, *Working with Quantized Types: Explicit Quantization* (TensorRT documentation), sections on Q/DQ layer-placement
recommendations and on Q/DQ propagation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal, cast

import numpy as np
import onnx

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.model.constants import own_constants, replace_constants
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.algebra.squant import squant
from zsq_deploy.quant.bias import apply_biases
from zsq_deploy.quant.fakequant import weight_qparams
from zsq_deploy.quant.qdq import TRANSPARENT, PlacementRules, insert_qdq, raise_opset
from zsq_deploy.quant.scheme import Granularity, Scheme
from zsq_deploy.quant.settle import settle

__all__ = ["MAC_OPS", "OPS", "Placed", "floats_of", "place_int4", "place_qdq", "plan_nodes"]

Array = np.ndarray[Any, Any]
Ranges = Mapping[str, tuple[float, float]]

MAC_OPS: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply and accumulate, and that have an 8-bit kernel."""

OPS: tuple[str, ...] = (*MAC_OPS, "Add", "Concat", "AveragePool", "GlobalAveragePool")
"""Operators whose operands our rules round."""

_PASSING = TRANSPARENT | {"Relu", "Clip", "LeakyRelu"}


@dataclasses.dataclass(frozen=True)
class Placed:
    """A Q/DQ graph for TensorRT, and how it came about.

    Attributes:
        graph: The Q/DQ graph.
        nodes: Names of the nodes whose operands are rounded, in graph order.
        skipped: Node name -> why it stays in float, for nodes that could be quantized.
        coarser: Mean factor by which settling made activation scales grow (1.0: not at all, or not settled).
        inexact: Layer -> number of channels whose codes may depend on the order of operations; empty if scales were not settled.
        notes: What a reader should know, one sentence each.
    """

    graph: Graph
    nodes: tuple[str, ...]
    skipped: Mapping[str, str]
    coarser: float = 1.0
    inexact: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """JSON values for the manifest."""
        return {
            "placement": "explicit Q/DQ, own rules",
            "nodes_quantized": len(self.nodes),
            "float_nodes": dict(self.skipped),
            "activation_steps_grew_by": self.coarser,
            "inexact_layers": dict(self.inexact),
        }


def place_qdq(graph: Graph, ranges: Ranges, target: Target, options: BuildOptions | None = None) -> Placed:
    """Write Q/DQ into a float network by NVIDIA's rules.

    Args:
        graph: Float graph with batch normalization folded.
        ranges: Range of every activation of it.
        target: One of the ``tensorrt-...`` targets.
        options: What to quantize and how.

    Returns:
        The graph, with its scales settled if the options ask for exact ones.

    Raises:
        UsageError: A node to exclude or a weight to replace is not in the network.
        EngineError: Nothing can be quantized.
    """
    options = options or BuildOptions()
    graph = own_constants(replace_constants(apply_biases(graph, options.biases), options.weights), MAC_OPS)
    graph = raise_opset(graph, min(target.opset, 13))  # scales per channel
    nodes, skipped = plan_nodes(graph, ranges, options)
    chosen = set(nodes)
    rules = PlacementRules(
        compute=frozenset(graph.node(name).op_type for name in nodes),
        exclude=frozenset(node.name for node in graph if node.op_type in OPS and node.name not in chosen),
        residual="skip",
        always_output=frozenset(),
        bias="float",
        drop_activations=False,
        split_activations=False,
        round_outputs="read",
        place_reads="late",
        float_readers=True,
        store_weights="float" if generation(target) < 10 else "integers",
    )
    written = insert_qdq(
        graph,
        _one_code_short(ranges) if options.exact_scales else ranges,
        activation=target.activation,
        weight=target.weight,
        rules=rules,
        weight_method=cast("Literal['minmax', 'mse']", options.weight_method),
        weight_scales=options.weight_scales,
    )
    if not options.exact_scales:
        return Placed(_flipped(written, graph, options), nodes, skipped)
    floats = _weights_of(graph)
    settled = settle(written, activation=target.activation, weight=target.weight, float_weights=floats)
    final = _flipped(settled.graph, graph, options)
    return Placed(final, nodes, skipped, settled.coarser, settled.inexact, settled.notes)


def _flipped(qdq: Graph, graph: Graph, options: BuildOptions) -> Graph:
    """The Q/DQ graph with the weights rounded as the options say, on its final scales."""
    return squant(qdq, graph) if options.rounding == "squant" else qdq


def _weights_of(graph: Graph) -> dict[str, Array]:
    return {
        node.name: weight
        for node in graph
        if node.op_type in MAC_OPS and (weight := graph.constant(node.input[1])) is not None
    }


def floats_of(graph: Graph, options: BuildOptions) -> dict[str, Array]:
    """Node name -> the float weights that :func:`place_qdq` rounds for these options."""
    return _weights_of(replace_constants(graph, options.weights))


def _one_code_short(ranges: Ranges) -> dict[str, tuple[float, float]]:
    """Ranges whose upper end is 128 steps away, of which int8 has 127.

    The largest number of all is rounded down by one step then. In exchange, ranges that end at a number of few bits, such as the 6 of
    Relu6, have steps of few bits, which settling does not have to make coarser.
    """
    return {name: (low, high * 127.0 / 128.0) for name, (low, high) in ranges.items()}


def plan_nodes(graph: Graph, ranges: Ranges, options: BuildOptions) -> tuple[tuple[str, ...], dict[str, str]]:
    """Decide which nodes are quantized.

    Args:
        graph: Float graph with batch normalization folded.
        ranges: Range of every activation.
        options: Operator types and exclusions.

    Returns:
        Names of the nodes, in graph order; and node name -> why it stays in float, for the others that could be.

    Raises:
        UsageError: A name to exclude is not in the graph.
        EngineError: Nothing can be quantized.
    """
    unknown = sorted(name for name in (*options.exclude, *options.spared) if name not in graph)
    if unknown:
        raise UsageError(
            f"nodes to exclude are not in the network: {', '.join(unknown[:5])}",
            where="exclude",
            remedy="take the names from `zsq inspect`",
        )
    wanted = OPS if options.op_types is None else options.op_types
    skipped: dict[str, str] = {}
    chosen: set[str] = set()
    for node in graph:
        if node.op_type not in OPS or node.domain not in ("", "ai.onnx"):
            continue
        if node.name in options.exclude:
            skipped[node.name] = "excluded by the options"
        elif node.name in options.spared:
            skipped[node.name] = "8 bits would lose too much here, on synthetic images"
        elif node.op_type not in wanted:
            skipped[node.name] = f"{node.op_type} is not among the operators to quantize"
        elif problem := _problem(graph, node, ranges, options.attention):
            skipped[node.name] = problem
        else:
            chosen.add(node.name)
    macs = {name for name in chosen if graph.node(name).op_type in MAC_OPS}
    if not macs:
        raise EngineError(
            "no convolution or matrix product of this network can be quantized",
            where=f"{len(graph.nodes)} nodes; {'; '.join(f'{k}: {v}' for k, v in list(skipped.items())[:5])}",
            remedy="check the exclusions, or deploy the float model",
        )
    while True:
        idle: dict[str, str] = {}
        for name in chosen - macs:
            node = graph.node(name)
            if node.op_type == "Add" and _convolved(graph, node, chosen) is None:
                idle[name] = "no operand comes straight from an integer convolution"
            elif not (
                any(_comes_from(graph, value, chosen) for value in node.input)
                and all(_leads_to(graph, value, chosen) for value in node.output)
            ):
                idle[name] = "it does not stand between integer kernels"
        if not idle:
            break
        chosen -= idle.keys()
        skipped.update(idle)
    return tuple(node.name for node in graph if node.name in chosen), skipped


def _computed(graph: Graph, value: str) -> bool:
    return bool(value) and graph.constant(value) is None


def _problem(graph: Graph, node: onnx.NodeProto, ranges: Ranges, attention: bool) -> str:
    """Why the operands of a node cannot be rounded, or should not be; empty if they can."""
    found = attributes(node)
    if node.op_type in MAC_OPS:
        weight = graph.constant(node.input[1])
        if not _computed(graph, node.input[0]):
            return "its first input is not computed"
        if weight is None and node.op_type != "MatMul":
            return "its weights are computed, not constant"
        if weight is None and not attention:
            return "a product of two computed matrices: TensorRT fuses attention in float"
        if weight is not None and node.op_type == "MatMul" and weight.ndim != 2:
            return f"its weights have {weight.ndim} dimensions"
        if node.op_type == "Gemm" and (found.get("transA", 0) or found.get("alpha", 1.0) != 1.0):
            return "its first input is transposed or scaled"
    elif any(not _computed(graph, name) for name in node.input if name):
        return "an operand is constant"
    dynamic = [name for name in (node.input[:2] if node.op_type in MAC_OPS else node.input) if _computed(graph, name)]
    if any(graph.dtype(name) not in (None, np.dtype(np.float32)) for name in dynamic):
        return "it does not compute in float32"
    missing = [name for name in dynamic if not _has_range(graph, name, ranges)]
    return f"the range of {missing[0]!r} is not known" if missing else ""


def _has_range(graph: Graph, value: str, ranges: Ranges) -> bool:
    while value not in ranges:
        node = graph.producer(value)
        if node is None or node.op_type not in TRANSPARENT:
            return False
        value = node.input[0]
    return True


def _convolved(graph: Graph, add: onnx.NodeProto, chosen: Collection[str]) -> str | None:
    """The operand of an Add that comes straight from an integer convolution that nothing else reads."""
    for value in reversed(add.input):
        maker = graph.producer(value)
        if (
            maker is not None
            and maker.op_type in ("Conv", "ConvTranspose")
            and maker.name in chosen
            and len(graph.consumers(value)) == 1
            and not graph.is_output(value)
        ):
            return str(value)
    return None


def _comes_from(graph: Graph, value: str, chosen: Collection[str]) -> bool:
    maker = graph.producer(value)
    while maker is not None and maker.name not in chosen and maker.op_type in _PASSING:
        maker = graph.producer(maker.input[0])
    return maker is not None and maker.name in chosen


def _leads_to(graph: Graph, value: str, chosen: Collection[str]) -> bool:
    return any(
        reader.name in chosen
        or (reader.op_type in _PASSING and any(_leads_to(graph, name, chosen) for name in reader.output))
        for reader in graph.consumers(value)
    )


def place_int4(graph: Graph, target: Target, options: BuildOptions | None = None) -> Placed:
    """Store the weights of matrix products in 4 bits, with one scale for each block of a column; everything computes in float.

    Blocks run along the axis that is summed over and have 128 weights, or 64 where that axis is no multiple of 128; layers whose axis
    is a multiple of neither stay as they are.

    Args:
        graph: Float graph with batch normalization folded.
        target: ``tensorrt-10`` or ``tensorrt-11``.
        options: Exclusions, replaced weights, and the longest block.

    Raises:
        UsageError: The target knows no 4-bit weights, or a name is not in the network.
        EngineError: No weight can be stored in blocks.
    """
    options = options or BuildOptions(bits="w4a32")
    if generation(target) < 10:
        raise UsageError(f"{target.name} knows no 4-bit weights", where="--bits", remedy="choose w8a8, or tensorrt-10")
    unknown = sorted(name for name in options.exclude if name not in graph)
    if unknown:
        raise UsageError(
            f"nodes to exclude are not in the network: {', '.join(unknown[:5])}",
            where="exclude",
            remedy="take the names from `zsq inspect`",
        )
    graph = raise_opset(
        own_constants(replace_constants(apply_biases(graph, options.biases), options.weights), MAC_OPS), 21
    )
    net = Net(graph.proto)
    stored: list[str] = []
    skipped: dict[str, str] = {}
    for node in list(net.nodes):
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            continue
        weight = graph.constant(node.input[1])
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            skipped[node.name] = "its second input is no constant matrix of float32 numbers"
            continue
        axis = 1 if node.op_type == "Gemm" and attributes(node).get("transB", 0) else 0
        block = next((size for size in (128, 64) if size <= options.block and weight.shape[axis] % size == 0), 0)
        if node.name in options.exclude:
            skipped[node.name] = "excluded by the options"
        elif not block:
            skipped[node.name] = f"{weight.shape[axis]} weights to sum over are no multiple of 64"
        else:
            _store_int4(net, node, weight, axis, block, cast("Literal['minmax', 'mse']", options.weight_method))
            stored.append(node.name)
    if not stored:
        raise EngineError(
            "no matrix product of this network can have 4-bit weights in blocks",
            where="; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5]) or "there is none",
            remedy="quantize it with --bits w8a8",
        )
    net.touch()
    net.sweep()
    return Placed(Graph(net.proto()), tuple(stored), skipped)


def _store_int4(
    net: Net, node: onnx.NodeProto, weight: Array, axis: int, block: int, method: Literal["minmax", "mse"]
) -> None:
    scheme = Scheme(bits=4, signed=True, symmetric=True, granularity=Granularity.BLOCK, block=block)
    parameters = weight_qparams(weight, scheme, axis, method)
    name = node.input[1]
    codes = parameters.quantize(np.asarray(weight, np.float64))
    value = net.fresh(f"{name}_DequantizeLinear_Output")
    inputs = [
        net.add_constant(f"{name}_quantized", codes),
        net.add_constant(f"{name}_scale", parameters.scale),
        net.add_constant(f"{name}_zero_point", parameters.zero_point.astype(codes.dtype)),
    ]
    net.insert_before(
        node,
        net.new_node("DequantizeLinear", inputs, [value], f"{name}_DequantizeLinear", axis=axis, block_size=block),
    )
    node.input[1] = value
