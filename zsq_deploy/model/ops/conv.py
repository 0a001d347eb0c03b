"""Convolutions in float arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.model.ops.registry import Kernel, Node, op
from zsq_deploy.model.ops.window import Window, torch_padding

__all__ = ["CONV", "convolution"]

#: By the rank of the weight.
CONV: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSE: dict[int, Callable[..., Tensor]] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def convolution(window: Window, group: int) -> Callable[..., Tensor]:
    """A function ``(x, w, bias=None) -> y`` for the window's geometry."""
    stride: Any = window.strides or 1
    dilation: Any = window.dilations or 1
    padding = window.static_symmetric
    if padding is not None:

        def simple(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
            return CONV[w.dim()](x, w, bias, stride, padding, dilation, group)

        return simple

    def padded(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        begin, end = window.padding(x.shape[2:], w.shape[2:])
        x = F.pad(x, torch_padding(begin, end))
        return CONV[w.dim()](x, w, bias, stride, 0, dilation, group)

    return padded


@op("Conv")
def conv(node: Node) -> Kernel:
    """Convolution (cross-correlation) over 1, 2 or 3 axes, with groups, dilation and any padding."""
    return convolution(Window.of(node), int(node.get("group", 1)))


@op("ConvTranspose")
def conv_transpose(node: Node) -> Kernel:
    """The transpose of a convolution; an explicit output shape or SAME padding decides how much is cut away."""
    window, group = Window.of(node), int(node.get("group", 1))
    wanted = node.get("output_shape")
    extra = tuple(int(value) for value in node.get("output_padding") or ())
    padding = window.static_symmetric
    stride: Any = window.strides or 1
    dilation: Any = window.dilations or 1
    if wanted is None and padding is not None:

        def simple(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
            return _TRANSPOSE[w.dim()](x, w, bias, stride, padding, extra or 0, group, dilation)

        return simple

    def general(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = x.dim() - 2
        strides, dilations = window.resolved(rank)
        more = extra or (0,) * rank
        begin, end = [], []
        for axis in range(rank):
            size, length = x.shape[2 + axis], w.shape[2 + axis]
            full = strides[axis] * (size - 1) + more[axis] + (length - 1) * dilations[axis] + 1
            if wanted is None and window.auto_pad == "NOTSET":
                begin.append(window.pads[axis])
                end.append(window.pads[rank + axis])
                continue
            target = int(wanted[-rank:][axis]) if wanted is not None else size * strides[axis]
            total = full - target
            small, large = total // 2, total - total // 2
            upper = window.auto_pad == "SAME_UPPER"
            begin.append(small if upper else large)
            end.append(large if upper else small)
        y = _TRANSPOSE[w.dim()](x, w, None, stride, 0, 0, group, dilation)
        # negative pads cut; output padding adds positions that only the bias reaches
        y = F.pad(y, torch_padding([-pad for pad in begin], [m - pad for m, pad in zip(more, end, strict=True)]))
        return y if bias is None else y + bias.reshape(1, -1, *([1] * rank))

    return general


@op("DeformConv", since=19)
def deform_conv(node: Node) -> Kernel:
    """Deformable convolution v2 in two dimensions (Dai et al. 2017; Zhu et al. 2019): sample, modulate, multiply."""
    window = Window.of(node)
    group, offset_group = int(node.get("group", 1)), int(node.get("offset_group", 1))

    def kernel(x: Tensor, w: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = w.shape[2:]
        strides, dilations = window.resolved(2)
        begin, _ = window.padding((height, width), (rows, columns))
        out_h, out_w = offset.shape[2:]
        taps = rows * columns
        shift = offset.reshape(batch, offset_group, taps, 2, out_h, out_w)
        # sampling positions in input pixels: [batch, offset_group, taps, out_h, out_w]
        tap_y = torch.arange(rows, device=x.device).repeat_interleave(columns) * dilations[0]
        tap_x = torch.arange(columns, device=x.device).repeat(rows) * dilations[1]
        base_y = torch.arange(out_h, device=x.device) * strides[0] - begin[0]
        base_x = torch.arange(out_w, device=x.device) * strides[1] - begin[1]
        y = shift[:, :, :, 0] + (tap_y.reshape(-1, 1, 1) + base_y.reshape(1, -1, 1)).to(x.dtype)
        z = shift[:, :, :, 1] + (tap_x.reshape(-1, 1, 1) + base_x.reshape(1, 1, -1)).to(x.dtype)
        per = channels // offset_group
        planes = x.reshape(batch, offset_group, per, height * width)
        sampled = _bilinear(planes, y.flatten(2), z.flatten(2), height, width)
        sampled = sampled.reshape(batch, offset_group, per, taps, out_h, out_w)
        if mask is not None:
            sampled = sampled * mask.reshape(batch, offset_group, 1, taps, out_h, out_w)
        columns_in = sampled.reshape(batch, group, channels // group * taps, out_h * out_w)
        weights = w.reshape(group, w.shape[0] // group, -1)
        result = torch.matmul(weights, columns_in).reshape(batch, w.shape[0], out_h, out_w)
        return result if bias is None else result + bias.reshape(1, -1, 1, 1)

    return kernel


def _bilinear(planes: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Values of flat planes [n, g, c, h*w] at positions [n, g, points] in pixels; zero outside."""
    total: Tensor | None = None
    top, left = torch.floor(y), torch.floor(x)
    for down in (0, 1):
        for right in (0, 1):
            row, column = top + down, left + right
            weight = (1 - torch.abs(y - row)) * (1 - torch.abs(x - column))
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            flat = row.clamp(0, height - 1).to(torch.int64) * width + column.clamp(0, width - 1).to(torch.int64)
            index = flat.unsqueeze(2).expand(-1, -1, planes.shape[2], -1)
            part = torch.gather(planes, 3, index) * (weight * inside).unsqueeze(2)
            total = part if total is None else total + part
    assert total is not None
    return total
