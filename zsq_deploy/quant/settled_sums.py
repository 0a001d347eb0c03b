"""How fine the grids of a settled graph have to be: what the arithmetic of one sum needs so that its code does not depend on the order.

The numbers of :mod:`zsq_deploy.quant.settle`: a sum of products, a bias and other summands is requantized to a code. Here stand the demands
of the sites behind a layer, the weight scales that meet them, and the bias that keeps every sum away from rounding boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from zsq_deploy.quant.regions import Layer, Regions, Term

__all__ = [
    "TIE_FREE_BITS",
    "Grid",
    "Need",
    "bits_of",
    "may_tie",
    "needs_of",
    "odd_part",
    "settled_bias",
    "trailing_step",
    "weight_scale",
]

TIE_FREE_BITS = 13
"""Sums are below 2**8 codes, so float32 resolves 2**-16; a few roundings stay below half a grid step of 2**-14."""

EXACT_BITS = 16
"""Sums below 2**8 codes that are multiples of 2**-16 are exact in float32. In real numbers they are longer, by the odd part of the
significand of the output's scale."""

LADDER = (
    (True, 1.03),
    (False, 1.03),
    (True, 1.13),
    (False, 1.13),
    (True, 1.3),
    (False, 1.3),
    (True, 2.0),
    (False, 2.0),
)
"""What is tried for a weight scale, one after the other: whether the grid shall allow a bias without ties (or only exact sums), and the
factor by which the scale may grow for that. Only channels with a multiplier below 2**-11 come near the last ones."""

NOISE = 0.08
"""It may grow by more where that adds an error to the layer's output whose standard deviation is below this share of a code."""

_CODE_RMS = 48.0
"""Root mean square of activation codes (without their zero point), for that estimate."""


def trailing_step(value: float) -> int:
    """The largest n so that `value` is a multiple of ``2**n`` (0 for 0)."""
    if value == 0 or not math.isfinite(value):
        return 0
    fraction, exponent = math.frexp(abs(value))
    odd = int(fraction * 2**53)
    return exponent - 53 + ((odd & -odd).bit_length() - 1)


@dataclass(frozen=True)
class Grid:
    """New scale and zero point of a site."""

    scale: float
    zero: int
    significand: int


@dataclass
class Need:
    """What the sites behind a layer ask of it.

    Attributes:
        output: Scale of the finest site behind it.
        significand: Of that scale.
        low: Smallest number that a site behind it can represent.
        high: Largest number.
        step: Step (log2) of what is added to its products.
        added: Largest magnitude of what is added to them.
        half: It is the one layer of each sum that moves to the half grid.
        doubtful: The sum is averaged or has parts without a grid.
    """

    output: float
    significand: int
    low: float
    high: float
    step: float = math.inf
    added: float = 0.0
    half: bool = True
    doubtful: bool = False


@dataclass(frozen=True)
class Bits:
    """How fine a grid may be, in bits behind the point of the output's code.

    Attributes:
        tie_free: Half a step is above the noise of float32.
        exact: float32 holds all multiples that occur.
    """

    tie_free: int
    exact: int


def _uneven(divisor: int) -> bool:
    """Whether division by it leaves the grid."""
    return divisor & (divisor - 1) != 0


def may_tie(term: Term, site: str, grids: Mapping[str, Grid]) -> bool:
    """Whether codes behind a summand may depend on the order of operations."""
    if (term.divisor == 0 and not term.site) or term.sloped:
        return True
    if not _uneven(term.divisor):
        return False
    if not term.site or not term.divisor:
        return True
    # A sum S of codes gives S * ratio / n codes; a tie is 2 S ratio = n (2 m + 1), which more factors 2 on the left rule out.
    return trailing_step(grids[term.site].scale / grids[site].scale) + 1 <= trailing_step(term.divisor)


def needs_of(regions: Regions, grids: Mapping[str, Grid]) -> dict[str, Need]:
    """For every layer: what the sites behind it ask of it."""
    needs: dict[str, Need] = {}
    for site, alternatives in regions.behind.items():
        grid, (lowest, highest) = grids[site], regions.sites[site].limits
        low, high = ((limit - grid.zero) * grid.scale for limit in (lowest, highest))
        for terms in alternatives:
            layers = [term for term in terms if term.layer]
            new = Need(grid.scale, grid.significand, low, high, added=(len(layers) - 1) * (high - low))
            for term in terms:
                if term.site and term.divisor and not _uneven(term.divisor):
                    other = grids[term.site]
                    new.step = min(new.step, trailing_step(other.scale / term.divisor))
                    largest = max(abs(limit - other.zero) for limit in regions.sites[term.site].limits)
                    new.added += largest * other.scale / term.divisor
                elif not term.layer or term.divisor != 1:
                    new.doubtful = True
            for index, term in enumerate(layers):
                needs[term.layer] = _both(replace(new, half=index == 0), needs.get(term.layer))
    return needs


