"""Rules that a Q/DQ graph must keep for ONNX Runtime to run it in integer kernels, checked before any device sees the file.

Each rule is one function that yields findings; a finding names the node, the rule, what is wrong and what to do. The same rules explain
afterwards why a node ran in float (:func:`explain`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.backends.base import Finding, Target
from zsq_deploy.backends.onnxruntime.options import MAC_OPS
from zsq_deploy.backends.onnxruntime.targets import weight_limit
from zsq_deploy.backends.onnxruntime.tidy import IR_OF_OPSET
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["INTEGER_FORMS", "RULES", "Finding", "explain", "lint"]

Array = npt.NDArray[Any]

INTEGER_FORMS = frozenset(
    (
        *MAC_OPS,
        "Add",
        "Mul",
        "Concat",
        "LeakyRelu",
        "Sigmoid",
        "Softmax",
        "AveragePool",
        "GlobalAveragePool",
        "MaxPool",
        "Reshape",
        "Transpose",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "Pad",
        "Resize",
        "Relu",
        "Clip",
        "Where",
    )
)
"""Operators that ONNX Runtime's CPU provider can compute on 8-bit integers."""


@dataclass(frozen=True)
class _Pair:
    """A DequantizeLinear and what it reads."""

    node: onnx.NodeProto
    scale: Array | None
    zero: Array | None
    codes: Array | None  # constant codes (weights, biases)
    dtype: np.dtype[Any] | None


def _pair(graph: Graph, value: str) -> _Pair | None:
    maker = graph.producer(value)
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    zero = graph.constant(maker.input[2]) if len(maker.input) > 2 and maker.input[2] else None
    codes = graph.constant(maker.input[0])
    dtype = codes.dtype if codes is not None else (zero.dtype if zero is not None else graph.dtype(maker.input[0]))
    return _Pair(maker, graph.constant(maker.input[1]), zero, codes, dtype)


Rule = Callable[[Graph, Target], Iterator[Finding]]


def _file_stamps(graph: Graph, target: Target) -> Iterator[Finding]:
    needed = IR_OF_OPSET.get(graph.opset, target.ir_version)
    allowed = max(needed, target.ir_version)
    if graph.proto.ir_version > allowed:
        yield Finding(
            "",
            "ir-version",
            f"IR version {graph.proto.ir_version}; operator set {graph.opset} needs only {needed}",
            f"stamp IR version {allowed}, or runtimes as old as the operator set refuse the file",
            "error",
        )
    if graph.opset > max(IR_OF_OPSET):
        yield Finding(
            "",
            "opset",
            f"operator set {graph.opset} is newer than what this project checks ({max(IR_OF_OPSET)})",
            f"export with operator set {target.opset} to 21",
        )
    if graph.opset < 13:
        yield Finding(
            "",
            "opset",
            f"operator set {graph.opset} has no quantization per channel",
            f"convert the model to operator set {target.opset}",
            "error",
        )


def _contrib_pairs(graph: Graph, _target: Target) -> Iterator[Finding]:
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain not in ("", "ai.onnx"):
            yield Finding(
                node.name,
                "contrib-domain",
                f"{node.op_type} is of domain {node.domain!r}, which only ONNX Runtime knows",
                "raise the operator set to 21 before quantizing, so that the standard operators hold 4- and 16-bit types",
            )


def _scales(graph: Graph, _target: Target) -> Iterator[Finding]:
    for node in graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = graph.constant(node.input[1])
        if scale is None:
            yield Finding(
                node.name, "computed-scale", "its scale is computed, not constant", "write constant scales", "warning"
            )
        elif not (np.isfinite(scale).all() and (np.asarray(scale, np.float64) > 0).all()):
            yield Finding(
                node.name,
                "bad-scale",
                "its scale is zero, negative or not finite",
                "collect the ranges again; look for NaN and for channels that were never excited",
                "error",
            )


