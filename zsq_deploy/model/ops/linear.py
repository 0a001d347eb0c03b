"""Matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.model.ops.registry import Kernel, Node, op

__all__: list[str] = []


@op("MatMul")
def matmul(_node: Node) -> Kernel:
    """Matrix product with broadcast batch axes, as ``numpy.matmul``."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype in (torch.uint32, torch.uint64):
            return torch.matmul(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
        return torch.matmul(a, b)

    return kernel


@op("Gemm")
def gemm(node: Node) -> Kernel:
    """``alpha * A' B' + beta * C``; the form of a linear layer goes to ``torch.nn.functional.linear``."""
    alpha, beta = float(node.get("alpha", 1.0)), float(node.get("beta", 1.0))
    trans_a, trans_b = bool(node.get("transA", 0)), bool(node.get("transB", 0))

    def kernel(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        if trans_a:
            a = a.transpose(0, 1)
        if alpha == 1.0 and (
            c is None or (beta == 1.0 and c.dim() == 1 and c.shape[0] == b.shape[0 if trans_b else 1])
        ):
            return F.linear(a, b if trans_b else b.transpose(0, 1), c)
        y = torch.matmul(a, b.transpose(0, 1) if trans_b else b)
        y = y if alpha == 1.0 else y * alpha
        if c is None:
            return y
        return y + (c if beta == 1.0 else c * beta)

    return kernel


@op("Einsum")
def einsum(node: Node) -> Kernel:
    """Sum of products by an equation."""
    equation = str(node.get("equation")).replace(" ", "")
    return lambda *tensors: torch.einsum(equation, *tensors)


@op("Det")
def determinant(_node: Node) -> Kernel:
    """Determinant of square matrices in the last two axes."""
    kernel: Any = torch.linalg.det
    return kernel  # type: ignore[no-any-return]
