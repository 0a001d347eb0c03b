"""The calibration table of ONNX Runtime's TensorRT provider: tensor names and largest magnitudes.

The provider reads ``calibration.flatbuffers`` (``trt_int8_calibration_table_name``, with ``trt_int8_use_native_calibration_table`` off)
and sets every tensor's dynamic range to ``(-value, value)``. ONNX Runtime's ``write_calibration_table`` writes that file with a JSON
and a plain text file of the same content beside it; so does :func:`write_table`. The schema is two strings an entry::

    table KeyValue { key: string (key); value: string; }
    table TrtTable { dict: [KeyValue]; }
    root_type TrtTable;

One difference is deliberate: ONNX Runtime's writer stores the larger one of the two *ends* of a range, which for ``[-5, 2]`` is 2 and
clips more than half of it. Here it is the larger *magnitude*.

The provider can read TensorRT's own cache too (``trt_int8_use_native_calibration_table`` on), but it cuts every line at the first
colon, so that tensors with a colon in their name get no range there: :func:`native_unreadable` names them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import flatbuffers
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table

from zsq_deploy.artifact import atomic_writer
from zsq_deploy.errors import CalibrationError

__all__ = ["FILES", "native_unreadable", "provider_options", "read_table", "table_bytes", "table_values", "write_table"]

FILES = ("calibration.flatbuffers", "calibration.json", "calibration.cache")
"""Files of a table; the provider reads the first one, people the others."""


def table_values(ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The largest magnitude of every tensor, as float32, in the tensor's unit; tensors that are always zero are left out.

    Raises:
        CalibrationError: A range is not finite.
    """
    found: dict[str, float] = {}
    for name, (low, high) in ranges.items():
        value = float(np.float32(max(abs(float(low)), abs(float(high)))))
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(value)):
            raise CalibrationError(
                f"the range of {name!r} is not usable: {low} .. {high}",
                where=name,
                remedy="look for NaN or infinite values in the network or in the calibration set",
            )
        if value > 0.0:
            found[name] = value
    return found


def table_bytes(values: Mapping[str, float]) -> bytes:
    """The flatbuffers form of a table, entries sorted by the bytes of their names (as its ``key`` attribute demands)."""
    builder = flatbuffers.Builder(1024)
    entries = []
    for name in sorted(values, key=str.encode):
        key, value = builder.CreateString(name), builder.CreateString(_text(values[name]))
        builder.StartObject(2)
        builder.PrependUOffsetTRelativeSlot(0, key, 0)
        builder.PrependUOffsetTRelativeSlot(1, value, 0)
        entries.append(builder.EndObject())
    builder.StartVector(4, len(entries), 4)
    for entry in reversed(entries):
        builder.PrependUOffsetTRelative(entry)
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def _text(value: float) -> str:
    """The shortest decimal that is read back as the same float32."""
    return np.format_float_positional(np.float32(value), unique=True, trim="0")


