"""Which significand a group of activation scales gets: the choice behind :mod:`zsq_deploy.quant.exact_scales`.

Scales are ``m * 2**e``. Tensors that meet in an operator without weights usually share ``m``, so that their scales differ by powers of two
and a sum is exact. Such a sum is often half-way between two codes of its output, though, and where a runtime rounds halves in another way
than the graph does (ONNX Runtime's integer sums on Arm round them away from zero, Q/DQ graphs to even), a sixth of all sums differs by one.

A sum cannot be half-way if its output's step is ``m * 2**e`` with an odd ``m``, and both inputs are multiples of ``2**e``: it is then a whole
number of ``1/m`` steps, and one half is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["ACTIVATION_SIGNIFICANDS", "BIT_COSTS", "Sum", "choose", "grid_of", "in_order", "snap_scale"]

ACTIVATION_SIGNIFICANDS = (4, 5, 6, 7)
SUM_SIGNIFICANDS = tuple(range(3, 64, 2))
BIT_COSTS = (0.1, 0.15, 0.2, 0.3, 0.4)
"""Growth of a step (natural logarithm) that one bit less in the significand is worth. Which is best depends on the network: long significands
follow the ranges, short ones keep the products of the layers behind short. All are tried."""

SHRINK = 0.005
"""A range may lose this share of its length (about one code of 255) rather than grow to the next significand."""

Sum = tuple[str, tuple[str, str]]
"""Output and inputs of a sum, by name."""


def snap_scale(
    scale: float, significands: Iterable[int], *, shrink: float = SHRINK, largest: float = math.inf
) -> float:
    """The smallest ``m * 2**e`` (m from `significands`) that is at least ``scale * (1 - shrink)``.

    Args:
        scale: The scale wanted, positive.
        significands: Allowed integer significands.
        shrink: Share by which the result may stay below `scale`.
        largest: Upper limit of the result; where it excludes every candidate above `scale`, the largest allowed one is taken.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"a scale must be positive and finite, not {scale}")
    exponent = math.floor(math.log2(scale))
    candidates = sorted({m * 2.0**e for m in significands for e in range(exponent - 9, exponent + 3)})
    allowed = [value for value in candidates if value <= largest]
    fitting = [value for value in allowed if value >= scale * (1 - shrink)]
    return fitting[0] if fitting else allowed[-1]


def grid_of(scale: float) -> float:
    """The largest power of two that a positive scale is a multiple of."""
    fraction, exponent = math.frexp(scale)
    whole = int(fraction * 2**53)
    return math.ldexp(whole & -whole, exponent - 53)


def in_order(
    members: Mapping[str, Sequence[str]], sums: Iterable[Sum], find: Callable[[str], str]
) -> list[Sequence[str]]:
    """Groups of values, those of a sum's inputs before the one of its output (as far as they do not go round in a circle).

    Args:
        members: The values of each group, by the group's representative.
        sums: The sums between groups.
        find: The representative of a value's group.
    """
    before: dict[str, set[str]] = {name: set() for name in members}
    for output, pair in sums:
        place = find(output)
        before[place] |= {find(name) for name in pair} - {place}
    ordered: list[Sequence[str]] = []
    left = dict.fromkeys(members)
    while left:
        free = [name for name in left if not before[name] & left.keys()] or [next(iter(left))]
        for name in free:
            ordered.append(members[name])
            del left[name]
    return ordered


def choose(
    wanted: Mapping[str, tuple[float, float]],
    grids: Mapping[str, float],
    bit_cost: float = 0.0,
) -> tuple[int, dict[str, float]]:
    """A significand for a group, and the scale of each of its values.

    Args:
        wanted: Value -> least and largest scale.
        grids: Outputs of sums that must not be half-way -> the grid of their inputs (the smaller one).
        bit_cost: See :data:`BIT_COSTS`; 0: only the growth of the steps counts.

    Returns:
        The significand and the scales. Where no significand keeps all sums off the middle, they are chosen as if there were none.
    """
    best: tuple[float, int, dict[str, float]] | None = None
    for candidates in (SUM_SIGNIFICANDS, ACTIVATION_SIGNIFICANDS) if grids else (ACTIVATION_SIGNIFICANDS,):
        for candidate in candidates:
            scales = {name: snap_scale(least, [candidate], largest=most) for name, (least, most) in wanted.items()}
            if candidates is SUM_SIGNIFICANDS and any(grid_of(scales[name]) > grid for name, grid in grids.items()):
                continue
            odd = candidate // (candidate & -candidate)
            cost = sum(abs(math.log(scales[name] / wanted[name][0])) for name in scales) + bit_cost * odd.bit_length()
            if best is None or cost < best[0]:
                best = (cost, candidate, scales)
        if best is not None:
            break
    assert best is not None
    return best[1], best[2]
