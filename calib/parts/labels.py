"""Classes of a network, and the ones that synthetic images are asked to be.

A label loss needs the numbers in front of the last softmax. :func:`find_labels` looks for them from the network's outputs: a
classifier has one output [N, classes], and exporters leave a softmax behind it or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zsq_deploy.model.graph import Graph, TensorSpec, attributes

__all__ = ["LabelSpace", "Softened", "TargetRule", "Targets", "balanced", "find_features", "find_labels", "uniform"]

_SAME_NUMBERS = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout")
# What may stand between the last weights and the class scores without making other features of them.
_BEHIND_WEIGHTS = (*_SAME_NUMBERS, "Add", "GlobalAveragePool", "AveragePool", "ReduceMean", "Relu", "Clip")
_WEIGHTS = ("Gemm", "MatMul", "Conv")


@dataclass(frozen=True)
class LabelSpace:
    """Where a network says what it sees.

    Attributes:
        value: Name of the value [N, classes] whose softmax gives the probabilities.
        classes: How many there are.
        node: Name of the node that makes it.
    """

    value: str
    classes: int
    node: str


@dataclass(frozen=True)
class Targets:
    """What the images of a batch are asked to be.

    Attributes:
        classes: Class of each image, int64 [N].
        soft: Wanted probabilities [N, C]; ``None``: all of it on the class. Rows may sum to less than 1 for terms that look at the
            class's own probability only (IntraQ).
    """

    classes: Tensor
    soft: Tensor | None = None

    def rows(self, first: int, count: int) -> Targets:
        """Those of a piece of the batch."""
        part = slice(first, first + count)
        return Targets(self.classes[part], None if self.soft is None else self.soft[part])

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(self.classes.to(device), None if self.soft is None else self.soft.to(device))

    def probabilities(self, classes: int) -> Tensor:
        """Wanted probabilities [N, C], one-hot unless soft ones were drawn."""
        if self.soft is not None:
            return self.soft
        return torch.nn.functional.one_hot(self.classes, classes).to(torch.float32)


class TargetRule(Protocol):
    """Draws the targets of a batch from (images, classes, random generator)."""

    def __call__(self, count: int, classes: int, generator: torch.Generator) -> Targets:
        """Targets of `count` images, on the CPU."""


def uniform(count: int, classes: int, generator: torch.Generator) -> Targets:
    """Every image a class of its own choice (DeepInversion, GDFQ, IntraQ, HAST)."""
    return Targets(torch.randint(classes, (count,), generator=generator))


def balanced(count: int, classes: int, generator: torch.Generator) -> Targets:
    """Every class as often as any other, to within one image, in random order."""
    repeated = torch.arange(count) % classes
    order = torch.randperm(classes, generator=generator)[repeated]
    return Targets(order[torch.randperm(count, generator=generator)])


@dataclass(frozen=True)
class Softened:
    """Classes drawn uniformly; a share of the images is asked to be only nearly certain (IntraQ, arXiv 2111.09136, section 3.4).

    Such an image is asked for a probability of its class that is drawn uniformly from `low` to 1; nothing is said of the others.

    Attributes:
        low: Least probability that is asked for.
        share: Of images that are softened, on average.
    """

    low: float
    share: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.low <= 1 and 0 <= self.share <= 1):
            raise ValueError("the least probability and the share of softened images lie between 0 and 1")

    def __call__(self, count: int, classes: int, generator: torch.Generator) -> Targets:
        """Targets of `count` images."""
        chosen = torch.randint(classes, (count,), generator=generator)
        asked = self.low + (1 - self.low) * torch.rand(count, generator=generator)
        softened = torch.rand(count, generator=generator) < self.share
        asked = torch.where(softened, asked, torch.ones(()))
        return Targets(chosen, torch.zeros(count, classes).scatter_(1, chosen[:, None], asked[:, None]))


def find_labels(graph: Graph, outputs: tuple[TensorSpec, ...]) -> LabelSpace | None:
    """The class scores of a network, or ``None`` for one that is no classifier.

    Args:
        graph: The network.
        outputs: Its outputs, with shapes. A classifier has one float output of shape [N, C] with C >= 2, or the same
            followed by axes of length 1.
    """
    if len(outputs) != 1 or outputs[0].dtype.kind != "f":
        return None
    shape = outputs[0].shape
    if len(shape) < 2 or not isinstance(shape[1], int) or shape[1] < 2 or any(size != 1 for size in shape[2:]):
        return None
    value, classes = outputs[0].name, shape[1]
    at = value
    while (node := graph.producer(at)) is not None:  # back through what leaves the numbers as they are
        if node.op_type in ("Softmax", "LogSoftmax"):
            axis = int(attributes(node).get("axis", -1))
            if axis not in (1, -1, -(len(shape) - 1)):
                return None  # a softmax over something that is not the classes
            value = node.input[0]
            break
        if node.op_type not in _SAME_NUMBERS:
            break
        at = node.input[0]
    maker = graph.producer(value)
    return LabelSpace(value, classes, maker.name if maker is not None else "")


def find_features(graph: Graph, labels: LabelSpace) -> str:
    """Name of the value that the last weights of a classifier read: its features, [N, F] or [N, F, ...] (to be pooled).

    A network without weights behind its last pooling (class scores that are pooled maps) has its class scores as features.

    Args:
        graph: The network, as it came or as synthesis runs it; names differ between the two.
        labels: Its class scores.
    """
    at = labels.value
    while (node := graph.producer(at)) is not None:
        if node.op_type in _WEIGHTS:
            weights = [index for index, name in enumerate(node.input[:2]) if graph.constant(name) is not None]
            return str(node.input[1] if weights == [0] else node.input[0])
        if node.op_type not in _BEHIND_WEIGHTS:
            break
        data = [name for name in node.input if name and graph.constant(name) is None]
        if len(data) != 1:
            break  # a sum of two branches
        at = data[0]
    return labels.value
