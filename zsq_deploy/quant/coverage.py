"""How far the calibration images reach, against how far the network itself says that its activations reach.

Behind a batch normalization a channel had, over the training set, mean ``beta`` and standard deviation ``|gamma|``. So the network says,
without any image, that the tensor reaches from ``min(beta - k |gamma|)`` to ``max(beta + k |gamma|)`` over its channels, cut by the
Relu or Clip behind it. Images that match these statistics on average can still miss the tails; a range that only looks at the images
then clips activations that real data will have. The rule here compares both and widens the observed range where it falls short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zsq_deploy.errors import UsageError
from zsq_deploy.model.model import Model
from zsq_deploy.quant.analytic import Kind, propagate_model
from zsq_deploy.quant.ranges import Ranges

__all__ = ["coverage", "implied_ranges", "widen"]

Range = tuple[float, float]


def implied_ranges(model: Model, sigmas: float = 6.0, *, kinds: Sequence[Kind] = ("bn",)) -> Ranges:
    """The reach of every tensor that a batch normalization determines, directly or through Relu, Clip, pooling and views.

    Args:
        model: The network with its batch normalizations; without any, the result is empty.
        sigmas: How many standard deviations the activations reach.
        kinds: Which tensors: ``bn`` (determined by one batch normalization), ``derived`` (sums and linear layers of such),
            ``interval`` (bounds only).
    """
    found = propagate_model(model, sigmas=sigmas)
    values = {name: channels.reach for name, channels in found.channels.items() if channels.kind in kinds}
    return Ranges(values, f"bn-implied {sigmas:g} sigma", model.digest)


def coverage(observed: Mapping[str, Range], implied: Mapping[str, Range], *, minor: float = 0.1) -> dict[str, float]:
    """Observed reach over implied reach, for every tensor that has both.

    The smaller of the two sides counts; a side that makes up less than `minor` of the implied extent is left out.

    Args:
        observed: Ranges on images.
        implied: Ranges that the network implies.
        minor: Share of the extent below which a side does not matter.
    """
    shares: dict[str, float] = {}
    for name, (low, high) in implied.items():
        if name not in observed:
            continue
        low, high = min(low, 0.0), max(high, 0.0)
        extent = high - low
        if extent <= 0.0:
            continue
        seen_low, seen_high = min(observed[name][0], 0.0), max(observed[name][1], 0.0)
        sides = []
        if high >= minor * extent:
            sides.append(seen_high / high)
        if -low >= minor * extent:
            sides.append(seen_low / low)
        shares[name] = min(sides)
    return shares


def widen(
    observed: Ranges,
    implied: Mapping[str, Range],
    *,
    strength: float = 1.0,
    most: float = 4.0,
) -> tuple[Ranges, dict[str, float]]:
    """Move the ends of observed ranges outwards, towards what the network implies; never inwards.

    Args:
        observed: Ranges on images.
        implied: From :func:`implied_ranges`.
        strength: Share of the gap that is closed: 0 leaves the ranges as they are, 1 takes the implied end.
        most: A range grows to at most this many times its observed extent, so that a network whose statistics do not describe
            its activations (dead channels, badly trained layers) cannot spoil it.

    Returns:
        The new ranges, and the coverage before (:func:`coverage`).
    """
    if not 0.0 <= strength <= 1.0 or most < 1.0:
        raise UsageError(
            f"strength {strength} and most {most} make no sense", where="widen", remedy="0 <= strength <= 1, most >= 1"
        )
    shares = coverage(observed, implied)
    changed: dict[str, Range] = {}
    for name in shares:
        low, high = observed[name]
        wanted_low, wanted_high = implied[name]
        new_low = low + strength * min(wanted_low - low, 0.0)
        new_high = high + strength * max(wanted_high - high, 0.0)
        extent = max(high, 0.0) - min(low, 0.0)
        if extent > 0.0:
            grown = max(new_high, 0.0) - min(new_low, 0.0)
            if grown > most * extent:
                share = (most - 1.0) * extent / (grown - extent)
                new_low, new_high = low + share * (new_low - low), high + share * (new_high - high)
        if (new_low, new_high) != (low, high):
            changed[name] = (new_low, new_high)
    return observed.updated(changed, method=f"{observed.method} + coverage"), shares
