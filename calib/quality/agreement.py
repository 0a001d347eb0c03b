"""Whether a quantized network still decides like the float one, on images that need no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.quant.statistics import micro_batches

__all__ = ["Agreement", "Runner", "agreement"]

Array = npt.NDArray[Any]
Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Something that computes outputs from inputs, both by name: an engine, a twin, a session."""

_LIMIT = 320.0


@dataclass(frozen=True)
class Agreement:
    """A quantized network against the float one.

    Attributes:
        images: Number of images.
        top1: Share of the images with the same largest score; ``None`` unless the only output is ``[images, classes]``.
        sqnr_db: Signal to quantization noise of the outputs together; 320 when nothing differs, -320 when the quantized network gives
            what is no number. An output whose shape depends on its values (boxes that survive) and differs counts as noise altogether.
    """

    images: int
    top1: float | None
    sqnr_db: float


def agreement(
    floating: Runner, quantized: Runner, batches: Iterable[Mapping[str, Array]], *, micro_batch: int = 16
) -> Agreement:
    """Compare two networks output by output, in one pass.

    Args:
        floating: The float network.
        quantized: The quantized one, with the same output names.
        batches: Images by input name; cut anew, so that the result does not depend on how they come.
        micro_batch: Images given at a time.
    """
    images = same = 0
    signal = noise = 0.0
    classifies = True
    for batch in micro_batches(batches, micro_batch):
        count = len(next(iter(batch.values())))
        wanted, got = floating(batch), quantized(batch)
        images += count
        for name, reference in wanted.items():
            a, b = np.asarray(reference, np.float64), np.asarray(got[name], np.float64)
            power = float(np.square(a).sum())
            signal += power
            noise += float(np.square(b - a).sum()) if a.shape == b.shape else power
        first = np.asarray(next(iter(wanted.values())))
        classifies = classifies and len(wanted) == 1 and first.ndim == 2 and first.shape[1] > 1 and len(first) == count
        if classifies:
            same += int((first.argmax(1) == np.asarray(got[next(iter(wanted))]).argmax(1)).sum())
    if noise == 0.0:
        decibel = _LIMIT
    elif math.isfinite(noise) and math.isfinite(signal):
        decibel = 10.0 * math.log10(max(signal, 1e-300) / noise)
    else:
        decibel = -_LIMIT
    return Agreement(images, same / images if classifies and images else None, max(-_LIMIT, min(_LIMIT, decibel)))
