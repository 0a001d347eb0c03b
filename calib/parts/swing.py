"""Swing convolution (Genie, arXiv 2212.04780, section 3.2): a strided convolution sees its input shifted at random by a pixel or so.

A strided convolution reads its input on a fixed lattice, so the gradient with respect to the images comes out as a checkerboard. Padding the
input by reflection and cutting the original size out at a random place lets every pixel take every part in turn.

The shift belongs to the edge into that one convolution, not to the value (a shortcut that reads the same value must not move), so
:func:`swing_edges` gives each such edge a name of its own by an Identity node, and the shift is a tap on that name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
import torch
from torch import Tensor

from zsq_deploy.model.graph import Graph, attributes

__all__ = ["shift", "swing_edges", "swing_taps"]


def swing_edges(graph: Graph) -> tuple[Graph, tuple[str, ...]]:
    """Name the data edge into every strided 2-D convolution.

    Returns:
        The graph (the same one if nothing is strided) and the names of the edges, in graph order.
    """
    strided = [
        node.name
        for node in graph.nodes
        if node.op_type == "Conv" and len(s := attributes(node).get("strides", [])) == 2 and max(s) > 1
    ]
    if not strided:
        return graph, ()
    proto = graph.editable()
    nodes, edges = [], []
    for node in proto.graph.node:
        if node.name in strided:
            edge = f"{node.input[0]}::swing::{node.name}"
            nodes.append(onnx.helper.make_node("Identity", [node.input[0]], [edge], name=f"{node.name}::swing"))
            node.input[0] = edge
            edges.append(edge)
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return Graph(proto), tuple(edges)


def shift(x: Tensor, down: int, right: int) -> Tensor:
    """`x` [N, C, H, W] moved by (down, right) pixels, what enters at the border filled by reflection.

    The same as padding by reflection and cutting, put together from slices: their gradient is deterministic on every device.
    """
    return _shift_along(_shift_along(x, down, 2), right, 3)


def _shift_along(x: Tensor, by: int, axis: int) -> Tensor:
    size = x.shape[axis]
    by = max(-(size - 1), min(size - 1, by))  # reflection needs more pixels than it fills
    if by == 0:
        return x
    if by > 0:
        entering = x.narrow(axis, 1, by).flip(axis)
        return torch.cat([entering, x.narrow(axis, 0, size - by)], axis)
    entering = x.narrow(axis, size - 1 + by, -by).flip(axis)
    return torch.cat([x.narrow(axis, -by, size + by), entering], axis)


def swing_taps(
    edges: Sequence[str], generator: torch.Generator, reach: int = 1
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Taps that shift each edge by an amount drawn from `generator`; make new ones for every step."""
    if not edges:
        return {}
    drawn = torch.randint(-reach, reach + 1, (len(edges), 2), generator=generator).tolist()

    def tap(down: int, right: int) -> Callable[[Tensor], Tensor]:
        return lambda x: shift(x, down, right)

    return {edge: tap(down, right) for edge, (down, right) in zip(edges, drawn, strict=True)}
