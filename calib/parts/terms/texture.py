"""Laws' texture energies of images, and how they should be shared out (TexQ)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look
from zsq_deploy.errors import CalibrationError

__all__ = ["TEXTURES", "TextureShares", "texture_energies"]

# Laws' one-dimensional masks of five pixels: level, edge, spot, ripple.
_MASKS = {
    "L": (1.0, 4.0, 6.0, 4.0, 1.0),
    "E": (-1.0, -2.0, 0.0, 2.0, 1.0),
    "S": (-1.0, 0.0, 2.0, 0.0, -1.0),
    "R": (1.0, -4.0, 6.0, -4.0, 1.0),
}

#: The nine textures: pairs of masks without direction, but for the pure level, which is brightness.
TEXTURES: tuple[str, ...] = tuple(a + b for a, b in itertools.combinations_with_replacement(_MASKS, 2) if a + b != "LL")


def _filters() -> tuple[Tensor, Tensor]:
    """All filters of unit norm [F, 1, 5, 5], and which of them make up which texture [9, F] (mean of both directions)."""
    kernels, members = [], []
    for row, name in enumerate(TEXTURES):
        for pair in dict.fromkeys((name, name[::-1])):
            kernel = torch.outer(torch.tensor(_MASKS[pair[0]]), torch.tensor(_MASKS[pair[1]])).double()
            kernels.append(kernel / kernel.norm())
            members.append(row)
    share = torch.zeros(len(TEXTURES), len(kernels), dtype=torch.float64)
    for index, row in enumerate(members):
        share[row, index] = 1 / members.count(row)
    return torch.stack(kernels)[:, None], share


def texture_energies(images: Tensor) -> Tensor:
    """Laws' texture energies [N, 9] of images [N, C, H, W] of at least 5 x 5 pixels.

    Mean magnitude of the mean channel's response to each of the nine 5x5 filters (unit norm, so that white noise has the same energy in all).
    """
    filters, share = _filters()
    responses = F.conv2d(images.mean(1, keepdim=True), filters.to(images))
    return responses.abs().mean((2, 3)) @ share.to(images).T


@dataclass(frozen=True)
class TextureShares:
    """Pull the shares that an image's nine texture energies have of their sum into the range in which pictures have them.

    TexQ (Chen et al., NeurIPS 2023) calibrates the distribution of texture energy of its calibration images with nine (k) Laws filters and the thresholds 0.3,
    0.5 and 0.015, because synthetic images tend to hold one dominant texture where photographs hold up to nine. Its formula could not be read;
    this one uses its constants as hinges, mean over images of

        sum_i max(p_i - upper, 0) + sum_i max(least - p_i, 0) + max(lower - (sum of the three largest p), 0):

    no texture dominates, none is missing, and yet an image is no white noise (which has 1/9 everywhere).

    Attributes:
        weight: Its weight.
        upper: Most that one texture may have.
        lower: Least that the three strongest have together.
        least: Least that each has.
    """

    weight: float = 1.0
    upper: float = 0.3
    lower: float = 0.5
    least: float = 0.015
    name: str = "texture"
    separable: bool = True
    needs_labels: bool = False

    @property
    def fetch(self) -> Sequence[str]:
        """Nothing."""
        return ()

    def bind(self, context: Context) -> BoundTerm:
        """It needs images.

        Raises:
            CalibrationError: The network's input is no image, or one of less than 5 x 5 pixels.
        """
        shape = context.spec.shape
        if len(shape) != 4 or any(size is not None and size < 5 for size in shape[2:]):
            raise CalibrationError(
                f"input {context.spec.name!r} of shape {list(shape)} is no image of at least 5 x 5 pixels; Laws' texture filters have that size",
                where=context.spec.name,
                remedy="use --method zeroq, which takes inputs of any shape",
            )
        return self

    def __call__(self, look: Look) -> Tensor:
        """The hinges."""
        energies = texture_energies(look.images)
        shares = energies / energies.sum(1, keepdim=True).clamp_min(1e-12)
        above = (shares - self.upper).clamp_min(0).sum(1)
        below = (self.least - shares).clamp_min(0).sum(1)
        flat = (self.lower - shares.topk(3, 1).values.sum(1)).clamp_min(0)
        return (above + below + flat).sum() / look.batch
