"""From a range to scale and zero point, and the simulation of quantization in floating point with gradients.

The formulas are those of ONNX QuantizeLinear and DequantizeLinear:
``q = clamp(rint(x / scale) + zero_point, qmin, qmax)``, ``x' = (q - zero_point) * scale``, rounding half to even.
Gradients are straight-through inside the representable range and zero outside of it (Bengio et al. 2013); the gradient with
respect to the scale is the one of LSQ (Esser et al. 2020, equation 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch

from zsq_deploy.errors import UsageError
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["QParams", "fake_quant", "onnx_type", "qparams", "storage_dtype", "weight_qparams"]

Array = npt.NDArray[Any]

# Scales below the smallest normal float32 lose their precision or flush to zero in runtimes.
_TINY = float(np.finfo(np.float32).tiny)


def storage_dtype(scheme: Scheme) -> np.dtype[Any]:
    """The numpy (or ml_dtypes) integer type that holds the codes of a scheme: 4, 8 or 16 bits wide."""
    if scheme.bits <= 4:
        kind: np.dtype[Any] = np.dtype(ml_dtypes.int4 if scheme.signed else ml_dtypes.uint4)
        return kind
    if scheme.bits <= 8:
        return np.dtype(np.int8 if scheme.signed else np.uint8)
    return np.dtype(np.int16 if scheme.signed else np.uint16)


def onnx_type(scheme: Scheme) -> int:
    """The element type of ONNX that holds the codes of a scheme (``onnx.TensorProto.INT8``, ...)."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(storage_dtype(scheme)))


@dataclass(frozen=True, eq=False)
class QParams:
    """Scale and zero point of one tensor.

    Attributes:
        scale: float32; shape ``()`` per tensor, ``[C]`` per channel, the tensor's shape with a shortened `axis` per block.
        zero_point: int32, same shape.
        scheme: What the numbers mean.
        axis: Channel axis, or blocked axis; ``None`` per tensor.
    """

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    scheme: Scheme
    axis: int | None = None

    @property
    def low(self) -> Array:
        """Smallest representable number (float64, shaped like the scale)."""
        return (self.scheme.qmin - self.zero_point.astype(np.float64)) * self.scale

    @property
    def high(self) -> Array:
        """Largest representable number (float64, shaped like the scale)."""
        return (self.scheme.qmax - self.zero_point.astype(np.float64)) * self.scale

    def expand(self, parameter: Array, shape: tuple[int, ...]) -> Array:
        """Scale or zero point in a form that broadcasts against a tensor of that shape."""
        if self.axis is None:
            return parameter
        axis = self.axis % len(shape)
        if self.scheme.granularity is Granularity.BLOCK:
            return np.repeat(parameter, self.scheme.block, axis=axis).take(range(shape[axis]), axis=axis)
        form = [1] * len(shape)
        form[axis] = -1
        return parameter.reshape(form)

    def quantize(self, x: Array) -> Array:
        """Integer codes of a float array, in the scheme's storage type; the division is done in `x`'s precision."""
        scale = self.expand(self.scale, x.shape).astype(x.dtype)
        zero = self.expand(self.zero_point, x.shape)
        codes = np.rint(x / scale) + zero
        clipped = np.clip(codes, self.scheme.qmin, self.scheme.qmax)
        return np.asarray(clipped.astype(np.int32).astype(storage_dtype(self.scheme)))

    def dequantize(self, codes: Array) -> npt.NDArray[np.float32]:
        """float32 numbers of integer codes."""
        zero = self.expand(self.zero_point, codes.shape)
        offset = (codes.astype(np.int32) - zero).astype(np.float32)
        return np.asarray(offset * self.expand(self.scale, codes.shape), np.float32)


def qparams(low: float | Array, high: float | Array, scheme: Scheme, *, axis: int | None = None) -> QParams:
    """Scale and zero point that make ``[low, high]`` representable; zero always is, exactly.

    A range without extent (only zeros) gets scale 1. An asymmetric zero point is rounded to a whole code, so the representable
    range can be shifted against the wanted one by up to half a step, as in every runtime.

    Args:
        low: Smallest number(s); above zero counts as zero.
        high: Largest number(s); below zero counts as zero.
        scheme: The integers to map to.
        axis: Channel axis that vectors of `low` and `high` run along, or the blocked axis.
    """
    small = np.minimum(np.asarray(low, np.float64), 0.0)
    large = np.maximum(np.asarray(high, np.float64), 0.0)
    if not (np.isfinite(small).all() and np.isfinite(large).all()):
        raise UsageError(
            "a range is not finite", where="qparams", remedy="look for NaN or infinite values in the network"
        )
    qmin, qmax = scheme.qmin, scheme.qmax
    if scheme.symmetric:
        middle = 0 if scheme.signed else (qmax + 1) // 2
        # A range that is one code shorter on the positive side may still use the extra code on the negative side.
        scale = np.maximum(large / (qmax - middle), small / (qmin - middle))
        scale = np.where(scale.astype(np.float32) < _TINY, 1.0, scale).astype(np.float32)
        zero = np.full(scale.shape, middle, np.int32)
    else:
        scale = (large - small) / (qmax - qmin)
        scale = np.where(scale.astype(np.float32) < _TINY, 1.0, scale).astype(np.float32)
        zero = np.clip(np.rint(qmin - small / scale.astype(np.float64)), qmin, qmax).astype(np.int32)
    return QParams(np.asarray(scale), np.asarray(zero), scheme, axis)


