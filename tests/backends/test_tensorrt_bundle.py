"""The folder for the device: flags of each generation of trtexec, scripts that are valid, and what a build writes."""

from __future__ import annotations

import json
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from zsq_deploy.backends import BuildSettings, get_backend, get_target, target_names
from zsq_deploy.backends.tensorrt.bundle import trtexec_build_flags, trtexec_time_flags, write_bundle
from zsq_deploy.backends.tensorrt.cache import check_binding, read_cache
from zsq_deploy.backends.tensorrt.implicit import CACHE_VERSION, write_implicit
from zsq_deploy.backends.tensorrt.options import BuildOptions, options_from
from zsq_deploy.backends.tensorrt.ort_table import read_table
from zsq_deploy.backends.tensorrt.quantizer import build, choose
from zsq_deploy.backends.tensorrt.runner import missing_features
from zsq_deploy.backends.tensorrt.scale_files import compare_files
from zsq_deploy.errors import CalibrationError, EngineError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import Ranges

from .tensorrt_bindings import bindings
from .tensorrt_networks import images, network, outputs, ranges_of

TARGETS = {number: get_target(f"tensorrt-{number}") for number in (8, 10, 11)}
CACHE = b"TRT-8502-EntropyCalibration2\nimage: 3caa54fc\n"

COMMON = "--onnx=q.onnx --saveEngine=e.plan"
DETAIL = "--profilingVerbosity=detailed --exportLayerInfo=e.layers.json"
GOLDEN = {
    (8, "explicit", False): f"{COMMON} --int8 --buildOnly {DETAIL}",
    (8, "explicit", True): f"{COMMON} --int8 --fp16 --buildOnly {DETAIL}",
    (8, "implicit", False): f"{COMMON} --int8 --calib=c.cache --buildOnly {DETAIL}",
    (8, "implicit", True): f"{COMMON} --int8 --fp16 --calib=c.cache --buildOnly {DETAIL}",
    (8, "float", False): f"{COMMON} --buildOnly {DETAIL}",
    (8, "float", True): f"{COMMON} --fp16 --buildOnly {DETAIL}",
    (10, "explicit", False): f"{COMMON} --stronglyTyped --skipInference {DETAIL}",
    (10, "explicit", True): f"{COMMON} --int8 --fp16 --skipInference {DETAIL}",
    (10, "implicit", False): f"{COMMON} --int8 --calib=c.cache --skipInference {DETAIL}",
    (10, "implicit", True): f"{COMMON} --int8 --fp16 --calib=c.cache --skipInference {DETAIL}",
    (10, "float", False): f"{COMMON} --skipInference {DETAIL}",
    (10, "float", True): f"{COMMON} --fp16 --skipInference {DETAIL}",
    (11, "explicit", False): f"{COMMON} --skipInference {DETAIL}",
    (11, "float", False): f"{COMMON} --skipInference {DETAIL}",
}
REMOVED_IN_11 = {"--int8", "--fp16", "--bf16", "--best", "--calib", "--precisionConstraints", "--buildOnly"}


@pytest.mark.parametrize(("number", "mode", "half"), GOLDEN, ids=lambda one: str(one))
def test_flags_of_trtexec(number, mode, half):
    cache = "c.cache" if mode == "implicit" else ""
    found = trtexec_build_flags(TARGETS[number], mode, network="q.onnx", plan="e.plan", cache=cache, half=half)
    assert " ".join(found) == GOLDEN[number, mode, half]
    if number == 11:
        assert not {flag.split("=")[0] for flag in found} & REMOVED_IN_11
    # trtexec 10.12 and later refuse both together
    assert not {"--stronglyTyped", "--int8"} <= set(found)


def test_flags_that_a_generation_does_not_have():
    with pytest.raises(UsageError, match="neither calibrators nor"):
        trtexec_build_flags(TARGETS[11], "implicit", network="q.onnx", plan="e.plan", cache="c.cache")
    with pytest.raises(UsageError, match="types as the graph"):
        trtexec_build_flags(TARGETS[11], "explicit", network="q.onnx", plan="e.plan", half=True)
    with pytest.raises(UsageError, match="needs a calibration cache"):
        trtexec_build_flags(TARGETS[8], "implicit", network="q.onnx", plan="e.plan")


