"""What a walk through a graph has found so far, and the words in which its rules are written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.analytic.channels import Channels, Kind, Vector

__all__ = ["Known", "aligned", "hull"]


@dataclass(frozen=True, eq=False)
class Known:
    """A graph, and what is known about its values.

    Attributes:
        graph: The graph.
        sigmas: How many standard deviations activations reach.
        found: Value name to what is known about it.
    """

    graph: Graph
    sigmas: float
    found: dict[str, Channels] = field(default_factory=dict)

    def constant(self, name: str) -> Vector | None:
        """The numbers of a constant; ``None`` for anything else."""
        array = self.graph.constant(name) if name else None
        return None if array is None or array.dtype.kind not in "fiu" else array.astype(np.float64)

    def rank(self, name: str) -> int | None:
        """How many axes a value has."""
        shape = self.graph.shape(name)
        return None if shape is None else len(shape)

    def of(self, name: str) -> Channels | None:
        """What is known about an operand, constants included."""
        if name in self.found:
            return self.found[name]
        value = self.constant(name)
        if value is None or value.size == 0:
            return None
        shape = value.shape
        real = [axis for axis, size in enumerate(shape) if size > 1]
        if len(real) == 1 and (len(shape) - real[0] in (1, 3) and len(shape) in (1, 3, 4)):
            flat = value.reshape(-1)
            axis = -1 if len(shape) - real[0] == 1 else 1
            return Channels(flat, np.zeros_like(flat), flat, flat, axis, "bn")
        mean = value.mean(keepdims=True).reshape(1)
        return Channels(
            mean, value.var(keepdims=True).reshape(1), value.min().reshape(1), value.max().reshape(1), None, "bn"
        )

    def normal(self, mean: Vector, var: Vector, axis: int | None, kind: Kind) -> Channels:
        """Channels of a normal distribution."""
        deviation = self.sigmas * np.sqrt(var)
        return Channels(mean, var, mean - deviation, mean + deviation, axis, kind)


def aligned(a: Channels, b: Channels) -> tuple[Channels, Channels]:
    """Both with the same channel axis, pooled where they do not match."""
    if a.axis is None or b.axis is None or (a.axis == b.axis and len(a.mean) == len(b.mean)):
        return a, b
    return a.pooled(), b.pooled()


def hull(a: Channels, b: Channels) -> Channels:
    """One of two values, whichever it is."""
    a, b = aligned(a, b)
    mean = (a.mean + b.mean) / 2
    return Channels(
        mean,
        (a.var + b.var) / 2 + np.square(a.mean - b.mean) / 4,
        np.minimum(a.low, b.low),
        np.maximum(a.high, b.high),
        a.axis if a.axis is not None else b.axis,
        a.as_kind(b.kind, "derived").kind,
    )
