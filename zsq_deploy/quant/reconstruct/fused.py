"""Soft weights whose gradient and update are one pass over memory.

Where weights outnumber activations, a step of reconstruction is spent in the weights' own operators: the sigmoid, the limits, the regulariser's
power, the gradients of all these, and Adam, some thirty passes over the weight. The compiled loops
(:mod:`zsq_deploy.quant.reconstruct.native`) make two of them: one forward, and one that takes the gradient as the convolution gave it and moves the
logits right away. The numbers are those of :class:`~zsq_deploy.quant.reconstruct.quantizers.RoundedWeight` and ``torch.optim.Adam``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsq_deploy.quant.reconstruct.native import Kernels, kernels

__all__ = ["FusedRounding"]


class FusedRounding:
    """The logits of a layer with Adam's state.

    Args:
        loops: The compiled loops.
        logits: Float32 on the CPU, first axis outermost in memory; changed in place.
        base: Integer part, laid out in the same way.
        low: Smallest code.
        high: Largest code.

    Attributes:
        rate: Adam's step.
    """

    def __init__(self, loops: Kernels, logits: Tensor, base: Tensor, low: int, high: int) -> None:
        self._loops, self._logits, self._base, self._limits = loops, logits, base, (float(low), float(high))
        self._moments = (torch.zeros_like(base), torch.zeros_like(base))
        self._steps = 0
        self.rate = 0.0

    @classmethod
    def of(cls, logits: Tensor, base: Tensor, scale: Tensor, low: Any, high: Any) -> FusedRounding | None:
        """For a weight that the loops can take: one scale, or one for each entry of the first axis, and the same limits for all.

        Args:
            logits: Of the weight.
            base: Its integer part.
            scale: Broadcasts against it.
            low: Smallest code.
            high: Largest code.
        """
        loops = kernels()
        alike = isinstance(low, int) and isinstance(high, int)
        if loops is None or not alike or logits.device.type != "cpu" or logits.dtype != torch.float32:
            return None
        if logits.stride() != base.stride() or scale.numel() not in (1, len(logits)):
            return None
        if scale.numel() > 1 and scale.shape[0] != len(logits):
            return None
        dense = logits.is_contiguous() or (
            logits.dim() == 4 and logits.is_contiguous(memory_format=torch.channels_last)
        )
        return cls(loops, logits.detach(), base, low, high) if dense else None

    def weight(self, logits: Tensor, scale: Tensor, strength: float, beta: float) -> Tensor:
        """The soft weight; when its gradient comes, the logits take a step, and the scale gets its gradient.

        Args:
            logits: The leaf whose numbers these are.
            scale: Broadcasts against it.
            strength: Of the regulariser.
            beta: Its exponent.
        """
        result: Tensor = _Weight.apply(logits, scale, self, strength, beta)  # type: ignore[no-untyped-call]
        return result

    def forward(self, scale: Tensor) -> Tensor:
        """The numbers of the weight."""
        return self._loops.soft_weight(self._logits, self._base, scale.reshape(-1).contiguous(), *self._limits)

    def step(self, g: Tensor, scale: Tensor, strength: float, beta: float) -> Tensor:
        """Move the logits; gives the gradient of the scale."""
        if g.stride() != self._logits.stride():
            g = torch.empty_like(self._logits).copy_(g)
        self._steps += 1
        found = self._loops.soft_step(
            g,
            self._logits,
            self._base,
            scale.reshape(-1).contiguous(),
            self._moments,
            self._limits,
            (strength, beta),
            self.rate,
            self._steps,
        )
        return found.reshape(scale.shape)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: Tensor, fused: FusedRounding, strength: float, beta: float) -> Tensor:
        del logits  # the leaf that a gradient is asked for; its numbers are in `fused`
        ctx.save_for_backward(scale)
        ctx.fused, ctx.regulariser = fused, (strength, beta)
        return fused.forward(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (scale,) = ctx.saved_tensors
        return None, ctx.fused.step(grads[0], scale, *ctx.regulariser), None, None, None
