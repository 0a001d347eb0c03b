"""Pooling over windows, and over everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.model.ops.conv import CONV
from zsq_deploy.model.ops.registry import Kernel, Node, op
from zsq_deploy.model.ops.window import Window, torch_padding

__all__: list[str] = []

_MAX: dict[int, Callable[..., Any]] = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_AVERAGE: dict[int, Callable[..., Tensor]] = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def _completed(window: Window, x: Tensor) -> tuple[list[int], list[int], list[int], list[int]]:
    """Pads before and after, the output sizes, and the pads after that make the last window of a ceil-mode pool fit."""
    sizes = list(x.shape[2:])
    strides, dilations = window.resolved(len(sizes))
    begin, end = window.padding(sizes, window.kernel)
    counts = window.output_sizes(sizes, window.kernel, begin, end)
    full = [
        (count - 1) * strides[axis] + (window.kernel[axis] - 1) * dilations[axis] + 1 - sizes[axis] - begin[axis]
        for axis, count in enumerate(counts)
    ]
    return begin, end, counts, full


@op("MaxPool")
def max_pool(node: Node) -> Kernel:
    """Largest value of every window; optionally its flat position in the whole tensor."""
    window = Window.of(node)
    stride: Any = window.strides or 1
    dilation: Any = window.dilations or 1
    column_major = bool(node.get("storage_order", 0))
    padding = window.static_symmetric
    simple = (
        not window.ceil_mode
        and padding is not None
        and (
            padding == 0
            or (isinstance(padding, tuple) and all(2 * p <= k for p, k in zip(padding, window.kernel, strict=True)))
        )
    )

    if simple and not node.wants(1):

        def fast(x: Tensor) -> Tensor:
            if x.is_floating_point():
                return _MAX[x.dim()](x, window.kernel, stride, padding, dilation)  # type: ignore[no-any-return]
            return _MAX[x.dim()](x.to(torch.float64), window.kernel, stride, padding, dilation).to(x.dtype)  # type: ignore[no-any-return]

        return fast

    def general(x: Tensor) -> Any:
        begin, _, _, full = _completed(window, x)
        dtype = x.dtype
        work = x if x.is_floating_point() else x.to(torch.float64)
        padded = F.pad(work, torch_padding(begin, full), value=-math.inf)
        if not node_wants_index:
            return _MAX[x.dim()](padded, window.kernel, stride, 0, dilation).to(dtype)
        values, index = _MAX[x.dim()](padded, window.kernel, stride, 0, dilation, return_indices=True)
        return values.to(dtype), _positions(index, padded.shape[2:], begin, x, column_major)

    node_wants_index = node.wants(1)
    return general


def _positions(index: Tensor, padded: torch.Size, begin: list[int], x: Tensor, column_major: bool) -> Tensor:
    """Positions inside one padded plane as flat positions in the whole unpadded tensor."""
    places = []
    for axis in reversed(range(len(padded))):
        places.append(index % padded[axis] - begin[axis])
        index = torch.div(index, padded[axis], rounding_mode="floor")
    places.reverse()
    sizes = list(x.shape[2:])
    order = list(range(len(sizes)))
    flat = torch.zeros_like(index)
    for axis in reversed(order) if column_major else order:
        flat = flat * sizes[axis] + places[axis]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *([1] * len(sizes)))
    return flat + planes * math.prod(sizes)


def _window_sum(x: Tensor, window: Window, begin: list[int], full: list[int]) -> Tensor:
    """Sum over every window of a zero-padded input."""
    rank = x.dim() - 2
    padded = F.pad(x, torch_padding(begin, full)).reshape(
        -1, 1, *[a + b + c for a, b, c in zip(x.shape[2:], begin, full, strict=True)]
    )
    ones = torch.ones((1, 1, *window.kernel), dtype=x.dtype, device=x.device)
    strides, dilations = window.resolved(rank)
    total = CONV[rank + 2](padded, ones, None, strides, 0, dilations)
    return total.reshape(*x.shape[:2], *total.shape[2:])


@op("AveragePool")
def average_pool(node: Node) -> Kernel:
    """Mean of every window, with or without the padding; what ceil mode adds at the end is never counted."""
    window = Window.of(node)
    include = bool(node.get("count_include_pad", 0))
    padding = window.static_symmetric
    stride: Any = window.strides or 1
    if (
        not window.ceil_mode
        and all(dilation == 1 for dilation in window.dilations)
        and padding is not None
        and (
            padding == 0
            or (isinstance(padding, tuple) and all(2 * p <= k for p, k in zip(padding, window.kernel, strict=True)))
        )
    ):
        return lambda x: _AVERAGE[x.dim()](x, window.kernel, stride, padding, False, include)

    def general(x: Tensor) -> Tensor:
        begin, end, _, full = _completed(window, x)
        counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        if include:
            inside = [min(a, b) for a, b in zip(end, full, strict=True)]
            counted = F.pad(counted, torch_padding(begin, inside), value=1.0)
            rest = [a - b for a, b in zip(full, inside, strict=True)]
            count = _window_sum(counted, window, [0] * len(rest), rest)
        else:
            count = _window_sum(counted, window, begin, full)
        return _window_sum(x, window, begin, full) / count

    return general


@op("LpPool")
def lp_pool(node: Node) -> Kernel:
    """p-norm of every window."""
    window, order = Window.of(node), int(node.get("p", 2))

    def kernel(x: Tensor) -> Tensor:
        begin, _, _, full = _completed(window, x)
        return torch.pow(_window_sum(torch.pow(torch.abs(x), order), window, begin, full), 1.0 / order)

    return kernel


@op("GlobalAveragePool")
def global_average_pool(_node: Node) -> Kernel:
    """Mean over all positions."""
    return lambda x: x.mean(list(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(_node: Node) -> Kernel:
    """Maximum over all positions."""
    return lambda x: x.amax(list(range(2, x.dim())), keepdim=True)


@op("GlobalLpPool")
def global_lp_pool(node: Node) -> Kernel:
    """p-norm over all positions."""
    order = int(node.get("p", 2))
    return lambda x: torch.linalg.vector_norm(x, ord=order, dim=list(range(2, x.dim())), keepdim=True)


@op("MaxUnpool", host=(2,))
def max_unpool(node: Node) -> Kernel:
    """Puts pooled values back at their positions in a tensor of zeros.

    The positions were counted in the tensor that was pooled; a given output shape may be larger, then the rest stays zero.
    """
    window, read = Window.of(node), node.ints(2)

    def kernel(x: Tensor, index: Tensor, shape_given: Tensor | None = None) -> Tensor:
        strides, _ = window.resolved(x.dim() - 2)
        begin, end = window.padding(x.shape[2:], window.kernel)
        inferred = [
            (size - 1) * strides[axis] + window.kernel[axis] - begin[axis] - end[axis]
            for axis, size in enumerate(x.shape[2:])
        ]
        shape = [*x.shape[:2], *inferred]
        wanted = read(shape_given)
        flat = torch.zeros(math.prod(shape), dtype=x.dtype, device=x.device)
        y = flat.scatter(0, index.reshape(-1), x.reshape(-1)).reshape(shape)
        if wanted is None or wanted == shape:
            return y
        return F.pad(y, torch_padding([0] * len(inferred), [a - b for a, b in zip(wanted[2:], inferred, strict=True)]))

    return kernel


@op("MaxRoiPool")
def max_roi_pool(node: Node) -> Kernel:
    """Maximum over a grid of bins in every region (Girshick 2015): regions are rows of batch index, x1, y1, x2, y2."""
    rows, columns = (int(value) for value in node.get("pooled_shape"))
    scale = float(node.get("spatial_scale", 1.0))

    def kernel(x: Tensor, regions: Tensor) -> Tensor:
        height, width = x.shape[2:]
        found = []
        for region in regions.tolist():
            # which bin a border falls into depends on the last bit of the float32 product
            x1, y1, x2, y2 = (math.floor(float(np.float32(value) * np.float32(scale)) + 0.5) for value in region[1:])
            step_y, step_x = max(y2 - y1 + 1, 1) / rows, max(x2 - x1 + 1, 1) / columns
            plane = x[int(region[0])]
            bins = []
            for i in range(rows):
                top, bottom = _span(i, step_y, y1, height)
                for j in range(columns):
                    left, right = _span(j, step_x, x1, width)
                    cell = plane[:, top:bottom, left:right]
                    bins.append(cell.amax((1, 2)) if cell.numel() else plane.new_zeros(plane.shape[0]))
            found.append(torch.stack(bins, -1).reshape(-1, rows, columns))
        return torch.stack(found) if found else x.new_zeros((0, x.shape[1], rows, columns))

    return kernel


def _span(index: int, step: float, start: int, size: int) -> tuple[int, int]:
    return (
        min(max(math.floor(index * step) + start, 0), size),
        min(max(math.ceil((index + 1) * step) + start, 0), size),
    )
