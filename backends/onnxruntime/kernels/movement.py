"""Operators that move values without changing them, on codes and on anything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from zsq_deploy.backends.onnxruntime.kernels.base import Array, Inputs, Kernel, kernel, need

__all__ = ["Movement", "Reference"]


class Movement(Kernel):
    """Base of kernels that only move values."""

    arithmetic_kernel = False


@kernel("Transpose")
class Transpose(Movement):
    """Permute axes."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        return [np.ascontiguousarray(np.transpose(x, self.node.attrs.get("perm")))]


@kernel("Identity", "Dropout")
class Identity(Movement):
    """The same values."""

    def _run(self, inputs: Inputs) -> list[Array]:
        return [need(inputs, 0, self.node)]


@kernel("Reshape")
class Reshape(Movement):
    """Another shape; 0 copies a size (unless ``allowzero``), -1 is what is left."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x, wanted = need(inputs, 0, self.node), [int(n) for n in need(inputs, 1, self.node)]
        if not self.node.attrs.get("allowzero", 0):
            wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
        return [x.reshape(wanted)]


@kernel("Flatten")
class Flatten(Movement):
    """Two axes."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        axis = int(self.node.attrs.get("axis", 1))
        axis = axis + x.ndim if axis < 0 else axis
        rows = int(np.prod(x.shape[:axis]))
        return [x.reshape(rows, int(np.prod(x.shape[axis:])))]


@kernel("Squeeze")
class Squeeze(Movement):
    """Leave axes of size 1 out."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        axes: Any = self.node.attrs.get("axes")
        if len(inputs) > 1 and inputs[1] is not None:
            axes = tuple(int(a) for a in np.atleast_1d(inputs[1]))
        return [np.squeeze(x, None if axes is None else tuple(axes))]


@kernel("Unsqueeze")
class Unsqueeze(Movement):
    """Put axes of size 1 in."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        axes: Any = self.node.attrs.get("axes")
        if len(inputs) > 1 and inputs[1] is not None:
            axes = tuple(int(a) for a in np.atleast_1d(inputs[1]))
        return [np.expand_dims(x, tuple(axes))]


@kernel("Concat")
class Concat(Movement):
    """One after another along an axis."""

    def _run(self, inputs: Inputs) -> list[Array]:
        parts = [need(inputs, index, self.node) for index in range(len(inputs))]
        return [np.concatenate(parts, axis=int(self.node.attrs["axis"]))]


@kernel("Gather")
class Gather(Movement):
    """Pick along an axis; negative indices count from the end."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x, index = need(inputs, 0, self.node), need(inputs, 1, self.node)
        return [np.asarray(np.take(x, index, axis=int(self.node.attrs.get("axis", 0))))]


@kernel("Slice")
class Slice(Movement):
    """Cut along axes."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        starts, ends = need(inputs, 1, self.node), need(inputs, 2, self.node)
        axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else np.arange(len(starts))
        steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else np.ones(len(starts), np.int64)
        cut = [slice(None)] * x.ndim
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            size = x.shape[int(axis)]
            begin, stop = (int(v) + size if v < 0 else int(v) for v in (start, end))
            if step > 0:
                cut[int(axis)] = slice(min(max(begin, 0), size), min(max(stop, 0), size), int(step))
            else:
                begin, stop = min(max(begin, 0), size - 1), min(max(stop, -1), size - 1)
                cut[int(axis)] = slice(begin, None if stop < 0 else stop, int(step))
        return [np.ascontiguousarray(x[tuple(cut)])]


