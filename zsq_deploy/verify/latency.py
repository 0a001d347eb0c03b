"""Latency, measured so that two runners can be compared.

* Each runner lives in a process of its own, started fresh: load time, first run and peak memory are those of a program that
  only runs this model. Several starts are made, and the median is given.
* The timed runs are interleaved, a short round of each runner in turn (ABAB...), so that a noisy machine, a warm one or a
  slower clock hits all of them alike. The speed-up is the ratio of the medians; its spread comes from the rounds.
* A run is end to end for one batch: inputs in host memory as numpy arrays, outputs as numpy arrays, the call of the
  runtime's Python binding included. Preprocessing is not included.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.verify.bench_child import timed_runs
from zsq_deploy.verify.machine import machine_info

__all__ = ["WHAT_IS_TIMED", "Comparison", "Latency", "RunnerSpec", "Speedup", "compare_latency", "measure"]

Array = npt.NDArray[Any]

#: For the report: what the milliseconds contain.
WHAT_IS_TIMED = (
    "one inference end to end: input arrays in host memory to output arrays in host memory, through the runtime's Python "
    "binding; preprocessing is not included"
)


@dataclass(frozen=True)
class Latency:
    """Times of one runner in milliseconds.

    Attributes:
        median_ms: Half of the runs are faster.
        p90_ms: 90 % of the runs are faster.
        p95_ms: 95 % of the runs are faster.
        p99_ms: 99 % of the runs are faster.
        iqr_ms: Spread: 75th minus 25th percentile, within which the middle half of the runs lies.
        mean_ms: Mean.
        min_ms: Fastest run.
        runs: Number of timed runs.
        threads: Threads that the runner was given.
        batch: Samples in one run.
        first_ms: First run after loading; ``None`` if not measured.
        load_ms: Loading the model; ``None`` if not measured.
        peak_rss_bytes: Largest resident memory of the process, interpreter and runtime included; ``None`` if not measured.
        added_rss_bytes: By how much loading and the first run raised that peak; ``None`` if not measured.
        mode: What was run, in words.
        device_median_ms: Of a runner that tells how long the accelerator alone worked (without copies and without Python): the median of
            that; ``None`` of others.
        device_p90_ms: 90 % of these times are shorter.
        device_p99_ms: 99 % of these times are shorter.
    """

    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    iqr_ms: float
    mean_ms: float
    min_ms: float
    runs: int
    threads: int
    batch: int = 1
    first_ms: float | None = None
    load_ms: float | None = None
    peak_rss_bytes: int | None = None
    added_rss_bytes: int | None = None
    mode: str = ""
    device_median_ms: float | None = None
    device_p90_ms: float | None = None
    device_p99_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the keys are those of the report."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Speedup:
    """How many times faster one runner is than another.

    Attributes:
        ratio: Median time of the other by the median time of this one.
        low: 10th percentile of that ratio over the rounds.
        high: 90th percentile of that ratio over the rounds.
    """

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Runners measured side by side.

    Attributes:
        latencies: By name of the runner.
        medians: Median of each round, by name of the runner.
        environment: The machine, read at the start (:func:`zsq_deploy.verify.machine.machine_info`).
        seconds: What the measurement took.
    """

    latencies: Mapping[str, Latency]
    medians: Mapping[str, tuple[float, ...]]
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def speedup(self, name: str, over: str) -> Speedup:
        """How many times faster `name` is than `over`."""
        ratios = np.divide(self.medians[over], self.medians[name])
        low, high = (float(value) for value in np.percentile(ratios, [10, 90]))
        return Speedup(self.latencies[over].median_ms / self.latencies[name].median_ms, low, high)


