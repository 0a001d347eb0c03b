"""Any Q/DQ graph moved to scales, weights and biases with which float32, float64 and integer arithmetic give the same codes.

:mod:`zsq_deploy.quant.exact_scales` chooses such scales for a float graph that is yet to be quantized. This module takes a graph that
is quantized already, by whomever, keeps what is rounded where, and changes numbers only:

* activation scales become ``a * 2**i`` with ``a`` in {4, 5, 6, 7}, one ``a`` for all that meet without a weighted layer in between;
* zero points become even (``rint(x + z)`` and ``rint(x) + z`` break ties alike then);
* weight scales become ``a_y * b * 2**j``, so that the multiplier ``M = sx * sw / sy`` is a short number; where ``M`` is so small that
  its last bit would get lost in float32, ``b`` gets shorter. Weights are rounded once, at the final scale, from float numbers;
* biases move by at most half a step of ``M``: to the middle between two multiples of the common grid of ``accumulator * M`` and of what
  is added to it. No sum is on or near a rounding boundary then, whatever the order of operations (a tie needs a multiple of a half
  code, and all sums are odd multiples of half a grid step). Where the grid is so fine that half a step would be within the noise of
  float32, the bias becomes a multiple of the grid instead: every step of float32 arithmetic is exact then.

How fine grids have to be is computed in :mod:`zsq_deploy.quant.settled_sums`; here the grids of activations are chosen and all is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.exact_scales import Groups, snap_scale
from zsq_deploy.quant.reader import QuantizedTensor, dequantized_weight
from zsq_deploy.quant.regions import Layer, Regions, axis_form, read_regions
from zsq_deploy.quant.scheme import Scheme
from zsq_deploy.quant.settled_sums import (
    TIE_FREE_BITS,
    Grid,
    Need,
    bits_of,
    may_tie,
    needs_of,
    odd_part,
    settled_bias,
    trailing_step,
    weight_scale,
)
from zsq_deploy.quant.significands import ACTIVATION_SIGNIFICANDS

__all__ = ["INVERTIBLE", "Settled", "settle"]

Array = npt.NDArray[Any]

INVERTIBLE = (4, 5, 6)
"""Significands ``a`` for which ``x * float32(1 / (a * 2**i))`` is exact wherever ``x / (a * 2**i)`` has at most 24 bits. The reciprocal of 7
is off by 0.75 of half a unit in the last place, those of 5 and 6 by a quarter and a third: too little to move a product."""


@dataclass(frozen=True)
class Settled:
    """The outcome of :func:`settle`.

    Attributes:
        graph: The Q/DQ graph with new numbers; names and nodes are the old ones (layers may have got a bias).
        coarser: Mean factor by which activation scales grew (1.0: not at all).
        inexact: Layer or QuantizeLinear node -> number of channels (1 for a node) whose codes may depend on the order of operations.
        notes: What was left as it is, and why; one line each.
    """

    graph: Graph
    coarser: float = 1.0
    inexact: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def settle(
    qdq: Graph,
    *,
    activation: Scheme,
    weight: Scheme,
    float_weights: Mapping[str, Array] | None = None,
) -> Settled:
    """Move the scales of a Q/DQ graph to the exact grid, round its weights again, and write biases without ties.

    Args:
        qdq: Any Q/DQ graph: activations per tensor in 8 bits, weights as integers behind DequantizeLinear or as floats behind
            QuantizeLinear and DequantizeLinear. What is rounded otherwise is left as it is, and noted.
        activation: Scheme of activations of the target; decides which zero points may be moved.
        weight: Scheme of weights of the target; its `restricted` leaves out the code -128.
        float_weights: Name of a weight's constant (without ``_quantized``) or of the layer -> the float numbers that it was made from,
            in the shape of the weight. Without them the dequantized integers are rounded a second time.

    Returns:
        The settled graph.
    """
    regions = read_regions(qdq)
    grids = _choose_grids(regions, activation)
    growth = [math.log(grid.scale / float(regions.sites[site].scale)) for site, grid in grids.items()]
    net = Net(qdq.proto)
    nodes = {node.name: node for node in net.nodes}
    for name, grid in grids.items():
        _write_site(net, nodes, regions.sites[name], grid)
    inexact: dict[str, int] = {}
    needs = needs_of(regions, grids)
    for layer in regions.layers.values():
        doubtful = _settle_layer(net, nodes, qdq, layer, grids, needs.get(layer.node), weight, float_weights or {})
        if doubtful:
            inexact[layer.node] = doubtful
    for site, alternatives in regions.behind.items():
        if any(may_tie(term, site, grids) for terms in alternatives for term in terms):
            inexact[site] = 1
    net.touch()
    net.sweep()
    return Settled(Graph(net.proto()), float(np.exp(np.mean(growth))) if growth else 1.0, inexact, regions.left)


def _choose_grids(regions: Regions, activation: Scheme) -> dict[str, Grid]:
    groups = Groups()
    by_layer: dict[str, str] = {}
    for site, alternatives in regions.behind.items():
        for terms in alternatives:
            for term in terms:
                if term.site:
                    groups.union(site, term.site)
                elif term.layer:
                    groups.union(site, by_layer.setdefault(term.layer, site))
    for layer in regions.layers.values():
        for site in layer.sites[1:]:
            groups.union(layer.site, site)
    members: dict[str, list[str]] = {}
    for site in regions.sites:
        members.setdefault(groups.find(site), []).append(site)
    grids: dict[str, Grid] = {}
    multipliers = _multipliers(regions)
    for sites in members.values():
        grids.update(_best_grids(regions, sites, ACTIVATION_SIGNIFICANDS, activation, multipliers))
    doubtful = _wants_inverse(regions, grids)
    for sites in members.values():
        if doubtful.intersection(sites):
            grids.update(_best_grids(regions, sites, INVERTIBLE, activation, multipliers))
    return grids


def _multipliers(regions: Regions) -> dict[str, list[npt.NDArray[np.float64]]]:
    """Site -> requantization multipliers per channel, as they are, of the layers that read it."""
    behind: dict[str, float] = {}
    for site, alternatives in regions.behind.items():
        for term in (term for terms in alternatives for term in terms if term.layer):
            behind[term.layer] = min(float(regions.sites[site].scale), behind.get(term.layer, math.inf))
    found: dict[str, list[npt.NDArray[np.float64]]] = {}
    for layer in regions.layers.values():
        if layer.node in behind:
            x = float(regions.sites[layer.site].scale)
            product = x * layer.weight.scale.astype(np.float64).reshape(-1) / behind[layer.node]
            found.setdefault(layer.site, []).append(product[product > 2.0**-13])
    return found


def _best_grids(
    regions: Regions,
    sites: Iterable[str],
    significands: Iterable[int],
    activation: Scheme,
    multipliers: Mapping[str, Sequence[npt.NDArray[np.float64]]],
) -> dict[str, Grid]:
    best: tuple[float, dict[str, Grid]] | None = None
    for significand in significands:
        cost, found = 0.0, {}
        for site in sites:
            tensor = regions.sites[site]
            old = float(tensor.scale)
            scale = snap_scale(old, [significand])
            found[site] = Grid(scale, _zero_point(tensor, scale, activation), significand)
            cost += abs(math.log(scale / old))
            for product in multipliers.get(site, ()):
                # Multipliers become multiples of the significand's odd part, whose step must not be too fine.
                units = product / (odd_part(significand) * 2.0**-TIE_FREE_BITS)
                cost += float(np.log(np.ceil(units) / units).mean()) if units.size else 0.0
        if best is None or cost < best[0]:
            best = (cost, found)
    assert best is not None
    return best[1]


def _wants_inverse(regions: Regions, grids: Mapping[str, Grid]) -> set[str]:
    """Sites where ties can happen, although their significand has no exact reciprocal."""
    found: set[str] = set()
    needs = needs_of(regions, grids)
    for site, alternatives in regions.behind.items():
        if grids[site].significand in INVERTIBLE:
            continue
        for terms in alternatives:
            layers = [regions.layers[term.layer] for term in terms if term.layer]
            if not layers:
                moved = len(terms) == 1 and terms[0].divisor == 1 and terms[0].site
                if not moved or grids[terms[0].site].scale != grids[site].scale:
                    found.add(site)
            for layer in layers:
                need, x = needs[layer.node], grids[layer.site].scale
                bits = bits_of(layer, need)
                old = np.asarray(layer.weight.scale, np.float64).reshape(-1)
                scales = (weight_scale(float(s), need, x, layer.taps, k) for s, k in zip(old, bits, strict=True))
                steps = (
                    min(trailing_step(x * s / need.output), need.step - trailing_step(need.output)) for s in scales
                )
                if any(step < -k.tie_free for step, k in zip(steps, bits, strict=True)) or layer.bias_at is None:
                    found.add(site)
    return found


def _zero_point(tensor: QuantizedTensor, scale: float, activation: Scheme) -> int:
    """An even zero point that keeps the old range, or loses as little of it as can be."""
    lowest, highest = tensor.limits
    old = int(tensor.zero_point)
    if old == lowest or (old % 2 == 0 and (activation.symmetric or old == (lowest + highest + 1) // 2)):
        return old  # one-sided and symmetric ranges stay what they are
    low, high = tensor.low / scale, tensor.high / scale

    def loss(zero: int) -> tuple[float, float]:
        lost = max(lowest - zero - low, 0.0) + max(high - (highest - zero), 0.0)
        return lost, abs(zero - (lowest - low))

    first = lowest - math.floor(low) - 4
    candidates = [zero for zero in range(first - 260, first + 260) if zero % 2 == 0 and lowest <= zero <= highest]
    return min(candidates, key=loss)


def _write_site(net: Net, nodes: Mapping[str, Any], tensor: QuantizedTensor, grid: Grid) -> None:
    users = [nodes[str(tensor.quantize)], *(nodes[name] for name in tensor.dequantize)]
    first = users[0]
    zero = np.asarray(grid.zero, tensor.dtype)
    scale_name = _put(net, first.input[1], np.asarray(grid.scale, np.float32), users)
    if len(first.input) > 2 and first.input[2]:
        zero_name = _put(net, first.input[2], zero, users)
    else:
        zero_name = net.add_constant(f"{tensor.name}_zero_point", zero)
    for node in users:
        while len(node.input) < 3:
            node.input.append("")
        node.input[1], node.input[2] = scale_name, zero_name
    net.touch()


def _put(net: Net, name: str, value: Array, users: Iterable[Any]) -> str:
    """Store a value under an initializer's name if only these nodes read it, else under a new name."""
    allowed = {id(node) for node in users}
    own = all(id(node) in allowed for node in net.consumers().get(name, []))
    return net.add_constant(name, value, exact=own and net.constant(name) is not None)


