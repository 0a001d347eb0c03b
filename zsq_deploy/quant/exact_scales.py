"""Scales with short significands, so that an integer engine computes exactly what its Q/DQ graph says.

An integer convolution multiplies its accumulator by ``M = sx * sw / sy`` in float32 and rounds; the Q/DQ graph divides a sum of
products of scales. With arbitrary scales the two round differently about once in 10^5 activations, and in deep networks (depthwise
ones above all) one flipped code grows until a third of the logits differ. This module chooses scales for which neither
computation rounds at all before the final ``rint``:

* an activation scale is ``a * 2**i`` with ``a`` in {4, 5, 6, 7};
* tensors that meet in an operator without weights (Add, Concat, pooling, ...) share one ``a``, so that their scales differ by
  powers of two (or, where a runtime breaks the ties of sums in another way than the graph does, a sum's output gets an ``a`` with which
  it cannot tie: :mod:`zsq_deploy.quant.significands`);
* the weight scale of an output channel is ``a_y * b * 2**j`` with ``b`` in {8..15}, where ``a_y`` belongs to the output, so that
  ``M = a_x * b * 2**k`` is a short exact number, and ``accumulator * M`` fits the 24 bits of a float32.

Then the fused engine, the unfused file, the fake-quant twin and exact integer arithmetic agree code for code, whatever the order
of summation. The price is a grid that is up to 25 % (mean about 11 %) coarser for activations and 12 % (mean about 6 %) for weights.
Power-of-two scales have long been used for shifts instead of multiplications (Jain et al., TQT, MLSys 2020) and dyadic
multipliers for integer-only inference (Yao et al., HAWQ-V3, ICML 2021); here the aim is equality of reference and engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.scheme import Granularity, Scheme
from zsq_deploy.quant.significands import BIT_COSTS, SHRINK, Sum, choose, grid_of, in_order, snap_scale

__all__ = ["ExactScales", "Groups", "exact_scales", "exactly_representable", "requantizes_exactly", "snap_scale"]

WEIGHT_SIGNIFICANDS = (tuple(range(8, 16)), tuple(range(4, 8)))
"""Fine first; the coarser set serves channels whose requantization multiplier is so small that a product would need 25 bits."""

_WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "MatMul": 1}
_FUSED = ("Relu", "Clip")


@dataclass(frozen=True)
class ExactScales:
    """The outcome of :func:`exact_scales`.

    Attributes:
        ranges: Range of every activation, ``(-zp * s, (qmax - zp) * s)`` with ``s`` of the form above.
        weight_scales: Scale per output channel of every weight initializer, float32 [C], or [1] for per-tensor weights.
        coarser: Mean factor by which activation scales grew (1.0: not at all), for the report.
        inexact: Weight initializers with channels whose requantization may still round, with the number of such channels.
        tying: With `tie_free_sums`: sums (by output) that may still be half-way between two codes.
    """

    ranges: Mapping[str, tuple[float, float]]
    weight_scales: Mapping[str, npt.NDArray[np.float32]]
    coarser: float = 1.0
    inexact: Mapping[str, int] = field(default_factory=dict)
    tying: tuple[str, ...] = ()


def exactly_representable(value: float, bits: int = 24) -> bool:
    """Whether a number has at most `bits` significant bits (24: it is exact in float32)."""
    if value == 0:
        return True
    significand, _ = math.frexp(abs(value))
    return float(significand * 2**bits).is_integer()


class Groups:
    """Union-find over value names."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """The representative of a name's group."""
        self._parent.setdefault(name, name)
        root = name
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[name] != root:
            self._parent[name], name = root, self._parent[name]
        return root

    def union(self, first: str, second: str) -> None:
        """Put two names into one group."""
        self._parent[self.find(first)] = self.find(second)


def _fused_activation(graph: Graph, value: str) -> str:
    """The value behind the Relu or Clip that a runtime fuses into the producer of `value`, or `value` itself."""
    consumers = graph.consumers(value)
    if len(consumers) == 1 and consumers[0].op_type in _FUSED and not graph.is_output(value):
        return str(consumers[0].output[0])
    return value


def _upper_bound(graph: Graph, value: str) -> float:
    """What a Clip in front of `value` limits it to from above; infinity without one."""
    node = graph.producer(value)
    if node is None or node.op_type != "Clip":
        return math.inf
    if len(node.input) > 2 and node.input[2]:
        limit = graph.constant(node.input[2])
        return float(limit.reshape(-1)[0]) if limit is not None and limit.size else math.inf
    return float(attributes(node).get("max", math.inf))


