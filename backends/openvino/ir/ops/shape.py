"""Shapes: asking for them, changing them, and moving elements around."""

from __future__ import annotations

import numpy as np

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, element_type, translates

__all__: list[str] = []


@translates("Reshape")
def reshape(op: Op) -> None:
    """New shape; with `special_zero` a 0 keeps a size."""
    wanted = op.constant(1)
    literal = not op.attrs.get("special_zero", False) and wanted is not None and bool((wanted == 0).any())
    extra = {"allowzero": 1} if literal else {}
    op.emit("Reshape", [op.input(0), op.input_as(1, "i64")], **extra)


@translates("Squeeze", "Unsqueeze")
def squeeze(op: Op) -> None:
    """Removes or inserts axes of size one."""
    if not op.has(1):
        op.emit(op.kind, [op.input(0)])
        return
    axes = op.constant(1)
    if axes is not None:
        op.emit(op.kind, [op.input(0), op.whole("axes", [int(axis) for axis in axes.reshape(-1)])])
        return
    op.emit(op.kind, [op.input(0), op.step("Reshape", [op.input_as(1, "i64"), op.whole("flat", [-1])])])


@translates("Transpose")
def transpose(op: Op) -> None:
    """Permutes axes; an empty order reverses them."""
    order = op.ints(1) if op.has(1) else []
    op.emit("Transpose", [op.input(0)], perm=order or list(reversed(range(op.rank(0)))))


@translates("Concat")
def concat(op: Op) -> None:
    """Joins tensors along an axis."""
    op.emit("Concat", [op.input(index) for index in range(op.inputs)], axis=int(op.attrs["axis"]))


@translates("Split")
def split(op: Op) -> None:
    """Cuts along an axis into equal parts."""
    op.emit("Split", [op.input(0)], axis=op.ints(1)[0], num_outputs=op.outputs)


@translates("VariadicSplit")
def variadic_split(op: Op) -> None:
    """Cuts along an axis by given lengths, one of which may be left open."""
    axis = op.ints(1)[0]
    lengths = op.ints(2)
    if -1 in lengths:
        size = op.shape(0)[axis]
        if size is None:
            raise UnsupportedFormError("an open length along a size that is open")
        lengths = [size - sum(item for item in lengths if item != -1) if item == -1 else item for item in lengths]
    op.emit("Split", [op.input(0), op.whole("lengths", lengths)], axis=axis)


@translates("ShapeOf")
def shape_of(op: Op) -> None:
    """The shape of a tensor."""
    if op.result_type == "i64":
        op.emit("Shape", [op.input(0)])
    else:
        op.emit("Cast", [op.step("Shape", [op.input(0)])], to=element_type(op.result_type))


@translates("Tile")
def tile(op: Op) -> None:
    """Repeats along every axis."""
    repeats = op.constant(1)
    value, rank = op.input(0), op.rank(0)
    if repeats is None:
        count = op.shape(1)[0]
        if count is None or count < rank:
            raise UnsupportedFormError("computed repeats of another rank")
        if count > rank:
            value = op.step("Unsqueeze", [value, op.whole("axes", range(count - rank))])
        op.emit("Tile", [value, op.input_as(1, "i64")])
        return
    times = [int(item) for item in repeats.reshape(-1)]
    if len(times) > rank:
        value = op.step("Unsqueeze", [value, op.whole("axes", range(len(times) - rank))])
    op.emit("Tile", [value, op.whole("repeats", [1] * (rank - len(times)) + times)])


@translates("Broadcast")
def broadcast(op: Op) -> None:
    """Copies along axes until a shape is reached."""
    mode = str(op.attrs.get("mode", "numpy")).lower()
    value = op.input(0)
    if mode == "explicit":
        places, rank = op.ints(2), op.shape(1)[0]
        if rank is None:
            raise UnsupportedFormError("explicit axes for a rank that is open")
        missing = [axis for axis in range(rank) if axis not in places]
        if missing:
            value = op.step("Unsqueeze", [value, op.whole("axes", missing)])
    elif mode == "pdpd":
        raise UnsupportedFormError("broadcasting 'pdpd'")
    op.emit("Expand", [value, op.input_as(1, "i64")])


