"""Files with one scale a tensor, whoever wrote them: TensorRT's cache, ONNX Runtime's table, our ranges; looked at and compared.

The kind is told from the content, not from the name: a cache may be called anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zsq_deploy.artifact import read_json
from zsq_deploy.backends.tensorrt.cache import (
    CacheComparison,
    CalibrationCache,
    binding_path,
    compare_scales,
    read_cache,
)
from zsq_deploy.backends.tensorrt.ort_table import read_table
from zsq_deploy.errors import CalibrationError, ZsqError
from zsq_deploy.quant.ranges import Ranges

__all__ = ["ScaleFile", "compare_files", "is_scale_file", "read_scale_file"]


@dataclass(frozen=True, eq=False)
class ScaleFile:
    """What a file says about a network's tensors.

    Attributes:
        path: The file.
        title: What it is, in a few words: ``TensorRT 8.6.2 EntropyCalibration2``.
        scales: Tensor name to scale, the largest magnitude / 127, in float32; 0 for tensors without one.
        cache: The cache, where it is one.
    """

    path: Path
    title: str
    scales: Mapping[str, float]
    cache: CalibrationCache | None = None

    def describe(self) -> dict[str, Any]:
        """The file in human terms, as JSON values; of a cache also what it is bound to, if that is known."""
        if self.cache is not None:
            beside = binding_path(self.path)
            bound = read_json(beside) if beside.is_file() else None
            return {"file": str(self.path), **self.cache.describe(), "belongs_to": bound}
        return {
            "file": str(self.path),
            "kind": self.title,
            "tensors": [
                {"name": name, "scale": scale, "low": -127.0 * scale, "high": 127.0 * scale}
                for name, scale in self.scales.items()
            ],
        }


def is_scale_file(path: Path) -> bool:
    """Whether a file looks like a calibration cache of TensorRT or a table of ONNX Runtime."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(4) == b"TRT-":
            return True
    return path.suffix == ".flatbuffers"


def read_scale_file(path: Path) -> ScaleFile:
    """Read a calibration cache, a table of ONNX Runtime (flatbuffers or JSON) or our own ranges (JSON).

    Scales of 0 are accepted in caches, because TensorRT writes them.

    Raises:
        CalibrationError: It is none of them, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError("there is no such file", where=str(path), remedy="check the path")
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"TRT-":
        cache = read_cache(path, zeros=True)
        return ScaleFile(path, cache.title, cache.scales, cache)
    if path.suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict) and "ranges" in content and "schema_version" in content:
            ranges = Ranges.from_json(content)
            return ScaleFile(
                path, f"ranges ({ranges.method})", _scales({n: max(-a, b) for n, (a, b) in ranges.items()})
            )
    try:
        return ScaleFile(path, "ONNX Runtime calibration table", _scales(read_table(path)))
    except ZsqError as error:
        if path.suffix in (".json", ".flatbuffers"):
            raise
        raise CalibrationError(
            "this is neither a calibration cache of TensorRT nor a table of ONNX Runtime",
            where=str(path),
            remedy="a cache begins with TRT-<version>-<algorithm>; a table is calibration.flatbuffers or calibration.json",
        ) from error


def _scales(amax: Mapping[str, float]) -> dict[str, float]:
    return {name: float(np.float32(max(value, 0.0) / 127.0)) for name, value in amax.items()}


def compare_files(first: Path, second: Path) -> CacheComparison:
    """Two such files, tensor by tensor; they need not be of the same kind.

    Raises:
        CalibrationError: One of them cannot be read.
    """
    a, b = read_scale_file(first), read_scale_file(second)
    return compare_scales(a.scales, b.scales, (a.title, b.title))
