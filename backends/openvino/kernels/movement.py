"""Operators that only move, repeat or compare values: nothing is rounded, so codes stay codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.lowered import Op

__all__ = ["MOVEMENTS"]

Array = npt.NDArray[Any]
Inputs = Sequence[Array | None]


def _given(inputs: Inputs, index: int) -> Array:
    array = inputs[index] if index < len(inputs) else None
    assert array is not None
    return array


def _list(inputs: Inputs, index: int) -> list[int]:
    return [int(value) for value in np.asarray(_given(inputs, index)).reshape(-1)]


def _reshape(op: Op, inputs: Inputs) -> list[Array]:
    x, shape = _given(inputs, 0), _list(inputs, 1)
    if op.flag("special_zero"):
        shape = [x.shape[place] if size == 0 else size for place, size in enumerate(shape)]
    return [x.reshape(shape)]


def _squeeze(_op: Op, inputs: Inputs) -> list[Array]:
    x = _given(inputs, 0)
    axes = _list(inputs, 1) if len(inputs) > 1 and inputs[1] is not None else None
    return [np.squeeze(x) if axes is None else np.squeeze(x, tuple(a for a in axes if x.shape[a] == 1))]


def _unsqueeze(_op: Op, inputs: Inputs) -> list[Array]:
    return [np.expand_dims(_given(inputs, 0), tuple(_list(inputs, 1)))]


def _transpose(_op: Op, inputs: Inputs) -> list[Array]:
    order = _list(inputs, 1)
    return [np.transpose(_given(inputs, 0), order or None)]


def _slice(_op: Op, inputs: Inputs) -> list[Array]:
    x = _given(inputs, 0)
    starts, stops, steps = (_list(inputs, place) for place in (1, 2, 3))
    axes = _list(inputs, 4) if len(inputs) > 4 and inputs[4] is not None else list(range(len(starts)))
    cut = [slice(None)] * x.ndim
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        whole = step < 0 and stop <= -(x.shape[axis] + 1)
        cut[axis] = slice(start, None if whole else stop, step)
    return [x[tuple(cut)]]


def _strided_slice(op: Op, inputs: Inputs) -> list[Array]:
    x = _given(inputs, 0)
    starts, stops = _list(inputs, 1), _list(inputs, 2)
    steps = _list(inputs, 3) if len(inputs) > 3 and inputs[3] is not None else [1] * len(starts)
    masks = {
        name: [*op.ints(name), *([0] * len(starts))]
        for name in ("begin_mask", "end_mask", "new_axis_mask", "shrink_axis_mask", "ellipsis_mask")
    }
    index: list[Any] = []
    for place, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
        if masks["ellipsis_mask"][place]:
            index.append(Ellipsis)
        elif masks["new_axis_mask"][place]:
            index.append(None)
        elif masks["shrink_axis_mask"][place]:
            index.append(start)
        else:
            first = None if masks["begin_mask"][place] else start
            last = None if masks["end_mask"][place] else stop
            index.append(slice(first, last, step))
    return [x[tuple(index)]]


def _pad(op: Op, inputs: Inputs) -> list[Array]:
    x, before, after = _given(inputs, 0), _list(inputs, 1), _list(inputs, 2)
    mode = op.attrs.get("pad_mode", "constant").lower()
    cut = tuple(slice(max(-b, 0), size - max(-a, 0)) for b, a, size in zip(before, after, x.shape, strict=True))
    widths = [(max(b, 0), max(a, 0)) for b, a in zip(before, after, strict=True)]
    if mode == "constant":
        fill = inputs[3] if len(inputs) > 3 else None
        value = 0 if fill is None else np.asarray(fill).reshape(-1)[0]
        return [np.pad(x[cut], widths, constant_values=value)]
    return [np.pad(x[cut], widths, mode={"edge": "edge", "reflect": "reflect", "symmetric": "symmetric"}[mode])]  # type: ignore[call-overload]


def _concat(op: Op, inputs: Inputs) -> list[Array]:
    return [np.concatenate([_given(inputs, place) for place in range(len(inputs))], int(op.number("axis")))]


def _split(op: Op, inputs: Inputs) -> list[Array]:
    x, axis = _given(inputs, 0), _list(inputs, 1)[0]
    return list(np.split(x, int(op.number("num_splits")), axis))


def _variadic_split(_op: Op, inputs: Inputs) -> list[Array]:
    x, axis, lengths = _given(inputs, 0), _list(inputs, 1)[0], _list(inputs, 2)
    rest = x.shape[axis] - sum(size for size in lengths if size >= 0)
    sizes = [rest if size < 0 else size for size in lengths]
    return list(np.split(x, np.cumsum(sizes)[:-1], axis))


def _gather(op: Op, inputs: Inputs) -> list[Array]:
    x, chosen, axis = _given(inputs, 0), _given(inputs, 1), _list(inputs, 2)[0]
    if int(op.number("batch_dims")):
        raise NotImplementedError
    return [np.take(x, chosen.astype(np.int64), axis)]


def _broadcast(_op: Op, inputs: Inputs) -> list[Array]:
    x, shape = _given(inputs, 0), _list(inputs, 1)
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape)))]


def _tile(_op: Op, inputs: Inputs) -> list[Array]:
    return [np.tile(_given(inputs, 0), _list(inputs, 1))]


def _shape_of(op: Op, inputs: Inputs) -> list[Array]:
    return [np.asarray(_given(inputs, 0).shape, np.int32 if op.precisions[0] == "i32" else np.int64)]


def _depth_to_space(op: Op, inputs: Inputs) -> list[Array]:
    x, block = _given(inputs, 0), int(op.number("block_size", 1))
    n, c, h, w = x.shape
    inner = c // (block * block)
    if op.attrs.get("mode", "blocks_first") == "blocks_first":
        y = x.reshape(n, block, block, inner, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, inner, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    return [y.reshape(n, inner, h * block, w * block)]


def _space_to_depth(op: Op, inputs: Inputs) -> list[Array]:
    x, block = _given(inputs, 0), int(op.number("block_size", 1))
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // block, block, w // block, block)
    order = (0, 3, 5, 1, 2, 4) if op.attrs.get("mode", "blocks_first") == "blocks_first" else (0, 1, 3, 5, 2, 4)
    return [y.transpose(order).reshape(n, c * block * block, h // block, w // block)]


def _shuffle(op: Op, inputs: Inputs) -> list[Array]:
    x, axis, group = _given(inputs, 0), int(op.number("axis", 1)), int(op.number("group", 1))
    axis %= x.ndim
    y = x.reshape(*x.shape[:axis], group, -1, *x.shape[axis + 1 :])
    return [np.swapaxes(y, axis, axis + 1).reshape(x.shape)]


def _identity(_op: Op, inputs: Inputs) -> list[Array]:
    return [_given(inputs, 0)]


MOVEMENTS: Mapping[str, Callable[[Op, Inputs], list[Array]]] = {
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Slice": _slice,
    "StridedSlice": _strided_slice,
    "Pad": _pad,
    "Concat": _concat,
    "Split": _split,
    "VariadicSplit": _variadic_split,
    "Gather": _gather,
    "Broadcast": _broadcast,
    "Tile": _tile,
    "ShapeOf": _shape_of,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "ShuffleChannels": _shuffle,
    "Identity": _identity,
    "Result": _identity,
}
"""Operator -> function of the operator and its inputs."""