def _activations(graph: Graph, target: Target) -> Iterator[Finding]:
    wanted = np.dtype(np.int8 if target.activation.signed else np.uint8)
    for node in graph:
        if node.op_type != "QuantizeLinear" or graph.constant(node.input[0]) is not None:
            continue
        zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        dtype = zero.dtype if zero is not None else np.dtype(np.uint8)
        scale = graph.constant(node.input[1])
        if dtype.itemsize == 2:
            yield Finding(
                node.name,
                "16-bit-activation",
                f"{dtype} activations: convolutions stay in float, and matrix products may be rewritten so that activations are "
                "rounded to 8 bits again",
                "use 8-bit activations on this target",
            )
        elif dtype != wanted:
            slow = target.name.startswith("ort-x86") and dtype == np.int8
            yield Finding(
                node.name,
                "activation-type",
                f"{dtype} activations; {target.name} wants {wanted}"
                + (" (s8 x s8 is not fused on x86 by default, and slow if it is)" if slow else ""),
                f"quantize activations to {wanted}",
            )
        if scale is not None and scale.size > 1:
            yield Finding(
                node.name,
                "activation-granularity",
                "an activation with a scale per channel has no integer kernel",
                "use one scale for the tensor",
            )


def _macs(graph: Graph, target: Target) -> Iterator[Finding]:
    for node in graph:
        if node.op_type in MAC_OPS and node.domain in ("", "ai.onnx"):
            yield from _mac(graph, node, target)


def _mac(graph: Graph, node: onnx.NodeProto, target: Target) -> Iterator[Finding]:
    source = _pair(graph, node.input[0])
    weight = _pair(graph, node.input[1])
    if source is None or source.codes is not None:
        yield Finding(
            node.name,
            "input-not-quantized",
            "its input is not quantized",
            "put a Q/DQ pair in front of it, or accept float",
        )
    if weight is None:
        yield Finding(
            node.name, "weight-not-quantized", "its weights are not quantized", "quantize the weights, or accept float"
        )
    if source is None or weight is None:
        return
    if weight.codes is not None:
        yield from _weight(node, weight, target)
    if len(node.input) > 2 and node.input[2]:
        yield from _bias(graph, node, source, weight)
    if node.op_type == "Conv":
        readers = graph.consumers(node.output[0])
        through = readers[0] if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") else None
        if through is not None:
            readers = graph.consumers(through.output[0])
        if graph.is_output(node.output[0]) or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
            yield Finding(
                node.name,
                "output-not-quantized",
                "its output is not quantized (or also read in float), and the integer convolution writes only integers",
                "put one Q/DQ pair behind it, for all readers",
            )
    if node.op_type == "Gemm":
        found = attributes(node)
        if found.get("transA", 0) or float(found.get("alpha", 1)) != 1 or float(found.get("beta", 1)) != 1:
            yield Finding(
                node.name,
                "gemm-form",
                "transA, or alpha or beta other than 1, has no integer kernel",
                "fold the factors into weights and bias",
            )


def _weight(node: onnx.NodeProto, weight: _Pair, target: Target) -> Iterator[Finding]:
    assert weight.codes is not None
    if weight.zero is not None and np.asarray(weight.zero).astype(np.int64).any():
        per_channel = weight.zero.size > 1
        yield Finding(
            node.name,
            "weight-zero-point",
            "its weights are asymmetric" + (" per channel, which the integer kernel refuses" if per_channel else ""),
            "quantize weights symmetrically",
            "error" if per_channel else "warning",
        )
    kind = weight.codes.dtype
    if kind != np.int8:
        yield Finding(
            node.name,
            "weight-type",
            f"its weights are {kind}; the fast kernels of {target.name} read int8",
            "quantize weights to int8, or expand 4-bit weights with a Cast to int8",
        )
    limit = weight_limit(target)
    if kind == np.int8 and target.weight.reduced and weight.codes.size:
        peak = int(np.abs(weight.codes.astype(np.int64)).max())
        if peak > limit:
            yield Finding(
                node.name,
                "int16-saturation",
                f"its weights reach {peak}; beyond {limit} the int16 sums of processors without VNNI can saturate",
                "quantize with the reduced range (target ort-x86-avx2 does)",
                "error",
            )


