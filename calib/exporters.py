"""A calibration set in other tools' formats.

========================= ================================================================ =====================================
format                    what is written                                                  who reads it
========================= ================================================================ =====================================
:class:`OrtReader`        nothing; an object                                               ``onnxruntime.quantization``
``test-data``             ``test_data_set_N/input_I.pb`` (onnx.TensorProto)                onnxruntime's static_quantize_runner,
                                                                                           onnx and onnxruntime test runners
``polygraphy``            one JSON file                                                    ``polygraphy --load-inputs``
``npy``                   ``.npy`` files and ``list.txt``                                  ncnn2table ``type=1``, benchmark_app
========================= ================================================================ =====================================

Files appear complete or not at all, and nothing is overwritten.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from zsq_deploy.artifact import atomic_writer, write_json
from zsq_deploy.calib.calibration_set import CalibrationSet
from zsq_deploy.errors import CalibrationError, OutputExistsError, UsageError

__all__ = ["EXPORTERS", "OrtReader", "export", "export_npy", "export_polygraphy", "export_test_data"]

Array = npt.NDArray[Any]


class OrtReader:
    """Feeds a set to ``onnxruntime.quantization`` (its ``CalibrationDataReader`` protocol), a batch at a time.

    onnxruntime recognizes a reader by its ``get_next``; nothing is imported from it here.

    Args:
        calibration: The set.
        batch_size: Images a batch. The last batch of a range may be smaller.
    """

    def __init__(self, calibration: CalibrationSet, *, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise CalibrationError(
                f"a batch of {batch_size} images makes no sense", where="batch_size", remedy="give 1 or more"
            )
        self._set = calibration
        self._batch = batch_size
        self._start, self._stop = 0, len(self)
        self._batches: Iterator[dict[str, Array]] | None = None

    def __len__(self) -> int:
        """Number of batches in the whole set."""
        return -(-len(self._set) // self._batch)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with the batches ``start_index .. end_index - 1``."""
        if not 0 <= start_index < end_index:
            raise CalibrationError(
                f"the range {start_index}..{end_index} of batches makes no sense",
                where="OrtReader.set_range",
                remedy=f"give a range within 0..{len(self)}",
            )
        self._start, self._stop = start_index, min(end_index, len(self))
        self._batches = None

    def rewind(self) -> None:
        """Start again at the first batch of the range."""
        self._batches = None

    def get_next(self) -> dict[str, Array] | None:
        """The next batch keyed by input name, ``None`` after the last one."""
        if self._batches is None:
            low, high = self._start * self._batch, min(self._stop * self._batch, len(self._set))
            self._batches = self._set.take(low, high).batches(self._batch) if low < high else iter(())
        return next(self._batches, None)

    def __iter__(self) -> OrtReader:
        return self

    def __next__(self) -> dict[str, Array]:
        """The next batch, for ``for`` loops."""
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch


