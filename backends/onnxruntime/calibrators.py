"""ONNX Runtime's own calibrators, fed by a calibration set, as an alternative to this project's ranges.

Three traps are avoided here. The option ``CalibMaxIntermediateOutputs`` clears what was collected without having looked at it, so only
the last samples count: it is never used; ``collect_data`` is called once per chunk instead, which merges correctly. The entropy
calibrator of ``quantize_static`` has 128 bins for 128 levels, so there is nothing to search: it is created here with 2,048. And the
histogram calibrators keep the activations of a whole call in memory: chunks are small.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.ranges import Ranges

__all__ = ["METHODS", "calibrate"]

Array = npt.NDArray[Any]

METHODS: dict[str, CalibrationMethod] = {
    "ort-minmax": CalibrationMethod.MinMax,
    "ort-entropy": CalibrationMethod.Entropy,
    "ort-percentile": CalibrationMethod.Percentile,
}
"""Names on the command line -> ONNX Runtime's methods."""

_FEWEST_BINS = 2048


class _Chunk(CalibrationDataReader):  # type: ignore[misc]
    """A reader over a few batches."""

    def __init__(self, batches: Iterator[Mapping[str, Array]]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)


def calibrate(
    graph: Graph,
    calibration: Any,
    method: str,
    *,
    bins: int = _FEWEST_BINS,
    percentile: float = 99.999,
    batch: int = 8,
    model_digest: str | None = None,
    progress: Progress = SILENT,
) -> Ranges:
    """Ranges of all float tensors by one of ONNX Runtime's calibrators.

    Args:
        graph: Float graph with batch norm folded.
        calibration: The :class:`~zsq_deploy.calib.CalibrationSet`.
        method: ``ort-minmax``, ``ort-entropy`` or ``ort-percentile``.
        bins: Histogram bins of the last two, at least 2,048.
        percentile: Share of values that stays inside, in percent.
        batch: Images of one chunk, which are in memory together.
        model_digest: Goes into the result; the graph's own digest otherwise.
        progress: Watches.

    Returns:
        :class:`~zsq_deploy.quant.Ranges` with the method's name.

    Raises:
        UsageError: Unknown method, or too few bins.
        CalibrationError: The set is empty or does not fit the network.
    """
    if method not in METHODS:
        raise UsageError(f"unknown calibrator {method!r}", where="ranges", remedy=f"choose one of {', '.join(METHODS)}")
    if bins < _FEWEST_BINS:
        raise UsageError(f"{bins} bins leave nothing to search", where="bins", remedy=f"use {_FEWEST_BINS} or more")
    if len(calibration) == 0:
        raise CalibrationError(
            "the calibration set is empty", where="calibration", remedy="synthesize at least one image"
        )
    ort.set_default_logger_severity(3)
    extra: dict[str, Any] = {"symmetric": False}
    if method == "ort-entropy":
        extra |= {"num_bins": bins, "num_quantized_bins": 128}
    elif method == "ort-percentile":
        extra |= {"num_bins": bins, "percentile": percentile}
    # A file with a fixed batch size takes one batch of that size at a time.
    fixed = graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else None
    step = fixed or max(1, batch)
    with tempfile.TemporaryDirectory(prefix="zsq-ort-") as scratch:
        source = Path(scratch) / "float.onnx"
        source.write_bytes(graph.proto.SerializeToString())
        try:
            calibrator = create_calibrator(
                source,
                None,
                augmented_model_path=str(Path(scratch) / "augmented.onnx"),
                calibrate_method=METHODS[method],
                extra_options=extra,
            )
            with progress.task(f"calibrate ({method})", len(calibration)) as task:
                for images in calibration.batches(step):
                    if fixed and len(next(iter(images.values()))) != fixed:
                        continue  # the rest of the set does not fill the fixed batch
                    with contextlib.redirect_stdout(sys.stderr):
                        calibrator.collect_data(_Chunk(iter([images])))
                    task.advance(len(next(iter(images.values()))))
            with contextlib.redirect_stdout(sys.stderr):  # it prints, and standard output belongs to our caller
                data = calibrator.compute_data()
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"ONNX Runtime's calibrator stopped: {type(error).__name__}: {str(error)[:300]}",
                where=method,
                remedy="check that the set's inputs fit the network, or use this project's ranges",
            ) from error
    pairs = {
        name: (float(np.asarray(low).reshape(-1)[0]), float(np.asarray(high).reshape(-1)[0]))
        for name, (low, high) in ((name, item.range_value) for name, item in data.items())
    }
    return Ranges(pairs, method=method, model_digest=model_digest or graph.digest, set_digest=str(calibration.digest))
