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

__all__ = ["LabelSpace", "Targets", "balanced", "find_labels", "uniform"]

_SAME_NUMBERS = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout")


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
        soft: Wanted probabilities [N, C]; ``None``: all of it on the class.
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
