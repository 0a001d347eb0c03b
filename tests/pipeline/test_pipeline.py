"""The job as a library: the same words as on the command line, values in and values out."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.backends import get_target
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.errors import StaleArtifactError, UsageError
from zsq_deploy.pipeline import Images, deploy, make_images, measure_ranges, verification
from zsq_deploy.pipeline.calibration import images_in
from zsq_deploy.pipeline.checks import check_recipe, nearest
from zsq_deploy.pipeline.deploy import load_recipe_model, owned, pinned
from zsq_deploy.pipeline.stages import open_engine, quantize_only, verify_folder
from zsq_deploy.pipeline.verification import Evidence, output_steps
from zsq_deploy.recipe import Recipe


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    few = partial(verification.compare_latency, starts=1, round_seconds=0.01, round_runs=2, warmup=1)
    monkeypatch.setattr(verification, "compare_latency", lambda specs, **more: few(specs, **{**more, "rounds": 2}))


def network(path, *, batch="n"):
    """One convolution with batch norm and a classifier; output 'logits' [n, 4]."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(8, 3, 3, 3)), "gamma": np.ones(8), "beta": np.full(8, 0.2), "mean": np.zeros(8),
        "var": np.full(8, 9.0), "fc": rng.normal(size=(8, 4)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["b"], name="norm"),
        helper.make_node("Relu", ["b"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
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


@pytest.fixture
def recipe(tmp_path):
    return Recipe.of(
        {
            "model": {"source": str(network(tmp_path / "net.onnx"))},
            "calibration": {"method": "gaussian", "images": 8, "holdout": 4},
            "quantization": {"search": False},
        }
    ).resolved()


def test_deploy_gives_the_report_that_it_writes(recipe, tmp_path):
    outcome = deploy(recipe, tmp_path / "out", command="python")
    assert outcome.passed
    assert outcome.exit_code == 0
    assert outcome.report.targets["ort-x86-vnni"].parity.integer.equal_share == 1.0
    assert outcome.report.calibration.images == 8
    assert outcome.report.evaluation.images == 4
    again = verify_folder(tmp_path / "out", changes={"verification.gates.min_speedup": 1e9})
    assert not again.passed
    assert again.exit_code == 1


def test_a_network_of_one_batch_size(recipe, tmp_path):
    fixed = recipe.replace({"model.source": str(network(tmp_path / "fixed.onnx", batch=1))})
    report = deploy(fixed, tmp_path / "out").report
    assert report.targets["ort-x86-vnni"].parity.integer.equal_share == 1.0


def test_the_search_is_pinned_by_its_label(recipe, tmp_path):
    searched = recipe.replace({"quantization.search": True})
    built = quantize_only(searched, tmp_path / "a")
    resolved = Recipe.load(tmp_path / "a" / "recipe.resolved.yaml")
    assert resolved.quantization.choice == {"ort-x86-vnni": built["ort-x86-vnni"].choices["label"]}
    again = quantize_only(resolved, tmp_path / "b")
    assert again["ort-x86-vnni"].path.read_bytes() == built["ort-x86-vnni"].path.read_bytes()
    wrong = searched.replace({"quantization.choice": {"ort-x86-vnni": "sideways"}})
    with pytest.raises(UsageError, match="no way 'sideways'"):
        quantize_only(wrong, tmp_path / "c")
    assert pinned(recipe, "ort-x86-vnni", built["ort-x86-vnni"]) == recipe  # nothing was searched


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration.method": "zeroQ"}, "zeroq"),
        ({"calibration.holdout": 0}, "held out"),
        ({"quantization.ranges": "percentil"}, "percentile"),
        ({"quantization.exclude": ["heat"]}, "'head'"),
        ({"quantization.choice": {"ort-arm64": "wide"}}, "ort-arm64"),
        ({"quantization.bits": "w4a16"}, "w8a8"),
        ({"quantization.protocol": "end-8bit"}, "ends-8bit"),
        ({"quantization.reconstruct_preset": "fats"}, "fast"),
        ({"quantization.rounding": "learned", "calibration.method": "bn-analytic"}, "makes none"),
        ({"quantization.size_budget": 0.6}, "8 bits"),
        (
            {"quantization.size_budget": 0.6, "quantization.bits": "w4a8", "calibration.method": "bn-analytic"},
            "makes none",
        ),
        ({"calibration.parameters": {"steps": 3}}, "no parameter"),
        ({"calibration.device": "cuda:99"}, "cuda:99"),
        ({"model.mean": [0.5, 0.5], "model.std": [1, 1]}, "3"),
    ],
)
def test_mistakes_are_found_before_work_begins(recipe, changes, words):
    changed = recipe.replace(changes)
    with pytest.raises(UsageError) as caught:
        check_recipe(changed, load_recipe_model(changed), [get_target(name) for name in changed.targets])
    assert words in str(caught.value)


