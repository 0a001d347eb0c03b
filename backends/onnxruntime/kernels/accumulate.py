"""Exact integer accumulation for activations with the channels last, and the saturating pair sums of x86 without VNNI.

A sum of integer products is exact in float32, in any order, while every partial sum stays below 2**24. The reduction is cut
into as few pieces as that needs (one, for nearly every layer of a real network), each piece is a float32 matrix product, and
the pieces are added in int32, which wraps as the runtime's accumulator does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["ConvShape", "Weights", "convolve", "matmul", "saturating_matmul", "saturation_loss"]

_EXACT = 1 << 24
_BLOCK = 1 << 20  # elements of one im2col block: 4 MiB, so that it stays in the cache


def _pieces(magnitudes: torch.Tensor, largest: int) -> list[tuple[int, int]]:
    """Cut the reduction so that ``largest * sum|w|`` of every column stays below 2**24 in each piece.

    Args:
        magnitudes: ``[K, N]`` |w|.
        largest: Largest |x|.
    """
    depth = magnitudes.shape[0]
    if depth == 0:
        return []
    cumulative = torch.cat([torch.zeros(1, magnitudes.shape[1], dtype=torch.int64), magnitudes.long().cumsum(0)])
    cuts, start = [], 0
    while start < depth:
        spans = (cumulative[start + 1 :] - cumulative[start]).amax(1) * largest
        stop = start + max(1, int((spans < _EXACT).sum()))
        cuts.append((start, stop))
        start = stop
    return cuts


@dataclass(frozen=True)
class Weights:
    """A weight matrix prepared for exact products.

    Attributes:
        codes: ``[K, N]`` int32, zero point removed.
        matrix: The same as float32.
        pieces: Cuts of K.
    """

    codes: torch.Tensor
    matrix: torch.Tensor
    pieces: tuple[tuple[int, int], ...]

    @classmethod
    def prepare(cls, codes: torch.Tensor, largest: int) -> Weights:
        """Prepare ``[K, N]`` int32 weights for activations of magnitude up to `largest`."""
        return cls(codes, codes.to(torch.float32).contiguous(), tuple(_pieces(codes.abs(), largest)))


def matmul(a: torch.Tensor, weights: Weights) -> torch.Tensor:
    """``a @ w`` as int32.

    Args:
        a: ``[M, K]`` float32 holding integers (zero point removed).
        weights: The prepared ``[K, N]`` matrix.
    """
    pieces = weights.pieces
    if len(pieces) == 1:
        return torch.mm(a, weights.matrix).to(torch.int32)
    total = torch.zeros(a.shape[0], weights.matrix.shape[1], dtype=torch.int32)
    for start, stop in pieces:
        total += torch.mm(a[:, start:stop], weights.matrix[start:stop]).to(torch.int32)
    return total


def saturating_matmul(raw: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``raw @ w`` where neighbouring products are first added in saturating int16.

    ``sum_p sat16(raw[2p] * w[2p] + raw[2p + 1] * w[2p + 1])``: what ``vpmaddubsw`` computes on x86 without VNNI. The activation
    codes are *raw* (unsigned, zero point included); 64 products of 255 with 127 give 32 * 32767 = 1,048,544.

    Args:
        raw: ``[M, K]`` int32 in 0..255.
        weights: ``[K, N]`` int32 in -128..127.
    """
    rows, depth = raw.shape
    if depth % 2:
        raw = torch.cat([raw, raw.new_zeros(rows, 1)], 1)
        weights = torch.cat([weights, weights.new_zeros(1, weights.shape[1])], 0)
    total = torch.zeros(rows, weights.shape[1], dtype=torch.int32)
    for k in range(0, raw.shape[1], 2):
        pair = raw[:, k : k + 1] * weights[k] + raw[:, k + 1 : k + 2] * weights[k + 1]
        total += pair.clamp_(-32768, 32767)
    return total


def saturation_loss(raw: torch.Tensor, weights: Weights) -> torch.Tensor:
    """What saturating pair sums (:func:`saturating_matmul`) give less or more than exact ones.

    Zero points do not matter here: the runtime multiplies raw codes and corrects for the zero points exactly afterwards.

    Args:
        raw: ``[M, K]`` float32 holding 0..255.
        weights: Raw signed weight codes.
    """
    return saturating_matmul(raw.to(torch.int32), weights.codes) - matmul(raw, weights)


