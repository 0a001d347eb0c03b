"""Building an engine with TensorRT's Python API, on the machine that will run it.

Types by generation. 8 has weak types only: the flag INT8 allows 8 bits, and the Q/DQ graph says where. 10 builds a Q/DQ graph with strong
types, so that nothing but the graph decides; float networks and calibration caches need weak types there, with flags as in 8. 11 has
strong types only and none of these flags. The flag TF32 is on by default in all of them and lets float32 products lose 13 bits of their
factors; it is switched off unless it is asked for.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq_deploy.artifact import atomic_path, atomic_writer, digest_bytes, digest_file
from zsq_deploy.backends.base import Target
from zsq_deploy.backends.tensorrt.cache import CalibrationCache, read_cache
from zsq_deploy.backends.tensorrt.cuda import Gpu
from zsq_deploy.backends.tensorrt.plan import PlanRecord, PlanSettings, layers_path, log_path
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.backends.tensorrt.watching import Log, make_log, make_monitor
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.progress import SILENT, Progress

__all__ = ["build_plan", "deserialize", "flags_of", "timing_cache_path"]

_CALIBRATORS = {
    "EntropyCalibration2": "IInt8EntropyCalibrator2",
    "EntropyCalibration": "IInt8EntropyCalibrator",
    "MinMaxCalibration": "IInt8MinMaxCalibrator",
}


@dataclass(frozen=True)
class Flags:
    """Flags of one build, by the names of TensorRT's enumerations.

    Attributes:
        network: Of ``NetworkDefinitionCreationFlag``.
        on: Of ``BuilderFlag``, set.
        off: Of ``BuilderFlag``, cleared.
    """

    network: tuple[str, ...]
    on: tuple[str, ...]
    off: tuple[str, ...]


def flags_of(target: Target, settings: PlanSettings) -> Flags:
    """The flags with which an engine is built. TensorRT 11 has no flags for types: 16 bits have to stand in the graph there.

    Raises:
        UsageError: This generation cannot do it.
    """
    number, half = generation(target), settings.floats in ("float16", "bfloat16")
    if number >= 11 and settings.mode == "implicit":
        raise UsageError(
            "TensorRT 11 has neither calibrators nor calibration caches",
            where=target.name,
            remedy="build the Q/DQ graph, or choose tensorrt-10",
        )
    if number < 10 and settings.floats == "bfloat16":
        raise UsageError("TensorRT 8 has no bfloat16", where=target.name, remedy="choose float16")
    strong = number == 10 and settings.mode == "explicit" and not half
    network = ("EXPLICIT_BATCH",) if number == 8 else ("STRONGLY_TYPED",) if strong else ()
    on = []
    if number < 11 and not strong:
        on += ["INT8"] if settings.mode != "float" else []
        on += {"float16": ["FP16"], "bfloat16": ["BF16"]}.get(settings.floats, [])
    return Flags(network, tuple(on), ("TF32",) if settings.floats == "float32" else ())


def timing_cache_path(version: str, gpu: Gpu) -> Path:
    """Where the times of kernels are kept between builds, for one TensorRT on one model of GPU."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{version}-{gpu.name}-{gpu.capability[0]}.{gpu.capability[1]}").strip("-")
    return base / "zsq-deploy" / "tensorrt" / f"timing-{words}.cache"


