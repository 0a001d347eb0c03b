"""How much arithmetic each layer is: multiply-accumulates from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.model.shapes import Probe, probe

__all__ = ["node_macs"]

_CONV = ("Conv", "ConvInteger", "QLinearConv")
_MATMUL = ("MatMul", "MatMulInteger", "QLinearMatMul")


def node_macs(graph: Graph, batch: int = 1, input_shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, int]:
    """Multiply-accumulates of every convolution and matrix product.

    Additions of a bias do not count, positions where a kernel reaches into the padding do (the runtimes count so too).

    Args:
        graph: Any graph, with Q/DQ or without.
        batch: Number of samples.
        input_shapes: Shapes of the inputs, where the graph leaves more open than the batch.

    Returns:
        Node name -> count, for Conv, ConvTranspose, Gemm and MatMul and their integer forms. A node whose shapes cannot be
        found counts as 0.
    """
    shapes = {
        spec.name: tuple(input_shapes[spec.name])
        if input_shapes and spec.name in input_shapes
        else tuple(batch if axis == 0 and size is None else size or 1 for axis, size in enumerate(spec.shape))
        for spec in graph.inputs
    }
    known = probe(graph.proto, shapes)
    return {
        node.name: _count(node.op_type, list(node.input), node.output[0], attributes(node), known)
        for node in graph.nodes
        if node.domain in ("", "ai.onnx") and node.op_type in (*_CONV, "ConvTranspose", "Gemm", *_MATMUL)
    }


def _count(op_type: str, inputs: Sequence[str], output: str, found: Mapping[str, object], known: Probe) -> int:
    weight_at = 3 if op_type.startswith("QLinear") else 1
    source, weight, target = (known.known(name) for name in (inputs[0], inputs[weight_at], output))
    if source is None or weight is None or target is None:
        return 0
    if op_type in _CONV:  # every output value: C in / groups x kernel
        return int(np.prod(target, dtype=np.int64) * np.prod(weight[1:], dtype=np.int64))
    if op_type == "ConvTranspose":  # every input value: C out / groups x kernel
        return int(np.prod(source, dtype=np.int64) * np.prod(weight[1:], dtype=np.int64))
    if op_type == "Gemm":
        inner = source[0] if found.get("transA", 0) else source[1]
        return int(np.prod(target, dtype=np.int64) * inner)
    return int(np.prod(target, dtype=np.int64) * source[-1])
