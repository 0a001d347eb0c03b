"""QLinearSoftmax: a table of exponentials and float32 sums."""

from __future__ import annotations

import math

import numpy as np

from zsq_deploy.backends.onnxruntime.kernels.base import Array, Inputs, Kernel, kernel, need, scalar

__all__ = ["QLinearSoftmax", "exponential_table"]

F32 = np.float32


def exponential_table(x_scale: np.float32, length: int) -> Array:
    """``f(exp((i - 255 + shift) * sx))`` for i = 0..255: the exponentials of codes below the row's maximum (i = 255).

    ``shift = max(0, f(ln(f(FLT_MAX / length))) - 5) / sx`` lifts them towards the top of float32's range, so that small ones do
    not vanish and a sum of `length` of them does not overflow. The logarithm is rounded to float32; everything else but the
    last rounding is float64.
    """
    room = float(F32(math.log(float(F32(np.finfo(F32).max) / F32(length)))))
    shift = max(0.0, room - 5) / float(x_scale)
    return np.array([math.exp((i - 255 + shift) * float(x_scale)) for i in range(256)]).astype(F32)


@kernel("com.microsoft.QLinearSoftmax")
class QLinearSoftmax(Kernel):
    """``y = min(rint(e * Y / S) + zy, qmax)`` with ``e = table[255 - max(q) + q]``; see :meth:`Arithmetic.softmax`
    for how the quotient is formed.

    S is the float32 sum of the row's ``e``, one addition after another; ``Y = floor(f(1 / sy))``: the output's scale is
    *truncated to the inverse of an integer*, which is exact only for the usual 1/256.
    Attribute ``opset``: below 13 the row is everything from ``axis`` on, from 13 on it is that axis alone.
    """

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        q = need(inputs, 0, node)
        old = int(node.attrs.get("opset", 13)) < 13
        axis = int(node.attrs.get("axis", 1 if old else -1)) % q.ndim
        if old:
            rows = q.reshape(int(np.prod(q.shape[:axis])), -1)
        else:
            moved = np.swapaxes(q, axis, -1)
            rows = moved.reshape(-1, moved.shape[-1])
        sx = F32(scalar(inputs[1], "scale of x", node))
        scale = np.floor(F32(1) / F32(scalar(inputs[3], "scale of y", node)))
        zero = int(scalar(inputs[4] if len(inputs) > 4 else None, "zero point of y", node))
        table = self.fixed(f"table{rows.shape[1]}", (1,), lambda: exponential_table(sx, rows.shape[1]))
        index = rows.astype(np.int32)
        index += 255 - index.max(axis=1, keepdims=True)
        value = np.take(table, index)
        total = np.cumsum(value, axis=1, dtype=F32)[:, -1:]
        y = self.arithmetic.softmax(value, total, scale, zero, q.dtype)
        return [y.reshape(q.shape) if old else np.ascontiguousarray(np.swapaxes(y.reshape(moved.shape), axis, -1))]