def write_table(folder: Path, ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Write the table's three files into a folder, each atomically.

    Args:
        folder: Where; made if missing.
        ranges: Value name to ``(low, high)``.

    Returns:
        What was written: the largest magnitude by tensor name.

    Raises:
        CalibrationError: A range is not finite.
    """
    values = table_values(ranges)
    content = {
        FILES[0]: table_bytes(values),
        FILES[1]: (json.dumps({name: float(_text(v)) for name, v in sorted(values.items())}, indent=1) + "\n").encode(),
        FILES[2]: "".join(f"{name} {_text(v)}\n" for name, v in sorted(values.items())).encode(),
    }
    for name, data in content.items():
        with atomic_writer(Path(folder) / name) as file:
            file.write(data)
    return values


def read_table(path: Path) -> dict[str, float]:
    """Read a table, flatbuffers or JSON by its suffix, whoever wrote it.

    Of ONNX Runtime's JSON, which holds whole ranges, the larger magnitude is taken.

    Returns:
        Largest magnitude by tensor name.

    Raises:
        CalibrationError: The file is missing or damaged, an entry stands there twice, or a magnitude is not a positive number.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError("there is no such calibration table", where=str(path), remedy="check the path")
    try:
        pairs = _from_json(path.read_bytes()) if path.suffix == ".json" else _from_flatbuffers(path.read_bytes())
    except Exception as error:
        raise CalibrationError(
            f"this is no calibration table of ONNX Runtime ({type(error).__name__}: {str(error)[:120]})",
            where=str(path),
            remedy="give calibration.flatbuffers or calibration.json, or write them again",
        ) from error
    found: dict[str, float] = {}
    for name, value in pairs:
        if name in found:
            raise CalibrationError(
                f"the tensor {name!r} stands in the table twice", where=str(path), remedy="write the table again"
            )
        if not (math.isfinite(value) and value > 0):
            raise CalibrationError(
                f"the largest magnitude of {name!r} is {value}",
                where=str(path),
                remedy="no image excited this tensor, or the network computes NaN: calibrate again without it",
            )
        found[name] = value
    if not found:
        raise CalibrationError("the table holds no tensor", where=str(path), remedy="write the table again")
    return found


def _from_flatbuffers(data: bytes) -> list[tuple[str, float]]:
    if len(data) < 8:
        raise ValueError("the file is too short")
    offset = number_types.UOffsetTFlags
    root = Table(bytearray(data), flatbuffers.encode.Get(flatbuffers.packer.uoffset, data, 0))
    place = root.Offset(4)
    if not place:
        raise ValueError("it holds no entries")
    start, count = root.Vector(place), root.VectorLen(place)
    if count * 4 > len(data):
        raise ValueError("it is truncated")
    pairs = []
    for index in range(count):
        entry = Table(root.Bytes, root.Indirect(start + 4 * index))
        texts = []
        for slot in (4, 6):
            at = offset.py_type(entry.Offset(slot))
            if not at:
                raise ValueError(f"entry {index} lacks a name or a value")
            texts.append(_string(entry, int(at) + entry.Pos))
        pairs.append((texts[0], float(texts[1])))
    return pairs


def _string(table: Table, at: int) -> str:
    at += table.Get(number_types.UOffsetTFlags, at)
    length = table.Get(number_types.UOffsetTFlags, at)
    raw = bytes(table.Bytes[at + 4 : at + 4 + length])
    if len(raw) != length:
        raise ValueError("it is truncated")
    return raw.decode("utf-8")


def _from_json(data: bytes) -> list[tuple[str, float]]:
    twice: list[str] = []

    def pairs_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in set(names) if names.count(name) > 1)
        return dict(pairs)

    content = json.loads(data, object_pairs_hook=pairs_of)
    if twice:
        raise ValueError(f"{twice[0]!r} stands there twice")
    if not isinstance(content, dict):
        raise TypeError("it is not an object of names")
    return [(str(name), _magnitude(value)) for name, value in content.items()]


def _magnitude(value: object) -> float:
    """Of one JSON entry: a number, or ONNX Runtime's record of a tensor (``{"lowest": {"data": ...}, "highest": ...}``)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, dict):
        raise TypeError(f"an entry holds {type(value).__name__}")
    if value.get("CLS") == "TensorData":
        value = value.get("data", value)
    assert isinstance(value, dict)
    ends = [value[key] for key in ("lowest", "highest")]
    return max(abs(float(np.asarray(end["data"] if isinstance(end, dict) else end).reshape(-1)[0])) for end in ends)


def native_unreadable(names: Iterable[str]) -> list[str]:
    """Tensors that the provider cannot find in TensorRT's own cache, because it ends their name at the first colon."""
    return [name for name in names if ":" in name]


def provider_options(folder: Path, table: str = FILES[0], *, native: bool = False) -> dict[str, str]:
    """The options that make ONNX Runtime's ``TensorrtExecutionProvider`` use a table.

    Args:
        folder: Where the table is; the provider looks for it in its cache folder and nowhere else.
        table: File name of the table (or of TensorRT's cache).
        native: Whether it is TensorRT's own cache.
    """
    return {
        "trt_int8_enable": "True",
        "trt_int8_calibration_table_name": table,
        "trt_int8_use_native_calibration_table": str(native),
        "trt_engine_cache_path": str(folder),
    }
