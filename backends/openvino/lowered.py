"""The graph that OpenVINO's CPU plugin really executes: what its transformations made of an engine, and what it fused.

Two public interfaces of a compiled model are read together:

* **The lowered operators.** An exported model holds the graph *after* all transformations (low precision, CPU-specific operators), with
  the constants that the plugin computed. The property ``CACHE_ENCRYPTION_CALLBACKS`` hands its XML to a function of ours.
* **The executed nodes.** ``get_runtime_model()`` names, for each node that is executed, the lowered operators that were fused into it,
  the precisions that it writes, and the primitive that was chosen.

So the structure is the plugin's own; nothing about fusion is guessed.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.runner import OvRunner
from zsq_deploy.errors import EngineError

__all__ = ["Group", "Lowered", "Op", "Source", "lower"]

Array = npt.NDArray[Any]

_TYPES: Mapping[str, Any] = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "i64": np.int64,
    "i32": np.int32,
    "i16": np.int16,
    "i8": np.int8,
    "u64": np.uint64,
    "u32": np.uint32,
    "u16": np.uint16,
    "u8": np.uint8,
    "boolean": np.bool_,
}
_HEADER = struct.Struct("<6Q")
"""Offsets and sizes of the three parts of an exported model: own data, constants, XML."""

_INSERTED = ("Input", "Output", "Const", "Constant")


@dataclass(frozen=True)
class Source:
    """Where an input comes from: one output of one operator.

    Attributes:
        op: Identity of the operator (:attr:`Op.key`).
        port: Number of its output, from 0.
    """

    op: str
    port: int


@dataclass(frozen=True, eq=False)
class Op:
    """One lowered operator.

    Attributes:
        key: Identity within the graph.
        name: Its friendly name; executed nodes refer to it.
        type: ``Convolution``, ``FakeQuantize``, ``PowerStatic``, ...
        attrs: Its attributes as written in the XML.
        inputs: One source an input; ``None`` for an input that the plugin left empty.
        outputs: For each output the names of its tensor (those of the ONNX values that it stands for).
        precisions: For each output its element type, ``u8``.
        constant: The numbers of a ``Const``.
        element: The operator as it stands in the XML.
        body: For a ``Subgraph`` (several operators compiled into one kernel): its operators in order.
        entries: For each of its inputs the parameter in the body.
        exits: For each of its outputs the value in the body.
    """

    key: str
    name: str
    type: str
    attrs: Mapping[str, str]
    inputs: tuple[Source | None, ...]
    outputs: tuple[tuple[str, ...], ...]
    precisions: tuple[str, ...]
    constant: Array | None
    element: ElementTree.Element = field(repr=False)
    body: tuple[Op, ...] = ()
    entries: tuple[Op, ...] = ()
    exits: tuple[Source, ...] = ()

    def ints(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """An attribute that is a list of integers."""
        text = self.attrs.get(name, "")
        return tuple(int(part) for part in text.split(",") if part.strip()) if text.strip() else default

    def number(self, name: str, default: float = 0.0) -> float:
        """An attribute that is a number."""
        return float(self.attrs.get(name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        """An attribute that is true or false."""
        text = self.attrs.get(name)
        return default if text is None else text.lower() in ("true", "1")


@dataclass(frozen=True, eq=False)
class Group:
    """One executed node.

    Attributes:
        name: Its name.
        kind: Its type in the plugin, ``Convolution``, ``Eltwise``, ...
        ops: The lowered operators that it computes, in the order of fusion: the first is the node itself.
        precision: Element type of its first output as it is executed.
        computes: Element type that it computes with: ``u8`` and ``i8`` for products of codes.
        primitive: The implementation, ``brgconv_avx512_I8``.
        index: Place in the order of execution.
    """

    name: str
    kind: str
    ops: tuple[Op, ...]
    precision: str
    computes: str
    primitive: str
    index: int


@dataclass(frozen=True, eq=False)
class Lowered:
    """The lowered graph.

    Attributes:
        ops: All operators by key, in topological order.
        groups: The executed nodes that compute any of them, in order of execution.
        inputs: Names of the model's inputs, and the operators that stand for them.
        outputs: Names of the model's outputs, and what they show.
        types: Names of the model's outputs, and their types.
    """

    ops: Mapping[str, Op]
    groups: tuple[Group, ...]
    inputs: Mapping[str, Op]
    outputs: Mapping[str, Source]
    types: Mapping[str, Any]
    _ends: Mapping[str, Op] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", {op.key: group.ops[-1] for group in self.groups for op in group.ops})

    def claimed(self, op: Op) -> bool:
        """Whether an executed node computes the operator."""
        return op.key in self._ends

    def seen(self, source: Source) -> Source:
        """What a reader outside of an executed node sees of a value: the end of the node that it was fused into."""
        end = self._ends.get(source.op)
        return source if end is None or end.key == source.op else Source(end.key, 0)

    def constant(self, source: Source | None) -> Array | None:
        """The numbers behind an input, if it is a constant."""
        return None if source is None else self.ops[source.op].constant

    def producer(self, source: Source) -> Op:
        """The operator that makes a value."""
        return self.ops[source.op]


def lower(runner: OvRunner, feeds: Mapping[str, Array]) -> Lowered:
    """What the CPU plugin makes of a model for inputs of these shapes.

    Args:
        runner: The loaded model; it is compiled once more, with the same properties.
        feeds: One array an input; only the shapes matter.

    Raises:
        EngineError: The model does not run on a CPU here, or its exported form is not understood (another version of OpenVINO).
    """
    written: list[bytes] = []

    def note(text: Any) -> Any:
        written.append(text if isinstance(text, bytes) else str(text).encode())
        return text

    if runner.device != "CPU":
        raise EngineError(
            f"the integer reference describes OpenVINO's CPU plugin, and this engine runs on {runner.device}",
            where=str(runner.path),
            remedy="compare with the fake-quant reference only",
        )
    _, compiled = runner.compiled(feeds, CACHE_ENCRYPTION_CALLBACKS=[note, lambda text: text])
    stream = compiled.export_model()
    blob = stream.getvalue() if isinstance(stream, io.BytesIO) else bytes(stream)
    if not written:
        raise EngineError(
            "OpenVINO does not say what it made of this engine: its exported form holds no readable graph",
            where=str(runner.path),
            remedy="use the version of OpenVINO that zsq-deploy was tested with (constraints.txt)",
        )
    root = ElementTree.fromstring(written[-1].rstrip(b"\0"))  # noqa: S314 - written by OpenVINO in this very process
    ops: dict[str, Op] = {}
    outer = _operators(root, _constants(blob, runner.path), "", ops)
    groups = tuple(_groups(compiled, outer))
    types = {
        name: np.dtype(port.element_type.to_dtype())
        for name, port in zip(runner.output_names, compiled.outputs, strict=True)
    }
    return Lowered(ops, groups, _inputs(compiled, outer, runner), _outputs(compiled, outer, runner), types)


def _constants(blob: bytes, path: Path) -> memoryview:
    """The part of an exported model that holds the numbers of its constants."""
    own = blob.find(b"<?xml")
    if own >= _HEADER.size:
        first, _, start, size, _, _ = _HEADER.unpack_from(blob, own - _HEADER.size)
        begin = own - first + start
        if begin > 0 and begin + size <= len(blob):
            return memoryview(blob)[begin : begin + size]
    raise EngineError(
        "the form in which OpenVINO exports a compiled model is not the known one",
        where=str(path),
        remedy="use the version of OpenVINO that zsq-deploy was tested with (constraints.txt)",
    )


def _numbers(layer: ElementTree.Element, numbers: memoryview) -> Array | None:
    data = layer.find("data")
    if layer.get("type") != "Const" or data is None:
        return None
    dtype = _TYPES.get(data.get("element_type", ""))
    if dtype is None:
        return None
    shape = [int(part) for part in (data.get("shape") or "").split(",") if part.strip()]
    count = int(np.prod(shape, dtype=np.int64)) if shape else 1
    array = np.frombuffer(numbers, dtype, count=count, offset=int(data.get("offset", 0)))
    return array.reshape(shape)


def _operators(root: ElementTree.Element, numbers: memoryview, prefix: str, ops: dict[str, Op]) -> dict[str, Op]:
    """Read one graph: into `ops`, with the bodies of its subgraphs; its own operators are returned."""
    edges: dict[str, dict[str, tuple[str, str]]] = {}
    for edge in root.iterfind("./edges/edge"):
        target = edges.setdefault(edge.get("to-layer", ""), {})
        target[edge.get("to-port", "")] = (edge.get("from-layer", ""), edge.get("from-port", ""))
    layers = {layer.get("id", ""): layer for layer in root.iterfind("./layers/layer")}
    places = {  # (layer, number of the port in the XML) -> number of the output
        (key, port.get("id", "")): place
        for key, layer in layers.items()
        for place, port in enumerate(layer.iterfind("./output/port"))
    }
    own: dict[str, Op] = {}
    for key, layer in layers.items():
        inputs: list[Source | None] = []
        for port in layer.iterfind("./input/port"):
            found = edges.get(key, {}).get(port.get("id", ""))
            empty = found is None or (
                layers[found[0]].get("type") == "Const"
                and (layers[found[0]].find("data") is not None)
                and layers[found[0]].find("data").get("element_type") == "dynamic"  # type: ignore[union-attr]
            )
            inputs.append(None if found is None or empty else Source(prefix + found[0], places[found]))
        data = layer.find("data")
        ports = list(layer.iterfind("./output/port"))
        attrs = dict(data.attrib) if data is not None else {}
        if layer.get("output_names"):
            attrs["output_names"] = layer.get("output_names", "")
        body, entries, exits = _body(layer, numbers, f"{prefix}{key}/", ops)
        own[prefix + key] = ops[prefix + key] = Op(
            key=prefix + key,
            name=layer.get("name", ""),
            type=layer.get("type", ""),
            attrs=attrs,
            inputs=tuple(inputs),
            outputs=tuple(tuple(_split(port.get("names", ""))) for port in ports),
            precisions=tuple(port.get("precision", "").lower().replace("fp", "f") for port in ports),
            constant=_numbers(layer, numbers),
            element=layer,
            body=body,
            entries=entries,
            exits=exits,
        )
    return own


def _body(
    layer: ElementTree.Element, numbers: memoryview, prefix: str, ops: dict[str, Op]
) -> tuple[tuple[Op, ...], tuple[Op, ...], tuple[Source, ...]]:
    root = layer.find("body")
    if root is None or layer.get("type") != "Subgraph":
        return (), (), ()
    inner = _operators(root, numbers, prefix, ops)

    def mapped(kind: str) -> list[Op]:
        entries = layer.findall(f"./port_map/{kind}")
        entries.sort(key=lambda entry: int(entry.get("external_port_id", 0)))
        return [inner[prefix + entry.get("internal_layer_id", "")] for entry in entries]

    exits = [source for op in mapped("output") if (source := op.inputs[0]) is not None]
    kept = tuple(op for op in inner.values() if op.type not in ("Const", "Parameter", "Result"))
    return kept, tuple(mapped("input")), tuple(exits)


def _split(text: str) -> Iterator[str]:
    """Names between commas; a comma within a name stands behind a backslash."""
    name = ""
    escaped = False
    for letter in text:
        if escaped:
            name, escaped = name + letter, False
        elif letter == "\\":
            escaped = True
        elif letter == ",":
            yield name
            name = ""
        else:
            name += letter
    if name:
        yield name


def _groups(compiled: Any, ops: Mapping[str, Op]) -> Iterator[Group]:
    by_name: dict[str, Op] = {}
    for op in ops.values():
        if op.type not in ("Const", "Parameter", "Result"):
            by_name.setdefault(op.name, op)
    taken: set[str] = set()
    for index, node in enumerate(compiled.get_runtime_model().get_ordered_ops()):
        info = node.get_rt_info()
        entries = {key: info[key].astype(str) for key in _ENTRIES if key in info}
        kind = entries.get("layerType", "")
        if kind in _INSERTED:
            continue
        found = []
        for name in _names(entries.get("originalLayersNames", ""), by_name):
            op = by_name[name]
            if op.key not in taken:
                taken.add(op.key)
                found.append(op)
        if found:
            precisions = entries.get("outputPrecisions", "").split(",")
            yield Group(
                name=node.get_friendly_name(),
                kind=kind,
                ops=tuple(found),
                precision=precisions[0],
                computes=entries.get("runtimePrecision", ""),
                primitive=entries.get("primitiveType", ""),
                index=index,
            )


_ENTRIES = ("layerType", "originalLayersNames", "outputPrecisions", "runtimePrecision", "primitiveType")


def _names(text: str, known: Mapping[str, Any]) -> Iterator[str]:
    """The operators that an executed node names, separated by commas; a name may hold commas itself."""
    parts = text.split(",")
    start = 0
    while start < len(parts):
        for stop in range(len(parts), start, -1):
            name = ",".join(parts[start:stop])
            if name in known:
                yield name
                start = stop
                break
        else:
            start += 1


def _inputs(compiled: Any, ops: Mapping[str, Op], runner: OvRunner) -> dict[str, Op]:
    parameters = [op for op in ops.values() if op.type == "Parameter"]
    named = {name: op for op in parameters for name in (op.name, *(n for names in op.outputs for n in names))}
    return {
        name: next((named[n] for n in _titles(port) if n in named), parameters[place])
        for place, (name, port) in enumerate(zip(runner.input_names, compiled.inputs, strict=True))
    }


def _outputs(compiled: Any, ops: Mapping[str, Op], runner: OvRunner) -> dict[str, Source]:
    results = [op for op in ops.values() if op.type == "Result"]
    named = {name: op for op in results for name in (op.name, *_split(op.attrs.get("output_names", "")))}
    found: dict[str, Source] = {}
    for place, (name, port) in enumerate(zip(runner.output_names, compiled.outputs, strict=True)):
        result = next((named[n] for n in _titles(port) if n in named), results[place])
        source = result.inputs[0]
        assert source is not None
        found[name] = source
    return found


def _titles(port: Any) -> list[str]:
    """The friendly name of a port's node, and the names of its tensor."""
    return [str(port.get_node().get_friendly_name()), *sorted(str(name) for name in port.get_names())]
