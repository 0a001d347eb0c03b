"""Ranges as TensorRT's calibrators define them: symmetric around zero, found on the magnitudes of a tensor's numbers.

* ``minmax`` (``IInt8MinMaxCalibrator``): the largest magnitude seen.
* ``entropy`` (``IInt8EntropyCalibrator2`` and ``IInt8EntropyCalibrator``): a histogram of the magnitudes with 2,048 bins from 0 to the
  largest one; for every threshold from 128 bins up to all of them, the clipped distribution P (what lies beyond is added to its last bin)
  is compared with Q, the unclipped counts pooled into 128 levels and spread evenly over the occupied bins of each level. The threshold
  with the smallest Kullback-Leibler divergence of Q from P wins.

TensorRT's library is closed. The procedure above is the one that NVIDIA published (S. Migacz, "8-bit Inference with TensorRT", GTC 2017,
S7310, the slide with the pseudocode). What the slides leave open is settled as in NVIDIA's own open implementation (the entropy
calibrator of its pytorch-quantization toolkit): bin ``k`` of a window of ``i`` bins goes to level ``floor(128 k / i)``; the first bin,
which holds the exact zeros behind a ReLU and would outweigh everything, counts as much as the second; the range ends at the upper edge
of the last bin kept (the slides add half a bin); among equal divergences the widest range wins. How the library itself settles them, and
in which order it widens its histograms, is not known, so its caches are compared, not expected to be equal.

Our histograms (:mod:`zsq_deploy.quant.histogram`) have between 4,096 and 8,192 bins of a power of two up to the largest magnitude.
:func:`magnitudes` cuts them anew into 2,048, splitting the bins at the new edges in proportion. :func:`collect_magnitudes` counts
the images' own numbers instead, exactly, at the price of a second pass. (ResNet-20 with 32 synthesized images: 33 of 55 entropy ranges
are the same both ways, the others are 6 % narrower to 12 % wider; the divergence is flat around its minimum.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.histogram import Histogram
from zsq_deploy.quant.ranges import Ranges
from zsq_deploy.quant.statistics import collect, micro_batches
from zsq_deploy.quant.statistics_values import Statistics

__all__ = [
    "BINS",
    "LEVELS",
    "METHODS",
    "Magnitudes",
    "calibrate",
    "collect_magnitudes",
    "divergences",
    "entropy_amax",
    "magnitudes",
    "tensorrt_ranges",
]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

BINS = 2048
"""Bins of the histogram of magnitudes."""

LEVELS = 128
"""Magnitudes that int8 with a sign can tell apart; also the narrowest range tried, in bins."""

METHODS = ("entropy2", "entropy", "minmax")
"""Range methods of this module, as in ``tensorrt-entropy2``. Both entropy calibrators search alike; they differ in when TensorRT asks
for the images (``entropy``: after layers are fused), and so in which tensors a cache of the device holds."""

_TIE = 1e-12
"""Divergences this close (float64 noise) count as equal."""


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """Histogram of the absolute values of a tensor.

    Attributes:
        counts: ``BINS`` numbers; bin ``k`` covers ``[k, k + 1) * amax / BINS``, the last one its upper edge too. Whole numbers when they
            were counted, fractions when they were cut from another grid.
        amax: Largest magnitude, in the tensor's unit.
    """

    counts: Vector
    amax: float

    def merge(self, other: Magnitudes) -> Magnitudes:
        """The histogram of both sets of numbers together.

        Raises:
            UsageError: They have different ranges.
        """
        if self.amax != other.amax:
            raise UsageError(
                f"histograms up to {self.amax} and up to {other.amax} have different bins",
                where="Magnitudes.merge",
                remedy="find the largest magnitude of all images first",
            )
        return Magnitudes(self.counts + other.counts, self.amax)


def magnitudes(histogram: Histogram) -> Magnitudes:
    """The histogram of magnitudes that a histogram on our grid stands for; exact zeros stay in the first bin."""
    amax = max(-histogram.minimum, histogram.maximum, 0.0)
    if amax == 0.0 or histogram.total == 0:
        counts = np.zeros(BINS)
        counts[0] = histogram.total
        return Magnitudes(counts, 0.0)
    first, length = histogram.first, len(histogram.counts)
    folded = np.zeros(max(first + length, -first, 1))
    index = first + np.arange(length)
    np.add.at(folded, np.where(index >= 0, index, -index - 1), histogram.counts)
    folded[0] -= histogram.zeros
    # All numbers of the last bins are at most amax: nothing lies between it and their upper edge.
    edges = np.minimum(np.arange(len(folded) + 1) * histogram.width, amax)
    below = np.concatenate([[0.0], np.cumsum(folded)])
    cut = np.interp(np.arange(BINS + 1) * (amax / BINS), edges, below)
    cut[-1] = below[-1]
    counts = np.diff(cut)
    counts[0] += histogram.zeros
    return Magnitudes(counts, amax)


def divergences(counts: Vector) -> Vector:
    """Kullback-Leibler divergence for every threshold of ``LEVELS``, ``LEVELS + 1``, ..., ``len(counts)`` bins, in nats.

    Infinite where the last bin kept is empty but numbers lie beyond it, or where nothing is kept.

    With ``c`` the counts, ``T`` their sum, ``S`` and ``n`` the mass and the occupied bins of each level and ``S_in`` the mass kept, the
    sums over bins reduce to differences of cumulative sums: ``sum p log p`` needs those of ``c log c``, and ``sum p log q`` one term a
    level, ``S log(S / n)``, and one for the outliers.
    """
    c = np.array(counts, np.float64)
    if len(c) < LEVELS:
        raise UsageError(
            f"{len(c)} bins leave nothing to search", where="bins", remedy=f"use a histogram of {LEVELS} or more"
        )
    c[0] = c[1]
    total = float(c.sum())
    if total <= 0.0:
        return np.full(len(c) - LEVELS + 1, np.inf)
    mass = np.concatenate([[0.0], np.cumsum(c)])
    occupied = np.concatenate([[0], np.cumsum(c > 0)])
    log_mass = np.concatenate([[0.0], np.cumsum(_xlogx(c))])
    kept = np.arange(LEVELS, len(c) + 1)
    # level l of a window of i bins starts at the first bin k with floor(LEVELS k / i) >= l
    starts = -(-(np.arange(LEVELS + 1)[None, :] * kept[:, None]) // LEVELS)
    s = np.diff(mass[starts], axis=1)
    n = np.diff(occupied[starts], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.where(n > 0, np.log(s / np.maximum(n, 1)), 0.0)  # without the normalization by S_in
    inside, beyond, last = mass[kept], total - mass[kept], c[kept - 1]
    # differences of large sums: what no number can leave is no outlier
    beyond = np.where(occupied[-1] == occupied[kept], 0.0, np.maximum(beyond, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        p_log_p = (log_mass[kept] - _xlogx(last) + _xlogx(last + beyond)) / total - np.log(total)
        p_log_q = ((s * np.where(n > 0, log_q, 0.0)).sum(1) + beyond * log_q[:, -1]) / total - np.log(inside)
        found = p_log_p - p_log_q
    return np.where((inside <= 0) | ((last <= 0) & (beyond > 0)), np.inf, found)


def _xlogx(x: Vector) -> Vector:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x > 0, x * np.log(x), 0.0)


def entropy_amax(histogram: Magnitudes) -> float:
    """The largest magnitude to represent, by the entropy search; 0 for a tensor of zeros."""
    if histogram.amax == 0.0:
        return 0.0
    found = divergences(histogram.counts)
    smallest = float(found.min())
    if not np.isfinite(smallest):  # nothing but zeros and a few numbers at the end: no window says anything
        return histogram.amax
    best = int(np.flatnonzero(found <= smallest + _TIE)[-1])
    kept = LEVELS + best
    return histogram.amax if kept == len(histogram.counts) else histogram.amax * kept / len(histogram.counts)


def tensorrt_ranges(
    statistics: Statistics | Mapping[str, Magnitudes],
    method: str = "entropy",
    *,
    model_digest: str = "",
    set_digest: str = "",
) -> Ranges:
    """Symmetric ranges ``(-amax, amax)`` of all tensors, as TensorRT's calibrators define them.

    Args:
        statistics: Of :func:`zsq_deploy.quant.statistics.collect`, or the exact ones of :func:`collect_magnitudes`.
        method: ``entropy2``, ``entropy`` or ``minmax``.
        model_digest: Of the network; that of the statistics where empty.
        set_digest: Of the calibration set; that of the statistics where empty.

    Raises:
        UsageError: There is no such method.
    """
    if method not in METHODS:
        raise UsageError(
            f"TensorRT has no range method {method!r} that is known well enough to compute",
            where="ranges",
            remedy=f"choose one of {', '.join(METHODS)}",
        )
    values: dict[str, tuple[float, float]] = {}
    for name in statistics:
        found = statistics[name]
        if method == "minmax":
            amax = found.amax if isinstance(found, Magnitudes) else max(-found.minimum, found.maximum, 0.0)
        else:
            amax = entropy_amax(found if isinstance(found, Magnitudes) else magnitudes(found.histogram))
        values[name] = (-amax, amax)
    if isinstance(statistics, Statistics):
        model_digest, set_digest = model_digest or statistics.model_digest, set_digest or statistics.set_digest
    return Ranges(values, f"tensorrt-{method}", model_digest, set_digest)


def calibrate(
    graph: Graph,
    calibration: Any,
    calibrator: str,
    *,
    micro_batch: int = 16,
    device: str | torch.device | None = None,
    model_digest: str = "",
    progress: Progress = SILENT,
) -> Ranges:
    """What one of TensorRT's calibrators makes of a calibration set; the numbers of all images are counted exactly.

    Args:
        graph: The network, batch norm folded.
        calibration: The :class:`~zsq_deploy.calib.CalibrationSet`.
        calibrator: ``tensorrt-entropy2``, ``tensorrt-entropy`` or ``tensorrt-minmax``.
        micro_batch: Images that go through the network at a time; 1 for a network of fixed batch size.
        device: Where to compute; ``None``: a CUDA device where there is one.
        model_digest: Goes into the result; the graph's own digest otherwise.
        progress: Watches.

    Raises:
        UsageError: There is no such calibrator, or it is ``tensorrt-legacy``, whose search is not published.
        CalibrationError: The set is empty or does not fit the network.
    """
    prefix, _, method = calibrator.partition("-")
    if prefix != "tensorrt" or method not in METHODS:
        raise UsageError(
            f"TensorRT's calibrator {calibrator!r} cannot be computed here",
            where="--ranges",
            remedy=f"choose one of {', '.join(f'tensorrt-{name}' for name in METHODS)}; what the legacy calibrator does with its "
            "quantile and cutoff is not published: run it on the device",
        )
    where = torch.device(device) if device is not None else None
    statistics = collect(
        graph,
        calibration.batches(16),
        micro_batch=micro_batch,
        device=None if where is None else str(where),
        progress=progress,
        total=len(calibration),
        set_digest=str(calibration.digest),
    )
    found: Statistics | dict[str, Magnitudes] = statistics
    if method != "minmax":
        amax = {name: max(-item.minimum, item.maximum, 0.0) for name, item in statistics.items()}
        found = collect_magnitudes(
            graph,
            calibration.batches(16),
            amax,
            micro_batch=micro_batch,
            device=where,
            progress=progress,
            total=len(calibration),
        )
    return tensorrt_ranges(found, method, model_digest=model_digest or graph.digest, set_digest=str(calibration.digest))


def collect_magnitudes(
    graph: Graph,
    batches: Iterable[Mapping[str, Array]],
    amax: Mapping[str, float],
    *,
    micro_batch: int = 16,
    device: str | torch.device | None = None,
    progress: Progress = SILENT,
    total: int | None = None,
) -> dict[str, Magnitudes]:
    """Count the magnitudes of activations exactly, in a second pass over the images.

    Args:
        graph: The network, batch norm folded.
        batches: The images by input name, the same ones that `amax` comes from.
        amax: Largest magnitude of each activation to watch (from :func:`zsq_deploy.quant.statistics.collect`).
        micro_batch: Images that go through the network at a time; use the first pass's number, so that the arithmetic is the same.
        device: Where to compute; ``None``: a CUDA device where there is one.
        progress: Where to report.
        total: Number of images, if known, for the time left.

    Raises:
        CalibrationError: No images, or an activation larger than its `amax`: these are other images.
    """
    from zsq_deploy.model.twin import Twin

    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    twin = Twin(graph, dtype=torch.float32, device=place)
    counts = {name: torch.zeros(BINS, dtype=torch.int64, device=place) for name in amax}

    def tap(name: str) -> Any:
        limit = amax[name]

        def look(x: torch.Tensor) -> None:
            if not x.is_floating_point() or x.numel() == 0:
                return
            size = x.detach().abs().reshape(-1).to(torch.float64)
            if float(size.max()) > limit * (1 + 1e-6):  # a library's arithmetic may differ in the last bits
                raise CalibrationError(
                    f"the activation {name!r} reaches {float(size.max()):.6g}, beyond its largest magnitude {limit:.6g}",
                    where=name,
                    remedy="count the same images that the largest magnitudes were taken from",
                )
            if limit == 0.0:
                counts[name][0] += x.numel()
                return
            index = (size * (BINS / limit)).to(torch.int64).clamp_(max=BINS - 1)
            counts[name] += torch.bincount(index, minlength=BINS)

        return look

    taps = {name: tap(name) for name in amax}
    seen = 0
    with progress.task("magnitudes", float(total or 0)) as task, torch.no_grad():
        for batch in micro_batches(batches, micro_batch):
            feeds = {name: torch.tensor(array, device=place) for name, array in batch.items()}
            twin.run(feeds, fetch=(), taps=taps)
            number = _images(batch.values())
            seen += number
            task.advance(number)
    if seen == 0:
        raise CalibrationError(
            "the calibration set is empty", where="collect_magnitudes", remedy="synthesize at least one image"
        )
    return {name: Magnitudes(found.cpu().numpy().astype(np.float64), amax[name]) for name, found in counts.items()}


def _images(arrays: Iterable[Sequence[Any] | Array]) -> int:
    return len(next(iter(arrays)))
