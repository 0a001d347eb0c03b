"""Every command beside `deploy`: what it prints for people, what for machines, and its help."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import small
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import zsq_deploy.cli
from zsq_deploy import __version__
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.cli.app import app
from zsq_deploy.pipeline import on_device
from zsq_deploy.recipe import describe

COMMANDS = (
    "deploy",
    "run",
    "synth",
    "quantize",
    "verify",
    "bench",
    "bundle",
    "report",
    "inspect",
    "lint",
    "doctor",
    "demo",
)


GROUPS = {
    "devices": ("add", "check", "list", "remove"),
    "methods": ("show",),
    "env": ("create", "check", "list", "remove"),
    "import": ("pot-config",),
    "export": ("pot-config",),
}


@pytest.mark.parametrize(("group", "command"), [(group, command) for group, held in GROUPS.items() for command in held])
def test_help_of_groups(zsq, group, command):
    assert re.search(rf"^  {command}  +\w", zsq(group, "--help").out, re.MULTILINE)
    said = zsq(group, command, "--help")
    assert said.code == 0
    assert f"Usage: zsq {group} {command}" in said.out
    assert "--json" in said.out
    assert re.search(rf"^  zsq {group} {command}", said.out, re.MULTILINE), "an example"


ONE_FLAG_SEVERAL_MEANINGS = {
    "--device", "--force", "--model", "--output", "--python", "--target", "--threads", "--time-limit",
}  # fmt: skip
"""Said more than once, since commands mean different things by it: `--device` of deploy makes images, that of bench measures."""


def test_every_option_is_declared_once():
    said = defaultdict(list)
    for file in Path(zsq_deploy.cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option":
                flags = [word.value for word in node.args if isinstance(word, ast.Constant)]
                (text,) = (ast.unparse(word.value) for word in node.keywords if word.arg == "help")
                for flag in flags:
                    if isinstance(flag, str) and flag.startswith("--"):
                        said[flag].append(text)
    assert len(said) > 70
    assert {flag for flag, texts in said.items() if len(texts) > 1} == ONE_FLAG_SEVERAL_MEANINGS
    for flag, texts in said.items():
        assert len(set(texts)) == len(texts), f"{flag} is declared twice with one meaning"


def test_all_commands_are_there(zsq):
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)
    assert {group.name for group in app.registered_groups} == set(GROUPS)
    said = zsq("--help")
    assert said.code == 0
    for name in (*COMMANDS, *GROUPS):
        assert re.search(rf"^  {name}  +\w", said.out, re.MULTILINE)
    assert "..." not in said.out.partition("Commands:")[2]  # every summary is whole
    assert zsq("--version").out == f"zsq-deploy {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(zsq, command):
    said = zsq(command, "--help")
    assert said.code == 0
    assert said.err == ""
    assert f"Usage: zsq {command}" in said.out
    assert "--json" in said.out
    assert "<list[str]>" not in said.out
    if command not in ("doctor", "demo", "report", "bench"):
        assert re.search(rf"^  zsq {command} ", said.out, re.MULTILINE), "an example"
    for line in said.out.splitlines():
        if re.match(r"  (-\w, )?--[\w-]+(  |$)", line):
            assert line.strip()
    assert not re.search(r"^  (?:-\w, )?--[\w-]+ *(?:\w+)? *$\n  -", said.out, re.MULTILINE), "an option without a word"


def test_words_of_a_recipe(zsq):
    said = zsq("run", "--words")
    assert said.code == 0
    assert [line.split()[0] for line in said.out.splitlines()] == [item.name for item in describe()]


def test_synth_and_its_exports(place, tmp_path, zsq):
    said = zsq(
        "synth",
        place.network,
        "-o",
        tmp_path / "set",
        "--method",
        "fractal",
        "--images",
        6,
        "--export",
        "npy",
        "--json",
    )
    assert said.code == 0, said.err
    assert said.json["method"] == "fractal"
    made = CalibrationSet.open(tmp_path / "set" / "calibration")
    assert (len(made), made.digest) == (6, said.json["digest"])
    assert list((tmp_path / "set" / "npy").rglob("*.npy"))
    bad = zsq("synth", place.network, "-o", tmp_path / "no", "--export", "tflite")
    assert bad.code == 2
    assert "polygraphy" in bad.err
    none = zsq("synth", place.network, "-o", tmp_path / "no", "--method", "bn-analytic")
    assert none.code == 2
    assert not (tmp_path / "no").exists()


def test_synth_says_how_good_the_set_is(place, tmp_path, zsq):
    told = ("synth", place.network, "--method", "gaussian", "--images", 12, "--real-data", place.data)
    said = zsq(*told, "-o", tmp_path / "set")
    assert said.code == 0, said.err
    found = small.read(tmp_path / "set" / "quality.json")
    coverage, real = found["coverage"]["summary"], found["real"]
    for line in (
        f"coverage {coverage:.3f}:",
        "batch-norm distance",
        "variety:",
        f"against {real['images']} real images",
    ):
        assert line in said.out
    assert real["images"] == 40
    again = zsq(*told, "-o", tmp_path / "set", "--force", "--json")
    assert again.json["quality"] == found
    assert zsq(*told[:-1], tmp_path / "nowhere", "-o", tmp_path / "none").code == 2
    assert not (tmp_path / "none").exists()


def test_synth_quantize_verify_are_the_job_in_pieces(place, tmp_path, zsq):
    assert zsq("synth", place.network, "-o", tmp_path / "set", "--method", "gaussian", "--images", 12, "-q").code == 0
    said = zsq(
        "quantize",
        place.network,
        "--calibration",
        tmp_path / "set" / "calibration",
        "-o",
        tmp_path / "out",
        "--no-search",
    )
    assert said.code == 0, said.err
    assert "ort-x86-vnni: " in said.out
    assert not (tmp_path / "out" / "report.json").exists()
    said = zsq("verify", tmp_path / "out", "--eval-data", place.data, "--json")
    assert said.code == 0, said.err
    assert said.json["targets"]["ort-x86-vnni"]["accuracy"]["float"] == 1.0
    assert said.json["calibration"]["method"] == "gaussian"
    assert (tmp_path / "out" / "report.html").is_file()
    # The widened engine's Q/DQ graph is found again, too.
    assert said.json["targets"]["ort-x86-vnni"]["parity"]["integer"]["equal_share"] == 1.0


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place.out, tmp_path / "copy")


def test_verify_again(copy, place, zsq):
    before = small.read(copy / "report.json")
    said = zsq("verify", copy, "--target", "ort-x86-vnni", "--max-latency-ms", 1e-6, "--limit", 10, "-q")
    assert said.code == 1
    assert "report:" in said.out
    after = small.read(copy / "report.json")
    assert after["targets"]["ort-x86-vnni"]["accuracy"]["images"] == 10
    assert after["calibration"] == before["calibration"]
    assert after["targets"]["ort-arm64"] == before["targets"]["ort-arm64"]
    engines = [(folder / "ort-x86-vnni" / "engine.onnx").read_bytes() for folder in (copy, place.out)]
    assert engines[0] == engines[1]


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize("file", ["engine.onnx", "float.onnx"])
def test_a_changed_engine_is_refused(copy, zsq, command, file):
    changed = copy / "ort-x86-vnni" / file
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    report = (copy / "report.json").read_bytes()
    said = zsq(command, copy)
    assert said.code == 2
    assert str(changed) in said.err
    assert "changed" in said.err
    assert (copy / "report.json").read_bytes() == report


@pytest.mark.parametrize("command", ["verify", "bench", "report"])
def test_folders_that_are_none(tmp_path, zsq, command):
    for thing in (tmp_path, tmp_path / "nowhere"):
        said = zsq(command, thing)
        assert said.code == 2, (command, thing, said.out, said.err)
        assert str(thing) in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_targets_that_were_not_built(place, zsq, command):
    said = zsq(command, place.out, "--target", "ort-x86-avx2")
    assert said.code == 2
    assert "ort-x86-avx2" in said.err


def test_bench(place, zsq):
    said = zsq("bench", place.out, "--rounds", 2, "--json")
    assert said.code == 0, said.err
    assert set(said.json) == {"ort-x86-vnni", "ort-arm64"}
    assert said.json["ort-x86-vnni"]["engine"]["median_ms"] > 0
    said = zsq("bench", place.out, "--rounds", 2, "--target", "ort-x86-vnni", "-q")
    assert "float_best" in said.out
    assert re.search(r"^target +runs as +median +spread +p95 +p99 +first +load +speed$", said.out, re.MULTILINE)
    (row,) = re.findall(r"^ort-x86-vnni +engine +(.*)x$", said.out, re.MULTILINE)
    median, spread, p95, p99, *_ = (float(number) for number in row.split())
    assert 0 < median <= p95 <= p99
    assert spread >= 0
    assert "ort-arm64" not in said.out
    for more in (["--rounds", 0], ["--threads", 0]):
        assert zsq("bench", place.out, *more).code == 2


def test_what_bench_is_told_goes_before_the_list_of_devices(zsq, tmp_path, monkeypatch):
    monkeypatch.setenv("ZSQ_DEVICES", str(tmp_path / "devices.yaml"))
    added = zsq("devices", "add", "pi4", "ssh://pi@pi4", "--python", "py", "--threads", 4, "--affinity", "0-3")
    assert added.code == 0, added.err
    seen = []

    def watched(folder, devices, *, measure, **more):
        seen.append([(one.python, one.threads or measure.threads, one.affinity or measure.affinity) for one in devices])
        return on_device.Benched()

    monkeypatch.setattr(on_device, "bench_on_devices", watched)
    both = ["--device", "pi4", "--device", "ssh://pi@pi5"]
    assert zsq("bench", tmp_path, *both).code == 2  # nothing was measured
    zsq("bench", tmp_path, *both, "--threads", 1, "--affinity", "7", "--python", "python3.12")
    assert seen == [[("py", 4, "0-3"), (None, 1, None)], [("python3.12", 1, "7"), ("python3.12", 1, "7")]]


def test_report(copy, zsq):
    (copy / "report.html").unlink()
    said = zsq("report", copy, "--json")
    assert said.code == 0, said.err
    assert said.json == small.read(copy / "report.json")
    assert (copy / "report.html").is_file()
    (copy / "report.json").write_text('{"schema_version": 1}')
    said = zsq("report", copy / "report.json")
    assert said.code == 2
    assert "report.json" in said.err


def test_inspect_every_kind(place, zsq, tmp_path):
    kinds = {
        place.network: "network",
        place.out: "output folder",
        place.out / "calibration": "calibration set",
        place.out / "ort-x86-vnni": "quantized graph",
        place.out / "ort-x86-vnni" / "engine.onnx": "quantized graph",
        place.out / "ort-x86-vnni" / "float.onnx": "network",
    }
    for thing, kind in kinds.items():
        said = zsq("inspect", thing, "--json")
        assert said.code == 0, (thing, said.err)
        assert said.json["kind"] == kind
        people = zsq("inspect", thing)
        assert people.code == 0
        assert kind in people.out
    network = zsq("inspect", place.network, "--nodes", "--json").json
    assert network["batch_norms"] == 2
    assert [node["name"] for node in network["nodes"] if node["op"] == "Conv"] == ["conv0", "conv1"]
    assert "conv0" in zsq("inspect", place.network, "--nodes").out
    assert set(zsq("inspect", place.out, "--json").json["engines"]) == {"ort-x86-vnni", "ort-arm64"}
    (tmp_path / "netcode3.py").write_text(small.TORCH_CODE)
    code = zsq("inspect", "netcode3:gray", "--path", tmp_path, "--input-shape", "1x1x8x8", "--json")
    assert code.json["inputs"][0]["shape"][1:] == [1, 8, 8]


def test_inspect_what_is_nothing(tmp_path, zsq):
    (tmp_path / "cut.onnx").write_bytes(small.onnx_model().SerializeToString()[:2000])
    for thing in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.onnx", tmp_path / "cut.onnx"):
        said = zsq("inspect", thing)
        assert said.code == 2, (thing, said.out, said.err)
        assert str(thing) in said.err


class Reader(CalibrationDataReader):
    def __init__(self, count=8):
        rng = np.random.default_rng(0)
        self._left = iter([{"input": rng.random((1, 3, 8, 8), dtype=np.float32)} for _ in range(count)])

    def get_next(self):
        return next(self._left, None)


@pytest.fixture(scope="module")
def plain_s8s8(tmp_path_factory):
    """What plain `quantize_static` makes without any thought: signed activations, one scale a weight tensor."""
    home = tmp_path_factory.mktemp("plain")
    net = small.network()
    import torch

    torch.nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])
    small.write_onnx(home / "net.onnx")
    quantize_static(
        home / "net.onnx", home / "q.onnx", Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8, per_channel=False,
    )  # fmt: skip
    return home / "q.onnx"


def test_lint_finds_what_is_wrong_with_a_plain_graph(plain_s8s8, zsq):
    said = zsq("lint", plain_s8s8, "--target", "ort-x86-vnni", "--json")
    assert said.code == 1
    findings = json.loads(said.out)
    assert findings
    for item in findings:
        assert item["node"]
        assert item["rule"]
        assert len(item["message"]) > 15
        assert len(item["remedy"]) > 10
    told = " ".join(item["message"] + item["remedy"] for item in findings).lower()
    assert "u8" in told or "uint8" in told or "unsigned" in told
    people = zsq("lint", plain_s8s8)
    assert people.code == 1
    assert people.out.count("to do:") == len(findings)


def test_lint_has_nothing_against_our_engines(place, zsq):
    for target in ("ort-x86-vnni", "ort-arm64"):
        said = zsq("lint", place.out / target / "engine.onnx", "--target", target)
        assert said.code == 0, said.out
    crossed = zsq("lint", place.out / "ort-arm64" / "engine.onnx", "--target", "ort-x86-vnni")
    assert crossed.code == 1


def test_lint_of_what_is_no_graph(tmp_path, zsq, place):
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    assert zsq("lint", tmp_path / "x.onnx").code == 2
    assert zsq("lint", tmp_path / "nowhere.onnx").code == 2
    said = zsq("lint", place.out / "ort-x86-vnni" / "engine.onnx", "--target", "ort-x86")
    assert said.code == 2
    assert "did you mean" in said.err


@pytest.mark.assets
@pytest.mark.slow
def test_lint_has_nothing_against_engines_of_real_networks(assets, tmp_path, zsq):
    tried = 0
    for file in sorted((assets / "models").glob("*.onnx")):
        network = onnx.load(file, load_external_data=False)
        sizes = [d.dim_value for d in network.graph.input[0].type.tensor_type.shape.dim]
        if len(sizes) != 4 or 0 in sizes[1:] or max(sizes[1:]) > 64:
            continue  # large inputs take long, and are built in the tests of the backend
        tried += 1
        out = tmp_path / file.stem
        said = zsq(
            "quantize",
            file,
            "-o",
            out,
            "--method",
            "gaussian",
            "--images",
            4,
            "--no-search",
            "--no-bias-correction",
            "-q",
        )
        assert said.code == 0, (file, said.err)
        linted = zsq("lint", out / "ort-x86-vnni" / "engine.onnx")
        assert linted.code == 0, (file, linted.out)
    assert tried >= 2


def test_doctor(zsq):
    said = zsq("doctor", "--json")
    assert said.code == 0
    assert {"ort-x86-vnni", "ort-x86-avx2", "ort-arm64", "openvino-cpu"} <= set(said.json["targets"])
    assert [item["name"] for item in said.json["environments"]] == ["pot"]
    assert said.json["packages"]["onnxruntime"]
    people = zsq("doctor").out
    for word in ("CPU", "CUDA", "onnxruntime", "ort-x86-vnni", "ort-arm64", "zsq demo"):
        assert word in people


def test_a_reader_that_has_enough(place):
    """`zsq inspect | head -1`: no traceback, no complaint."""
    import subprocess

    done = subprocess.run(
        ["bash", "-c", f"{small.executable()} inspect {place.network} --nodes --json | head -1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "{"
    assert done.stderr == ""


@pytest.mark.slow
def test_the_demo_from_end_to_end(zsq, tmp_path, monkeypatch):
    """As a newcomer runs it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    done = zsq("demo", "--json")
    assert done.code == 0, done.err
    report = done.json
    target = report["targets"]["ort-x86-vnni"]
    assert target["accuracy"]["float"] > 0.95
    assert target["accuracy"]["engine"] >= target["accuracy"]["float"] - 0.01
    assert target["accuracy"]["images"] == 450
    assert target["integer"]["macs_share"] == 1.0
    assert target["parity"]["integer"]["equal_share"] == 1.0
    assert (tmp_path / "demo-out" / "report.html").stat().st_size > 20_000
    again = zsq("demo")
    assert again.code == 2
    assert "--force" in again.err
