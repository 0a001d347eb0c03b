"""The generated ``engine.py`` against NVIDIA's own Python bindings: every name that it uses exists in the generation that it is for.

Only ``Builder``, ``OnnxParser`` and ``Runtime`` are hand-written, because without the library there is nothing behind them. The stand-ins
refuse any attribute that NVIDIA's class does not have. Flags, enumerations and the calibrator are NVIDIA's.
"""

from __future__ import annotations

import platform
import re
from importlib import resources
from pathlib import Path

import onnx
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.bundle import write_bundle
from zsq_deploy.backends.tensorrt.cache import CalibrationCache

from .tensorrt_bindings import CALLING, GENERATIONS, bindings
from .tensorrt_networks import network

STANDS_IN = """
import runpy, sys
from pathlib import Path

folder = Path(sys.argv[1])

class Strict:
    '''Has what NVIDIA's class has, and does what it is told here.'''
    def __init__(self, real, **does):
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "does", does)
        object.__setattr__(self, "given", {})
    def __getattr__(self, name):
        assert hasattr(self.real, name), f"{self.real.__name__} has no {name}"
        return self.does.get(name, lambda *_: None)
    def __setattr__(self, name, value):
        assert hasattr(self.real, name), f"{self.real.__name__} has no {name}"
        self.given[name] = value

flags, network_flags, profiles, cached = [], [], [], []

def build(network, config):
    calibrator = config.given.get("int8_calibrator")
    if calibrator is not None:
        assert isinstance(calibrator, trt.IInt8EntropyCalibrator2)
        virtual = Virtual(calibrator)
        cached.append(virtual.read())
        assert virtual.batch("image") is None and virtual.batch_size() == 1
        virtual.write(b"again")
    return b"plan"

inspector = Strict(trt.EngineInspector, get_engine_information=lambda form: "{}" if form == trt.LayerInformationFormat.JSON else None)
context = Strict(trt.IExecutionContext, set_input_shape=lambda name, shape: shape == [1, 3, 8, 8])
engine = Strict(trt.ICudaEngine, create_engine_inspector=lambda: inspector, create_execution_context=lambda: context, num_layers=3)
profile = Strict(trt.IOptimizationProfile, set_shape=lambda *given: profiles.append(given))
config = Strict(trt.IBuilderConfig, set_flag=flags.append)
trt.Builder, real = lambda logger: Strict(
    real,
    create_network=lambda given: network_flags.append(given) or Strict(trt.INetworkDefinition),
    create_builder_config=lambda: config,
    create_optimization_profile=lambda: profile,
    build_serialized_network=build,
), trt.Builder
trt.OnnxParser, parser = lambda network, logger: Strict(parser, parse_from_file=lambda path: Path(path).is_file()), trt.OnnxParser
trt.Runtime, runtime = lambda logger: Strict(runtime, deserialize_cuda_engine=lambda data: engine), trt.Runtime

sys.argv = ["engine.py", "build"]
runpy.run_path(str(folder / "engine.py"), run_name="__main__")
assert (folder / "int8.plan").read_bytes() == b"plan" and (folder / "int8.layers.json").read_text() == "{}"
assert config.given["profiling_verbosity"] == trt.ProfilingVerbosity.DETAILED
print([str(flag) for flag in flags], network_flags, len(profiles), cached == [(folder / "c.cache").read_bytes()] if cached else None)
"""

CASES = {
    (10, "explicit"): ("[] [2]", "None"),  # 1 << STRONGLY_TYPED
    (10, "implicit"): ("['BuilderFlag.INT8'] [0]", "True"),
    (11, "explicit"): ("[] [0]", "None"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls through a table of virtual functions of x86-64")
@pytest.mark.parametrize(("generation", "mode"), CASES)
def test_the_script_builds_with_nvidias_own_classes(generation: int, mode: str, tmp_path: Path) -> None:
    found = bindings(generation)
    source = tmp_path / "float.onnx"
    onnx.save(network("residual").folded().graph.editable(), source)
    cache = None
    if mode == "implicit":
        cache = tmp_path / "c.cache"
        cache.write_bytes(CalibrationCache.from_ranges({"image": (-2.0, 2.0)}, version=found.version[:7]).to_bytes())
    folder = tmp_path / "bundle"
    write_bundle(folder, source, get_target(f"tensorrt-{generation}"), mode=mode, cache=cache)  # type: ignore[arg-type]
    flags, cached = CASES[generation, mode]
    last = found.run(CALLING + STANDS_IN, str(folder)).stdout.splitlines()[-1]
    assert last.startswith(flags), last
    assert last.endswith(cached), last


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_name_in_the_script_exists(generation: int) -> None:
    text = resources.files("zsq_deploy.backends.tensorrt").joinpath("engine.py.txt").read_text(encoding="utf-8")
    names = set(re.findall(r"\btrt\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", text))
    for variable, title in (("engine", "ICudaEngine"), ("context", "IExecutionContext"), ("parser", "OnnxParser")):
        names |= {f"{title}.{name}" for name in re.findall(rf"\b{variable}\.([a-z_]\w*)", text) if name != "py"}
    names = {name for name in names if not name.startswith("__version__")}
    assert len(names) > 20
    if generation == 11:
        names -= {"BuilderFlag.INT8", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"}  # asked of 8 and 10 only
    missing = bindings(generation).run(
        """
        def has(name):
            place = trt
            for part in name.split("."):
                if not hasattr(place, part):
                    return False
                place = getattr(place, part)
            return True

        print(*(name for name in sys.argv[1:] if not has(name)))
        """,
        *sorted(names),
    )
    assert missing.stdout.split() == []
