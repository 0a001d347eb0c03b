"""Ranges on a calibration set against those on real images: a comparison for people, never an input of anything that is made.

Per tensor, in bits: ``log2`` of the largest magnitude on the set over that on the real images, and ``log2`` of the extents (largest minus
smallest number, zero included, which is what an integer range has to hold). Below 0 the set is too narrow and real numbers would be clipped;
above 0 it is too wide and resolution is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from zsq_deploy.calib.quality.reach import outside
from zsq_deploy.quant.statistics_values import Statistics

__all__ = ["RangeError", "TensorError", "range_error"]

Range = tuple[float, float]


@dataclass(frozen=True)
class TensorError:
    """One activation.

    Attributes:
        name: Value name.
        magnitude: log2 of the ratio of the largest magnitudes.
        extent: log2 of the ratio of the extents.
        clipped: Share of the real numbers outside of the set's range.
    """

    name: str
    magnitude: float
    extent: float
    clipped: float


@dataclass(frozen=True)
class RangeError:
    """All activations that are not constant on the real images.

    Attributes:
        tensors: In order of execution.
        images: Number of real images.
    """

    tensors: tuple[TensorError, ...]
    images: int

    @property
    def magnitude(self) -> float:
        """Mean absolute error of the largest magnitudes, in bits."""
        return _mean([abs(tensor.magnitude) for tensor in self.tensors])

    @property
    def extent(self) -> float:
        """Mean absolute error of the extents, in bits."""
        return _mean([abs(tensor.extent) for tensor in self.tensors])

    @property
    def bias(self) -> float:
        """Mean error of the extents with its sign, in bits: below 0 the ranges are too narrow."""
        return _mean([tensor.extent for tensor in self.tensors])

    @property
    def clipped(self) -> float:
        """Share of the real numbers outside of the set's ranges, averaged over tensors."""
        return _mean([tensor.clipped for tensor in self.tensors])

    def worst(self, count: int = 5) -> tuple[TensorError, ...]:
        """The tensors whose extent is farthest off, the worst first."""
        return tuple(sorted(self.tensors, key=lambda tensor: -abs(tensor.extent))[:count])


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


#: A range without extent counts as this small a part of the real one.
_SMALLEST = 2.0**-20


def _bits(ours: float, theirs: float) -> float:
    return math.log2(max(ours / theirs, _SMALLEST))


def range_error(observed: Mapping[str, Range], real: Statistics) -> RangeError:
    """Compare the ranges of a set with real images.

    Args:
        observed: Smallest and largest number of every activation on the set.
        real: Statistics of the same graph on real images.
    """
    rows = []
    for name, tensor in real.items():
        low, high = min(tensor.minimum, 0.0), max(tensor.maximum, 0.0)
        if name not in observed or high <= low:
            continue
        ours = min(observed[name][0], 0.0), max(observed[name][1], 0.0)
        rows.append(
            TensorError(
                name,
                _bits(max(ours[1], -ours[0]), max(high, -low)),
                _bits(ours[1] - ours[0], high - low),
                outside(tensor.histogram, *ours),
            )
        )
    return RangeError(tuple(rows), real.images)
