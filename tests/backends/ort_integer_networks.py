"""Networks for the integer reference: a small residual one, the real ones of the assets, and their static quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.onnxruntime.runner import session_options


def residual_network() -> onnx.ModelProto:
    """Strided, depthwise and 1x1 convolutions, sums, a concatenation, average pools, a global pool, a fully connected layer."""
    rng = np.random.default_rng(0)
    tensors: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def conv(
        x: str, y: str, cin: int, cout: int, k: int, *, stride: int = 1, group: int = 1, relu: bool = True
    ) -> None:
        fan = cin // group * k * k
        w = rng.standard_normal((cout, cin // group, k, k)) * np.sqrt(2 / fan) * rng.uniform(0.3, 2, (cout, 1, 1, 1))
        tensors.append(numpy_helper.from_array(w.astype(np.float32), f"{y}_w"))
        tensors.append(numpy_helper.from_array(rng.normal(0, 0.1, cout).astype(np.float32), f"{y}_b"))
        nodes.append(
            helper.make_node(
                "Conv", [x, f"{y}_w", f"{y}_b"], [f"{y}_c" if relu else y], f"{y}_conv",
                kernel_shape=[k, k], strides=[stride] * 2, pads=[k // 2] * 4, group=group,
            )
        )  # fmt: skip
        if relu:
            nodes.append(helper.make_node("Relu", [f"{y}_c"], [y], f"{y}_relu"))

    conv("x", "stem", 3, 24, 3)
    conv("stem", "a1", 24, 24, 3)
    conv("a1", "a2", 24, 24, 3, relu=False)
    nodes.append(helper.make_node("Add", ["stem", "a2"], ["sum1"], "add1"))
    nodes.append(helper.make_node("Relu", ["sum1"], ["block1"], "relu1"))
    conv("block1", "b1", 24, 24, 3, stride=2, group=24)
    conv("b1", "b2", 24, 40, 1)
    nodes.append(
        helper.make_node("AveragePool", ["block1"], ["p"], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    )
    nodes.append(helper.make_node("Concat", ["b2", "p"], ["cat"], "concat", axis=1))
    conv("cat", "c1", 64, 33, 3, relu=False)
    nodes.append(helper.make_node("Sigmoid", ["c1"], ["gate"], "sigmoid"))
    nodes.append(helper.make_node("Mul", ["c1", "gate"], ["swish"], "mul"))
    nodes.append(helper.make_node("MaxPool", ["swish"], ["m"], "max", kernel_shape=[2, 2], strides=[2, 2]))
    nodes.append(helper.make_node("GlobalAveragePool", ["m"], ["g"], "gap"))
    nodes.append(helper.make_node("Flatten", ["g"], ["f"], "flatten"))
    tensors.append(numpy_helper.from_array((rng.standard_normal((33, 10)) * 0.4).astype(np.float32), "fc_w"))
    tensors.append(numpy_helper.from_array(rng.normal(0, 0.1, 10).astype(np.float32), "fc_b"))
    nodes.append(helper.make_node("Gemm", ["f", "fc_w", "fc_b"], ["y"], "fc"))
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 20, 20])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def asset_network(assets: Path, network: str) -> onnx.ModelProto:
    """One of the asset networks, upgraded where its operator set is too old to quantize."""
    model = onnx.load(next(iter(sorted((assets / "models").rglob(f"{network}.onnx")))))
    if model.opset_import[0].version < 13:
        model = onnx.version_converter.convert_version(model, 17)
        model.ir_version = 8
    return model


def _images(shape: list[int], network: str, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(shape)
    if network == "mlperf_tiny_resnet8_cifar10":  # raw pixels
        noise = np.clip(noise * 60 + 128, 0, 255)
    return noise.astype(np.float32)


def random_feeds(path: Path, network: str, *, images: int, seed: int) -> dict[str, np.ndarray]:
    """Noise in the range of the network's input; unknown sizes become 48."""
    value = onnx.load(path).graph.input[0]
    sizes = [d.dim_value or (images if axis == 0 else 48) for axis, d in enumerate(value.type.tensor_type.shape.dim)]
    return {value.name: _images(sizes, network, seed)}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def quantize(
    model: onnx.ModelProto,
    folder: Path,
    *,
    types: str = "u8s8",
    float_outputs: bool = True,
    reduce_range: bool = False,
    network: str = "",
    **options: Any,
) -> Path:
    """The runtime's static quantizer, per channel, calibrated with three noise images.

    Batch norm and constants are folded by the runtime first, as its preprocessing does (which cannot read every graph).
    """
    source, folded, path = (
        folder / "float.onnx",
        folder / "folded.onnx",
        folder / f"{types}-{float_outputs}-{reduce_range}.onnx",
    )
    onnx.save(model, source)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(folded)
    ort.InferenceSession(str(source), settings, providers=["CPUExecutionProvider"])
    kinds = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}
    extra: dict[str, Any] = dict(options)
    if float_outputs:
        extra["OpTypesToExcludeOutputQuantization"] = ["Gemm", "MatMul"]
    ort.set_default_logger_severity(3)
    quantize_static(
        str(folded),
        str(path),
        _Reader(random_feeds(folded, network, images=1, seed=seed) for seed in range(3)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=kinds[types[:2]],
        weight_type=kinds[types[2:]],
        extra_options=extra,
    )
    return path


def engine_output(
    path: Path, feeds: Mapping[str, np.ndarray], target: Target, *, threads: int = 1
) -> dict[str, np.ndarray]:
    """What the runtime computes with everything fused."""
    session = ort.InferenceSession(
        str(path), session_options(target, threads=threads), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
