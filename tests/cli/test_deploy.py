"""`zsq deploy` from end to end: what lies in the output folder, what the report says, and that it can be repeated."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import small
import yaml

from zsq_deploy.calib import CalibrationSet

TARGETS = ("ort-x86-vnni", "ort-arm64")


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_everything_is_in_the_folder(place):
    found = {str(file.relative_to(place.out)) for file in place.out.rglob("*") if file.is_file()}
    wanted = {
        "report.json",
        "report.html",
        "recipe.resolved.yaml",
        "calibration/manifest.json",
        "holdout/manifest.json",
    }
    for target in TARGETS:
        wanted |= {f"{target}/engine.onnx", f"{target}/manifest.json", f"{target}/float.onnx"}
    assert wanted <= found
    assert not [
        name for name in found if "trial" in name or "candidates" in name or ".synthesis" in name or "narrow" in name
    ]
    assert not [name for name in found if name.split("/")[-1].startswith(".") and name != ".zsq-run.json"]
    assert len(CalibrationSet.open(place.out / "calibration")) == 16


def test_the_report_has_the_stable_keys(place):
    report = small.read(place.out / "report.json")
    assert report["schema_version"] == 1
    calibration = report["calibration"]
    assert calibration["method"] == "zeroq"
    assert calibration["images"] == 16
    assert calibration["seconds"] > 0
    assert calibration["peak_rss_bytes"] > 10_000_000
    assert set(report["targets"]) == set(TARGETS)
    for name, target in report["targets"].items():
        engine = place.out / target["engine"]["path"]
        assert engine == place.out / name / "engine.onnx"
        assert target["engine"]["bytes"] == engine.stat().st_size
        (tried,) = (row for row in target["engine"]["candidates"] if row["chosen"])  # one row is the engine
        assert tried["bytes"] == target["engine"]["bytes"]
        assert target["integer"]["macs_share"] == 1.0
        parity = target["parity"]
        assert {"top1_agreement", "within_2_lsb", "max_lsb", "mean_lsb", "sqnr_db"} <= set(parity)
        assert parity["top1_agreement"] >= 0.95
        assert parity["within_2_lsb"] >= 0.99
        assert parity["integer"]["equal_share"] == 1.0
        assert parity["integer"]["max_lsb"] == 0
        assert target["accuracy"]["float"] == 1.0
        assert target["accuracy"]["images"] == 40
        assert 0.8 <= target["accuracy"]["reference"] <= 1
        assert 0.8 <= target["accuracy"]["engine"] <= 1
        for form in ("engine", "float32", "float_best"):
            times = target["latency"][form]
            assert 0 < times["median_ms"] <= times["p90_ms"] <= times["p95_ms"] <= times["p99_ms"]
            assert 0 <= times["iqr_ms"] <= times["p95_ms"]
            assert times["first_ms"] > 0
            assert times["load_ms"] > 0
        assert target["latency"]["speedup"] == pytest.approx(
            target["latency"]["float32"]["median_ms"] / target["latency"]["engine"]["median_ms"], rel=1e-6
        )


def test_the_reported_accuracy_is_that_of_the_engine_in_plain_onnxruntime(place):
    with np.load(place.data) as data:
        x, y = data["x"], data["y"]
    session = onnxruntime.InferenceSession(str(place.out / "ort-x86-vnni" / "engine.onnx"))
    logits = session.run(None, {"input": np.moveaxis(x, -1, 1).astype(np.float32) / 255})[0]
    report = small.read(place.out / "report.json")
    assert report["targets"]["ort-x86-vnni"]["accuracy"]["engine"] == pytest.approx(np.mean(logits.argmax(1) == y))


def test_the_report_says_how_good_the_set_is(place):
    report = small.read(place.out / "report.json")
    quality = report["calibration"]["quality"]
    assert (quality["images"], quality["held_out"], quality["pictures"]) == (16, 64, 32)
    assert quality["real"]["images"] == 40  # compared with, after everything was decided
    seen = {row["name"]: row for row in report["calibration"]["ranges"]}
    for row in quality["tensors"]:
        assert row["name"] in seen
    assert 0 < quality["coverage"]["summary"] <= 1
    assert "How good the set is" in (place.out / "report.html").read_text()


def test_the_page_stands_alone(place):
    page = (place.out / "report.html").read_text(encoding="utf-8")
    assert "ort-x86-vnni" in page
    assert "<script src=" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'href="http' not in page


def test_the_engines_differ_as_their_targets_do(place):
    kinds = {}
    for target in TARGETS:
        graph = onnx.load(place.out / target / "engine.onnx").graph
        kinds[target] = {item.name: item.data_type for item in graph.initializer}["input_zero_point"]
    assert kinds == {"ort-x86-vnni": onnx.TensorProto.UINT8, "ort-arm64": onnx.TensorProto.INT8}


def test_the_resolved_recipe_gives_the_same_images_and_engines(place, tmp_path, zsq):
    recipe = place.out / "recipe.resolved.yaml"
    words = yaml.safe_load(recipe.read_text())
    assert set(words["quantization"]["choice"]) == set(TARGETS)
    said = zsq("run", recipe, "-o", tmp_path / "again", "-q")
    assert said.code == 0, said.err
    for target in TARGETS:
        assert sha(tmp_path / "again" / target / "engine.onnx") == sha(place.out / target / "engine.onnx")
    for part in ("calibration", "holdout"):
        assert CalibrationSet.open(tmp_path / "again" / part).digest == CalibrationSet.open(place.out / part).digest
    # What is resolved stays as it is when it is resolved again.
    assert yaml.safe_load((tmp_path / "again" / "recipe.resolved.yaml").read_text()) == words


def test_same_seed_same_engine_and_another_seed_another(place, tmp_path, zsq):
    digests = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        said = zsq(
            "quantize", place.network, "-o", tmp_path / name, "--method", "gaussian", "--images", 16, "--seed", seed,
            "--no-search", "-q",
        )  # fmt: skip
        assert said.code == 0, said.err
        digests[name] = sha(tmp_path / name / "ort-x86-vnni" / "engine.onnx")
    assert digests["a"] == digests["b"] != digests["c"]


def test_a_missed_gate_is_exit_code_1_and_everything_is_written(place, tmp_path, zsq):
    said = zsq(
        "deploy", place.network, "-o", tmp_path / "out", "--images", 8, "--method", "gaussian", "--max-latency-ms", 1e-6,
        "--min-agreement", 0.5, "--no-search", "--json",
    )  # fmt: skip
    assert said.code == 1
    gates = {gate["name"]: gate["passed"] for gate in said.json["gates"]}
    assert gates == {"max_latency_ms": False, "min_agreement": True}
    assert (tmp_path / "out" / "report.html").is_file()
    assert said.json == small.read(tmp_path / "out" / "report.json")


def test_without_labelled_data_the_quality_is_called_an_estimate(place, tmp_path, zsq):
    said = zsq(
        "deploy", place.network, "-o", tmp_path / "out", "--images", 8, "--method", "gaussian", "--no-search", "-q"
    )
    assert said.code == 0
    assert "estimate" in said.out
    report = small.read(tmp_path / "out" / "report.json")
    assert report["evaluation"]["kind"] == "synthetic"
    assert report["evaluation"]["estimate"] is True
    assert "estimate" in (tmp_path / "out" / "report.html").read_text().lower()


def test_a_gray_network_from_torch_code_with_weights(tmp_path, zsq):
    import torch

    (tmp_path / "graynet.py").write_text(small.TORCH_CODE)
    torch.save(small.network(1).state_dict(), tmp_path / "w.pt")
    data = small.write_eval(tmp_path / "gray.npz", channels=1)
    said = zsq(
        "deploy", "graynet:gray", "--path", tmp_path, "--weights", tmp_path / "w.pt", "--input-shape", "1x1x8x8",
        "--images", 8, "--method", "fractal", "--eval-data", data, "-o", tmp_path / "out", "--no-search", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    target = said.json["targets"]["ort-x86-vnni"]
    assert target["accuracy"]["float"] == 1.0
    assert target["parity"]["integer"]["equal_share"] == 1.0


def test_mean_and_std_reach_the_network(place, tmp_path, zsq):
    """Images normalized by the command line: labels of the float network on normalized pixels must come out."""
    import torch

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    with np.load(place.data) as data:
        x = data["x"]
    normal = (np.moveaxis(x, -1, 1) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    with torch.no_grad():
        labels = small.network()(torch.from_numpy(normal).float()).argmax(1).numpy()
    np.savez(tmp_path / "data.npz", x=x, y=labels)
    said = zsq(
        "deploy", place.network, "-o", tmp_path / "out", "--images", 8, "--method", "gaussian", "--no-search", "--json",
        "--mean", ",".join(map(str, mean)), "--std", ",".join(map(str, std)), "--eval-data", tmp_path / "data.npz",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.json["targets"]["ort-x86-vnni"]["accuracy"]["float"] == 1.0


def test_ranges_without_any_image(place, tmp_path, zsq):
    said = zsq("deploy", place.network, "-o", tmp_path / "out", "--method", "bn-analytic", "--no-search", "--json")
    assert said.code == 0, said.err
    assert said.json["calibration"]["method"] == "bn-analytic"
    assert said.json["calibration"]["images"] == 0
    assert not (tmp_path / "out" / "calibration").exists()


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse", "bn-analytic", "ort-minmax", "ort-entropy"])
def test_every_range_method_from_one_finished_set(place, tmp_path, zsq, method):
    said = zsq(
        "quantize", place.network, "-o", tmp_path / "out", "--calibration", place.out / "calibration", "--ranges", method,
        "--no-search", "--no-bias-correction", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert set(said.json) == {"ort-x86-vnni"}
    assert (tmp_path / "out" / "ort-x86-vnni" / "engine.onnx").stat().st_size == said.json["ort-x86-vnni"]["bytes"]


def test_the_real_program(tmp_path):
    """As installed: progress on standard error, JSON alone on standard output, the exit code."""
    network = small.write_onnx(tmp_path / "net.onnx")
    done = small.zsq(
        "deploy", network, "-o", tmp_path / "out", "--images", 4, "--method", "gaussian", "--no-search", "--json"
    )
    assert done.returncode == 0, done.stderr
    import json

    assert json.loads(done.stdout)["targets"]["ort-x86-vnni"]["parity"]["integer"]["equal_share"] == 1.0
    assert "Warning" not in done.stderr
    shutil.rmtree(tmp_path / "out")
    done = small.zsq("deploy", network, "-o", tmp_path / "out", "--images", 4, "--method", "gaussian", "--no-search")
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout
    assert 3 <= len(done.stderr.splitlines()) <= 20, done.stderr  # plain lines, and not many
    assert "\x1b" not in done.stderr
