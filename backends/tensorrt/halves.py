"""Float16 and bfloat16 outside of Q/DQ, written into the graph itself.

TensorRT 11, and 10 with strong types, computes every layer in the type that the graph gives it: what a Q/DQ graph leaves in float32 (the
outputs of the last layers, activations without a fused kernel, attention) runs in float32, on the slow units. Here those values get a
16-bit type:

* Nodes compute in 16 bits, except those that sum squares, exponentiate or divide (normalizations, softmax, ...), and those whose values
  or constants are larger than what the type holds with some room. Casts stand where the two meet. Inputs and outputs of the network keep
  their type.
* A QuantizeLinear has the type of what it reads, a DequantizeLinear that of what reads it. From operator set 19 on both types are
  allowed, and the scale has the same type: every scale is rounded up to a number of that type first, and weights are rounded anew, from
  the float numbers, at their new scale. So the numbers that a scale stands for are the same in all types.
* The input's QuantizeLinear stays in float32, so that the input is rounded once.
* Operators stay in float32 where ONNX does not allow the type: up to operator set 21, convolutions and pooling take no bfloat16.

NVIDIA's own tool writes its graphs in this form too: 16-bit scales, operator set 19 or later (TensorRT Model Optimizer, ``onnx`` quantization
with a high-precision type).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.backends.tensorrt.walking import ACTIVATIONS, element_types, is_product, moves
from zsq_deploy.errors import UsageError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.qdq import raise_opset
from zsq_deploy.quant.reader import QuantizedTensor, dequantized_weight, is_dequantize, is_quantize, read_qdq

__all__ = ["FLOAT32_OPS", "Half", "to_half", "up_to_type"]

Array = npt.NDArray[Any]
Kind = Literal["float16", "bfloat16"]

FLOAT32_OPS = frozenset(
    {
        "LayerNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization", "MeanVarianceNormalization", "LRN",
        "BatchNormalization", "Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Div", "Softplus", "Erf",
        "ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd",
        "CumSum", "Einsum", "Range", "NonMaxSuppression", "TopK", "GridSample", "RoiAlign", "If", "Loop", "Scan",
    }
)  # fmt: skip
"""Operators that stay in float32: sums of many or of squares, and functions that are steep."""

_FLOAT = onnx.TensorProto.FLOAT
_TYPES: Mapping[str, tuple[int, Any]] = {
    "float16": (onnx.TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (onnx.TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
OPSET = 19
"""From here on QuantizeLinear and DequantizeLinear take 16-bit floats."""

_ROOM = 8.0
"""Values may be this much larger on the device than on the calibration images before they overflow."""

_FIRST_INPUT_ONLY = frozenset({"Resize", "Upsample"})
"""Operators whose further inputs (scales) are float32 whatever the first one is."""


@dataclass(frozen=True)
class Half:
    """A graph with 16-bit floats.

    Attributes:
        graph: The graph.
        kind: ``float16`` or ``bfloat16``.
        nodes: Number of nodes that compute in it.
        kept: Node name -> why it stays in float32.
        casts: Number of Casts that were put in.
        notes: What a reader should know, one sentence each.
    """

    graph: Graph
    kind: str
    nodes: int
    kept: Mapping[str, str]
    casts: int
    notes: tuple[str, ...] = field(default=())

    def record(self) -> dict[str, Any]:
        """JSON values for the manifest."""
        return {"half_nodes": self.nodes, "float32_nodes": dict(self.kept), "casts": self.casts}


def up_to_type(values: Array, kind: str) -> Array:
    """The smallest numbers of a 16-bit type that are not below `values` (positive), as float32."""
    number = _TYPES[kind][1]
    wanted = np.asarray(values, np.float32)
    found = wanted.astype(number)
    low = found.astype(np.float32) < wanted
    # positive floats are ordered like their bits
    bits = found.view(np.uint16) + low.astype(np.uint16)
    return np.asarray(bits.astype(np.uint16).view(number), np.float32).reshape(wanted.shape)


def to_half(
    graph: Graph,
    kind: str,
    *,
    ranges: Mapping[str, tuple[float, float]],
    weights: Mapping[str, Array] | None = None,
) -> Half:
    """Give a 16-bit type to what a Q/DQ graph computes in float32.

    Args:
        graph: A Q/DQ graph with standard operators (a float network works too).
        kind: ``float16`` or ``bfloat16``.
        ranges: Range of the float values: what is too large for float16 stays in float32.
        weights: Node name -> float weights, for rounding them anew; without them the dequantized ones are rounded.

    Raises:
        UsageError: There is no such type.
        ModelError: The graph cannot be raised to operator set 19.
    """
    if kind not in _TYPES:
        raise UsageError(
            f"there is no 16-bit type {kind!r}", where="--float-type", remedy=f"choose {', '.join(_TYPES)}"
        )
    graph = _with_scales(raise_opset(graph, OPSET), kind, weights or {})
    job = _Job(graph, kind, ranges)
    job.write()
    job.net.touch()
    job.net.sweep()
    result = Graph(job.net.proto())
    kept = dict(job.kept)
    notes = []
    large = [name for name, why in kept.items() if "reach" in why]
    if large:
        notes.append(f"too large for {kind}, so in float32: {', '.join(large[:5])}{', ...' if len(large) > 5 else ''}")
    notes.append(
        f"{len(job.half)} nodes compute in {kind}, {len(kept)} stay in float32, with {job.casts} casts between them"
    )
    return Half(result, kind, len(job.half), kept, job.casts, tuple(notes))


# -- scales --


def _with_scales(graph: Graph, kind: str, weights: Mapping[str, Array]) -> Graph:
    """All scales rounded up to numbers of the type, and stored weights rounded at their new scale."""
    net = Net(graph.proto)
    nodes = {node.name: node for node in net.nodes}
    for tensor in read_qdq(graph):
        scale = up_to_type(tensor.scale, kind)
        if tensor.is_bias or np.array_equal(scale, tensor.scale):
            continue
        readers = [nodes[name] for name in (*((tensor.quantize,) if tensor.quantize else ()), *tensor.dequantize)]
        old = graph.constant(readers[0].input[1])
        assert old is not None
        name = net.add_constant(readers[0].input[1], scale.reshape(old.shape))
        for reader in readers:
            reader.input[1] = name
        if tensor.is_weight and tensor.quantize is None and tensor.codes == readers[0].input[0]:
            codes = _rounded(graph, tensor, scale, weights)
            stored = net.add_constant(tensor.codes, codes)
            for reader in readers:
                reader.input[0] = stored
    net.touch()
    net.sweep()
    return Graph(net.proto())


def _rounded(graph: Graph, tensor: QuantizedTensor, scale: Array, weights: Mapping[str, Array]) -> Array:
    held = graph.constant(tensor.codes)
    assert held is not None
    readers = graph.consumers(tensor.output)
    exact = next((weights[reader.name] for reader in readers if reader.name in weights), None)
    if exact is None or exact.shape != held.shape:
        exact = dequantized_weight(graph, tensor.output)
    assert exact is not None
    step = _spread(scale, tensor, held.shape)
    offset = _spread(tensor.zero_point, tensor, held.shape)
    low, high = tensor.limits
    low += int(held.min() > low)  # a symmetric range does without the lowest code
    codes = np.clip(np.rint(np.asarray(exact, np.float64) / step) + offset, low, high)
    return np.asarray(codes.astype(np.int64).astype(held.dtype))


def _spread(values: Array, tensor: QuantizedTensor, shape: tuple[int, ...]) -> Array:
    if values.size == 1 and not tensor.block:
        return np.asarray(values, np.float64).reshape(())
    assert tensor.axis is not None
    axis = tensor.axis % len(shape)
    wide = np.asarray(values, np.float64)
    if tensor.block:
        return np.repeat(wide, tensor.block, axis=axis).take(range(shape[axis]), axis=axis)
    form = [1] * len(shape)
    form[axis] = -1
    return wide.reshape(form)


# -- types --


class _Job:
    """Which node computes in which type, and the graph that says so."""

    def __init__(self, graph: Graph, kind: str, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.graph, self.kind, self.ranges = graph, kind, ranges
        self.onnx_type, self.number = _TYPES[kind]
        self.largest = float(ml_dtypes.finfo(self.number).max)
        self.net = Net(graph.proto)
        self.types = element_types(graph)
        self.floats_of = {tensor.output: tensor.name for tensor in read_qdq(graph)}
        self.kept: dict[str, str] = {}
        self.half = {node.name for node in self.net.nodes if self._computes_half(node)}
        self._follow_products()
        self._leave_lonely_moves()
        self.casts = 0
        self.cast_of: dict[tuple[str, int], str] = {}
        self.constants: dict[str, str] = {}

    def _is_float(self, value: str) -> bool:
        return bool(value) and self.types.get(value) == _FLOAT

    def _computed(self, value: str) -> bool:
        return bool(value) and self.graph.constant(value) is None

    def _computes_half(self, node: onnx.NodeProto) -> bool:
        if is_quantize(node) or is_dequantize(node) or node.op_type == "Constant":
            return False
        touched = [name for name in (*node.input, *node.output) if self._is_float(name)]
        if not any(self._is_float(name) for name in node.output):
            return False
        why = self._reason(node, touched)
        if why:
            self.kept[node.name] = why
        return not why

    def _reason(self, node: onnx.NodeProto, touched: list[str]) -> str:
        if node.domain not in ("", "ai.onnx"):
            return f"an operator of the domain {node.domain!r}"
        if node.op_type in FLOAT32_OPS:
            return f"{node.op_type} loses too much in 16 bits"
        if node.op_type in ("Cast", "CastLike") or not any(self._is_float(name) for name in node.input):
            return "it makes float32 numbers of something else"
        if any(name and name not in self.types for name in (*node.input, *node.output)):
            return "the type of one of its values is not known"
        if not self._admitted(node):
            return f"{node.op_type} of operator set {self.graph.opset} does not take {self.kind}"
        for name in touched:
            reach = self._reach(name)
            if reach * _ROOM > self.largest and self._computed(name):
                return f"its values reach {reach:.3g}"
            if reach > self.largest:
                return f"its constants reach {reach:.3g}"
        return ""

    def _admitted(self, node: onnx.NodeProto) -> bool:
        """Whether ONNX allows the type for the first input and output of an operator in the graph's operator set."""
        schema = onnx.defs.get_schema(node.op_type, self.graph.opset, "")
        wanted = f"tensor({self.kind})"
        allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
        ends = (schema.inputs[0], schema.outputs[0])
        return all(wanted in allowed.get(end.type_str, (end.type_str,)) for end in ends)

    def _reach(self, value: str) -> float:
        """The largest magnitude of a value, as far as it is known."""
        constant = self.graph.constant(value)
        if constant is not None:
            finite = np.abs(constant[np.isfinite(constant)])
            return float(finite.max()) if finite.size else 0.0
        value = self.floats_of.get(value, value)
        low, high = self.ranges.get(value, (0.0, 0.0))
        return max(abs(low), abs(high))

    def _follow_products(self) -> None:
        """What becomes one kernel with a product in float32 stays there too: a Cast between them would part the two."""
        apart = {node.name for node in self.net.nodes if is_product(node) and node.name not in self.half}
        for node in self.net.nodes:
            if node.name not in self.half or node.op_type not in (*ACTIVATIONS, "Add"):
                continue
            makers = [self.graph.producer(name) for name in node.input if self._is_float(name)]
            first = next((maker for maker in makers if maker is not None and maker.name in apart), None)
            if first is not None:
                self.half.discard(node.name)
                self.kept[node.name] = f"it is one kernel with {first.name!r}, which stays in float32"
                apart.add(node.name)

    def _leave_lonely_moves(self) -> None:
        """Nodes that only move numbers from float32 to float32 stay there."""
        for node in self.net.nodes:
            if node.name not in self.half or not moves(node):
                continue
            maker = self.graph.producer(node.input[0])
            before = maker is None or (maker.name not in self.half and not is_dequantize(maker))
            readers = [reader for name in node.output for reader in self.graph.consumers(name)]
            if before and not any(reader.name in self.half for reader in readers):
                self.half.discard(node.name)
                self.kept[node.name] = "it moves float32 numbers"

    def _dequantizes_half(self, node: onnx.NodeProto) -> bool:
        value = node.output[0]
        return not self.graph.is_output(value) and any(
            reader.name in self.half for reader in self.graph.consumers(value)
        )

    # -- writing --

    def write(self) -> None:
        """Give every value its type, with Casts where types meet."""
        net = self.net
        now: dict[str, int] = {spec.name: _FLOAT for spec in self.graph.inputs if self._is_float(spec.name)}
        order, net.nodes = net.nodes, []
        outputs = set(net.output_names)
        for node in order:
            half = node.name in self.half
            if is_quantize(node):
                self._scale(node, now.get(node.input[0], _FLOAT))
            elif is_dequantize(node):
                wanted = self.onnx_type if self._dequantizes_half(node) else _FLOAT
                self._scale(node, wanted)
                now[node.output[0]] = wanted
            else:
                self._operands(node, self.onnx_type if half else _FLOAT, now)
                for name in node.output:
                    if self._is_float(name):
                        now[name] = self.onnx_type if half else _FLOAT
            net.nodes.append(node)
            for index, name in enumerate(list(node.output)):
                if name in outputs and now.get(name) == self.onnx_type:
                    now[self._output(node, index, name, order)] = self.onnx_type

    def _scale(self, node: onnx.NodeProto, kind: int) -> None:
        if kind == self.onnx_type:
            node.input[1] = self._constant(node.input[1])

    def _operands(self, node: onnx.NodeProto, wanted: int, now: Mapping[str, int]) -> None:
        for index, name in enumerate(node.input):
            if not self._is_float(name) and name not in now:
                continue
            if wanted == self.onnx_type and index and node.op_type in _FIRST_INPUT_ONLY:
                continue
            if self.graph.constant(name) is not None:
                if wanted == self.onnx_type:
                    node.input[index] = self._constant(name)
            elif now.get(name, _FLOAT) != wanted:
                node.input[index] = self._cast(name, wanted)

    def _constant(self, name: str) -> str:
        """The 16-bit copy of a constant."""
        if name not in self.constants:
            array = self.graph.constant(name)
            assert array is not None
            with np.errstate(over="ignore"):
                self.constants[name] = self.net.add_constant(f"{name}_{self.kind}", array.astype(self.number))
        return self.constants[name]

    def _cast(self, value: str, wanted: int) -> str:
        key = (value, wanted)
        if key not in self.cast_of:
            name = self.net.fresh(f"{value}_{self.kind if wanted == self.onnx_type else 'float32'}")
            self.net.nodes.append(self.net.new_node("Cast", [value], [name], f"{value}_Cast", to=wanted))
            self.cast_of[key] = name
            self.casts += 1
        return self.cast_of[key]

    def _output(self, node: onnx.NodeProto, index: int, name: str, order: list[onnx.NodeProto]) -> str:
        """An output of the network keeps its name and its type; others read the 16-bit value."""
        inner = self.net.fresh(f"{name}_{self.kind}")
        node.output[index] = inner
        for reader in order:
            for place, read in enumerate(reader.input):
                if read == name and reader is not node:
                    reader.input[place] = inner
        self.net.nodes.append(self.net.new_node("Cast", [inner], [name], f"{name}_Cast", to=_FLOAT))
        self.casts += 1
        return inner
