"""How far a calibration set excites each activation, against what other evidence says about how far it should reach.

Two witnesses are heard, neither of which is a real image:

* **the network**: behind a batch normalization a channel has mean ``beta`` and standard deviation ``|gamma|``, so the tensor reaches from
  ``min(beta - 6 |gamma|)`` to ``max(beta + 6 |gamma|)``, cut by the Relu or Clip behind it (:mod:`zsq_deploy.quant.coverage`);
* **other images**: synthetic ones that the set does not hold, and structured pictures that know nothing of the network.

The *share* of a tensor is the reach of the set over the reach of a witness, on the side of zero where it is smaller (a side below a
tenth of the extent does not count); with two witnesses the smaller share counts, and nothing above 1. **Coverage** is the geometric mean
of the shares over all tensors that have a witness: 1 when the set reaches as far as the evidence everywhere, 0.5 when it misses one bit
of range everywhere. Shares below 1/100 count as 1/100. Reaching too far costs resolution instead: that is *excess*, in bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from zsq_deploy.model import Model
from zsq_deploy.quant.analytic import Channels, propagate_model
from zsq_deploy.quant.coverage import coverage
from zsq_deploy.quant.histogram import Histogram
from zsq_deploy.quant.statistics_values import Statistics

__all__ = ["FLOOR", "SIGMAS", "Reach", "TensorReach", "measure_reach", "outside"]

SIGMAS = 6.0
"""How far behind a batch normalization activations are taken to reach, in its own standard deviations."""

FLOOR = 0.01
"""The smallest share that enters the geometric mean."""

Range = tuple[float, float]


@dataclass(frozen=True)
class TensorReach:
    """One activation.

    Attributes:
        name: Value name in the folded graph.
        low: Smallest number on the set.
        high: Largest number on the set.
        channels: Number of channels.
        unexcited: Channels that never changed on the set, without those that the network itself says are constant.
        implied: What the batch normalization implies; ``None`` where none determines the tensor.
        witnessed: What other images showed; ``None`` without any.
        share_implied: Reach over implied reach; may exceed 1.
        share_witnessed: Reach over witnessed reach; may exceed 1.
        clipped: Share of the numbers of the other images that lie outside of the set's range.
    """

    name: str
    low: float
    high: float
    channels: int
    unexcited: int
    implied: Range | None = None
    witnessed: Range | None = None
    share_implied: float | None = None
    share_witnessed: float | None = None
    clipped: float | None = None

    @property
    def share(self) -> float | None:
        """The smaller share, at most 1; ``None`` without evidence."""
        known = [share for share in (self.share_implied, self.share_witnessed) if share is not None]
        return min(1.0, *known) if known else None

    @property
    def excess(self) -> float | None:
        """Bits of resolution that the range costs because it is wider than the batch normalization implies; 0 where it is not."""
        if self.implied is None:
            return None
        wanted = _extent(self.implied)
        return max(0.0, math.log2(_extent((self.low, self.high)) / wanted)) if wanted and self.high > self.low else 0.0


@dataclass(frozen=True)
class Reach:
    """All activations of a network.

    Attributes:
        tensors: In order of execution.
        witnesses: Number of other images that were looked at.
    """

    tensors: tuple[TensorReach, ...]
    witnesses: int = 0

    @property
    def judged(self) -> tuple[TensorReach, ...]:
        """The tensors that there is evidence for."""
        return tuple(tensor for tensor in self.tensors if tensor.share is not None)

    @property
    def coverage(self) -> float | None:
        """The summary: the geometric mean of the shares; ``None`` without any evidence."""
        shares = [max(tensor.share, FLOOR) for tensor in self.tensors if tensor.share is not None]
        return math.exp(math.fsum(math.log(share) for share in shares) / len(shares)) if shares else None

    @property
    def worst(self) -> TensorReach | None:
        """The tensor with the smallest share."""
        return min(self.judged, key=lambda tensor: tensor.share or 0.0, default=None)

    @property
    def below_half(self) -> int:
        """Tensors that miss half of their reach or more."""
        return sum(tensor.share is not None and tensor.share < 0.5 for tensor in self.tensors)

    @property
    def unexcited(self) -> float:
        """Share of all channels that never changed, without those that are constant by the network's own word."""
        channels = sum(tensor.channels for tensor in self.tensors)
        return sum(tensor.unexcited for tensor in self.tensors) / channels if channels else 0.0

    @property
    def excess(self) -> float | None:
        """Mean excess in bits over the tensors behind a batch normalization; ``None`` without any."""
        known = [tensor.excess for tensor in self.tensors if tensor.excess is not None]
        return math.fsum(known) / len(known) if known else None

    @property
    def clipped(self) -> float | None:
        """Mean over the tensors of the share of numbers of other images outside of the set's range; ``None`` without any."""
        known = [tensor.clipped for tensor in self.tensors if tensor.clipped is not None]
        return math.fsum(known) / len(known) if known else None


