"""Building an engine: somebody decides what is quantized and how, one writer makes the files.

Our own Q/DQ placement, NNCF and POT each give a :class:`~zsq_deploy.backends.openvino.design.Design`, whose Q/DQ graph is the contract.
Its scales are settled onto numbers with which every arithmetic agrees, the graph is kept as ``qdq.onnx``, and OpenVINO reads exactly
that graph into the engine. Without exact scales, what NNCF or POT wrote is the engine, byte for byte in its arithmetic.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy import __version__
from zsq_deploy.artifact import atomic_path, digest_bytes, digest_file, digest_json, write_json
from zsq_deploy.backends.base import Engine, Target, ValidationData
from zsq_deploy.backends.openvino.convert import convert, read, save, weights_of
from zsq_deploy.backends.openvino.design import Design
from zsq_deploy.backends.openvino.fusing import fuse_residuals, same_outputs
from zsq_deploy.backends.openvino.int4 import float_weights, int4_storage, pack, store_int4
from zsq_deploy.backends.openvino.low_bits import low_bit_graph, places_of
from zsq_deploy.backends.openvino.merging import drop_merged_pairs
from zsq_deploy.backends.openvino.options import BITS, BuildOptions
from zsq_deploy.backends.openvino.reading import FAKE_QUANT
from zsq_deploy.backends.openvino.roundings import drop_float_roundings
from zsq_deploy.backends.openvino.runner import OvRunner
from zsq_deploy.backends.openvino.runtime import version
from zsq_deploy.backends.openvino.targets import DEVICE
from zsq_deploy.backends.openvino.weight_only import design_weight_only
from zsq_deploy.backends.provenance import check_exclusions, check_provenance
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import BiasSite, apply_biases, bias_sites
from zsq_deploy.quant.reconstruct.deployed import Places

__all__ = ["BuildOptions", "build", "places"]

Array = npt.NDArray[Any]

_ROUTES = {
    "qdq": ("zsq_deploy.backends.openvino.qdq_route", "design_qdq"),
    "nncf": ("zsq_deploy.backends.openvino.nncf_route", "design_nncf"),
    "pot": ("zsq_deploy.backends.openvino.pot", "design_pot"),
}
_REMEMBERED = 2
_PROBES = 4
"""Samples on which an engine with residuals inside convolutions has to give the numbers of the plain one, bit for bit."""


@dataclass(frozen=True)
class _Remembered:
    """A design and the bytes of the vendor's files: the pipeline builds three times and only changes biases in between."""

    design: Design
    vendor: tuple[bytes, bytes] | None


_designs: OrderedDict[str, _Remembered] = OrderedDict()


