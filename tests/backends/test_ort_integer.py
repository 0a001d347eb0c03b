"""The integer reference as a whole: networks, structure, float islands, errors, and its accumulators on their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.base import Engine, Target
from zsq_deploy.backends.onnxruntime.grouping import group
from zsq_deploy.backends.onnxruntime.integer import IntegerReference
from zsq_deploy.backends.onnxruntime.kernels import Arithmetic, Arm64Arithmetic, arithmetic_for, arithmetic_here
from zsq_deploy.backends.onnxruntime.kernels.accumulate import (
    ConvShape,
    Weights,
    convolve,
    matmul,
    saturating_matmul,
)
from zsq_deploy.backends.onnxruntime.kernels.arithmetic import fma
from zsq_deploy.backends.onnxruntime.runner import session_options
from zsq_deploy.errors import DataError, EngineError, UnsupportedOpError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.integer import accumulate_conv, accumulate_matmul
from zsq_deploy.quant.scheme import Scheme

from .ort_integer_cases import TARGET, Case, codes, conv_case
from .ort_integer_networks import engine_output, quantize, residual_network

U8, S8 = np.uint8, np.int8


# --- whole networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("float_outputs", [False, True], ids=["quantized-output", "float-output"])
@pytest.mark.parametrize("types", ["u8s8", "u8u8", "s8s8"])
def test_a_residual_network_is_computed_bit_for_bit(types: str, float_outputs: bool, tmp_path: Path) -> None:
    target = TARGET
    if types == "s8s8":
        target = Target(
            "ort-arm64", "onnxruntime", "", Scheme(symmetric=False), Scheme(), 17, 8,
            session={"session.qdqisint8allowed": "1"},
        )  # fmt: skip
    path = quantize(residual_network(), tmp_path, types=types, float_outputs=float_outputs)
    reference = IntegerReference(path, target)
    x = np.random.default_rng(1).standard_normal((5, 3, 20, 20)).astype(np.float32)
    feeds = {"x": x}
    theirs = engine_output(path, feeds, target)
    ours = reference.run(feeds)
    assert set(theirs) == set(ours) == set(reference.output_names)
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, ours[name])
    assert reference.first_divergence(feeds) is None
    assert not reference.float_nodes
    operators = {node.op for node in reference.integer_nodes}
    assert {"com.microsoft.QLinearConv", "com.microsoft.QLinearAdd", "com.microsoft.QGemm"} <= operators


def test_batches_and_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    path = quantize(residual_network(), tmp_path)
    one, two = IntegerReference(path, TARGET), IntegerReference(path, TARGET, threads=2)
    x = np.random.default_rng(2).standard_normal((7, 3, 20, 20)).astype(np.float32)
    whole = one.run({"x": x})["y"]
    np.testing.assert_array_equal(whole, np.concatenate([one.run({"x": x[i : i + 1]})["y"] for i in range(7)]))
    np.testing.assert_array_equal(whole, two.run({"x": x})["y"])
    np.testing.assert_array_equal(whole, engine_output(path, {"x": x}, TARGET, threads=2)["y"])
    singles = [engine_output(path, {"x": x[i : i + 1]}, TARGET)["y"] for i in range(7)]
    np.testing.assert_array_equal(whole, np.concatenate(singles))


def test_intermediate_values_are_those_of_the_runtime(tmp_path: Path) -> None:
    path = quantize(residual_network(), tmp_path)
    reference = IntegerReference(path, TARGET)
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 3, 20, 20)).astype(np.float32)}
    theirs, ours = reference.engine_intermediates(feeds), reference.intermediates(feeds)
    assert len(ours) >= 10
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
    some = list(ours)[3]
    np.testing.assert_array_equal(reference.run(feeds, [some])[some], ours[some])


def test_the_first_diverging_value_is_found(tmp_path: Path) -> None:
    """A reference with a wrong rounding of sums diverges first at a sum, not before."""

    class Truncating(Arithmetic):
        def add_table(self, a: Any, b: Any, y: Any, dtype: Any) -> Any:
            right = super().add_table(a, b, y, dtype)
            return np.where(right > 0, right - 1, right).astype(right.dtype)

    path = quantize(residual_network(), tmp_path)
    here = arithmetic_here()
    truncating = Truncating(saturating_pairs=here.saturating_pairs, runtime=here.runtime)
    reference = IntegerReference(path, TARGET, arithmetic=truncating)
    found = reference.first_divergence(
        {"x": np.random.default_rng(3).standard_normal((2, 3, 20, 20)).astype(np.float32)}
    )
    assert found is not None
    assert found.op == "com.microsoft.QLinearAdd"
    assert found.largest == 1
    assert 0 < found.share <= 1


def test_the_target_comes_with_the_engine(tmp_path: Path) -> None:
    path = quantize(residual_network(), tmp_path)
    reference = IntegerReference(Engine(path, path, TARGET, path))
    assert reference.target is TARGET
    with pytest.raises(UsageError, match="built for"):
        IntegerReference(path)


# --- structure read from the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("float_outputs", [False, True], ids=["quantized-output", "float-output"])
@pytest.mark.parametrize("types", ["u8s8", "u8u8"])
def test_our_own_reading_of_the_file_agrees_with_the_runtime(types: str, float_outputs: bool, tmp_path: Path) -> None:
    path = quantize(residual_network(), tmp_path, types=types, float_outputs=float_outputs)
    asked, read = IntegerReference(path, TARGET), IntegerReference(path, TARGET, structure="file")
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 3, 20, 20)).astype(np.float32)}
    np.testing.assert_array_equal(engine_output(path, feeds, TARGET)["y"], read.run(feeds)["y"])

    def kernels(reference: IntegerReference) -> list[str]:
        return sorted(node.op.rpartition(".")[2] for node in reference.integer_nodes)

    assert kernels(asked) == kernels(read)
    assert read.first_divergence(feeds) is None


def _conv_group(bias_scale: float, clamp: str, y_zero: int) -> Graph:
    """x -> DQ -> Conv(+ bias) -> clamp -> Q, with scales 0.5 and 0.25."""
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["x"]),
        helper.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["w"]),
        helper.make_node("DequantizeLinear", ["bq", "sb", "zb"], ["b"]),
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv"),
        helper.make_node(clamp, ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "sy", "zy"], ["y"]),
    ]
    arrays = {
        "sx": np.float32(0.5), "zx": U8(3), "wq": np.ones((2, 3, 1, 1), S8), "sw": np.float32(0.25), "zw": S8(0),
        "bq": np.array([5, -5], np.int32), "sb": np.float32(bias_scale), "zb": np.int32(0), "sy": np.float32(1),
        "zy": U8(y_zero),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "group",
        [helper.make_tensor_value_info("q", onnx.TensorProto.UINT8, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [1, 2, 4, 4])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_groups_are_made_only_where_integers_mean_the_same() -> None:
    def operators(graph: Graph) -> list[str]:
        return [node.op_type for node in group(graph)]

    assert operators(_conv_group(0.125, "Relu", 0)) == ["QLinearConv"]
    assert operators(_conv_group(0.125, "Clip", 77)) == ["QLinearConv"]
    assert "Conv" in operators(_conv_group(0.125, "Relu", 77)), "codes below 77 are negative: the ReLU is not implied"
    assert "Conv" in operators(_conv_group(0.13, "Relu", 0)), "the bias has another scale"
    assert "Conv" in operators(_conv_group(0.125, "Sigmoid", 0))


# --- float islands and errors -------------------------------------------------------------------------------------------


def _float_island(folder: Path) -> Path:
    """Codes -> float -> LayerNormalization -> codes."""
    one = np.asarray(0.05, np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("LayerNormalization", ["d", "gamma", "beta"], ["n"], name="island", axis=-1),
        helper.make_node("QuantizeLinear", ["n", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "island",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [None, 16])],
        [
            numpy_helper.from_array(one, "s"),
            numpy_helper.from_array(np.asarray(128, U8), "z"),
            numpy_helper.from_array(np.ones(16, np.float32), "gamma"),
            numpy_helper.from_array(np.zeros(16, np.float32), "beta"),
        ],
    )
    path = folder / "island.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_float_islands_are_named(tmp_path: Path) -> None:
    path = _float_island(tmp_path)
    reference = IntegerReference(path, TARGET)
    assert [node.op for node in reference.float_nodes] == ["LayerNormalization"]
    x = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    np.testing.assert_array_equal(engine_output(path, {"x": x}, TARGET)["y"], reference.run({"x": x})["y"])


def test_unknown_integer_operators_are_refused_not_delegated(tmp_path: Path) -> None:
    """QLinearReduceMean-like surprises must not be computed by the runtime behind our back: here BitShift on codes."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("BitShift", ["q", "one"], ["b"], name="shift", direction="RIGHT"),
        helper.make_node("DequantizeLinear", ["b", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "unknown",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, 16])],
        [
            numpy_helper.from_array(np.asarray(0.1, np.float32), "s"),
            numpy_helper.from_array(np.asarray(0, U8), "z"),
            numpy_helper.from_array(np.asarray(1, U8), "one"),
        ],
    )
    path = tmp_path / "unknown.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(UnsupportedOpError, match=r"BitShift \(shift\)"):
        IntegerReference(path, TARGET)


