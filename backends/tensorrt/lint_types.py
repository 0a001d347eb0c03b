"""Rules about 16-bit floats in a Q/DQ graph: TensorRT with strong types takes them as the graph says them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from zsq_deploy.backends.base import Finding, Target
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.backends.tensorrt.walking import ACTIVATIONS, Rounded, element_types, is_product
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import is_dequantize, is_quantize

__all__ = ["half_types"]

_FLOATS = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def half_types(rounded: Rounded, target: Target) -> Iterator[Finding]:
    """Findings about types; a graph without 16-bit floats has none."""
    graph = rounded.graph
    if not _has_halves(graph):
        return
    types = element_types(graph)
    for node in graph:
        if is_quantize(node) or is_dequantize(node):
            yield from _scale(graph, node, types, target)
        elif is_product(node):
            yield from _operands(node, types)
            yield from _casts(graph, node)


def _has_halves(graph: Graph) -> bool:
    kinds = {tensor.data_type for tensor in graph.proto.graph.initializer}
    kinds |= {spec.type.tensor_type.elem_type for spec in graph.proto.graph.input}
    casts = (attribute.i for node in graph if node.op_type == "Cast" for attribute in node.attribute)
    return bool(kinds & set(_HALF)) or any(kind in _HALF for kind in casts)


def _scale(graph: Graph, node: onnx.NodeProto, types: dict[str, int], target: Target) -> Iterator[Finding]:
    scale = types.get(node.input[1])
    if scale not in _HALF:
        read = types.get(node.input[0])
        if is_quantize(node) and read in _HALF and graph.opset < 23:
            yield _mismatch(node, read, scale)
        return
    if generation(target) < 10:
        yield Finding(
            node.name,
            "half-scale",
            f"its scale is {_FLOATS[scale]}, and TensorRT {generation(target)} takes float32 scales only",
            "write float32 scales, and allow float16 when the engine is built",
            "error",
        )
    elif graph.opset < 19 and node.domain in ("", "ai.onnx"):
        yield Finding(
            node.name,
            "half-scale",
            f"its scale is {_FLOATS[scale]}, which operator set {graph.opset} does not allow",
            "convert the model to operator set 19 or later",
            "error",
        )
    if is_quantize(node) and types.get(node.input[0], scale) != scale:
        yield _mismatch(node, types[node.input[0]], scale)


def _mismatch(node: onnx.NodeProto, read: Any, scale: Any) -> Finding:
    return Finding(
        node.name,
        "scale-type",
        f"it reads {_FLOATS.get(read, read)} and its scale is {_FLOATS.get(scale, scale)}: both have to have one type",
        "give the scale the type of the value that is rounded (zsq: --float-type writes them so)",
        "error",
    )


def _operands(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[Finding]:
    kinds = {_FLOATS[types[name]] for name in node.input if types.get(name) in _FLOATS}
    if len(kinds) > 1:
        yield Finding(
            node.name,
            "mixed-types",
            f"its operands are {' and '.join(sorted(kinds))}: with strong types they have to be the same",
            "cast weights, bias and input to one type (zsq: --float-type)",
            "error",
        )


def _casts(graph: Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    for name in node.input[:2]:
        maker = graph.producer(name)
        before = graph.producer(maker.input[0]) if maker is not None and maker.op_type == "Cast" else None
        if maker is not None and before is not None and is_dequantize(before):
            yield Finding(
                node.name,
                "cast-in-fusion",
                f"the Cast {maker.name!r} stands between DequantizeLinear and {node.op_type}: they do not fuse into an 8-bit kernel",
                "let DequantizeLinear give that type itself, with a scale of it",
            )
    readers = graph.consumers(node.output[0])
    if len(readers) == 1 and readers[0].op_type == "Cast" and not graph.is_output(readers[0].output[0]):
        behind = [reader for reader in graph.consumers(readers[0].output[0]) if reader.op_type in (*ACTIVATIONS, "Add")]
        if behind:
            yield Finding(
                node.name,
                "cast-in-fusion",
                f"a Cast stands between it and the {behind[0].op_type} {behind[0].name!r}: they do not fuse",
                "compute both in one type",
            )
