"""Matrix products: QLinearMatMul, QGemm, MatMulInteger, MatMulIntegerToFloat, DynamicQuantizeMatMul."""

from __future__ import annotations

import numpy as np
import torch

from zsq_deploy.backends.onnxruntime.kernels.accumulate import Weights, matmul, saturation_loss
from zsq_deploy.backends.onnxruntime.kernels.base import Array, Inputs, Kernel, kernel, need, scalar
from zsq_deploy.backends.onnxruntime.kernels.conv import add_bias
from zsq_deploy.errors import EngineError

__all__ = ["DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul"]

F32 = np.float32


class _MatMul(Kernel):
    """``sum_k (a - za) * (b - zb)`` with numpy's broadcasting, int32."""

    def _weights(self, b: Array, zero: Array | None) -> list[Weights]:
        """One prepared matrix a batch entry of `b`."""
        centred = b.astype(np.int32)
        if zero is not None:
            # scalar, [N], or [..., 1, N] for a batch of matrices
            centred = centred - zero.astype(np.int32)
        stacked = torch.from_numpy(np.ascontiguousarray(centred.reshape(-1, *b.shape[-2:])))
        return [Weights.prepare(matrix, 255) for matrix in stacked]

    def _accumulate(
        self, a: Array, a_zero: Array | None, b: Array, b_zero: Array | None, key: str, indices: tuple[int, int]
    ) -> torch.Tensor:
        node = self.node
        squeeze_rows, squeeze_columns = a.ndim == 1, b.ndim == 1
        if squeeze_rows:
            a = a[None]
        if squeeze_columns:
            b = b[:, None]
        weights: list[Weights] = self.fixed(key, indices, lambda: self._weights(b, b_zero))
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        left = np.broadcast_to(np.arange(int(np.prod(a.shape[:-2]))).reshape(a.shape[:-2]), batch).reshape(-1)
        right = np.broadcast_to(np.arange(len(weights)).reshape(b.shape[:-2]), batch).reshape(-1)
        rows, depth, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        codes = torch.from_numpy(np.ascontiguousarray(a)).reshape(-1, rows, depth)
        zero = np.zeros((), np.int32) if a_zero is None else a_zero.astype(np.int32)
        if zero.size not in (1, rows):
            raise EngineError(
                f"{node.name} has {zero.size} zero points for {rows} rows", where=node.proto.name, remedy="use one"
            )
        zero_rows = torch.from_numpy(np.broadcast_to(zero.reshape(-1, 1), (rows, 1)).copy())
        # The runtime multiplies raw codes and corrects for zero points exactly, so saturation looks at raw codes.
        saturating = self.arithmetic.saturating_pairs and a.dtype == np.uint8 and b.dtype == np.int8
        raw: list[Weights] = self.fixed(f"raw {key}", indices, lambda: self._weights(b, None)) if saturating else []

        def product(x: torch.Tensor, index: int, zeros: torch.Tensor) -> torch.Tensor:
            values = x.to(torch.float32)
            total = matmul(values - zeros, weights[index])
            return total + saturation_loss(values, raw[index]) if saturating else total

        if len(weights) == 1:  # one matrix for all: one large product
            everything = product(codes.reshape(-1, depth), 0, zero_rows.repeat(codes.shape[0], 1))
            result = everything.reshape(codes.shape[0], rows, columns)[torch.from_numpy(left.copy())]
        else:
            result = torch.stack([product(codes[i], int(j), zero_rows) for i, j in zip(left, right, strict=True)])
        result = result.reshape(*batch, rows, columns)
        if squeeze_columns:
            result = result.squeeze(-1)
        if squeeze_rows:
            result = result.squeeze(-1 if squeeze_columns else -2)
        return result


def _optional(inputs: Inputs, index: int) -> Array | None:
    return inputs[index] if index < len(inputs) else None


@kernel("QLinearMatMul", "com.microsoft.QLinearMatMul")
class QLinearMatMul(_MatMul):
    """``y = sat(rint(f(f(acc) * m)) + zy)`` with ``m = f(f(sa * sb[n]) / sy)``."""

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        a, b = need(inputs, 0, node), need(inputs, 3, node)
        total = self._accumulate(a, inputs[2], b, inputs[5], "weights", (3, 5))
        multiplier = self.arithmetic.multiplier(
            scalar(inputs[1], "scale of a", node),
            need(inputs, 4, node).reshape(-1),
            scalar(inputs[6], "scale of y", node),
        )
        if multiplier.size > 1 and need(inputs, 4, node).ndim > 1 and need(inputs, 4, node).shape[0] != 1:
            raise EngineError(
                f"{node.name} has one scale a matrix and column", where=node.proto.name, remedy="use one a column"
            )
        return [self.arithmetic.requantize(total, multiplier, int(scalar(inputs[7], "zero point of y", node)), a.dtype)]