def test_damaged_engines_and_missing_feeds(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(EngineError):
        IntegerReference(path, TARGET)
    reference = IntegerReference(_float_island(tmp_path), TARGET)
    with pytest.raises(DataError, match="x"):
        reference.run({})
    with pytest.raises(EngineError, match="nowhere"):
        reference.run({"x": np.zeros((1, 16), np.float32)}, ["nowhere"])


# --- accumulators -------------------------------------------------------------------------------------------------------

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_channels_last_convolutions_agree_with_the_channels_first_ones(seed: int) -> None:
    """Two independent exact accumulators: gathered rows times a matrix here, direct convolution in quant.integer."""
    rng = np.random.default_rng(seed)
    case = conv_case(rng, groups=int(rng.integers(1, 4)))
    x, zero = case.feeds["x"], int(case.constants["zx"])
    w, w_zero = case.constants["w"], np.asarray(case.constants["zw"]).reshape(-1)[0]
    attrs = case.attrs
    group = attrs["group"]
    rows = np.moveaxis(w.astype(np.int32) - int(w_zero), [0, 1], [-1, -2]).reshape(-1, w.shape[0])
    width = w.shape[0] // group
    weights = [
        Weights.prepare(torch.from_numpy(rows[:, g * width : (g + 1) * width].copy()), 255) for g in range(group)
    ]
    shape = ConvShape(
        w.shape[2:],
        tuple(attrs["strides"]),
        tuple(attrs["dilations"]),
        tuple(attrs["pads"][:2]),
        tuple(attrs["pads"][2:]),
    )
    last = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, 1, -1)).astype(np.float32) - zero)
    got = np.moveaxis(convolve(last, weights, shape).numpy(), -1, 1)
    np.testing.assert_array_equal(got, accumulate_conv(x, zero, w, int(w_zero), attrs))


