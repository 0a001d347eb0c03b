"""Where two executions of one network part: the first tensor that differs, and how a rounding flip there grew.

Two implementations of the same integer network differ because one kernel, somewhere, rounds one accumulator another way.
What is seen at the output is that flip after all the layers that follow. Walking the tensors in topological order finds the
layer where it starts, which is the only one that has to be explained.

The same walk, over the quantized twin and the float twin, gives the per-layer SQNR: where the quantization noise enters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import DataError, EngineError, UsageError
from zsq_deploy.verify.parity import LSB_SLACK, sqnr_db

__all__ = [
    "Divergence",
    "FlipTrace",
    "TensorDifference",
    "TensorWalk",
    "first_divergence",
    "layer_quality",
    "walk_tensors",
]

Array = npt.NDArray[Any]

#: Runs one execution on one batch and gives the named tensors.
Fetch = Callable[[Mapping[str, Array], Sequence[str]], Mapping[str, Array]]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in both executions.

    Attributes:
        name: Value name in the graph.
        index: Place in topological order, from 0.
        elements: Compared numbers.
        samples_differing: Samples in which at least one element differs.
        differing_share: Share of elements whose codes differ (by at least half a step; at all, where no step is known).
        max_lsb: Largest difference in steps; ``None`` where no step is known.
        mean_lsb: Mean absolute difference in steps; ``None`` where no step is known.
        max_abs: Largest difference in the tensor's own unit.
        sqnr_db: Signal to noise ratio in dB; 320 where nothing differs.
    """

    name: str
    index: int
    elements: int
    samples_differing: int
    differing_share: float
    max_lsb: float | None
    mean_lsb: float | None
    max_abs: float
    sqnr_db: float

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the keys are those of the report."""
        return {
            "name": self.name,
            "index": self.index,
            "elements": self.elements,
            "samples_differing": self.samples_differing,
            "differing_share": self.differing_share,
            "max_lsb": self.max_lsb,
            "mean_lsb": self.mean_lsb,
            "max_abs": self.max_abs,
            "sqnr_db": self.sqnr_db,
        }


@dataclass(frozen=True)
class FlipTrace:
    """One sample, followed from its first differing tensor to the output: how far a single flip travels.

    Of all samples that differ it is one that starts at the earliest tensor, with the fewest differing elements there (usually
    one).

    Attributes:
        sample: Number of the sample, from 0.
        start: The tensor in which this sample first differs.
        names: The tensors from `start` on.
        differing: How many elements differ in each of them.
        elements: How many elements each of them has.
        max_lsb: The largest difference in each of them, in steps (``nan`` where no step is known).
    """

    sample: int
    start: str
    names: tuple[str, ...]
    differing: tuple[int, ...]
    elements: tuple[int, ...]
    max_lsb: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "sample": self.sample,
            "start": self.start,
            "names": list(self.names),
            "differing": list(self.differing),
            "elements": list(self.elements),
            "max_lsb": [value if math.isfinite(value) else None for value in self.max_lsb],
        }


@dataclass(frozen=True)
class Divergence:
    """The result of a walk.

    Attributes:
        samples: Number of compared samples.
        first: Name of the first tensor that differs in any sample; ``None`` if none does.
        tensors: All compared tensors in topological order.
        flip: How one flip grew; ``None`` if nothing differs.
    """

    samples: int
    first: str | None
    tensors: tuple[TensorDifference, ...]
    flip: FlipTrace | None

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the keys are those of the report."""
        return {
            "images": self.samples,
            "first": self.first,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "flip": self.flip.to_json() if self.flip else None,
        }

    def __str__(self) -> str:
        """One sentence."""
        if self.first is None:
            return f"no tensor differs ({len(self.tensors)} tensors, {self.samples} samples)"
        tensor = next(t for t in self.tensors if t.name == self.first)
        last = self.tensors[-1]
        return (
            f"first differing tensor: {self.first} (number {tensor.index + 1} of {len(self.tensors)}), "
            f"{tensor.differing_share:.3%} of its elements; {last.differing_share:.3%} of the elements of {last.name}"
        )