@kernel("Split")
class Split(Movement):
    """Cut into parts along an axis."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        axis = int(self.node.attrs.get("axis", 0))
        sizes: Any = self.node.attrs.get("split")
        if len(inputs) > 1 and inputs[1] is not None:
            sizes = [int(n) for n in inputs[1]]
        if sizes is None:
            count = int(self.node.attrs.get("num_outputs", len(self.node.proto.output)))
            each = -(-x.shape[axis] // count)
            sizes = [min(each, x.shape[axis] - each * i) for i in range(count)]
        cuts = np.cumsum(sizes)[:-1]
        return [np.ascontiguousarray(part) for part in np.split(x, cuts, axis=axis)]


@kernel("Pad")
class Pad(Movement):
    """Values around it: a constant, the edge, or a reflection. The runtime pads codes with codes."""

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        x = need(inputs, 0, node)
        pads = np.asarray(inputs[1] if len(inputs) > 1 and inputs[1] is not None else node.attrs["pads"], np.int64)
        value: Any = inputs[2] if len(inputs) > 2 and inputs[2] is not None else node.attrs.get("value", 0)
        axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else np.arange(x.ndim)
        before, after = [0] * x.ndim, [0] * x.ndim
        for axis, b, a in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
            before[int(axis)], after[int(axis)] = int(b), int(a)
        cut = tuple(slice(max(-b, 0), n - max(-a, 0)) for b, a, n in zip(before, after, x.shape, strict=True))
        width = [(max(b, 0), max(a, 0)) for b, a in zip(before, after, strict=True)]
        mode = str(node.attrs.get("mode", "constant"))
        if mode == "constant":
            return [np.pad(x[cut], width, constant_values=np.asarray(value, x.dtype).reshape(-1)[0])]
        return [np.pad(x[cut], width, mode=mode)]  # type: ignore[call-overload]


@kernel("Expand")
class Expand(Movement):
    """Broadcast."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x, shape = need(inputs, 0, self.node), need(inputs, 1, self.node)
        return [np.ascontiguousarray(x * np.ones([int(n) for n in shape], x.dtype))]


@kernel("Shape")
class Shape(Movement):
    """Sizes of the axes."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        start, end = self.node.attrs.get("start", 0), self.node.attrs.get("end")
        return [np.array(x.shape, np.int64)[start:end]]


@kernel("Where")
class Where(Movement):
    """Choose element by element."""

    def _run(self, inputs: Inputs) -> list[Array]:
        return [np.where(need(inputs, 0, self.node), need(inputs, 1, self.node), need(inputs, 2, self.node))]


@kernel("Relu")
class Relu(Movement):
    """The larger of a value and zero (of codes: zero is the code 0)."""

    any_type = False

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        return [np.maximum(x, np.zeros((), x.dtype))]


@kernel("Clip")
class Clip(Movement):
    """Between two bounds."""

    any_type = False

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        low: Any = inputs[1] if len(inputs) > 1 and inputs[1] is not None else self.node.attrs.get("min")
        high: Any = inputs[2] if len(inputs) > 2 and inputs[2] is not None else self.node.attrs.get("max")
        if low is not None:
            x = np.maximum(x, np.asarray(low, x.dtype))
        if high is not None:
            x = np.minimum(x, np.asarray(high, x.dtype))
        return [x]


@kernel(
    "ArgMax",
    "ArgMin",
    "DepthToSpace",
    "GatherElements",
    "GatherND",
    "Max",
    "Min",
    "ReduceMax",
    "ReduceMin",
    "Size",
    "SpaceToDepth",
    "Tile",
)
class Reference(Movement):
    """Operators that need no rounding, evaluated by the ONNX project's reference implementation."""

    any_type = False

    def __init__(self, node: Any, arithmetic: Any) -> None:
        super().__init__(node, arithmetic)
        names = [name if name else "" for name in node.proto.input]
        graph = onnx.helper.make_graph(
            [node.proto],
            "one",
            [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name],
            [onnx.ValueInfoProto(name=name) for name in node.proto.output if name],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", node.opset)])
        self._evaluator = ReferenceEvaluator(model)

    def _run(self, inputs: Inputs) -> list[Array]:
        feeds = {
            name: array for name, array in zip(self.node.proto.input, inputs, strict=True) if name and array is not None
        }
        found: list[Array] = list(self._evaluator.run(None, feeds))
        return [np.asarray(array) for array in found]
