"""Labelled images to evaluate on. They never reach synthesis, calibration or anything else that shapes an engine.

Two forms are read:

* an ``.npz`` file with ``x``, uint8 images [N, H, W, C] (gray also [N, H, W]), and ``y``, N integer labels;
* a folder of image files: with a ``labels.csv`` (columns ``file`` and ``label``; files are looked up in the folder and in its
  ``images/`` sub-folder), or with one sub-folder a class. Sub-folders whose names are all integers are those classes; other
  names are numbered in sorted order.

Images are given out as uint8 [N, H, W, C], RGB or gray as the network wants them, in exactly the network's size. Nothing is
cropped, and nothing is resized unless asked for: what an image is scaled with changes accuracy.
"""

from __future__ import annotations

import csv
import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from zsq_deploy.artifact import digest_file, digest_json
from zsq_deploy.errors import DataError
from zsq_deploy.model.graph import TensorSpec

__all__ = ["EvalData", "load_eval_data", "load_images"]

Array = npt.NDArray[Any]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_FORMS = (
    "give an .npz file with x (uint8, N x H x W x C) and y (N integer labels), a folder with labels.csv (columns file,label), "
    "or a folder with one sub-folder a class"
)


@dataclass(frozen=True)
class _Wanted:
    """What the network takes."""

    height: int | None
    width: int | None
    channels: int | None
    resize: bool


class _Images(Protocol):
    def __len__(self) -> int: ...
    def read(self, index: int) -> Array: ...
    def digest(self, index: int) -> str: ...


