"""How far two implementations of one network are apart, in units of the output's quantization step.

One *LSB* is the quantization step of an output: the scale of its QuantizeLinear where the output is quantized, and the
calibrated range of the output divided by 255 where it stays in float. A difference is never judged by a bare tolerance:
the result says how many outputs are identical, how many lie within half, one and two steps, how far the worst one is,
what the error weighs against the signal (SQNR, cosine), and how often the decision (the largest class) is the same.

Everything is accumulated batch by batch in constant memory. Counts are exact, and the sums are kept without rounding error
(Shewchuk, "Adaptive Precision Floating-Point Arithmetic", 1997), so the result does not depend on how the samples were
cut into batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import DataError, EngineError, UsageError

__all__ = ["SQNR_LIMIT_DB", "LsbHistogram", "OutputParity", "Parity", "ParityAccumulator", "compare", "sqnr_db"]

Array = npt.NDArray[Any]

#: What is given for identical outputs: no double can hold a smaller relative error than 2**-53, which is 319 dB.
SQNR_LIMIT_DB = 320.0

#: Integer differences of LSB are told apart with this much slack: two dequantized float32 values, 1 step apart, differ by
#: 1 step give or take the rounding of numbers of up to 2**16 steps.
LSB_SLACK = 4e-3

#: The histogram has one bin for each whole LSB up to this distance, and one beyond it on each side.
HISTOGRAM_REACH = 16


class _ExactSum:
    """A sum of doubles without rounding error: non-overlapping partial sums, rounded once when asked for."""

    __slots__ = ("_partials",)

    def __init__(self) -> None:
        self._partials: list[float] = []

    def add(self, values: Iterable[float]) -> None:
        partials = self._partials
        for value in values:
            x = float(value)
            count = 0
            for y in partials:
                if abs(x) < abs(y):
                    x, y = y, x
                high = x + y
                low = y - (high - x)
                if low:
                    partials[count] = low
                    count += 1
                x = high
            partials[count:] = [x]

    def value(self) -> float:
        return math.fsum(self._partials)


@dataclass(frozen=True)
class LsbHistogram:
    """Signed differences (engine minus reference), rounded to whole LSB.

    Attributes:
        lsb: Bin centres, ``-16 .. 16``; bin 0 holds differences below half a step.
        counts: Number of output elements in each bin.
        below: Elements farther below than the first bin, or not comparable (NaN, infinite on one side).
        above: Elements farther above than the last bin.
    """

    lsb: tuple[int, ...]
    counts: tuple[int, ...]
    below: int
    above: int

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {"lsb": list(self.lsb), "counts": list(self.counts), "below": self.below, "above": self.above}


@dataclass(frozen=True)
class OutputParity:
    """The comparison of one output (or, as :class:`Parity`, of all of them).

    Attributes:
        samples: Number of samples (first axis).
        elements: Number of compared numbers.
        step: One LSB in the output's own unit (``nan`` in the summary over several outputs).
        equal_share: Share of elements that are identical, bit for bit.
        within_half_lsb: Share within half a step (the same code, if both are rounded to the grid).
        within_1_lsb: Share within one step.
        within_2_lsb: Share within two steps.
        max_lsb: Largest difference in steps (over finite elements).
        mean_lsb: Mean absolute difference in steps.
        sqnr_db: ``10 log10(sum reference**2 / sum error**2)``; 320 where nothing differs.
        cosine: Cosine similarity of all elements seen as one vector.
        non_finite: Elements that are NaN or infinite in one and not the same in the other; they count as not within.
        histogram: Signed differences in LSB.
        top1_agreement: Share of samples with the same largest class; ``None`` for outputs that are no class scores.
        near_ties: Samples in which the reference's two largest scores are within one step.
        tie_disagreements: Samples with another largest class, where that class is within one step of the largest score
            in the reference: 8 bits cannot tell the two apart.
        disagreements: Samples with another largest class that is no such tie.
    """

    samples: int
    elements: int
    step: float
    equal_share: float
    within_half_lsb: float
    within_1_lsb: float
    within_2_lsb: float
    max_lsb: float
    mean_lsb: float
    sqnr_db: float
    cosine: float
    non_finite: int
    histogram: LsbHistogram
    top1_agreement: float | None = None
    near_ties: int | None = None
    tie_disagreements: int | None = None
    disagreements: int | None = None

    @property
    def identical(self) -> bool:
        """Every element is equal, bit for bit."""
        return self.equal_share == 1.0

    @property
    def top1_agreement_but_ties(self) -> float | None:
        """Top-1 agreement if ties are not held against the engine."""
        if self.top1_agreement is None or self.disagreements is None:
            return None
        return 1.0 - self.disagreements / self.samples

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the keys are those of the report."""
        return {
            "images": self.samples,
            "elements": self.elements,
            "step": self.step if math.isfinite(self.step) else None,
            "equal_share": self.equal_share,
            "within_half_lsb": self.within_half_lsb,
            "within_1_lsb": self.within_1_lsb,
            "within_2_lsb": self.within_2_lsb,
            "max_lsb": self.max_lsb,
            "mean_lsb": self.mean_lsb,
            "sqnr_db": self.sqnr_db,
            "cosine": self.cosine,
            "non_finite": self.non_finite,
            "histogram": self.histogram.to_json(),
            "top1_agreement": self.top1_agreement,
            "top1_agreement_but_ties": self.top1_agreement_but_ties,
            "near_ties": self.near_ties,
            "tie_disagreements": self.tie_disagreements,
            "disagreements": self.disagreements,
        }


