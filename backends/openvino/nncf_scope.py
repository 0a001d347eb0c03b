"""Which operators stay in float: what the user names, found in the graph or refused with the names that were probably meant.

A user knows the names of the ONNX network (what ``zsq inspect`` shows); NNCF wants those of OpenVINO's model, which gives a convolution
with a bias two operators and a layer normalization six. So every ONNX node is traced to the operators that compute it, and names,
types and patterns of either kind are accepted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zsq_deploy.errors import UsageError
from zsq_deploy.model.graph import Graph

__all__ = ["Ignored", "ignored_operators", "operators_of"]

_SHOWN = 6
"""Names or types that an error lists at most."""

_ENDS = ("Parameter", "Constant", "Result")

_COMPUTING = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "AveragePool", "GlobalAveragePool"}
    | {"ReduceMean", "MaxPool", "Concat", "Resize", "LSTM", "GRU", "LayerNormalization", "InstanceNormalization"}
    | {"Softmax", "HardSwish", "HardSigmoid", "Gelu", "PRelu", "Pow", "Sqrt", "ReduceSum", "DepthToSpace"}
)
"""Operators whose absence from ``op_types`` keeps them in float; the others only pass values on, or are fused."""


@dataclass(frozen=True)
class Ignored:
    """The operators that stay in float because the user says so.

    Attributes:
        operators: Names in OpenVINO's model, sorted.
        asked: What was asked for -> how many operators it stands for.
    """

    operators: tuple[str, ...]
    asked: Mapping[str, int]


def operators_of(ir: Any, graph: Graph) -> dict[str, tuple[str, ...]]:
    """The operators of OpenVINO's model that compute each node of the ONNX graph that it was converted from.

    Args:
        ir: The ``openvino.Model``; its tensors carry the names of the graph's values.
        graph: The ONNX graph.

    Returns:
        Node name -> friendly names of operators. A node that OpenVINO folded away or fused has none.
    """
    makers: dict[str, Any] = {}
    for operator in ir.get_ops():
        for port in operator.outputs():
            for name in port.get_names():
                makers[name] = operator
    named = {operator.get_friendly_name(): operator for operator in ir.get_ops()}
    boundary = {operator.get_friendly_name() for operator in makers.values()}
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        ends = [makers[value] for value in node.output if value in makers]
        if not ends and node.name in named and named[node.name].get_type_name() not in _ENDS:
            ends = [named[node.name]]
        names: list[str] = []
        waiting = list(ends)
        while waiting:
            operator = waiting.pop()
            name = operator.get_friendly_name()
            if name in names or operator.get_type_name() in _ENDS:
                continue
            names.append(name)
            for port in operator.inputs():
                source = port.get_source_output().get_node()
                if source.get_friendly_name() not in boundary:
                    waiting.append(source)
        found[node.name] = tuple(names)
    return found


def ignored_operators(
    ir: Any,
    graph: Graph,
    *,
    names: Sequence[str] = (),
    types: Sequence[str] = (),
    patterns: Sequence[str] = (),
    op_types: Sequence[str] | None = None,
) -> Ignored:
    """Find everything that is to stay in float.

    Args:
        ir: The ``openvino.Model``.
        graph: The ONNX graph that it was converted from.
        names: Names of nodes of either.
        types: Types of operators of either; where both know a type, OpenVINO's meaning counts.
        patterns: Regular expressions that match a name from its beginning.
        op_types: ONNX types that alone are quantized; ``None``: all.

    Raises:
        UsageError: Something does not exist in this network, or a pattern is no regular expression; the message has the near names.
    """
    parts = operators_of(ir, graph)
    kinds: dict[str, list[str]] = {}
    for operator in ir.get_ops():
        if operator.get_type_name() not in _ENDS:
            kinds.setdefault(operator.get_type_name(), []).append(operator.get_friendly_name())
    operators = {name for members in kinds.values() for name in members}
    found: set[str] = set()
    asked: dict[str, int] = {}

    def take(what: str, members: Iterable[str]) -> None:
        members = set(members)
        asked[what] = len(members)
        found.update(members)

    unknown = [name for name in names if name not in parts and name not in operators]
    if unknown:
        _refuse("node", unknown, [*parts, *sorted(operators - set(parts))], "nncf.ignored_names")
    for name in names:
        take(name, {*parts.get(name, ()), *({name} & operators)})

    onnx_kinds: dict[str, list[str]] = {}
    for node in graph.nodes:
        onnx_kinds.setdefault(node.op_type, []).extend(parts[node.name])
    unknown = [kind for kind in types if kind not in kinds and kind not in onnx_kinds]
    if unknown:
        _refuse("operator of type", unknown, [*kinds, *onnx_kinds], "nncf.ignored_types", listed=sorted(kinds))
    for kind in types:
        take(f"type {kind}", kinds.get(kind) or onnx_kinds[kind])

    for text in patterns:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UsageError(
                f"{text!r} is no regular expression: {error}",
                where="nncf.ignored_patterns",
                remedy="mend the pattern; a plain name belongs into ignored_names",
            ) from error
        nodes = [name for name in parts if pattern.match(name)]
        members = {name for name in operators if pattern.match(name)} | {op for name in nodes for op in parts[name]}
        if not members:
            raise UsageError(
                f"no node of the network matches {text!r}",
                where="nncf.ignored_patterns",
                remedy=f"patterns match from the beginning of a name, such as {next(iter(parts), '')!r}; `zsq inspect` lists all",
            )
        take(f"pattern {text}", members)

    if op_types is not None:
        kept = set(op_types)
        for kind, members_of in onnx_kinds.items():
            if kind in _COMPUTING and kind not in kept:
                take(f"type {kind}", members_of)
    return Ignored(tuple(sorted(found)), asked)


def _refuse(what: str, unknown: Sequence[str], known: Sequence[str], where: str, *, listed: Sequence[str] = ()) -> None:
    near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.6)]
    if not near:
        lowered = {name.lower(): name for name in known}
        near = [lowered[low] for name in unknown for low in lowered if name.lower() in low][:_SHOWN]
    shown = ", ".join(repr(name) for name in unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
    if near:
        remedy = f"did you mean {', '.join(dict.fromkeys(near[:_SHOWN]))}?"
    elif listed:
        remedy = f"the network has: {', '.join(listed)}"
    else:
        remedy = "`zsq inspect` lists the names of all nodes"
    raise UsageError(f"the network has no {what} {shown}", where=where, remedy=remedy)
