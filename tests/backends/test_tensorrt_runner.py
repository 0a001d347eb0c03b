"""Engines run, checked and asked what they compute in, on a pretended device; and what is said where there is none.

Numbers come from ONNX Runtime behind hand-written stand-ins of TensorRT's runtime and of libcudart (``tensorrt_fake/tensorrt.py``), through
NVIDIA's own types; so what is tested is our side of it: addresses, shapes, types, batches, memory, files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.tensorrt import library
from zsq_deploy.backends.tensorrt.cuda import Gpu
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import place_qdq
from zsq_deploy.backends.tensorrt.plan import check_plan
from zsq_deploy.cli.inspecting import describe_thing
from zsq_deploy.errors import EngineError, StaleArtifactError

from .tensorrt_device import VERSIONS, device
from .tensorrt_networks import images, network, outputs, ranges_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


def folder_of(number: int, folder: Path) -> Path:
    """``qdq.onnx``, ``float.onnx``, inputs and what they should give."""
    model = network("residual")
    graph = model.folded().graph
    placed = place_qdq(graph, ranges_of(model), get_target(f"tensorrt-{number}"), BuildOptions()).graph
    onnx.save(graph.editable(), folder / "float.onnx")
    onnx.save(placed.editable(), folder / "qdq.onnx")
    x = images(model, 5)
    np.savez(folder / "x.npz", x=x, qdq=outputs(placed, x)["logits"], float=outputs(graph, x)["logits"])
    return folder


HEAD = """
import ctypes, gc, json, sys
from pathlib import Path
import numpy as np
from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.tensorrt.plan import PlanSettings
from zsq_deploy.errors import ZsqError
target = get_target(f"tensorrt-{sys.argv[1]}")
folder = Path(sys.argv[2])
backend = get_backend(target)
found = np.load(folder / "x.npz")
x = found["x"]
cudart = ctypes.CDLL("libcudart.so")

def refused(kind, *words, **more):
    def call(function, *given):
        try:
            function(*given, **more)
        except ZsqError as error:
            assert type(error).__name__ == kind and all(word in str(error) for word in words), str(error)
        else:
            raise AssertionError(words)
    return call
"""

RUNS = (
    HEAD
    + """
engine = Engine(folder / "qdq.onnx", folder / "qdq.onnx", target, folder / "float.onnx", {"mode": "explicit"})
backend.check_runs(target)
assert backend.missing_features(target) == ()
built = backend.prepare(engine)
assert built.path == folder / "engine.plan" and built.choices["plan"]["gpu"] == "Pretended GPU"
modes = backend.float_modes(target)
names = {8: {"float32", "tf32", "float16"}, 10: {"float32", "tf32", "float16", "bfloat16"}, 11: {"float32", "tf32", "float16"}}
assert set(modes) == names[int(sys.argv[1])] and modes["float32"] == {}
assert {path.stem for path in folder.glob("*.plan")} == {"engine", "unfused", *modes}
assert not list(folder.glob("*.part")) and not list(folder.glob(".*"))
before = (folder / "engine.plan").stat().st_mtime_ns
assert backend.prepare(built).path == built.path
assert (folder / "engine.plan").stat().st_mtime_ns == before  # nothing is built twice

runner = backend.runner(built.path, target)
assert runner.input_names == ("image",) and runner.output_names == ("logits",) and runner.load_ms > 0
got = runner.run({"image": x})["logits"]  # built for batch 1: five runs
step = np.abs(found["qdq"]).max() / 127
assert got.shape == (5, 5) and np.abs(got - found["qdq"]).max() < 2 * step
assert np.array_equal(runner.run({"image": x[2:3]})["logits"], got[2:3])
assert runner.device_ms > 0
assert got.base is None or not np.shares_memory(got, runner.run({"image": x})["logits"])
unfused = backend.runner(built.path, target, mode="unfused").run({"image": x})["logits"]
assert np.abs(unfused - found["qdq"]).max() < 1e-5
floats = backend.runner(engine.float_path, target, mode="float")
assert np.abs(floats.run({"image": x})["logits"] - found["float"]).max() < 1e-5
half = backend.runner(engine.float_path, target, mode="float", session=modes["float16"])
assert 1e-6 < np.abs(half.run({"image": x})["logits"] - found["float"]).max() < 1e-2

