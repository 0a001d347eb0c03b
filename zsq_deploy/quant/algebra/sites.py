"""Where channels may be rescaled: a layer, what carries its channels on, and the layers that read them.

A *site* starts at a layer with a constant weight. Its output may pass a batch normalization, constants that are added to or multiplied
with channels, functions with ``f(s x) = s f(x)`` for ``s > 0`` (Relu, LeakyRelu, PRelu, pooling), moves of whole channels (Flatten,
concatenations, zero padding), and must then be read by layers with constant weights only. Scaling output channel ``i`` by ``s[i]`` and
input channel ``i`` of every reader by ``1 / s[i]`` changes nothing then (Nagel et al. 2019, *Data-Free Quantization*, arXiv:1906.04721,
section 4.1). A residual addition, an output of the graph or any other operator ends the search: there is no site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.editing import is_default
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.algebra.weights import Form, form_of

__all__ = ["Reader", "Site", "clip_bounds", "find_sites"]

Vector = npt.NDArray[np.float64]

_THROUGH = frozenset({"Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "MaxPool", "GlobalMaxPool"})
_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_SPATIAL = _AVERAGES | {"MaxPool", "GlobalMaxPool"}


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels of a site.

    Attributes:
        node: Its name.
        offset: Where the site's first channel is among its input channels (behind a concatenation).
        repeat: How many of its input channels one channel of the site becomes (Flatten of feature maps).
        padded: Zeros are added around the feature map between the site's layer and the products.
        shifts: A number subtracted from a channel arrives as the same number subtracted (only Relu, maxima and unpadded means between).
    """

    node: str
    offset: int = 0
    repeat: int = 1
    padded: bool = False
    shifts: bool = True

    def channels(self, count: int) -> npt.NDArray[np.int64]:
        """Input channels of the reader, ``[count, repeat]``, for the `count` channels of the site."""
        return self.offset + np.arange(count * self.repeat, dtype=np.int64).reshape(count, self.repeat)


@dataclass(frozen=True)
class Site:
    """Channels that may be rescaled.

    Attributes:
        layer: Name of the layer that makes them.
        channels: How many there are.
        norm: Name of the batch normalization directly behind it; empty if there is none.
        shifts: Adds and Subs with a constant that are scaled with the channels: node name -> the constant's name.
        readers: The layers that read them.
        limit: Largest value that Clip nodes on the way let through (infinite without any).
        clips: Names of those Clip nodes.
        rectified: Relu (or Clip at 0) is on every way, so values are not negative.
    """

    layer: str
    channels: int
    norm: str = ""
    shifts: Mapping[str, str] = field(default_factory=dict)
    readers: tuple[Reader, ...] = ()
    limit: float = math.inf
    clips: tuple[str, ...] = ()
    rectified: bool = False


@dataclass(frozen=True)
class _State:
    """What is known on the way from the layer to a reader."""

    axis: int
    offset: int = 0
    repeat: int = 1
    padded: bool = False
    shifts: bool = True
    rectified: bool = False


class _Blocked(Exception):  # noqa: N818 - never leaves this module
    """The channels reach something that cannot be rescaled."""


