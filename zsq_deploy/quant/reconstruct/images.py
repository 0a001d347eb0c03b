"""The images that a reconstruction learns from, and their mirror images beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsq_deploy.artifact import digest_json

__all__ = ["ImageSet", "with_mirror_images"]

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
    first = next(images.batches(1))
    if all(array.ndim == 4 and array.shape[1] == 3 for array in first.values()):
        return _Mirrored(images)
    return images


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
