"""What is in an engine's file, for ``zsq inspect``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from zsq_deploy.backends.openvino.convert import convert
from zsq_deploy.backends.openvino.reading import read, weights_of
from zsq_deploy.model.graph import Graph

__all__ = ["summarize"]

_PRODUCTS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
_COPIES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Convert", "MaxPool", "Concat", "Multiply", "Subtract")


def summarize(graph: Graph | Path | str) -> dict[str, Any]:
    """Count what an IR or an ONNX graph holds, as OpenVINO sees it.

    Returns:
        JSON values: inputs and outputs, operators, FakeQuantize by levels, stored constants by type, how many convolutions and
        matrix products have FakeQuantize (or stored integers) on both inputs, and the number of parameters with their bytes.

    Raises:
        EngineError: The file cannot be read.
    """
    path = None if isinstance(graph, Graph) else Path(graph)
    model = convert(graph) if isinstance(graph, Graph) else read(Path(graph))
    operators: Counter[str] = Counter()
    levels: Counter[str] = Counter()
    constants: Counter[str] = Counter()
    products = paired = parameters = parameter_bytes = 0
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        operators[kind] += 1
        if kind == "FakeQuantize":
            wide = max(int(np.prod(node.input(place).get_shape())) for place in range(1, 5)) > 1
            levels[f"{node.get_attributes()['levels']} levels {'per channel' if wide else 'per tensor'}"] += 1
        elif kind == "Constant":
            constants[node.get_element_type().get_type_name()] += 1
            parameters += int(np.prod(node.get_output_shape(0)))
            parameter_bytes += int(node.get_byte_size())
        elif kind in _PRODUCTS:
            products += 1
            paired += all(_is_quantized(node, place) for place in (0, 1))
    bytes_ = None
    if path is not None:
        bytes_ = path.stat().st_size
        if path.suffix == ".xml":
            bytes_ += weights_of(path).stat().st_size
    return {
        "file_bytes": bytes_,
        "inputs": {port.any_name: [_type(port), port.partial_shape.to_string()] for port in model.inputs},
        "outputs": {port.any_name: [_type(port), port.partial_shape.to_string()] for port in model.outputs},
        "operators": dict(sorted(operators.items())),
        "quantized_activations_and_weights": dict(levels),
        "constants": dict(constants),
        "convolutions_and_products": {"all": products, "between_pairs": paired},
        "parameters": parameters,
        "parameter_bytes": parameter_bytes,
    }


def _type(port: Any) -> str:
    return str(port.get_element_type().get_type_name())


def _is_quantized(node: Any, place: int) -> bool:
    source = node.input_value(place).get_node()
    integers = False
    while source.get_type_name() in _COPIES:
        source = source.input_value(0).get_node()
        integers = integers or source.get_element_type().get_type_name() in ("i8", "u8", "i4", "u4")
    return bool(source.get_type_name() == "FakeQuantize" or integers)