def _grouped(w: Array, scheme: Scheme, axis: int | None) -> tuple[Array, tuple[int, ...]]:
    """`w` as ``[groups, members]`` (NaN where a last block is short), and the shape of the parameters."""
    w = w.astype(np.float64)
    if scheme.granularity is Granularity.TENSOR:
        return w.reshape(1, -1), ()
    if axis is None:
        raise UsageError(f"{scheme} needs an axis", where="weight_qparams", remedy="say which axis holds the channels")
    axis %= w.ndim
    if scheme.granularity is Granularity.CHANNEL:
        return np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1), (w.shape[axis],)
    blocks = -(-w.shape[axis] // scheme.block)
    last = np.moveaxis(w, axis, -1)
    padded = np.full((*last.shape[:-1], blocks * scheme.block), np.nan)
    padded[..., : w.shape[axis]] = last
    groups = padded.reshape(-1, scheme.block)
    shape = list(w.shape)
    shape[axis] = blocks
    return groups, tuple(shape)


def _ungrouped(values: Array, scheme: Scheme, axis: int | None, shape: tuple[int, ...]) -> Array:
    if scheme.granularity is not Granularity.BLOCK:
        return values.reshape(shape)
    assert axis is not None
    axis %= len(shape)
    moved = [size for index, size in enumerate(shape) if index != axis] + [shape[axis]]
    return np.ascontiguousarray(np.moveaxis(values.reshape(moved), -1, axis))


def weight_qparams(
    w: Array, scheme: Scheme, axis: int | None = None, method: Literal["minmax", "mse"] = "minmax"
) -> QParams:
    """Scale and zero point of a weight.

    Args:
        w: The weight.
        scheme: The integers; its granularity says what shares a scale.
        axis: Channel axis (per channel) or blocked axis (per block); not used per tensor.
        method: ``minmax``, or ``mse``: of 61 clip ratios between 0.4 and 1 the one with the smallest squared error, a group
            at a time.
    """
    groups, shape = _grouped(np.asarray(w), scheme, axis)
    if groups.size == 0:
        raise UsageError("an empty weight has no range", where="weight_qparams")
    low = np.minimum(np.nanmin(groups, axis=1), 0.0)
    high = np.maximum(np.nanmax(groups, axis=1), 0.0)
    if method == "mse":
        best = np.full(len(groups), np.inf)
        ratio = np.ones(len(groups))
        for candidate in np.linspace(1.0, 0.4, 61):
            trial = qparams(low * candidate, high * candidate, scheme, axis=0)
            scale, zero = trial.scale[:, None].astype(np.float64), trial.zero_point[:, None]
            codes = np.clip(np.rint(groups / scale) + zero, scheme.qmin, scheme.qmax)
            error = np.nansum(np.square((codes - zero) * scale - groups), axis=1)
            better = error < best
            best, ratio = np.where(better, error, best), np.where(better, candidate, ratio)
        low, high = low * ratio, high * ratio
    found = qparams(low, high, scheme)
    per_tensor = scheme.granularity is Granularity.TENSOR
    return QParams(
        _ungrouped(found.scale, scheme, axis, shape),
        _ungrouped(found.zero_point, scheme, axis, shape),
        scheme,
        None if per_tensor else axis,
    )


def _broadcast(parameter: torch.Tensor, x: torch.Tensor, axis: int | None) -> torch.Tensor:
    if axis is None or parameter.ndim == 0:
        return parameter
    if parameter.ndim == 1:
        form = [1] * x.ndim
        form[axis] = -1
        return parameter.reshape(form)
    axis %= x.ndim
    length = -(-x.shape[axis] // parameter.shape[axis])
    return parameter.repeat_interleave(length, dim=axis).narrow(axis, 0, x.shape[axis])


def fake_quant(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> torch.Tensor:
    """Quantize and dequantize in floating point, differentiable in `x` and in `scale`.

    Args:
        x: Any float tensor.
        scale: Scalar; ``[C]`` along `axis`; or `x`'s shape with a shortened `axis` for blocks.
        zero_point: Same shape as the scale; may be float (not rounded here).
        qmin: Smallest code.
        qmax: Largest code.
        axis: Channel axis or blocked axis.

    Returns:
        `x`'s shape and type. The gradient in `x` is 1 where the code is not clipped and 0 elsewhere.
    """
    s = _broadcast(torch.as_tensor(scale, dtype=x.dtype, device=x.device), x, axis)
    z = _broadcast(torch.as_tensor(zero_point, dtype=x.dtype, device=x.device), x, axis)
    u = x / s
    rounded = torch.round(u)
    if torch.is_grad_enabled() and u.requires_grad:
        # The difference of two neighbours is exact, so the sum is the rounded number itself, with the gradient of u.
        rounded = u + (rounded - u).detach()
    return (torch.clamp(rounded + z, qmin, qmax) - z) * s
