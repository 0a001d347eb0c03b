"""Rewrites that are chosen by measurement or needed by some networks only: each keeps the function, and reaches integer kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.backends import get_target
from zsq_deploy.backends.onnxruntime.options import BuildOptions
from zsq_deploy.backends.onnxruntime.prepare import prepare
from zsq_deploy.backends.onnxruntime.quantizer import build
from zsq_deploy.backends.onnxruntime.runner import runner
from zsq_deploy.backends.onnxruntime.transposed import phase_taps
from zsq_deploy.model.graph import Graph

from .ort_engines import Builder, everything, loaded, ranges_of, run

VNNI = get_target("ort-x86-vnni")


def noise(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def sqnr(want: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10((want.astype(np.float64) ** 2).sum() / ((want - got) ** 2).sum()))


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(2, 6),
    stride=st.integers(1, 3),
    pad=st.integers(0, 2),
    extra=st.integers(0, 1),
    bias=st.booleans(),
)
def test_a_transposed_convolution_is_a_convolution_of_its_phases(
    kernel: int, stride: int, pad: int, extra: int, bias: bool
) -> None:
    if kernel < stride or extra >= stride or kernel <= 2 * pad - extra:
        return
    b = Builder(kernel)
    w = b.constant("w", b.rng.standard_normal((3, 4, kernel, kernel)))
    inputs = ["x", w, b.constant("b", b.rng.standard_normal(4))] if bias else ["x", w]
    b.node(
        "ConvTranspose", inputs, "y",
        strides=[stride] * 2, pads=[pad] * 4, output_padding=[extra] * 2, kernel_shape=[kernel] * 2,
    )  # fmt: skip
    height = stride * 4 + kernel - 2 * pad + extra
    width = stride * 5 + kernel - 2 * pad + extra
    proto = b.model(["n", 3, 5, 6], {"y": ["n", 4, height, width]})
    prepared = prepare(Graph(proto))
    feeds = noise(2, 3, 5, 6)
    np.testing.assert_allclose(run(prepared.graph.proto, feeds)[0], run(proto, feeds)[0], rtol=1e-4, atol=1e-5)
    if kernel % stride == 0:
        assert not any(node.op_type == "ConvTranspose" for node in prepared.graph)


def test_every_tap_of_a_transposed_convolution_is_used_once() -> None:
    for kernel in range(1, 8):
        for stride in range(1, 4):
            for pad in range(3):
                *_, taps = phase_taps(kernel, stride, pad)
                assert sorted(taps.values()) == list(range(kernel)), (kernel, stride, pad)


def test_an_upsampling_network_runs_all_macs_in_integers(tmp_path: Path) -> None:
    b = Builder(5)
    skip = b.node("Relu", [b.conv("x", "c1", 3, 16, 3)], "a1")
    x = b.node("MaxPool", [skip], "down", kernel_shape=[2, 2], strides=[2, 2])
    x = b.node("Relu", [b.conv(x, "c2", 16, 32, 3)], "a2")
    w, bias = b.constant("up_w", b.rng.standard_normal((32, 16, 2, 2)) * 0.2), b.constant("up_b", np.zeros(16))
    x = b.node("ConvTranspose", [x, w, bias], "up", strides=[2, 2], kernel_shape=[2, 2])
    x = b.node("Relu", [b.conv(b.node("Concat", [skip, x], "cat", axis=1), "c3", 32, 16, 3)], "a3")
    b.conv(x, "out", 16, 2, 1, pads=[0] * 4)
    model = loaded(b.model(["n", 3, 16, 16], {"out": ["n", 2, 16, 16]}), tmp_path)
    feeds = noise(4, 3, 16, 16)
    one = {"x": feeds["x"][:1]}
    for heads in (False, True):
        made = build(
            model, ranges_of(model, feeds), VNNI, tmp_path / str(heads), options=BuildOptions(float_heads=heads)
        )
        records = runner(made.path, VNNI).kernels(one)
        assert [r.node for r in records if r.macs and not r.integer] == []
        want = runner(made.float_path, VNNI, mode="float").run(feeds)["out"]
        got = runner(made.path, VNNI).run(feeds)["out"]
        assert sqnr(want, got) > 25
        levels = len(np.unique(got))
        assert levels > 1000 if heads else levels <= 256  # float out, or 8 bits


@pytest.mark.parametrize("op", ["HardSwish", "HardSigmoid"])
def test_hard_gates_have_integer_kernels_if_asked(tmp_path: Path, op: str) -> None:
    b = Builder(6)
    more = {"alpha": 0.25, "beta": 0.4} if op == "HardSigmoid" else {}
    x = b.node(op, [b.conv("x", "c1", 3, 16, 3)], "gated", **more)
    x = b.node("GlobalAveragePool", [b.node("Relu", [b.conv(x, "c2", 16, 16, 3)], "a2")], "gap")
    b.gemm(b.node("Flatten", [x], "flat"), "logits", 16, 5)
    model = loaded(b.model(["n", 3, 8, 8], {"logits": ["n", 5]}), tmp_path)
    feeds = noise(6, 3, 8, 8)
    graph = model.folded().graph
    rewritten = prepare(graph, gates=True)
    before, after = everything(graph, feeds), everything(rewritten.graph, feeds)
    for name in set(before) & set(after):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-5, err_msg=name)
    made = build(model, ranges_of(model, feeds), VNNI, tmp_path / "e", options=BuildOptions(gates=True))
    floats = {r.op for r in runner(made.path, VNNI).kernels({"x": feeds["x"][:1]}) if not r.integer}
    assert floats <= {"QuantizeLinear", "DequantizeLinear"}
    want = runner(made.float_path, VNNI, mode="float").run(feeds)["logits"]
    assert sqnr(want, runner(made.path, VNNI).run(feeds)["logits"]) > 25


def test_a_float_reader_of_the_input_gets_the_float_input(tmp_path: Path) -> None:
    b = Builder(7)
    x = b.node("Relu", [b.conv("x", "c1", 1, 16, 3)], "a1")
    b.node("Sub", ["x", b.conv(x, "noise", 16, 1, 3)], "clean")
    model = loaded(b.model(["n", 1, 12, 12], {"clean": ["n", 1, 12, 12]}), tmp_path)
    feeds = noise(3, 1, 12, 12)
    ranges = ranges_of(model, feeds)
    for wanted in (True, False):
        made = build(model, ranges, VNNI, tmp_path / str(wanted), options=BuildOptions(float_readers=wanted))
        graph = Graph.load(made.path)
        sub = next(node for node in graph if node.op_type == "Sub")
        assert (sub.input[0] == "x") is wanted


def test_two_convolutions_with_one_weight_get_their_own_scales(tmp_path: Path) -> None:
    b = Builder(8)
    x = b.node("Relu", [b.conv("x", "c1", 3, 3, 3)], "a1")
    x = b.node("Relu", [b.node("Conv", [x, "c1_w", "c1_b"], "c2", pads=[1] * 4)], "a2")
    b.conv(x, "y", 3, 2, 1, pads=[0] * 4)
    model = loaded(b.model(["n", 3, 8, 8], {"y": ["n", 2, 8, 8]}), tmp_path)
    feeds = noise(3, 3, 8, 8)
    made = build(model, ranges_of(model, feeds), VNNI, tmp_path / "e")
    records = runner(made.path, VNNI).kernels({"x": feeds["x"][:1]})
    assert [r.node for r in records if r.macs and not r.integer] == []
    want = runner(made.float_path, VNNI, mode="float").run(feeds)["y"]
    assert sqnr(want, runner(made.path, VNNI).run(feeds)["y"]) > 25


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_newer_operator_sets_go_through(tmp_path: Path, opset: int) -> None:
    import onnx

    b = Builder(9)
    x = b.node("Relu", [b.conv("x", "c1", 3, 16, 3)], "a1")
    axes = b.constant("axes", [2, 3], np.int64)
    x = b.node("ReduceMean", [x, axes], "mean", keepdims=0)
    b.gemm(x, "logits", 16, 5)
    ir = {18: 8, 20: 9, 21: 10}[opset]
    model = loaded(b.model(["n", 3, 8, 8], {"logits": ["n", 5]}, opset=opset, ir=ir), tmp_path)
    feeds = noise(4, 3, 8, 8)
    made = build(model, ranges_of(model, feeds), VNNI, tmp_path / "e")
    proto = onnx.load(made.path)
    assert proto.ir_version == ir
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", opset)]
    records = runner(made.path, VNNI).kernels({"x": feeds["x"][:1]})
    assert [r.node for r in records if r.macs and not r.integer] == []
