"""Moments behind averages and behind operators that move numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx

from zsq_deploy.quant.analytic.channels import Channels, repeated
from zsq_deploy.quant.analytic.known import Known

__all__ = ["average", "view"]


def average(known: Known, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Channels) -> Channels:
    """Moments behind averages over places or other axes."""
    if node.op_type == "ReduceMean":
        axes = attrs.get("axes")
        if axes is None and len(node.input) > 1 and node.input[1]:
            given = known.constant(node.input[1])
            axes = None if given is None else [int(v) for v in given.reshape(-1)]
        rank = known.rank(node.input[0])
        channel = None if rank is None or x.axis is None else x.axis % rank
        if axes is None or rank is None or channel in [axis % rank for axis in axes]:
            return x.pooled().as_kind("derived")
        if not attrs.get("keepdims", 1) and x.axis == -1:
            return x.pooled().as_kind("derived")
    # Neighbouring pixels move together, so the variance is kept: an upper bound.
    return x.as_kind("derived")


def view(known: Known, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Channels) -> Channels:
    """Moments behind operators that only move or pick numbers."""
    before, after = known.graph.shape(node.input[0]), known.graph.shape(node.output[0])
    if x.axis is None or before is None or after is None:
        return x.pooled()
    channel = x.axis % len(before)
    if node.op_type == "Transpose":
        perm = list(attrs.get("perm", range(len(before))[::-1]))
        place = perm.index(channel)
        if place == 1 and len(perm) != 3:
            return replace(x, axis=1)
        return replace(x, axis=-1) if place == len(perm) - 1 else x.pooled()
    size = before[channel]
    if node.op_type in ("Reshape", "Flatten") and channel == 1 and len(after) == 2 and after[1] and size:
        return repeated(x, after[1] // size) if after[1] % size == 0 else x.pooled()
    if (
        node.op_type in ("Reshape", "Squeeze", "Slice", "Unsqueeze")
        and channel == 1
        and len(after) > 1
        and after[1] == size
    ):
        return x
    return x.pooled()