@dataclass(frozen=True)
class Parity(OutputParity):
    """All outputs together: shares over all elements, the worst output's SQNR, cosine and top-1 agreement.

    Attributes:
        outputs: Each output by its name.
    """

    outputs: Mapping[str, OutputParity] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON value with the outputs one by one."""
        each = {name: output.to_json() for name, output in (self.outputs or {}).items()}
        return {**super().to_json(), "outputs": each}


def sqnr_db(signal_power: float, noise_power: float) -> float:
    """Signal to quantization noise ratio in dB, held within plus or minus 320 (identical, or no signal at all)."""
    if noise_power <= 0:
        return SQNR_LIMIT_DB
    if signal_power <= 0:
        return -SQNR_LIMIT_DB
    ratio = 10 * (math.log10(signal_power) - math.log10(noise_power))
    return max(-SQNR_LIMIT_DB, min(SQNR_LIMIT_DB, ratio))


class _Output:
    """Running counts and sums of one output."""

    def __init__(self, name: str, step: float) -> None:
        if not (math.isfinite(step) and step > 0):
            raise UsageError(
                f"the quantization step of output {name!r} is {step}; it has to be a positive number",
                where=name,
                remedy="use the scale of the output's QuantizeLinear, or its calibrated range divided by 255",
            )
        self.name = name
        self.step = step
        self.samples = self.elements = self.equal = self.half = self.one = self.two = self.non_finite = 0
        self.below = self.above = 0
        self.counts = np.zeros(2 * HISTOGRAM_REACH + 1, np.int64)
        self.max_lsb = 0.0
        self.sums = {key: _ExactSum() for key in ("lsb", "signal", "noise", "dot", "engine")}
        self.classes = False
        self.decided = self.agreed = self.near_ties = self.tie_disagreements = 0

    def update(self, engine: Array, reference: Array) -> None:
        if engine.shape != reference.shape:
            raise EngineError(
                f"output {self.name!r} has shape {engine.shape}, the reference's has {reference.shape}",
                where=self.name,
                remedy="compare the same network, fed with the same batch",
            )
        if reference.ndim == 0:
            engine, reference = engine.reshape(1), reference.reshape(1)
        samples = reference.shape[0]
        if samples == 0 or reference.size == 0:
            return
        equal = (engine == reference) | (_is_nan(engine) & _is_nan(reference))
        a = np.ascontiguousarray(engine, np.float64).reshape(samples, -1)
        b = np.ascontiguousarray(reference, np.float64).reshape(samples, -1)
        finite = np.isfinite(a) & np.isfinite(b)
        broken = ~finite & ~equal.reshape(samples, -1)
        if not finite.all():
            a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        error = a - b
        lsb = error / self.step
        size = np.abs(lsb)

        self.samples += samples
        self.elements += a.size
        self.equal += int(np.count_nonzero(equal))
        self.non_finite += int(np.count_nonzero(broken))
        for name, limit in (("half", 0.5), ("one", 1.0), ("two", 2.0)):
            within = int(np.count_nonzero((size <= limit + LSB_SLACK) & ~broken))
            setattr(self, name, getattr(self, name) + within)
        self.max_lsb = max(self.max_lsb, float(size.max()))

        # Half a step rounds towards zero here: such a value is as near to one code as to the other.
        bins = np.sign(lsb) * np.ceil(size - 0.5 - LSB_SLACK)
        kept = bins[~broken]
        self.below += int(np.count_nonzero(kept < -HISTOGRAM_REACH)) + int(np.count_nonzero(broken))
        self.above += int(np.count_nonzero(kept > HISTOGRAM_REACH))
        inside = kept[np.abs(kept) <= HISTOGRAM_REACH].astype(np.int64)
        self.counts += np.bincount(inside + HISTOGRAM_REACH, minlength=self.counts.size)

        # One sum a sample, so that no cut into batches changes the order of any rounding addition.
        self.sums["lsb"].add(size.sum(axis=1))
        self.sums["signal"].add((b * b).sum(axis=1))
        self.sums["noise"].add((error * error).sum(axis=1))
        self.sums["dot"].add((a * b).sum(axis=1))
        self.sums["engine"].add((a * a).sum(axis=1))
        self._decide(engine, reference)

    def _decide(self, engine: Array, reference: Array) -> None:
        scores, expected = class_scores(engine), class_scores(reference)
        if scores is None or expected is None:
            return
        self.classes = True
        rows = np.arange(len(expected))
        choice, wanted = scores.argmax(axis=1), expected.argmax(axis=1)
        with np.errstate(invalid="ignore"):  # infinite scores: inf - inf is no tie
            top_two = np.partition(expected, -2, axis=1)[:, -2:]
            near = (top_two[:, 1] - top_two[:, 0]) / self.step <= 1 + LSB_SLACK
            behind = (expected[rows, wanted] - expected[rows, choice]) / self.step
        other = choice != wanted
        self.decided += len(expected)
        self.agreed += int(np.count_nonzero(~other))
        self.near_ties += int(np.count_nonzero(near))
        self.tie_disagreements += int(np.count_nonzero(other & (behind <= 1 + LSB_SLACK)))

    def histogram(self) -> LsbHistogram:
        reach = tuple(range(-HISTOGRAM_REACH, HISTOGRAM_REACH + 1))
        return LsbHistogram(reach, tuple(int(c) for c in self.counts), self.below, self.above)

    def result(self) -> OutputParity:
        n = self.elements
        power = {key: total.value() for key, total in self.sums.items()}
        return OutputParity(
            samples=self.samples,
            elements=n,
            step=self.step,
            equal_share=self.equal / n,
            within_half_lsb=self.half / n,
            within_1_lsb=self.one / n,
            within_2_lsb=self.two / n,
            max_lsb=self.max_lsb,
            mean_lsb=power["lsb"] / n,
            sqnr_db=sqnr_db(power["signal"], power["noise"]) if not self.non_finite else -SQNR_LIMIT_DB,
            cosine=_cosine(power["dot"], power["engine"], power["signal"]),
            non_finite=self.non_finite,
            histogram=self.histogram(),
            top1_agreement=self.agreed / self.decided if self.classes else None,
            near_ties=self.near_ties if self.classes else None,
            tie_disagreements=self.tie_disagreements if self.classes else None,
            disagreements=self.decided - self.agreed - self.tie_disagreements if self.classes else None,
        )


def _is_nan(array: Array) -> npt.NDArray[np.bool_]:
    if array.dtype.kind not in "fc":
        return np.zeros(array.shape, np.bool_)
    return np.asarray(np.isnan(array))


def _cosine(dot: float, power_a: float, power_b: float) -> float:
    if power_a <= 0 or power_b <= 0:
        return 1.0 if power_a == power_b else 0.0
    return max(-1.0, min(1.0, dot / (math.sqrt(power_a) * math.sqrt(power_b))))


def class_scores(output: Array) -> npt.NDArray[np.float64] | None:
    """An output as scores [samples, classes], or ``None`` if it is none (another rank, one column, whole numbers).

    Trailing axes of length 1, as a global pooling leaves them, are dropped.
    """
    shape = list(output.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 2 or shape[1] < 2 or output.dtype.kind == "b":
        return None
    return output.reshape(shape).astype(np.float64)


class ParityAccumulator:
    """Compares an engine with a reference, batch by batch.

    Args:
        steps: One LSB for each output that is to be compared, by output name, in the output's own unit.
    """

    def __init__(self, steps: Mapping[str, float]) -> None:
        if not steps:
            raise UsageError(
                "no output is named", where="ParityAccumulator(steps)", remedy="give one step for each output"
            )
        self._outputs = {name: _Output(name, float(step)) for name, step in steps.items()}

    def update(self, engine: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
        """Add one batch.

        Args:
            engine: The outputs of what is judged, by name.
            reference: The outputs of what it is judged by; shapes as in `engine`, first axis: samples.

        Raises:
            EngineError: An output is missing, or the shapes differ.
        """
        for name, output in self._outputs.items():
            for side, values in (("engine", engine), ("reference", reference)):
                if name not in values:
                    raise EngineError(
                        f"the {side} has no output {name!r} (it has: {', '.join(values) or 'none'})",
                        where=name,
                        remedy="compare two forms of one network; output names have to be kept when it is converted",
                    )
            output.update(np.asarray(engine[name]), np.asarray(reference[name]))

    def result(self) -> Parity:
        """What was found.

        Raises:
            DataError: Nothing was compared.
        """
        empty = [name for name, output in self._outputs.items() if output.elements == 0]
        if empty:
            raise DataError(
                f"nothing was compared for output {empty[0]!r}",
                where=empty[0],
                remedy="give at least one sample to compare on",
            )
        each = {name: output.result() for name, output in self._outputs.items()}
        every = list(self._outputs.values())
        elements = sum(output.elements for output in every)
        summed = [sum(column) for column in zip(*(output.counts for output in every), strict=True)]
        classified = [result for result in each.values() if result.top1_agreement is not None]
        worst = min(classified, key=lambda result: result.top1_agreement or 0.0) if classified else None
        lsb = _ExactSum()
        for output in every:
            lsb.add([output.sums["lsb"].value()])
        return Parity(
            samples=max(output.samples for output in every),
            elements=elements,
            step=every[0].step if len(every) == 1 else math.nan,
            equal_share=sum(output.equal for output in every) / elements,
            within_half_lsb=sum(output.half for output in every) / elements,
            within_1_lsb=sum(output.one for output in every) / elements,
            within_2_lsb=sum(output.two for output in every) / elements,
            max_lsb=max(output.max_lsb for output in every),
            mean_lsb=lsb.value() / elements,
            sqnr_db=min(result.sqnr_db for result in each.values()),
            cosine=min(result.cosine for result in each.values()),
            non_finite=sum(output.non_finite for output in every),
            histogram=LsbHistogram(
                every[0].histogram().lsb,
                tuple(int(count) for count in summed),
                sum(output.below for output in every),
                sum(output.above for output in every),
            ),
            top1_agreement=worst.top1_agreement if worst else None,
            near_ties=worst.near_ties if worst else None,
            tie_disagreements=worst.tie_disagreements if worst else None,
            disagreements=worst.disagreements if worst else None,
            outputs=each,
        )


def compare(engine: Mapping[str, Array], reference: Mapping[str, Array], step: Mapping[str, float]) -> Parity:
    """Compare two sets of outputs that are in memory at once.

    Args:
        engine: The outputs of what is judged, by name.
        reference: The outputs of what it is judged by.
        step: One LSB for each output.

    Raises:
        EngineError: An output is missing, or the shapes differ.
        DataError: The outputs are empty.
    """
    accumulator = ParityAccumulator(step)
    accumulator.update(engine, reference)
    return accumulator.result()