def build(
    model: Any,
    ranges: Any,
    target: Target,
    folder: Path,
    *,
    options: BuildOptions | None = None,
    calibration: Any = None,
    validation: ValidationData | None = None,
    probes: Mapping[str, Array] | None = None,
    progress: Progress = SILENT,
) -> Engine:
    """Turn a model into an engine.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        ranges: A :class:`~zsq_deploy.quant.Ranges` of ``model.folded().graph``; NNCF and POT do without.
        target: What to build for.
        folder: Where the files go: ``engine.xml``, ``engine.bin``, ``qdq.onnx``, ``float.onnx``, ``manifest.json``, and
            ``vendor.xml`` with ``vendor.bin`` where NNCF or POT quantized.
        options: Who quantizes, what and how. With ``quantizer="auto"`` it is our own placement (only
            :func:`~zsq_deploy.backends.openvino.choose.choose` measures).
        calibration: The calibration set; NNCF and POT read its images.
        validation: What accuracy control measures on.
        probes: Structured pictures that NNCF and POT look at beside the set, so that their ranges are covered: input name -> array.
        progress: Watches.

    Raises:
        StaleArtifactError: Ranges or set belong to another model.
        CalibrationError: A tensor has no range, or the set is missing.
        EngineError: Nothing can be quantized, or OpenVINO, NNCF or POT gave up.
        UsageError: Options that do not fit the network.
    """
    options = options or BuildOptions()
    if options.quantizer == "auto":
        options = options.with_(quantizer="qdq")
    if options.numbers is None and options.bits.lower() not in BITS:
        raise UsageError(
            f"{options.bits} engines are built from numbers that were found before",
            where="BuildOptions.numbers",
            remedy="find them on places(...) with zsq_deploy.quant.reconstruct.deployed.find_numbers",
        )
    folder = Path(folder)
    folded: Graph = model.folded().graph
    check_provenance(model, folded, ranges, calibration)
    check_exclusions(folded, options.exclude)
    if options.quantizer in ("nncf", "pot") and calibration is None and options.weight_only is None:
        raise CalibrationError(
            f"{options.quantizer.upper()} reads a calibration set, and none was given",
            where="--quantizer",
            remedy="take a synthesis method that makes images, or --quantizer qdq",
        )
    if isinstance(ranges, str):
        raise UsageError(
            f"{ranges} is no range method of OpenVINO",
            where="--ranges",
            remedy="choose auto, minmax, percentile, entropy, mse or bn-analytic",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with progress.task(f"quantize for {target.name}", 4) as task:
        float_path = folder / "float.onnx"
        _write(folded, float_path)
        task.advance(step=options.quantizer)
        design = _design(model, ranges, calibration, target, options, folder, validation, probes, progress)
        task.advance(step="scales")
        if options.weight_only is None:
            qdq, record = _finish(design, folded, target, options)
        else:
            qdq, record = design.qdq, {"notes": list(design.notes)}
        qdq_path = folder / "qdq.onnx"
        _write(qdq, qdq_path)
        task.advance(step="convert")
        engine_path = folder / "engine.xml"
        keeps = _keeps_vendor(design, options)
        if keeps and design.vendor_ir is not None:
            save(read(design.vendor_ir), engine_path)
        else:
            record["residuals_added_in_convolutions"] = _write_engine(qdq, engine_path, target, options, ranges)
        choices = {
            **options.describe(),
            "ranges": str(getattr(ranges, "method", "") or type(ranges).__name__),
            "ranges_digest": str(getattr(ranges, "digest", "") or ""),
            "set_digest": str(getattr(calibration, "digest", "") or ""),
            "engine_from": "the vendor's IR as it is" if keeps else "the Q/DQ graph",
            # The vendor corrected them for its own rounding: settled scales round anew, and their means have to be corrected anew.
            "corrects_biases": design.corrects_biases and keeps,
            "decided": dict(design.record),
            **record,
        }
        manifest: dict[str, Any] = {
            "schema_version": 1,
            "target": target.name,
            "model": {"name": model.name, "digest": model.digest},
            "engine": _entry(engine_path),
            "weights": _entry(weights_of(engine_path)),
            "qdq": _entry(qdq_path),
            "float": _entry(float_path),
            "choices": choices,
            "versions": _versions(),
        }
        if design.vendor_ir is not None:
            manifest["vendor"] = _entry(design.vendor_ir)
            manifest["vendor_weights"] = _entry(weights_of(design.vendor_ir))
        write_json(folder / "manifest.json", json.loads(json.dumps(manifest, default=str)))
        task.advance(step="done")
    return Engine(
        path=engine_path,
        qdq_path=qdq_path,
        target=target,
        float_path=float_path,
        choices=choices,
        weights_path=weights_of(engine_path),
        vendor_path=design.vendor_ir,
    )


def places(
    model: Any,
    ranges: Any,
    target: Target,
    *,
    options: BuildOptions | None = None,
    calibration: Any = None,
    progress: Progress = SILENT,
) -> Places:
    """Our 8-bit Q/DQ graph of a network, on which numbers of fewer bits can be found; arguments as for :func:`build`."""
    del calibration
    options = (options or BuildOptions()).with_(quantizer="qdq", bits="w8a8", rounding="nearest")
    with tempfile.TemporaryDirectory(prefix="zsq-ov-") as scratch:
        design = _design(model, ranges, None, target, options, Path(scratch), None, None, progress)
    return places_of(design, model.folded().graph, target, options)


def _write_engine(qdq: Graph, path: Path, target: Target, options: BuildOptions, ranges: Any) -> bool:
    """Convert a Q/DQ graph into the engine, with residuals added inside convolutions where that changes no number.

    Returns:
        Whether the engine asks for that; its fake-quant form is the Q/DQ graph then, as the engine's file says.
    """

    def converted(graph: Graph) -> Any:
        model = convert(graph, batch=1 if target.session.get(DEVICE) == "NPU" else None)
        if options.stores_int4:
            pack(model)
        return model

    save(converted(qdq), path)
    if not options.exact_scales or target.session.get(DEVICE) != "CPU":
        return False
    fused = fuse_residuals(qdq)
    if fused is qdq:
        return False
    model = converted(fused)
    model.set_rt_info("qdq.onnx", list(FAKE_QUANT))
    with tempfile.TemporaryDirectory(prefix=".fused-", dir=path.parent) as scratch:
        trial = Path(scratch) / path.name
        save(model, trial)
        feeds = _probe(qdq, ranges)
        if not same_outputs(OvRunner(path, target).run(feeds), OvRunner(trial, target).run(feeds)):
            return False
    save(model, path)
    return True


def _probe(graph: Graph, ranges: Any) -> dict[str, Array]:
    """Noise that fills the ranges of the inputs (-3 .. 3 where none is known), and goes a little beyond."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in graph.inputs:
        low, high = ranges.get(spec.name, (-3.0, 3.0)) if ranges is not None else (-3.0, 3.0)
        shape = tuple(size or (_PROBES if axis == 0 else 1) for axis, size in enumerate(spec.shape))
        values = rng.uniform(1.1 * float(low), 1.1 * float(high), shape)
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds


def _entry(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": digest_file(path)}


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {"zsq-deploy": __version__, "openvino": version(), "onnx": onnx.__version__, "numpy": np.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["nncf"] = metadata.version("nncf")
    return found


def _write(graph: Graph, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(graph.proto.SerializeToString(deterministic=True))


def _keeps_vendor(design: Design, options: BuildOptions) -> bool:
    """Whether the vendor's IR is the engine: nothing of ours changes its numbers."""
    if options.weight_only is not None:
        return True
    return design.vendor_ir is not None and not (options.exact_scales or options.biases or options.stores_int4)


def _identity(
    model: Any,
    ranges: Any,
    calibration: Any,
    target: Target,
    options: BuildOptions,
    probes: Mapping[str, Array] | None = None,
    validation: ValidationData | None = None,
) -> str:
    """Everything that a design depends on: not the biases, which are added to it, nor how its scales are settled."""
    told = options.with_(biases={}, exact_scales=False, numbers=None, label="").describe()
    pairs = None if ranges is None else sorted((name, float(low), float(high)) for name, (low, high) in ranges.items())
    seen = {name: digest_bytes(np.ascontiguousarray(value).tobytes()) for name, value in sorted((probes or {}).items())}
    judged: list[str] = []
    if validation is not None:
        arrays = [value for batch in validation.batches for _, value in sorted(batch.items())]
        labels = [np.asarray(part) for part in validation.labels or ()]
        judged = [digest_bytes(np.ascontiguousarray(value).tobytes()) for value in (*arrays, *labels)]
    source = str(getattr(calibration, "digest", "") or "")
    return digest_json([model.digest, target.name, pairs, source, told, seen, judged])


def _design(
    model: Any,
    ranges: Any,
    calibration: Any,
    target: Target,
    options: BuildOptions,
    folder: Path,
    validation: ValidationData | None,
    probes: Mapping[str, Array] | None,
    progress: Progress,
) -> Design:
    """What the chosen route gives; the last few are remembered, because only biases change between the builds of one run."""
    vendor_path = folder / "vendor.xml"
    if options.weight_only is not None:
        return design_weight_only(model, target, options, folder, progress=progress)
    key = _identity(model, ranges, calibration, target, options, probes, validation)
    found = _designs.get(key)
    if found is not None:
        _designs.move_to_end(key)
        if found.vendor is None:
            return found.design
        for data, path in zip(found.vendor, (vendor_path, weights_of(vendor_path)), strict=True):
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        return replace(found.design, vendor_ir=vendor_path)
    module, name = _ROUTES[options.quantizer]
    route = getattr(importlib.import_module(module), name)
    plain = options.with_(biases={})
    if options.quantizer == "qdq":
        design: Design = route(model, ranges, target, plain, progress=progress)
    else:
        with tempfile.TemporaryDirectory(prefix=".vendor-", dir=folder) as scratch:
            shown: dict[str, Any] = {"validation": validation, "probes": probes}
            design = route(model, calibration, target, plain, Path(scratch), progress=progress, **shown)
            if design.vendor_ir is not None:
                for source, place in (
                    (weights_of(design.vendor_ir), weights_of(vendor_path)),
                    (design.vendor_ir, vendor_path),
                ):
                    shutil.move(source, place)
                design = replace(design, vendor_ir=vendor_path)
    vendor = None
    if design.vendor_ir is not None:
        vendor = (vendor_path.read_bytes(), weights_of(vendor_path).read_bytes())
    _designs[key] = _Remembered(design, vendor)
    while len(_designs) > _REMEMBERED:
        _designs.popitem(last=False)
    return design


def _finish(design: Design, folded: Graph, target: Target, options: BuildOptions) -> tuple[Graph, dict[str, Any]]:
    """The design's graph with corrected biases and settled scales, and what to write down about it."""
    if options.numbers is not None:
        written, told = low_bit_graph(design, folded, target, options, options.numbers)
        return written, {**told, "int4": int4_storage(written).to_json()}
    qdq = design.qdq
    record: dict[str, Any] = {"activation_steps_grew_by": 1.0, "inexact_layers": {}, "notes": list(design.notes)}
    if options.biases:
        qdq = _shift_biases(qdq, folded, options.biases)
    floats = {**_float_weights(folded), **options.weights} if options.quantizer == "qdq" else None
    if options.bits.lower() == "w4a8":
        floats = float_weights(qdq) if floats is None else floats
        qdq = store_int4(qdq, floats)
        record["int4"] = int4_storage(qdq).to_json()
    if options.exact_scales:
        if options.quantizer != "qdq" and target.session.get(DEVICE) == "CPU":
            lean = drop_float_roundings(qdq)
            qdq = lean.graph
            record["roundings_left_out"] = {"everywhere": list(lean.dropped), "for_float_readers": list(lean.bypassed)}
            record["notes"].extend(lean.notes(options.quantizer.upper()))
        qdq, sums = drop_merged_pairs(qdq)
        record["sums_in_convolutions"] = list(sums)
        settle = importlib.import_module("zsq_deploy.quant.settle").settle
        settled = settle(qdq, activation=target.activation, weight=target.weight, float_weights=floats)
        qdq = settled.graph
        record["activation_steps_grew_by"] = settled.coarser
        record["inexact_layers"] = dict(settled.inexact)
        record["notes"].extend(settled.notes)
    if options.rounding == "squant":  # on the final scales, so that nothing is rounded again
        squant = importlib.import_module("zsq_deploy.quant.algebra").squant
        known = {name: weight for name, weight in (floats or {}).items() if name in qdq}
        for name in known:  # replaced weights go by the name of the constant
            known[name] = options.weights.get(folded.node(name).input[1], known[name])
        qdq = squant(qdq, known)
    return qdq, record


def _float_weights(folded: Graph) -> dict[str, Array]:
    """Name of a layer, and of its weight -> the float numbers."""
    found: dict[str, Array] = {}
    for node in folded.nodes:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            weight = folded.constant(node.input[1])
            if weight is not None:
                found[node.name] = found[node.input[1]] = weight
    return found


def _shift_biases(qdq: Graph, folded: Graph, corrected: Mapping[str, Array]) -> Graph:
    """Move biases of a Q/DQ graph by what a correction added to the float network's.

    The vendor may have changed the biases before; the correction was measured on the graph with those, so it is their shift, not
    their value, that counts.
    """
    sites = {key: site for site in bias_sites(folded) for key in (site.node, site.key)}
    changed: dict[str, Array] = {}
    for key, values in corrected.items():
        site = sites.get(key)
        if site is None:
            raise UsageError(
                f"{key!r} is neither a layer nor a bias of this network",
                where="BuildOptions.biases",
                remedy="take the names from `zsq inspect`, or leave the bias out",
            )
        old, where = _present_bias(qdq, site)
        shift = np.asarray(values, np.float64).reshape(-1) - site.bias.astype(np.float64).reshape(-1)
        changed[where] = np.asarray(old.astype(np.float64) + shift.reshape(old.shape), np.float32)
    return apply_biases(qdq, changed)


def _present_bias(qdq: Graph, site: BiasSite) -> tuple[Array, str]:
    """The bias of a layer as the Q/DQ graph has it, and the key that :func:`apply_biases` knows it by."""
    if site.key != site.node:
        value = qdq.constant(site.key)
        return (site.bias if value is None else value), site.key
    node = qdq.node(site.node)
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros_like(site.bias), site.node
    value = qdq.constant(node.input[2])
    if value is None:  # stored as integers
        from zsq_deploy.quant.reader import dequantized_weight

        value = dequantized_weight(qdq, node.input[2])
    return (site.bias if value is None else np.asarray(value)), site.node
