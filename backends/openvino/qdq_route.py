"""Our own placement of Q/DQ for OpenVINO, by the rules of its low-precision transformations.

What OpenVINO's CPU plugin was seen to do, and what follows for the graph (``zsq_deploy/docs/exact-scales.md`` has the measurements):

* A residual Add becomes part of the convolution in front of it. Rounding between the two would be lost, so there is none; the other
  operand is rounded.
* Convolutions and matrix products with weights take unsigned activations with any zero point and give float or 8 bits.
* A product of two computed matrices runs in integers only without zero points, and only with a signed second factor.
* Transposed convolutions run in integers only without zero points.
* Nodes that move numbers, pooling and concatenation work on 8-bit numbers if what they read is rounded; a second rounding behind
  them would be a kernel of its own.
* Relu, Clip and most other activations are computed on the float sum, before it is rounded, as the graph says.
* Biases are float numbers.

A convolution or matrix product is quantized unless it is excluded. Add, Mul, Concat and pooling are quantized only between such nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, cast

import numpy as np

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.openvino.design import Design
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.model.constants import own_constants, replace_constants
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import apply_biases
from zsq_deploy.quant.qdq import TRANSPARENT, PlacementRules, insert_qdq
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["MAC_OPS", "OPS", "Plan", "design_qdq", "plan_qdq"]

MAC_OPS: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply and accumulate, and that have an integer kernel."""

OPS: tuple[str, ...] = (*MAC_OPS, "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean")
"""Operators that our rules round the operands of."""

