"""Exact integer arithmetic for convolutions and matrix products, with the speed of floating-point libraries.

A sum of products of integers is exact in floating point, in whatever order it is summed, as long as no partial sum leaves the
range in which every integer is representable: 2**24 for float32, 2**53 for float64. Every partial sum of one output is at most
``max|x| * sum|w|`` in magnitude, where the sum runs over that output's weights. The functions here compute this bound from the
codes themselves, cut the reduction into pieces that stay below 2**24, run each piece in float32 (direct convolution or GEMM;
algorithms that transform their input, such as Winograd and FFT, are kept out), and add the pieces as 64-bit integers.

Shapes follow ONNX: activations ``[N, C, spatial...]``, weights ``[M, C/group, kernel...]`` (``[C, M/group, kernel...]`` for the
transposed convolution). Zero points are scalars, or one value an output channel for weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from zsq_deploy.errors import ModelError

__all__ = [
    "accumulate_conv",
    "accumulate_conv_transpose",
    "accumulate_matmul",
    "conv_padding",
    "quantize_bias",
    "requantize",
    "saturate",
]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

_FLOAT32_EXACT = 2**24
_FLOAT64_EXACT = 2**53


@contextmanager
def _exact_kernels() -> Iterator[None]:
    """Only kernels that multiply and add what they are given: no NNPACK (FFT, Winograd), no reduced-precision shortcuts."""
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
        yield


def _centred(codes: Array, zero_point: Array | int, axis: int | None) -> torch.Tensor:
    """``codes - zero_point`` as an int32 tensor; a vector of zero points runs along `axis`."""
    zero = np.asarray(zero_point).astype(np.int64)
    if zero.size == 1:
        zero = zero.reshape(())
    elif axis is None:
        raise ModelError(
            "an activation with one zero point a channel cannot be accumulated in integers",
            remedy="quantize activations per tensor",
        )
    else:
        shape = [1] * codes.ndim
        shape[axis] = -1
        zero = zero.reshape(shape)
    return torch.from_numpy(np.ascontiguousarray(codes.astype(np.int64) - zero).astype(np.int32))


def conv_padding(
    attrs: Mapping[str, Any], spatial: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis of a convolution or pooling node.

    Args:
        attrs: The node's attributes (:func:`zsq_deploy.model.graph.attributes`).
        spatial: Sizes of the input's spatial axes.
        kernel: Sizes of the kernel.
    """
    rank = len(spatial)
    strides = list(attrs.get("strides", [1] * rank))
    dilations = list(attrs.get("dilations", [1] * rank))
    mode = attrs.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, width, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
            small, large = total // 2, total - total // 2
            before.append(small if mode == "SAME_UPPER" else large)
            after.append(large if mode == "SAME_UPPER" else small)
        return before, after
    if mode == "VALID":
        return [0] * rank, [0] * rank
    pads = list(attrs.get("pads", [0] * (2 * rank)))
    return pads[:rank], pads[rank:]


def _pieces(weight_sums: torch.Tensor, largest: int, limit: int) -> list[tuple[int, int]]:
    """Cut the reduction axis so that `largest` times the sum of any output's weights in one piece stays below `limit`.

    Args:
        weight_sums: ``[outputs, reduction]`` sums of |w|.
        largest: Largest |x|.
    """
    steps = weight_sums.shape[1]
    cumulative = torch.zeros(weight_sums.shape[0], steps + 1, dtype=torch.int64)
    torch.cumsum(weight_sums.to(torch.int64), dim=1, out=cumulative[:, 1:])
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < steps:
        spans = (cumulative[:, start + 1 :] - cumulative[:, start : start + 1]).max(dim=0).values * largest
        stop = start + int(torch.searchsorted(spans, torch.tensor(limit), right=False))
        if stop == start:
            raise ModelError(
                f"one piece of a reduction exceeds {limit} already: the codes are too large for exact accumulation"
            )
        pieces.append((start, stop))
        start = stop
    return pieces


def _plan(weight: torch.Tensor, largest: int) -> tuple[torch.dtype, list[tuple[int, int]]]:
    """The arithmetic and the pieces for weights ``[outputs, reduction, ...]``: few float32 pieces, or float64."""
    sums = weight.abs().to(torch.int64).flatten(2).sum(2) if weight.ndim > 2 else weight.abs().to(torch.int64)
    whole = int(sums.sum(1).max()) * largest if sums.numel() else 0
    if whole < _FLOAT32_EXACT:
        return torch.float32, [(0, weight.shape[1])]
    if whole < 16 * _FLOAT32_EXACT and int(sums.max()) * largest < _FLOAT32_EXACT:
        return torch.float32, _pieces(sums, largest, _FLOAT32_EXACT)
    return torch.float64, _pieces(sums, largest, _FLOAT64_EXACT)


