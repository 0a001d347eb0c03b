"""Calibration sets: network inputs in network input space, in memory or on disk, with a manifest that says where they come from.

On disk a set is a folder::

    manifest.json         what it is, written last: a folder without it is an unfinished set
    shard-00000.npz       arrays keyed by input name, first axis = images, about 64 MiB each
    shard-00001.npz
    ...

Every shard carries its SHA-256 in the manifest and the manifest carries its own, so a changed byte anywhere is noticed when
the set is opened. The :attr:`CalibrationSet.digest` is something else: it is taken over the *content* (names, types, shapes and
values in order), so the same images have the same digest in memory, in one shard or in a hundred, today and tomorrow.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from zsq_deploy.artifact import digest_file
from zsq_deploy.calib.contents import Array, Content, join
from zsq_deploy.calib.manifest import (
    MANIFEST,
    MARKER,
    REMAKE,
    CalibrationManifest,
    ModelLike,
    preprocess_fields,
    read_manifest,
)
from zsq_deploy.errors import CalibrationError, OutputExistsError, StaleArtifactError

__all__ = ["SHARD_BYTES", "CalibrationSet", "Disk"]

SHARD_BYTES = 64 * 2**20
"""Size at which a shard on disk is closed."""


class _Source(Protocol):
    """Where arrays come from: `read` returns the images of one piece, `pieces` how many images each holds."""

    pieces: list[int]

    def read(self, index: int) -> dict[str, Array]: ...


class _Memory:
    def __init__(self, arrays: dict[str, Array]) -> None:
        self._arrays = arrays
        self.pieces = [len(next(iter(arrays.values())))]

    def read(self, index: int) -> dict[str, Array]:
        assert index == 0
        return self._arrays


class Disk:
    """Shards on disk; the last one read is kept, because a set is read front to back."""

    def __init__(self, folder: Path, manifest: CalibrationManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.pieces = [shard.images for shard in manifest.shards]
        self._cached: tuple[int, dict[str, Array]] | None = None

    def read(self, index: int) -> dict[str, Array]:
        """The images of one shard."""
        if self._cached is not None and self._cached[0] == index:
            return self._cached[1]
        self._cached = None  # free the old shard before the next one is read
        arrays = _read_shard(self.folder / self.manifest.shards[index].file, self.manifest, self.pieces[index])
        self._cached = (index, arrays)
        return arrays


def _read_shard(path: Path, manifest: CalibrationManifest, images: int) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if names != set(manifest.inputs):
                raise StaleArtifactError(
                    f"the shard holds {sorted(names)}, the manifest says {sorted(manifest.inputs)}",
                    where=str(path),
                    remedy=REMAKE,
                )
            for name in manifest.inputs:
                array = file[name]
                array.flags.writeable = False
                arrays[name] = array
    except FileNotFoundError as error:
        raise CalibrationError("a part of the calibration set is missing", where=str(path), remedy=REMAKE) from error
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise CalibrationError(
            f"a part of the calibration set cannot be read ({error})", where=str(path), remedy=REMAKE
        ) from error
    for name, array in arrays.items():
        if array.shape != (images, *manifest.inputs[name]) or array.dtype.name != manifest.dtypes[name]:
            raise StaleArtifactError(
                f"input {name!r} is {array.dtype} {array.shape}, the manifest says "
                f"{manifest.dtypes[name]} {(images, *manifest.inputs[name])}",
                where=str(path),
                remedy=REMAKE,
            )
    return arrays


class CalibrationSet:
    """Images (or other inputs) that a network's ranges are measured on.

    Values are in *network input space*: already normalized, NCHW, as the network's own inputs. Sets never change once made.
    Use :meth:`from_arrays`, :meth:`open` or :class:`~zsq_deploy.calib.writer.CalibrationWriter`.

    Attributes:
        manifest: What the set is and how it was made. Of a part (:meth:`take`) it is the manifest of the whole with the
            number of images of the part; its digest and statistics are the part's own.
    """

    def __init__(self, source: _Source, manifest: CalibrationManifest, start: int, stop: int, *, part: bool) -> None:
        self._source = source
        self._manifest = manifest
        self._start = start
        self._stop = stop
        self._part = part

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], manifest: CalibrationManifest) -> CalibrationSet:
        """A set in memory.

        Args:
            arrays: Input name -> array whose first axis counts the images.
            manifest: What is known about it; counts, statistics and digest are filled in.

        Raises:
            CalibrationError: Empty, not finite, not numbers, or different numbers of images.
        """
        content = Content()
        checked = {name: array.copy() for name, array in content.check(arrays, "CalibrationSet.from_arrays").items()}
        content.add(checked)
        for array in checked.values():
            array.flags.writeable = False
        return cls(_Memory(checked), content.complete(manifest, []), 0, content.images, part=False)

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> CalibrationSet:
        """Open a set on disk; images are read as they are needed.

        Args:
            path: The folder with ``manifest.json``.
            verify: Compare every shard with its SHA-256 (reads all files once, in pieces).

        Raises:
            CalibrationError: No set, an unfinished one, a missing file, or a manifest of another format.
            StaleArtifactError: A file was changed after the set was made.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CalibrationError(
                "there is no calibration set here" + (" (this is a file)" if folder.exists() else ""),
                where=str(folder),
                remedy="give the folder that `zsq synth` wrote; a set is a folder with manifest.json",
            )
        if not (folder / MANIFEST).exists():
            if (folder / MARKER).exists():
                raise CalibrationError(
                    "this calibration set is unfinished: the run that made it was interrupted, or is still running",
                    where=str(folder),
                    remedy="go on with `zsq synth ... --resume`, or make it again with --force",
                )
            raise CalibrationError(
                "this folder is not a calibration set: it has no manifest.json",
                where=str(folder),
                remedy="give the folder that `zsq synth` wrote (in the output of `zsq deploy`: calibration/)",
            )
        manifest = read_manifest(folder / MANIFEST)
        if verify:
            for shard in manifest.shards:
                file = folder / shard.file
                if not file.exists():
                    raise CalibrationError("a part of the calibration set is missing", where=str(file), remedy=REMAKE)
                if digest_file(file) != shard.sha256:
                    raise StaleArtifactError(
                        "this part of the calibration set was changed after it was made (its SHA-256 does not fit)",
                        where=str(file),
                        remedy=REMAKE,
                    )
        return cls(Disk(folder, manifest), manifest, 0, manifest.images, part=False)

    @property
    def manifest(self) -> CalibrationManifest:
        """What the set is and how it was made."""
        if self._part:
            self._measure()
        return self._manifest

    def _measure(self) -> None:
        """Digest and statistics of a part, by reading it once."""
        content = Content()
        for batch in self.batches(64):
            content.add(content.check(batch, "CalibrationSet.take"))
        self._manifest = content.complete(self._manifest, [])
        self._part = False

    @property
    def digest(self) -> str:
        """SHA-256 over the content: the same images have the same digest, however they are stored."""
        return self.manifest.digest

    @property
    def folder(self) -> Path | None:
        """The folder of a set on disk, ``None`` in memory."""
        return self._source.folder if isinstance(self._source, Disk) else None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the network inputs."""
        return tuple(self._manifest.inputs)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one sample per input, without the batch axis."""
        return {name: tuple(shape) for name, shape in self._manifest.inputs.items()}

    def __len__(self) -> int:
        """Number of images."""
        return self._stop - self._start

    def __repr__(self) -> str:
        """Short form for error messages."""
        where = f" in {self.folder}" if self.folder else ""
        return f"<CalibrationSet of {len(self)} {self._manifest.method} images {self.shapes}{where}>"

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        """The images in order, `batch_size` at a time (the last batch may be smaller).

        At most one shard and one batch are in memory. The arrays may be read-only views.
        """
        if batch_size < 1:
            raise CalibrationError(
                f"a batch of {batch_size} images makes no sense", where="batch_size", remedy="give 1 or more"
            )
        held: list[dict[str, Array]] = []
        count = 0
        for piece in self._pieces():
            images = len(next(iter(piece.values())))
            at = 0
            while at < images:
                taken = min(images - at, batch_size - count)
                held.append({name: array[at : at + taken] for name, array in piece.items()})
                at += taken
                count += taken
                if count == batch_size:
                    yield join(held)
                    held, count = [], 0
        if held:
            yield join(held)

    def _pieces(self) -> Iterator[dict[str, Array]]:
        begin = 0
        for index, images in enumerate(self._source.pieces):
            low, high = max(self._start, begin), min(self._stop, begin + images)
            if low < high:
                arrays = self._source.read(index)
                yield {name: array[low - begin : high - begin] for name, array in arrays.items()}
            begin += images

    def arrays(self) -> dict[str, Array]:
        """All images in memory, keyed by input name. For large sets use :meth:`batches`."""
        return join(list(self._pieces()))

    def take(self, start: int, stop: int | None = None) -> CalibrationSet:
        """The images ``start:stop`` as a set of their own, without copying; indices as in Python slices."""
        low, high, _ = slice(start, stop).indices(len(self))
        if low >= high:
            raise CalibrationError(
                f"the part {start}:{stop} of a set of {len(self)} images is empty",
                where="CalibrationSet.take",
                remedy="ask for a part that holds at least one image",
            )
        manifest = self._manifest.model_copy(
            update={"images": high - low, "shards": [], "digest": "", "statistics": {}}
        )
        return CalibrationSet(self._source, manifest, self._start + low, self._start + high, part=True)

    def save(self, path: Path | str, *, force: bool = False, shard_bytes: int = SHARD_BYTES) -> CalibrationSet:
        """Write the set to a folder and return the set that reads from there.

        Raises:
            OutputExistsError: A set is there already, and `force` was not given.
        """
        if self.folder is not None and Path(path).resolve() == self.folder.resolve():
            raise OutputExistsError(
                "a set cannot be saved over itself", where=str(path), remedy="choose another folder"
            )
        from zsq_deploy.calib.writer import CalibrationWriter

        with CalibrationWriter(path, self._manifest, force=force, shard_bytes=shard_bytes) as writer:
            for batch in self.batches(64):
                writer.append(batch)
            return writer.finish()

    def check_fits(self, model: ModelLike, *, same_network: bool = True) -> None:
        """Make sure that the set can be fed to `model`.

        Args:
            model: The network.
            same_network: Also insist that the set was made for this very network (a synthesized set belongs to one network;
                a set without a model digest belongs to none and passes).

        Raises:
            StaleArtifactError: Made for another network, or for other preprocessing.
            CalibrationError: Names, shapes or types of the inputs differ.
        """
        where = str(self.folder) if self.folder else f"calibration set ({self._manifest.method})"
        wanted = {spec.name: spec for spec in model.inputs}
        missing = [name for name in wanted if name not in self.input_names]
        unknown = [name for name in self.input_names if name not in wanted]
        if missing or unknown:
            raise CalibrationError(
                f"the set has the inputs {list(self.input_names)}, the network has {list(wanted)}",
                where=where,
                remedy=f"make a set for this network with `zsq synth`; missing: {missing}, unknown: {unknown}",
            )
        for name, spec in wanted.items():
            have = self.shapes[name]
            if len(have) != len(spec.shape) - 1 or any(
                b is not None and a != b for a, b in zip(have, spec.shape[1:], strict=True)
            ):
                raise CalibrationError(
                    f"one sample of input {name!r} has the shape {have} in the set and {spec.shape[1:]} in the network",
                    where=where,
                    remedy="make the set with the network's own --input-shape",
                )
            if np.dtype(self._manifest.dtypes[name]) != spec.dtype:
                raise CalibrationError(
                    f"input {name!r} is {self._manifest.dtypes[name]} in the set and {spec.dtype} in the network",
                    where=where,
                    remedy="make a set for this network with `zsq synth`",
                )
        if not same_network:
            return
        if self._manifest.model_digest and self._manifest.model_digest not in (
            model.digest,
            getattr(model, "origin", ""),
        ):
            raise StaleArtifactError(
                f"the set was made for another network: {self._manifest.model_name!r} "
                f"({self._manifest.model_digest[:12]}), not {model.name!r} ({model.digest[:12]})",
                where=where,
                remedy="make a set for this network with `zsq synth`, or give the network that the set was made for",
            )
        ours, theirs = self._manifest.preprocess, preprocess_fields(model.preprocess)
        if ours and theirs and ours != theirs:
            raise StaleArtifactError(
                f"the set was made for inputs with {ours}, the network is used with {theirs}",
                where=where,
                remedy="give the same --mean, --std and --raw-pixels as when the set was made, or make it again",
            )
