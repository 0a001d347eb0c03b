"""Accuracy control without labels: what NNCF measures while it returns layers to float, and what it says it did.

``nncf.quantize_with_accuracy_control`` wants a metric. With labelled data it is their accuracy. Without any, it is how often the quantized
network agrees with the float one on synthetic images; where the outputs are no class scores, it is the share of the float outputs'
energy that quantization leaves undisturbed (``1 - |q - f|^2 / |f|^2``: a drop of 0.01 is an SQNR of 20 dB). The report names which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.base import ValidationData
from zsq_deploy.backends.openvino.runtime import core
from zsq_deploy.errors import CalibrationError

__all__ = ["Metric", "Step", "drop_of", "quantized_operators", "read_steps"]

Array = npt.NDArray[Any]

_PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}
_DROP = re.compile(r"(?:scope is|accuracy drop) (-?[\d.eE+-]+)")


@dataclass(frozen=True)
class _Item:
    """One sample: feeds with a batch axis of one, and its number."""

    index: int
    feeds: dict[str, Array]


class Metric:
    """The metric of accuracy control on a fixed set of samples; 1 is best.

    Args:
        ir: The float network, an ``openvino.Model``.
        data: What to measure on.

    Attributes:
        name: What it is, as the report says it.
        items: The samples, one at a time, for an ``nncf.Dataset``.
        floating: The metric of the float network.

    Raises:
        CalibrationError: No samples, or labels that do not fit them.
    """

    def __init__(self, ir: Any, data: ValidationData) -> None:
        self.items: list[_Item] = []
        for batch in data.batches:
            for row in range(len(next(iter(batch.values())))):
                feeds = {name: np.ascontiguousarray(value[row : row + 1]) for name, value in batch.items()}
                self.items.append(_Item(len(self.items), feeds))
        if not self.items:
            raise CalibrationError(
                "accuracy control has no samples to measure on",
                where="validation",
                remedy="hold some images out (--holdout), or give labelled images",
            )
        floating = core().compile_model(ir, "CPU", _PRECISION)
        self._expected = [_outputs(floating, item.feeds) for item in self.items]
        self._labels: list[int] | None = None
        source = data.source or "the given images"
        if data.labels is not None:
            self._labels = [int(label) for labels in data.labels for label in np.asarray(labels).reshape(-1)]
            if len(self._labels) != len(self.items):
                raise CalibrationError(
                    f"{len(self._labels)} labels do not fit {len(self.items)} samples",
                    where="validation",
                    remedy="give one class number for every image",
                )
            self.name = f"top-1 accuracy on {source}"
        elif all(_is_classifier(outputs) for outputs in self._expected):
            self.name = f"top-1 agreement with the float network on {source}"
        else:
            self.name = f"share of the float outputs' energy that quantization leaves undisturbed, on {source}"
        self._classes = self._labels is not None or "agreement" in self.name
        self.floating = self(floating, self.items)[0]

    def of(self, ir: Any) -> float:
        """The metric of a network on all samples, in float arithmetic, as NNCF itself evaluates."""
        return self(core().compile_model(ir, "CPU", _PRECISION), self.items)[0]

    def __call__(self, compiled: Any, items: Iterable[_Item]) -> tuple[float, list[float]]:
        """The metric of a compiled network on some of the samples, and of each sample; what NNCF calls ``validation_fn``."""
        each: list[float] = []
        signal = noise = 0.0
        for item in items:
            got = _outputs(compiled, item.feeds)
            if self._classes:
                wanted = (
                    int(self._expected[item.index][0].argmax()) if self._labels is None else self._labels[item.index]
                )
                each.append(float(int(got[0].argmax()) == wanted))
                continue
            energy = sum(float(np.square(f.astype(np.float64)).sum()) for f in self._expected[item.index])
            error = sum(
                float(np.square(q.astype(np.float64) - f).sum())
                for q, f in zip(got, self._expected[item.index], strict=True)
            )
            signal, noise = signal + energy, noise + error
            each.append(1.0 - error / max(energy, 1e-30))
        value = float(np.mean(each)) if self._classes else 1.0 - noise / max(signal, 1e-30)
        return value, each


def _outputs(compiled: Any, feeds: Mapping[str, Array]) -> list[Array]:
    return [np.array(value) for value in compiled(feeds).values()]


def _is_classifier(outputs: Sequence[Array]) -> bool:
    return len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1


# ---------------------------------------------------------------------------------------------------------------------
# what happened
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step back to float.

    Attributes:
        operators: Operators of OpenVINO's model that went back together.
        drop: Drop of the metric that was left afterwards; ``None`` where NNCF did not say.
    """

    operators: tuple[str, ...]
    drop: float | None = field(default=None)


def read_steps(messages: Sequence[str]) -> tuple[Step, ...]:
    """The steps that NNCF took, from its log: which operators it reverted, and what drop was left."""
    steps: list[Step] = []
    for text in messages:
        if text.startswith("Reverted "):
            steps.append(Step(tuple(line.strip() for line in text.splitlines()[1:] if line.strip())))
        elif steps and steps[-1].drop is None:
            found = _DROP.search(text)
            if found is not None:
                steps[-1] = Step(steps[-1].operators, float(found.group(1)))
    return tuple(steps)


def drop_of(floating: float, quantized: float, kind: str) -> float:
    """How far a metric fell, as NNCF counts it: ``absolute``, or ``relative`` to the float network's."""
    drop = floating - quantized
    return drop if kind == "absolute" else drop / max(abs(floating), 1e-30)


def quantized_operators(ir: Any) -> set[str]:
    """Names of the operators of a model that read a FakeQuantize."""
    found: set[str] = set()
    for operator in ir.get_ops():
        if operator.get_type_name() == "FakeQuantize":
            for port in operator.outputs():
                for reader in port.get_target_inputs():
                    found.add(reader.get_node().get_friendly_name())
    return found
