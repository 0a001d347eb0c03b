"""OpenVINO engines through the whole job as a library: every quantizer, on small and on real networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.backends import get_target
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.errors import UsageError
from zsq_deploy.evaldata import load_eval_data
from zsq_deploy.model import Preprocess, load_model
from zsq_deploy.pipeline import EngineSettings, Evidence, build_engine, make_images, measure_ranges, verify_engine
from zsq_deploy.pipeline.control import judged_images, validation_data
from zsq_deploy.pipeline.stages import open_engine, quantize_only
from zsq_deploy.recipe import Recipe


def network(path, *, batch="n"):
    """Two convolutions, one of them depthwise, a residual and a classifier; output 'logits' [n, 4]."""
    rng = np.random.default_rng(0)
    arrays = {
        "w0": rng.normal(size=(8, 3, 3, 3)) / 5, "w1": rng.normal(size=(8, 1, 3, 3)), "b0": rng.normal(size=8),
        "fc": rng.normal(size=(8, 4)) * 4,
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"], name="relu"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], name="depthwise", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Add", ["c1", "r0"], ["s"], name="sum"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "fc"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, 3, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (batch, 4))],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def recipe_of(source, **more):
    values = {
        "model": {"source": str(source)},
        "calibration": {"method": "gaussian", "images": 8, "holdout": 6},
        "targets": ["openvino-cpu"],
        **more,
    }
    return Recipe.of(values).resolved()


# ---------------------------------------------------------------------------------------------------------------------
# what accuracy control looks at
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path):
    model = load_model(network(tmp_path / "net.onnx"))
    images = make_images(model, method="gaussian", images=4, holdout=6, seed=0)
    return model, images.holdout


CONTROL = {"quantizer": "nncf", "nncf": {"accuracy_control": True}}


def test_nobody_looks_unless_asked(held, tmp_path):
    model, holdout = held
    recipe = recipe_of(tmp_path / "net.onnx")
    assert validation_data(recipe, model, holdout, classes=4) is None
    assert judged_images(recipe, holdout).digest == holdout.digest


def test_held_out_images_decide_or_judge_but_not_both(held, tmp_path):
    model, holdout = held
    recipe = recipe_of(tmp_path / "net.onnx", quantization=CONTROL)
    found = validation_data(recipe, model, holdout, classes=4)
    assert found.labels is None
    assert "3 held-out synthetic images (gaussian)" in found.source
    decide = np.concatenate([batch["x"] for batch in found.batches])
    judge = np.concatenate([batch["x"] for batch in judged_images(recipe, holdout).batches(6)])
    whole = np.concatenate([batch["x"] for batch in holdout.batches(6)])
    np.testing.assert_array_equal(np.concatenate([decide, judge]), whole)
    with pytest.raises(UsageError, match="nothing was calibrated on"):
        validation_data(recipe, model, holdout.take(0, 1), classes=4)


def test_all_of_them_decide_where_labelled_images_judge(held, tmp_path):
    model, holdout = held
    recipe = recipe_of(tmp_path / "net.onnx", quantization=CONTROL, verification={"eval_data": "test.npz"})
    found = validation_data(recipe, model, holdout, classes=4)
    assert found.labels is None  # the data for evaluation are never taken
    assert sum(len(batch["x"]) for batch in found.batches) == 6


def test_labelled_images_decide_where_they_are_named(held, tmp_path):
    model, holdout = held
    x = np.random.default_rng(1).integers(0, 256, (21, 8, 8, 3), dtype=np.uint8)
    y = np.arange(21) % 4
    np.savez(tmp_path / "val.npz", x=x, y=y)
    quantization = {**CONTROL, "validation_data": str(tmp_path / "val.npz")}
    recipe = recipe_of(tmp_path / "net.onnx", quantization=quantization)
    found = validation_data(recipe, model, holdout, classes=4)
    assert len(found.batches) == len(found.labels) == 2
    for _ in range(2):  # a quantizer goes through them many times
        got = np.concatenate([found.batches[place]["x"] for place in range(len(found.batches))])
        np.testing.assert_allclose(got, np.moveaxis(x, -1, 1) / 255, rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate(list(found.labels)), y)
    assert [len(batch["x"]) for batch in found.batches] == [16, 5]
    with pytest.raises(IndexError):
        found.batches[2]
    same = recipe.replace({"verification.eval_data": str(tmp_path / "val.npz")})
    assert "not independent" in validation_data(same, model, holdout, classes=4).source
    assert judged_images(recipe, holdout).digest == holdout.digest


# ---------------------------------------------------------------------------------------------------------------------
# engines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")


def section_of(model, images, measured, folder, data=None, **settings):
    target = get_target("openvino-cpu")
    built = build_engine(model, images, measured, target, folder / target.name, EngineSettings(**settings))
    judged = Evidence(data, images.holdout)
    return built, verify_engine(model, built.engine, judged, measured.observed, folder, latency=False)


@pytest.mark.parametrize("batch", ["n", 1])
@pytest.mark.parametrize("quantizer", ["qdq", "nncf"])
def test_the_engine_computes_what_its_graph_says(runtime, tmp_path, quantizer, batch):
    model = load_model(network(tmp_path / "net.onnx", batch=batch))
    images = make_images(model, method="gaussian", images=8, holdout=6, seed=0)
    measured = measure_ranges(model, images, "auto")
    built, section = section_of(model, images, measured, tmp_path, quantizer=quantizer, search=False)
    assert section["integer"]["macs_share"] == 1.0
    for reference in (section["parity"], section["parity"]["unfused"]):
        assert reference["within_2_lsb"] == 1.0
        assert reference["top1_agreement"] == 1.0
    assert section["parity"]["integer"]["equal_share"] == 1.0
    assert section["parity"]["float"]["sqnr_db"] > 20
    assert built.engine.bytes == section["engine"]["bytes"]
    names = {file.name for file in (tmp_path / "openvino-cpu").iterdir()}
    vendor = {"vendor.xml", "vendor.bin"} if quantizer == "nncf" else set()
    assert names == {"engine.xml", "engine.bin", "qdq.onnx", "float.onnx", "manifest.json"} | vendor


def test_free_scales_ship_what_nncf_wrote(runtime, tmp_path):
    model = load_model(network(tmp_path / "net.onnx"))
    images = make_images(model, method="gaussian", images=8, holdout=6, seed=0)
    measured = measure_ranges(model, images, "auto")
    built, section = section_of(model, images, measured, tmp_path, quantizer="nncf", search=False, exact_scales=False)
    assert built.engine.choices["engine_from"] == "the vendor's IR as it is"
    assert built.engine.choices["corrects_biases"]
    assert not [row for row in built.candidates if "corrected" in row["name"]]
    assert section["parity"]["float"]["sqnr_db"] > 15


def test_engines_are_opened_with_all_their_files(runtime, tmp_path):
    recipe = recipe_of(network(tmp_path / "net.onnx"), quantization={"quantizer": "nncf", "search": False})
    built = quantize_only(recipe, tmp_path / "out")["openvino-cpu"]
    opened = open_engine(tmp_path / "out", "openvino-cpu")
    for name in ("path", "qdq_path", "float_path", "weights_path", "vendor_path"):
        assert getattr(opened, name) == tmp_path / "out" / "openvino-cpu" / getattr(built, name).name
        assert getattr(opened, name).is_file()
    assert opened.bytes == opened.path.stat().st_size + opened.weights_path.stat().st_size


def test_one_recipe_for_both_runtimes(runtime, tmp_path):
    recipe = recipe_of(network(tmp_path / "net.onnx")).replace({"targets": ["ort-x86-vnni", "openvino-cpu"]})
    recipe = recipe.replace({"quantization.nncf.preset": "performance", "quantization.bias_correction": False})
    built = quantize_only(recipe, tmp_path / "out")
    assert {engine.path.name for engine in built.values()} == {"engine.onnx", "engine.xml"}


IMAGENET = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
REAL = {
    "resnet20_cifar10": (IMAGENET, "cifar10_test.npz", 200, 0.97),
    "mlperf_tiny_resnet8_cifar10": (Preprocess(raw_pixels=True), "cifar10_test.npz", 200, 0.94),
}


def real(assets: Path, tmp_path: Path, name: str, **settings):
    preprocess, data_name, count, least = REAL[name]
    model = load_model(assets / "models" / f"{name}.onnx", preprocess=preprocess)
    images = make_images(model, method="fractal", images=24, holdout=16, seed=3)
    measured = measure_ranges(model, images, "auto")
    data = load_eval_data(assets / "data" / data_name, model.inputs[0], limit=count)
    built, section = section_of(model, images, measured, tmp_path, data, **settings)
    assert section["integer"]["macs_share"] == 1.0
    assert section["parity"]["top1_agreement"] >= 0.995
    assert section["parity"]["within_2_lsb"] >= 0.995
    assert section["accuracy"]["agreement_with_float"]["engine"] >= least
    assert isinstance(images.holdout, CalibrationSet)
    return built, section


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("quantizer", ["qdq", "nncf"])
@pytest.mark.parametrize("name", REAL)
def test_real_networks(runtime, assets, tmp_path, name, quantizer):
    real(assets, tmp_path, name, quantizer=quantizer, search=False)


@pytest.mark.pot
@pytest.mark.assets
def test_pot_on_a_real_network(runtime, assets, pot_environment, tmp_path):
    built, section = real(assets, tmp_path, "mlperf_tiny_resnet8_cifar10", quantizer="pot", search=False)
    assert section["engine"]["quantizer"] == "pot"
    assert built.engine.vendor_path.is_file()
