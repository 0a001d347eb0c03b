"""Proof of integers: the share of the work that really ran in integer kernels, from what the runtime says it executed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["ExecutedKernel", "FloatIsland", "IntegerProof", "KernelGroup", "prove"]


class ExecutedKernel(Protocol):
    """What is read of a runtime's record of one executed node (``zsq_deploy.backends.base.KernelRecord``)."""

    @property
    def node(self) -> str:
        """The runtime's node name."""

    @property
    def op(self) -> str:
        """Kernel (operator) name."""

    @property
    def integer(self) -> bool:
        """Whether its arithmetic was integer."""

    @property
    def microseconds(self) -> float:
        """Mean time of one execution."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Nodes of the engine's graph that it stands for."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one execution."""

    @property
    def reason(self) -> str:
        """Why it is not an integer kernel."""


@dataclass(frozen=True)
class KernelGroup:
    """All executed nodes of one kernel.

    Attributes:
        op: Kernel (operator) name.
        integer: Whether its arithmetic is integer.
        nodes: How many nodes were executed.
        macs: Their multiply-accumulates at batch 1.
        microseconds: Their time together.
    """

    op: str
    integer: bool
    nodes: int
    macs: int
    microseconds: float


@dataclass(frozen=True)
class FloatIsland:
    """A node that ran in float arithmetic.

    Attributes:
        node: The runtime's node name.
        op: Kernel name.
        macs: Multiply-accumulates at batch 1.
        microseconds: Mean time of one execution.
        reason: Why it is not an integer kernel.
        sources: Nodes of the engine's graph that it stands for.
    """

    node: str
    op: str
    macs: int
    microseconds: float
    reason: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class IntegerProof:
    """How much of the network runs in integers.

    Attributes:
        macs: Multiply-accumulates of the whole network at batch 1.
        integer_macs: Those in integer kernels.
        microseconds: Time of all kernels together.
        integer_microseconds: Time in integer kernels.
        kernels: The work by kernel, the longest time first.
        islands: Nodes that ran in float, those with the most multiply-accumulates, then the longest time, first.
    """

    macs: int
    integer_macs: int
    microseconds: float
    integer_microseconds: float
    kernels: tuple[KernelGroup, ...]
    islands: tuple[FloatIsland, ...]

    @property
    def macs_share(self) -> float | None:
        """Share of multiply-accumulates in integer kernels; ``None`` for a network without any."""
        return self.integer_macs / self.macs if self.macs else None

    @property
    def time_share(self) -> float | None:
        """Share of time in integer kernels; ``None`` if no time was recorded."""
        return self.integer_microseconds / self.microseconds if self.microseconds else None

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the keys are those of the report."""
        return {
            "macs_share": self.macs_share,
            "time_share": self.time_share,
            "macs": self.macs,
            "integer_macs": self.integer_macs,
            "microseconds": self.microseconds,
            "kernels": [
                {
                    "op": group.op,
                    "integer": group.integer,
                    "nodes": group.nodes,
                    "macs": group.macs,
                    "microseconds": group.microseconds,
                }
                for group in self.kernels
            ],
            "float_islands": [
                {
                    "node": island.node,
                    "op": island.op,
                    "macs": island.macs,
                    "microseconds": island.microseconds,
                    "reason": island.reason,
                    "sources": list(island.sources),
                }
                for island in self.islands
            ],
        }


def prove(records: Iterable[ExecutedKernel]) -> IntegerProof:
    """Add up what a runtime executed.

    Args:
        records: One record for each executed node, from the runtime's own profile.
    """
    executed: Sequence[ExecutedKernel] = list(records)
    groups: dict[tuple[str, bool], list[ExecutedKernel]] = {}
    for record in executed:
        groups.setdefault((record.op, record.integer), []).append(record)
    kernels = [
        KernelGroup(op, integer, len(nodes), sum(n.macs for n in nodes), sum(n.microseconds for n in nodes))
        for (op, integer), nodes in groups.items()
    ]
    islands = [
        FloatIsland(
            record.node,
            record.op,
            record.macs,
            record.microseconds,
            record.reason or "the runtime gives no reason",
            tuple(record.sources),
        )
        for record in executed
        if not record.integer
    ]
    return IntegerProof(
        macs=sum(record.macs for record in executed),
        integer_macs=sum(record.macs for record in executed if record.integer),
        microseconds=sum(record.microseconds for record in executed),
        integer_microseconds=sum(record.microseconds for record in executed if record.integer),
        kernels=tuple(sorted(kernels, key=lambda group: (-group.microseconds, group.op, group.integer))),
        islands=tuple(sorted(islands, key=lambda island: (-island.macs, -island.microseconds, island.node))),
    )
