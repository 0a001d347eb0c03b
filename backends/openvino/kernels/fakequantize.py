"""OpenVINO's FakeQuantize as its CPU plugin evaluates it: clip, one multiply-add, round, one multiply-add.

The plugin turns the four limits of the operator into six numbers once, in float32; this module does the same in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.kernels.float32 import channelwise, fused_multiply_add

__all__ = ["Formula", "optimized", "quantization"]

Float32 = npt.NDArray[np.float32]

_TINY = float(np.finfo(np.float32).tiny)
_DRIFT = 0.00005
"""Input shifts of channels that differ by less are one shift to the plugin."""
_NEGLIGIBLE = np.float32(0.00001)
"""A shift below this share of the range of codes is dropped."""


@dataclass(frozen=True, eq=False)
class Formula:
    """``rint(clip(x) * scale + shift) * out_scale + out_shift``: each a vector of one value, or one a channel.

    Attributes:
        low: Lower limit of clipping (before scaling, unless made by :func:`optimized`).
        high: Upper limit.
        scale: Factor of the input.
        shift: What is added before rounding.
        out_scale: Factor of the rounded number; ``None`` for 1.
        out_shift: What is added to it; ``None`` for 0.
        levels: Number of levels.
    """

    low: Float32
    high: Float32
    scale: Float32
    shift: Float32
    out_scale: Float32 | None
    out_shift: Float32 | None
    levels: int

    def after(self, factor: Float32, addend: Float32) -> Formula:
        """The formula with ``x * factor + addend`` in front of it, merged as the plugin merges it."""
        if np.all(factor == 1) and np.all(addend == 0):
            return self
        low, high = (self.low - addend) / factor, (self.high - addend) / factor
        limit = np.finfo(np.float32).max
        return replace(
            self,
            low=np.maximum(np.minimum(low, high), -limit),
            high=np.minimum(np.maximum(low, high), limit),
            scale=_normal(self.scale * factor),
            shift=_normal(self.shift + addend * self.scale),
        )

    def alone(self) -> Formula:
        """The formula as a node of its own evaluates it.

        A fault of the plugin (2026.4): where only an addition of one number a channel was merged, so that the factor is still one for all
        channels, the node takes the numbers of the first channel for all of them. The result is not what the graph says.
        """
        if self.shift.size == 1 or not np.all(self.scale == self.scale[0]):
            return self
        return replace(self, low=self.low[:1], high=self.high[:1], scale=self.scale[:1], shift=self.shift[:1])

    def evaluate(self, values: Float32, axis: int = 1) -> Float32:
        """Evaluate as the plugin's own quantization kernels do: clipping first."""
        rank = values.ndim

        def spread(vector: Float32) -> Float32:
            return channelwise(vector, rank, axis)

        clipped = np.minimum(np.maximum(values, spread(self.low)), spread(self.high))
        rounded = np.rint(fused_multiply_add(clipped, spread(self.scale), spread(self.shift)))
        if self.out_scale is None or self.out_shift is None:
            return np.asarray(rounded, np.float32)
        return fused_multiply_add(rounded, spread(self.out_scale), spread(self.out_shift))


def quantization(in_low: Float32, in_high: Float32, out_low: Float32, out_high: Float32, levels: int) -> Formula:
    """The six numbers of a FakeQuantize operator.

    Args:
        in_low: Smallest input, flat: one value, or one a channel; likewise the others.
        in_high: Largest input.
        out_low: Smallest output.
        out_high: Largest output.
        levels: Number of levels.
    """
    low, high, out_low, out_high = (np.asarray(v, np.float32).reshape(-1) for v in (in_low, in_high, out_low, out_high))
    steps = np.float32(levels - 1)
    scale = steps / (high - low)
    shift = -low * steps / (high - low)
    out_scale = (out_high - out_low) / steps
    only_codes = bool(np.all(out_scale == 1) and np.all(out_low == 0))
    return Formula(low, high, scale, shift, None if only_codes else out_scale, None if only_codes else out_low, levels)


def _normal(vector: Float32) -> Float32:
    """Numbers too small for a normal float32 become zero."""
    return np.where(np.abs(vector) < np.float32(_TINY), np.float32(0), vector)


def _shrunk(vector: Float32) -> Float32:
    return vector[:1] if vector.size > 1 and np.all(vector == vector[0]) else vector


def optimized(formula: Formula, rounding: bool = True) -> Formula:
    """The form that is fused into convolutions and products: limits after scaling, shifts merged where they are whole numbers.

    Args:
        formula: From :func:`quantization`.
        rounding: Whether the number is rounded here (without, the output's factor and shift move to the input's side).
    """
    shift = formula.shift
    size = max(v.size for v in (formula.low, formula.high, formula.scale, shift))
    out_scale = formula.out_scale if formula.out_scale is not None else np.ones(1, np.float32)
    out_shift = formula.out_shift if formula.out_shift is not None else np.zeros(1, np.float32)
    size = max(size, out_scale.size, out_shift.size)
    if np.all(np.abs(shift - shift[0]) < np.float32(_DRIFT)):
        shift = np.full(size, shift[0], np.float32)
    low, high, scale, shift = (
        np.broadcast_to(v, (size,)).astype(np.float32) for v in (formula.low, formula.high, formula.scale, shift)
    )
    low, high = np.rint(low * scale + shift), np.rint(high * scale + shift)
    low, high = np.minimum(low, high), np.maximum(low, high)
    after: tuple[Float32, Float32] | None = (out_scale, out_shift)
    if not rounding:
        low, high = low * out_scale + out_shift, high * out_scale + out_shift
        low, high = np.minimum(low, high), np.maximum(low, high)
        scale, shift = scale * out_scale, shift * out_scale + out_shift
        after = None
    low, high, scale, shift = (_shrunk(np.asarray(v, np.float32)) for v in (low, high, scale, shift))
    if after is not None:
        first, second = _shrunk(after[0]), _shrunk(after[1])
        after = (first, second)
        if first.size == 1 and second.size == 1 and first[0] == 1 and second[0] == np.trunc(second[0]):
            shift, low, high = shift + second[0], low + second[0], high + second[0]
            after = None
    if shift.size == 1 and low.size == 1 and high.size == 1 and abs(shift[0]) < (high[0] - low[0]) * _NEGLIGIBLE:
        shift = np.zeros(1, np.float32)
    return replace(
        formula,
        low=low,
        high=high,
        scale=scale,
        shift=shift,
        out_scale=None if after is None else after[0],
        out_shift=None if after is None else after[1],
    )