@dataclass(frozen=True)
class RunnerSpec:
    """How a fresh process opens a runner.

    Attributes:
        factory: ``"package.module:function"``; it returns an object with ``run(feeds)`` and, if it knows it, ``load_ms``.
        arguments: Keyword arguments of the factory; JSON values.
        feeds: The inputs of every run, by name.
        threads: For the record; the factory gets its threads in `arguments`.
        mode: For the record: what is run, in words.
        path: More folders to import from.
        preload: Modules to import before the clock for the load time starts.
    """

    factory: str
    arguments: Mapping[str, Any]
    feeds: Mapping[str, Array]
    threads: int = 1
    mode: str = ""
    path: Sequence[str] = ()
    preload: Sequence[str] = ()


def summarize(times_ms: Sequence[float], *, threads: int, device_ms: Sequence[float] = (), **known: Any) -> Latency:
    """Single times as a :class:`Latency`; `device_ms` are those of the accelerator alone, if the runner tells them.

    Raises:
        UsageError: There are no times.
    """
    if not times_ms:
        raise UsageError("no run was timed", where="latency", remedy="ask for at least one run")
    times = np.asarray(times_ms, np.float64)
    low, median, high, p90, p95, p99 = (float(value) for value in np.percentile(times, [25, 50, 75, 90, 95, 99]))
    if device_ms:
        middle, most, all_but = (
            float(value) for value in np.percentile(np.asarray(device_ms, np.float64), [50, 90, 99])
        )
        known.update(device_median_ms=middle, device_p90_ms=most, device_p99_ms=all_but)
    return Latency(
        median_ms=median,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        iqr_ms=high - low,
        mean_ms=float(times.mean()),
        min_ms=float(times.min()),
        runs=len(times),
        threads=threads,
        **known,
    )


def measure(
    run: Callable[[], object],
    *,
    warmup: int = 5,
    min_seconds: float = 1.0,
    min_runs: int = 20,
    max_seconds: float = 60.0,
    threads: int = 1,
    batch: int = 1,
    load_ms: float | None = None,
    mode: str = "",
) -> Latency:
    """Time one runner in this process.

    Args:
        run: One inference.
        warmup: Runs before the clock starts; the first of them is `first_ms`.
        min_seconds: Go on for so long at least,
        min_runs: and for so many runs at least,
        max_seconds: but stop after this long.
        threads: For the record.
        batch: For the record.
        load_ms: For the record.
        mode: For the record.
    """
    start = time.perf_counter()
    run()
    first = (time.perf_counter() - start) * 1000
    times = timed_runs(
        run, warmup=max(0, warmup - 1), min_seconds=min_seconds, min_runs=min_runs, max_seconds=max_seconds
    )
    return summarize(times, threads=threads, batch=batch, first_ms=first, load_ms=load_ms, mode=mode)


