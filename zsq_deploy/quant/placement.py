"""Where a float graph is rounded: frozen rules, and the plan that they give for one graph.

* A node of :attr:`PlacementRules.compute` reads rounded activations and constants, and its output is rounded;
* a Relu or Clip behind it belongs to it: no Q/DQ stands in between, and where the integer type itself enforces the bounds the node is
  left out, as integer kernels do;
* nodes of :attr:`PlacementRules.transparent` move numbers without changing them, so both of their sides share one scale; so do all
  sides of a concatenation;
* every reader of a rounded value reads the rounded value, also those that compute in float.

A plan is written into the graph by :func:`zsq_deploy.quant.qdq.insert_qdq`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.fakequant import QParams, qparams
from zsq_deploy.quant.scheme import Scheme

__all__ = ["COMPUTE", "TRANSPARENT", "WEIGHTED", "PlacementRules", "Plan", "reduced_axis", "weight_axis"]

Array = npt.NDArray[Any]
Range = tuple[float, float]

COMPUTE = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}
)
"""Operators that most integer runtimes compute in integers."""

TRANSPARENT = frozenset(
    {
        "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "GlobalMaxPool", "Slice", "Split", "Gather", "Identity",
        "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Pad", "Resize",
    }
)  # fmt: skip
"""Operators that move numbers (Pad with zeros and nearest-neighbour Resize among them; other modes are left alone)."""

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose second input may hold weights."""


@dataclass(frozen=True)
class PlacementRules:
    """Where Q/DQ may stand. A value: a runtime's rules are one of these.

    Attributes:
        compute: Operator types that are computed in integers.
        transparent: Operator types that move numbers.
        fused: Operator types that belong to the node in front of them.
        exclude: Names of nodes that stay in float.
        residual: Round ``both`` operands of an Add, or only the ``skip`` branch, and leave the one that comes straight from a
            convolution alone (runtimes that add in the convolution's epilogue).
        shared_concat: All inputs and the output of a concatenation share one scale.
        shared_pool: Input and output of average pooling share one scale.
        quantize_outputs: Also round what leads to nothing but the graph's outputs.
        always_output: Operator types whose output is rounded even there, because their kernels give integers only.
        per_channel: Operator types with one weight scale an output channel (if the weight scheme asks for it).
        bias: ``int32`` or ``float``.
        drop_activations: Leave out a Relu or Clip that the integer range enforces.
        split_activations: Round in front of a Relu or Clip whose bounds the integer range does not enforce (``False`` for runtimes
            that fuse them whatever the zero point is).
        round_outputs: ``always``: what a computed node gives is rounded. ``read``: a value is rounded only if such a node reads it; then
            once, in front of the nodes that move it, and not again behind them or behind a concatenation.
        float_readers: Nodes that compute in float read the value as it was before rounding.
        place_reads: With ``round_outputs="read"``: round ``early``, in front of the nodes that move numbers, or ``late``, directly in front
            of the node that computes. Late, a concatenation has its inputs rounded, and its output again where such a node reads it
            (the same numbers: all of them share one scale).
        store_weights: ``integers`` behind DequantizeLinear; or ``float`` numbers on the grid behind QuantizeLinear and DequantizeLinear
            (the same numbers, for readers that take no integer constants).
    """

    compute: frozenset[str] = COMPUTE
    transparent: frozenset[str] = TRANSPARENT
    fused: frozenset[str] = frozenset({"Relu", "Clip"})
    exclude: frozenset[str] = frozenset()
    residual: Literal["both", "skip"] = "both"
    shared_concat: bool = True
    shared_pool: bool = False
    quantize_outputs: bool = False
    always_output: frozenset[str] = frozenset({"Conv", "ConvTranspose"})
    per_channel: frozenset[str] = field(default=WEIGHTED)
    bias: Literal["int32", "float"] = "int32"
    drop_activations: bool = True
    split_activations: bool = True
    round_outputs: Literal["always", "read"] = "always"
    float_readers: bool = False
    place_reads: Literal["early", "late"] = "early"
    store_weights: Literal["integers", "float"] = "integers"


def weight_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of a weight that counts the output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attributes(node).get("transB", 0) else 1
    return rank - 1


