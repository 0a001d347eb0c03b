"""Preparing an engine for TensorRT without TensorRT: the Q/DQ graph, checked by its rules, in a folder that builds itself on the device.

The Q/DQ graph is what TensorRT reads, and its twin is the reference of the engine that TensorRT will make of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from zsq_deploy import __version__
from zsq_deploy.artifact import atomic_path, digest_file, write_json
from zsq_deploy.backends.base import Engine, Target
from zsq_deploy.backends.measured import Choice, Measured, quality
from zsq_deploy.backends.provenance import check_exclusions, check_provenance
from zsq_deploy.backends.tensorrt.bundle import write_bundle
from zsq_deploy.backends.tensorrt.cache import CacheBinding, CalibrationCache, binding_path, write_cache
from zsq_deploy.backends.tensorrt.fusion import describe_fusion, expect_fusion
from zsq_deploy.backends.tensorrt.lint import lint
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.ort_table import FILES, write_table
from zsq_deploy.backends.tensorrt.placement import Placed, place_int4, place_qdq
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.errors import CalibrationError, EngineError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import correct_bias

__all__ = ["BuildOptions", "build", "candidates", "choose"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_BIAS_IMAGES = 64
_JUDGE_IMAGES = 16
_SAMPLES = 8
"""Samples in the folder, on which the engine is compared on the device."""

CACHE_VERSION = MappingProxyType({8: "8.6.2", 10: "10.3.0"})
"""Generation -> version that the cache is written for: those of JetPack 6.0, and of 6.1 and 6.2. For any other the first line is rewritten."""

TABLE_FOLDER = "onnxruntime"
"""Folder of ONNX Runtime's table, whose third file is called ``calibration.cache`` too."""

_TOLERANCE_DB = 0.3
"""How much SQNR a bias correction may cost before it is rejected: less is noise."""


