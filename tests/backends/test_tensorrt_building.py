"""Building engines with NVIDIA's own enumerations and base classes; the builder behind them is pretended (``tensorrt_fake/tensorrt.py``).

The pretended classes have no name that NVIDIA's do not have, and refuse what TensorRT refuses: precision flags on strongly typed networks,
Q/DQ without the flag INT8 on weakly typed ones, caches of another version, open sizes without a profile.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.building import flags_of
from zsq_deploy.backends.tensorrt.cache import CalibrationCache
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import place_qdq
from zsq_deploy.backends.tensorrt.plan import PlanSettings
from zsq_deploy.errors import UsageError

from .tensorrt_bindings import bindings
from .tensorrt_device import VERSIONS, Device, device
from .tensorrt_networks import network, ranges_of

GENERATIONS = tuple(VERSIONS)

BUILD = """
import json, sys
from pathlib import Path
import tensorrt as trt
from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.building import build_plan, timing_cache_path
from zsq_deploy.backends.tensorrt.library import gpu, load
from zsq_deploy.backends.tensorrt.plan import PlanSettings
from zsq_deploy.errors import ZsqError
from zsq_deploy.progress import Silent

said = []
class Watch(Silent):
    def task(self, title, total):
        said.append((title, total))
        return super().task(title, total)

name, network, plan, settings, cache = sys.argv[1:6]
target = get_target(name)
device = gpu(target)
times = timing_cache_path(trt.__version__, device)
try:
    record = build_plan(
        load(target), Path(network), Path(plan), target, PlanSettings(**json.loads(settings)), device,
        cache=Path(cache) if cache else None, timing_cache=times, progress=Watch(),
    )
