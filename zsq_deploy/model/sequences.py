"""Sequences of tensors, as torch's exporter writes ``chunk``, ``split`` and ``unbind``, become plain Split nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx

from zsq_deploy.model.editing import Net, is_default

if TYPE_CHECKING:
    from zsq_deploy.model.simplify import View

__all__ = ["split_instead_of_sequence", "unpack_sequences"]


def split_instead_of_sequence(net: Net, view: View, node: onnx.NodeProto) -> bool:
    """SplitToSequence whose parts are picked by constant places is one Split, which quantizers and runtimes know."""
    if not is_default(node, "SplitToSequence") or node.output[0] in net.output_names:
        return False
    readers = net.consumers().get(node.output[0], [])
    places = [net.constant(reader.input[1]) if is_default(reader, "SequenceAt") else None for reader in readers]
    shapes = view.shapes(node.input[0])
    if not readers or shapes is None or any(place is None for place in places):
        return False
    found = net.attributes(node)
    axis = int(found.get("axis", 0))
    sizes = {shape[axis] for shape in shapes}
    if len(sizes) != 1:
        return False
    size = sizes.pop()
    squeeze = False
    if len(node.input) > 1 and node.input[1]:
        given = net.constant(node.input[1])
        if given is None:
            return False
        if given.ndim:
            lengths = [int(length) for length in given]
        else:
            each = int(given)
            lengths = [min(each, size - start) for start in range(0, size, each)]
    else:
        lengths, squeeze = [1] * size, not found.get("keepdims", 1)
    parts = [net.fresh(f"{node.output[0]}.{index}") for index in range(len(lengths))]
    lengths_name = net.add_constant(f"{node.name}.split", np.asarray(lengths, np.int64))
    net.insert_before(node, net.new_node("Split", [node.input[0], lengths_name], parts, node.name, axis=axis))
    for reader, place in zip(readers, places, strict=True):
        assert place is not None
        part = parts[int(place.reshape(()))]
        output, name = reader.output[0], reader.name
        if squeeze:
            axes = net.add_constant(f"{name}.axes", np.asarray([axis], np.int64))
            reader.CopyFrom(onnx.helper.make_node("Squeeze", [part, axes], [output], name=name))
        else:
            reader.CopyFrom(onnx.helper.make_node("Identity", [part], [output], name=name))
    net.remove([node])
    return True


def unpack_sequences(net: Net, view: View) -> bool:
    """Apply :func:`split_instead_of_sequence` wherever it fits; whether anything changed."""
    changed = False
    for node in list(net.nodes):
        if net.holds(node) and split_instead_of_sequence(net, view, node):
            net.touch()
            changed = True
    return changed
