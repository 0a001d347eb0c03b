"""One engine against its four references, on labelled data or on held-out synthetic images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.backends import Engine, get_backend
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.calib.parts.memory import steady_memory
from zsq_deploy.errors import ZsqError
from zsq_deploy.evaldata import EvalData
from zsq_deploy.model import Graph, Model, Twin
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant import read_qdq
from zsq_deploy.report.build import (
    accuracy_section,
    engine_section,
    file_section,
    integer_section,
    latency_section,
    layers_section,
    parity_section,
)
from zsq_deploy.verify import (
    RunnerSpec,
    compare_latency,
    evaluate,
    image_feeds,
    layer_quality,
    prove,
    walk_fused,
)

__all__ = [
    "Evidence",
    "batch_for",
    "measure_latency",
    "output_steps",
    "prepared",
    "runtime_version",
    "twin_predictor",
    "verify_engine",
]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Predict = Callable[[Feeds], Mapping[str, Array]]

_ACTIVATION_BUDGET = 40_000_000
"""Elements of the largest activation in one batch (bounds the memory of the float64 twin)."""

INTEGER_SAMPLES = 256
"""Samples that the exact integer reference and the unfused file are compared on; they are slow, and flips are not rare events."""

DIVERGENCE_SAMPLES = 32
"""Samples in which the first tensor that differs from the twin is looked for."""

LAYER_SAMPLES = 16


def batch_for(model: Model) -> int:
    """A batch size for verification: 1 for a fixed batch, else as many as keep the largest activation moderate."""
    if not model.dynamic_batch:
        return 1
    largest = 1
    for node in model.graph:
        for value in node.output:
            shape = model.graph.shape(value)
            if shape and len(shape) > 1 and all(size is not None for size in shape[1:]):
                largest = max(largest, int(np.prod([size for size in shape[1:] if size is not None])))
    return int(np.clip(_ACTIVATION_BUDGET // (8 * largest), 1, 32))


@dataclass(frozen=True)
class Evidence:
    """What engines are judged on.

    Attributes:
        data: Labelled images; ``None``: held-out synthetic images estimate the quality.
        holdout: The held-out synthetic images.
        limit: At most this many labelled images.
    """

    data: EvalData | None
    holdout: CalibrationSet

    def batches(self, model: Model, size: int) -> Iterator[tuple[dict[str, Array], Array | None]]:
        """Feeds and labels (``None`` without labels)."""
        if self.data is not None:
            for feeds, labels in image_feeds(self.data, model.preprocess, model.inputs[0].name, size):
                yield dict(feeds), labels
            return
        for feeds in self.holdout.batches(size):
            yield feeds, None

    @property
    def images(self) -> int:
        """Number of samples."""
        return len(self.data) if self.data is not None else len(self.holdout)

    def section(self) -> dict[str, Any]:
        """``evaluation`` of the report."""
        if self.data is not None:
            return {
                "kind": "labelled",
                "estimate": False,
                "images": len(self.data),
                "source": self.data.source,
                "note": "Labelled data that the user handed over; they reached evaluation only.",
            }
        return {
            "kind": "synthetic",
            "estimate": True,
            "images": len(self.holdout),
            "source": f"held-out {self.holdout.manifest.method} images",
            "note": "No labelled data were given: agreement with the float network on synthetic images that no quantizer "
            "saw. This is an estimate.",
        }


def output_steps(model: Model, engine_graph: Graph, observed: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """One LSB of every float output: its own scale if it is quantized, else its range on the calibration set / 255."""
    scales = {tensor.output: float(np.max(tensor.scale)) for tensor in read_qdq(engine_graph) if not tensor.is_weight}
    steps: dict[str, float] = {}
    for spec in model.outputs:
        if spec.name in scales:
            steps[spec.name] = scales[spec.name]
        elif spec.name in observed:
            low, high = observed[spec.name]
            steps[spec.name] = max(high - low, 1e-12) / 255
    return steps


def twin_predictor(graph: Graph, *, dtype: torch.dtype, device: str | None = None) -> tuple[Twin, Predict]:
    """A twin and a function from numpy feeds to numpy outputs."""
    twin = Twin(graph, dtype=dtype, device=device)
    place = next((p.device for p in twin.parameters()), torch.device(device or "cpu"))

    def predict(feeds: Feeds) -> dict[str, Array]:
        with torch.no_grad():
            given = {name: torch.tensor(np.asarray(value)).to(place) for name, value in feeds.items()}
            given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
            return {name: value.cpu().numpy() for name, value in twin.run(given).items()}

    return twin, predict


def prepared(engine: Engine, progress: Progress) -> Engine:
    """The engine with what has to be built on this very machine before it can be run.

    A runtime whose engines fit one device only (TensorRT) builds them in a function ``prepare(engine, progress=...)`` of its module
    ``backend``.
    """
    prepare = getattr(get_backend(engine.target), "prepare", None)
    if prepare is None:
        return engine
    made: Engine = prepare(engine, progress=progress)
    return made


def verify_engine(
    model: Model,
    engine: Engine,
    evidence: Evidence,
    observed: Mapping[str, tuple[float, float]],
    root: Path,
    *,
    threads: int = 1,
    peak: float | None = None,
    latency: bool = True,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Everything that is measured on one engine: ``targets.<T>`` of the report.

    Args:
        model: The network.
        engine: What is verified.
        evidence: What it is judged on.
        observed: Ranges of the float network's values on the calibration set (outputs at least), for the LSB of float outputs.
        root: The output folder; paths in the section are relative to it.
        threads: Threads of the runners.
        peak: Peak value of PSNR for image-to-image networks.
        latency: Whether to time it.
        progress: Where to report.
    """
    target = engine.target
    backend = get_backend(target)
    engine = prepared(engine, progress)
    size = batch_for(model)
    not_measured: dict[str, str] = {}
    engine_runner = backend.runner(engine.path, target, threads=threads)
    float_runner = backend.runner(engine.float_path, target, threads=threads, mode="float")
    unfused = backend.runner(engine.path, target, threads=threads, mode="unfused")
    graph = Graph.load(engine.qdq_path)
    twin, reference = twin_predictor(graph, dtype=torch.float64, device="cpu")
    models: dict[str, Predict] = {
        "float": float_runner.run,
        "engine": engine_runner.run,
        "reference": reference,
        "unfused": unfused.run,
    }
    sample = next(iter(evidence.batches(model, 1)))[0]
    integer = None
    try:
        integer = backend.integer_reference(engine, threads=threads)
        integer.run(sample)  # what it cannot compute is known at the first sample
        models["integer"] = integer.run
    except ZsqError as error:
        integer = None
        not_measured["parity.integer"] = str(error)
    steps = output_steps(model, graph, observed)
    with steady_memory():
        evaluation = evaluate(
            evidence.batches(model, size),
            models,
            steps=steps,
            limits={"integer": INTEGER_SAMPLES, "unfused": INTEGER_SAMPLES},
            peak=peak,
            total=evidence.images,
            progress=progress,
        )
    divergence = None
    if integer is not None:

        def fetch(feeds: Feeds, names: Sequence[str]) -> dict[str, Array]:
            with torch.no_grad():
                given = {name: torch.tensor(value, dtype=torch.float64) for name, value in feeds.items()}
                return {name: value.numpy() for name, value in twin.run(given, fetch=list(names)).items()}

        first = itertools.islice(evidence.batches(model, size), max(1, DIVERGENCE_SAMPLES // size))
        divergence = walk_fused([feeds for feeds, _ in first], integer, graph, fetch)
    layers = _layers(model, graph, twin, evidence, min(size, LAYER_SAMPLES))
    proof = prove(engine_runner.kernels(sample))
    facts = dict(backend.device_facts(target, threads=threads))
    section: dict[str, Any] = {
        "runtime": target.runtime,
        "runtime_version": runtime_version(target.runtime) or str(facts.get(target.runtime, "")),
        "summary": target.summary,
        "activation": str(target.activation),
        "weight": str(target.weight),
        "device": facts,
        "engine": engine_section(
            engine.path,
            root,
            qdq_path=engine.qdq_path,
            bytes=engine.bytes,
            quantizer=str(engine.choices.get("quantizer") or target.runtime),
            choices=engine.choices,
            weights_path=engine.weights_path,
            vendor_path=engine.vendor_path,
        ),
        "float_model": file_section(engine.float_path, root),
        "integer": integer_section(proof),
        "parity": parity_section(evaluation, divergence),
        "accuracy": accuracy_section(evaluation),
        "layers": layers,
        "notes": list(target.notes),
    }
    missing = backend.missing_features(target)
    if missing:
        section["notes"].append(
            f"This machine lacks {', '.join(missing)}: parity and latency here are those of this machine, not of the target."
        )
    if latency:
        section["latency"] = measure_latency(engine, sample, threads=threads, progress=progress)
        speedup = section["latency"].get("speedup")
        if speedup is not None and speedup < 1:
            section["notes"].append(
                f"The engine is slower than fp32 here ({speedup:.2f}x): deploy the float model {engine.float_path.name!r} for "
                "speed, or quantize fewer layers."
            )
    else:
        section["latency"] = {}
        not_measured["latency"] = "not asked for"
    section["not_measured"] = not_measured
    return section


def runtime_version(runtime: str) -> str:
    """Version of an installed runtime; empty where it is not known."""
    try:
        return metadata.version(runtime)
    except metadata.PackageNotFoundError:
        return ""


def _layers(model: Model, graph: Graph, twin: Twin, evidence: Evidence, samples: int) -> list[dict[str, Any]]:
    """SQNR of every quantized activation against the float network, on a few samples."""
    folded = model.folded().graph
    known = {value for node in folded for value in node.output} | {spec.name for spec in folded.inputs}
    pairs = {
        tensor.name: tensor.output
        for tensor in read_qdq(graph)
        if not tensor.is_weight and tensor.name in known and tensor.output
    }
    order = [spec.name for spec in folded.inputs] + [value for node in folded for value in node.output]
    names = [name for name in order if name in pairs]
    if not names:
        return []
    feeds = next(iter(evidence.batches(model, samples)))[0]
    floating = Twin(folded, device="cpu")
    with torch.no_grad():
        quantized = twin.run(
            {name: torch.tensor(np.asarray(value), dtype=torch.float64) for name, value in feeds.items()},
            fetch=[pairs[name] for name in names],
        )
        wanted = floating.run({name: torch.tensor(np.asarray(value)) for name, value in feeds.items()}, fetch=names)
    steps = {tensor.name: float(np.max(tensor.scale)) for tensor in read_qdq(graph) if not tensor.is_weight}
    rows = layer_quality(
        names,
        {name: quantized[pairs[name]].numpy() for name in names},
        {name: wanted[name].numpy() for name in names},
        {name: steps[name] for name in names},
    )
    return layers_section(rows)


def measure_latency(
    engine: Engine, sample: Feeds, *, threads: int = 1, rounds: int = 10, progress: Progress = SILENT
) -> dict[str, Any]:
    """Engine, fp32 and best float mode in fresh processes, in turn: ``targets.<T>.latency``."""
    factory = f"zsq_deploy.backends.{engine.target.runtime}.runner:open_runner"
    backend = get_backend(engine.target)
    engine = prepared(engine, progress)
    preload: Sequence[str] = (f"zsq_deploy.backends.{engine.target.runtime}.runner",)

    def spec(path: Path, mode: str, words: str, session: Mapping[str, Any] | None = None) -> RunnerSpec:
        arguments: dict[str, Any] = {"path": str(path), "target": engine.target.name, "threads": threads, "mode": mode}
        if session:
            arguments["session"] = dict(session)
        return RunnerSpec(factory, arguments, feeds=sample, threads=threads, mode=words, preload=preload)

    specs = {
        "engine": spec(engine.path, "engine", "integer engine, everything fused"),
        "float32": spec(engine.float_path, "float", "float network, all optimizations, fp32"),
    }
    for name, session in backend.float_modes(engine.target).items():
        if name not in specs:
            specs[name] = spec(engine.float_path, "float", f"float network, all optimizations, {name}", session)
    return latency_section(compare_latency(specs, rounds=rounds, progress=progress))