def test_flags_that_time():
    head = "--loadEngine=e.plan --warmUp=500 --duration=10 --iterations=100"
    tail = "--exportTimes=e.times.json"
    quick = "--useCudaGraph --useSpinWait --noDataTransfers"
    assert " ".join(trtexec_time_flags(TARGETS[8], plan="e.plan")) == f"{head} {quick} --percentile=99 {tail}"
    assert " ".join(trtexec_time_flags(TARGETS[10], plan="e.plan")) == f"{head} {quick} --percentile=50,90,99 {tail}"
    assert " ".join(trtexec_time_flags(TARGETS[11], plan="e.plan")) == f"{head} --percentile=50,90,99 {tail}"


@pytest.fixture(scope="module")
def float_network(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("net") / "float.onnx"
    onnx.save(network("residual").folded().graph.editable(), path)
    return path


def fake_trtexec(folder: Path, version: str) -> Path:
    """Says its version, and writes down what it was called with."""
    path = folder / "trtexec"
    path.write_text(
        f'#!/usr/bin/env bash\nif [ "$1" = --help ]; then echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{version}]"; exit 0; fi\n'
        f'printf "%s\\n" "$@" > "{folder}/called.txt"\n'
    )
    path.chmod(0o755)
    return path


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(folder / "trtexec.sh"), *words],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("number", "mode"),
    [*((number, "explicit") for number in TARGETS), *((number, "implicit") for number in TARGETS if number < 11)],
)
def test_scripts_are_valid(tmp_path: Path, float_network: Path, number, mode):
    cache = tmp_path / "calibration.cache"
    cache.write_bytes(CACHE)
    made = write_bundle(
        tmp_path / "out",
        float_network,
        TARGETS[number],
        mode=mode,
        float_network=float_network,
        cache=cache if mode == "implicit" else None,
    )
    assert {"float.onnx", "trtexec.sh", "engine.py", "README.md"} <= set(made.files)
    assert ("calibration.cache" in made.files) == (mode == "implicit")
    assert {path.name for path in made.folder.iterdir()} == set(made.files)
    bash = shutil.which("bash")
    assert subprocess.run([bash, "-n", str(made.folder / "trtexec.sh")], check=False).returncode == 0
    assert (made.folder / "trtexec.sh").stat().st_mode & stat.S_IXUSR
    py_compile.compile(str(made.folder / "engine.py"), cfile=str(tmp_path / "e.pyc"), doraise=True)
    text = "".join((made.folder / name).read_text() for name in ("trtexec.sh", "engine.py", "README.md"))
    assert not re.search(r"@[A-Z_]+@", text)
    assert str(tmp_path) not in text
    readme = (made.folder / "README.md").read_text()
    commands = re.findall(r"^(?:scp|bash|python3) .*?# (\d)\.", readme, re.MULTILINE)
    assert commands == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(("number", "version"), [(8, "8502"), (10, "100300"), (11, "110401")])
def test_the_shell_script_calls_trtexec(tmp_path: Path, float_network: Path, number, version):
    folder = tmp_path / "out"
    write_bundle(folder, float_network, TARGETS[number], float_network=float_network)
    tool = fake_trtexec(tmp_path, version)
    done = run(folder, "build", TRTEXEC=str(tool), BATCH="4")
    assert done.returncode == 0, done.stderr
    assert f"TensorRT {number}" in done.stdout
    wanted = trtexec_build_flags(TARGETS[number], "explicit", network="float.onnx", plan="int8.plan")
    shapes = ["--minShapes=image:1x3x8x8", "--optShapes=image:4x3x8x8", "--maxShapes=image:4x3x8x8"]
    assert (tmp_path / "called.txt").read_text().split("\n")[:-1] == [*wanted, *shapes]
    assert run(folder, "time", TRTEXEC=str(tool)).returncode == 0
    assert (tmp_path / "called.txt").read_text().split("\n")[-2] == "--shapes=image:1x3x8x8"
    half = run(folder, "build", TRTEXEC=str(tool), HALF="1")
    assert half.returncode == (2 if number == 11 else 0)
    if number < 11:
        assert "--fp16" in (tmp_path / "called.txt").read_text()
    assert run(folder, "float", TRTEXEC=str(tool)).returncode == 0
    assert "--saveEngine=float.plan" in (tmp_path / "called.txt").read_text()