def build_plan(
    trt: Any,
    network: Path,
    plan: Path,
    target: Target,
    settings: PlanSettings,
    gpu: Gpu,
    *,
    cache: Path | None = None,
    made_of: Path | None = None,
    timing_cache: Path | None = None,
    progress: Progress = SILENT,
) -> PlanRecord:
    """Build an engine and write it with its record, its layers and TensorRT's log.

    Args:
        trt: The ``tensorrt`` module, of the target's generation.
        network: The ONNX file: a Q/DQ graph (``explicit``), or a float network.
        plan: Where the engine goes.
        target: The target.
        settings: How to build.
        gpu: The GPU here, for the record.
        cache: The calibration cache, with ``implicit``; its header may name any version.
        made_of: The file in the plan's folder that `network` was made of, where it is another one: that one is recorded.
        timing_cache: Where times of kernels are kept between builds; ``None``: nowhere.
        progress: Watches; Ctrl-C ends the build where TensorRT has progress monitors (10 and later).

    Raises:
        UsageError: Settings that this generation does not have, or a network with more open sizes than the batch.
        EngineError: TensorRT cannot read the network or build the engine; the message is TensorRT's.
    """
    flags = flags_of(target, settings)
    if (settings.mode == "implicit") != (cache is not None):
        raise UsageError(
            "an implicit engine needs a calibration cache, and no other takes one",
            where=str(cache or network),
            remedy="name the cache of the folder, or leave it out",
        )
    for file in (network, cache):
        if file is not None and not file.is_file():
            raise EngineError("a file is missing", where=str(file), remedy="make the folder again with zsq quantize")
    started = time.monotonic()
    log = Log()
    with _logged(log, plan):
        data = _serialized(trt, network, target, settings, flags, log, cache, timing_cache, progress)
        engine = deserialize(trt, data, log, where=str(plan))
        with atomic_writer(layers_path(plan)) as stream:
            stream.write(_inspected(trt, engine, settings.batch).encode())
        layers = int(engine.num_layers)
        del engine
        with atomic_writer(plan) as stream:
            stream.write(data)
    record = PlanRecord(
        network=(made_of or network).name,
        network_sha256=digest_file(made_of or network),
        cache_sha256="" if cache is None else digest_file(cache),
        settings=settings.to_json(),
        tensorrt=str(trt.__version__),
        gpu=gpu.name,
        capability=f"{gpu.capability[0]}.{gpu.capability[1]}",
        cuda=gpu.runtime,
        plan_sha256=digest_bytes(data),
        bytes=len(data),
        seconds=time.monotonic() - started,
        layers=layers,
        warnings=tuple(log.warnings),
    )
    record.write(plan)
    return record


def deserialize(trt: Any, data: bytes, log: Log, *, where: str) -> Any:
    """An engine from the content of a plan.

    Raises:
        EngineError: TensorRT does not take it.
    """
    logger = make_log(trt, log)
    trt.init_libnvinfer_plugins(logger, "")
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(
            f"TensorRT {trt.__version__} does not take this engine: {log.why() or 'it gives no reason'}",
            where=where,
            remedy="remove the file and build it again on this device",
        )
    return engine


def _inspected(trt: Any, engine: Any, batch: int) -> str:
    """What the inspector says of an engine, with the largest batch: engines with open sizes do not tell their types without shapes."""
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None:
        for place in range(engine.num_io_tensors):
            name = engine.get_tensor_name(place)
            shape = [int(size) for size in engine.get_tensor_shape(name)]
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT and shape[:1] == [-1]:
                context.set_input_shape(name, [batch, *shape[1:]])
        inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


@contextmanager
def _logged(log: Log, plan: Path) -> Iterator[None]:
    """Write what TensorRT said beside the plan, also where the build failed."""
    try:
        yield
    finally:
        if log.lines:
            with atomic_path(log_path(plan)) as temporary:
                temporary.write_text("\n".join(log.lines) + "\n", encoding="utf-8")


