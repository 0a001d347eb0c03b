"""A transposed convolution as an ordinary one: ONNX Runtime has no integer kernel for the former.

With stride ``s`` the outputs fall into ``s * s`` phases: output ``s * q + r`` sees only the taps ``t`` with ``t = r + p (mod s)``, and those
meet the input at whole offsets around ``q``. So every phase is an ordinary convolution of the input at its own resolution; all of them
together are one convolution with ``s * s`` times the channels, whose outputs are then interleaved (depth to space). Taps that a phase
does not have are zero weights. The rewrite is exact; for kernels that the stride divides evenly it costs no extra work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from zsq_deploy.backends.onnxruntime.editing import Editor
from zsq_deploy.model.graph import attributes

__all__ = ["conv_transpose_as_conv", "phase_taps"]

Array = npt.NDArray[Any]

_MOST_EXTRA_WORK = 4.0


def phase_taps(kernel: int, stride: int, pad: int) -> tuple[int, int, dict[tuple[int, int], int]]:
    """Which tap meets which input, along one axis.

    Returns:
        Lowest and highest offset of an input from ``q``, and ``(phase, offset) -> tap``.
    """
    taps: dict[tuple[int, int], int] = {}
    for phase in range(stride):
        shift, first = divmod(phase + pad, stride)
        for number, tap in enumerate(range(first, kernel, stride)):
            taps[phase, shift - number] = tap
    offsets = [offset for _, offset in taps]
    return min(offsets), max(offsets), taps


def _geometry(edit: Editor, node: onnx.NodeProto) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """Kernel, strides, first pads and output size of a plain two-dimensional transposed convolution; ``None`` for others."""
    weight = edit.graph.constant(node.input[1])
    source, result = edit.shape(node.input[0]), edit.shape(node.output[0])
    found = attributes(node)
    if weight is None or weight.ndim != 4 or source is None or result is None or len(source) != 4 or len(result) != 4:
        return None
    if any(size is None for size in (*source[2:], *result[2:])):
        return None
    if int(found.get("group", 1)) != 1 or any(int(d) != 1 for d in found.get("dilations", [1, 1])):
        return None
    if str(found.get("auto_pad", "NOTSET")) != "NOTSET" or found.get("output_shape"):
        return None
    if len(node.input) > 2 and node.input[2] and edit.graph.constant(node.input[2]) is None:
        return None
    strides = [int(v) for v in found.get("strides", [1, 1])]
    pads = [int(v) for v in found.get("pads", [0, 0, 0, 0])]
    return list(weight.shape[2:]), strides, pads[:2], [int(size or 0) for size in result[2:]]


def conv_transpose_as_conv(edit: Editor) -> bool:
    """Rewrite one transposed convolution; see the module."""
    for node in edit.graph:
        if node.op_type != "ConvTranspose":
            continue
        geometry = _geometry(edit, node)
        if geometry is None:
            continue
        kernel, strides, pads, size = geometry
        source = edit.shape(node.input[0])
        weight = edit.graph.constant(node.input[1])
        assert source is not None
        assert weight is not None
        inputs = [int(v or 0) for v in source[2:]]
        axes = [phase_taps(k, s, p) for k, s, p in zip(kernel, strides, pads, strict=True)]
        spans = [high - low + 1 for low, high, _ in axes]
        if spans[0] * spans[1] * strides[0] * strides[1] > _MOST_EXTRA_WORK * kernel[0] * kernel[1]:
            continue
        steps = [-(-total // stride) for total, stride in zip(size, strides, strict=True)]
        begin = [-low for low, _, _ in axes]
        end = [step - 1 + high - (count - 1) for step, (_, high, _), count in zip(steps, axes, inputs, strict=True)]
        if min(*begin, *end) < 0:
            continue  # an input that no output sees; does not happen with sensible padding
        channels = weight.shape[1]
        phases = np.zeros((strides[0], strides[1], channels, weight.shape[0], spans[0], spans[1]), np.float32)
        for (row, up), tap_y in axes[0][2].items():
            for (column, left), tap_x in axes[1][2].items():
                phases[row, column, :, :, up - axes[0][0], left - axes[1][0]] = weight[:, :, tap_y, tap_x].T
        name = f"{node.name}__phases"
        count = channels * strides[0] * strides[1]
        tensors = [node.input[0], edit.add_initializer(f"{node.input[1]}__phases", phases.reshape(count, -1, *spans))]
        if len(node.input) > 2 and node.input[2]:
            bias = edit.graph.constant(node.input[2])
            assert bias is not None
            repeated = np.tile(bias.reshape(-1), strides[0] * strides[1])
            tensors.append(edit.add_initializer(f"{node.input[2]}__phases", repeated))
        final = node.output[0]
        values = [edit.fresh(f"{final}__{part}") for part in ("phases", "last", "split", "woven", "joined", "whole")]
        for value in values:
            edit.aliases[value] = edit.aliases.get(final, final)
        whole = [step * stride for step, stride in zip(steps, strides, strict=True)]
        exact = whole == size
        split = edit.add_initializer(f"{name}_split", np.array([0, *steps, *strides, channels], np.int64))
        join = edit.add_initializer(f"{name}_join", np.array([0, *whole, channels], np.int64))
        # Channels go last before the phases are woven: ONNX Runtime's integer convolutions give them so anyway, its optimizer cancels
        # these transpositions against its own, and what remains moves whole runs of bytes.
        chain: list[tuple[str, list[str], str, dict[str, Any]]] = [
            ("Conv", tensors, name, {"kernel_shape": spans, "pads": [*begin, *end]}),
            ("Transpose", [values[0]], f"{name}_last", {"perm": [0, 2, 3, 1]}),
            ("Reshape", [values[1], split], f"{name}_split_node", {}),
            ("Transpose", [values[2]], f"{name}_weave", {"perm": [0, 1, 3, 2, 4, 5]}),
            ("Reshape", [values[3], join], f"{name}_join_node", {}),
            ("Transpose", [values[4]], f"{name}_first", {"perm": [0, 3, 1, 2]}),
        ]
        made = [*values[:5], final if exact else values[5]]
        nodes = [
            helper.make_node(op, sources, [value], name=edit.fresh(title), **more)
            for (op, sources, title, more), value in zip(chain, made, strict=True)
        ]
        if not exact:
            starts = edit.add_initializer(f"{name}_starts", np.array([0, 0], np.int64))
            ends = edit.add_initializer(f"{name}_ends", np.array(size, np.int64))
            where = edit.add_initializer(f"{name}_axes", np.array([2, 3], np.int64))
            nodes.append(
                helper.make_node("Slice", [values[5], starts, ends, where], [final], name=edit.fresh(f"{name}_crop"))
            )
        edit.replace(node, *nodes)
        edit.log.append(f"transposed convolution {node.name} became a convolution of {strides[0] * strides[1]} phases")
        return True
    return False