def reduced_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of a weight that blocks run along: one that is summed over."""
    if node.op_type == "Conv":
        return 1
    if node.op_type == "ConvTranspose":
        return 0
    if node.op_type == "Gemm":
        return 1 if attributes(node).get("transB", 0) else 0
    return rank - 2


class _Groups:
    """Values that share one scale (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        self._parent.setdefault(name, name)
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def join(self, a: str, b: str) -> None:
        self._parent[self.root(b)] = self.root(a)


class Plan:
    """What is to be rounded, and with which parameters; nothing is written yet."""

    def __init__(
        self,
        graph: Graph,
        ranges: Mapping[str, Range],
        activation: Scheme,
        rules: PlacementRules,
        schemes: Mapping[str, Scheme],
    ) -> None:
        self.graph = graph
        self.ranges = ranges
        self.activation = activation
        self.rules = rules
        self.schemes = dict(schemes)
        self.nodes = [node for node in graph.nodes if self._computes(node)]
        self.chosen = {node.name for node in self.nodes}
        self.rounded: dict[str, None] = {}
        self.derived: set[str] = set()  # outputs of transparent nodes: their range is their source's
        self.groups = _Groups()
        self.parameters: dict[str, QParams] = {}
        self.dropped: set[str] = set()
        self._final = self._final_values()
        self._place()
        self._parametrize()

    # -- what is what --

    def _floats(self, value: str) -> bool:
        kind = self.graph.dtype(value)
        return bool(value) and (kind is None or kind == np.float32)

    def _computed(self, value: str) -> bool:
        return bool(value) and self.graph.constant(value) is None

    def _computes(self, node: onnx.NodeProto) -> bool:
        if (
            node.domain not in ("", "ai.onnx")
            or node.op_type not in self.rules.compute
            or node.name in self.rules.exclude
        ):
            return False
        dynamic = [name for name in self._operands(node) if self._computed(name)]
        if not dynamic or not all(self._floats(name) for name in (*dynamic, node.output[0])):
            return False
        if node.op_type in ("Add", "Mul") and len(dynamic) == 1:
            other = next((name for name in node.input if name not in dynamic), dynamic[0])
            constant = self.graph.constant(other)
            if constant is not None and not np.isfinite(constant).all():
                return False
        return all(self._has_range(name) for name in dynamic) and (
            self._has_range(self.output(node)) or self.graph.is_output(self.output(node))
        )

    def _has_range(self, value: str) -> bool:
        """Whether a range is known, directly or through nodes that move numbers."""
        while value not in self.ranges:
            maker = self.graph.producer(value)
            if maker is None or not self._moves(maker):
                return False
            value = maker.input[0]
        return True

    def _operands(self, node: onnx.NodeProto) -> list[str]:
        """The inputs that take part in the arithmetic (without biases and sizes)."""
        if node.op_type in WEIGHTED:
            return list(node.input[:2])
        if node.op_type in ("AveragePool", "GlobalAveragePool", "ReduceMean"):
            return list(node.input[:1])
        return [name for name in node.input if name]

    def _moves(self, node: onnx.NodeProto) -> bool:
        if (
            node.domain not in ("", "ai.onnx")
            or node.op_type not in self.rules.transparent
            or node.name in self.rules.exclude
        ):
            return False
        if not node.input or not self._computed(node.input[0]) or not self._floats(node.input[0]):
            return False
        found = attributes(node)
        if node.op_type == "Pad":
            if found.get("mode", "constant") != "constant":
                return True
            value = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
            return value is not None and not np.any(value)
        if node.op_type == "Resize":
            return bool(found.get("mode", "nearest") == "nearest")
        return True

    def output(self, node: onnx.NodeProto) -> str:
        """The value behind a node and the activation that belongs to it."""
        behind = self._activation(node)
        return str((behind or node).output[0])

    def _activation(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        value = node.output[0]
        readers = self.graph.consumers(value)
        if len(readers) != 1 or self.graph.is_output(value):
            return None
        after = readers[0]
        if after.op_type not in self.rules.fused or after.name in self.rules.exclude or after.input[0] != value:
            return None
        return after if self.bounds(after) is not None else None

    def bounds(self, node: onnx.NodeProto) -> Range | None:
        """What a Relu or Clip lets through; ``None`` when a bound is computed."""
        if node.op_type == "Relu":
            return 0.0, math.inf
        found = attributes(node)
        limits = [float(found.get("min", -math.inf)), float(found.get("max", math.inf))]
        for index in (0, 1):
            if len(node.input) > index + 1 and node.input[index + 1]:
                given = self.graph.constant(node.input[index + 1])
                if given is None or given.size != 1:
                    return None
                limits[index] = float(given.reshape(-1)[0])
        return limits[0], limits[1]

    def _final_values(self) -> set[str]:
        """Values behind which no integer node comes any more."""
        reaching: set[str] = set()
        for node in reversed(self.graph.nodes):
            if node.name in self.chosen or any(name in reaching for name in node.output):
                reaching.update(name for name in node.input if name)
        every = {name for node in self.graph.nodes for name in node.output}
        return every - reaching

    # -- where --

    def _place(self) -> None:
        if self.rules.round_outputs == "read":
            self._place_reads()
            return
        for node in self.graph.nodes:
            if node.name in self.chosen:
                inputs = [name for name in self._operands(node) if self._computed(name)]
                spared = self._spared(node, inputs)
                for name in inputs:
                    if name != spared:
                        self.rounded.setdefault(name)
                out = self.output(node)
                keep = node.op_type in self.rules.always_output or out not in self._final
                if self.rules.quantize_outputs or keep:
                    self.rounded.setdefault(out)
        if self.rules.residual == "skip":
            for node in self.graph.nodes:
                if node.name in self.chosen and node.op_type == "Add":
                    spared = self._spared(node, [name for name in node.input if self._computed(name)])
                    if spared is not None:
                        self.rounded.pop(spared, None)
        for node in self.graph.nodes:
            if self._moves(node) and node.input[0] in self.rounded:
                for name in node.output:
                    if name and self._floats(name):
                        if name in self._final and not self.rules.quantize_outputs:
                            self.rounded.pop(name, None)
                            continue
                        self.rounded.setdefault(name)
                        self.derived.add(name)
                        self.groups.join(node.input[0], name)
            elif node.name in self.chosen:
                shared = (node.op_type == "Concat" and self.rules.shared_concat) or (
                    node.op_type in ("AveragePool", "GlobalAveragePool") and self.rules.shared_pool
                )
                out = self.output(node)
                if shared and out in self.rounded:
                    for name in self._operands(node):
                        if name in self.rounded:
                            self.groups.join(out, name)

    def _place_reads(self) -> None:
        """Round what the chosen nodes read, as early as nodes that only move numbers allow."""
        for node in self.graph.nodes:
            if node.name not in self.chosen:
                continue
            inputs = [name for name in self._operands(node) if self._computed(name)]
            spared = self._spared(node, inputs)
            if self.rules.place_reads == "late":
                for name in inputs:
                    if name != spared:
                        self._round_late(name)
            else:
                sources = [self._round(name) for name in inputs if name != spared]
                if node.op_type == "Concat":
                    for source in sources:
                        self.groups.join(node.output[0], source)
            out = self.output(node)
            if self.rules.quantize_outputs and out in self._final and self._has_range(out):
                self.rounded.setdefault(out)

    def _round(self, value: str) -> str:
        """Round a value where it comes from; returns the value that is rounded."""
        asked = self.schemes.get(value)
        while True:
            maker = self.graph.producer(value)
            if maker is not None and maker.op_type == "Concat" and maker.name in self.chosen:
                break  # its inputs are rounded, with one scale
            if maker is None or not self._moves(maker) or not self._rounds_all(maker.input[0]):
                self.rounded.setdefault(value)
                break
            value = maker.input[0]
        if asked is not None:
            self.schemes[value] = asked
        return value

    def _round_late(self, value: str) -> None:
        """Round a value where it is read, with one scale for it and for what it is moved or put together from."""
        self.rounded.setdefault(value)
        asked, current = self.schemes.get(value), [value]
        while current:
            name = current.pop()
            if asked is not None:
                self.schemes.setdefault(name, asked)
            maker = self.graph.producer(name)
            if maker is not None and maker.op_type == "Concat" and maker.name in self.chosen:
                sources = [source for source in self._operands(maker) if self._computed(source)]
            elif maker is not None and self._moves(maker):
                sources = [maker.input[0]]
            else:
                continue
            for source in sources:
                self.groups.join(source, name)
            current.extend(sources)

    def _rounds_all(self, value: str) -> bool:
        """Whether all readers of a value want it rounded, directly or behind nodes that move numbers."""
        readers = self.graph.consumers(value)
        return (
            bool(readers)
            and not self.graph.is_output(value)
            and self._has_range(value)
            and all(
                reader.name in self.chosen
                or (self._moves(reader) and all(self._rounds_all(name) for name in reader.output if name))
                for reader in readers
            )
        )

    def reads_rounded(self, node: onnx.NodeProto) -> bool:
        """Whether a node reads rounded values where they exist."""
        if not self.rules.float_readers or node.name in self.chosen:
            return True
        return self._moves(node) and any(
            self.reads_rounded(reader) for name in node.output for reader in self.graph.consumers(name)
        )

    def _spared(self, node: onnx.NodeProto, inputs: list[str]) -> str | None:
        """The operand of a residual Add that stays unrounded, because a convolution's epilogue adds to it."""
        if self.rules.residual != "skip" or node.op_type != "Add" or len(inputs) != 2:
            return None
        for name in reversed(inputs):
            maker = self.graph.producer(name)
            if (
                maker is not None
                and maker.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
                and maker.name in self.chosen
                and len(self.graph.consumers(name)) == 1
                and not self.graph.is_output(name)
            ):
                return name
        return None

    # -- how --

    def _range_of(self, value: str) -> Range:
        found = self.ranges.get(value)
        current = value
        while found is None:
            maker = self.graph.producer(current)
            if maker is None or not self._moves(maker):
                raise CalibrationError(
                    f"the value {value!r} is to be rounded, but has no range",
                    where=value,
                    remedy="collect the ranges of all activations of this graph",
                )
            current = maker.input[0]
            found = self.ranges.get(current)
        low, high = min(float(found[0]), 0.0), max(float(found[1]), 0.0)
        maker = self.graph.producer(value)
        if maker is not None and maker.op_type in self.rules.fused:
            bounds = self.bounds(maker)
            if bounds is not None:
                low, high = max(low, min(bounds[0], 0.0)), min(high, max(bounds[1], 0.0))
        return low, high

    def _parametrize(self) -> None:
        self._share()
        if self.rules.drop_activations or self.rules.split_activations:
            for node in self.nodes:
                after = self._activation(node)
                if after is None or after.output[0] not in self.rounded:
                    continue
                if self._enforced(after):
                    if self.rules.drop_activations:
                        self.dropped.add(after.name)
                elif self.rules.split_activations and node.output[0] in self.ranges:
                    self.rounded.setdefault(node.output[0])
            self._share()

    def _share(self) -> None:
        members: dict[str, list[str]] = {}
        for value in self.rounded:
            members.setdefault(self.groups.root(value), []).append(value)
        for values in members.values():
            own = [self._range_of(value) for value in values if value not in self.derived] or [
                self._range_of(value) for value in values
            ]
            low, high = min(low for low, _ in own), max(high for _, high in own)
            asked = [self.schemes[name] for name in self._in_group(values) if name in self.schemes]
            shared = qparams(low, high, asked[0] if asked else self.activation)
            for value in values:
                self.parameters[value] = shared

    def _in_group(self, values: list[str]) -> list[str]:
        """The values, and the concatenation that ties them together."""
        root = self.groups.root(values[0])
        return [*values, *(name for name in self.schemes if name not in values and self.groups.root(name) == root)]

    def _enforced(self, node: onnx.NodeProto) -> bool:
        """Whether saturation to the integer range does what the Relu or Clip does."""
        bounds = self.bounds(node)
        assert bounds is not None
        parameters = self.parameters[node.output[0]]
        tolerance = 1e-3 * float(parameters.scale)
        return bool(parameters.low >= bounds[0] - tolerance and parameters.high <= bounds[1] + tolerance)
