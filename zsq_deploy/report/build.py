"""From what was measured to the parts of the report.

Each function takes the results of :mod:`zsq_deploy.verify` and gives the section as a JSON value with the keys of the schema,
so that a pipeline only puts sections together; :func:`finish` checks the whole.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from zsq_deploy import __version__
from zsq_deploy.artifact import digest_file
from zsq_deploy.report.engine_schema import AccuracyControl
from zsq_deploy.report.schema import SCHEMA_VERSION, Report, parse
from zsq_deploy.verify.accuracy import Evaluation
from zsq_deploy.verify.divergence import Divergence, TensorDifference
from zsq_deploy.verify.gates import GateResult, Gates, evaluate_gates
from zsq_deploy.verify.latency import WHAT_IS_TIMED, Comparison
from zsq_deploy.verify.machine import machine_info
from zsq_deploy.verify.proof import IntegerProof

__all__ = [
    "accuracy_section",
    "engine_section",
    "environment_section",
    "file_section",
    "finish",
    "integer_section",
    "latency_section",
    "layers_section",
    "parity_section",
    "verdict_section",
]

#: Libraries whose versions belong to a result, where they are installed.
LIBRARIES = ("numpy", "torch", "onnx", "onnx-ir", "onnxruntime", "openvino", "nncf", "tensorrt", "timm")


def file_section(path: Path, root: Path) -> dict[str, Any]:
    """A file beside the report: path relative to `root`, size and digest."""
    path, root = Path(path), Path(root)
    shown = path.resolve().relative_to(root.resolve()) if path.resolve().is_relative_to(root.resolve()) else path
    return {"path": shown.as_posix(), "bytes": path.stat().st_size, "sha256": digest_file(path)}


def engine_section(
    path: Path,
    root: Path,
    *,
    qdq_path: Path,
    bytes: int,  # noqa: A002 - the word of the schema
    quantizer: str,
    choices: Mapping[str, Any],
    weights_path: Path | None = None,
    vendor_path: Path | None = None,
) -> dict[str, Any]:
    """``targets.<T>.engine``: its files, who quantized it, and what accuracy control did.

    Args:
        path: What the runtime loads.
        root: The output folder; paths are relative to it.
        qdq_path: The Q/DQ graph.
        bytes: Size with weights.
        quantizer: Who quantized.
        choices: How it was built; ``decided.accuracy_control`` is shown in a part of its own.
        weights_path: The weights, where they are apart.
        vendor_path: The engine as a vendor's quantizer wrote it.
    """

    def file(path: Path | None) -> dict[str, Any] | None:
        return None if path is None or not path.is_file() else file_section(path, root)

    control = dict(choices.get("decided") or {}).get("accuracy_control")
    if control is not None:
        control = {key: control.get(key) for key in AccuracyControl.model_fields if key != "float_"}
        control["float"] = (choices["decided"]["accuracy_control"]).get("float")
        returned = control["returned_to_float"] or {}
        control["returned_to_float"] = [{"node": node, "reason": str(why)} for node, why in returned.items()]
        control = {key: value for key, value in control.items() if value is not None}
    return {
        **file_section(path, root),
        "bytes": bytes,
        "qdq_path": file_section(qdq_path, root)["path"],
        "quantizer": quantizer,
        "weights": file(weights_path),
        "vendor": file(vendor_path),
        "accuracy_control": control,
        "choices": dict(choices),
    }


def accuracy_section(evaluation: Evaluation) -> dict[str, Any]:
    """``targets.<T>.accuracy``."""
    return evaluation.accuracy.to_json()


def parity_section(
    evaluation: Evaluation, divergence: Divergence | None = None, *, against: str = "reference"
) -> dict[str, Any]:
    """``targets.<T>.parity``: against the fake-quant twin at the top, the other references below it.

    Args:
        evaluation: The pass over the samples; its forms ``reference``, ``integer``, ``unfused`` and ``float`` are used.
        divergence: Where the engine and one reference part.
        against: Which reference that was.
    """
    section: dict[str, Any] = {}
    if "reference" in evaluation.parity:
        section.update(evaluation.parity["reference"].to_json())
    for form in ("integer", "unfused", "float"):
        section[form] = evaluation.parity[form].to_json() if form in evaluation.parity else None
    section["divergence"] = {"against": against, **divergence.to_json()} if divergence else None
    return section


def integer_section(proof: IntegerProof, *, source: str = "the runtime's profile of one inference") -> dict[str, Any]:
    """``targets.<T>.integer``."""
    return {**proof.to_json(), "source": source}


def latency_section(
    comparison: Comparison, *, engine: str = "engine", float32: str = "float32", float_best: str | None = None
) -> dict[str, Any]:
    """``targets.<T>.latency``.

    Args:
        comparison: Runners measured side by side.
        engine: Name of the engine in it.
        float32: Name of the fp32 baseline.
        float_best: Name of the best float mode; default: the fastest runner but the engine.
    """
    latencies = comparison.latencies
    floats = {name: latency for name, latency in latencies.items() if name != engine}
    best = float_best or (min(floats, key=lambda name: floats[name].median_ms) if floats else None)
    section: dict[str, Any] = {
        "engine": latencies[engine].to_json(),
        "float32": latencies[float32].to_json() if float32 in latencies else None,
        "float_best": latencies[best].to_json() if best else None,
        "rounds": len(comparison.medians[engine]),
        "others": {name: value.to_json() for name, value in floats.items() if name not in (float32, best)},
        "what": WHAT_IS_TIMED,
    }
    if float32 in latencies:
        speedup = comparison.speedup(engine, over=float32)
        section.update(speedup=speedup.ratio, speedup_low=speedup.low, speedup_high=speedup.high)
    if best:
        section["speedup_over_best"] = comparison.speedup(engine, over=best).ratio
    return section


def layers_section(tensors: Sequence[TensorDifference]) -> list[dict[str, Any]]:
    """``targets.<T>.layers``."""
    return [tensor.to_json() for tensor in tensors]


def environment_section(*, threads: int | None = None, command: str = "") -> dict[str, Any]:
    """``environment``: this machine, and the versions that are installed."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": machine_info(),
        "python": platform.python_version(),
        "versions": versions,
        "threads": threads,
        "command": command,
    }


def verdict_section(results: Sequence[GateResult]) -> dict[str, Any]:
    """``verdict``: the gates together."""
    if not results:
        return {"passed": None, "text": "No limits were demanded."}
    failed = [result for result in results if not result.passed]
    if not failed:
        text = "All demanded limits are kept." if len(results) > 1 else "The demanded limit is kept."
    else:
        text = f"{len(failed)} of {len(results)} demanded limits {'is' if len(failed) == 1 else 'are'} not kept."
    return {"passed": not failed, "text": text}


def finish(report: Mapping[str, Any], gates: Gates | None = None) -> Report:
    """Add version, time, gates and verdict to the parts, and check the whole against the schema.

    Args:
        report: The parts, by the keys of the schema; ``model``, ``calibration`` and ``targets`` at least.
        gates: The demanded limits.

    Raises:
        ZsqError: The parts do not follow the schema.
    """
    results = evaluate_gates(report, gates or Gates())
    whole = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "zsq-deploy", "version": __version__},
        "created": datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        **report,
        "gates": [result.to_json() for result in results],
        "verdict": verdict_section(results),
    }
    return parse(whole)
