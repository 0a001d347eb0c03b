"""What ONNX Runtime really executed: its profile, joined with the graph that it optimized, traced back to the engine's nodes.

The profile is the stronger witness: it lists what ran, with the types that went in and out. The optimized graph gives what the
profile leaves out (weights that were packed in advance, memory layouts), and the engine's Q/DQ graph gives the names that users know.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy.typing as npt
import onnx

from zsq_deploy.backends.base import KernelRecord, Target
from zsq_deploy.backends.onnxruntime.lint import explain
from zsq_deploy.errors import EngineError
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["kernels"]

Array = npt.NDArray[Any]

_FLOATS = frozenset(("float", "float16", "double", "bfloat16"))
_CONVOLUTIONS = frozenset(("Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv"))
_PRODUCTS = frozenset(
    (
        "MatMul",
        "FusedMatMul",
        "Gemm",
        "FusedGemm",
        "QGemm",
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
    )
)
_FLOAT_OUT = frozenset(("QGemm", "MatMulIntegerToFloat"))
"""Kernels that multiply integers and write float."""
_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc|/duplicated|/\w+Fusion\w*)+$")


def kernels(
    path: Path,
    target: Target,
    feeds: Mapping[str, Array],
    *,
    threads: int = 1,
    mode: str = "engine",
    repeats: int = 12,
    warmup: int = 3,
) -> list[KernelRecord]:
    """Profile a model and describe every node that was executed.

    Args:
        path: The ONNX file.
        target: Gives the session options.
        feeds: One batch.
        threads: Threads inside an operator.
        mode: ``engine``, ``unfused`` or ``float``.
        repeats: Profiled runs; the time of a node is their median.
        warmup: Runs that are not looked at.

    Returns:
        One record for each executed node, in order of execution. MACs are those of batch 1.

    Raises:
        EngineError: The profile names nothing.
    """
    from zsq_deploy.backends.onnxruntime.runner import open_session, session_options

    with tempfile.TemporaryDirectory(prefix="zsq-ort-") as scratch:
        options = session_options(target, threads=threads, mode=mode)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        optimized = Path(scratch) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        session = open_session(path, options)
        for _ in range(warmup + repeats):
            session.run(None, dict(feeds))
        trace = Path(session.end_profiling())
        events = json.loads(trace.read_text(encoding="utf-8"))
        graph = Graph.load(optimized)
    source = Graph.load(path)
    executed = _executed(events, warmup)
    if not executed:
        raise EngineError(
            "ONNX Runtime's profile names no executed node",
            where=str(path),
            remedy="please report this with the version",
        )
    batch = max(1, int(next(iter(feeds.values())).shape[0])) if feeds else 1
    by_weight = _weight_readers(source)
    records = []
    for name, (args, times) in executed.items():
        op = str(args.get("op_name", ""))
        node = graph.node(name) if name in graph else graph.producer(name)  # nodes without a name go by their output
        origin = _origin(name, op, node, source, by_weight)
        integer = _is_integer(op, args)
        reason = ""
        if not integer:
            reason = {"float": "float model", "unfused": "graph optimization is off"}.get(mode) or explain(
                source, origin, op, target
            )
        records.append(
            KernelRecord(
                node=name,
                op=op,
                integer=integer,
                microseconds=float(median(times)),
                sources=(origin.name,) if origin is not None else (),
                macs=_macs(op, args, node, graph, origin, source, batch),
                reason=reason,
            )
        )
    return records


def _executed(events: Sequence[Mapping[str, Any]], warmup: int) -> dict[str, tuple[Mapping[str, Any], list[float]]]:
    """Node name -> arguments and times of the runs after the warm-up, in order of execution."""
    found: dict[str, tuple[Mapping[str, Any], list[float]]] = {}
    counts: dict[str, int] = {}
    for event in events:
        title = str(event.get("name", ""))
        if event.get("cat") != "Node" or not title.endswith("_kernel_time"):
            continue
        name = title.removesuffix("_kernel_time")
        counts[name] = counts.get(name, 0) + 1
        if counts[name] <= warmup:
            continue
        args, times = found.setdefault(name, (event["args"], []))
        del args
        times.append(float(event["dur"]))
    return found


def _types(entries: Any) -> list[tuple[str, list[int]]]:
    """The profile's list of {type: shape} as pairs."""
    return [(kind, [int(v) for v in shape]) for entry in entries or () for kind, shape in dict(entry).items()]


