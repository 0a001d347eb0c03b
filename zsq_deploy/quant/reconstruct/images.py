"""The images that a reconstruction learns from, and what is made of them: mirror images, shifted images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsq_deploy.artifact import digest_json

__all__ = ["ImageSet", "with_mirror_images", "with_shifted_images"]

Array = npt.NDArray[Any]


class ImageSet(Protocol):
    """What this package needs of a calibration set."""

    @property
    def digest(self) -> str:
        """Digest of the content."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        """The images in order, by input name."""


def with_mirror_images(images: ImageSet) -> ImageSet:
    """The images, and behind them all again with left and right exchanged.

    Only where every input is a batch of colour pictures (``[N, 3, H, W]``): there the mirror image of a picture is a picture again. Nothing
    says so of spectra or of sequences; those are given back as they are.

    Args:
        images: At least one.
    """
    return _Mirrored(images) if _are_pictures(images) else images


def with_shifted_images(images: ImageSet, copies: int, seed: int) -> ImageSet:
    """The images, and behind them all again some times, each moved by up to a tenth of its size; what comes in at the edge is mirrored.

    Only where every input is a batch of colour pictures, as in :func:`with_mirror_images`.

    Args:
        images: At least one.
        copies: How often they come again.
        seed: Of the random shifts.
    """
    return _Shifted(images, copies, seed) if copies > 0 and _are_pictures(images) else images


def _are_pictures(images: ImageSet) -> bool:
    first = next(images.batches(1))
    return all(array.ndim == 4 and array.shape[1] == 3 for array in first.values())


class _Mirrored:
    def __init__(self, images: ImageSet) -> None:
        self._images = images

    @property
    def digest(self) -> str:
        return digest_json({"images": self._images.digest, "and": "mirror images"})

    def __len__(self) -> int:
        return 2 * len(self._images)

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        yield from self._images.batches(batch_size)
        for batch in self._images.batches(batch_size):
            yield {name: np.ascontiguousarray(array[..., ::-1]) for name, array in batch.items()}


class _Shifted:
    def __init__(self, images: ImageSet, copies: int, seed: int) -> None:
        self._images, self._copies, self._seed = images, copies, seed

    @property
    def digest(self) -> str:
        return digest_json(
            {"images": self._images.digest, "and": "shifted", "copies": self._copies, "seed": self._seed}
        )

    def __len__(self) -> int:
        return (1 + self._copies) * len(self._images)

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        yield from self._images.batches(batch_size)
        for copy in range(self._copies):
            # one draw an image, whatever the batches: how the set is cut must not change it
            shares = np.random.default_rng([self._seed, copy]).random((len(self._images), 2))
            at = 0
            for batch in self._images.batches(batch_size):
                size = len(next(iter(batch.values())))
                yield {name: _moved(array, shares[at : at + size]) for name, array in batch.items()}
                at += size


def _moved(array: Array, shares: Array) -> Array:
    """Pictures moved down and right by shares of -0.1 to 0.1 of their size, in whole pixels."""
    height, width = array.shape[2:]
    reach = (height // 10, width // 10)
    wide = np.pad(array, ((0, 0), (0, 0), *((each, each) for each in reach)), mode="reflect")
    found = np.empty_like(array)
    for number, (down, right) in enumerate(shares):
        top, left = int(down * (2 * reach[0] + 1)), int(right * (2 * reach[1] + 1))
        found[number] = wide[number, :, top : top + height, left : left + width]
    return found
