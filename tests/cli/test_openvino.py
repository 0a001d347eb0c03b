"""OpenVINO from the command line: every way to quantize, what is refused, and the files that come out."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import small
import yaml

pytest.importorskip("openvino")
pytest.importorskip("nncf")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small.write_onnx(tmp_path_factory.mktemp("good") / "net.onnx")


@pytest.fixture
def deploy(zsq, good, tmp_path):
    def call(*more, command="deploy", out=None, images=8):
        return zsq(
            command, good, "-o", out or tmp_path / "out", "--images", images, "--method", "gaussian", "--target",
            "openvino-cpu", *more,
        )  # fmt: skip

    return call


def logits_of(engine, x):
    """What plain OpenVINO says, without anything of ours."""
    import openvino

    core = openvino.Core()
    model = core.compile_model(str(engine), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return model(x)[0]


def test_auto_measures_both_routes_and_the_report_shows_them(deploy, good, tmp_path):
    data = small.write_eval(tmp_path / "data.npz")
    said = deploy("--eval-data", data, "--json", images=16)
    assert said.code == 0, said.err
    target = said.json["targets"]["openvino-cpu"]
    names = {row["name"]: row for row in target["engine"]["candidates"]}
    assert {"qdq", "nncf"} <= set(names)
    assert all(names[name]["median_ms"] > 0 and names[name]["sqnr_db"] > 15 for name in ("qdq", "nncf"))
    assert target["engine"]["quantizer"] in ("qdq", "nncf")
    assert target["parity"]["integer"]["equal_share"] == 1.0
    assert target["parity"]["within_2_lsb"] >= 0.995
    assert target["parity"]["unfused"]["within_2_lsb"] >= 0.995
    assert target["integer"]["macs_share"] == 1.0
    assert target["latency"]["speedup"] > 0
    assert target["device"]["session"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert target["runtime_version"].startswith("20")
    # The numbers are those of plain OpenVINO on the file.
    out = tmp_path / "out" / "openvino-cpu"
    with np.load(data) as held:
        x, y = np.moveaxis(held["x"], -1, 1).astype(np.float32) / 255, held["y"]
    plain = logits_of(out / "engine.xml", x)
    assert np.mean(plain.argmax(1) == y) == pytest.approx(target["accuracy"]["engine"])
    # The size is that of everything that is shipped, each file has its digest, and the page names the quantizer.
    assert target["engine"]["bytes"] == sum((out / f"engine.{end}").stat().st_size for end in ("xml", "bin"))
    assert target["engine"]["weights"]["bytes"] == (out / "engine.bin").stat().st_size
    assert target["engine"]["quantizer"] in (tmp_path / "out" / "report.html").read_text()
    # What was chosen is pinned, and gives the same engine again.
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.resolved.yaml").read_text())
    assert recipe["quantization"]["choice"] == {"openvino-cpu": target["engine"]["quantizer"]}


@pytest.mark.parametrize("quantizer", ["qdq", "nncf"])
def test_the_resolved_recipe_gives_the_same_engine(deploy, zsq, tmp_path, quantizer):
    assert deploy("--quantizer", quantizer, "-q", command="quantize").code == 0
    said = zsq("run", tmp_path / "out" / "recipe.resolved.yaml", "-o", tmp_path / "again", "-q")
    assert said.code == 0, said.err
    for name in ("engine.bin", "qdq.onnx"):
        first, second = ((tmp_path / out / "openvino-cpu" / name).read_bytes() for out in ("out", "again"))
        assert first == second, name
    assert not list((tmp_path / "out" / "openvino-cpu").glob(".vendor*"))
    assert not (tmp_path / "out" / "openvino-cpu" / "trial").exists()


def test_flags_reach_nncf(deploy, tmp_path):
    said = deploy(
        "--quantizer", "nncf", "--preset", "performance", "--fast-bias", "--subset-size", 4, "--ignore-name", "conv1",
        "--ignore-type", "MatMul", "-q", command="quantize",
    )  # fmt: skip
    assert said.code == 0, said.err
    manifest = small.read(tmp_path / "out" / "openvino-cpu" / "manifest.json")
    told = manifest["choices"]["nncf"]
    assert told["preset"] == "performance"
    assert told["fast_bias_correction"] is True
    assert told["subset_size"] == 4
    assert told["ignored_names"] == ["conv1"]
    decided = manifest["choices"]["decided"]
    assert decided["images"] == 4
    # What is ignored is in float: its weights are no integers in the Q/DQ graph.
    import onnx

    graph = onnx.load(tmp_path / "out" / "openvino-cpu" / "qdq.onnx").graph
    readers = {node.name: node for node in graph.node}
    made = {value: node.op_type for node in graph.node for value in node.output}
    assert made.get(readers["conv0"].input[1]) == "DequantizeLinear"
    assert readers["conv1"].input[1] not in made
    (product,) = (node for node in graph.node if node.op_type in ("Gemm", "MatMul"))
    assert product.input[1] not in made


def test_accuracy_control_names_its_metric_and_what_it_returned(deploy, zsq, tmp_path):
    said = deploy("--quantizer", "nncf", "--accuracy-control", "--max-drop", 0.5, "--json", "--no-search")
    assert said.code == 0, said.err
    control = said.json["targets"]["openvino-cpu"]["engine"]["accuracy_control"]
    assert control["max_drop"] == 0.5
    assert "float" in control["metric"] or "agree" in control["metric"]
    assert control["returned_to_float"] == []
    notes = " ".join(said.json["targets"]["openvino-cpu"]["notes"])
    assert "held-out synthetic images (gaussian)" in notes
    # Half of the held-out images are left to judge the engine on.
    assert said.json["evaluation"]["images"] == 32
    assert "Accuracy control" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_accuracy_control_looks_at_labelled_images_only_if_told(deploy, tmp_path):
    data, other = small.write_eval(tmp_path / "data.npz"), small.write_eval(tmp_path / "other.npz", images=20)
    said = deploy(
        "--quantizer", "nncf", "--accuracy-control", "--max-drop", 0.9, "--eval-data", data, "--validation-data", other,
        "--no-search", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    target = said.json["targets"]["openvino-cpu"]
    assert any("20 labelled images" in note and "other.npz" in note for note in target["notes"])
    assert target["accuracy"]["images"] == 40


REFUSED = {
    "an unknown quantizer": (("--quantizer", "ncf"), ("--quantizer", "nncf")),
    "a calibrator of another runtime": (("--ranges", "ort-entropy"), ("--ranges", "openvino-cpu")),
    "ranges that NNCF does not read": (("--quantizer", "nncf", "--ranges", "mse"), ("mse", "nncf")),
    "NNCF without images": (("--quantizer", "nncf", "--method", "bn-analytic"), ("--quantizer", "bn-analytic")),
    "a preset that there is not": (("--quantizer", "nncf", "--preset", "fast"), ("--preset", "mixed")),
    "NNCF's words for our own graph": (("--quantizer", "qdq", "--preset", "mixed"), ("--preset", "--quantizer nncf")),
    "patterns for POT": (("--quantizer", "pot", "--ignore-pattern", ".*"), ("--ignore-pattern", "nncf")),
    "a drop that nobody looks at": (("--quantizer", "nncf", "--max-drop", 0.1), ("--max-drop", "--accuracy-control")),
    "validation data for nobody": (("--quantizer", "nncf", "--validation-data", "x.npz"), ("accuracy control",)),
    "a node that is none": (("--quantizer", "nncf", "--ignore-name", "conv9"), ("conv9",)),
    "a type that is none": (("--quantizer", "nncf", "--ignore-type", "Frobnicate"), ("Frobnicate",)),
    "a pattern that is none": (("--quantizer", "nncf", "--ignore-pattern", "("), ("(",)),
    "a POT configuration that is none": (("--quantizer", "pot", "--pot-config", "/nowhere.json"), ("/nowhere.json",)),
    "bits that are not built": (("--bits", "w1a2"), ("--bits", "w1a2")),
    "a negative subset": (("--quantizer", "nncf", "--subset-size", -1), ("--subset-size",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(deploy, tmp_path, case):
    more, words = REFUSED[case]
    said = deploy(*more, "-q")
    assert said.code == 2, (said.out, said.err)
    assert said.err.startswith("error: ")
    assert "  to do: " in said.err
    for word in words:
        assert word in said.err, (word, said.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--quantizer", "nncf"), ("--quantizer", "ort-x86-vnni")),
        (("--preset", "mixed", "--fast-bias"), ("NNCF", "openvino-cpu")),
        (("--compress-weights", "int8_sym"), ("--compress-weights",)),
    ],
)
def test_onnx_runtime_targets_have_one_quantizer(zsq, good, tmp_path, more, words):
    said = zsq("deploy", good, "-o", tmp_path / "out", "--method", "gaussian", "--images", 4, "-q", *more)
    assert said.code == 2
    for word in words:
        assert word in said.err, said.err


def test_an_ir_is_inspected_and_linted(deploy, zsq, tmp_path):
    assert deploy("--quantizer", "nncf", "-q", command="quantize").code == 0
    folder = tmp_path / "out" / "openvino-cpu"
    for thing in (folder, folder / "engine.xml", folder / "vendor.xml"):
        said = zsq("inspect", thing, "--json")
        assert said.code == 0, said.err
        assert said.json["kind"] == "OpenVINO IR"
        assert said.json["convolutions_and_products"] == {"all": 3, "between_pairs": 3}
    nodes = zsq("inspect", folder / "engine.xml", "--nodes", "--json").json["nodes"]
    assert {"Conv", "QuantizeLinear", "DequantizeLinear"} <= {node["op"] for node in nodes}
    listed = zsq("inspect", tmp_path / "out", "--json").json["engines"]["openvino-cpu"]
    assert listed["quantizer"] == "nncf"
    assert listed["bytes"] == sum((folder / f"engine.{end}").stat().st_size for end in ("xml", "bin"))
    said = zsq("lint", folder / "engine.xml")
    assert said.code == 0, said.out
    assert "openvino-cpu" in said.out
    assert zsq("lint", folder / "engine.xml", "--target", "ort-arm64").code == 2
    (tmp_path / "cut.xml").write_text("<net")
    for command in ("lint", "inspect"):
        said = zsq(command, tmp_path / "cut.xml")
        assert said.code == 2
        assert str(tmp_path / "cut.xml") in said.err


@pytest.mark.parametrize("file", ["engine.xml", "engine.bin", "vendor.bin", "qdq.onnx", "float.onnx"])
def test_changed_files_are_refused(deploy, zsq, tmp_path, file):
    assert deploy("--quantizer", "nncf", "-q", "--no-search", command="quantize").code == 0
    changed = tmp_path / "out" / "openvino-cpu" / file
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    said = zsq("verify", tmp_path / "out")
    assert said.code == 2
    assert str(changed) in said.err


POT_CONFIG = """{
    // as POT's documentation writes it
    "model": {"model_name": "net", "model": "net.xml", "weights": "net.bin"},
    "engine": {"type": "simplified", "data_source": "images"},
    "compression": {
        "target_device": "CPU",
        "algorithms": [{"name": "DefaultQuantization", "params": {"preset": "performance", "stat_subset_size": 50}}]
    }
}
"""


@pytest.mark.parametrize("quantizer", ["pot", "nncf"])
def test_pot_configurations_become_recipes_and_come_back(zsq, good, tmp_path, quantizer):
    config = tmp_path / "pot.json"
    config.write_text(POT_CONFIG)
    recipe = tmp_path / "recipe.yaml"
    said = zsq("import", "pot-config", config, "--as", quantizer, "--model", good, "-o", recipe)
    assert said.code == 0, said.err
    assert "left out: engine" in said.err
    held = yaml.safe_load(recipe.read_text())
    assert held["quantization"]["quantizer"] == quantizer
    assert held["quantization"][quantizer]["preset"] == "performance"
    assert held["targets"] == ["openvino-cpu"]
    again = zsq("import", "pot-config", config, "-o", recipe)
    assert again.code == 2
    assert "--force" in again.err
    back = zsq("export", "pot-config", recipe, "--json")
    assert back.code == 0, back.err
    (algorithm,) = back.json["config"]["compression"]["algorithms"]
    assert algorithm["name"] == "DefaultQuantization"
    assert algorithm["params"]["preset"] == "performance"
    assert algorithm["params"]["stat_subset_size"] == 50
    assert zsq("export", "pot-config", recipe, "-o", tmp_path / "back.json").code == 0
    assert json.loads((tmp_path / "back.json").read_text()) == back.json["config"]


def test_pot_configurations_that_are_none(zsq, tmp_path):
    config = tmp_path / "pot.json"
    config.write_text(POT_CONFIG.replace("DefaultQuantization", "DefaultQuantisation"))
    said = zsq("import", "pot-config", config)
    assert said.code == 2
    assert "DefaultQuantization" in said.err
    assert str(config) in said.err
    assert zsq("import", "pot-config", tmp_path / "nowhere.json").code == 2
    assert "--as" in zsq("import", "pot-config", config, "--as", "tensorrt").err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {source: net.onnx}\n")
    said = zsq("export", "pot-config", recipe)
    assert said.code == 2
    assert "quantization.quantizer" in said.err


def test_environments(zsq, tmp_path, monkeypatch):
    monkeypatch.setenv("ZSQ_ENV_DIR", str(tmp_path / "envs"))
    said = zsq("env", "list", "--json")
    assert said.code == 0
    assert [(item["name"], item["state"]) for item in said.json] == [("pot", "missing")]
    assert "missing" in zsq("env", "list").out
    said = zsq("env", "check", "pot")
    assert said.code == 2
    assert "zsq env create pot" in said.err
    assert zsq("env", "remove", "pot", "--json").json == {"name": "pot", "removed": False}
    said = zsq("env", "create", "pto")
    assert said.code == 2
    assert "did you mean 'pot'" in said.err
    said = zsq("env", "create", "pot", "--python", tmp_path / "nopython")
    assert said.code == 2
    assert "--python" in said.err
    people = zsq("doctor").out
    assert "environment pot: missing" in people
    assert "zsq env create pot" in people


def test_pot_without_its_interpreter_is_one_clear_error(deploy, tmp_path, monkeypatch):
    monkeypatch.setenv("ZSQ_ENV_DIR", str(tmp_path / "envs"))
    said = deploy("--quantizer", "pot", "-q", command="quantize")
    assert said.code == 2
    assert "zsq env create pot" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.pot
def test_pot_for_real(deploy, zsq, pot_environment, tmp_path):
    data = small.write_eval(tmp_path / "data.npz")
    said = deploy("--quantizer", "pot", "--eval-data", data, "--json", images=16)
    assert said.code == 0, said.err
    target = said.json["targets"]["openvino-cpu"]
    assert target["engine"]["quantizer"] == "pot"
    assert target["engine"]["vendor"]["path"] == "openvino-cpu/vendor.xml"
    assert target["integer"]["macs_share"] == 1.0
    assert target["parity"]["within_2_lsb"] >= 0.995
    assert target["parity"]["top1_agreement"] >= 0.95
    assert target["accuracy"]["engine"] >= 0.8
    assert zsq("lint", tmp_path / "out" / "openvino-cpu" / "engine.xml").code == 0


_WITHOUT = """
import contextlib, io, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocked())
from zsq_deploy.cli import main
found = []
for arguments in {calls!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def without(blocked, *calls):
    """What commands say in a process in which some libraries are not installed: code, standard output, standard error of each."""
    code = _WITHOUT.format(blocked=blocked, calls=[[str(argument) for argument in call] for call in calls])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_without_openvino_everything_else_works(good, tmp_path):
    config = tmp_path / "pot.json"
    config.write_text(POT_CONFIG)
    more = ("--method", "gaussian", "--images", 4, "--no-search", "--no-bias-correction", "-q")
    ort, ov, doctor, imported = without(
        ["openvino", "nncf"],
        ("quantize", good, "-o", tmp_path / "ort", *more),
        ("quantize", good, "-o", tmp_path / "ov", "--target", "openvino-cpu", *more),
        ("doctor", "--json"),
        ("import", "pot-config", config, "--as", "nncf"),
    )
    assert ort[0] == 0, ort[2]
    assert ov[0] == 2
    assert "pip install 'zsq-deploy[openvino]'" in ov[2]
    assert not (tmp_path / "ov").exists()
    assert doctor[0] == 0, doctor[2]
    found = json.loads(doctor[1])
    assert found["targets"]["openvino-cpu"]["builds"] is False
    assert found["targets"]["ort-x86-vnni"]["builds"] is True
    assert imported[0] == 0, imported[2]


@pytest.mark.slow
def test_without_nncf_our_own_graph_is_what_openvino_runs(good, tmp_path):
    more = ("--target", "openvino-cpu", "--method", "gaussian", "--images", 4, "--no-bias-correction", "-q")
    auto, nncf = without(
        ["nncf"],
        ("quantize", good, "-o", tmp_path / "auto", *more),
        ("quantize", good, "-o", tmp_path / "nncf", "--quantizer", "nncf", *more),
    )
    assert auto[0] == 0, auto[2]
    assert small.read(tmp_path / "auto" / "openvino-cpu" / "manifest.json")["choices"]["quantizer"] == "qdq"
    assert nncf[0] == 2
    assert "pip install 'zsq-deploy[openvino]'" in nncf[2]
    assert not (tmp_path / "nncf").exists()
