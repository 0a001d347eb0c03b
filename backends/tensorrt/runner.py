"""Engines on the machine that has TensorRT and a GPU: built where they are missing, loaded, run, timed, and asked what they compute in.

An engine is named by its ONNX file or by its plan. Beside ``qdq.onnx`` and ``float.onnx`` lie, once they are built (:func:`prepare`):

* ``engine.plan``: the 8-bit engine;
* ``unfused.plan``: the same numbers in float32 (:mod:`zsq_deploy.backends.tensorrt.unfused`), TensorRT's own fake-quant reference;
* ``float32.plan`` (without TF32), ``tf32.plan``, ``float16.plan``, ``bfloat16.plan``: the float network, as far as the GPU has these types.

Where TensorRT or the GPU is missing, everything here says so and what to do instead.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NoReturn

import numpy.typing as npt

from zsq_deploy.backends.base import Engine, KernelRecord, Target
from zsq_deploy.backends.tensorrt.building import build_plan, deserialize, timing_cache_path
from zsq_deploy.backends.tensorrt.cuda import Cuda, Gpu
from zsq_deploy.backends.tensorrt.library import check_runs, gpu, installed, load, missing
from zsq_deploy.backends.tensorrt.plan import PlanSettings, check_plan, read_plan
from zsq_deploy.backends.tensorrt.running import Running, Signature
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.backends.tensorrt.watching import Log, make_times
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.progress import SILENT, Progress

__all__ = [
    "Mode",
    "TrtRunner",
    "check_runs",
    "device_facts",
    "float_modes",
    "installed",
    "integer_reference",
    "missing_features",
    "open_runner",
    "prepare",
    "runner",
]

Array = npt.NDArray[Any]
Mode = Literal["engine", "unfused", "float"]

FLOATS = "floats"
"""The key of a session (see :func:`float_modes`): what float layers compute in."""

_WARMUP, _REPEATS = 5, 30
_SHOWN_WARNINGS = 5


class TrtRunner:
    """A built engine, loaded.

    Args:
        path: The plan, or the ONNX file beside which it lies; of an ONNX file it is built if it is not there.
        target: The target.
        threads: Not used: the work is the GPU's.
        mode: ``engine``; ``unfused`` for TensorRT's fake-quant reference; ``float``.
        session: ``{"floats": "float16"}``: of a float network, what it computes in.
        settings: How a missing engine is built; ``None``: as `mode` says.
        progress: Watches a build.

    Attributes:
        input_names: Names of the inputs.
        output_names: Names of the outputs.
        load_ms: Milliseconds that reading the plan and making its context took; building is not in it.
        plan: The engine's file.

    Raises:
        EngineError: TensorRT or a GPU is missing, or the engine cannot be built, loaded or run.
        StaleArtifactError: The plan was built for another GPU, by another TensorRT, or from another network.
    """

    def __init__(
        self,
        path: Path,
        target: Target,
        *,
        threads: int = 1,
        mode: Mode = "engine",
        session: Mapping[str, str] | None = None,
        settings: PlanSettings | None = None,
        progress: Progress = SILENT,
    ) -> None:
        del threads
        self.target, self.mode = target, mode
        self._trt = load(target)
        self._gpu = gpu(target)
        self.plan, network = _places(Path(path), mode, dict(session or {}))
        if not self.plan.is_file() and network is not None:
            _build(
                self._trt, self._gpu, network, self.plan, target, settings or _settings(network, self.plan), progress
            )
        self.record = check_plan(self.plan, version=str(self._trt.__version__), gpu=self._gpu, network=network)
        self._log = Log()
        self._cuda = Cuda()
        started = time.perf_counter()
        self._engine = deserialize(self._trt, self.plan.read_bytes(), self._log, where=str(self.plan))
        self._signature = Signature(self._trt, self._engine, self.plan)
        self._running = Running(self._engine, self._signature, self._cuda, self._log, self.plan)
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.input_names: Sequence[str] = self._signature.inputs
        self.output_names: Sequence[str] = self._signature.outputs

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the engine insists on, or ``None``."""
        return None if self._signature.open_batch else self._signature.most

    @property
    def device_ms(self) -> float:
        """Time of the last run on the GPU, between two CUDA events: without copies and without Python."""
        return self._running.device_ms

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for one batch, from host memory to host memory.

        Raises:
            EngineError: The inputs do not fit the engine.
        """
        return self._running.run(feeds)

    def layers(self, feeds: Mapping[str, Array]) -> str:
        """What TensorRT's inspector says of the engine for the shapes of `feeds`, as JSON."""
        return self._inspect(self._running, feeds)

    def _inspect(self, running: Running, feeds: Mapping[str, Array]) -> str:
        given = self._signature.check(feeds, self.plan)
        most = self._signature.most
        running.prepare(
            {name: tuple(value.shape if most is None else value[:most].shape) for name, value in given.items()}
        )
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = running.context  # without it, engines with open sizes do not tell their types
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def kernels(self, feeds: Mapping[str, Array]) -> Sequence[KernelRecord]:
        """What TensorRT's inspector and profiler say that was executed (see :mod:`zsq_deploy.backends.tensorrt.proof`).

        Times are medians by layer; with the profiler TensorRT runs the layers one after the other, so their sum is more than a run takes.
        """
        from zsq_deploy.backends.tensorrt.inspector import read_layers
        from zsq_deploy.backends.tensorrt.proof import kernel_records
        from zsq_deploy.model.graph import Graph

        times: dict[str, list[float]] = {}
        running = Running(
            self._engine, self._signature, self._cuda, self._log, self.plan, profiler=make_times(self._trt, times)
        )
        try:
            for _ in range(_WARMUP):
                running.run(feeds)
            times.clear()
            for _ in range(_REPEATS):
                running.run(feeds)
            text = self._inspect(running, feeds)
        finally:
            running.close()
        graph = Graph.load(self.plan.with_name(self.record.network))
        built = PlanSettings(**self.record.settings)
        mode = built.mode if built.mode == "implicit" else "engine"
        if self.mode != "engine":
            mode = f"built in float ({built.floats})"
        return kernel_records(
            read_layers(text, where=str(self.plan)),
            graph,
            {name: 1e3 * median(found) for name, found in times.items()},
            mode=mode,
        )

    def close(self) -> None:
        """Give the device memory back. Safe to call twice; it happens by itself in the end."""
        self._running.close()


