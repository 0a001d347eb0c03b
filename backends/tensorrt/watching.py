"""What TensorRT says and how far it is while it works: its log and its progress, through classes that it calls back.

TensorRT's base classes are known only once the module is imported, so the classes are made at run time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from zsq_deploy.progress import Progress

__all__ = ["LOGGER", "Log", "make_log", "make_monitor", "make_times"]

LOGGER = logging.getLogger("zsq_deploy.tensorrt")
"""Everything that TensorRT says goes here too, for programs that want to see it; by default nothing of it is printed."""
LOGGER.addHandler(logging.NullHandler())

_LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}


class Log:
    """What TensorRT said.

    Attributes:
        errors: Its errors, in order.
        warnings: Its warnings, each once.
        lines: Errors, warnings and information as lines of text.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.lines: list[str] = []

    def add(self, level: str, text: str) -> None:
        """Keep one message."""
        text = text.strip()
        LOGGER.log(_LEVELS.get(level, logging.INFO), "%s", text)
        if level == "VERBOSE":
            return
        self.lines.append(f"[{level}] {text}")
        if level in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text)
        elif level == "WARNING" and text not in self.warnings:
            self.warnings.append(text)

    def why(self) -> str:
        """What went wrong, in TensorRT's words: the first errors, because later ones follow from them."""
        return "; ".join(dict.fromkeys(line.splitlines()[0][:300] for line in self.errors[:2] if line))


def make_log(trt: Any, log: Log) -> Any:
    """A logger for TensorRT that writes into `log`; an instance of a subclass of ``trt.ILogger``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT says."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 insists on the explicit call

        def log(self, severity: Any, msg: str) -> None:
            log.add(getattr(severity, "name", str(severity)), msg)

    return Logger()


class _Cancelled:
    """What was raised in a callback: TensorRT must not see it, and it is raised again after the build."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


def make_monitor(trt: Any, progress: Progress, title: str) -> tuple[Any, Callable[[], None]] | None:
    """A progress monitor for the builder, where this TensorRT has one (10 and later).

    Returns:
        An instance of a subclass of ``trt.IProgressMonitor``, and a function to call after the build: it ends the progress bar, and
        raises what stopped the build (Ctrl-C). ``None``: there are no monitors.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return None
    held, opened = _Cancelled(), ExitStack()
    top: dict[str, Any] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the outermost phase; inner ones are shown by name."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase
            try:
                if not top:
                    task = opened.enter_context(progress.task(title, float(max(1, num_steps))))
                    top.update(name=phase_name, task=task)
            except BaseException as error:
                held.error = held.error or error

        def step_complete(self, phase_name: str, step: int) -> bool:
            del step
            try:
                if top.get("name") == phase_name:
                    top["task"].advance(1)
            except BaseException as error:
                held.error = held.error or error
            return held.error is None  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            if top.get("name") == phase_name:
                top.clear()
                opened.close()

    def finish() -> None:
        opened.close()
        if held.error is not None:
            raise held.error

    return Monitor(), finish


def make_times(trt: Any, times: dict[str, list[float]]) -> Any:
    """A profiler for an execution context that collects milliseconds by layer; an instance of a subclass of ``trt.IProfiler``.

    A context keeps its profiler for life: setting it to ``None`` is refused by TensorRT. So it belongs in a context of its own.
    """

    class Times(trt.IProfiler):  # type: ignore[misc]
        """Collects the times of layers."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(float(ms))

    return Times()