@pytest.mark.parametrize("depth", [1, 500, 519, 4097, 40000])
def test_deep_products_stay_exact(depth: int) -> None:
    """Sums far beyond 2**24 are cut into pieces; extreme codes make every piece as large as it can be."""
    rng = np.random.default_rng(depth)
    a = rng.choice([0, 1, 254, 255], (4, depth)).astype(np.int64)
    b = rng.choice([-128, -127, 126, 127], (depth, 3)).astype(np.int64)
    weights = Weights.prepare(torch.from_numpy(b.astype(np.int32)), 255)
    got = matmul(torch.from_numpy(a.astype(np.float32)), weights).numpy()
    np.testing.assert_array_equal(got, a @ b)
    np.testing.assert_array_equal(got, accumulate_matmul(a.astype(U8), 0, b.astype(S8), 0))


def test_sums_beyond_int32_wrap() -> None:
    b = torch.full((70000, 1), 127, dtype=torch.int32)
    got = matmul(torch.full((1, 70000), 255.0), Weights.prepare(b, 255))
    expected = (255 * 127 * 70000 + 2**31) % 2**32 - 2**31
    assert int(got) == expected


def test_saturating_pairs_in_closed_form() -> None:
    """64 products of 255 with 127: 2,072,640 in exact sums, 32 * 32767 in saturating pairs."""
    raw, w = torch.full((1, 64), 255, dtype=torch.int32), torch.full((64, 1), 127, dtype=torch.int32)
    assert int(saturating_matmul(raw, w)) == 1_048_544 == 32 * 32767
    assert int(saturating_matmul(raw, -w - 1)) == 32 * -32768
    assert int(saturating_matmul(raw[:, :63], w[:63])) == 31 * 32767 + 255 * 127
    half = torch.full((64, 1), 64, dtype=torch.int32)
    assert int(saturating_matmul(raw, half)) == 64 * 255 * 64, "weights within -64..64 cannot saturate"