class _Process:
    """A bench child and the conversation with it."""

    def __init__(self, name: str, spec: RunnerSpec, feeds: Path) -> None:
        self.name = name
        self.spec = spec
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([*spec.path, *filter(None, [environment.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zsq_deploy.verify.bench_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )
        try:
            self.opened = self.ask(
                "open",
                factory=spec.factory,
                arguments=dict(spec.arguments),
                feeds=str(feeds),
                path=list(spec.path),
                preload=list(spec.preload),
            )
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise EngineError(
                f"the process that measures {self.name!r} ended with code {code}" + (f": {last[0]}" if last else ""),
                where=self.spec.factory,
                remedy="a code of -9 is usually a lack of memory, -4 a missing CPU instruction; try the engine with 'zsq bench'",
            )
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise EngineError(
                f"{self.name!r} cannot be measured: {answer['error'].splitlines()[0]}",
                where=self.spec.factory,
                remedy="check that the engine loads and runs on this machine ('zsq doctor')",
            )
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(BrokenPipeError, OSError, ValueError):
                assert self._process.stdin is not None
                self._process.stdin.write('{"do": "quit"}\n')
                self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


@contextlib.contextmanager
def _children(specs: Mapping[str, RunnerSpec], feeds: Mapping[str, Path]) -> Iterator[dict[str, _Process]]:
    running: dict[str, _Process] = {}
    try:
        for name, spec in specs.items():
            running[name] = _Process(name, spec, feeds[name])
        yield running
    finally:
        for process in running.values():
            process.close()


def _store_feeds(folder: Path, index: int, feeds: Mapping[str, Array]) -> Path:
    path = folder / f"feeds-{index}.npz"
    arrays = {f"input_{place}": np.asarray(value) for place, value in enumerate(feeds.values())}
    np.savez(path, names=np.asarray(json.dumps(list(feeds))), **arrays)  # type: ignore[arg-type]
    return path


def compare_latency(
    specs: Mapping[str, RunnerSpec],
    *,
    rounds: int = 10,
    round_seconds: float = 0.25,
    round_runs: int = 3,
    warmup: int = 3,
    starts: int = 3,
    max_round_seconds: float = 20.0,
    progress: Progress = SILENT,
) -> Comparison:
    """Measure runners side by side, each in a fresh process, in interleaved rounds.

    Args:
        specs: The runners, by name.
        rounds: How often every runner has its turn.
        round_seconds: Least length of one turn.
        round_runs: Least number of runs in one turn.
        warmup: Untimed runs at the start of each turn: caches and thread pools belong to this runner again.
        starts: Fresh processes for load time, first run and memory; the median of them is given.
        max_round_seconds: Longest turn.
        progress: Where to report progress.

    Raises:
        EngineError: A runner cannot be opened, fails, or its process dies.
    """
    if not specs or rounds < 1 or starts < 1:
        raise UsageError(
            "at least one runner, one round and one start are needed",
            where="compare_latency",
            remedy="name a runner, and give rounds and starts of 1 or more",
        )
    begun = time.perf_counter()
    environment = machine_info()
    times: dict[str, list[float]] = {name: [] for name in specs}
    device: dict[str, list[float]] = {name: [] for name in specs}
    medians: dict[str, list[float]] = {name: [] for name in specs}
    opened: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    with tempfile.TemporaryDirectory(prefix="zsq-bench-") as folder:
        feeds = {
            name: _store_feeds(Path(folder), index, spec.feeds) for index, (name, spec) in enumerate(specs.items())
        }
        with progress.task("latency", (starts + rounds) * len(specs)) as task:
            for _ in range(starts - 1):
                for name, spec in specs.items():
                    process = _Process(name, spec, feeds[name])
                    opened[name].append(process.opened)
                    process.close()
                    task.advance(1)
            with _children(specs, feeds) as running:
                for name, process in running.items():
                    opened[name].append(process.opened)
                    task.advance(1)
                for turn in range(rounds):
                    # Every other round goes the other way, so that no runner always follows the same neighbour.
                    order = list(running) if turn % 2 == 0 else list(reversed(running))
                    for name in order:
                        answer = running[name].ask(
                            "round",
                            warmup=warmup,
                            min_seconds=round_seconds,
                            min_runs=round_runs,
                            max_seconds=max_round_seconds,
                        )
                        times[name].extend(answer["times_ms"])
                        device[name].extend(answer.get("device_ms", ()))
                        medians[name].append(float(np.median(answer["times_ms"])))
                        task.advance(1, ms=medians[name][-1])
    latencies = {}
    for name, spec in specs.items():
        middle = {
            key: float(np.median([start[key] for start in opened[name]]))
            for key in ("load_ms", "first_ms", "peak_rss_bytes", "added_rss_bytes")
        }
        batch = len(next(iter(spec.feeds.values())))
        latencies[name] = summarize(
            times[name],
            threads=spec.threads,
            device_ms=device[name],
            batch=batch,
            mode=spec.mode or name,
            load_ms=middle["load_ms"],
            first_ms=middle["first_ms"],
            peak_rss_bytes=int(middle["peak_rss_bytes"]),
            added_rss_bytes=int(middle["added_rss_bytes"]),
        )
    return Comparison(
        latencies, {name: tuple(values) for name, values in medians.items()}, environment, time.perf_counter() - begun
    )
