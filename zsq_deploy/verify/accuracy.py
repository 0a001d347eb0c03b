"""What the network still gets right after quantization, and how sure that is.

All forms of a network (float, fake-quant reference, engine, ...) see the same samples in one pass, so their differences are
paired: the standard error of a difference is that of the samples on which the two decide differently, which is far smaller
than that of either accuracy. The counts of McNemar's test (Psychometrika 12, 1947) say whether it could be chance.

Without labels the agreement with the float network is given instead, and called what it is: an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import DataError, EngineError, UsageError
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.verify.parity import Parity, ParityAccumulator, class_scores, sqnr_db

__all__ = ["Accuracy", "Evaluation", "Metric", "Paired", "Predict", "evaluate", "image_feeds", "mcnemar"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

#: Runs one form of the network on one batch: inputs by name -> outputs by name.
Predict = Callable[[Feeds], Mapping[str, Array]]

#: What the accuracy figures mean: share of right classes; share of samples with float's class; PSNR against the given
#: targets; SQNR against float.
Metric = Literal["top1", "agreement_with_float", "psnr_db", "sqnr_db"]


@dataclass(frozen=True)
class Paired:
    """Float and one quantized form on the same labelled samples.

    Attributes:
        difference: Accuracy of the form minus accuracy of float (negative: it got worse), as a share.
        standard_error: Of that difference, from the paired samples.
        lost: Samples that float gets right and the form gets wrong.
        gained: Samples that float gets wrong and the form gets right.
        p_value: McNemar's exact two-sided test of "equally good".
    """

    difference: float
    standard_error: float
    lost: int
    gained: int
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the keys are those of the report."""
        return {
            "difference": self.difference,
            "standard_error": self.standard_error,
            "lost": self.lost,
            "gained": self.gained,
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class Accuracy:
    """Quality of the forms of one network on one set of samples.

    Attributes:
        metric: What `values` mean; shares are 0 to 1, ratios in dB.
        values: By form: ``float``, ``reference``, ``engine``, and whatever else was evaluated.
        images: Number of samples.
        estimate: No labels were given: the values say how well float is reproduced, not how often it is right.
        standard_error: Of the float accuracy itself (a share), for labelled classification.
        agreement: Share of samples on which a form decides as float does, by form; empty for outputs without classes.
        paired: Paired comparison with float, by form; labelled classification only.
    """

    metric: Metric
    values: Mapping[str, float]
    images: int
    estimate: bool
    standard_error: float | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    paired: Mapping[str, Paired] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the keys are those of the report."""
        named = ("float", "reference", "engine")
        return {
            "metric": self.metric,
            **{name: self.values.get(name) for name in named},
            "others": {name: value for name, value in self.values.items() if name not in named},
            "images": self.images,
            "estimate": self.estimate,
            "standard_error": self.standard_error,
            "agreement_with_float": dict(self.agreement),
            "paired": {name: paired.to_json() for name, paired in self.paired.items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the samples gave.

    Attributes:
        accuracy: Quality of every form.
        parity: The engine against every other form, by the other form's name.
    """

    accuracy: Accuracy
    parity: Mapping[str, Parity]


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: a fair coin thrown ``lost + gained`` times."""
    total = lost + gained
    if total == 0:
        return 1.0
    fewer = min(lost, gained)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


class _Images(Protocol):
    def batches(self, batch_size: int) -> Iterable[tuple[Array, Array | None]]: ...


class _Preprocess(Protocol):
    def apply(self, images_u8_nhwc: Array) -> Array: ...


def image_feeds(
    data: _Images, preprocess: _Preprocess, input_name: str, batch_size: int = 16
) -> Iterator[tuple[dict[str, Array], Array | None]]:
    """Evaluation data as batches for :func:`evaluate`: uint8 NHWC images become the network's float32 NCHW input."""
    for images, labels in data.batches(batch_size):
        yield {input_name: preprocess.apply(images)}, labels


class _Tally:
    """Running quality of all forms, for one output."""

    def __init__(self, output: str, forms: Iterable[str], peak: float | None) -> None:
        self.output = output
        self.forms = tuple(forms)
        self.peak = peak
        self.images = 0
        self.kind: Literal["classes", "numbers"] | None = None
        self.labelled: bool | None = None
        self.right: dict[str, list[npt.NDArray[np.bool_]]] = {form: [] for form in self.forms}
        self.same = dict.fromkeys(self.forms, 0)
        self.noise = dict.fromkeys(self.forms, 0.0)
        self.signal = 0.0
        self.psnr: dict[str, list[float]] = {form: [] for form in self.forms}

    def update(self, outputs: Mapping[str, Array], labels: Array | None) -> None:
        reference = outputs["float"]
        scores = {form: class_scores(value) for form, value in outputs.items()}
        kind: Literal["classes", "numbers"] = "classes" if scores["float"] is not None else "numbers"
        if labels is not None and np.asarray(labels).ndim > 1:
            kind = "numbers"
        if self.kind not in (None, kind) or self.labelled not in (None, labels is not None):
            raise DataError(
                "some batches have labels and others do not, or their kind changes",
                where=self.output,
                remedy="give labels for every sample or for none",
            )
        self.kind, self.labelled = kind, labels is not None
        self.images += len(reference)
        if kind == "classes":
            decisions = {form: value.argmax(axis=1) for form, value in scores.items() if value is not None}
            for form, decided in decisions.items():
                self.same[form] += int(np.count_nonzero(decided == decisions["float"]))
            if labels is not None:
                wanted = self._classes(np.asarray(labels), scores["float"])
                for form, decided in decisions.items():
                    self.right[form].append(decided == wanted)
            return
        target = reference if labels is None else np.asarray(labels)
        if target.shape != reference.shape:
            raise DataError(
                f"the targets have shape {target.shape}, the output has {reference.shape}",
                where=self.output,
                remedy="give one class number a sample, or targets shaped as the output",
            )
        wide = target.astype(np.float64)
        self.signal += float(np.square(wide).sum())
        for form, value in outputs.items():
            error = np.square(value.astype(np.float64) - wide)
            self.noise[form] += float(error.sum())
            if labels is not None:
                peak = self.peak if self.peak is not None else 1.0
                each = error.reshape(len(error), -1).mean(axis=1)
                self.psnr[form].extend(sqnr_db(peak * peak, float(mse)) for mse in each)

    def _classes(self, labels: Array, scores: npt.NDArray[np.float64] | None) -> Array:
        assert scores is not None
        if labels.dtype.kind not in "iu" or len(labels) != len(scores):
            raise DataError(
                f"the labels are {labels.dtype} numbers of shape {labels.shape} for {len(scores)} samples",
                where=self.output,
                remedy="give one whole class number a sample",
            )
        low, high, classes = int(labels.min()), int(labels.max()), scores.shape[1]
        if low < 0 or high >= classes:
            raise DataError(
                f"the labels go from {low} to {high}, but output {self.output!r} has {classes} classes (0 to {classes - 1})",
                where=self.output,
                remedy="check that the data belong to this network, and whether its labels start at 1 or skip a background class",
            )
        return labels

    def result(self) -> Accuracy:
        if self.images == 0:
            raise DataError(
                "there is nothing to evaluate on: the data are empty",
                where=self.output,
                remedy="give evaluation data with at least one sample",
            )
        if self.kind == "numbers":
            metric: Metric = "psnr_db" if self.labelled else "sqnr_db"
            values = {
                form: float(np.mean(self.psnr[form])) if self.labelled else sqnr_db(self.signal, self.noise[form])
                for form in self.forms
            }
            return Accuracy(metric, values, self.images, estimate=not self.labelled)
        agreement = {form: self.same[form] / self.images for form in self.forms if form != "float"}
        if not self.labelled:
            values = {form: self.same[form] / self.images for form in self.forms}
            return Accuracy("agreement_with_float", values, self.images, True, None, agreement)
        right = {form: np.concatenate(parts) for form, parts in self.right.items()}
        share = float(right["float"].mean())
        return Accuracy(
            metric="top1",
            values={form: float(hits.mean()) for form, hits in right.items()},
            images=self.images,
            estimate=False,
            standard_error=math.sqrt(share * (1 - share) / self.images),
            agreement=agreement,
            paired={form: _paired(right["float"], hits) for form, hits in right.items() if form != "float"},
        )


def _paired(floating: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> Paired:
    difference = other.astype(np.float64) - floating
    count = len(difference)
    lost = int(np.count_nonzero(floating & ~other))
    gained = int(np.count_nonzero(other & ~floating))
    spread = float(difference.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return Paired(float(difference.mean()), spread, lost, gained, mcnemar(lost, gained))


def evaluate(
    batches: Iterable[tuple[Feeds, Array | None]],
    models: Mapping[str, Predict],
    *,
    steps: Mapping[str, float],
    output: str | None = None,
    limits: Mapping[str, int] | None = None,
    peak: float | None = None,
    total: int | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Run all forms of a network over the samples, once, and compare them.

    Args:
        batches: ``(feeds, labels)``; labels are class numbers [N], targets shaped as the output, or ``None``.
        models: By form. ``float`` and ``engine`` are needed; ``reference`` (the fake-quant twin), ``integer`` (exact integer
            arithmetic), ``unfused`` (the same file with fusion off) and any other are compared with the engine too.
        steps: One LSB for each output to compare, in the output's own unit.
        output: The output that the accuracy is about; default: the first one in `steps`.
        limits: Run a form only on the first so many samples (for slow references); it then has a parity, but no accuracy.
        peak: Peak value for PSNR (255 for 8-bit images, default 1).
        total: Number of samples, for the progress display.
        progress: Where to report progress.

    Raises:
        UsageError: ``float`` or ``engine`` is missing.
        DataError: There are no samples, or the labels do not fit the output.
        EngineError: A form does not give an output.
    """
    missing = [form for form in ("float", "engine") if form not in models]
    if missing:
        raise UsageError(
            f"the form {missing[0]!r} of the network is missing",
            where="evaluate(models)",
            remedy="give at least 'float' and 'engine'",
        )
    output = output or next(iter(steps))
    limits = limits or {}
    limited = {form for form in models if form in limits}
    if limited & {"float", "engine"}:
        raise UsageError(
            "float and engine see every sample", where="evaluate(limits)", remedy="limit the other forms only"
        )
    tally = _Tally(output, [form for form in models if form not in limited], peak)
    parities = {form: ParityAccumulator(steps) for form in models if form != "engine"}
    seen = 0
    with progress.task("evaluating", total or 1) as task:
        for feeds, labels in batches:
            size = len(next(iter(feeds.values())))
            if labels is not None and len(labels) != size:
                raise DataError(
                    f"{size} samples come with {len(labels)} labels",
                    where=output,
                    remedy="give exactly one label a sample",
                )
            results: dict[str, Mapping[str, Array]] = {}
            for form, predict in models.items():
                left = limits.get(form, size + seen) - seen
                if left <= 0:
                    continue
                cut = feeds if left >= size else {name: value[:left] for name, value in feeds.items()}
                results[form] = predict(cut)
                if output not in results[form]:
                    raise EngineError(
                        f"the form {form!r} has no output {output!r} (it has: {', '.join(results[form])})",
                        where=output,
                        remedy="name one of the network's outputs",
                    )
            for form, accumulator in parities.items():
                if form in results:
                    count = min(size, limits.get(form, size + seen) - seen)
                    engine = results["engine"]
                    if count < size:
                        engine = {name: value[:count] for name, value in engine.items()}
                    accumulator.update(engine, results[form])
            tally.update({form: np.asarray(results[form][output]) for form in tally.forms}, labels)
            seen += size
            task.advance(size if total else 1 / 1000)
    accuracy = tally.result()
    return Evaluation(accuracy, {form: accumulator.result() for form, accumulator in parities.items()})
