"""What a FakeQuantize says, as scale and zero point.

FakeQuantize (OpenVINO specification, opset 1): ``x`` is cut to ``[input_low, input_high]``, moved to the nearest of `levels` equally
spaced numbers (ties to even), and these are mapped to ``[output_low, output_high]``. With ``step = (high - low) / (levels - 1)`` this
is QuantizeLinear and DequantizeLinear whenever ``-low / step`` is an integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Affine", "Rounding", "levels_of", "on_the_side_of", "read_ranges"]

Array = npt.NDArray[Any]

_EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class Rounding:
    """Codes of a tensor: ``codes = clip(rint(x / scale) + zero, low, high)``.

    Attributes:
        dtype: Type of the codes, ``int8``.
        scale: float32; as many axes as the tensor (sizes 1 where it does not vary), or none.
        zero: int64, shape of the scale.
        low: Smallest code that is used.
        high: Largest code that is used.
        narrow: Whether fewer codes are used than the type has.
    """

    dtype: str
    scale: Array = field(repr=False)
    zero: Array = field(repr=False)
    low: int
    high: int

    @property
    def narrow(self) -> bool:
        """Whether the type has codes that are not used."""
        signed, bits = not self.dtype.startswith("u"), int(self.dtype.lstrip("uint"))
        first = -(1 << (bits - 1)) if signed else 0
        return self.low > first or self.high < first + (1 << bits) - 1

    @property
    def bottom(self) -> Array:
        """Smallest number that has a code, float32, shape of the scale."""
        return np.asarray((self.low - self.zero) * self.scale.astype(np.float64), np.float32)

    @property
    def top(self) -> Array:
        """Largest number that has a code, float32, shape of the scale."""
        return np.asarray((self.high - self.zero) * self.scale.astype(np.float64), np.float32)


@dataclass(frozen=True, eq=False)
class Affine:
    """``y = factor * x + shift`` behind a rounding whose output range is not its input range; float32."""

    factor: Array = field(repr=False)
    shift: Array = field(repr=False)


def _scale(low: Array, high: Array, zero: Array, levels: int) -> npt.NDArray[np.float32]:
    """The float32 scale that gives both bounds back, as far as there is one; otherwise the nearest."""
    best = np.asarray((high - low) / (levels - 1), np.float32)

    def misfit(scale: Array) -> Array:
        wide = scale.astype(np.float64)
        bottom, top = np.asarray(-zero * wide, np.float32), np.asarray((levels - 1 - zero) * wide, np.float32)
        return np.abs(bottom - low) + np.abs(top - high)

    with np.errstate(divide="ignore", invalid="ignore"):
        others = [high / (levels - 1 - zero), -low / zero]
    for other in others:
        candidate = np.asarray(other, np.float32)
        usable = np.isfinite(candidate) & (candidate > 0)
        candidate = np.where(usable, candidate, best)
        best = np.where(misfit(candidate) < misfit(best), candidate, best)
    # a scale that was made of few bits (a power of two times a small integer) is the one that was meant
    for bits in (8, 12, 16, 20):
        mantissa, exponent = np.frexp(best.astype(np.float64))
        short = np.asarray(np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits), np.float32)
        close = np.abs(short.astype(np.float64) - best) <= 2 * _EPS * best
        best = np.where(close & (misfit(short) <= misfit(best)), short, best)
    return np.asarray(best, np.float32)


def read_ranges(bounds: Sequence[Array | float], levels: int) -> tuple[Rounding, Affine | None] | None:
    """Scale and zero point of a FakeQuantize; ``None`` when its zero point is no integer code.

    Args:
        bounds: Input low and high, output low and high; they broadcast against each other.
        levels: Number of levels.

    Returns:
        The rounding, and what comes behind it where the output range is another one.
    """
    low, high, out_low, out_high = np.broadcast_arrays(*[np.asarray(bound, np.float64) for bound in bounds])
    if not 2 <= levels <= 65536 or not np.isfinite(low).all() or not np.isfinite(high).all() or not (high > low).all():
        return None
    step = (high - low) / (levels - 1)
    zero = -low / step
    whole = np.rint(zero)
    if (np.abs(zero - whole) > max(1e-4, 4 * _EPS * levels)).any() or (whole < 0).any() or (whole > levels - 1).any():
        return None
    bits = 4 if levels <= 16 else 8 if levels <= 256 else 16
    half = levels // 2
    signed = bool((whole == half).all())
    scale = _scale(low, high, whole, levels)
    rounding = Rounding(
        f"{'' if signed else 'u'}int{bits}",
        scale,
        np.asarray(whole - half if signed else whole, np.int64),
        -half if signed else 0,
        levels - 1 - half if signed else levels - 1,
    )
    tolerance = 1e-5 * step
    if (np.abs(out_low - low) <= tolerance).all() and (np.abs(out_high - high) <= tolerance).all():
        return rounding, None
    out_step = (out_high - out_low) / (levels - 1)
    factor, shift = out_step / scale, out_low + whole * out_step
    shift = np.where(np.abs(shift) <= 1e-5 * np.abs(out_step), 0.0, shift)
    return rounding, Affine(np.asarray(factor, np.float32), np.asarray(shift, np.float32))


def levels_of(values: Array, bounds: Sequence[Array], levels: int) -> npt.NDArray[np.int64]:
    """On which level, counted from the lowest, FakeQuantize puts float32 numbers of this input range.

    In float32 and in this order, as OpenVINO's CPU plugin was seen to compute it (no difference in two million weights).
    """
    low, high = (np.asarray(bound, np.float32) for bound in bounds[:2])
    factor = np.asarray(np.float32(levels - 1) / (high - low), np.float32)
    scaled = np.asarray(np.minimum(np.maximum(values, low), high) * factor, np.float32)
    return np.asarray(np.rint(scaled + np.asarray(-low * factor, np.float32)), np.int64)


def on_the_side_of(values: Array, rounding: Rounding, places: Array) -> npt.NDArray[np.float32]:
    """Weights moved off the ties between two codes, to the side on which FakeQuantize puts them.

    A weight that lies in the middle between two codes (the largest one does where a range was doubled against overflow) is rounded to
    the even *place above the lowest level* by FakeQuantize, but to the even *multiple of the scale* by QuantizeLinear. Such weights
    are moved by a hundred-thousandth of a step; all others stay as they are.

    Args:
        values: float32 weights.
        rounding: How QuantizeLinear rounds them; broadcasts against them.
        places: The levels that FakeQuantize puts them on (:func:`levels_of`).
    """
    wanted = places + rounding.low
    scale = rounding.scale.astype(np.float64)
    exact = np.asarray(values, np.float64) / scale
    found = np.clip(np.rint(exact) + rounding.zero, rounding.low, rounding.high)
    differ = (found != wanted) & (np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-3)
    if not differ.any():
        return values
    side = np.sign(wanted - found)
    moved = (wanted - rounding.zero - side * (0.5 - 1e-5)) * scale
    return np.where(differ, moved, values).astype(np.float32)
