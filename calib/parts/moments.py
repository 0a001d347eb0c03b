"""Mean and variance of a feature map inside the graph of gradients, at the price of a few cheap passes over memory.

`torch.var` and `torch.var_mean` on the CPU are scalar Welford loops: on a 16-channel 32x32 map they take three times as long as the
convolution that made it. :func:`watch` takes the two moments from two vectorised sums about an expected centre (so that
nothing cancels where the mean is large against the spread), and its backward adds the closed-form gradient

    dL/dy = g + dL/dm / n + dL/dv * 2 (y - m) / (n - u)

to the gradient `g` that comes from the rest of the network, where u = 1 for the unbiased variance and 0 else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zsq_deploy.calib.parts import native

__all__ = ["Follow", "count_of", "reduced_axes", "watch", "watch_plainly"]


def reduced_axes(rank: int, per_sample: bool) -> tuple[int, ...]:
    """The axes that statistics of a [N, C, ...] value are taken over."""
    spatial = tuple(range(2, rank))
    return spatial if per_sample else (0, *spatial)


def count_of(shape: torch.Size | tuple[int, ...], per_sample: bool) -> int:
    """How many numbers each mean is taken over."""
    count = 1
    for axis in reduced_axes(len(shape), per_sample):
        count *= shape[axis]
    return count


def watch(
    y: Tensor,
    *,
    per_sample: bool,
    unbiased: bool,
    affine: tuple[Tensor, Tensor] | None = None,
    addend: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    own_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure a value and pass it on, doing on the way what follows it: a batch norm, a sum, a rectifier.

    Passed on is ``limit(scale * y + shift + addend)``, each part of it only if given.

    Args:
        y: A value [N, C, ...]; channels-last memory is kept and is the fastest.
        per_sample: One mean per image and channel ([N, C]) instead of one per channel ([C]).
        unbiased: Divide by n - 1 instead of n in the variance.
        affine: Scale and shift [C]: a batch norm in inference form.
        addend: The other branch of a residual block; same shape as `y`.
        bounds: Limits: ``(0, inf)`` is a Relu, ``(0, 6)`` a Relu6.
        own_gradient: The gradient that arrives belongs to nobody else, so it may be changed in place.

    Returns:
        What is passed on, the mean of y, and its variance.
    """
    scale, shift = affine if affine is not None else (None, None)
    passed, mean, var = _Watch.apply(  # type: ignore[no-untyped-call]
        y, addend, scale, shift, per_sample, unbiased, bounds, own_gradient
    )
    return passed, mean, var


