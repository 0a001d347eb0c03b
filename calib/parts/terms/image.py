"""Terms that look at the images alone: smoothness and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zsq_deploy.calib.parts.priors import total_variation
from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look

__all__ = ["PixelNorm", "TotalVariation"]


@dataclass(frozen=True)
class TotalVariation:
    """Total variation of the batch (DeepInversion, arXiv 1912.08795, equation 3; see :func:`~zsq_deploy.calib.parts.priors.total_variation`).

    Attributes:
        weight: Its weight.
        norm: ``l2``: four plain norms over the whole batch; ``l1``: four mean absolute differences.
        seen: Of what the network was given (after augmentation) instead of the images.
    """

    weight: float = 1.0
    norm: Literal["l1", "l2"] = "l2"
    seen: bool = True
    name: str = "smooth"
    separable: bool = False
    needs_labels: bool = False

    @property
    def fetch(self) -> Sequence[str]:
        """Nothing."""
        return ()

    def bind(self, context: Context) -> BoundTerm:
        """It needs no network."""
        del context
        return self

    def __call__(self, look: Look) -> Tensor:
        """The total variation."""
        return total_variation(look.seen if self.seen else look.images, self.norm)


@dataclass(frozen=True)
class PixelNorm:
    """The size of the images: the plain norm over the whole batch (DeepInversion's released form), or the mean square.

    Attributes:
        weight: Its weight.
        squared: Mean over images of the sum of squares, which is separable, instead of the plain norm over all images.
    """

    weight: float = 1.0
    squared: bool = False
    name: str = "size"
    needs_labels: bool = False

    @property
    def separable(self) -> bool:
        """The squared form is a sum over images."""
        return self.squared

    @property
    def fetch(self) -> Sequence[str]:
        """Nothing."""
        return ()

    def bind(self, context: Context) -> BoundTerm:
        """It needs no network."""
        del context
        return self

    def __call__(self, look: Look) -> Tensor:
        """The norm."""
        if self.squared:
            return look.seen.square().sum() / look.batch
        norm: Tensor = torch.linalg.vector_norm(look.seen)
        return norm
