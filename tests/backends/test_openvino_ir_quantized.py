"""What an IR says about quantization, read back: ranges, compressed constants, names; and files that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from zsq_deploy.backends import get_target
from zsq_deploy.backends.openvino.ir.rounding import read_ranges
from zsq_deploy.errors import ModelError, UsageError, ZsqError
from zsq_deploy.model import Graph, Twin, load_model
from zsq_deploy.quant import PlacementRules, insert_qdq, read_qdq

ov = pytest.importorskip("openvino")

import openvino.opset13 as op  # noqa: E402

from zsq_deploy.backends.openvino.ir import ir_to_qdq, load_ir, read_ir  # noqa: E402

Array = np.ndarray[Any, Any]
CONFIG = {
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
    "LP_TRANSFORMS_MODE": "NO",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


def f(*shape: int, seed: int = 7) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def c(values: Any, kind: Any = np.float32) -> Any:
    return op.constant(np.asarray(values, kind))


def parameter(*shape: int) -> Any:
    node = op.parameter(list(shape), np.float32, "x")
    node.output(0).set_names({"x"})
    return node


def fake(x: Any, low: Any, high: Any, levels: int = 256, out: tuple[Any, Any] | None = None) -> Any:
    first, last = (low, high) if out is None else out
    return op.fake_quantize(x, c(low), c(high), c(first), c(last), levels)


def run(model: Any, feed: Array) -> Array:
    return np.asarray(ov.Core().compile_model(model, "CPU", CONFIG)(feed)[0], np.float64)


def twin(graph: Graph, feed: Array) -> Array:
    with torch.no_grad():
        found = Twin(graph, dtype=torch.float64, device="cpu")(torch.from_numpy(feed))
    return np.asarray(found.numpy() if isinstance(found, torch.Tensor) else found[0].numpy(), np.float64)


def by_definition(x: Array, low: Array, high: Array, out_low: Array, out_high: Array, levels: int) -> Array:
    """FakeQuantize as the specification has it, in float64."""
    low, high, out_low, out_high = (
        np.asarray(v, np.float32).astype(np.float64) for v in (low, high, out_low, out_high)
    )
    places = np.rint((np.clip(x.astype(np.float64), low, high) - low) / (high - low) * (levels - 1))
    return np.asarray(places / (levels - 1) * (out_high - out_low) + out_low)


CHANNELS = np.asarray([0.5, 1.0, 2.0, 3.5], np.float32).reshape(1, 4, 1, 1)
FORMS = {
    "unsigned": ((0.0, 2.55), 256, "uint8", False),
    "symmetric": ((-1.28, 1.27), 256, "int8", False),
    "asymmetric": ((-np.float32(0.01) * 100, np.float32(0.01) * 155), 256, "uint8", False),
    "narrow": ((-1.27, 1.27), 255, "int8", False),
    "sixteen": ((-0.8, 0.7), 16, "int4", False),
    "fifteen": ((0.0, 1.4), 15, "uint4", False),
    "wide": ((-3.2768, 3.2767), 65536, "int16", False),
    "per channel": ((-CHANNELS, CHANNELS * np.float32(127 / 128)), 256, "int8", False),
    "per channel narrow": ((-CHANNELS, CHANNELS), 255, "int8", False),
    "no integer zero": ((-0.7, 1.3337), 256, None, True),
    "no integer zero per channel": ((-CHANNELS * np.float32(0.37), CHANNELS), 256, None, True),
    "without zero": ((0.5, 1.5), 256, None, True),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_range_of_an_activation_is_exact(form: str) -> None:
    (low, high), levels, kind, noted = FORMS[form]
    x = parameter(2, 4, 9, 9)
    model = ov.Model([op.relu(fake(op.negative(x), low, high, levels))], [x])
    read = read_ir(model)
    onnx.checker.check_model(read.graph.proto, full_check=True)
    feed = f(2, 4, 9, 9) * 2
    expected = np.maximum(by_definition(-feed, low, high, low, high, levels), 0)
    found = twin(read.graph, feed)
    step = float(np.max((np.asarray(high, np.float64) - low) / (levels - 1)))
    differ = np.abs(found - expected) > 0.01 * step
    assert differ.mean() < 1e-3  # a number on a tie
    if levels <= 256:  # the CPU plugin computes something else with more
        assert np.abs(run(model, feed) - found)[~differ].max() < 1e-3 * step + 1e-6
    assert bool(read.notes) == noted
    tensors = read_qdq(read.graph)
    assert [t.dtype for t in tensors] == ([] if kind is None else [kind])


def test_a_range_that_is_made_of_a_scale_gives_that_scale_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        mantissa, exponent, zero = int(rng.integers(1, 200)), int(rng.integers(-14, 4)), int(rng.integers(0, 256))
        scale = np.float32(mantissa * 2.0**exponent)
        low, high = np.float32(-zero * scale), np.float32((255 - zero) * scale)
        found = read_ranges([low, high, low, high], 256)
        assert found is not None
        assert found[0].scale == scale
        assert found[0].zero == (0 if found[0].dtype == "int8" else zero)
    for _ in range(300):
        scale = np.float32(rng.uniform(1e-4, 1))
        zero = int(rng.integers(0, 256))
        low, high = np.float32(-zero * scale), np.float32((255 - zero) * scale)
        found = read_ranges([low, high, low, high], 256)
        assert found is not None
        assert found[0].scale == pytest.approx(scale, rel=2e-7)


def test_another_output_range_is_scaled_behind_the_rounding() -> None:
    x = parameter(1, 4, 5, 5)
    model = ov.Model([fake(x, 0.0, 2.55, 256, (-1.0, 4.1))], [x])
    read = read_ir(model)
    feed = f(1, 4, 5, 5)
    assert np.abs(twin(read.graph, feed) - run(model, feed)).max() < 1e-5
    assert [t.dtype for t in read_qdq(read.graph)] == ["uint8"]


def test_a_scale_that_was_moved_into_the_range_is_put_back() -> None:
    gain, shift = np.abs(f(1, 12)) + 0.2, f(1, 12, seed=3)
    low, high = -np.float32(0.02) * 100, np.float32(0.02) * 155
    x = parameter(-1, 12)
    model = ov.Model([fake(x, (low - shift) / gain, (high - shift) / gain, 256, (low, high))], [x])
    read = read_ir(model)
    assert not read.notes
    (tensor,) = read_qdq(read.graph)
    assert float(tensor.scale) == pytest.approx(0.02, rel=1e-6)
    assert int(tensor.zero_point) == 100
    feed = f(50, 12, seed=5)
    exact = np.clip(np.rint((feed.astype(np.float64) * gain + shift) / 0.02) + 100, 0, 255)
    differ = np.abs(twin(read.graph, feed) - (exact - 100) * 0.02) > 0.01
    assert differ.mean() < 0.005


def compressed(codes: Array, scale: Array, zero: Array | None, kind: Any = None) -> Any:
    node = op.constant(codes) if kind is None else op.constant(codes, dtype=kind)
    value = op.convert(node, "f32")
    if zero is not None:
        value = op.subtract(value, op.convert(op.constant(zero), "f32"))
    return op.multiply(value, op.constant(scale))


CODES = np.random.default_rng(5).integers(-127, 128, (8, 4, 3, 3)).astype(np.int8)


@pytest.mark.parametrize(
    ("codes", "scale", "zero", "kind"),
    [
        (CODES, np.abs(f(8, 1, 1, 1)) + 0.1, None, "int8"),
        (CODES, np.asarray(0.02, np.float32), None, "int8"),
        ((CODES.astype(np.int16) + 127).astype(np.uint8), np.abs(f(8, 1, 1, 1)) + 0.1, np.arange(100, 108, dtype=np.uint8).reshape(8, 1, 1, 1), "uint8"),
    ],
    ids=["per-channel", "per-tensor", "asymmetric"],
)  # fmt: skip
def test_compressed_constants_are_stored_integers(codes: Array, scale: Array, zero: Array | None, kind: str) -> None:
    x = parameter(-1, 4, 6, 6)
    conv = op.convolution(x, compressed(codes, scale, zero), [1, 1], [0, 0], [0, 0], [1, 1])
    graph = ir_to_qdq(ov.Model([conv], [x]))
    (weight,) = read_qdq(graph)
    assert weight.quantize is None
    assert weight.is_weight
    assert weight.dtype == kind
    assert np.array_equal(graph.constant(weight.codes), codes)
    assert np.array_equal(
        weight.scale.reshape(-1),
        np.broadcast_to(scale, weight.scale.shape or ()).reshape(-1) if scale.ndim == 0 else scale.reshape(-1),
    )
    feed = f(2, 4, 6, 6)
    wanted = run(ov.Model([conv], [x]), feed)
    assert np.abs(twin(graph, feed) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["i4", "u4"])
def test_four_bit_constants_stay_four_bit(kind: str) -> None:
    low = -8 if kind == "i4" else 0
    codes = np.random.default_rng(1).integers(low, low + 16, (6, 10)).astype(np.int8 if low else np.uint8)
    x = parameter(-1, 10)
    weight = compressed(codes, np.abs(f(6, 1)) + 0.1, None, getattr(ov.Type, kind))
    model = ov.Model([op.matmul(x, weight, False, True)], [x])
    graph = ir_to_qdq(model)
    (found,) = read_qdq(graph)
    assert found.dtype == ("int4" if low else "uint4")
    assert np.array_equal(
        np.asarray(graph.constant(found.codes)).astype(np.int8).reshape(-1),
        codes.astype(np.int8).reshape(-1) if found.axis == 0 else codes.T.astype(np.int8).reshape(-1),
    )
    feed = f(3, 10)
    wanted = run(model, feed)
    assert np.abs(twin(graph, feed) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_scales_of_groups_become_blocks() -> None:
    codes = np.random.default_rng(1).integers(0, 16, (6, 4, 8)).astype(np.uint8)
    scale, zero = np.abs(f(6, 4, 1)) + 0.1, np.random.default_rng(2).integers(0, 16, (6, 4, 1)).astype(np.uint8)
    x = parameter(-1, 32)
    weight = op.reshape(compressed(codes, scale, zero, ov.Type.u4), c([6, 32], np.int64), False)
    model = ov.Model([op.matmul(x, weight, False, True)], [x])
    read = read_ir(model)
    assert not read.notes
    (found,) = read_qdq(read.graph)
    assert found.block == 8
    feed = f(3, 32)
    exact = feed.astype(np.float64) @ ((codes.astype(float) - zero) * scale).reshape(6, 32).T
    assert np.abs(twin(read.graph, feed) - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("levels", [255, 256])
@pytest.mark.parametrize("doubled", [False, True])
def test_float_weights_are_rounded_by_the_graph_as_openvino_rounds_them(levels: int, doubled: bool) -> None:
    weight = f(8, 4, 3, 3)
    top = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) * np.float32(2 if doubled else 1)
    low = -top if levels == 255 else -top * np.float32(128 / 127)
    x = parameter(-1, 4, 6, 6)
    conv = op.convolution(x, fake(c(weight), low, top, levels), [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([conv], [x])
    graph = ir_to_qdq(model)
    (found,) = read_qdq(graph)
    assert found.quantize is not None
    assert found.is_weight
    assert found.dtype == "int8"
    assert found.axis == 0
    source = graph.constant(found.name)
    assert source is not None
    assert source.dtype == np.float32
    assert np.abs(source - weight).max() < 1e-4 * float(found.scale.max())
    feed = f(2, 4, 6, 6)
    wanted = run(model, feed)
    assert np.abs(twin(graph, feed) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_weights_that_were_halved_against_overflow_are_doubled_again() -> None:
    weight = f(8, 4, 3, 3)
    top = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    x = parameter(-1, 4, 6, 6)
    rounded = fake(c(weight / 2), -top, top, 255, (-2 * top, 2 * top))
    model = ov.Model([op.convolution(x, rounded, [1, 1], [0, 0], [0, 0], [1, 1])], [x])
    read = read_ir(model)
    assert not read.notes
    (found,) = read_qdq(read.graph)
    source = read.graph.constant(found.name)
    assert source is not None
    assert np.abs(source - weight).max() < 1e-4 * float(found.scale.max())
    feed = f(2, 4, 6, 6)
    wanted = run(model, feed)
    assert np.abs(twin(read.graph, feed) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_grouped_weights_keep_a_scale_a_channel() -> None:
    codes = np.random.default_rng(5).integers(-127, 128, (6, 1, 1, 3, 3)).astype(np.int8)
    scale = np.abs(f(6, 1, 1, 1, 1)) + 0.1
    x = parameter(-1, 6, 6, 6)
    conv = op.group_convolution(x, compressed(codes, scale, None), [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([op.add(conv, c(f(1, 6, 1, 1)))], [x])
    graph = ir_to_qdq(model)
    (node,) = [item for item in graph.nodes if item.op_type == "Conv"]
    assert len(node.input) == 3
    (found,) = read_qdq(graph)
    assert found.axis == 0
    assert np.array_equal(found.scale, scale.reshape(-1))
    assert graph.shape(found.codes) == (6, 1, 3, 3)
    feed = f(2, 6, 6, 6)
    wanted = run(model, feed)
    assert np.abs(twin(graph, feed) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_half_precision_constants_are_read_as_they_are() -> None:
    x = parameter(-1, 4, 6, 6)
    weight = f(8, 4, 3, 3).astype(np.float16)
    conv = op.convolution(x, op.convert(op.constant(weight), "f32"), [1, 1], [0, 0], [0, 0], [1, 1])
    graph = ir_to_qdq(ov.Model([conv], [x]))
    (node,) = [item for item in graph.nodes if item.op_type == "Conv"]
    stored = graph.constant(node.input[1])
    assert stored is not None
    assert stored.dtype == np.float32
    assert np.array_equal(stored, weight.astype(np.float32))


# -- names --


def small_net() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        small (float[N, 3, 8, 8] image) => (float[N, 5] scores, float[N, 4, 8, 8] features)
        <float[4, 3, 3, 3] w1, float[4] b1, float[4, 1, 3, 3] w2, float[5, 4] w3, float[5] b3>
        {
            first = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
            active = Relu (first)
            features = Conv <pads = [1, 1, 1, 1], group = 4> (active, w2)
            pooled = GlobalAveragePool (features)
            flat = Flatten (pooled)
            scores = Gemm <transB = 1> (flat, w3, b3)
        }
        """
    )