def watch_plainly(
    y: Tensor,
    *,
    per_sample: bool,
    unbiased: bool,
    affine: tuple[Tensor, Tensor] | None = None,
    addend: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    own_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`watch` in torch's own operators, which a compiler can look into."""
    del own_gradient
    axes, count = reduced_axes(y.dim(), per_sample), count_of(y.shape, per_sample)
    mean = y.mean(axes) if axes else y
    away = (y - _channels(mean, y.dim())).square()
    var = (away.sum(axes) if axes else away) / max(count - 1 if unbiased else count, 1)
    passed = y
    if affine is not None:
        scale, shift = (_channels(part, y.dim()) for part in affine)
        passed = passed * scale + shift
    if addend is not None:
        passed = passed + addend
    if bounds is not None:
        low, high = bounds
        passed = torch.relu(passed) if bounds == (0.0, math.inf) else passed.clamp(low, high)
    return passed, mean, var


@dataclass(frozen=True)
class Follow:
    """What follows a measured value.

    Attributes:
        scale: Of the batch norm [C], or ``None``.
        shift: Of the batch norm [C], or ``None``.
        bounds: Of the rectifier, or ``None``.
    """

    scale: Tensor | None
    shift: Tensor | None
    bounds: tuple[float, float] | None


def _channels(small: Tensor, rank: int) -> Tensor:
    """[C] or [N, C] as something that broadcasts against [N, C, ...]."""
    small = small.unsqueeze(0) if small.dim() == 1 else small
    return small.reshape(*small.shape, *(1,) * (rank - 2))


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        addend: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        per_sample: bool,
        unbiased: bool,
        bounds: tuple[float, float] | None,
        own_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = count_of(y.shape, per_sample)
        divisor = max(count - 1 if unbiased else count, 1)
        fits = native.Kernels.fits(y) and (addend is None or native.Kernels.fits(addend))
        loops = native.kernels() if fits else None
        measure = _measure if loops is None else loops.measure
        follow = Follow(scale, shift, bounds)
        passed, mean, var = measure(y, addend, per_sample, follow)
        var = var * (count / divisor)
        # The bounds apply to what was passed on; the loops can have that again from y unless something was added.
        keep = bounds is not None and (addend is not None or loops is None)
        ctx.save_for_backward(y, mean, passed if keep else None)
        ctx.count, ctx.divisor, ctx.follow, ctx.own, ctx.loops = count, divisor, follow, own_gradient, loops
        ctx.joined = addend is not None
        return passed, mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, passed: Tensor | None, to_mean: Tensor | None, to_var: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None]:
        y, mean, limited = ctx.saved_tensors
        slope = torch.zeros_like(mean) if to_var is None else to_var * (2 / ctx.divisor)
        level = -slope * mean
        if to_mean is not None:
            level.add_(to_mean, alpha=1 / ctx.count)
        add = _add if ctx.loops is None else ctx.loops.add
        to_y, to_addend = add(
            passed, y, limited, level, slope, ctx.follow, in_place=ctx.own, joined=ctx.joined and passed is not None
        )
        return to_y, to_addend, None, None, None, None, None, None


def _measure(y: Tensor, addend: Tensor | None, per_sample: bool, follow: Follow) -> tuple[Tensor, Tensor, Tensor]:
    """What is passed on, and mean and variance (divided by n) of y."""
    axes = reduced_axes(y.dim(), per_sample)
    mean = y.mean(axes) if axes else y.clone()
    work = y - _channels(mean, y.dim())
    work.square_()
    var = work.mean(axes) if axes else work.clone()
    if follow.scale is not None and follow.shift is not None:
        y = torch.addcmul(_channels(follow.shift, y.dim()), y, _channels(follow.scale, y.dim()), out=work)
    if addend is not None:
        y = torch.add(y, addend, out=work)
    if follow.bounds is not None:
        y = torch.clamp(y, *follow.bounds, out=work)
    return y, mean, var


def _add(
    gradient: Tensor | None,
    y: Tensor,
    limited: Tensor | None,
    level: Tensor,
    slope: Tensor,
    follow: Follow,
    *,
    in_place: bool,
    joined: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients to y (through what follows it, and through its moments: level + slope * y) and to the addend."""
    rank = y.dim()
    slope, level = _channels(slope, rank), _channels(level, rank)
    if gradient is None:
        return torch.addcmul(level, y, slope), None
    scale = None if follow.scale is None else _channels(follow.scale, rank)
    if follow.bounds is not None and limited is not None:
        gradient = _masked(gradient, limited, follow.bounds, in_place=in_place)
        in_place = True  # after the mask the buffer is ours in any case
    rest = gradient if joined else None
    if scale is not None:
        gradient, in_place = (gradient.mul_(scale) if in_place and not joined else gradient * scale), True
    elif joined:
        in_place = False
    total = gradient.addcmul_(y, slope) if in_place else torch.addcmul(gradient, y, slope)
    return total.add_(level), rest


def _masked(gradient: Tensor, y: Tensor, bounds: tuple[float, float], *, in_place: bool) -> Tensor:
    """The gradient where `y` lies between the bounds, zero elsewhere."""
    low, high = bounds
    into = gradient if in_place else torch.empty_like(gradient)
    if math.isinf(high):
        torch.ops.aten.threshold_backward.grad_input(gradient, y, low, grad_input=into)
    else:
        torch.ops.aten.hardtanh_backward.grad_input(gradient, y, low, high, grad_input=into)
    return into