def _is_integer(op: str, args: Mapping[str, Any]) -> bool:
    """Whether a kernel computed on integers: no float data in or out, apart from scales and from what writes float knowingly."""
    inputs, outputs = _types(args.get("input_type_shape")), _types(args.get("output_type_shape"))
    if op in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return False
    if op in _FLOAT_OUT:
        return bool(inputs) and inputs[0][0] in ("uint8", "int8")
    if any(kind in _FLOATS for kind, _ in outputs):
        return False
    if op.startswith("QLinear") or op == "ConvInteger" or op == "MatMulInteger":
        return any(kind in ("uint8", "int8") for kind, _ in inputs)
    if op in ("Shape", "Size"):
        return True
    return not any(kind in _FLOATS and shape for kind, shape in inputs[:1])


def _weight_readers(source: Graph) -> dict[str, onnx.NodeProto]:
    """Name of a weight (its codes, or the float array) -> the one convolution or product of the engine's graph that reads it."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in source:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or len(node.input) < 2:
            continue
        name = node.input[1]
        maker = source.producer(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            name = maker.input[0]
        if source.constant(name) is not None:
            found.setdefault(name, []).append(node)
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}


def _origin(
    name: str,
    op: str,
    node: onnx.NodeProto | None,
    source: Graph,
    by_weight: Mapping[str, onnx.NodeProto],
) -> onnx.NodeProto | None:
    """The node of the engine's graph that an executed node stands for."""
    stem = _SUFFIX.sub("", name)
    for candidate in (name, stem):
        if candidate in source:
            found = source.node(candidate)
            before = source.producer(found.input[0]) if found.input else None
            fused = op in _CONVOLUTIONS or op in _PRODUCTS
            return before if fused and before is not None and found.op_type in ("Relu", "Clip") else found
    if node is not None:
        for value in node.input:
            if value in by_weight:
                return by_weight[value]
    # Blocked-layout nodes carry the name of the value that they make.
    values = [stem, *(() if node is None else (_SUFFIX.sub("", value) for value in node.output))]
    for value in values:
        maker = source.producer(value)
        while maker is not None and maker.op_type in ("QuantizeLinear", "Relu", "Clip"):
            before = source.producer(maker.input[0])
            if before is None or before.op_type == "DequantizeLinear":
                break
            maker = before
        if maker is not None:
            return maker
    return None


def _weight_shape(
    op: str, node: onnx.NodeProto | None, graph: Graph, origin: onnx.NodeProto | None, source: Graph
) -> list[int] | None:
    """Shape of a convolution's weights in the order of ONNX, as the engine's graph has them (packing may pad channels)."""
    if origin is not None and origin.op_type in ("Conv", "ConvTranspose"):
        shape = source.shape(origin.input[1])
        maker = source.producer(origin.input[1])
        if shape is None and maker is not None:
            shape = source.shape(maker.input[0])
        if shape is not None and all(size is not None for size in shape):
            return [int(size or 0) for size in shape]
    if node is not None:
        slot = 3 if op == "QLinearConv" else 1
        if len(node.input) > slot:
            shape = graph.shape(node.input[slot])
            if shape is not None and all(size is not None for size in shape):
                return [int(size or 0) for size in shape]
    return None


def _macs(
    op: str,
    args: Mapping[str, Any],
    node: onnx.NodeProto | None,
    graph: Graph,
    origin: onnx.NodeProto | None,
    source: Graph,
    batch: int,
) -> int:
    """Multiply-accumulates of one executed node at batch 1, from the shapes that it saw."""
    outputs = _types(args.get("output_type_shape"))
    inputs = _types(args.get("input_type_shape"))
    if op in _CONVOLUTIONS or op == "ConvTranspose":
        weight = _weight_shape(op, node, graph, origin, source)
        if weight is None or not outputs:
            return 0
        last = node is not None and (bool(attributes(node).get("channels_last", 0)) or op.startswith("Nhwc"))
        seen = inputs[0][1] if op == "ConvTranspose" else outputs[0][1]
        plane = seen[1:-1] if last else seen[2:]
        return math.prod(plane) * math.prod(weight)
    if op in _PRODUCTS:
        if not outputs or not inputs:
            return 0
        rows = inputs[0][1]
        transposed = node is not None and bool(attributes(node).get("transA", 0))
        inner = rows[0] if transposed and len(rows) == 2 else rows[-1]
        return math.prod(outputs[0][1]) * inner // batch
    return 0
