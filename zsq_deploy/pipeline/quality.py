"""The quality of a calibration set within a run: what is measured, and with what beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from zsq_deploy.calib import CalibrationSet
from zsq_deploy.calib.quality import Quality, measure_quality
from zsq_deploy.calib.quality.agreement import Runner
from zsq_deploy.evaldata import EvalData, load_images
from zsq_deploy.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant import Statistics
from zsq_deploy.quant.qdq import insert_qdq
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["REAL_IMAGES", "quality_of", "real_images", "simulated"]

REAL_IMAGES = 256
"""Real images that ranges are compared with, at most, spread evenly over what was given."""

Array = npt.NDArray[Any]


def real_images(path: Path, model: Model, *, resize: bool = False) -> EvalData:
    """Images of the user to compare ranges with; labels are not needed.

    Raises:
        DataError: Missing, unreadable, or of another size than the network takes.
    """
    return load_images(path, model.inputs[0], resize=resize, limit=REAL_IMAGES)


def simulated(model: Model, ranges: Mapping[str, tuple[float, float]], device: str | None = None) -> Runner:
    """The network with 8-bit weights (per output channel) and activations (plain min-max ranges), simulated in floating point.

    Nothing is corrected or widened: it shows what the set alone gives.
    """
    graph = insert_qdq(
        model.folded().graph,
        ranges,
        activation=Scheme(8, signed=False, symmetric=False),
        weight=Scheme(8, granularity=Granularity.CHANNEL, restricted=True),
    )
    twin = Twin(graph, dtype=torch.float32, device=torch.device(device or "cpu"))

    def run(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.no_grad():
            found = twin.run({name: torch.tensor(array) for name, array in feeds.items()})
        return {name: value.cpu().numpy() for name, value in found.items()}

    return run


def _inputs(model: Model, data: EvalData) -> Iterator[dict[str, Array]]:
    for pixels, _ in data.limit(REAL_IMAGES).batches(32):
        yield {model.inputs[0].name: model.preprocess.apply(pixels)}


def quality_of(
    model: Model,
    images: CalibrationSet,
    *,
    held_out: CalibrationSet | None = None,
    statistics: Statistics | None = None,
    real: EvalData | None = None,
    device: str | None = None,
    progress: Progress = SILENT,
) -> Quality:
    """Measure a calibration set: without real data, and against real images where there are any.

    Args:
        model: The network.
        images: The set that calibrates.
        held_out: Images of the same kind that it does not hold.
        statistics: Of the folded network on `images`, if they are there already.
        real: Images of the user; they are compared with and decide nothing.
        device: Where to compute.
        progress: Where to report.
    """
    return measure_quality(
        model,
        images,
        held_out=held_out,
        statistics=statistics,
        real=None if real is None else _inputs(model, real),
        quantize=lambda ranges: simulated(model, ranges, device),
        device=device,
        progress=progress,
    )
