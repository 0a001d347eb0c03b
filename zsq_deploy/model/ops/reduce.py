"""Reductions, positions of extremes, running sums and the k largest."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zsq_deploy.model.ops.registry import Kernel, Node, op
from zsq_deploy.model.ops.types import is_wide_unsigned

__all__: list[str] = []

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(torch.sum(x, axes, keepdim=keep), count, rounding_mode="trunc").to(x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _extreme(x: Tensor, axes: list[int], keep: bool, *, largest: bool) -> Tensor:
    if any(x.shape[axis] == 0 for axis in axes):
        shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        if x.is_floating_point():
            fill: float = -math.inf if largest else math.inf
        elif x.dtype is torch.bool:
            fill = not largest
        else:
            fill = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
        result = torch.full(shape, fill, dtype=x.dtype, device=x.device)
        return result if keep else result.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])
    return x.amax(axes, keepdim=keep) if largest else x.amin(axes, keepdim=keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        length: Tensor = torch.linalg.vector_norm(x, ord=2, dim=axes, keepdim=keep)
        return length
    return torch.sqrt(_sum((x * x).to(torch.float64), axes, keep)).to(x.dtype)


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.log(_sum(x, axes, keep))
    return torch.log(_sum(x, axes, keep).to(torch.float64)).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.logsumexp(x, axes, keepdim=keep)
    return torch.logsumexp(x.to(torch.float64), axes, keepdim=keep).to(x.dtype)


_REDUCE: dict[str, Reduction] = {
    "ReduceL1": lambda x, axes, keep: _sum(torch.abs(x), axes, keep),
    "ReduceL2": _l2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, largest=True),
    "ReduceMean": _mean,
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, largest=False),
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
}


@op(*_REDUCE, host=(1,))
def reduction(node: Node) -> Kernel:
    """Reductions over axes: an attribute before opset 18 (ReduceSum: 13), an input from then on; no axes means all or none."""
    function = _REDUCE[node.proto.op_type]
    keep = bool(node.get("keepdims", 1))
    nothing = bool(node.get("noop_with_empty_axes", 0))
    read = node.axes(1, since=13 if node.proto.op_type == "ReduceSum" else 18)

    def kernel(x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = read(given)
        if not axes:
            # without axes a reduction still applies its pointwise part (the square, the logarithm), to single elements
            if nothing:
                return function(x.unsqueeze(-1), [x.dim()], False)
            axes = list(range(x.dim()))
        axes = [axis % x.dim() if x.dim() else 0 for axis in axes]
        if x.dim() == 0:
            return function(x.reshape(1), [0], False)
        if is_wide_unsigned(x.dtype):
            return function(x.to(torch.int64), axes, keep).to(x.dtype)
        return function(x, axes, keep)

    return kernel


@op("ArgMax", "ArgMin")
def position_of_extreme(node: Node) -> Kernel:
    """Position of the first (or last) largest or smallest element along an axis."""
    axis, keep = int(node.get("axis", 0)), bool(node.get("keepdims", 1))
    last = bool(node.get("select_last_index", 0))
    find = torch.argmax if node.proto.op_type == "ArgMax" else torch.argmin

    def kernel(x: Tensor) -> Tensor:
        if x.dim() == 0:
            return torch.zeros((), dtype=torch.int64, device=x.device)
        # torch promises no particular place among equal values: ask for the first hit among booleans instead
        extreme = x.amax(axis, keepdim=True) if find is torch.argmax else x.amin(axis, keepdim=True)
        hit = x == extreme
        size = x.shape[axis]
        shape = [1] * x.dim()
        shape[axis] = size
        index = torch.arange(size, device=x.device).reshape(shape)
        if last:
            return torch.where(hit, index, -1).amax(axis, keepdim=keep)
        return torch.where(hit, index, size).amin(axis, keepdim=keep)

    return kernel


@op("CumSum", host=(1,))
def cumulative_sum(node: Node) -> Kernel:
    """Running sum along an axis; `exclusive` leaves out the element itself, `reverse` runs from the end."""
    exclusive, reverse = bool(node.get("exclusive", 0)), bool(node.get("reverse", 0))
    read = node.ints(1)

    def kernel(x: Tensor, axis_given: Tensor) -> Tensor:
        axis = (read(axis_given) or [0])[0]
        if reverse:
            x = x.flip(axis)
        y = torch.cumsum(x, axis, dtype=x.dtype)
        if exclusive:
            # shifted by one place, not y - x, which would not be exact
            y = torch.cat([torch.zeros_like(y.narrow(axis, 0, 1)), y.narrow(axis, 0, y.shape[axis] - 1)], axis)
        return y.flip(axis) if reverse else y

    return kernel


@op("TopK", host=(1,))
def top_k(node: Node) -> Kernel:
    """The k largest or smallest along an axis with their positions; equal values come in the order of their positions."""
    axis, largest = int(node.get("axis", -1)), bool(node.get("largest", 1))
    read = node.ints(1)

    def kernel(x: Tensor, k_given: Tensor) -> tuple[Tensor, Tensor]:
        k = (read(k_given) or [0])[0]
        wide = x.to(torch.int64) if is_wide_unsigned(x.dtype) else x
        values, index = torch.sort(wide, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, k).to(x.dtype), index.narrow(axis, 0, k)

    return kernel
