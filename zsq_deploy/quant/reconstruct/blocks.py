"""Blocks: the parts of a network that are reconstructed one after the other, found from the graph alone.

A block is a region with one entry and one exit around a place where branches meet again: a residual sum, a concatenation, attention
(Li et al. 2021, BRECQ, section 3.2, takes residual blocks for that). What lies outside such regions is cut into single layers; nodes
without weights belong to the block in front of them. Regions with too many products (a skip around the whole network) are not taken as
one. Nothing depends on how the graph was written, only on what reads what.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import onnx

from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reconstruct.template import PRODUCTS

__all__ = ["LARGEST", "Block", "find_blocks"]

LARGEST = 8
"""Products in one block at most. A bottleneck with projection has 4, attention 6 (query, key, value, two products of activations, output)."""


@dataclass(frozen=True)
class Block:
    """A part of the network.

    Attributes:
        name: Name of its last product, or of its last node where it has none.
        nodes: Names of its nodes in order of execution.
        products: Those of them that multiply (Conv, Gemm, MatMul, ...).
        inputs: Values that come from other blocks or from outside.
        outputs: Values that other blocks or the outside read.
    """

    name: str
    nodes: tuple[str, ...]
    products: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def find_blocks(graph: Graph, *, largest: int = LARGEST, uncut: Collection[str] = ()) -> tuple[Block, ...]:
    """Cut a network into blocks.

    Every node that depends on the data belongs to exactly one block. Each block reads only network inputs and outputs of blocks before
    it. Shape arithmetic belongs to none.

    Args:
        graph: Without Q/DQ (:attr:`~zsq_deploy.quant.reconstruct.template.Template.plain`).
        largest: Products in one block at most, unless `uncut` asks for more.
        uncut: Values that may not go from one block to another.
    """
    data = _data_values(graph)
    nodes = [node for node in graph.nodes if any(name in data for name in node.output)]
    position = {node.name: number for number, node in enumerate(nodes)}
    home: dict[str, int] = {}  # node -> number of the first node of its block
    for region in _regions(graph, nodes, data, largest):
        first = min(position[name] for name in region)
        for name in region:
            home[name] = first
    maker = {name: node for node in nodes for name in node.output if name}
    for node in nodes:
        if node.name in home:
            continue
        before = [home[maker[name].name] for name in node.input if name in maker]
        if node.op_type in PRODUCTS or not before:
            home[node.name] = position[node.name]
        else:
            home[node.name] = max(before)
    _lead_in(nodes, maker, home)
    _merge(nodes, maker, home, uncut)
    members: dict[int, list[onnx.NodeProto]] = {}
    for node in nodes:
        members.setdefault(home[node.name], []).append(node)
    return tuple(_block(graph, members[number], data) for number in sorted(members))


def _data_values(graph: Graph) -> set[str]:
    """Inputs and computed values that follow from the numbers in the data, not from their shape alone."""
    data = {spec.name for spec in graph.inputs}
    for node in graph.nodes:
        if node.op_type in ("Shape", "Size"):
            continue
        if any(name in data for name in node.input):
            data.update(name for name in node.output if name)
    return data


def _lead_in(nodes: Sequence[onnx.NodeProto], maker: dict[str, onnx.NodeProto], home: dict[str, int]) -> None:
    """Put what stands in front of the first products (the rounding of the input) into the first block that reads it."""
    busy = {home[node.name] for node in nodes if node.op_type in PRODUCTS}
    readers: dict[int, set[int]] = {}
    for node in nodes:
        for name in node.input:
            if name in maker and home[maker[name].name] != home[node.name]:
                readers.setdefault(home[maker[name].name], set()).add(home[node.name])
    for number in sorted(readers, reverse=True):
        if number not in busy and len(readers[number]) == 1:
            (reader,) = readers[number]
            for name, other in home.items():
                if other == reader:
                    home[name] = number
            for others in readers.values():
                if reader in others:
                    others.discard(reader)
                    others.add(number)


def _merge(
    nodes: Sequence[onnx.NodeProto], maker: dict[str, onnx.NodeProto], home: dict[str, int], uncut: Collection[str]
) -> None:
    """Put blocks together until no value of `uncut` leaves one; what lies between two of them comes along."""
    changed = True
    while changed:
        changed = False
        for node in nodes:
            for name in node.input:
                if name in uncut and name in maker and home[maker[name].name] != home[node.name]:
                    low, high = sorted((home[maker[name].name], home[node.name]))
                    for other, number in home.items():
                        if low <= number <= high:
                            home[other] = low
                    changed = True


def _block(graph: Graph, nodes: Sequence[onnx.NodeProto], data: Collection[str]) -> Block:
    own = {node.name for node in nodes}
    made = {name for node in nodes for name in node.output if name}
    inputs: dict[str, None] = {}
    for node in nodes:
        for name in _needs(graph, node.input, data):
            if name not in made:
                inputs.setdefault(name)
    outputs = [
        name
        for node in nodes
        for name in node.output
        if name and (graph.is_output(name) or any(_read_outside(graph, name, own, data)))
    ]
    products = tuple(node.name for node in nodes if node.op_type in PRODUCTS)
    return Block(
        name=products[-1] if products else nodes[-1].name,
        nodes=tuple(node.name for node in nodes),
        products=products,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _needs(graph: Graph, names: Iterable[str], data: Collection[str]) -> list[str]:
    """The data values that values follow from, through shape arithmetic."""
    found: list[str] = []
    stack = [name for name in names if name][::-1]
    while stack:
        name = stack.pop()
        if name in data:
            found.append(name)
            continue
        node = graph.producer(name)
        if node is not None:
            stack += [other for other in node.input if other]
    return found


def _read_outside(graph: Graph, value: str, own: Collection[str], data: Collection[str]) -> Iterable[bool]:
    """For every reader of a value, whether it belongs to another block; shape arithmetic counts for whoever reads its result."""
    for node in graph.consumers(value):
        if any(name in data for name in node.output):
            yield node.name not in own
        else:
            for name in node.output:
                yield from _read_outside(graph, name, own, data)


# -- regions --


def _regions(
    graph: Graph, nodes: Sequence[onnx.NodeProto], data: Collection[str], largest: int
) -> list[frozenset[str]]:
    """Regions with one entry and one exit around nodes where branches meet, the largest that are allowed, disjoint."""
    maker = {name: node for node in nodes for name in node.output if name}
    dominators = _dominators(nodes, data)
    ancestors: dict[str, frozenset[str]] = {}
    for node in nodes:
        before: set[str] = set()
        for name in node.input:
            if name in maker:
                before.add(maker[name].name)
                before |= ancestors[maker[name].name]
        ancestors[node.name] = frozenset(before)
    candidates: list[frozenset[str]] = []
    for node in nodes:
        branches = list(dict.fromkeys(name for name in node.input if name in data))
        if len(branches) < 2:
            continue
        entry = _common(branches, dominators)
        if entry is None:
            continue
        # Everything between the entry and the node, with it.
        source = maker[entry].name if entry in maker else None
        outside = (ancestors[source] | {source}) if source is not None else frozenset()
        region = frozenset((ancestors[node.name] | {node.name}) - outside)
        if entry not in maker and any(
            name in data and name not in maker and name != entry for item in region for name in graph.node(item).input
        ):
            continue
        if _closed(graph, region, node.name, entry, data):
            candidates.append(region)
    taken: list[frozenset[str]] = []
    for region in sorted(candidates, key=len, reverse=True):
        products = sum(graph.node(name).op_type in PRODUCTS for name in region)
        if 0 < products <= largest and not any(region & other for other in taken):
            taken.append(region)
    return taken


def _dominators(nodes: Sequence[onnx.NodeProto], data: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Data value -> the values that every way from the inputs to it passes, the value itself last."""
    found: dict[str, tuple[str, ...]] = {}

    def chain(value: str) -> tuple[str, ...]:
        return found.get(value, (value,))

    for node in nodes:
        branches = [chain(name) for name in node.input if name in data]
        common = branches[0] if branches else ()
        for other in branches[1:]:
            length = 0
            while length < min(len(common), len(other)) and common[length] == other[length]:
                length += 1
            common = common[:length]
        for name in node.output:
            if name:
                found[name] = (*common, name)
    return found


def _common(branches: Sequence[str], dominators: dict[str, tuple[str, ...]]) -> str | None:
    """The last value that all branches have passed."""
    chains = [dominators.get(name, (name,)) for name in branches]
    entry = None
    for level in zip(*chains, strict=False):
        if any(name != level[0] for name in level):
            break
        entry = level[0]
    return entry


def _closed(graph: Graph, region: frozenset[str], exit_node: str, entry: str, data: Collection[str]) -> bool:
    """Whether a region reads nothing but its entry and gives nothing but the output of its last node."""
    made = {name for item in region for name in graph.node(item).output if name}
    for item in region:
        node = graph.node(item)
        if any(name not in made and name != entry for name in _needs(graph, node.input, data)):
            return False
        if item == exit_node:
            continue
        for name in node.output:
            if name and (graph.is_output(name) or any(_read_outside(graph, name, region, data))):
                return False
    return True