def _magnitude(tensor: torch.Tensor) -> int:
    return max(abs(int(tensor.min())), abs(int(tensor.max()))) if tensor.numel() else 0


def accumulate_conv(
    x_codes: Array, x_zp: Array | int, w_codes: Array, w_zp: Array | int, attrs: Mapping[str, Any] | None = None
) -> IntArray:
    """The exact accumulator of an integer convolution, ``conv(x - x_zp, w - w_zp)``; padding counts as the zero point.

    Args:
        x_codes: ``[N, C, spatial...]`` integer codes, 1 to 3 spatial axes.
        x_zp: Scalar zero point.
        w_codes: ``[M, C/group, kernel...]``.
        w_zp: Scalar, or one value an output channel.
        attrs: Attributes of the ONNX Conv (or QLinearConv, ConvInteger) node.

    Returns:
        ``[N, M, spatial...]`` int64. An int32 accumulator equals it modulo 2**32.
    """
    attrs = attrs or {}
    x, w = _centred(x_codes, x_zp, None), _centred(w_codes, w_zp, 0)
    rank = x.ndim - 2
    before, after = conv_padding(attrs, x.shape[2:], w.shape[2:])
    if any(before) or any(after):
        x = F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
    group = int(attrs.get("group", 1))
    strides = tuple(attrs.get("strides", [1] * rank))
    dilations = tuple(attrs.get("dilations", [1] * rank))
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    dtype, pieces = _plan(w, _magnitude(x))
    batch = x.shape[0]
    total: torch.Tensor | None = None
    with _exact_kernels():
        for start, stop in pieces:
            if len(pieces) == 1:
                part_x = x
            else:
                part_x = x.reshape(batch, group, -1, *x.shape[2:])[:, :, start:stop].flatten(1, 2)
            part = function(
                part_x.to(dtype), w[:, start:stop].to(dtype), None, strides, (0,) * rank, dilations, group
            ).to(torch.int64)
            total = part if total is None else total.add_(part)
    assert total is not None
    return total.numpy()