records = runner.kernels({"image": x[:1]})
products = {name: record for record in records for name in record.sources if record.macs}
assert {name: record.integer for name, record in products.items()} == dict.fromkeys(("n_stem", "n_left", "n_right", "n_logits"), True)
assert sum(record.macs for record in records) == 87592 and sum(record.microseconds for record in records) > 0
assert any(record.reason == "conversion from float to 8-bit integers" for record in records)
assert {record.reason for record in floats.kernels({"image": x[:1]})} == {"built in float (float32)"}
refused("EngineError", "no exact integer reference")(backend.integer_reference, engine)
facts = backend.device_facts(target)
assert facts["name"] == "Pretended GPU" and facts["compute capability"] == "8.7" and facts["cuda runtime"] == "12.6"

# Everything is given back: by hand, or when the runner is gone.
floats.close()
floats.close()
del runner, half, floats
gc.collect()
assert cudart.blocks() == 0 and cudart.open_handles() == 0

# The process that measures latency opens engines by names.
from zsq_deploy.backends.tensorrt.runner import open_runner
child = open_runner(str(engine.float_path), target.name, threads=2, mode="float", session=modes["float16"])
assert child.plan.name == "float16.plan"
"""
)


@pytest.mark.parametrize("number", tuple(VERSIONS))
def test_engines_run_and_tell_what_they_compute_in(number: int, home: Path, tmp_path: Path) -> None:
    device(number, home).run(RUNS, str(number), str(folder_of(number, tmp_path)))


WRONG = (
    HEAD
    + """
refused("EngineError", "holds no Q/DQ")(backend.runner, folder / "float.onnx", target)
runner = backend.runner(folder / "qdq.onnx", target)  # built where it is missing
assert runner.plan == folder / "engine.plan" and runner.fixed_batch is None
refused("EngineError", "the network's inputs are image")(runner.run, {"data": x})
refused("EngineError", "image has the shape [-1, 3, 8, 8]", "float32[5, 3, 8, 9]")(runner.run, {"image": np.zeros((5, 3, 8, 9), np.float32)})
refused("EngineError", "image has the type float32")(runner.run, {"image": x.astype(np.float64)})
refused("EngineError", "takes batches of 1")(runner.run, {"image": x[:0]})
refused("UsageError", "unknown mode", mode="best")(backend.runner, folder / "qdq.onnx", target)
big = backend.prepare(
    Engine(folder / "qdq.onnx", folder / "qdq.onnx", target, folder / "float.onnx", {"mode": "explicit"}), settings=PlanSettings(batch=4)
)
assert json.loads((folder / "float32.plan.json").read_text())["settings"]["batch"] == 4
for size in (1, 4, 5):  # 5 does not fit: 4 and 1
    got = backend.runner(folder / "float.onnx", target, mode="float").run({"image": x[:size]})["logits"]
    assert np.abs(got - found["float"][:size]).max() < 1e-5, size
plan = folder / "engine.plan"
data = plan.read_bytes()
plan.write_bytes(data[:-1])
refused("StaleArtifactError", "damaged, or was changed")(backend.runner, plan, target)
plan.write_bytes(data)
record = json.loads((folder / "engine.plan.json").read_text())
for change, said in (
    ({"tensorrt": "10.3.0"}, "built by TensorRT 10.3.0, and this is TensorRT"),
    ({"gpu": "Orin"}, "built for Orin (compute capability 8.7), and the GPU here is Pretended GPU"),
    ({"capability": "7.2"}, "compute capability 7.2"),
):
    (folder / "engine.plan.json").write_text(json.dumps({**record, **change}))
    refused("StaleArtifactError", said, "remove this file")(backend.runner, plan, target)
(folder / "engine.plan.json").write_text("{}")
refused("EngineError", "cannot be understood")(backend.runner, plan, target)
(folder / "engine.plan.json").write_text(json.dumps(record))
(folder / "qdq.onnx").write_bytes((folder / "float.onnx").read_bytes())
refused("StaleArtifactError", "built from another network than qdq.onnx is now")(backend.runner, folder / "qdq.onnx", target)
(folder / "engine.plan.json").unlink()
refused("EngineError", "was not built by zsq")(backend.runner, plan, target)
refused("EngineError", "no such engine")(backend.runner, folder / "nobody.plan", target)
plan.write_bytes(b"nonsense")
(folder / "engine.plan.json").write_text(json.dumps({**record, "plan_sha256": __import__("hashlib").sha256(b"nonsense").hexdigest()}))
refused("EngineError", "does not take this engine: The engine plan file is not compatible")(backend.runner, plan, target)
"""
)


def test_what_does_not_fit_is_refused(home: Path, tmp_path: Path) -> None:
    device(10, home).run(WRONG, "10", str(folder_of(10, tmp_path)))


KINDS = (
    HEAD
    + """
