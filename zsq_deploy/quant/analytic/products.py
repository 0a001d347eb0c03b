"""Moments behind convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from zsq_deploy.quant.analytic.channels import Channels, Vector
from zsq_deploy.quant.analytic.known import Known

__all__ = ["convolution", "product"]


def _linear(known: Known, x: Channels, weight: Vector, bias: Vector | float, axis: int, group: int = 1) -> Channels:
    """Weights as ``[outputs, inputs of the group, places]`` applied to the channels."""
    outputs, inputs, _ = weight.shape
    sums = weight.sum(2)
    spread = np.maximum(np.square(weight).sum(2), np.square(sums))
    positive, negative = np.maximum(weight, 0.0).sum(2), np.minimum(weight, 0.0).sum(2)

    def per_output(values: Vector) -> Vector:
        full = np.broadcast_to(values, (group * inputs,)) if len(values) == 1 else values
        return np.repeat(full.reshape(group, inputs), outputs // group, axis=0)

    mean, var = per_output(x.mean), per_output(x.var)
    low, high = per_output(x.low), per_output(x.high)
    out_mean = (sums * mean).sum(1) + bias
    out_var = (spread * var).sum(1)
    lowest = (positive * np.minimum(low, 0) + negative * np.maximum(high, 0)).sum(1) + bias
    highest = (positive * np.maximum(high, 0) + negative * np.minimum(low, 0)).sum(1) + bias
    if x.kind == "interval":
        return Channels(out_mean, out_var, lowest, highest, axis, "interval")
    deviation = known.sigmas * np.sqrt(out_var)
    # Padding counts as zero, so the bounds include inputs of zero; the mean is that of the interior.
    return Channels(
        out_mean,
        out_var,
        np.maximum(out_mean - deviation, lowest),
        np.minimum(out_mean + deviation, highest),
        axis,
        "derived",
    )


def convolution(known: Known, node: onnx.NodeProto, attrs: Mapping[str, Any], x: Channels) -> Channels | None:
    """Moments behind a convolution or transposed convolution; ``None`` where its weight is computed."""
    weight = known.constant(node.input[1])
    bias = known.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if weight is None or bias is None:
        return None
    group = int(attrs.get("group", 1))
    if node.op_type == "ConvTranspose":
        per = weight.shape[1]
        weight = weight.reshape(group, -1, per, *weight.shape[2:])
        weight = np.swapaxes(weight, 1, 2).reshape(group * per, -1, *weight.shape[3:])
    if x.axis == -1 or (x.axis == 1 and len(x.mean) not in (1, weight.shape[1] * group)):
        x = x.pooled()
    return _linear(known, x, weight.reshape(*weight.shape[:2], -1), bias, 1, group)


def product(known: Known, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> Channels | None:
    """Moments behind MatMul or Gemm."""
    x = known.found.get(node.input[0])
    weight = known.constant(node.input[1])
    if x is None or weight is None or weight.ndim != 2:
        return _product_of_two(known, node)
    bias: Vector | float = 0.0
    if node.op_type == "Gemm":
        weight = (weight if attrs.get("transB", 0) else weight.T) * float(attrs.get("alpha", 1.0))
        if attrs.get("transA", 0):
            x = x.pooled()
        if len(node.input) > 2 and node.input[2]:
            given = known.constant(node.input[2])
            if given is None or given.size not in (1, weight.shape[0]):
                return None
            bias = given.reshape(-1) * float(attrs.get("beta", 1.0))
    else:
        weight = weight.T
    rank = known.rank(node.input[0])
    if (x.axis == 1 and rank != 2) or len(x.mean) not in (1, weight.shape[1]):
        x = x.pooled()
    return _linear(known, x, weight[..., None], bias, 1 if rank == 2 else -1)


def _product_of_two(known: Known, node: onnx.NodeProto) -> Channels | None:
    a, b = known.of(node.input[0]), known.of(node.input[1])
    shape = known.graph.shape(node.input[0])
    depth = shape[-1] if shape else None
    if a is None or b is None or depth is None:
        return None
    a, b = a.pooled(), b.pooled()
    ends = np.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high]) * depth
    mean = a.mean * b.mean * depth
    var = (a.var * b.var + a.var * np.square(b.mean) + b.var * np.square(a.mean)) * depth
    kind = a.as_kind(b.kind).kind
    if kind == "interval":
        # Rows of a softmax sum to one: their product stays inside the other factor's reach.
        maker = known.graph.producer(node.input[0])
        if maker is not None and maker.op_type == "Softmax":
            return replace(b, kind="interval")
        return Channels(mean, var, ends.min(0), ends.max(0), None, "interval")
    deviation = known.sigmas * np.sqrt(var)
    return Channels(
        mean,
        var,
        np.maximum(mean - deviation, ends.min(0)),
        np.minimum(mean + deviation, ends.max(0)),
        None,
        "derived",
    )
