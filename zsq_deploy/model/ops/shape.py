"""Shapes: asking for them, changing them, and moving elements around."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.model.ops.registry import Kernel, Node, UnsupportedVariantError, op

__all__: list[str] = []


@op("Shape")
def shape(node: Node) -> Kernel:
    """The shape, or a part of it (opset 15), as int64 on the CPU."""
    start, end = int(node.get("start", 0)), node.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


@op("Size")
def size(_node: Node) -> Kernel:
    """Number of elements as int64 on the CPU."""
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)


@op("Reshape", host=(1,))
def reshape(node: Node) -> Kernel:
    """New shape: 0 keeps a size (unless `allowzero`), -1 is worked out."""
    allow_zero, read = bool(node.get("allowzero", 0)), node.ints(1)

    def kernel(x: Tensor, given: Tensor) -> Tensor:
        wanted = read(given)
        assert wanted is not None
        if allow_zero:
            if -1 in wanted:
                rest = math.prod(value for value in wanted if value != -1)
                wanted = [
                    x.numel() // rest if value == -1 and rest else (0 if value == -1 else value) for value in wanted
                ]
            return x.reshape(wanted)
        return x.reshape([x.shape[axis] if value == 0 else value for axis, value in enumerate(wanted)])

    return kernel


@op("Flatten")
def flatten(node: Node) -> Kernel:
    """Two axes: those before `axis`, and the rest."""
    axis = int(node.get("axis", 1))

    def kernel(x: Tensor) -> Tensor:
        first = axis + x.dim() if axis < 0 else axis
        return x.reshape(math.prod(x.shape[:first]), math.prod(x.shape[first:]))

    return kernel


@op("Squeeze", host=(1,))
def squeeze(node: Node) -> Kernel:
    """Removes axes of size one: the given ones or all."""
    read = node.ints(1)

    def kernel(x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = read(given)
        return torch.squeeze(x) if axes is None else torch.squeeze(x, tuple(axes))

    return kernel


@op("Unsqueeze", host=(1,))
def unsqueeze(node: Node) -> Kernel:
    """Inserts axes of size one; axes count in the output."""
    read = node.ints(1)

    def kernel(x: Tensor, given: Tensor) -> Tensor:
        axes = read(given) or []
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return kernel


@op("Transpose")
def transpose(node: Node) -> Kernel:
    """Permutes axes; reverses them by default."""
    order = node.get("perm")
    if order is None:
        return lambda x: x.permute(*reversed(range(x.dim())))
    fixed = [int(axis) for axis in order]
    return lambda x: x.permute(fixed)


@op("Concat")
def concat(node: Node) -> Kernel:
    """Joins tensors along an axis."""
    axis = int(node.get("axis"))
    return lambda *tensors: torch.cat(tensors, axis)


@op("Split", host=(1,))
def split(node: Node) -> Kernel:
    """Cuts along an axis: by given lengths, or into equal parts of which the last may be smaller (opset 18)."""
    axis, parts, read = int(node.get("axis", 0)), len(node.proto.output), node.ints(1)
    asked = node.get("num_outputs")

    def kernel(x: Tensor, given: Tensor | None = None) -> Any:
        lengths = read(given)
        if lengths is None:
            count = int(asked or parts)
            each = math.ceil(x.shape[axis] / count)
            lengths = [max(0, min(each, x.shape[axis] - index * each)) for index in range(count)]
        found = torch.split(x, lengths, axis)
        return found[0] if parts == 1 else found

    return kernel


@op("Slice", host=(1, 2, 3, 4))
def slice_(node: Node) -> Kernel:
    """Part of a tensor from starts to ends in steps, on some axes; negative steps go backwards."""
    starts, ends, axes, steps = (node.ints(index) for index in (1, 2, 3, 4))

    def kernel(x: Tensor, *given: Tensor) -> Tensor:
        first, last, along, stride = (
            read(given[index] if index < len(given) else None) for index, read in enumerate((starts, ends, axes, steps))
        )
        assert first is not None
        assert last is not None
        along = list(range(len(first))) if along is None else along
        stride = [1] * len(first) if stride is None else stride
        for begin, end, axis, step in zip(first, last, along, stride, strict=True):
            length = x.shape[axis]
            if step > 0:
                places = range(*slice(begin, end, step).indices(length))
                x = x.narrow(axis, 0, 0) if not places else _strided(x, axis, places)
            else:
                # the far end of a backward slice is "before the first": anything at or below -length - 1
                lower = -1 if end < -length else (end + length if end < 0 else min(end, length - 1))
                upper = max(0, begin + length) if begin < 0 else min(begin, length - 1)
                places = range(upper, lower, step)
                if not places:
                    x = x.narrow(axis, 0, 0)
                else:
                    back = range(places[-1], places[0] + 1, -step)
                    x = _strided(x, axis, back).flip(axis)
        return x

    return kernel


def _strided(x: Tensor, axis: int, places: range) -> Tensor:
    """The elements at an ascending range of places: a view."""
    if len(places) == x.shape[axis] and places.step == 1:
        return x
    index: list[slice] = [slice(None)] * x.dim()
    index[axis] = slice(places.start, places[-1] + 1, places.step)
    return x[tuple(index)]


@op("Expand", host=(1,))
def expand(node: Node) -> Kernel:
    """Two-way broadcast to a shape."""
    read = node.ints(1)

    def kernel(x: Tensor, given: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(x.shape, tuple(read(given) or ()))  # type: ignore[no-untyped-call]
        return x.expand(shape)

    return kernel


@op("Tile", host=(1,))
def tile(node: Node) -> Kernel:
    """Repeats along every axis."""
    read = node.ints(1)
    return lambda x, given: x.repeat(read(given) or [])


_PAD_MODES = ("constant", "reflect", "edge", "wrap")


@op("Pad", host=(1, 2, 3))
def pad(node: Node) -> Kernel:
    """Pads (or, with negative numbers, cuts) every axis with a constant, by reflection, with the edge, or around (opset 19)."""
    mode = str(node.get("mode", "constant"))
    if mode not in _PAD_MODES:
        raise UnsupportedVariantError(f"padding mode {mode!r}")
    pads, value, axes = node.ints(1), node.floats(2), node.ints(3)

    def kernel(
        x: Tensor, pads_given: Tensor, value_given: Tensor | None = None, axes_given: Tensor | None = None
    ) -> Tensor:
        numbers = pads(pads_given)
        assert numbers is not None
        along = axes(axes_given)
        along = list(range(x.dim())) if along is None else [axis % x.dim() for axis in along]
        half = len(numbers) // 2
        begin, end = [0] * x.dim(), [0] * x.dim()
        for place, axis in enumerate(along):
            begin[axis], end[axis] = numbers[place], numbers[half + place]
        if mode == "constant":
            fill = value(value_given)
            amount: Any = fill[0] if fill else 0.0
            if not x.is_floating_point():
                amount = bool(amount) if x.dtype is torch.bool else int(amount)
            order = [pad for axis in reversed(range(x.dim())) for pad in (begin[axis], end[axis])]
            return F.pad(x, order, value=amount)
        for axis in range(x.dim()):
            if begin[axis] or end[axis]:
                x = x.index_select(axis, _pad_index(x.shape[axis], begin[axis], end[axis], mode).to(x.device))
        return x

    return kernel


def _pad_index(length: int, begin: int, end: int, mode: str) -> Tensor:
    """Where each element of the padded axis comes from."""
    places = torch.arange(-begin, length + end)
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return torch.remainder(places, length)
    if length == 1:
        return torch.zeros_like(places)
    period = 2 * (length - 1)
    places = torch.remainder(places, period)
    return torch.where(places < length, places, period - places)


@op("DepthToSpace")
def depth_to_space(node: Node) -> Kernel:
    """Blocks of channels become blocks of pixels: depth-column-row (DCR) or column-row-depth (CRD) order."""
    block, crd = int(node.get("blocksize")), node.get("mode", "DCR") == "CRD"

    def kernel(x: Tensor) -> Tensor:
        if crd:
            return F.pixel_shuffle(x, block)
        n, c, h, w = x.shape
        parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(n, c // block**2, h * block, w * block)

    return kernel


@op("SpaceToDepth")
def space_to_depth(node: Node) -> Kernel:
    """Blocks of pixels become blocks of channels."""
    block = int(node.get("blocksize"))

    def kernel(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(n, c * block**2, h // block, w // block)

    return kernel


@op("Trilu", since=14, host=(1,))
def trilu(node: Node) -> Kernel:
    """Upper or lower triangle of matrices."""
    function = torch.triu if node.get("upper", 1) else torch.tril
    read = node.ints(1)
    return lambda x, given=None: function(x, (read(given) or [0])[0])


@op("ReverseSequence")
def reverse_sequence(node: Node) -> Kernel:
    """Reverses the first `length` steps of every sample."""
    time, batch = int(node.get("time_axis", 0)), int(node.get("batch_axis", 1))

    def kernel(x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[time], device=x.device).unsqueeze(0)
        count = lengths.to(x.device).unsqueeze(1)
        index = torch.where(steps < count, count - 1 - steps, steps)  # [batch, time]
        view = [1] * x.dim()
        view[batch], view[time] = x.shape[batch], x.shape[time]
        index = (index if batch < time else index.transpose(0, 1)).reshape(view)
        return torch.gather(x, time, index.expand(x.shape))

    return kernel


@op("CenterCropPad", since=18, host=(1,))
def center_crop_pad(node: Node) -> Kernel:
    """Cuts or zero-pads axes to a shape around their centre."""
    axes, read = node.get("axes"), node.ints(1)

    def kernel(x: Tensor, given: Tensor) -> Tensor:
        wanted = read(given) or []
        along = list(range(x.dim())) if axes is None else [int(axis) % x.dim() for axis in axes]
        for axis, target in zip(along, wanted, strict=True):
            size = x.shape[axis]
            if target < size:
                x = x.narrow(axis, (size - target) // 2, target)
            elif target > size:
                before = (target - size) // 2
                order = [0] * (2 * (x.dim() - 1 - axis)) + [before, target - size - before]
                x = F.pad(x, order)
        return x

    return kernel


@op("Col2Im", since=18, host=(1, 2))
def column_to_image(node: Node) -> Kernel:
    """Adds columns of blocks up into an image of any number of axes: the transpose of im2col."""
    image_read, block_read = node.ints(1), node.ints(2)
    strides, dilations, pads = node.get("strides"), node.get("dilations"), node.get("pads")

    def kernel(x: Tensor, image_given: Tensor, block_given: Tensor) -> Tensor:
        image, block = image_read(image_given) or [], block_read(block_given) or []
        rank = len(image)
        step = [int(s) for s in strides] if strides else [1] * rank
        spread = [int(d) for d in dilations] if dilations else [1] * rank
        begin = [int(p) for p in pads[:rank]] if pads else [0] * rank
        end = [int(p) for p in pads[rank:]] if pads else [0] * rank
        padded = [image[a] + begin[a] + end[a] for a in range(rank)]
        counts = [(padded[a] - spread[a] * (block[a] - 1) - 1) // step[a] + 1 for a in range(rank)]
        flat = torch.zeros((*block, *counts), dtype=torch.int64)
        for a in range(rank):
            place = (torch.arange(block[a]) * spread[a]).reshape(-1, 1) + torch.arange(counts[a]) * step[a]
            view = [1] * (2 * rank)
            view[a], view[rank + a] = block[a], counts[a]
            flat = flat * padded[a] + place.reshape(view)
        n = x.shape[0]
        channels = x.shape[1] // math.prod(block)
        total = x.new_zeros((n, channels, math.prod(padded)))
        total = total.index_add(2, flat.reshape(-1).to(x.device), x.reshape(n, channels, -1))
        y = total.reshape(n, channels, *padded)
        for a in range(rank):
            y = y.narrow(2 + a, begin[a], image[a])
        return y

    return kernel
