"""The differentiable quantizers of block reconstruction, as custom autograd functions with closed-form gradients.

* Weights: ``w(v, s) = s * clamp(floor(w / s0) + h(v), low, high)`` with the rectified sigmoid ``h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)``
  (Nagel et al. 2020, AdaRound, equations 22 to 24), and a scale that is learned with it while the integer part stays (Jeon et al. 2023,
  Genie, section 3.2). The gradient of the rounding regulariser ``1 - |2 h - 1|**beta`` is added where the gradient of ``v`` is computed.
* Activations: ``clamp(rint(x / s), low, high) * s`` with the gradient of LSQ (Esser et al. 2020, equations 3 and 5), the activation function
  that the integer range enforces, and QDrop (Wei et al. 2022, equation 12): a random part of the elements is not rounded.

Codes are counted from the zero point: ``low = qmin - zero_point``, ``high = qmax - zero_point``. The arithmetic is that of DequantizeLinear and
QuantizeLinear in float32, so a learned network and the twin of its Q/DQ graph give the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zsq_deploy.quant.fakequant import qparams
from zsq_deploy.quant.reconstruct.native import kernels
from zsq_deploy.quant.scheme import Scheme

__all__ = [
    "GAMMA",
    "ZETA",
    "Range",
    "RoundedActivation",
    "RoundedWeight",
    "dropped",
    "initial_logits",
    "on_grid",
    "rectified_sigmoid",
    "round_activation",
    "weight_scales",
]

Array = npt.NDArray[Any]

GAMMA, ZETA = -0.1, 1.1
"""Limits that the sigmoid is stretched to."""


@dataclass(frozen=True)
class Range:
    """Limits of an activation quantizer.

    Attributes:
        low: Smallest code, counted from the zero point.
        high: Largest code.
        floor: Lower bound of the activation function in front that the codes enforce; it holds for elements that are not rounded.
        ceiling: Upper bound of it.
    """

    low: int
    high: int
    floor: float = -float("inf")
    ceiling: float = float("inf")


# -- weights --


def rectified_sigmoid(v: Tensor) -> Tensor:
    """How far up a weight is rounded: 0 to 1, reached exactly."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp_(0.0, 1.0)


def initial_logits(w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Integer part and logits with which the soft weight is the float weight (where it is not clipped).

    Args:
        w: Float weight.
        scale: Broadcasts against it.
    """
    steps = w / scale
    base = torch.floor(steps)
    rest = (steps - base).clamp(0.0, 1.0)
    logits = -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1.0)
    return base, logits


class RoundedWeight(torch.autograd.Function):
    """Soft rounding with learned scale; see the module's text.

    Inputs: logits (shape of the weight), scale (broadcasts, one an output channel or one), base (integers in floats), low, high,
    strength of the regulariser (0 for none), beta.
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, scale: Tensor, base: Tensor, low: int, high: int, strength: float, beta: float
    ) -> Tensor:
        """The weight."""
        h = torch.sigmoid(v).mul_(ZETA - GAMMA).add_(GAMMA)
        free = (h > 0.0) & (h < 1.0)
        h.clamp_(0.0, 1.0)
        codes = (base + h).clamp_(low, high)
        ctx.save_for_backward(h, free, codes, scale, base)
        ctx.limits, ctx.regulariser = (low, high), (strength, beta)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of logits and scale."""
        h, free, codes, scale, base = ctx.saved_tensors
        low, high = ctx.limits
        strength, beta = ctx.regulariser
        g = grads[0]
        d_scale = None
        if ctx.needs_input_grad[1]:
            d_scale = (g * codes).sum_to_size(scale.shape)
        raw = base + h
        d_h = torch.where((raw >= low) & (raw <= high), g * scale, torch.zeros((), dtype=g.dtype, device=g.device))
        if strength:
            away = 2.0 * h - 1.0
            d_h -= (2.0 * strength * beta) * away.sign() * away.abs().pow_(beta - 1.0)
        # h = 1.2 p - 0.1, so p (1 - p) follows from h
        p = (h - GAMMA).div_(ZETA - GAMMA)
        d_v = d_h.mul_(p.mul_(1.0 - p)).mul_(ZETA - GAMMA).mul_(free)
        return d_v, d_scale, None, None, None, None, None


def weight_scales(w: Array, scheme: Scheme, axis: int | None, *, power: float, candidates: int) -> tuple[Array, Array]:
    """Scale and zero point of each channel: the best of some clip ratios by the mean of ``|error| ** power``.

    Args:
        w: Float weight.
        scheme: Of the weight.
        axis: Channel axis; ``None``: one scale for all.
        power: 2.4 in QDrop and Genie: large errors count more.
        candidates: Clip ratios, evenly from 1 down to ``1 / candidates``.

    Returns:
        float32 scales and int32 zero points, ``[C]`` or ``()``.
    """
    rows = w.reshape(1, -1) if axis is None else np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    rows = rows.astype(np.float32)
    low, high = np.minimum(rows.min(1), 0.0), np.maximum(rows.max(1), 0.0)
    best = np.full(len(rows), np.inf)
    scale, zero = np.ones(len(rows), np.float32), np.zeros(len(rows), np.int32)
    for ratio in np.linspace(1.0, 0.0, candidates, endpoint=False):
        trial = qparams(low * ratio, high * ratio, scheme, axis=0)
        s, z = trial.scale[:, None], trial.zero_point[:, None].astype(np.float32)
        codes = np.clip(np.rint(rows / s), scheme.qmin - z, scheme.qmax - z)
        error = (np.abs(codes * s - rows) ** power).mean(1)
        better = error < best
        best = np.where(better, error, best)
        scale, zero = np.where(better, trial.scale, scale), np.where(better, trial.zero_point, zero)
    dead = np.abs(rows).max(1) == 0
    if dead.any() and not dead.all():
        scale[dead] = np.median(scale[~dead])  # a channel of zeros takes the size of its neighbours' scales
    if axis is None:
        return scale.astype(np.float32).reshape(()), zero.astype(np.int32).reshape(())
    return scale.astype(np.float32), zero.astype(np.int32)


def on_grid(bias: Tensor, step: Tensor) -> Tensor:
    """A bias on the grid of its int32 codes, straight through the rounding; at few bits that grid is coarse enough to matter.

    Args:
        bias: ``[C]`` or ``()``.
        step: Scale of the input times scale of the weight, ``[C]`` or one for all; it gets no gradient.
    """
    with torch.no_grad():
        step = step.reshape(()) if step.numel() == 1 else step
        gone = torch.round(bias / step) * step - bias
    return bias + gone


# -- activations --

_GOLDEN, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


def dropped(count: int, key: int, share: float) -> Array:
    """Which of `count` elements are not rounded: a hash of key and position (the finalizer of MurmurHash3), so nothing is stored.

    Args:
        count: Number of elements.
        key: 32 bits.
        share: Of them that are dropped, 0 to 1.
    """
    h = np.arange(count, dtype=np.uint32) * np.uint32(_GOLDEN) + np.uint32(key & 0xFFFFFFFF)
    h ^= h >> np.uint32(16)
    h *= np.uint32(_FIRST)
    h ^= h >> np.uint32(13)
    h *= np.uint32(_SECOND)
    h ^= h >> np.uint32(16)
    return h < np.uint32(min(int(share * 2.0**32), 2**32 - 1))


def _flat(x: Tensor) -> Tensor:
    """The elements in the order of memory."""
    return x.as_strided((x.numel(),), (1,))


def _dense(x: Tensor) -> Tensor:
    """The tensor itself if its elements lie side by side in memory, else a copy for which that is so."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