def _serialized(
    trt: Any,
    network: Path,
    target: Target,
    settings: PlanSettings,
    flags: Flags,
    log: Log,
    cache: Path | None,
    timing_cache: Path | None,
    progress: Progress,
) -> bytes:
    logger = make_log(trt, log)
    trt.init_libnvinfer_plugins(logger, "")  # the parser makes some operators (InstanceNormalization) of plugins
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what the bindings make of a null pointer
        raise EngineError(
            f"TensorRT {trt.__version__} cannot begin: {log.why() or error}",
            where="trt.Builder",
            remedy="look at nvidia-smi: the GPU's driver has to be as new as TensorRT's CUDA version, and the GPU not too old for it",
        ) from error
    bits = 0
    for name in flags.network:
        bits |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    definition = builder.create_network(bits)
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse_from_file(str(network)):
        said = "; ".join(str(parser.get_error(place).desc()) for place in range(min(3, parser.num_errors)))
        raise EngineError(
            f"TensorRT {trt.__version__} cannot read this network: {said or log.why() or 'it gives no reason'}",
            where=str(network),
            remedy=f"zsq lint FILE --target {target.name} names what TensorRT does not take; its own words are in the log beside the "
            "engine (*.build.log)",
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for name in flags.on:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in flags.off:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.effort is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise UsageError(
                f"TensorRT {trt.__version__} has no optimization levels",
                where="PlanSettings.effort",
                remedy="leave it out, or use TensorRT 8.6 or later",
            )
        config.builder_optimization_level = settings.effort
    _one_profile(builder, config, definition, settings.batch, network)
    calibrator = None
    if cache is not None:
        calibrator = _from_cache(trt, read_cache(cache, zeros=True), where=str(cache))
        config.int8_calibrator = calibrator
    times = _take_times(config, timing_cache)  # held until the engine is built: TensorRT does not
    title = f"build {network.stem} ({settings.mode}, {settings.floats})"
    monitor = make_monitor(trt, progress, title)
    if monitor is None:
        with progress.task(title, 1) as task:
            made = builder.build_serialized_network(definition, config)
            task.advance()
    else:
        config.progress_monitor, finish = monitor
        try:
            made = builder.build_serialized_network(definition, config)
        finally:
            finish()
    if made is None:
        raise EngineError(
            f"TensorRT {trt.__version__} could not build the engine: {log.why() or 'it gives no reason'}",
            where=str(network),
            remedy="the log beside the engine (*.build.log) names the layer; out of memory: close other programs on the device",
        )
    if calibrator is not None and not calibrator.asked:
        raise EngineError(
            "TensorRT did not ask for the calibration cache: the engine would not be what the cache says",
            where=str(cache),
            remedy="look into the log beside the engine (*.build.log), and report it with the version of TensorRT",
        )
    _keep_times(config, timing_cache)
    del times
    return bytes(made)


def _one_profile(builder: Any, config: Any, definition: Any, batch: int, where: Path) -> None:
    """The shapes that the engine is for: one optimization profile, where the batch is open."""
    profile = None
    for place in range(definition.num_inputs):
        tensor = definition.get_input(place)
        shape = [int(size) for size in tensor.shape]
        if min(shape, default=1) >= 0:
            continue
        if min(shape[1:], default=1) < 0:
            raise UsageError(
                f"the input {tensor.name!r} has open sizes beside the batch: {shape}",
                where=str(where),
                remedy="fix them with --input-shape when the network is quantized",
            )
        if profile is None:
            profile = builder.create_optimization_profile()
        profile.set_shape(tensor.name, [1, *shape[1:]], [batch, *shape[1:]], [batch, *shape[1:]])
    if profile is not None:
        config.add_optimization_profile(profile)


def _from_cache(trt: Any, cache: CalibrationCache, *, where: str) -> Any:
    """A calibrator that knows a cache and no images; of the class that wrote the algorithm in the cache's header."""
    if cache.algorithm not in _CALIBRATORS:
        raise UsageError(
            f"the cache was made by {cache.algorithm!r}", where=where, remedy=f"use one of {', '.join(_CALIBRATORS)}"
        )
    # TensorRT ignores a header of another version without a word, and makes up ranges.
    data = cache.for_version(str(trt.__version__)).to_bytes()
    base: Any = getattr(trt, _CALIBRATORS[cache.algorithm])

    class FromCache(base):  # type: ignore[misc]
        """Answers with the cache."""

        def __init__(self) -> None:
            base.__init__(self)
            self.asked = False
            self.data = data  # TensorRT gets a pointer into it

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: Any) -> None:
            del names

        def read_calibration_cache(self) -> bytes:
            self.asked = True
            return self.data

        def write_calibration_cache(self, cache: Any) -> None:
            del cache

    return FromCache()


def _take_times(config: Any, path: Path | None) -> Any:
    """Hand TensorRT the times of earlier builds, or none where it does not accept them; the object that holds them."""
    if path is None:
        return None
    for held in (path.read_bytes() if path.is_file() else b"", b""):
        times = config.create_timing_cache(held)
        if config.set_timing_cache(times, False):
            return times
    return None


def _keep_times(config: Any, path: Path | None) -> None:
    found = None if path is None else config.get_timing_cache()
    if found is None or path is None:
        return
    data = bytes(found.serialize())
    if data:
        with atomic_writer(path) as stream:
            stream.write(data)
