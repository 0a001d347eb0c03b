"""Pixels that start as structured pictures instead of noise.

What enters the layers of a network is far nearer to its stored statistics for pictures with edges, shading and textures than for noise (a third
of the distance on a CIFAR ResNet-20), so fewer steps are left to do. Pictures are drawn from formulas (:mod:`zsq_deploy.calib.fractal`); they are a
function of the run's seed, not of the network.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.calib.fractal import render
from zsq_deploy.calib.parts.parametrisations import Pixels, Start
from zsq_deploy.calib.parts.priors import NATURAL_MEAN, NATURAL_STD

__all__ = ["PicturedPixels", "drawn"]


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Structured pictures in standard space, on the CPU.

    Args:
        shape: [N, C, H, W] with 1 or 3 channels.
        seed: Of the pictures.
    """
    count, channels, height, width = shape
    levels = np.stack([render(height, width, channels, seed=seed, index=index) for index in range(count)])
    mean, std = np.array(NATURAL_MEAN), np.array(NATURAL_STD)
    if channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    standard = (levels / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(standard.transpose(0, 3, 1, 2), dtype=np.float32))


class PicturedPixels(Pixels):
    """Pixels of which a share starts as structured pictures, spread evenly over the batch, and the rest as N(0, 1) noise.

    An input that is no gray or colour picture starts as noise altogether.

    Args:
        start: What they start from.
        share: Of the images that start as pictures, 0 to 1.
    """

    def __init__(self, start: Start, share: float) -> None:
        super().__init__(start.shape, start.generator, start.device)
        chosen = [k for k in range(start.shape[0]) if int((k + 1) * share) > int(k * share)]
        if len(start.shape) != 4 or start.shape[1] not in (1, 3) or not chosen:
            return
        seed = int(torch.randint(2**31, (1,), generator=start.generator))
        with torch.no_grad():
            self.pixels[chosen] = drawn((len(chosen), *start.shape[1:]), seed).to(start.device)
