"""Elementwise arithmetic, comparisons, logic, and changes of type."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, element_type, translates

__all__: list[str] = []

_UNARY = {
    "Abs": "Abs", "Acos": "Acos", "Acosh": "Acosh", "Asin": "Asin", "Asinh": "Asinh", "Atan": "Atan", "Atanh": "Atanh",
    "Ceiling": "Ceil", "Cos": "Cos", "Cosh": "Cosh", "Erf": "Erf", "Exp": "Exp", "Floor": "Floor", "Identity": "Identity",
    "IsNaN": "IsNaN", "Log": "Log", "LogicalNot": "Not", "BitwiseNot": "BitwiseNot", "Negative": "Neg", "Sign": "Sign",
    "Sin": "Sin", "Sinh": "Sinh", "Sqrt": "Sqrt", "Tan": "Tan",
}  # fmt: skip

_BINARY = {
    "Add": "Add", "Subtract": "Sub", "Multiply": "Mul", "Maximum": "Max", "Minimum": "Min", "Power": "Pow", "Equal": "Equal",
    "Greater": "Greater", "GreaterEqual": "GreaterOrEqual", "Less": "Less", "LessEqual": "LessOrEqual", "LogicalAnd": "And",
    "LogicalOr": "Or", "LogicalXor": "Xor", "BitwiseAnd": "BitwiseAnd", "BitwiseOr": "BitwiseOr", "BitwiseXor": "BitwiseXor",
}  # fmt: skip


@translates(*_UNARY)
def unary(op: Op) -> None:
    """Functions of one tensor."""
    op.emit(_UNARY[op.kind], [op.input(0)])


def operands(op: Op) -> list[str]:
    """Both operands, in shapes that broadcast as in numpy."""
    how = str(op.attrs.get("auto_broadcast", "numpy")).lower()
    if how in ("pdpd", "paddlepaddle"):
        axis = int(op.attrs.get("axis", -1))
        left, right = op.rank(0), op.rank(1)
        if axis not in (-1, left - right):
            tail = op.whole("axes", range(right, left - axis))
            return [op.input(0), op.step("Unsqueeze", [op.input(1), tail])]
    return [op.input(0), op.input(1)]


@translates(*_BINARY)
def binary(op: Op) -> None:
    """Functions of two tensors with broadcasting."""
    op.emit(_BINARY[op.kind], operands(op))


def _is_float(kind: str) -> bool:
    return kind in ("f16", "bf16", "f32", "f64")


@translates("Divide")
def divide(op: Op) -> None:
    """Quotient; integers are rounded towards zero, as the CPU plugin does it whatever `m_pythondiv` says."""
    op.emit("Div", operands(op))


@translates("NotEqual")
def not_equal(op: Op) -> None:
    """Whether two numbers differ."""
    op.emit("Not", [op.step("Equal", operands(op))])


@translates("SquaredDifference")
def squared_difference(op: Op) -> None:
    """``(a - b)^2``."""
    difference = op.step("Sub", operands(op))
    op.emit("Mul", [difference, difference])


@translates("FloorMod", "Mod")
def remainder(op: Op) -> None:
    """Remainder with the sign of the divisor (FloorMod) or of the dividend (Mod)."""
    if op.kind == "Mod":
        op.emit("Mod", operands(op), fmod=1)
    elif _is_float(op.result_type):
        a, b = operands(op)
        whole = op.step("Floor", [op.step("Div", [a, b])])
        op.emit("Sub", [a, op.step("Mul", [whole, b])])
    else:
        op.emit("Mod", operands(op))


@translates("IsInf")
def is_infinite(op: Op) -> None:
    """Whether a number is infinite."""
    sides = {name: int(bool(op.attrs.get(name, True))) for name in ("detect_negative", "detect_positive")}
    op.emit("IsInf", [op.input(0)], **sides)


@translates("IsFinite")
def is_finite(op: Op) -> None:
    """Whether a number is neither infinite nor undefined."""
    value = op.input(0)
    op.emit("Not", [op.step("Or", [op.step("IsInf", [value]), op.step("IsNaN", [value])])])


@translates("Round")
def round_(op: Op) -> None:
    """Nearest integer; ties to even or away from zero."""
    if str(op.attrs.get("mode", "half_to_even")).lower() == "half_to_even":
        op.emit("Round", [op.input(0)])
        return
    value = op.input(0)
    size = op.step("Floor", [op.step("Add", [op.step("Abs", [value]), op.number("half", 0.5)])])
    op.emit("Mul", [op.step("Sign", [value]), size])


def _limits(kind: np.dtype[Any]) -> tuple[float, float]:
    """Smallest and largest number of a type."""
    if kind.kind in "iu":
        whole = np.iinfo(kind)
        return int(whole.min), int(whole.max)
    real = np.finfo(kind)
    return float(real.min), float(real.max)


@translates("Clamp")
def clamp(op: Op) -> None:
    """Limits values to [min, max]."""
    kind: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type(op.result_type)))
    whole = kind.kind in "iu"
    least, most = (float(bound) for bound in _limits(kind))
    names = []
    for hint, bound in (("min", float(op.attrs["min"])), ("max", float(op.attrs["max"]))):
        if bound <= least if hint == "min" else bound >= most:
            names.append("")  # no bound on this side
            continue
        cut = min(max(bound, least), most)
        names.append(op.number(hint, (np.ceil(cut) if hint == "min" else np.floor(cut)) if whole else cut, kind))
    while names and not names[-1]:
        names.pop()
    op.emit("Clip", [op.input(0), *names])


@translates("Select")
def select(op: Op) -> None:
    """Choice by a condition."""
    if str(op.attrs.get("auto_broadcast", "numpy")).lower() not in ("numpy", "none", "explicit"):
        raise UnsupportedFormError(f"broadcasting {op.attrs['auto_broadcast']!r}")
    op.emit("Where", [op.input(index) for index in range(3)])


@translates("Convert")
def convert(op: Op) -> None:
    """Change of type."""
    target, source = op.result_type, op.type(0)
    if element_type(target) == element_type(source):
        op.emit("Identity", [op.input(0)])
    else:
        op.emit("Cast", [op.input(0)], to=element_type(target))


@translates("ConvertLike")
def convert_like(op: Op) -> None:
    """Change to the type of another tensor."""
    op.emit("Cast", [op.input(0)], to=element_type(op.result_type))
