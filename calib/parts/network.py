"""The network as synthesis runs it: what follows a measured value is done while it is measured.

The distance to stored statistics is defined on what enters each batch norm. Statistics need one pass over that value; the batch norm itself, the
sum at the end of a residual branch and the rectifier behind them are element by element and ride along (see
:func:`~.moments.watch`). So they are taken out of the graph here, wherever nothing else reads the values between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.calib.parts.bn_loss import BNLayer
from zsq_deploy.calib.parts.swing import swing_edges
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["SynthesisNetwork", "prepare"]

Float64 = npt.NDArray[np.float64]

# A Relu or Clip that alone reads a watched value is applied by the watch itself.
_RECTIFIERS = ("Relu", "Clip")
# Operators whose backward makes a new tensor, so that the gradient they send may be changed in place. An Add, for example,
# sends the same tensor to both of its inputs.
_FRESH_GRADIENT = frozenset({"Conv", "Relu", "Clip", "LeakyRelu", "HardSwish", "MaxPool", "BatchNormalization"})


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
        layers: The batch-norm layers, in graph order.
        affine: Watched values that their batch norm reads alone, with its scale and shift [C]; the graph no longer holds it.
        joins: Watched values that then go into a sum alone, with the value that is added; the graph no longer holds the sum.
        bounds: Watched values that then go into a rectifier alone, with its bounds; the graph no longer holds it.
        owned: Watched values whose gradient may be changed in place.
        edges: Inputs of strided convolutions under names of their own, for swing convolution.
    """

    graph: Graph
    layers: tuple[BNLayer, ...]
    affine: Mapping[str, tuple[Float64, Float64]]
    joins: Mapping[str, str]
    bounds: Mapping[str, tuple[float, float]]
    owned: frozenset[str]
    edges: tuple[str, ...]


def prepare(
    model: _Model, *, hook: Literal["bn_in", "conv_out"] = "bn_in", fast: bool = True, swing: bool = False
) -> SynthesisNetwork:
    """Make the network that synthesis runs.

    Args:
        model: The network, batch norms in place.
        hook: The loss's (see :class:`~.bn_loss.BNLoss`): a batch norm that it leaves out stays in the graph.
        fast: Do what follows a watched value while watching it; ``False`` keeps the graph as it is (for checks).
        swing: Name the inputs of strided convolutions.
    """
    batch_norms = list(model.batch_norms())
    layers = tuple(
        BNLayer(bn.node, bn.input, bn.mean, bn.var, bn.eps, direct=bn.conv is not None) for bn in batch_norms
    )
    graph = model.graph
    affine: dict[str, tuple[Float64, Float64]] = {}
    joins: dict[str, str] = {}
    bounds: dict[str, tuple[float, float]] = {}
    if fast:
        graph, affine = _absorb(graph, [bn for bn in batch_norms if hook == "bn_in" or bn.conv is not None])
        graph, bounds = _fuse_rectifiers(graph, list(affine))
        graph, joins = _fuse_sums(graph, list(affine), bounds)
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
    return SynthesisNetwork(graph, layers, affine, joins, bounds, owned, edges)


def _sends_fresh(node: onnx.NodeProto) -> bool:
    return node.op_type in _FRESH_GRADIENT and node.domain in ("", "ai.onnx")


def _absorb(graph: Graph, batch_norms: Sequence[_BatchNorm]) -> tuple[Graph, dict[str, tuple[Float64, Float64]]]:
    """Take out each batch norm that alone reads its input; its readers read the input under the watch instead."""
    inputs = {bn.input for bn in batch_norms}
    affine: dict[str, tuple[Float64, Float64]] = {}
    renamed: dict[str, str] = {}
    removed: set[str] = set()
    for bn in batch_norms:
        alone = len(graph.consumers(bn.input)) == 1 and not graph.is_output(bn.input)
        if not alone or graph.is_output(bn.output) or bn.output in inputs:
            continue
        scale = bn.gamma / np.sqrt(bn.var + bn.eps)
        affine[bn.input] = (scale, bn.beta - scale * bn.mean)
        renamed[bn.output] = bn.input
        removed.add(bn.node)
    return (_rewritten(graph, graph.nodes, removed, renamed), affine) if removed else (graph, {})


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


def _fuse_rectifiers(graph: Graph, watched: Sequence[str]) -> tuple[Graph, dict[str, tuple[float, float]]]:
    """Take out each Relu or Clip that alone reads a watched value; its readers read the watched value instead."""
    bounds: dict[str, tuple[float, float]] = {}
    renamed: dict[str, str] = {}
    removed: set[str] = set()
    for value in watched:
        consumers = graph.consumers(value)
        if len(consumers) != 1:
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
    graph: Graph, watched: Sequence[str], bounds: dict[str, tuple[float, float]]
) -> tuple[Graph, dict[str, str]]:
    """Take out each Add that alone reads a watched value, and a rectifier behind it; `bounds` gets the rectifier's.

    The layer that makes the watched value moves to the place of the Add, where the other summand exists.
    """
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
            if name in watched
            and name not in bounds
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
