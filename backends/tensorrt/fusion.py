"""What TensorRT is expected to fuse: which convolutions and matrix products become one 8-bit kernel with what stands behind them.

This is read off the Q/DQ graph by the rules of NVIDIA's documentation; it is an expectation. What was really built is told by the engine
inspector on the device (the ``layers.json`` of the bundle's scripts), and can be held against this list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from zsq_deploy.backends.tensorrt.walking import ACTIVATIONS, CONVOLUTIONS, Rounded, addend, is_product
from zsq_deploy.model.graph import Graph

__all__ = ["FusedGroup", "describe_fusion", "expect_fusion"]


@dataclass(frozen=True)
class FusedGroup:
    """Nodes that are expected to become one kernel.

    Attributes:
        nodes: Their names, the convolution or matrix product first.
        kind: Their operators, ``Conv+Add+Relu``; an Add of a constant is called ``bias``.
        computes: ``int8``, ``int4 weights`` (computed in float) or ``float``.
        writes: ``int8`` or ``float``: what the kernel leaves in memory.
        apart: Operator behind the group that could have been in it, with the reason why it is not; empty if there is none.
    """

    nodes: tuple[str, ...]
    kind: str
    computes: str
    writes: str
    apart: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "nodes": list(self.nodes),
            "kind": self.kind,
            "computes": self.computes,
            "writes": self.writes,
            "apart": self.apart,
        }


def expect_fusion(graph: Graph) -> tuple[FusedGroup, ...]:
    """The expected kernels of all convolutions and matrix products of a Q/DQ graph, in graph order."""
    rounded = Rounded(graph)
    taken: set[str] = set()
    return tuple(_group(rounded, node, taken) for node in graph if is_product(node))


def _group(rounded: Rounded, node: onnx.NodeProto, taken: set[str]) -> FusedGroup:
    graph = rounded.graph
    reads, weight = rounded.behind(node.input[0]), rounded.behind(node.input[1])
    computes = "int8" if reads is not None and weight is not None else "float"
    if weight is not None and weight.dtype == "int4":
        computes = "int4 weights"
    chain, kinds, apart = [node], [str(node.op_type)], ""
    value = str(node.output[0])
    added = False
    while True:
        readers = graph.consumers(value)
        if len(readers) != 1 or graph.is_output(value):
            break
        after = readers[0]
        if after.op_type == "Add" and not addend(graph, after):
            apart = _residual(rounded, node, after, value, taken, again=added)
            if apart:
                break
            added = True
            kinds.append("Add")
        elif after.op_type in ACTIVATIONS and after.input[0] == value:
            if chain[-1].op_type in ACTIVATIONS:
                break
            kinds.append(after.op_type)
        elif len(chain) == 1 and (
            after.op_type == "BatchNormalization" or (after.op_type == "Add" and addend(graph, after))
        ):
            kinds.append("bias" if after.op_type == "Add" else after.op_type)
        else:
            break
        chain.append(after)
        taken.add(after.name)
        value = str(after.output[0])
    writes = "int8" if computes == "int8" and rounded.only_rounded(value) else "float"
    return FusedGroup(tuple(one.name for one in chain), "+".join(kinds), computes, writes, apart)


def _residual(
    rounded: Rounded, node: onnx.NodeProto, add: onnx.NodeProto, value: str, taken: set[str], *, again: bool
) -> str:
    """Why a residual Add does not become part of a convolution; empty if it does."""
    if add.name in taken:
        return "Add: it is part of the other convolution in front of it"
    if again:
        return "Add: one sum a kernel"
    if node.op_type not in CONVOLUTIONS:
        return "Add: residual sums fuse into convolutions only"
    other = next((name for name in add.input if name != value), value)
    if other == value:
        return "Add: both operands are the same"
    rounds = rounded.behind(other) is not None
    out = str(add.output[0])
    readers = rounded.graph.consumers(out)
    if len(readers) == 1 and readers[0].op_type in ACTIVATIONS:
        out = str(readers[0].output[0])
    writes = rounded.only_rounded(out)
    if rounds == writes:
        return ""
    # The branch that computes the sum is the one whose other operand is rounded.
    if writes:
        return f"Add: its other operand {other!r} is not rounded, but the sum is"
    return "Add: its other operand is rounded, but the sum is read in float"


def describe_fusion(groups: Sequence[FusedGroup], *, most: int | None = None) -> str:
    """One line for each group, and a summary, for people.

    Args:
        groups: The expected kernels.
        most: Longer lists are put together: one line for all groups of the same kind that compute and write the same; groups with
            an operator apart always have a line of their own.
    """
    if not groups:
        return "no convolutions or matrix products"
    if most is None or len(groups) <= most:
        lines = [_line(group, ", ".join(group.nodes)) for group in groups]
    else:
        alike: dict[tuple[str, str, str], list[FusedGroup]] = {}
        for group in groups:
            if not group.apart:
                alike.setdefault((group.kind, group.computes, group.writes), []).append(group)
        lines = [
            f"{len(same)} x {_line(same[0], f'{same[0].nodes[0]} ... {same[-1].nodes[0]}')}"
            if len(same) > 1
            else _line(same[0], ", ".join(same[0].nodes))
            for same in alike.values()
        ]
        lines += [_line(group, ", ".join(group.nodes)) for group in groups if group.apart]
    integer = sum(group.computes == "int8" for group in groups)
    whole = sum(group.computes == "int8" and group.writes == "int8" for group in groups)
    sums = sum("Add" in group.kind.split("+") and group.computes == "int8" for group in groups)
    lines.append(
        f"expected: {len(groups)} kernels, {integer} of them in 8 bits, {whole} write 8 bits, {sums} with the sum inside"
    )
    return "\n".join(lines)


def _line(group: FusedGroup, names: str) -> str:
    words = f"{group.kind}: {names}: computes {group.computes}, writes {group.writes}"
    return f"{words}; apart: {group.apart}" if group.apart else words
