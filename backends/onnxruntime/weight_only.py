"""Weights only: matrix products with 4-bit or 8-bit weights in blocks, everything computed in float32.

ONNX Runtime has one kernel for that, MatMulNBits. It knows no convolutions: those stay in float. The engine names the kernel itself, with
``accuracy_level=1`` (float32). Left to the runtime, a DequantizeLinear in front of a MatMul becomes the same kernel with level 4, which also rounds
the activations to 8 bits while it runs, and so computes something else than its graph. The Q/DQ graph beside the engine says the same numbers with
DequantizeLinear in blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.backends.onnxruntime.options import BuildOptions
from zsq_deploy.backends.onnxruntime.tidy import IR_OF_OPSET
from zsq_deploy.errors import EngineError
from zsq_deploy.model.constants import own_constants
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.fakequant import weight_qparams
from zsq_deploy.quant.qdq import raise_opset
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["BLOCKS", "WeightsOnly", "weights_only"]

Array = npt.NDArray[np.generic]

BLOCKS: tuple[int, ...] = (32, 16)
"""Lengths of blocks along the summed axis, the first one that divides it."""

_FLOAT32 = 1  # MatMulNBits' accuracy_level


@dataclass(frozen=True)
class WeightsOnly:
    """A network with narrow weights.

    Attributes:
        qdq: What is computed: DequantizeLinear in blocks in front of matrix products.
        engine: The same with MatMulNBits.
        stored: Names of the matrix products with narrow weights.
        skipped: Other convolutions and matrix products -> why they stay in float.
    """

    qdq: Graph
    engine: onnx.ModelProto
    stored: tuple[str, ...]
    skipped: Mapping[str, str]


def weights_only(graph: Graph, options: BuildOptions) -> WeightsOnly:
    """Store the weights of matrix products in few bits.

    Args:
        graph: Float graph, batch normalization folded.
        options: ``bits`` (``w4a32`` or ``w8a32``) and exclusions.

    Raises:
        EngineError: The network has no matrix product whose weights can be stored so.
    """
    bits = int(options.bits[1])
    graph = raise_opset(own_constants(graph, ("MatMul", "Gemm")), 21)
    net, packed = Net(graph.proto), Net(graph.proto)
    stored: list[str] = []
    skipped: dict[str, str] = {}
    fast = {node.name: node for node in packed.nodes}
    for node in list(net.nodes):
        if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            continue
        problem, block = _problem(graph, node, options)
        if problem:
            skipped[node.name] = problem
            continue
        weight = graph.constant(node.input[1])
        assert weight is not None
        axis = 1 if node.op_type == "Gemm" and attributes(node).get("transB", 0) else 0
        scheme = Scheme(bits=bits, signed=True, symmetric=True, granularity=Granularity.BLOCK, block=block)
        parameters = weight_qparams(weight, scheme, axis, "mse" if options.weight_method == "mse" else "minmax")
        codes = parameters.quantize(np.asarray(weight, np.float64))
        name = node.input[1]
        value = net.fresh(f"{name}_DequantizeLinear_Output")
        inputs = [
            net.add_constant(f"{name}_quantized", codes),
            net.add_constant(f"{name}_scale", parameters.scale),
            net.add_constant(f"{name}_zero_point", parameters.zero_point.astype(codes.dtype)),
        ]
        made = net.new_node(
            "DequantizeLinear", inputs, [value], f"{name}_DequantizeLinear", axis=axis, block_size=block
        )
        net.insert_before(node, made)
        node.input[1] = value
        _put_kernel(packed, fast[node.name], codes, parameters.scale, axis, bits, block)
        stored.append(node.name)
    if not stored:
        raise EngineError(
            "no matrix product of this network can have its weights stored in blocks",
            where="; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5]) or "there is none",
            remedy="ONNX Runtime stores weights only of matrix products; quantize with --bits w8a8 or w4a8",
        )
    return WeightsOnly(Graph(_finished(net, "")), _finished(packed, "com.microsoft"), tuple(stored), skipped)


def _problem(graph: Graph, node: onnx.NodeProto, options: BuildOptions) -> tuple[str, int]:
    """Why a node stays in float, empty if it does not; and the length of its blocks."""
    if node.op_type not in ("MatMul", "Gemm"):
        return "ONNX Runtime has no convolution with narrow weights", 0
    weight = graph.constant(node.input[1])
    if node.name in options.exclude:
        return "excluded by the options", 0
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return "its second input is no constant matrix of float32 numbers", 0
    found = attributes(node)
    if node.op_type == "Gemm" and (
        found.get("transA", 0) or found.get("alpha", 1.0) != 1 or found.get("beta", 1.0) != 1
    ):
        return "its first input is transposed or scaled", 0
    summed = weight.shape[1] if node.op_type == "Gemm" and found.get("transB", 0) else weight.shape[0]
    block = next((size for size in BLOCKS if summed % size == 0), 0)
    return ("" if block else f"{summed} weights to sum over are no multiple of {BLOCKS[-1]}"), block


def _put_kernel(net: Net, node: onnx.NodeProto, codes: Array, scale: Array, axis: int, bits: int, block: int) -> None:
    """Turn a matrix product into MatMulNBits: weights [N, K / block, bytes], scales [N, K / block], zero point in the middle."""
    rows = np.asarray(codes).astype(np.int64)
    rows, scales = (rows, np.asarray(scale)) if axis == 1 else (rows.T, np.asarray(scale).T)
    outputs, summed = rows.shape
    octets = (rows + 2 ** (bits - 1)).astype(np.uint8).reshape(outputs, summed // block, block)
    if bits == 4:
        octets = octets[..., 0::2] | (octets[..., 1::2] << 4)
    name, bias = str(node.input[1]), str(node.input[2]) if len(node.input) > 2 else ""
    inputs = [
        str(node.input[0]),
        net.add_constant(f"{name}_packed", octets),
        net.add_constant(f"{name}_scale", np.ascontiguousarray(scales.reshape(-1), np.float32)),
    ]
    product = str(node.output[0]) if not bias else net.fresh(f"{node.output[0]}_product")
    place = next(index for index, item in enumerate(net.nodes) if item is node)
    net.remove([node])
    kernel = net.new_node(
        "MatMulNBits",
        inputs,
        [product],
        node.name,
        domain="com.microsoft",
        K=summed,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=_FLOAT32,
    )
    net.nodes.insert(place, kernel)
    if bias:
        net.nodes.insert(place + 1, net.new_node("Add", [product, bias], [node.output[0]], f"{node.name}_bias"))
    net.touch()


def _finished(net: Net, domain: str) -> onnx.ModelProto:
    net.touch()
    net.sweep()
    proto = net.proto()
    if domain and all(one.domain != domain for one in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    proto.ir_version = max(proto.ir_version, IR_OF_OPSET[21])
    return proto
