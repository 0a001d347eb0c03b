"""Who quantizes by default: our own placement and NNCF are both built, both are measured, and the better engine stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from zsq_deploy.backends.base import Engine, Target, ValidationData
from zsq_deploy.backends.measured import (
    Choice,
    Measured,
    first_image,
    move,
    paired_latency,
    pick,
    quality,
    remove,
    run_batch,
)
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.quantizer import build
from zsq_deploy.backends.openvino.runner import OvRunner, missing_features
from zsq_deploy.errors import CalibrationError, EngineError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress

__all__ = ["Choice", "Measured", "candidates", "choose", "paired_latency", "quality"]

Feeds = Mapping[str, npt.NDArray[Any]]


def candidates(graph: Graph, target: Target, base: BuildOptions | None = None) -> list[BuildOptions]:
    """Ways of quantizing a network that are worth a measurement; the label of each is the name of who quantizes.

    Args:
        graph: Float graph with batch norm folded.
        target: The target.
        base: Other choices (exclusions, ...) that all candidates share. A quantizer named there is the only candidate.
    """
    del graph, target
    base = base or BuildOptions()
    if base.weight_only is not None:
        return [base.with_(label=base.weight_only)]
    if base.quantizer != "auto":
        return [base.with_(label=base.quantizer)]
    found = [base.with_(quantizer="qdq", label="qdq")]
    if base.op_types is None and not base.quantize_outputs:
        found.append(base.with_(quantizer="nncf", label="nncf"))
    return found


def choose(
    model: Any,
    ranges: Any,
    target: Target,
    folder: Path,
    *,
    images: Iterable[Feeds],
    options: BuildOptions | None = None,
    calibration: Any = None,
    validation: ValidationData | None = None,
    probes: Feeds | None = None,
    refine: Callable[[Engine, BuildOptions], tuple[Engine, BuildOptions]] | None = None,
    threads: int = 1,
    rounds: int = 40,
    tolerance_agreement: float = 0.005,
    tolerance_db: float = 1.0,
    progress: Progress = SILENT,
) -> Choice:
    """Build every candidate, measure it, and keep the fastest of those that are about as exact as the best.

    Args:
        model: The model.
        ranges: As for :func:`~zsq_deploy.backends.openvino.quantizer.build`.
        target: The target.
        folder: Where the chosen engine goes.
        images: Batches of inputs that the candidates are compared on.
        options: Choices that all candidates share.
        calibration: The calibration set; without one NNCF is no candidate.
        validation: What accuracy control measures on.
        probes: Structured pictures that NNCF looks at beside the set.
        refine: What is done to a candidate before it is measured (bias correction): engine and options -> the better engine in the
            same folder, and its options. Engines whose quantizer corrected the biases are left alone.
        threads: Threads inside an operator.
        rounds: Latency rounds.
        tolerance_agreement: How much less agreement than the best a candidate may have.
        tolerance_db: How many dB less than the best.
        progress: Watches.

    Returns:
        The choice, with all measurements.

    Raises:
        CalibrationError: There are no images to compare on.
        EngineError: No candidate could be built.
    """
    folder = Path(folder)
    batches = [dict(batch) for batch in images]
    if not batches:
        raise CalibrationError(
            "there are no images to compare engines on", where="images", remedy="give at least one batch of inputs"
        )
    asked = options or BuildOptions()
    found = candidates(model.folded().graph, target, asked)
    if calibration is None:
        found = [option for option in found if option.quantizer == "qdq"] or found
    notes: list[str] = []
    trial = folder / "candidates"
    engines: list[Engine] = []
    built: list[BuildOptions] = []
    refused: EngineError | None = None
    with progress.task(f"measure {len(found)} ways to quantize", len(found) + 1) as task:
        for option in found:
            try:
                engine = build(
                    model,
                    ranges,
                    target,
                    trial / option.label,
                    options=option,
                    calibration=calibration,
                    validation=validation,
                    probes=probes,
                    progress=progress,
                )
                if refine is not None and not engine.choices.get("corrects_biases"):
                    engine, option = refine(engine, option)
            except EngineError as error:
                if len(found) == 1:
                    raise
                refused = error
                notes.append(f"{option.label} could not quantize this network: {error}")
                continue
            engines.append(engine)
            built.append(option)
        if refused is not None and not engines:
            raise refused
        float_runner = OvRunner(engines[0].float_path, target, threads=threads, mode="float")
        runners = [OvRunner(engine.path, target, threads=threads) for engine in engines]
        reference = [run_batch(float_runner, batch) for batch in batches]
        task.advance()
        times = paired_latency([float_runner, *runners], first_image(batches[0]), rounds=rounds)
        measured: list[Measured] = []
        for one, engine, option, milliseconds in zip(runners, engines, built, times[1:], strict=True):
            agreement, ratio = quality([run_batch(one, batch) for batch in batches], reference)
            measured.append(Measured(option, milliseconds, times[0], agreement, ratio, engine.bytes))
            task.advance(candidate=option.label, ms=milliseconds, db=ratio)
    lacking = missing_features(target)
    best = pick(measured, tolerance_agreement, tolerance_db, trust_times=not lacking)
    chosen = measured[best]
    engine = move(engines[best], folder)
    remove(trial)
    slower = not lacking and all(one.median_ms > one.float_ms for one in measured)
    if slower:
        notes.append(
            f"no integer engine of this network is faster than float32 here ({chosen.median_ms:.3f} ms against "
            f"{chosen.float_ms:.3f} ms): layers with few channels spend their time on moving data"
        )
    if lacking:
        notes.append(
            f"this machine lacks {', '.join(lacking)}: the latencies are not those of {target.name}, and the choice looked at "
            "exactness only"
        )
    engine = replace(
        engine,
        choices={
            **engine.choices,
            "candidates": [one.to_json() for one in measured],
            "chosen": chosen.options.label,
        },
    )
    return Choice(engine, chosen, tuple(measured), slower, None, tuple(notes))
