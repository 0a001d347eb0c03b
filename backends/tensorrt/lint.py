"""Rules that a Q/DQ graph must keep for TensorRT to build it, and to run it in fused 8-bit kernels.

They hold for any Q/DQ graph: ours, those of ONNX Runtime's ``quantize_static``, of NNCF, of a training framework. Each rule is one
function that yields findings; a finding names the node, the rule, what is wrong and what to do. An ``error`` is what the parser or the
builder refuses; a ``warning`` costs speed or accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from zsq_deploy.backends.base import Finding, Target
from zsq_deploy.backends.tensorrt.lint_types import half_types
from zsq_deploy.backends.tensorrt.targets import NEWEST_OPSET, generation
from zsq_deploy.backends.tensorrt.walking import (
    ACTIVATIONS,
    Rounded,
    addend,
    between,
    is_product,
    skips,
    straight_from,
)
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.qdq import weight_axis
from zsq_deploy.quant.reader import QuantizedTensor, is_dequantize, is_quantize

__all__ = ["RULES", "Finding", "lint"]

_INTEGER_OPS = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "QLinearAdd"}
)
_BLOCKS = (64, 128)

Rule = Callable[["Rounded", Target], Iterator[Finding]]


def _file(rounded: Rounded, target: Target) -> Iterator[Finding]:
    graph, newest = rounded.graph, NEWEST_OPSET[generation(target)]
    if graph.opset > newest:
        yield Finding(
            "",
            "opset",
            f"operator set {graph.opset} is newer than what the parser of TensorRT {generation(target)} reads ({newest})",
            f"export with operator set 13 to {newest}",
        )
    if graph.opset < 13 and any(is_quantize(node) or is_dequantize(node) for node in graph):
        yield Finding(
            "",
            "opset",
            f"operator set {graph.opset} has no quantization per channel",
            "convert the model to operator set 13 or later",
            "error",
        )


def _operators(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    for node in rounded.graph:
        if node.op_type in _INTEGER_OPS or node.op_type.startswith("QLinear"):
            yield Finding(
                node.name,
                "integer-operator",
                f"{node.op_type} is an integer operator, and TensorRT's parser knows none",
                "write the network with QuantizeLinear and DequantizeLinear (quantize_static: quant_format=QuantFormat.QDQ)",
                "error",
            )
        elif (is_quantize(node) or is_dequantize(node)) and node.domain not in ("", "ai.onnx"):
            yield Finding(
                node.name,
                "domain",
                f"{node.op_type} is the one of the domain {node.domain!r}, which TensorRT's parser does not know",
                "write it with the standard operator of operator set 13 or 21",
                "error",
            )


def _scales(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    graph = rounded.graph
    for node in graph:
        if not (is_quantize(node) or is_dequantize(node)):
            continue
        scale = graph.constant(node.input[1])
        if scale is None:
            yield Finding(
                node.name,
                "computed-scale",
                "its scale is computed, not constant",
                "write constant scales",
                "error",
            )
        elif not (np.isfinite(scale).all() and (np.asarray(scale, np.float64) > 0).all()):
            yield Finding(
                node.name,
                "bad-scale",
                "its scale is zero, negative or not finite: the builder refuses it",
                "collect the ranges again; look for NaN and for channels that were never excited",
                "error",
            )


def _types(rounded: Rounded, target: Target) -> Iterator[Finding]:
    for tensor in rounded.tensors:
        node = tensor.quantize or (tensor.dequantize[0] if tensor.dequantize else "")
        if tensor.dtype == "int32":
            continue  # a bias: has its own rule
        if np.any(tensor.zero_point):
            yield Finding(
                node,
                "zero-point",
                f"{tensor.name!r} has a zero point other than 0, and TensorRT knows symmetric quantization only",
                "quantize symmetrically (quantize_static: ActivationSymmetric and WeightSymmetric; NNCF: preset=performance)",
                "error",
            )
        if tensor.dtype == "uint8":
            yield Finding(
                node,
                "unsigned",
                f"{tensor.name!r} is uint8, and TensorRT's 8-bit type is signed",
                "write int8 with zero point 0 (quantize_static: activation_type and weight_type QuantType.QInt8; NNCF refuses signed "
                "activations for all of its devices: quantize with zsq instead); without a zero point QuantizeLinear means uint8",
                "error",
            )
        elif tensor.dtype == "int4":
            yield from _int4(tensor, node, target)
        elif tensor.dtype != "int8" and not tensor.dtype.startswith("float"):
            yield Finding(
                node,
                "type",
                f"{tensor.name!r} is {tensor.dtype}: TensorRT has signed 8-bit numbers, and signed 4-bit weights",
                "quantize to int8",
                "error",
            )


def _int4(tensor: QuantizedTensor, node: str, target: Target) -> Iterator[Finding]:
    if generation(target) < 10:
        yield Finding(node, "int4", f"{target.name} knows no 4-bit numbers", "use int8, or tensorrt-10", "error")
    elif not tensor.is_weight:
        yield Finding(
            node,
            "int4",
            f"the activation {tensor.name!r} has 4 bits: TensorRT stores weights so, and nothing else",
            "quantize activations to int8, or leave them in float",
            "error",
        )
    elif tensor.block not in _BLOCKS:
        yield Finding(
            node,
            "int4",
            f"the 4-bit weight {tensor.name!r} has "
            + (f"blocks of {tensor.block}" if tensor.block else "no blocks")
            + ": TensorRT's 4-bit products want one scale for each block of 64 or 128",
            "store it in blocks of 128 along the axis that is summed over (zsq: --bits w4a32)",
        )


def _granularity(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    for tensor in rounded.tensors:
        if not tensor.is_weight and tensor.quantize is not None and tensor.scale.size > 1:
            yield Finding(
                tensor.quantize,
                "activation-granularity",
                f"{tensor.name!r} has {tensor.scale.size} scales: TensorRT's activations have one for the tensor",
                "quantize activations per tensor (NNCF: activations_quantization_params with per_channel=False)",
                "error",
            )
    graph = rounded.graph
    for node in graph:
        if not is_product(node):
            continue
        weight = rounded.of(node.input[1])
        rank = len(graph.shape(node.input[1]) or ())
        if weight is None or not weight.is_weight or weight.block or weight.scale.size == 1 or not rank:
            continue
        axis = (weight.axis or 0) % rank
        if axis != weight_axis(node, rank):
            yield Finding(
                node.name,
                "weight-axis",
                f"the scales of its weights run along axis {axis}; output channels are counted by axis {weight_axis(node, rank)}",
                "quantize weights per output channel (Conv: axis 0, ConvTranspose: axis 1, MatMul: the last axis)",
                "error",
            )


def _storage(rounded: Rounded, target: Target) -> Iterator[Finding]:
    if generation(target) >= 10:
        return
    for tensor in rounded.tensors:
        if tensor.is_weight and tensor.quantize is None and tensor.dtype == "int8":
            yield Finding(
                tensor.dequantize[0],
                "integer-weight",
                f"{tensor.name!r} is stored as integers, and the parser of TensorRT 8 takes no 8-bit constants",
                "store float numbers behind QuantizeLinear and DequantizeLinear (quantize_static: AddQDQPairToWeight=True)",
                "error",
            )


def _biases(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    for node in rounded.graph:
        if is_product(node) and len(node.input) > 2 and rounded.of(node.input[2]) is not None:
            yield Finding(
                node.name,
                "quantized-bias",
                f"its bias {node.input[2]!r} is quantized; TensorRT wants a float constant there",
                "leave biases in float (quantize_static: extra_options QuantizeBias=False)",
                "error",
            )


def _products(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    for node in rounded.graph:
        if not is_product(node):
            continue
        weight = rounded.of(node.input[1])
        if weight is not None and weight.dtype == "int4":
            continue  # weights only: the product is computed in float
        reads, has = rounded.behind(node.input[0]) is not None, rounded.behind(node.input[1]) is not None
        if reads == has:
            continue  # in 8 bits, or in float on purpose
        yield Finding(
            node.name,
            "half-quantized",
            f"its {'input' if not has else 'weight'} is quantized and its {'weight' if not has else 'input'} is not: "
            "it is computed in float, and the rounding is paid for nothing",
            f"quantize its {'weight' if not has else 'input'} as well, or neither",
        )


def _activations(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    """Q/DQ between a convolution and the BatchNormalization or activation behind it."""
    graph = rounded.graph
    for node in graph:
        if node.op_type not in (*ACTIVATIONS, "BatchNormalization") or not node.input:
            continue
        tensor = rounded.of(node.input[0])
        if tensor is None or tensor.is_weight:
            continue
        maker = straight_from(graph, tensor.name)
        if maker is not None:
            yield Finding(
                tensor.quantize or node.name,
                "inside-fusion",
                f"{tensor.name!r} is rounded between {maker.op_type} {maker.name!r} and the {node.op_type} behind it: they do not fuse, "
                "and accuracy is lost",
                f"round behind the {node.op_type} instead (quantize_static: OpTypesToExcludeOutputQuantization)",
            )


def _residuals(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    graph = rounded.graph
    for node in graph:
        if node.op_type != "Add" or addend(graph, node):
            continue
        branches = [value for value in node.input if straight_from(graph, value) is not None]
        for value in node.input if not branches else ():
            tensor = rounded.of(value)
            if tensor is not None and not tensor.is_weight and straight_from(graph, tensor.name) is not None:
                yield Finding(
                    tensor.quantize or node.name,
                    "rounded-branch",
                    f"{tensor.name!r} is rounded between its convolution and the Add {node.name!r}: they do not fuse",
                    "round the other operand (the skip) only, and leave this one as it is",
                )
                break
        if not branches or not between(rounded, node):
            continue
        for value in skips(node, branches):
            if rounded.behind(value) is None:
                yield Finding(
                    node.name,
                    "residual-not-quantized",
                    f"its operand {value!r} is not rounded: the convolution in front of it has to write float numbers for the sum",
                    f"put a Q/DQ pair between {value!r} and the Add",
                )


def _concatenations(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    for node in rounded.graph:
        if node.op_type != "Concat":
            continue
        parts = [rounded.behind(value) for value in node.input if rounded.graph.constant(value) is None]
        known = [part for part in parts if part is not None]
        behind = rounded.reading(node.output[0])
        if len({float(part.scale) for part in (*known, *behind) if part.scale.size == 1}) > 1:
            yield Finding(
                node.name,
                "concat-scales",
                "its inputs and its output are rounded with different scales: each difference is a kernel that rounds anew",
                "give all of them the largest of their scales",
            )
        elif known and len(known) < len(parts):
            yield Finding(
                node.name,
                "concat-mixed",
                "some of its inputs are rounded and others are not: it is computed in float",
                "round all inputs with one scale, or none",
            )


def _moves(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    for tensor in rounded.tensors:
        if tensor.is_weight or tensor.quantize is None or tensor.scale.size > 1:
            continue
        before = rounded.behind(tensor.name)
        maker = rounded.graph.producer(tensor.name)
        if before is None or before.scale.size > 1 or maker is None or maker.op_type == "Concat":
            continue
        if float(before.scale) != float(tensor.scale):
            yield Finding(
                tensor.quantize,
                "scale-across-move",
                f"{tensor.name!r} only moves numbers of {before.name!r}, and is rounded with another scale: a kernel of its own",
                "use one scale on both sides of pooling and reshaping",
            )


def _unread(rounded: Rounded, _target: Target) -> Iterator[Finding]:
    graph = rounded.graph
    for tensor in rounded.tensors:
        if tensor.is_weight or tensor.quantize is None:
            continue
        if not tensor.dequantize:
            yield Finding(
                tensor.quantize,
                "not-dequantized",
                f"the integers of {tensor.name!r} are read without DequantizeLinear",
                "put a DequantizeLinear behind every QuantizeLinear",
                "error",
            )
        elif all(graph.is_output(graph.node(name).output[0]) for name in tensor.dequantize):
            yield Finding(
                tensor.quantize,
                "output-quantized",
                f"{tensor.name!r} is an output of the network, and is rounded: one more kernel, and less accuracy",
                "leave outputs in float (quantize_static: OpTypesToExcludeOutputQuantization)",
            )


RULES: tuple[Rule, ...] = (
    _file,
    _operators,
    _scales,
    _types,
    _granularity,
    _storage,
    _biases,
    _products,
    _activations,
    _residuals,
    _concatenations,
    _moves,
    _unread,
    half_types,
)


def lint(graph: Graph | Path | str, target: Target) -> list[Finding]:
    """Check a Q/DQ graph against the rules of TensorRT.

    Args:
        graph: The graph, or the ONNX file that holds it, whoever wrote it.
        target: One of the ``tensorrt-...`` targets.

    Returns:
        All findings, errors first.
    """
    rounded = Rounded(graph if isinstance(graph, Graph) else Graph.load(graph))
    findings = [finding for rule in RULES for finding in rule(rounded, target)]
    return sorted(findings, key=lambda one: one.severity != "error")
