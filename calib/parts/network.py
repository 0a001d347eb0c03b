"""The network as synthesis runs it: batch norms folded away where that is exact, statistics watched where they are cheapest.

The distance to stored statistics is defined on what *enters* each batch norm, z. Where a convolution stands in front, the batch norm is
folded into it, so that only y = a z + b exists; the statistics of z follow from those of y channel by channel, so the folded
network gives the same loss for one pass over memory less per layer. That needs a scale `a` that float32 can undo: a layer in
which some channel's spread drowns in its offset (dead channels, mostly) stays unfolded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx

from zsq_deploy.calib.parts.bn_loss import BNLayer
from zsq_deploy.calib.parts.swing import swing_edges
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["SynthesisNetwork", "bn_layers", "prepare"]

# A Relu or Clip that alone reads a watched value is applied by the watch itself.
_RECTIFIERS = ("Relu", "Clip")
# Operators whose backward makes a new tensor, so that the gradient they send may be changed in place. An Add, for example,
# sends the same tensor to both of its inputs.
_FRESH_GRADIENT = frozenset({"Conv", "Relu", "Clip", "LeakyRelu", "HardSwish", "MaxPool", "BatchNormalization"})
# Smallest spread of a folded channel against its offset. Below it rounding of y would show in the statistics of z.
_SPREAD_AGAINST_OFFSET = 1e-3


class _BatchNorm(Protocol):
    @property
    def node(self) -> str: ...
    @property
    def input(self) -> str: ...
    @property
    def output(self) -> str: ...
    @property
    def gamma(self) -> np.ndarray[Any, Any]: ...
    @property
    def beta(self) -> np.ndarray[Any, Any]: ...
    @property
    def mean(self) -> np.ndarray[Any, Any]: ...
    @property
    def var(self) -> np.ndarray[Any, Any]: ...
    @property
    def eps(self) -> float: ...
    @property
    def conv(self) -> str | None: ...


class _Model(Protocol):
    @property
    def graph(self) -> Graph: ...
    def batch_norms(self) -> Sequence[Any]: ...


@dataclass(frozen=True)
class SynthesisNetwork:
    """A graph to differentiate, and what to watch in it.

    Attributes:
        graph: Build a twin of it.
        layers: The batch-norm layers, in graph order of the original network.
        bounds: Watched values that a rectifier reads alone, with its bounds; the watch applies it and the graph no longer does.
        joins: Watched values that a sum reads alone, with the value that it adds; the watch adds it and the graph no longer does.
        owned: Watched values whose gradient may be changed in place.
        edges: Inputs of strided convolutions under names of their own, for swing convolution.
        folded: How many batch norms are folded away.
    """

    graph: Graph
    layers: tuple[BNLayer, ...]
    bounds: Mapping[str, tuple[float, float]]
    joins: Mapping[str, str]
    owned: frozenset[str]
    edges: tuple[str, ...]
    folded: int


def bn_layers(batch_norms: Sequence[_BatchNorm], folded: frozenset[str] = frozenset()) -> tuple[BNLayer, ...]:
    """The layers to match; those whose node name is in `folded` are watched at the batch norm's output."""
    layers = []
    for bn in batch_norms:
        if bn.node in folded:
            scale = bn.gamma / np.sqrt(bn.var + bn.eps)
            offset = bn.beta - scale * bn.mean
            layers.append(BNLayer(bn.node, bn.output, bn.mean, bn.var, bn.eps, scale, offset, direct=True))
        else:
            layers.append(BNLayer(bn.node, bn.input, bn.mean, bn.var, bn.eps, direct=bn.conv is not None))
    return tuple(layers)


def prepare(model: _Model, *, fast: bool = True, swing: bool = False) -> SynthesisNetwork:
    """Make the network that synthesis runs.

    Args:
        model: The network, batch norms in place.
        fast: Fold batch norms and fuse rectifiers; ``False`` keeps the graph as it is (for checks, and for comparison).
        swing: Name the inputs of strided convolutions.
    """
    batch_norms = list(model.batch_norms())
    graph, folded = (_fold(model.graph, batch_norms)) if fast else (model.graph, frozenset[str]())
    layers = bn_layers(batch_norms, folded)
    bounds: dict[str, tuple[float, float]] = {}
    joins: dict[str, str] = {}
    if fast:
        graph, bounds = _fuse_rectifiers(graph, layers)
        graph, joins = _fuse_sums(graph, layers, bounds)
    # A value that is added without a rectifier behind shares its gradient with the sum.
    shared = {addend for value, addend in joins.items() if value not in bounds}
    owned = frozenset(
        layer.value
        for layer in layers
        if not graph.is_output(layer.value)
        and layer.value not in shared
        and all(_sends_fresh(node) for node in graph.consumers(layer.value))
    )
    graph, edges = swing_edges(graph) if swing else (graph, ())
    return SynthesisNetwork(graph, layers, bounds, joins, owned, edges, len(folded))


def _sends_fresh(node: onnx.NodeProto) -> bool:
    return node.op_type in _FRESH_GRADIENT and node.domain in ("", "ai.onnx")


