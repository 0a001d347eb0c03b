"""Terms that look at the features in front of a classifier's last weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.parts.labels import find_features
from zsq_deploy.calib.parts.recipe import Finished
from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look

__all__ = ["ClassMargins", "remember_class_features"]

_SUM, _COUNT = "feature_sum", "feature_count"


def pooled(features: Tensor) -> Tensor:
    """Features [N, F] of a value [N, F] or [N, F, ...]: the mean over what lies behind."""
    return features if features.dim() == 2 else features.flatten(2).mean(2)


def remember_class_features(finished: Finished) -> Mapping[str, Tensor]:
    """A recipe's `remember`: sum and number of the features of every class over all batches so far, ``[C, F]`` and ``[C]``."""
    context, targets = finished.context, finished.targets
    assert context.labels is not None
    assert targets is not None
    name = find_features(context.model.graph, context.labels)
    features = pooled(finished.values([name])[name]).cpu()
    classes, memory = targets.classes.cpu(), finished.memory
    shape = (context.labels.classes, features.shape[1])
    # Summed in order on the CPU, in float64: the same bits on every run.
    total = memory[_SUM].cpu().double() if _SUM in memory else torch.zeros(shape, dtype=torch.float64)
    count = memory[_COUNT].cpu() if _COUNT in memory else torch.zeros(shape[0], dtype=torch.float64)
    return {
        _SUM: total.index_add(0, classes, features.double()),
        _COUNT: count.index_add(0, classes, torch.ones(len(classes), dtype=torch.float64)),
    }


@dataclass(frozen=True)
class ClassMargins:
    """Keep each image's features neither too near to its class's centre nor too far from it (IntraQ, arXiv 2111.09136, section 3.3).

    Distance is one minus the cosine; the centre is the mean over earlier batches (see :func:`remember_class_features`). Two hinges,
    mean over the images whose class has been seen before.

    Attributes:
        weight: Its weight.
        lower: Least distance; 0: no bound.
        upper: Most distance; 2: no bound.
    """

    weight: float = 1.0
    lower: float = 0.05
    upper: float = 0.8
    name: str = "margins"
    separable: bool = False
    needs_labels: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.upper <= 2:
            raise ValueError(f"margins are distances between 0 and 2, in order, not {self.lower} and {self.upper}")

    def bind(self, context: Context) -> BoundTerm:
        """The term on the features of the network."""
        assert context.labels is not None
        return _BoundMargins(self, find_features(context.network.graph, context.labels))


@dataclass(frozen=True)
class _BoundMargins:
    """Margins of one network's features."""

    term: ClassMargins
    value: str

    @property
    def fetch(self) -> Sequence[str]:
        """The features."""
        return (self.value,)

    def __call__(self, look: Look) -> Tensor:
        """Both hinges."""
        assert look.targets is not None
        features = pooled(look.values[self.value])
        if _SUM not in look.memory:
            return features.new_zeros(())
        classes = look.targets.classes
        count = look.memory[_COUNT][classes]
        centres = (look.memory[_SUM][classes] / count.clamp_min(1)[:, None]).to(features)
        distance = 1 - F.cosine_similarity(features, centres, dim=1, eps=1e-6)
        outside = (self.term.lower - distance).clamp_min(0) + (distance - self.term.upper).clamp_min(0)
        known = (count > 0).to(features)
        return (outside * known).sum() / known.sum().clamp_min(1)
