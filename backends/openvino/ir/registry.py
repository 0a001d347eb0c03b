"""How an operation of an OpenVINO IR is entered, and what its translator gets to see.

An entry is a *translator*: a function that writes the ONNX nodes of one operation. Enter one with a decorated function in the module
of its family::

    @translates("Transpose")
    def transpose(op: Op) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import openvino as ov

if TYPE_CHECKING:
    from zsq_deploy.backends.openvino.ir.writer import Writer

__all__ = ["TRANSLATORS", "Array", "Op", "Translator", "UnsupportedFormError", "element_type", "translates"]

Array = npt.NDArray[Any]

_T = onnx.TensorProto

_ELEMENT: dict[str, int] = {
    "f16": _T.FLOAT, "bf16": _T.FLOAT, "f32": _T.FLOAT, "f64": _T.DOUBLE,
    "i4": _T.INT4, "u4": _T.UINT4, "i8": _T.INT8, "u8": _T.UINT8, "i16": _T.INT16, "u16": _T.UINT16,
    "i32": _T.INT32, "u32": _T.UINT32, "i64": _T.INT64, "u64": _T.UINT64, "boolean": _T.BOOL,
}  # fmt: skip


class UnsupportedFormError(Exception):
    """The operation is known, but not this form of it; the message says which form."""


def element_type(name: str) -> int:
    """The ONNX element type of an OpenVINO one; narrow floats are computed, and written, as float32.

    Raises:
        UnsupportedFormError: ONNX has no such type.
    """
    if name not in _ELEMENT:
        raise UnsupportedFormError(f"element type {name}")
    return _ELEMENT[name]


class Op:
    """One operation as its translator sees it.

    Attributes:
        node: The operation.
        writer: Where its ONNX nodes go.
        kind: Its type, ``Convolution``.
        version: Operator set that defines it, ``opset1``.
        name: Its friendly name.
        attrs: Its attributes as Python values.
    """

    def __init__(self, node: ov.Node, writer: Writer) -> None:
        self.node = node
        self.writer = writer
        self.kind: str = node.get_type_name()
        self.version: str = node.get_type_info().version_id or ""
        self.name: str = node.get_friendly_name()
        self.attrs: Mapping[str, Any] = dict(node.get_attributes())

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return int(self.node.get_input_size())

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return int(self.node.get_output_size())

    def source(self, index: int) -> ov.Output:
        """The output that feeds an input."""
        return self.node.input(index).get_source_output()

    def has(self, index: int) -> bool:
        """Whether an input is given."""
        return index < self.inputs

    def rank(self, index: int) -> int:
        """Rank of an input.

        Raises:
            UnsupportedFormError: It is not known.
        """
        found = self.source(index).get_partial_shape().rank
        if found.is_dynamic:
            raise UnsupportedFormError(f"input {index} of unknown rank")
        return int(found.get_length())

    def shape(self, index: int) -> tuple[int | None, ...]:
        """Shape of an input, ``None`` where a size is open."""
        self.rank(index)
        return tuple(d.get_length() if d.is_static else None for d in self.source(index).get_partial_shape())

    def type(self, index: int) -> str:
        """Element type of an input by its OpenVINO name, ``f32``."""
        return str(self.source(index).get_element_type().get_type_name())

    @property
    def result_type(self) -> str:
        """Element type of the first output."""
        return str(self.node.output(0).get_element_type().get_type_name())

    def constant(self, index: int) -> Array | None:
        """The numbers of an input that is a plain constant; ``None`` when it is computed, or rounded on the way."""
        stored = self.writer.plain(self.source(index)) if self.has(index) else None
        return None if stored is None else stored.values

    def numbers(self, index: int) -> Array:
        """The numbers of an input that has to be a constant.

        Raises:
            UnsupportedFormError: It is computed.
        """
        found = self.constant(index)
        if found is None:
            raise UnsupportedFormError(f"input {index} is computed; a constant is understood")
        return found

    def ints(self, index: int) -> list[int]:
        """The integers of an input that has to be a constant."""
        return [int(value) for value in self.numbers(index).reshape(-1)]

    def scalar(self, index: int) -> float:
        """The one number of an input that has to be a constant."""
        found = self.numbers(index)
        if found.size != 1:
            raise UnsupportedFormError(f"input {index} holds {found.size} numbers; one is understood")
        return float(found.reshape(()))

    # -- writing ------------------------------------------------------------------------------------------------------

    def input(self, index: int) -> str:
        """The ONNX value of an input; a constant is written when it is first asked for."""
        return self.writer.value(self.source(index))

    def input_as(self, index: int, kind: str) -> str:
        """The ONNX value of an input in an element type, with a Cast where it has another."""
        constant = self.constant(index)
        if constant is not None:
            wanted = onnx.helper.tensor_dtype_to_np_dtype(element_type(kind))
            name = self.writer.names[self.writer.key(self.source(index))]
            return self.writer.constant(name, constant.astype(wanted), share=True)
        value = self.input(index)
        if element_type(self.type(index)) == element_type(kind):
            return value
        return self.step("Cast", [value], to=element_type(kind))

    def output(self, index: int = 0) -> str:
        """The ONNX name of an output."""
        return self.writer.names[self.writer.key(self.node.output(index))]

    def number(self, hint: str, value: Array | np.generic | float, kind: Any = np.float32) -> str:
        """A constant that the operation does not have as an input."""
        return self.writer.constant(f"{self.name}/{hint}", np.asarray(value, kind), share=True)

    def whole(self, hint: str, values: Sequence[int]) -> str:
        """A constant list of int64."""
        return self.number(hint, np.asarray(list(values), np.int64), np.int64)

    def step(self, op_type: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        """Write a node between the inputs and the outputs of the operation; returns the value that it makes."""
        made = self.writer.node(op_type, inputs, None, f"{self.name}/{op_type}", outputs, **attributes)
        return made[0]

    def emit(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Write the node that makes the outputs of the operation."""
        names = [self.output(index) for index in range(self.outputs)]
        self.writer.node(op_type, inputs, names, self.name, len(names), **attributes)

    def emit_as(self, value: str, made: str, wanted: str, index: int = 0) -> None:
        """Deliver a value of type `made` as an output of type `wanted` (OpenVINO names)."""
        if element_type(made) == element_type(wanted):
            self.writer.node("Identity", [value], [self.output(index)], f"{self.name}/Identity", 1)
        else:
            self.writer.node("Cast", [value], [self.output(index)], f"{self.name}/Cast", 1, to=element_type(wanted))


Translator = Callable[[Op], None]

TRANSLATORS: dict[str, Translator] = {}


def translates(*kinds: str) -> Callable[[Translator], Translator]:
    """Enter a translator for one or several types of operations."""

    def enter(function: Translator) -> Translator:
        for kind in kinds:
            if kind in TRANSLATORS:
                raise ValueError(f"operation {kind!r} is entered twice")
            TRANSLATORS[kind] = function
        return function

    return enter
