"""One image of a batch pasted into another, with the label mixed accordingly (MixMix)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zsq_deploy.calib.parts.augment import Plan
from zsq_deploy.calib.parts.labels import Targets

__all__ = ["Paste", "pasted"]


def pasted(images: Tensor, others: Tensor, boxes: Tensor) -> Tensor:
    """Images with others, scaled down to a box (bilinear, corners not aligned), pasted into them.

    Args:
        images: [N, C, H, W].
        others: What is pasted, same shape.
        boxes: Top, left, height and width in pixels, int64 [N, 4]; a box of no height leaves the image alone.
    """
    height, width = images.shape[2:]
    boxes = boxes.to(images.device)
    rows, inside_rows = _weights(boxes[:, 0], boxes[:, 2], height, images.dtype)
    columns, inside_columns = _weights(boxes[:, 1], boxes[:, 3], width, images.dtype)
    small = torch.einsum(
        "nyh,nchw,nxw->ncyx", rows, others, columns
    )  # matrix products: their gradient is deterministic on GPUs
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    made = torch.where(inside, small, images)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


def _weights(start: Tensor, size: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Along one axis: weights of the source's pixels for each pixel [N, L, L], and which pixels lie in the box [N, L]."""
    at = torch.arange(length, device=start.device)
    inside = (at >= start[:, None]) & (at < (start + size)[:, None])
    scale = (length / size.clamp_min(1).to(dtype))[:, None]
    source = ((at - start[:, None]).to(dtype) + 0.5) * scale - 0.5
    source = source.clamp(0, length - 1)
    weights = (1 - (source[:, :, None] - at.to(dtype)).abs()).clamp_min(0)
    return weights, inside


@dataclass(frozen=True)
class Paste:
    """Paste another image of the batch, scaled down, into a random box of each, and mix the labels by area (MixMix, arXiv 2011.09899).

    The network then sees parts of several images at once and the loss asks for exactly the classes that are there, each as much as it covers. Partners go
    round: image i gets image i + k of the batch, k drawn for the step.

    Attributes:
        share: Probability that the images of a step are mixed.
        least: Least side of the box, as a share of the image's.
        most: Most side of it.
    """

    share: float = 0.5
    least: float = 0.2
    most: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1 or not 0 <= self.share <= 1:
            raise ValueError(f"boxes take a share of the image's sides, and steps a share of all: {self}")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, number: int, steps: int) -> Plan:
        """Which image is pasted, and where (top, left, height, width in pixels)."""
        del number, steps
        count, height, width = shape[0], shape[-2], shape[-1]
        chosen = bool(torch.rand(1, generator=generator) < self.share) and count > 1
        by = int(torch.randint(1, max(2, count), (1,), generator=generator))
        uniform = torch.rand((count, 3), generator=generator, dtype=torch.float64)
        side = self.least + (self.most - self.least) * uniform[:, 0]
        tall, wide = (side * height).round().clamp(1, height), (side * width).round().clamp(1, width)
        top = (uniform[:, 1] * (height - tall + 1)).floor()
        left = (uniform[:, 2] * (width - wide + 1)).floor()
        box = torch.stack([top, left, tall, wide], 1).to(torch.int64)
        area = tall * wide / (height * width)
        if not chosen:
            box, area = torch.zeros_like(box), torch.zeros_like(area)
        return {"partner": (torch.arange(count) + by) % count, "box": box, "area": area}

    def apply(self, images: Tensor, plan: Plan) -> Tensor:
        """Mixed images; the whole batch at once, because partners may be anywhere in it."""
        if len(images) != len(plan["partner"]) or int(plan["partner"].max()) >= len(images):
            raise ValueError("images are pasted into each other in whole batches only")
        if not bool((plan["box"][:, 2] > 0).any()):
            return images
        return pasted(images, images[plan["partner"].to(images.device)], plan["box"])

    def mix(self, targets: Targets, plan: Plan, classes: int) -> Targets:
        """What mixed images are asked to be: the partner's classes by the area of the box, the image's own by the rest."""
        if not bool((plan["area"] > 0).any()):
            return targets
        own = targets.probabilities(classes)
        area = plan["area"].to(own)[:, None]
        return Targets(targets.classes, (1 - area) * own + area * own[plan["partner"].to(own.device)])
