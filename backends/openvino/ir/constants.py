"""Which values of an IR are constants, and what is done to them on the way to the operation that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from onnx import helper

from zsq_deploy.backends.openvino.ir.registry import UnsupportedFormError, element_type
from zsq_deploy.backends.openvino.ir.rounding import Rounding, levels_of, on_the_side_of, read_ranges
from zsq_deploy.backends.openvino.ir.stored import Stored, constant_array

__all__ = ["Constants", "Key", "is_unit", "key_of", "plain"]

Array = npt.NDArray[Any]
Key = tuple[str, int]

_FLOATS = frozenset({"f16", "bf16", "f32", "f64"})
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
_CODES = {"i4": "int4", "u4": "uint4", "i8": "int8", "u8": "uint8", "i16": "int16", "u16": "uint16", "i32": "int32"}


def key_of(output: ov.Output) -> Key:
    """Identity of an output: the unique name of its operation, and its number."""
    return str(output.get_node().get_name()), int(output.get_index())


def is_unit(stored: Stored) -> bool:
    """Whether these are integers that were converted, but have not been scaled."""
    rounding = stored.rounding
    return stored.codes and rounding is not None and rounding.scale.ndim == 0 and float(rounding.scale) == 1.0


def plain(stored: Stored | None) -> Stored | None:
    """A constant that is read as plain numbers (integers that were only converted among them), else ``None``."""
    if stored is None or stored.rounding is None:
        return stored
    if is_unit(stored) and not np.any(stored.rounding.zero):
        return Stored(stored.values.astype(np.float32), stored.name)
    return None


def _aligned(scale: Array, zero: Array, rank: int) -> tuple[Array, Array]:
    """Both as one number, or with as many axes as the tensor."""
    if scale.size == 1 and zero.size == 1:
        return scale.reshape(()), zero.reshape(())
    wide = [array.reshape((1,) * (rank - array.ndim) + array.shape) for array in (scale, zero)]
    first, second = np.broadcast_arrays(*wide)
    return first, second


class Constants:
    """The constants of an IR.

    Args:
        names: Names of the outputs of the IR.
    """

    def __init__(self, names: Mapping[Key, str]) -> None:
        self._names = names
        self._stored: dict[Key, Stored | None] = {}

    def stored(self, output: ov.Output) -> Stored | None:
        """The constant behind an output, with what is done to it on the way; ``None`` when the output is computed."""
        key = key_of(output)
        if key not in self._stored:
            self._stored[key] = self._resolve(output)
        return self._stored[key]

    def _resolve(self, output: ov.Output) -> Stored | None:
        node = output.get_node()
        kind = node.get_type_name()
        if kind == "Constant":
            values, element = constant_array(node)
            if element in ("f16", "bf16"):
                values = values.astype(np.float32)
            return Stored(values, self._names[key_of(output)])
        if kind not in {"Convert", "Subtract", "Multiply", "FakeQuantize"} | _MOVES:
            return None
        first = self.stored(node.input(0).get_source_output())
        if first is None:
            return None
        if kind == "Convert":
            return self._converted(first, node)
        if kind in _MOVES:
            return self._moved(first, node)
        rest = [self.stored(node.input(index).get_source_output()) for index in range(1, node.get_input_size())]
        numbers = [number for item in rest if (number := plain(item)) is not None]
        if len(numbers) != len(rest):
            return None
        if kind == "FakeQuantize":
            return self._fake_quantized(first, numbers, node)
        return self._shifted(first, numbers[0]) if kind == "Subtract" else self._scaled(first, numbers[0])

    @staticmethod
    def _converted(first: Stored, node: ov.Node) -> Stored | None:
        source = str(node.get_input_element_type(0).get_type_name())
        target = str(node.get_output_element_type(0).get_type_name())
        if target in _FLOATS and source in _CODES and first.rounding is None:
            # codes whose scale is still to come
            kind = _CODES[source]
            unit = Rounding(kind, np.ones((), np.float32), np.zeros((), np.int64), -(1 << 31), (1 << 31) - 1)
            return Stored(first.values, first.name, unit, codes=True)
        if first.rounding is not None:
            return first if target in _FLOATS else None
        if target in _FLOATS and source in _FLOATS:
            return Stored(first.values.astype(np.float64 if target == "f64" else np.float32), first.name)
        try:
            wanted = helper.tensor_dtype_to_np_dtype(element_type(target))
        except UnsupportedFormError:
            return None
        return Stored(first.values.astype(wanted), first.name)

    def _moved(self, first: Stored, node: ov.Node) -> Stored | None:
        shape = node.get_output_partial_shape(0)
        if shape.is_dynamic:
            return None
        if node.get_type_name() != "Transpose":
            return first.reshaped([d.get_length() for d in shape])
        order = self.stored(node.input(1).get_source_output())
        if order is None:
            return None
        places = [int(value) for value in order.values.reshape(-1)]
        return first.transposed(places or list(reversed(range(len(first.shape)))))

    @staticmethod
    def _shifted(first: Stored, second: Stored) -> Stored | None:
        if not is_unit(first) or first.rounding is None or np.any(first.rounding.zero):
            return None
        zero = np.rint(second.values).astype(np.int64)
        if np.any(zero != second.values) or np.broadcast_shapes(zero.shape, first.shape) != first.shape:
            return None
        r = first.rounding
        return Stored(first.values, first.name, Rounding(r.dtype, r.scale, zero, r.low, r.high), codes=True)

    @staticmethod
    def _scaled(first: Stored, second: Stored) -> Stored | None:
        if not is_unit(first) or first.rounding is None:
            return None
        r = first.rounding
        scale: Array = np.asarray(second.values, np.float32)
        rank = len(first.shape)
        if scale.ndim > rank or np.broadcast_shapes(scale.shape, first.shape) != first.shape:
            return None
        scale, zero = _aligned(scale, r.zero, rank)
        return Stored(first.values, first.name, Rounding(r.dtype, scale, zero, r.low, r.high), codes=True)

    @staticmethod
    def _fake_quantized(first: Stored, bounds: Sequence[Stored], node: ov.Node) -> Stored | None:
        if first.rounding is not None:
            return None
        levels, limits = int(node.get_attributes()["levels"]), [bound.values for bound in bounds]
        values = np.asarray(first.values, np.float32)
        rank = values.ndim
        if any(limit.ndim > rank for limit in limits):
            return None
        found = read_ranges(limits, levels)
        source = values
        if found is None or found[1] is not None:
            # another output range (POT halves the weights of a first layer, and doubles them here): the weights are taken there
            found = read_ranges([*limits[2:], *limits[2:]], levels)
            if found is None or not (limits[1] > limits[0]).all():
                return None
            low, high, out_low, out_high = (limit.astype(np.float64) for limit in limits)
            source = np.asarray((values - low) * ((out_high - out_low) / (high - low)) + out_low, np.float32)
        scale, zero = _aligned(found[0].scale, found[0].zero, rank)
        rounding = replace(found[0], scale=scale, zero=zero)
        places = levels_of(values, limits, levels)
        return Stored(on_the_side_of(source, rounding, places), first.name, rounding)
