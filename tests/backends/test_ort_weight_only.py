"""Weights of matrix products in 4 or 8 bits, in blocks: engine, Q/DQ graph and numpy say the same numbers, in float32."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import BuildSettings
from zsq_deploy.backends.onnxruntime.backend import (
    BuildOptions,
    build,
    candidates,
    integer_reference,
    options_from,
    runner,
)
from zsq_deploy.errors import EngineError, UnsupportedOpError, UsageError
from zsq_deploy.model import Graph, load_model
from zsq_deploy.model.twin import Twin

VNNI = get_target("ort-x86-vnni")


def network(tmp_path, *, products=True):
    """A patch embedding by convolution, a MatMul, a Gemm with bias and transposed weights, and a Gemm whose 24 inputs no block of 16 divides."""
    rng = np.random.default_rng(0)
    arrays = {
        "conv": rng.normal(size=(64, 3, 4, 4)) / 7, "one": rng.normal(size=(64, 96)) / 8,
        "two": rng.normal(size=(24, 96)) / 10, "bias": rng.normal(size=24), "three": rng.normal(size=(24, 5)) / 5,
        "none": rng.normal(size=5),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["c"], name="patches", strides=[4, 4]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flat"),
    ]
    last = "f"
    if products:
        nodes += [
            helper.make_node("MatMul", ["f", "one"], ["m"], name="matmul"),
            helper.make_node("Relu", ["m"], ["r"], name="relu"),
            helper.make_node("Gemm", ["r", "two", "bias"], ["h"], name="gemm", transB=1),
            helper.make_node("Gemm", ["h", "three", "none"], ["y"], name="odd"),
        ]
        last = "y"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, 16, 16))],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ("n", 5 if products else 64))],
        [
            numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in arrays.items()
            if products or name == "conv"
        ],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return load_model(path), arrays


@pytest.mark.parametrize("bits", [4, 8])
def test_engine_graph_and_numpy_say_the_same(tmp_path, bits):
    model, arrays = network(tmp_path)
    engine = build(model, {}, VNNI, tmp_path / "e", options=BuildOptions(bits=f"w{bits}a32"))
    assert engine.choices["weights_stored"] == ["matmul", "gemm"]
    assert set(engine.choices["float_nodes"]) == {"patches", "odd"}
    assert any("1 stay in float" in note for note in engine.choices["notes"])
    graph = Graph.load(engine.qdq_path)
    x = np.random.default_rng(1).normal(size=(6, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        wanted = Twin(graph, dtype=torch.float64).run({"x": torch.tensor(x, dtype=torch.float64)})["y"].numpy()
    np.testing.assert_allclose(runner(engine.path, VNNI).run({"x": x})["y"], wanted, atol=1e-5 * np.abs(wanted).max())

    # the numbers of the graph are the float weights, each at most half a step of its block away
    for name, key, axis in (("matmul", "one", 0), ("gemm", "two", 1)):
        maker = graph.producer(graph.node(name).input[1])
        codes, scale = (graph.constant(value) for value in maker.input[:2])
        block = next(a.i for a in maker.attribute if a.name == "block_size")
        assert block == 32
        assert codes.dtype.name == f"int{bits}"
        spread = np.repeat(scale.astype(np.float64), block, axis=axis)
        off = np.abs(codes.astype(np.float64) * spread - arrays[key].astype(np.float32))
        assert (off <= 0.5 * spread * (1 + 1e-5)).mean() > 0.99
        assert (off <= spread).all()


def test_files_are_small_and_the_kernel_computes_in_float32(tmp_path):
    model, _ = network(tmp_path)
    engine = build(model, {}, VNNI, tmp_path / "e", options=BuildOptions(bits="w4a32"))
    made = onnx.load(engine.path)
    kernels = [node for node in made.graph.node if node.op_type == "MatMulNBits"]
    assert len(kernels) == 2
    for node in kernels:
        values = {a.name: a.i for a in node.attribute}
        assert values["accuracy_level"] == 1
        assert values["bits"] == 4
    packed = sum(np.prod(t.dims) for t in made.graph.initializer if t.name.endswith("_packed"))
    assert packed == (64 * 96 + 24 * 96) / 2
    x = np.zeros((1, 3, 16, 16), np.float32)
    ran = [one for one in runner(engine.path, VNNI).kernels({"x": x}) if one.op == "MatMulNBits"]
    assert len(ran) == 2
    assert not any(one.integer for one in ran)


def test_there_are_no_integers_to_compare(tmp_path):
    model, _ = network(tmp_path)
    engine = build(model, {}, VNNI, tmp_path / "e", options=BuildOptions(bits="w4a32"))
    with pytest.raises(UnsupportedOpError, match="arithmetic is float32"):
        integer_reference(engine)


def test_one_way_to_build_and_what_is_refused(tmp_path):
    model, _ = network(tmp_path)
    (only,) = candidates(model.folded().graph, VNNI, BuildOptions(bits="w4a32"))
    assert only.label == "weights only"
    with pytest.raises(UsageError, match="rounded to nearest"):
        options_from(BuildSettings(bits="w4a32", rounding="squant"), VNNI)
    plain, _ = network(tmp_path, products=False)
    with pytest.raises(EngineError, match="patches: ONNX Runtime has no convolution"):
        build(plain, {}, VNNI, tmp_path / "b", options=BuildOptions(bits="w4a32"))
    with pytest.raises(EngineError, match="excluded by the options"):
        build(model, {}, VNNI, tmp_path / "c", options=BuildOptions(bits="w4a32", exclude=("matmul", "gemm")))
