"""From ranges to an engine: what to quantize is measured, scales are exact, biases are corrected, all on synthetic images."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zsq_deploy.backends import Engine, Target, get_backend
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model import Graph, Model
from zsq_deploy.pipeline.calibration import Images, MeasuredRanges
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import correct_bias

__all__ = ["Built", "EngineSettings", "build_engine"]

BIAS_IMAGES = 64
"""Images for bias correction; the mean error of a channel over 64 images is known far better than one step of its bias."""


@dataclass(frozen=True)
class EngineSettings:
    """What a recipe can say about an engine.

    Attributes:
        bits: ``w8a8``.
        bias_correction: Shift every bias by the mean error that quantization causes, layer by layer.
        exact_scales: Scales on which engine and reference agree exactly (:mod:`zsq_deploy.quant.exact_scales`).
        search: Measure candidates for what to quantize and take the best; ``False``: the default placement.
        op_types: Operator types to quantize; ``None``: the target's choice.
        exclude: Nodes that stay in float.
        quantize_outputs: Quantize the network's outputs too.
        weight_method: ``minmax`` or ``mse``.
        choice: Target name -> what an earlier search chose for it; nothing is measured then.
    """

    bits: str = "w8a8"
    bias_correction: bool = True
    exact_scales: bool = True
    search: bool = True
    op_types: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    quantize_outputs: bool = False
    weight_method: str = "minmax"
    choice: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """An engine, what else was tried, and how long it took."""

    engine: Engine
    candidates: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def build_engine(
    model: Model,
    images: Images,
    measured: MeasuredRanges,
    target: Target,
    folder: Path,
    settings: EngineSettings | None = None,
    *,
    threads: int = 1,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Built:
    """Quantize a network for one target into `folder`.

    The placement is chosen first (by measurement, if `settings.search`), then biases are corrected on the engine's own Q/DQ graph,
    and the engine is built once more with the corrected biases.
    """
    settings = settings or EngineSettings()
    started = time.monotonic()
    trial = folder / "trial" if settings.bias_correction else folder
    backend: Any = get_backend(target)
    if isinstance(measured.ranges, str) and images.calibration is None:
        raise CalibrationError(
            f"{measured.ranges} reads images, and the method {images.method!r} makes none",
            where="--ranges",
            remedy="choose another range method, or a synthesis method that makes images",
        )
    options = backend.BuildOptions(
        bits=settings.bits,
        op_types=settings.op_types,
        exclude=settings.exclude,
        quantize_outputs=settings.quantize_outputs,
        weight_method=settings.weight_method,
        exact_scales=settings.exact_scales,
    )
    candidates: list[dict[str, Any]] = []
    notes: list[str] = []
    looked_at = images.calibration if images.calibration is not None else images.holdout
    pinned = settings.choice.get(target.name)
    if pinned is not None:
        options = _chosen_before(backend.candidates(model.folded().graph, target, options), pinned, target)
    if settings.search and settings.op_types is None and pinned is None:
        choice = backend.choose(
            model,
            measured.ranges,
            target,
            trial,
            images=list(looked_at.take(0, min(32, len(looked_at))).batches(8 if model.dynamic_batch else 1)),
            options=options,
            calibration=images.calibration,
            threads=threads,
            progress=progress,
        )
        options, engine = choice.chosen.options, choice.engine
        candidates = [_candidate(item, item is choice.chosen) for item in choice.measured]
        notes.extend(choice.notes)
    else:
        engine = backend.build(
            model, measured.ranges, target, trial, options=options, calibration=images.calibration, progress=progress
        )
    if settings.bias_correction:
        if getattr(options, "widen", False):
            # Added zero channels change nothing but speed; the correction compares layers of the network as it is.
            plain = options.with_(widen=False)
            engine = backend.build(
                model, measured.ranges, target, folder / "narrow", options=plain, calibration=images.calibration
            )
        batch = looked_at.take(0, min(BIAS_IMAGES, len(looked_at)))
        corrected: Mapping[str, np.ndarray[Any, Any]] = correct_bias(
            model.folded(),
            Graph.load(engine.qdq_path),
            batch.batches(8 if model.dynamic_batch else 1),
            seed=seed,
            progress=progress,
        )
        engine = backend.build(
            model,
            measured.ranges,
            target,
            folder,
            options=options.with_(biases=dict(corrected)),
            calibration=images.calibration,
            progress=progress,
        )
        shutil.rmtree(trial, ignore_errors=True)
        shutil.rmtree(folder / "narrow", ignore_errors=True)
    return Built(engine, candidates, time.monotonic() - started, tuple(notes))


def _chosen_before(candidates: Sequence[Any], label: str, target: Target) -> Any:
    for options in candidates:
        if options.label == label:
            return options
    raise UsageError(
        f"there is no way {label!r} to quantize this network for {target.name}",
        where="quantization.choice",
        remedy=f"choose one of {', '.join(options.label for options in candidates)}, or leave it out to have it measured",
    )


def _candidate(item: Any, chosen: bool) -> dict[str, Any]:
    return {
        "name": item.options.label,
        "chosen": chosen,
        "median_ms": item.median_ms,
        "sqnr_db": item.sqnr_db,
        "agreement": item.agreement,
        "bytes": item.bytes,
    }
