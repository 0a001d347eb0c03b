"""From the histogram of a tensor to the range that its integers should cover.

Every function takes a :class:`~zsq_deploy.quant.histogram.Histogram` and returns ``(low, high)``. The results do not depend on the
tensor's unit: multiplied by a power of two, the numbers give exactly the multiplied range; by anything else, the same up to one bin
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import UsageError
from zsq_deploy.quant.fakequant import qparams
from zsq_deploy.quant.histogram import Histogram
from zsq_deploy.quant.scheme import Scheme

__all__ = ["METHODS", "entropy", "expected_squared_error", "minmax", "mse", "percentile", "search"]

Array = npt.NDArray[Any]
Range = tuple[float, float]


def minmax(histogram: Histogram) -> Range:
    """Smallest and largest number seen."""
    return histogram.minimum, histogram.maximum


def percentile(histogram: Histogram, percent: float = 99.999) -> Range:
    """The central `percent` of the numbers: half of the rest is cut off on each side, rounded outwards to whole bins.

    Args:
        histogram: Of the tensor.
        percent: Above 50, up to 100.
    """
    if not 50.0 < percent <= 100.0:
        raise UsageError(
            f"percentile {percent} is not usable", where="percentile", remedy="choose one above 50, up to 100"
        )
    if histogram.total == 0:
        return minmax(histogram)
    cut = (1.0 - percent / 100.0) / 2.0 * histogram.total
    cumulative = np.cumsum(histogram.counts)
    edges = histogram.edges
    bottom = int(np.searchsorted(cumulative, cut, side="right"))
    top = int(np.searchsorted(cumulative, histogram.total - cut, side="left"))
    top = min(top, len(histogram.counts) - 1)
    return max(float(edges[bottom]), histogram.minimum), min(float(edges[top + 1]), histogram.maximum)


def expected_squared_error(histogram: Histogram, low: float, high: float, scheme: Scheme) -> float:
    """Mean squared error of quantizing the histogram's numbers with the parameters that ``[low, high]`` gives.

    The density is taken as uniform inside each bin, and the error (rounding and clipping) is integrated in closed form: in units of
    the scale, the integral of the squared distance to the nearest code from 0 to ``u`` is ``n / 12 + d**3 / 3`` with ``n = rint(u)``
    and ``d = u - n``, and beyond the last code it grows with ``d**3 / 3``.
    """
    parameters = qparams(low, high, scheme)
    scale, zero = float(parameters.scale), int(parameters.zero_point)
    u = histogram.edges / scale
    inside = np.clip(u, scheme.qmin - zero, scheme.qmax - zero)
    nearest = np.rint(inside)
    rounding, clipping = inside - nearest, u - inside
    integral = nearest / 12.0 + (rounding * rounding * rounding + clipping * clipping * clipping) / 3.0
    per_bin = np.diff(integral) / (histogram.width / scale) * scale**2
    counts = histogram.counts.astype(np.float64)
    if histogram.zeros:
        # Exact zeros (behind a ReLU) carry no error at all; they are not spread over their bin.
        counts = counts.copy()
        counts[-histogram.first] -= histogram.zeros
    return float(counts @ per_bin / max(histogram.total, 1))


def mse(histogram: Histogram, scheme: Scheme, *, steps: int = 48, smallest: float = 0.05, bins: int = 2048) -> Range:
    """The range with the smallest expected squared error.

    A grid of clip ratios is applied to both ends together first, then a finer one around the best. An asymmetric scheme then moves
    each end by itself, over the whole grid once and over the finer one once more.

    Args:
        histogram: Of the tensor.
        scheme: The integers that will represent it.
        steps: Clip ratios between `smallest` and 1.
        smallest: Smallest clip ratio.
        bins: Resolution of the histogram that the error is computed from.
    """
    low, high = minmax(histogram)
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0.0:
        return 0.0, 0.0
    coarse = histogram.coarser(bins)
    ratios = np.linspace(1.0, smallest, steps)
    gap = float(ratios[0] - ratios[1]) if steps > 1 else 0.0
    known: dict[Range, float] = {}

    def best(candidates: Iterable[Range]) -> Range:
        unique = list(dict.fromkeys(candidates))
        for pair in unique:
            if pair not in known:
                known[pair] = expected_squared_error(coarse, *pair, scheme)
        return min(unique, key=known.__getitem__)

    def around(ratio: float) -> Array:
        return np.clip(ratio + np.linspace(-gap, gap, 9), smallest, 1.0)

    reach = max(-low, high)
    if scheme.symmetric:

        def both(ratio: float) -> Range:
            return max(low, -reach * ratio), min(high, reach * ratio)
    else:

        def both(ratio: float) -> Range:
            return low * ratio, high * ratio

    ends = {both(float(ratio)): float(ratio) for ratio in ratios}
    found = best(ends)
    found = best([found, *(both(float(ratio)) for ratio in around(ends[found]))])
    if scheme.symmetric or low == 0.0 or high == 0.0:
        return found
    for fine in (False, True):
        found = best([found, *((low * float(r), found[1]) for r in (around(found[0] / low) if fine else ratios))])
        found = best([found, *((found[0], high * float(r)) for r in (around(found[1] / high) if fine else ratios))])
    return found


def entropy(
    histogram: Histogram, scheme: Scheme, *, bins: int = 2048, steps: int = 128, most_clipped: float = 0.005
) -> Range:
    """The clip threshold whose quantized distribution loses the least information (Kullback-Leibler divergence).

    The numbers are clipped at ``[-t, t]`` (within the observed range) for `steps` thresholds. The reference distribution ``P`` is the
    clipped histogram, with the mass beyond the threshold in its outermost bins; the candidate ``Q`` spreads the unclipped mass of each
    code evenly over the bins that are occupied there. Exact zeros are left out, because every candidate represents them exactly.
    The resolution is at least `bins` bins over the larger side.

    The measure has a known weakness: where activations crowd at a few values (constant channels), it favours thresholds that give
    every bin a code of its own, however much they clip. So no threshold is tried that clips more than the share `most_clipped`.

    Args:
        histogram: Of the tensor.
        scheme: The integers that will represent it.
        bins: Smallest number of bins; must be well above the number of codes, or there is nothing to search.
        steps: Number of thresholds.
        most_clipped: Share of the numbers other than zero that a threshold may clip.
    """
    low, high = minmax(histogram)
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0.0:
        return 0.0, 0.0
    needed = 4 * scheme.levels
    coarse = histogram.coarser(max(bins, needed))  # with as many bins as codes every threshold would look the same
    counts = coarse.counts.astype(np.float64)
    if histogram.zeros:
        counts[-coarse.first] -= histogram.zeros
    if counts.sum() <= 0:
        return low, high
    below, above = max(-coarse.first, 0), max(coarse.first + len(counts), 0)
    whole = np.zeros(below + above)
    start = coarse.first + below
    whole[start : start + len(counts)] = counts
    reach = max(below, above)
    smallest = max(scheme.levels // (2 if below and above else 1), 2)
    if scheme.symmetric and not (below and above):
        smallest = max(scheme.levels // 2, 2)
    places = np.arange(len(whole)) - below
    distance = np.where(places >= 0, places + 1, -places)
    inside = np.cumsum(np.bincount(distance, weights=whole, minlength=reach + 1))
    smallest = max(smallest, int(np.searchsorted(inside, (1.0 - most_clipped) * inside[-1])))
    thresholds = np.unique(np.linspace(min(smallest, reach), reach, steps).astype(int))
    best, found = np.inf, reach
    cumulative = np.concatenate([[0.0], np.cumsum(whole)])
    for threshold in thresholds[::-1]:
        left, right = below - min(below, threshold), below + min(above, threshold)
        inner = whole[left:right]
        p = inner.copy()
        p[0] += cumulative[left]
        p[-1] += cumulative[-1] - cumulative[right]
        # The codes that this window would get, and the code of each bin's middle.
        parameters = qparams((left - below) * coarse.width, (right - below) * coarse.width, scheme)
        middle = (np.arange(left, right) - below + 0.5) * coarse.width
        codes = np.clip(
            np.rint(middle / float(parameters.scale)) + int(parameters.zero_point), scheme.qmin, scheme.qmax
        )
        codes = (codes - scheme.qmin).astype(np.int64)
        occupied = p > 0
        mass = np.bincount(codes, weights=inner, minlength=scheme.levels)
        bins_of = np.bincount(codes, weights=occupied, minlength=scheme.levels)
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.where(occupied, mass[codes] / bins_of[codes], 0.0)
        p_sum, q_sum = p.sum(), q.sum()
        if q_sum <= 0:
            continue
        p_share, q_share = p[occupied] / p_sum, q[occupied] / q_sum
        # A bin that only holds clipped mass has q == 0: bounded from below, it is a heavy loss, not an infinite one.
        divergence = float(np.sum(p_share * np.log(p_share / np.maximum(q_share, 1e-12))))
        if divergence < best:
            best, found = divergence, int(threshold)
    limit = found * coarse.width
    return max(low, -limit), min(high, limit)


def _minmax(histogram: Histogram, scheme: Scheme, percent: float, bins: int) -> Range:
    del scheme, percent, bins
    return minmax(histogram)


def _percentile(histogram: Histogram, scheme: Scheme, percent: float, bins: int) -> Range:
    del scheme, bins
    return percentile(histogram, percent)


def _entropy(histogram: Histogram, scheme: Scheme, percent: float, bins: int) -> Range:
    del percent
    return entropy(histogram, scheme, bins=bins)


def _mse(histogram: Histogram, scheme: Scheme, percent: float, bins: int) -> Range:
    del percent
    return mse(histogram, scheme, bins=bins)


METHODS: dict[str, Callable[[Histogram, Scheme, float, int], Range]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
"""Range search by name."""


def search(histogram: Histogram, method: str, scheme: Scheme, *, percent: float = 99.999, bins: int = 2048) -> Range:
    """Run a range search by name.

    Raises:
        UsageError: There is no such method.
    """
    if method not in METHODS:
        raise UsageError(
            f"there is no range method {method!r}", where="ranges", remedy=f"choose one of {', '.join(METHODS)}"
        )
    return METHODS[method](histogram, scheme, percent, bins)
