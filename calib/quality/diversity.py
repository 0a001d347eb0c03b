"""How different the images of a set are, as the network sees them.

Features are what enters the network's last layer with weights, averaged over places. With ``u_i`` the feature of image i at unit length and
``n`` images:

* **effective images**: the exponential of the entropy of the eigenvalues of the matrix ``u_i . u_j / n`` (the Vendi score with a cosine
  kernel; Friedman and Dieng, TMLR 2023, arXiv 2210.02410, definition 3.1): 1 when all images are the same, n when all are orthogonal;
* **mean cosine** of two different images;
* **effective directions**: ``(sum of l)^2 / sum of l^2`` over the eigenvalues ``l`` of the covariance of the features (participation ratio):
  in how many directions the images differ, however little.

Of a classifier also: how many classes it sees in the set, the exponential of the entropy of their frequencies, and its mean confidence.

The sums need a matrix of the size of the feature, whatever the number of images. Features of more than 1,024 numbers are mapped to 1,024 by
a fixed random projection, which keeps angles to about 3 % (Johnson-Lindenstrauss).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.model import Model
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.statistics import micro_batches

__all__ = ["LARGEST", "Diversity", "DiversityBuilder", "diversity", "feature_of"]

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]

LARGEST = 1024
"""Features longer than this are projected to it."""


@dataclass(frozen=True)
class Diversity:
    """What one pass over a set says about its variety.

    Attributes:
        images: Number of images.
        feature: Name of the value that was looked at; empty if there is none.
        effective_images: See above; ``None`` without a feature.
        effective_directions: See above; ``None`` without a feature.
        mean_cosine: See above; ``None`` without a feature or with one image.
        classes: Number of classes of the network; ``None`` for networks that do not classify, as all below.
        classes_seen: Classes that the float network gives to at least one image.
        effective_classes: Exponential of the entropy of the classes' frequencies.
        confidence: Mean probability of the class that it gives.
    """

    images: int
    feature: str = ""
    effective_images: float | None = None
    effective_directions: float | None = None
    mean_cosine: float | None = None
    classes: int | None = None
    classes_seen: int | None = None
    effective_classes: float | None = None
    confidence: float | None = None


def _entropy_number(weights: Matrix) -> float:
    """Exponential of the entropy of weights that sum to one."""
    kept = weights[weights > 1e-15]
    return float(np.exp(-(kept * np.log(kept)).sum()))


class DiversityBuilder:
    """Takes in features and class scores, batch by batch."""

    def __init__(self) -> None:
        self._images = 0
        self._units: Matrix | None = None
        self._unit_sum: Matrix | None = None
        self._unit_norms = 0.0
        self._pivot: Matrix | None = None
        self._squares: Matrix | None = None
        self._sum: Matrix | None = None
        self._projection: Matrix | None = None
        self._votes: npt.NDArray[np.int64] | None = None
        self._confidence = 0.0

    def add(self, features: Array | None, scores: Array | None = None, *, probabilities: bool = False) -> None:
        """Take in some images.

        Args:
            features: ``[images, length]``.
            scores: ``[images, classes]``.
            probabilities: The scores are probabilities already; otherwise a softmax makes them so.
        """
        count = len(features) if features is not None else len(scores) if scores is not None else 0
        self._images += count
        if features is not None:
            self._add_features(np.asarray(features, np.float64))
        if scores is not None:
            self._add_scores(np.asarray(scores, np.float64), probabilities)

    def _add_features(self, x: Matrix) -> None:
        length = x.shape[1]
        if length > LARGEST:
            if self._projection is None:
                signs = np.random.default_rng(20_011).integers(0, 2, (length, LARGEST), dtype=np.int8)
                self._projection = np.asarray((2.0 * signs - 1.0) / math.sqrt(LARGEST), np.float64)
            x, length = np.asarray(x @ self._projection, np.float64), LARGEST
        if self._pivot is None:
            self._pivot = x[0].copy()
            self._units, self._squares = np.zeros((length, length)), np.zeros((length, length))
            self._unit_sum, self._sum = np.zeros(length), np.zeros(length)
        assert self._units is not None
        assert self._squares is not None
        assert self._unit_sum is not None
        assert self._sum is not None
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        units = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
        self._units += units.T @ units
        self._unit_sum += units.sum(0)
        self._unit_norms += float(np.square(units).sum())
        centred = x - self._pivot
        self._squares += centred.T @ centred
        self._sum += centred.sum(0)

    def _add_scores(self, scores: Matrix, probabilities: bool) -> None:
        if self._votes is None:
            self._votes = np.zeros(scores.shape[1], np.int64)
        self._votes += np.bincount(scores.argmax(1), minlength=scores.shape[1])
        if not probabilities:
            scores = np.exp(scores - scores.max(1, keepdims=True))
            scores /= scores.sum(1, keepdims=True)
        self._confidence += float(scores.max(1).sum())

    def finish(self, feature: str = "") -> Diversity:
        """The diversity so far.

        Args:
            feature: Name of the feature, for the result.
        """
        n = self._images
        images = directions = cosine = None
        if self._units is not None and n:
            assert self._squares is not None
            assert self._unit_sum is not None
            assert self._sum is not None
            spectrum = np.maximum(np.linalg.eigvalsh(self._units / n), 0.0)
            total = spectrum.sum()
            images = _entropy_number(spectrum / total) if total > 0 else 1.0
            mean = self._sum / n
            covariance = self._squares / n - np.outer(mean, mean)
            power = float(np.square(covariance).sum())
            scale = float(np.square(self._squares / n).sum())
            directions = float(np.trace(covariance)) ** 2 / power if power > 1e-24 * scale else 0.0
            if n > 1:
                cosine = (float(self._unit_sum @ self._unit_sum) - self._unit_norms) / (n * (n - 1))
        found = Diversity(n, feature if images is not None else "", images, directions, cosine)
        if self._votes is None:
            return found
        return Diversity(
            *(n, found.feature, images, directions, cosine),
            classes=len(self._votes),
            classes_seen=int((self._votes > 0).sum()),
            effective_classes=_entropy_number(self._votes / n),
            confidence=min(1.0, self._confidence / n),  # a softmax in float32 may give a little more than one
        )


def feature_of(graph: Graph) -> str | None:
    """The value that enters the last layer with weights in front of the first output; ``None`` if there is no such layer."""
    waiting, known = [graph.outputs[0].name], set[str]()
    while waiting:
        value = waiting.pop(0)
        node = graph.producer(value)
        if node is None or node.name in known:
            continue
        known.add(node.name)
        if node.op_type in ("Gemm", "MatMul", "Conv", "ConvTranspose") and graph.constant(node.input[1]) is not None:
            return str(node.input[0])
        waiting += [name for name in node.input if name and graph.constant(name) is None]
    return None


def _pooled(x: torch.Tensor, images: int) -> torch.Tensor | None:
    """``[images, length]``: channels averaged over places (axis 1 counts them), or features averaged over tokens."""
    if x.ndim < 2 or x.shape[0] != images or not x.is_floating_point():
        return None
    if x.ndim == 2:
        return x
    return x.mean(1) if x.ndim == 3 else x.flatten(2).mean(2)


def diversity(
    model: Model,
    batches: Iterable[Mapping[str, Array]],
    *,
    micro_batch: int = 16,
    device: str | torch.device | None = None,
    progress: Progress = SILENT,
    total: int | None = None,
) -> Diversity:
    """The variety of a set, in one pass of constant memory; the result does not depend on how the images are cut.

    Args:
        model: The network.
        batches: Images by input name.
        micro_batch: Images that go through the network at a time.
        device: Where to compute.
        progress: Where to report.
        total: Number of images, if known, for the time left.
    """
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    graph = model.graph
    feature = feature_of(graph)
    output = graph.outputs[0]
    classifies = len(graph.outputs) == 1 and len(output.shape) == 2 and (output.shape[1] or 0) > 1
    maker = graph.producer(output.name)
    probabilities = maker is not None and maker.op_type == "Softmax"
    twin, builder = model.twin(device=place), DiversityBuilder()
    wanted = [name for name in (feature, output.name if classifies else None) if name is not None]
    seen = 0
    with progress.task("quality: variety", float(total or 0)) as task, torch.no_grad():
        for batch in micro_batches(batches, micro_batch):
            images = len(next(iter(batch.values())))
            held = twin.run({name: torch.tensor(array, device=place) for name, array in batch.items()}, fetch=wanted)
            features = None if feature is None else _pooled(held[feature], images)
            scores = held[output.name] if classifies else None
            builder.add(
                None if features is None else features.double().cpu().numpy(),
                None if scores is None or len(scores) != images else scores.double().cpu().numpy(),
                probabilities=probabilities,
            )
            seen += images
            task.advance(images)
    found = builder.finish(feature or "")
    return found if found.images else Diversity(seen)
