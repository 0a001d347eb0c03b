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

import hashlib
import io
import json
import os
import platform
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pydantic

from zsq_deploy.artifact import atomic_writer, digest_file, digest_json, read_json, write_json
from zsq_deploy.errors import CalibrationError, OutputExistsError, StaleArtifactError, ZsqError
from zsq_deploy.model.graph import TensorSpec

__all__ = [
    "MANIFEST",
    "CalibrationManifest",
    "CalibrationSet",
    "CalibrationWriter",
    "InputStatistics",
    "ShardRecord",
    "library_versions",
]

Array = npt.NDArray[Any]

MANIFEST = "manifest.json"
_MARKER = "unfinished.json"
_SHARD_BYTES = 64 * 2**20
_REMAKE = "make the set again with `zsq synth`"


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class InputStatistics(_Strict):
    """Mean, standard deviation, smallest and largest value per channel (axis 1 of inputs with spatial axes, else one channel)."""

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]


class ShardRecord(_Strict):
    """One file of a set on disk: its name, how many images it holds, and its SHA-256."""

    file: str
    images: int = pydantic.Field(gt=0)
    sha256: str = pydantic.Field(pattern=r"^[0-9a-f]{64}$")

    @pydantic.field_validator("file")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value != Path(value).name or value in ("", ".", ".."):
            raise ValueError("a shard is a plain file name inside the set's folder")
        return value


class CalibrationManifest(_Strict):
    """What a calibration set is and how it was made.

    The fields from `images` to `digest` are filled in by :class:`CalibrationWriter` and :meth:`CalibrationSet.from_arrays`;
    whoever makes a set gives the ones above (see :meth:`of`).

    Attributes:
        schema_version: Version of this format.
        model_digest: Digest of the network's graph; empty for a set that belongs to no network in particular.
        model_name: The network's short name.
        method: How the images were made, ``zeroq``, ``fractal``, ``real``.
        parameters: Every parameter of the method with its resolved value.
        seed: Seed of everything random.
        preprocess: How pixels become network inputs (``mean``, ``std``, ``raw_pixels``), as far as it was known.
        device: Where it was computed, ``cpu`` or ``cuda``.
        seconds: Wall time of making it.
        peak_rss_bytes: Largest resident memory of the process while making it.
        versions: Versions of what computed it.
        notes: What a user should know (fall-backs, warnings), one sentence each.
        images: Number of images.
        inputs: Shape of one sample per input name, without the batch axis.
        dtypes: numpy type name per input name.
        statistics: Image statistics per input name.
        digest: SHA-256 over the content.
        shards: The files; empty in memory.
    """

    schema_version: Literal[1] = 1
    model_digest: str = ""
    model_name: str = ""
    method: str
    parameters: dict[str, Any] = pydantic.Field(default_factory=dict)
    seed: int = 0
    preprocess: dict[str, Any] = pydantic.Field(default_factory=dict)
    device: str = "cpu"
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    versions: dict[str, str] = pydantic.Field(default_factory=lambda: library_versions())
    notes: list[str] = pydantic.Field(default_factory=list)
    images: int = 0
    inputs: dict[str, list[int]] = pydantic.Field(default_factory=dict)
    dtypes: dict[str, str] = pydantic.Field(default_factory=dict)
    statistics: dict[str, InputStatistics] = pydantic.Field(default_factory=dict)
    digest: str = ""
    shards: list[ShardRecord] = pydantic.Field(default_factory=list)

    @classmethod
    def of(cls, model: _ModelLike, *, method: str, **fields: Any) -> CalibrationManifest:
        """The manifest of a set that is made for `model`, its digest, name and preprocessing filled in."""
        return cls(
            model_digest=model.digest,
            model_name=model.name,
            preprocess=_preprocess_fields(model.preprocess),
            method=method,
            **fields,
        )