def _both(new: Need, old: Need | None) -> Need:
    """What satisfies two sites."""
    if old is None:
        return new
    finest = min((old, new), key=lambda need: need.output)
    return Need(
        output=finest.output,
        significand=finest.significand,
        low=min(old.low, new.low),
        high=max(old.high, new.high),
        step=min(old.step, new.step),
        added=max(old.added, new.added),
        half=old.half and new.half,
        doubtful=old.doubtful or new.doubtful,
    )


def bits_of(layer: Layer, need: Need) -> list[Bits]:
    """For every weight scale: how fine the grid of its channels may be.

    A large bias is made up for by sums of products that are as large, and float32 has to hold those as well.
    """
    bias = np.zeros(layer.channels) if layer.bias is None else layer.bias
    largest = (np.maximum(np.abs(need.low - bias), np.abs(need.high - bias)) + need.added) / need.output
    if layer.weight.scale.size != layer.channels:
        largest = largest.max(keepdims=True)
    return [
        Bits(
            TIE_FREE_BITS - max(0, math.ceil(math.log2(float(size) / 340.0))),
            EXACT_BITS - max(0, math.ceil(math.log2(float(size) * odd_part(need.significand) / 256.0))),
        )
        for size in largest
    ]


def odd_part(significand: int) -> int:
    """What is left of a positive whole number without its factors 2."""
    return significand // (significand & -significand)


def weight_scale(old: float, need: Need, x: float, taps: int, bits: Bits) -> float:
    """The smallest scale at or above the old one whose multiplier is short enough, at a price that is small enough.

    Args:
        old: The scale as it was; what is no positive number is given back as it is.
        need: What the sites behind the layer ask.
        x: Scale of what the layer reads.
        taps: Products in one sum.
        bits: How fine the grid may be.
    """
    y, a = need.output, need.significand
    if not (old > 0 and math.isfinite(old)):
        return old
    # What no input can bring to a hundredth of a code may have any scale: all its weights become 0 at this one.
    least = max(old, y / x * 2.0**-28)

    def noise(scale: float) -> float:
        # A weight is at most 127 old steps: rounding it to zero costs no more than that.
        return min(scale / math.sqrt(12.0), 64.0 * old) * x / y * math.sqrt(taps) * _CODE_RMS

    for tie_free, coarser in LADDER:
        scale = _next_scale(least, a, x / y, -(bits.tie_free if tie_free else bits.exact))
        if scale <= coarser * old or noise(scale) ** 2 - noise(old) ** 2 <= NOISE**2:
            return scale
    return _next_scale(least, a, x / y, -60)


def _next_scale(least: float, significand: int, ratio: float, step: int) -> float:
    """The smallest ``significand * b * 2**j`` (b below 128) that is at least `least`, times `ratio` a multiple of ``2**step``."""
    exponent = math.floor(math.log2(least / significand)) - 6
    while True:
        unit = significand * 2.0**exponent  # `least` is 64 to 128 of these
        if trailing_step(unit * ratio) >= step:
            return math.ceil(least / unit) * unit
        exponent += 1


def settled_bias(
    layer: Layer, need: Need, scales: npt.NDArray[np.float64], x: float, bits: Sequence[Bits]
) -> tuple[npt.NDArray[np.float64] | None, int]:
    """The bias on the half grid or on the grid, per channel, and how many channels are on neither.

    Args:
        layer: The layer.
        need: What the sites behind it ask.
        scales: Its new weight scales, one or one a channel.
        x: Scale of what it reads.
        bits: How fine the grid may be, for every scale.
    """
    y = need.output
    old = np.zeros(layer.channels) if layer.bias is None else layer.bias
    spread = np.broadcast_to(scales, (layer.channels,)) if scales.size == 1 else scales
    limits = list(bits) * layer.channels if len(bits) == 1 else bits
    new = old.copy()
    doubtful = 0
    for channel in range(layer.channels):
        # steps are measured in units of the output's scale, whose significand all of them share
        products = trailing_step(x * float(spread[channel]) / y)
        added = math.inf if need.step == math.inf else need.step - trailing_step(y)
        step = min(products, added, -6.0)
        allowed, certain = limits[channel], step >= -limits[channel].tie_free
        if need.half and layer.bias_at is not None and (certain or step < -allowed.exact):
            # Even where half a step is lost in noise, few sums are as near to a boundary as that.
            unit = 2.0**step * y
            new[channel] = (math.floor(old[channel] / unit) + 0.5) * unit
            doubtful += need.doubtful or not certain
        else:
            product = x * float(spread[channel])
            whole = step >= -allowed.exact and step == products and product < 2.0**-6 * y
            new[channel] = _float32_multiple(old[channel], product if whole else 2.0 ** max(step, -allowed.exact) * y)
            doubtful += need.doubtful or step < -allowed.exact
    return new, int(doubtful)


def _float32_multiple(value: float, unit: float) -> float:
    """The multiple of `unit` next to a value that float32 can hold."""
    while True:
        multiple = float(np.rint(value / unit) * unit)
        if not math.isfinite(multiple) or float(np.float32(multiple)) == multiple:
            return multiple
        unit *= 2
