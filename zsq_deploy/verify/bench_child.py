"""The process that holds one runner while it is measured: ``python -m zsq_deploy.verify.bench_child``.

It reads one JSON command a line on standard input and answers with one JSON line on standard output; what a runtime prints
goes to standard error. A fresh process makes load time, first run and peak memory honest: nothing is warm, and nothing of
another runner is in memory. It knows no runtime: a factory, ``"package.module:function"``, opens the runner.

Commands: ``open`` (load, first run), ``round`` (timed runs), ``quit``.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsq_deploy.verify.machine import peak_rss_bytes

__all__ = ["main", "resolve"]

Array = npt.NDArray[Any]


class _Runs(Protocol):
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...


def resolve(factory: str) -> Callable[..., Any]:
    """The function that ``"package.module:function"`` names."""
    module, _, name = factory.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def timed_runs(
    run: Callable[[], object], *, warmup: int, min_seconds: float, min_runs: int, max_seconds: float
) -> list[float]:
    """Milliseconds of single runs, after `warmup` untimed ones.

    It goes on until `min_seconds` have passed and `min_runs` are done, but not for longer than `max_seconds` (one run at
    least).
    """
    for _ in range(warmup):
        run()
    times: list[float] = []
    clock = time.perf_counter_ns
    start = clock()
    while True:
        before = clock()
        run()
        after = clock()
        times.append((after - before) / 1e6)
        elapsed = (after - start) / 1e9
        if (elapsed >= min_seconds and len(times) >= min_runs) or elapsed >= max_seconds:
            return times


class _Child:
    def __init__(self) -> None:
        self.runner: _Runs | None = None
        self.feeds: dict[str, Array] = {}

    def open(self, command: dict[str, Any]) -> dict[str, Any]:
        sys.path[:0] = [path for path in command.get("path", []) if path not in sys.path]
        with np.load(command["feeds"], allow_pickle=False) as stored:
            names = json.loads(str(stored["names"]))
            self.feeds = {name: stored[f"input_{index}"] for index, name in enumerate(names)}
        # Importing the runtime's own library is paid once a program, not once a model: it is not part of the load time.
        make = resolve(command["factory"])
        for module in command.get("preload", []):
            importlib.import_module(module)
        before = peak_rss_bytes()
        start = time.perf_counter()
        runner = make(**command["arguments"])
        opened = (time.perf_counter() - start) * 1000
        start = time.perf_counter()
        runner.run(self.feeds)
        first = (time.perf_counter() - start) * 1000
        self.runner = runner
        own = getattr(runner, "load_ms", None)
        peak = peak_rss_bytes()
        return {
            "load_ms": float(own) if own is not None and own > 0 else opened,
            "first_ms": first,
            "peak_rss_bytes": peak,
            "added_rss_bytes": peak - before,
        }

    def round(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.runner is not None
        runner, feeds = self.runner, self.feeds
        on_device: list[float] = []

        def once() -> None:
            runner.run(feeds)

        def once_told() -> None:
            runner.run(feeds)
            on_device.append(float(runner.device_ms))  # type: ignore[attr-defined]

        # A runner on an accelerator may tell how long that alone worked in its last run.
        times = timed_runs(
            once_told if hasattr(runner, "device_ms") else once,
            warmup=int(command["warmup"]),
            min_seconds=float(command["min_seconds"]),
            min_runs=int(command["min_runs"]),
            max_seconds=float(command["max_seconds"]),
        )
        told = {"device_ms": on_device[-len(times) :]} if on_device else {}
        return {"times_ms": times, **told, "peak_rss_bytes": peak_rss_bytes()}


def main() -> int:
    """Serve commands until standard input ends."""
    # Ctrl-C reaches every process of a terminal; it is for the parent to decide, and this one ends with its standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A runtime may write to standard output, from C as well: the answers get a descriptor of their own.
    answers = io.TextIOWrapper(os.fdopen(os.dup(1), "wb"), write_through=True, encoding="utf-8")
    os.dup2(2, 1)
    child = _Child()
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "quit":
            break
        try:
            answer = {"ok": True, **getattr(child, command["do"])(command)}
        except Exception as error:
            answer = {"ok": False, "error": str(error) or type(error).__name__, "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