def filled() -> Graph:
    proto = small_net()
    shapes = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 1, 3, 3), "w3": (5, 4), "b3": (5,)}
    del proto.graph.initializer[:]
    for seed, (name, shape) in enumerate(shapes.items()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(f(*shape, seed=seed), name))
    return Graph(proto)


def converted(graph: Graph, folder: Path) -> Any:
    path = folder / "net.onnx"
    onnx.save(graph.proto, path)
    return ov.convert_model(path)


def test_values_inputs_outputs_and_weights_keep_their_names(tmp_path: Path) -> None:
    like = filled()
    model = converted(like, tmp_path)
    graph = ir_to_qdq(model, like=like)
    assert [spec.name for spec in graph.inputs] == ["image"]
    assert [spec.name for spec in graph.outputs] == ["scores", "features"]
    assert graph.inputs[0].shape == (None, 3, 8, 8)
    feed = torch.from_numpy(f(3, 3, 8, 8)).double()
    ours, theirs = (Twin(g, dtype=torch.float64, device="cpu") for g in (graph, like))
    shared = [name for node in like.nodes for name in node.output if graph.producer(name) is not None]
    assert {"first", "active", "features", "pooled", "scores"} <= set(shared)
    a, b = ours.run({"image": feed}, fetch=shared), theirs.run({"image": feed}, fetch=shared)
    for name in shared:
        assert torch.allclose(a[name], b[name], rtol=1e-6, atol=1e-6), name
    assert {"w1", "b1", "w2", "w3", "b3"} <= set(graph.initializer_names)
    assert [node.op_type for node in graph.nodes if node.output[0] in ("pooled", "scores")] == [
        "GlobalAveragePool",
        "Gemm",
    ]