class EvalData:
    """Labelled images, read as they are needed.

    Use :func:`load_eval_data`.

    Attributes:
        source: The file or folder, as the user said it.
        labels: int64 [N].
        class_names: Names of the classes where sub-folders gave them, else empty.
    """

    def __init__(
        self, images: _Images, labels: Array, source: str, indices: Array, class_names: tuple[str, ...] = ()
    ) -> None:
        self._images = images
        self._all_labels = labels
        self._indices = indices
        self.source = source
        self.labels: Array = labels[indices]
        self.class_names = class_names

    def __len__(self) -> int:
        """Number of images."""
        return len(self._indices)

    def __repr__(self) -> str:
        """Short form for messages."""
        return f"<EvalData of {len(self)} images from {self.source}>"

    def images(self, start: int, stop: int) -> Array:
        """The images ``start .. stop - 1``, uint8 [stop - start, H, W, C].

        Raises:
            DataError: A file cannot be decoded; it is named.
        """
        return np.stack([self._images.read(int(index)) for index in self._indices[start:stop]])

    def batches(self, batch: int) -> Iterator[tuple[Array, Array]]:
        """Images (uint8 [B, H, W, C]) and labels (int64 [B]) in order; the last batch may be smaller."""
        for start in range(0, len(self), batch):
            stop = min(start + batch, len(self))
            yield self.images(start, stop), self.labels[start:stop]

    def take(self, indices: Sequence[int] | Array) -> EvalData:
        """Some of the images, by position."""
        chosen = self._indices[np.asarray(indices, dtype=np.int64)]
        if len(chosen) == 0:
            raise DataError("no image was chosen", where=self.source, remedy="choose at least one")
        return EvalData(self._images, self._all_labels, self.source, chosen, self.class_names)

    def limit(self, count: int | None) -> EvalData:
        """At most `count` images, spread evenly over the whole (folders are sorted by class: the first ones would be one class).

        ``None`` means all.
        """
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise DataError(f"a limit of {count} images leaves none", where="--limit", remedy="give 1 or more")
        return self.take(np.arange(count) * len(self) // count)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the images (their files, where they are files) and labels in order."""
        running = hashlib.sha256()
        for index in self._indices:
            running.update(self._images.digest(int(index)).encode())
        return digest_json({"images": running.hexdigest(), "labels": self.labels.tolist()})


def load_eval_data(
    path: Path | str,
    spec: TensorSpec | None = None,
    *,
    classes: int | None = None,
    resize: bool = False,
    limit: int | None = None,
) -> EvalData:
    """Open labelled images.

    Labels and the sizes of all images are checked at once; pixels are decoded later, batch by batch.

    Args:
        path: The ``.npz`` file or the folder.
        spec: The network's input [N, C, H, W]: images must have this size and get this number of channels. ``None``: no check.
        classes: Number of classes; labels must lie in 0 .. classes - 1. ``None``: not known.
        resize: Scale images of another size (bilinear with antialiasing, aspect ratio not kept) instead of refusing them.
        limit: Use at most this many images, spread evenly.

    Raises:
        DataError: Missing, empty, no labels, labels that do not fit, wrong type or size, unreadable image.
    """
    folder = Path(path)
    wanted = _wanted(spec, resize)
    if not folder.exists():
        raise DataError("the evaluation data do not exist", where=str(path), remedy="check the path; " + _FORMS)
    names: tuple[str, ...] = ()
    images: _Images
    if folder.is_dir():
        files, labels, names = _read_folder(folder, classes)
        images = _Files(files, wanted)
        where: Sequence[str] = [str(file.relative_to(folder)) for file in files]
        _check_labels(labels, where, classes, str(path))
        images.check()
    else:
        pixels, labels = _read_npz(folder)
        _check_labels(labels, [f"y[{index}]" for index in range(len(labels))], classes, str(path))
        images = _Pixels(pixels, wanted, str(path))
        images.check()
    return EvalData(images, labels, str(path), np.arange(len(labels)), names).limit(limit)


def load_images(
    path: Path | str, spec: TensorSpec | None = None, *, resize: bool = False, limit: int | None = None
) -> EvalData:
    """Open images whose labels nobody asks for: an ``.npz`` file with ``x``, or all image files in a folder and below it.

    Args:
        path: The file or the folder.
        spec: The network's input, as for :func:`load_eval_data`.
        resize: Scale images of another size instead of refusing them.
        limit: Use at most this many images, spread evenly.

    Returns:
        The images; their labels are all -1.

    Raises:
        DataError: Missing, empty, wrong type or size, unreadable image.
    """
    place = Path(path)
    wanted = _wanted(spec, resize)
    if not place.exists():
        raise DataError("the images do not exist", where=str(path), remedy="check the path")
    images: _Pixels | _Files
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if _is_image(file))
        if not files:
            raise DataError(
                "there are no images in the folder", where=str(path), remedy="give a folder with image files"
            )
        if limit is not None and 0 < limit < len(files):  # the others need not even be opened
            files = [files[index * len(files) // limit] for index in range(limit)]
        images = _Files(files, wanted)
    else:
        images = _Pixels(_read_npz(place, labelled=False)[0], wanted, str(path))
    images.check()
    return EvalData(images, np.full(len(images), -1, np.int64), str(path), np.arange(len(images))).limit(limit)


def _wanted(spec: TensorSpec | None, resize: bool) -> _Wanted:
    if spec is None:
        return _Wanted(None, None, None, resize)
    if len(spec.shape) != 4 or spec.shape[1] not in (1, 3, None):
        raise DataError(
            f"labelled images can only be fed to a network whose input is N x 1 x H x W or N x 3 x H x W, not {spec.shape}",
            where=spec.name,
            remedy="leave --eval-data out: the report then gives the agreement with the float network instead",
        )
    channels, height, width = spec.shape[1:]
    return _Wanted(height, width, channels, resize)


def _check_labels(labels: Array, where: Sequence[str], classes: int | None, source: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes if classes is not None else False))
    if len(wrong) == 0:
        return
    examples = ", ".join(f"{where[index]}: {int(labels[index])}" for index in wrong[:3])
    allowed = f"0..{classes - 1}" if classes is not None else "0, 1, 2, ..."
    remedy = "number the classes from 0, in the order of the network's outputs"
    if classes is not None and labels.min() >= 1 and labels.max() == classes:
        remedy = "the labels seem to count from 1: subtract 1 from each"
    raise DataError(
        f"{len(wrong)} of {len(labels)} labels lie outside {allowed}, which the network can answer ({examples})",
        where=source,
        remedy=remedy,
    )


# ---------------------------------------------------------------------------------------------------------------------
# .npz
# ---------------------------------------------------------------------------------------------------------------------


def _read_npz(path: Path, *, labelled: bool = True) -> tuple[Array, Array]:
    if path.suffix.lower() != ".npz":
        raise DataError(
            f"this is no form of evaluation data: {path.suffix or 'a file'}", where=str(path), remedy=_FORMS
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = list(file.files)
            pixels = file["x"] if "x" in keys else None
            labels = file["y"] if "y" in keys else None
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise DataError(
            f"the file cannot be read as .npz ({error})",
            where=str(path),
            remedy="write it with numpy.savez(file, x=images, y=labels), numbers only",
        ) from error
    if pixels is None:
        raise DataError(f"the file has no images: x is missing (found: {keys})", where=str(path), remedy=_FORMS)
    if not labelled:
        labels = np.full(len(pixels), -1, np.int64)
    if labels is None:
        raise DataError(f"the file has no labels: y is missing (found: {keys})", where=str(path), remedy=_FORMS)
    if pixels.dtype != np.uint8:
        raise DataError(
            f"x is {pixels.dtype}; evaluation images are uint8, 0..255, before any normalization",
            where=f"{path}: x",
            remedy="store the pixels as they come from the image files; --mean, --std and --raw-pixels do the rest",
        )
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        hint = ""
        if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
            hint = "; this looks like N x C x H x W: store x.transpose(0, 2, 3, 1)"
        raise DataError(
            f"x has the shape {pixels.shape}, not N x H x W x 3, N x H x W x 1 or N x H x W",
            where=f"{path}: x",
            remedy="store the channels last" + hint,
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"y is {labels.dtype} of shape {labels.shape}, not one integer label an image",
            where=f"{path}: y",
            remedy="store class numbers: for one-hot or score rows y.argmax(1), for other types y.astype('int64')",
        )
    if len(pixels) == 0:
        raise DataError("there are no images in it", where=str(path), remedy=_FORMS)
    if len(pixels) != len(labels):
        raise DataError(
            f"x holds {len(pixels)} images and y {len(labels)} labels",
            where=str(path),
            remedy="store exactly one label an image",
        )
    return pixels, labels.astype(np.int64)


class _Pixels:
    """Images of an array."""

    def __init__(self, pixels: Array, wanted: _Wanted, source: str) -> None:
        self._pixels = pixels
        self._wanted = wanted
        self._source = source

    def __len__(self) -> int:
        return len(self._pixels)

    def check(self) -> None:
        height, width, channels = self._pixels.shape[1:]
        _check_size((height, width), self._wanted, f"{self._source}: x")
        if self._wanted.channels not in (None, channels):
            raise DataError(
                f"the images have {channels} channel(s), the network takes {self._wanted.channels}",
                where=f"{self._source}: x",
                remedy="store colour images for a colour network: numpy.repeat(x, 3, axis=-1) makes gray ones fit"
                if channels == 1
                else "store gray images: N x H x W",
            )

    def read(self, index: int) -> Array:
        image: Array = self._pixels[index]
        size = _target(image.shape[:2], self._wanted)
        if size == image.shape[:2]:
            return image
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        return _as_array(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))

    def digest(self, index: int) -> str:
        return hashlib.sha256(np.ascontiguousarray(self._pixels[index]).data.cast("B")).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# folders
# ---------------------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, classes: int | None) -> tuple[list[Path], Array, tuple[str, ...]]:
    if (folder / "labels.csv").is_file():
        files, labels = _read_csv(folder)
        return files, labels, ()
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    per_class = {name: sorted(file for file in (folder / name).rglob("*") if _is_image(file)) for name in names}
    loose = [file for file in folder.iterdir() if _is_image(file)]
    if not any(per_class.values()):
        if loose:
            raise DataError(f"the folder holds {len(loose)} images without labels", where=str(folder), remedy=_FORMS)
        raise DataError("there are no images in the folder", where=str(folder), remedy=_FORMS)
    if names == ["images"]:
        raise DataError("the images have no labels: labels.csv is missing", where=str(folder), remedy=_FORMS)
    if loose:
        raise DataError(
            f"{len(loose)} images lie beside the class folders ({loose[0].name}): their class is not known",
            where=str(folder),
            remedy="move each image into the folder of its class",
        )
    if all(name.isdecimal() for name in names):
        numbers = {name: int(name) for name in names}
        class_names: tuple[str, ...] = ()
    else:
        if classes is not None and len(names) != classes:
            raise DataError(
                f"the folder has {len(names)} class folders, the network {classes} classes: sorting the names does not say "
                "which class is which",
                where=str(folder),
                remedy="name the folders by class number (0, 1, ...), or write labels.csv",
            )
        numbers = {name: index for index, name in enumerate(names)}
        class_names = tuple(names)
    files = [file for name in names for file in per_class[name]]
    labels = np.array([numbers[name] for name in names for _ in per_class[name]], np.int64)
    return files, labels, class_names


def _read_csv(folder: Path) -> tuple[list[Path], Array]:
    table = folder / "labels.csv"
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = [column.strip().lower() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"the table cannot be read ({error})", where=str(table), remedy="write comma-separated UTF-8 text"
        ) from error
    missing = [column for column in ("file", "label") if column not in columns]
    if missing:
        raise DataError(
            f"the table has no column {' and no column '.join(missing)} (found: {', '.join(columns) or 'nothing'})",
            where=str(table),
            remedy="the first line names the columns: file,label",
        )
    if not rows:
        raise DataError("the table names no image", where=str(table), remedy="write one line an image: file,label")
    files: list[Path] = []
    labels = np.empty(len(rows), np.int64)
    for number, row in enumerate(rows):
        line = number + 2
        name, label = (row.get("file") or "").strip(), (row.get("label") or "").strip()
        candidates = [folder / name, folder / "images" / name]
        found = next((candidate for candidate in candidates if candidate.is_file()), None) if name else None
        if found is None:
            raise DataError(
                f"the image {name!r} of line {line} does not exist",
                where=str(table),
                remedy="give paths relative to the folder or to its images/ sub-folder",
            )
        try:
            labels[number] = int(label)
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"the label {label!r} of line {line} ({name}) is no integer",
                where=str(table),
                remedy="give class numbers from 0, in the order of the network's outputs",
            ) from error
        files.append(found)
    return files, labels


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


