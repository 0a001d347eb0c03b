"""Elementwise float32 operators, with the roundings of the plugin's own vector kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.kernels.float32 import fused_multiply_add, to_codes
from zsq_deploy.backends.openvino.lowered import Op

__all__ = ["ELEMENTWISE"]

Array = npt.NDArray[Any]


def _floats(arrays: Sequence[Array]) -> list[Array]:
    return [np.asarray(array, np.float32) for array in arrays]


def _integers(arrays: Sequence[Array]) -> bool:
    return all(array.dtype.kind in "iu" for array in arrays)


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Op, Sequence[Array]], Array]:
    def evaluate(op: Op, arrays: Sequence[Array]) -> Array:
        if _integers(arrays) and op.precisions[0] in ("i32", "i64"):
            return np.asarray(function(arrays[0].astype(np.int64), arrays[1].astype(np.int64)))
        a, b = _floats(arrays)
        return np.asarray(function(a, b))

    return evaluate


def _power_static(op: Op, arrays: Sequence[Array]) -> Array:
    (x,) = _floats(arrays)
    scale, shift, power = (np.float32(op.number(name, default)) for name, default in _POWER)
    if scale != 1 or shift != 0:
        x = fused_multiply_add(x, np.asarray(scale), np.asarray(shift))
    if power == 1:
        return x
    if power == 2:
        return np.asarray(x * x)
    if power == -1:
        return np.asarray(np.float32(1) / x)
    if power == 0.5:
        return np.sqrt(x)
    raise NotImplementedError


_POWER = (("scale", 1.0), ("shift", 0.0), ("power", 1.0))


def _relu(_op: Op, arrays: Sequence[Array]) -> Array:
    return np.maximum(_floats(arrays)[0], np.float32(0))


def _leaky(op: Op, arrays: Sequence[Array]) -> Array:
    (x,) = _floats(arrays)
    return np.where(x > 0, x, x * np.float32(op.number("negative_slope")))


def _prelu(_op: Op, arrays: Sequence[Array]) -> Array:
    x, slope = _floats(arrays)
    if slope.ndim == 1 and slope.size > 1:
        slope = slope.reshape(1, -1, *([1] * (x.ndim - 2)))
    return np.where(x > 0, x, x * slope)


def _clamp(op: Op, arrays: Sequence[Array]) -> Array:
    return np.minimum(np.maximum(_floats(arrays)[0], np.float32(op.number("min"))), np.float32(op.number("max")))


def _convert(op: Op, arrays: Sequence[Array]) -> Array:
    return arrays[0] if op.precisions[0] not in ("f32",) else np.asarray(arrays[0], np.float32)


def _saturate(op: Op, arrays: Sequence[Array]) -> Array:
    return to_codes(arrays[0], op.precisions[0])


def _round(op: Op, arrays: Sequence[Array]) -> Array:
    if op.attrs.get("mode", "half_to_even") != "half_to_even":
        raise NotImplementedError
    return np.rint(_floats(arrays)[0])


ELEMENTWISE: Mapping[str, Callable[[Op, Sequence[Array]], Array]] = {
    "Add": _binary(np.add),
    "Subtract": _binary(np.subtract),
    "Multiply": _binary(np.multiply),
    "Maximum": _binary(np.maximum),
    "Minimum": _binary(np.minimum),
    "Divide": _binary(np.divide),
    "PowerStatic": _power_static,
    "Relu": _relu,
    "ReLU": _relu,
    "LeakyRelu": _leaky,
    "PRelu": _prelu,
    "PReLU": _prelu,
    "Clamp": _clamp,
    "Convert": _convert,
    "ConvertTruncation": _convert,
    "ConvertSaturation": _saturate,
    "Round": _round,
}
"""Operator -> function of the operator and its inputs, all broadcast by numpy's rules."""
