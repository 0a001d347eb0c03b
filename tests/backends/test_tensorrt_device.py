"""Real engines on a real GPU: everything that the other tests only pretend. ``pytest -m tensorrt`` where TensorRT and a GPU are.

Nothing here was run yet by those who wrote it: they had no machine with TensorRT. ``ZSQ_REQUIRE_TENSORRT=1`` makes a failure of what is
skipped elsewhere.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.base import Engine, Target
from zsq_deploy.backends.tensorrt import library
from zsq_deploy.backends.tensorrt.cache import CalibrationCache, read_cache
from zsq_deploy.backends.tensorrt.lint import lint
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import place_qdq
from zsq_deploy.backends.tensorrt.plan import PlanSettings
from zsq_deploy.backends.tensorrt.reference import reference_of_cache
from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.errors import EngineError
from zsq_deploy.model.graph import Graph

from .tensorrt_networks import NETWORKS, images, network, outputs, ranges_of

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def target() -> Target:
    """The target of the TensorRT that is installed here."""
    found = library.numbers(library.installed())
    name = f"tensorrt-{found[0]}" if found and found[0] in (8, 10, 11) else "tensorrt-10"
    wanted = get_target(name)
    try:
        library.check_runs(wanted)
    except EngineError as error:
        if os.environ.get("ZSQ_REQUIRE_TENSORRT"):
            pytest.fail(f"TensorRT is required here: {error}")
        pytest.skip(error.what)
    return wanted


def engine_of(name: str, target: Target, folder: Path, **options: object) -> tuple[Engine, Graph, np.ndarray]:
    model = network(name)
    graph = model.folded().graph
    placed = place_qdq(graph, ranges_of(model), target, BuildOptions(**options)).graph  # type: ignore[arg-type]
    assert not [item for item in lint(placed, target) if item.severity == "error"]
    onnx.save(graph.editable(), folder / "float.onnx")
    onnx.save(placed.editable(), folder / "qdq.onnx")
    made = Engine(folder / "qdq.onnx", folder / "qdq.onnx", target, folder / "float.onnx", {"mode": "explicit"})
    return get_backend(target).prepare(made), placed, images(model)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_built_and_equals_its_reference(name: str, target: Target, tmp_path: Path) -> None:
    engine, placed, x = engine_of(name, target, tmp_path)
    backend = get_backend(target)
    wanted = outputs(placed, x)
    got = backend.runner(engine.path, target).run({"image": x})
    unfused = backend.runner(engine.path, target, mode="unfused").run({"image": x})
    for output, value in wanted.items():
        step = np.abs(value).max() / 127
        assert got[output].shape == value.shape
        # Roundings of single tensors may fall the other way; the float form only sums in another order.
        assert np.sqrt(np.mean(np.square(got[output] - value))) < step
        assert np.quantile(np.abs(unfused[output] - value), 0.95) < 0.1 * step


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat"])
def test_products_run_in_8_bits(name: str, target: Target, tmp_path: Path) -> None:
    engine, _, x = engine_of(name, target, tmp_path)
    records = get_backend(target).runner(engine.path, target).kernels({"image": x[:1]})
    macs = sum(record.macs for record in records)
    integer = sum(record.macs for record in records if record.integer)
    floats = [f"{record.node}: {record.reason}" for record in records if record.macs and not record.integer]
    assert integer > 0.5 * macs, floats
    assert not [one for one in floats if "does not say which layer" in one]
    assert sum(record.microseconds for record in records) > 0


def test_float_engines_of_every_type_run(target: Target, tmp_path: Path) -> None:
    engine, _, x = engine_of("residual", target, tmp_path)
    wanted = outputs(Graph.load(engine.float_path), x)["logits"]
    backend = get_backend(target)
    for name, session in backend.float_modes(target).items():
        runner = backend.runner(engine.float_path, target, mode="float", session=session)  # type: ignore[call-arg]
        got = runner.run({"image": x})["logits"]
        limit = {"float32": 1e-5, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 5e-2}[name]
        assert np.abs(got - wanted).max() < limit * np.abs(wanted).max(), name
        assert runner.device_ms > 0  # type: ignore[attr-defined]


def test_larger_batches_and_16_bits_outside_of_qdq(target: Target, tmp_path: Path) -> None:
    engine, placed, x = engine_of("residual", target, tmp_path)
    for plan in tmp_path.glob("*.plan*"):
        plan.unlink()
    backend = get_backend(target)
    bare = Engine(tmp_path / "qdq.onnx", tmp_path / "qdq.onnx", target, tmp_path / "float.onnx", {"mode": "explicit"})
    engine = backend.prepare(bare, settings=PlanSettings(batch=4, workspace_mib=256))  # type: ignore[attr-defined]
    runner = backend.runner(engine.path, target)
    wanted = outputs(placed, x)["logits"]
    for size in (1, 3, 4, 8):
        got = runner.run({"image": x[:size]})["logits"]
        assert np.sqrt(np.mean(np.square(got - wanted[:size]))) < np.abs(wanted).max() / 127


def test_an_implicit_engine_follows_its_cache(target: Target, tmp_path: Path) -> None:
    if target.name == "tensorrt-11":
        pytest.skip("TensorRT 11 has no implicit quantization")
    model = network("residual")
    graph = model.folded().graph
    cache = CalibrationCache.from_ranges(ranges_of(model), version="8.6.2")
    (tmp_path / "calibration.cache").write_bytes(cache.to_bytes())
    onnx.save(graph.editable(), tmp_path / "float.onnx")
    onnx.save(graph.editable(), tmp_path / "network.onnx")
    reference = reference_of_cache(graph, cache).graph
    onnx.save(reference.editable(), tmp_path / "implicit.onnx")
    bare = Engine(
        tmp_path / "network.onnx", tmp_path / "implicit.onnx", target, tmp_path / "float.onnx", {"mode": "implicit"}
    )
    backend = get_backend(target)
    engine = backend.prepare(bare)  # type: ignore[attr-defined]
    x = images(model)
    wanted = outputs(reference, x)["logits"]
    got = backend.runner(engine.path, target).run({"image": x})["logits"]
    assert np.sqrt(np.mean(np.square(got - wanted))) < 2 * np.abs(wanted).max() / 127


@pytest.mark.parametrize("algorithm", ["entropy-2", "minmax"])
def test_tensorrts_own_calibrators_read_a_set(algorithm: str, target: Target, tmp_path: Path) -> None:
    if target.name == "tensorrt-11":
        pytest.skip("TensorRT 11 has no calibrators")
    from zsq_deploy.backends.tensorrt.calibrators import make_calibrator

    trt = library.load(target)
    model = network("residual")
    graph = model.folded().graph
    onnx.save(graph.editable(), tmp_path / "float.onnx")
    calibration = CalibrationSet.from_arrays({"image": images(model, 32)}, CalibrationManifest(method="gaussian"))
    calibrator = make_calibrator(
        trt, calibration, model_digest=graph.digest, algorithm=algorithm, cache=tmp_path / "device.cache"
    )
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH) if target.name == "tensorrt-8" else 0
    definition = builder.create_network(flags)
    assert trt.OnnxParser(definition, logger).parse_from_file(str(tmp_path / "float.onnx"))
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    config.int8_calibrator = calibrator
    profile = builder.create_optimization_profile()
    size = calibrator.get_batch_size()
    profile.set_shape("image", *([[size, 3, 8, 8]] * 3))
    config.add_optimization_profile(profile)
    config.set_calibration_profile(profile)
    assert builder.build_serialized_network(definition, config) is not None
    calibrator.check()
    cache = read_cache(tmp_path / "device.cache", zeros=True)
    low, high = ranges_of(model)["image"]
    assert cache.scales["image"] == pytest.approx(max(-low, high) / 127, rel=0.5)


@pytest.mark.slow
def test_the_whole_job(target: Target, tmp_path: Path) -> None:
    from zsq_deploy.pipeline import deploy
    from zsq_deploy.recipe import Recipe

    onnx.save(network("residual").graph.editable(), tmp_path / "net.onnx")
    recipe = Recipe.of(
        {
            "model": {"source": str(tmp_path / "net.onnx"), "mean": (0, 0, 0), "std": (1, 1, 1)},
            "calibration": {"method": "gaussian", "images": 16},
            "targets": [target.name],
        }
    ).resolved()
    outcome = deploy(recipe, tmp_path / "out")
    section = outcome.report.targets[target.name]
    assert section.parity.top1_agreement is not None
    assert section.parity.top1_agreement > 0.9
    assert section.latency.engine is not None
    assert section.latency.engine.device_median_ms
    assert json.loads((tmp_path / "out" / target.name / "engine.plan.json").read_text())["bytes"] > 0
