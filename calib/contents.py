"""Digest and statistics of a set, image by image, so that they do not depend on how it is cut into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.artifact import digest_json
from zsq_deploy.calib.manifest import CalibrationManifest, InputStatistics, ShardRecord
from zsq_deploy.errors import CalibrationError

__all__ = ["Array", "Content", "join"]

Array = npt.NDArray[Any]


class Content:
    """Running digest and statistics of one set."""

    def __init__(self) -> None:
        self.images = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self._hashes: dict[str, Any] = {}
        self._moments: dict[str, _Moments] = {}

    def check(self, batch: Mapping[str, Array], where: str) -> dict[str, Array]:
        """The batch as contiguous little-endian arrays, if it may be added."""
        if not batch:
            raise CalibrationError(
                "a batch holds no input at all", where=where, remedy="give one array for each input of the network"
            )
        arrays = {name: _plain(name, value, where) for name, value in batch.items()}
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) != 1:
            raise CalibrationError(
                f"the inputs hold different numbers of images: {counts}",
                where=where,
                remedy="give every input the same number of images (first axis)",
            )
        if self.shapes and set(arrays) != set(self.shapes):
            raise CalibrationError(
                f"a batch has the inputs {sorted(arrays)}, the batches before it had {sorted(self.shapes)}",
                where=where,
                remedy="give the same inputs in every batch",
            )
        for name, array in arrays.items():
            if self.shapes and (array.shape[1:] != self.shapes[name] or array.dtype != self.dtypes[name]):
                raise CalibrationError(
                    f"input {name!r} changes from {self.dtypes[name]} {self.shapes[name]} to {array.dtype} {array.shape[1:]}",
                    where=where,
                    remedy="all images of a set have one shape and one type",
                )
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
                raise CalibrationError(
                    f"input {name!r} holds NaN or infinite values in image(s) {[int(i) + self.images for i in bad[:5]]}",
                    where=where,
                    remedy="a synthesis that diverged: lower its learning rate or take another seed; other data: mend the file",
                )
        return arrays

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Take checked arrays into account."""
        for name, array in arrays.items():
            if name not in self.shapes:
                self.shapes[name], self.dtypes[name] = array.shape[1:], array.dtype
                self._hashes[name] = hashlib.sha256()
                self._moments[name] = _Moments()
            self._hashes[name].update(array.data.cast("B"))
            self._moments[name].add(array)
        self.images += len(next(iter(arrays.values())))

    def digest(self) -> str:
        """SHA-256 over the number of images and every input's name, type, shape and values."""
        return digest_json(
            {
                "images": self.images,
                "inputs": {
                    name: {
                        "dtype": self.dtypes[name].name,
                        "shape": list(self.shapes[name]),
                        "sha256": self._hashes[name].hexdigest(),
                    }
                    for name in self.shapes
                },
            }
        )

    def complete(self, manifest: CalibrationManifest, shards: list[ShardRecord]) -> CalibrationManifest:
        """The manifest with everything that follows from the content."""
        return manifest.model_copy(
            update={
                "images": self.images,
                "inputs": {name: list(shape) for name, shape in self.shapes.items()},
                "dtypes": {name: dtype.name for name, dtype in self.dtypes.items()},
                "statistics": {name: moments.result() for name, moments in self._moments.items()},
                "digest": self.digest(),
                "shards": shards,
            }
        )


class _Moments:
    """Per-channel moments, merged image by image (Chan, Golub and LeVeque 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros(0)
        self.m2: Array = np.zeros(0)
        self.low: Array = np.zeros(0)
        self.high: Array = np.zeros(0)

    def add(self, array: Array) -> None:
        images = len(array)
        channels = array.shape[1] if array.ndim >= 4 else 1
        for image in array.reshape(
            images, channels, -1
        ):  # one at a time: bounded memory, and no effect of the batch size
            values = image.astype(np.float64)
            size = values.shape[1]
            mean = values.mean(axis=1)
            m2 = np.square(values - mean[:, None]).sum(axis=1)
            low, high = values.min(axis=1), values.max(axis=1)
            if self.count == 0:
                self.count, self.mean, self.m2, self.low, self.high = size, mean, m2, low, high
                continue
            total = self.count + size
            delta = mean - self.mean
            self.mean = self.mean + delta * (size / total)
            self.m2 = self.m2 + m2 + np.square(delta) * (self.count * size / total)
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
            self.count = total

    def result(self) -> InputStatistics:
        return InputStatistics(
            mean=self.mean.tolist(),
            std=np.sqrt(self.m2 / max(self.count, 1)).tolist(),
            min=self.low.tolist(),
            max=self.high.tolist(),
        )


def _plain(name: str, value: Array, where: str) -> Array:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise CalibrationError(
            f"input {name!r} has the type {array.dtype}, which no network input has",
            where=where,
            remedy="give float, integer or boolean arrays",
        )
    if array.ndim < 1 or array.size == 0:
        raise CalibrationError(
            f"input {name!r} has the shape {array.shape}: nothing in it, or no image axis",
            where=where,
            remedy="give arrays whose first axis counts the images, with at least one image",
        )
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def join(pieces: list[dict[str, Array]]) -> dict[str, Array]:
    """Batches as one."""
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