def export_test_data(calibration: CalibrationSet, path: Path | str, *, batch_size: int = 1) -> Path:
    """Write ``test_data_set_N/input_I.pb``: batch N, I-th input, serialized ``onnx.TensorProto`` with the input's name.

    Args:
        calibration: The set.
        path: A folder, new or existing (onnxruntime's runner looks beside the model file).
        batch_size: Images a data set.

    Raises:
        OutputExistsError: The folder holds such data sets already.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("test_data_set_*")):
        raise OutputExistsError(
            "the folder holds test_data_set_* already",
            where=str(folder),
            remedy="choose another folder, or remove them first",
        )
    with _staged(folder) as staging:
        for number, batch in enumerate(calibration.batches(batch_size)):
            target = staging / f"test_data_set_{number}"
            target.mkdir()
            for index, (name, array) in enumerate(batch.items()):
                tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
                (target / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
    return folder


def export_npy(
    calibration: CalibrationSet, path: Path | str, *, batch_axis: bool = True, absolute: bool = False
) -> Path:
    """Write one ``.npy`` file an image and a ``list.txt`` that names them in order, one a line.

    A network with one input: ``00000.npy``, ... and ``list.txt``. With several: ``input_0/00000.npy``, ..., one
    ``list_0.txt`` an input, and ``inputs.json`` that says which input is which.

    Args:
        calibration: The set.
        path: A folder that is new or empty.
        batch_axis: Arrays have shape [1, ...]; ``False`` for readers that want none (ncnn).
        absolute: The list holds absolute paths instead of paths relative to its folder.

    Raises:
        OutputExistsError: The folder holds something.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError("the folder holds something already", where=str(folder), remedy="choose a new folder")
    names = calibration.input_names
    digits = max(5, len(str(len(calibration) - 1)))
    with _staged(folder) as staging:
        lists: list[list[str]] = [[] for _ in names]
        for number, batch in enumerate(calibration.batches(1)):
            for index, name in enumerate(names):
                relative = Path(f"input_{index}" if len(names) > 1 else "") / f"{number:0{digits}d}.npy"
                (staging / relative).parent.mkdir(exist_ok=True)
                np.save(staging / relative, batch[name] if batch_axis else batch[name][0], allow_pickle=False)
                lists[index].append(str(folder.resolve() / relative if absolute else relative))
        for index, lines in enumerate(lists):
            file = staging / (f"list_{index}.txt" if len(names) > 1 else "list.txt")
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if len(names) > 1:
            write_json(staging / "inputs.json", {f"list_{index}.txt": name for index, name in enumerate(names)})
    return folder


def export_polygraphy(calibration: CalibrationSet, path: Path | str, *, batch_size: int = 1) -> Path:
    """Write the JSON file that ``polygraphy run --load-inputs`` and its calibrator read.

    The file is a list with one object a batch, input name -> ``{"array": BASE64, "polygraphy_class": "ndarray"}``, where BASE64
    is the content of a ``.npy`` file. It is written batch by batch.

    Args:
        calibration: The set.
        path: The file to write.
        batch_size: Images a batch.

    Raises:
        OutputExistsError: The file exists.
    """
    file = Path(path)
    if file.exists():
        raise OutputExistsError("the file exists already", where=str(file), remedy="choose another name")
    with atomic_writer(file) as out:
        out.write(b"[")
        for number, batch in enumerate(calibration.batches(batch_size)):
            out.write(b",\n" if number else b"\n")
            out.write(json.dumps({name: _polygraphy_array(array) for name, array in batch.items()}).encode())
        out.write(b"\n]\n")
    return file


def _polygraphy_array(array: Array) -> dict[str, str]:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return {"array": base64.b64encode(buffer.getvalue()).decode("ascii"), "polygraphy_class": "ndarray"}


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A temporary folder whose entries move into `folder` when the block ends well, and vanish otherwise."""
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError("the output is a file, not a folder", where=str(folder), remedy="choose another name")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".zsq-export-", dir=folder))
    moved: list[Path] = []
    try:
        try:
            yield staging
            for entry in sorted(staging.iterdir()):
                target = folder / entry.name
                entry.rename(target)
                moved.append(target)
        except OSError as error:
            raise CalibrationError(
                f"the export could not be written ({error.strerror or error}); nothing was left behind",
                where=str(folder),
                remedy="free some space, or choose another folder",
            ) from error
    except BaseException:
        for target in moved:
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(staging, ignore_errors=True)


EXPORTERS: Mapping[str, Callable[[CalibrationSet, Path], Path]] = {
    "test-data": export_test_data,
    "polygraphy": export_polygraphy,
    "npy": export_npy,
}


def export(calibration: CalibrationSet, kind: str, path: Path | str) -> Path:
    """Write `calibration` in one of the formats of :data:`EXPORTERS`.

    Raises:
        UsageError: No such format.
        OutputExistsError: Something is there already.
    """
    if kind not in EXPORTERS:
        raise UsageError(
            f"there is no export format {kind!r}", where="--format", remedy=f"choose one of {', '.join(EXPORTERS)}"
        )
    return EXPORTERS[kind](calibration, Path(path))
