"""Ranges without any image: mean, variance and reach of every activation, from the network's parameters alone.

The moments travel through the graph node by node, a channel at a time:

* a batch normalization sets them: mean ``beta``, standard deviation ``|gamma|`` (Nagel et al. 2019, *Data-Free Quantization*,
  section 4.2.1 and appendix C, use the same source for bias correction);
* Relu and Clip give the moments of a clipped normal in closed form, other elementwise functions by quadrature;
* sums add means and variances; convolutions and matrix products without batch normalization map them with their weights, taking for
  each input channel the larger of two variances: independent pixels, and pixels that move together;
* a tensor reaches ``mean -+ sigmas * std`` of its channels, as far as the function in front of it lets it.

Where no such reasoning holds, hard bounds are carried on by interval arithmetic, and the result says so (:attr:`Channels.kind`).
An operator without a rule ends the chain: its output has no range, and a note names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx

from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.model.model import Model
from zsq_deploy.quant.analytic.channels import Channels, Kind, Vector
from zsq_deploy.quant.analytic.known import Known, hull
from zsq_deploy.quant.analytic.normals import ELEMENTWISE, clipped, largest_of, mapped
from zsq_deploy.quant.analytic.products import convolution, product
from zsq_deploy.quant.analytic.sums import binary, concat
from zsq_deploy.quant.analytic.views import average, view

__all__ = ["Propagated", "propagate", "propagate_model"]


@dataclass(frozen=True)
class Propagated:
    """The outcome for a whole graph.

    Attributes:
        channels: Value name to what is known about it.
        notes: Operators without a rule, and where bounds had to do.
    """

    channels: Mapping[str, Channels]
    notes: tuple[str, ...]


_SAME = frozenset({"Identity", "Dropout", "LpPool", "Resize", "Upsample", "Cast", "Expand", "Tile"})
_AVERAGE = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_VIEWS = frozenset(
    {
        "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather", "Split", "DepthToSpace", "SpaceToDepth",
        "GatherElements", "GatherND", "ReduceMax", "ReduceMin", "Trilu",
    }
)  # fmt: skip


def _apply(known: Known, node: onnx.NodeProto) -> Channels | None:
    """The rule of one node."""
    kind = node.op_type
    attrs = attributes(node)
    if kind in ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"):
        return _normalization(known, node)
    x = known.found.get(node.input[0])
    if kind in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
        return binary(known, node)
    if kind == "Concat":
        return concat(known, node, attrs)
    if kind in ("MatMul", "Gemm"):
        return product(known, node, attrs)
    if kind == "Where":
        a, b = known.of(node.input[1]), known.of(node.input[2])
        return None if a is None or b is None else hull(a, b)
    if x is None:
        return None
    if kind in ("Conv", "ConvTranspose"):
        return convolution(known, node, attrs, x)
    if kind == "Relu":
        capped = _capped(known, node.input[0])
        return clipped(*capped) if capped is not None else clipped(x, 0.0, math.inf)
    if kind == "Clip":
        bounds = [-math.inf, math.inf]
        for index, name in enumerate(("min", "max")):
            given = known.constant(node.input[index + 1]) if len(node.input) > index + 1 else None
            bounds[index] = (
                float(given.reshape(-1)[0]) if given is not None and given.size else attrs.get(name, bounds[index])
            )
        return clipped(x, bounds[0], bounds[1])
    if kind == "PRelu":
        slope = known.constant(node.input[1])
        if slope is None:
            return None
        largest, smallest = float(slope.max()), float(slope.min())
        a = mapped(x, lambda v: np.where(v < 0, v * largest, v))
        b = mapped(x, lambda v: np.where(v < 0, v * smallest, v))
        return hull(a, b)
    if kind in ELEMENTWISE:
        return mapped(x, lambda v: ELEMENTWISE[kind](v, attrs))
    if kind in ("FastGelu", "QuickGelu"):
        return mapped(x, lambda v: ELEMENTWISE["Gelu"](v, attrs))
    if kind == "Pow":
        power = known.constant(node.input[1])
        if power is None or power.size != 1:
            return None
        exponent = float(power.reshape(-1)[0])
        return mapped(x, lambda v: np.power(v if exponent.is_integer() else np.maximum(v, 0), exponent))
    if kind in ("Softmax", "LogSoftmax"):
        if kind == "LogSoftmax":
            return None
        one = np.ones(1)
        return Channels(0.5 * one, one / 12.0, 0.0 * one, one, None, "interval")
    if kind == "Pad":
        value = known.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        if value is None:
            return None
        edge = float(value.reshape(-1)[0]) if value.size else 0.0
        if attrs.get("mode", "constant") != "constant":
            return x
        return replace(x, low=np.minimum(x.low, edge), high=np.maximum(x.high, edge))
    if kind in ("MaxPool", "GlobalMaxPool"):
        return largest_of(x, math.prod(attrs.get("kernel_shape", [7, 7])))
    if kind in _SAME:
        return x
    if kind in _AVERAGE:
        return average(known, node, attrs, x)
    if kind in _VIEWS:
        return view(known, node, attrs, x)
    return None


def _normalization(known: Known, node: onnx.NodeProto) -> Channels | None:
    first = 1
    gamma = known.constant(node.input[first])
    beta = known.constant(node.input[first + 1]) if len(node.input) > first + 1 and node.input[first + 1] else None
    if gamma is None:
        return None
    gamma = gamma.reshape(-1)
    beta = np.zeros_like(gamma) if beta is None else beta.reshape(-1)
    axis = -1 if node.op_type == "LayerNormalization" else 1
    kind: Kind = "bn" if node.op_type == "BatchNormalization" else "derived"
    return known.normal(beta, np.square(gamma), axis, kind)


def _capped(known: Known, value: str) -> tuple[Channels, float, Vector] | None:
    """What a Relu behind a Min with one constant a channel clips, and between which bounds (ReLU6 of rescaled channels)."""
    node = known.graph.producer(value)
    if node is None or node.op_type != "Min" or len(node.input) != 2:
        return None
    for index in (0, 1):
        x, bound = known.found.get(node.input[index]), known.constant(node.input[1 - index])
        if x is None or bound is None or x.axis != 1 or bound.size != x.mean.size or not (bound > 0).all():
            continue
        if bound.ndim < 2 or bound.shape[1] != bound.size:
            continue
        return x, 0.0, bound.reshape(-1)
    return None


def _step(known: Known, node: onnx.NodeProto, unknown: dict[str, list[str]]) -> None:
    """Enter what is known about a node's outputs, or that there is no rule for it."""
    if not any(name in known.found for name in node.input):
        return
    results = None
    if node.domain in ("", "ai.onnx") or node.op_type in ("Gelu", "FastGelu", "QuickGelu"):
        with np.errstate(all="ignore"):
            results = _apply(known, node)
    if results is None:
        if node.op_type not in ("Shape", "Size"):
            unknown.setdefault(node.op_type, []).append(node.name)
        return
    if np.isfinite(results.low).all() and np.isfinite(results.high).all():
        known.found.update((name, results) for name in node.output if name)