_PASSING = TRANSPARENT | {"Relu", "Clip", "LeakyRelu", "PRelu"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is quantized.

    Attributes:
        nodes: Names of the nodes whose operands are rounded, in graph order.
        skipped: Node name -> why it stays in float, for nodes that could be quantized.
        schemes: Value -> scheme, where it is not the target's.
    """

    nodes: tuple[str, ...]
    skipped: Mapping[str, str]
    schemes: Mapping[str, Scheme]


def design_qdq(
    model: Any,
    ranges: Mapping[str, tuple[float, float]],
    target: Target,
    options: BuildOptions,
    *,
    progress: Progress = SILENT,
) -> Design:
    """Write Q/DQ into a network by our own rules.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        ranges: Range of every activation of ``model.folded().graph``.
        target: What to build for.
        options: What to quantize and how.
        progress: Watches.

    Returns:
        The design; scales are free (:func:`zsq_deploy.quant.settle.settle` moves them to the exact grid).

    Raises:
        UsageError: A node to exclude or a weight to replace is not in the network.
        EngineError: Nothing can be quantized.
    """
    with progress.task("place Q/DQ", 2) as task:
        graph = own_constants(
            replace_constants(apply_biases(model.folded().graph, options.biases), options.weights), MAC_OPS
        )
        plan = plan_qdq(graph, ranges, target.activation, op_types=options.op_types, exclude=options.exclude)
        task.advance(step="placed")
        chosen = set(plan.nodes)
        rules = PlacementRules(
            compute=frozenset({graph.node(name).op_type for name in plan.nodes}),
            exclude=frozenset({*options.exclude, *(node.name for node in graph if _computes(node, chosen))}),
            residual="skip",
            quantize_outputs=options.quantize_outputs,
            always_output=frozenset(),
            bias="float",
            drop_activations=False,
            split_activations=False,
            round_outputs="read",
            float_readers=True,
        )
        qdq = insert_qdq(
            graph,
            ranges,
            activation=target.activation,
            weight=target.weight,
            rules=rules,
            weight_method=cast("Literal['minmax', 'mse']", options.weight_method),
            weight_scales=options.weight_scales,
            schemes=plan.schemes,
        )
        task.advance(step="written")
    record = {
        "placement": "own rules",
        "op_types": sorted({graph.node(name).op_type for name in plan.nodes}),
        "nodes_quantized": len(plan.nodes),
        "float_nodes": dict(plan.skipped),
        "signed_values": sorted(name for name, scheme in plan.schemes.items() if scheme.signed),
    }
    return Design(qdq=qdq, record=record)


def _computes(node: Any, chosen: Collection[str]) -> bool:
    """Whether a node has an operator of ours, but is not among those chosen."""
    return node.op_type in OPS and node.name not in chosen


def plan_qdq(
    graph: Graph,
    ranges: Mapping[str, tuple[float, float]],
    activation: Scheme,
    *,
    op_types: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Plan:
    """Decide which nodes are quantized, and which values have to be signed.

    Args:
        graph: Float graph with batch norm folded.
        ranges: Range of every activation.
        activation: The target's scheme of activations.
        op_types: Operator types to quantize, instead of :data:`OPS`.
        exclude: Names of nodes that stay in float.

    Raises:
        UsageError: A name is not in the graph.
        EngineError: Nothing can be quantized.
    """
    excluded = frozenset(exclude)
    unknown = sorted(name for name in excluded if name not in graph)
    if unknown:
        raise UsageError(
            f"nodes to exclude are not in the network: {', '.join(unknown[:5])}",
            where="exclude",
            remedy="take the names from `zsq inspect`",
        )
    ops = frozenset(OPS if op_types is None else op_types)
    skipped: dict[str, str] = {}
    chosen: set[str] = set()
    for node in graph:
        if node.op_type not in OPS or node.domain not in ("", "ai.onnx"):
            continue
        if node.name in excluded:
            skipped[node.name] = "excluded by the options"
        elif node.op_type not in ops:
            skipped[node.name] = f"{node.op_type} is not among the operators to quantize"
        elif op_types is None and node.op_type == "MatMul" and graph.constant(node.input[1]) is None:
            # Measured on a ViT: 99.1 % of outputs within 2 LSB of the graph with attention in integers, 100 % without, at equal speed. The sums
            # of softmax times values have no bias that keeps them off ties, and the plugin breaks those with an inexact factor.
            skipped[node.name] = (
                "attention in integers parts from its graph here; name MatMul in op_types to have it so"
            )
        elif problem := _problem(graph, node, ranges):
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
        idle = {name for name in chosen - macs if not _stands_between(graph, name, chosen)}
        if not idle:
            break
        chosen -= idle
        skipped.update(dict.fromkeys(idle, "it does not stand between integer kernels"))
    nodes = tuple(node.name for node in graph if node.name in chosen)
    return Plan(nodes, skipped, _schemes(graph, nodes, ranges, activation))


def _computed(graph: Graph, value: str) -> bool:
    return bool(value) and graph.constant(value) is None


def _problem(graph: Graph, node: Any, ranges: Mapping[str, tuple[float, float]]) -> str:
    """Why the operands of a node cannot be rounded, or should not be; empty if they can."""
    found = attributes(node)
    if node.op_type in MAC_OPS:
        weight = graph.constant(node.input[1])
        if not _computed(graph, node.input[0]):
            return "its first input is not computed"
        if weight is None and node.op_type != "MatMul":
            return "its weights are computed, not constant"
        if node.op_type == "Gemm" and (found.get("transA", 0) or found.get("alpha", 1.0) != 1.0):
            return "its first input is transposed or scaled"
    elif node.op_type in ("Add", "Mul") and any(not _computed(graph, name) for name in node.input):
        return "a constant operand is fused into the kernel in front of it"
    elif node.op_type == "ReduceMean" and not _pools(graph, node):
        return "it is not a mean over all places of an image"
    dynamic = [name for name in node.input[:2] if _computed(graph, name)]
    if any(graph.dtype(name) not in (None, np.dtype(np.float32)) for name in dynamic):
        return "it does not compute in float32"
    missing = [name for name in dynamic if not _has_range(graph, name, ranges)]
    return f"the range of {missing[0]!r} is not known" if missing else ""


def _has_range(graph: Graph, value: str, ranges: Mapping[str, tuple[float, float]]) -> bool:
    while value not in ranges:
        node = graph.producer(value)
        if node is None or node.op_type not in TRANSPARENT:
            return False
        value = node.input[0]
    return True


def _pools(graph: Graph, node: Any) -> bool:
    shape = graph.shape(node.input[0])
    axes = attributes(node).get("axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        constant = graph.constant(node.input[1])
        axes = None if constant is None else constant.reshape(-1).tolist()
    if shape is None or len(shape) < 3 or axes is None:
        return False
    return sorted(int(axis) % len(shape) for axis in axes) == list(range(2, len(shape)))


def _stands_between(graph: Graph, name: str, chosen: Collection[str]) -> bool:
    node = graph.node(name)
    return any(_comes_from(graph, value, chosen) for value in node.input) and any(
        _leads_to(graph, value, chosen) for value in node.output
    )


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


def _schemes(
    graph: Graph, nodes: Iterable[str], ranges: Mapping[str, tuple[float, float]], activation: Scheme
) -> dict[str, Scheme]:
    """Values that must not have a zero point: unsigned where they have no negative numbers anyway, else symmetric."""
    signed = Scheme(bits=activation.bits, signed=True, symmetric=True, granularity=Granularity.TENSOR)
    found: dict[str, Scheme] = {}
    for name in nodes:
        node = graph.node(name)
        if node.op_type == "ConvTranspose":
            values = [node.input[0]]
        elif node.op_type == "MatMul" and graph.constant(node.input[1]) is None:
            values = [node.input[0]]
            found[node.input[1]] = signed
        else:
            continue
        for value in values:
            if _low(graph, value, ranges) < 0:
                found[value] = signed
    return found


def _low(graph: Graph, value: str, ranges: Mapping[str, tuple[float, float]]) -> float:
    while value not in ranges:
        node = graph.producer(value)
        if node is None:
            return 0.0
        value = node.input[0]
    return float(ranges[value][0])
