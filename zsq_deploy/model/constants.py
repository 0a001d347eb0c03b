"""Other numbers for a graph's constants, and constants of its own for every layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from zsq_deploy.errors import UsageError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph

__all__ = ["own_constants", "replace_constants"]


def replace_constants(graph: Graph, weights: Mapping[str, Any]) -> Graph:
    """The graph with other weights.

    Args:
        graph: Float graph with batch norm folded.
        weights: Initializer name -> array of the same shape.

    Raises:
        UsageError: There is no such initializer, or its shape is another one.
    """
    if not weights:
        return graph
    net = Net(graph.proto)
    for name, array in weights.items():
        old = net.constant(name)
        if old is None or old.shape != np.shape(array):
            raise UsageError(
                f"there is no weight {name!r} of shape {np.shape(array)}",
                where=name,
                remedy="give initializers of the folded graph, with values of the same shape",
            )
        net.add_constant(name, np.asarray(array, old.dtype), exact=True)
    return Graph(net.proto())


def own_constants(graph: Graph, op_types: Collection[str]) -> Graph:
    """A weight or bias that several layers (of these operator types) read is copied, so that each can have its own scales."""
    seen: set[str] = set()
    net: Net | None = None
    for index, node in enumerate(graph.nodes):
        if node.op_type not in op_types:
            continue
        for slot in range(1, len(node.input)):
            name = node.input[slot]
            array = graph.constant(name) if name else None
            if array is None:
                continue
            if name in seen:
                net = net or Net(graph.proto)
                net.nodes[index].input[slot] = net.add_constant(f"{name}__{node.name}", array)
            seen.add(name)
    return graph if net is None else Graph(net.proto())