@kernel("com.microsoft.QGemm")
class QGemm(_MatMul):
    """A fully connected layer: ``acc = C + sum (qa - za) * (qb - zb)`` in int32 (C int32, broadcast), then

    * quantized output: ``sat(rint(f(f(acc) * m)) + zy)`` with ``m = f(f(f(alpha * sa) * sb[n]) / sy)``;
    * float output (no output scale): ``f(f(acc) * f(f(alpha * sa) * sb[n]))``.
    """

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        a, b = need(inputs, 0, node), need(inputs, 3, node)
        if node.attrs.get("transA", 0):
            a = np.ascontiguousarray(a.T)
        if node.attrs.get("transB", 0):
            b = np.ascontiguousarray(b.T)
        total = self._accumulate(a, inputs[2], b, _optional(inputs, 5), "weights", (3, 5))
        total = add_bias(total, _optional(inputs, 6))
        alpha = F32(node.attrs.get("alpha", 1.0))
        a_scale = F32(alpha * F32(scalar(inputs[1], "scale of a", node)))
        b_scale = need(inputs, 4, node).reshape(-1)
        y_scale = _optional(inputs, 7)
        if y_scale is None:
            return [self.arithmetic.to_float(total, a_scale * b_scale, None)]
        multiplier = self.arithmetic.multiplier(a_scale, b_scale, scalar(y_scale, "scale of y", node))
        return [
            self.arithmetic.requantize(
                total, multiplier, int(scalar(_optional(inputs, 8), "zero point of y", node)), a.dtype
            )
        ]


@kernel("MatMulInteger")
class MatMulInteger(_MatMul):
    """``sum (a - za) * (b - zb)`` in int32."""

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        total = self._accumulate(
            need(inputs, 0, node), _optional(inputs, 2), need(inputs, 1, node), _optional(inputs, 3), "weights", (1, 3)
        )
        return [np.asarray(total.numpy())]


@kernel("com.microsoft.MatMulIntegerToFloat")
class MatMulIntegerToFloat(_MatMul):
    """``f(f(f(acc) * f(sa * sb[n])) + bias[n])``; see :meth:`Arithmetic.to_float`."""

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        a, b = need(inputs, 0, node), need(inputs, 1, node)
        total = self._accumulate(a, _optional(inputs, 4), b, _optional(inputs, 5), "weights", (1, 5))
        factor = F32(scalar(inputs[2], "scale of a", node)) * need(inputs, 3, node).reshape(-1)
        return [self.arithmetic.to_float(total, factor, _optional(inputs, 6))]


def dynamic_parameters(x: Array) -> tuple[np.float32, np.uint8]:
    """Scale and zero point that the runtime gives a float tensor at run time.

    The range is widened to hold zero; ``s = f(f(max - min) / 255)`` (1 for a constant zero), ``z = rint(clamp(f(-min / s)))``.
    """
    low = F32(min(F32(x.min()), F32(0))) if x.size else F32(0)
    high = F32(max(F32(x.max()), F32(0))) if x.size else F32(0)
    scale = F32(1) if high == low else F32(F32(high - low) / F32(255))
    zero = np.clip(F32(F32(0) - F32(low / scale)), F32(0), F32(255))
    return scale, np.uint8(np.rint(zero))


@kernel("com.microsoft.DynamicQuantizeMatMul")
class DynamicQuantizeMatMul(_MatMul):
    """Quantize `a` with its own range (:func:`dynamic_parameters`), then as MatMulIntegerToFloat."""

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        a, b = need(inputs, 0, node), need(inputs, 1, node)
        scale, zero = dynamic_parameters(a)
        codes = self.arithmetic.quantize(a, scale, zero, np.uint8)
        total = self._accumulate(codes, np.asarray(zero), b, _optional(inputs, 3), "weights", (1, 3))
        factor = scale * need(inputs, 2, node).reshape(-1)
        return [self.arithmetic.to_float(total, factor, _optional(inputs, 4))]
