"""Which quantized values of a graph may travel as integer codes held in floats.

Integer tensors carry no gradient. A quantized value that only travels to DequantizeLinear, perhaps through operators that merely
move or choose elements, never needs its integer type: the twin holds its codes in floats, exactly, and the straight-through
gradient reaches what was quantized. A value that is an output of the graph, or that any other operator reads, keeps its type.
"""

from __future__ import annotations

from collections.abc import Mapping

from zsq_deploy.model.graph import Graph

__all__ = ["carried_codes"]

#: Operators that move or choose elements, and which inputs hold the elements (empty: all of them).
_MOVERS: Mapping[str, tuple[int, ...]] = {
    "Concat": (),
    "DepthToSpace": (0,),
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "Identity": (0,),
    "MaxPool": (0,),
    "Pad": (0,),
    "Reshape": (0,),
    "Slice": (0,),
    "SpaceToDepth": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
}


def carried_codes(graph: Graph) -> Mapping[str, str]:
    """Values that may be held as codes in floats, each with the name of a QuantizeLinear node that makes their type."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    def element_inputs(op_type: str, inputs: list[str]) -> list[str]:
        chosen = _MOVERS[op_type]
        return [name for index, name in enumerate(inputs) if name and (not chosen or index in chosen)]

    def moved_outputs(op_type: str, outputs: list[str]) -> list[str]:
        return [name for name in outputs if name] if op_type == "Split" else outputs[:1]

    quantizers = {
        node.output[0]: node.name for node in graph if node.op_type == "QuantizeLinear" and len(node.output) == 1
    }
    if not quantizers:
        return {}
    for name in quantizers:
        root(name)
    for node in graph:
        if node.op_type in _MOVERS:
            group = element_inputs(node.op_type, list(node.input)) + moved_outputs(node.op_type, list(node.output))
            for name in group[1:]:
                parent[root(group[0])] = root(name)
    groups: dict[str, list[str]] = {}
    for name in parent:
        groups.setdefault(root(name), []).append(name)

    outputs = {spec.name for spec in graph.outputs}

    def may(name: str) -> bool:
        if name in outputs:
            return False
        producer = graph.producer(name)
        if producer is None or not (
            name in quantizers
            or (producer.op_type in _MOVERS and name in moved_outputs(producer.op_type, list(producer.output)))
        ):
            return False
        for consumer in graph.consumers(name):
            inputs = list(consumer.input)
            if consumer.op_type == "DequantizeLinear":
                fine = inputs.count(name) == 1 and inputs[0] == name
            elif consumer.op_type in _MOVERS:
                fine = element_inputs(consumer.op_type, inputs).count(name) == inputs.count(name)
            else:
                fine = False
            if not fine:
                return False
        return True

    found: dict[str, str] = {}
    for members in groups.values():
        makers = [quantizers[name] for name in members if name in quantizers]
        if makers and all(may(name) for name in members):
            found.update(dict.fromkeys(members, makers[0]))
    return found
