"""``zsq deploy`` for TensorRT from end to end on a pretended device, and what is said where there is no device.

NVIDIA's bindings are real; builder, runtime and libcudart are pretended (``tensorrt_fake/tensorrt.py``): an engine is executed by ONNX
Runtime, so that the whole path is walked, verification and report included. Times and kernels mean nothing here.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from .tensorrt_device import device
from .tensorrt_networks import network

COMMON = ("--mean", "0,0,0", "--std", "1,1,1", "--method", "gaussian", "--images", "16", "-q")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    onnx.save(network("residual").graph.editable(), folder / "net.onnx")
    return folder


@pytest.mark.slow
def test_deploy_builds_runs_verifies_and_reports(home: Path, tmp_path: Path) -> None:
    machine = device(10, home)
    out = tmp_path / "out"
    # A GPU without TF32 and bfloat16 (Xavier) has fewer float engines to measure.
    more = {"PRETEND_CAPABILITY": "72", "PRETEND_GPU": "Xavier"}
    done = machine.zsq("deploy", home / "net.onnx", *COMMON, "--target", "tensorrt-10", "-o", out, **more)
    assert "latency, engine, on the device alone" in done.stdout
    report = json.loads((out / "report.json").read_text())["targets"]["tensorrt-10"]
    assert report["device"]["name"] == "Xavier"
    assert report["device"]["float modes"] == ["float32", "float16"]
    assert report["runtime_version"] == machine.version
    engine = report["engine"]
    assert engine["path"] == "tensorrt-10/engine.plan"
    assert engine["bytes"] == (out / engine["path"]).stat().st_size
    plan = engine["choices"]["plan"]
    assert (plan["mode"], plan["gpu"], plan["tensorrt"]) == ("explicit", "Xavier", machine.version)
    assert plan["warnings"] == ["a warning of the builder"]
    # Against the twin: another runtime's 8-bit kernels, so within two steps; its own float form is the twin nearly exactly.
    assert report["parity"]["top1_agreement"] == 1.0
    assert report["parity"]["within_2_lsb"] > 0.95
    assert report["parity"]["unfused"]["images"] > 0
    assert report["accuracy"]["metric"] == "agreement_with_float"
    assert "no exact integer reference" in report["not_measured"]["parity.integer"]
    assert report["integer"]["macs_share"] == 1.0
    assert report["integer"]["macs"] == 87592
    assert any(
        island["reason"] == "conversion from float to 8-bit integers" for island in report["integer"]["float_islands"]
    )
    latency = report["latency"]
    assert latency["float32"]["device_median_ms"] > 0
    modes = {row["mode"] for row in (latency["float32"], latency["float_best"], *latency["others"].values())}
    assert modes == {f"float network, all optimizations, {name}" for name in ("fp32", "float16")}
    for runner in (latency["engine"], latency["float32"]):
        assert 0 < runner["device_median_ms"] <= runner["median_ms"]
        assert runner["load_ms"] > 0
        assert runner["first_ms"] > 0
    assert (out / "report.html").read_text().count("on the device alone") >= 2
    plans = {path.name for path in (out / "tensorrt-10").glob("*.plan")}
    assert plans == {"engine.plan", "unfused.plan", "float32.plan", "float16.plan"}

    # Measured again later, nothing is built anew; on another GPU the plans are refused, and the folder stays as it was.
    before = {path: path.stat().st_mtime_ns for path in (out / "tensorrt-10").iterdir()}
    other = machine.zsq("verify", out, "-q", check=False, PRETEND_GPU="Orin")
    assert other.returncode == 2
    assert (
        "was built for Xavier (compute capability 7.2), and the GPU here is Orin (compute capability 8.7)"
        in other.stderr
    )
    assert {path: path.stat().st_mtime_ns for path in (out / "tensorrt-10").iterdir()} == before


def test_verification_of_an_implicit_engine(home: Path, tmp_path: Path) -> None:
    machine = device(8, home)
    out = tmp_path / "out"
    words = (home / "net.onnx", *COMMON, "--target", "tensorrt-8", "--quantizer", "implicit", "-o", out)
    machine.zsq("quantize", *words, PRETEND_CAPABILITY="72")
    code = """
import json, sys
from pathlib import Path
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.model import load_model
from zsq_deploy.pipeline.stages import open_engine
from zsq_deploy.pipeline.verification import Evidence, verify_engine
from zsq_deploy.quant import Ranges
out, net = Path(sys.argv[1]), sys.argv[2]
engine = open_engine(out, "tensorrt-8")
evidence = Evidence(None, CalibrationSet.open(out / "holdout"))
section = verify_engine(load_model(net), engine, evidence, Ranges.load(out / "ranges.json"), out, latency=False)
print(json.dumps({"plan": section["engine"]["choices"]["plan"], "macs": section["integer"]["macs"], "shares": section["integer"]["macs_share"],
                  "reasons": [row["reason"] for row in section["integer"]["float_islands"] if row["macs"]],
                  "agreement": section["parity"]["top1_agreement"]}))
"""
    done = machine.run(code, str(out), str(home / "net.onnx"), PRETEND_CAPABILITY="72")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plan"]["mode"] == "implicit"
    assert found["macs"] == 87592
    # The pretended engine computes in float, and the proof says so.
    assert found["shares"] == 0.0
    assert len(found["reasons"]) == 4
    assert found["agreement"] >= 0.9


def test_deploy_is_refused_before_images_are_made(home: Path, tmp_path: Path) -> None:
    machine = device(10, home)
    words = ("deploy", home / "net.onnx", *COMMON, "-o", tmp_path / "out", "--target")
    other = machine.zsq(*words, "tensorrt-11", check=False)
    assert other.returncode == 2
    assert "tensorrt-11 is for TensorRT 11, and TensorRT 10." in other.stderr
    nothing = machine.zsq(*words, "tensorrt-10", check=False, PRETEND_DEVICES="0")
    assert nothing.returncode == 2
    assert "there is no GPU that it could use" in nothing.stderr
    assert "zsq quantize --target tensorrt-10" in " ".join(nothing.stderr.split())
    assert not (tmp_path / "out").exists()


def test_doctor_tells_what_there_is_and_what_is_missing(home: Path) -> None:
    machine = device(10, home)
    found = json.loads(machine.zsq("doctor", "--json").stdout)
    targets = found["targets"]
    assert targets["tensorrt-10"]["measures"]
    assert targets["tensorrt-10"]["missing"] == []
    assert not targets["tensorrt-11"]["measures"]
    assert targets["tensorrt-11"]["builds"]
    assert "zsq quantize" in targets["tensorrt-11"]["notes"][-1]
    assert found["runtimes"]["tensorrt"]["name"] == "Pretended GPU"
    said = machine.zsq("doctor").stdout
    assert f"tensorrt: {machine.version} on Pretended GPU (compute capability 8.7, CUDA 12.6)" in said
