"""Activations of the images that a block learns from: in memory while they are small, on disk beyond that.

Images lie along axis 0, channels innermost where there are planes, so that a random batch is a few long copies. Files are mapped: the
operating system keeps what fits and drops it when memory is wanted elsewhere.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Cache"]

Array = npt.NDArray[Any]


class Cache:
    """Tensors by key, written in order of the images and read in any order.

    Args:
        images: Number of images.
        folder: Where files are made (a folder of its own inside it, gone with the cache); ``None``: where temporary files go.
        memory: Bytes that may stay in memory together.
    """

    def __init__(self, images: int, folder: Path | None = None, *, memory: int = 1 << 29) -> None:
        self._images = images
        self._parent = folder
        self._memory = memory
        self._held = 0
        self._folder: Path | None = None
        self._arrays: dict[str, Array] = {}
        self._axes: dict[str, tuple[int, bool]] = {}
        self._files: dict[str, Path] = {}
        self._number = 0

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def resize(self, images: int) -> None:
        """Forget everything and take another number of images from now on."""
        for key in list(self._arrays):
            self.drop(key)
        self._images = images

    @property
    def on_disk(self) -> int:
        """Bytes in files."""
        return sum(self._arrays[key].nbytes for key in self._files)

    def put(self, key: str, first: int, tensor: Tensor, axis: int = 0) -> None:
        """Write the images from `first` on.

        Args:
            key: Of the tensor.
            first: Number of the first image.
            tensor: Their activations.
            axis: Which axis counts the images.
        """
        tensor = tensor.detach().movedim(axis, 0)
        planes = tensor.dim() == 4
        if planes:
            tensor = tensor.permute(0, 2, 3, 1)
        array = tensor.cpu().contiguous().numpy()
        if key not in self._arrays:
            self._make(key, array)
            self._axes[key] = (axis, planes)
        self._arrays[key][first : first + len(array)] = array

    def _make(self, key: str, sample: Array) -> None:
        shape = (self._images, *sample.shape[1:])
        size = int(np.prod(shape)) * sample.itemsize
        if self._held + size <= self._memory:
            self._arrays[key] = np.empty(shape, sample.dtype)
            self._held += size
            return
        if self._folder is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=self._parent))
        path = self._folder / f"{self._number:05d}.bin"
        self._number += 1
        self._arrays[key] = np.memmap(path, sample.dtype, "w+", shape=shape)
        self._files[key] = path

    def take(self, key: str, chosen: Array | slice) -> Tensor:
        """Activations of some images, in the shape in which they were put."""
        axis, planes = self._axes[key]
        tensor = torch.from_numpy(np.array(self._arrays[key][chosen]))
        if planes:
            tensor = tensor.permute(0, 3, 1, 2)
        return tensor.movedim(0, axis)

    def drop(self, key: str) -> None:
        """Forget a tensor."""
        array = self._arrays.pop(key, None)
        if array is None:
            return
        path = self._files.pop(key, None)
        if path is None:
            self._held -= array.nbytes
            return
        del array
        path.unlink(missing_ok=True)

    def close(self) -> None:
        """Forget everything."""
        self.resize(self._images)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