def test_another_network_is_refused(tmp_path: Path) -> None:
    model = converted(filled(), tmp_path)
    other = Graph(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[1] a) => (float[1] y) { y = Relu (a) }'
        )
    )
    with pytest.raises(ModelError, match="output"):
        ir_to_qdq(model, like=other)


def test_a_rounded_output_has_the_name_of_the_output() -> None:
    x = parameter(-1, 4)
    y = op.relu(x)
    y.output(0).set_names({"y"})
    model = ov.Model([fake(y, 0.0, 2.55)], [x])
    like = Graph(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }'
        )
    )
    graph = ir_to_qdq(model, like=like)
    assert [spec.name for spec in graph.outputs] == ["y"]
    assert graph.producer("y").op_type == "DequantizeLinear"  # type: ignore[union-attr]
    feed = f(3, 4)
    assert np.abs(twin(graph, feed) - run(model, feed)).max() < 1e-6


# -- files --


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ov.save_model(converted(filled(), tmp_path), tmp_path / "net.xml", compress_to_fp16=False)
    return tmp_path / "net.xml"


def test_a_saved_ir_is_read_from_its_path(saved: Path) -> None:
    assert [spec.name for spec in ir_to_qdq(saved, like=filled()).outputs] == ["scores", "features"]
    assert load_ir(saved).get_parameters()


