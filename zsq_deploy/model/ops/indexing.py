"""Reading and writing by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.model.ops.registry import Kernel, Node, op

__all__: list[str] = []


def _positive(index: Tensor, size: int) -> Tensor:
    """Indices that count from the end made to count from the start."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


@op("Gather")
def gather(node: Node) -> Kernel:
    """Slices along an axis by index; a constant scalar index is a view."""
    axis = int(node.get("axis", 0))
    constant = node.constant(1)
    if constant is not None and constant.size == 1:
        place, rank = int(constant.reshape(())), constant.ndim

        def select(x: Tensor, _index: Tensor) -> Tensor:
            found = x.select(axis, place)
            for _ in range(rank):
                found = found.unsqueeze(axis if axis >= 0 else axis + x.dim())
            return found

        return select

    def kernel(x: Tensor, index: Tensor) -> Tensor:
        first = axis % x.dim()
        flat = _positive(index, x.shape[first]).reshape(-1)
        found = torch.index_select(x, first, flat.to(x.device))
        return found.reshape([*x.shape[:first], *index.shape, *x.shape[first + 1 :]])

    return kernel


@op("GatherElements")
def gather_elements(node: Node) -> Kernel:
    """Single elements along an axis by index."""
    axis = int(node.get("axis", 0))
    return lambda x, index: torch.gather(x, axis, _positive(index, x.shape[axis]))


def _tuples(index: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, ...]:
    """The last axis of an index tensor as a tuple for advanced indexing."""
    return tuple(_positive(index[..., axis], shape[axis]) for axis in range(index.shape[-1]))


@op("GatherND")
def gather_nd(node: Node) -> Kernel:
    """Elements or slices by index tuples, the first `batch_dims` axes in parallel."""
    batch_dims = int(node.get("batch_dims", 0))

    def kernel(x: Tensor, index: Tensor) -> Tensor:
        if batch_dims == 0:
            return x[_tuples(index, x.shape)]
        lead = x.shape[:batch_dims]
        flat, places = x.reshape(-1, *x.shape[batch_dims:]), index.reshape(-1, *index.shape[batch_dims:])
        number = torch.arange(flat.shape[0], device=x.device).reshape(-1, *([1] * (places.dim() - 2)))
        tuples = _tuples(places, flat.shape[1:])
        found = flat[(number.expand(places.shape[:-1]), *tuples)]
        return found.reshape([*lead, *found.shape[1:]])

    return kernel


_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("ScatterElements")
def scatter_elements(node: Node) -> Kernel:
    """Writes single elements along an axis by index, or combines them with what is there."""
    axis, how = int(node.get("axis", 0)), str(node.get("reduction", "none"))

    def kernel(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        places = _positive(index, x.shape[axis])
        if how == "none":
            return torch.scatter(x, axis, places, updates)
        return torch.scatter_reduce(x, axis, places, updates, _SCATTER[how], include_self=True)

    return kernel


@op("ScatterND")
def scatter_nd(node: Node) -> Kernel:
    """Writes elements or slices by index tuples, or combines them with what is there."""
    how = str(node.get("reduction", "none"))

    def kernel(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        tuples = _tuples(index, x.shape)
        if how == "none":
            return x.index_put(tuples, updates)
        if how == "add":
            return x.index_put(tuples, updates, accumulate=True)
        depth = index.shape[-1]
        flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=x.device)
        for axis, places in enumerate(tuples):
            flat = flat * x.shape[axis] + places
        inner = x.shape[depth:]
        rows = x.reshape(-1, int(np.prod(inner)) if inner else 1)
        changes = updates.reshape(-1, rows.shape[1])
        where = flat.reshape(-1, 1).expand(changes.shape)
        return torch.scatter_reduce(rows, 0, where, changes, _SCATTER[how], include_self=True).reshape(x.shape)

    return kernel


@op("OneHot", host=(1,))
def one_hot(node: Node) -> Kernel:
    """On and off values by class index; indices outside [-depth, depth - 1] are all off."""
    axis, read = int(node.get("axis", -1)), node.ints(1)

    def kernel(index: Tensor, depth_given: Tensor, values: Tensor) -> Tensor:
        depth = (read(depth_given) or [0])[0]
        index = index.to(torch.int64)
        places = torch.where(index < 0, index + depth, index).unsqueeze(axis)
        view = [1] * places.dim()
        view[axis] = depth
        hit = torch.arange(depth, device=index.device).reshape(view) == places
        return torch.where(hit, values[1], values[0])

    return kernel


@op("NonZero")
def non_zero(_node: Node) -> Kernel:
    """Positions of what is not zero, one row an axis."""
    return lambda x: torch.nonzero(x).transpose(0, 1).contiguous()


@op("Compress")
def compress(node: Node) -> Kernel:
    """Slices (or flat elements) where a condition holds."""
    axis = node.get("axis")

    def kernel(x: Tensor, condition: Tensor) -> Tensor:
        places = torch.nonzero(condition.reshape(-1)).reshape(-1).to(x.device)
        return torch.index_select(x.reshape(-1) if axis is None else x, 0 if axis is None else int(axis), places)

    return kernel


@op("Unique")
def unique(node: Node) -> Kernel:
    """Distinct elements or slices, sorted or in the order of their first place, with places, inverse and counts."""
    axis, ordered, outputs = node.get("axis"), bool(node.get("sorted", 1)), node.outputs

    def kernel(x: Tensor) -> Any:
        array = x.detach().cpu().numpy()
        values, first, inverse, counts = np.unique(
            array, return_index=True, return_inverse=True, return_counts=True, axis=axis
        )
        inverse = inverse.reshape(-1)
        along = 0 if axis is None else int(axis)
        if not ordered:
            order = np.argsort(first, kind="stable")
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            values, first, inverse, counts = np.take(values, order, along), first[order], rank[inverse], counts[order]
        if axis is None:
            picked = torch.index_select(x.reshape(-1), 0, torch.from_numpy(first).to(x.device))
        else:
            picked = torch.index_select(x, along, torch.from_numpy(first).to(x.device))
        numbers = (torch.from_numpy(np.asarray(part, np.int64)).to(x.device) for part in (first, inverse, counts))
        found = (picked, *numbers)
        return found[0] if outputs == 1 else found[:outputs]

    return kernel