from onnx import TensorProto, helper, numpy_helper
import onnx
# Whole numbers as input, two inputs, a scalar output: shapes and types as the engine tells them.
table = numpy_helper.from_array(np.arange(40, dtype=np.float32).reshape(10, 4), "table")
axes = numpy_helper.from_array(np.array([0, 1, 2]), "axes")
nodes = [
    helper.make_node("Gather", ["table", "places"], ["rows"], name="rows"),
    helper.make_node("Add", ["rows", "more"], ["sum"], name="sum"),
    helper.make_node("ReduceSum", ["sum", "axes"], ["total"], name="total", keepdims=0),
]
value = helper.make_tensor_value_info
graph = helper.make_graph(
    nodes, "g",
    [value("places", TensorProto.INT64, [2, 3]), value("more", TensorProto.FLOAT, [2, 3, 4])],
    [value("sum", TensorProto.FLOAT, [2, 3, 4]), value("total", TensorProto.FLOAT, [])],
    [table, axes],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "float.onnx")
runner = backend.runner(folder / "float.onnx", target, mode="float")
places, more = np.array([[1, 2, 3], [4, 5, 9]]), np.ones((2, 3, 4), np.float32)
got = runner.run({"places": places, "more": more})
wanted = np.arange(40, dtype=np.float32).reshape(10, 4)[places] + more
assert np.array_equal(got["sum"], wanted) and got["total"].shape == () and got["total"] == wanted.sum()
assert runner.fixed_batch == 2
refused("EngineError", "total is one number for all samples, and the engine takes 2")(
    runner.run, {"places": np.concatenate([places, places]), "more": np.concatenate([more, more])}
)
refused("EngineError", "takes batches of 2")(runner.run, {"places": places[:1], "more": more[:1]})
refused("EngineError", "different numbers of samples")(runner.run, {"places": places, "more": np.concatenate([more, more])})
if int(sys.argv[1]) == 8:  # reads int64 as int32
    refused("EngineError", "places has the type int32")(runner.run, {"places": places + 2**40, "more": more})
"""
)


@pytest.mark.parametrize("number", [8, 10])
def test_inputs_of_other_kinds(number: int, home: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros(1))
    device(number, home).run(KINDS, str(number), str(tmp_path))


def test_an_implicit_engine_is_built_with_its_cache(home: Path, tmp_path: Path) -> None:
    from zsq_deploy.backends.tensorrt.cache import CalibrationCache
    from zsq_deploy.backends.tensorrt.reference import reference_of_cache

    model = network("residual")
    graph = model.folded().graph
    cache = CalibrationCache.from_ranges(ranges_of(model), version="8.6.2")
    (tmp_path / "calibration.cache").write_bytes(cache.to_bytes())
    for name in ("float", "network"):
        onnx.save(graph.editable(), tmp_path / f"{name}.onnx")
    onnx.save(reference_of_cache(graph, cache).graph.editable(), tmp_path / "implicit.onnx")
    x = images(model, 2)
    np.savez(tmp_path / "x.npz", x=x, float=outputs(graph, x)["logits"])
    code = """
