"""Values that come from nowhere, and changes of type."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from zsq_deploy.model.ops.registry import Kernel, Node, UnsupportedVariantError, op
from zsq_deploy.model.ops.types import INTEGER_RANGE, compute_type, tensor_from_numpy

__all__: list[str] = []


@op("Constant")
def constant(node: Node) -> Kernel:
    """A constant; the twin holds it among its own tensors, so the kernel is only asked where it stands alone."""
    array = node.graph.constant(node.proto.output[0])
    tensor = None if array is None else tensor_from_numpy(array)
    if tensor is None:
        raise UnsupportedVariantError("constants of strings, sparse tensors and 8-bit floats")
    value = tensor.to(compute_type(tensor.dtype, node.dtype))
    return lambda: value


@op("ConstantOfShape", host=(0,))
def constant_of_shape(node: Node) -> Kernel:
    """One value in a given shape, on the CPU until it meets a tensor elsewhere."""
    array = np.asarray(node.get("value", np.zeros(1, np.float32)))
    one = tensor_from_numpy(array.reshape(-1)[:1])
    if one is None:
        raise UnsupportedVariantError(f"constants of type {array.dtype.name}")
    value: Any = one.item()
    dtype = compute_type(one.dtype, node.dtype)
    read = node.ints(0)
    return lambda given: torch.full(read(given) or [], value, dtype=dtype)


@op("Range", host=(0, 1, 2))
def range_(_node: Node) -> Kernel:
    """``start, start + delta, ...`` below the limit."""

    def kernel(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, last, step = start.item(), limit.item(), delta.item()
        count = max(0, math.ceil((last - first) / step))
        # start + i * delta, as ONNX defines it; torch.arange could end one element later on floats
        return (start + torch.arange(count, device=start.device).to(start.dtype) * delta).to(start.dtype)

    return kernel


@op("EyeLike")
def eye_like(node: Node) -> Kernel:
    """Ones on a diagonal of a matrix that has the input's shape."""
    shift, wanted = int(node.get("k", 0)), node.get("dtype")
    dtype = None if wanted is None else node.target_type(int(wanted))

    def kernel(x: Tensor) -> Tensor:
        rows, columns = x.shape
        down, right = torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
        return (right.unsqueeze(0) == down.unsqueeze(1) + shift).to(dtype or x.dtype)

    return kernel


def _converter(node: Node, onnx_type: int) -> Callable[[Tensor], Tensor]:
    target = node.target_type(onnx_type)
    if onnx_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        low, high = INTEGER_RANGE[onnx_type]

        def narrow(x: Tensor) -> Tensor:
            kept = x.to(torch.int64) & 15  # truncated, and the low bits kept
            return (torch.where(kept > high, kept - 16, kept) if low else kept).to(target)

        return narrow
    return lambda x: x.to(target)


@op("Cast")
def cast(node: Node) -> Kernel:
    """Change of type; what the graph calls float32 is the twin's own float type."""
    return _converter(node, int(node.get("to")))


@op("CastLike", since=15)
def cast_like(node: Node) -> Kernel:
    """Change to the type of another tensor."""
    kind = node.input_type(1)
    if kind is None:
        return lambda x, like: x.to(like.dtype)
    convert = _converter(node, int(onnx.helper.np_dtype_to_tensor_dtype(kind)))
    return lambda x, _like: convert(x)
