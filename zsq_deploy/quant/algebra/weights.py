"""Weights of all layers in one form: groups, output channels, input channels, kernel elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.editing import is_default
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["LAYERS", "Form", "form_of"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply with a weight."""


@dataclass(frozen=True)
class Form:
    """How a layer's weight is read as ``[groups, outputs / groups, inputs / groups, elements]``.

    Attributes:
        op: ``Conv``, ``ConvTranspose``, ``Gemm`` or ``MatMul``.
        shape: Shape of the weight as it is stored.
        groups: Groups of a convolution, 1 otherwise.
        turned: Gemm with ``transB``: the output channels come first.
    """

    op: str
    shape: tuple[int, ...]
    groups: int
    turned: bool

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        if self.op == "Conv":
            return self.shape[0]
        if self.op == "ConvTranspose":
            return self.shape[1] * self.groups
        return self.shape[0] if self.turned else self.shape[1]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        if self.op == "Conv":
            return self.shape[1] * self.groups
        if self.op == "ConvTranspose":
            return self.shape[0]
        return self.shape[1] if self.turned else self.shape[0]

    @property
    def output_axis(self) -> int:
        """Axis of the stored weight that counts output channels (of one group, for a transposed convolution)."""
        return 0 if self.op == "Conv" or self.turned else 1

    def read(self, weight: Array) -> Array:
        """The stored weight as ``[groups, outputs / groups, inputs / groups, elements]``."""
        groups = self.groups
        if self.op == "Conv":
            return weight.reshape(groups, self.shape[0] // groups, self.shape[1], -1)
        if self.op == "ConvTranspose":
            return weight.reshape(groups, self.shape[0] // groups, self.shape[1], -1).swapaxes(1, 2)
        return (weight if self.turned else weight.T)[None, :, :, None]

    def write(self, values: Array) -> Array:
        """The reverse of :meth:`read`."""
        if self.op == "Conv":
            return np.ascontiguousarray(values).reshape(self.shape)
        if self.op == "ConvTranspose":
            return np.ascontiguousarray(values.swapaxes(1, 2)).reshape(self.shape)
        flat = values[0, :, :, 0]
        return np.ascontiguousarray(flat if self.turned else flat.T)

    def along_outputs(self, values: Array) -> Array:
        """A vector ``[outputs]`` in a form that broadcasts against :meth:`read`."""
        return values.reshape(self.groups, -1, 1, 1)

    def along_inputs(self, values: Array) -> Array:
        """A vector ``[inputs]`` in a form that broadcasts against :meth:`read`."""
        return values.reshape(self.groups, 1, -1, 1)


def form_of(graph: Graph, node: onnx.NodeProto) -> Form | None:
    """How the weight of a node is stored; ``None`` where it is computed, or of a kind that has no channels of this sort."""
    if not is_default(node, *LAYERS) or len(node.input) < 2:
        return None
    weight = graph.constant(node.input[1])
    if weight is None:
        return None
    return form_for(node, weight.shape)


def form_for(node: onnx.NodeProto, shape: tuple[int, ...]) -> Form | None:
    """:func:`form_of` for a weight of which only the shape is known."""
    found = attributes(node)
    if node.op_type in ("Conv", "ConvTranspose"):
        return Form(node.op_type, tuple(shape), int(found.get("group", 1)), False) if len(shape) >= 3 else None
    if len(shape) != 2 or (node.op_type == "Gemm" and found.get("transA", 0)):
        return None
    return Form(node.op_type, tuple(shape), 1, bool(node.op_type == "Gemm" and found.get("transB", 0)))