except (ZsqError, KeyboardInterrupt) as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
else:
    head = json.loads(Path(plan).read_bytes().split(b"\\n")[1])
    print(json.dumps({"head": head, "warnings": record.warnings, "said": said, "times": times.name}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    model = network("residual")
    graph = model.folded().graph
    onnx.save(graph.editable(), folder / "float.onnx")
    for number in GENERATIONS:
        placed = place_qdq(graph, ranges_of(model), get_target(f"tensorrt-{number}"), BuildOptions())
        onnx.save(placed.graph.editable(), folder / f"qdq{number}.onnx")
    cache = CalibrationCache.from_ranges(ranges_of(model), version="8.5.2")
    (folder / "calibration.cache").write_bytes(cache.to_bytes())
    return folder


def build(machine: Device, home: Path, plan: Path, cache: Path | str = "", network: str = "", **settings):
    mode = settings.get("mode", "explicit")
    file = home / (network or (f"qdq{machine.generation}.onnx" if mode == "explicit" else "float.onnx"))
    more = {key: settings.pop(key) for key in list(settings) if key.startswith("PRETEND")}
    words = (f"tensorrt-{machine.generation}", str(file), str(plan), json.dumps(settings), str(cache))
    return json.loads(machine.run(BUILD, *words, **more).stdout.splitlines()[-1])


FLAGS = {
    (8, "explicit", "float32"): (("EXPLICIT_BATCH",), {"INT8"}, True),
    (8, "explicit", "float16"): (("EXPLICIT_BATCH",), {"INT8", "FP16"}, False),
    (8, "implicit", "float32"): (("EXPLICIT_BATCH",), {"INT8"}, True),
    (8, "float", "float32"): (("EXPLICIT_BATCH",), set(), True),
    (8, "float", "tf32"): (("EXPLICIT_BATCH",), set(), False),
    (8, "float", "float16"): (("EXPLICIT_BATCH",), {"FP16"}, False),
    (10, "explicit", "float32"): (("STRONGLY_TYPED",), set(), True),
    (10, "explicit", "tf32"): (("STRONGLY_TYPED",), set(), False),
    (10, "explicit", "float16"): ((), {"INT8", "FP16"}, False),
    (10, "implicit", "float32"): ((), {"INT8"}, True),
    (10, "float", "float32"): ((), set(), True),
    (10, "float", "bfloat16"): ((), {"BF16"}, False),
    (11, "explicit", "float32"): ((), set(), True),
    (11, "float", "float32"): ((), set(), True),
    (11, "float", "tf32"): ((), set(), False),
}


@pytest.mark.parametrize(("number", "mode", "floats"), FLAGS, ids=str)
def test_flags_by_generation(number: int, mode: str, floats: str) -> None:
    found = flags_of(get_target(f"tensorrt-{number}"), PlanSettings(mode=mode, floats=floats))
    wanted = FLAGS[number, mode, floats]
    assert (found.network, set(found.on), found.off == ("TF32",)) == wanted


@pytest.mark.parametrize("number", [10, 11])
def test_all_flags_are_nvidias(number: int) -> None:
    names = {
        (n, "BuilderFlag", flag)
        for (n, *_), (_, on, off) in FLAGS.items()
        for flag in (*on, *(["TF32"] if off else []))
    }
    names |= {(n, "NetworkDefinitionCreationFlag", flag) for (n, *_), (flags, *_) in FLAGS.items() for flag in flags}
    mine = sorted(f"{kind}.{flag}" for n, kind, flag in names if n == number or (number == 10 and n == 8))
    assert len(mine) >= (6 if number == 10 else 1)
    bindings(number).run(
        "for name in sys.argv[1:]:\n    kind, flag = name.split('.')\n    getattr(getattr(trt, kind), flag)", *mine
    )


def test_settings_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="neither calibrators"):
        flags_of(get_target("tensorrt-11"), PlanSettings(mode="implicit"))
    with pytest.raises(UsageError, match="no bfloat16"):
        flags_of(get_target("tensorrt-8"), PlanSettings(mode="float", floats="bfloat16"))
    for wrong in ({"mode": "best"}, {"floats": "int8"}, {"effort": 6}, {"batch": 0}, {"workspace_mib": 0}):
        with pytest.raises(UsageError):
            PlanSettings(**wrong)


@pytest.mark.parametrize("number", GENERATIONS)
def test_engines_are_built(number: int, home: Path, tmp_path: Path) -> None:
    machine = device(number, home)
    found = build(machine, home, tmp_path / "engine.plan", batch=4, workspace_mib=64, effort=2)
    head = found["head"]
    assert head["shapes"] == {"image": [[1, 3, 8, 8], [4, 3, 8, 8], [4, 3, 8, 8]]}
    assert head["limits"] == {"WORKSPACE": 64 << 20}
    assert head["effort"] == 2
    assert head["detailed"]
    assert "TF32" not in head["flags"]
    assert found["warnings"] == ["a warning of the builder"]
    # Progress comes from TensorRT's monitor, where it has one (10 and later): one bar, of the outermost phase.
    assert found["said"] == [[f"build qdq{number} (explicit, float32)", 2.0 if number >= 10 else 1]]
    layers = (tmp_path / "engine.layers.json").read_text()
    assert "Int8" in layers
    assert "N/A due to dynamic shapes" not in layers
    log = (tmp_path / "engine.build.log").read_text()
    assert "[WARNING] a warning of the builder" in log
    assert "not kept" not in log
    record = json.loads((tmp_path / "engine.plan.json").read_text())
    assert (record["tensorrt"], record["gpu"], record["capability"]) == (machine.version, "Pretended GPU", "8.7")
    assert record["settings"]["batch"] == 4
    # The times of kernels are kept for the next build on this machine, and for no other.
    assert found["times"] == f"timing-{machine.version}-Pretended-GPU-8.7.cache"
    assert head["times"] == ""
    again = build(machine, home, tmp_path / "again.plan", mode="float", floats="tf32")
    assert again["head"]["times"] == f"times of {machine.version}"
    assert "TF32" in again["head"]["flags"]
    kept = home / "cache" / "zsq-deploy" / "tensorrt" / found["times"]
    kept.write_bytes(b"times of another TensorRT")
    assert build(machine, home, tmp_path / "third.plan", mode="float")["head"]["times"] == ""
    assert kept.read_bytes() == f"times of {machine.version}".encode()


@pytest.mark.parametrize("number", [8, 10])
def test_a_cache_of_another_version_reaches_the_builder(number: int, home: Path, tmp_path: Path) -> None:
    machine = device(number, home)
    found = build(machine, home, tmp_path / "engine.plan", home / "calibration.cache", mode="implicit")
    # The pretended TensorRT takes scales only from a cache whose first line names its own version.
    assert "image" in found["head"]["scales"]
    assert "INT8" in found["head"]["flags"]
    assert json.loads((tmp_path / "engine.plan.json").read_text())["cache_sha256"]


def test_what_goes_wrong_is_said_in_tensorrts_words(home: Path, tmp_path: Path) -> None:
    machine = device(10, home)
    plan = tmp_path / "engine.plan"
    failed = build(machine, home, plan, PRETEND_NO_BUILD="1")
    assert failed["error"] == "EngineError"
    assert "Could not find any implementation for node n_left" in failed["text"]
    assert "Could not find any implementation" in (tmp_path / "engine.build.log").read_text()
    none = build(machine, home, plan, PRETEND_NO_BUILDER="1")
    assert "CUDA initialization failure with error: 35" in none["text"]
    assert "driver" in none["text"]
    assert not plan.exists()
    assert not (tmp_path / "engine.plan.json").exists()

    odd = onnx.load(home / "float.onnx")
    odd.graph.node.append(onnx.helper.make_node("NonZero", ["logits"], ["places"], name="select"))
    onnx.save(odd, home / "odd.onnx")
    refused = build(machine, home, plan, network="odd.onnx", mode="float")
    assert "cannot read this network: no importer for NonZero (select)" in refused["text"]
    assert "is missing" in build(machine, home, plan, network="nobody.onnx", mode="float")["text"]
    assert "needs a calibration cache" in build(machine, home, plan, mode="implicit")["text"]

    wide = onnx.load(home / "float.onnx")
    wide.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    onnx.save(wide, home / "wide.onnx")
    assert "open sizes beside the batch" in build(machine, home, plan, network="wide.onnx", mode="float")["text"]


INTERRUPTED = """
import sys
from contextlib import contextmanager
from zsq_deploy.backends.tensorrt.watching import make_monitor
import tensorrt as trt

class Stop:
    @contextmanager
    def task(self, title, total):
        class Bar:
            def advance(self, steps=1, **values):
                raise KeyboardInterrupt
        yield Bar()

monitor, finish = make_monitor(trt, Stop(), "build")
assert isinstance(monitor, trt.IProgressMonitor)
monitor.phase_start("a", None, 2)
assert monitor.step_complete("a", 0) is False  # TensorRT ends the build
monitor.phase_finish("a")
try:
    finish()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("number", [10, 11])
def test_ctrl_c_ends_a_build(number: int) -> None:
    assert bindings(number).run(INTERRUPTED).stdout == "interrupted\n"


LISTENS = """
import logging
from zsq_deploy.backends.tensorrt.watching import LOGGER, Log, make_log, make_times
import tensorrt as trt

seen = []
class Keep(logging.Handler):
    def emit(self, record):
        seen.append((record.levelname, record.getMessage()))
LOGGER.addHandler(Keep())
LOGGER.setLevel(logging.DEBUG)
log = Log()
logger = make_log(trt, log)
assert isinstance(logger, trt.ILogger)
for level in ("VERBOSE", "INFO", "WARNING", "WARNING", "ERROR", "INTERNAL_ERROR"):
    logger.log(getattr(trt.ILogger, level), f"{level} said\\nmore")
assert [level for level, _ in seen] == ["DEBUG", "INFO", "WARNING", "WARNING", "ERROR", "CRITICAL"]
assert log.warnings == ["WARNING said\\nmore"] and len(log.errors) == 2
assert log.why() == "ERROR said; INTERNAL_ERROR said"
times = {}
profiler = make_times(trt, times)
assert isinstance(profiler, trt.IProfiler)
profiler.report_layer_time("a", 0.5)
profiler.report_layer_time("a", 0.25)
assert times == {"a": [0.5, 0.25]}
"""


@pytest.mark.parametrize("number", [10, 11])
def test_log_and_profiler_are_nvidias(number: int) -> None:
    bindings(number).run(LISTENS)