engine = Engine(folder / "network.onnx", folder / "implicit.onnx", target, folder / "float.onnx", {"mode": "implicit"})
built = backend.prepare(engine)
head = json.loads(built.path.read_bytes().split(b"\\n")[1])
assert "image" in head["scales"] and "INT8" in head["flags"], head
assert built.choices["plan"]["mode"] == "implicit"
assert json.loads((folder / "unfused.plan.json").read_text())["network"] == "implicit.onnx"
assert backend.prepare(built) .path == built.path
runner = backend.runner(built.path, target)
assert np.abs(runner.run({"image": x})["logits"] - found["float"]).max() < 1e-5
assert not any(record.integer for record in runner.kernels({"image": x[:1]}))  # the pretended engine computes in float
"""
    device(10, home).run(HEAD + code, "10", str(tmp_path))


MISSING = {
    "another generation": ({}, 10, 11, "tensorrt-11 is for TensorRT 11, and TensorRT 10.", "--target tensorrt-10"),
    "too old": ({"PRETEND_TENSORRT": "8.4.1"}, 10, 8, "too old", "8.5 or later"),
    "no GPU": ({"PRETEND_DEVICES": "0"}, 10, 10, "installed here, but there is no GPU", "nvidia-smi"),
}


@pytest.mark.parametrize("case", MISSING)
def test_one_clear_error_for_what_is_missing(case: str, home: Path) -> None:
    more, number, wanted, said, todo = MISSING[case]
    code = """
import json, sys
from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.errors import EngineError
target = get_target(f"tensorrt-{sys.argv[1]}")
backend = get_backend(target)
try:
    backend.check_runs(target)
except EngineError as error:
    (lacks,) = backend.missing_features(target)
    assert backend.float_modes(target) == {} and backend.device_facts(target)["missing"] == lacks
    print(json.dumps([error.what, error.remedy, lacks]))
"""
    what, remedy, lacks = json.loads(device(number, home).run(code, str(wanted), **more).stdout)
    assert said in what
    assert todo in remedy
    assert f"zsq quantize --target tensorrt-{wanted}" in remedy
    assert f"TensorRT {wanted}" in lacks


def test_without_tensorrt_everything_says_what_to_do(tmp_path: Path) -> None:
    if library.installed():
        pytest.skip("TensorRT is installed here")
    target = get_target("tensorrt-10")
    backend = get_backend(target)
    engine = Engine(tmp_path / "qdq.onnx", tmp_path / "qdq.onnx", target, tmp_path / "float.onnx")
    for call in (
        lambda: backend.check_runs(target),  # type: ignore[attr-defined]
        lambda: backend.runner(tmp_path / "qdq.onnx", target),
        lambda: backend.prepare(engine),  # type: ignore[attr-defined]
    ):
        with pytest.raises(EngineError, match="not installed here") as caught:
            call()
        assert "zsq quantize --target tensorrt-10" in str(caught.value)
        assert "pip install 'tensorrt-cu12>=10,<11'" in str(caught.value)


def test_a_package_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text('raise ImportError("libnvinfer.so.10: cannot open shared object file")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=r"cannot be loaded: libnvinfer\.so\.10") as caught:
        library.load(get_target("tensorrt-10"))
    assert "LD_LIBRARY_PATH" in str(caught.value)


def test_versions_are_compared_as_numbers() -> None:
    assert library.numbers("10.16.1.11") == (10, 16, 1, 11)
    assert library.numbers("8.5.2+cuda11") == (8, 5, 2)
    assert library.numbers("8.10.0") > library.OLDEST


def test_a_plan_without_its_record(tmp_path: Path) -> None:
    plan = tmp_path / "engine.plan"
    gpu = Gpu("Orin", (8, 7), "12.6", "12.6")
    with pytest.raises(EngineError, match="no such engine"):
        check_plan(plan, version="10.3.0", gpu=gpu)
    plan.write_bytes(b"x")
    with pytest.raises(EngineError, match="was not built by zsq"):
        check_plan(plan, version="10.3.0", gpu=gpu)
    record = {
        "network": "q.onnx", "network_sha256": "0", "settings": {"mode": "explicit"}, "tensorrt": "10.3.0", "gpu": "Orin", "capability": "8.7",
        "cuda": "12.6", "plan_sha256": "0", "bytes": 1, "seconds": 1.0, "cache_sha256": "", "layers": 1, "warnings": [],
    }  # fmt: skip
    (tmp_path / "engine.plan.json").write_text(json.dumps(record))
    described = describe_thing(str(plan))
    assert (described["kind"], described["gpu"], described["settings"]) == (
        "TensorRT engine",
        "Orin",
        {"mode": "explicit"},
    )
    with pytest.raises(StaleArtifactError, match="damaged"):
        check_plan(plan, version="10.3.0", gpu=gpu)
    with pytest.raises(StaleArtifactError, match=r"built by TensorRT 10\.3\.0, and this is TensorRT 10\.4\.0"):
        check_plan(plan, version="10.4.0", gpu=gpu)
