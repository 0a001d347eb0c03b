"""What a calibration cache means: the Q/DQ graph that stands for an engine built from the float network and the cache.

A cache holds one scale a tensor. Which layers compute in 8 bits, and which tensors are rounded, TensorRT decides itself when it builds
the engine; it says so in the engine's layer information, and nowhere else. This module writes down the most that it can do by what is
known, as a graph whose twin and whose execution in ONNX Runtime can be measured:

* A layer computes in 8 bits if it has such a kernel and all of its float inputs and outputs have a scale; where a scale is missing, it
  falls back to float, and so do the others that read or write that tensor.
* Convolutions, transposed convolutions, fully connected layers (Gemm with constant weights), sums and average pooling have such kernels.
  Matrix products (MatMul) stay in float: without Q/DQ TensorRT's transformers run in float.
* A convolution and the activation behind it are one kernel; the scale of what lies between them is never used. The same holds for the sum
  behind a convolution: of its operands only the other one is rounded.
* Pooling and reshaping keep the scale of what they move (TensorRT's own caches give both sides the same); the parts of a concatenation
  are written with the scale of the whole.
* Weights have one scale an output channel, the largest magnitude / 127, and -127..127; biases stay float numbers. Outputs of the network
  stay in float, and so does what only float layers read.

Sources: NVIDIA, TensorRT 8 developer guide, chapter "Working with INT8"; and the answers of NVIDIA's engineers in the issues of
github.com/NVIDIA/TensorRT: 25 (ranges inside of fused layers, outputs), 2114 (which tensors need ranges), 2658 and 1785 (transformers), with
the caches shown in 2958. None of this was checked on a device here: compare ``CacheReference.layers`` with the layer information there,
and name in `floats` what it shows in float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from zsq_deploy.backends.tensorrt.cache_format import CalibrationCache
from zsq_deploy.backends.tensorrt.targets import ACTIVATION, WEIGHT
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.constants import own_constants, replace_constants
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.qdq import TRANSPARENT, PlacementRules, insert_qdq, raise_opset
from zsq_deploy.quant.reader import read_qdq

__all__ = ["KERNELS", "CacheReference", "reference_of_cache"]

KERNELS = ("Conv", "ConvTranspose", "Gemm", "Add", "AveragePool", "GlobalAveragePool")
"""Operators that TensorRT computes in 8 bits without Q/DQ, if all of their tensors have a scale."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
_FUSED = ("Relu", "Clip")


@dataclass(frozen=True)
class CacheReference:
    """The graph that a cache means for a network.

    Attributes:
        graph: The Q/DQ graph; its twin is the reference of the engine.
        layers: Names of the nodes that compute in 8 bits, in graph order.
        floats: Node name -> why it stays in float, for the others that have an 8-bit kernel, and for matrix products.
        without_scale: Computed float tensors of the network that have no scale in the cache.
    """

    graph: Graph
    layers: tuple[str, ...]
    floats: Mapping[str, str]
    without_scale: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """JSON values for the manifest."""
        return {
            "layers_8_bit": len(self.layers),
            "float_layers": dict(self.floats),
            "tensors_without_scale": list(self.without_scale),
        }


def reference_of_cache(graph: Graph, cache: CalibrationCache, *, floats: Collection[str] = ()) -> CacheReference:
    """The Q/DQ graph that a calibration cache means.

    Args:
        graph: The float network that the engine is built from, batch normalization folded (``float.onnx``).
        cache: Its cache, whoever made it; scales of 0 count as missing.
        floats: Nodes that are known to stay in float, from the device's layer information or because their precision was set.

    Raises:
        CalibrationError: The cache speaks of tensors that the network lacks, or of none that an 8-bit kernel reads.
        UsageError: A node of `floats` is not in the network.
    """
    strangers = sorted(name for name in floats if name not in graph)
    if strangers:
        raise UsageError(
            f"the network has no node {strangers[0]!r}",
            where="floats",
            remedy="take the names from `zsq inspect --nodes`",
        )
    graph = raise_opset(own_constants(graph, _WEIGHTED), 13)
    tensors = [spec.name for spec in graph.inputs] + [name for node in graph for name in node.output if name]
    missing = set(cache.check_names(tensors))
    scales = {name: scale for name, scale in cache.scales.items() if scale > 0.0}
    why: dict[str, str] = {}
    chosen: list[onnx.NodeProto] = []
    for node in graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in (*KERNELS, "MatMul"):
            continue
        reason = "it was named" if node.name in floats else _reason(graph, node, scales)
        if reason:
            why[node.name] = reason
        else:
            chosen.append(node)
    _drop_unfused(graph, chosen, why, scales)
    _drop_idle(graph, chosen, why)
    if not any(node.op_type in _WEIGHTED for node in chosen):
        raise CalibrationError(
            "no layer of this network computes in 8 bits with this cache",
            where=cache.title,
            remedy="; ".join(f"{name}: {reason}" for name, reason in list(why.items())[:3])
            or "the network has no convolution and no fully connected layer",
        )
    names = {node.name for node in chosen}
    # What lies inside of a kernel needs no scale and is never rounded, but has to have a range to be part of one.
    inside = {value: (-1.0, 1.0) for node in chosen if (value := _summed(graph, node)) and value not in scales}
    written = insert_qdq(
        graph,
        {**inside, **{name: (-127.0 * scale, 127.0 * scale) for name, scale in scales.items()}},
        activation=ACTIVATION,
        weight=WEIGHT,
        rules=PlacementRules(
            compute=frozenset(node.op_type for node in chosen),
            exclude=frozenset(node.name for node in graph if node.op_type in KERNELS and node.name not in names),
            residual="skip",
            always_output=frozenset(),
            bias="float",
            drop_activations=False,
            split_activations=False,
            round_outputs="read",
            place_reads="early",
        ),
    )
    dynamic = [name for name in tensors if name in missing and _is_float(graph, name)]
    return CacheReference(_exact(written, scales), tuple(node.name for node in chosen), why, tuple(dynamic))


