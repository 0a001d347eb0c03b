"""Bias absorption: what a rectified channel has in common on nearly all inputs moves into the bias of the next layer.

After equalization some channels have a large positive mean, which widens the range of the whole tensor. With ``c = max(0, beta - 3 gamma)``
of the batch normalization in front, ``relu(z - c) = relu(z) - c`` wherever ``z >= c``, which is nearly always so; subtracting ``c`` in the
first layer and adding ``W c`` to the bias of the next leaves the function alone there (Nagel et al. 2019, *Data-Free Quantization*,
arXiv:1906.04721, section 4.1.3).

Deviations from the paper: where a batch normalization follows the second layer, its running mean is moved instead, so that it stays the mean of
its input; and readers that add zeros around the feature map are left out unless asked for, because the border would miss the shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.constants import own_constants
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.algebra.sites import Site, find_sites
from zsq_deploy.quant.algebra.weights import LAYERS, form_of

__all__ = ["Absorbed", "absorb"]

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Absorbed:
    """The outcome of :func:`absorb`.

    Attributes:
        graph: Same nodes and names; biases changed. A layer without a bias may have got one.
        shifts: Layer -> what was taken from its output channels, ``[C]``.
    """

    graph: Graph
    shifts: Mapping[str, Vector] = field(repr=False)


def absorb(
    graph: Graph,
    *,
    sigmas: float = 3.0,
    statistics: Mapping[str, tuple[Vector, Vector]] | None = None,
    padded: bool = False,
) -> Absorbed:
    """Move the constant part of rectified channels into the next layers.

    Args:
        graph: Float graph. Where batch normalizations are kept, their beta and gamma say mean and standard deviation of the channels.
        sigmas: Channels are taken to stay above ``mean - sigmas * std``.
        statistics: Layer -> mean and standard deviation of its output channels, for layers without a batch normalization.
        padded: Also into layers that pad with zeros; their borders then change by ``W c`` at the padded positions.

    Returns:
        The graph, with the same function wherever every shifted channel is at least its shift.
    """
    graph = own_constants(graph, (*LAYERS, "BatchNormalization"))
    net = Net(graph.proto)
    nodes = {node.name: node for node in net.nodes}
    done: dict[str, Vector] = {}
    for site in _eligible(graph, padded):
        moments = _moments(net, graph, site, statistics or {})
        if moments is None:
            continue
        mean, std = moments
        shift = np.maximum(0.0, mean - sigmas * np.abs(std))
        if not shift.any():
            continue
        _subtract(net, nodes, graph, site, shift)
        for reader in site.readers:
            node = graph.node(reader.node)
            form = form_of(graph, node)
            weight = net.constant(node.input[1])
            assert form is not None
            assert weight is not None
            full = np.zeros(form.inputs)
            full[reader.channels(site.channels)] = shift[:, None]
            moved = (form.read(weight.astype(np.float64)) * form.along_inputs(full)).sum(axis=(2, 3)).reshape(-1)
            _add(net, nodes, graph, node, moved)
        done[site.layer] = shift
    net.touch()
    return Absorbed(Graph(net.proto()) if done else graph, done)


def _eligible(graph: Graph, padded: bool) -> Iterator[Site]:
    for site in find_sites(graph):
        readers = [graph.node(reader.node) for reader in site.readers]
        if not site.rectified or not all(reader.shifts for reader in site.readers):
            continue
        if any(reader.padded for reader in site.readers) and not padded:
            continue
        if all(_takes_bias(graph, node) for node in readers) and _takes_bias(graph, graph.node(site.layer)):
            yield site


def _takes_bias(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a shift of a layer's output has a place: a batch normalization, a bias, or an Add behind a MatMul."""
    if node.op_type == "Gemm" and any(a.name in ("alpha", "beta") and a.f != 1.0 for a in node.attribute):
        return False
    return node.op_type != "MatMul" or _norm(graph, node) is not None or _added(graph, node) is not None


def _norm(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    readers = graph.consumers(node.output[0])
    return readers[0] if len(readers) == 1 and readers[0].op_type == "BatchNormalization" else None


def _added(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The constant that an Add behind a MatMul adds to each channel."""
    readers = graph.consumers(node.output[0])
    form = form_of(graph, node)
    if form is None or len(readers) != 1 or readers[0].op_type != "Add" or graph.is_output(node.output[0]):
        return None
    name = next((other for other in readers[0].input if other != node.output[0]), "")
    constant = graph.constant(name) if name in graph.initializer_names else None
    if constant is None or constant.size != form.outputs or constant.shape[-1] != form.outputs:
        return None
    return name if len(graph.consumers(name)) == 1 else None


def _moments(
    net: Net, graph: Graph, site: Site, statistics: Mapping[str, tuple[Vector, Vector]]
) -> tuple[Vector, Vector] | None:
    if not site.norm:
        return statistics.get(site.layer)
    norm = graph.node(site.norm)
    gamma, beta = net.constant(norm.input[1]), net.constant(norm.input[2])
    assert gamma is not None
    assert beta is not None
    return beta.astype(np.float64), gamma.astype(np.float64)


def _subtract(net: Net, nodes: Mapping[str, onnx.NodeProto], graph: Graph, site: Site, shift: Vector) -> None:
    if site.norm:
        _move(net, graph.node(site.norm).input[2], -shift)
    else:
        _shift_layer(net, nodes, graph, graph.node(site.layer), -shift)


def _add(net: Net, nodes: Mapping[str, onnx.NodeProto], graph: Graph, node: onnx.NodeProto, moved: Vector) -> None:
    """Make up for a layer's output that fell by `moved`."""
    norm = _norm(graph, node)
    if norm is not None and not graph.is_output(node.output[0]):
        _move(net, norm.input[3], -moved)
    else:
        _shift_layer(net, nodes, graph, node, moved)


def _shift_layer(
    net: Net, nodes: Mapping[str, onnx.NodeProto], graph: Graph, node: onnx.NodeProto, shift: Vector
) -> None:
    added = _added(graph, node) if node.op_type == "MatMul" else None
    live = nodes[node.name]
    if added is not None:
        _move(net, added, shift)
    elif len(live.input) > 2 and live.input[2]:
        _move(net, live.input[2], shift)
    else:
        while len(live.input) < 3:
            live.input.append("")
        live.input[2] = net.add_constant(f"{node.name}.bias", shift.astype(np.float32))


def _move(net: Net, name: str, shift: Vector) -> None:
    old = net.constant(name)
    assert old is not None
    values = np.broadcast_to(old.astype(np.float64).reshape(-1), shift.shape) + shift
    shape = old.shape if old.size == values.size else values.shape
    net.add_constant(name, np.asarray(values, old.dtype).reshape(shape), exact=True)
