"""QuantizeLinear and DequantizeLinear, with straight-through gradients.

``q = saturate(rint(x / scale) + zero_point)`` and ``y = (q - zero_point) * scale``: a true division, rounding half to even, as ONNX
defines it and as runtimes compute it in float32. The gradient of the rounding is taken as one and that of the saturation as it is
(one inside, zero outside), so that the pair has the gradient of LSQ (Esser et al. 2020, eq. 3 and 5) for input and scale.

Where a quantized value only travels to DequantizeLinear, the twin asks for its codes in the compute float type
(:attr:`Node.codes`): every code of up to 16 bits is exact in float32, and the gradient can flow. Everywhere else
QuantizeLinear gives the integer type of the graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

import onnx
import torch
from torch import Tensor

from zsq_deploy.model.ops.registry import DOMAIN, MICROSOFT, Kernel, Node, UnsupportedVariantError, op
from zsq_deploy.model.ops.types import INTEGER_RANGE, torch_type

__all__ = ["integer_type", "spread"]


class _RoundThrough(torch.autograd.Function):
    """Rounding half to even with the gradient of the identity."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(_ctx: Any, *grad: Any) -> Any:
        return grad[0]


def _round_through(x: Tensor) -> Tensor:
    result: Tensor = _RoundThrough.apply(x)  # type: ignore[no-untyped-call]
    return result


def spread(values: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points made to broadcast against `x`: one for all, one a channel along `axis`, or one a block of it."""
    if values.numel() == 1:
        return values.reshape(())
    if block:
        # the last block may be cut short
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if values.dim() == x.dim():
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def integer_type(node: Node) -> int:
    """The ONNX element type that a QuantizeLinear node makes: that of its zero point, else its attribute, else uint8."""
    if node.has(2):
        constant = node.constant(2)
        kind = node.input_type(2) if constant is None else constant.dtype
        if kind is None:
            raise UnsupportedVariantError("a zero point whose type is not known")
        return int(onnx.helper.np_dtype_to_tensor_dtype(kind))
    return int(node.get("output_dtype", 0)) or int(onnx.TensorProto.UINT8)


def _no_float8(kind: int) -> NoReturn:
    name = onnx.TensorProto.DataType.Name(kind)
    raise UnsupportedVariantError(f"quantization to {name}; integer types of 4, 8 and 16 bits are known")


@op("QuantizeLinear")
def quantize_linear(node: Node) -> Kernel:
    """Codes of a tensor: per tensor, per channel along `axis`, or per block of it (opset 21)."""
    kind = integer_type(node)
    if kind not in INTEGER_RANGE:
        _no_float8(kind)
    low, high = INTEGER_RANGE[kind]
    target = torch_type(kind)
    assert target is not None
    axis, block, codes = int(node.get("axis", 1)), int(node.get("block_size", 0)), node.codes

    def kernel(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        if not x.is_floating_point():
            x = x.to(scale.dtype)
        scale = spread(scale, x, axis, block)
        shift = None if zero_point is None else spread(zero_point, x, axis, block).to(x.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            y = _round_through(x / scale)
            y = torch.clamp(y if shift is None else y + shift, low, high)
        else:
            y = torch.div(x, scale).round_()
            y = (y if shift is None else y.add_(shift)).clamp_(low, high)
        return y if codes else y.to(target)

    return kernel


@op("DequantizeLinear")
def dequantize_linear(node: Node) -> Kernel:
    """Values of codes: per tensor, per channel along `axis`, or per block of it (opset 21); in the type of the scale."""
    axis, block = int(node.get("axis", 1)), int(node.get("block_size", 0))
    if node.has(0):
        kind = node.input_type(0)
        if kind is not None and kind.name.startswith("float") and kind.itemsize == 1:
            raise UnsupportedVariantError(f"dequantization of {kind.name}; integer types are known")

    def kernel(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        y = codes if codes.dtype == scale.dtype else codes.to(scale.dtype)
        factor = spread(scale, codes, axis, block)
        if zero_point is None:
            return y * factor
        y = y - spread(zero_point, codes, axis, block).to(scale.dtype)
        return y * factor if y.requires_grad or factor.requires_grad else y.mul_(factor)

    return kernel


op("QuantizeLinear", domain=MICROSOFT)(quantize_linear)
op("DequantizeLinear", domain=MICROSOFT)(dequantize_linear)


@op("DynamicQuantizeLinear", domain=DOMAIN)
def dynamic_quantize_linear(_node: Node) -> Kernel:
    """uint8 codes with the scale and zero point of the tensor's own range, which always holds zero."""

    def kernel(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = torch.clamp(x.amin(), max=0.0), torch.clamp(x.amax(), min=0.0)
        scale = (high - low) / 255.0
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero_point = torch.clamp(torch.round(-low / safe), 0, 255)
        codes = torch.clamp(torch.round(x / safe) + zero_point, 0, 255)
        return codes.to(torch.uint8), scale, zero_point.to(torch.uint8)

    return kernel