def _is_float(graph: Graph, value: str) -> bool:
    return graph.constant(value) is None and graph.dtype(value) in (None, np.dtype(np.float32))


def _reason(graph: Graph, node: onnx.NodeProto, scales: Mapping[str, float]) -> str:
    """Why a node with an 8-bit kernel stays in float; empty if it does not."""
    if node.op_type == "MatMul":
        return "TensorRT computes matrix products in float unless Q/DQ stand in front of them"
    found = attributes(node)
    inputs = [name for name in (node.input[:1] if node.op_type in (*_WEIGHTED, "AveragePool") else node.input) if name]
    if node.op_type in _WEIGHTED and graph.constant(node.input[1]) is None:
        return "its weights are computed"
    if node.op_type == "Gemm" and (found.get("transA", 0) or found.get("alpha", 1.0) != 1.0):
        return "its first input is transposed or scaled"
    if any(graph.constant(name) is not None for name in inputs):
        return "an operand is constant"
    if any(not _is_float(graph, name) for name in inputs):
        return "it does not compute in float32"
    for name in inputs:
        maker = graph.producer(name)
        if not _scale_behind(graph, name, scales) and not (maker is not None and _summed(graph, maker) == name):
            return f"its input {name!r} has no scale"
    out = str(node.output[0])
    readers = graph.consumers(out)
    if len(readers) == 1 and readers[0].op_type in _FUSED and not graph.is_output(out):
        out = str(readers[0].output[0])
    elif _summed(graph, node):
        return ""  # part of the sum's kernel
    if not graph.is_output(out) and out not in scales:
        return f"its output {out!r} has no scale"
    return ""


def _summed(graph: Graph, node: onnx.NodeProto) -> str:
    """The value that a convolution adds to in its own kernel: its output, if a sum reads nothing else of convolutions behind it."""
    value = str(node.output[0])
    readers = graph.consumers(value)
    if node.op_type not in ("Conv", "ConvTranspose") or len(readers) != 1 or graph.is_output(value):
        return ""
    add = readers[0]
    if add.op_type != "Add" or add.domain not in ("", "ai.onnx") or add.input[0] == add.input[1]:
        return ""
    for name in reversed(add.input):  # of two convolutions the later operand's counts
        maker = graph.producer(name)
        if (
            maker is not None
            and maker.op_type in ("Conv", "ConvTranspose")
            and len(graph.consumers(name)) == 1
            and not graph.is_output(name)
        ):
            return value if name == value else ""
    return ""


def _drop_unfused(graph: Graph, chosen: list[onnx.NodeProto], why: dict[str, str], scales: Mapping[str, float]) -> None:
    """A convolution and the sum behind it do without a scale between them only if both compute in 8 bits."""
    while True:
        names = {node.name for node in chosen}
        lost: dict[str, str] = {}
        for node in chosen:
            value = _summed(graph, node)
            if value and value not in scales and graph.consumers(value)[0].name not in names:
                lost[node.name] = f"its output {value!r} has no scale"
            if node.op_type == "Add":
                for name in node.input:
                    maker = graph.producer(name)
                    if name not in scales and maker is not None and _summed(graph, maker) and maker.name not in names:
                        lost[node.name] = f"its input {name!r} has no scale"
        if not lost:
            return
        chosen[:] = [node for node in chosen if node.name not in lost]
        why.update(lost)


def _scale_behind(graph: Graph, value: str, scales: Mapping[str, float]) -> bool:
    """Whether the place where a value is rounded has a scale: the value itself, or what it is moved from."""
    while value not in scales:
        maker = graph.producer(value)
        if maker is None or maker.op_type not in TRANSPARENT or maker.domain not in ("", "ai.onnx"):
            return False
        value = maker.input[0]
    return True


def _drop_idle(graph: Graph, chosen: list[onnx.NodeProto], why: dict[str, str]) -> None:
    """Sums and pooling that neither read what an 8-bit layer wrote nor write what one reads have no reason to be in 8 bits."""
    passing = TRANSPARENT | {"Relu", "Clip", "Concat"}

    def comes(value: str) -> bool:
        maker = graph.producer(value)
        if maker is None:
            return False
        return maker.name in names or (maker.op_type in passing and any(comes(name) for name in maker.input if name))

    def leads(value: str) -> bool:
        return any(
            reader.name in names or (reader.op_type in passing and any(leads(name) for name in reader.output))
            for reader in graph.consumers(value)
        )

    while True:
        names = {node.name for node in chosen}
        idle = [
            node
            for node in chosen
            if node.op_type not in _WEIGHTED
            and not (any(comes(name) for name in node.input if name) and any(leads(name) for name in node.output))
        ]
        if not idle:
            return
        for node in idle:
            chosen.remove(node)
            why[node.name] = "it does not stand between 8-bit layers"


def _exact(graph: Graph, scales: Mapping[str, float]) -> Graph:
    """The scales of the cache themselves: bounds of activations narrow a range, which a cache that says otherwise does not know of."""
    wanted: dict[str, Any] = {}
    for tensor in read_qdq(graph):
        if tensor.is_weight or tensor.quantize is None or tensor.name not in scales:
            continue
        value = np.float32(scales[tensor.name])
        if value != np.float32(tensor.scale):
            wanted[graph.node(tensor.quantize).input[1]] = np.reshape(value, np.shape(tensor.scale))
    return replace_constants(graph, wanted)
