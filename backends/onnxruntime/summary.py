"""What is in an engine's file, for ``zsq inspect``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from zsq_deploy.backends.onnxruntime.options import MAC_OPS
from zsq_deploy.model.graph import Graph

__all__ = ["summarize"]


def summarize(graph: Graph | Path | str) -> dict[str, Any]:
    """Count what a float or Q/DQ graph holds.

    Returns:
        JSON values: operator set, IR version, inputs and outputs, operators, types of quantized activations, weights and biases,
        how many convolutions and matrix products stand between Q/DQ pairs, and the number of parameters with their bytes.
    """
    path = None if isinstance(graph, Graph) else Path(graph)
    if not isinstance(graph, Graph):
        graph = Graph.load(graph)
    activations: Counter[str] = Counter()
    constants: Counter[str] = Counter()
    for node in graph:
        if node.op_type == "QuantizeLinear":
            zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            kind = str(zero.dtype) if zero is not None else "uint8"
            activations[
                kind + (" symmetric" if zero is not None and not np.asarray(zero).any() and kind == "int8" else "")
            ] += 1
        elif node.op_type == "DequantizeLinear":
            codes = graph.constant(node.input[0])
            if codes is not None:
                scale = graph.constant(node.input[1])
                wide = scale is not None and scale.size > 1
                constants[f"{codes.dtype} {'per channel' if wide else 'per tensor'}"] += 1
    macs = [node for node in graph if node.op_type in (*MAC_OPS, "ConvTranspose")]
    paired = 0
    for node in macs:
        makers = [graph.producer(name) for name in node.input[:2]]
        paired += all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
    sizes = [graph.constant(name) for name in graph.initializer_names]
    return {
        "file_bytes": path.stat().st_size if path is not None else None,
        "opset": graph.opset,
        "ir_version": int(graph.proto.ir_version),
        "domains": sorted({one.domain or "ai.onnx" for one in graph.proto.opset_import}),
        "inputs": {spec.name: [str(spec.dtype), list(spec.shape)] for spec in graph.inputs},
        "outputs": {spec.name: [str(spec.dtype), list(spec.shape)] for spec in graph.outputs},
        "operators": dict(sorted(Counter(node.op_type for node in graph).items())),
        "quantized_activations": dict(activations),
        "quantized_constants": dict(constants),
        "convolutions_and_products": {"all": len(macs), "between_pairs": paired},
        "parameters": int(sum(array.size for array in sizes if array is not None)),
        "parameter_bytes": int(sum(array.nbytes for array in sizes if array is not None)),
    }
