"""Pooling of codes: averages with rescaling, and maxima."""

from __future__ import annotations

import math

import numpy as np
import torch

from zsq_deploy.backends.onnxruntime.kernels.accumulate import ConvShape
from zsq_deploy.backends.onnxruntime.kernels.base import Array, Inputs, Kernel, NodeSpec, kernel, need, scalar
from zsq_deploy.backends.onnxruntime.kernels.conv import geometry
from zsq_deploy.errors import EngineError

__all__ = ["MaxPool", "NhwcMaxPool", "QLinearAveragePool", "QLinearGlobalAveragePool"]

F32 = np.float32


def pool_geometry(node: NodeSpec, spatial: tuple[int, ...]) -> tuple[ConvShape, tuple[int, ...]]:
    """Geometry of a pooling node, and the padding after each axis that the attributes ask for.

    With ``ceil_mode`` the last window may reach beyond that padding; the geometry's padding is enlarged so that it can be cut
    out. A last window that would lie wholly in the padding is left out.
    """
    shape = geometry(node, spatial, tuple(node.attrs["kernel_shape"]))
    if not node.attrs.get("ceil_mode", 0) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", ""):
        return shape, shape.after
    after = []
    for n, k, s, d, b, a in zip(
        spatial, shape.kernel, shape.strides, shape.dilations, shape.before, shape.after, strict=True
    ):
        extent = (k - 1) * d + 1
        count = math.ceil((n + b + a - extent) / s) + 1
        if (count - 1) * s >= n + b:
            count -= 1
        after.append(max(a, (count - 1) * s + extent - n - b))
    return ConvShape(shape.kernel, shape.strides, shape.dilations, shape.before, tuple(after)), shape.after


class _GlobalAverage(Kernel):
    def _global(self, x: Array, inputs: Inputs) -> Array:
        """``[N, spatial..., C]`` codes to ``[N, C]``."""
        node = self.node
        count = int(np.prod(x.shape[1:-1]))
        zero = int(scalar(inputs[2], "zero point of x", node))
        y_zero = int(scalar(inputs[4] if len(inputs) > 4 else None, "zero point of y", node))
        total = x.astype(np.int32).sum(axis=tuple(range(1, x.ndim - 1)), dtype=np.int32) - np.int32(zero * count)
        factor = self.arithmetic.average_multiplier(
            scalar(inputs[1], "scale of x", node), scalar(inputs[3], "scale of y", node), count
        )
        return self.arithmetic.requantize(torch.from_numpy(total), np.asarray(factor), y_zero, x.dtype)


@kernel("com.microsoft.QLinearGlobalAveragePool")
class QLinearGlobalAveragePool(_GlobalAverage):
    """``y = sat(rint(f(f(acc) * m)) + zy)``, ``acc = sum (qx - zx)`` in int32, ``m = f(sx / f(sy * count))``."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        last = bool(self.node.attrs.get("channels_last", 0))
        y = self._global(x if last else np.moveaxis(x, 1, -1), inputs)
        ones = (1,) * (x.ndim - 2)
        return [y.reshape(y.shape[0], *ones, y.shape[1]) if last else y.reshape(*y.shape, *ones)]


@kernel("com.microsoft.QLinearAveragePool")
class QLinearAveragePool(_GlobalAverage):
    """An average pool is *not* integer arithmetic in this runtime, but float32 on dequantized codes:

    ``y = sat(rint(f(f(S / count) / sy + zy)))`` (the zero point is added in float32 before rounding), where S is the float32
    sum of ``f(sx * (q - zx))`` in the order of the window, first axis slowest, one addition after another. ``count`` leaves
    padding out unless ``count_include_pad``. A window that covers the whole input without padding takes the arithmetic of
    QLinearGlobalAveragePool instead.
    """

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        q = need(inputs, 0, node)
        last = bool(node.attrs.get("channels_last", 0))
        x = q if last else np.moveaxis(q, 1, -1)
        spatial = tuple(x.shape[1:-1])
        shape, asked = pool_geometry(node, spatial)
        if any(d != 1 for d in shape.dilations):
            raise EngineError(f"{node.name} is dilated", where=node.proto.name, remedy="leave this layer in float")
        if shape.kernel == spatial and not any(shape.before) and not any(asked):
            y = self._global(x, inputs).reshape(x.shape[0], *(1,) * len(spatial), x.shape[-1])
        else:
            y = self._windows(x, shape, inputs)
        return [y if last else np.ascontiguousarray(np.moveaxis(y, -1, 1))]

    def _windows(self, x: Array, shape: ConvShape, inputs: Inputs) -> Array:
        node = self.node
        sx = scalar(inputs[1], "scale of x", node)
        sy = F32(scalar(inputs[3], "scale of y", node))
        zx = int(scalar(inputs[2], "zero point of x", node))
        zy = int(scalar(inputs[4] if len(inputs) > 4 else None, "zero point of y", node))
        value = F32(sx) * (x.astype(np.int32) - zx).astype(F32)
        total: torch.Tensor | None = None
        for tap in shape.taps(shape.padded(torch.from_numpy(np.ascontiguousarray(value)), 0.0)):
            total = tap.clone() if total is None else total.add_(tap)
        assert total is not None
        spatial = x.shape[1:-1]
        out = shape.outputs(spatial)
        if node.attrs.get("count_include_pad", 0):
            count = np.full(out, int(np.prod(shape.kernel)), np.int64)
        else:
            count = np.ones(out, np.int64)
            for axis, (n, k, s, b) in enumerate(zip(spatial, shape.kernel, shape.strides, shape.before, strict=True)):
                start = np.arange(out[axis]) * s - b
                inside = np.minimum(start + k, n) - np.maximum(start, 0)
                count = count * inside.reshape([-1 if i == axis else 1 for i in range(len(out))])
        mean = total.numpy() / count[None, ..., None].astype(F32)
        limits = np.iinfo(x.dtype)
        return np.clip(np.rint(mean / sy + F32(zy)), limits.min, limits.max).astype(np.int32).astype(x.dtype)


class _MaxPool(Kernel):
    arithmetic_kernel = False
    any_type = False

    def _maximum(self, x: Array) -> Array:
        """``[N, spatial..., C]`` to ``[N, out..., C]``; padding never wins."""
        if len(self.node.proto.output) > 1 and self.node.proto.output[1]:
            raise EngineError(
                f"{self.node.name} also returns indices",
                where=self.node.proto.name,
                remedy="leave this layer out of quantization",
            )
        shape, _ = pool_geometry(self.node, tuple(x.shape[1:-1]))
        low = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
        tensor = torch.from_numpy(np.ascontiguousarray(x))
        best: torch.Tensor | None = None
        for tap in shape.taps(shape.padded(tensor, low)):
            best = tap.clone() if best is None else torch.maximum(best, tap, out=best)
        assert best is not None
        return np.asarray(best.numpy())


@kernel("com.microsoft.NhwcMaxPool")
class NhwcMaxPool(_MaxPool):
    """The largest code of each window, channels last."""

    def _run(self, inputs: Inputs) -> list[Array]:
        return [self._maximum(need(inputs, 0, self.node))]


@kernel("MaxPool")
class MaxPool(_MaxPool):
    """The largest value of each window (codes, or float without indices)."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        return [np.ascontiguousarray(np.moveaxis(self._maximum(np.moveaxis(x, 1, -1)), -1, 1))]
