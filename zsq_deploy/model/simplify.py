"""Small rewrites that leave what a network computes alone: noise out, one spelling for the same thing.

Every rule looks at one node and its neighbours, knows the shapes from :mod:`zsq_deploy.model.shapes` and answers whether it
changed something. Batch normalization is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from zsq_deploy.model.editing import Net, is_default
from zsq_deploy.model.shapes import Probe

__all__ = ["View", "simplify"]

_BROADCAST = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul",
    "Or", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
_VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class View:
    """Shapes of values as several walks with different batch sizes saw them."""

    probes: Sequence[Probe]

    def shapes(self, value: str) -> tuple[tuple[int, ...], ...] | None:
        """The shape in every walk, or ``None`` unless all are fully known."""
        found = tuple(probe.known(value) for probe in self.probes)
        return None if any(item is None for item in found) else tuple(item for item in found if item is not None)

    def same(self, one: str, other: str) -> bool:
        """Whether two values have the same, fully known shape for every batch size."""
        shapes = self.shapes(one)
        return shapes is not None and shapes == self.shapes(other)

    def rank(self, value: str) -> int | None:
        """Number of dimensions."""
        shape = self.probes[0].shapes.get(value)
        return None if shape is None else len(shape)

    def dims(self, value: str) -> tuple[int, ...] | None:
        """The shape with -1 where a size differs between walks; ``None`` unless all are fully known."""
        shapes = self.shapes(value)
        if shapes is None or len({len(shape) for shape in shapes}) != 1:
            return None
        return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))

    def reshape_target(self, value: str) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        """The constant that makes Reshape produce this value at any batch size, if one constant can."""
        dims = self.dims(value)
        if dims is None or 0 in dims or dims.count(-1) > 1:
            return None
        return np.asarray(dims, np.int64)


Rule = Callable[[Net, View, onnx.NodeProto], bool]


def simplify(net: Net, look: Callable[[Net], View]) -> None:
    """Apply all rules until none finds anything more.

    Args:
        net: The graph; changed in place.
        look: Makes the shapes known for the graph as it is now.
    """
    for _ in range(50):  # every rule removes or merges nodes, so this ends long before
        view = look(net)
        changed = False
        for rule in _RULES:
            for node in list(net.nodes):
                if net.holds(node) and rule(net, view, node):
                    net.touch()
                    changed = True
        if not net.sweep() and not changed:
            return


def _single_reader(net: Net, value: str) -> onnx.NodeProto | None:
    """The only node that reads a value, if there is just one and the value is no output of the graph."""
    if value in net.output_names:
        return None
    readers = net.consumers().get(value, [])
    return readers[0] if len(readers) == 1 and list(readers[0].input).count(value) == 1 else None


def _no_op(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Nodes that hand on what they get."""
    if not node.input or not node.input[0]:
        return False
    source, target = node.input[0], node.output[0]
    if is_default(node, "Identity"):
        return net.bypass(node)
    if is_default(node, "Cast", "CastLike"):
        kinds = {probe.types.get(name) for probe in view.probes for name in (source, target)}
        return len(kinds) == 1 and None not in kinds and net.bypass(node)
    if is_default(node, "Concat", "Sum", "Max", "Min", "Mean") and len(node.input) == 1:
        return net.bypass(node)
    if is_default(node, *_VIEWS, "Expand", "Pad") and view.same(source, target):
        if is_default(node, "Pad"):
            pads = net.constant(node.input[1]) if len(node.input) > 1 else None
            if pads is None or np.any(pads):
                return False
        return net.bypass(node)
    if is_default(node, "Slice") and view.same(source, target):
        steps = net.constant(node.input[4]) if len(node.input) > 4 and node.input[4] else np.ones(1)
        return steps is not None and bool(np.all(steps == 1)) and net.bypass(node)
    if is_default(node, "Transpose"):
        permutation = net.attributes(node).get("perm")
        return permutation is not None and list(permutation) == list(range(len(permutation))) and net.bypass(node)
    return False


