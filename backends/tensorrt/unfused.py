"""A Q/DQ graph in float arithmetic alone, from which TensorRT builds its own fake-quant reference.

TensorRT cannot be told to compute a Q/DQ graph in float. But the same numbers can be written without Q/DQ: a rounding is a division, a
``Round`` (half to even, in TensorRT as in ONNX), a ``Clip`` and a multiplication, all in float32, and a quantized weight is a float
constant. An engine
of that graph differs from the 8-bit engine only by what the 8-bit kernels do, and from the twin only by the order of float32 sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from zsq_deploy.errors import ModelError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import QuantizedTensor, dequantized_weight, is_dequantize, is_quantize, read_qdq

__all__ = ["float_form"]


def float_form(graph: Graph) -> onnx.ModelProto:
    """The graph with its Q/DQ pairs written as float operators.

    Args:
        graph: A Q/DQ graph for TensorRT: activations per tensor without a zero point, weights constant.

    Raises:
        ModelError: An activation is rounded in a way that TensorRT does not know (see ``zsq lint``).
    """
    net = Net(graph.proto)
    tensors = {name: tensor for tensor in read_qdq(graph) for name in (tensor.quantize, *tensor.dequantize) if name}
    for node in list(net.nodes):
        if not (is_quantize(node) or is_dequantize(node)):
            continue
        given = graph.constant(node.input[1])
        kind = (
            np.dtype(np.float32) if given is None else given.dtype
        )  # of the numbers around it: 16 bits where the scale has them
        if is_dequantize(node):
            weight = dequantized_weight(graph, node.output[0])
            if weight is not None:
                net.redirect(node.output[0], net.add_constant(f"{node.output[0]}_float", weight.astype(kind)))
                net.remove([node])
                continue
        tensor = tensors.get(node.name)
        if tensor is not None and tensor.is_weight and is_quantize(node):
            continue  # nobody reads it any more
        if tensor is None or tensor.scale.size != 1 or np.any(tensor.zero_point):
            raise ModelError(
                "this rounding is none that TensorRT knows: it takes one constant scale and no zero point",
                where=node.name,
                remedy="zsq lint names what has to be changed",
            )
        net.insert_before(node, *_written(net, node, tensor, kind))
        net.remove([node])
    net.sweep()
    return net.proto()


def _written(net: Net, node: onnx.NodeProto, tensor: QuantizedTensor, kind: np.dtype[Any]) -> list[onnx.NodeProto]:
    """The float operators of one QuantizeLinear or DequantizeLinear; between them the whole numbers are float32."""
    scale = net.add_constant(f"{node.name}_scale", tensor.scale.reshape(()).astype(np.float32))
    source, target, narrow = str(node.input[0]), str(node.output[0]), kind != np.float32
    new: list[onnx.NodeProto] = []

    def step(op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        new.append(net.new_node(op_type, inputs, [output], f"{node.name}_{op_type.lower()}", **attributes))
        return output

    if is_quantize(node):
        if narrow:
            source = step("Cast", [source], net.fresh(f"{target}_wide"), to=onnx.TensorProto.FLOAT)
        whole = step(
            "Round", [step("Div", [source, scale], net.fresh(f"{target}_steps"))], net.fresh(f"{target}_whole")
        )
        low, high = (net.add_constant(f"{node.name}_limit", np.array(limit, np.float32)) for limit in tensor.limits)
        step("Clip", [whole, low, high], target)
    elif narrow:
        wide = step("Mul", [source, scale], net.fresh(f"{target}_wide"))
        step("Cast", [wide], target, to=onnx.helper.np_dtype_to_tensor_dtype(kind))
    else:
        step("Mul", [source, scale], target)
    return new
