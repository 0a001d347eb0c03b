"""Sequences of tensors, as exporters use them to split and stack, become plain operators.

``torch.chunk`` and ``unbind`` are exported as SplitToSequence with a SequenceAt for each part, ``torch.stack`` of a list as
SequenceConstruct and ConcatFromSequence. No integer runtime computes on sequences; Split, Gather and Concat say the same.
"""

from __future__ import annotations

import numpy as np
import onnx

from zsq_deploy.model.editing import Net, is_default
from zsq_deploy.model.simplify import View

__all__ = ["unpack_sequences"]


def unpack_sequences(net: Net, view: View) -> bool:
    """Rewrite what can be rewritten with the shapes that are known, in place; says whether anything changed."""
    changed = False
    for node in list(net.nodes):
        if (is_default(node, "SplitToSequence") and _split(net, view, node)) or (
            is_default(node, "SequenceConstruct") and _construct(net, view, node)
        ):
            changed = True
    return changed


def _index(view: View, name: str) -> int | None:
    """A constant index, as all walks see it."""
    found = {int(walk.data[name].reshape(-1)[0]) for walk in view.probes if name in walk.data}
    return found.pop() if len(found) == 1 and all(name in walk.data for walk in view.probes) else None


def _readers(net: Net, view: View, node: onnx.NodeProto, count: int) -> list[tuple[onnx.NodeProto, int]] | None:
    """The SequenceAt nodes that read a sequence, with their positions; ``None`` if anything else reads it too."""
    if node.output[0] in net.output_names:
        return None
    found = []
    for reader in net.consumers().get(node.output[0], []):
        position = _index(view, reader.input[1]) if is_default(reader, "SequenceAt") else None
        if position is None or not -count <= position < count:
            return None
        found.append((reader, position % count))
    return found


def _split(net: Net, view: View, node: onnx.NodeProto) -> bool:
    dims = view.dims(node.input[0])
    if dims is None:
        return False
    found = net.attributes(node)
    axis = int(found.get("axis", 0)) % len(dims)
    length = dims[axis]
    if length <= 0:
        return False
    single = len(node.input) < 2 or not node.input[1]
    if single:
        sizes = [1] * length
    else:
        given = [walk.data.get(node.input[1]) for walk in view.probes]
        first = given[0]
        if first is None or any(item is None or not np.array_equal(item, first) for item in given):
            return False
        if first.ndim:
            sizes = [int(size) for size in first]
        else:
            size = int(first)
            sizes = [min(size, length - start) for start in range(0, length, size)]
    readers = _readers(net, view, node, len(sizes))
    if readers is None:
        return False
    if single and not found.get("keepdims", 1):
        for reader, position in readers:
            index = net.add_constant(f"{reader.name}.index", np.asarray(position, np.int64))
            output, name = reader.output[0], reader.name
            reader.CopyFrom(onnx.helper.make_node("Gather", [node.input[0], index], [output], name=name, axis=axis))
        net.remove([node])
        return True
    outputs: dict[int, str] = {}
    for reader, position in readers:
        if position not in outputs:
            outputs[position] = reader.output[0]
            net.remove([reader])
        else:
            name = reader.name
            reader.CopyFrom(onnx.helper.make_node("Identity", [outputs[position]], [reader.output[0]], name=name))
    names = [outputs.get(position) or net.fresh(f"{node.output[0]}.part") for position in range(len(sizes))]
    split = net.add_constant(f"{node.name}.split", np.asarray(sizes, np.int64))
    source, name = node.input[0], node.name
    node.CopyFrom(onnx.helper.make_node("Split", [source, split], names, name=name, axis=axis))
    net.touch()
    return True


def _construct(net: Net, view: View, node: onnx.NodeProto) -> bool:
    if node.output[0] in net.output_names:
        return False
    readers = net.consumers().get(node.output[0], [])
    places = {id(reader): _index(view, reader.input[1]) for reader in readers if is_default(reader, "SequenceAt")}
    parts = list(node.input)
    for reader in readers:
        place = places.get(id(reader))
        if not is_default(reader, "ConcatFromSequence") and (place is None or not -len(parts) <= place < len(parts)):
            return False
    for reader in readers:
        output, name = reader.output[0], reader.name
        place = places.get(id(reader))
        if place is not None:
            reader.CopyFrom(onnx.helper.make_node("Identity", [parts[place]], [output], name=name))
            continue
        found = net.attributes(reader)
        axis, inputs = int(found["axis"]), parts
        if found.get("new_axis", 0):
            where = net.add_constant(f"{name}.axis", np.asarray([axis], np.int64))
            inputs = [net.fresh(f"{part}.stacked") for part in parts]
            net.insert_before(
                reader,
                *(
                    net.new_node("Unsqueeze", [part, where], [target], f"{name}/Unsqueeze")
                    for part, target in zip(parts, inputs, strict=True)
                ),
            )
        reader.CopyFrom(onnx.helper.make_node("Concat", inputs, [output], name=name, axis=axis))
    net.remove([node])
    return True
