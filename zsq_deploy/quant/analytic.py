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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.model.model import Model
from zsq_deploy.quant.ranges import Ranges

__all__ = ["Channels", "Kind", "Propagated", "analytic_ranges", "clipped_normal", "propagate", "propagate_model"]

Vector = npt.NDArray[np.float64]
Kind = Literal["bn", "derived", "interval"]

_ORDER: dict[str, int] = {"bn": 0, "derived": 1, "interval": 2}


@dataclass(frozen=True, eq=False)
class Channels:
    """What is known about one activation, a channel at a time.

    Attributes:
        mean: ``[C]``, or ``[1]`` when the channels are not told apart.
        var: Same shape.
        low: How far each channel reaches downwards.
        high: How far each channel reaches upwards.
        axis: Where the channels are: 1, -1 (last), or ``None`` with one entry for all.
        kind: ``bn``: set by a normalization, through monotone functions at most; ``derived``: by algebra on such;
            ``interval``: only the bounds mean something.
    """

    mean: Vector
    var: Vector
    low: Vector
    high: Vector
    axis: int | None
    kind: Kind

    @property
    def reach(self) -> tuple[float, float]:
        """Smallest and largest number over all channels."""
        return float(self.low.min()), float(self.high.max())

    @property
    def std(self) -> Vector:
        """Standard deviation of each channel."""
        return np.sqrt(self.var)

    def pooled(self) -> Channels:
        """The same without telling the channels apart."""
        if self.axis is None:
            return self
        mean = self.mean.mean(keepdims=True)
        return Channels(
            mean,
            (self.var + np.square(self.mean - mean)).mean(keepdims=True),
            self.low.min(keepdims=True),
            self.high.max(keepdims=True),
            None,
            self.kind,
        )

    def as_kind(self, *kinds: Kind) -> Channels:
        """The same, of the weakest of these kinds and its own."""
        return replace(self, kind=max((self.kind, *kinds), key=_ORDER.__getitem__))


@dataclass(frozen=True)
class Propagated:
    """The outcome for a whole graph.

    Attributes:
        channels: Value name to what is known about it.
        notes: Operators without a rule, and where bounds had to do.
    """

    channels: Mapping[str, Channels]
    notes: tuple[str, ...]


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(63)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
_erf = np.vectorize(math.erf, otypes=[np.float64])


_GRID = np.linspace(-6.0, 6.0, 2401)
_QUANTILES = (0.5 * (1.0 + _erf(_GRID / math.sqrt(2.0))), _GRID)


def _phi(x: Vector) -> Vector:
    return np.asarray(np.exp(-0.5 * np.square(x)) / math.sqrt(2.0 * math.pi), np.float64)


def _cdf(x: Vector) -> Vector:
    return np.asarray(0.5 * (1.0 + _erf(x / math.sqrt(2.0))), np.float64)


def clipped_normal(mean: Vector, var: Vector, low: float, high: float | Vector) -> tuple[Vector, Vector]:
    """Mean and variance of ``clip(X, low, high)`` with ``X`` normal, in closed form; the bounds may be infinite.

    `high` may be a finite vector, one bound a channel.
    """
    std = np.sqrt(np.maximum(var, 1e-300))
    unbounded = isinstance(high, float) and math.isinf(high)
    a = np.full_like(mean, -np.inf) if math.isinf(low) else (low - mean) / std
    b = np.full_like(mean, np.inf) if unbounded else (high - mean) / std
    below, above = _cdf(a), _cdf(-b)
    inside = np.maximum(1.0 - below - above, 0.0)
    pa, pb = _phi(a), _phi(b)
    finite_a, finite_b = np.where(np.isinf(a), 0.0, a), np.where(np.isinf(b), 0.0, b)
    # Moments of the unit normal between a and b: of order one pa - pb, of order two inside + a pa - b pb.
    first, second = pa - pb, inside + finite_a * pa - finite_b * pb
    bottom, top = (0.0 if math.isinf(low) else low), (0.0 if unbounded else high)
    expected = mean * inside + std * first + bottom * below + top * above
    squares = (
        np.square(mean) * inside
        + 2.0 * mean * std * first
        + np.square(std) * second
        + bottom**2 * below
        + top**2 * above
    )
    return expected, np.maximum(squares - np.square(expected), 0.0)


