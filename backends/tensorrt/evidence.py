"""What a device said about its engine, read anywhere: the layer files of ``trtexec`` or TensorRT's inspector, held against the network.

On devices where this program does not run, the scripts of the folder leave ``int8.layers.json`` and ``int8.profile.json``. Carried back into
the folder, they tell what the engine really computes in, and whether TensorRT fused what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq_deploy.artifact import read_json
from zsq_deploy.backends.base import KernelRecord
from zsq_deploy.backends.tensorrt.inspector import read_layers
from zsq_deploy.backends.tensorrt.proof import kernel_records
from zsq_deploy.errors import EngineError
from zsq_deploy.model.graph import Graph

__all__ = ["Evidence", "holds_layers", "layer_times", "read_evidence"]

_SUFFIX = ".layers.json"
_HEAD = 4096


@dataclass(frozen=True)
class Evidence:
    """An engine's layers and the network that they are of.

    Attributes:
        network: The ONNX file.
        records: One a layer that does work, as :meth:`~zsq_deploy.backends.base.Runner.kernels` gives them.
        timed: Whether times of layers were found beside the layers.
        surprises: Kernels that were expected in 8 bits and are not: what was expected, and what is.
    """

    network: Path
    records: tuple[KernelRecord, ...]
    timed: bool
    surprises: tuple[str, ...]


def holds_layers(file: Path) -> bool:
    """Whether a file is layer information of TensorRT."""
    if not file.is_file() or file.suffix != ".json":
        return False
    if file.name.endswith(_SUFFIX):
        return True
    with file.open("rb") as stream:
        return b'"Layers"' in stream.read(_HEAD)


def layer_times(file: Path) -> dict[str, float]:
    """Microseconds by layer, from a file of ``trtexec --exportProfile``: the median where it has one (8.4 and later), else the mean.

    Raises:
        EngineError: It is no such file.
    """
    rows = read_json(file)
    found: dict[str, float] = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and "name" in row:
            value = row.get("medianMs", row.get("averageMs"))
            if isinstance(value, int | float):
                found[str(row["name"])] = 1e3 * float(value)
    if not found:
        raise EngineError(
            "the file holds no times of layers",
            where=str(file),
            remedy="export it with trtexec --exportProfile, or remove it",
        )
    return found


def read_evidence(file: Path, *, network: Path | None = None) -> Evidence:
    """Layers, and times where ``<name>.profile.json`` lies beside them, against the network that the engine was built from.

    Args:
        file: ``int8.layers.json``, ``engine.layers.json``, or another.
        network: The ONNX file; ``None``: what the folder says of it.

    Raises:
        EngineError: There is no such file, it holds no layers, or the folder has no network for it.
    """
    if not file.is_file():
        raise EngineError("there is no such file", where=str(file), remedy="check the path")
    stem = file.name.removesuffix(_SUFFIX)
    manifest = file.with_name("manifest.json")
    held: Any = read_json(manifest) if manifest.is_file() else {}
    choices = held.get("choices", {}) if isinstance(held, dict) else {}
    name, mode = _network_of(file, stem, held)
    place = network or file.with_name(name)
    if not place.is_file():
        raise EngineError(
            f"the network that these layers are of is not beside them ({place.name})",
            where=str(file),
            remedy="put the file back into the folder that zsq quantize wrote",
        )
    profile = file.with_name(f"{stem}.profile.json")
    times = layer_times(profile) if profile.is_file() else {}
    layers = read_layers(file.read_text(encoding="utf-8", errors="replace"), where=str(file))
    records = tuple(kernel_records(layers, Graph.load(place), times, mode=mode))
    expected = choices.get("expected_kernels", ()) if mode in ("engine", "implicit") else ()
    return Evidence(place, records, bool(times), _surprises(records, expected))


def _network_of(file: Path, stem: str, held: Any) -> tuple[str, str]:
    """Name of the network of an engine, and how it was built, by the record beside it or by the names that the scripts use."""
    record = file.with_name(f"{stem}.plan.json")
    if record.is_file():
        said = read_json(record)
        settings = said.get("settings", {})
        mode = {"explicit": "engine", "implicit": "implicit"}.get(str(settings.get("mode")))
        return str(said.get("network", "qdq.onnx")), mode or f"built in float ({settings.get('floats', 'float32')})"
    built = held.get("engine", {}).get("file") if isinstance(held, dict) else None
    if stem == "float":
        return "float.onnx", "built in float"
    if stem == "implicit":
        return "float.onnx", "implicit"
    implicit = isinstance(held, dict) and held.get("choices", {}).get("mode") == "implicit"
    return str(built or "qdq.onnx"), "implicit" if implicit else "engine"


def _surprises(records: tuple[KernelRecord, ...], expected: Any) -> tuple[str, ...]:
    """Where TensorRT did otherwise than its rules made one expect."""
    by_node: dict[str, KernelRecord] = {}
    for record in records:
        for name in record.sources:
            if name not in by_node or record.macs:
                by_node[name] = record
    found = []
    for group in expected if isinstance(expected, list) else ():
        nodes, kind = list(group.get("nodes", ())), str(group.get("kind", ""))
        first = by_node.get(nodes[0]) if nodes else None
        if group.get("computes") != "int8" or first is None:
            continue
        if not first.integer:
            found.append(f"{nodes[0]} ({kind}): expected in 8 bits, is float: {first.reason}")
            continue
        apart = [name for name in nodes[1:] if name in by_node and by_node[name].node != first.node]
        if apart:
            found.append(f"{nodes[0]} ({kind}): in 8 bits, but {', '.join(apart)} is a layer of its own")
    return tuple(found)
