"""Covariances of activations without any image: between channels and between places, from the network's parameters alone.

Rounding a weight to codes matters as far as the inputs of the layer move together (the second moment of its input is the Hessian of the squared error of
its output). Batch normalization gives every channel's mean and variance; what it does not give is how channels and neighbouring pixels
move together. That follows from the weights, if activations are taken for a stationary normal field:

* the autocovariance of a feature map is ``R[c, d, y, x] = Cov(channel c here, channel d at distance (y, x))``, kept on a torus. A convolution
  multiplies its Fourier transform, a matrix of all channel pairs at each frequency, with the transformed weight from both sides;
* batch normalization scales it to the known variances, so errors do not add up from layer to layer;
* a function of single numbers (Relu, Clip) maps it by its Hermite series, ``Cov(f(u), f(v)) = sum_k c_k(u) c_k(v) rho^k / k!`` (Mehler's
  formula), whose coefficients for functions with corners are closed forms;
* strides and pooling sample or average it; sums add the covariances of their operands, which are taken as independent.

Pictures come in as they are known to be: power falls with a power of the frequency (Field 1987, *Relations between the statistics of
natural images and the response properties of cortical cells*, has 2; the default of 3 makes neighbours on small pictures as alike as fractal
pictures have them, 0.9), and the colours of a pixel are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.model.model import Model
from zsq_deploy.quant.analytic import Channels, propagate_model

__all__ = ["Field", "clipped_field", "covariances", "filtered", "hermite_of_clip", "picture_field"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

ORDERS = 8
"""Terms of the Hermite series that are kept; what is left of the variance goes into one more."""


@dataclass(frozen=True, eq=False)
class Field:
    """What is known about one activation as a stationary field.

    Attributes:
        cov: ``[C, C, Y, X]``: covariance of channel ``c`` here with channel ``d`` at distance ``(y, x)``, on a torus: distance -1 is the last entry.
    """

    cov: Vector

    @property
    def var(self) -> Vector:
        """Variance of each channel, ``[C]``."""
        found: Vector = np.diagonal(self.cov[:, :, 0, 0]).copy()
        return found

    def scaled_to(self, var: Vector) -> Field:
        """The same correlations with other variances."""
        gain = np.sqrt(np.maximum(var, 0.0) / np.maximum(self.var, 1e-30))
        return Field(self.cov * gain[:, None, None, None] * gain[None, :, None, None])

    def sampled(self, size: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> Field:
        """Every `stride`-th place, on a torus of another size."""
        rows, columns = (_distances(n) * s % old for n, s, old in zip(size, stride, self.cov.shape[2:], strict=True))
        return Field(np.ascontiguousarray(self.cov[:, :, rows[:, None], columns[None, :]]))

    def patches(self, places: Array) -> Vector:
        """Covariance ``[C * K, C * K]`` of patches; `places` ``[K, 2]`` are their pixels."""
        away = places[None, :, :] - places[:, None, :]
        rows, columns = away[..., 0] % self.cov.shape[2], away[..., 1] % self.cov.shape[3]
        found = self.cov[:, :, rows, columns].transpose(0, 2, 1, 3)  # [C, K, C, K]
        size = found.shape[0] * found.shape[1]
        return np.ascontiguousarray(found).reshape(size, size)


def _distances(size: int) -> npt.NDArray[np.int64]:
    """0, 1, .. , -2, -1 on a torus."""
    found = np.arange(size)
    return np.where(found <= size // 2, found, found - size)


def picture_field(var: Vector, size: tuple[int, int], *, exponent: float = 3.0, alike: float = 0.9) -> Field:
    """The input of a network that looks at pictures.

    Args:
        var: Variance of each channel.
        size: Height and width.
        exponent: Power falls with this power of the frequency.
        alike: Correlation of two colours of a pixel.
    """
    rows, columns = (_distances(n) / n for n in size)
    frequency = np.hypot(rows[:, None], columns[None, :])
    frequency[0, 0] = min(1.0 / max(size), 1.0)
    field = np.fft.ifft2(frequency**-exponent).real
    field /= field[0, 0]
    colours = np.where(np.eye(len(var), dtype=bool), 1.0, alike) * np.sqrt(np.outer(var, var))
    return Field(colours[:, :, None, None] * field)


def hermite_of_clip(mean: Vector, std: Vector, low: float, high: float | Vector, orders: int = ORDERS) -> Vector:
    """Coefficients ``c_k = E[clip(mean + std u, low, high) He_k(u)]`` for ``k = 1 .. orders`` with ``u`` a unit normal: ``[orders, C]``.

    Args:
        mean: ``[C]``.
        std: ``[C]``.
        low: Lower bound; may be ``-inf``.
        high: Upper bound, for all or one a channel; may be ``inf``.
        orders: How many.
    """
    std = np.maximum(std, 1e-30)
    result = np.zeros((orders, len(mean)))
    for bound, sign in (
        (np.full_like(mean, low), 1.0),
        (np.broadcast_to(np.asarray(high, np.float64), mean.shape), -1.0),
    ):
        finite = np.isfinite(bound)
        t = np.where(finite, (np.where(finite, bound, 0.0) - mean) / std, 0.0)
        density = np.where(finite, np.exp(-0.5 * np.square(t)) / math.sqrt(2.0 * math.pi), 0.0)
        above = np.where(finite, 0.5 * _erfc(t / math.sqrt(2.0)), 1.0 if sign > 0 else 0.0)
        result[0] += sign * std * above
        before, he = np.zeros_like(t), np.ones_like(t)
        for order in range(1, orders):  # the second derivative of a corner is a spike: He_{k - 2} at the corner
            result[order] += sign * std * density * he
            before, he = he, t * he - (order - 1) * before
    return result


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def clipped_field(field: Field, mean: Vector, low: float, high: float | Vector, var: Vector) -> Field:
    """A normal field behind a clip: Mehler's formula, with what the series leaves of the variance in one more term.

    Args:
        field: In front of it.
        mean: In front of it, ``[C]``.
        low: Lower bound.
        high: Upper bound, for all or one a channel.
        var: Variance behind it, ``[C]``.
    """
    std = np.sqrt(np.maximum(field.var, 1e-30))
    coefficients = hermite_of_clip(mean, std, low, high)
    rho = np.clip(field.cov / (std[:, None, None, None] * std[None, :, None, None]), -1.0, 1.0)
    weights = coefficients / np.sqrt([math.factorial(k + 1) for k in range(len(coefficients))])[:, None]
    left = np.sqrt(np.maximum(var - np.square(weights).sum(axis=0), 0.0))
    power, total = np.ones_like(rho), np.zeros_like(rho)
    for row in (*weights, left):
        power = power * rho
        total += row[:, None, None, None] * row[None, :, None, None] * power
    return Field(total)


class _Walk:
    """One walk through one graph with its batch normalizations."""

    def __init__(self, graph: Graph, marginals: Mapping[str, Channels], entries: int) -> None:
        self.graph, self.marginals, self.entries = graph, marginals, entries
        self.found: dict[str, Field] = {}

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.domain not in ("", "ai.onnx"):
                continue
            field = self.apply(node)
            if field is None or not np.isfinite(field.cov).all():
                continue
            self.found[node.output[0]] = self.known(node.output[0], field)

    def known(self, name: str, field: Field) -> Field:
        """With the variances that are known for a value."""
        marginal = self.marginals.get(name)
        if marginal is None or marginal.axis != 1 or marginal.kind != "bn" or len(marginal.var) != len(field.cov):
            return field
        return field.scaled_to(marginal.var)

    def size(self, name: str, channels: int) -> tuple[int, int]:
        """The torus of a value: its height and width, as far as there is room."""
        shape = self.graph.shape(name) or ()
        most = max(1, int(math.sqrt(self.entries / channels**2)))
        rows, columns = (int(v or 1) for v in shape[2:4]) if len(shape) == 4 else (1, 1)
        return min(rows, most), min(columns, most)

    def apply(self, node: onnx.NodeProto) -> Field | None:
        kind, x = node.op_type, self.found.get(node.input[0]) if node.input else None
        if kind == "Add":
            return self.sum(node)
        if kind == "Min":
            return self.found.get(self.behind_cap(node))
        if x is None:
            return None
        attrs = attributes(node)
        if kind in ("Conv", "Gemm", "MatMul"):
            return self.linear(node, attrs, x)
        if kind == "BatchNormalization":
            gamma = self.graph.constant(node.input[1])
            if gamma is None:
                return None
            sign = np.where(gamma.reshape(-1) < 0, -1.0, 1.0)
            return Field(x.cov * sign[:, None, None, None] * sign[None, :, None, None]).scaled_to(
                np.square(gamma.astype(np.float64).reshape(-1))
            )
        if kind in ("Relu", "Clip"):
            return self.clipped(node, attrs, x)
        if kind in ("GlobalAveragePool", "ReduceMean"):
            return Field(x.cov.mean(axis=(2, 3), keepdims=True))
        if kind in ("AveragePool", "MaxPool"):
            return self.pooled(node, attrs, x)
        if kind in ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout", "Pad", "Cast", "Slice"):
            return self.view(node, x)
        return None

    def view(self, node: onnx.NodeProto, x: Field) -> Field | None:
        """What moves numbers: channels stay (new ones at the end, as padded shortcuts have them, are zero), places may be left out."""
        before, after = self.graph.shape(node.input[0]), self.graph.shape(node.output[0])
        if before is None or after is None or len(after) < 2 or not after[1]:
            return None
        if len(after) == 4 and len(before) == 4 and node.op_type == "Slice" and after[1] == len(x.cov):
            stride = [max(1, round(int(b or 1) / int(a or 1))) for b, a in zip(before[2:], after[2:], strict=True)]
            return x.sampled(self.size(node.output[0], len(x.cov)), (stride[0], stride[1]))
        if node.op_type == "Pad" and after[1] > len(x.cov):
            pads = self.graph.constant(node.input[1])
            if pads is None or pads.size != 8:
                return None
            cov = np.zeros((after[1], after[1], *x.cov.shape[2:]))
            first = int(pads[1])
            cov[first : first + len(x.cov), first : first + len(x.cov)] = x.cov
            return Field(cov)
        return x if after[1] == len(x.cov) else None

    def sum(self, node: onnx.NodeProto) -> Field | None:
        parts = [self.found.get(name) for name in node.input]
        known = [part for part in parts if part is not None]
        constants = sum(self.graph.constant(name) is not None for name in node.input)
        if len(known) + constants != 2 or not known or any(part.cov.shape != known[0].cov.shape for part in known):
            return None
        return Field(sum(part.cov for part in known[1:]) + known[0].cov)

    def clipped(self, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Field) -> Field | None:
        bounds = [0.0, math.inf] if node.op_type == "Relu" else [-math.inf, math.inf]
        if node.op_type == "Clip":
            for index, name in enumerate(("min", "max")):
                given = self.graph.constant(node.input[index + 1]) if len(node.input) > index + 1 else None
                bounds[index] = (
                    float(given.reshape(-1)[0]) if given is not None and given.size else attrs.get(name, bounds[index])
                )
        source, high = node.input[0], float(bounds[1])
        top: float | Vector = high
        maker = self.graph.producer(source)
        if node.op_type == "Relu" and maker is not None and maker.op_type == "Min" and self.behind_cap(maker):
            # One bound a channel in front of a Relu: both bounds at once, on what the Min reads.
            source = self.behind_cap(maker)
            cap = next(array for array in map(self.graph.constant, maker.input) if array is not None)
            top = cap.astype(np.float64).reshape(-1)
        before, after = self.marginals.get(source), self.marginals.get(node.output[0])
        if before is None or after is None or before.axis != 1 or len(before.mean) != len(x.cov):
            return None
        return clipped_field(x.scaled_to(before.var), before.mean, bounds[0], top, after.var)

    def behind_cap(self, node: onnx.NodeProto) -> str:
        """What a Min with one constant a channel reads; empty for any other Min."""
        values = [name for name in node.input if name in self.found]
        caps = [array for array in map(self.graph.constant, node.input) if array is not None]
        if len(node.input) != 2 or len(values) != 1 or len(caps) != 1:
            return ""
        return values[0] if caps[0].size == len(self.found[values[0]].cov) else ""

    def linear(self, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Field) -> Field | None:
        weight = self.graph.constant(node.input[1])
        if weight is None:
            return None
        weight = weight.astype(np.float64)
        if node.op_type != "Conv":
            if weight.ndim != 2 or attrs.get("transA", 0) or x.cov.shape[2:] != (1, 1):
                return None
            matrix = weight if node.op_type == "Gemm" and attrs.get("transB", 0) else weight.T
            if matrix.shape[1] != len(x.cov):
                return None
            return Field((matrix @ x.cov[:, :, 0, 0] @ matrix.T)[:, :, None, None])
        if weight.ndim != 4:
            return None
        groups, outputs = int(attrs.get("group", 1)), weight.shape[0]
        size = self.size(node.output[0], outputs)
        stride = tuple(attrs.get("strides", (1, 1)))
        dilation = tuple(attrs.get("dilations", (1, 1)))
        return filtered(x, weight, groups, size, (stride[0], stride[1]), (dilation[0], dilation[1]))

    def pooled(self, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Field) -> Field | None:
        kernel, stride = attrs["kernel_shape"], attrs.get("strides", (1, 1))
        size = self.size(node.output[0], len(x.cov))
        if node.op_type == "MaxPool":
            after = self.marginals.get(node.output[0])
            y = x.sampled(size, (stride[0], stride[1]))
            return y if after is None or len(after.var) != len(x.cov) else y.scaled_to(after.var)
        box = np.full((len(x.cov), 1, *kernel), 1.0 / math.prod(kernel))
        return filtered(x, box, len(x.cov), size, (stride[0], stride[1]), (1, 1))


def filtered(
    x: Field, weight: Vector, groups: int, size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Field:
    """What a convolution makes of a field.

    Args:
        x: Its input.
        weight: ``[outputs, inputs / groups, rows, columns]``.
        groups: Its groups.
        size: Torus of the output.
        stride: Rows, columns.
        dilation: Rows, columns.
    """
    outputs, inner, rows, columns = weight.shape
    height, width = x.cov.shape[2:]
    spectrum = np.fft.rfft2(x.cov).transpose(2, 3, 0, 1)  # [y, x, C, D]
    kernel = np.zeros((outputs, inner, height, width))
    for row in range(rows):
        for column in range(columns):
            kernel[:, :, row * dilation[0] % height, column * dilation[1] % width] += weight[:, :, row, column]
    gain = np.fft.rfft2(kernel).transpose(2, 3, 0, 1)  # [y, x, O, I]
    if groups == 1:
        left = gain @ spectrum
        out = left @ np.conj(gain).swapaxes(-1, -2)
    else:
        per = outputs // groups
        f = spectrum.reshape(*spectrum.shape[:2], groups, inner, groups, inner)
        g = gain.reshape(*gain.shape[:2], groups, per, inner)
        out = np.einsum("yxgoi,yxgihj,yxhpj->yxgohp", g, f, np.conj(g), optimize=True)
        out = out.reshape(*spectrum.shape[:2], outputs, outputs)
    cov = np.fft.irfft2(out.transpose(2, 3, 0, 1), s=(height, width))
    return Field(cov).sampled(size, stride)


def covariances(model: Model, *, entries: int = 1 << 22) -> dict[str, Field]:
    """Covariances of every feature map that can be followed, by value name of ``model.graph``.

    Args:
        model: The network with its batch normalizations.
        entries: Largest number of covariances of one feature map; larger ones keep the smaller distances only.
    """
    marginals = propagate_model(model).channels
    walk = _Walk(model.graph, marginals, entries)
    for spec in model.inputs:
        marginal = marginals.get(spec.name)
        if marginal is not None and len(spec.shape) == 4 and spec.shape[1]:
            var = np.broadcast_to(marginal.var, (int(spec.shape[1]),)).astype(np.float64)
            walk.found[spec.name] = picture_field(var, walk.size(spec.name, len(var)))
    walk.run()
    return walk.found
