"""What is known about one activation, a channel at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["ORDER", "Channels", "Kind", "Vector", "repeated"]

Vector = npt.NDArray[np.float64]
Kind = Literal["bn", "derived", "interval"]

ORDER: dict[str, int] = {"bn": 0, "derived": 1, "interval": 2}
"""From the strongest kind to the weakest."""


@dataclass(frozen=True, eq=False)
class Channels:
    """What is known about one activation, a channel at a time.

    Attributes:
        mean: ``[C]``, or ``[1]`` when the channels are not told apart.
        var: Same shape.
        low: How far each channel reaches downwards.
        high: How far each channel reaches upwards.
        axis: Where the channels are: 1, -1 (last), or ``None`` with one entry for all.
        kind: ``bn``: set by a normalization, through monotone functions at most; ``derived``: by algebra on such;
            ``interval``: only the bounds mean something.
    """

    mean: Vector
    var: Vector
    low: Vector
    high: Vector
    axis: int | None
    kind: Kind

    @property
    def reach(self) -> tuple[float, float]:
        """Smallest and largest number over all channels."""
        return float(self.low.min()), float(self.high.max())

    @property
    def std(self) -> Vector:
        """Standard deviation of each channel."""
        return np.sqrt(self.var)

    def pooled(self) -> Channels:
        """The same without telling the channels apart."""
        if self.axis is None:
            return self
        mean = self.mean.mean(keepdims=True)
        return Channels(
            mean,
            (self.var + np.square(self.mean - mean)).mean(keepdims=True),
            self.low.min(keepdims=True),
            self.high.max(keepdims=True),
            None,
            self.kind,
        )

    def as_kind(self, *kinds: Kind) -> Channels:
        """The same, of the weakest of these kinds and its own."""
        return replace(self, kind=max((self.kind, *kinds), key=ORDER.__getitem__))


def repeated(x: Channels, times: int) -> Channels:
    """Every entry `times` times, along axis 1."""
    mean, var, low, high = (np.repeat(v, times) for v in (x.mean, x.var, x.low, x.high))
    return Channels(mean, var, low, high, 1, x.kind)
