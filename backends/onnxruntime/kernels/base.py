"""What a kernel is: built from a node and its constants, called with arrays; and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.backends.onnxruntime.kernels.arithmetic import Arithmetic
from zsq_deploy.errors import EngineError

__all__ = ["KERNELS", "Array", "Kernel", "NodeSpec", "kernel", "quantized", "scalar"]

Array = npt.NDArray[Any]
Inputs = Sequence[Array | None]

QUANTIZED = (np.dtype(np.uint8), np.dtype(np.int8))


@dataclass(frozen=True)
class NodeSpec:
    """One node of the runtime's optimized graph, as a kernel sees it.

    Attributes:
        proto: The node.
        attrs: Its attributes as Python values.
        constants: One entry an input: the array behind an initializer, or ``None`` for a computed value.
        float_function: Evaluates an elementwise float operator by the runtime's own float kernel; only used to fill the
            256-entry tables of activation functions.
        opset: Version of the default operator set of the graph.
    """

    proto: onnx.NodeProto
    attrs: Mapping[str, Any]
    constants: tuple[Array | None, ...]
    float_function: Callable[[str, Array], Array]
    opset: int = 17

    @property
    def name(self) -> str:
        """Operator and node name, for messages."""
        return f"{self.proto.op_type} {self.proto.name!r}"

    def constant(self, index: int) -> Array | None:
        """The constant behind one input, if it is one."""
        return self.constants[index] if index < len(self.constants) else None


class Kernel:
    """A kernel bound to a node. Subclasses implement :meth:`_run`."""

    # Whether the kernel rounds or sums (False: it only moves, compares or describes values).
    arithmetic_kernel: ClassVar[bool] = True
    # Whether it is also used where no 8-bit value is involved (False: float operators are left to the runtime).
    any_type: ClassVar[bool] = True

    def __init__(self, node: NodeSpec, arithmetic: Arithmetic) -> None:
        self.node = node
        self.arithmetic = arithmetic
        self._memory: dict[str, Any] = {}

    def __call__(self, inputs: Inputs) -> list[Array]:
        """The node's outputs.

        Args:
            inputs: One array an input of the node (constants included), ``None`` for an omitted optional one.
        """
        return self._run(inputs)

    def _run(self, inputs: Inputs) -> list[Array]:
        raise NotImplementedError

    def fixed(self, key: str, indices: Sequence[int], make: Callable[[], Any]) -> Any:
        """`make()`, remembered when all inputs in `indices` are constants (or absent)."""
        proto = self.node.proto
        steady = all(
            index >= len(proto.input) or not proto.input[index] or self.node.constant(index) is not None
            for index in indices
        )
        if not steady:
            return make()
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]


KERNELS: dict[tuple[str, str], type[Kernel]] = {}

K = TypeVar("K", bound=type[Kernel])


def kernel(*operators: str) -> Callable[[K], K]:
    """Register a class for operators, written ``Op`` or ``com.microsoft.Op``."""

    def register(cls: K) -> K:
        for operator in operators:
            domain, _, op_type = operator.rpartition(".")
            KERNELS[domain, op_type] = cls
        return cls

    return register


def scalar(value: Array | None, what: str, node: NodeSpec, default: Any = 0) -> Any:
    """The only element of a scale or zero point, as a numpy scalar.

    Raises:
        EngineError: There are several.
    """
    if value is None:
        return default
    if value.size != 1:
        raise EngineError(
            f"{node.name} has {value.size} values as {what}; one was expected",
            where=node.proto.name,
            remedy="quantize this tensor per tensor",
        )
    return value.reshape(-1)[0]


def quantized(array: Array | None) -> bool:
    """Whether an array holds 8-bit codes."""
    return array is not None and array.dtype in QUANTIZED


def need(inputs: Inputs, index: int, node: NodeSpec) -> Array:
    """A mandatory input.

    Raises:
        EngineError: It is missing.
    """
    array = inputs[index] if index < len(inputs) else None
    if array is None:
        raise EngineError(
            f"{node.name} lacks input {index}", where=node.proto.name, remedy="the engine file is damaged"
        )
    return array
