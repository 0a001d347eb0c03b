"""Channels that are all zero, added where ONNX Runtime's integer convolutions want round numbers of them.

On x86 the fast integer convolution needs input channels in fours and output channels in sixteens, and the depthwise one works on sixteen
channels at a time; everything else takes a path that copies pixel by pixel. A first layer of 3 -> 8 channels, padded to 4 -> 16, runs
at nearly twice the speed although it computes more. Zero weights and zero biases make the rewrite exact, also in integers: an added
channel holds the zero point, and its readers multiply it by zero.

Values that gain channels get new names (``<name>__wide``), because they no longer have the shape that the old name promises.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from zsq_deploy.backends.onnxruntime.editing import Editor
from zsq_deploy.model.graph import attributes

__all__ = ["widen"]

_IN, _OUT = 4, 16
_LARGEST = 64  # beyond this many channels the leftover of a round number is a small share
_MOST_PADDED_INPUTS = 16


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _kind(edit: Editor, node: onnx.NodeProto) -> str:
    """``dense``, ``depthwise`` or empty (not a two-dimensional convolution with constant weights, or grouped)."""
    if node.op_type != "Conv":
        return ""
    weight = edit.graph.constant(node.input[1])
    if weight is None or weight.ndim != 4:
        return ""
    if len(node.input) > 2 and node.input[2] and edit.graph.constant(node.input[2]) is None:
        return ""
    group = int(attributes(node).get("group", 1))
    if group == 1:
        return "dense"
    return "depthwise" if group == weight.shape[0] and weight.shape[1] == 1 else ""


@dataclass(frozen=True)
class _Step:
    """One convolution whose output gains channels."""

    conv: onnx.NodeProto
    passed: tuple[onnx.NodeProto, ...]  # activations between it and its readers
    readers: tuple[onnx.NodeProto, ...]


def _closure(edit: Editor, conv: onnx.NodeProto) -> list[_Step] | None:
    """Everything that has to change so that a convolution may give more channels; ``None`` if something else reads them."""
    weight = edit.graph.constant(conv.input[1])
    assert weight is not None
    value, passed = conv.output[0], []
    while True:
        reader = edit.sole_consumer(value)
        if reader is None or reader.op_type not in ("Relu", "Clip") or reader.input[0] != value:
            break
        passed.append(reader)
        value = reader.output[0]
    readers = tuple(edit.graph.consumers(value))
    if edit.graph.is_output(value) or not readers:
        return None
    steps = [_Step(conv, tuple(passed), readers)]
    for reader in readers:
        kind = _kind(edit, reader)
        if reader.input[0] != value or not kind or value in list(reader.input)[1:]:
            return None
        if kind == "depthwise":
            further = _closure(edit, reader)
            if further is None:
                return None
            steps.extend(further)
    return steps


def _rename(edit: Editor, value: str, nodes: list[onnx.NodeProto]) -> None:
    fresh = edit.fresh(f"{value}__wide")
    edit.aliases[fresh] = edit.aliases.get(value, value)
    for node in nodes:
        for slot, name in enumerate(node.input):
            if name == value:
                node.input[slot] = fresh
        for slot, name in enumerate(node.output):
            if name == value:
                node.output[slot] = fresh


def _pad_axis(edit: Editor, node: onnx.NodeProto, slot: int, axis: int, size: int) -> None:
    array = edit.graph.constant(node.input[slot])
    assert array is not None
    room = [(0, 0)] * array.ndim
    room[axis] = (0, size - array.shape[axis])
    node.input[slot] = edit.reshaped(node.input[slot], np.pad(array, room))


def _wider_outputs(edit: Editor) -> bool:
    for conv in edit.graph:
        if _kind(edit, conv) != "dense":
            continue
        weight = edit.graph.constant(conv.input[1])
        assert weight is not None
        outputs = weight.shape[0]
        if outputs % _OUT == 0 or outputs > _LARGEST:
            continue
        steps = _closure(edit, conv)
        if steps is None:
            continue
        feeds_depthwise = len(steps) > 1
        if weight.shape[2] * weight.shape[3] == 1 and not feeds_depthwise:
            continue
        wide = _up(outputs, _OUT)
        for step in steps:
            _pad_axis(edit, step.conv, 1, 0, wide)
            if len(step.conv.input) > 2 and step.conv.input[2]:
                _pad_axis(edit, step.conv, 2, 0, wide)
            if _kind_of_group(step.conv) > 1:
                kept = [one for one in step.conv.attribute if one.name != "group"]
                del step.conv.attribute[:]
                step.conv.attribute.extend([*kept, helper.make_attribute("group", wide)])
            for reader in step.readers:
                if _kind_of_group(reader) == 1:
                    _pad_axis(edit, reader, 1, 1, wide)
            chain = [step.conv, *step.passed]
            for node, following in zip(chain, [[one] for one in step.passed] + [list(step.readers)], strict=True):
                _rename(edit, node.output[0], [node, *following])
            edit.refresh()
        edit.log.append(f"{conv.name} gives {wide} channels instead of {outputs} (the added ones are zero)")
        return True
    return False


def _kind_of_group(node: onnx.NodeProto) -> int:
    return int(attributes(node).get("group", 1))


def _wider_inputs(edit: Editor) -> bool:
    for conv in edit.graph:
        if _kind(edit, conv) != "dense":
            continue
        weight = edit.graph.constant(conv.input[1])
        assert weight is not None
        inputs = weight.shape[1]
        if weight.shape[2] * weight.shape[3] == 1 or inputs % _IN == 0 or inputs > _MOST_PADDED_INPUTS:
            continue
        if weight.shape[0] % _OUT != 0:
            continue  # the fast path needs both
        wide = _up(inputs, _IN)
        value = conv.input[0]
        readers = [
            one
            for one in edit.graph.consumers(value)
            if _kind(edit, one) == "dense"
            and one.input[0] == value
            and (array := edit.graph.constant(one.input[1])) is not None
            and array.shape[2] * array.shape[3] > 1
            and array.shape[0] % _OUT == 0
        ]
        fresh = edit.fresh(f"{value}__wide")
        edit.aliases[fresh] = edit.aliases.get(value, value)
        pads = edit.add_initializer(f"{fresh}_pads", np.array([0, 0, 0, 0, 0, wide - inputs, 0, 0], np.int64))
        pad = helper.make_node("Pad", [value, pads], [fresh], name=edit.fresh(f"{conv.name}__widen"))
        for one in readers:
            _pad_axis(edit, one, 1, 1, wide)
            one.input[0] = fresh
        at = min(edit.index(one) for one in readers)
        edit.proto.graph.node.insert(at, pad)
        edit.log.append(f"{value!r} gets {wide - inputs} zero channel(s) in front of {conv.name}")
        return True
    return False


def widen(edit: Editor) -> None:
    """Apply both rewrites wherever they fit."""
    for rewrite in (_wider_outputs, _wider_inputs):
        while rewrite(edit):
            edit.refresh()
        edit.refresh()