_PAD = {"constant": "constant", "edge": "edge", "reflect": "reflect"}


@translates("Pad")
def pad(op: Op) -> None:
    """Pads every axis with a constant, with the edge, or by reflection."""
    mode = str(op.attrs.get("pad_mode", "constant")).lower()
    if mode not in _PAD:
        raise UnsupportedFormError(f"padding mode {mode!r}")
    begin, end = op.constant(1), op.constant(2)
    if begin is not None and end is not None:
        pads = op.whole("pads", [int(item) for item in (*begin.reshape(-1), *end.reshape(-1))])
    else:
        pads = op.step("Concat", [op.input_as(1, "i64"), op.input_as(2, "i64")], axis=0)
    inputs = [op.input(0), pads]
    if mode == "constant" and op.has(3):
        inputs.append(op.input(3))
    op.emit("Pad", inputs, mode=_PAD[mode])


@translates("DepthToSpace")
def depth_to_space(op: Op) -> None:
    """Blocks of channels become blocks of pixels."""
    mode = "DCR" if str(op.attrs.get("mode", "blocks_first")).lower() == "blocks_first" else "CRD"
    op.emit("DepthToSpace", [op.input(0)], blocksize=int(op.attrs.get("block_size", 1)), mode=mode)


@translates("SpaceToDepth")
def space_to_depth(op: Op) -> None:
    """Blocks of pixels become blocks of channels, the block's place first or last."""
    block = int(op.attrs.get("block_size", 1))
    if str(op.attrs.get("mode", "blocks_first")).lower() == "blocks_first":
        op.emit("SpaceToDepth", [op.input(0)], blocksize=block)
        return
    channels = op.shape(0)[1]
    if channels is None:
        raise UnsupportedFormError("an open number of channels")
    moved = op.step("SpaceToDepth", [op.input(0)], blocksize=block)
    order = np.arange(channels * block**2).reshape(block**2, channels).T.reshape(-1)
    op.emit("Gather", [moved, op.whole("order", [int(place) for place in order])], axis=1)


@translates("ShuffleChannels")
def shuffle_channels(op: Op) -> None:
    """Deals the channels of every group out in turn."""
    axis, groups = int(op.attrs.get("axis", 1)) % op.rank(0), int(op.attrs.get("group", 1))
    channels = op.shape(0)[axis]
    if channels is None:
        raise UnsupportedFormError("an open number of channels")
    order = np.arange(channels).reshape(groups, channels // groups).T.reshape(-1)
    op.emit("Gather", [op.input(0), op.whole("order", [int(place) for place in order])], axis=axis)


@translates("Reverse")
def reverse(op: Op) -> None:
    """The elements along some axes in the opposite order."""
    axes = (
        op.ints(1)
        if str(op.attrs.get("mode", "index")).lower() == "index"
        else [int(i) for i in np.flatnonzero(op.numbers(1))]
    )
    count = len(axes)
    far = [np.iinfo(np.int64).min] * count
    op.emit(
        "Slice",
        [
            op.input(0),
            op.whole("from", [-1] * count),
            op.whole("to", far),
            op.whole("axes", axes),
            op.whole("back", [-1] * count),
        ],
    )


@translates("Roll")
def roll(op: Op) -> None:
    """Moves the elements along axes in a circle."""
    shifts, axes = op.ints(1), op.ints(2)
    if len(shifts) == 1:
        shifts = shifts * len(axes)
    value = op.input(0)
    for number, (shift, axis) in enumerate(zip(shifts, axes, strict=True)):
        size = op.shape(0)[axis]
        if size is None:
            raise UnsupportedFormError("rolling along a size that is open")
        cut = -shift % size
        ends = [(cut, size), (0, cut)]
        parts = [
            op.step(
                "Slice",
                [
                    value,
                    op.whole(f"from{number}{k}", [a]),
                    op.whole(f"to{number}{k}", [b]),
                    op.whole(f"axis{number}", [axis]),
                ],
            )
            for k, (a, b) in enumerate(ends)
        ]
        value = op.step("Concat", parts, axis=axis)
    op.emit("Identity", [value])