def test_softmax_rules_of_older_runtimes() -> None:
    """A probability of one: clamped today, wrapped to a negative code before 1.29; infinities before 1.32."""
    one, minus = np.array([[1.0]], np.float32), -128
    for version, expected in (((1, 32), 127), ((1, 29), 127), ((1, 28), -128)):
        got = Arithmetic(runtime=version).softmax(one, one, np.float32(256), minus, S8)
        assert got.item() == expected, version
    huge = np.array([[np.finfo(np.float32).max]], np.float32)
    for version, expected in (((1, 32), 255), ((1, 31), 7)):
        got = Arithmetic(runtime=version).softmax(huge, huge, np.float32(256), 7, U8)
        assert got.item() == expected, version


@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_saturating_pairs_equal_exact_sums_for_reduced_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    depth = int(rng.integers(1, 60))
    a, b = rng.integers(0, 256, (5, depth)), rng.integers(-64, 65, (depth, 4))
    got = saturating_matmul(torch.from_numpy(a).int(), torch.from_numpy(b).int())
    np.testing.assert_array_equal(got.numpy(), a @ b)


def test_a_machine_without_vnni_is_modelled(tmp_path: Path) -> None:
    """Full-range weights change the outputs, reduced ones do not."""
    full = quantize(residual_network(), tmp_path)
    x = np.random.default_rng(4).standard_normal((3, 3, 20, 20)).astype(np.float32)
    exact = IntegerReference(full, TARGET, arithmetic=Arithmetic()).run({"x": x})["y"]
    without = IntegerReference(full, TARGET, arithmetic=Arithmetic(saturating_pairs=True)).run({"x": x})["y"]
    assert not np.array_equal(exact, without)
    reduced = quantize(residual_network(), tmp_path, reduce_range=True)
    a = IntegerReference(reduced, TARGET, arithmetic=Arithmetic()).run({"x": x})["y"]
    b = IntegerReference(reduced, TARGET, arithmetic=Arithmetic(saturating_pairs=True)).run({"x": x})["y"]
    np.testing.assert_array_equal(a, b)


# --- arithmetic ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(*(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**40), max_value=2.0**40),) * 3)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    from fractions import Fraction

    got = float(fma(np.float32(a), np.float32(b), np.float32(c)))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert got == _nearest_float32(exact)


def _nearest_float32(value: Any) -> float:
    """Correct rounding by comparing with the neighbours in exact rational arithmetic."""
    from fractions import Fraction

    middle = np.float32(float(value))
    candidates = [np.nextafter(middle, np.float32(-np.inf)), middle, np.nextafter(middle, np.float32(np.inf))]

    def rank(candidate: np.float32) -> tuple[Any, int]:
        return abs(Fraction(float(candidate)) - value), int(candidate.view(np.int32)) & 1

    return float(min(candidates, key=rank))


def test_fused_multiply_add_where_two_roundings_go_wrong() -> None:
    """1 + 2**-24 + tiny: rounding to float64 first makes a tie of it and then loses the tiny part."""
    a, b, c = np.float32(2.0**-24), np.float32(1), np.float32(1)
    assert fma(a, b, c) == np.float32(1)
    tiny = fma(np.float32(2.0**-30), np.float32(2.0**-30), np.float32(1 + 2.0**-23))
    assert tiny == np.float32(1 + 2.0**-23)
    x = np.float32(1 + 2.0**-12)
    product = np.float64(x) * np.float64(x)  # 1 + 2**-11 + 2**-24: exactly between two float32
    assert np.float32(product) == np.float32(1 + 2.0**-11)
    assert fma(x, x, np.float32(2.0**-80)) == np.nextafter(np.float32(1 + 2.0**-11), np.float32(2))


def test_the_arm_rule_of_sums_is_fixed_point_close_to_exact() -> None:
    """Within one code of the exact sum, and equal to it away from ties."""
    rng = np.random.default_rng(8)
    q = np.arange(256, dtype=U8).view(S8).astype(np.int64)
    for _ in range(20):
        sa, sb = np.float32(rng.uniform(0.01, 1)), np.float32(rng.uniform(0.01, 1))
        sy, zy = np.float32(max(sa, sb) * rng.uniform(0.7, 2)), int(rng.integers(-128, 128))
        za, zb = int(rng.integers(-128, 128)), int(rng.integers(-128, 128))
        table = Arm64Arithmetic().add_table((sa, za), (sb, zb), (sy, zy), S8).astype(np.int64)
        exact = (float(sa) * (q[:, None] - za) + float(sb) * (q[None] - zb)) / float(sy) + zy
        inside = np.abs(exact - np.floor(exact) - 0.5) > 1e-3
        np.testing.assert_array_equal(table[inside], np.clip(np.rint(exact), -128, 127)[inside])
        assert np.abs(table - np.clip(exact, -128, 127)).max() <= 0.501 + 1e-3


