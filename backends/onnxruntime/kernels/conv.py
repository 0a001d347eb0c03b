"""Convolutions: QLinearConv (channels first or last) and ConvInteger."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from zsq_deploy.backends.onnxruntime.kernels.accumulate import ConvShape, Weights, convolve
from zsq_deploy.backends.onnxruntime.kernels.base import Array, Inputs, Kernel, NodeSpec, kernel, need, scalar
from zsq_deploy.errors import EngineError
from zsq_deploy.quant.integer import conv_padding

__all__ = ["ConvInteger", "QLinearConv", "add_bias"]


def geometry(node: NodeSpec, spatial: tuple[int, ...], kernel_shape: tuple[int, ...]) -> ConvShape:
    """Strides, dilations and padding of a convolution or pooling node for an input of size `spatial`."""
    rank = len(spatial)
    before, after = conv_padding(node.attrs, spatial, kernel_shape)
    return ConvShape(
        kernel_shape,
        tuple(node.attrs.get("strides", [1] * rank)),
        tuple(node.attrs.get("dilations", [1] * rank)),
        tuple(before),
        tuple(after),
    )


def add_bias(accumulator: torch.Tensor, bias: Array | None) -> torch.Tensor:
    """Add an int32 bias along the last axis (or a full matrix), wrapping as int32 does."""
    if bias is None:
        return accumulator
    return accumulator + torch.from_numpy(bias.astype(np.int32))


class _Conv(Kernel):
    """What all integer convolutions share: weights, geometry, accumulation."""

    def _prepare(self, w: Array, zero_point: Array | None) -> tuple[Weights, ...]:
        """One matrix a group: ``[M, C/group, kernel...]`` becomes ``[kernel..., C/group] x [M/group]``."""
        group = int(self.node.attrs.get("group", 1))
        zero = np.zeros(1, np.int32) if zero_point is None else zero_point.reshape(-1).astype(np.int32)
        centred = w.astype(np.int32) - zero.reshape(-1, *([1] * (w.ndim - 1)))
        ordered = np.moveaxis(centred, [0, 1], [-1, -2])
        rows = torch.from_numpy(np.ascontiguousarray(ordered.reshape(-1, w.shape[0])))
        width = w.shape[0] // group
        return tuple(Weights.prepare(rows[:, g * width : (g + 1) * width].contiguous(), 255) for g in range(group))

    def _accumulate(
        self, x: Array, x_zero: int, w: Array, w_zero: Array | None, *, indices: tuple[int, int]
    ) -> torch.Tensor:
        """The accumulator ``[N, out..., M]`` for ``[N, spatial..., C]`` codes.

        Saturating pairs concern u8 activations with s8 weights in fused convolutions; a depthwise one with one output a channel
        has a kernel of its own that sums exactly, and so does ConvInteger.
        """
        groups: tuple[Weights, ...] = self.fixed("weights", indices, lambda: self._prepare(w, w_zero))
        shape = geometry(self.node, x.shape[1:-1], w.shape[2:])
        codes = torch.from_numpy(np.ascontiguousarray(x)).to(torch.float32)
        total = convolve(codes - x_zero if x_zero else codes, groups, shape)
        depthwise = w.shape[1] == 1 and w.shape[0] == len(groups)
        pairs = self.arithmetic.saturating_pairs and self.node.proto.op_type == "QLinearConv" and not depthwise
        if pairs and x.dtype == np.uint8 and w.dtype == np.int8:
            raw: tuple[Weights, ...] = self.fixed("raw", indices, lambda: self._prepare(w, None))
            total += convolve(codes, raw, shape, pad_value=x_zero, saturation=True)
        return total


@kernel("QLinearConv", "com.microsoft.QLinearConv")
class QLinearConv(_Conv):
    """``y = sat(rint(f(f(acc) * m)) + zy)`` with ``acc = bias + sum (qx - zx) * (qw - zw)`` in int32.

    ``m = f(f(sx * sw[c]) / sy)``: two float32 roundings, the division last. Padding counts as the zero point. A clamp that
    was fused into the node (ReLU) needs no arithmetic: the output's range does it.
    Attribute ``channels_last``: activations are ``[N, spatial..., C]``; weights stay ``[M, C/group, kernel...]``.
    """

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        x, w = need(inputs, 0, node), need(inputs, 3, node)
        x_zero = int(scalar(inputs[2], "zero point of the input", node))
        y_zero = int(scalar(inputs[7], "zero point of the output", node))
        last = bool(node.attrs.get("channels_last", 0))
        if x.ndim - 2 not in (1, 2, 3):
            raise EngineError(
                f"{node.name} has {x.ndim - 2} spatial axes", where=node.proto.name, remedy="use 1 to 3 spatial axes"
            )
        accumulator = self._accumulate(x if last else np.moveaxis(x, 1, -1), x_zero, w, inputs[5], indices=(3, 5))
        accumulator = add_bias(accumulator, inputs[8] if len(inputs) > 8 else None)
        multiplier = self.fixed(
            "multiplier",
            (1, 4, 6),
            lambda: self.arithmetic.multiplier(
                scalar(inputs[1], "scale of the input", node),
                need(inputs, 4, node).reshape(-1),
                scalar(inputs[6], "scale of the output", node),
            ),
        )
        y = self.arithmetic.requantize(accumulator, multiplier, y_zero, x.dtype)
        return [y if last else np.ascontiguousarray(np.moveaxis(y, -1, 1))]


@kernel("ConvInteger")
class ConvInteger(_Conv):
    """``acc = sum (qx - zx) * (qw - zw)`` in int32, nothing else."""

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        x, w = need(inputs, 0, node), need(inputs, 1, node)
        zero: Any = inputs[2] if len(inputs) > 2 else None
        w_zero = inputs[3] if len(inputs) > 3 else None
        total = self._accumulate(
            np.moveaxis(x, 1, -1), int(scalar(zero, "zero point of the input", node)), w, w_zero, indices=(1, 3)
        )
        return [np.ascontiguousarray(np.moveaxis(total.numpy(), -1, 1))]
