"""Activation functions."""

from __future__ import annotations

import numpy as np

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, translates

__all__: list[str] = []

_PLAIN = {
    "Relu": "Relu", "ReLU": "Relu", "Sigmoid": "Sigmoid", "Tanh": "Tanh", "HSwish": "HardSwish", "Mish": "Mish", "SoftPlus": "Softplus",
    "SoftSign": "Softsign",
}  # fmt: skip


@translates(*_PLAIN)
def plain(op: Op) -> None:
    """Functions without parameters."""
    op.emit(_PLAIN[op.kind], [op.input(0)])


@translates("Softmax", "SoftMax", "LogSoftmax")
def softmax(op: Op) -> None:
    """Softmax along one axis, or its logarithm."""
    op.emit("LogSoftmax" if op.kind == "LogSoftmax" else "Softmax", [op.input(0)], axis=int(op.attrs.get("axis", 1)))


@translates("PRelu", "PReLU")
def prelu(op: Op) -> None:
    """``x`` above zero, ``slope * x`` below; a list of slopes lies along axis 1."""
    slope = op.constant(1)
    rank = op.rank(0)
    if slope is not None and slope.size == 1:
        op.emit("LeakyRelu", [op.input(0)], alpha=float(slope.reshape(())))
        return
    if slope is None:
        raise UnsupportedFormError("computed slopes")
    if slope.ndim == 1 and rank > 1:
        slope = slope.reshape(-1, *([1] * (rank - 2)))
    op.emit("PRelu", [op.input(0), op.number("slope", slope)])


@translates("Elu")
def elu(op: Op) -> None:
    """``x`` above zero, ``alpha * (exp(x) - 1)`` below."""
    op.emit("Elu", [op.input(0)], alpha=float(op.attrs.get("alpha", 1.0)))


@translates("Selu")
def selu(op: Op) -> None:
    """ELU times gamma."""
    op.emit("Selu", [op.input(0)], alpha=op.scalar(1), gamma=op.scalar(2))


@translates("HSigmoid")
def hsigmoid(op: Op) -> None:
    """``clamp(x / 6 + 1 / 2, 0, 1)``."""
    op.emit("HardSigmoid", [op.input(0)], alpha=1.0 / 6.0, beta=0.5)


@translates("HardSigmoid")
def hard_sigmoid(op: Op) -> None:
    """``clamp(alpha * x + beta, 0, 1)``."""
    op.emit("HardSigmoid", [op.input(0)], alpha=op.scalar(1), beta=op.scalar(2))


@translates("Swish")
def swish(op: Op) -> None:
    """``x * sigmoid(beta * x)``."""
    value = op.input(0)
    inner = value
    if op.has(1) and op.scalar(1) != 1.0:
        inner = op.step("Mul", [value, op.number("beta", np.float32(op.scalar(1)))])
    op.emit("Mul", [value, op.step("Sigmoid", [inner])])


@translates("Gelu")
def gelu(op: Op) -> None:
    """``x * Phi(x)``, exact or with the tanh approximation."""
    how = "tanh" if str(op.attrs.get("approximation_mode", "ERF")).upper() == "TANH" else "none"
    op.emit("Gelu", [op.input(0)], approximate=how)
