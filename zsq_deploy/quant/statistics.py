"""One streaming pass over a calibration set: what every activation of the network looks like.

The memory does not depend on the number of images: a histogram on a fixed grid and a few vectors a tensor. The result does not
depend on how the caller cut the set into batches: the stream of images is cut anew into micro-batches of a fixed size before it
enters the network, so the arithmetic is the same, bit for bit. Counts, minima, maxima and histograms do not even depend on the order
of the images, as long as each image's activations do not depend on its neighbours in the micro-batch.

Means and variances are per-plane float32 sums of differences from a pivot (the channel's mean in the first micro-batch), added up in
float64, so a small spread around a large mean is not lost.
The values that come out are in :mod:`zsq_deploy.quant.statistics_values`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.histogram import HistogramBuilder
from zsq_deploy.quant.statistics_values import Moments, Statistics, TensorStatistics

__all__ = ["StatisticsBuilder", "collect", "micro_batches", "observable"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]


class _TensorBuilder:
    """Statistics of one activation in the making.

    Args:
        name: Of the activation.
        pooled: Whether axis 1 holds something else than channels, so that all numbers are one channel.
    """

    def __init__(self, name: str, *, pooled: bool = False) -> None:
        self._name = name
        self._pooled = pooled
        self._histogram = HistogramBuilder()
        self._count = 0
        self._minimum: torch.Tensor | None = None
        self._maximum: torch.Tensor | None = None
        self._pivot: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """Take in one micro-batch of the activation."""
        if x.numel() == 0:
            return
        x = x.detach().to(torch.float32)
        if x.ndim >= 2 and self._minimum is not None and not self._pooled and x.shape[1] != len(self._minimum):
            self._pool()  # the size of axis 1 follows the batch: it does not count channels
        planes = (
            x.reshape(1, 1, -1) if x.ndim < 2 or self._pooled else x.contiguous().reshape(x.shape[0], x.shape[1], -1)
        )
        low, high = planes.amin((0, 2)), planes.amax((0, 2))
        limits = float(low.min()), float(high.max())
        if not (math.isfinite(limits[0]) and math.isfinite(limits[1])):
            raise CalibrationError(
                f"the activation {self._name!r} is not finite: it holds NaN or infinite numbers",
                where=self._name,
                remedy="check the network's weights and the range of the calibration images",
            )
        if self._minimum is None or self._maximum is None:
            self._minimum, self._maximum = low, high
            self._pivot = planes.mean((0, 2))
            self._sum = torch.zeros(len(low), dtype=torch.float64, device=x.device)
            self._squares = torch.zeros_like(self._sum)
        else:
            self._minimum, self._maximum = torch.minimum(self._minimum, low), torch.maximum(self._maximum, high)
        assert self._pivot is not None
        assert self._sum is not None
        assert self._squares is not None
        pivot = self._pivot.reshape(1, -1, 1)
        if planes.shape[2] == 1:
            centred = (planes - pivot).to(torch.float64)[..., 0]
            self._sum += centred.sum(0)
            self._squares += centred.square().sum(0)
        else:
            for image in planes:  # one image at a time: the differences stay in the cache
                centred = image - pivot[0]
                self._sum += centred.sum(1).to(torch.float64)
                self._squares += torch.linalg.vector_norm(centred, dim=1).to(torch.float64).square()
        self._count += planes.shape[0] * planes.shape[2]
        self._histogram.add(planes, limits)

    def _pool(self) -> None:
        """Go on with all channels as one."""
        assert self._minimum is not None
        assert self._maximum is not None
        assert self._pivot is not None
        assert self._sum is not None
        assert self._squares is not None
        pivot = self._pivot.mean(0, keepdim=True)
        offset = (self._pivot - pivot).to(torch.float64)
        # Sums of differences from the old pivots, moved to the common one.
        self._squares = (self._squares + 2 * offset * self._sum + self._count * offset.square()).sum(0, keepdim=True)
        self._sum = (self._sum + self._count * offset).sum(0, keepdim=True)
        self._count *= len(self._pivot)
        self._minimum, self._maximum = (
            self._minimum.min(0, keepdim=True).values,
            self._maximum.max(0, keepdim=True).values,
        )
        self._pivot, self._pooled = pivot, True

    def finish(self) -> TensorStatistics:
        """The statistics so far."""
        if self._minimum is None or self._maximum is None or self._pivot is None:
            empty = np.zeros(1)
            return TensorStatistics(self._histogram.finish(), Moments(0, empty, empty, empty, empty))
        assert self._sum is not None
        assert self._squares is not None
        offset = self._sum / self._count
        var = (self._squares / self._count - offset.square()).clamp_min(0.0)
        return TensorStatistics(
            self._histogram.finish(),
            Moments(
                self._count,
                _vector(self._minimum),
                _vector(self._maximum),
                _vector(self._pivot.to(torch.float64) + offset),
                _vector(var),
            ),
        )


def _vector(tensor: torch.Tensor) -> Vector:
    return tensor.to(torch.float64).cpu().numpy()


class StatisticsBuilder:
    """Takes in activations by name; for whoever runs the network himself.

    Args:
        model_digest: Digest of the graph.
        set_digest: Digest of the calibration set, if there is one.
        pooled: Names of activations whose axis 1 does not hold channels.
    """

    def __init__(self, *, model_digest: str = "", set_digest: str = "", pooled: Iterable[str] = ()) -> None:
        self._pooled = frozenset(pooled)
        self._tensors: dict[str, _TensorBuilder] = {}
        self._model_digest = model_digest
        self._set_digest = set_digest

    @torch.no_grad()
    def add(self, name: str, x: torch.Tensor) -> None:
        """Take in one micro-batch of one activation; anything but floating point is ignored."""
        if not x.is_floating_point():
            return
        if name not in self._tensors:
            self._tensors[name] = _TensorBuilder(name, pooled=name in self._pooled)
        self._tensors[name].add(x)

    def finish(self, images: int) -> Statistics:
        """The statistics so far.

        Args:
            images: How many images have been taken in.
        """
        return Statistics(
            {name: builder.finish() for name, builder in self._tensors.items()},
            images,
            self._model_digest,
            self._set_digest,
        )


def micro_batches(batches: Iterable[Mapping[str, Array]], size: int) -> Iterator[dict[str, Array]]:
    """The same stream of images, cut anew into batches of `size` (the last one may be shorter).

    Args:
        batches: By input name; axis 0 counts the images and has the same length for every input.
        size: Images a micro-batch.
    """
    waiting: list[Mapping[str, Array]] = []
    held = 0
    for batch in batches:
        lengths = {len(array) for array in batch.values()}
        if len(lengths) != 1:
            raise CalibrationError(
                "the inputs of one batch do not hold the same number of images",
                where=", ".join(f"{name}: {len(array)}" for name, array in batch.items()),
                remedy="give every input one entry an image along axis 0",
            )
        start, length = 0, lengths.pop()
        while start < length:
            take = min(size - held, length - start)
            waiting.append({name: array[start : start + take] for name, array in batch.items()})
            held += take
            start += take
            if held == size:
                yield _join(waiting)
                waiting, held = [], 0
    if waiting:
        yield _join(waiting)


def _join(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    if len(parts) == 1:
        return {name: np.ascontiguousarray(array) for name, array in parts[0].items()}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def observable(graph: Graph) -> list[str]:
    """The values that depend on the graph's inputs, inputs included, in order of execution (also integer ones).

    Values that depend on the input's size only (a class token that is expanded to the batch) count when they are floating-point
    numbers, because they are quantized like any other activation.
    """
    known = {spec.name for spec in graph.inputs}
    sized: set[str] = set()
    found = [spec.name for spec in graph.inputs]
    for node in graph.nodes:
        fresh = [name for name in node.output if name]
        if node.op_type == "Shape" and node.domain in ("", "ai.onnx"):
            sized.update(fresh)
        elif any(name in known for name in node.input):
            known.update(fresh)
            found += fresh
        elif any(name in sized for name in node.input):
            sized.update(fresh)
            found += [name for name in fresh if (kind := graph.dtype(name)) is not None and kind.kind == "f"]
    return found


def _batch_is_axis_one(shape: Sequence[int | None] | None) -> bool:
    """Whether a value is laid out as attention layers do it: tokens, images, features."""
    return shape is not None and len(shape) > 1 and shape[1] is None and shape[0] is not None


def collect(
    graph: Graph,
    batches: Iterable[Mapping[str, Array]],
    *,
    values: Sequence[str] | None = None,
    micro_batch: int = 16,
    device: str | torch.device | None = None,
    progress: Progress = SILENT,
    total: int | None = None,
    set_digest: str = "",
    title: str = "ranges",
) -> Statistics:
    """Run the images through the network and take the statistics of its activations, in one pass.

    Args:
        graph: The network; deployments use the batch-norm-folded graph.
        batches: Images by input name, cut in any way.
        values: Names of the activations to watch; ``None``: all floating-point ones, with inputs and outputs.
        micro_batch: Images that go through the network at a time. The peak memory grows with it; the result depends on it at most
            in the last bit of the means (and of activations, where a library's arithmetic depends on the batch size).
        device: Where to compute; ``None``: a CUDA device where there is one.
        progress: Where to report.
        total: Number of images, if known, for the time left.
        set_digest: Digest of the calibration set, kept in the result.
        title: What the progress is called.

    Raises:
        CalibrationError: No images, or activations that are not finite.
    """
    from zsq_deploy.model.twin import Twin

    if micro_batch < 1:
        raise UsageError("a micro-batch holds at least one image", where="micro_batch", remedy="choose 1 or more")
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    twin = Twin(graph, dtype=torch.float32, device=place)
    watched = list(values) if values is not None else observable(graph)
    unknown = set(watched) - set(observable(graph))
    if unknown:
        raise UsageError(
            f"the network has no activation named {', '.join(sorted(unknown)[:3])}",
            where="values",
            remedy="use names of activations of this graph",
        )
    pooled = [name for name in watched if _batch_is_axis_one(graph.shape(name))]
    builder = StatisticsBuilder(model_digest=graph.digest, set_digest=set_digest, pooled=pooled)

    def tap(name: str) -> Any:
        def look(x: torch.Tensor) -> None:
            builder.add(name, x)

        return look

    taps = {name: tap(name) for name in watched}
    seen = 0
    with progress.task(title, float(total or 0)) as task, torch.no_grad():
        for batch in micro_batches(batches, micro_batch):
            feeds = {name: torch.tensor(array, device=place) for name, array in batch.items()}
            twin.run(feeds, fetch=(), taps=taps)
            number = len(next(iter(batch.values())))
            seen += number
            task.advance(number)
    if seen == 0:
        raise CalibrationError("the calibration set is empty", where="collect", remedy="synthesize at least one image")
    return builder.finish(seen)
