"""Elementwise arithmetic: one, two or many tensors in, one out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from zsq_deploy.model.ops.registry import Kernel, Node, UnsupportedVariantError, op
from zsq_deploy.model.ops.types import is_wide_unsigned

__all__: list[str] = []

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Log": torch.log,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,  # half to even, as in ONNX
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}


def _widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lets a function on integers take the unsigned types that torch has no arithmetic for.

    64-bit two's complement gives the same low bits for sums, differences and products; comparisons and quotients of uint64 values
    above 2**63 are outside what networks do.
    """

    def run(*tensors: Tensor) -> Tensor:
        dtype = tensors[0].dtype
        if is_wide_unsigned(dtype):
            result = function(*(tensor.to(torch.int64) for tensor in tensors))
            return result if result.dtype is torch.bool else result.to(dtype)
        return function(*tensors)

    return run


@op(*_UNARY)
def unary(node: Node) -> Kernel:
    """Elementwise functions with one input and no attributes."""
    return _widened(_UNARY[node.proto.op_type])


@op("Identity")
def identity(_node: Node) -> Kernel:
    """The value itself (the same memory)."""
    return lambda x: x


@op("IsNaN")
def is_nan(_node: Node) -> Kernel:
    """True where not a number."""
    return torch.isnan


@op("IsInf")
def is_inf(node: Node) -> Kernel:
    """True where infinite; either sign can be left out."""
    positive, negative = bool(node.get("detect_positive", 1)), bool(node.get("detect_negative", 1))
    if positive and negative:
        return torch.isinf
    if positive:
        return torch.isposinf
    if negative:
        return torch.isneginf
    return lambda x: torch.zeros_like(x, dtype=torch.bool)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype and a.is_floating_point():
        return torch.pow(a, b)
    if not a.is_floating_point() and not b.is_floating_point():
        return torch.pow(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    if not a.is_floating_point():
        return torch.pow(a.to(torch.float64), b.to(torch.float64)).to(a.dtype)
    return torch.pow(a, b.to(a.dtype))


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Div": _divide,
    "Mul": torch.mul,
    "Sub": torch.sub,
}


@op(*_BINARY)
def binary(node: Node) -> Kernel:
    """Elementwise functions of two tensors with broadcasting; integer quotients are truncated towards zero."""
    return _widened(_BINARY[node.proto.op_type])


@op("Pow")
def power(node: Node) -> Kernel:
    """``base ** exponent`` in the type of the base; a constant scalar exponent is taken as a number."""
    exponent = node.constant(1)
    if exponent is not None and exponent.size == 1:
        value = float(exponent.reshape(()))
        if value in (0.5, 2.0, 3.0, -1.0):

            def fixed(a: Tensor, b: Tensor) -> Tensor:
                return torch.pow(a, value) if a.is_floating_point() and b.dim() <= a.dim() else _power(a, b)

            return fixed
    return _power


@op("Mod")
def modulo(node: Node) -> Kernel:
    """Remainder with the sign of the divisor (``fmod=0``) or of the dividend (``fmod=1``)."""
    return _widened(torch.fmod if node.get("fmod", 0) else torch.remainder)


_MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}


@op(*_MANY)
def many(node: Node) -> Kernel:
    """Elementwise functions of any number of tensors with broadcasting."""
    function = _MANY[node.proto.op_type]
    if len(node.proto.input) == 2:
        return _widened(function)
    return _widened(lambda *tensors: reduce(function, tensors))


@op("Mean")
def mean(_node: Node) -> Kernel:
    """Elementwise mean of any number of tensors."""
    return lambda *tensors: reduce(torch.add, tensors) / len(tensors)


@op("Where")
def where(_node: Node) -> Kernel:
    """Choice by a condition, with broadcasting."""

    def kernel(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if is_wide_unsigned(a.dtype):
            return torch.where(condition, a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
        return torch.where(condition, a, b)

    return kernel


@op("BitShift")
def bit_shift(node: Node) -> Kernel:
    """Shift of unsigned integers to the left or right."""
    left = node.get("direction") == "LEFT"

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype is torch.uint64:
            # in int64: an arithmetic shift to the right would pull in sign bits, which the mask takes out again
            wide, count = a.view(torch.int64), b.to(torch.int64)
            if left:
                return torch.bitwise_left_shift(wide, count).view(torch.uint64)
            mask = torch.where(count > 0, torch.bitwise_left_shift(torch.ones_like(count), 64 - count) - 1, -1)
            return (torch.bitwise_right_shift(wide, count) & mask).view(torch.uint64)
        wide, count = a.to(torch.int64), b.to(torch.int64)
        shifted = torch.bitwise_left_shift(wide, count) if left else torch.bitwise_right_shift(wide, count)
        return shifted.to(a.dtype)

    return kernel


_BITWISE: dict[str, Callable[..., Tensor]] = {
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}


@op(*_BITWISE, since=18)
def bitwise(node: Node) -> Kernel:
    """Bit by bit logic on integers."""
    return _widened(_BITWISE[node.proto.op_type])


@op("Clip", host=())
def clip(node: Node) -> Kernel:
    """Limits values to [min, max]; constant bounds are read when the twin is built, others flow as tensors."""

    def bound(index: int) -> float | None:
        constant = node.constant(index)
        return None if constant is None or constant.size != 1 else float(constant.reshape(()))

    low, high = bound(1), bound(2)
    if (low is None) == (not node.has(1)) and (high is None) == (not node.has(2)):
        low = -math.inf if low is None else low
        high = math.inf if high is None else high

        def fixed(x: Tensor, _low: Tensor | None = None, _high: Tensor | None = None) -> Tensor:
            if x.is_floating_point():
                return torch.clamp(x, low, high)
            return _integer_clip(x, low, high)

        return fixed

    def kernel(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        x = x if low is None else torch.maximum(x, low.to(x.dtype))
        return x if high is None else torch.minimum(x, high.to(x.dtype))

    return kernel


def _integer_clip(x: Tensor, low: float, high: float) -> Tensor:
    bottom = None if low == -math.inf else int(low)
    top = None if high == math.inf else int(high)
    if bottom is None and top is None:
        return x
    return torch.clamp(x.to(torch.int64), bottom, top).to(x.dtype)


@op("Dropout")
def dropout(node: Node) -> Kernel:
    """Dropout at inference: the identity (with a mask of all true)."""
    training = node.constant(2)
    ratio = node.constant(1)
    if node.has(2) and (training is None or (bool(training) and (ratio is None or float(ratio) != 0.0))):
        raise UnsupportedVariantError("dropout in training mode is random; export the network in evaluation mode")
    if node.outputs == 1:
        return lambda x, *_rest: x
    return lambda x, *_rest: (x, torch.ones_like(x, dtype=torch.bool))