@dataclass(frozen=True)
class ConvShape:
    """Geometry of a convolution or of a pooling window; every tuple has one entry a spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def outputs(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the output's spatial axes."""
        return tuple(
            (n + b + a - (k - 1) * d - 1) // s + 1
            for n, k, s, d, b, a in zip(
                spatial, self.kernel, self.strides, self.dilations, self.before, self.after, strict=True
            )
        )

    def padded(self, x: torch.Tensor, value: float) -> torch.Tensor:
        """``[N, spatial..., C]`` with `value` around it."""
        if not any(self.before) and not any(self.after):
            return x
        widths = [0, 0]
        for b, a in zip(reversed(self.before), reversed(self.after), strict=True):
            widths += [b, a]
        return torch.nn.functional.pad(x, widths, value=value)

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """A view ``[N, out..., kernel..., C]`` of a padded ``[N, spatial..., C]`` tensor."""
        rank = len(self.kernel)
        out = tuple(
            (n - (k - 1) * d - 1) // s + 1
            for n, k, s, d in zip(x.shape[1:-1], self.kernel, self.strides, self.dilations, strict=True)
        )
        steps = x.stride()
        return x.as_strided(
            (x.shape[0], *out, *self.kernel, x.shape[-1]),
            (
                steps[0],
                *(steps[1 + i] * self.strides[i] for i in range(rank)),
                *(steps[1 + i] * self.dilations[i] for i in range(rank)),
                steps[-1],
            ),
            x.storage_offset(),
        )

    def taps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The kernel's positions one after another: views ``[N, out..., C]``, first axis slowest."""
        view = self.windows(x)
        rank = len(self.kernel)
        for position in np.ndindex(*self.kernel):
            yield view[(slice(None),) * (1 + rank) + tuple(position)]


def _blocks(view: torch.Tensor, row_elements: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut ``[N, out0, ...]`` into blocks ``(image, image_end, row, row_end)`` of about `_BLOCK` gathered elements."""
    images, rows = view.shape[:2]
    per_image = rows * row_elements
    if per_image <= _BLOCK:
        step = max(1, _BLOCK // max(per_image, 1))
        for image in range(0, images, step):
            yield image, min(image + step, images), 0, rows
        return
    step = max(1, _BLOCK // row_elements)
    for image in range(images):
        for row in range(0, rows, step):
            yield image, image + 1, row, min(row + step, rows)


def convolve(
    x: torch.Tensor,
    groups: Sequence[Weights],
    shape: ConvShape,
    *,
    pad_value: int = 0,
    saturation: bool = False,
) -> torch.Tensor:
    """The accumulator of a convolution, ``[N, out..., M]`` int32.

    Args:
        x: ``[N, spatial..., C]`` float32 integers: zero point removed, or raw 0..255 codes with `saturation`.
        groups: One weight matrix ``[kernel..., C/group] x [M/group]`` a group, rows in that order.
        shape: Geometry.
        pad_value: What surrounds the input.
        saturation: Return what saturating pair sums lose instead (:func:`saturation_loss`).
    """
    padded = shape.padded(x, float(pad_value))
    view = shape.windows(padded)
    rank = len(shape.kernel)
    out = view.shape[1 : 1 + rank]
    depth = padded.shape[-1] // len(groups)
    per_group = groups[0].codes.shape[1]
    result = torch.empty(x.shape[0], *out, per_group * len(groups), dtype=torch.int32)
    if depth == 1 and not saturation and all(len(weights.pieces) == 1 for weights in groups):
        return _depthwise(padded, groups, shape, result)
    taps = int(np.prod(shape.kernel))
    row_elements = int(np.prod(out[1:])) * taps * depth
    for first, last, row, end in _blocks(view, row_elements):
        block = view[first:last, row:end]
        for index, weights in enumerate(groups):
            columns = block[..., index * depth : (index + 1) * depth].reshape(-1, taps * depth)
            total = saturation_loss(columns, weights) if saturation else matmul(columns, weights)
            target = result[first:last, row:end, ..., index * per_group : (index + 1) * per_group]
            target.copy_(total.reshape(target.shape))
    return result


def _depthwise(padded: torch.Tensor, groups: Sequence[Weights], shape: ConvShape, result: torch.Tensor) -> torch.Tensor:
    """One input channel a group: multiply and add position by position, exact in float32 by the same bound."""
    kernel = torch.cat([weights.matrix for weights in groups], 1)  # [taps, M]
    per_group = groups[0].codes.shape[1]
    images = max(1, (2 * _BLOCK) // max(1, result[0].numel()))
    for first in range(0, padded.shape[0], images):
        part = padded[first : first + images]
        if per_group > 1:
            part = part.repeat_interleave(per_group, dim=-1)
        total: torch.Tensor | None = None
        for row, tap in zip(kernel, shape.taps(part), strict=True):
            total = tap * row if total is None else torch.addcmul(total, tap, row, out=total)
        assert total is not None
        result[first : first + images] = total.to(torch.int32)
    return result