def _full_scatter(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Writing every row of a tensor, which is how exporters spell ``x += y``, hands on what is written."""
    if not is_default(node, "ScatterND") or net.attributes(node).get("reduction", "none") != "none":
        return False
    if not view.same(node.input[2], node.output[0]):
        return False
    for walk in view.probes:
        rows, shape = walk.data.get(node.input[1]), walk.known(node.output[0])
        if rows is None or not shape or rows.shape != (shape[0], 1) or not np.array_equal(rows[:, 0], range(shape[0])):
            return False
    updates, output, name = node.input[2], node.output[0], node.name
    node.CopyFrom(onnx.helper.make_node("Identity", [updates], [output], name=name))
    net.touch()
    return True


def _gather_of_all(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Gathering every element of a flat tensor in order, which is how exporters spell strided views, is a Reshape."""
    if not is_default(node, "Gather") or net.attributes(node).get("axis", 0) != 0 or view.rank(node.input[0]) != 1:
        return False
    for walk in view.probes:
        places, shape = walk.data.get(node.input[1]), walk.known(node.input[0])
        if (
            places is None
            or not shape
            or places.size != shape[0]
            or not np.array_equal(places.ravel(), range(shape[0]))
        ):
            return False
    target = view.reshape_target(node.output[0])
    if target is None:
        return False
    shape_name = net.add_constant(f"{node.name}.shape", target)
    source, output, name = node.input[0], node.output[0], node.name
    node.CopyFrom(onnx.helper.make_node("Reshape", [source, shape_name], [output], name=name))
    return True


def _view_of_view(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Two reshaping nodes in a row are one Reshape."""
    if not is_default(node, *_VIEWS):
        return False
    reader = _single_reader(net, node.output[0])
    if reader is None or not is_default(reader, *_VIEWS) or reader.input[0] != node.output[0]:
        return False
    target = view.reshape_target(reader.output[0])
    source = view.shapes(node.input[0])
    if target is None or source is None:
        return False
    shape = net.add_constant(f"{reader.name}.shape", target)
    output, name = reader.output[0], reader.name
    reader.CopyFrom(onnx.helper.make_node("Reshape", [node.input[0], shape], [output], name=name))
    net.remove([node])
    return True


def _transpose_of_transpose(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Two transpositions in a row are one."""
    del view
    if not is_default(node, "Transpose"):
        return False
    reader = _single_reader(net, node.output[0])
    if reader is None or not is_default(reader, "Transpose"):
        return False
    first, second = net.attributes(node).get("perm"), net.attributes(reader).get("perm")
    if first is None or second is None:
        return False
    output, name = reader.output[0], reader.name
    merged = [first[axis] for axis in second]
    reader.CopyFrom(onnx.helper.make_node("Transpose", [node.input[0]], [output], name=name, perm=merged))
    net.remove([node])
    return True


def _transpose_of_ones(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Unsqueeze, Transpose, Squeeze, as exporters spell a transposition of packed projections, is one Transpose."""
    del view
    if not is_default(node, "Unsqueeze") or len(node.input) < 2:
        return False
    middle = _single_reader(net, node.output[0])
    last = _single_reader(net, middle.output[0]) if middle is not None and is_default(middle, "Transpose") else None
    if middle is None or last is None or not is_default(last, "Squeeze") or len(last.input) < 2:
        return False
    added, dropped, permutation = net.constant(node.input[1]), net.constant(last.input[1]), None
    permutation = net.attributes(middle).get("perm")
    if added is None or dropped is None or permutation is None or added.size != 1 or dropped.size != 1:
        return False
    rank = len(permutation)
    new, gone = int(added.reshape(-1)[0]) % rank, int(dropped.reshape(-1)[0]) % rank
    if permutation[gone] != new:
        return False
    merged = [axis - (axis > new) for position, axis in enumerate(permutation) if position != gone]
    output, name = last.output[0], last.name
    last.CopyFrom(onnx.helper.make_node("Transpose", [node.input[0]], [output], name=name, perm=merged))
    net.remove([node, middle])
    return True


def _slice_of_slice(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Two slices in a row along different axes are one."""
    if not is_default(node, "Slice"):
        return False
    reader = _single_reader(net, node.output[0])
    rank = view.rank(node.input[0])
    if reader is None or not is_default(reader, "Slice") or reader.input[0] != node.output[0] or rank is None:
        return False
    merged: dict[int, tuple[int, int, int]] = {}
    for item in (node, reader):
        parts = [net.constant(name) if name else None for name in item.input[1:]]
        if len(parts) < 2 or any(part is None and name for part, name in zip(parts, item.input[1:], strict=True)):
            return False
        starts, ends, axes, steps = (*parts, None, None)[:4]
        assert starts is not None
        assert ends is not None
        axes = np.arange(len(starts)) if axes is None else axes
        steps = np.ones(len(starts)) if steps is None else steps
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            if int(axis) % rank in merged:
                return False
            merged[int(axis) % rank] = (int(start), int(end), int(step))
    axes_in_order = sorted(merged)
    starts_ends_steps = [[merged[axis][part] for axis in axes_in_order] for part in range(3)]
    names = [
        net.add_constant(f"{reader.name}.{part}", np.asarray(value, np.int64))
        for part, value in zip(
            ("starts", "ends", "axes", "steps"),
            (*starts_ends_steps[:2], axes_in_order, starts_ends_steps[2]),
            strict=True,
        )
    ]
    output, name = reader.output[0], reader.name
    reader.CopyFrom(onnx.helper.make_node("Slice", [node.input[0], *names], [output], name=name))
    net.remove([node])
    return True


def _pad_into_conv(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Zero padding in front of a convolution becomes the convolution's own padding."""
    if not is_default(node, "Pad") or net.attributes(node).get("mode", "constant") != "constant":
        return False
    conv = _single_reader(net, node.output[0])
    rank = view.rank(node.input[0])
    if conv is None or not is_default(conv, "Conv") or conv.input[0] != node.output[0] or rank is None or rank < 3:
        return False
    found = net.attributes(conv)
    pads = net.constant(node.input[1]) if len(node.input) > 1 else None
    value = net.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    axes = net.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else np.arange(rank)
    if pads is None or value is None or axes is None or np.any(value != 0) or np.any(pads < 0):
        return False
    if found.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    begin, end = [0] * rank, [0] * rank
    half = len(pads) // 2
    for position, axis in enumerate(axes):
        begin[int(axis)], end[int(axis)] = int(pads[position]), int(pads[position + half])
    if any(begin[:2]) or any(end[:2]):
        return False
    own = found.get("pads") or [0] * (2 * (rank - 2))
    merged = [a + b for a, b in zip(own, begin[2:] + end[2:], strict=True)]
    for attribute in list(conv.attribute):
        if attribute.name in ("pads", "auto_pad"):
            conv.attribute.remove(attribute)
    conv.attribute.append(onnx.helper.make_attribute("pads", merged))
    conv.input[0] = node.input[0]
    net.remove([node])
    return True


def _mean_to_pool(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """The mean over all positions of a feature map is GlobalAveragePool, which integer runtimes know."""
    if not is_default(node, "ReduceMean"):
        return False
    rank, found = view.rank(node.input[0]), net.attributes(node)
    axes = found.get("axes")
    if len(node.input) > 1 and node.input[1]:
        stored = net.constant(node.input[1])
        axes = None if stored is None else [int(axis) for axis in stored.reshape(-1)]
    if rank is None or rank < 4 or not axes or {axis % rank for axis in axes} != set(range(2, rank)):
        return False
    source, target, name = node.input[0], node.output[0], node.name
    if found.get("keepdims", 1):
        node.CopyFrom(onnx.helper.make_node("GlobalAveragePool", [source], [target], name=name))
        return True
    pooled = net.fresh(f"{target}.pooled")
    flat = net.new_node("Flatten", [pooled], [target], f"{name}/Flatten", axis=1)
    index = next(i for i, item in enumerate(net.nodes) if item is node)
    node.CopyFrom(onnx.helper.make_node("GlobalAveragePool", [source], [pooled], name=name))
    net.nodes.insert(index + 1, flat)
    return True


def _zero_bias(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """A convolution with a bias of zeros (exporters write them for convolutions without bias) has no bias."""
    del view
    if not is_default(node, "Conv", "ConvTranspose") or len(node.input) < 3 or not node.input[2]:
        return False
    bias = net.constant(node.input[2])
    if bias is None or np.any(bias != 0):
        return False
    del node.input[2:]
    return True


def _expand_before_broadcast(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """Expanding an operand that the next operator would broadcast by itself is not needed."""
    if not is_default(node, "Expand") or node.output[0] in net.output_names:
        return False
    readers = net.consumers().get(node.output[0], [])
    small = view.shapes(node.input[0])
    if small is None or not readers:
        return False
    for reader in readers:
        if not is_default(reader, *_BROADCAST):
            return False
        result = view.shapes(reader.output[0])
        others = [view.shapes(name) for name in reader.input if name and name != node.output[0]]
        if result is None or any(item is None for item in others):
            return False
        for walk, shape in enumerate(result):
            parts = [small[walk], *(item[walk] for item in others if item is not None)]
            if np.broadcast_shapes(*parts) != shape:
                return False
    net.redirect(node.output[0], node.input[0])
    net.remove([node])
    return True


_RULES: Sequence[Rule] = (
    _full_scatter,
    _gather_of_all,
    _no_op,
    _expand_before_broadcast,
    _view_of_view,
    _transpose_of_transpose,
    _transpose_of_ones,
    _slice_of_slice,
    _pad_into_conv,
    _mean_to_pool,
    _zero_bias,
)