def _bias(graph: Graph, node: onnx.NodeProto, source: _Pair, weight: _Pair) -> Iterator[Finding]:
    bias = _pair(graph, node.input[2])
    if bias is None or bias.codes is None or bias.codes.dtype != np.int32:
        yield Finding(
            node.name,
            "bias-type",
            "its bias is not an int32 constant behind a DequantizeLinear",
            "quantize the bias to int32 with scale (input scale x weight scale)",
        )
        return
    if bias.scale is None or source.scale is None or weight.scale is None:
        return
    wanted = source.scale.astype(np.float64).reshape(-1) * weight.scale.astype(np.float64).reshape(-1)
    have = bias.scale.astype(np.float64).reshape(-1)
    if have.size not in (1, wanted.size) or not np.allclose(have, wanted, rtol=1e-5, atol=0):
        yield Finding(
            node.name,
            "bias-scale",
            "the scale of its bias is not (input scale x weight scale): ONNX Runtime leaves the node in float, without a word",
            "quantize the bias with that product as its scale",
        )


def _idle_pairs(graph: Graph, _target: Target) -> Iterator[Finding]:
    for node in graph:
        if node.op_type != "DequantizeLinear" or graph.constant(node.input[0]) is not None:
            continue
        if len(node.input) < 1 or graph.producer(node.input[0]) is None:
            continue
        before = graph.producer(node.input[0])
        if before is None or before.op_type != "QuantizeLinear":
            continue
        maker = graph.producer(before.input[0])
        readers = graph.consumers(node.output[0])
        float_maker = maker is None or maker.op_type not in INTEGER_FORMS
        if float_maker and readers and all(reader.op_type not in INTEGER_FORMS for reader in readers):
            yield Finding(
                before.name,
                "idle-pair",
                f"{before.input[0]!r} is rounded to integers and back between float operators, for nothing",
                "take the pair out",
            )


RULES: tuple[Rule, ...] = (_file_stamps, _contrib_pairs, _scales, _activations, _macs, _idle_pairs)


def lint(graph: Graph | Path | str, target: Target) -> list[Finding]:
    """Check a Q/DQ graph against the rules of a target.

    Args:
        graph: The graph, or the file that holds it.
        target: One of the ``ort-...`` targets.

    Returns:
        All findings, errors first.
    """
    if not isinstance(graph, Graph):
        graph = Graph.load(graph)
    findings = [finding for rule in RULES for finding in rule(graph, target)]
    return sorted(findings, key=lambda one: one.severity != "error")


def explain(graph: Graph, node: onnx.NodeProto | None, op: str, target: Target) -> str:
    """Why an executed node was not an integer kernel, as far as the Q/DQ graph tells.

    Args:
        graph: The Q/DQ graph of the engine.
        node: The node of that graph that was executed, if it can be traced.
        op: The kernel's name.
        target: What the engine was built for.
    """
    if op == "QuantizeLinear":
        return "conversion from float to integers"
    if op == "DequantizeLinear":
        return "conversion from integers to float"
    if node is not None and node.op_type in MAC_OPS:
        found = list(_mac(graph, node, target))
        if found:
            return "; ".join(finding.message for finding in found)
        return "ONNX Runtime did not fuse its Q/DQ pairs, though no rule is broken"
    kind = node.op_type if node is not None else op
    if kind in INTEGER_FORMS:
        return f"{kind} stands among float operators (or is excluded), so that 8 bits would only cost accuracy"
    return f"ONNX Runtime's CPU provider has no integer kernel for {kind}"
