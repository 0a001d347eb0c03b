"""Element types: ONNX to torch, and numpy constants to tensors.

Torch has no 4-bit integers: ``int4`` and ``uint4`` values are held one per element in ``int8`` and ``uint8``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch

__all__ = ["INTEGER_RANGE", "compute_type", "is_wide_unsigned", "tensor_from_numpy", "torch_type"]

_T = onnx.TensorProto

_TORCH: dict[int, torch.dtype] = {
    _T.FLOAT: torch.float32,
    _T.DOUBLE: torch.float64,
    _T.FLOAT16: torch.float16,
    _T.BFLOAT16: torch.bfloat16,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    _T.INT4: torch.int8,
    _T.UINT4: torch.uint8,
    _T.BOOL: torch.bool,
}

#: Smallest and largest code of every integer type that QuantizeLinear can make.
INTEGER_RANGE: dict[int, tuple[int, int]] = {
    _T.INT4: (-8, 7),
    _T.UINT4: (0, 15),
    _T.INT8: (-128, 127),
    _T.UINT8: (0, 255),
    _T.INT16: (-32768, 32767),
    _T.UINT16: (0, 65535),
}

_WIDE = frozenset({torch.uint16, torch.uint32, torch.uint64})


def is_wide_unsigned(dtype: torch.dtype) -> bool:
    """Whether torch can store the type but has next to no arithmetic for it."""
    return dtype in _WIDE


def torch_type(onnx_type: int) -> torch.dtype | None:
    """The torch type that holds an ONNX element type; ``None`` where there is none (strings, complex, 8-bit floats)."""
    return _TORCH.get(onnx_type)


def compute_type(dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The type in which a twin computes a value that the graph says is `dtype`.

    What the graph calls float32 is computed in the twin's own float type. A float64 twin is the ideal arithmetic, so every
    narrower float type becomes float64 there.
    """
    if dtype is torch.float32:
        return compute
    if compute is torch.float64 and dtype in (torch.float16, torch.bfloat16):
        return compute
    return dtype


def tensor_from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor | None:
    """A tensor with its own memory; ``None`` for types that torch cannot hold."""
    name = array.dtype.name
    if name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy().view(np.int16)).view(torch.bfloat16)
    if name in ("int4", "uint4"):
        array = array.astype(np.int8 if name == "int4" else np.uint8)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize == 16 or name.startswith("float8"):
        return None
    return torch.from_numpy(np.array(array, copy=True, order="C"))
