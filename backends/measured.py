"""Engines measured against each other and against float, and the one that is kept; the same for every runtime.

Speed is measured in turns (engine, engine, float, engine, ...), so that a machine that changes its pace changes it for all; quality is
how far the outputs are from the float network's on given images (synthetic ones: no labels and no real data are needed).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.base import Engine, Runner

__all__ = ["Choice", "Measured", "first_image", "move", "paired_latency", "pick", "quality", "remove", "run_batch"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class _Batched(Runner, Protocol):
    """A runner that knows the batch size that its file insists on."""

    @property
    def fixed_batch(self) -> int | None:
        """The batch size, or ``None``."""


_TURN = 5
_SAME_SPEED = 0.04
"""Medians closer than this share are taken as equal on a shared machine; the more exact engine wins then."""


@dataclass(frozen=True)
class Measured:
    """One way of building the engine, measured.

    Attributes:
        options: How it was built (the runtime's build options).
        median_ms: Median latency of one image.
        float_ms: Median latency of the float model in the same rounds.
        agreement: Share of images (or places of an image) with the same top-1 as float.
        sqnr_db: Signal to quantization noise of the outputs.
        bytes: Size of the file.
    """

    options: Any
    median_ms: float
    float_ms: float
    agreement: float
    sqnr_db: float
    bytes: int

    @property
    def speedup(self) -> float:
        """How many times faster than float32."""
        return self.float_ms / self.median_ms

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "label": self.options.label,
            "exclude": list(self.options.exclude),
            "median_ms": self.median_ms,
            "float_ms": self.float_ms,
            "speedup": self.speedup,
            "agreement": self.agreement,
            "sqnr_db": self.sqnr_db,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Choice:
    """The engine that was chosen, and against what.

    Attributes:
        engine: The engine.
        chosen: Its measurement.
        measured: All candidates.
        slower_than_float: No integer engine was faster than float32 on this machine.
        mixed: Then: the fastest mix of integer and float layers that was tried, with its ``options.exclude``.
        notes: What the user should read: why, and what else could be done.
    """

    engine: Engine
    chosen: Measured
    measured: tuple[Measured, ...]
    slower_than_float: bool
    mixed: Measured | None = None
    notes: tuple[str, ...] = field(default=())


def paired_latency(
    runners: Sequence[Runner], feeds: Feeds, *, rounds: int = 40, warmup: int = 5, quantile: float = 0.5
) -> list[float]:
    """Milliseconds (median, or another quantile) of several runners on one input, measured in turns of a few runs each.

    The first run of a turn is not counted: it pays for the caches that the runner before it left behind.
    """
    times: list[list[float]] = [[] for _ in runners]
    for number in range(-(-rounds // _TURN) + 1):
        for one, kept in zip(runners, times, strict=True):
            for again in range(warmup if number == 0 else _TURN + 1):
                started = time.perf_counter()
                one.run(feeds)
                if number and again:
                    kept.append((time.perf_counter() - started) * 1e3)
    return [float(np.quantile(kept, quantile)) for kept in times]


def quality(outputs: Sequence[Mapping[str, Array]], reference: Sequence[Mapping[str, Array]]) -> tuple[float, float]:
    """Top-1 agreement and signal-to-noise ratio (dB) of outputs against the float network's.

    Top-1 is taken over the last axis of every float output with 2 to 100,000 places there; without such an output the agreement is 1.
    The ratio is the worst one over the outputs.
    """
    same = total = 0
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for got, want in zip(outputs, reference, strict=True):
        for name, expected in want.items():
            if not np.issubdtype(expected.dtype, np.floating):
                continue
            value = got[name].astype(np.float64)
            expected = expected.astype(np.float64)
            signal[name] = signal.get(name, 0.0) + float(np.square(expected).sum())
            noise[name] = noise.get(name, 0.0) + float(np.square(value - expected).sum())
            if expected.ndim == 2 and expected.shape[-1] > 1:
                same += int((value.argmax(-1) == expected.argmax(-1)).sum())
                total += expected.shape[0]
    ratios = [
        10 * float(np.log10(max(signal[name], 1e-300) / max(noise[name], 1e-300))) if noise[name] > 0 else 200.0
        for name in signal
    ]
    return (same / total if total else 1.0), min(ratios, default=200.0)


def first_image(feeds: Feeds) -> dict[str, Array]:
    """The first sample of a batch."""
    return {name: value[:1] for name, value in feeds.items()}


def pick(
    measured: Sequence[Measured], tolerance_agreement: float, tolerance_db: float, *, trust_times: bool = True
) -> int:
    """Index of the fastest candidate that is about as exact as the best; among equally fast ones the most exact.

    Where times mean nothing (another processor's target), it is the first of the most exact ones.
    """
    top_agreement = max(one.agreement for one in measured)
    top_db = max(one.sqnr_db for one in measured)
    good = [
        index
        for index, one in enumerate(measured)
        if one.agreement >= top_agreement - tolerance_agreement and one.sqnr_db >= top_db - tolerance_db
    ]
    if not good:  # the one with the best agreement is not the one with the best ratio
        good = [index for index, one in enumerate(measured) if one.agreement == top_agreement]
    if not trust_times:
        return max(good, key=lambda index: (round(measured[index].sqnr_db, 1), -index))
    fastest = min(measured[index].median_ms for index in good)
    equal = [index for index in good if measured[index].median_ms <= fastest * (1 + _SAME_SPEED)]
    return max(equal, key=lambda index: (measured[index].sqnr_db, -measured[index].median_ms))


def run_batch(one: _Batched, feeds: Feeds) -> dict[str, Array]:
    """All outputs; a file with a fixed batch takes its batches one after the other."""
    fixed = one.fixed_batch
    count = len(next(iter(feeds.values())))
    if fixed is None or fixed == count:
        return one.run(feeds)
    parts = [
        one.run({name: value[start : start + fixed] for name, value in feeds.items()})
        for start in range(0, count - fixed + 1, fixed)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def move(engine: Engine, folder: Path) -> Engine:
    """Move an engine's files up into their final folder."""
    home = engine.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(home.iterdir()):
        file.replace(folder / file.name)
    return replace(
        engine,
        path=folder / engine.path.name,
        weights_path=_moved(engine.weights_path, folder),
        vendor_path=_moved(engine.vendor_path, folder),
        qdq_path=folder / engine.qdq_path.name,
        float_path=folder / engine.float_path.name,
    )


def remove(folder: Path) -> None:
    """Remove a folder of candidates, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _moved(path: Path | None, folder: Path) -> Path | None:
    return None if path is None else folder / path.name