def build(
    model: Any,
    ranges: Any,
    target: Target,
    folder: Path,
    *,
    options: BuildOptions | None = None,
    calibration: Any = None,
    progress: Progress = SILENT,
) -> Engine:
    """Turn a model into a folder that is carried to the device.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        ranges: A :class:`~zsq_deploy.quant.Ranges` of ``model.folded().graph``; not read with ``w4a32``.
        target: One of the ``tensorrt-...`` targets.
        folder: Where the files go: ``qdq.onnx``, ``float.onnx``, ``manifest.json``, ``trtexec.sh``, ``engine.py``, ``README.md``, with
            a calibration set ``samples.npz``, and for TensorRT 8 and 10 the same ranges as a calibration cache with its binding and as
            a table of ONNX Runtime.
        options: What to quantize and how.
        calibration: The calibration set: biases are corrected on it, and a few of its images are the samples.
        progress: Watches.

    Returns:
        The engine; its `path` is the Q/DQ graph, from which TensorRT builds on the device.

    Raises:
        StaleArtifactError: Ranges or set belong to another model.
        CalibrationError: A tensor has no range.
        UsageError: Options that do not fit the network.
        EngineError: Nothing can be quantized, or TensorRT would refuse the graph.
    """
    options = options or BuildOptions()
    folder = Path(folder)
    folded: Graph = model.folded().graph
    check_provenance(model, folded, ranges, calibration)
    check_exclusions(folded, options.exclude)
    if isinstance(ranges, str) or (ranges is None and not options.weight_only):
        raise UsageError(
            f"{ranges} is no range method of TensorRT's graphs",
            where="--ranges",
            remedy="choose auto, minmax, percentile, entropy, mse or bn-analytic",
        )
    with progress.task(f"quantize for {target.name}", 4) as task:
        size = 8 if model.dynamic_batch else 1
        placed = (
            place_int4(folded, target, options) if options.weight_only else place_qdq(folded, ranges, target, options)
        )
        task.advance(step="placed")
        notes = [*placed.notes]
        if options.bias_correction and not options.biases and calibration is not None and not options.weight_only:
            placed, options, said = _correct(model, ranges, target, options, placed, calibration, size, progress)
            notes.append(said)
        task.advance(step="biases")
        findings = lint(placed.graph, target)
        broken = [item for item in findings if item.severity == "error"]
        if broken:
            raise EngineError(
                f"TensorRT would refuse this graph: {broken[0].message}",
                where=broken[0].node or folded.proto.graph.name,
                remedy=broken[0].remedy,
            )
        notes.extend(f"{item.node}: {item.message}; {item.remedy}" for item in findings[:3])
        folder.mkdir(parents=True, exist_ok=True)
        float_path, path = folder / "float.onnx", folder / "qdq.onnx"
        _write(folded, float_path, target)
        _write(placed.graph, path, target)
        cache: Path | None = None
        more: tuple[str, ...] = ()
        if isinstance(ranges, Mapping) and generation(target) < 11 and not options.weight_only:
            cache, more, said_of_cache = _implicit(folder, folded, ranges, target, calibration)
            notes.extend(said_of_cache)
        task.advance(step="written")
        samples = expected = None
        if calibration is not None:
            parts = list(calibration.take(0, min(_SAMPLES, len(calibration))).batches(size))
            samples = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            made = list(_outputs(placed.graph, parts))
            expected = {name: np.concatenate([part[name] for part in made]) for name in made[0]}
        groups = expect_fusion(placed.graph)
        summary = describe_fusion(groups).splitlines()[-1]
        bundle = write_bundle(
            folder,
            path,
            target,
            float_network=float_path,
            cache=cache,
            samples=samples,
            expected=expected,
            more=more,
            notes=(summary,),
        )
        choices = {
            **options.describe(),
            "ranges": str(getattr(ranges, "method", "") or type(ranges).__name__),
            "ranges_digest": str(getattr(ranges, "digest", "") or ""),
            "set_digest": str(getattr(calibration, "digest", "") or ""),
            # Whether a correction helps is judged by the reference, here; nothing can be run to judge it again.
            "corrects_biases": True,
            **placed.record(),
            "expected_kernels": [group.to_json() for group in groups],
            "findings": [f"{item.node}: {item.rule}" for item in findings],
            "notes": [*notes, summary],
        }
        manifest = {
            "schema_version": 1,
            "target": target.name,
            "model": {"name": model.name, "digest": model.digest},
            "engine": _entry(path),
            "qdq": _entry(path),
            "float": _entry(float_path),
            "bundle": list(bundle.files),
            "choices": choices,
            "versions": {"zsq-deploy": __version__, "onnx": onnx.__version__, "numpy": np.__version__},
        }
        write_json(folder / "manifest.json", json.loads(json.dumps(manifest, default=str)))
        task.advance(step="done")
    return Engine(path=path, qdq_path=path, target=target, float_path=float_path, choices=choices)


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
        threads: Not used; nothing is timed.
        progress: Watches.

    Raises:
        CalibrationError: There are no images to compare on.
    """
    del threads
    option = candidates(model.folded().graph, target, options)[0]
    batches = [dict(batch) for batch in images]
    if not batches:
        raise CalibrationError(
            "there are no images to compare engines on", where="images", remedy="give at least one batch of inputs"
        )
    engine = build(model, ranges, target, folder, options=option, calibration=calibration, progress=progress)
    agreement, ratio = _quality(model, Graph.load(engine.qdq_path), batches)
    unknown = float("nan")
    chosen = Measured(option, unknown, unknown, agreement, ratio, engine.path.stat().st_size)
    note = (
        f"the reference of the engine is {ratio:.1f} dB from the float network on synthetic images (same class: {agreement:.1%}); "
        "TensorRT itself has not run it"
    )
    return Choice(engine, chosen, (), slower_than_float=False, notes=(note,))


def _correct(
    model: Any,
    ranges: Any,
    target: Target,
    options: BuildOptions,
    placed: Placed,
    calibration: Any,
    size: int,
    progress: Progress,
) -> tuple[Placed, BuildOptions, str]:
    """The graph with corrected biases if they help on images at the other end of the set, else as it was; and what to say of it."""
    looked_at = calibration.take(0, min(_BIAS_IMAGES, len(calibration))).batches(size)
    biases = correct_bias(model.folded(), placed.graph, looked_at, progress=progress)
    changed = options.with_(biases=biases)
    second = place_qdq(model.folded().graph, ranges, target, changed)
    judge = [dict(batch) for batch in calibration.take(max(0, len(calibration) - _JUDGE_IMAGES)).batches(size)]
    before, after = (_quality(model, graph, judge)[1] for graph in (placed.graph, second.graph))
    words = f"biases corrected: {after:.1f} dB against {before:.1f} dB without, on synthetic images"
    if after < before - _TOLERANCE_DB:
        return placed, options, f"{words}: rejected"
    return second, changed, words


def _implicit(
    folder: Path, folded: Graph, ranges: Mapping[str, tuple[float, float]], target: Target, calibration: Any
) -> tuple[Path | None, tuple[str, ...], tuple[str, ...]]:
    """Write the ranges for those who give TensorRT the float network: its own cache, and the table of ONNX Runtime's provider.

    Returns:
        The cache (``None``: no tensor has a range), the other files by their path in the folder, and what to say.
    """
    known = {name for node in folded for name in node.output} | {spec.name for spec in folded.inputs}
    # Names with a line break do not fit in a cache; no exporter writes them.
    names = [name for name in ranges if name in known and not {"\n", "\r"} & set(name)]
    cache = CalibrationCache.from_ranges(ranges, version=CACHE_VERSION[generation(target)], names=names)
    if not len(cache):
        return None, (), ("no calibration cache was written: no activation has a range",)
    path = folder / "calibration.cache"
    digest = str(getattr(ranges, "set_digest", "") or getattr(calibration, "digest", "") or "")
    method = str(getattr(ranges, "method", "") or "ranges")
    write_cache(path, cache, CacheBinding(folded.digest, digest, method))
    write_table(folder / TABLE_FOLDER, {name: ranges[name] for name in names})
    left = cache.left_out
    said = (f"zero on every image, so without a scale in the calibration cache: {', '.join(left[:5])}",) if left else ()
    return path, (binding_path(path).name, *(f"{TABLE_FOLDER}/{name}" for name in FILES)), said


def _quality(model: Any, graph: Graph, batches: Iterable[Feeds]) -> tuple[float, float]:
    """Top-1 agreement and SQNR in dB of a Q/DQ graph's twin against the float network."""
    held = list(batches)
    return quality(list(_outputs(graph, held)), list(_outputs(model.folded().graph, held)))


def _outputs(graph: Graph, batches: Iterable[Feeds]) -> Iterable[dict[str, Array]]:
    twin = Twin(graph, device="cpu")
    with torch.no_grad():
        for feeds in batches:
            found = twin.run({name: torch.from_numpy(np.array(value)) for name, value in feeds.items()})
            yield {name: value.numpy() for name, value in found.items()}


def _write(graph: Graph, path: Path, target: Target) -> None:
    proto = graph.editable()
    proto.ir_version = max(target.ir_version, 10) if graph.opset >= 21 else target.ir_version
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def _entry(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": digest_file(path)}