class _ModelLike(Protocol):
    """What this module needs of a :class:`zsq_deploy.model.Model`."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def preprocess(self) -> Any: ...


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a set depends on."""
    found = {"python": platform.python_version()}
    for name in ("zsq-deploy", "numpy", "torch", "onnx"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _preprocess_fields(preprocess: Any) -> dict[str, Any]:
    """The preprocessing as JSON values; empty when nothing is known about it."""
    mean, std = getattr(preprocess, "mean", None), getattr(preprocess, "std", None)
    raw = bool(getattr(preprocess, "raw_pixels", False))
    if mean is None and std is None and not raw:
        return {}
    return {
        "mean": None if mean is None else [float(value) for value in mean],
        "std": None if std is None else [float(value) for value in std],
        "raw_pixels": raw,
    }


# ---------------------------------------------------------------------------------------------------------------------
# content: digest and statistics, image by image, so that they do not depend on how a set is cut into batches
# ---------------------------------------------------------------------------------------------------------------------


class _Content:
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


# ---------------------------------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------------------------------


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


class _Disk:
    """Shards on disk; the last one read is kept, because a set is read front to back."""

    def __init__(self, folder: Path, manifest: CalibrationManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.pieces = [shard.images for shard in manifest.shards]
        self._cached: tuple[int, dict[str, Array]] | None = None

    def read(self, index: int) -> dict[str, Array]:
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
                    remedy=_REMAKE,
                )
            for name in manifest.inputs:
                array = file[name]
                array.flags.writeable = False
                arrays[name] = array
    except FileNotFoundError as error:
        raise CalibrationError("a part of the calibration set is missing", where=str(path), remedy=_REMAKE) from error
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise CalibrationError(
            f"a part of the calibration set cannot be read ({error})", where=str(path), remedy=_REMAKE
        ) from error
    for name, array in arrays.items():
        if array.shape != (images, *manifest.inputs[name]) or array.dtype.name != manifest.dtypes[name]:
            raise StaleArtifactError(
                f"input {name!r} is {array.dtype} {array.shape}, the manifest says "
                f"{manifest.dtypes[name]} {(images, *manifest.inputs[name])}",
                where=str(path),
                remedy=_REMAKE,
            )
    return arrays


class CalibrationSet:
    """Images (or other inputs) that a network's ranges are measured on.

    Values are in *network input space*: already normalized, NCHW, as the network's own inputs. Sets never change once made.
    Use :meth:`from_arrays`, :meth:`open` or :class:`CalibrationWriter`.

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
        content = _Content()
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
            if (folder / _MARKER).exists():
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
        manifest = _read_manifest(folder / MANIFEST)
        if verify:
            for shard in manifest.shards:
                file = folder / shard.file
                if not file.exists():
                    raise CalibrationError("a part of the calibration set is missing", where=str(file), remedy=_REMAKE)
                if digest_file(file) != shard.sha256:
                    raise StaleArtifactError(
                        "this part of the calibration set was changed after it was made (its SHA-256 does not fit)",
                        where=str(file),
                        remedy=_REMAKE,
                    )
        return cls(_Disk(folder, manifest), manifest, 0, manifest.images, part=False)

    @property
    def manifest(self) -> CalibrationManifest:
        """What the set is and how it was made."""
        if self._part:
            self._measure()
        return self._manifest

    def _measure(self) -> None:
        """Digest and statistics of a part, by reading it once."""
        content = _Content()
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
        return self._source.folder if isinstance(self._source, _Disk) else None

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
                    yield _join(held)
                    held, count = [], 0
        if held:
            yield _join(held)

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
        return _join(list(self._pieces()))

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

    def save(self, path: Path | str, *, force: bool = False, shard_bytes: int = _SHARD_BYTES) -> CalibrationSet:
        """Write the set to a folder and return the set that reads from there.

        Raises:
            OutputExistsError: A set is there already, and `force` was not given.
        """
        if self.folder is not None and Path(path).resolve() == self.folder.resolve():
            raise OutputExistsError(
                "a set cannot be saved over itself", where=str(path), remedy="choose another folder"
            )
        with CalibrationWriter(path, self._manifest, force=force, shard_bytes=shard_bytes) as writer:
            for batch in self.batches(64):
                writer.append(batch)
            return writer.finish()

    def check_fits(self, model: _ModelLike, *, same_network: bool = True) -> None:
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
        if self._manifest.model_digest and self._manifest.model_digest != model.digest:
            raise StaleArtifactError(
                f"the set was made for another network: {self._manifest.model_name!r} "
                f"({self._manifest.model_digest[:12]}), not {model.name!r} ({model.digest[:12]})",
                where=where,
                remedy="make a set for this network with `zsq synth`, or give the network that the set was made for",
            )
        ours, theirs = self._manifest.preprocess, _preprocess_fields(model.preprocess)
        if ours and theirs and ours != theirs:
            raise StaleArtifactError(
                f"the set was made for inputs with {ours}, the network is used with {theirs}",
                where=where,
                remedy="give the same --mean, --std and --raw-pixels as when the set was made, or make it again",
            )


def _join(pieces: list[dict[str, Array]]) -> dict[str, Array]:
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _sealed(fields: Mapping[str, Any]) -> str:
    return digest_json({key: value for key, value in fields.items() if key != "manifest_sha256"})


def _read_manifest(path: Path) -> CalibrationManifest:
    try:
        found = read_json(path)
    except ZsqError as error:
        raise CalibrationError(error.what, where=error.where, remedy=_REMAKE) from error
    if not isinstance(found, dict):
        raise CalibrationError("the manifest is not a JSON object", where=str(path), remedy=_REMAKE)
    seal = found.pop("manifest_sha256", None)
    version = found.get("schema_version")
    if version != 1:
        raise CalibrationError(
            f"the manifest has the format version {version!r}; this program reads version 1",
            where=str(path),
            remedy="use the version of zsq-deploy that made the set, or make it again with `zsq synth`",
        )
    try:
        manifest = CalibrationManifest.model_validate(found)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CalibrationError(
            f"the manifest is not one of a calibration set: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(path),
            remedy=_REMAKE,
        ) from error
    if seal != _sealed(found):
        raise StaleArtifactError(
            "the manifest was changed after the set was made (its SHA-256 does not fit)",
            where=str(path),
            remedy=_REMAKE,
        )
    if not manifest.shards or sum(shard.images for shard in manifest.shards) != manifest.images:
        raise CalibrationError(
            f"the manifest speaks of {manifest.images} images, its shards of {sum(s.images for s in manifest.shards)}",
            where=str(path),
            remedy=_REMAKE,
        )
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# writing
# ---------------------------------------------------------------------------------------------------------------------


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
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self.path = Path(path)
        self._manifest = manifest
        self._limit = max(1, shard_bytes)
        self._content = _Content()
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
        if (self.path / _MARKER).exists() and not force:
            raise OutputExistsError(
                "the folder holds an unfinished calibration set, or another run is writing one",
                where=str(self.path),
                remedy="wait for the other run, go on with --resume, or start over with --force",
            )
        # the marker comes first and the old manifest goes before anything else: whatever happens from here on, the folder
        # never looks like a finished set
        write_json(self.path / _MARKER, {"method": self._manifest.method, "pid": os.getpid()})
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
        arrays = _join(self._held)
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
            written["manifest_sha256"] = _sealed(json.loads(json.dumps(written, allow_nan=False)))
            write_json(self.path / MANIFEST, written)
        except (TypeError, ValueError) as error:
            raise CalibrationError(
                f"the manifest holds something that JSON cannot say ({error})",
                where=str(self.path / MANIFEST),
                remedy="give the method's parameters as plain numbers, strings, lists and mappings",
            ) from error
        (self.path / _MARKER).unlink(missing_ok=True)
        self._open = False
        return CalibrationSet(_Disk(self.path, manifest), manifest, 0, manifest.images, part=False)

    def abort(self) -> None:
        """Take away what was written."""
        self._held, self._held_images, self._open = [], 0, False
        self._remove_shards()
        (self.path / _MARKER).unlink(missing_ok=True)
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