class RoundedActivation(torch.autograd.Function):
    """Rounding with the gradient of LSQ, and QDrop; see the module's text.

    Inputs: x, scale (a scalar tensor), limits, share of elements that are dropped, key of the random choice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, limits: Range, share: float, key: int) -> Tensor:
        """The rounded tensor."""
        x = _dense(x)
        ctx.save_for_backward(x, scale)
        ctx.choice = (limits, share, key)
        native = kernels() if x.dtype == torch.float32 and x.device.type == "cpu" else None
        if native is not None:
            return native.round(x, float(scale), limits, share, key)
        flat = _flat(x)
        out = torch.round(flat / scale).clamp_(limits.low, limits.high).mul_(scale)
        if share > 0.0:
            mask = torch.from_numpy(dropped(flat.numel(), key, share)).to(x.device)
            out = torch.where(mask, flat.clamp(limits.floor, limits.ceiling), out)
        return out.as_strided(x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of x and scale."""
        x, scale = ctx.saved_tensors
        limits, share, key = ctx.choice
        g = grads[0]
        if g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)
        native = kernels() if x.dtype == torch.float32 and x.device.type == "cpu" else None
        if native is not None:
            d_x, total = native.round_backward(g, x, float(scale), limits, share, key)
            return d_x, torch.full((), total, dtype=scale.dtype).reshape(scale.shape), None, None, None
        flat, gradient = _flat(x), _flat(g)
        steps = flat / scale
        rounded = torch.round(steps)
        codes = rounded.clamp(limits.low, limits.high)
        inside = codes == rounded
        slope = torch.where(inside, codes - steps, codes)
        if share > 0.0:
            mask = torch.from_numpy(dropped(flat.numel(), key, share)).to(x.device)
            inside = torch.where(mask, (flat >= limits.floor) & (flat <= limits.ceiling), inside)
            slope = slope.masked_fill(mask, 0.0)
        d_scale = (gradient * slope).sum().reshape(scale.shape)
        return (gradient * inside).as_strided(x.shape, x.stride()), d_scale, None, None, None


def round_activation(x: Tensor, scale: Tensor, limits: Range, share: float = 0.0, key: int = 0) -> Tensor:
    """An activation on its grid, differentiable in both; see :class:`RoundedActivation`."""
    result: Tensor = RoundedActivation.apply(x, scale, limits, share, key)  # type: ignore[no-untyped-call]
    return result
