"""Equalized weights and SQuant through the whole job: recipe words, engines, and the set of the plain network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.calib import CalibrationSet
from zsq_deploy.errors import UsageError
from zsq_deploy.model import Graph
from zsq_deploy.pipeline import make_images
from zsq_deploy.pipeline.deploy import load_recipe_model
from zsq_deploy.pipeline.stages import quantize_only
from zsq_deploy.quant.algebra import float_weights_of
from zsq_deploy.quant.reader import dequantized_weight, read_qdq
from zsq_deploy.recipe import Recipe


def network(path):
    """Three convolutions with batch norm, one of them depthwise, and a classifier."""
    rng = np.random.default_rng(0)
    nodes, arrays, x = [], {}, "x"
    for i, (inputs, outputs, k, group) in enumerate(((3, 8, 3, 1), (8, 8, 3, 8), (8, 12, 1, 1))):
        arrays[f"w{i}"] = rng.normal(size=(outputs, inputs // group, k, k)) / 3
        for name, low, high in (("g", 0.2, 2), ("b", -0.5, 0.5), ("m", -0.1, 0.1), ("v", 0.5, 2)):
            arrays[f"{name}{i}"] = rng.uniform(low, high, outputs)
        nodes += [
            helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[k // 2] * 4, group=group),
            helper.make_node("BatchNormalization", [f"c{i}", *(f"{n}{i}" for n in "gbmv")], [f"n{i}"], name=f"norm{i}"),
            helper.make_node("Relu", [f"n{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
        x = f"r{i}"
    arrays["fc"] = rng.normal(size=(12, 4))
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "fc"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", 4))],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def recipe_of(source, target="ort-x86-vnni", **quantization):
    values = {
        "model": {"source": str(source)},
        "calibration": {"method": "gaussian", "images": 8, "holdout": 4},
        "quantization": {"search": False, **quantization},
        "targets": [target],
    }
    return Recipe.of(values).resolved()


def test_equalized_networks_compute_the_same_and_fit_the_sets_of_the_plain_one(tmp_path):
    import onnxruntime as ort

    source = network(tmp_path / "net.onnx")
    plain, equalized = (load_recipe_model(recipe_of(source, equalize=on)) for on in (False, True))
    assert equalized.digest != plain.digest == equalized.origin
    assert any("equalized" in note for note in equalized.notes)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = np.random.default_rng(1).normal(size=(3, 3, 8, 8)).astype(np.float32)
    outputs = [
        ort.InferenceSession(model.graph.proto.SerializeToString(), options).run(None, {"x": x})[0]
        for model in (plain, equalized)
    ]
    np.testing.assert_array_equal(*outputs)
    made = make_images(plain, method="gaussian", images=6, holdout=1, seed=0).calibration
    made.save(tmp_path / "set")
    assert CalibrationSet.open(tmp_path / "set").manifest.model_digest == plain.digest
    recipe = recipe_of(source, equalize=True).replace({"calibration.set": str(tmp_path / "set")})
    quantize_only(recipe, tmp_path / "second")
    folded = equalized.folded().graph
    got = Graph.load(tmp_path / "second" / "ort-x86-vnni" / "engine.onnx")
    for name, weight in float_weights_of(folded).items():
        if name in got:
            found = dequantized_weight(got, got.node(name).input[1])
            np.testing.assert_allclose(found, weight, atol=np.abs(weight).max() / 100)


@pytest.mark.parametrize(
    ("target", "file", "bits"),
    [
        ("ort-x86-vnni", "engine.onnx", "w8a8"),
        ("openvino-cpu", "qdq.onnx", "w8a8"),
        ("openvino-cpu", "qdq.onnx", "w4a8"),
        ("tensorrt-10", None, "w8a8"),
    ],
)
def test_engines_with_squant_keep_channel_sums(tmp_path, target, file, bits):
    if target.startswith("openvino"):
        pytest.importorskip("openvino")
    source = network(tmp_path / "net.onnx")
    recipe = recipe_of(source, target, rounding="squant", bits=bits)
    (engine,) = quantize_only(recipe, tmp_path / "out").values()
    assert engine.choices["rounding"] == "squant"
    qdq = Graph.load(engine.qdq_path if file is None else tmp_path / "out" / target / file)
    floats = float_weights_of(load_recipe_model(recipe).folded().graph)
    scales = {tensor.output: tensor for tensor in read_qdq(qdq) if tensor.is_weight}
    seen = 0
    for name in ("conv0", "conv1", "conv2"):
        node = qdq.node(name)
        tensor, weight = scales[node.input[1]], floats[name].astype(np.float64)
        found = dequantized_weight(qdq, node.input[1]).astype(np.float64)
        steps = ((found - weight) / tensor.scale.reshape(-1, 1, 1, 1)).reshape(len(weight), -1)
        clipped = (np.abs(steps) > 1).any(axis=1)  # scales of least squared error cut the largest weights
        assert np.abs(steps.sum(axis=1))[~clipped].max() <= 0.5 + 1e-3
        seen += int((~clipped).sum())
    assert seen > 10


def test_vendors_round_themselves(tmp_path):
    source = network(tmp_path / "net.onnx")
    recipe = recipe_of(source, "openvino-cpu", rounding="squant", quantizer="nncf")
    with pytest.raises(UsageError, match="round weights themselves"):
        quantize_only(recipe, tmp_path / "out")
