"""The default choice of what to quantize is the best *measured* engine: a few ways are built, run and compared.

Speed is measured in turns (engine, engine, float, engine, ...), so that a machine that changes its pace changes it for all; quality is
how far the outputs are from the float network's on given images (synthetic ones: no labels and no real data are needed).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from zsq_deploy.backends.base import Engine, Target
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
from zsq_deploy.backends.onnxruntime.options import LOSSY_OPS, MAC_OPS, WIDE_OPS, BuildOptions
from zsq_deploy.backends.onnxruntime.placement import place
from zsq_deploy.backends.onnxruntime.prepare import prepare
from zsq_deploy.backends.onnxruntime.proof import kernels
from zsq_deploy.backends.onnxruntime.quantizer import build
from zsq_deploy.backends.onnxruntime.runner import OrtRunner, missing_features
from zsq_deploy.backends.onnxruntime.widen import could_widen
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress

__all__ = ["Choice", "Measured", "candidates", "choose", "paired_latency", "quality"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


def candidates(graph: Graph, target: Target, base: BuildOptions | None = None) -> list[BuildOptions]:
    """Ways of quantizing a network that are worth a measurement; those that would give the same engine are left out.

    Args:
        graph: Float graph with batch norm folded.
        target: The target.
        base: Other choices (biases, exclusions, ...) that all candidates share.
    """
    del target
    base = base or BuildOptions()
    if base.weight_only:
        return [base.with_(label="weights only")]
    if base.op_types is not None:
        return [base]
    present = {node.op_type for node in graph}
    found = [base.with_(label="wide")]
    if not base.widen and could_widen(prepare(graph).graph):
        base = base.with_(widen=True)
        found.append(base.with_(label="widened"))
    if present & set(LOSSY_OPS):
        found.append(base.with_(op_types=(*WIDE_OPS, *LOSSY_OPS), label="all"))
    if present & {"LayerNormalization", "Softmax", "Gelu", "Erf"} and present & {"Gemm", "MatMul"}:
        lean = tuple(op for op in WIDE_OPS if op not in ("Add", "Mul"))
        found.append(base.with_(op_types=lean, mac_outputs=False, label="products"))
    heads = any("over pixels" in line for line in prepare(graph, float_heads=True).rewrites)
    if heads and not base.float_heads and not base.quantize_outputs:
        found.append(base.with_(float_heads=True, label="float heads"))
    if present & {"HardSwish", "HardSigmoid"} and not base.gates:
        found.append(base.with_(gates=True, label="integer gates"))
    inputs = {spec.name for spec in graph.inputs}
    if any(
        {reader.op_type for reader in graph.consumers(name)} - {*MAC_OPS, *WIDE_OPS, "Shape"}
        and {reader.op_type for reader in graph.consumers(name)} & set(MAC_OPS)
        for name in inputs
    ):
        found.append(base.with_(float_readers=False, label="rounded input"))
    return _distinct(graph, found)


def _distinct(graph: Graph, options: Sequence[BuildOptions]) -> list[BuildOptions]:
    """Only those that quantize other nodes, or in another way, than one before."""
    kept: dict[Any, BuildOptions] = {}
    for option in options:
        prepared = prepare(graph, gates=option.gates, float_heads=option.float_heads)
        placement = place(prepared.graph, option)
        key = (
            placement.nodes,
            option.gates,
            option.float_heads,
            option.widen,
            option.float_readers,
            option.mac_outputs,
        )
        kept.setdefault(key, option)
    return list(kept.values())


def choose(
    model: Any,
    ranges: Any,
    target: Target,
    folder: Path,
    *,
    images: Iterable[Feeds],
    options: BuildOptions | None = None,
    calibration: Any = None,
    threads: int = 1,
    rounds: int = 40,
    tolerance_agreement: float = 0.005,
    tolerance_db: float = 1.0,
    allow_float_layers: bool = False,
    progress: Progress = SILENT,
) -> Choice:
    """Build every candidate, measure it, and keep the fastest of those that are about as exact as the best.

    Args:
        model: The model.
        ranges: As for :func:`~zsq_deploy.backends.onnxruntime.quantizer.build`.
        target: The target.
        folder: Where the chosen engine goes.
        images: Batches of inputs that the candidates are compared on.
        options: Choices that all candidates share.
        calibration: As for ``build``.
        threads: Threads inside an operator.
        rounds: Latency rounds.
        tolerance_agreement: How much less agreement than the best a candidate may have.
        tolerance_db: How many dB less than the best.
        allow_float_layers: If no integer engine is faster than float32, take a mix of integer and float layers that is; otherwise
            it is only measured and offered.
        progress: Watches.

    Returns:
        The choice, with all measurements.

    Raises:
        CalibrationError: There are no images to compare on.
    """
    folder = Path(folder)
    batches = [dict(batch) for batch in images]
    if not batches:
        raise CalibrationError(
            "there are no images to compare engines on", where="images", remedy="give at least one batch of inputs"
        )
    graph = model.folded().graph
    found = candidates(graph, target, options)
    notes: list[str] = []
    measured: list[Measured] = []
    with progress.task(f"measure {len(found)} ways to quantize", len(found) + 1) as task:
        if len(found) == 1:
            engine = build(model, ranges, target, folder, options=found[0], calibration=calibration)
            engines = [engine]
        else:
            trial = folder / "candidates"
            engines = [
                build(model, ranges, target, trial / f"{index}", options=option, calibration=calibration)
                for index, option in enumerate(found)
            ]
        float_runner = OrtRunner(engines[0].float_path, target, threads=threads, mode="float")
        runners = [OrtRunner(engine.path, target, threads=threads) for engine in engines]
        reference = [run_batch(float_runner, batch) for batch in batches]
        task.advance()
        times = paired_latency([float_runner, *runners], first_image(batches[0]), rounds=rounds)
        for one, engine, option, milliseconds in zip(runners, engines, found, times[1:], strict=True):
            agreement, ratio = quality([run_batch(one, batch) for batch in batches], reference)
            measured.append(Measured(option, milliseconds, times[0], agreement, ratio, engine.path.stat().st_size))
            task.advance(candidate=option.label, ms=milliseconds, db=ratio)
    lacking = missing_features(target)
    best = pick(measured, tolerance_agreement, tolerance_db, trust_times=not lacking)
    chosen = measured[best]
    if len(found) > 1:
        engine = move(engines[best], folder)
        remove(folder / "candidates")
    engine = replace(
        engine,
        choices={**engine.choices, "candidates": [one.to_json() for one in measured], "chosen": chosen.options.label},
    )
    weight_only = measured[0].options.weight_only
    slower = not lacking and not weight_only and all(one.median_ms > one.float_ms for one in measured)
    mixed: Measured | None = None
    if slower:
        notes.append(
            f"no integer engine of this network is faster than float32 here ({chosen.median_ms:.3f} ms against "
            f"{chosen.float_ms:.3f} ms): layers with few channels spend their time on moving data"
        )
        result = _mix(
            model, ranges, target, folder / "mixed", engine, chosen, batches, reference, threads, rounds, calibration
        )
        if result is None:
            notes.append(
                "no mix of integer and float layers is faster either: deploy the float model where only speed counts"
            )
        else:
            mixed_engine, mixed = result
            left = ", ".join(mixed.options.exclude[:4]) + (", ..." if len(mixed.options.exclude) > 4 else "")
            notes.append(
                f"with {len(mixed.options.exclude)} layers in float ({left}) it takes {mixed.median_ms:.3f} ms against "
                f"{mixed.float_ms:.3f} ms of float32"
            )
            if allow_float_layers and mixed.median_ms < min(chosen.median_ms, mixed.float_ms):
                engine, chosen = move(mixed_engine, folder), mixed
            remove(folder / "mixed")
    if lacking:
        notes.append(
            f"this machine lacks {', '.join(lacking)}: the latencies are not those of {target.name}, and the choice looked at "
            "exactness only"
        )
    engine = replace(
        engine,
        choices={
            **engine.choices,
            "candidates": [one.to_json() for one in (*measured, *((mixed,) if mixed else ()))],
            "chosen": chosen.options.label,
        },
    )
    return Choice(engine, chosen, tuple(measured), slower, mixed, tuple(notes))


def _mix(
    model: Any,
    ranges: Any,
    target: Target,
    folder: Path,
    engine: Engine,
    chosen: Measured,
    batches: Sequence[Feeds],
    reference: Sequence[Mapping[str, Array]],
    threads: int,
    rounds: int,
    calibration: Any,
) -> tuple[Engine, Measured] | None:
    """The engine with its slow layers in float, if that is faster than the integer engine; ``None`` otherwise.

    A layer is slow if its integer kernel takes longer than its float kernel; layers are left out from the input on, since a
    change between integers and floats in the middle of a network costs two conversions.
    """
    feeds = first_image(batches[0])
    whole = {
        node.sources[0]: node.microseconds
        for node in kernels(engine.path, target, feeds, threads=threads)
        if node.macs and node.sources
    }
    floats = {
        node.sources[0]: node.microseconds
        for node in kernels(engine.float_path, target, feeds, threads=threads, mode="float")
        if node.macs and node.sources
    }
    gain, best_gain, exclude, best = 0.0, 0.0, [], []
    for name, microseconds in whole.items():
        if name not in floats:
            break
        gain += microseconds - floats[name]
        exclude.append(name)
        if gain > best_gain:
            best_gain, best = gain, list(exclude)
    if not best or len(best) == len(whole):
        return None
    option = chosen.options.with_(exclude=(*chosen.options.exclude, *best), label="mixed")
    built = build(model, ranges, target, folder, options=option, calibration=calibration)
    trio = [
        OrtRunner(engine.float_path, target, threads=threads, mode="float"),
        OrtRunner(engine.path, target, threads=threads),
        OrtRunner(built.path, target, threads=threads),
    ]
    float_ms, engine_ms, mixed_ms = paired_latency(trio, feeds, rounds=rounds)
    if mixed_ms >= engine_ms:
        remove(folder)
        return None
    agreement, ratio = quality([run_batch(trio[2], batch) for batch in batches], reference)
    return built, Measured(option, mixed_ms, float_ms, agreement, ratio, built.path.stat().st_size)
