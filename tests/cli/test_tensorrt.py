"""TensorRT on the command line: a folder for the device, and calibration caches looked at and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small

from zsq_deploy.backends.tensorrt.cache import CalibrationCache
from zsq_deploy.backends.tensorrt.ort_table import write_table
from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.quant import Ranges

RANGES = {"image": (-1.0, 0.5), "conv0": (0.0, 6.0)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same ranges as a cache (called anything), a table and our JSON, and a cache with another scale."""
    found = {
        kind: tmp_path / name
        for kind, name in {"cache": "some.calib", "ranges": "ranges.json", "other": "b.cache"}.items()
    }
    found["cache"].write_bytes(CalibrationCache.from_ranges(RANGES, version="8.6.2").to_bytes())
    found["other"].write_bytes(
        CalibrationCache.from_ranges({**RANGES, "conv0": (0, 3), "x": (0, 1)}, version="10.3.0").to_bytes()
    )
    Ranges(RANGES, "minmax").save(found["ranges"])
    write_table(tmp_path / "table", RANGES)
    found["table"] = tmp_path / "table" / "calibration.flatbuffers"
    return found


def test_inspect_shows_scales_whoever_wrote_them(zsq, files):
    kinds = {
        "cache": "TensorRT calibration cache",
        "table": "ONNX Runtime calibration table",
        "ranges": "ranges (minmax)",
    }
    for kind, title in kinds.items():
        said = zsq("inspect", files[kind], "--json")
        assert said.code == 0, said.err
        assert said.json["kind"] == title
        by_name = {tensor["name"]: tensor for tensor in said.json["tensors"]}
        assert set(by_name) == set(RANGES)
        assert by_name["conv0"]["high"] == pytest.approx(6.0)
        people = zsq("inspect", files[kind])
        assert people.code == 0
        assert title in people.out
        assert "conv0" in people.out
    assert zsq("inspect", files["cache"], "--json").json["tensorrt"] == "8.6.2"


def test_inspect_compares_two_of_them(zsq, files):
    same = zsq("inspect", files["cache"], "--against", files["table"], "--json")
    assert same.json["equal"] is True
    said = zsq("inspect", files["table"], "--against", files["other"], "--json")
    assert (said.code, said.json["kind"], said.json["equal"]) == (0, "comparison", False)
    assert said.json["only_second"] == ["x"]
    first = said.json["tensors"][0]
    assert (first["name"], first["ratio"]) == ("conv0", 0.5)
    people = zsq("inspect", files["ranges"], "--against", files["other"])
    assert "tensors that differ" in people.out
    assert "conv0" in people.out
    assert "image" not in people.out.partition("tensors that differ")[2]


def test_inspect_says_what_is_damaged(zsq, files, tmp_path):
    cut = tmp_path / "cut.cache"
    cut.write_bytes(files["cache"].read_bytes()[:-3])
    (tmp_path / "no.json").write_text("[1]")
    for thing in (cut, tmp_path / "no.json"):
        said = zsq("inspect", thing)
        assert said.code == 2, said.out
        assert str(thing) in said.err
    for pair in ((files["cache"], tmp_path / "nowhere"), (small.write_onnx(tmp_path / "net.onnx"), files["cache"])):
        said = zsq("inspect", pair[0], "--against", pair[1])
        assert said.code == 2
        assert "Traceback" not in said.err