def propagate(graph: Graph, inputs: Mapping[str, tuple[Vector, Vector]], *, sigmas: float = 6.0) -> Propagated:
    """Carry moments and reach from the inputs through a graph.

    Args:
        graph: With or without batch normalizations; with them it knows much more.
        inputs: Smallest and largest value of each channel of each input. Pixels are taken as uniform in between.
        sigmas: How many standard deviations activations reach.
    """
    known, unknown = Known(graph, sigmas), dict[str, list[str]]()
    for name, (low, high) in inputs.items():
        low, high = np.asarray(low, np.float64).reshape(-1), np.asarray(high, np.float64).reshape(-1)
        axis = 1 if len(low) > 1 else None
        known.found[name] = Channels((low + high) / 2, np.square(high - low) / 12.0, low, high, axis, "derived")
    for node in graph.nodes:
        _step(known, node, unknown)
    notes = [
        f"{kind}: no rule for analytic ranges ({len(names)} node{'s' if len(names) > 1 else ''}, first {names[0]!r})"
        for kind, names in unknown.items()
    ]
    bounds = sum(channels.kind == "interval" for channels in known.found.values())
    if bounds:
        notes.append(f"{bounds} activations have hard bounds only (interval arithmetic), which are wide")
    return Propagated(known.found, tuple(notes))


def propagate_model(model: Model, *, sigmas: float = 6.0) -> Propagated:
    """:func:`propagate` on a model, with the input's bounds from its preprocessing."""
    inputs: dict[str, tuple[Vector, Vector]] = {}
    for spec in model.inputs:
        if spec.dtype.kind != "f":
            continue
        channels = spec.shape[1] if len(spec.shape) > 1 else None
        low, high = model.preprocess.bounds(channels or 1)
        inputs[spec.name] = (low.astype(np.float64), high.astype(np.float64))
    return propagate(model.graph, inputs, sigmas=sigmas)