def test_the_shell_script_refuses_what_cannot_work(tmp_path: Path, float_network: Path):
    folder = tmp_path / "out"
    write_bundle(folder, float_network, TARGETS[10])
    tool = fake_trtexec(tmp_path, "8602")
    wrong = run(folder, "build", TRTEXEC=str(tool))
    assert wrong.returncode == 1
    assert "make one for --target tensorrt-8" in wrong.stderr
    assert "not found" in run(folder, "build", TRTEXEC=str(tmp_path / "nobody")).stderr
    assert "no batch size" in run(folder, "build", TRTEXEC=str(tool), BATCH="0; true").stderr
    assert run(folder, "nothing", TRTEXEC=str(tool)).returncode == 2
    assert run(folder, "float", TRTEXEC=str(tool)).returncode == 2


def test_the_python_script_says_what_is_missing(tmp_path: Path, float_network: Path):
    folder = tmp_path / "out"
    write_bundle(folder, float_network, TARGETS[10])
    (folder / "tensorrt.py").write_text('__version__ = "8.6.2"\n')
    done = subprocess.run(
        [sys.executable, str(folder / "engine.py"), "build"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "made for TensorRT 10, and this is 8.6.2" in done.stderr
    (folder / "tensorrt.py").write_text('raise ImportError("libnvinfer.so.10")\n')
    done = subprocess.run(
        [sys.executable, str(folder / "engine.py"), "compare"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "TensorRT for Python is missing (libnvinfer.so.10)" in done.stderr
    done = subprocess.run([sys.executable, str(folder / "engine.py")], capture_output=True, text=True, check=False)
    assert (done.returncode, "usage" in done.stderr) == (2, True)


_OF_OTHER_GENERATIONS = {10: {"NetworkDefinitionCreationFlag.EXPLICIT_BATCH"}, 11: {"NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "BuilderFlag.INT8"}}  # fmt: skip
"""Names in the Python script that stand behind a question about the generation."""

_METHODS = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "OnnxParser": "parse_from_file num_errors get_error",
    "IBuilderConfig": "profiling_verbosity set_flag add_optimization_profile",
    "IOptimizationProfile": "set_shape",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "num_layers num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype create_execution_context "
    "create_engine_inspector",
    "IExecutionContext": "set_input_shape set_tensor_address get_tensor_shape execute_async_v3",
    "EngineInspector": "get_engine_information",
}


@pytest.mark.parametrize("number", [10, 11])
def test_the_python_script_speaks_the_language_of_nvidias_bindings(tmp_path: Path, float_network: Path, number):
    made = write_bundle(tmp_path / "out", float_network, TARGETS[number])
    text = (made.folder / "engine.py").read_text()
    names = set(re.findall(r"\btrt\.([A-Za-z]\w+(?:\.[A-Z]\w*)?)", text)) - _OF_OTHER_GENERATIONS[number]
    assert len(names) > 10
    wanted = sorted(names | {f"{kind}.{name}" for kind, words in _METHODS.items() for name in words.split()})
    for words in _METHODS.values():
        assert all(f".{name}" in text for name in words.split())
    real = bindings(number)
    code = (
        "import functools\n"
        "for name in sys.argv[1:]:\n"
        "    functools.reduce(getattr, name.split('.'), trt)\n"
    )  # fmt: skip
    real.run(code, *wanted)
    # The stand-ins of its libraries have no builder, as a machine without a GPU has none.
    start = "import runpy\nsys.argv[:] = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    done = real.run(start, str(made.folder / "engine.py"), "build", check=False)
    assert done.returncode == 2, done.stderr
    assert "found no GPU" in done.stderr


def test_names_that_a_script_cannot_hold_are_refused(tmp_path: Path, float_network: Path):
    odd = tmp_path / "a b;rm.onnx"
    odd.write_bytes(float_network.read_bytes())
    with pytest.raises(UsageError, match="cannot stand in a script"):
        write_bundle(tmp_path / "out", odd, TARGETS[10])
    proto = onnx.load(float_network)
    proto.graph.input[0].name = "a b"
    for node in proto.graph.node:
        node.input[:] = ["a b" if name == "image" else name for name in node.input]
    path = tmp_path / "odd.onnx"
    onnx.save(proto, path)
    with pytest.raises(UsageError, match="input 'a b'"):
        write_bundle(tmp_path / "out", path, TARGETS[10])
    with pytest.raises(EngineError, match="missing"):
        write_bundle(tmp_path / "out", tmp_path / "nobody.onnx", TARGETS[10])
    with pytest.raises(UsageError, match="goes with the float network"):
        write_bundle(tmp_path / "out", float_network, TARGETS[10], cache=float_network)


class Images:
    """What a build reads of a calibration set."""

    digest = "d" * 64
    manifest = None

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def take(self, start: int, stop: int | None = None) -> Images:
        return Images(self.array[start:stop])

    def batches(self, size: int):
        for place in range(0, len(self.array), size):
            yield {"image": self.array[place : place + size]}


@pytest.mark.parametrize("number", TARGETS)
def test_a_build_writes_the_folder(tmp_path: Path, number):
    model = network("residual")
    ranges = Ranges(ranges_of(model), "minmax", model_digest=model.folded().graph.digest)
    options = BuildOptions(exact_scales=True, bias_correction=True)
    x = images(model, 24)
    engine = build(model, ranges, TARGETS[number], tmp_path / "a", options=options, calibration=Images(x))
    again = build(model, ranges, TARGETS[number], tmp_path / "b", options=options, calibration=Images(x))
    assert engine.path == engine.qdq_path == tmp_path / "a" / "qdq.onnx"
    assert engine.path.read_bytes() == again.path.read_bytes()
    onnx.checker.check_model(str(engine.path))
    found = np.load(tmp_path / "a" / "samples.npz", allow_pickle=False)
    assert np.array_equal(found["input:image"], x[:8])
    assert np.array_equal(found["output:logits"], outputs(Graph.load(engine.path), x[:8])["logits"])
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["target"] == f"tensorrt-{number}"
    held = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert set(manifest["bundle"]) == held - {"manifest.json"}
    assert ("calibration.cache" in held) == (number < 11)
    assert manifest["choices"]["findings"] == []
    assert any("biases corrected" in note for note in manifest["choices"]["notes"])
    assert manifest["choices"]["notes"][-1].startswith("expected: 4 kernels, 4 of them in 8 bits")
    assert "python3 engine.py compare" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize(("number", "digits"), [(8, "8502"), (10, "101303")])
def test_the_ranges_also_serve_the_float_network(tmp_path: Path, number, digits):
    model = network("residual")
    found = ranges_of(model)
    dead = next(name for name in found if name != "image")
    ranges = Ranges({**found, dead: (0.0, 0.0), "nowhere": (0.0, 1.0)}, "minmax", set_digest="d" * 64)
    x = images(model, 8)
    folder = build(model, ranges, TARGETS[number], tmp_path / "out", calibration=Images(x)).path.parent
    # TensorRT's own cache, with what it belongs to
    network_digest = Graph.load(folder / "float.onnx").digest
    binding = check_binding(folder / "calibration.cache", model_digest=network_digest, set_digest="d" * 64)
    assert (binding.method, binding.source) == ("minmax", "zsq")
    cache = read_cache(folder / "calibration.cache")
    cache.check_reader(CACHE_VERSION[number], "EntropyCalibration2")
    assert cache.check_names(found) == [dead]
    for name in set(found) - {dead}:
        low, high = found[name]
        assert cache.scales[name] == np.float32(max(-low, high) / 127)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert any(dead in note and "without a scale" in note for note in manifest["choices"]["notes"])
    # ONNX Runtime's table holds the same
    table = read_table(folder / "onnxruntime" / "calibration.flatbuffers")
    assert set(table) == set(cache.scales)
    assert compare_files(folder / "onnxruntime" / "calibration.flatbuffers", folder / "calibration.cache").equal
    # The script writes the version of the device's TensorRT into a copy: any other is ignored without a word.
    tool = fake_trtexec(tmp_path, digits)
    done = run(folder, "implicit", TRTEXEC=str(tool))
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called.txt").read_text().split("\n")
    assert {"--onnx=float.onnx", "--saveEngine=implicit.plan", "--int8", "--calib=implicit.cache"} <= set(called)
    assert "--fp16" not in called
    assert "--stronglyTyped" not in called
    copied = read_cache(folder / "implicit.cache")
    assert (copied.version, copied.scales) == (int(digits), cache.scales)
    assert run(folder, "implicit", TRTEXEC=str(tool), HALF="1").returncode == 0
    assert "--fp16" in (tmp_path / "called.txt").read_text().split("\n")
    (folder / "implicit.plan").touch()
    assert run(folder, "time", TRTEXEC=str(tool)).returncode == 0
    silent = run(folder, "implicit", TRTEXEC=str(fake_trtexec(tmp_path, "")))
    assert (silent.returncode, "version is needed" in silent.stderr) == (1, True)
    readme = (folder / "README.md").read_text()
    assert "bash trtexec.sh implicit" in readme
    assert "onnxruntime/calibration.flatbuffers" in readme
    assert '"trt_engine_cache_path": "onnxruntime"' in readme


def test_a_folder_without_a_cache_has_no_second_way(tmp_path: Path):
    model = network("residual")
    folder = build(model, Ranges(ranges_of(model), "minmax"), TARGETS[11], tmp_path / "11").path.parent
    done = run(folder, "implicit", TRTEXEC=str(fake_trtexec(tmp_path, "110401")))
    assert (done.returncode, "no second way" in done.stderr) == (2, True)
    assert "calibration.cache" not in (folder / "README.md").read_text()
    nothing = Ranges(dict.fromkeys(ranges_of(model), (0.0, 0.0)), "minmax")
    assert write_implicit(tmp_path, model.folded().graph, nothing, TARGETS[10]) is None
    assert not (tmp_path / "calibration.cache").exists()


def test_four_bit_weights_are_built(tmp_path: Path):
    model = network("transformer")
    engine = build(model, None, TARGETS[10], tmp_path, options=BuildOptions(bits="w4a32"))
    graph = Graph.load(engine.path)
    assert graph.opset == 21
    assert graph.proto.ir_version == 10
    assert any(array.data_type == onnx.TensorProto.INT4 for array in graph.proto.graph.initializer)


def test_choosing_says_that_nothing_was_run(tmp_path: Path):
    model = network("residual")
    ranges = Ranges(ranges_of(model), "minmax")
    choice = choose(model, ranges, TARGETS[10], tmp_path, images=[{"image": images(model)}])
    assert choice.engine.path.is_file()
    assert choice.chosen.sqnr_db > 20
    assert "before any engine was built" in choice.notes[0]
    with pytest.raises(CalibrationError, match="no images"):
        choose(model, ranges, TARGETS[10], tmp_path, images=[])


def test_running_is_refused_with_what_to_do(tmp_path: Path):
    backend = get_backend("tensorrt-10")
    with pytest.raises(EngineError, match="on the device") as caught:
        backend.runner(tmp_path / "qdq.onnx", TARGETS[10])
    assert "trtexec.sh build" in str(caught.value)
    assert backend.float_modes(TARGETS[10]) == {}
    assert "TensorRT 10" in missing_features(TARGETS[10])[0]
    assert backend.device_facts(TARGETS[11])["wanted"] == "TensorRT 11"


def test_zsq_deploy_is_refused_before_anything_is_made(tmp_path: Path, float_network: Path):
    from zsq_deploy.pipeline import deploy
    from zsq_deploy.recipe import Recipe

    recipe = Recipe.model_validate({"model": {"source": str(float_network)}, "targets": ["tensorrt-10"]})
    with pytest.raises(EngineError, match="on the device") as caught:
        deploy(recipe, tmp_path / "out")
    assert "zsq quantize --target tensorrt-10" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_targets_and_what_they_refuse():
    assert [name for name in target_names() if name.startswith("tensorrt-")] == [f"tensorrt-{n}" for n in TARGETS]
    for target in TARGETS.values():
        assert target.runtime == "tensorrt"
        assert any("Jetson" in note for note in target.notes)
        assert (str(target.activation), str(target.weight)) == (
            "s8 symmetric per tensor",
            "s8 symmetric per channel restricted",
        )
    for settings, said in (
        (BuildSettings(quantizer="nncf"), "does not quantize"),
        (BuildSettings(bits="w4a8"), "does not build 'w4a8'"),
        (BuildSettings(quantize_outputs=True), "stay in float"),
        (BuildSettings(compress_weights="int8_sym"), "OpenVINO only"),
        (BuildSettings(bits="w4a32"), "no 4-bit weights"),
    ):
        with pytest.raises(UsageError, match=said):
            options_from(settings, TARGETS[8])
    assert options_from(BuildSettings(bits="w4a32"), TARGETS[11]).weight_only


def test_nothing_here_loads_tensorrt():
    code = (
        "import sys; from zsq_deploy.backends import get_backend; get_backend('tensorrt-10'); "
        "assert not [name for name in sys.modules if name.split('.')[0].startswith('tensorrt')], 'loaded'"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
