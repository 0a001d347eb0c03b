"""Choosing one option for each layer: every best trade between cost and loss, by dynamic programming.

Losses of layers add up (the assumption of Cai et al. 2020, ZeroQ, section 3.3), and so do costs. Then the best choices for a part of the
layers can only be those that no other choice for the same layers beats in both, so layers are taken in one after the other and
what is beaten is dropped: what is left in the end is the whole Pareto frontier, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import UsageError

__all__ = ["Point", "best_within", "pareto"]

Costs = npt.NDArray[np.int64]
Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A choice for all layers that no other one beats.

    Attributes:
        cost: Sum over layers.
        loss: Sum over layers.
        choice: Number of the option taken, layer by layer.
    """

    cost: int
    loss: float
    choice: tuple[int, ...]


def pareto(options: Sequence[Sequence[tuple[int, float]]], *, limit: int = 100_000) -> list[Point]:
    """All choices that no other one beats, from the cheapest to the one with the smallest loss.

    Args:
        options: For each layer its options as (cost, loss).
        limit: Partial choices that are kept at a time. Beyond it they are thinned out to one for each of as many equal intervals of cost (the one
            with the smallest loss); costs stay exact, only the smallest loss may be missed by what an interval is wide.

    Raises:
        UsageError: A layer has no option, or a number is negative or not finite.
    """
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    back: list[tuple[npt.NDArray[np.int64], int]] = []
    for number, layer in enumerate(options):
        if not layer or any(cost < 0 or not np.isfinite(loss) or loss < 0 for cost, loss in layer):
            raise UsageError(
                f"layer {number} has no option, or one with a negative or infinite number: {list(layer)}",
                where="options",
                remedy="give (cost, loss) pairs that are finite and not negative",
            )
        own_costs = np.asarray([cost for cost, _ in layer], np.int64)
        own_losses = np.asarray([loss for _, loss in layer], np.float64)
        # entry i * options + j: partial choice i followed by option j
        costs = (costs[:, None] + own_costs).reshape(-1)
        losses = (losses[:, None] + own_losses).reshape(-1)
        kept = _thinned(costs, _unbeaten(costs, losses), limit)
        costs, losses = costs[kept], losses[kept]
        back.append((kept, len(layer)))
    choices = np.empty((len(costs), len(options)), np.int64)
    at = np.arange(len(costs))
    for number in reversed(range(len(options))):
        kept, count = back[number]
        before = kept[at]
        choices[:, number] = before % count
        at = before // count
    return [
        Point(int(cost), float(loss), tuple(int(each) for each in choice))
        for cost, loss, choice in zip(costs, losses, choices, strict=True)
    ]


def _unbeaten(costs: Costs, losses: Losses) -> npt.NDArray[np.int64]:
    """Numbers of the entries that no other one beats, by rising cost."""
    order = np.lexsort((losses, costs))
    smallest = np.minimum.accumulate(losses[order])
    better = np.ones(len(order), bool)
    better[1:] = losses[order][1:] < smallest[:-1]
    return order[better]


def _thinned(costs: Costs, kept: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    """At most `limit` of the entries, which are sorted by cost; the cheapest always stays."""
    if len(kept) <= limit:
        return kept
    low, high = int(costs[kept[0]]), int(costs[kept[-1]])
    interval = (costs[kept] - low) * (limit - 1) // max(high - low, 1)
    # losses fall with costs: the last entry of an interval is its best, but only the first entry of all is the cheapest
    last = np.ones(len(kept), bool)
    last[:-1] = interval[1:] != interval[:-1]
    last[0] = True
    chosen = kept[last]
    return chosen if len(chosen) <= limit else np.delete(chosen, 1)


def best_within(points: Sequence[Point], budget: int) -> Point:
    """The point with the smallest loss that costs no more than the budget.

    Args:
        points: From :func:`pareto`.
        budget: In the unit of the costs.

    Raises:
        UsageError: Even the cheapest choice costs more.
    """
    within = [point for point in points if point.cost <= budget]
    if not within:
        least = min(point.cost for point in points)
        raise UsageError(
            f"a budget of {budget} cannot be kept: the cheapest choice costs {least}",
            where="budget",
            remedy=f"allow at least {least}, or offer fewer bits",
        )
    return min(within, key=lambda point: (point.loss, point.cost))