def _settle_layer(
    net: Net,
    nodes: Mapping[str, Any],
    qdq: Graph,
    layer: Layer,
    grids: Mapping[str, Grid],
    need: Need | None,
    weight: Scheme,
    float_weights: Mapping[str, Array],
) -> int:
    """Write scales, weight and bias of one layer; returns the number of channels that may still round."""
    x = grids[layer.site].scale
    old = layer.weight.scale.astype(np.float64).reshape(-1)
    scales, doubtful = old, 0
    bias = layer.bias
    if need is not None:
        bits = bits_of(layer, need)
        scales = np.array([weight_scale(float(s), need, x, layer.taps, k) for s, k in zip(old, bits, strict=True)])
        bias, doubtful = settled_bias(layer, need, scales, x, bits)
    _write_weight(net, nodes, qdq, layer, np.asarray(scales, np.float32), weight, float_weights)
    if bias is not None and layer.bias_at is not None:
        _write_bias(net, nodes, qdq, layer, bias)
    return doubtful


def _write_weight(
    net: Net,
    nodes: Mapping[str, Any],
    qdq: Graph,
    layer: Layer,
    scales: npt.NDArray[np.float32],
    weight: Scheme,
    float_weights: Mapping[str, Array],
) -> None:
    tensor = layer.weight
    users = [nodes[name] for name in tensor.dequantize]
    if tensor.quantize is not None:
        users.append(nodes[tensor.quantize])
    same = np.array_equal(scales, tensor.scale.reshape(-1))
    stored = qdq.constant(layer.codes)
    assert stored is not None
    shape = stored.shape
    given = float_weights.get(tensor.name, float_weights.get(layer.codes, float_weights.get(layer.node)))
    if given is not None and np.shape(given) == shape:
        floats = np.asarray(given, np.float64)
    elif same and stored.dtype.kind != "f":
        return
    elif stored.dtype.kind == "f":
        floats = stored.astype(np.float64)
    else:
        dequantized = dequantized_weight(qdq, users[0].output[0])
        assert dequantized is not None
        floats = dequantized.astype(np.float64)
    lowest, highest = tensor.limits
    if (weight.restricted or weight.symmetric) and (stored.dtype.kind == "f" or stored.min() > lowest):
        lowest = -highest  # unless the code below it is used already, as in weights of few bits
    step = axis_form(scales.astype(np.float64), len(shape), layer.axis)
    codes = np.clip(np.rint(floats / step), lowest, highest)
    new_scale = scales.reshape(tensor.scale.shape)
    name = _put(net, users[0].input[1], new_scale, users)
    for node in users:
        node.input[1] = name
    net.touch()
    if stored.dtype.kind == "f":
        # The numbers as they will be: nobody has to round them a second time.
        net.add_constant(layer.codes, np.asarray(codes * step, np.float32), exact=True)
    else:
        net.add_constant(layer.codes, codes.astype(np.int32).astype(stored.dtype), exact=True)


def _write_bias(net: Net, nodes: Mapping[str, Any], qdq: Graph, layer: Layer, bias: npt.NDArray[np.float64]) -> None:
    assert layer.bias_at is not None
    node, index = nodes[layer.bias_at[0]], layer.bias_at[1]
    while len(node.input) <= index:
        node.input.append("")
    old = node.input[index]
    before = dequantized_weight(qdq, old) if old else None
    values = np.asarray(bias if before is None else bias.reshape(before.shape), np.float32)
    node.input[index] = (
        _put(net, layer.bias_name, values, [node])
        if layer.bias_name == old
        else net.add_constant(layer.bias_name, values)
    )
    net.touch()