def _sigmoid(x: Vector) -> Vector:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60, 60))), np.float64)


_ELEMENTWISE: dict[str, Callable[[Vector, Mapping[str, Any]], Vector]] = {
    "Abs": lambda x, _: np.abs(x),
    "Neg": lambda x, _: -x,
    "Sigmoid": lambda x, _: _sigmoid(x),
    "Tanh": lambda x, _: np.tanh(x),
    "Erf": lambda x, _: _erf(x),
    "Exp": lambda x, _: np.exp(np.minimum(x, 80.0)),
    "Sqrt": lambda x, _: np.sqrt(np.maximum(x, 0.0)),
    "Softplus": lambda x, _: np.logaddexp(0.0, x),
    "Softsign": lambda x, _: x / (1.0 + np.abs(x)),
    "Sin": lambda x, _: np.sin(x),
    "Cos": lambda x, _: np.cos(x),
    "HardSigmoid": lambda x, a: np.clip(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0.0, 1.0),
    "HardSwish": lambda x, _: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "Mish": lambda x, _: x * np.tanh(np.logaddexp(0.0, x)),
    "Gelu": lambda x, _: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "Swish": lambda x, a: x * _sigmoid(x * a.get("alpha", 1.0)),
    "LeakyRelu": lambda x, a: np.where(x < 0, x * a.get("alpha", 0.01), x),
    "Elu": lambda x, a: np.where(x < 0, a.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)), x),
    "Celu": lambda x, a: np.where(x < 0, a.get("alpha", 1.0) * np.expm1(np.minimum(x, 0) / a.get("alpha", 1.0)), x),
    "Selu": lambda x, a: (
        a.get("gamma", 1.0507009873554805)
        * np.where(x < 0, a.get("alpha", 1.6732632423543772) * np.expm1(np.minimum(x, 0)), x)
    ),
    "ThresholdedRelu": lambda x, a: np.where(x > a.get("alpha", 1.0), x, 0.0),
}

_SAME = frozenset({"Identity", "Dropout", "LpPool", "Resize", "Upsample", "Cast", "Expand", "Tile"})
_AVERAGE = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_VIEWS = frozenset(
    {
        "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather", "Split", "DepthToSpace", "SpaceToDepth",
        "GatherElements", "GatherND", "ReduceMax", "ReduceMin", "Trilu",
    }
)  # fmt: skip


