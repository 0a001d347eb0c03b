"""What accuracy control looks at: held-out synthetic images, or labelled images that the user named for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy.typing as npt

from zsq_deploy.backends import ValidationData
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.errors import UsageError
from zsq_deploy.evaldata import EvalData, load_eval_data
from zsq_deploy.model import Model
from zsq_deploy.recipe import Recipe

__all__ = ["judged_images", "validation_data"]

Array = npt.NDArray[Any]

_BATCH = 16


def validation_data(
    recipe: Recipe, model: Model, holdout: CalibrationSet, *, classes: int | None
) -> ValidationData | None:
    """The samples for accuracy control; ``None`` where none was asked for.

    Labelled data are read only if ``quantization.validation_data`` names them; the data for evaluation are never taken. Otherwise it is
    synthetic images that nothing was calibrated on: all of them if labelled data judge the engine in the end, else the half that
    :func:`judged_images` leaves.

    Args:
        recipe: What was asked for.
        model: The network.
        holdout: The held-out synthetic images.
        classes: Number of classes, where the output says it.
    """
    spec = recipe.quantization
    if not spec.accuracy_control:
        return None
    if spec.validation_data is None and len(holdout) < 2:
        raise UsageError(
            "accuracy control needs images that nothing was calibrated on, and so does verification",
            where="calibration.holdout",
            remedy="hold out 2 or more (default: 64), or give labelled images with --validation-data",
        )
    size = _BATCH if model.dynamic_batch else 1
    if spec.validation_data is not None:
        data = load_eval_data(
            Path(spec.validation_data), model.inputs[0], classes=classes, resize=recipe.verification.resize
        )
        same = recipe.verification.eval_data == spec.validation_data
        return ValidationData(
            _Batches(data, model, size),
            [data.labels[start : start + size] for start in range(0, len(data), size)],
            f"{len(data)} labelled images of {spec.validation_data}, named for accuracy control"
            + (" (and for evaluation: its accuracy is not independent)" if same else ""),
        )
    shown = holdout if recipe.verification.eval_data else holdout.take(0, len(holdout) // 2)
    return ValidationData(
        list(shown.batches(size)),
        None,
        f"agreement with the float network on {len(shown)} held-out synthetic images ({shown.manifest.method})",
    )


def judged_images(recipe: Recipe, holdout: CalibrationSet) -> CalibrationSet:
    """The held-out images that an engine is judged on: those that accuracy control did not look at."""
    spec = recipe.quantization
    if spec.accuracy_control and spec.validation_data is None and not recipe.verification.eval_data:
        return holdout.take(len(holdout) // 2)
    return holdout


class _Batches(Sequence[Mapping[str, Array]]):
    """Labelled images as inputs of the network, read when they are looked at: a quantizer goes through them many times."""

    def __init__(self, data: EvalData, model: Model, size: int) -> None:
        self._data, self._size = data, size
        self._name, self._preprocess = model.inputs[0].name, model.preprocess

    def __len__(self) -> int:
        return -(-len(self._data) // self._size)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Array]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Array]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = (index % len(self)) * self._size
        images = self._data.images(start, min(start + self._size, len(self._data)))
        return {self._name: self._preprocess.apply(images)}
