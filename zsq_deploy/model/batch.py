"""Networks that were exported for one batch size are made to take any.

Exporters write the batch size into the constants of Reshape, Expand and Resize. Where the batch sits in a tensor is followed
through the graph: a walk with the exported size gives every shape, and the batch axis of a Reshape's input tells which axis
of its output holds the batch. The result is only a proposal; the caller checks it by running it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from zsq_deploy.model.editing import Net, is_default
from zsq_deploy.model.shapes import Probe, probe

__all__ = ["PROBED", "reshape_batch_axis", "scales_for", "unfix_batch"]

#: Batch sizes that graphs are walked with. Three, so that "k times the batch" can be told from coincidence.
PROBED = (2, 3, 5)


def reshape_batch_axis(source: Sequence[int], axis: int, target: Sequence[int], batch: int) -> int | None:
    """The axis of a Reshape's output that holds the batch.

    The batch is the slowest index of `axis`; in row-major order it stays the slowest index of the output axis that starts
    after the same number of elements. Where the output has no axis that starts there, it has no batch axis.

    Args:
        source: Shape that goes in, at the exported batch size.
        axis: Its batch axis; its size is a multiple of `batch`.
        target: Shape that comes out, at the exported batch size.
        batch: The exported batch size.
    """
    before = int(np.prod(source[:axis], dtype=np.int64))
    for position, size in enumerate(target):
        if int(np.prod(target[:position], dtype=np.int64)) == before and size % batch == 0:
            return position
    return None


def scales_for(
    source: Sequence[Sequence[int]], target: Sequence[Sequence[int]]
) -> np.ndarray[tuple[int], np.dtype[np.float32]] | None:
    """Scales that make Resize produce the same sizes as its ``sizes`` input, for every batch size; ``None`` if none do."""
    scales = np.asarray([b / a for a, b in zip(source[0], target[0], strict=True)], np.float32)
    for shape, wanted in zip(source, target, strict=True):
        found = tuple(int(np.floor(np.float32(size) * scale)) for size, scale in zip(shape, scales, strict=True))
        if found != tuple(wanted):
            return None
    return scales


def unfix_batch(net: Net, fixed: Mapping[str, Sequence[int]], batch: int) -> None:
    """Rewrite the constants that hold the exported batch size, in place, as far as they are recognized.

    Args:
        net: Graph whose shape arithmetic was already computed at the exported batch size.
        fixed: Shapes of the inputs as exported; the first axis is the batch.
        batch: The exported batch size.
    """
    exported = probe(net.skeleton(), fixed, arrays=net.arrays())
    axes = {name: 0 for name, shape in fixed.items() if shape}
    made: list[str] = []
    for node in list(net.nodes):
        _rewrite(net, node, exported, axes, batch, made, next(iter(axes)))
        for name in node.output:
            axis = _follow(node, name, exported, axes, batch)
            if axis is not None:
                axes[name] = axis


def _rewrite(
    net: Net,
    node: onnx.NodeProto,
    exported: Probe,
    axes: Mapping[str, int],
    batch: int,
    made: list[str],
    first_input: str,
) -> None:
    source = exported.known(node.input[0]) if node.input else None
    if is_default(node, "Reshape") and node.input[0] in axes and source is not None:
        target = exported.known(node.output[0])
        if target is None or 0 in target:
            return
        axis = reshape_batch_axis(source, axes[node.input[0]], target, batch)
        if axis is not None:
            dims = [-1 if position == axis else size for position, size in enumerate(target)]
            node.input[1] = net.add_constant(f"{node.name}.shape", np.asarray(dims, np.int64))
    elif is_default(node, "Resize") and len(node.input) > 3 and node.input[3] and source is not None:
        target = exported.known(node.output[0])
        scales = scales_for([source], [target]) if target is not None else None
        if scales is not None and len(scales) == len(source):
            node.input[2] = net.add_constant(f"{node.name}.scales", scales)
            del node.input[3:]
            for attribute in list(node.attribute):
                if attribute.name == "keep_aspect_ratio_policy":
                    node.attribute.remove(attribute)
    elif is_default(node, "Concat"):
        _grow_constants(net, node, axes, batch, made, first_input)


def _grow_constants(
    net: Net,
    node: onnx.NodeProto,
    axes: Mapping[str, int],
    batch: int,
    made: list[str],
    first_input: str,
) -> None:
    """A constant beside batched tensors in Concat (a class token) is expanded to the batch."""
    along = net.attributes(node)["axis"]
    moving = {axes[name] for name in node.input if name in axes}
    if len(moving) != 1:
        return
    axis = moving.pop()
    for index, name in enumerate(node.input):
        value = net.constant(name)
        if value is None or name in axes or value.ndim <= axis or along % value.ndim == axis:
            continue
        rows = np.take(value, [0], axis=axis)
        if value.shape[axis] != batch or not np.array_equal(np.broadcast_to(rows, value.shape), value):
            continue
        if not made:
            size = net.fresh("batch_size")
            net.nodes.insert(0, net.new_node("Shape", [first_input], [size], "batch_size", start=0, end=1))
            made.append(size)
        parts = [
            net.add_constant(f"{node.name}.ones", np.asarray([1], np.int64)) if position != axis else made[0]
            for position in range(value.ndim)
        ]
        shape, grown = net.fresh(f"{name}.shape"), net.fresh(f"{name}.expanded")
        row = net.add_constant(f"{name}.row", rows)
        net.insert_before(
            node,
            net.new_node("Concat", parts, [shape], f"{node.name}/shape", axis=0),
            net.new_node("Expand", [row, shape], [grown], f"{node.name}/Expand"),
        )
        node.input[index] = grown


def _follow(node: onnx.NodeProto, name: str, exported: Probe, axes: Mapping[str, int], batch: int) -> int | None:
    """The batch axis of a node's output, from its inputs' batch axes; ``None`` where it has none or it is not known."""
    target = exported.known(name)
    moving = [value for value in node.input if value in axes]
    if target is None or not moving:
        return None
    first = moving[0]
    source, axis = exported.known(first), axes[first]
    if source is None:
        return None
    attribute = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if is_default(node, "Reshape", "Flatten"):
        return reshape_batch_axis(source, axis, target, batch)
    if is_default(node, "Transpose"):
        order = list(attribute.get("perm", range(len(source))[::-1]))
        return order.index(axis)
    if is_default(node, "Squeeze", "Unsqueeze"):
        changed = exported.data.get(node.input[1]) if len(node.input) > 1 else None
        if changed is None:
            return reshape_batch_axis(source, axis, target, batch)
        rank = max(len(source), len(target))
        positions = sorted(int(item) % rank for item in changed.reshape(-1))
        if is_default(node, "Squeeze"):
            return None if axis in positions else axis - sum(item < axis for item in positions)
        free = [position for position in range(rank) if position not in positions]
        return free[axis]
    if is_default(node, "Gather") and first == node.input[0]:
        along = attribute.get("axis", 0) % len(source)
        if along == axis:
            return None
        rank = len(exported.shapes.get(node.input[1], ()))
        return axis if axis < along else axis - 1 + rank
    if is_default(
        node, "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "ReduceL2", "ReduceProd"
    ):
        if len(target) == len(source):
            return axis if target[axis] == source[axis] else None
        return reshape_batch_axis(source, axis, target, batch)
    # Everything else lines its axes up with its widest input, from the right (broadcasting, convolutions, products).
    placed = {
        axes[value] + len(target) - len(shape) for value in moving if (shape := exported.known(value)) is not None
    }
    position = placed.pop() if len(placed) == 1 else -1
    return position if 0 <= position < len(target) and target[position] % batch == 0 else None