class _Files:
    """Images in files; opened to look at their size first, decoded when they are read."""

    def __init__(self, files: list[Path], wanted: _Wanted) -> None:
        self._files = files
        self._wanted = wanted

    def __len__(self) -> int:
        return len(self._files)

    def check(self) -> None:
        first: tuple[int, int] | None = None
        for file in self._files:
            with _opened(file) as image:
                size = (image.height, image.width)
            _check_size(size, self._wanted, str(file))
            first = first or size
            if self._wanted.height is None and size != first:
                raise DataError(
                    f"images have different sizes: {first[1]}x{first[0]} and {size[1]}x{size[0]}",
                    where=str(file),
                    remedy="scale all images to one size",
                )

    def read(self, index: int) -> Array:
        file = self._files[index]
        with _opened(file) as image:
            try:
                picture = image.convert("L" if self._wanted.channels == 1 else "RGB")
            except Exception as error:  # decoders raise all sorts of things for damaged files
                raise _damaged(file, error) from error
        size = _target((picture.height, picture.width), self._wanted)
        if size != (picture.height, picture.width):
            picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return _as_array(picture)

    def digest(self, index: int) -> str:
        return digest_file(self._files[index])


def _opened(file: Path) -> Image.Image:
    try:
        image = Image.open(file)
    except Exception as error:  # decoders raise all sorts of things for damaged files
        raise _damaged(file, error) from error
    if image.mode.startswith(("I", "F")):
        image.close()
        raise DataError(
            f"the image has more than 8 bits a channel (mode {image.mode})",
            where=str(file),
            remedy="convert it to an 8-bit image",
        )
    return image


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"the image cannot be decoded ({str(error) or type(error).__name__})",
        where=str(file),
        remedy="replace the file, or take its line out of labels.csv",
    )


def _as_array(picture: Image.Image) -> Array:
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def _check_size(size: tuple[int, int], wanted: _Wanted, where: str) -> None:
    if wanted.resize or _target(size, wanted) == size:
        return
    raise DataError(
        f"the image is {size[1]}x{size[0]} (width x height), the network takes "
        f"{wanted.width if wanted.width is not None else 'any'}x{wanted.height if wanted.height is not None else 'any'}",
        where=where,
        remedy="prepare the images as the network was trained (resize and crop), give --input-shape for another size, "
        "or say --resize to scale them here",
    )


def _target(size: tuple[int, int], wanted: _Wanted) -> tuple[int, int]:
    return (
        wanted.height if wanted.height is not None else size[0],
        wanted.width if wanted.width is not None else size[1],
    )
