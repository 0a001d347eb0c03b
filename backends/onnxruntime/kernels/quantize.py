"""Between float and codes: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx

from zsq_deploy.backends.onnxruntime.kernels.base import Array, Inputs, Kernel, NodeSpec, kernel, need
from zsq_deploy.backends.onnxruntime.kernels.matmul import dynamic_parameters
from zsq_deploy.errors import EngineError

__all__ = ["DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"]


def spread(parameter: Array, x: Array, node: NodeSpec) -> Array:
    """Shape a scale or zero point so that it broadcasts against `x`: per tensor, per channel or per block."""
    if parameter.ndim == 0 or (parameter.size == 1 and parameter.ndim <= 1):
        return parameter.reshape(())
    axis = int(node.attrs.get("axis", 1)) % x.ndim
    if parameter.ndim == 1:
        return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    block = int(node.attrs.get("block_size", 0))
    if not block or parameter.ndim != x.ndim:
        raise EngineError(
            f"{node.name} has a scale of shape {parameter.shape}",
            where=node.proto.name,
            remedy="use one scale a tensor, channel or block",
        )
    return np.repeat(parameter, block, axis=axis).take(range(x.shape[axis]), axis=axis)


@kernel("QuantizeLinear", "com.microsoft.QuantizeLinear")
class QuantizeLinear(Kernel):
    """``q = sat(rint(f(x / s)) + z)``: a true division, half to even."""

    arithmetic_kernel = False

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        x, scale = need(inputs, 0, node), need(inputs, 1, node)
        zero = inputs[2] if len(inputs) > 2 else None
        if zero is not None:
            dtype = zero.dtype
        else:
            wanted = int(node.attrs.get("output_dtype", 0)) or onnx.TensorProto.UINT8
            dtype = onnx.helper.tensor_dtype_to_np_dtype(wanted)
        if dtype.kind not in "iu" or x.dtype != np.float32:
            raise EngineError(
                f"{node.name} makes {dtype} of {x.dtype}",
                where=node.proto.name,
                remedy="only float32 to 8- or 16-bit integers is known to the integer reference",
            )
        zero_point = np.zeros((), dtype) if zero is None else spread(zero, x, node)
        return [self.arithmetic.quantize(x, spread(scale, x, node), zero_point, dtype)]


@kernel("DequantizeLinear", "com.microsoft.DequantizeLinear")
class DequantizeLinear(Kernel):
    """``x = f(f(q - z) * s)``."""

    arithmetic_kernel = False

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        q, scale = need(inputs, 0, node), need(inputs, 1, node)
        zero = inputs[2] if len(inputs) > 2 else None
        if scale.dtype != np.float32:
            raise EngineError(f"{node.name} returns {scale.dtype}", where=node.proto.name, remedy="use float32 scales")
        zero_point = np.zeros((), np.int32) if zero is None else spread(zero, q, node)
        return [self.arithmetic.dequantize(q, spread(scale, q, node), zero_point)]


@kernel("DynamicQuantizeLinear")
class DynamicQuantizeLinear(Kernel):
    """Codes with the tensor's own range: :func:`dynamic_parameters`, then as QuantizeLinear."""

    def _run(self, inputs: Inputs) -> list[Array]:
        x = need(inputs, 0, self.node)
        scale, zero = dynamic_parameters(x)
        return [self.arithmetic.quantize(x, scale, zero, np.uint8), np.asarray(scale), np.asarray(zero)]
