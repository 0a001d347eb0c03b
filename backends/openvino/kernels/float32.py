"""float32 arithmetic exactly as vector instructions do it: one rounding an instruction, and one for a fused multiply-add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["channelwise", "fused_multiply_add", "reciprocal", "to_codes"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_RANGES: Mapping[str, tuple[npt.DTypeLike, float, float]] = {
    "u8": (np.uint8, 0.0, 255.0),
    "i8": (np.int8, -128.0, 127.0),
}


def fused_multiply_add(x: Array, factor: Array, shift: Array) -> Float32:
    """``x * factor + shift`` in float32 with a single rounding.

    The product of two float32 numbers is exact in float64. The sum is rounded to float64 *to odd* (an inexact sum with an even last
    bit is moved one step towards its error), which makes the second rounding, to float32, the only one that counts.
    """
    product = np.asarray(x, np.float32).astype(np.float64) * np.asarray(factor, np.float32).astype(np.float64)
    addend = np.asarray(shift, np.float32).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.asarray(product + addend)
        part = total - product
        error = (product - (total - part)) + (addend - part)
    even = (total.view(np.int64) & 1) == 0
    moved = even & (error != 0) & np.isfinite(total)
    if np.any(moved):
        total = np.where(moved, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    with np.errstate(over="ignore"):
        return np.asarray(total.astype(np.float32))


def reciprocal(value: Array | float) -> Float32:
    """``1 / value`` rounded to float32."""
    return np.asarray(np.float32(1) / np.asarray(value, np.float32), np.float32)


def channelwise(values: Array, rank: int, axis: int) -> Array:
    """One value, or one a channel, in a shape that broadcasts against a tensor of `rank` dimensions."""
    flat = np.asarray(values).reshape(-1)
    if flat.size == 1:
        return flat.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return flat.reshape(shape)


def to_codes(values: Array, kind: str) -> Array:
    """Clamp to the range of an 8-bit type and round half to even, as the store of a kernel does (``f32``: nothing)."""
    if kind not in _RANGES:
        return np.asarray(values, np.float32) if kind == "f32" else values
    dtype, low, high = _RANGES[kind]
    return np.asarray(np.rint(np.clip(values, low, high)).astype(dtype))
