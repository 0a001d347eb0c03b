"""Running an engine, its unfused form or a float model in ONNX Runtime, with the session options of the target."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from zsq_deploy.backends.base import KernelRecord, Target
from zsq_deploy.errors import EngineError, UsageError

__all__ = [
    "Mode",
    "OrtRunner",
    "cpu_features",
    "device_facts",
    "float_modes",
    "missing_features",
    "runner",
    "session_options",
]

Array = npt.NDArray[Any]
Mode = Literal["engine", "unfused", "float"]

_MODES: tuple[str, ...] = ("engine", "unfused", "float")
_QUIET = 3  # errors only: ONNX Runtime warns about unused initializers and the like


def session_options(target: Target, *, threads: int = 1, mode: str = "engine") -> ort.SessionOptions:
    """The session options of a target.

    ``engine``: everything fused, the target's own keys. ``unfused``: no graph optimization at all, so Q/DQ stay as they are and the
    arithmetic is float (the runtime's own fake-quant reference). ``float``: everything optimized, without the target's keys.

    Raises:
        UsageError: Unknown mode, or a number of threads below 1.
    """
    if mode not in _MODES:
        raise UsageError(f"unknown mode {mode!r}", where="mode", remedy=f"choose one of {', '.join(_MODES)}")
    if threads < 1:
        raise UsageError(f"{threads} threads cannot run anything", where="--threads", remedy="give 1 or more")
    ort.set_default_logger_severity(_QUIET)
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_DISABLE_ALL if mode == "unfused" else level.ORT_ENABLE_ALL
    if mode == "engine":
        for key, value in target.session.items():
            options.add_session_config_entry(key, value)
    return options


def open_session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the CPU provider.

    Raises:
        EngineError: The file is missing, is no ONNX model, or cannot be run.
    """
    if not Path(path).is_file():
        raise EngineError("the engine's file does not exist", where=str(path), remedy="build the engine again")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own family of exceptions without a common public base
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load this file: {first[:400]}",
            where=str(path),
            remedy="build the engine again; if the file is intact, its operator set or IR version may be newer than this runtime",
        ) from error


class OrtRunner:
    """A model loaded in ONNX Runtime.

    Args:
        path: The ONNX file.
        target: Whose session options to use.
        threads: Threads inside an operator.
        mode: ``engine``, ``unfused`` or ``float``, see :func:`session_options`.
        session: More session keys, such as those of :func:`float_modes`.

    Attributes:
        input_names: Names of the inputs.
        output_names: Names of the outputs.
        load_ms: Milliseconds that loading (with graph optimization) took.
    """

    def __init__(
        self,
        path: Path,
        target: Target,
        *,
        threads: int = 1,
        mode: Mode = "engine",
        session: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.target = target
        self.threads = threads
        self.mode: Mode = mode
        options = session_options(target, threads=threads, mode=mode)
        for key, value in (session or {}).items():
            options.add_session_config_entry(key, value)
        started = time.perf_counter()
        self._session = open_session(self.path, options)
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.input_names: Sequence[str] = tuple(value.name for value in self._session.get_inputs())
        self.output_names: Sequence[str] = tuple(value.name for value in self._session.get_outputs())

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the file insists on, or ``None``."""
        shape = self._session.get_inputs()[0].shape
        return int(shape[0]) if shape and isinstance(shape[0], int) else None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for one batch.

        Raises:
            EngineError: The inputs do not fit the model.
        """
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime could not run this input: {str(error).strip().splitlines()[0][:400]}",
                where=f"{self.path} with " + ", ".join(f"{k}: {v.dtype}{list(v.shape)}" for k, v in feeds.items()),
                remedy="check the input's shape and type against `zsq inspect`",
            ) from error
        return {name: np.asarray(value) for name, value in zip(self.output_names, values, strict=True)}

    def kernels(self, feeds: Mapping[str, Array]) -> Sequence[KernelRecord]:
        """What ONNX Runtime executed for one batch, from its profile (see :mod:`zsq_deploy.backends.onnxruntime.proof`)."""
        from zsq_deploy.backends.onnxruntime.proof import kernels

        return kernels(self.path, self.target, feeds, threads=self.threads, mode=self.mode)


def runner(
    path: Path,
    target: Target,
    *,
    threads: int = 1,
    mode: Mode = "engine",
    session: Mapping[str, str] | None = None,
) -> OrtRunner:
    """Load a model; see :class:`OrtRunner`."""
    return OrtRunner(path, target, threads=threads, mode=mode, session=session)


def open_runner(
    path: str, target: str, threads: int = 1, mode: Mode = "engine", session: Mapping[str, str] | None = None
) -> OrtRunner:
    """A runner from plain values, for a fresh process that measures latency.

    Args:
        path: File of the model.
        target: Name of the target.
        threads: Threads inside an operator.
        mode: As for :class:`OrtRunner`.
        session: Further session keys (of :func:`float_modes`).
    """
    from zsq_deploy.backends import get_target

    return OrtRunner(Path(path), get_target(target), threads=threads, mode=mode, session=session)


def float_modes(target: Target) -> dict[str, dict[str, str]]:
    """The float modes that this device offers: a name -> session keys on top of ``mode="float"``.

    ONNX Runtime computes float models in float32. On 64-bit Arm with bfloat16 products it can also trade precision for speed.
    """
    modes: dict[str, dict[str, str]] = {"float32": {}}
    if target.name == "ort-arm64" and "bf16" in cpu_features():
        modes["float32, bf16 products"] = {"mlas.enable_gemm_fastmath_arm64_bfloat16": "1"}
    return modes


def device_facts(target: Target, *, threads: int = 1) -> dict[str, Any]:
    """What is known of the device that the target is measured on here, for the report."""
    return {
        "device": "CPU",
        "provider": "CPUExecutionProvider",
        "precision of float": "float32",
        "float modes": list(float_modes(target)),
        "threads": threads,
        **({"session": dict(target.session)} if target.session else {}),
    }


@cache
def cpu_features() -> frozenset[str]:
    """The CPU features that the operating system reports, in Linux's spelling; empty where it does not say."""
    found: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("flags", "features"):
                found.update(value.split())
                break
    except OSError:
        pass
    if not found and platform.machine().lower() in ("arm64", "aarch64"):
        found.update(("asimd", "asimddp"))
    return frozenset(found)


def missing_features(target: Target) -> tuple[str, ...]:
    """The CPU features that the target wants and this machine does not report; alternatives are joined with ``|``."""
    have = cpu_features()
    return tuple(want for want in target.requires if not any(one in have for one in want.split("|")))
