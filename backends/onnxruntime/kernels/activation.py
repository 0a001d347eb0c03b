"""Everything that maps one code to one code, by a table of 256: activations, and the rescaling in Concat and Where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.onnxruntime.kernels.arithmetic import Arithmetic, codes
from zsq_deploy.backends.onnxruntime.kernels.base import Array, Inputs, Kernel, kernel, need, scalar

__all__ = ["QLinearConcat", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearWhere", "code_table"]

F32 = np.float32


def code_table(
    arithmetic: Arithmetic,
    x: tuple[Any, Any],
    y: tuple[Any, Any],
    dtype: npt.DTypeLike,
    function: Callable[[Array], Array] | None = None,
) -> Array:
    """The output code of every input code, indexed by byte: dequantize, apply `function` in float32, quantize.

    ``table[q] = sat(rint(f(function(f(sx * (q - zx))) / sy)) + zy)``; the division makes the rescaling of Concat differ from a
    multiplication by ``sx / sy``.
    """
    value = F32(x[0]) * (codes(dtype) - np.int32(x[1])).astype(F32)
    if function is not None:
        value = function(value)
    return arithmetic.quantize(value, y[0], y[1], dtype)


def look_up(table: Array, q: Array) -> Array:
    """Apply a table indexed by byte."""
    return np.take(table, q.view(np.uint8))


class _Activation(Kernel):
    def _function(self, value: Array) -> Array:
        raise NotImplementedError

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        q = need(inputs, 0, node)
        x = scalar(inputs[1], "scale of x", node), scalar(inputs[2], "zero point of x", node)
        zero = inputs[4] if len(inputs) > 4 else None
        y = scalar(inputs[3], "scale of y", node), scalar(zero, "zero point of y", node)
        table = self.fixed("table", (1, 2, 3, 4), lambda: code_table(self.arithmetic, x, y, q.dtype, self._function))
        return [look_up(table, np.ascontiguousarray(q))]


@kernel("com.microsoft.QLinearLeakyRelu")
class QLinearLeakyRelu(_Activation):
    """Table of ``v >= 0 ? v : f(alpha * v)``."""

    def _function(self, value: Array) -> Array:
        return np.where(value >= 0, value, F32(self.node.attrs.get("alpha", 0.01)) * value).astype(F32)


@kernel("com.microsoft.QLinearSigmoid")
class QLinearSigmoid(_Activation):
    """Table of the runtime's own float logistic function at the 256 dequantized codes.

    The logistic function is a float polynomial of the runtime, not integer arithmetic; its 256 values are asked of the
    runtime's Sigmoid, the rounding to codes is ours.
    """

    def _function(self, value: Array) -> Array:
        return self.node.float_function("Sigmoid", value)


@kernel("com.microsoft.QLinearConcat")
class QLinearConcat(Kernel):
    """Concatenation of tensors with different scales: each is mapped to the output's scale by a table of 256.

    An input with exactly the output's scale and zero point is copied.
    """

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        y = scalar(inputs[0], "scale of y", node), scalar(inputs[1], "zero point of y", node)
        parts = []
        for index in range(2, len(inputs), 3):
            q = np.ascontiguousarray(need(inputs, index, node))
            x = scalar(inputs[index + 1], "scale of x", node), scalar(inputs[index + 2], "zero point of x", node)
            if x == y:
                parts.append(q)
                continue
            table = self.fixed(
                f"table{index}",
                (0, 1, index + 1, index + 2),
                lambda x=x, q=q: code_table(self.arithmetic, x, y, q.dtype),  # type: ignore[misc]
            )
            parts.append(look_up(table, q))
        return [np.concatenate(parts, axis=int(node.attrs["axis"]))]


@kernel("com.microsoft.QLinearWhere")
class QLinearWhere(Kernel):
    """Selection between two tensors of different scales; each is mapped to the output's scale by a table of 256."""

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        out = scalar(inputs[7], "scale of z", node), scalar(inputs[8], "zero point of z", node)
        chosen = []
        for index in (1, 4):
            q = np.ascontiguousarray(need(inputs, index, node))
            x = scalar(inputs[index + 1], "scale", node), scalar(inputs[index + 2], "zero point", node)
            chosen.append(q if x == out else look_up(code_table(self.arithmetic, x, out, q.dtype), q))
        return [np.where(need(inputs, 0, node), chosen[0], chosen[1])]
