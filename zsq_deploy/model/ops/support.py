"""Which operators of a graph the table cannot run: found all at once, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zsq_deploy.errors import UnsupportedOpError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.ops.registry import DOMAIN, OPS, OPSETS, Kernel, Node, OpImpl, UnsupportedVariantError

__all__ = ["UnsupportedUse", "build", "check_supported", "lookup", "raise_unsupported", "unsupported"]

_SHOWN = 8


@dataclass(frozen=True)
class UnsupportedUse:
    """One operator that cannot run, and where it stands.

    Attributes:
        op_type: Operator name, with its domain where that is not ONNX's own.
        reason: Why: not in the table, or which form of it is not.
        nodes: Names of the nodes, in graph order.
    """

    op_type: str
    reason: str
    nodes: tuple[str, ...]


def _domain(name: str) -> str:
    return DOMAIN if name == "ai.onnx" else name


def lookup(domain: str, op_type: str) -> OpImpl | None:
    """The row of the table for an operator."""
    return OPS.get((_domain(domain), op_type))


def build(node: Node) -> Kernel:
    """The kernel of a node.

    Raises:
        UnsupportedVariantError: The table has no such operator, or not in this form or opset.
    """
    proto = node.proto
    row = lookup(proto.domain, proto.op_type)
    if row is None:
        raise UnsupportedVariantError("not in the op table")
    if row.domain == DOMAIN and not row.since <= node.opset <= row.until:
        raise UnsupportedVariantError(
            f"defined in opsets {row.since} to {row.until}, the graph says opset {node.opset}"
        )
    try:
        return row.build(node)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # a builder reads attributes as the specification says they are; a file that breaks it ends here
        raise UnsupportedVariantError(f"malformed attributes or constants: {error}") from error


def _title(node: Node) -> str:
    domain = _domain(node.proto.domain)
    return f"{domain}::{node.proto.op_type}" if domain else node.proto.op_type


def unsupported(graph: Graph) -> tuple[UnsupportedUse, ...]:
    """Every operator of a graph that the table cannot run, with all of its places, in the order of first appearance."""
    found: dict[tuple[str, str], list[str]] = {}
    for proto in graph:
        node = Node(graph, proto, torch.float32)
        try:
            build(node)
        except UnsupportedVariantError as error:
            found.setdefault((_title(node), str(error)), []).append(proto.name)
    return tuple(UnsupportedUse(op_type, reason, tuple(names)) for (op_type, reason), names in found.items())


def raise_unsupported(uses: tuple[UnsupportedUse, ...]) -> None:
    """One error that lists every use.

    Raises:
        UnsupportedOpError: There is at least one.
    """
    if not uses:
        return
    lines = []
    for use in uses:
        places = ", ".join(use.nodes[:_SHOWN])
        more = f" and {len(use.nodes) - _SHOWN} more" if len(use.nodes) > _SHOWN else ""
        lines.append(f"{use.op_type} ({use.reason}): {places}{more}")
    count = sum(len(use.nodes) for use in uses)
    raise UnsupportedOpError(
        f"{len(uses)} operator form(s) in {count} node(s) are not supported",
        where="\n         ".join(lines),
        remedy=(
            "export the network without them (evaluation mode, fixed shapes, post-processing left out of the graph), or add the "
            "operator: one decorated builder in zsq_deploy/model/ops"
        ),
    )


def check_supported(graph: Graph) -> None:
    """Refuse a graph that the table cannot run.

    Raises:
        UnsupportedOpError: Some operators are not supported, or the opset is out of range; names all of them with all of
            their places.
    """
    if graph.opset not in OPSETS:
        raise UnsupportedOpError(
            f"the graph uses opset {graph.opset}; the op table knows opsets {OPSETS.start} to {OPSETS.stop - 1}",
            remedy="load it with zsq_deploy.model.load_model, which converts older files, or export with a lower opset",
        )
    raise_unsupported(unsupported(graph))
