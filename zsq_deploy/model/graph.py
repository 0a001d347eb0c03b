"""The ONNX graph as every other room reads it: nodes, values, shapes and constants by name.

A :class:`Graph` wraps one :class:`onnx.ModelProto` whose node names are unique and whose nodes are in topological order. It is
read-only by convention: a transformation takes a graph and returns a new one (:meth:`Graph.editable` hands out a copy of the
protobuf to change, :meth:`Graph.__init__` indexes it again).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from zsq_deploy.errors import ModelError

__all__ = ["Graph", "TensorSpec", "attributes", "clean_shape"]

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and type of a graph input or output; an unknown or dynamic dimension is ``None``."""

    name: str
    shape: Shape
    dtype: np.dtype[Any]

    def with_batch(self, batch: int) -> tuple[int, ...]:
        """The concrete shape for `batch` samples.

        Raises:
            ModelError: A dimension other than the first is not known.
        """
        unknown = [axis for axis, size in enumerate(self.shape) if size is None and axis > 0]
        if unknown:
            raise ModelError(
                f"input {self.name!r} has no fixed size in dimension(s) {unknown}: {self.shape}",
                where=self.name,
                remedy="say the size with --input-shape, for example --input-shape 1x3x224x224",
            )
        return (batch, *(int(size) for size in self.shape[1:] if size is not None))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values (tensors as numpy arrays, strings as ``str``)."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        elif isinstance(value, list) and value and isinstance(value[0], bytes):
            value = [item.decode() for item in value]
        found[attribute.name] = value
    return found


def clean_shape(tensor_type: onnx.TypeProto.Tensor) -> Shape | None:
    """The shape of a typed value, or ``None`` where not even the rank is known."""
    if not tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor_type.shape.dim)


class Graph:
    """An indexed ONNX graph.

    Args:
        proto: The model. It is not copied: do not change it afterwards.

    Attributes:
        proto: The model that was given.
        nodes: All nodes in topological order. Every node has a unique, non-empty name.
        inputs: The graph's inputs without initializers.
        outputs: The graph's outputs.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes: tuple[onnx.NodeProto, ...] = tuple(proto.graph.node)
        seen: set[str] = set()
        for index, node in enumerate(self.nodes):
            if not node.name or node.name in seen:
                base, number = node.name or node.op_type, index
                while f"{base}_{number}" in seen:
                    number += 1
                node.name = f"{base}_{number}"
            seen.add(node.name)
        self._initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._producer: dict[str, onnx.NodeProto] = {}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.output:
                if name:
                    self._producer[name] = node
            for name in dict.fromkeys(node.input):
                if name:
                    self._consumers.setdefault(name, []).append(node)
        self._by_name = {node.name: node for node in self.nodes}
        self.inputs: tuple[TensorSpec, ...] = tuple(
            self._spec(value) for value in proto.graph.input if value.name not in self._initializers
        )
        self.outputs: tuple[TensorSpec, ...] = tuple(self._spec(value) for value in proto.graph.output)

    @staticmethod
    def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        element = tensor.elem_type or onnx.TensorProto.FLOAT
        return TensorSpec(value.name, clean_shape(tensor) or (), onnx.helper.tensor_dtype_to_np_dtype(element))

    @classmethod
    def load(cls, path: Path | str) -> Graph:
        """Read a graph that this project wrote itself (use :func:`zsq_deploy.model.load_model` for the user's files)."""
        return cls(onnx.load(str(path)))

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        for item in self.proto.opset_import:
            if item.domain in ("", "ai.onnx"):
                return int(item.version)
        return 1

    def domain_version(self, domain: str) -> int | None:
        """Version of another operator set that the graph imports, or ``None``."""
        return next((int(item.version) for item in self.proto.opset_import if item.domain == domain), None)

    def node(self, name: str) -> onnx.NodeProto:
        """The node of that name."""
        return self._by_name[name]

    def __contains__(self, node_name: str) -> bool:
        return node_name in self._by_name

    def __iter__(self) -> Iterator[onnx.NodeProto]:
        return iter(self.nodes)

    def producer(self, value: str) -> onnx.NodeProto | None:
        """The node that makes a value; ``None`` for inputs and initializers."""
        return self._producer.get(value)

    def consumers(self, value: str) -> Sequence[onnx.NodeProto]:
        """The nodes that read a value, each once, in topological order."""
        return self._consumers.get(value, [])

    def is_output(self, value: str) -> bool:
        """Whether a value is an output of the graph."""
        return any(spec.name == value for spec in self.outputs)

    @property
    def initializer_names(self) -> Sequence[str]:
        """Names of all initializers."""
        return list(self._initializers)

    def constant(self, value: str) -> np.ndarray[Any, Any] | None:
        """The array behind an initializer or the output of a Constant node; ``None`` when the value is computed.

        Types that numpy does not have (bfloat16, int4, float8) come as ml_dtypes arrays.
        """
        if value in self._arrays:
            return self._arrays[value]
        array: np.ndarray[Any, Any] | None = None
        if value in self._initializers:
            array = numpy_helper.to_array(self._initializers[value])
        else:
            node = self._producer.get(value)
            if node is not None and node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                found = attributes(node)
                if "value" in found:
                    array = np.asarray(found["value"])
                elif "value_float" in found:
                    array = np.asarray(found["value_float"], np.float32)
                elif "value_floats" in found:
                    array = np.asarray(found["value_floats"], np.float32)
                elif "value_int" in found:
                    array = np.asarray(found["value_int"], np.int64)
                elif "value_ints" in found:
                    array = np.asarray(found["value_ints"], np.int64)
        if array is not None:
            self._arrays[value] = array
        return array

    @cached_property
    def _inferred(self) -> Mapping[str, onnx.TypeProto.Tensor]:
        try:
            proto = onnx.shape_inference.infer_shapes(self.proto, data_prop=True)
        except Exception:  # shape inference is an aid; models above 2 GiB and exotic ops go without it
            proto = self.proto
        found: dict[str, onnx.TypeProto.Tensor] = {}
        for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
            if value.type.HasField("tensor_type"):
                found[value.name] = value.type.tensor_type
        return found

    def shape(self, value: str) -> Shape | None:
        """The inferred shape of a value (unknown dimensions are ``None``), or ``None`` where the rank is unknown."""
        if value in self._initializers:
            return tuple(self._initializers[value].dims)
        tensor = self._inferred.get(value)
        return clean_shape(tensor) if tensor is not None else None

    def dtype(self, value: str) -> np.dtype[Any] | None:
        """The inferred element type of a value, or ``None``."""
        if value in self._initializers:
            stored: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self._initializers[value].data_type))
            return stored
        tensor = self._inferred.get(value)
        if tensor is None or not tensor.elem_type:
            return None
        inferred: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return inferred

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what the graph computes: operators, attributes, names and weights; not over doc strings and metadata."""
        proto = self.editable()
        proto.doc_string = proto.producer_name = proto.producer_version = ""
        proto.ir_version = 0
        del proto.metadata_props[:]
        del proto.graph.value_info[:]
        proto.graph.doc_string = ""
        for node in proto.graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()

    def editable(self) -> onnx.ModelProto:
        """A deep copy of the protobuf, to change and to index again."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return proto
