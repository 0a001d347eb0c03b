"""Bias correction of an engine: which images it is measured on, and which decide whether it stays.

A correction fits the images that it was measured on. Whether it is right for others is therefore asked of others: of images of the same set
that it has not seen, and of noise that has nothing in common with them but the colours.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends import Engine
from zsq_deploy.backends.measured import move
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.model import Graph, Model
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import correct_bias
from zsq_deploy.verify.parity import sqnr_db

__all__ = ["Correction", "compare_outputs", "scrambled", "shuffled"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_MEASURED = 64
"""Images for bias correction; one number a channel is known well enough from so many."""

_JUDGES = 32
"""Images of each kind that decide whether it is kept."""


def scrambled(feeds: Feeds, seed: int) -> dict[str, Array]:
    """Pictures whose structure is gone: colours, contrast and spectrum stay, the phases are random.

    Args:
        feeds: By input name; what is no ``[N, C, H, W]`` stays as it is.
        seed: Of the phases.
    """
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for name, x in feeds.items():
        if x.ndim != 4 or not np.issubdtype(x.dtype, np.floating):
            found[name] = x
            continue
        noise = np.fft.rfft2(random.standard_normal((len(x), 1, *x.shape[2:])))
        turned = np.fft.irfft2(np.fft.rfft2(x) * _directions(noise), s=x.shape[2:])
        ends = x.min((2, 3), keepdims=True), x.max((2, 3), keepdims=True)
        found[name] = np.clip(turned, *ends).astype(x.dtype)
    return found


def _directions(spectrum: Array) -> Array:
    """Complex numbers of length one; the mean of a picture keeps its sign."""
    found = np.exp(1j * np.angle(spectrum))
    found[..., 0, 0] = 1.0
    return found


def shuffled(feeds: Feeds, seed: int) -> dict[str, Array]:
    """Pictures whose pixels changed places: white noise of their colours; arguments as for :func:`scrambled`."""
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for name, x in feeds.items():
        if x.ndim != 4:
            found[name] = x
            continue
        flat = x.reshape(*x.shape[:2], -1)
        found[name] = np.stack([one[:, random.permutation(one.shape[1])] for one in flat]).reshape(x.shape)
    return found


@dataclass
class Correction:
    """Corrects the biases of an engine on its own Q/DQ graph, and keeps that if it helps.

    Attributes:
        model: The network.
        images: Synthetic images.
        backend: The runtime's.
        build: Builds the engine: ``build(folder, options=...)``.
        threads: Of the engines that are compared.
        seed: Of the noise.
        tolerance: How many dB it may cost.
        progress: Where to report.
        rows: What was measured, as candidates of the report.
        notes: What was rejected.
    """

    model: Model
    images: CalibrationSet
    backend: Any
    build: Callable[..., Engine]
    threads: int
    seed: int
    tolerance: float
    progress: Progress = SILENT
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __call__(self, engine: Engine, options: Any) -> tuple[Engine, Any]:
        """The engine with corrected biases in the same folder, or the engine as it was; and its options."""
        corrected: Mapping[str, Array] = correct_bias(
            self.model.folded(),
            Graph.load(engine.qdq_path),
            self._measured(),
            seed=self.seed,
            progress=self.progress,
        )
        home = engine.path.parent
        changed = options.with_(biases=dict(corrected))
        second = self.build(home.with_name(f"{home.name}-corrected"), options=changed)
        pairs = [
            compare_outputs(self.backend, engine, second, list(kind), self.threads)
            for kind in (self._unseen(), self._noise())
        ]
        kept = float(np.mean([after - before for before, after in pairs])) >= -self.tolerance
        (before, after), (noise_before, noise_after) = pairs
        words = (
            f"{after:.1f} dB with it, {before:.1f} dB without it on images that it was not measured on, "
            f"{noise_after:.1f} and {noise_before:.1f} dB on noise"
        )
        self.rows.append(
            {
                "name": f"{options.label}, biases corrected",
                "chosen": False,
                "sqnr_db": after,
                "bytes": second.bytes,
                "reason": words if kept else f"{words}: rejected",
            }
        )
        if not kept:
            self.notes.append(f"bias correction was rejected: {words}")
            shutil.rmtree(second.path.parent)
            return engine, options
        shutil.rmtree(home)
        left = second.path.parent
        second = move(second, home)
        left.rmdir()
        return second, changed

    @property
    def _size(self) -> int:
        return 8 if self.model.dynamic_batch else 1

    def _first(self) -> int:
        """How many images of the set the correction sees: the others judge it."""
        count = len(self.images)
        return min(_MEASURED, max(count - _JUDGES, count - count // 2))

    def _measured(self) -> Iterator[Feeds]:
        """What it is measured on. Images that no batch normalization shaped know nothing of the network: some lose their structure, too."""
        yield from self.images.take(0, self._first()).batches(self._size)
        if not self.model.batch_norms():
            few = self.images.take(0, max(1, self._first() // 3)).batches(self._size)
            for number, feeds in enumerate(few):
                yield scrambled(feeds, self.seed * 1000 + number)

    def _unseen(self) -> Iterator[Feeds]:
        count = len(self.images)
        judges = min(_JUDGES, max(count - self._first(), 1))
        yield from self.images.take(count - judges, count).batches(self._size)

    def _noise(self) -> Iterator[Feeds]:
        for number, feeds in enumerate(self._unseen()):
            yield shuffled(feeds, self.seed * 1000 + number)


def compare_outputs(
    backend: Any, first: Engine, second: Engine, batches: Sequence[Feeds], threads: int
) -> tuple[float, float]:
    """SQNR in dB of the outputs of two engines against the float network; the worst output counts.

    Scores that are all too high by the same are no error for who reads the largest. So an output of one row an image is looked at twice, as it is and
    less the mean of each row, and the smaller number counts.
    """
    floating = backend.runner(first.float_path, first.target, threads=threads, mode="float")
    runners = [backend.runner(engine.path, engine.target, threads=threads) for engine in (first, second)]
    signal: dict[str, float] = {}
    noise: list[dict[str, float]] = [{}, {}]
    for feeds in batches:
        wanted = dict(_views(floating.run(feeds)))
        for name, value in wanted.items():
            signal[name] = signal.get(name, 0.0) + float(np.square(value).sum())
        for runner, sums in zip(runners, noise, strict=True):
            for name, value in _views(runner.run(feeds)):
                sums[name] = sums.get(name, 0.0) + float(np.square(value - wanted[name]).sum())
    first_db, second_db = (min(sqnr_db(signal[name], sums[name]) for name in signal) for sums in noise)
    return first_db, second_db


def _views(outputs: Feeds) -> Iterator[tuple[str, Array]]:
    for name, value in outputs.items():
        wide = value.astype(np.float64)
        yield name, wide
        if wide.ndim == 2 and wide.shape[1] > 2:
            yield f"{name}, less the mean of each row", wide - wide.mean(1, keepdims=True)
