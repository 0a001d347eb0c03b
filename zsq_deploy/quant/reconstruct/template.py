"""The Q/DQ graph taken apart: where numbers are rounded (sites), which weights are integers (layers), and the graph without its Q/DQ.

The Q/DQ graph that the placement rules write is the contract. Learning needs the same graph with its quantizers exchangeable, so every
QuantizeLinear/DequantizeLinear pair of an activation becomes an Identity node that a tap can fill, and every stored weight and bias a float
initializer that can be fed. Value names behind the quantizers stay, so what is learned goes back by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.errors import ModelError, UsageError
from zsq_deploy.model.constants import own_constants
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.qdq import PlacementRules, insert_qdq
from zsq_deploy.quant.reader import is_dequantize, is_quantize, read_qdq
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["PRODUCTS", "WEIGHTED", "Layer", "Site", "Template", "make_template", "take_apart"]

Array = npt.NDArray[Any]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PRODUCTS = frozenset(WEIGHTED)


@dataclass(frozen=True)
class Site:
    """A place where an activation is rounded.

    Attributes:
        name: The float value.
        output: The value with the rounded numbers.
        source: Value of the float network that has these numbers before rounding.
        group: Name of the first site of those that share scale and zero point.
        signed: Whether the integers that hold the codes are signed.
        floor: Lower bound of the activation function that the integer range enforces in its place; minus infinity without one.
        ceiling: Upper bound of it.
        repeats: The numbers are on the grid already (behind nodes that only move them): rounding again changes nothing.
        from_input: The numbers are those of the network's input, moved at most.
    """

    name: str
    output: str
    source: str
    group: str
    signed: bool
    floor: float
    ceiling: float
    repeats: bool
    from_input: bool


@dataclass(frozen=True)
class Layer:
    """A node with an integer weight.

    Attributes:
        node: Its name.
        op_type: Its operator.
        x: Group of the site that it reads; empty where its input is not rounded.
        weight: Value that holds the (dequantized) weight.
        axis: Axis of the weight with one scale a channel; ``None`` with one scale for all.
        bias: Value that holds the bias; empty without one.
        integer_bias: The bias is stored as int32 with scale ``x_scale * w_scale``.
        output: Value that the node makes.
    """

    node: str
    op_type: str
    x: str
    weight: str
    axis: int | None
    bias: str
    integer_bias: bool
    output: str


@dataclass(frozen=True, eq=False)
class Template:
    """A network with its places for quantizers.

    Attributes:
        floating: The float graph that it was made from; no two layers share a constant.
        qdq: The Q/DQ graph with 8 bits everywhere.
        plain: The Q/DQ graph without Q/DQ: sites are Identity nodes, weights and biases float initializers.
        sites: In order of execution.
        layers: In order of execution.
        activation: Scheme of activations that the bits are put into.
        weight: Scheme of weights that the bits are put into.
        weights: Weight value -> float numbers.
        biases: Bias value -> float numbers, as stored.
    """

    floating: Graph
    qdq: Graph
    plain: Graph
    sites: tuple[Site, ...]
    layers: tuple[Layer, ...]
    activation: Scheme
    weight: Scheme
    weights: Mapping[str, Array] = field(repr=False)
    biases: Mapping[str, Array] = field(repr=False)

    def groups(self) -> dict[str, list[Site]]:
        """Group name to its sites."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.group, []).append(site)
        return found


def make_template(
    graph: Graph,
    ranges: Mapping[str, tuple[float, float]],
    *,
    activation: Scheme,
    weight: Scheme,
    rules: PlacementRules | None = None,
) -> Template:
    """Place quantizers by a target's rules and take the result apart.

    Args:
        graph: Batch normalization folded.
        ranges: Range of every activation that may be rounded; only their signs decide anything here.
        activation: Scheme of activations, per tensor, 8 bits.
        weight: Scheme of weights, per tensor or per channel, 8 bits.
        rules: Where Q/DQ may stand.

    Raises:
        UsageError: A scheme has other bits than 8, or weights in blocks.
        ModelError: Nothing in the network can be quantized.
    """
    # Weights are always stored as integers: that is what is learned.
    rules = dataclasses.replace(rules or PlacementRules(), store_weights="integers")
    _check_schemes(activation, weight)
    graph = own_constants(graph, WEIGHTED)
    qdq = insert_qdq(graph, ranges, activation=activation, weight=weight, rules=rules)
    return take_apart(graph, qdq, activation=activation, weight=weight, rules=rules)


