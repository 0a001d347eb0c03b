"""From uint8 images to what the network takes in, and which values that can be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import UsageError

__all__ = ["Preprocess"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Preprocess:
    """How uint8 images become network input: ``(image / 255 - mean) / std``, or the bare pixel values.

    Attributes:
        mean: Per channel (RGB order) or one number for all; acts on values from 0 to 1.
        std: As `mean`; never zero.
        raw_pixels: Leave pixel values at 0 to 255; excludes `mean` and `std`.

    Raises:
        UsageError: The parts contradict each other.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    raw_pixels: bool = False

    def __post_init__(self) -> None:
        if self.raw_pixels and (self.mean is not None or self.std is not None):
            raise UsageError(
                "--raw-pixels leaves pixel values as they are, so --mean and --std have nothing to act on",
                where="--raw-pixels",
                remedy="give either --raw-pixels, or --mean and --std",
            )
        if (self.mean is None) != (self.std is None):
            given, missing = ("--mean", "--std") if self.std is None else ("--std", "--mean")
            raise UsageError(
                f"{given} is given without {missing}",
                where=given,
                remedy=f"give both; a network trained without {missing[2:]} wants {missing} "
                + ("1,1,1" if missing == "--std" else "0,0,0"),
            )
        if self.mean is None or self.std is None:
            return
        for option, values in (("--mean", self.mean), ("--std", self.std)):
            if not values or not all(math.isfinite(value) for value in values):
                raise UsageError(
                    f"{option} is {_text(values) or 'empty'}", where=option, remedy="give one finite number per channel"
                )
        if any(value <= 0 for value in self.std):
            raise UsageError(
                f"--std is {_text(self.std)}, but a standard deviation is greater than zero",
                where="--std",
                remedy="check the numbers; for ImageNet networks it is 0.229,0.224,0.225",
            )
        if len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise UsageError(
                f"--mean has {len(self.mean)} numbers and --std has {len(self.std)}",
                where="--std",
                remedy="give one number per channel in both",
            )
        if any(abs(value) > 2 for value in self.mean):
            raise UsageError(
                f"--mean is {_text(self.mean)}, but it acts on pixel values divided by 255",
                where="--mean",
                remedy="divide --mean and --std by 255, or use --raw-pixels for a network that takes 0 to 255",
            )

    def _constants(self, channels: int) -> tuple[Floats, Floats]:
        """Mean and standard deviation as float32 arrays of `channels` numbers."""
        found = []
        for option, values in (("--mean", self.mean or (0.0,)), ("--std", self.std or (1.0,))):
            if len(values) not in (1, channels):
                raise UsageError(
                    f"{option} has {len(values)} numbers, but the network's input has {channels} channel(s)",
                    where=option,
                    remedy=f"give {channels} number(s), or a single one for all channels",
                )
            found.append(np.broadcast_to(np.asarray(values, np.float32), (channels,)))
        return found[0], found[1]

    def apply(self, images: npt.NDArray[Any]) -> Floats:
        """Network input for uint8 images.

        Args:
            images: uint8, ``[N, H, W, C]``, RGB or gray.

        Returns:
            float32, ``[N, C, H, W]``, contiguous.

        Raises:
            UsageError: The number of channels does not fit `mean` and `std`.
        """
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UsageError(
                f"images are {images.dtype} with {images.ndim} dimensions, not uint8 [N, H, W, C]",
                where="images",
                remedy="give 8-bit images, one per first index, channels last",
            )
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32)
        if self.raw_pixels:
            return pixels
        mean, std = self._constants(pixels.shape[1])
        pixels /= np.float32(255)
        if self.mean is not None:
            pixels -= mean[:, None, None]
            pixels /= std[:, None, None]
        return pixels

    def bounds(self, channels: int) -> tuple[Floats, Floats]:
        """Smallest and largest value that an image can take in each channel of the network's input.

        Returns:
            Two float32 arrays ``[channels]``: exactly what :meth:`apply` gives for black and for white.
        """
        extremes = self.apply(np.stack([np.full((1, 1, channels), level, np.uint8) for level in (0, 255)]))
        return extremes[0, :, 0, 0], extremes[1, :, 0, 0]


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
