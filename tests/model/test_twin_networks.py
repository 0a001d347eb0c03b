"""Whole networks: the twin against ONNX Runtime, as exporters leave the files and after quantization."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from zsq_deploy.model import load_model
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin

pytestmark = pytest.mark.assets

Array = np.ndarray[Any, np.dtype[Any]]

RAW = {
    "dncnn25": (1, 40, 56),
    "mlperf_tiny_mobilenet_v1_025_vww": (3, 96, 96),
    "mlperf_tiny_resnet8_cifar10": (3, 32, 32),
    "mobilenet_v1_025_imagenet": (3, 224, 224),
    "resnet20_cifar10": (3, 32, 32),
    "squeezenet11_imagenet": (3, 224, 224),
    "vit_cifar10": (3, 32, 32),
}


def session(proto: onnx.ModelProto, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def relative_error(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(graph: Graph, proto: onnx.ModelProto, x: Array, dtype: torch.dtype) -> None:
    expected = session(proto).run(None, {graph.inputs[0].name: x})
    twin = Twin(graph, dtype=dtype, device="cpu")
    with torch.no_grad():
        found = twin.run({graph.inputs[0].name: torch.from_numpy(x)})
    for name, value in zip(twin.output_names, expected, strict=True):
        assert found[name].shape == value.shape
        assert relative_error(found[name].numpy(), value) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", RAW)
def test_raw_exports(assets: Path, name: str, dtype: torch.dtype) -> None:
    graph = Graph.load(assets / "models" / f"{name}.onnx")
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, *RAW[name])).astype(np.float32)
        compare(graph, graph.proto, x, dtype)


@pytest.mark.parametrize("name", RAW)
def test_raw_exports_need_no_number_from_the_device(assets: Path, name: str) -> None:
    """On the meta device: a kernel that waited for a value would fail."""
    twin = Twin(Graph.load(assets / "models" / f"{name}.onnx"), device="meta")
    found = twin(torch.empty(2, *RAW[name], device="meta"))
    assert isinstance(found, torch.Tensor)
    assert found.device.type == "meta"
    assert found.shape[0] == 2


@pytest.mark.parametrize("name", [*RAW, "ultraface_rfb320"])
def test_loaded_networks(assets: Path, name: str) -> None:
    """After loading: the cleaned graph against the untouched file."""
    path = assets / "models" / f"{name}.onnx"
    shape = RAW.get(name, (3, 240, 320))
    model = load_model(path, input_shape=(1, *shape))
    x = np.random.default_rng(3).standard_normal((1, *shape)).astype(np.float32)
    compare(model.graph, onnx.load(path), x, torch.float64)


class _Noise(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        self.batches: Iterator[dict[str, Array]] = iter(
            {name: np.random.default_rng(seed).standard_normal((8, 3, 32, 32)).astype(np.float32)} for seed in range(4)
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


@pytest.mark.parametrize(
    ("activation", "weight", "per_channel"),
    [
        (QuantType.QUInt8, QuantType.QInt8, True),
        (QuantType.QInt8, QuantType.QInt8, False),
        (QuantType.QUInt16, QuantType.QInt8, True),
        (QuantType.QUInt8, QuantType.QInt4, True),
    ],
    ids=["u8s8", "s8s8", "u16s8", "u8s4"],
)
def test_quantized_by_the_runtime(
    assets: Path, tmp_path: Path, activation: Any, weight: Any, per_channel: bool
) -> None:
    """The twin of a Q/DQ graph against the runtime that runs the same graph unfused.

    Float convolutions differ in the last bit, so a code may fall on the other side of a tie. Layer by layer, from the runtime's own
    codes, that is rare and never more than one step; through the whole network such flips grow, which is bounded more loosely.
    """
    clean, engine = tmp_path / "clean.onnx", tmp_path / "engine.onnx"
    quant_pre_process(assets / "models" / "resnet20_cifar10.onnx", clean)
    quantize_static(
        clean,
        engine,
        _Noise("image"),
        quant_format=QuantFormat.QDQ,
        activation_type=activation,
        weight_type=weight,
        per_channel=per_channel,
    )
    proto = onnx.load(engine)
    graph = Graph(proto)
    x = np.random.default_rng(9).standard_normal((64, 3, 32, 32)).astype(np.float32)
    quantizers = [node for node in graph if node.op_type == "QuantizeLinear"]
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    for node in quantizers:
        kind = onnx.helper.np_dtype_to_tensor_dtype(graph.constant(node.input[2]).dtype)
        watched.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], kind, None))
    runtime = session(watched, optimize=False)
    names = [output.name for output in runtime.get_outputs()]
    expected = dict(zip(names, runtime.run(names, {"image": x}), strict=True))
    twin = Twin(graph, device="cpu")

    codes = {node.output[0]: torch.from_numpy(expected[node.output[0]].astype(np.int32)) for node in quantizers}
    with torch.no_grad():
        before = twin.run({"image": torch.from_numpy(x), **codes}, [node.input[0] for node in quantizers])
    flipped = total = 0
    for node in quantizers:
        scale, zero = graph.constant(node.input[1]), graph.constant(node.input[2])
        assert scale is not None
        assert zero is not None
        limits = np.iinfo(zero.dtype)
        ours = np.clip(np.rint(before[node.input[0]].numpy() / scale) + zero, limits.min, limits.max)
        steps = np.abs(ours - expected[node.output[0]])
        assert steps.max() <= 1
        flipped, total = flipped + int(steps.sum()), total + steps.size
    wide = activation is QuantType.QUInt16
    assert flipped / total < (2e-2 if wide else 2e-4)

    with torch.no_grad():
        found = twin(torch.from_numpy(x))
    assert isinstance(found, torch.Tensor)
    logits = expected[twin.output_names[0]]
    steps = np.rint(np.abs(found.numpy() - logits) / float(graph.constant(quantizers[-1].input[1])))  # type: ignore[arg-type]
    assert (steps == 0).mean() > (0.2 if wide else 0.85)
    assert steps.max() <= (64 if wide else 3)
    assert (found.numpy().argmax(1) == logits.argmax(1)).mean() >= 63 / 64


def test_gradient_through_a_quantized_network(assets: Path, tmp_path: Path) -> None:
    """Straight-through gradients reach the image, and point the way of the float network's."""
    clean, engine = tmp_path / "clean.onnx", tmp_path / "engine.onnx"
    quant_pre_process(assets / "models" / "resnet20_cifar10.onnx", clean)
    quantize_static(
        clean,
        engine,
        _Noise("image"),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    gradients = []
    for path in (clean, engine):
        x = torch.from_numpy(np.random.default_rng(2).standard_normal((4, 3, 32, 32)).astype(np.float32))
        x.requires_grad_()
        output = Twin(Graph.load(path), device="cpu")(x)
        assert isinstance(output, torch.Tensor)
        output[:, 3].sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.flatten())
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.5