def _places(path: Path, mode: str, session: Mapping[str, str]) -> tuple[Path, Path | None]:
    """The plan of a file in a mode, and the ONNX file that it is of (``None``: whatever its record says)."""
    name = {"engine": "engine", "unfused": "unfused", "float": session.get(FLOATS, "float32")}.get(mode)
    if name is None:
        raise UsageError(f"unknown mode {mode!r}", where="mode", remedy="choose engine, unfused or float")
    if path.suffix == ".plan":
        return path if mode != "unfused" else path.with_name("unfused.plan"), None
    return path.with_name(f"{name}.plan"), path


def _settings(network: Path, plan: Path) -> PlanSettings:
    """How an engine is built that is not there, by what it is called.

    Raises:
        EngineError: It would be an 8-bit engine of a float network.
    """
    if plan.stem != "engine":
        return PlanSettings(mode="float", floats="float32" if plan.stem == "unfused" else plan.stem)
    if network.is_file() and b"DequantizeLinear" not in network.read_bytes():
        raise EngineError(
            "this network holds no Q/DQ, so its engine would compute in float",
            where=str(network),
            remedy="name the Q/DQ graph, or the output folder: zsq verify builds what its manifest says, with the calibration cache",
        )
    return PlanSettings()


def _build(
    trt: Any,
    device: Gpu,
    network: Path,
    plan: Path,
    target: Target,
    settings: PlanSettings,
    progress: Progress,
    cache: Path | None = None,
) -> None:
    times = timing_cache_path(str(trt.__version__), device)
    halved = generation(target) >= 11 and settings.floats in ("float16", "bfloat16")
    if plan.stem != "unfused" and not halved:
        build_plan(trt, network, plan, target, settings, device, cache=cache, timing_cache=times, progress=progress)
        return
    from zsq_deploy.backends.tensorrt.halves import to_half
    from zsq_deploy.backends.tensorrt.unfused import float_form
    from zsq_deploy.model.graph import Graph

    graph = Graph.load(network)
    proto = to_half(graph, settings.floats, ranges={}).graph.proto if halved else float_form(graph)
    with tempfile.TemporaryDirectory(prefix="zsq-tensorrt-") as folder:
        written = Path(folder) / f"{plan.stem}.onnx"
        written.write_bytes(proto.SerializeToString())
        build_plan(trt, written, plan, target, settings, device, made_of=network, timing_cache=times, progress=progress)