def _check_schemes(activation: Scheme, weight: Scheme) -> None:
    if weight.granularity is Granularity.BLOCK or weight.bits != 8 or activation.bits != 8:
        raise UsageError(
            f"{activation} with {weight} cannot be learned",
            where="activation, weight",
            remedy="give the target's 8-bit schemes, weights per tensor or per channel; the bits are reduced within them",
        )


def take_apart(
    graph: Graph, qdq: Graph, *, activation: Scheme, weight: Scheme, rules: PlacementRules | None = None
) -> Template:
    """The template of a Q/DQ graph that is there already, by whomever it was written.

    Args:
        graph: The float graph that it was made from: nodes and values have the same names. No two layers share a constant.
        qdq: The Q/DQ graph, 8 bits everywhere, weights as integers behind DequantizeLinear. Other weights are left as they are.
        activation: Scheme of activations, per tensor, 8 bits.
        weight: Scheme of weights, per tensor or per channel, 8 bits.
        rules: Which nodes move numbers or share a scale; only that is read.

    Raises:
        UsageError: A scheme has other bits than 8, or weights in blocks.
        ModelError: Nothing in the network is quantized.
    """
    _check_schemes(activation, weight)
    rules = rules or PlacementRules()
    found = [tensor for tensor in read_qdq(qdq) if tensor.quantize is not None and not tensor.is_weight]
    layers, weights, biases = _layers(graph, qdq)
    if not layers:
        raise ModelError(
            "no layer of this network can be quantized",
            where=graph.proto.graph.name,
            remedy="check the placement rules, and that the calibration set covers the network",
        )
    outputs = {tensor.name: tensor.output for tensor in found}
    plain = _plain(qdq, outputs, {**weights, **biases})
    parameters = {t.name: (t.scale.tobytes(), t.zero_point.tobytes()) for t in found}
    by_output = {tensor.output: tensor.name for tensor in found}
    groups, repeats = _groups(plain, by_output, parameters, rules)
    from_input = _inputs(plain, rules)
    sites = []
    for tensor in found:
        source = tensor.output if tensor.output in _names(graph) else tensor.name
        floor, ceiling = _fused_bounds(graph, qdq, source)
        sites.append(
            Site(
                name=tensor.name,
                output=tensor.output,
                source=source,
                group=groups[tensor.name],
                signed=not tensor.dtype.startswith("u"),
                floor=floor,
                ceiling=ceiling,
                repeats=tensor.name in repeats,
                from_input=tensor.name in from_input,
            )
        )
    site_of = {site.output: site.group for site in sites}
    placed = tuple(Layer(layer.node, layer.op_type, site_of.get(layer.x, ""), *_rest(layer)) for layer in layers)
    return Template(graph, qdq, plain, tuple(sites), placed, activation, weight, weights, biases)


def _rest(layer: Layer) -> tuple[str, int | None, str, bool, str]:
    return layer.weight, layer.axis, layer.bias, layer.integer_bias, layer.output


def _names(graph: Graph) -> set[str]:
    return {spec.name for spec in graph.inputs} | {name for node in graph.nodes for name in node.output if name}


