"""Building an engine: ONNX Runtime's ``quantize_static`` quantizes, with ranges, nodes and weight scales that were decided here.

1. Corrected biases and replaced weights are put in; the graph is rewritten (exactly) into the patterns that have integer kernels.
2. The nodes to quantize are chosen; every tensor that they touch gets its range; both are handed over.
3. The quantizer's graph is tidied: no Q/DQ where a float consumer could have the float value, none behind the last matrix product,
   zero padding moved onto the integer side, operator set and IR version stamped on purpose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from zsq_deploy import __version__
from zsq_deploy.artifact import atomic_path, digest_file, write_json
from zsq_deploy.backends.base import Engine, Target
from zsq_deploy.backends.onnxruntime.cache import tensor_ranges, write_cache
from zsq_deploy.backends.onnxruntime.calibrators import METHODS, calibrate
from zsq_deploy.backends.onnxruntime.options import BuildOptions
from zsq_deploy.backends.onnxruntime.placement import Placement, place
from zsq_deploy.backends.onnxruntime.prepare import Prepared, prepare, replace_initializers
from zsq_deploy.backends.onnxruntime.static import quantize_graph
from zsq_deploy.backends.onnxruntime.tidy import IR_OF_OPSET, integer_pads
from zsq_deploy.backends.onnxruntime.weight_only import weights_only
from zsq_deploy.backends.onnxruntime.widen import widen
from zsq_deploy.backends.provenance import check_exclusions, check_provenance
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.constants import own_constants
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.algebra.squant import squant
from zsq_deploy.quant.exact_scales import exact_scales
from zsq_deploy.quant.reconstruct.deployed import Places, pack_int4
from zsq_deploy.quant.reconstruct.template import WEIGHTED
from zsq_deploy.quant.reconstruct.writing import clip_codes

__all__ = ["BuildOptions", "build", "places"]

Array = npt.NDArray[Any]


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
    """Turn a model and its ranges into an engine.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        ranges: A :class:`~zsq_deploy.quant.Ranges` of ``model.folded().graph``, or the name of one of ONNX Runtime's own
            calibrators (``ort-minmax``, ``ort-entropy``, ``ort-percentile``), which then reads `calibration`.
        target: What to build for.
        folder: Where the files go: ``engine.onnx``, ``float.onnx``, the calibration cache and ``manifest.json``.
        options: What to quantize and how.
        calibration: The calibration set; only needed for ONNX Runtime's own calibrators, checked against the model otherwise.
        progress: Watches.

    Returns:
        The engine. Its Q/DQ graph and the file that runs are the same, unless zero channels were added to the latter.

    Raises:
        StaleArtifactError: Ranges, set or a cache in `folder` belong to another model.
        CalibrationError: A tensor has no range, or the set is missing.
        EngineError: Nothing can be quantized, or ONNX Runtime's quantizer gave up.
    """
    options = options or BuildOptions()
    if options.low_bits and options.numbers is None:
        raise UsageError(
            f"{options.bits} engines are built from numbers that were found before",
            where="BuildOptions.numbers",
            remedy="find them on places(...) with zsq_deploy.quant.reconstruct.deployed.find_numbers",
        )
    folder = Path(folder)
    folded: Graph = model.folded().graph
    check_provenance(model, folded, ranges, calibration)
    check_exclusions(folded, options.exclude)
    with progress.task(f"quantize for {target.name}", 4) as task:
        float_path = folder / "float.onnx"
        _save(folded.proto, float_path)
        task.advance(step="prepare")
        if options.weight_only:
            return _weight_only_engine(model, target, folder, options, float_path)
        cache = folder / "calibration_cache.json"
        plan = _plan(model, ranges, target, options, calibration, progress)
        binding = write_cache(cache, plan.prepared.graph, plan.found, plan.ranges, model.digest)
        task.advance(step="quantize_static")
        engine_path = folder / "engine.onnx"
        qdq, proto, added = _engine_graphs(plan, cache, target)
        qdq_path = engine_path
        if qdq is not proto:
            # What is computed, under the names and in the shapes of the network: without added channels, and with every pair of Q and DQ together.
            qdq_path = folder / "qdq.onnx"
            _save(qdq, qdq_path)
        _save(proto, engine_path)
        choices = {
            **options.describe(),
            "ranges": binding["ranges_method"],
            "ranges_digest": binding["ranges_digest"],
            "set_digest": binding["set_digest"],
            "nodes_quantized": len(plan.placement.nodes),
            "float_nodes": dict(plan.placement.skipped),
            "rewrites": [*plan.prepared.rewrites, *added],
            "activation_steps_grew_by": plan.growth,
        }
        engine = Engine(path=engine_path, qdq_path=qdq_path, target=target, float_path=float_path, choices=choices)
        _write_manifest(folder, model, engine, {"cache": binding})
        task.advance(step="done")
    return engine


def _write_manifest(folder: Path, model: Any, engine: Engine, more: Mapping[str, Any]) -> None:
    def entry(path: Path) -> dict[str, str]:
        return {"file": path.name, "sha256": digest_file(path)}

    write_json(
        folder / "manifest.json",
        {
            "schema_version": 1,
            "target": engine.target.name,
            "model": {"name": model.name, "digest": model.digest},
            "engine": entry(engine.path),
            "qdq": entry(engine.qdq_path),
            "float": entry(engine.float_path),
            **more,
            "choices": dict(engine.choices),
            "versions": {
                "zsq-deploy": __version__,
                "onnxruntime": onnxruntime.__version__,
                "onnx": onnx.__version__,
                "numpy": np.__version__,
            },
        },
    )


def _weight_only_engine(model: Any, target: Target, folder: Path, options: BuildOptions, float_path: Path) -> Engine:
    """Narrow weights in blocks, activations in float."""
    folded = replace_initializers(model.folded().graph, options.biases, options.weights)
    made = weights_only(folded, options)
    engine_path, qdq_path = folder / "engine.onnx", folder / "qdq.onnx"
    _save(made.qdq.proto, qdq_path)
    _save(made.engine, engine_path)
    convolutions = [name for name in made.skipped if folded.node(name).op_type in ("Conv", "ConvTranspose")]
    notes = [f"weights only ({options.bits}): {len(made.stored)} matrix products, computed in float32 by MatMulNBits"]
    if convolutions:
        notes.append(f"ONNX Runtime has no convolution with narrow weights: {len(convolutions)} stay in float")
    choices = {
        **options.describe(),
        "weights_stored": list(made.stored),
        "float_nodes": dict(made.skipped),
        "notes": notes,
    }
    engine = Engine(path=engine_path, qdq_path=qdq_path, target=target, float_path=float_path, choices=choices)
    _write_manifest(folder, model, engine, {})
    return engine


@dataclass(frozen=True)
class _Plan:
    """A network just before the quantizer: the rewritten graph, what is quantized of it, and with which ranges."""

    prepared: Prepared
    placement: Placement
    ranges: Any
    found: Mapping[str, tuple[float, float]]
    growth: float
    options: BuildOptions


def _plan(
    model: Any, ranges: Any, target: Target, options: BuildOptions, calibration: Any, progress: Progress
) -> _Plan:
    folded: Graph = model.folded().graph
    corrected = replace_initializers(folded, options.biases, options.weights)
    prepared = prepare(corrected, gates=options.gates, float_heads=options.float_heads)
    placement = place(prepared.graph, options)
    if isinstance(ranges, str):
        ranges = _own_calibrators(model, ranges, folded, calibration, progress)
    known = {**ranges, **prepared.ranges}
    found = tensor_ranges(prepared.graph, placement, known, prepared.aliases, options)
    growth = 1.0
    if options.exact_scales:
        exact = exact_scales(
            prepared.graph,
            found,
            activation=target.activation,
            weight=target.weight,
            nodes=placement.nodes,
            tie_free_sums=target.tie_free_sums,
        )
        found, growth = dict(exact.ranges), exact.coarser
        options = options.with_(weight_scales={**exact.weight_scales, **options.weight_scales})
    return _Plan(prepared, placement, ranges, found, growth, options)


def _engine_graphs(
    plan: _Plan, cache: Path, target: Target
) -> tuple[onnx.ModelProto, onnx.ModelProto, tuple[str, ...]]:
    """The Q/DQ graph, the graph that the runtime gets (the same object where nothing was changed), and the channels added to it."""
    options = plan.options
    if options.numbers is None:
        proto = quantize_graph(plan.prepared, plan.placement, plan.found, cache, target, options)
        if options.rounding == "squant":  # on the final scales, so that nothing is rounded again
            proto = squant(Graph(proto), plan.prepared.graph).proto
        wide, added = widen(proto) if options.widen else (proto, ())
        return proto, (wide if added else proto), added
    eight = _places(plan, cache, target)
    written = options.numbers.rounded(options.numbers.write(eight), eight.floating)
    qdq = _stamped(pack_int4(written, through="int8"))
    cut = clip_codes(written).editable()
    integer_pads(cut)
    wide, added = widen(cut) if options.widen else (cut, ())
    engine = _stamped(pack_int4(Graph(wide), through="int8"))
    same = engine.graph == qdq.graph
    return qdq, (qdq if same else engine), added


def _stamped(graph: Graph) -> onnx.ModelProto:
    proto = graph.editable()
    proto.ir_version = max(proto.ir_version, IR_OF_OPSET[21])
    onnx.checker.check_model(proto)
    return proto


def _places(plan: _Plan, cache: Path, target: Target) -> Places:
    """The 8-bit Q/DQ graph in which every QuantizeLinear has its DequantizeLinear."""
    options = plan.options.with_(rounding="nearest")
    proto = quantize_graph(plan.prepared, plan.placement, plan.found, cache, target, options, pads=False)
    floating = own_constants(plan.prepared.graph, WEIGHTED)
    return Places(floating, Graph(proto), target.activation, target.weight)


def places(
    model: Any,
    ranges: Any,
    target: Target,
    *,
    options: BuildOptions | None = None,
    calibration: Any = None,
    progress: Progress = SILENT,
) -> Places:
    """The 8-bit Q/DQ graph of a network, on which numbers of fewer bits can be found; arguments as for :func:`build`."""
    with tempfile.TemporaryDirectory(prefix="zsq-ort-") as scratch:
        cache = Path(scratch) / "calibration_cache.json"
        plan = _plan(model, ranges, target, options or BuildOptions(), calibration, progress)
        write_cache(cache, plan.prepared.graph, plan.found, plan.ranges, model.digest)
        return _places(plan, cache, target)


def _own_calibrators(model: Any, method: str, folded: Graph, calibration: Any, progress: Progress) -> Any:
    if method not in METHODS:
        raise UsageError(
            f"unknown calibrator {method!r}",
            where="ranges",
            remedy=f"choose one of {', '.join(METHODS)}, or give ranges",
        )
    if calibration is None:
        raise CalibrationError(
            f"{method} reads a calibration set, and none was given",
            where="calibration",
            remedy="synthesize one first (`zsq synth`)",
        )
    return calibrate(folded, calibration, method, progress=progress, model_digest=model.digest)


def _save(proto: onnx.ModelProto, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
