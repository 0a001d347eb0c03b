"""Activation functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.model.ops.registry import Kernel, Node, op

__all__: list[str] = []


@op("Relu")
def relu(_node: Node) -> Kernel:
    """``max(x, 0)``."""
    return torch.relu


@op("Sigmoid")
def sigmoid(_node: Node) -> Kernel:
    """``1 / (1 + exp(-x))``."""
    return torch.sigmoid


@op("Tanh")
def tanh(_node: Node) -> Kernel:
    """Hyperbolic tangent."""
    return torch.tanh


@op("Softsign")
def softsign(_node: Node) -> Kernel:
    """``x / (1 + |x|)``."""
    return F.softsign


@op("Softplus")
def softplus(_node: Node) -> Kernel:
    """``log(1 + exp(x))`` without overflow and without torch's switch to linear above 20."""
    return lambda x: torch.logaddexp(x, torch.zeros_like(x))


@op("Mish", since=18)
def mish(_node: Node) -> Kernel:
    """``x * tanh(softplus(x))``."""
    return F.mish


@op("LeakyRelu")
def leaky_relu(node: Node) -> Kernel:
    """``x`` above zero, ``alpha * x`` below."""
    alpha = float(node.get("alpha", 0.01))
    return lambda x: F.leaky_relu(x, alpha)


@op("PRelu")
def prelu(_node: Node) -> Kernel:
    """``x`` above zero, ``slope * x`` below; the slope broadcasts to the input."""
    return lambda x, slope: torch.where(x < 0, x * slope, x)


@op("Elu")
def elu(node: Node) -> Kernel:
    """``x`` above zero, ``alpha * (exp(x) - 1)`` below."""
    alpha = float(node.get("alpha", 1.0))
    return lambda x: F.elu(x, alpha)


@op("Selu")
def selu(node: Node) -> Kernel:
    """ELU times gamma."""
    alpha = float(node.get("alpha", 1.67326319217681884765625))
    gamma = float(node.get("gamma", 1.05070102214813232421875))
    return lambda x: gamma * F.elu(x, alpha)


@op("Celu")
def celu(node: Node) -> Kernel:
    """``max(0, x) + min(0, alpha * (exp(x / alpha) - 1))``."""
    alpha = float(node.get("alpha", 1.0))
    return lambda x: F.celu(x, alpha)


@op("HardSigmoid")
def hard_sigmoid(node: Node) -> Kernel:
    """``clamp(alpha * x + beta, 0, 1)``."""
    alpha, beta = float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))
    return lambda x: torch.clamp(x * alpha + beta, 0.0, 1.0)


@op("HardSwish", since=14)
def hard_swish(_node: Node) -> Kernel:
    """``x * clamp(x / 6 + 1/2, 0, 1)``."""
    return F.hardswish


@op("Gelu", since=20)
def gelu(node: Node) -> Kernel:
    """``x * Phi(x)``, exact or with the tanh approximation."""
    approximate = str(node.get("approximate", "none"))
    return lambda x: F.gelu(x, approximate=approximate)


@op("ThresholdedRelu")
def thresholded_relu(node: Node) -> Kernel:
    """``x`` above alpha, zero elsewhere."""
    alpha = float(node.get("alpha", 1.0))
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


@op("Shrink")
def shrink(node: Node) -> Kernel:
    """``x - bias`` above lambd, ``x + bias`` below -lambd, zero between."""
    bias, threshold = float(node.get("bias", 0.0)), float(node.get("lambd", 0.5))

    def kernel(x: Tensor) -> Tensor:
        shifted = torch.where(x > threshold, x - bias, torch.where(x < -threshold, x + bias, torch.zeros_like(x)))
        return shifted.to(x.dtype)

    return kernel


@op("Softmax")
def softmax(node: Node) -> Kernel:
    """Softmax along one axis (opset 13 and later: no flattening)."""
    axis = int(node.get("axis", -1))
    return lambda x: torch.softmax(x, axis)


@op("LogSoftmax")
def log_softmax(node: Node) -> Kernel:
    """Logarithm of the softmax along one axis."""
    axis = int(node.get("axis", -1))
    return lambda x: torch.log_softmax(x, axis)


@op("Hardmax")
def hardmax(node: Node) -> Kernel:
    """One at the first maximum along an axis, zero elsewhere."""
    axis = int(node.get("axis", -1))

    def kernel(x: Tensor) -> Tensor:
        # cummax keeps the first of equal maxima visible: the first place that equals the overall maximum
        maximum = x.amax(axis, keepdim=True)
        hit = (x == maximum).to(torch.int64)
        first = (hit.cumsum(axis) == 1) & (hit == 1)
        return first.to(x.dtype)

    return kernel
