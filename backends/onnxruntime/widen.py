"""Channels that are all zero, added where ONNX Runtime's integer convolutions want round numbers of them.

On x86 the fast integer convolution needs input channels in fours and output channels in sixteens, and the depthwise one works on sixteen
channels at a time; everything else takes a path that copies pixel by pixel. A first layer of 3 -> 8 channels, padded to 4 -> 16, runs
at nearly twice the speed although it computes more.

The rewrite works on the quantized graph and is exact there: codes of added weights and biases are 0, so an added channel holds the zero
point, and its readers multiply that (minus the zero point) by 0. The engine gives the same integers as the graph it was made from,
which stays beside it as the description of what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from zsq_deploy.backends.onnxruntime.editing import Editor
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["could_widen", "widen"]

_IN, _OUT = 4, 16
_LARGEST = 64  # beyond this many channels the leftover of a round number is a small share
_MOST_PADDED_INPUTS = 16


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _codes(graph: Graph, value: str) -> str | None:
    """Name of the constant behind a weight or bias: itself, or what its DequantizeLinear reads."""
    if graph.constant(value) is not None:
        return value
    maker = graph.producer(value)
    if maker is not None and maker.op_type == "DequantizeLinear" and graph.constant(maker.input[0]) is not None:
        return str(maker.input[0])
    return None


def _shape(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...] | None:
    """Shape of a two-dimensional convolution's constant weights, or ``None``."""
    if node.op_type != "Conv":
        return None
    name = _codes(graph, node.input[1])
    array = graph.constant(name) if name else None
    return array.shape if array is not None and array.ndim == 4 else None


def _kind(graph: Graph, node: onnx.NodeProto) -> str:
    """``dense``, ``depthwise``, or empty for anything else."""
    shape = _shape(graph, node)
    if shape is None:
        return ""
    group = _group(node)
    if group == 1:
        return "dense"
    return "depthwise" if group == shape[0] and shape[1] == 1 else ""


def _group(node: onnx.NodeProto) -> int:
    return int(attributes(node).get("group", 1))


def could_widen(graph: Graph) -> bool:
    """Whether a (float or quantized) graph has convolutions that the rewrite might serve."""
    for node in graph:
        kind, shape = _kind(graph, node), _shape(graph, node)
        if shape is None or not kind:
            continue
        if kind == "depthwise" and shape[0] % _OUT and shape[0] <= _LARGEST:
            return True
        if kind == "dense" and shape[2] * shape[3] > 1:
            odd_inputs = shape[1] % _IN != 0 and shape[1] <= _MOST_PADDED_INPUTS
            odd_outputs = shape[0] % _OUT != 0 and shape[0] <= _LARGEST
            if odd_inputs or odd_outputs:
                return True
    return False


@dataclass(frozen=True)
class _Step:
    """One quantized convolution whose output gains channels, and the nodes that pass them on."""

    conv: onnx.NodeProto
    passed: tuple[onnx.NodeProto, ...]  # activations, QuantizeLinear, DequantizeLinear
    readers: tuple[onnx.NodeProto, ...]


def _quantized(graph: Graph, conv: onnx.NodeProto) -> bool:
    """Whether weights and bias are constant codes behind DequantizeLinear, and the input comes out of one."""
    makers = [graph.producer(name) for name in conv.input if name]
    return all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers) and all(
        _codes(graph, name) is not None for name in list(conv.input)[1:] if name
    )


def _closure(edit: Editor, conv: onnx.NodeProto) -> list[_Step] | None:
    """Everything that has to change so that a convolution may give more channels; ``None`` if something else reads them."""
    graph = edit.graph
    if not _quantized(graph, conv):
        return None
    value = conv.output[0]
    passed: list[onnx.NodeProto] = []
    while True:
        reader = edit.sole_consumer(value)
        if reader is None or reader.input[0] != value:
            break
        if reader.op_type not in ("Relu", "Clip", "QuantizeLinear", "DequantizeLinear"):
            break
        passed.append(reader)
        value = reader.output[0]
    if not passed or passed[-1].op_type != "DequantizeLinear":
        return None
    readers = tuple(graph.consumers(value))
    if graph.is_output(value) or not readers:
        return None
    steps = [_Step(conv, tuple(passed), readers)]
    for reader in readers:
        kind = _kind(graph, reader)
        if not kind or reader.input[0] != value or value in list(reader.input)[1:] or not _quantized(graph, reader):
            return None
        if kind == "depthwise":
            further = _closure(edit, reader)
            if further is None:
                return None
            steps.extend(further)
    return steps


