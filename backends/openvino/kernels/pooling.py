"""Pooling and means over codes: the sums are exact, one float32 rounding (or two) makes the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.kernels.float32 import reciprocal
from zsq_deploy.backends.openvino.lowered import Op

__all__ = ["average_pool", "max_pool", "reduce_mean", "reduce_sum"]

Array = npt.NDArray[Any]


def _paddings(op: Op, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    kernel, strides = op.ints("kernel"), op.ints("strides")
    mode = op.attrs.get("auto_pad", "explicit").lower()
    before, after = list(op.ints("pads_begin")), list(op.ints("pads_end"))
    if mode in ("same_upper", "same_lower"):
        totals = [
            max((math.ceil(size / s) - 1) * s + k - size, 0) for size, s, k in zip(sizes, strides, kernel, strict=True)
        ]
        before = [t // 2 if mode == "same_upper" else t - t // 2 for t in totals]
        after = [t - b for t, b in zip(totals, before, strict=True)]
    elif mode == "valid":
        before, after = [0] * len(sizes), [0] * len(sizes)
    return before, after


def _windows(op: Op, x: Array, fill: float) -> tuple[Array, Array]:
    """All windows, ``[N, C, out..., kernel...]``, and for each place of a window whether it lies within the tensor."""
    spatial = x.shape[2:]
    kernel, strides = op.ints("kernel"), op.ints("strides")
    dilations = op.ints("dilations", (1,) * len(kernel))
    before, after = _paddings(op, spatial)
    ceil = op.attrs.get("rounding_type", "floor").lower().startswith("ceil")
    extra = []
    for size, k, s, d, b, a in zip(spatial, kernel, strides, dilations, before, after, strict=True):
        reach = (k - 1) * d + 1
        span = size + b + a - reach
        count = (math.ceil(span / s) if ceil else span // s) + 1
        extra.append(max((count - 1) * s + reach - (size + b + a), 0))
    widths = [(0, 0), (0, 0), *((b, a + e) for b, a, e in zip(before, after, extra, strict=True))]
    inside = np.pad(np.ones((1, 1, *spatial), np.bool_), widths)
    padded = np.pad(x, widths, constant_values=fill)
    axes = tuple(range(2, 2 + len(kernel)))

    def cut(array: Array) -> Array:
        reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
        view = np.lib.stride_tricks.sliding_window_view(array, reach, axes)
        steps = [slice(None), slice(None), *(slice(None, None, s) for s in strides)]
        return view[(*steps, *(slice(None, None, d) for d in dilations))]

    return cut(padded), cut(inside)


def max_pool(op: Op, x: Array) -> Array:
    """The largest code of every window."""
    if x.dtype.kind == "f":
        windows, _ = _windows(op, x, -np.inf)
    else:
        windows, _ = _windows(op, x, np.iinfo(x.dtype).min)
    return np.asarray(windows.max(tuple(range(x.ndim, windows.ndim))))


def average_pool(op: Op, x: Array) -> Array:
    """The mean of every window, float32, before it is rounded to a code."""
    windows, inside = _windows(op, x.astype(np.int64), 0)
    axes = tuple(range(x.ndim, windows.ndim))
    total = windows.sum(axes).astype(np.float32)
    if op.flag("exclude-pad"):
        count = inside.sum(axes).astype(np.float32)
    else:
        count = np.asarray(math.prod(op.ints("kernel")), np.float32)
    return np.asarray(total * reciprocal(count), np.float32)


def reduce_sum(x: Array, axes: Sequence[int], keep: bool) -> Array:
    """The exact sum, float32."""
    return np.asarray(x.astype(np.int64).sum(tuple(axes), keepdims=keep).astype(np.float32))


def reduce_mean(x: Array, axes: Sequence[int], keep: bool) -> Array:
    """The exact sum divided by the number of terms, in float32."""
    count = math.prod(x.shape[axis] for axis in axes)
    return np.asarray(reduce_sum(x, axes, keep) / np.float32(count), np.float32)
