"""Operators on integers, computed exactly.

Products are accumulated in float64, where every partial sum of a real network is far below 2**53 and therefore exact; torch has
no integer convolution that is as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_deploy.model.ops.conv import convolution
from zsq_deploy.model.ops.registry import Kernel, Node, op
from zsq_deploy.model.ops.window import Window

__all__: list[str] = []


def _centred(x: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    """``x - zero_point`` in float64; a zero point vector lies along `axis`."""
    wide = x.to(torch.float64)
    if zero_point is None:
        return wide
    shift = zero_point.to(torch.float64)
    if shift.dim() == 1 and shift.numel() > 1 and axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        shift = shift.reshape(shape)
    elif shift.numel() == 1:
        shift = shift.reshape(())
    return wide - shift


def _requantize(total: Tensor, multiplier: Tensor, zero_point: Tensor) -> Tensor:
    """``saturate(rint(float32(total) * multiplier) + zero_point)`` in the type of the zero point, all in float32."""
    limits = torch.iinfo(zero_point.dtype)
    scaled = torch.round(total.to(torch.float32) * multiplier)
    shift = zero_point.reshape(()) if zero_point.numel() == 1 else zero_point
    return torch.clamp(scaled.to(torch.float64) + shift.to(torch.float64), limits.min, limits.max).to(zero_point.dtype)


@op("MatMulInteger")
def matmul_integer(_node: Node) -> Kernel:
    """int32 product of 8-bit matrices; zero points per tensor, per row of A, per column of B."""

    def kernel(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
        return torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1)).to(torch.int32)

    return kernel


@op("ConvInteger")
def conv_integer(node: Node) -> Kernel:
    """int32 convolution of 8-bit tensors; the padding stands for the input's zero point."""
    run = convolution(Window.of(node), int(node.get("group", 1)))

    def kernel(x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Tensor:
        return run(_centred(x, x_zero, None), _centred(w, w_zero, 0)).to(torch.int32)

    return kernel


@op("QLinearConv")
def qlinear_conv(node: Node) -> Kernel:
    """8-bit convolution with int32 bias and requantization; weights per tensor or per output channel."""
    run = convolution(Window.of(node), int(node.get("group", 1)))

    def kernel(
        x: Tensor,
        x_scale: Tensor,
        x_zero: Tensor,
        w: Tensor,
        w_scale: Tensor,
        w_zero: Tensor,
        y_scale: Tensor,
        y_zero: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        total = run(_centred(x, x_zero, None), _centred(w, w_zero, 0))
        view = (1, -1, *([1] * (x.dim() - 2)))
        if bias is not None:
            total = total + bias.to(torch.float64).reshape(view)
        multiplier = x_scale.float() * w_scale.float() / y_scale.float()
        multiplier = multiplier.reshape(view) if multiplier.numel() > 1 else multiplier.reshape(())
        return _requantize(total, multiplier, y_zero)

    return kernel


@op("QLinearMatMul")
def qlinear_matmul(_node: Node) -> Kernel:
    """8-bit matrix product with requantization; A per tensor or per row, B per tensor or per column."""

    def kernel(
        a: Tensor,
        a_scale: Tensor,
        a_zero: Tensor,
        b: Tensor,
        b_scale: Tensor,
        b_zero: Tensor,
        y_scale: Tensor,
        y_zero: Tensor,
    ) -> Tensor:
        total = torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1))
        rows = a_scale.float().reshape(-1, 1) if a_scale.numel() > 1 and a_scale.dim() == 1 else a_scale.float()
        columns = b_scale.float().reshape(1, -1) if b_scale.numel() > 1 and b_scale.dim() == 1 else b_scale.float()
        multiplier = rows * columns / y_scale.float()
        return _requantize(total, multiplier.reshape(()) if multiplier.numel() == 1 else multiplier, y_zero)

    return kernel