def _fold(graph: Graph, batch_norms: Sequence[_BatchNorm]) -> tuple[Graph, frozenset[str]]:
    from zsq_deploy.model import fold

    proto = graph.editable()
    present = {output.name for output in proto.graph.output}
    for bn in batch_norms:
        spread = np.abs(bn.gamma) * np.sqrt(bn.var / (bn.var + bn.eps))
        exact = bool(np.all((spread > _SPREAD_AGAINST_OFFSET * np.abs(bn.beta)) & (spread > 1e-10)))
        if bn.conv is not None and not exact and bn.input not in present:
            # A value that the outside wants to see cannot be folded away.
            proto.graph.output.append(onnx.helper.make_tensor_value_info(bn.input, onnx.TensorProto.FLOAT, None))
            present.add(bn.input)
    folded = fold(Graph(proto))
    # A layer that carries the batch norm's own name is an affine layer in its place: nothing was folded there.
    return folded.graph, frozenset(bn.node for layer, bn in folded.batch_norms.items() if layer != bn.node)


def _bounds_of(graph: Graph, node: onnx.NodeProto) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, np.inf
    found = attributes(node)
    sides = [found.get("min", -np.inf), found.get("max", np.inf)]
    for index, name in enumerate(node.input[1:3]):
        if name:
            constant = graph.constant(name)
            if constant is None or constant.size != 1:
                return None
            sides[index] = float(constant.reshape(()))
    return float(sides[0]), float(sides[1])


def _fuse_rectifiers(graph: Graph, layers: Sequence[BNLayer]) -> tuple[Graph, dict[str, tuple[float, float]]]:
    """Take out each Relu or Clip that alone reads a watched value; its readers read the watched value instead."""
    watched = [layer.value for layer in layers]
    bounds: dict[str, tuple[float, float]] = {}
    renamed: dict[str, str] = {}
    removed: set[str] = set()
    for value in dict.fromkeys(watched):
        consumers = graph.consumers(value)
        if watched.count(value) > 1 or graph.is_output(value) or len(consumers) != 1:
            continue
        node = consumers[0]
        if node.op_type not in _RECTIFIERS or node.domain not in ("", "ai.onnx"):
            continue
        result = node.output[0]
        limits = _bounds_of(graph, node)
        if limits is None or graph.is_output(result) or result in watched:
            continue
        bounds[value], renamed[result] = limits, value
        removed.add(node.name)
    return (_rewritten(graph, graph.nodes, removed, renamed), bounds) if removed else (graph, {})


def _fuse_sums(
    graph: Graph, layers: Sequence[BNLayer], bounds: dict[str, tuple[float, float]]
) -> tuple[Graph, dict[str, str]]:
    """Take out each Add that alone reads a watched value, and a rectifier behind it; `bounds` gets the rectifier's.

    The layer that makes the watched value moves to the place of the Add, where the other summand exists.
    """
    watched = [layer.value for layer in layers]
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    joins: dict[str, str] = {}
    renamed: dict[str, str] = {}
    removed: set[str] = set()
    at: dict[str, str] = {}  # Add -> the node that takes its place
    for node in graph.nodes:
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or len(set(node.input)) != 2:
            continue
        shapes = [graph.shape(name) for name in node.input]
        if shapes[0] is None or shapes[1] is None or len(shapes[0]) != 4 or shapes[0][1:] != shapes[1][1:]:
            continue
        if None in shapes[0][1:] or shapes[0][0] != shapes[1][0]:
            continue
        free = [
            name
            for name in node.input
            if watched.count(name) == 1
            and name not in bounds
            and not graph.is_output(name)
            and len(graph.consumers(name)) == 1
            and graph.producer(name) is not None
        ]
        if not free or any(graph.constant(name) is not None for name in node.input):
            continue
        value = max(free, key=lambda name: order[_producer(graph, name).name])
        other = next(name for name in node.input if name != value)
        result = node.output[0]
        if graph.is_output(result) or result in watched:
            continue
        joins[value], renamed[result], at[node.name] = other, value, _producer(graph, value).name
        readers = graph.consumers(result)
        rectifier = readers[0] if len(readers) == 1 and readers[0].op_type in _RECTIFIERS else None
        limits = None if rectifier is None else _bounds_of(graph, rectifier)
        if rectifier is not None and limits is not None:
            after = rectifier.output[0]
            if not graph.is_output(after) and after not in watched:
                bounds[value], renamed[after] = limits, value
                removed.add(rectifier.name)
    if not joins:
        return graph, {}
    moved = set(at.values())
    nodes = [graph.node(at[node.name]) if node.name in at else node for node in graph.nodes if node.name not in moved]
    joins = {value: renamed.get(other, other) for value, other in joins.items()}
    return _rewritten(graph, nodes, removed, renamed), joins


def _producer(graph: Graph, value: str) -> onnx.NodeProto:
    node = graph.producer(value)
    assert node is not None
    return node


def _rewritten(graph: Graph, nodes: Sequence[onnx.NodeProto], removed: set[str], renamed: Mapping[str, str]) -> Graph:
    """A graph of these nodes without the removed ones, where readers of renamed values read their new names."""
    proto = graph.editable()
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes if node.name not in removed]
    for node in kept:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return Graph(proto)
