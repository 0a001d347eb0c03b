"""Histograms whose grid does not depend on how or in what order the data came.

The bins are ``[i * 2**e, (i + 1) * 2**e)`` for integers ``i`` in ``[-SIDE, SIDE)``: aligned at zero, with a width that is a power of two.
``e`` is the smallest exponent for which the largest magnitude seen so far fits. When larger numbers arrive, neighbouring bins are
added in pairs, which gives exactly the counts that the coarser grid would have given from the start. Counts are integers, so the
result depends on the set of numbers alone, and two histograms merge exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["SIDE", "Histogram", "HistogramBuilder", "exponent_for"]

Array = npt.NDArray[Any]

SIDE = 8192
"""Bins on each side of zero; at least half of them are in use on the side of the largest magnitude."""

_SMALLEST, _LARGEST = -120, 115  # 2**-e stays a normal float32, and so do the products


def exponent_for(magnitude: float) -> int:
    """The smallest exponent whose grid holds numbers of this magnitude."""
    if magnitude == 0.0:
        return _SMALLEST
    return min(max(math.frexp(magnitude)[1] - (SIDE.bit_length() - 1), _SMALLEST), _LARGEST)


@dataclass(frozen=True, eq=False)
class Histogram:
    """A finished histogram.

    Attributes:
        counts: int64, only the used bins.
        first: Index of the first used bin: bin ``k`` covers ``[(first + k) * width, (first + k + 1) * width)``.
        exponent: ``width == 2.0 ** exponent``.
        minimum: Smallest number.
        maximum: Largest number.
        zeros: How many numbers were exactly zero.
    """

    counts: npt.NDArray[np.int64]
    first: int
    exponent: int
    minimum: float
    maximum: float
    zeros: int

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    @property
    def total(self) -> int:
        """Number of numbers."""
        return int(self.counts.sum())

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """The ``len(counts) + 1`` edges of the bins."""
        return (self.first + np.arange(len(self.counts) + 1, dtype=np.float64)) * self.width

    def coarser(self, bins: int) -> Histogram:
        """Bins joined in pairs as long as at least `bins` of them remain in use on the longer side of zero."""
        current = self
        while max(current.first + len(current.counts), -current.first) >= 2 * bins:
            current = current.halved()
        return current

    def halved(self) -> Histogram:
        """The same numbers on the next coarser grid."""
        start = self.first // 2
        lead = self.first - 2 * start
        padded = np.zeros(2 * ((lead + len(self.counts) + 1) // 2), np.int64)
        padded[lead : lead + len(self.counts)] = self.counts
        return Histogram(padded.reshape(-1, 2).sum(1), start, self.exponent + 1, self.minimum, self.maximum, self.zeros)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of numbers together; exact, associative and commutative."""
        a, b = self, other
        while a.exponent < b.exponent:
            a = a.halved()
        while b.exponent < a.exponent:
            b = b.halved()
        first = min(a.first, b.first)
        counts = np.zeros(max(a.first + len(a.counts), b.first + len(b.counts)) - first, np.int64)
        counts[a.first - first : a.first - first + len(a.counts)] += a.counts
        counts[b.first - first : b.first - first + len(b.counts)] += b.counts
        return Histogram(
            counts, first, a.exponent, min(a.minimum, b.minimum), max(a.maximum, b.maximum), a.zeros + b.zeros
        )

    @staticmethod
    def of(values: Array | torch.Tensor) -> Histogram:
        """The histogram of the numbers of one array (computed in float32)."""
        builder = HistogramBuilder()
        builder.add(torch.as_tensor(values))
        return builder.finish()


def _count_zeros(part: torch.Tensor) -> int:
    if part.device.type != "cpu":
        return int((part == 0).sum())
    # numpy compares and counts more than ten times faster than torch does on one core
    return int(np.count_nonzero(np.equal(part.numpy(), 0)))


class HistogramBuilder:
    """Adds tensors to a histogram; its memory is 2 * SIDE integers, however many numbers come."""

    _CHUNK = 1 << 17

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None
        self._exponent = _SMALLEST
        self._minimum = math.inf
        self._maximum = -math.inf
        self._zeros = 0
        self._scaled: torch.Tensor | None = None
        self._index: torch.Tensor | None = None

    def add(self, x: torch.Tensor, limits: tuple[float, float] | None = None) -> None:
        """Count the numbers of a tensor.

        Args:
            x: Finite floats of any shape.
            limits: Smallest and largest number of `x`, if the caller has them already.
        """
        if x.numel() == 0:
            return
        # Any order will do: take the memory's own, without a copy where the layout is dense.
        flat = (
            x.permute(0, 2, 3, 1) if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x
        ).reshape(-1)
        flat = flat.to(torch.float32)
        if limits is None:
            smallest, largest = torch.aminmax(flat)
            limits = float(smallest), float(largest)
        self._minimum, self._maximum = min(self._minimum, limits[0]), max(self._maximum, limits[1])
        if self._counts is None:
            self._counts = torch.zeros(2 * SIDE, dtype=torch.int64, device=flat.device)
        exponent = exponent_for(max(abs(limits[0]), abs(limits[1])))
        if exponent > self._exponent:
            self._grow(exponent)
        factor = 2.0**-self._exponent
        chunk = self._CHUNK if flat.device.type == "cpu" else flat.numel()
        if self._scaled is None or self._scaled.device != flat.device or len(self._scaled) < min(chunk, flat.numel()):
            self._scaled = torch.empty(min(chunk, flat.numel()), device=flat.device)
            self._index = torch.empty(min(chunk, flat.numel()), dtype=torch.int32, device=flat.device)
        assert self._index is not None
        zeros = 0
        for start in range(0, flat.numel(), chunk):
            part = flat[start : start + chunk]
            scaled, index = self._scaled[: len(part)], self._index[: len(part)]
            torch.mul(part, factor, out=scaled).floor_()
            index.copy_(scaled)
            index.add_(SIDE)
            self._counts += torch.bincount(index, minlength=2 * SIDE)
            zeros += _count_zeros(part)
        self._zeros += zeros

    def _grow(self, exponent: int) -> None:
        assert self._counts is not None
        steps = exponent - self._exponent
        if steps > 2 * SIDE.bit_length():
            # Everything seen so far falls into the two bins beside zero.
            below, above = self._counts[:SIDE].sum(), self._counts[SIDE:].sum()
            self._counts.zero_()
            self._counts[SIDE - 1], self._counts[SIDE] = below, above
        else:
            for _ in range(steps):
                pairs = self._counts.reshape(-1, 2).sum(1)
                self._counts.zero_()
                self._counts[SIDE // 2 : SIDE // 2 + SIDE] = pairs
        self._exponent = exponent

    def finish(self) -> Histogram:
        """The histogram so far. The grid is the one that the largest magnitude asks for, nothing else."""
        if self._counts is None:
            return Histogram(np.zeros(1, np.int64), 0, _SMALLEST, 0.0, 0.0, 0)
        counts = self._counts.cpu().numpy()
        used = np.flatnonzero(counts)
        first, last = int(used[0]), int(used[-1])
        return Histogram(
            counts[first : last + 1].copy(),
            first - SIDE,
            self._exponent,
            self._minimum,
            self._maximum,
            self._zeros,
        )
