"""Comparisons and boolean logic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zsq_deploy.model.ops.registry import Kernel, Node, op
from zsq_deploy.model.ops.types import is_wide_unsigned

__all__: list[str] = []

_COMPARE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}

_BOOLEAN: dict[str, Callable[..., Tensor]] = {
    "And": torch.logical_and,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}


@op(*_COMPARE)
def compare(node: Node) -> Kernel:
    """Elementwise comparison with broadcasting."""
    function = _COMPARE[node.proto.op_type]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        if is_wide_unsigned(a.dtype):
            return function(a.to(torch.int64), b.to(torch.int64))
        return function(a, b)

    return kernel


@op(*_BOOLEAN)
def boolean(node: Node) -> Kernel:
    """Elementwise logic on booleans with broadcasting."""
    return _BOOLEAN[node.proto.op_type]