class _Propagation:
    """One walk through one graph."""

    def __init__(self, graph: Graph, sigmas: float) -> None:
        self.graph = graph
        self.sigmas = sigmas
        self.found: dict[str, Channels] = {}
        self.unknown: dict[str, list[str]] = {}

    def run(self) -> None:
        for node in self.graph.nodes:
            if not any(name in self.found for name in node.input):
                continue
            results = None
            if node.domain in ("", "ai.onnx") or node.op_type in ("Gelu", "FastGelu", "QuickGelu"):
                with np.errstate(all="ignore"):
                    results = self.apply(node)
            if results is None:
                if any(name in self.found for name in node.input) and node.op_type not in ("Shape", "Size"):
                    self.unknown.setdefault(node.op_type, []).append(node.name)
                continue
            for name in node.output:
                if name and np.isfinite(results.low).all() and np.isfinite(results.high).all():
                    self.found[name] = results

    # -- helpers --

    def constant(self, name: str) -> Vector | None:
        array = self.graph.constant(name) if name else None
        return None if array is None or array.dtype.kind not in "fiu" else array.astype(np.float64)

    def rank(self, name: str) -> int | None:
        shape = self.graph.shape(name)
        return None if shape is None else len(shape)

    def of(self, name: str) -> Channels | None:
        """What is known about an operand, constants included."""
        if name in self.found:
            return self.found[name]
        value = self.constant(name)
        if value is None or value.size == 0:
            return None
        shape = value.shape
        real = [axis for axis, size in enumerate(shape) if size > 1]
        if len(real) == 1 and (len(shape) - real[0] in (1, 3) and len(shape) in (1, 3, 4)):
            flat = value.reshape(-1)
            axis = -1 if len(shape) - real[0] == 1 else 1
            return Channels(flat, np.zeros_like(flat), flat, flat, axis, "bn")
        mean = value.mean(keepdims=True).reshape(1)
        return Channels(
            mean, value.var(keepdims=True).reshape(1), value.min().reshape(1), value.max().reshape(1), None, "bn"
        )

    def aligned(self, a: Channels, b: Channels) -> tuple[Channels, Channels]:
        """Both with the same channel axis, pooled where they do not match."""
        if a.axis is None or b.axis is None or (a.axis == b.axis and len(a.mean) == len(b.mean)):
            return a, b
        return a.pooled(), b.pooled()

    def normal(self, mean: Vector, var: Vector, axis: int | None, kind: Kind) -> Channels:
        deviation = self.sigmas * np.sqrt(var)
        return Channels(mean, var, mean - deviation, mean + deviation, axis, kind)

    # -- rules --

    def apply(self, node: onnx.NodeProto) -> Channels | None:
        kind = node.op_type
        attrs = attributes(node)
        if kind in ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"):
            return self.normalization(node)
        x = self.found.get(node.input[0])
        if kind in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
            return self.binary(node)
        if kind == "Concat":
            return self.concat(node, attrs)
        if kind in ("MatMul", "Gemm"):
            return self.product(node, attrs)
        if kind == "Where":
            a, b = self.of(node.input[1]), self.of(node.input[2])
            return None if a is None or b is None else self.hull(a, b)
        if x is None:
            return None
        if kind in ("Conv", "ConvTranspose"):
            return self.convolution(node, attrs, x)
        if kind == "Relu":
            capped = self.capped(node.input[0])
            return self.clip(*capped) if capped is not None else self.clip(x, 0.0, math.inf)
        if kind == "Clip":
            bounds = [-math.inf, math.inf]
            for index, name in enumerate(("min", "max")):
                given = self.constant(node.input[index + 1]) if len(node.input) > index + 1 else None
                bounds[index] = (
                    float(given.reshape(-1)[0]) if given is not None and given.size else attrs.get(name, bounds[index])
                )
            return self.clip(x, bounds[0], bounds[1])
        if kind == "PRelu":
            slope = self.constant(node.input[1])
            if slope is None:
                return None
            largest, smallest = float(slope.max()), float(slope.min())
            a = self.elementwise(x, lambda v: np.where(v < 0, v * largest, v))
            b = self.elementwise(x, lambda v: np.where(v < 0, v * smallest, v))
            return self.hull(a, b)
        if kind in _ELEMENTWISE:
            return self.elementwise(x, lambda v: _ELEMENTWISE[kind](v, attrs))
        if kind in ("FastGelu", "QuickGelu"):
            return self.elementwise(x, lambda v: _ELEMENTWISE["Gelu"](v, attrs))
        if kind == "Pow":
            power = self.constant(node.input[1])
            if power is None or power.size != 1:
                return None
            exponent = float(power.reshape(-1)[0])
            return self.elementwise(x, lambda v: np.power(v if exponent.is_integer() else np.maximum(v, 0), exponent))
        if kind in ("Softmax", "LogSoftmax"):
            if kind == "LogSoftmax":
                return None
            one = np.ones(1)
            return Channels(0.5 * one, one / 12.0, 0.0 * one, one, None, "interval")
        if kind == "Pad":
            value = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
            if value is None:
                return None
            edge = float(value.reshape(-1)[0]) if value.size else 0.0
            if attrs.get("mode", "constant") != "constant":
                return x
            return replace(x, low=np.minimum(x.low, edge), high=np.maximum(x.high, edge))
        if kind in ("MaxPool", "GlobalMaxPool"):
            return self.largest(x, math.prod(attrs.get("kernel_shape", [7, 7])))
        if kind in _SAME:
            return x
        if kind in _AVERAGE:
            return self.average(node, attrs, x)
        if kind in _VIEWS:
            return self.view(node, attrs, x)
        return None

    def normalization(self, node: onnx.NodeProto) -> Channels | None:
        first = 1
        gamma = self.constant(node.input[first])
        beta = self.constant(node.input[first + 1]) if len(node.input) > first + 1 and node.input[first + 1] else None
        if gamma is None:
            return None
        gamma = gamma.reshape(-1)
        beta = np.zeros_like(gamma) if beta is None else beta.reshape(-1)
        axis = -1 if node.op_type == "LayerNormalization" else 1
        kind: Kind = "bn" if node.op_type == "BatchNormalization" else "derived"
        return self.normal(beta, np.square(gamma), axis, kind)

    def capped(self, value: str) -> tuple[Channels, float, Vector] | None:
        """What a Relu behind a Min with one constant a channel clips, and between which bounds (ReLU6 of rescaled channels)."""
        node = self.graph.producer(value)
        if node is None or node.op_type != "Min" or len(node.input) != 2:
            return None
        for index in (0, 1):
            x, bound = self.found.get(node.input[index]), self.constant(node.input[1 - index])
            if x is None or bound is None or x.axis != 1 or bound.size != x.mean.size or not (bound > 0).all():
                continue
            if bound.ndim < 2 or bound.shape[1] != bound.size:
                continue
            return x, 0.0, bound.reshape(-1)
        return None

    def clip(self, x: Channels, low: float, high: float | Vector) -> Channels:
        mean, var = clipped_normal(x.mean, x.var, low, high)
        return replace(x, mean=mean, var=var, low=np.clip(x.low, low, high), high=np.clip(x.high, low, high))

    def elementwise(self, x: Channels, function: Callable[[Vector], Vector]) -> Channels:
        samples = np.clip(x.mean + x.std * _NODES[:, None], x.low, x.high)
        values = function(samples)
        mean = _WEIGHTS @ values
        var = np.maximum(_WEIGHTS @ np.square(values) - np.square(mean), 0.0)
        # The extremes of a smooth function, on a grid over the reach that holds zero where zero is inside.
        grid = function(
            np.concatenate([np.linspace(x.low, x.high, 513), np.clip(np.zeros((1, len(x.low))), x.low, x.high)])
        )
        return Channels(mean, var, grid.min(0), grid.max(0), x.axis, x.as_kind("derived").kind)

    def hull(self, a: Channels, b: Channels) -> Channels:
        a, b = self.aligned(a, b)
        mean = (a.mean + b.mean) / 2
        return Channels(
            mean,
            (a.var + b.var) / 2 + np.square(a.mean - b.mean) / 4,
            np.minimum(a.low, b.low),
            np.maximum(a.high, b.high),
            a.axis if a.axis is not None else b.axis,
            a.as_kind(b.kind, "derived").kind,
        )

    def binary(self, node: onnx.NodeProto) -> Channels | None:
        if len(node.input) != 2:
            return None
        a, b = self.of(node.input[0]), self.of(node.input[1])
        if a is None or b is None:
            return None
        a, b = self.aligned(a, b)
        axis = a.axis if a.axis is not None else b.axis
        constant = not a.var.any() or not b.var.any()
        kind = a.as_kind(b.kind, "derived").kind
        if node.op_type in ("Add", "Sub"):
            sign = 1.0 if node.op_type == "Add" else -1.0
            mean, var = a.mean + sign * b.mean, a.var + b.var
            lowest = a.low + (b.low if sign > 0 else -b.high)
            highest = a.high + (b.high if sign > 0 else -b.low)
            if kind == "interval" or constant:
                return Channels(mean, var, lowest, highest, axis, kind)
            # Independent deviations add in squares, each at its own distance from its own mean; never beyond the bounds.
            down_b = b.mean - b.low if sign > 0 else b.high - b.mean
            up_b = b.high - b.mean if sign > 0 else b.mean - b.low
            down, up = np.hypot(a.mean - a.low, down_b), np.hypot(a.high - a.mean, up_b)
            return Channels(mean, var, np.maximum(mean - down, lowest), np.minimum(mean + up, highest), axis, kind)
        if node.op_type in ("Max", "Min"):
            pick = np.maximum if node.op_type == "Max" else np.minimum
            return Channels(
                pick(a.mean, b.mean), np.maximum(a.var, b.var), pick(a.low, b.low), pick(a.high, b.high), axis, kind
            )
        if node.op_type == "Div":
            if not (b.low > 0).all() and not (b.high < 0).all():
                return None
            mean_b = 1.0 / np.where(b.mean == 0, 1e-30, b.mean)
            b = Channels(mean_b, b.var * mean_b**4, 1.0 / b.high, 1.0 / b.low, b.axis, b.kind)
        ends = np.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high])
        mean = a.mean * b.mean
        var = a.var * b.var + a.var * np.square(b.mean) + b.var * np.square(a.mean)
        return Channels(mean, var, ends.min(0), ends.max(0), axis, kind)

    def concat(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> Channels | None:
        parts = [self.of(name) for name in node.input]
        known = [part for part in parts if part is not None]
        if len(known) != len(parts):
            return None
        axis = int(attrs.get("axis", 1))
        kind: Kind = max((part.kind for part in known), key=_ORDER.__getitem__)
        rank = self.rank(node.output[0])
        if (
            rank is not None
            and axis % rank == 1
            and rank in (2, 4, 5)
            and all(part.axis in (1, None) for part in known)
        ):
            sizes = [self.graph.shape(name) for name in node.input]
            whole: list[Channels] = []
            for part, shape in zip(known, sizes, strict=True):
                size = shape[1] if shape is not None and len(shape) > 1 else None
                if size is None:
                    whole = []
                    break
                whole.append(part if len(part.mean) == size else _repeat(part.pooled(), size))
            if whole:
                joined = [np.concatenate([getattr(p, f) for p in whole]) for f in ("mean", "var", "low", "high")]
                return Channels(joined[0], joined[1], joined[2], joined[3], 1, kind)
        pooled = [part.pooled() for part in known]
        result = pooled[0]
        for part in pooled[1:]:
            result = replace(self.hull(result, part), kind=kind)
        return result

    def linear(self, x: Channels, weight: Vector, bias: Vector | float, axis: int, group: int = 1) -> Channels:
        """Weights as ``[outputs, inputs of the group, places]`` applied to the channels."""
        outputs, inputs, _ = weight.shape
        sums = weight.sum(2)
        spread = np.maximum(np.square(weight).sum(2), np.square(sums))
        positive, negative = np.maximum(weight, 0.0).sum(2), np.minimum(weight, 0.0).sum(2)

        def per_output(values: Vector) -> Vector:
            full = np.broadcast_to(values, (group * inputs,)) if len(values) == 1 else values
            return np.repeat(full.reshape(group, inputs), outputs // group, axis=0)

        mean, var = per_output(x.mean), per_output(x.var)
        low, high = per_output(x.low), per_output(x.high)
        out_mean = (sums * mean).sum(1) + bias
        out_var = (spread * var).sum(1)
        lowest = (positive * np.minimum(low, 0) + negative * np.maximum(high, 0)).sum(1) + bias
        highest = (positive * np.maximum(high, 0) + negative * np.minimum(low, 0)).sum(1) + bias
        if x.kind == "interval":
            return Channels(out_mean, out_var, lowest, highest, axis, "interval")
        deviation = self.sigmas * np.sqrt(out_var)
        # Padding counts as zero, so the bounds include inputs of zero; the mean is that of the interior.
        return Channels(
            out_mean,
            out_var,
            np.maximum(out_mean - deviation, lowest),
            np.minimum(out_mean + deviation, highest),
            axis,
            "derived",
        )

    def convolution(self, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Channels) -> Channels | None:
        weight = self.constant(node.input[1])
        bias = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        if weight is None or bias is None:
            return None
        group = int(attrs.get("group", 1))
        if node.op_type == "ConvTranspose":
            per = weight.shape[1]
            weight = weight.reshape(group, -1, per, *weight.shape[2:])
            weight = np.swapaxes(weight, 1, 2).reshape(group * per, -1, *weight.shape[3:])
        if x.axis == -1 or (x.axis == 1 and len(x.mean) not in (1, weight.shape[1] * group)):
            x = x.pooled()
        return self.linear(x, weight.reshape(*weight.shape[:2], -1), bias, 1, group)

    def product(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> Channels | None:
        x = self.found.get(node.input[0])
        weight = self.constant(node.input[1])
        if x is None or weight is None or weight.ndim != 2:
            return self.product_of_two(node)
        bias: Vector | float = 0.0
        if node.op_type == "Gemm":
            weight = (weight if attrs.get("transB", 0) else weight.T) * float(attrs.get("alpha", 1.0))
            if attrs.get("transA", 0):
                x = x.pooled()
            if len(node.input) > 2 and node.input[2]:
                given = self.constant(node.input[2])
                if given is None or given.size not in (1, weight.shape[0]):
                    return None
                bias = given.reshape(-1) * float(attrs.get("beta", 1.0))
        else:
            weight = weight.T
        rank = self.rank(node.input[0])
        if (x.axis == 1 and rank != 2) or len(x.mean) not in (1, weight.shape[1]):
            x = x.pooled()
        return self.linear(x, weight[..., None], bias, 1 if rank == 2 else -1)

    def product_of_two(self, node: onnx.NodeProto) -> Channels | None:
        a, b = self.of(node.input[0]), self.of(node.input[1])
        shape = self.graph.shape(node.input[0])
        depth = shape[-1] if shape else None
        if a is None or b is None or depth is None:
            return None
        a, b = a.pooled(), b.pooled()
        ends = np.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high]) * depth
        mean = a.mean * b.mean * depth
        var = (a.var * b.var + a.var * np.square(b.mean) + b.var * np.square(a.mean)) * depth
        kind = a.as_kind(b.kind).kind
        if kind == "interval":
            # Rows of a softmax sum to one: their product stays inside the other factor's reach.
            maker = self.graph.producer(node.input[0])
            if maker is not None and maker.op_type == "Softmax":
                return replace(b, kind="interval")
            return Channels(mean, var, ends.min(0), ends.max(0), None, "interval")
        deviation = self.sigmas * np.sqrt(var)
        return Channels(
            mean,
            var,
            np.maximum(mean - deviation, ends.min(0)),
            np.minimum(mean + deviation, ends.max(0)),
            None,
            "derived",
        )

    def largest(self, x: Channels, places: int) -> Channels:
        """The largest of neighbouring pixels, which move together: counted as the square root of their number of normals."""
        independent = math.sqrt(max(places, 1))
        # Expected largest of n unit normals and its variance, from the quantiles of F ** n.
        levels = (np.arange(400) + 0.5) / 400
        normal = np.interp(levels ** (1.0 / independent), *_QUANTILES)
        mean = np.clip(x.mean + normal.mean() * x.std, x.low, x.high)
        return replace(x, mean=mean, var=x.var * normal.var())

    def average(self, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Channels) -> Channels:
        if node.op_type == "ReduceMean":
            axes = attrs.get("axes")
            if axes is None and len(node.input) > 1 and node.input[1]:
                given = self.constant(node.input[1])
                axes = None if given is None else [int(v) for v in given.reshape(-1)]
            rank = self.rank(node.input[0])
            channel = None if rank is None or x.axis is None else x.axis % rank
            if axes is None or rank is None or channel in [axis % rank for axis in axes]:
                return x.pooled().as_kind("derived")
            if not attrs.get("keepdims", 1) and x.axis == -1:
                return x.pooled().as_kind("derived")
        # Neighbouring pixels move together, so the variance is kept: an upper bound.
        return x.as_kind("derived")

    def view(self, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Channels) -> Channels:
        before, after = self.graph.shape(node.input[0]), self.graph.shape(node.output[0])
        if x.axis is None or before is None or after is None:
            return x.pooled()
        channel = x.axis % len(before)
        if node.op_type == "Transpose":
            perm = list(attrs.get("perm", range(len(before))[::-1]))
            place = perm.index(channel)
            if place == 1 and len(perm) != 3:
                return replace(x, axis=1)
            return replace(x, axis=-1) if place == len(perm) - 1 else x.pooled()
        size = before[channel]
        if node.op_type in ("Reshape", "Flatten") and channel == 1 and len(after) == 2 and after[1] and size:
            return _repeat(x, after[1] // size) if after[1] % size == 0 else x.pooled()
        if (
            node.op_type in ("Reshape", "Squeeze", "Slice", "Unsqueeze")
            and channel == 1
            and len(after) > 1
            and after[1] == size
        ):
            return x
        return x.pooled()


def _repeat(x: Channels, times: int) -> Channels:
    """Every entry `times` times, along axis 1."""
    mean, var, low, high = (np.repeat(v, times) for v in (x.mean, x.var, x.low, x.high))
    return Channels(mean, var, low, high, 1, x.kind)


def propagate(graph: Graph, inputs: Mapping[str, tuple[Vector, Vector]], *, sigmas: float = 6.0) -> Propagated:
    """Carry moments and reach from the inputs through a graph.

    Args:
        graph: With or without batch normalizations; with them it knows much more.
        inputs: Smallest and largest value of each channel of each input. Pixels are taken as uniform in between.
        sigmas: How many standard deviations activations reach.
    """
    walk = _Propagation(graph, sigmas)
    for name, (low, high) in inputs.items():
        low, high = np.asarray(low, np.float64).reshape(-1), np.asarray(high, np.float64).reshape(-1)
        axis = 1 if len(low) > 1 else None
        walk.found[name] = Channels((low + high) / 2, np.square(high - low) / 12.0, low, high, axis, "derived")
    walk.run()
    notes = [
        f"{kind}: no rule for analytic ranges ({len(names)} node{'s' if len(names) > 1 else ''}, first {names[0]!r})"
        for kind, names in walk.unknown.items()
    ]
    bounds = sum(channels.kind == "interval" for channels in walk.found.values())
    if bounds:
        notes.append(f"{bounds} activations have hard bounds only (interval arithmetic), which are wide")
    return Propagated(walk.found, tuple(notes))


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


def analytic_ranges(model: Model, sigmas: float = 6.0) -> Ranges:
    """The range of every activation from the network's parameters alone (method ``bn-analytic``).

    Args:
        model: The network with its batch normalizations.
        sigmas: How many standard deviations activations reach.
    """
    found = propagate_model(model, sigmas=sigmas)
    notes = found.notes
    if not model.batch_norms():
        warning = (
            "there is no batch normalization: ranges follow from the weights alone, take channels as independent, and become "
            "too narrow layer by layer; measure them on images instead"
        )
        notes = (warning, *notes)
    return Ranges(
        {name: channels.reach for name, channels in found.channels.items()},
        f"bn-analytic {sigmas:g} sigma",
        model.digest,
        "",
        notes,
    )