def prepare(engine: Engine, *, settings: PlanSettings | None = None, progress: Progress = SILENT) -> Engine:
    """Build what has to be built on this machine before an engine can be measured: its plan, and those of its baselines.

    Plans that are there already are checked and used.

    Args:
        engine: As :func:`~zsq_deploy.backends.tensorrt.quantizer.build` made it.
        settings: How to build the 8-bit engine; its batch and limits are the baselines' too. Its mode is that of the engine.
        progress: Watches.

    Returns:
        The engine whose `path` is the plan.

    Raises:
        EngineError: TensorRT or a GPU is missing, or a build failed.
        StaleArtifactError: A plan in the folder was built for another GPU, by another TensorRT, or from another network.
    """
    target, folder = engine.target, engine.qdq_path.parent
    module, device = load(target), gpu(target)
    cache = folder / "calibration.cache" if _is_implicit(engine) else None
    settings = replace(settings or PlanSettings(), mode="implicit" if cache is not None else "explicit")
    plain = replace(settings, mode="float", floats="float32")
    wanted: list[tuple[str, Path, PlanSettings, Path | None]] = [
        ("engine", _network_of(engine), settings, cache),
        ("unfused", engine.qdq_path, plain, None),
        ("float32", engine.float_path, plain, None),
    ]
    for session in float_modes(target).values():
        if session:
            floats = session[FLOATS]
            wanted.append((floats, engine.float_path, replace(plain, floats=floats), None))
    with progress.task(f"engines for {target.name}", len(wanted)) as task:
        for name, network, how, with_cache in wanted:
            plan = folder / f"{name}.plan"
            if not plan.is_file():
                _build(module, device, network, plan, target, how, progress, with_cache)
            check_plan(plan, version=str(module.__version__), gpu=device, network=network)
            task.advance(step=name)
    plan = folder / "engine.plan"
    record = read_plan(plan)
    built = {**record.settings, "tensorrt": record.tensorrt, "gpu": record.gpu, "seconds": record.seconds}
    built.update(layers=record.layers, warnings=list(record.warnings[:_SHOWN_WARNINGS]))
    return replace(engine, path=plan, choices={**engine.choices, "plan": built})


def _network_of(engine: Engine) -> Path:
    """The ONNX file that an engine is built from, also of an engine that was prepared before."""
    if engine.path.suffix == ".onnx":
        return engine.path
    return engine.path.with_name(read_plan(engine.path).network)


def _is_implicit(engine: Engine) -> bool:
    """Whether an engine is built from its float network and a calibration cache."""
    return str(engine.choices.get("mode", "")) == "implicit"


def runner(
    path: Path,
    target: Target,
    *,
    threads: int = 1,
    mode: Mode = "engine",
    session: Mapping[str, str] | None = None,
) -> TrtRunner:
    """Load an engine, building it if it is not there; see :class:`TrtRunner`."""
    return TrtRunner(path, target, threads=threads, mode=mode, session=session)


def open_runner(
    path: str, target: str, threads: int = 1, mode: Mode = "engine", session: Mapping[str, str] | None = None
) -> TrtRunner:
    """A runner from plain values, for a fresh process that measures latency.

    Args:
        path: File of the engine or of its ONNX graph.
        target: Name of the target.
        threads: Not used.
        mode: As for :class:`TrtRunner`.
        session: Of :func:`float_modes`.
    """
    from zsq_deploy.backends import get_target

    return TrtRunner(Path(path), get_target(target), threads=threads, mode=mode, session=session)


def integer_reference(engine: Any, *, threads: int = 1, on_target: bool = False) -> NoReturn:
    """Refuse to compute the engine in exact integers.

    Raises:
        EngineError: Always: how TensorRT's kernels round has not been measured.
    """
    del threads, on_target
    raise EngineError(
        "there is no exact integer reference for TensorRT: how its kernels round has not been measured",
        where=str(engine.path),
        remedy="compare with the twin of the Q/DQ graph, and with the same graph in TensorRT's own float32",
    )


def float_modes(target: Target) -> dict[str, dict[str, str]]:
    """The float modes that the GPU here offers: a name -> session on top of ``mode="float"``; none where nothing can be run.

    TensorRT 8 and 10 choose the fastest type of those that are allowed, layer by layer. TensorRT 11 takes types as the graph says them:
    there the network is written in float16 for it (:mod:`zsq_deploy.backends.tensorrt.halves`).
    """
    try:
        load(target)
        capability = gpu(target).capability
    except EngineError:
        return {}
    names = ["float32", *(["tf32"] if capability >= (8, 0) else []), "float16"]
    names += ["bfloat16"] if generation(target) == 10 and capability >= (8, 0) else []
    return {name: {} if name == "float32" else {FLOATS: name} for name in names}


def device_facts(target: Target, *, threads: int = 1) -> dict[str, Any]:
    """What is known of TensorRT and the GPU on this machine, for the report and for ``zsq doctor``."""
    del threads
    facts: dict[str, Any] = {
        "tensorrt": installed() or "not installed",
        "wanted": f"TensorRT {generation(target)}",
    }
    lacking = missing(target)
    if lacking:
        return {**facts, "missing": lacking}
    cuda = Cuda()
    device = cuda.gpu()
    return {
        **facts,
        "tensorrt": str(load(target).__version__),
        "device": "GPU",
        "name": device.name,
        "compute capability": f"{device.capability[0]}.{device.capability[1]}",
        "cuda runtime": device.runtime,
        "cuda driver": device.driver,
        "memory bytes": cuda.memory()[1],
        "float modes": list(float_modes(target)),
        "precision of float": "float32, TF32 off",
    }


def missing_features(target: Target) -> tuple[str, ...]:
    """What this machine lacks to measure the target, in words; empty where engines can be built and run."""
    lacking = missing(target)
    return (lacking,) if lacking else ()