class TensorWalk:
    """Compares many tensors of two executions, batch by batch, in constant memory.

    Args:
        names: The tensors in topological order.
        steps: The quantization step of each tensor, where it has one. A tensor on a grid differs where the codes differ.
    """

    def __init__(self, names: Sequence[str], steps: Mapping[str, float] | None = None) -> None:
        if not names or len(set(names)) != len(names):
            raise UsageError(
                "the tensors to compare have to be named once each, and at least one of them",
                where="TensorWalk(names)",
                remedy="give the value names of the graph in topological order",
            )
        self.names = tuple(names)
        self.steps = {name: float(step) for name, step in (steps or {}).items() if step and math.isfinite(step)}
        size = len(self.names)
        self._samples = 0
        self._elements = np.zeros(size, np.int64)
        self._differing = np.zeros(size, np.int64)
        self._touched = np.zeros(size, np.int64)
        self._max = np.zeros(size)
        self._sum = np.zeros(size)
        self._signal = np.zeros(size)
        self._noise = np.zeros(size)
        self._flip: tuple[tuple[int, int, int], FlipTrace] | None = None

    def update(self, engine: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
        """Add one batch: every named tensor from both sides, first axis samples.

        Raises:
            EngineError: A tensor is missing, or its shapes differ.
        """
        counts: list[npt.NDArray[np.int64]] = []
        largest: list[npt.NDArray[np.float64]] = []
        sizes: list[int] = []
        batch = 0
        for index, name in enumerate(self.names):
            for side, values in (("engine", engine), ("reference", reference)):
                if name not in values:
                    raise EngineError(
                        f"the {side} gives no tensor {name!r}",
                        where=name,
                        remedy="compare tensors that both sides have",
                    )
            a, b = np.asarray(engine[name]), np.asarray(reference[name])
            if a.shape != b.shape:
                raise EngineError(
                    f"tensor {name!r} has shape {a.shape} in the engine and {b.shape} in the reference",
                    where=name,
                    remedy="compare the same network, fed with the same batch",
                )
            a = a.reshape(len(a) if a.ndim else 1, -1).astype(np.float64)
            b = b.reshape(a.shape).astype(np.float64)
            with np.errstate(invalid="ignore"):
                error = np.where(a == b, 0.0, a - b)
            error = np.where(np.isfinite(error), error, np.finfo(np.float32).max)
            size = np.abs(error)
            step = self.steps.get(name)
            differs = size > (0.5 + LSB_SLACK) * step if step else size > 0
            in_sample = differs.sum(axis=1)
            self._elements[index] += size.size
            self._differing[index] += int(in_sample.sum())
            self._touched[index] += int(np.count_nonzero(in_sample))
            self._max[index] = max(self._max[index], float(size.max(initial=0.0)))
            self._sum[index] += float(size.sum())
            self._signal[index] += float(np.square(np.where(np.isfinite(b), b, 0.0)).sum())
            self._noise[index] += float(np.square(error).sum())
            counts.append(in_sample)
            largest.append(size.max(axis=1, initial=0.0) / (step or math.nan))
            sizes.append(size.shape[1])
            batch = max(batch, len(a))
        self._trace(batch, counts, largest, sizes)
        self._samples += batch

    def _trace(
        self,
        batch: int,
        counts: list[npt.NDArray[np.int64]],
        largest: list[npt.NDArray[np.float64]],
        sizes: list[int],
    ) -> None:
        # Tensors with another first axis (a flattened token axis, say) cannot be followed sample by sample.
        followed = [index for index, column in enumerate(counts) if len(column) == batch]
        if not followed:
            return
        table = np.stack([counts[index] for index in followed], axis=1)
        for sample in np.flatnonzero(table.any(axis=1)):
            start = int(np.argmax(table[sample] > 0))
            key = (followed[start], int(table[sample, start]), self._samples + int(sample))
            if self._flip is not None and self._flip[0] <= key:
                continue
            rest = followed[start:]
            trace = FlipTrace(
                sample=self._samples + int(sample),
                start=self.names[rest[0]],
                names=tuple(self.names[index] for index in rest),
                differing=tuple(int(counts[index][sample]) for index in rest),
                elements=tuple(sizes[index] for index in rest),
                max_lsb=tuple(float(largest[index][sample]) for index in rest),
            )
            self._flip = (key, trace)

    def result(self) -> Divergence:
        """What was found.

        Raises:
            DataError: Nothing was compared.
        """
        if self._samples == 0:
            raise DataError("nothing was compared", where="TensorWalk", remedy="give at least one sample")
        tensors = []
        for index, name in enumerate(self.names):
            step = self.steps.get(name)
            elements = int(self._elements[index])
            tensors.append(
                TensorDifference(
                    name=name,
                    index=index,
                    elements=elements,
                    samples_differing=int(self._touched[index]),
                    differing_share=float(self._differing[index]) / elements if elements else 0.0,
                    max_lsb=float(self._max[index]) / step if step else None,
                    mean_lsb=float(self._sum[index]) / elements / step if step and elements else None,
                    max_abs=float(self._max[index]),
                    sqnr_db=sqnr_db(float(self._signal[index]), float(self._noise[index])),
                )
            )
        first = next((tensor.name for tensor in tensors if tensor.samples_differing), None)
        return Divergence(self._samples, first, tuple(tensors), self._flip[1] if self._flip else None)


def first_divergence(
    names: Sequence[str],
    engine: Mapping[str, Array],
    reference: Mapping[str, Array],
    steps: Mapping[str, float] | None = None,
) -> Divergence:
    """Compare the tensors of two executions that are in memory at once; see :class:`TensorWalk`."""
    walk = TensorWalk(names, steps)
    walk.update(engine, reference)
    return walk.result()


def layer_quality(
    names: Sequence[str],
    quantized: Mapping[str, Array],
    floating: Mapping[str, Array],
    steps: Mapping[str, float] | None = None,
) -> tuple[TensorDifference, ...]:
    """SQNR of every tensor of the quantized network against the float one, in topological order.

    The noise of a tensor is what all layers up to it have added.
    """
    return first_divergence(names, quantized, floating, steps).tensors


def walk_tensors(
    batches: Iterable[Mapping[str, Array]],
    engine: Fetch,
    reference: Fetch,
    names: Sequence[str],
    steps: Mapping[str, float] | None = None,
) -> Divergence:
    """Run two executions over some batches and compare the named tensors.

    Args:
        batches: Inputs by name.
        engine: ``engine(feeds, names)`` gives the named tensors of one execution, by name; for codes a step is 1.
        reference: The same of the other execution.
        names: The tensors in topological order, as both sides name them.
        steps: The quantization step of each tensor, where it has one.
    """
    walk = TensorWalk(names, steps)
    for feeds in batches:
        walk.update(engine(feeds, names), reference(feeds, names))
    return walk.result()