def _pad_constant(edit: Editor, node: onnx.NodeProto, slot: int, axis: int, size: int, fill: float | None = 0) -> None:
    """Give a constant input more entries along an axis: `fill`, or the last entry again."""
    array = edit.graph.constant(node.input[slot])
    if array is None or array.ndim <= axis or array.size <= 1:
        return
    room = [(0, 0)] * array.ndim
    room[axis] = (0, size - array.shape[axis])
    wide = np.pad(array, room, mode="edge") if fill is None else np.pad(array, room, constant_values=fill)
    node.input[slot] = edit.add_initializer(f"{node.input[slot]}__wide", wide)


def _pad_channels(edit: Editor, dequantize: onnx.NodeProto, axis: int, size: int, *, own_scales: bool) -> None:
    """Pad codes with 0 along an axis; scales and zero points too, if they belong to that axis."""
    _pad_constant(edit, dequantize, 0, axis, size)
    if own_scales:
        _pad_constant(edit, dequantize, 1, 0, size, None)
        if len(dequantize.input) > 2 and dequantize.input[2]:
            _pad_constant(edit, dequantize, 2, 0, size)


def _wider_outputs(edit: Editor) -> bool:
    graph = edit.graph
    for conv in graph:
        shape = _shape(graph, conv)
        if shape is None or _kind(graph, conv) != "dense" or shape[0] % _OUT == 0 or shape[0] > _LARGEST:
            continue
        steps = _closure(edit, conv)
        if steps is None or (shape[2] * shape[3] == 1 and len(steps) == 1):
            continue  # 1x1 convolutions have a fast path for any number of channels
        wide = _up(shape[0], _OUT)
        for step in steps:
            for slot, name in enumerate(step.conv.input):
                maker = graph.producer(name) if slot and name else None
                if maker is not None:
                    _pad_channels(edit, maker, 0, wide, own_scales=True)
            if _group(step.conv) > 1:
                kept = [one for one in step.conv.attribute if one.name != "group"]
                del step.conv.attribute[:]
                step.conv.attribute.extend([*kept, helper.make_attribute("group", wide)])
            for reader in step.readers:
                maker = graph.producer(reader.input[1])
                if _group(reader) == 1 and maker is not None:
                    _pad_channels(edit, maker, 1, wide, own_scales=False)
            _rename_outputs(edit, [step.conv, *step.passed])
        edit.log.append(f"{conv.name} gives {wide} channels instead of {shape[0]} (the added ones are zero)")
        return True
    return False


def _rename_outputs(edit: Editor, nodes: list[onnx.NodeProto]) -> None:
    """New names for values that no longer have their old shape."""
    for node in nodes:
        old, fresh = node.output[0], edit.fresh(f"{node.output[0]}__wide")
        for other in edit.proto.graph.node:
            for slot, name in enumerate(other.input):
                if name == old:
                    other.input[slot] = fresh
        node.output[0] = fresh


def _wider_inputs(edit: Editor) -> bool:
    graph = edit.graph
    for conv in graph:
        shape = _shape(graph, conv)
        if shape is None or _kind(graph, conv) != "dense" or not _quantized(graph, conv):
            continue
        few = shape[1] % _IN != 0 and shape[1] <= _MOST_PADDED_INPUTS
        if shape[2] * shape[3] == 1 or not few or shape[0] % _OUT != 0:
            continue  # the fast path needs both
        source = graph.producer(conv.input[0])
        assert source is not None
        wide = _up(shape[1], _IN)
        codes = edit.fresh(f"{source.input[0]}__wide")
        pads = edit.add_initializer(f"{codes}_pads", np.array([0, 0, 0, 0, 0, wide - shape[1], 0, 0], np.int64))
        zero = [source.input[2]] if len(source.input) > 2 and source.input[2] else []
        pad = helper.make_node("Pad", [source.input[0], pads, *zero], [codes], name=edit.fresh(f"{conv.name}__widen"))
        value = edit.fresh(f"{source.output[0]}__wide")
        dequantize = helper.make_node(
            "DequantizeLinear", [codes, *list(source.input)[1:]], [value], name=edit.fresh(f"{source.name}__widen")
        )
        weights = graph.producer(conv.input[1])
        assert weights is not None
        _pad_channels(edit, weights, 1, wide, own_scales=False)
        conv.input[0] = value
        at = edit.index(conv)
        edit.proto.graph.node.insert(at, dequantize)
        edit.proto.graph.node.insert(at, pad)
        edit.log.append(f"{source.input[0]!r} gets {wide - shape[1]} zero channel(s) in front of {conv.name}")
        return True
    return False


def widen(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A quantized graph with zero channels where they help, and what was added; the graph that was given is not changed.

    Args:
        proto: A Q/DQ graph as :func:`~zsq_deploy.backends.onnxruntime.tidy.tidy` leaves it.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    edit = Editor(copy)
    for rewrite in (_wider_outputs, _wider_inputs):
        while rewrite(edit):
            edit.refresh()
        edit.refresh()
    used = {name for node in copy.graph.node for name in node.input}
    kept = [tensor for tensor in copy.graph.initializer if tensor.name in used]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy, tuple(edit.log)
