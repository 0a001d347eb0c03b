"""Preparing an engine for TensorRT without TensorRT: the Q/DQ graph, checked by its rules, in a folder that builds itself on the device.

The Q/DQ graph is what TensorRT reads, and its twin is the reference of the engine that TensorRT will make of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy import __version__
from zsq_deploy.artifact import digest_file, write_json
from zsq_deploy.backends.base import Engine, Target
from zsq_deploy.backends.measured import Choice, Measured
from zsq_deploy.backends.provenance import check_exclusions, check_provenance
from zsq_deploy.backends.tensorrt.bundle import write_bundle
from zsq_deploy.backends.tensorrt.fusion import describe_fusion, expect_fusion
from zsq_deploy.backends.tensorrt.implicit import REFERENCE, write_implicit
from zsq_deploy.backends.tensorrt.lint import lint
from zsq_deploy.backends.tensorrt.making import Job, outputs_of, quality_of
from zsq_deploy.backends.tensorrt.options import CALIBRATORS, BuildOptions
from zsq_deploy.backends.tensorrt.ranges import calibrate
from zsq_deploy.backends.tensorrt.writing import write_network
from zsq_deploy.errors import CalibrationError, EngineError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress

__all__ = ["BuildOptions", "build", "candidates", "choose"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_SAMPLES = 8
"""Samples in the folder, on which the engine is compared on the device."""

_SHOWN = 12
"""Kernels that are listed one by one on the console; the manifest lists all."""


def build(
    model: Any,
    ranges: Any,
    target: Target,
    folder: Path,
    *,
    options: BuildOptions | None = None,
    calibration: Any = None,
    validation: Any = None,
    probes: Mapping[str, Array] | None = None,
    progress: Progress = SILENT,
) -> Engine:
    """Turn a model into a folder that is carried to the device.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        ranges: A :class:`~zsq_deploy.quant.Ranges` of ``model.folded().graph``, or the name of a calibrator of TensorRT
            (:data:`~zsq_deploy.backends.tensorrt.options.CALIBRATORS`), which is computed on the calibration set; not read with ``w4a32``.
        target: One of the ``tensorrt-...`` targets.
        folder: Where the files go: ``qdq.onnx`` (``implicit``: ``network.onnx``), ``float.onnx``, ``manifest.json``, ``trtexec.sh``,
            ``engine.py``, ``README.md``, with a calibration set ``samples.npz``, and for TensorRT 8 and 10 the same ranges as a calibration
            cache with its binding, as the graph that the cache means (``implicit.onnx``), and as a table of ONNX Runtime.
        options: What to quantize and how.
        calibration: The calibration set: biases are corrected on it, and a few of its images are the samples.
        validation: Not read; nothing here looks at labels.
        probes: Structured pictures (input name -> array): what is decided by measuring is decided on them and on the end of the set.
        progress: Watches.

    Returns:
        The engine; its `path` is the network that TensorRT builds from on the device, its `qdq_path` the Q/DQ graph that says what the
        engine computes (the same file, unless the engine is made with a cache).

    Raises:
        StaleArtifactError: Ranges or set belong to another model.
        CalibrationError: A tensor has no range, or a calibrator has no images.
        UsageError: Options that do not fit the network.
        EngineError: Nothing can be quantized, or TensorRT would refuse the graph.
    """
    del validation
    options = options or BuildOptions()
    folder = Path(folder)
    folded: Graph = model.folded().graph
    check_provenance(model, folded, ranges, calibration)
    check_exclusions(folded, options.exclude)
    with progress.task(f"quantize for {target.name}", 4) as task:
        ranges = _ranges(model, ranges, options, calibration, progress)
        job, searched = Job(model, ranges, target, calibration, probes, progress).searched(options)
        ranges = job.ranges
        made = job.implicit(options) if options.implicit else job.explicit(options)
        task.advance(step="placed")
        notes = [*searched, *made.notes]
        findings = [] if options.implicit else lint(made.network, target)
        broken = [item for item in findings if item.severity == "error"]
        if broken:
            raise EngineError(
                f"TensorRT would refuse this graph: {broken[0].message}",
                where=broken[0].node or folded.proto.graph.name,
                remedy=broken[0].remedy,
            )
        notes.extend(f"{item.node}: {item.message}; {item.remedy}" for item in findings[:3])
        folder.mkdir(parents=True, exist_ok=True)
        float_path, path = folder / "float.onnx", folder / ("network.onnx" if options.implicit else "qdq.onnx")
        write_network(folded, float_path, target)
        write_network(made.network, path, target)
        reference_path, implicit, more = path, None, list[str]()
        if job.has_cache(options):
            network = made.network if options.implicit else folded
            digest = str(getattr(ranges, "set_digest", "") or getattr(calibration, "digest", "") or "")
            floats = options.exclude if options.implicit else ()
            implicit = write_implicit(folder, network, ranges, target, set_digest=digest, floats=floats)
            notes.extend(["no calibration cache was written: no activation has a range"] if implicit is None else [])
        record: dict[str, Any] = {}
        if implicit is not None:
            more.extend(implicit.files)
            notes.extend(implicit.notes)
            if implicit.reference is not None:
                write_network(implicit.reference.graph, folder / REFERENCE, target)
                more.append(REFERENCE)
                record = {**implicit.reference.record(), **job.judged(implicit.reference.graph)}
        if options.implicit:
            reference_path = folder / REFERENCE
        task.advance(step="written")
        samples = expected = None
        if calibration is not None:
            parts = list(calibration.take(0, min(_SAMPLES, len(calibration))).batches(job.size))
            samples = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            answers = list(outputs_of(made.reference, parts))
            expected = {name: np.concatenate([part[name] for part in answers]) for name in answers[0]}
        groups = expect_fusion(made.reference)
        summary = describe_fusion(groups).splitlines()[-1]
        bundle = write_bundle(
            folder,
            path,
            target,
            mode="implicit" if options.implicit else "explicit",
            float_network=float_path,
            cache=None if implicit is None else implicit.cache,
            samples=samples,
            expected=expected,
            more=more,
            notes=(summary,),
        )
        task.advance(step="bundled")
        choices = {
            **made.options.describe(),
            "mode": "implicit" if options.implicit else "explicit",
            "ranges": str(getattr(ranges, "method", "") or type(ranges).__name__),
            "ranges_digest": str(getattr(ranges, "digest", "") or ""),
            "set_digest": str(getattr(calibration, "digest", "") or ""),
            # Whether a correction helps is judged by the reference, here; nothing can be run to judge it again.
            "corrects_biases": True,
            **made.record,
            "expected_kernels": [group.to_json() for group in groups],
            "expectation": describe_fusion(groups, most=_SHOWN).splitlines(),
            "implicit": record,
            "findings": [f"{item.node}: {item.rule}" for item in findings],
            "notes": [*notes, summary],
        }
        manifest = {
            "schema_version": 1,
            "target": target.name,
            "model": {"name": model.name, "digest": model.digest},
            "engine": _entry(path),
            "qdq": _entry(reference_path),
            "float": _entry(float_path),
            "bundle": list(bundle.files),
            "choices": choices,
            "versions": {"zsq-deploy": __version__, "onnx": onnx.__version__, "numpy": np.__version__},
        }
        write_json(folder / "manifest.json", json.loads(json.dumps(manifest, default=str)))
        task.advance(step="done")
    return Engine(path=path, qdq_path=reference_path, target=target, float_path=float_path, choices=choices)


def candidates(graph: Graph, target: Target, base: BuildOptions | None = None) -> list[BuildOptions]:
    """Ways of quantizing that are worth a measurement: ours alone, because nothing can be measured away from the device."""
    del graph, target
    return [base or BuildOptions()]


def choose(
    model: Any,
    ranges: Any,
    target: Target,
    folder: Path,
    *,
    images: Iterable[Feeds],
    options: BuildOptions | None = None,
    calibration: Any = None,
    validation: Any = None,
    probes: Mapping[str, Array] | None = None,
    refine: Any = None,
    tolerance_agreement: float = 0.0,
    threads: int = 1,
    progress: Progress = SILENT,
) -> Choice:
    """Build the one candidate, and say how far its reference is from the float network; its latency is not known here.

    Args:
        model: The model.
        ranges: As for :func:`build`.
        target: The target.
        folder: Where the engine goes.
        images: Batches of inputs.
        options: As for :func:`build`.
        calibration: As for :func:`build`.
        validation: Not read.
        probes: As for :func:`build`.
        refine: Not used: biases are corrected and judged by :func:`build`.
        tolerance_agreement: Not used; there is one candidate.
        threads: Not used; nothing is timed.
        progress: Watches.

    Raises:
        CalibrationError: There are no images to compare on.
    """
    del validation, refine, tolerance_agreement, threads
    option = candidates(model.folded().graph, target, options)[0]
    batches = [dict(batch) for batch in images]
    if not batches:
        raise CalibrationError(
            "there are no images to compare engines on", where="images", remedy="give at least one batch of inputs"
        )
    engine = build(
        model, ranges, target, folder, options=option, calibration=calibration, probes=probes, progress=progress
    )
    agreement, ratio = quality_of(model, Graph.load(engine.qdq_path), batches)
    unknown = float("nan")
    chosen = Measured(option, unknown, unknown, agreement, ratio, engine.path.stat().st_size)
    note = (
        f"the reference of the engine is {ratio:.1f} dB from the float network on synthetic images (same class: {agreement:.1%}); "
        "that is the twin's word, before any engine was built"
    )
    return Choice(engine, chosen, (), slower_than_float=False, notes=(note,))


def _ranges(model: Any, ranges: Any, options: BuildOptions, calibration: Any, progress: Progress) -> Any:
    """The ranges, computed on the set where a calibrator was named."""
    if options.weight_only or not (ranges is None or isinstance(ranges, str)):
        return ranges
    if ranges not in CALIBRATORS:
        raise UsageError(
            f"{ranges} is no range method of TensorRT's graphs",
            where="--ranges",
            remedy=f"choose auto, minmax, percentile, entropy, mse, bn-analytic, {', '.join(CALIBRATORS)}",
        )
    if calibration is None or len(calibration) == 0:
        raise CalibrationError(
            f"{ranges} reads images, and there are none", where="--ranges", remedy="give a calibration set"
        )
    return calibrate(
        model.folded().graph,
        calibration,
        ranges,
        micro_batch=16 if model.dynamic_batch else 1,
        model_digest=model.digest,
        progress=progress,
    )


def _entry(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": digest_file(path)}
