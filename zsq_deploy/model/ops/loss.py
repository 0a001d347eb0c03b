"""The two losses of ONNX, which training exports leave behind in some files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.model.ops.registry import Kernel, Node, op

__all__: list[str] = []


def _nll(logs: Tensor, target: Tensor, weight: Tensor | None, ignore: int | None, reduction: str) -> Tensor:
    return F.nll_loss(
        logs, target.to(torch.int64), weight, ignore_index=-100 if ignore is None else ignore, reduction=reduction
    )


def _ignored(node: Node) -> int | None:
    value = node.get("ignore_index")
    return None if value is None else int(value)


@op("NegativeLogLikelihoodLoss")
def negative_log_likelihood(node: Node) -> Kernel:
    """Minus the log probability of the target class, weighted, over any number of positions."""
    reduction, ignore = str(node.get("reduction", "mean")), _ignored(node)
    return lambda logs, target, weight=None: _nll(logs, target, weight, ignore, reduction)


@op("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(node: Node) -> Kernel:
    """Negative log likelihood of the log softmax over axis 1; the log probabilities are an optional output."""
    reduction, ignore, both = str(node.get("reduction", "mean")), _ignored(node), node.wants(1)

    def kernel(scores: Tensor, target: Tensor, weight: Tensor | None = None) -> Any:
        logs = torch.log_softmax(scores, 1)
        loss = _nll(logs, target, weight, ignore, reduction)
        return (loss, logs) if both else loss

    return kernel