def clip_bounds(graph: Graph, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Lower and upper bound of a Clip; ``None`` where one is computed."""
    found = attributes(node)
    bounds = [float(found.get("min", -math.inf)), float(found.get("max", math.inf))]
    for index in (0, 1):
        if len(node.input) > index + 1 and node.input[index + 1]:
            given = graph.constant(node.input[index + 1])
            if given is None or given.size != 1:
                return None
            bounds[index] = float(given.reshape(-1)[0])
    return bounds[0], bounds[1]


class _Search:
    """The way from one layer to its readers."""

    def __init__(self, graph: Graph, layer: onnx.NodeProto, form: Form, clips: bool) -> None:
        self.graph, self.layer, self.form, self.allow_clips = graph, layer, form, clips
        self.norm = ""
        self.constants: dict[str, str] = {}
        self.readers: list[Reader] = []
        self.limit = math.inf
        self.clips: list[str] = []
        self.rectified = True

    def run(self) -> Site | None:
        graph, value = self.graph, self.layer.output[0]
        try:
            readers = graph.consumers(value)
            if len(readers) == 1 and is_default(readers[0], "BatchNormalization") and not graph.is_output(value):
                norm = readers[0]
                if norm.input[0] != value or any(graph.constant(name) is None for name in norm.input[1:5]):
                    return None
                self.norm, value = norm.name, norm.output[0]
            axis = -1 if self.layer.op_type == "MatMul" else 1
            self.follow(value, _State(axis))
        except _Blocked:
            return None
        if not self.readers:
            return None
        return Site(
            self.layer.name,
            self.form.outputs,
            self.norm,
            dict(self.constants),
            tuple(self.readers),
            self.limit,
            tuple(self.clips),
            self.rectified,
        )

    def follow(self, value: str, state: _State) -> None:
        if self.graph.is_output(value):
            raise _Blocked
        readers = self.graph.consumers(value)
        if not readers:
            raise _Blocked
        for node in readers:
            if list(node.input).count(value) != 1:
                raise _Blocked
            self.step(node, value, state)

    def step(self, node: onnx.NodeProto, value: str, state: _State) -> None:
        form = form_of(self.graph, node)
        if form is not None and node.input[0] == value and node.input[1] != value:
            self.read(node, form, state)
            return
        if node.domain not in ("", "ai.onnx") or not node.output:
            raise _Blocked
        after = self.passed(node, value, state)
        if any(self.graph.consumers(name) or self.graph.is_output(name) for name in node.output[1:]):
            raise _Blocked  # indices of a MaxPool
        self.follow(node.output[0], after)

    def read(self, node: onnx.NodeProto, form: Form, state: _State) -> None:
        channel = state.axis
        rank = self.rank(node.input[0])
        expected = -1 if node.op_type == "MatMul" else 1
        if channel != expected and not (rank is not None and channel % rank == expected % rank):
            raise _Blocked
        if state.offset + self.form.outputs * state.repeat > form.inputs:
            raise _Blocked
        padded = state.padded or (node.op_type in ("Conv", "ConvTranspose") and _pads(node))
        self.readers.append(Reader(node.name, state.offset, state.repeat, padded, state.shifts))
        self.rectified = self.rectified and state.rectified

    def passed(self, node: onnx.NodeProto, value: str, state: _State) -> _State:
        """The state behind a node that channels may pass; raises where they may not."""
        op, found = node.op_type, attributes(node)
        if op in ("Add", "Sub", "Mul", "Div"):
            return self.with_constant(node, value, state)
        if op == "Clip":
            return self.clipped(node, state)
        if op == "Concat" and all(name == value or self.graph.constant(name) is None for name in node.input):
            return self.joined(node, value, int(found["axis"]), state)
        if node.input[0] != value:
            raise _Blocked
        if op in _SPATIAL and not self.is_map(value, state):
            raise _Blocked
        if op in _THROUGH:
            if op == "PRelu":
                slope = self.graph.constant(node.input[1])
                if slope is None or (slope < 0).any():
                    raise _Blocked
            if op == "LeakyRelu" and float(found.get("alpha", 0.01)) < 0:
                raise _Blocked
            rectified = state.rectified or op == "Relu"
            keeps = op not in ("LeakyRelu", "PRelu") or state.rectified
            return _State(state.axis, state.offset, state.repeat, state.padded, state.shifts and keeps, rectified)
        if op in _AVERAGES:
            if op == "ReduceMean":
                self.check_axes(node, found, value, state)
            uneven = op == "AveragePool" and (_pads(node) or bool(found.get("ceil_mode", 0)))
            return _State(state.axis, state.offset, state.repeat, state.padded or uneven, state.shifts, state.rectified)
        if op == "Pad":
            return self.with_zeros(node, found, state)
        if op in ("Flatten", "Reshape", "Squeeze"):
            return self.flattened(node, state)
        raise _Blocked

    def is_map(self, value: str, state: _State) -> bool:
        rank = self.rank(value)
        return rank is not None and rank >= 3 and state.axis % rank == 1

    def check_axes(self, node: onnx.NodeProto, found: Mapping[str, Any], value: str, state: _State) -> None:
        """A mean may be taken over positions only; where it drops axes, the channels keep their place."""
        axes = found.get("axes")
        if axes is None and len(node.input) > 1 and node.input[1]:
            given = self.graph.constant(node.input[1])
            axes = None if given is None else given.reshape(-1).tolist()
        rank = self.rank(value)
        if axes is None or rank is None or any(int(axis) % rank <= state.axis % rank for axis in axes):
            raise _Blocked

    def with_constant(self, node: onnx.NodeProto, value: str, state: _State) -> _State:
        index = 1 - list(node.input).index(value)
        name = node.input[index]
        constant = self.graph.constant(name)
        rank = self.rank(value)
        if constant is None or rank is None or constant.dtype.kind != "f" or state.repeat != 1 or state.offset:
            raise _Blocked
        if name not in self.graph.initializer_names or len(self.graph.consumers(name)) != 1:
            raise _Blocked
        shape = (1,) * (rank - constant.ndim) + constant.shape
        axis = state.axis % rank
        if len(shape) != rank or any(size != 1 for place, size in enumerate(shape) if place != axis):
            raise _Blocked
        if node.op_type in ("Mul", "Div"):
            if (node.op_type == "Div" and index == 0) or not (constant > 0).all():
                raise _Blocked
            # Multiplied shifts are not carried on; nothing else is known of them.
            return _State(state.axis, state.offset, state.repeat, state.padded, False, state.rectified)
        if shape[axis] != self.form.outputs or (node.op_type == "Sub" and index == 0):
            raise _Blocked
        self.constants[node.name] = name
        keeps = state.shifts and not state.rectified
        return _State(state.axis, state.offset, state.repeat, state.padded, keeps, False)

    def clipped(self, node: onnx.NodeProto, state: _State) -> _State:
        bounds = clip_bounds(self.graph, node)
        if bounds is None or bounds[0] not in (0.0, -math.inf) or bounds[1] <= 0:
            raise _Blocked
        if math.isfinite(bounds[1]):
            if not self.allow_clips:
                raise _Blocked
            self.limit = min(self.limit, bounds[1])
            self.clips.append(node.name)
        rectified = state.rectified or bounds[0] == 0.0
        shifts = state.shifts and math.isinf(bounds[1])
        return _State(state.axis, state.offset, state.repeat, state.padded, shifts, rectified)

    def joined(self, node: onnx.NodeProto, value: str, axis: int, state: _State) -> _State:
        rank = self.rank(value)
        if rank is None or axis % rank != state.axis % rank:
            raise _Blocked
        before = 0
        for name in node.input:
            if name == value:
                break
            shape = self.graph.shape(name)
            size = None if shape is None else shape[axis % rank]
            if size is None:
                raise _Blocked
            before += size
        return _State(state.axis, state.offset + before, state.repeat, state.padded, state.shifts, state.rectified)

    def with_zeros(self, node: onnx.NodeProto, found: Mapping[str, Any], state: _State) -> _State:
        if found.get("mode", "constant") != "constant" or (len(node.input) > 3 and node.input[3]):
            raise _Blocked
        pads = self.graph.constant(node.input[1])
        value = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        rank = self.rank(node.input[0])
        if pads is None or value is None or rank is None or pads.size != 2 * rank or np.any(value):
            raise _Blocked
        channel = state.axis % rank
        first, last = int(pads[channel]), int(pads[channel + rank])
        if first < 0 or last < 0:
            raise _Blocked
        spatial = any(int(p) for place, p in enumerate(pads) if place % rank != channel)
        offset = state.offset + first
        return _State(state.axis, offset, state.repeat, state.padded or spatial, state.shifts, state.rectified)

    def flattened(self, node: onnx.NodeProto, state: _State) -> _State:
        before, after = self.graph.shape(node.input[0]), self.graph.shape(node.output[0])
        if before is None or after is None or len(after) != 2 or state.axis % len(before) != 1:
            raise _Blocked
        sizes = before[2:]
        if any(size is None for size in sizes) or after[1] is None or before[1] is None:
            raise _Blocked
        times = math.prod(int(size or 0) for size in sizes)
        if times < 1 or after[1] != before[1] * times:
            raise _Blocked
        repeat = state.repeat * times
        return _State(1, state.offset * times, repeat, state.padded, state.shifts, state.rectified)

    def rank(self, value: str) -> int | None:
        shape = self.graph.shape(value)
        return None if shape is None else len(shape)


def _pads(node: onnx.NodeProto) -> bool:
    found = attributes(node)
    return any(found.get("pads", ())) or found.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", b"NOTSET")


def find_sites(graph: Graph, *, clips: bool = False) -> Iterator[Site]:
    """All sites of a graph, in graph order.

    Args:
        graph: Float graph, batch normalization folded or not. Weights that several layers share make no site (see
            :func:`zsq_deploy.model.constants.own_constants`).
        clips: Also sites whose channels pass a Clip with an upper bound, which rescaling moves; :attr:`Site.limit` says the bound.
    """
    for node in graph.nodes:
        form = form_of(graph, node)
        if form is None or not _owns(graph, node):
            continue
        site = _Search(graph, node, form, clips).run()
        if site is not None and all(_owns(graph, graph.node(reader.node)) for reader in site.readers):
            yield site


def _owns(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether weight and bias are initializers that only this node reads."""
    names = [name for name in node.input[1:3] if name]
    if any(graph.constant(name) is None or len(graph.consumers(name)) != 1 for name in names):
        return False
    bias = graph.constant(names[1]) if len(names) > 1 else None
    form = form_of(graph, node)
    return bias is None or (form is not None and bias.size in (1, form.outputs))