def accumulate_conv_transpose(
    x_codes: Array, x_zp: Array | int, w_codes: Array, w_zp: Array | int, attrs: Mapping[str, Any] | None = None
) -> IntArray:
    """The exact accumulator of an integer transposed convolution, without bias.

    Args:
        x_codes: ``[N, C, spatial...]``.
        x_zp: Scalar.
        w_codes: ``[C, M/group, kernel...]``.
        w_zp: Scalar, or one value an output channel (length M, only with one group).
        attrs: Attributes of the ConvTranspose node.
    """
    attrs = attrs or {}
    x, w = _centred(x_codes, x_zp, None), _centred(w_codes, w_zp, 1)
    rank = x.ndim - 2
    group = int(attrs.get("group", 1))
    strides = list(attrs.get("strides", [1] * rank))
    dilations = list(attrs.get("dilations", [1] * rank))
    extra = list(attrs.get("output_padding", [0] * rank))
    kernel = list(w.shape[2:])
    full = [
        (size - 1) * s + (k - 1) * d + 1 + e
        for size, s, k, d, e in zip(x.shape[2:], strides, kernel, dilations, extra, strict=True)
    ]
    wanted = attrs.get("output_shape")
    mode = attrs.get("auto_pad", "NOTSET")
    if wanted is not None or mode in ("SAME_UPPER", "SAME_LOWER"):
        sizes = (
            list(wanted)[-rank:] if wanted is not None else [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        )
        totals = [max(f - size, 0) for f, size in zip(full, sizes, strict=True)]
        halves = [t // 2 for t in totals]
        before = halves if mode == "SAME_UPPER" else [t - h for t, h in zip(totals, halves, strict=True)]
        after = [t - b for t, b in zip(totals, before, strict=True)]
    elif mode == "VALID":
        before, after = [0] * rank, [0] * rank
    else:
        pads = list(attrs.get("pads", [0] * (2 * rank)))
        before, after = pads[:rank], pads[rank:]
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    # Every output sums over the input channels of its group: outputs first, reduction second.
    per_group = w.reshape(group, -1, *w.shape[1:]).transpose(1, 2).flatten(0, 1)
    dtype, pieces = _plan(per_group, _magnitude(x))
    batch = x.shape[0]
    total: torch.Tensor | None = None
    with _exact_kernels():
        for start, stop in pieces:
            part_x = x.reshape(batch, group, -1, *x.shape[2:])[:, :, start:stop].flatten(1, 2)
            part_w = w.reshape(group, -1, *w.shape[1:])[:, start:stop].flatten(0, 1)
            part = function(
                part_x.to(dtype),
                part_w.to(dtype),
                None,
                tuple(strides),
                (0,) * rank,
                (0,) * rank,
                group,
                tuple(dilations),
            ).to(torch.int64)
            total = part if total is None else total.add_(part)
    assert total is not None
    if any(extra):
        total = F.pad(total, [p for e in reversed(extra) for p in (0, e)])
    for axis in range(rank):
        total = total.narrow(axis + 2, before[axis], total.shape[axis + 2] - before[axis] - after[axis])
    return total.contiguous().numpy()


def accumulate_matmul(a_codes: Array, a_zp: Array | int, b_codes: Array, b_zp: Array | int) -> IntArray:
    """The exact accumulator of an integer matrix product with numpy's broadcasting, ``(a - a_zp) @ (b - b_zp)``.

    Args:
        a_codes: ``[..., M, K]`` (or ``[K]``).
        a_zp: Scalar, or one value a row (length M).
        b_codes: ``[..., K, N]`` (or ``[K]``).
        b_zp: Scalar, or one value a column (length N).

    Returns:
        int64, shaped as numpy's matmul.
    """
    a = _centred(a_codes, a_zp, max(a_codes.ndim - 2, 0))
    b = _centred(b_codes, b_zp, b_codes.ndim - 1)
    depth = a.shape[-1]
    largest = _magnitude(a)
    columns = b.reshape(-1, depth, b.shape[-1]).transpose(1, 2).flatten(0, 1) if b.ndim > 1 else b.reshape(1, depth)
    dtype, pieces = _plan(columns, largest)
    total: torch.Tensor | None = None
    with _exact_kernels():
        for start, stop in pieces:
            part_a = a[..., start:stop].to(dtype)
            part_b = (b[..., start:stop, :] if b.ndim > 1 else b[start:stop]).to(dtype)
            part = torch.matmul(part_a, part_b).to(torch.int64)
            total = part if total is None else total + part
    assert total is not None
    return np.asarray(total.numpy())


def saturate(values: Array, dtype: npt.DTypeLike) -> Array:
    """Clamp integers (or whole floats) to the range of an integer type and convert."""
    limits = np.iinfo(np.dtype(dtype))
    return np.clip(values, limits.min, limits.max).astype(dtype)


def requantize(
    accumulator: Array, multiplier: Array | float, zero_point: int, dtype: npt.DTypeLike, *, axis: int = 1
) -> Array:
    """``saturate(rint(float32(acc) * float32(multiplier)) + zero_point)``, rounding half to even.

    This is the float32 requantization that ONNX Runtime's CPU kernels use for fused convolutions, with
    ``multiplier = float32(float32(sx * sw) / sy)``.

    Args:
        accumulator: int32 or int64 accumulators (bias included).
        multiplier: Scalar, or one value a channel along `axis`.
        zero_point: The output's zero point.
        dtype: The output's integer type.
        axis: Channel axis of the accumulator.
    """
    factor = np.asarray(multiplier, np.float32)
    if factor.size > 1:
        shape = [1] * accumulator.ndim
        shape[axis] = -1
        factor = factor.reshape(shape)
    elif factor.ndim:
        factor = factor.reshape(())
    scaled = np.rint(accumulator.astype(np.float32) * factor)
    limits = np.iinfo(np.dtype(dtype))
    bounded = np.clip(scaled, np.float32(limits.min - zero_point), np.float32(limits.max - zero_point))
    return np.asarray(bounded.astype(np.int32) + np.int32(zero_point), dtype)


def quantize_bias(bias: Array, x_scale: Array | float, w_scale: Array | float) -> npt.NDArray[np.int32]:
    """A bias as int32 codes of scale ``x_scale * w_scale`` (float32 product, as the runtimes form it), zero point 0.

    Args:
        bias: ``[M]`` float.
        x_scale: Scalar.
        w_scale: Scalar, or ``[M]``.
    """
    scale = (np.asarray(x_scale, np.float32) * np.asarray(w_scale, np.float32)).astype(np.float64)
    return saturate(np.rint(bias.astype(np.float64) / scale), np.int32)
