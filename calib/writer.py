"""Writing a calibration set batch by batch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zsq_deploy.artifact import atomic_writer, write_json
from zsq_deploy.calib.calibration_set import SHARD_BYTES, CalibrationSet, Disk
from zsq_deploy.calib.contents import Array, Content, join
from zsq_deploy.calib.manifest import MANIFEST, MARKER, CalibrationManifest, ShardRecord, sealed
from zsq_deploy.errors import CalibrationError, OutputExistsError

__all__ = ["CalibrationWriter"]


class CalibrationWriter:
    """Writes a set batch by batch: memory holds one shard, whatever the number of images.

    Use it as a context manager: when the block ends with an error, what was written is taken away again. When the process is
    killed, the folder stays behind marked as unfinished, and :meth:`CalibrationSet.open` says so.

    Args:
        path: The folder; made when missing.
        manifest: What is known about the set; counts, statistics, digests and shards are filled in.
        force: Replace a set (or an unfinished one) that is there already. Other files in the folder are left alone.
        shard_bytes: Size at which a shard is closed.

    Raises:
        OutputExistsError: The folder holds a set already, or an unfinished one.
    """

    def __init__(
        self,
        path: Path | str,
        manifest: CalibrationManifest,
        *,
        force: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path = Path(path)
        self._manifest = manifest
        self._limit = max(1, shard_bytes)
        self._content = Content()
        self._held: list[dict[str, Array]] = []
        self._held_images = 0
        self._shards: list[ShardRecord] = []
        self._open = False
        self._made_folder = not self.path.exists()
        self._claim(force)
        self._open = True

    def _claim(self, force: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OutputExistsError(
                "the output is a file, not a folder", where=str(self.path), remedy="choose another folder"
            )
        if (self.path / MANIFEST).exists() and not force:
            raise OutputExistsError(
                "the folder holds a calibration set already",
                where=str(self.path),
                remedy="choose another folder, or replace the set with --force",
            )
        if (self.path / MARKER).exists() and not force:
            raise OutputExistsError(
                "the folder holds an unfinished calibration set, or another run is writing one",
                where=str(self.path),
                remedy="wait for the other run, go on with --resume, or start over with --force",
            )
        # the marker comes first and the old manifest goes before anything else: whatever happens from here on, the folder
        # never looks like a finished set
        write_json(self.path / MARKER, {"method": self._manifest.method, "pid": os.getpid()})
        (self.path / MANIFEST).unlink(missing_ok=True)
        self._remove_shards()

    def _remove_shards(self) -> None:
        for file in self.path.glob("shard-*.npz"):
            file.unlink(missing_ok=True)

    def __enter__(self) -> CalibrationWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Take everything away again unless :meth:`finish` was reached."""
        if self._open:
            self.abort()

    def __len__(self) -> int:
        """Number of images appended so far."""
        return self._content.images

    def append(self, batch: Mapping[str, Array]) -> None:
        """Add images (input name -> array, first axis = images).

        Raises:
            CalibrationError: Not finite, not numbers, other inputs or shapes than before.
        """
        if not self._open:
            raise CalibrationError(
                "the set is finished; it does not change any more", where=str(self.path), remedy="write a new set"
            )
        arrays = self._content.check(batch, str(self.path))
        self._content.add(arrays)
        images = len(next(iter(arrays.values())))
        each = sum(array.nbytes for array in arrays.values()) // images
        per_shard = max(1, self._limit // max(1, each))
        at = 0
        while at < images:
            taken = min(images - at, per_shard - self._held_images)
            # copies: the caller may reuse its buffer
            self._held.append({name: array[at : at + taken].copy() for name, array in arrays.items()})
            self._held_images += taken
            at += taken
            if self._held_images == per_shard:
                self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        arrays = join(self._held)
        path = self.path / f"shard-{len(self._shards):05d}.npz"
        hashing = _HashingFile()
        with atomic_writer(path) as file:
            hashing.file = file
            _write_npz(hashing, arrays)
        self._shards.append(ShardRecord(file=path.name, images=self._held_images, sha256=hashing.hash.hexdigest()))
        self._held, self._held_images = [], 0

    def finish(self, **fields: Any) -> CalibrationSet:
        """Write the last shard and the manifest.

        Args:
            fields: Manifest fields that are known only now, ``seconds=...``, ``peak_rss_bytes=...``, ``notes=[...]``.

        Raises:
            CalibrationError: No image was appended.
        """
        if self._content.images == 0:
            raise CalibrationError(
                "the calibration set would be empty",
                where=str(self.path),
                remedy="ask for one image or more (--images)",
            )
        self._flush()
        manifest = self._content.complete(self._manifest, self._shards)
        if fields:
            manifest = CalibrationManifest.model_validate({**manifest.model_dump(), **fields})
        try:
            written = manifest.model_dump(mode="json")
            written["manifest_sha256"] = sealed(json.loads(json.dumps(written, allow_nan=False)))
            write_json(self.path / MANIFEST, written)
        except (TypeError, ValueError) as error:
            raise CalibrationError(
                f"the manifest holds something that JSON cannot say ({error})",
                where=str(self.path / MANIFEST),
                remedy="give the method's parameters as plain numbers, strings, lists and mappings",
            ) from error
        (self.path / MARKER).unlink(missing_ok=True)
        self._open = False
        return CalibrationSet(Disk(self.path, manifest), manifest, 0, manifest.images, part=False)

    def abort(self) -> None:
        """Take away what was written."""
        self._held, self._held_images, self._open = [], 0, False
        self._remove_shards()
        (self.path / MARKER).unlink(missing_ok=True)
        if self._made_folder and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()


class _HashingFile(io.RawIOBase):
    """Passes bytes on to a file and hashes them; it cannot seek, so the zip writer never goes back."""

    def __init__(self) -> None:
        super().__init__()
        self.file: Any = None
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.file.write(data)
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()


def _write_npz(file: Any, arrays: Mapping[str, Array]) -> None:
    """An uncompressed .npz with fixed time stamps: the same arrays give the same bytes, and any input name is allowed."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(name + ".npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