def _extent(pair: Range) -> float:
    """Length of a range that holds zero, as every integer range does."""
    return max(pair[1], 0.0) - min(pair[0], 0.0)


def outside(histogram: Histogram, low: float, high: float) -> float:
    """Share of a histogram's numbers below `low` or above `high`.

    Inside a bin that an end cuts, numbers are taken as spread evenly; exact zeros are counted as zeros.
    """
    if histogram.total == 0:
        return 0.0
    edges = np.clip(histogram.edges, histogram.minimum, histogram.maximum)
    left, right = edges[:-1], edges[1:]
    width = right - left
    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.where(width > 0, np.clip((right - high) / width, 0.0, 1.0), right > high)
        below = np.where(width > 0, np.clip((low - left) / width, 0.0, 1.0), left < low)
    counts = histogram.counts.astype(np.float64)
    zeros = float(histogram.zeros)
    if zeros:
        counts[-histogram.first] -= zeros
    found = float(counts @ np.minimum(above + below, 1.0)) + (zeros if low > 0.0 or high < 0.0 else 0.0)
    return found / histogram.total


def _share(shares: Mapping[str, float], name: str) -> float | None:
    """Without the negative zero of a set that stays on the other side of zero."""
    return max(shares[name], 0.0) + 0.0 if name in shares else None


def _silent(statistics: Statistics, name: str, implied: Channels | None) -> int:
    """Channels that never changed although nothing says that they cannot."""
    moments = statistics[name].channels
    still = moments.minimum == moments.maximum
    if implied is not None and len(implied.low) == len(still):
        still = still & (implied.high > implied.low)
    return int(still.sum())


def measure_reach(model: Model, seen: Statistics, others: Statistics | None = None, *, sigmas: float = SIGMAS) -> Reach:
    """How far a calibration set reaches.

    Args:
        model: The network, batch normalizations in place.
        seen: Statistics of the folded graph's activations on the set.
        others: The same on images that the set does not hold.
        sigmas: Reach behind a batch normalization, in standard deviations.
    """
    found: Mapping[str, Channels] = propagate_model(model, sigmas=sigmas).channels
    implied = {name: channels for name, channels in found.items() if channels.kind == "bn" and name in seen}
    implied_ranges = {name: channels.reach for name, channels in implied.items()}
    observed = {name: (tensor.minimum, tensor.maximum) for name, tensor in seen.items()}
    witnessed = {name: (tensor.minimum, tensor.maximum) for name, tensor in (others or {}).items() if name in seen}
    by_network, by_images = coverage(observed, implied_ranges), coverage(observed, witnessed)
    tensors = tuple(
        TensorReach(
            name,
            *observed[name],
            len(tensor.channels.minimum),
            _silent(seen, name, implied.get(name)),
            implied_ranges.get(name),
            witnessed.get(name),
            _share(by_network, name),
            _share(by_images, name),
            None if others is None or name not in others else outside(others[name].histogram, *observed[name]),
        )
        for name, tensor in seen.items()
    )
    return Reach(tensors, 0 if others is None else others.images)
