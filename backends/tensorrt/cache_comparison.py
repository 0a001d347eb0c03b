"""Two calibration caches (or other files with one scale a tensor) held against each other, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zsq_deploy.backends.tensorrt.cache_format import CalibrationCache, some

__all__ = ["CacheComparison", "ScaleDifference", "compare_caches", "compare_scales"]


@dataclass(frozen=True)
class ScaleDifference:
    """One tensor in two caches.

    Attributes:
        name: Of the tensor.
        first: Its scale in the first cache.
        second: Its scale in the second one.
    """

    name: str
    first: float
    second: float

    @property
    def ratio(self) -> float:
        """``second / first``; infinite where only the first is zero, 1 where both are."""
        if self.first == self.second:
            return 1.0
        return math.inf if self.first == 0.0 else self.second / self.first


@dataclass(frozen=True)
class CacheComparison:
    """Two caches, tensor by tensor.

    Attributes:
        headers: What the two are called; of caches their first lines, without ``TRT-``.
        tensors: What both hold, the largest differences (as a factor) first.
        only_first: What only the first one holds.
        only_second: What only the second one holds.
        inverse: Whether the second one looks as if it stored the inverse of the scale, a common mistake of hand-made caches.
    """

    headers: tuple[str, str]
    tensors: tuple[ScaleDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    inverse: bool

    @property
    def equal(self) -> bool:
        """Whether both say the same scales, bit for bit; the headers do not count."""
        return not (self.only_first or self.only_second) and all(t.first == t.second for t in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; a ratio that is infinite is ``None``."""
        return {
            "headers": list(self.headers),
            "equal": self.equal,
            "tensors": [
                {
                    "name": t.name,
                    "first": t.first,
                    "second": t.second,
                    "ratio": t.ratio if math.isfinite(t.ratio) else None,
                }
                for t in self.tensors
            ],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "inverse": self.inverse,
        }

    def lines(self, most: int | None = 20) -> Iterator[str]:
        """The same as text, the largest differences first.

        Args:
            most: Tensors to show; ``None``: all.
        """
        differing = [t for t in self.tensors if t.first != t.second]
        yield f"{self.headers[0]} against {self.headers[1]}: {len(self.tensors)} tensors in both, {len(differing)} differ"
        if self.inverse:
            yield "the scales are inverse to each other: one of the files holds 127/amax instead of amax/127"
        width = min(max((len(t.name) for t in differing[:most]), default=4), 60)
        for t in differing[:most]:
            yield f"{t.name:{width}}  amax {127 * t.first:12.6g}  {127 * t.second:12.6g}  x {t.ratio:.4g}"
        if most is not None and len(differing) > most:
            yield f"... and {len(differing) - most} more"
        for title, names in (("only in the first", self.only_first), ("only in the second", self.only_second)):
            if names:
                yield f"{title} ({len(names)}): {some(list(names))}"


def compare_caches(first: CalibrationCache, second: CalibrationCache) -> CacheComparison:
    """Two caches, tensor by tensor."""
    headers = f"{first.version}-{first.algorithm}", f"{second.version}-{second.algorithm}"
    return compare_scales(first.scales, second.scales, headers)


def compare_scales(
    first: Mapping[str, float], second: Mapping[str, float], headers: tuple[str, str]
) -> CacheComparison:
    """Two sets of scales by tensor name, wherever they come from.

    Args:
        first: Tensor name to scale (amax / 127).
        second: The same.
        headers: What the two are called.
    """
    shared = [ScaleDifference(name, s, second[name]) for name, s in first.items() if name in second]
    shared.sort(key=lambda t: -_distance(t.ratio))
    both = [t for t in shared if t.first > 0 and t.second > 0]
    return CacheComparison(
        headers,
        tuple(shared),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
        len(both) > 1
        and any(t.first != t.second for t in both)
        and all(abs(math.log(t.first * t.second)) < 1e-3 for t in both),
    )


def _distance(ratio: float) -> float:
    return math.inf if ratio <= 0.0 or math.isinf(ratio) else abs(math.log(ratio))
