"""Scales of few bits moved to numbers with which an integer engine computes exactly what its Q/DQ graph says.

The same grid as in :mod:`zsq_deploy.quant.exact_scales` (an activation scale is ``a * 2**i``, a weight scale ``a_y * b * 2**j``, and the
requantization multiplier ``a_x * b * 2**k`` is a short number), for networks whose scales were learned or found for few codes. Two things differ:

* With 16 codes a step that is 25 % too coarse costs accuracy, so scales move to the *nearest* number of a finer grid (``a`` in 8 to 15)
  instead of the next larger one. Sites that meet in a sum still share ``a``; those with fewer bits have more say in it.
* A weight of few bits keeps its codes, since those were learned; ``b`` goes up to 63, and is as long as the multiplier allows. A weight
  of 8 bits is rounded again on the new scale.

Where a runtime rounds sums that are half-way between two codes in another way than the graph does (:mod:`zsq_deploy.quant.significands`), the
output of a sum of two rounded tensors has a significand of its own: an odd one, on a grid that both inputs lie on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.quant.exact_scales import Groups, requantizes_exactly
from zsq_deploy.quant.reconstruct.state import Activation, State, Weight
from zsq_deploy.quant.reconstruct.template import Template
from zsq_deploy.quant.regions import Regions, Term, read_regions
from zsq_deploy.quant.significands import SUM_SIGNIFICANDS, Sum, grid_of, in_order

__all__ = ["FINE", "exact_activations", "exact_weights", "tying_sums"]

Array = npt.NDArray[Any]

FINE: tuple[int, ...] = tuple(range(8, 16))
"""Significands of activation scales; they hold those of 8-bit engines (4 to 7), so those stay what they are where they can."""

_WEIGHT_SIGNIFICANDS = (tuple(range(32, 64)), tuple(range(16, 32)), tuple(range(8, 16)), tuple(range(4, 8)))
_EIGHT_BIT_SAY = 0.1
"""How much a site with 8 bits counts against one with fewer, where they have to share a significand."""


def _names(template: Template, regions: Regions) -> dict[str, str]:
    """QuantizeLinear node -> group of its site."""
    own = {site.name: site.group for site in template.sites}
    return {node: own[tensor.name] for node, tensor in regions.sites.items() if tensor.name in own}


def _summed(alternatives: tuple[tuple[Term, ...], ...], names: Mapping[str, str]) -> tuple[str, str] | None:
    """Groups of the two rounded tensors whose sum a site rounds; ``None`` where it rounds something else."""
    if len(alternatives) != 1 or len(alternatives[0]) != 2:
        return None
    if any(term.site not in names or term.divisor != 1 or term.sloped for term in alternatives[0]):
        return None
    first, second = (names[term.site] for term in alternatives[0])
    return first, second


def _sums(template: Template, regions: Regions) -> list[Sum]:
    """Sums of two rounded tensors, by the groups of output and inputs."""
    names = _names(template, regions)
    found = [(names[site], _summed(behind, names)) for site, behind in regions.behind.items() if site in names]
    return [(output, pair) for output, pair in found if pair is not None]


def tying_sums(template: Template, state: State) -> tuple[str, ...]:
    """Groups of sites that round sums of two rounded tensors which may be half-way between two codes.

    Args:
        template: The network.
        state: The numbers.
    """
    grid = {name: grid_of(one.scale) for name, one in state.activations.items()}
    sums = _sums(template, read_regions(template.qdq))
    return tuple(dict.fromkeys(out for out, pair in sums if min(grid[name] for name in pair) < grid[out]))


def _meeting(template: Template, regions: Regions, tie_free: bool) -> tuple[dict[str, list[str]], Groups]:
    """Groups of sites (by the name of their scale's group) that meet without a weighted layer in between, or a sum (if that is asked for)."""
    names = _names(template, regions)
    groups = Groups()
    by_layer: dict[str, str] = {}
    for site, alternatives in regions.behind.items():
        if site not in names or (tie_free and _summed(alternatives, names) is not None):
            continue
        for term in (term for terms in alternatives for term in terms):
            if term.site in names:
                groups.union(names[site], names[term.site])
            elif term.layer:
                groups.union(names[site], by_layer.setdefault(term.layer, names[site]))
    found: dict[str, list[str]] = {}
    for group in template.groups():
        found.setdefault(groups.find(group), []).append(group)
    return found, groups


def exact_activations(
    template: Template, state: State, *, significands: Iterable[int] = FINE, tie_free_sums: bool = False
) -> State:
    """The state with activation scales ``a * 2**i``, one ``a`` for all that meet.

    Groups without a site of fewer than 8 bits are on the 8-bit engine's grid already and stay.

    Args:
        template: The network; its Q/DQ graph says what meets.
        state: The numbers.
        significands: Allowed ``a``.
        tie_free_sums: Keep sums of two activations from being half-way between two codes, as far as scales can do that
            (:func:`tying_sums` says what is left).
    """
    candidates = tuple(significands)
    ceilings = {
        group: min(site.ceiling for site in sites if not site.repeats or len(sites) == 1)
        for group, sites in template.groups().items()
        if any(not site.repeats for site in sites) or len(sites) == 1
    }
    regions = read_regions(template.qdq)
    sums = _sums(template, regions) if tie_free_sums else []
    found, groups = _meeting(template, regions, tie_free_sums)
    changed: dict[str, Activation] = {}
    scale_of: dict[str, float] = {}
    for members in in_order(found, sums, groups.find):
        # Outputs of sums -> the grid that both inputs lie on.
        grids: dict[str, float] = {}
        for output, pair in sums:
            if output in members and all(name in scale_of for name in pair):
                grids[output] = min([*(grid_of(scale_of[name]) for name in pair), grids.get(output, math.inf)])
        kept = {name: state.activations[name].scale for name in members}
        eight = all(state.activations[name].scheme.bits == 8 for name in members)
        scales = kept if eight and _on(kept, grids) else _shared(members, state, candidates, ceilings, grids)
        scale_of.update(scales)
        for name in members:
            if scales[name] != kept[name]:
                changed[name] = _rescaled(state.activations[name], scales[name])
    return state.updated(activations=changed)


def _on(scales: Mapping[str, float], grids: Mapping[str, float]) -> bool:
    """Whether no sum is half-way between two codes of its output."""
    return all(grid_of(scales[name]) <= grid for name, grid in grids.items())


def _shared(
    members: Iterable[str],
    state: State,
    significands: tuple[int, ...],
    ceilings: Mapping[str, float],
    grids: Mapping[str, float],
) -> dict[str, float]:
    """The nearest scales of one significand; where none of those keeps sums from being half-way, as if there were no sums."""
    best: tuple[float, dict[str, float]] | None = None
    for allowed in (SUM_SIGNIFICANDS, significands) if grids else (significands,):
        for significand in allowed:
            cost, scales = 0.0, {}
            for name in members:
                old = state.activations[name]
                say = _EIGHT_BIT_SAY if old.scheme.bits == 8 else 1.0
                scales[name] = _snapped(old, significand, ceilings.get(name, math.inf))
                cost += say * math.log(scales[name] / old.scale) ** 2
            if allowed is SUM_SIGNIFICANDS and not _on(scales, grids):
                continue
            if best is None or cost < best[0]:
                best = (cost, scales)
        if best is not None:
            break
    assert best is not None
    return best[1]


def _snapped(old: Activation, significand: int, ceiling: float) -> float:
    """The number ``significand * 2**i`` nearest to a scale (in ratio); for 8 bits the next one that loses no range."""
    exact = math.log2(old.scale / significand)
    exponent = math.ceil(exact - 0.01) if old.scheme.bits == 8 else round(exact)
    scale = significand * 2.0**exponent
    top = old.scheme.qmax - old.zero_point
    # Where the integer range stands in for a Clip of the network that it reached, it must not end above its bound.
    if top > 0 and ceiling < math.inf and top * old.scale >= 0.995 * ceiling:
        while top * scale > ceiling * (1 + 1e-9):
            scale /= 2
    return scale


def _rescaled(old: Activation, scale: float) -> Activation:
    """Another scale, with the zero point that keeps the lower end of the range."""
    scheme = old.scheme
    zero = old.zero_point
    if scheme.qmin < zero < scheme.qmax and not scheme.symmetric:
        zero = scheme.qmin - round((scheme.qmin - zero) * old.scale / scale)
        zero = max(scheme.qmin, min(scheme.qmax, zero))
    return dataclasses.replace(old, scale=scale, zero_point=zero)


def exact_weights(
    template: Template, state: State, *, floats: Mapping[str, Array] | None = None
) -> tuple[State, dict[str, int]]:
    """The state with weight scales that make every requantization multiplier a short number.

    Args:
        template: The network.
        state: The numbers; activation scales as they will be.
        floats: Layer node -> float weight to round (again) on the new scale. Weights of layers that are not named keep their codes, if they have
            fewer than 8 bits, and are rounded from their dequantized numbers otherwise.

    Returns:
        The state, and layer -> number of channels whose requantization may still round.
    """
    regions = read_regions(template.qdq)
    own = {site.name: site.group for site in template.sites}
    behind: dict[str, float] = {}
    for site, alternatives in regions.behind.items():
        name = own.get(regions.sites[site].name)
        if name is None:
            continue
        for term in (term for terms in alternatives for term in terms if term.layer):
            behind[term.layer] = min(state.activations[name].scale, behind.get(term.layer, math.inf))
    weights: dict[str, Weight] = {}
    inexact: dict[str, int] = {}
    for layer in template.layers:
        old = state.weights[layer.node]
        x = state.activations[layer.x].scale if layer.x else 0.0
        y = behind.get(layer.node, 0.0)
        given = None if floats is None else floats.get(layer.node)
        upwards = given is not None or old.scheme.bits == 8
        found = [_weight_scale(float(s), x, y, upwards=upwards) for s in old.scale.reshape(-1)]
        scale = np.asarray([value for value, _ in found], np.float32).reshape(old.scale.shape)
        rounded = sum(not exact for _, exact in found)
        if rounded:
            inexact[layer.node] = rounded
        new = dataclasses.replace(old, scale=scale)
        if upwards:
            numbers = old.numbers() if given is None else np.asarray(given, np.float32)
            codes = np.rint(numbers.astype(np.float64) / new.along(scale)) + new.along(old.zero_point)
            low = -old.scheme.qmax if old.scheme.symmetric and old.scheme.bits == 8 else old.scheme.qmin
            new = dataclasses.replace(new, codes=np.clip(codes, low, old.scheme.qmax).astype(np.int32))
        weights[layer.node] = new
    return state.updated(weights=weights), inexact


def _weight_scale(old: float, x: float, y: float, *, upwards: bool) -> tuple[float, bool]:
    """A scale ``a_y * b * 2**j`` near another, and whether its multiplier is short enough."""
    if not (old > 0 and math.isfinite(old)):
        return old, True
    significand = _odd(y) if y else 1
    scale = old
    for allowed in _WEIGHT_SIGNIFICANDS:
        unit = significand * 2.0 ** (math.floor(math.log2(old / significand)) - int(math.log2(allowed[0])))
        steps = old / unit  # allowed[0] to 2 * allowed[0]
        scale = (math.ceil(steps * (1 - 1e-9)) if upwards else round(steps)) * unit
        if not (x and y) or requantizes_exactly(x * scale / y):
            return scale, True
    return scale, False


def _odd(scale: float) -> int:
    """The odd part of a number's significand."""
    significand = int(math.frexp(scale)[0] * 2**53)
    return significand // (significand & -significand)
