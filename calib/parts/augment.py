"""Changes of the images inside the loop, between the pixels and the network, with the gradient going through them.

An augmentation first draws its choices for the whole batch and then applies the rows that it is given, so that a batch that is
worked through in pieces is changed exactly like one that is worked through at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augment", "Blur", "Flip", "Jitter", "Plan", "RandomResizedCrop", "blurred", "resampled"]

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


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a random box out of each image, enlarge it to the image's size, and mirror some, with the gradient going through.

    IntraQ (arXiv 2111.09136, section 3.2, "local object reinforcement") and HAST. Boxes are drawn as torchvision draws them: the area
    uniformly, the aspect ratio uniformly in its logarithm, up to ten attempts; in whole pixels. Bilinear, without antialiasing.

    Attributes:
        scale: Least and largest share of the image's area.
        ratio: Least and largest aspect ratio (width to height), relative to the image's own.
        share: Probability that the images of a step are cropped at all.
        each: Decide that for each image instead of for the whole batch.
        mirror: Probability that a cropped image is mirrored left and right.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    share: float = 0.5
    each: bool = False
    mirror: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"a crop takes a share of the area between 0 and 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"aspect ratios are positive and in order, not {self.ratio}")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, number: int, steps: int) -> Plan:
        """Which images are cropped, where (top, left, height, width in pixels), and which are mirrored."""
        del number, steps
        count, height, width = shape[0], shape[-2], shape[-1]
        chosen = torch.rand(count if self.each else 1, generator=generator).expand(count) < self.share
        uniform = torch.rand((4, count, _ATTEMPTS), generator=generator, dtype=torch.float64)
        mirror = torch.rand(count, generator=generator) < self.mirror
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform[0]) * (height * width)
        low, high = (math.log(side * width / height) for side in self.ratio)
        ratio = torch.exp(low + (high - low) * uniform[1])
        wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)  # the first attempt that fits, else attempt 0
        found = fits.gather(1, first)[:, 0]
        tall, wide = (
            torch.where(found, side.gather(1, first)[:, 0], torch.tensor(float(whole), dtype=torch.float64))
            for side, whole in ((tall, height), (wide, width))
        )
        top = (uniform[2, :, 0] * (height - tall + 1)).floor()
        left = (uniform[3, :, 0] * (width - wide + 1)).floor()
        return {
            "cropped": chosen,
            "box": torch.stack([top, left, tall, wide], 1).to(torch.int64),
            "mirror": mirror,
        }

    def apply(self, images: Tensor, plan: Plan) -> Tensor:
        """Cropped and enlarged images."""
        cropped = plan["cropped"]
        if not bool(cropped.any()):
            return images
        made = resampled(images, plan["box"], plan["mirror"])
        if bool(cropped.all()):
            return made
        return torch.where(cropped.to(images.device)[:, None, None, None], made, images)


_ATTEMPTS = 10


def resampled(images: Tensor, boxes: Tensor, mirror: Tensor | None = None) -> Tensor:
    """The box of each image, enlarged to the image's size (bilinear; corners not aligned), mirrored where asked.

    The same as ``interpolate(image[:, top:top + height, left:left + width], (H, W), mode="bilinear", align_corners=False)`` image by image, in
    one go. On a CPU it samples; elsewhere it multiplies with the two interpolation matrices, whose gradient is deterministic on GPUs.

    Args:
        images: [N, C, H, W].
        boxes: Top, left, height and width in pixels, int64 [N, 4].
        mirror: Which images are mirrored left and right, bool [N].
    """
    height, width = images.shape[2:]
    boxes = boxes.to(images.device)
    rows = _positions(boxes[:, 0], boxes[:, 2], height, images.dtype)
    columns = _positions(boxes[:, 1], boxes[:, 3], width, images.dtype)
    if mirror is not None:
        columns = torch.where(mirror.to(images.device)[:, None], columns.flip(1), columns)
    if images.device.type == "cpu":
        x = ((2 * columns + 1) / width - 1)[:, None, :].expand(-1, height, -1)
        y = ((2 * rows + 1) / height - 1)[:, :, None].expand(-1, -1, width)
        grid = torch.stack([x, y], 3)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _multiplied(images, rows, columns)


def _positions(start: Tensor, size: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Where each of `length` new pixels lies among the old ones [N, length], not beyond the outermost ones of the box."""
    start, size = start.to(dtype)[:, None], size.to(dtype)[:, None]
    centres = torch.arange(length, dtype=dtype, device=start.device) + 0.5
    inside = (centres * (size / length) - 0.5).clamp_min(0).minimum(size - 1)
    return start + inside


def _multiplied(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The images at the crossings of `rows` [N, H] and `columns` [N, W], by matrix products."""
    count, channels, height, width = images.shape
    vertical, horizontal = _weights(rows, height), _weights(columns, width)
    lines = torch.bmm(vertical, images.permute(0, 2, 1, 3).reshape(count, height, channels * width))
    lines = lines.view(count, height * channels, width)
    made = torch.bmm(lines, horizontal.transpose(1, 2)).view(count, height, channels, width)
    return made.permute(0, 2, 1, 3).contiguous(memory_format=torch.channels_last)


def _weights(positions: Tensor, length: int) -> Tensor:
    """Weights of the old pixels for new ones at `positions` [N, M]: [N, M, length], linear between neighbours."""
    old = torch.arange(length, dtype=positions.dtype, device=positions.device)
    return (1 - (positions[:, :, None] - old).abs()).clamp_min(0)


@dataclass(frozen=True)
class Blur:
    """Blur the images with a Gaussian, with probability `share`.

    Attributes:
        sigma: Standard deviation of the Gaussian in pixels, or, of two numbers, the least and the most of it, drawn for every step.
        share: Probability.
    """

    sigma: float | tuple[float, float] = 1.0
    share: float = 1.0

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, number: int, steps: int) -> Plan:
        """How much all images of the step are blurred; 0: not at all."""
        del number, steps
        low, high = self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)
        chosen, where = torch.rand(2, generator=generator, dtype=torch.float64)
        sigma = (low + (high - low) * where) * (chosen < self.share)
        return {"sigma": sigma.expand(shape[0])}

    def apply(self, images: Tensor, plan: Plan) -> Tensor:
        """Blurred images."""
        sigma = float(plan["sigma"][0])
        return blurred(images, sigma) if sigma > 0 else images


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images [N, C, H, W] convolved with a Gaussian of standard deviation `sigma` pixels, cut at three of them; edges by repetition."""
    reach = max(1, math.ceil(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    channels = images.shape[1]
    x = _extended(_extended(images, reach, 2), reach, 3)
    x = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def _extended(images: Tensor, by: int, axis: int) -> Tensor:
    """The images with their first and last line along an axis repeated. From slices: their gradient is deterministic on every device."""
    shape = [-1, -1, -1, -1]
    shape[axis] = by
    first, last = images.narrow(axis, 0, 1), images.narrow(axis, images.shape[axis] - 1, 1)
    return torch.cat([first.expand(shape), images, last.expand(shape)], axis)
