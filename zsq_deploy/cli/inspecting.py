"""What `zsq inspect` and `zsq lint` look at.

Files that one runtime only knows are asked about in its folder under ``backends/``, without its library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zsq_deploy.artifact import read_json
from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.cli.words import recipe_from
from zsq_deploy.errors import ModelError, UsageError
from zsq_deploy.model import Graph

__all__ = ["compare_things", "default_target", "describe_thing", "lint_file", "print_description"]

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_ENGINES = ("engine.onnx", "engine.xml")


def _read_graph(file: Path) -> Graph:
    import onnx

    if not file.is_file():
        raise UsageError("there is no such file", where=str(file), remedy="check the path")
    try:
        return Graph(onnx.load(str(file)))
    except Exception as error:
        raise ModelError(
            f"this is no ONNX file, or it is damaged ({type(error).__name__})",
            where=str(file),
            remedy="export the network again",
        ) from error


def describe_thing(
    thing: str,
    *,
    path: Path | None = None,
    weights: Path | None = None,
    input_shape: str | None = None,
    nodes: bool = False,
) -> dict[str, Any]:
    """What a network, an engine, a calibration set or an output folder holds, as JSON values."""
    place = Path(thing)
    if place.is_dir():
        if (place / "recipe.resolved.yaml").is_file():
            return _describe_output(place)
        if (place / "calibration" / "manifest.json").is_file():
            place = place / "calibration"
        engine = next((place / name for name in _ENGINES if (place / name).is_file()), None) or _stated_engine(place)
        if engine is None or not (place / "manifest.json").is_file():
            return _describe_set(place)
        place = engine
    if place.suffix == ".xml":
        return _describe_ir(place, nodes)
    if place.suffix == ".plan":
        return _describe_plan(place)
    if place.is_file() and _holds_layers(place):
        return _describe_layers(place)
    if place.is_file() and _holds_scales(place):
        from zsq_deploy.backends.tensorrt.scale_files import read_scale_file

        return read_scale_file(place).describe()
    graph = _read_graph(place) if place.suffix == ".onnx" else None
    if graph is not None and any(node.op_type in _QDQ for node in graph):
        from zsq_deploy.backends.onnxruntime.summary import summarize

        found = {"kind": "quantized graph", "file": str(place), **summarize(place)}
        return {**found, **({"nodes": _nodes(graph)} if nodes else {})}
    return _describe_network(thing, path, weights, input_shape, nodes)


def _stated_engine(folder: Path) -> Path | None:
    """The engine that a folder's manifest names, where its name says nothing (TensorRT's is the Q/DQ graph)."""
    file = folder / "manifest.json"
    held = read_json(file) if file.is_file() else {}
    name = held.get("engine", {}).get("file") if isinstance(held, dict) else None
    return folder / name if isinstance(name, str) and (folder / name).is_file() else None


def _holds_scales(file: Path) -> bool:
    """Whether a file holds one scale a tensor: a cache of TensorRT, a table of ONNX Runtime, or ranges."""
    from zsq_deploy.backends.tensorrt.scale_files import is_scale_file

    return file.suffix == ".json" or is_scale_file(file)


def _describe_plan(file: Path) -> dict[str, Any]:
    """For which GPU and which TensorRT an engine was built, and from what: what stands beside it."""
    from zsq_deploy.backends.tensorrt.plan import read_plan

    record = read_plan(file)
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return {"kind": "TensorRT engine", "file": str(file), **fields, "warnings": list(record.warnings)}


def _holds_layers(file: Path) -> bool:
    """Whether a file says what the layers of an engine of TensorRT compute in."""
    from zsq_deploy.backends.tensorrt.evidence import holds_layers

    return holds_layers(file)


def _describe_layers(file: Path) -> dict[str, Any]:
    """What a device said about its engine, held against the network: the share of the arithmetic in 8 bits, and each layer."""
    from zsq_deploy.backends.tensorrt.evidence import read_evidence
    from zsq_deploy.verify import prove

    evidence = read_evidence(file)
    proof = prove(evidence.records)
    return {
        "kind": "layers of a TensorRT engine",
        "file": str(file),
        "network": str(evidence.network),
        "macs": proof.macs,
        "integer_macs": proof.integer_macs,
        "macs_share": proof.macs_share,
        "time_share": proof.time_share if evidence.timed else None,
        "microseconds": proof.microseconds if evidence.timed else None,
        "not_as_expected": list(evidence.surprises),
        "layers": [
            {
                "name": record.node,
                "kernel": record.op,
                "computes": "8 bits" if record.integer else "float",
                "macs": record.macs,
                "microseconds": record.microseconds if evidence.timed else None,
                "reason": record.reason,
            }
            for record in evidence.records
        ],
    }


def compare_things(first: Path, second: Path) -> dict[str, Any]:
    """Two files with one scale a tensor, the largest differences first, as JSON values.

    Raises:
        CalibrationError: One of them is no calibration cache, no table of ONNX Runtime and no ranges.
    """
    from zsq_deploy.backends.tensorrt.scale_files import compare_files

    return {"kind": "comparison", "files": [str(first), str(second)], **compare_files(first, second).to_json()}


def _describe_ir(file: Path, nodes: bool) -> dict[str, Any]:
    """What an IR of OpenVINO holds; its nodes are those of the Q/DQ graph that says what it computes."""
    get_backend("openvino-cpu")  # the error for a runtime that is not installed
    from zsq_deploy.backends.openvino.summary import summarize

    found = {"kind": "OpenVINO IR", "file": str(file), **summarize(file)}
    if nodes:
        from zsq_deploy.backends.openvino.ir import ir_to_qdq

        found["nodes"] = _nodes(ir_to_qdq(file))
    return found


def _describe_network(
    source: str, path: Path | None, weights: Path | None, input_shape: str | None, nodes: bool
) -> dict[str, Any]:
    from zsq_deploy.pipeline.deploy import load_recipe_model, model_section

    recipe = recipe_from(
        {"model.source": source, "model.path": path, "model.weights": weights, "model.input_shape": input_shape}
    )
    model = load_recipe_model(recipe)
    found: dict[str, Any] = {
        "kind": "network",
        **model_section(model),
        "opset": model.graph.opset,
        "notes": list(model.notes),
    }
    if nodes:
        found["nodes"] = _nodes(model.folded().graph)
    return found


def _nodes(graph: Graph) -> list[dict[str, Any]]:
    return [
        {"name": node.name, "op": node.op_type, "inputs": list(node.input), "outputs": list(node.output)}
        for node in graph
    ]


def _describe_set(folder: Path) -> dict[str, Any]:
    from zsq_deploy.calib import CalibrationSet

    made = CalibrationSet.open(folder)
    return {
        "kind": "calibration set",
        "folder": str(folder),
        "digest": made.digest,
        **made.manifest.model_dump(mode="json"),
    }


def _describe_output(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "output folder", "folder": str(folder)}
    for manifest in sorted(folder.glob("*/manifest.json")):
        held = read_json(manifest)
        if "engine" in held:
            file = manifest.parent / held["engine"]["file"]
            found.setdefault("engines", {})[manifest.parent.name] = {
                "file": str(file),
                "bytes": _bytes(manifest.parent, held),
                "quantizer": held.get("choices", {}).get("quantizer"),
                "ranges": held.get("choices", {}).get("ranges"),
                "op_types": held.get("choices", {}).get("op_types"),
            }
        elif "method" in held:
            found.setdefault("sets", {})[manifest.parent.name] = {
                "method": held["method"],
                "images": held.get("images"),
            }
    if (folder / "report.json").is_file():
        found["report"] = str(folder / "report.html")
    return found


def _bytes(folder: Path, held: dict[str, Any]) -> int | None:
    """Size of an engine, its weights included; ``None`` if a file is missing."""
    files = [folder / held[part]["file"] for part in ("engine", "weights") if part in held]
    return sum(file.stat().st_size for file in files) if all(file.is_file() for file in files) else None


def print_description(found: dict[str, Any], console: Console) -> None:
    """Draw a description as a table of names and values."""
    table = Table(show_header=False, title=found.get("kind"), title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    nodes, tensors, layers = found.get("nodes"), found.get("tensors"), found.get("layers")
    for name, value in found.items():
        if name == "kind" or (name in ("nodes", "tensors", "layers") and isinstance(value, list)):
            continue
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = "\n".join(str(item) for item in value)
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    console.print(table, markup=False)
    if isinstance(tensors, list):
        differing = [row for row in tensors if row.get("ratio") != 1.0]  # of a comparison; else all of them
        _print_rows(differing, "tensors" if len(differing) == len(tensors) else "tensors that differ", console)
    if isinstance(layers, list):
        _print_rows(layers, "layers", console)
    if isinstance(nodes, list):
        listing = Table(title="nodes", title_justify="left")
        listing.add_column("name", overflow="fold")
        listing.add_column("operator")
        listing.add_column("outputs", overflow="fold")
        for node in nodes:
            listing.add_row(node["name"], node["op"], ", ".join(node["outputs"]))
        console.print(listing, markup=False)


def _print_rows(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """Draw records of the same fields, names to the left and numbers to the right."""
    listing = Table(title=title, title_justify="left")
    for key in rows[0] if rows else ():
        words = key in ("name", "kernel", "computes", "reason")
        listing.add_column(key, overflow="fold", justify="left" if words else "right")
    for row in rows:
        cells = (
            "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
            for value in row.values()
        )
        listing.add_row(*cells)
    console.print(listing, markup=False)


def default_target(file: Path) -> str:
    """The target that a file is checked against where none is named: an IR is one of OpenVINO's."""
    return "openvino-cpu" if file.suffix == ".xml" else "ort-x86-vnni"


def lint_file(file: Path, target: str) -> list[dict[str, str]]:
    """Findings of a target's rules in a Q/DQ graph or an IR, as JSON values."""
    wanted = get_target(target)
    backend: Any = get_backend(wanted)
    if file.suffix == ".xml" and wanted.runtime != "openvino":
        raise UsageError(
            f"{target} does not run an IR of OpenVINO", where=str(file), remedy="name one of the openvino targets"
        )
    graph = file if file.suffix == ".xml" else _read_graph(file)
    return [
        {
            "node": item.node,
            "rule": item.rule,
            "severity": item.severity,
            "message": item.message,
            "remedy": item.remedy,
        }
        for item in backend.lint(graph, wanted)
    ]
