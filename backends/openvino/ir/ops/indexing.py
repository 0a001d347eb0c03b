"""Slices, gathers, scatters, and tensors made of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, element_type, translates

__all__: list[str] = []

_FAR = int(np.iinfo(np.int64).max)
_NEAR = int(np.iinfo(np.int64).min)


@translates("Slice")
def slice_(op: Op) -> None:
    """Part of a tensor from starts to stops in steps, on some axes."""
    starts, stops, steps = (op.input_as(index, "i64") for index in (1, 2, 3))
    axes = op.input_as(4, "i64") if op.has(4) else op.whole("axes", range(op.shape(1)[0] or 0))
    op.emit("Slice", [op.input(0), starts, stops, axes, steps])


def _mask(op: Op, name: str, length: int) -> list[bool]:
    given = [bool(int(bit)) for bit in op.attrs.get(name) or []]
    return (given + [False] * length)[:length]


def _picked(op: Op, index: int, places: Sequence[int], free: Sequence[bool], ends: Sequence[int], hint: str) -> str:
    """Bounds for some entries of an input; entries that are free become the far end."""
    constant = op.constant(index)
    if constant is not None:
        flat = constant.reshape(-1)
        return op.whole(
            hint, [end if loose else int(flat[place]) for place, loose, end in zip(places, free, ends, strict=True)]
        )
    chosen = op.step("Gather", [op.input_as(index, "i64"), op.whole(f"{hint}_places", places)], axis=0)
    if not any(free):
        return chosen
    keep = op.number(f"{hint}_free", np.asarray(free, bool), bool)
    return op.step("Where", [keep, op.whole(f"{hint}_ends", ends), chosen])


@translates("StridedSlice")
def strided_slice(op: Op) -> None:
    """numpy's slicing: bounds and steps, axes that are taken out, put in, or passed over by an ellipsis."""
    count = op.shape(1)[0]
    if count is None:
        raise UnsupportedFormError("an open number of bounds")
    rank = op.rank(0)
    steps = op.ints(3) if op.has(3) else [1] * count
    new, shrink, ellipsis = (
        _mask(op, f"{name}_axis_mask" if name != "ellipsis" else "ellipsis_mask", count)
        for name in ("new", "shrink", "ellipsis")
    )
    no_begin, no_end = _mask(op, "begin_mask", count), _mask(op, "end_mask", count)
    passed = rank - sum(1 for k in range(count) if not new[k] and not ellipsis[k])
    axis, axes, places, inserted, removed, out = 0, [], [], [], [], 0
    for k in range(count):
        if ellipsis[k]:
            axis, out = axis + passed, out + passed
        elif new[k]:
            inserted.append(out)
            out += 1
        else:
            axes.append(axis)
            places.append(k)
            if shrink[k]:
                removed.append(axis)
            else:
                out += 1
            axis += 1
    value = op.input(0)
    if axes:
        value = _cut(op, value, axes, places, steps, (no_begin, no_end, shrink))
    if removed:
        value = op.step("Squeeze", [value, op.whole("removed", removed)])
    if inserted:
        value = op.step("Unsqueeze", [value, op.whole("inserted", inserted)])
    op.emit("Identity", [value])


def _cut(
    op: Op,
    value: str,
    axes: list[int],
    places: list[int],
    steps: list[int],
    masks: tuple[list[bool], list[bool], list[bool]],
) -> str:
    no_begin, no_end, shrink = masks
    stride = [1 if shrink[k] else steps[k] for k in places]
    begin = _picked(
        op, 1, places, [no_begin[k] and not shrink[k] for k in places], [0 if s > 0 else _FAR for s in stride], "begin"
    )
    far = [_FAR if s > 0 else _NEAR for s in stride]
    if any(shrink[k] for k in places):
        # one element: it ends behind its begin; at -1 that is the end of the axis
        first = op.constant(1)
        if first is None:
            one = op.step("Add", [begin, op.whole("one", [1] * len(places))])
            last = op.step("Equal", [one, op.whole("zero", [0] * len(places))])
            single = op.step("Where", [last, op.whole("beyond", [_FAR] * len(places)), one])
            other = _picked(op, 2, places, [no_end[k] for k in places], far, "end")
            end = op.step(
                "Where", [op.number("single", np.asarray([shrink[k] for k in places], bool), bool), single, other]
            )
        else:
            starts, stops = [int(item) for item in first.reshape(-1)], op.constant(2)
            if stops is None and not all(shrink[k] for k in places):
                raise UnsupportedFormError("computed ends beside axes that are taken out")
            ends = [] if stops is None else [int(item) for item in stops.reshape(-1)]
            end = op.whole(
                "end",
                [
                    (starts[k] + 1 or _FAR) if shrink[k] else far[place] if no_end[k] else ends[k]
                    for place, k in enumerate(places)
                ],
            )
    else:
        end = _picked(op, 2, places, [no_end[k] for k in places], far, "end")
    return op.step("Slice", [value, begin, end, op.whole("axes", axes), op.whole("steps", stride)])