def broken(path: Path, how: str) -> Path:
    text = path.read_text()
    if how == "missing":
        path.unlink()
    elif how == "no .bin":
        path.with_suffix(".bin").unlink()
    elif how == "short .bin":
        path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:100])
    elif how == "cut short":
        path.write_text(text[: len(text) // 2])
    elif how == "empty":
        path.write_text("")
    elif how == "version":
        path.write_text(text.replace('version="11"', 'version="7"', 1))
    elif how == "no version":
        path.write_text(text.replace(' version="11"', "", 1))
    elif how == "another xml":
        path.write_text("<svg></svg>")
    elif how == "unknown operation":
        path.write_text(text.replace('type="ReLU"', 'type="Wonderful"', 1))
    elif how == "binary":
        path.write_bytes(bytes(range(256)) * 4)
    elif how == "onnx":
        return path.with_suffix(".onnx")
    return path


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("missing", UsageError, "no such file"),
        ("no .bin", ModelError, "without its weights"),
        ("short .bin", ModelError, "cut short: 100 bytes"),
        ("cut short", ModelError, "cut short or damaged"),
        ("empty", ModelError, "cut short or damaged"),
        ("version", ModelError, "version 7"),
        ("no version", ModelError, "version unknown"),
        ("another xml", ModelError, "<svg>"),
        ("unknown operation", ModelError, "cannot read"),
        ("binary", ModelError, "damaged"),
        ("onnx", ModelError, "ends in .xml"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(saved: Path, how: str, kind: type[ZsqError], words: str) -> None:
    with pytest.raises(kind) as caught:
        ir_to_qdq(broken(saved, how))
    assert words in str(caught.value)
    assert caught.value.where
    assert caught.value.remedy


# -- whole networks --

NETWORKS = {
    "mlperf_tiny_resnet8_cifar10": None,
    "resnet20_cifar10": None,
    "mobilenet_v1_025_imagenet": None,
    "squeezenet11_imagenet": None,
    "mlperf_tiny_mobilenet_v1_025_vww": None,
    "vit_cifar10": None,
    "ultraface_rfb320": None,
    "dncnn25": (1, 1, 48, 48),
}


def feed_of(graph: Graph, batch: int, size: int = 48) -> Array:
    shape = [
        batch if axis == 0 and d is None else size if d is None else d for axis, d in enumerate(graph.inputs[0].shape)
    ]
    return f(*shape, seed=1)


def outputs(model: Any, graph: Graph, feed: Array) -> Sequence[tuple[Array, Array]]:
    found = ov.Core().compile_model(model, "CPU", CONFIG)(feed)
    with torch.no_grad():
        ours = Twin(graph, dtype=torch.float64, device="cpu").run(
            {graph.inputs[0].name: torch.from_numpy(feed).double()}
        )
    return [(np.asarray(found[spec.name], np.float64), ours[spec.name].numpy()) for spec in graph.outputs]


@pytest.mark.assets
@pytest.mark.parametrize("name", NETWORKS)
def test_float_networks_come_back_as_they_were(assets: Path, name: str) -> None:
    path = assets / "models" / f"{name}.onnx"
    like = load_model(str(path), input_shape=NETWORKS[name]).folded().graph
    model = ov.convert_model(path)
    graph = ir_to_qdq(model, like=like)
    assert [spec.name for spec in graph.outputs] == [spec.name for spec in like.outputs]
    feed = feed_of(graph, 2)
    for wanted, found in outputs(model, graph, feed):
        assert np.abs(wanted - found).max() < 1e-5 * np.abs(wanted).max()
    shared = [
        v for node in like.nodes for v in node.output if graph.producer(v) is not None and like.dtype(v) == np.float32
    ]
    assert len(shared) > 0.6 * len(like.nodes)
    x = torch.from_numpy(feed).double()
    a, b = (Twin(g, dtype=torch.float64, device="cpu").run({g.inputs[0].name: x}, fetch=shared) for g in (graph, like))
    for value in shared:
        assert float((a[value] - b[value]).abs().max()) <= 1e-5 * max(1.0, float(b[value].abs().max())), value


def spans(graph: Graph, feed: Array) -> dict[str, tuple[float, float]]:
    """Smallest and largest number of every float value for one batch."""
    names = [
        v for node in graph.nodes for v in node.output if graph.dtype(v) == np.float32 and graph.constant(v) is None
    ]
    names += [spec.name for spec in graph.inputs]
    with torch.no_grad():
        found = Twin(graph, dtype=torch.float32, device="cpu").run(
            {graph.inputs[0].name: torch.from_numpy(feed)}, fetch=names
        )
    return {name: (float(value.min()), float(value.max())) for name, value in found.items()}


@pytest.mark.assets
@pytest.mark.parametrize("bias", ["int32", "float"])
@pytest.mark.parametrize("name", ["mlperf_tiny_resnet8_cifar10", "mlperf_tiny_mobilenet_v1_025_vww", "vit_cifar10"])
def test_our_own_graphs_come_back_with_every_scale(assets: Path, tmp_path: Path, name: str, bias: Any) -> None:
    like = load_model(str(assets / "models" / f"{name}.onnx")).folded().graph
    target = get_target("openvino-cpu")
    rules = PlacementRules(residual="skip", bias=bias, always_output=frozenset())
    feed = feed_of(like, 2)
    ours = insert_qdq(like, spans(like, feed), activation=target.activation, weight=target.weight, rules=rules)
    model = converted(ours, tmp_path)
    read = read_ir(model, like=like)
    assert not read.notes
    wanted = {t.name: t for t in read_qdq(ours) if not t.is_weight}
    found = {t.name: t for t in read_qdq(read.graph) if not t.is_weight}
    same = sorted(set(wanted) & set(found))
    assert len(same) > 0.6 * len(wanted)
    for value in same:
        assert np.allclose(found[value].scale, wanted[value].scale, rtol=3e-7, atol=0), value
        low, high = wanted[value].low, wanted[value].high
        assert found[value].low == pytest.approx(low, abs=1e-6 * (high - low)), value
        assert found[value].high == pytest.approx(high, abs=1e-6 * (high - low)), value
    heavy = {t.codes: t for t in read_qdq(ours) if t.is_weight and not t.is_bias}
    again = [t for t in read_qdq(read.graph) if t.is_weight and not t.is_bias]
    assert len(again) >= len(heavy) > 0
    for tensor in again:
        if tensor.codes in heavy:
            assert np.array_equal(
                np.asarray(ours.constant(tensor.codes)), np.asarray(read.graph.constant(tensor.codes))
            )
            assert np.array_equal(tensor.scale, heavy[tensor.codes].scale)
    if bias == "int32":
        assert any(t.is_bias for t in read_qdq(read.graph))
    step_by_step(model, read.graph, feed)


def step_by_step(model: Any, graph: Graph, feed: Array) -> None:
    """Every rounding and every output, each from OpenVINO's own numbers in front of it: only numbers on a tie may differ."""
    roundings = [
        node for node in graph.nodes if node.op_type == "QuantizeLinear" and graph.constant(node.input[0]) is None
    ]
    behind = {node.input[0]: node.output[0] for node in graph.nodes if node.op_type == "DequantizeLinear"}
    places = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "FakeQuantize"
        and node.input(0).get_source_output().get_node().get_type_name() != "Constant"
    ]
    assert len(places) == len(roundings)
    model = model.clone()
    by_name = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    count = len(model.outputs)
    # what goes into a rounding is delivered too: then it stands alone, and is not computed inside the operation in front of it
    model.add_outputs([by_name[node.get_friendly_name()].output(0) for node in places])
    model.add_outputs([by_name[node.get_friendly_name()].input(0).get_source_output() for node in places])
    results = ov.Core().compile_model(model, "CPU", CONFIG)(feed)
    theirs = {behind[node.output[0]]: np.asarray(results[count + k], np.float64) for k, node in enumerate(roundings)}
    ours: dict[str, Array] = {}

    def forced(name: str) -> Any:
        def tap(value: torch.Tensor) -> torch.Tensor:
            ours[name] = value.numpy().copy()
            return torch.from_numpy(theirs[name])

        return tap

    with torch.no_grad():
        twin_ = Twin(graph, dtype=torch.float64, device="cpu")
        found = twin_.run(
            {graph.inputs[0].name: torch.from_numpy(feed).double()}, taps={name: forced(name) for name in theirs}
        )
    for tensor in read_qdq(graph):
        if tensor.output in theirs:
            step = np.asarray(tensor.scale, np.float64).max()
            differ = np.abs(ours[tensor.output] - theirs[tensor.output]) > 0.5 * step
            assert differ.mean() < 2e-3, tensor.name
            assert np.abs(ours[tensor.output] - theirs[tensor.output]).max() < 1.01 * step, tensor.name
    for index, spec in enumerate(graph.outputs):
        wanted = np.asarray(results[index], np.float64)
        assert np.abs(found[spec.name].numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("stored", [True, False], ids=["compressed", "float-weights"])
@pytest.mark.parametrize("name", ["mlperf_tiny_resnet8_cifar10", "mlperf_tiny_mobilenet_v1_025_vww"])
def test_what_nncf_writes_is_read(assets: Path, name: str, stored: bool) -> None:
    nncf = pytest.importorskip("nncf")
    from nncf.openvino.quantization.backend_parameters import BackendParameters

    path = assets / "models" / f"{name}.onnx"
    like = load_model(str(path)).folded().graph
    model = ov.convert_model(path)
    feeds = [feed_of(like, 1) for _ in range(3)]
    advanced = nncf.AdvancedQuantizationParameters(backend_params={BackendParameters.COMPRESS_WEIGHTS: stored})
    quantized = nncf.quantize(model, nncf.Dataset(feeds), subset_size=3, advanced_parameters=advanced)
    read = read_ir(quantized, like=like)
    assert not read.notes
    weights = [t for t in read_qdq(read.graph) if t.is_weight]
    convolutions = [node for node in read.graph.nodes if node.op_type in ("Conv", "Gemm")]
    assert len(weights) == len(convolutions)
    assert all((t.quantize is None) == stored for t in weights)
    assert {node.input[1] for node in like.nodes if node.op_type == "Conv"} <= {t.name for t in weights}
    kept = {value for node in read.graph.nodes for value in node.output}
    assert {value for node in like.nodes for value in node.output} <= kept
    step_by_step(quantized, read.graph, feed_of(like, 2))
