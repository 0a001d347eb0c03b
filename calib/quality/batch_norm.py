"""How far the statistics of images at every batch normalization are from those that training left there.

For channel ``c`` of a layer with stored mean ``mu``, variance ``s2`` and epsilon ``e``, and mean ``m`` and variance ``v`` (over images and
places, biased) of what enters the layer, with ``d = sqrt(s2 + e)``:

* mean gap ``(m - mu) / d``, as root mean square over channels;
* spread gap ``(sqrt(v) - sqrt(s2)) / d``, as root mean square over channels;
* Kullback-Leibler divergence of N(m, v + e) from N(mu, s2 + e), ``(log((s2 + e) / (v + e)) + (v + e + (m - mu)^2) / (s2 + e) - 1) / 2``, as
  mean over channels.

It is a plain forward pass of the images as they are stored: no smoothing, no generator, no augmentation takes part. A method that optimises
this very distance makes it small on its own images; what it says about images that were not used is why it is taken on a held-out part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.model import Model
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.statistics import collect
from zsq_deploy.quant.statistics_values import Moments

__all__ = ["BatchNormDistance", "LayerDistance", "batch_norm_distance"]


@dataclass(frozen=True)
class LayerDistance:
    """One batch normalization.

    Attributes:
        name: Node name.
        channels: Number of channels.
        mean: Mean gap in stored standard deviations.
        spread: Gap of the standard deviations in stored standard deviations.
        kl: Kullback-Leibler divergence in nats a channel.
    """

    name: str
    channels: int
    mean: float
    spread: float
    kl: float


@dataclass(frozen=True)
class BatchNormDistance:
    """All batch normalizations of a network, in graph order.

    Attributes:
        layers: One entry a layer.
        images: Number of images.
    """

    layers: tuple[LayerDistance, ...]
    images: int

    @property
    def mean(self) -> float:
        """Mean gap, averaged over layers."""
        return float(np.mean([layer.mean for layer in self.layers]))

    @property
    def spread(self) -> float:
        """Gap of the standard deviations, averaged over layers."""
        return float(np.mean([layer.spread for layer in self.layers]))

    @property
    def kl(self) -> float:
        """Kullback-Leibler divergence, averaged over layers."""
        return float(np.mean([layer.kl for layer in self.layers]))


def _layer(name: str, found: Moments, mean: npt.NDArray[Any], var: npt.NDArray[Any], eps: float) -> LayerDistance:
    mu, s2 = mean.astype(np.float64), var.astype(np.float64)
    m, v = found.mean, found.var
    eps = max(eps, 1e-30)  # some exporters write none, and a dead channel has no variance
    stored = s2 + eps
    gap, spread = np.square(m - mu) / stored, np.square(np.sqrt(v) - np.sqrt(s2)) / stored
    kl = 0.5 * (np.log(stored / (v + eps)) + (v + eps) / stored + gap - 1.0)
    return LayerDistance(
        name, len(mu), float(np.sqrt(gap.mean())), float(np.sqrt(spread.mean())), float(np.maximum(kl, 0.0).mean())
    )


def batch_norm_distance(
    model: Model,
    batches: Iterable[Mapping[str, npt.NDArray[Any]]],
    *,
    micro_batch: int = 16,
    device: str | torch.device | None = None,
    progress: Progress = SILENT,
) -> BatchNormDistance | None:
    """Distance to the stored statistics, in one pass of constant memory; the result does not depend on how the images are cut.

    Args:
        model: The network, batch normalizations in place.
        batches: Images by input name.
        micro_batch: Images that go through the network at a time.
        device: Where to compute.
        progress: Where to report.

    Returns:
        ``None`` for a network without batch normalizations.
    """
    layers = model.batch_norms()
    if not layers:
        return None
    watched = list(dict.fromkeys(layer.input for layer in layers))
    found = collect(
        model.graph,
        batches,
        values=watched,
        micro_batch=micro_batch,
        device=device,
        progress=progress,
        title="quality: batch-norm distance",
    )
    rows = tuple(
        _layer(layer.node, found[layer.input].channels, layer.mean, layer.var, layer.eps)
        for layer in layers
        if len(found[layer.input].channels.mean) == len(layer.mean)
    )
    return BatchNormDistance(rows, found.images) if rows else None
