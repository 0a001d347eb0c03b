"""What follows an integer accumulator inside one kernel: scale, bias, and the operators fused behind it, in float32.

The plugin hands a convolution or a product to oneDNN with a scale an output channel, a bias and a list of post-operations, and merges
neighbouring ones on the way: the factor of the last requantization becomes a *destination scale*, whose reciprocal is taken twice; a
factor without a bias before it moves into the weight scale; and so on. The rounding of a result depends on what was merged, so
:class:`Composer` does the same merging, and :meth:`Composer.evaluate` the same instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.kernels.fakequantize import Formula, optimized
from zsq_deploy.backends.openvino.kernels.float32 import channelwise, fused_multiply_add, reciprocal, to_codes

__all__ = ["Composer", "Stage"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Kind = Literal["linear", "multiply", "add", "relu", "clip", "minimum", "maximum", "round", "sum", "function"]

_ONE = np.ones(1, np.float32)
_ZERO = np.zeros(1, np.float32)
_BIG = np.full(1, np.finfo(np.float32).max, np.float32)


@dataclass(frozen=True, eq=False)
class Stage:
    """One post-operation.

    Attributes:
        kind: What it does.
        first: Factor, addend, or lower limit.
        second: Shift, or upper limit.
        function: For ``function``: any elementwise float function; for ``sum``: gives the other operand.
    """

    kind: Kind
    first: Float32 = field(default_factory=lambda: _ONE)
    second: Float32 = field(default_factory=lambda: _ZERO)
    function: Callable[[Array], Array] | None = None


class Composer:
    """The post-operations of one kernel on an int32 accumulator.

    Args:
        scale: Scale of the accumulator (of weights times activations), one value or one an output channel; ``None`` for none.
        bias: ``[channels]`` float32, added after scaling; ``None`` for none.
        precision: Type of the kernel's result, ``u8``, ``i8`` or ``f32``.
        axis: Channel axis of the result.
    """

    def __init__(self, scale: Float32 | None, bias: Float32 | None, precision: str, axis: int = 1) -> None:
        self.scale = _ONE if scale is None else np.asarray(scale, np.float32).reshape(-1)
        self.bias = None if bias is None else np.asarray(bias, np.float32).reshape(-1)
        self.precision = precision
        self.axis = axis
        self.stages: list[Stage] = []
        self.destination: Float32 | None = None

    def add_scale(self, scale: Float32, last: bool) -> None:
        """Multiply by one value, or one a channel."""
        if last and scale.size == 1:
            self.destination = reciprocal(scale)
            return
        into_weights = False
        if self.bias is None:
            kinds = [stage.kind for stage in self.stages]
            if not kinds or kinds == ["relu"]:
                into_weights = True
            elif kinds == ["sum"] and scale.size == 1:
                self.stages[0] = Stage("sum", self.stages[0].first * scale, function=self.stages[0].function)
                into_weights = True
        if into_weights:
            self.scale = np.asarray(self.scale * scale, np.float32)
        elif scale.size == 1:
            self.stages.append(Stage("linear", scale))
        else:
            self.stages.append(Stage("multiply", scale))

    def add_shift(self, shift: Float32) -> None:
        """Add one value, or one a channel."""
        if shift.size > 1:
            self.stages.append(Stage("add", shift))
        elif shift[0] != 0:
            self.stages.append(Stage("linear", _ONE, shift))

    def add_linear(self, scale: Float32, shift: Float32, last: bool) -> None:
        """Multiply and add."""
        if scale.size == 1 and shift.size == 1:
            if shift[0] == 0:
                self.add_scale(scale, last)
            else:
                self.stages.append(Stage("linear", scale, shift))
            return
        self.add_scale(scale, False)
        self.add_shift(shift)

    def add_clip(self, low: Float32, high: Float32) -> None:
        """Limit to a range."""
        if low.size == 1 and high.size == 1:
            self.stages.append(Stage("clip", low, high))
            return
        if low.size == 1:
            self.stages.append(Stage("clip", low, _BIG))
        else:
            self.stages.append(Stage("maximum", low))
        if high.size == 1:
            self.stages.append(Stage("clip", -_BIG, high))
        else:
            self.stages.append(Stage("minimum", high))

    def add_quantization(self, formula: Formula, last: bool, rounding: bool = True) -> None:
        """Requantize."""
        form = optimized(formula, rounding)
        whole = {"u8": (0.0, 255.0), "i8": (-128.0, 127.0)}.get(self.precision)
        plain = (
            last
            and formula.levels == 256
            and whole is not None
            and form.low.size == 1
            and form.high.size == 1
            and form.out_scale is None
            and form.low[0] <= whole[0]
            and form.high[0] >= whole[1]
        )
        self.add_linear(form.scale, form.shift, last and plain)
        if plain:
            return
        if rounding:
            self.stages.append(Stage("round"))
        self.add_clip(form.low, form.high)
        if form.out_scale is not None and form.out_shift is not None:
            self.add_linear(form.out_scale, form.out_shift, last)

    def evaluate(self, accumulator: Array) -> Array:
        """The kernel's result.

        Args:
            accumulator: Exact sums of products.
        """

        def spread(vector: Array) -> Array:
            return channelwise(vector, accumulator.ndim, self.axis)

        x = np.asarray(accumulator.astype(np.float32))
        if self.scale.size > 1 or self.scale[0] != 1:
            x = x * spread(self.scale)
        if self.bias is not None:
            x = x + spread(self.bias)
        for stage in self.stages:
            x = self._apply(stage, x, spread)
        if self.destination is not None and self.destination[0] != 1:
            x = x * reciprocal(self.destination).reshape(())
        return to_codes(x, self.precision)

    def _apply(self, stage: Stage, x: Array, spread: Callable[[Array], Array]) -> Array:
        first, second = spread(stage.first), spread(stage.second)
        if stage.kind == "linear":
            return fused_multiply_add(x, first, second)
        if stage.kind == "multiply":
            return np.asarray(x * first)
        if stage.kind == "add":
            return np.asarray(x + first)
        if stage.kind == "relu":
            return np.maximum(x, np.float32(0))
        if stage.kind == "clip":
            return np.minimum(np.maximum(x, first), second)
        if stage.kind == "minimum":
            return np.minimum(x, first)
        if stage.kind == "maximum":
            return np.maximum(x, first)
        if stage.kind == "round":
            return np.rint(x)
        assert stage.function is not None
        if stage.kind == "function":
            return stage.function(x)
        other = stage.function(x).astype(np.float32)
        return np.asarray(x + other) if stage.first[0] == 1 else fused_multiply_add(other, first, x)

    @property
    def kinds(self) -> Sequence[str]:
        """The post-operations by name, for messages."""
        return [stage.kind for stage in self.stages]