def test_good_recipes_pass(recipe):
    model = load_recipe_model(recipe)
    for changes in ({}, {"quantization.exclude": ["head"]}, {"calibration.method": "bn-analytic"}):
        changed = recipe.replace(changes)
        check_recipe(changed, model, [get_target("ort-arm64")])


def test_near_misses():
    assert nearest("zerq", ("zeroq", "genie")) == "did you mean 'zeroq'? "
    assert nearest("something else", ("zeroq", "genie")) == ""


def test_a_shape_by_name_of_the_input(recipe):
    named = recipe.replace({"model.input_shape": {"x": "1x3x8x8"}})
    assert load_recipe_model(named).inputs[0].shape[1:] == (3, 8, 8)


def test_images_are_reused_only_if_they_are_whole_and_fit(recipe, tmp_path, monkeypatch):
    model = load_recipe_model(recipe)
    spec = recipe.calibration
    first = images_in(tmp_path, model, spec)
    assert (len(first.calibration), len(first.holdout)) == (8, 4)
    calls = []
    import zsq_deploy.pipeline.calibration as module

    real = module.synthesize
    monkeypatch.setattr(module, "synthesize", lambda *a, **k: calls.append(1) or real(*a, **k))
    second = images_in(tmp_path, model, spec, resume=True)
    assert calls == []
    assert second.calibration.digest == first.calibration.digest
    assert second.holdout.digest == first.holdout.digest
    shard = next((tmp_path / "holdout").glob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:-10])
    third = images_in(tmp_path, model, spec, resume=True)
    assert calls == [1]
    assert third.holdout.digest == first.holdout.digest
    images_in(tmp_path, model, spec.model_copy(update={"images": 6}), resume=True)
    assert calls == [1, 1]


def test_a_set_that_is_given_is_split_and_its_end_held_out(recipe):
    model = load_recipe_model(recipe)
    whole = make_images(model, method="gaussian", images=8, holdout=0 + 4, seed=0)
    assert whole.holdout.digest != whole.calibration.digest
    split = make_images(model, method="zeroq", images=99, holdout=2, seed=0, given=whole.calibration)
    assert (len(split.calibration), len(split.holdout)) == (6, 2)
    assert split.method == "gaussian"
    together = np.concatenate([split.calibration.arrays()["x"], split.holdout.arrays()["x"]])
    np.testing.assert_array_equal(together, whole.calibration.arrays()["x"])
    with pytest.raises(UsageError, match="one input only"):
        make_images(model, method="zeroq", images=9, holdout=2, seed=0, given=whole.calibration.take(0, 1))


def test_ranges_and_their_words(recipe):
    model = load_recipe_model(recipe)
    images = make_images(model, method="gaussian", images=8, holdout=2, seed=0)
    plain = measure_ranges(model, images, "minmax")
    x = images.calibration.arrays()["x"]
    assert plain.observed["x"] == pytest.approx((float(x.min()), float(x.max())))
    assert measure_ranges(model, images, "ort-minmax").ranges == "ort-minmax"
    auto = measure_ranges(model, images, "auto")
    assert all(
        auto.ranges[name][0] <= low and auto.ranges[name][1] >= high for name, (low, high) in plain.ranges.items()
    )
    without = measure_ranges(model, Images(None, images.holdout, "bn-analytic", 0.0), "auto")
    assert without.statistics is None
    with pytest.raises(UsageError, match="no range method"):
        measure_ranges(model, images, "maxmin")


def test_the_step_of_a_float_output_is_its_range(recipe, tmp_path):
    from zsq_deploy.model import Graph

    engine = quantize_only(recipe, tmp_path / "out")["ort-x86-vnni"]
    steps = output_steps(load_recipe_model(recipe), Graph.load(engine.qdq_path), {"logits": (-1.0, 4.1)})
    assert steps["logits"] == pytest.approx(5.1 / 255)
    opened = open_engine(tmp_path / "out", "ort-x86-vnni")
    assert (opened.path, opened.qdq_path, opened.float_path) == (engine.path, engine.qdq_path, engine.float_path)
    engine.qdq_path.write_bytes(engine.qdq_path.read_bytes() + b"\0")
    with pytest.raises(StaleArtifactError, match="changed"):
        open_engine(tmp_path / "out", "ort-x86-vnni")


def test_evidence_names_an_estimate(recipe):
    model = load_recipe_model(recipe)
    holdout: CalibrationSet = make_images(model, method="gaussian", images=4, holdout=3, seed=0).holdout
    section = Evidence(None, holdout).section()
    assert section["estimate"] is True
    assert section["images"] == 3
    assert "estimate" in section["note"]


def test_everything_that_a_run_writes_is_owned(recipe, tmp_path):
    deploy(recipe, tmp_path / "out")
    written = {entry.name for entry in (tmp_path / "out").iterdir()} - {".zsq-run.json"}
    assert written <= set(owned(recipe))
