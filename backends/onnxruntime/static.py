"""Running ONNX Runtime's ``quantize_static`` on a prepared graph: nodes, ranges and weight scales that were decided here are handed over.

Weight scales are handed over where the quantizer's own (largest magnitude / 127) are not what is wanted; what it gives is tidied.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.onnxruntime.options import BuildOptions
from zsq_deploy.backends.onnxruntime.placement import Placement
from zsq_deploy.backends.onnxruntime.prepare import Prepared
from zsq_deploy.backends.onnxruntime.targets import weight_limit
from zsq_deploy.backends.onnxruntime.tidy import tidy
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["quantize_graph"]

Array = npt.NDArray[Any]


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Keep the quantizer's remarks (it logs to the root logger) out of the user's terminal."""

    def foreign(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root = logging.getLogger()
    root.addFilter(foreign)
    try:
        yield
    finally:
        root.removeFilter(foreign)


def quantize_graph(
    prepared: Prepared,
    placement: Placement,
    found: Mapping[str, tuple[float, float]],
    cache: Path,
    target: Target,
    options: BuildOptions,
    *,
    pads: bool = True,
) -> onnx.ModelProto:
    """Run ``quantize_static`` on a prepared graph and tidy what it gives (`pads` as for :func:`tidy`).

    Raises:
        EngineError: The quantizer raised an error; its message is passed on.
    """
    graph = prepared.graph
    source = graph.editable()
    add_pre_process_metadata(source)  # our own preparation stands in for quant_pre_process
    activation = QuantType.QInt8 if target.activation.signed else QuantType.QUInt8
    extra: dict[str, Any] = {
        "ActivationSymmetric": target.activation.symmetric,
        "WeightSymmetric": True,
        "TensorQuantOverrides": _weight_overrides(graph, placement, found, target, options),
    }
    if not options.mac_outputs:
        extra["OpTypesToExcludeOutputQuantization"] = ["Gemm", "MatMul"]
    _clip_weights(source, extra["TensorQuantOverrides"], target)
    types = sorted({graph.node(name).op_type for name in placement.nodes})
    with tempfile.TemporaryDirectory(prefix="zsq-ort-") as scratch, _quiet_quantizer():
        raw = Path(scratch) / "engine.onnx"
        try:
            quantize_static(
                source,
                raw,
                None,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=types,
                nodes_to_quantize=list(placement.nodes),
                per_channel=True,
                reduce_range=target.weight.reduced,
                activation_type=activation,
                weight_type=QuantType.QInt8,
                extra_options=extra,
                calibration_cache_path=cache,
            )
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime's quantizer stopped: {type(error).__name__}: {str(error)[:400]}",
                where=f"target {target.name}, {len(placement.nodes)} nodes",
                remedy="exclude the node that the message names, or report this with the model",
            ) from error
        quantized = onnx.load(raw)
    return tidy(
        quantized,
        graph,
        placement,
        target,
        quantize_outputs=options.quantize_outputs,
        float_readers=options.float_readers,
        pads=pads,
    )


def _weight_axis(node: onnx.NodeProto) -> int:
    if node.op_type == "Gemm":
        return 0 if attributes(node).get("transB", 0) else 1
    return 1 if node.op_type == "MatMul" else 0


def _weight_overrides(
    graph: Graph,
    placement: Placement,
    found: Mapping[str, tuple[float, float]],
    target: Target,
    options: BuildOptions,
) -> dict[str, list[dict[str, Any]]]:
    """Weight scales where ONNX Runtime's own (largest magnitude / 127) are not what is wanted.

    That is: other methods, learned scales, channels without any weight (their scale would become 1, and their bias as coarse as
    the input's step), and matrices of more than two dimensions (one scale for all, as the kernel wants).
    """
    overrides: dict[str, list[dict[str, Any]]] = {}
    limit = weight_limit(target) if target.weight.reduced else target.weight.qmax
    for name in placement.nodes:
        node = graph.node(name)
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        key = node.input[1]
        weight = graph.constant(key)
        if weight is None:
            continue
        if node.op_type == "MatMul" and weight.ndim != 2:
            if weight.ndim > 2:
                overrides[key] = [{"quant_type": QuantType.QInt8, "symmetric": True}]
            continue
        axis = _weight_axis(node)
        rows = np.moveaxis(weight.astype(np.float64), axis, 0).reshape(weight.shape[axis], -1)
        peak = np.abs(rows).max(axis=1) if rows.shape[1] else np.zeros(rows.shape[0])
        scales = peak / limit
        special = False
        if options.weight_method == "mse":
            scales, special = _mse_scales(weight, axis, target, scales), True
        if key in options.weight_scales:
            given = np.asarray(options.weight_scales[key], np.float64).reshape(-1)
            if given.size != scales.size or not np.isfinite(given).all() or (given <= 0).any():
                raise UsageError(
                    f"the learned scales of {key!r} do not fit: {given.size} values for {scales.size} channels",
                    where=key,
                    remedy="give one positive scale for each output channel",
                )
            scales, special = given, True
        empty = peak == 0
        if empty.any():
            scales = np.where(empty, _empty_scale(graph, node, found, scales, empty), scales)
            special = True
        if special:
            overrides[key] = [
                {
                    "axis": axis,
                    "scale": np.array(scale, np.float32),
                    "zero_point": np.array(0, np.int8),
                    "quant_type": QuantType.QInt8,
                }
                for scale in scales
            ]
    return overrides


def _empty_scale(
    graph: Graph, node: onnx.NodeProto, found: Mapping[str, tuple[float, float]], scales: Array, empty: Array
) -> Array:
    """Scales for channels whose weights are all zero: the bias alone decides, it becomes a code of about 2**20."""
    usual = float(np.median(scales[~empty])) if (~empty).any() else 1.0
    result = np.full(scales.shape, usual)
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if bias is not None and bias.size == scales.size:
        low, high = found.get(node.input[0], (0.0, 1.0))
        step = max((max(high, 0.0) - min(low, 0.0)) / 255, 1e-30)
        fine = np.abs(bias.reshape(-1).astype(np.float64)) / (step * 2.0**20)
        result = np.where(fine > 0, fine, result)
    floored: Array = np.maximum(result, float(np.finfo(np.float32).tiny))
    return floored


def _mse_scales(weight: Array, axis: int, target: Target, fallback: Array) -> Array:
    from zsq_deploy.quant import weight_qparams

    found = weight_qparams(weight, target.weight, axis, method="mse")
    scale = np.asarray(found.scale, np.float64).reshape(-1)
    return scale if scale.size == fallback.size else fallback


def _clip_weights(proto: onnx.ModelProto, overrides: Mapping[str, list[dict[str, Any]]], target: Target) -> None:
    """Cut weights to what their overridden scale can hold: with an override the quantizer would use the code -128 as well."""
    limit = weight_limit(target) if target.weight.reduced else target.weight.qmax
    for tensor in proto.graph.initializer:
        channels = overrides.get(tensor.name)
        if not channels or "axis" not in channels[0]:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        shape = [1] * values.ndim
        shape[channels[0]["axis"]] = -1
        bound = (np.array([c["scale"] for c in channels], np.float64) * limit).reshape(shape)
        cut = np.clip(values, -bound, bound).astype(values.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(cut, tensor.name))
