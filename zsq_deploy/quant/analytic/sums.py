"""Moments of sums, products and concatenations of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from zsq_deploy.quant.analytic.channels import ORDER, Channels, Kind, repeated
from zsq_deploy.quant.analytic.known import Known, aligned, hull

__all__ = ["binary", "concat"]


def binary(known: Known, node: onnx.NodeProto) -> Channels | None:
    """Moments behind Add, Sub, Mul, Div, Max and Min, operands taken as independent."""
    if len(node.input) != 2:
        return None
    a, b = known.of(node.input[0]), known.of(node.input[1])
    if a is None or b is None:
        return None
    a, b = aligned(a, b)
    axis = a.axis if a.axis is not None else b.axis
    constant = not a.var.any() or not b.var.any()
    kind = a.as_kind(b.kind, "derived").kind
    if node.op_type in ("Add", "Sub"):
        sign = 1.0 if node.op_type == "Add" else -1.0
        mean, var = a.mean + sign * b.mean, a.var + b.var
        lowest = a.low + (b.low if sign > 0 else -b.high)
        highest = a.high + (b.high if sign > 0 else -b.low)
        if kind == "interval" or constant:
            return Channels(mean, var, lowest, highest, axis, kind)
        # Independent deviations add in squares, each at its own distance from its own mean; never beyond the bounds.
        down_b = b.mean - b.low if sign > 0 else b.high - b.mean
        up_b = b.high - b.mean if sign > 0 else b.mean - b.low
        down, up = np.hypot(a.mean - a.low, down_b), np.hypot(a.high - a.mean, up_b)
        return Channels(mean, var, np.maximum(mean - down, lowest), np.minimum(mean + up, highest), axis, kind)
    if node.op_type in ("Max", "Min"):
        pick = np.maximum if node.op_type == "Max" else np.minimum
        return Channels(
            pick(a.mean, b.mean), np.maximum(a.var, b.var), pick(a.low, b.low), pick(a.high, b.high), axis, kind
        )
    if node.op_type == "Div":
        if not (b.low > 0).all() and not (b.high < 0).all():
            return None
        mean_b = 1.0 / np.where(b.mean == 0, 1e-30, b.mean)
        b = Channels(mean_b, b.var * mean_b**4, 1.0 / b.high, 1.0 / b.low, b.axis, b.kind)
    ends = np.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high])
    mean = a.mean * b.mean
    var = a.var * b.var + a.var * np.square(b.mean) + b.var * np.square(a.mean)
    return Channels(mean, var, ends.min(0), ends.max(0), axis, kind)


def concat(known: Known, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> Channels | None:
    """Moments behind Concat; channels are told apart where they are what is joined."""
    operands = [part for part in map(known.of, node.input) if part is not None]
    if len(operands) != len(node.input):
        return None
    axis = int(attrs.get("axis", 1))
    kind: Kind = max((part.kind for part in operands), key=ORDER.__getitem__)
    rank = known.rank(node.output[0])
    if rank is not None and axis % rank == 1 and rank in (2, 4, 5) and all(part.axis in (1, None) for part in operands):
        sizes = [known.graph.shape(name) for name in node.input]
        whole: list[Channels] = []
        for part, shape in zip(operands, sizes, strict=True):
            size = shape[1] if shape is not None and len(shape) > 1 else None
            if size is None:
                whole = []
                break
            whole.append(part if len(part.mean) == size else repeated(part.pooled(), size))
        if whole:
            joined = [np.concatenate([getattr(p, f) for p in whole]) for f in ("mean", "var", "low", "high")]
            return Channels(joined[0], joined[1], joined[2], joined[3], 1, kind)
    pooled = [part.pooled() for part in operands]
    result = pooled[0]
    for part in pooled[1:]:
        result = replace(hull(result, part), kind=kind)
    return result
