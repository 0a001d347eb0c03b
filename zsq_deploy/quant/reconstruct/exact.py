"""Scales of few bits moved to numbers with which an integer engine computes exactly what its Q/DQ graph says.

The same grid as in :mod:`zsq_deploy.quant.exact_scales` (an activation scale is ``a * 2**i``, a weight scale ``a_y * b * 2**j``, and the
requantization multiplier ``a_x * b * 2**k`` is a short number), for networks whose scales were learned or found for few codes. Two things differ:

* With 16 codes a step that is 25 % too coarse costs accuracy, so scales move to the *nearest* number of a finer grid (``a`` in 8 to 15)
  instead of the next larger one. Sites that meet in a sum still share ``a``; those with fewer bits have more say in it.
* A weight of few bits keeps its codes, since those were learned; ``b`` goes up to 63, and is as long as the multiplier allows. A weight
  of 8 bits is rounded again on the new scale.
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
from zsq_deploy.quant.regions import Regions, read_regions

__all__ = ["FINE", "exact_activations", "exact_weights"]

Array = npt.NDArray[Any]

FINE: tuple[int, ...] = tuple(range(8, 16))
"""Significands of activation scales; they hold those of 8-bit engines (4 to 7), so those stay what they are where they can."""

_WEIGHT_SIGNIFICANDS = (tuple(range(32, 64)), tuple(range(16, 32)), tuple(range(8, 16)), tuple(range(4, 8)))
_EIGHT_BIT_SAY = 0.1
"""How much a site with 8 bits counts against one with fewer, where they have to share a significand."""


def _meeting(template: Template, regions: Regions) -> list[list[str]]:
    """Groups of sites (by the name of their scale's group) that meet without a weighted layer in between."""
    own = {site.name: site.group for site in template.sites}
    names = {node: own[tensor.name] for node, tensor in regions.sites.items() if tensor.name in own}
    groups = Groups()
    by_layer: dict[str, str] = {}
    for site, alternatives in regions.behind.items():
        if site not in names:
            continue
        for term in (term for terms in alternatives for term in terms):
            if term.site in names:
                groups.union(names[site], names[term.site])
            elif term.layer:
                groups.union(names[site], by_layer.setdefault(term.layer, names[site]))
    found: dict[str, list[str]] = {}
    for group in template.groups():
        found.setdefault(groups.find(group), []).append(group)
    return list(found.values())


def exact_activations(template: Template, state: State, *, significands: Iterable[int] = FINE) -> State:
    """The state with activation scales ``a * 2**i``, one ``a`` for all that meet.

    Groups without a site of fewer than 8 bits are on the 8-bit engine's grid already and stay.

    Args:
        template: The network; its Q/DQ graph says what meets.
        state: The numbers.
        significands: Allowed ``a``.
    """
    candidates = tuple(significands)
    ceilings = {
        group: min(site.ceiling for site in sites if not site.repeats or len(sites) == 1)
        for group, sites in template.groups().items()
        if any(not site.repeats for site in sites) or len(sites) == 1
    }
    changed: dict[str, Activation] = {}
    for members in _meeting(template, read_regions(template.qdq)):
        if all(state.activations[name].scheme.bits == 8 for name in members):
            continue
        best: tuple[float, dict[str, float]] | None = None
        for significand in candidates:
            cost, scales = 0.0, {}
            for name in members:
                old = state.activations[name]
                say = _EIGHT_BIT_SAY if old.scheme.bits == 8 else 1.0
                scales[name] = _snapped(old, significand, ceilings.get(name, math.inf))
                cost += say * math.log(scales[name] / old.scale) ** 2
            if best is None or cost < best[0]:
                best = (cost, scales)
        assert best is not None
        for name, scale in best[1].items():
            changed[name] = _rescaled(state.activations[name], scale)
    return state.updated(activations=changed)


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
