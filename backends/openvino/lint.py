"""Rules that a Q/DQ graph must keep for OpenVINO to run it in int8 kernels and to compute what it says.

Each rule is one function that yields findings; a finding names the node, the rule, what is wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx

from zsq_deploy.backends.base import Finding, Target
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import QuantizedTensor, is_dequantize, is_quantize, read_qdq

__all__ = ["RULES", "Finding", "lint"]

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVES = (
    "Relu",
    "Clip",
    "Reshape",
    "Flatten",
    "Transpose",
    "MaxPool",
    "GlobalMaxPool",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Pad",
    "Concat",
    "Resize",
    "Gather",
    "DepthToSpace",
)
_NORMALIZATIONS = ("LayerNormalization", "MeanVarianceNormalization")
_NEWEST = 21

Rule = Callable[[Graph, Target], Iterator[Finding]]


def _file_stamps(graph: Graph, _target: Target) -> Iterator[Finding]:
    if graph.opset > _NEWEST:
        yield Finding(
            "",
            "opset",
            f"operator set {graph.opset} is newer than what this project checks with OpenVINO ({_NEWEST})",
            f"export with operator set 13 to {_NEWEST}",
        )
    if graph.opset < 13:
        yield Finding(
            "",
            "opset",
            f"operator set {graph.opset} has no quantization per channel",
            "convert the model to operator set 13 or later",
            "error",
        )


def _scales(graph: Graph, _target: Target) -> Iterator[Finding]:
    for node in graph:
        if not (is_quantize(node) or is_dequantize(node)):
            continue
        scale = graph.constant(node.input[1])
        if scale is None:
            yield Finding(node.name, "computed-scale", "its scale is computed, not constant", "write constant scales")
        elif not (np.isfinite(scale).all() and (np.asarray(scale, np.float64) > 0).all()):
            yield Finding(
                node.name,
                "bad-scale",
                "its scale is zero, negative or not finite",
                "collect the ranges again; look for NaN and for channels that were never excited",
                "error",
            )


def _activations(graph: Graph, target: Target) -> Iterator[Finding]:
    wanted = "int8" if target.activation.signed else "uint8"
    for tensor in read_qdq(graph):
        if tensor.is_weight or tensor.quantize is None:
            continue
        if tensor.scale.size > 1:
            yield Finding(
                tensor.quantize,
                "activation-granularity",
                f"{tensor.name!r} has a scale for each channel: layers that sum over channels run in float, depthwise ones may",
                "use one scale for the tensor (NNCF: activations_quantization_params with per_channel=False)",
            )
        elif "16" in tensor.dtype:
            yield Finding(
                tensor.quantize,
                "16-bit-activation",
                f"{tensor.name!r} has 16 bits: the layers behind it run in float",
                "use 8-bit activations on this target",
            )
        elif tensor.dtype != wanted and np.asarray(tensor.zero_point).any():
            yield Finding(
                tensor.quantize,
                "activation-type",
                f"{tensor.name!r} is {tensor.dtype} with a zero point; {target.name} wants {wanted}, or signed numbers without one",
                f"quantize activations to {wanted}",
            )


def _products(graph: Graph, _target: Target) -> Iterator[Finding]:
    tensors = {tensor.output: tensor for tensor in read_qdq(graph) if tensor.output}
    for node in graph:
        if node.op_type not in _PRODUCTS or node.domain not in ("", "ai.onnx"):
            continue
        if _behind(graph, node.input[0], tensors) is None:
            yield Finding(
                node.name,
                "input-not-quantized",
                "its input is not quantized",
                "put a Q/DQ pair in front of it, or accept float",
            )
        weight = _behind(graph, node.input[1], tensors)
        if weight is None:
            yield Finding(
                node.name,
                "weight-not-quantized",
                "its weights are not quantized",
                "quantize the weights, or accept float",
            )
        elif weight.is_weight and weight.dtype in ("int8", "int4") and np.asarray(weight.zero_point).any():
            yield Finding(
                node.name,
                "weight-zero-point",
                "its weights are asymmetric: every product needs a correction, or the layer runs in float",
                "quantize weights symmetrically",
            )


def _residuals(graph: Graph, _target: Target) -> Iterator[Finding]:
    """OpenVINO computes an Add inside the convolution in front of it, without the rounding in between."""
    tensors = {tensor.output: tensor for tensor in read_qdq(graph) if tensor.output and not tensor.is_weight}
    for node in graph:
        if node.op_type != "Add" or any(_from_convolution(graph, value) for value in node.input):
            continue  # merged into the convolution whose output is not rounded
        for value in node.input:
            tensor = tensors.get(value)
            if tensor is None or len(graph.consumers(value)) != 1:
                continue
            if _from_convolution(graph, tensor.name):
                yield Finding(
                    node.name,
                    "rounded-before-sum",
                    f"{tensor.name!r} is rounded between the convolution and the sum; OpenVINO fuses them and leaves that rounding out, "
                    "so the engine computes something else than the graph says",
                    "take the Q/DQ pair between the convolution and the Add away",
                )


def _normalizations(graph: Graph, _target: Target) -> Iterator[Finding]:
    """OpenVINO takes the scale of a rounding through the normalization behind it, and leaves its epsilon as it is.

    It does so with codes without a shift, and with sums, whatever the zero points of what they add.
    """
    tensors = {tensor.output: tensor for tensor in read_qdq(graph) if tensor.output and not tensor.is_weight}
    for node in graph:
        if node.op_type not in _NORMALIZATIONS:
            continue
        maker = graph.producer(node.input[0])
        rounded = [node.input[0]] if maker is None or maker.op_type != "Add" else list(maker.input)
        found = [tensors[value] for value in rounded if value in tensors]
        if len(rounded) == 1:
            found = [one for one in found if not _shifted(one)]
        if found:
            yield Finding(
                node.name,
                "rounded-before-normalization",
                f"{found[0].name!r} is rounded in front of it; OpenVINO normalizes the codes and keeps epsilon as it is, so the engine "
                "computes something else than the graph says where variances are small",
                "take the Q/DQ pair in front of it away: a normalization computes in float anyway",
            )


def _shifted(tensor: QuantizedTensor) -> bool:
    """Whether OpenVINO has to take a zero point off these codes: it reads unsigned codes around 128 as signed ones."""
    zero = np.asarray(tensor.zero_point)
    return bool(zero.any()) and not (tensor.dtype == "uint8" and bool((zero == 128).all()))


def _from_convolution(graph: Graph, value: str) -> bool:
    """Whether a value is what a convolution gives, and has one reader."""
    maker = graph.producer(value)
    return maker is not None and maker.op_type in ("Conv", "ConvTranspose") and len(graph.consumers(value)) == 1


def _behind(graph: Graph, value: str, tensors: dict[str, QuantizedTensor]) -> QuantizedTensor | None:
    """The rounded tensor that a value is, or is moved from."""
    maker: onnx.NodeProto | None
    while value not in tensors:
        maker = graph.producer(value)
        if maker is None or maker.op_type not in _MOVES or not maker.input:
            return None
        value = maker.input[0]
    return tensors[value]


RULES: tuple[Rule, ...] = (_file_stamps, _scales, _activations, _products, _residuals, _normalizations)


def lint(graph: Graph | Path | str, target: Target) -> list[Finding]:
    """Check a Q/DQ graph against the rules of OpenVINO.

    Args:
        graph: The graph, or the file that holds it: ONNX, or an IR (``.xml``), whoever wrote it.
        target: One of the ``openvino-...`` targets.

    Returns:
        All findings, errors first.
    """
    if not isinstance(graph, Graph):
        if Path(graph).suffix == ".xml":
            from zsq_deploy.backends.openvino.ir import ir_to_qdq

            graph = ir_to_qdq(Path(graph))
        else:
            graph = Graph.load(graph)
    findings = [finding for rule in RULES for finding in rule(graph, target)]
    return sorted(findings, key=lambda one: one.severity != "error")
