"""Batches of one stage made by several processes at the same time, on one GPU each or on a share of the processor's cores.

A batch does not depend on who makes it, so the images are the same bits for any number of workers with as many threads each. Everything goes through
the checkpoint folder: a worker opens it as a resumed run does, takes the next batch from a queue, and leaves it there finished; what an interrupted one
was at is there as well.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from zsq_deploy import errors
from zsq_deploy.calib.parts.engine import deterministic
from zsq_deploy.calib.parts.memory import Peak, forget_peak, peak_so_far, steady_memory
from zsq_deploy.calib.running import Run, Stage, Stop, interrupted
from zsq_deploy.errors import CalibrationError, InterruptedRunError, ZsqError
from zsq_deploy.progress import SILENT, Task

__all__ = ["make_batches"]

_LISTEN = 0.2  # seconds between two looks at whether a worker died or the user wants to stop
_END_WITHIN = 120.0


class _Said:
    """A worker's task: what it advances is sent to the one who shows it."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    def advance(self, steps: float = 1, **values: float | str) -> None:
        """Send it."""
        self._messages.put(("advance", steps, values))


class _Event:
    """A stop that another process asks for."""

    def __init__(self, event: Any) -> None:
        self._event = event

    @property
    def asked(self) -> bool:
        """Whether it is set."""
        return bool(self._event.is_set())


def make_batches(stage: Stage, indices: Sequence[int], interrupts: Stop, task: Task) -> Peak:
    """Make batches `indices` of a stage in the run's number of processes.

    Returns:
        The memory that they held, all together.

    Raises:
        InterruptedRunError: The user wants to stop; what was done is kept.
        CalibrationError: A worker failed or died; what was done is kept.
    """
    run = stage.whole
    assert run.workdir is not None
    context = multiprocessing.get_context("spawn")
    todo, messages, stop = context.Queue(), context.Queue(), context.Event()
    for index in indices:
        todo.put(index)
    count = min(run.workers, len(indices))
    packed = _packed(run)
    workers = [
        context.Process(target=_work, args=(packed, stage.number, number, todo, messages, stop), daemon=True)
        for number in range(count)
    ]
    failed: BaseException | None = None
    stopped, peak = False, Peak()
    try:
        for worker in workers:
            worker.start()
        ended = 0
        while ended < count:
            if interrupts.asked:
                stop.set()
            try:
                message = messages.get(timeout=_LISTEN)
            except queue.Empty:
                dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
                if dead and failed is None:
                    failed = _died(dead[0].exitcode, stage)
                    stop.set()
                if not any(worker.is_alive() for worker in workers):
                    break
                continue
            if message[0] == "advance":
                task.advance(message[1], **message[2])
            elif message[0] == "end":
                ended += 1
                peak = peak.beside(message[1])
            elif message[0] == "interrupted":
                stopped, ended = True, ended + 1
            else:
                ended += 1
                failed = failed or _again(message[1], message[2])
                stop.set()
        for worker in workers:
            worker.join(_END_WITHIN)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
    if failed is not None:
        raise failed
    if stopped or interrupts.asked:
        raise interrupted(f"with {count} workers", stage.checkpoint)
    return peak


def _packed(run: Run) -> Run:
    """The run without what cannot travel to another process."""
    return replace(run, parameters=dict(run.parameters), progress=SILENT, notes=[], resume=True)


def _work(run: Run, number: int, worker: int, todo: Any, messages: Any, stop: Any) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent passes it on
    try:
        torch.set_num_threads(run.threads)
        device = run.device
        if str(device) == "cuda" and torch.cuda.device_count() > 1:  # no number: take turns
            device = torch.device("cuda", worker % torch.cuda.device_count())
        run = replace(run, device=device, parameters=MappingProxyType(dict(run.parameters)))
        forget_peak(device)
        with deterministic(device), steady_memory():
            stage: Stage | None = None
            for at in range(number + 1):
                stage = Stage(run, at, stage)
            assert stage is not None
            while not stop.is_set():
                try:
                    index = todo.get(timeout=_LISTEN)
                except queue.Empty:
                    break
                stage.make(index, _Event(stop), _Said(messages))
        messages.put(("end", peak_so_far(device)))
    except InterruptedRunError:
        messages.put(("interrupted",))
    except ZsqError as error:
        words = {"what": error.what, "where": error.where, "remedy": error.remedy}
        messages.put(("error", type(error).__name__, words))
    except Exception as error:
        what = f"a worker process failed: {type(error).__name__}: {error}"
        messages.put(
            ("error", "CalibrationError", {"what": what, "where": None, "remedy": "try again with --workers 1"})
        )
    finally:
        with contextlib.suppress(Exception):
            messages.close()
            messages.join_thread()


def _again(kind: str, words: Mapping[str, str | None]) -> ZsqError:
    """A worker's error in this process."""
    known = getattr(errors, kind, CalibrationError)
    error: ZsqError = known(words["what"] or "a worker process failed", where=words["where"], remedy=words["remedy"])
    return error


def _died(code: int | None, stage: Stage) -> CalibrationError:
    return CalibrationError(
        f"a worker process ended with exit code {code}" + (" (killed, often for want of memory)" if code == -9 else ""),
        where=str(stage.checkpoint.folder),
        remedy="what the others finished is kept: go on with --resume and fewer --workers",
    )