@translates("Gather")
def gather(op: Op) -> None:
    """Slices along an axis by index."""
    if int(op.attrs.get("batch_dims", 0)) % max(op.rank(1), 1):
        raise UnsupportedFormError("batch_dims")
    index = op.constant(1)
    places = op.number("indices", index, np.int64) if index is not None else op.input(1)
    if index is None and op.type(1) not in ("i32", "i64"):
        places = op.input_as(1, "i64")
    op.emit("Gather", [op.input(0), places], axis=op.ints(2)[0])


@translates("GatherElements")
def gather_elements(op: Op) -> None:
    """Single elements along an axis by index."""
    op.emit("GatherElements", [op.input(0), op.input_as(1, "i64")], axis=int(op.attrs["axis"]))


@translates("GatherND")
def gather_nd(op: Op) -> None:
    """Elements or slices by index tuples."""
    batch = int(op.attrs.get("batch_dims", 0))
    if batch > 1 and op.version == "opset5":
        raise UnsupportedFormError("batch_dims of opset5")
    op.emit("GatherND", [op.input(0), op.input_as(1, "i64")], batch_dims=batch)


_REDUCTION = {"none": "none", "sum": "add", "prod": "mul", "min": "min", "max": "max"}


def _reduction(op: Op) -> dict[str, str]:
    how = str(op.attrs.get("reduction", "none")).lower()
    if how not in _REDUCTION or (how != "none" and not op.attrs.get("use_init_val", True)):
        raise UnsupportedFormError(f"reduction {how!r}")
    return {"reduction": _REDUCTION[how]}


@translates("ScatterElementsUpdate")
def scatter_elements(op: Op) -> None:
    """Writes single elements along an axis by index."""
    op.emit("ScatterElements", [op.input(0), op.input_as(1, "i64"), op.input(2)], axis=op.ints(3)[0], **_reduction(op))


@translates("ScatterNDUpdate")
def scatter_nd(op: Op) -> None:
    """Writes elements or slices by index tuples."""
    op.emit("ScatterND", [op.input(0), op.input_as(1, "i64"), op.input(2)], **_reduction(op))


@translates("ScatterUpdate")
def scatter(op: Op) -> None:
    """Writes slices along the first axis by index."""
    if op.ints(3)[0] % op.rank(0):
        raise UnsupportedFormError("an axis other than the first")
    places = op.step("Unsqueeze", [op.input_as(1, "i64"), op.whole("last", [-1])])
    op.emit("ScatterND", [op.input(0), places, op.input(2)])


@translates("OneHot")
def one_hot(op: Op) -> None:
    """On and off values by class index."""
    values = op.step("Concat", [op.step("Reshape", [op.input(k), op.whole("one", [1])]) for k in (3, 2)], axis=0)
    op.emit("OneHot", [op.input(0), op.input_as(1, "i64"), values], axis=int(op.attrs.get("axis", -1)))


@translates("NonZero")
def non_zero(op: Op) -> None:
    """Positions of what is not zero."""
    if op.result_type == "i64":
        op.emit("NonZero", [op.input(0)])
    else:
        op.emit("Cast", [op.step("NonZero", [op.input(0)])], to=element_type(op.result_type))


@translates("Range")
def range_(op: Op) -> None:
    """``start, start + step, ...`` below the end."""
    kind = op.result_type
    op.emit("Range", [op.input_as(index, kind) for index in range(3)])


@translates("Eye")
def eye(op: Op) -> None:
    """Ones on a diagonal."""
    rows, columns, shift = (op.ints(index)[0] for index in range(3))
    if op.has(3) and op.numbers(3).size:
        raise UnsupportedFormError("a batch of matrices")
    kind = onnx.helper.tensor_dtype_to_np_dtype(element_type(op.result_type))
    op.emit("Identity", [op.number("matrix", np.eye(rows, columns, shift), kind)])


@translates("ReverseSequence")
def reverse_sequence(op: Op) -> None:
    """Reverses the first steps of every sample."""
    batch, time = int(op.attrs["batch_axis"]), int(op.attrs["seq_axis"])
    op.emit("ReverseSequence", [op.input(0), op.input_as(1, "i64")], batch_axis=batch, time_axis=time)


@translates("GridSample")
def grid_sample(op: Op) -> None:
    """Samples at normalized positions."""
    mode = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}[str(op.attrs["mode"]).lower()]
    op.emit(
        "GridSample",
        [op.input(0), op.input(1)],
        mode=mode,
        padding_mode=str(op.attrs["padding_mode"]).lower(),
        align_corners=int(bool(op.attrs["align_corners"])),
    )
