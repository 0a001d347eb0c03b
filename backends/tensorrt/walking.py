"""Looking around in a Q/DQ graph, for the rules and for what will fuse."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.qdq import TRANSPARENT
from zsq_deploy.quant.reader import QuantizedTensor, is_quantize, read_qdq

__all__ = [
    "ACTIVATIONS",
    "CONVOLUTIONS",
    "PRODUCTS",
    "Rounded",
    "addend",
    "between",
    "element_types",
    "is_product",
    "moves",
    "skips",
    "straight_from",
]

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "HardSigmoid", "HardSwish", "Softplus")
"""Activations that TensorRT computes in the kernel of the convolution in front of them."""


class Rounded:
    """A Q/DQ graph and its rounded tensors, by the values that carry them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tensors = read_qdq(graph)
        self._by_output = {graph.node(name).output[0]: tensor for tensor in self.tensors for name in tensor.dequantize}
        self._by_quantize = {tensor.quantize: tensor for tensor in self.tensors if tensor.quantize is not None}

    def of(self, value: str) -> QuantizedTensor | None:
        """The rounded tensor that a value is."""
        return self._by_output.get(value)

    def behind(self, value: str) -> QuantizedTensor | None:
        """The rounded tensor that a value is, or is moved from; of a concatenation with one scale the first."""
        while value not in self._by_output:
            maker = self.graph.producer(value)
            if maker is not None and maker.op_type == "Concat" and maker.domain in ("", "ai.onnx"):
                parts = [self.behind(name) for name in maker.input]
                known = [part for part in parts if part is not None and part.scale.size == 1]
                same = len(known) == len(parts) and len({float(part.scale) for part in known}) == 1
                return known[0] if same else None
            if maker is None or not moves(maker):
                return None
            value = maker.input[0]
        return self._by_output[value]

    def reading(self, value: str) -> list[QuantizedTensor]:
        """What a value is rounded to, directly or behind nodes that move it."""
        found: list[QuantizedTensor] = []
        for reader in self.graph.consumers(value):
            if is_quantize(reader) and reader.name in self._by_quantize:
                found.append(self._by_quantize[reader.name])
            elif moves(reader):
                found.extend(tensor for name in reader.output for tensor in self.reading(name))
        return found

    def only_rounded(self, value: str) -> bool:
        """Whether every reader of a value rounds it, directly or behind nodes that move it; an output of the network is read in float."""
        readers = self.graph.consumers(value)
        return (
            bool(readers)
            and not self.graph.is_output(value)
            and all(
                is_quantize(reader)
                or (moves(reader) and all(self.only_rounded(name) for name in reader.output if name))
                for reader in readers
            )
        )


def is_product(node: onnx.NodeProto) -> bool:
    """Whether a node is a convolution or matrix product."""
    return node.op_type in PRODUCTS and node.domain in ("", "ai.onnx")


def moves(node: onnx.NodeProto) -> bool:
    """Whether a node moves numbers without changing them."""
    if node.op_type == "Resize" and attributes(node).get("mode", "nearest") not in ("nearest", b"nearest"):
        return False
    return node.op_type in TRANSPARENT and node.domain in ("", "ai.onnx") and bool(node.input)


def straight_from(graph: Graph, value: str) -> onnx.NodeProto | None:
    """The convolution whose output a value is, if nothing else reads it."""
    maker = graph.producer(value)
    if maker is None or maker.op_type not in CONVOLUTIONS or len(graph.consumers(value)) != 1 or graph.is_output(value):
        return None
    return maker


def addend(graph: Graph, add: onnx.NodeProto) -> bool:
    """Whether an Add has a constant operand (a bias)."""
    return any(graph.constant(value) is not None for value in add.input)


def skips(add: onnx.NodeProto, branches: Collection[str]) -> list[str]:
    """The operands of a residual Add beside the one that its convolution computes; of two convolutions the later one counts."""
    kept = next((value for value in reversed(add.input) if value in branches), "")
    return [value for value in add.input if value != kept]


def between(rounded: Rounded, node: onnx.NodeProto) -> bool:
    """Whether what a node gives is rounded behind it or behind its activation."""
    value = str(node.output[0])
    readers = rounded.graph.consumers(value)
    if len(readers) == 1 and readers[0].op_type in ACTIVATIONS and not rounded.graph.is_output(value):
        value = str(readers[0].output[0])
    return bool(rounded.reading(value))


def element_types(graph: Graph) -> dict[str, int]:
    """Element type of every value, by ONNX's type inference; constants and inputs included."""
    inferred = onnx.shape_inference.infer_shapes(graph.proto).graph
    found = {
        info.name: info.type.tensor_type.elem_type
        for info in (*inferred.value_info, *inferred.input, *inferred.output)
        if info.type.HasField("tensor_type")
    }
    found.update({tensor.name: tensor.data_type for tensor in inferred.initializer})
    for node in graph:
        if node.op_type == "Constant":
            array = graph.constant(node.output[0])
            if array is not None:
                found[node.output[0]] = int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
    return found
