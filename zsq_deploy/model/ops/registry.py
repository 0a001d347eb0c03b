"""The table itself: how an operator is entered, and what its builder gets to see.

An entry is a *builder*: a function that reads a node's attributes and constants once and returns a *kernel*, the callable that
computes tensors from tensors. Kernels hold no tensors and no state, so a twin can be copied, moved and run again.

Enter an operator with one decorated function in the module of its family::

    @op("Trilu", host=(1,))
    def trilu(node: Node) -> Kernel: ...

`host` names the inputs whose *numbers* steer the computation (shapes, axes, pads, counts). They stay on the CPU, so that a twin
on a GPU never waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch

from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.model.ops.types import compute_type, torch_type

__all__ = [
    "DOMAIN",
    "MICROSOFT",
    "OPS",
    "OPSETS",
    "Builder",
    "Kernel",
    "Node",
    "OpImpl",
    "UnsupportedVariantError",
    "op",
]

DOMAIN = ""
MICROSOFT = "com.microsoft"
OPSETS = range(13, 22)  # of the default domain

Kernel = Callable[..., Any]


class UnsupportedVariantError(Exception):
    """The operator is in the table, but not this form of it; the message says which form."""


class Node:
    """One node as a builder sees it.

    Attributes:
        proto: The node.
        attrs: Its attributes as Python values.
        opset: Version of the default operator set of the graph.
        dtype: The float type in which the twin computes.
        codes: The node's output is wanted as integer codes held in floats (quantized values with a gradient).
    """

    def __init__(self, graph: Graph, proto: onnx.NodeProto, dtype: torch.dtype, *, codes: bool = False) -> None:
        self.graph = graph
        self.proto = proto
        self.attrs = attributes(proto)
        self.opset = graph.opset
        self.dtype = dtype
        self.codes = codes

    @property
    def outputs(self) -> int:
        """How many outputs are wanted; trailing unnamed ones are not counted."""
        names = list(self.proto.output)
        while names and not names[-1]:
            names.pop()
        return len(names)

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.proto.input) and bool(self.proto.input[index])

    def wants(self, index: int) -> bool:
        """Whether an optional output is wanted."""
        return index < len(self.proto.output) and bool(self.proto.output[index])

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        return self.attrs.get(name, default)

    def constant(self, index: int) -> np.ndarray[Any, Any] | None:
        """The array behind an input when it is a constant of the graph."""
        return self.graph.constant(self.proto.input[index]) if self.has(index) else None

    def input_type(self, index: int) -> np.dtype[Any] | None:
        """The inferred element type of an input."""
        return self.graph.dtype(self.proto.input[index]) if self.has(index) else None

    def ints(self, index: int) -> Callable[[torch.Tensor | None], list[int] | None]:
        """A reader for an input that is a list of integers: constants are read now, others when they come."""
        if not self.has(index):
            return lambda _given: None
        constant = self.constant(index)
        if constant is not None:
            fixed = [int(value) for value in np.asarray(constant).reshape(-1)]
            return lambda _given: fixed
        return lambda given: None if given is None else [int(value) for value in given.reshape(-1).tolist()]

    def floats(self, index: int) -> Callable[[torch.Tensor | None], list[float] | None]:
        """A reader for an input that is a list of numbers, as :meth:`ints`."""
        if not self.has(index):
            return lambda _given: None
        constant = self.constant(index)
        if constant is not None:
            fixed = [float(value) for value in np.asarray(constant).reshape(-1)]
            return lambda _given: fixed
        return lambda given: None if given is None else [float(value) for value in given.reshape(-1).tolist()]

    def axes(self, index: int, since: int) -> Callable[[torch.Tensor | None], list[int] | None]:
        """A reader for `axes`, an attribute before opset `since` and input `index` from then on."""
        if self.opset >= since:
            return self.ints(index)
        given = self.get("axes")
        fixed = None if given is None else [int(axis) for axis in given]
        return lambda _given: fixed

    def target_type(self, onnx_type: int) -> torch.dtype:
        """The torch type of a value that the graph makes in an ONNX element type.

        Raises:
            UnsupportedVariantError: Torch has no such type.
        """
        found = torch_type(onnx_type)
        if found is None:
            name = onnx.TensorProto.DataType.Name(onnx_type)
            raise UnsupportedVariantError(f"element type {name} has no counterpart in torch")
        return compute_type(found, self.dtype)


Builder = Callable[[Node], Kernel]


@dataclass(frozen=True)
class OpImpl:
    """A row of the op table.

    Attributes:
        domain: Operator domain; ``""`` is ONNX itself.
        op_type: Operator name.
        build: Makes the kernel of a node.
        host: Inputs whose numbers are read on the CPU.
        since: First opset that has the operator, where that is above 13.
        until: Last opset that has the operator, where that is below 21.
    """

    domain: str
    op_type: str
    build: Builder
    host: tuple[int, ...] = ()
    since: int = OPSETS.start
    until: int = OPSETS.stop - 1


OPS: dict[tuple[str, str], OpImpl] = {}


def op(
    *names: str,
    host: tuple[int, ...] = (),
    domain: str = DOMAIN,
    since: int = OPSETS.start,
    until: int = OPSETS.stop - 1,
) -> Callable[[Builder], Builder]:
    """Enter a builder into the table under one or several operator names."""

    def enter(build: Builder) -> Builder:
        for name in names:
            if (domain, name) in OPS:
                raise ValueError(f"operator {name!r} of domain {domain!r} is entered twice")
            OPS[(domain, name)] = OpImpl(domain, name, build, host, since, until)
        return build

    return enter