def test_rules_go_by_target() -> None:
    def target(name: str) -> Target:
        return Target(name, "onnxruntime", "", Scheme(), Scheme(), 17, 8)

    assert isinstance(arithmetic_for(target("ort-arm64")), Arm64Arithmetic)
    assert arithmetic_for(target("ort-x86-vnni")) == Arithmetic()
    assert arithmetic_for(target("ort-x86-avx2")) == Arithmetic(saturating_pairs=True)
    assert arithmetic_for(target("ort-x86-avx2"), saturating_pairs=False) == Arithmetic()


def test_a_reference_on_the_target_goes_by_its_rules(tmp_path: Path) -> None:
    """One bundle holds what the engine must compute on Arm, made on a machine that rounds sums in another way."""
    path = quantize(residual_network(), tmp_path, types="s8s8")
    target = get_target("ort-arm64")
    engine = Engine(path, path, target, path)
    there = get_backend(target).integer_reference(engine, on_target=True)
    assert isinstance(there.arithmetic, Arm64Arithmetic)
    assert there.arithmetic.runtime == arithmetic_here(there.arithmetic.runtime).runtime
    here = get_backend(target).integer_reference(engine)
    assert here.arithmetic == IntegerReference(engine).arithmetic
    feeds = {"x": np.random.default_rng(4).standard_normal((4, 3, 20, 20)).astype(np.float32)}
    ours, theirs = there.intermediates(feeds), here.intermediates(feeds)
    sums = [name for node in there.integer_nodes if node.op.endswith("QLinearAdd") for name in node.outputs]
    differences = [np.abs(ours[name].astype(int) - theirs[name].astype(int)) for name in sums]
    assert max(int(found.max()) for found in differences) <= 2


# --- real networks ------------------------------------------------------------------------------------------------------

ASSETS = [
    "resnet20_cifar10",
    "mlperf_tiny_resnet8_cifar10",
    "mlperf_tiny_mobilenet_v1_025_vww",
    "mobilenet_v1_025_imagenet",
    "squeezenet11_imagenet",
    "dncnn25",
    "vit_cifar10",
    pytest.param("ultraface_rfb320", marks=pytest.mark.slow),
]


@pytest.mark.assets
@pytest.mark.parametrize("float_outputs", [True, False], ids=["float-output", "quantized-output"])
@pytest.mark.parametrize("network", ASSETS)
def test_real_networks_are_computed_bit_for_bit(
    network: str, float_outputs: bool, assets: Path, tmp_path: Path
) -> None:
    from .ort_integer_networks import asset_network, random_feeds

    model = asset_network(assets, network)
    path = quantize(model, tmp_path, float_outputs=float_outputs, network=network)
    reference = IntegerReference(path, TARGET)
    feeds = random_feeds(path, network, images=2, seed=5)
    theirs, ours = engine_output(path, feeds, TARGET), reference.run(feeds)
    for name, array in theirs.items():
        equal = float((array == ours[name]).mean())
        assert equal == 1.0, f"{name}: {equal:.6f} equal; first {reference.first_divergence(feeds)}"
    ours = IntegerReference(path, TARGET, structure="file").run(feeds)
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, ours[name], err_msg="with our own reading of the file")
    assert sum("Conv" in node.op or "MatMul" in node.op or "Gemm" in node.op for node in reference.integer_nodes) > 5
    assert not any("Conv" in node.op for node in reference.float_nodes)


def test_cases_are_onnx() -> None:
    """The generator itself: what it makes is accepted by the runtime (else every test above would be about errors)."""
    case: Case = conv_case(np.random.default_rng(0))
    ort.InferenceSession(case.model().SerializeToString(), session_options(TARGET), providers=["CPUExecutionProvider"])
    assert codes(np.random.default_rng(0), (3,), S8).dtype == S8