def exact_scales(
    graph: Graph,
    ranges: Mapping[str, tuple[float, float]],
    *,
    activation: Scheme,
    weight: Scheme,
    nodes: Iterable[str] | None = None,
    clip_ratio: Mapping[str, npt.NDArray[np.float64]] | None = None,
    tie_free_sums: bool = False,
) -> ExactScales:
    """Move ranges and weight scales to the grid on which engine and reference agree exactly.

    Args:
        graph: The deployable graph (batch norm folded) that will be quantized.
        ranges: Range of every activation that may be quantized.
        activation: Scheme of activations (8 bits, per tensor).
        weight: Scheme of weights (symmetric).
        nodes: Names of the nodes that will be quantized; ``None``: all. Only they tie their values together. A value that is fused
            away (between a convolution and its Relu) does not bind the choice.
        clip_ratio: Factor on the largest magnitude of each output channel of a weight, float64 [C] (from a range search).
        tie_free_sums: Choose the scales of sums of two activations so that no sum is half-way between two codes, for runtimes that round
            such halves in another way than the graph does.

    Returns:
        The new ranges and weight scales. Ranges that `ranges` holds for values that are not quantized are passed through.
    """
    if not tie_free_sums:
        return _exact_scales(graph, ranges, activation, weight, nodes, clip_ratio, None)
    nodes = None if nodes is None else tuple(nodes)
    tried = [_exact_scales(graph, ranges, activation, weight, nodes, clip_ratio, cost) for cost in BIT_COSTS]
    return min(tried, key=lambda one: (len(one.tying), sum(one.inexact.values()), one.coarser))


def _exact_scales(
    graph: Graph,
    ranges: Mapping[str, tuple[float, float]],
    activation: Scheme,
    weight: Scheme,
    nodes: Iterable[str] | None,
    clip_ratio: Mapping[str, npt.NDArray[np.float64]] | None,
    bit_cost: float | None,
) -> ExactScales:
    chosen = {node.name for node in graph} if nodes is None else set(nodes)
    fused_away = {
        str(node.input[0])
        for node in graph
        if node.op_type in _FUSED
        and _fused_activation(graph, node.input[0]) == node.output[0]
        and node.input[0] in ranges
    }
    bound = set(ranges) - fused_away

    groups = Groups()
    sums: list[Sum] = []
    for node in graph:
        if node.name not in chosen:
            continue
        if bit_cost is not None and node.op_type == "Add" and all(value in bound for value in node.input):
            output = str(node.output[0])
            output = _fused_activation(graph, output) if output in fused_away else output
            if output in bound:
                sums.append((output, (str(node.input[0]), str(node.input[1]))))
                continue
        if node.op_type in _FUSED and node.input[0] in bound and node.output[0] in bound:
            groups.union(node.input[0], node.output[0])
            continue
        has_weights = node.op_type in _WEIGHTED and len(node.input) > 1 and graph.constant(node.input[1]) is not None
        if has_weights:
            continue
        outputs = [_fused_activation(graph, value) if value in fused_away else value for value in node.output]
        touching = [value for value in (*node.input, *outputs) if value in bound]
        for value in touching[1:]:
            groups.union(touching[0], value)

    members: dict[str, list[str]] = {}
    for value in sorted(bound):
        members.setdefault(groups.find(value), []).append(value)

    new_ranges: dict[str, tuple[float, float]] = {
        name: (float(low), float(high)) for name, (low, high) in ranges.items()
    }
    significand: dict[str, int] = {}
    scale_of: dict[str, float] = {}
    growth: list[float] = []
    added = {name for _, pair in sums for name in pair}
    for values in in_order(members, sums, groups.find):
        wanted = {value: _wanted(graph, value, ranges[value], activation) for value in values}
        grids = {
            output: min(grid_of(scale_of[name]) for name in pair)
            for output, pair in sums
            if output in wanted and all(name in scale_of for name in pair)
        }
        matters = bit_cost is not None and bool(grids or added & wanted.keys())
        short, scales = choose(wanted, grids, bit_cost if bit_cost is not None and matters else 0.0)
        for value, scale in scales.items():
            low, high = _with_zero(ranges[value])
            zero = _zero_point(low, scale, activation)
            new_ranges[value] = ((activation.qmin - zero) * scale, (activation.qmax - zero) * scale)
            significand[value], scale_of[value] = short, scale
            growth.append(scale * (activation.levels - 1) / max(high - low, 1e-6))
    tying = tuple(
        output for output, pair in sums if not _never_half_way(scale_of[output], [scale_of[name] for name in pair])
    )

    weight_scales: dict[str, npt.NDArray[np.float32]] = {}
    inexact: dict[str, int] = {}
    for node in graph:
        if node.op_type not in _WEIGHTED or len(node.input) < 2:
            continue
        array = graph.constant(node.input[1])
        if array is None or array.dtype.kind != "f" or node.input[1] in weight_scales:
            continue
        source, output = str(node.input[0]), _fused_activation(graph, node.output[0])
        bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        rows = _channels_first(node.op_type, attributes(node), np.asarray(array, np.float64))
        channel_scales, rounding = _weight_scales(
            rows if weight.granularity is Granularity.CHANNEL else rows.reshape(1, -1),
            weight,
            x=scale_of.get(source, 0.0),
            y=scale_of.get(output, 0.0),
            y_significand=significand.get(output, 1),
            clip_ratio=None if clip_ratio is None else clip_ratio.get(node.input[1]),
            bias=None if bias is None else np.asarray(bias, np.float64).reshape(-1),
        )
        weight_scales[node.input[1]] = channel_scales
        if rounding:
            inexact[node.input[1]] = rounding
    coarser = float(np.exp(np.mean(np.log(growth)))) if growth else 1.0
    return ExactScales(new_ranges, weight_scales, coarser, inexact, tying)


