"""Functions of normal numbers: moments of what Clip, elementwise functions and the largest of neighbours make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from zsq_deploy.quant.analytic.channels import Channels, Vector

__all__ = ["ELEMENTWISE", "clipped", "clipped_normal", "largest_of", "mapped"]

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


ELEMENTWISE: dict[str, Callable[[Vector, Mapping[str, Any]], Vector]] = {
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
"""Operator -> function of numbers and the node's attributes."""


def clipped(x: Channels, low: float, high: float | Vector) -> Channels:
    """Moments and reach behind a Clip between two bounds; the upper one may be a vector, one a channel."""
    mean, var = clipped_normal(x.mean, x.var, low, high)
    return replace(x, mean=mean, var=var, low=np.clip(x.low, low, high), high=np.clip(x.high, low, high))


def mapped(x: Channels, function: Callable[[Vector], Vector]) -> Channels:
    """Moments and reach behind a function of single numbers, by quadrature."""
    samples = np.clip(x.mean + x.std * _NODES[:, None], x.low, x.high)
    values = function(samples)
    mean = _WEIGHTS @ values
    var = np.maximum(_WEIGHTS @ np.square(values) - np.square(mean), 0.0)
    # The extremes of a smooth function, on a grid over the reach that holds zero where zero is inside.
    grid = function(
        np.concatenate([np.linspace(x.low, x.high, 513), np.clip(np.zeros((1, len(x.low))), x.low, x.high)])
    )
    return Channels(mean, var, grid.min(0), grid.max(0), x.axis, x.as_kind("derived").kind)


def largest_of(x: Channels, places: int) -> Channels:
    """The largest of neighbouring pixels, which move together: counted as the square root of their number of normals."""
    independent = math.sqrt(max(places, 1))
    # Expected largest of n unit normals and its variance, from the quantiles of F ** n.
    levels = (np.arange(400) + 0.5) / 400
    normal = np.interp(levels ** (1.0 / independent), *_QUANTILES)
    mean = np.clip(x.mean + normal.mean() * x.std, x.low, x.high)
    return replace(x, mean=mean, var=x.var * normal.var())
