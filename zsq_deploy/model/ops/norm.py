"""Normalization layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.model.ops.registry import Kernel, Node, op

__all__: list[str] = []


def _per_channel(values: Tensor, rank: int) -> Tensor:
    """[C] as [1, C, 1, ...]."""
    return values.reshape(1, -1, *([1] * (rank - 2)))


@op("BatchNormalization")
def batch_normalization(node: Node) -> Kernel:
    """Per-channel normalization with stored statistics; in training mode with those of the batch (opset 14 and later)."""
    epsilon, momentum = float(node.get("epsilon", 1e-5)), float(node.get("momentum", 0.9))
    if not node.get("training_mode", 0):

        def inference(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            if mean.requires_grad or var.requires_grad:  # torch takes stored statistics for constants
                factor = _per_channel(scale / torch.sqrt(var + epsilon), x.dim())
                return (x - _per_channel(mean, x.dim())) * factor + _per_channel(bias, x.dim())
            return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)

        return inference
    outputs = node.outputs

    def training(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        batch_mean = x.mean(axes)
        batch_var = x.var(axes, correction=0)
        y = (x - _per_channel(batch_mean, x.dim())) * _per_channel(
            scale / torch.sqrt(batch_var + epsilon), x.dim()
        ) + _per_channel(bias, x.dim())
        if outputs == 1:
            return y
        running = (mean * momentum + batch_mean * (1 - momentum), var * momentum + batch_var * (1 - momentum))
        return (y, *running)[:outputs]

    return training


@op("InstanceNormalization")
def instance_normalization(node: Node) -> Kernel:
    """Normalization of every sample and channel over its positions."""
    epsilon = float(node.get("epsilon", 1e-5))

    def kernel(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # written out: torch's own refuses a single position
        axes = list(range(2, x.dim()))
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + epsilon) * _per_channel(scale, x.dim()) + _per_channel(bias, x.dim())

    return kernel


@op("LayerNormalization", since=17)
def layer_normalization(node: Node) -> Kernel:
    """Normalization over the axes from `axis` on, in the compute type; optionally mean and inverse standard deviation."""
    axis, epsilon, outputs = int(node.get("axis", -1)), float(node.get("epsilon", 1e-5)), node.outputs

    def kernel(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
        first = axis % x.dim()
        shape = x.shape[first:]
        if outputs == 1 and scale.shape == shape and (bias is None or bias.shape == shape):
            return F.layer_norm(x, shape, scale, bias, epsilon)
        axes = list(range(first, x.dim()))
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        inverse = torch.rsqrt(var + epsilon)
        y = (x - mean) * inverse * scale
        y = y if bias is None else y + bias
        return y if outputs == 1 else (y, mean, inverse)[:outputs]

    return kernel


@op("GroupNormalization", since=18)
def group_normalization(node: Node) -> Kernel:
    """Normalization over groups of channels; scale and bias per group at opset 18, per channel from opset 21 on."""
    groups, epsilon, per_group = int(node.get("num_groups")), float(node.get("epsilon", 1e-5)), node.opset < 21

    def kernel(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if per_group:
            repeats = x.shape[1] // groups
            scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
        return F.group_norm(x, groups, scale, bias, epsilon)

    return kernel


@op("LRN")
def local_response_normalization(node: Node) -> Kernel:
    """Division by a power of the squared sum over neighbouring channels (Krizhevsky et al. 2012, section 3.3)."""
    size = int(node.get("size"))
    alpha, beta, bias = float(node.get("alpha", 1e-4)), float(node.get("beta", 0.75)), float(node.get("bias", 1.0))
    before = (size - 1) // 2
    after = size - 1 - before

    def kernel(x: Tensor) -> Tensor:
        channels = x.shape[1]
        flat = (x * x).reshape(x.shape[0], 1, channels, -1)
        padded = F.pad(flat, (0, 0, before, after))
        total = F.avg_pool2d(padded, (size, 1), stride=1, divisor_override=1).reshape(x.shape)
        return x / torch.pow(bias + alpha / size * total, beta)

    return kernel


@op("LpNormalization")
def lp_normalization(node: Node) -> Kernel:
    """Division by the L1 or L2 norm along an axis; a zero norm gives zeros."""
    axis, order = int(node.get("axis", -1)), int(node.get("p", 2))

    def kernel(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, ord=order, dim=axis, keepdim=True)
        return torch.where(length == 0, torch.zeros_like(x), x / torch.where(length == 0, 1.0, length))

    return kernel


@op("MeanVarianceNormalization")
def mean_variance_normalization(node: Node) -> Kernel:
    """``(x - mean) / (std + 1e-9)`` over the given axes."""
    axes = [int(axis) for axis in node.get("axes", [0, 2, 3])]

    def kernel(x: Tensor) -> Tensor:
        mean = x.mean(axes, keepdim=True)
        var = torch.clamp((x * x).mean(axes, keepdim=True) - mean * mean, min=0.0)
        return (x - mean) / (torch.sqrt(var) + 1e-9)

    return kernel
