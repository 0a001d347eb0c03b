"""Float operators of an engine, each computed by OpenVINO's own float kernel as a model of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.lowered import Op, Source
from zsq_deploy.backends.openvino.reading import first_line
from zsq_deploy.backends.openvino.runtime import core, ov
from zsq_deploy.errors import UnsupportedOpError

__all__ = ["Island"]

Array = npt.NDArray[Any]

_PRECISIONS: Mapping[str, str] = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "uint64": "u64",
    "uint32": "u32",
    "bool": "boolean",
}
_RELAXED = "type_relaxed_"
_SWISH = "SwishCPU"


class Island:
    """A chain of operators as a model of its own.

    Args:
        ops: The operators; each reads results of the ones before it, constants and values given to :meth:`__call__`.
        constants: The numbers of the constants among their inputs, by key of the operator.
        config: Properties of the compiled model.
    """

    def __init__(self, ops: Sequence[Op], constants: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        self._ops = tuple(ops)
        self._constants = dict(constants)
        self._config = dict(config)
        inside = {op.key for op in ops}
        self.variable = [
            source
            for source in dict.fromkeys(source for op in ops for source in op.inputs if source is not None)
            if source.op not in inside and source.op not in constants
        ]
        self._models: dict[tuple[str, ...], Any] = {}

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """All results of the last operator.

        Args:
            arrays: One array for each of :attr:`variable`.
        """
        key = tuple(f"{array.dtype}{list(array.shape)}" for array in arrays)
        if key not in self._models:
            self._models[key] = self._compile(arrays)
        model = self._models[key]
        results = model([np.ascontiguousarray(array) if array.ndim else array for array in arrays])
        return [np.array(results[port]) for port in model.outputs]

    def _compile(self, arrays: Sequence[Array]) -> Any:
        net = ElementTree.Element("net", name="island", version="11")
        layers, edges = ElementTree.SubElement(net, "layers"), ElementTree.SubElement(net, "edges")
        numbers = bytearray()
        made: dict[tuple[str, int], tuple[str, str]] = {}

        def layer(name: str, kind: str, version: str = "opset1") -> ElementTree.Element:
            return ElementTree.SubElement(layers, "layer", id=str(len(layers)), name=name, type=kind, version=version)

        def port(parent: ElementTree.Element, number: int, array: Array) -> None:
            precision = _PRECISIONS[str(array.dtype)].upper().replace("F", "FP")
            entry = ElementTree.SubElement(parent, "port", id=str(number), precision=precision)
            for size in array.shape:
                ElementTree.SubElement(entry, "dim").text = str(size)

        for place, (source, array) in enumerate(zip(self.variable, arrays, strict=True)):
            element = layer(f"in{place}", "Parameter")
            shape = ",".join(str(size) for size in array.shape)
            ElementTree.SubElement(element, "data", shape=shape, element_type=_PRECISIONS[str(array.dtype)])
            port(ElementTree.SubElement(element, "output"), 0, array)
            made[source.op, source.port] = element.get("id", ""), "0"
        constants = {**self._constants, **{f"{op.key}.alpha": _alpha(op) for op in self._ops if op.type == _SWISH}}
        for name, array in constants.items():
            element = layer(f"constant{len(layers)}", "Const")
            values = np.ascontiguousarray(array).tobytes()
            ElementTree.SubElement(
                element,
                "data",
                element_type=_PRECISIONS[str(array.dtype)],
                shape=", ".join(str(size) for size in array.shape),
                offset=str(len(numbers)),
                size=str(len(values)),
            )
            numbers.extend(values)
            port(ElementTree.SubElement(element, "output"), 0, array)
            made[name, 0] = element.get("id", ""), "0"
        for op in self._ops:
            element = self._layer(op, str(len(layers)))
            layers.append(element)
            ports = [entry.get("id", "") for entry in element.iterfind("./input/port")]
            inputs = [*op.inputs, *([Source(f"{op.key}.alpha", 0)] if op.type == _SWISH else [])]
            for read, number in zip(inputs, ports, strict=True):
                if read is None:
                    continue
                start, first = made[read.op, read.port]
                ElementTree.SubElement(
                    edges,
                    "edge",
                    {"from-layer": start, "from-port": first, "to-layer": element.get("id", ""), "to-port": number},
                )
            for place, entry in enumerate(element.iterfind("./output/port")):
                made[op.key, place] = element.get("id", ""), entry.get("id", "")
        last = self._ops[-1]
        for place in range(len(last.outputs)):
            element = layer(f"out{place}", "Result")
            inner = ElementTree.SubElement(element, "input")
            inner.append(copy.deepcopy(list(last.element.iterfind("./output/port"))[place]))
            inner[0].set("id", "0")
            start, first = made[last.key, place]
            ElementTree.SubElement(
                edges,
                "edge",
                {"from-layer": start, "from-port": first, "to-layer": element.get("id", ""), "to-port": "0"},
            )
        try:
            weights = ov.Tensor(np.frombuffer(bytes(numbers) or b"\0", np.uint8).copy())
            model = core().read_model(ElementTree.tostring(net), weights)
            return core().compile_model(model, "CPU", self._config)
        except RuntimeError as error:
            names = ", ".join(f"{op.type} ({op.name})" for op in self._ops)
            raise UnsupportedOpError(
                f"OpenVINO does not compute {names} on its own: {first_line(error)}",
                remedy="compare with the fake-quant reference only",
            ) from error

    @staticmethod
    def _layer(op: Op, number: str) -> ElementTree.Element:
        element = copy.deepcopy(op.element)
        element.set("id", number)
        element.set("version", element.get("version", "opset1").replace(_RELAXED, ""))
        for entry in list(element.iterfind("rt_info")):
            element.remove(entry)
        data = element.find("data")
        if op.type == _SWISH:  # the plugin's own form of Swish, with its factor as an attribute
            element.set("type", "Swish")
            element.set("version", "opset4")
            ElementTree.SubElement(_child(element, "input"), "port", id="99", precision="FP32")
            if data is not None:
                element.remove(data)
            return element
        if data is not None:
            for key in ("type_relax", "input_data_types", "output_data_types"):
                data.attrib.pop(key, None)
        return element


def _alpha(op: Op) -> Array:
    return np.asarray(op.number("alpha", 1.0), np.float32)


def _child(element: ElementTree.Element, name: str) -> ElementTree.Element:
    found = element.find(name)
    return found if found is not None else ElementTree.SubElement(element, name)
