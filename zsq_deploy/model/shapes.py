"""Shapes and shape arithmetic of a graph, found by walking it once with concrete input sizes.

Symbolic shape algebra has many corners. With concrete sizes there are none: every ``Shape`` node is a known vector, all that
is computed from it is known too, and the ONNX project's own per-node inference gives the shape of everything else. What
depends on the batch size shows itself by walking the graph with several batch sizes and comparing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["Array", "Evaluator", "Probe", "opsets", "probe"]

Array = np.ndarray[Any, Any]
Dims = tuple[int | None, ...]

#: Never replaced by their value: random numbers, and the quantizers, which are what a Q/DQ graph is about.
_KEEP = frozenset(
    {
        "Bernoulli",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "If",
        "Loop",
        "Multinomial",
        "QuantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Scan",
    }
)
_LARGEST = 1 << 24  # elements of a computed constant that is still worth storing
#: Operators whose output can be much larger than their inputs.
_GROWING = frozenset({"ConstantOfShape", "EyeLike", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile"})
_DATA = 4096  # elements of a constant that shape inference may want to look at


def opsets(proto: onnx.ModelProto) -> dict[str, int]:
    """Operator set versions by domain; the default domain is the empty string."""
    return {("" if o.domain == "ai.onnx" else o.domain): int(o.version) for o in proto.opset_import}


class Evaluator:
    """Computes nodes whose inputs are all constants, with the ONNX reference implementation, and remembers the results.

    Args:
        versions: Operator set versions by domain.
    """

    def __init__(self, versions: Mapping[str, int]) -> None:
        self._versions = dict(versions)
        self._memory: dict[tuple[Any, ...], tuple[Array | None, ...]] = {}

    def run(self, node: onnx.NodeProto, inputs: Sequence[Array | None]) -> tuple[Array | None, ...] | None:
        """The outputs of a node, or ``None`` where it cannot be computed here (``None`` inside: an output left out)."""
        small = sum(0 if item is None else item.size for item in inputs) <= _DATA
        key: tuple[Any, ...] = ()
        if small:
            key = (
                node.SerializeToString(deterministic=True),
                *(None if item is None else (item.dtype.str, item.shape, item.tobytes()) for item in inputs),
            )
            if key in self._memory:
                return self._memory[key]
        result = self._compute(node, inputs)
        if small and result is not None:
            self._memory[key] = result
        return result

    def _compute(self, node: onnx.NodeProto, inputs: Sequence[Array | None]) -> tuple[Array | None, ...] | None:
        from onnx.reference import ReferenceEvaluator

        any_type = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
        feeds = {name: value for name, value in zip(node.input, inputs, strict=True) if name and value is not None}
        outputs = [name for name in node.output if name]
        graph = helper.make_graph(
            [node],
            "constant",
            [helper.make_value_info(name, any_type) for name in feeds],
            [helper.make_value_info(name, any_type) for name in outputs],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in self._versions.items()])
        try:
            with np.errstate(all="ignore"):
                found = dict(zip(outputs, ReferenceEvaluator(model).run(None, feeds), strict=True))
        except Exception:  # anything the reference implementation cannot do stays a node
            return None
        values: list[Array | None] = []
        for name in node.output:
            value = found.get(name) if name else None
            if name and not isinstance(value, np.ndarray | np.generic):
                return None
            values.append(None if value is None else np.asarray(value))
        if any(value is not None and value.size > _LARGEST for value in values):
            return None
        return tuple(values)


@dataclass
class Probe:
    """What one walk with concrete input shapes found.

    Attributes:
        shapes: Shape by value name; an unknown dimension is ``None``; a value of unknown rank is missing.
        types: ONNX element type by value name.
        data: Values that do not depend on what is fed, only on its shape.
        conflicts: Node name and message where these input shapes do not fit the graph.
    """

    shapes: dict[str, Dims] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    data: dict[str, Array] = field(default_factory=dict)
    conflicts: list[tuple[str, str]] = field(default_factory=list)

    def known(self, value: str) -> tuple[int, ...] | None:
        """The shape of a value if all of it is known."""
        dims = self.shapes.get(value)
        if dims is None or any(size is None for size in dims):
            return None
        return tuple(int(size) for size in dims if size is not None)

    def _set_array(self, name: str, value: Array) -> None:
        self.data[name] = value
        self.shapes[name] = tuple(value.shape)
        self.types[name] = helper.np_dtype_to_tensor_dtype(value.dtype)

    def _set_type(self, name: str, value: onnx.TypeProto) -> None:
        if not value.HasField("tensor_type"):
            return
        tensor = value.tensor_type
        if tensor.elem_type:
            self.types[name] = tensor.elem_type
        if tensor.HasField("shape"):
            self.shapes[name] = tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in tensor.shape.dim)

    def type_proto(self, name: str) -> onnx.TypeProto | None:
        """The type of a value for the ONNX inference functions."""
        if name not in self.types:
            return None
        dims = self.shapes.get(name)
        return helper.make_tensor_type_proto(self.types[name], dims)


def probe(
    proto: onnx.ModelProto,
    input_shapes: Mapping[str, Sequence[int]],
    *,
    evaluator: Evaluator | None = None,
    arrays: Mapping[str, Array] | None = None,
) -> Probe:
    """Walk a graph with concrete input shapes.

    Args:
        proto: A model without local functions; nodes in topological order.
        input_shapes: Concrete shape of every graph input.
        evaluator: Shared between walks of the same graph, to compute every constant once.
        arrays: The initializers as arrays; without them they are read from `proto`.
    """
    versions = opsets(proto)
    evaluator = evaluator or Evaluator(versions)
    imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    found = Probe()
    initial = arrays if arrays is not None else {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for name, array in initial.items():
        found._set_array(name, array)
    for value in proto.graph.input:
        if value.name not in initial:
            found.types[value.name] = value.type.tensor_type.elem_type or onnx.TensorProto.FLOAT
            found.shapes[value.name] = tuple(input_shapes[value.name])
    for node in proto.graph.node:
        if not _constant(node, found, evaluator, versions, imports, proto.ir_version):
            _infer(node, found, versions, imports, proto.ir_version)
    return found


def _constant(
    node: onnx.NodeProto,
    found: Probe,
    evaluator: Evaluator,
    versions: Mapping[str, int],
    imports: Iterable[Any],
    ir_version: int,
) -> bool:
    """Compute a node that does not depend on the data; says whether that was possible."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _KEEP:
        return False
    if node.op_type in ("Shape", "Size"):
        dims = found.known(node.input[0])
        if dims is not None:
            vector = np.asarray(dims, np.int64)
            if node.op_type == "Size":
                found._set_array(node.output[0], np.asarray(vector.prod(), np.int64))
            else:
                found._set_array(node.output[0], vector[_shape_slice({a.name: a.i for a in node.attribute}, len(dims))])
            return True
        return False
    if node.op_type == "CastLike" and node.input[0] in found.data and node.input[1] in found.types:
        kind = helper.tensor_dtype_to_np_dtype(found.types[node.input[1]])  # only the other operand's type matters
        found._set_array(node.output[0], found.data[node.input[0]].astype(kind))
        return True
    if not all(name == "" or name in found.data for name in node.input):
        return False
    if node.op_type in _GROWING and not _small_enough(node, found, versions, imports, ir_version):
        return False
    outputs = evaluator.run(node, [found.data[name] if name else None for name in node.input])
    if outputs is None:
        return False
    for name, value in zip(node.output, outputs, strict=True):
        if name and value is not None:
            found._set_array(name, value)
    return True