def _never_half_way(output: float, inputs: Iterable[float]) -> bool:
    """Whether no sum of whole multiples of `inputs` is an odd multiple of half of `output`."""
    return all(grid_of(scale) >= grid_of(output) for scale in inputs)


def _wanted(graph: Graph, value: str, bounds: tuple[float, float], activation: Scheme) -> tuple[float, float]:
    """The scale that covers a range, and the largest one that is allowed."""
    low, high = _with_zero(bounds)
    length = 2 * max(-low, high) if activation.symmetric else high - low
    limit = _upper_bound(graph, value)
    largest = math.inf
    if math.isfinite(limit) and limit > 0 and high >= limit * (1 - SHRINK):
        # Runtimes drop a Clip whose bounds the integer range enforces: the range must not end above the bound.
        largest = (limit - low) / (activation.levels - 1)
    return max(length, 1e-6) / (activation.levels - 1), largest


def _with_zero(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = min(float(bounds[0]), 0.0), max(float(bounds[1]), 0.0)
    return low, high


def _zero_point(low: float, scale: float, scheme: Scheme) -> int:
    if scheme.symmetric:
        return 0 if scheme.signed else 2 ** (scheme.bits - 1)
    zero = scheme.qmin - round(low / scale)
    return max(scheme.qmin, min(scheme.qmax, zero))


def _channels_first(op: str, found: Mapping[str, Any], array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A weight as [output channels, everything else]."""
    if op == "Gemm":
        array = array if found.get("transB", 0) else array.T
    elif op == "MatMul":
        array = np.moveaxis(array, -1, 0)
    elif op == "ConvTranspose":
        array = np.moveaxis(array, 1, 0)
    return array.reshape(array.shape[0], -1)


def _weight_scales(
    rows: npt.NDArray[np.float64],
    scheme: Scheme,
    *,
    x: float,
    y: float,
    y_significand: int,
    clip_ratio: npt.NDArray[np.float64] | None,
    bias: npt.NDArray[np.float64] | None,
) -> tuple[npt.NDArray[np.float32], int]:
    peak = np.abs(rows).max(axis=1)
    if clip_ratio is not None:
        peak = peak * np.asarray(clip_ratio, np.float64)
    codes = min(scheme.qmax, -scheme.qmin)
    floor = max(float(peak.max()) * 2.0**-24, 2.0**-100)
    need = np.maximum(peak / codes, floor)
    if bias is not None and x > 0 and bias.size == need.size:
        # The int32 bias has the scale sx * sw: a channel with tiny weights and a large bias needs a larger one.
        need = np.maximum(need, np.abs(bias) / (x * 2.0**30))
    scales = np.empty(need.size, np.float32)
    rounding = 0
    for channel, value in enumerate(need):
        chosen = 0.0
        for significands in WEIGHT_SIGNIFICANDS:
            chosen = snap_scale(float(value), [y_significand * b for b in significands], shrink=0.0)
            exact = x == 0.0 or y == 0.0 or requantizes_exactly(x * chosen / y)
            if exact:
                break
        else:
            rounding += 1
        scales[channel] = chosen
    return scales, rounding


def requantizes_exactly(multiplier: float) -> bool:
    """Whether ``accumulator * multiplier`` is exact in float32 for every accumulator that does not saturate (below 256 steps)."""
    fraction, exponent = math.frexp(multiplier)
    odd = int(fraction * 2**53)
    odd_bits = odd.bit_length() - ((odd & -odd).bit_length() - 1)
    # multiplier = odd * 2**step; products are multiples of 2**step below 2**8.
    step = exponent - odd_bits
    return step >= 8 - 24
