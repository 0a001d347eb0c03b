"""Changes of the images inside the loop, between the pixels and the network, with the gradient going through them.

An augmentation first draws its choices for the whole batch and then applies the rows that it is given, so that a batch that is
worked through in pieces is changed exactly like one that is worked through at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Augment", "Flip", "Jitter", "Plan"]

Plan = Mapping[str, Tensor]
"""The choices for a batch: name -> [N, ...], one row an image."""


class Augment(Protocol):
    """A random change of images. Implementations are frozen dataclasses."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, number: int, steps: int) -> Plan:
        """The choices of one step.

        Args:
            shape: Of the whole batch [N, C, H, W].
            generator: On the CPU.
            number: Steps done before this one, for augmentations that change with time.
            steps: Most steps of the batch.
        """

    def apply(self, images: Tensor, plan: Plan) -> Tensor:
        """The images [n, C, H, W] changed as the n rows of `plan` say."""


@dataclass(frozen=True)
class Jitter:
    """Roll the whole batch by up to `reach` pixels along both axes, the same for every image (DeepInversion, arXiv 1912.08795).

    Attributes:
        reach: Most pixels, or, below 1, share of the shorter side.
    """

    reach: float = 30

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, number: int, steps: int) -> Plan:
        """One shift for all images."""
        del number, steps
        reach = int(self.reach) if self.reach >= 1 else int(self.reach * min(shape[2:]))
        shift = torch.randint(-reach, reach + 1, (1, 2), generator=generator)
        return {"shift": shift.expand(shape[0], 2)}

    def apply(self, images: Tensor, plan: Plan) -> Tensor:
        """Rolled images."""
        down, right = (int(value) for value in plan["shift"][0])
        return torch.roll(images, (down, right), (2, 3)) if down or right else images


@dataclass(frozen=True)
class Flip:
    """Mirror left and right, with probability `share`.

    Attributes:
        share: Probability.
        each: Decide for each image instead of for the whole batch.
    """

    share: float = 0.5
    each: bool = False

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, number: int, steps: int) -> Plan:
        """Which images are mirrored."""
        del number, steps
        drawn = torch.rand(shape[0] if self.each else 1, generator=generator) < self.share
        return {"mirror": drawn.expand(shape[0])}

    def apply(self, images: Tensor, plan: Plan) -> Tensor:
        """Mirrored images."""
        mirror = plan["mirror"]
        if not bool(mirror.any()):
            return images
        if bool(mirror.all()):
            return images.flip(3)
        return torch.where(mirror.to(images.device)[:, None, None, None], images.flip(3), images)