def test_looking_needs_no_tensorrt(files):
    code = (
        "import sys\n"
        "from zsq_deploy.cli.inspecting import describe_thing\n"
        "describe_thing(sys.argv[1])\n"
        "assert not [name for name in sys.modules if name.split('.')[0].startswith('tensorrt')]\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(files["cache"])], check=True)


def test_a_folder_for_the_device(zsq, tmp_path):
    """What the page on TensorRT begins with; and the folder can be looked at."""
    net, out = small.write_onnx(tmp_path / "net.onnx"), tmp_path / "out"
    said = zsq("quantize", net, "--method", "gaussian", "--images", "8", "--target", "tensorrt-10", "-o", out, "-q")
    assert said.code == 0, said.err
    folder = out / "tensorrt-10"
    held = {path.name for path in folder.iterdir()}
    assert {
        "qdq.onnx",
        "float.onnx",
        "trtexec.sh",
        "engine.py",
        "README.md",
        "samples.npz",
        "calibration.cache",
    } <= held
    assert zsq("inspect", folder, "--json").json["kind"] == "quantized graph"
    assert zsq("inspect", folder / "calibration.cache", "--json").json["belongs_to"]["model_digest"]
    lint = zsq("lint", folder / "qdq.onnx", "--target", "tensorrt-10", "--json")
    assert (lint.code, lint.json) == (0, [])


def test_the_expected_kernels_are_said(zsq, tmp_path):
    net = small.write_onnx(tmp_path / "net.onnx")
    words = (net, "--method", "gaussian", "--images", "8", "--target", "tensorrt-10", "-q")
    said = zsq("quantize", *words, "-o", tmp_path / "a")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    manifest = json.loads((tmp_path / "a" / "tensorrt-10" / "manifest.json").read_text())
    kernels = manifest["choices"]["expected_kernels"]
    assert lines[-1].strip().startswith(f"expected: {len(kernels)} kernels")
    assert any("computes int8, writes int8" in line for line in lines)
    told = zsq("quantize", *words, "--json", "-o", tmp_path / "b")
    assert told.json["tensorrt-10"]["expected_kernels"] == kernels


def test_tensorrts_calibrators_are_range_methods(zsq, tmp_path):
    net = small.write_onnx(tmp_path / "net.onnx")
    words = (net, "--method", "gaussian", "--images", "8", "-q")
    said = zsq(
        *("quantize", *words, "--target", "tensorrt-10", "--ranges", "tensorrt-entropy2"), "-o", tmp_path / "out"
    )
    assert said.code == 0, said.err
    manifest = json.loads((tmp_path / "out" / "tensorrt-10" / "manifest.json").read_text())
    assert manifest["choices"]["ranges"] == "tensorrt-entropy2"
    bound = zsq("inspect", tmp_path / "out" / "tensorrt-10" / "calibration.cache", "--json").json["belongs_to"]
    assert bound["method"] == "tensorrt-entropy2"
    for target, ranges in (("ort-x86-vnni", "tensorrt-minmax"), ("tensorrt-8", "ort-minmax")):
        wrong = zsq("quantize", *words, "--target", target, "--ranges", ranges, "-o", tmp_path / "no")
        assert wrong.code == 2
        assert f"{ranges} is no calibrator of" in wrong.err


def test_an_engine_from_the_float_network_and_a_cache(zsq, tmp_path):
    net = small.write_onnx(tmp_path / "net.onnx")
    words = (net, "--method", "gaussian", "--images", "8", "-q", "--quantizer", "implicit")
    said = zsq("quantize", *words, "--target", "tensorrt-8", "-o", tmp_path / "out")
    assert said.code == 0, said.err
    folder = tmp_path / "out" / "tensorrt-8"
    assert {"network.onnx", "implicit.onnx", "calibration.cache"} <= {path.name for path in folder.iterdir()}
    wrong = zsq("quantize", *words, "--target", "tensorrt-11", "-o", tmp_path / "no")
    assert (wrong.code, "neither calibrators nor calibration caches" in wrong.err) == (2, True)


def test_16_bit_floats_are_a_word_of_the_command_line(zsq, tmp_path):
    net = small.write_onnx(tmp_path / "net.onnx")
    words = (net, "--method", "gaussian", "--images", "8", "-q", "--float-type", "float16")
    said = zsq("quantize", *words, "--target", "tensorrt-11", "-o", tmp_path / "out")
    assert said.code == 0, said.err
    qdq = tmp_path / "out" / "tensorrt-11" / "qdq.onnx"
    assert zsq("lint", qdq, "--target", "tensorrt-11", "--json").json == []
    assert zsq("lint", qdq, "--target", "tensorrt-8").code == 1
    for target in ("tensorrt-8", "ort-x86-vnni"):
        wrong = zsq("quantize", *words, "--target", target, "-o", tmp_path / "no")
        assert (wrong.code, "--float-type" in wrong.err) == (2, True)


def test_how_much_may_stay_in_float_is_a_word_of_the_command_line(zsq, tmp_path):
    net = small.write_onnx(tmp_path / "net.onnx")
    words = (net, "--method", "gaussian", "--images", "8", "-q")
    for number, (more, share) in enumerate([((), 0.125), (("--float-macs", "0"), 0.0), (("--float-macs", "0.3"), 0.3)]):
        out = tmp_path / f"out{number}"
        said = zsq("quantize", *words, *more, "--target", "tensorrt-10", "-o", out)
        assert said.code == 0, said.err
        manifest = json.loads((out / "tensorrt-10" / "manifest.json").read_text())
        assert manifest["choices"]["float_macs"] == share
        assert set(manifest["choices"]["spared_nodes"]) == set(manifest["choices"].get("spared", {}).get("nodes", ()))
    for target, value in (("ort-x86-vnni", "0.1"), ("tensorrt-10", "1.5")):
        wrong = zsq("quantize", *words, "--float-macs", value, "--target", target, "-o", tmp_path / "no")
        assert wrong.code == 2, wrong.err
        assert "float-macs" in wrong.err or "float_macs" in wrong.err


def test_a_set_of_another_shape_is_refused(zsq, tmp_path):
    net = small.write_onnx(tmp_path / "net.onnx")
    sizes = {"input": np.zeros((4, 3, 5, 5), np.float32)}
    CalibrationSet.from_arrays(sizes, CalibrationManifest(method="gaussian")).save(tmp_path / "set")
    said = zsq("quantize", net, "--calibration", tmp_path / "set", "--target", "tensorrt-10", "-o", tmp_path / "out")
    assert said.code == 2
    assert "(3, 5, 5)" in said.err or "[4, 3, 5, 5]" in said.err, said.err
    assert "Traceback" not in said.err
