"""Terms that ask the network to see a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look

__all__ = ["CrossEntropy", "OwnProbability"]

# Where an image is certain to the last bit, the slope of (1 - p)^focus with a focus below 1 would be infinite.
_CERTAIN = 1e-6


@dataclass(frozen=True)
class _Bound:
    """A label term on the class scores of one network."""

    term: CrossEntropy | OwnProbability
    value: str

    @property
    def fetch(self) -> Sequence[str]:
        """The class scores."""
        return (self.value,)

    def __call__(self, look: Look) -> Tensor:
        """Mean over the batch."""
        assert look.targets is not None
        scores = look.values[self.value].flatten(1)
        wanted = look.targets.probabilities(scores.shape[1]).to(scores)
        return self.term.of(scores, wanted, look.targets.classes).sum() / look.batch


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy between the network's probabilities and the wanted ones, mean over images.

    DeepInversion, GDFQ, KW with hard labels; MixMix with mixed ones; HAST (arXiv 2303.13826, equation 6) with `focus`, which multiplies each
    image's loss by (1 - p)^focus, p the probability of what is wanted, and lets the gradient through that factor.

    Attributes:
        weight: Its weight.
        focus: HAST's gamma; 0: the plain loss.
    """

    weight: float = 1.0
    focus: float = 0.0
    name: str = "label"
    separable: bool = True
    needs_labels: bool = True

    def bind(self, context: Context) -> BoundTerm:
        """The term on the class scores of the network."""
        assert context.labels is not None
        return _Bound(self, context.labels.value)

    def of(self, scores: Tensor, wanted: Tensor, classes: Tensor) -> Tensor:
        """The loss of each image [N] from class scores [N, C], wanted probabilities [N, C] and classes [N]."""
        del classes
        logs = F.log_softmax(scores, 1)
        loss = -(wanted * logs).sum(1)
        if self.focus:
            loss = loss * (1 - (wanted * logs.exp()).sum(1)).clamp_min(_CERTAIN).pow(self.focus)
        return loss


@dataclass(frozen=True)
class OwnProbability:
    """Squared difference between the probability of an image's class and the one that is asked for, mean over images.

    IntraQ's soft inception loss (arXiv 2111.09136, section 3.4; its released code): the other classes are left alone.

    Attributes:
        weight: Its weight.
    """

    weight: float = 1.0
    name: str = "label"
    separable: bool = True
    needs_labels: bool = True

    def bind(self, context: Context) -> BoundTerm:
        """The term on the class scores of the network."""
        assert context.labels is not None
        return _Bound(self, context.labels.value)

    def of(self, scores: Tensor, wanted: Tensor, classes: Tensor) -> Tensor:
        """The loss of each image [N] from class scores [N, C], wanted probabilities [N, C] and classes [N]."""
        own = torch.softmax(scores, 1).gather(1, classes[:, None])
        return (own - wanted.gather(1, classes[:, None])).square().sum(1)
