"""Clips moved to the middle of the signed range, so that all 8 bits of an activation are used.

TensorRT's integers are signed and have no zero point: a Clip that ends at zero, Relu6 above all, leaves the 128 codes below zero unused.
With ``m`` in the middle of what it lets through, ``Clip(y, a, b) - m = Clip(y - m, a - m, b - m)``: the convolution in front has ``m``
taken out of its bias, and the layers behind get ``m`` times the sum of their weights back in theirs. Only constants change, the network's
outputs do not, and the step of the activation is half as long.

A layer that pads its input with zeros would need ``-m`` there, so Clips that such a layer reads stay where they are; and a Relu stays a
Relu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["Centred", "centre"]

Array = npt.NDArray[Any]
Range = tuple[float, float]

_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Centred:
    """A float network with centred Clips.

    Attributes:
        graph: It computes what the original one does.
        ranges: Ranges of the values that are new (moved values have new names, because their numbers differ).
        moved: Name of a Clip node -> what was taken away from its values.
    """

    graph: Graph
    ranges: Mapping[str, Range]
    moved: Mapping[str, float]


def centre(graph: Graph, ranges: Mapping[str, Range]) -> Centred:
    """Centre the Clips of a float network that only layers without padding read.

    Args:
        graph: Float graph with batch normalization folded.
        ranges: Range of its activations; the middle of a Clip's range is taken away from it.

    Returns:
        The network; the same one, and nothing moved, where no Clip can be centred.
    """
    net = Net(graph.proto)
    nodes = {node.name: node for node in net.nodes}
    added: dict[str, Range] = {}
    moved: dict[str, float] = {}
    for clip in graph:
        middle = _middle(graph, clip, ranges)
        if middle is None:
            continue
        maker, readers = graph.producer(clip.input[0]), graph.consumers(clip.output[0])
        assert maker is not None
        _shift(net, nodes[maker.name], -middle)
        for reader in readers:
            _shift(net, nodes[reader.name], middle * _sums(graph, reader))
        for index in (1, 2):
            if len(clip.input) > index and clip.input[index]:
                bound = float(_scalar(graph, clip.input[index])) - middle
                name = net.add_constant(f"{clip.input[index]}_centred", np.asarray(bound, np.float32))
                nodes[clip.name].input[index] = name
        for value in (clip.input[0], clip.output[0]):
            name = net.fresh(f"{value}_centred")
            if value in ranges:
                low, high = ranges[value]
                added[name] = (low - middle, high - middle)
            net.redirect(value, name)
            for node in (nodes[maker.name], nodes[clip.name]):
                for place, output in enumerate(node.output):
                    if output == value:
                        node.output[place] = name
            net.touch()
        moved[clip.name] = middle
    if not moved:
        return Centred(graph, {}, {})
    net.touch()
    net.sweep()
    return Centred(Graph(net.proto()), added, moved)


def _middle(graph: Graph, clip: onnx.NodeProto, ranges: Mapping[str, Range]) -> float | None:
    """What to take away from a Clip's values, or nothing where they have to stay as they are."""
    if clip.op_type != "Clip" or clip.domain not in ("", "ai.onnx") or len(clip.input) < 2:
        return None  # before operator set 11, bounds are attributes
    value, source = clip.output[0], clip.input[0]
    maker, readers = graph.producer(source), graph.consumers(value)
    if maker is None or maker.op_type not in _CONVOLUTIONS or not _open(graph, maker):
        return None
    if len(graph.consumers(source)) != 1 or graph.is_output(source) or graph.is_output(value) or not readers:
        return None
    if any(_scalar(graph, name) is None for name in clip.input[1:] if name) or value not in ranges:
        return None
    if not all(_open(graph, reader) and _unpadded(graph, reader, value) for reader in readers):
        return None
    low, high = ranges[value]
    middle = float(np.float32((low + high) / 2))
    # A range that lies around zero already uses the codes on both sides.
    return middle if abs(middle) > 0.25 * (high - low) else None


def _scalar(graph: Graph, name: str) -> Any:
    found = graph.constant(name)
    return None if found is None or found.size != 1 else found.reshape(-1)[0]


def _open(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether weights and bias of a layer are constants that can be written anew."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in (*_CONVOLUTIONS, "Gemm"):
        return False
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    return graph.constant(node.input[1]) is not None and bias is not None


def _unpadded(graph: Graph, node: onnx.NodeProto, value: str) -> bool:
    """Whether every output of a layer sums the same weights, wherever it is."""
    found = attributes(node)
    if node.input[0] != value or list(node.input).count(value) > 1:
        return False
    if node.op_type == "Gemm":
        bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        plain = not found.get("transA", 0) and found.get("alpha", 1.0) == 1.0 and found.get("beta", 1.0) == 1.0
        return plain and (bias is None or bias.ndim == 1)
    padded = found.get("auto_pad", "NOTSET") not in ("NOTSET", b"NOTSET", "VALID", b"VALID")
    return node.op_type == "Conv" and not padded and not any(found.get("pads", ()))


def _sums(graph: Graph, node: onnx.NodeProto) -> Array:
    """Sum of the weights of each output channel."""
    weight = graph.constant(node.input[1])
    assert weight is not None
    exact = weight.astype(np.float64)
    if node.op_type == "Gemm":
        return np.asarray(exact.sum(1 if attributes(node).get("transB", 0) else 0))
    return np.asarray(exact.reshape(len(exact), -1).sum(1))


def _shift(net: Net, node: onnx.NodeProto, amount: float | Array) -> None:
    """Add to the bias of a layer; one that has none gets one."""
    if len(node.input) > 2 and node.input[2]:
        name = node.input[2]
        old = net.constant(name)
    else:
        name = f"{node.name}_bias"
        old = np.zeros(_channels(net, node), np.float32)
    assert old is not None
    while len(node.input) < 3:
        node.input.append("")
    node.input[2] = net.add_constant(f"{name}_centred", np.asarray(old.astype(np.float64) + amount, np.float32))


def _channels(net: Net, node: onnx.NodeProto) -> int:
    weight = net.constant(node.input[1])
    assert weight is not None
    found = attributes(node)
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1]) * int(found.get("group", 1))
    return int(weight.shape[1 if node.op_type == "Gemm" and not found.get("transB", 0) else 0])
