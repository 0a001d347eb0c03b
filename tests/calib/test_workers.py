"""Several processes make one set, and sets that never sit in memory."""

from __future__ import annotations

import functools
import os
import signal
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from zsq_deploy.calib import CalibrationSet, synthesis, workers
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import InterruptedRunError, UsageError

from .test_synthesis import Recorder, small

COMMON = {"method": "zeroq", "images": 8, "batch_size": 2, "parameters": {"steps": 7}, "device": "cpu", "seed": 5}


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_workers_make_the_same_bits_and_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    """Two workers with one thread each, one process with one thread, and two workers that are stopped in between."""
    torch.set_num_threads(1)
    alone = synthesize(small(), **COMMON)
    torch.set_num_threads(2)
    watching = Recorder()
    together = synthesize(small(), workers=2, progress=watching, **COMMON)
    assert together.digest == alone.digest
    assert together.manifest.parameters["outcome"]["threads"] == 1
    # two interpreters more, each with torch and the network
    assert together.manifest.peak_rss_bytes > alone.manifest.peak_rss_bytes + 2 * 100 * 2**20
    assert watching.steps == watching.total == 4 * 7
    assert {values["batch"] for values in watching.values} == {"1/4", "2/4", "3/4", "4/4"}

    with pytest.raises(InterruptedRunError, match="--resume") as caught:
        synthesize(small(), workers=2, workdir=tmp_path / "work", progress=Stopping(10), **COMMON)
    assert caught.value.exit_code == 130
    again = Recorder()
    resumed = synthesize(small(), workers=2, workdir=tmp_path / "work", resume=True, progress=again, **COMMON)
    assert resumed.digest == alone.digest
    assert 0 < len(again.values) < 4 * 7
    assert not list((tmp_path / "work").glob("*"))


class Stopping(Recorder):
    """Presses Ctrl-C after some steps, as a terminal does: the signal comes to this process."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.pressed = after, False

    def task(self, title: str, total: float) -> object:
        outer, parent = self, super().task(title, total)

        @contextmanager
        def watched() -> object:
            with parent as inner:

                class Counting:
                    def advance(self, steps: float = 1, **values: float | str) -> None:
                        inner.advance(steps, **values)
                        if len(outer.values) >= outer.after and not outer.pressed:
                            outer.pressed = True  # once: a second one interrupts at once
                            os.kill(os.getpid(), signal.SIGINT)

                yield Counting()

        return watched()


def test_a_worker_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = small()
    packed = workers._packed
    monkeypatch.setattr(workers, "_packed", lambda run: packed(run.__class__(**{**vars(run), "seed": 6})))
    with pytest.raises(Exception, match="another one; different: seed") as caught:
        synthesize(model, workers=2, workdir=tmp_path, **COMMON)
    assert type(caught.value).__name__ == "StaleArtifactError"


def test_workers_are_counted_from_one() -> None:
    with pytest.raises(UsageError, match="0 workers"):
        synthesize(small(), workers=0, **COMMON)


@pytest.mark.parametrize("method", ["zeroq", "uniform"])
def test_a_set_in_a_folder_is_the_one_in_memory(tmp_path: Path, method: str) -> None:
    common = {**COMMON, "method": method, "parameters": COMMON["parameters"] if method == "zeroq" else {}}
    held = synthesize(small(), **common)
    written = synthesize(small(), output=tmp_path / "set", workdir=tmp_path / "work", **common)
    assert written.digest == held.digest == CalibrationSet.open(tmp_path / "set").digest
    assert np.array_equal(written.arrays()["image"], held.arrays()["image"])
    assert written.manifest.seconds > 0
    # what was made is still there for a caller who was interrupted while putting the set in its place
    again = Recorder()
    synthesize(small(), output=tmp_path / "set", workdir=tmp_path / "work", resume=True, progress=again, **common)
    assert method == "uniform" or not again.values


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are numpy's, which tracemalloc sees: a set in a folder never holds more than a batch and a shard that is filled."""
    writer = functools.partial(synthesis.CalibrationWriter, shard_bytes=32 * 1440)
    monkeypatch.setattr(synthesis, "CalibrationWriter", writer)
    peaks = []
    for count in (64, 512):
        tracemalloc.start()
        synthesize(small(), method="uniform", images=count, output=tmp_path / str(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one = 4 * int(np.prod(small().inputs[0].with_batch(1)))
    assert peaks[1] - peaks[0] < 100 * one  # of 448 that came on top