def _small_enough(
    node: onnx.NodeProto, found: Probe, versions: Mapping[str, int], imports: Iterable[Any], ir_version: int
) -> bool:
    """Whether the result is known to be of a size worth computing: a few numbers in a file can ask for terabytes."""
    conflicts = len(found.conflicts)
    _infer(node, found, versions, imports, ir_version)
    del found.conflicts[conflicts:]
    sizes = [found.known(name) for name in node.output if name]
    return all(size is not None and math.prod(size) <= _LARGEST for size in sizes)


def _shape_slice(attribute: Mapping[str, int], rank: int) -> slice:
    """The part of the shape that Shape(start, end) of opset 15 asks for, clamped as the specification says."""
    start, end = attribute.get("start", 0), attribute.get("end", rank)
    start, end = (min(max(v + rank if v < 0 else v, 0), rank) for v in (start, end))
    return slice(start, max(start, end))


def _infer(
    node: onnx.NodeProto, found: Probe, versions: Mapping[str, int], imports: Iterable[Any], ir_version: int
) -> None:
    """Types and shapes of the outputs of a node that depends on the data."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        schema = onnx.defs.get_schema(node.op_type, versions.get(domain, 1), domain)
    except Exception:  # not an operator of the ONNX project: nothing is known about its outputs
        return
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name in dict.fromkeys(node.input):
        if not name:
            continue
        value = found.type_proto(name)
        if value is None:
            return
        types[name] = value
        array = found.data.get(name)
        if array is not None and array.size <= _DATA:
            data[name] = numpy_helper.from_array(array, name)
    try:
        outputs = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=list(imports), ir_version=max(ir_version, 8)
        )
    except Exception as error:  # shapes that do not fit, which is an answer
        found.conflicts.append((node.name or node.op_type, str(error).strip().splitlines()[0] if str(error) else ""))
        return
    for name, value in outputs.items():
        if name:
            found._set_type(name, value)
