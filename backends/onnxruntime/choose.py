"""The default choice of what to quantize is the best *measured* engine: a few ways are built, run and compared.

Speed is measured in turns (engine, engine, float, engine, ...), so that a machine that changes its pace changes it for all; quality is
how far the outputs are from the float network's on given images (synthetic ones: no labels and no real data are needed).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.base import Engine, Target
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

_TURN = 5
_SAME_SPEED = 0.04
"""Medians closer than this share are taken as equal on a shared machine; the more exact engine wins then."""


@dataclass(frozen=True)
class Measured:
    """One way of building the engine, measured.

    Attributes:
        options: How it was built.
        median_ms: Median latency of one image.
        float_ms: Median latency of the float model in the same rounds.
        agreement: Share of images (or places of an image) with the same top-1 as float.
        sqnr_db: Signal to quantization noise of the outputs.
        bytes: Size of the file.
    """

    options: BuildOptions
    median_ms: float
    float_ms: float
    agreement: float
    sqnr_db: float
    bytes: int

    @property
    def speedup(self) -> float:
        """How many times faster than float32."""
        return self.float_ms / self.median_ms

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "label": self.options.label,
            "exclude": list(self.options.exclude),
            "median_ms": self.median_ms,
            "float_ms": self.float_ms,
            "speedup": self.speedup,
            "agreement": self.agreement,
            "sqnr_db": self.sqnr_db,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Choice:
    """The engine that was chosen, and against what.

    Attributes:
        engine: The engine.
        chosen: Its measurement.
        measured: All candidates.
        slower_than_float: No integer engine was faster than float32 on this machine.
        mixed: Then: the fastest mix of integer and float layers that was tried, with its ``options.exclude``.
        notes: What the user should read: why, and what else could be done.
    """

    engine: Engine
    chosen: Measured
    measured: tuple[Measured, ...]
    slower_than_float: bool
    mixed: Measured | None = None
    notes: tuple[str, ...] = field(default=())


def candidates(graph: Graph, target: Target, base: BuildOptions | None = None) -> list[BuildOptions]:
    """Ways of quantizing a network that are worth a measurement; those that would give the same engine are left out.

    Args:
        graph: Float graph with batch norm folded.
        target: The target.
        base: Other choices (biases, exclusions, ...) that all candidates share.
    """
    del target
    base = base or BuildOptions()
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


def paired_latency(
    runners: Sequence[OrtRunner], feeds: Feeds, *, rounds: int = 40, warmup: int = 5, quantile: float = 0.5
) -> list[float]:
    """Milliseconds (median, or another quantile) of several runners on one input, measured in turns of a few runs each.

    The first run of a turn is not counted: it pays for the caches that the runner before it left behind.
    """
    times: list[list[float]] = [[] for _ in runners]
    for number in range(-(-rounds // _TURN) + 1):
        for one, kept in zip(runners, times, strict=True):
            for again in range(warmup if number == 0 else _TURN + 1):
                started = time.perf_counter()
                one.run(feeds)
                if number and again:
                    kept.append((time.perf_counter() - started) * 1e3)
    return [float(np.quantile(kept, quantile)) for kept in times]


def quality(outputs: Sequence[Mapping[str, Array]], reference: Sequence[Mapping[str, Array]]) -> tuple[float, float]:
    """Top-1 agreement and signal-to-noise ratio (dB) of outputs against the float network's.

    Top-1 is taken over the last axis of every float output with 2 to 100,000 places there; without such an output the agreement is 1.
    The ratio is the worst one over the outputs.
    """
    same = total = 0
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for got, want in zip(outputs, reference, strict=True):
        for name, expected in want.items():
            if not np.issubdtype(expected.dtype, np.floating):
                continue
            value = got[name].astype(np.float64)
            expected = expected.astype(np.float64)
            signal[name] = signal.get(name, 0.0) + float(np.square(expected).sum())
            noise[name] = noise.get(name, 0.0) + float(np.square(value - expected).sum())
            if expected.ndim == 2 and expected.shape[-1] > 1:
                same += int((value.argmax(-1) == expected.argmax(-1)).sum())
                total += expected.shape[0]
    ratios = [
        10 * float(np.log10(max(signal[name], 1e-300) / max(noise[name], 1e-300))) if noise[name] > 0 else 200.0
        for name in signal
    ]
    return (same / total if total else 1.0), min(ratios, default=200.0)


def _one(feeds: Feeds) -> dict[str, Array]:
    return {name: value[:1] for name, value in feeds.items()}


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
        reference = [_run(float_runner, batch) for batch in batches]
        task.advance()
        times = paired_latency([float_runner, *runners], _one(batches[0]), rounds=rounds)
        for one, engine, option, milliseconds in zip(runners, engines, found, times[1:], strict=True):
            agreement, ratio = quality([_run(one, batch) for batch in batches], reference)
            measured.append(Measured(option, milliseconds, times[0], agreement, ratio, engine.path.stat().st_size))
            task.advance(candidate=option.label, ms=milliseconds, db=ratio)
    lacking = missing_features(target)
    best = _pick(measured, tolerance_agreement, tolerance_db, trust_times=not lacking)
    chosen = measured[best]
    if len(found) > 1:
        engine = _move(engines[best], folder)
        _remove(folder / "candidates")
    engine = replace(
        engine,
        choices={**engine.choices, "candidates": [one.to_json() for one in measured], "chosen": chosen.options.label},
    )
    slower = not lacking and all(one.median_ms > one.float_ms for one in measured)
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
                engine, chosen = _move(mixed_engine, folder), mixed
            _remove(folder / "mixed")
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
    feeds = _one(batches[0])
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
        _remove(folder)
        return None
    agreement, ratio = quality([_run(trio[2], batch) for batch in batches], reference)
    return built, Measured(option, mixed_ms, float_ms, agreement, ratio, built.path.stat().st_size)


def _pick(
    measured: Sequence[Measured], tolerance_agreement: float, tolerance_db: float, *, trust_times: bool = True
) -> int:
    """Index of the fastest candidate that is about as exact as the best; among equally fast ones the most exact.

    Where times mean nothing (another processor's target), it is the first of the most exact ones.
    """
    top_agreement = max(one.agreement for one in measured)
    top_db = max(one.sqnr_db for one in measured)
    good = [
        index
        for index, one in enumerate(measured)
        if one.agreement >= top_agreement - tolerance_agreement and one.sqnr_db >= top_db - tolerance_db
    ]
    if not good:  # the one with the best agreement is not the one with the best ratio
        good = [index for index, one in enumerate(measured) if one.agreement == top_agreement]
    if not trust_times:
        return max(good, key=lambda index: (round(measured[index].sqnr_db, 1), -index))
    fastest = min(measured[index].median_ms for index in good)
    equal = [index for index in good if measured[index].median_ms <= fastest * (1 + _SAME_SPEED)]
    return max(equal, key=lambda index: (measured[index].sqnr_db, -measured[index].median_ms))


def _run(one: OrtRunner, feeds: Feeds) -> dict[str, Array]:
    """All outputs; a file with a fixed batch takes its batches one after the other."""
    fixed = one.fixed_batch
    count = len(next(iter(feeds.values())))
    if fixed is None or fixed == count:
        return one.run(feeds)
    parts = [
        one.run({name: value[start : start + fixed] for name, value in feeds.items()})
        for start in range(0, count - fixed + 1, fixed)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _move(engine: Engine, folder: Path) -> Engine:
    """Move an engine's files up into their final folder."""
    home = engine.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(home.iterdir()):
        file.replace(folder / file.name)
    return replace(
        engine,
        path=folder / engine.path.name,
        qdq_path=folder / engine.qdq_path.name,
        float_path=folder / engine.float_path.name,
    )


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