def _layers(graph: Graph, qdq: Graph) -> tuple[list[Layer], dict[str, Array], dict[str, Array]]:
    """Nodes whose weight is stored as integers, with the float numbers of weight and bias."""
    layers: list[Layer] = []
    weights: dict[str, Array] = {}
    biases: dict[str, Array] = {}
    for node in qdq.nodes:
        if node.op_type not in PRODUCTS or node.name not in graph:
            continue
        maker = qdq.producer(node.input[1])
        original = graph.node(node.name)
        array = graph.constant(original.input[1])
        if maker is None or not is_dequantize(maker) or array is None or qdq.constant(maker.input[0]) is None:
            continue
        scale = qdq.constant(maker.input[1])
        assert scale is not None
        axis = None if scale.size == 1 and scale.ndim == 0 else int(attributes(maker).get("axis", 1)) % array.ndim
        bias, integer = "", False
        if len(node.input) > 2 and node.input[2]:
            bias = str(node.input[2])
            behind = qdq.producer(bias)
            integer = behind is not None and is_dequantize(behind)
            if len(original.input) > 2 and original.input[2]:
                numbers = graph.constant(original.input[2])
                assert numbers is not None
                biases[bias] = np.asarray(numbers, np.float32)
            else:  # the Q/DQ graph's own, of a layer that has none
                held = qdq.constant(behind.input[0] if integer and behind is not None else bias)
                assert held is not None
                biases[bias] = np.zeros(held.shape, np.float32)
        weights[node.input[1]] = np.asarray(array, np.float32)
        layers.append(
            Layer(node.name, node.op_type, node.input[0], node.input[1], axis, bias, integer, str(node.output[0]))
        )
    return layers, weights, biases


def _plain(qdq: Graph, sites: Mapping[str, str], constants: Mapping[str, Array]) -> Graph:
    """The graph with Identity in place of each pair and float constants in place of stored integers."""
    net = Net(qdq.proto)
    kept: list[onnx.NodeProto] = []
    for node in net.nodes:
        if is_dequantize(node) and node.output[0] in constants:
            continue
        if is_quantize(node) and node.input[0] in sites:
            output = sites[node.input[0]]
            kept.append(onnx.helper.make_node("Identity", [node.input[0]], [output], name=node.name))
            continue
        if is_dequantize(node) and node.output[0] in sites.values():
            continue
        kept.append(node)
    net.nodes = kept
    net.touch()
    for name, array in constants.items():
        net.add_constant(name, array, exact=True)
    net.sweep()
    return Graph(net.proto())


def _groups(
    plain: Graph, by_output: Mapping[str, str], parameters: Mapping[str, tuple[bytes, bytes]], rules: PlacementRules
) -> tuple[dict[str, str], set[str]]:
    """Site -> first site of its group; and the sites whose numbers are on the grid already."""
    leader = {name: name for name in parameters}

    def root(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    order = {name: number for number, name in enumerate(parameters)}
    repeats: set[str] = set()
    for node in plain.nodes:
        moves = node.op_type in rules.transparent and node.op_type != "Identity"
        joins = node.op_type == "Concat" and rules.shared_concat
        pools = node.op_type in ("AveragePool", "GlobalAveragePool") and rules.shared_pool
        if not (moves or joins or pools):
            continue
        sources = [by_output.get(name) for name in (node.input[:1] if moves else node.input) if name]
        for name in node.output:
            if name not in parameters:
                continue
            same = [source is not None and parameters[source] == parameters[name] for source in sources]
            for source, equal in zip(sources, same, strict=True):
                if equal and source is not None:
                    first, second = sorted((root(source), root(name)), key=order.__getitem__)
                    leader[second] = first
            if all(same) and not pools:
                repeats.add(name)
    return {name: root(name) for name in parameters}, repeats


def _inputs(plain: Graph, rules: PlacementRules) -> set[str]:
    """Values that hold nothing but the network's input."""
    found = {spec.name for spec in plain.inputs}
    for node in plain.nodes:
        if node.op_type in rules.transparent and node.input[0] in found:
            found.update(node.output)
    return found


def _fused_bounds(graph: Graph, qdq: Graph, value: str) -> tuple[float, float]:
    """Bounds of the Relu or Clip behind which the float network has the value, and which the Q/DQ graph leaves out."""
    maker = graph.producer(value)
    if maker is None or maker.name in qdq or maker.op_type not in ("Relu", "Clip"):
        return -math.inf, math.inf
    if maker.op_type == "Relu":
        return 0.0, math.inf
    found = attributes(maker)
    limits = [float(found.get("min", -math.inf)), float(found.get("max", math.inf))]
    for index in (0, 1):
        if len(maker.input) > index + 1 and maker.input[index + 1]:
            given = graph.constant(maker.input[index + 1])
            assert given is not None
            limits[index] = float(given.reshape(-1)[0])
    return limits[0], limits[1]
