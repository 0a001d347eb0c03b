"""Pixels with a margin around the image, smoothed before the network sees a window of them (Sony's data generation)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.parts.augment import Plan
from zsq_deploy.calib.parts.parametrisations import Pixels, Start

__all__ = ["FramedPixels", "SmoothedWindow", "margins", "smoothed"]


def margins(shape: tuple[int, ...], share: float) -> tuple[int, int]:
    """Pixels around an image of this shape [..., H, W], both sides together, for a share of its sides."""
    return int(share * shape[-2]), int(share * shape[-1])


def smoothed(images: Tensor, sigma: float) -> Tensor:
    """Images [N, C, H, W] convolved with a 3x3 Gaussian of standard deviation `sigma` pixels; outside is 0, the mean of pictures."""
    side = math.exp(-0.5 / sigma**2)
    taps = torch.tensor([side, 1.0, side], dtype=torch.float64) / (1 + 2 * side)
    kernel = torch.outer(taps, taps).to(images)
    channels = images.shape[1]
    return F.conv2d(images, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)


@dataclass(frozen=True)
class SmoothedWindow:
    """What the network sees of framed pixels: smoothed, and a random window of the image's size, the same for all images of a step.

    Attributes:
        margin: Share of the sides that lies around the image.
        sigma: Of the smoothing, in pixels.
    """

    margin: float = 1 / 7
    sigma: float = 1.25

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, number: int, steps: int) -> Plan:
        """The window's corner."""
        del number, steps
        most = torch.tensor(margins(shape, self.margin))
        corner = (torch.rand(2, generator=generator, dtype=torch.float64) * (most + 1)).to(torch.int64)
        size = torch.tensor(shape[-2:])
        return {"window": torch.cat([corner, size]).expand(shape[0], 4)}

    def apply(self, images: Tensor, plan: Plan) -> Tensor:
        """The window; of images without a margin (a rehearsal shows such) all there is."""
        top, left, height, width = (int(value) for value in plan["window"][0])
        top, left = (
            max(0, min(at, size - part))
            for at, size, part in zip((top, left), images.shape[2:], (height, width), strict=True)
        )
        return smoothed(images, self.sigma)[:, :, top : top + height, left : left + width]


class FramedPixels(Pixels):
    """Pixels with a margin; finished images are smoothed and cut out of the middle.

    Args:
        start: What they start from; its shape is that of the finished images.
        margin: Share of the sides that lies around the image.
        sigma: Of the smoothing, in pixels.
    """

    def __init__(self, start: Start, margin: float, sigma: float) -> None:
        self._margins, self._sigma, self._size = margins(start.shape, margin), sigma, start.shape[2:]
        larger = tuple(size + more for size, more in zip(self._size, self._margins, strict=True))
        super().__init__((*start.shape[:2], *larger), start.generator, start.device)

    @torch.no_grad()
    def finished(self) -> Tensor:
        """The images."""
        top, left = (more // 2 for more in self._margins)
        height, width = self._size
        return smoothed(self.pixels, self._sigma)[:, :, top : top + height, left : left + width]
