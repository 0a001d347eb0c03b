"""Keeps what OpenVINO and NNCF say away from the terminal, hands their progress to ours, and keeps their telemetry off.

Three things talk behind a user's back in these libraries:

* **Telemetry.** ``openvino.convert_model`` and every call of NNCF's API report to Intel through the package ``openvino_telemetry``. Unless
  the user has declined, it writes an identity into ``~/intel`` and opens connections. Both libraries work without the package; so
  it is made unimportable for this process before they are loaded (:func:`forbid_telemetry`, called when
  :mod:`zsq_deploy.backends.openvino` is imported). Where a program has loaded it before us, it is disarmed in place.
* **Logs.** NNCF's logger writes to standard output. :func:`quiet` collects its messages instead.
* **Progress bars.** NNCF draws its own with `rich`. :func:`quiet` turns each into a task of our
  :class:`~zsq_deploy.progress.Progress`.

Nothing here imports OpenVINO or NNCF before it is used.
"""

from __future__ import annotations

import importlib
import logging
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from zsq_deploy.errors import EngineError
from zsq_deploy.progress import SILENT, Progress, Task

__all__ = ["Messages", "forbid_telemetry", "load_nncf", "quiet"]

_PACKAGE = "openvino_telemetry"
_BLOCKED: Any = None
"""The entry in ``sys.modules`` that makes ``import`` fail; typed loosely, because the table is typed to hold modules only."""

_LOCK = threading.RLock()
"""NNCF's bars and logger are global: one piece of work at a time may redirect them."""


@dataclass
class Messages:
    """What a library said.

    Attributes:
        lines: Level (as in :mod:`logging`) and text, in order.
    """

    lines: list[tuple[int, str]] = field(default_factory=list)

    def texts(self, level: int = logging.INFO) -> tuple[str, ...]:
        """The texts of at least this level."""
        return tuple(text for at, text in self.lines if at >= level)


# ---------------------------------------------------------------------------------------------------------------------
# telemetry
# ---------------------------------------------------------------------------------------------------------------------


def forbid_telemetry() -> None:
    """Make sure that nothing is reported to anybody from this process, by OpenVINO or NNCF; calling it again does no harm.

    Call it before they are imported. When the telemetry package is loaded already, its class is disarmed: it neither writes
    an identity nor sends, whoever holds an instance of it.
    """
    loaded = sys.modules.get(_PACKAGE)
    if loaded is None:
        sys.modules[_PACKAGE] = _BLOCKED
    else:
        _disarm(loaded)


def _disarm(package: ModuleType) -> None:
    """Turn off a telemetry package that somebody has imported, and the instances that exist."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.consent = False
        self.sender = _Nobody()

    cls = getattr(package, "Telemetry", None)
    if cls is None:
        return
    cls.init = start
    for name in ("send_event", "start_session", "end_session", "send_error", "send_stack_trace", "send_opt_in_event"):
        setattr(cls, name, nothing)
    for value in list(vars(cls).values()):  # the singleton that its metaclass keeps
        if isinstance(value, cls):
            value.consent = False
    sender = sys.modules.get(f"{_PACKAGE}.utils.sender")
    if sender is not None:
        sender.TelemetrySender.send = nothing


class _Nobody:
    """A sender that sends nothing."""

    def send(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def force_shutdown(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs


# ---------------------------------------------------------------------------------------------------------------------
# logs and progress bars
# ---------------------------------------------------------------------------------------------------------------------


def load_nncf() -> Any:
    """The module ``nncf``, imported without telemetry and without a word on the terminal.

    Raises:
        EngineError: It is not installed.
    """
    forbid_telemetry()
    if "nncf" not in sys.modules:
        logger = logging.getLogger("nncf")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module("nncf")
        except ModuleNotFoundError as error:
            raise EngineError(
                f"NNCF needs {error.name}, which is not installed",
                where="--quantizer nncf",
                remedy="install it: pip install 'zsq-deploy[openvino]'; --quantizer qdq does without",
            ) from error
        _unhandle(logger)
    return sys.modules["nncf"]


def _unhandle(logger: logging.Logger) -> None:
    """Take away the handler that writes to standard output; NNCF's warnings reach the user through :class:`Messages`."""
    for handler in list(logger.handlers):
        if type(handler) is logging.StreamHandler:
            logger.removeHandler(handler)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # else logging's last resort prints warnings on standard error


class _Collect(logging.Handler):
    def __init__(self, messages: Messages) -> None:
        super().__init__(logging.INFO)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.lines.append((record.levelno, record.getMessage()))


@contextmanager
def quiet(progress: Progress = SILENT) -> Iterator[Messages]:
    """Run NNCF without a word on the terminal; its bars become tasks of `progress`, its messages are handed back.

    Python warnings raised inside are collected too. Contexts may be nested; of several threads one at a time gets in.
    """
    messages = Messages()
    with _LOCK, ExitStack() as stack:
        load_nncf()
        stack.enter_context(_logs(messages))
        stack.enter_context(_bars(progress))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        try:
            yield messages
        finally:
            texts = dict.fromkeys(str(item.message).strip() for item in caught or ())
            messages.lines.extend((logging.WARNING, text) for text in texts)


@contextmanager
def _logs(messages: Messages) -> Iterator[None]:
    logger = logging.getLogger("nncf")
    before, level, propagate = list(logger.handlers), logger.level, logger.propagate
    collect = _Collect(messages)
    logger.handlers[:] = [collect]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers[:] = before
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    """While open, every ``track`` of NNCF reports to `progress`: its methods are replaced, because its users hold the class itself."""
    track: Any = importlib.import_module("nncf.common.logging.track_progress").track
    replaced: dict[str, Callable[..., Any]] = {
        "__iter__": lambda bar: _iterate(bar, progress),
        "__enter__": lambda bar: _open(bar, progress),
        "__exit__": lambda bar, *error: _close(bar, *error),
        "update": _advance,
    }
    before = {name: vars(track)[name] for name in replaced}
    for name, method in replaced.items():
        setattr(track, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(track, name, method)


def _title(bar: Any) -> str:
    text = str(bar.description or "working").strip().rstrip(".")
    return f"NNCF: {text[:1].lower()}{text[1:]}"


def _total(bar: Any) -> float:
    if bar.total is not None:
        return float(bar.total)
    return float(operator.length_hint(bar.sequence)) if bar.sequence is not None else 0.0


def _iterate(bar: Any, progress: Progress) -> Iterator[Any]:
    weights = bar.weights
    with progress.task(_title(bar), _total(bar)) as task:
        for index, item in enumerate(bar.sequence):
            yield item
            task.advance(1 if weights is None else weights[index])


def _open(bar: Any, progress: Progress) -> Any:
    bar.zsq_open = ExitStack()
    task: Task = bar.zsq_open.enter_context(progress.task(_title(bar), _total(bar)))
    bar.zsq_task = task
    return bar


def _advance(bar: Any, advance: float, **fields: Any) -> None:
    del fields
    bar.zsq_task.advance(advance)


def _close(bar: Any, *error: Any) -> None:
    bar.zsq_open.__exit__(*error)
