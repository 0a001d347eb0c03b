"""A Gaussian low-pass filter in the frequency domain (SynQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_deploy.calib.parts.parametrisations import Pixels, Start

__all__ = ["FilteredPixels", "low_pass"]


def low_pass(images: Tensor, cutoff: float) -> Tensor:
    """Images [..., H, W] with each frequency multiplied by exp(-r^2 / (2 cutoff^2)), r its distance from 0 in periods per image.

    SynQ (ICLR 2025), equation of its low-pass filter with D0 = `cutoff`. Real images stay real, and their means stay.
    """
    height, width = images.shape[-2:]
    down = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)
    right = torch.fft.rfftfreq(width, 1 / width, dtype=torch.float64)
    gain = torch.exp(-(down[:, None].square() + right[None, :].square()) / (2 * cutoff**2))
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(images.contiguous()) * gain.to(images), s=(height, width))
    return filtered


class FilteredPixels(Pixels):
    """Pixels whose finished images are low-pass filtered.

    Args:
        start: What they start from.
        cutoff: See :func:`low_pass`; 0: no filter.
    """

    def __init__(self, start: Start, cutoff: float) -> None:
        super().__init__(start.shape, start.generator, start.device)
        self._cutoff = cutoff

    @torch.no_grad()
    def finished(self) -> Tensor:
        """The filtered images."""
        return low_pass(self.pixels, self._cutoff) if self._cutoff else self.pixels
