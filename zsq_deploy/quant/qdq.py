"""Writing QuantizeLinear / DequantizeLinear into a float graph by frozen rules.

The written graph says of every tensor which scale, zero point and type it has:

* a node of :attr:`PlacementRules.compute` reads rounded activations and constants, and its output is rounded;
* a Relu or Clip behind it belongs to it: no Q/DQ stands in between, and where the integer type itself enforces the bounds the node is
  left out, as integer kernels do;
* nodes of :attr:`PlacementRules.transparent` move numbers without changing them, so both of their sides share one scale; so do all
  sides of a concatenation;
* weights are stored as integers, per output channel (convolution: axis 0, transposed convolution: axis 1, matrix products: the
  output's axis), per tensor or in blocks; biases as int32 of scale ``x_scale * w_scale``;
* every reader of a rounded value reads the rounded value, also those that compute in float.

Names are those that ONNX Runtime's quantizer uses: ``V_scale``, ``V_zero_point``, ``V_QuantizeLinear_Output``,
``V_DequantizeLinear_Output``, ``W_quantized``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.errors import CalibrationError, ModelError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.fakequant import QParams, onnx_type, qparams, storage_dtype, weight_qparams
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["COMPUTE", "TRANSPARENT", "PlacementRules", "insert_qdq", "raise_opset", "weight_axis"]

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

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_OPSET_OF_TYPE = {
    onnx.TensorProto.INT4: 21,
    onnx.TensorProto.UINT4: 21,
    onnx.TensorProto.INT16: 21,
    onnx.TensorProto.UINT16: 21,
}


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
    per_channel: frozenset[str] = field(default=_WEIGHTED)
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


def _reduced_axis(node: onnx.NodeProto, rank: int) -> int:
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


class _Plan:
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
        if node.op_type in _WEIGHTED:
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


class _Writer:
    """Writes a plan into a graph."""

    def __init__(
        self,
        plan: _Plan,
        weight: Scheme,
        weight_method: Literal["minmax", "mse"],
        weight_scales: Mapping[str, Array],
    ) -> None:
        self.plan = plan
        self.weight = weight
        self.method: Literal["minmax", "mse"] = weight_method
        self.weight_scales = weight_scales
        self.net = Net(plan.graph.proto)
        self.renamed: dict[str, str] = {}
        self.weights: dict[tuple[str, int | None, bytes], tuple[str, QParams]] = {}
        self.constants: dict[str, str] = {}

    def write(self) -> onnx.ModelProto:
        plan, net = self.plan, self.net
        old, net.nodes = net.nodes, []
        outputs = set(net.output_names)
        for spec in plan.graph.inputs:
            if spec.name in plan.rounded:
                self._pair(spec.name, spec.name)
        skip: dict[str, str] = {}
        for node in old:
            if node.name in plan.dropped:
                # The producer makes the activation's value itself; saturation does the rest.
                continue
            chosen = node.name in plan.chosen
            activation = plan._activation(plan.graph.node(node.name)) if chosen else None
            if activation is not None and activation.name in plan.dropped:
                node.output[0] = activation.output[0]
            original = list(node.input)
            rounds = plan.reads_rounded(plan.graph.node(node.name))
            for index, name in enumerate(original):
                if name in self.renamed and rounds:
                    node.input[index] = self.renamed[name]
            if chosen:
                self._operands(node, original)
            net.nodes.append(node)
            for index, name in enumerate(list(node.output)):
                if name in plan.rounded:
                    if name in outputs:
                        # The graph's output keeps its name: it is the rounded value.
                        inner = net.fresh(f"{name}_float") if self._rounds_output(name) else name
                        if inner != name:
                            node.output[index] = inner
                            skip[name] = inner
                        self._pair(inner, name, output=name if inner != name else None)
                    else:
                        self._pair(name, name)
        net.touch()
        net.sweep()
        return net.proto()

    def _rounds_output(self, name: str) -> bool:
        return self.plan.rules.quantize_outputs or name in self.plan._final

    def _pair(self, source: str, value: str, output: str | None = None) -> None:
        """QuantizeLinear and DequantizeLinear behind a value; later readers get the rounded one."""
        net, parameters = self.net, self.plan.parameters[value]
        scheme = parameters.scheme
        kind = storage_dtype(scheme)
        limits = _type_limits(kind)
        if limits != (scheme.qmin, scheme.qmax):
            # Fewer codes than the type has: QuantizeLinear saturates to the type, so the range is cut before it.
            low = net.add_constant(f"{value}_range_low", np.asarray(parameters.low, np.float32).reshape(()))
            high = net.add_constant(f"{value}_range_high", np.asarray(parameters.high, np.float32).reshape(()))
            cut = net.fresh(f"{value}_in_range")
            net.nodes.append(net.new_node("Clip", [source, low, high], [cut], f"{value}_Clip"))
            source = cut
        scale = net.add_constant(f"{value}_scale", np.asarray(parameters.scale, np.float32).reshape(()))
        zero = net.add_constant(f"{value}_zero_point", parameters.zero_point.astype(kind).reshape(()))
        codes = net.fresh(f"{value}_QuantizeLinear_Output")
        rounded = output or net.fresh(f"{value}_DequantizeLinear_Output")
        net.nodes.append(net.new_node("QuantizeLinear", [source, scale, zero], [codes], f"{value}_QuantizeLinear"))
        net.nodes.append(net.new_node("DequantizeLinear", [codes, scale, zero], [rounded], f"{value}_DequantizeLinear"))
        self.renamed[value] = rounded

    def _operands(self, node: onnx.NodeProto, original: list[str]) -> None:
        graph, rules = self.plan.graph, self.plan.rules
        if node.op_type in _WEIGHTED:
            array = graph.constant(original[1])
            if array is None:
                return
            source = self.plan.parameters.get(original[0])
            x_scale = float(source.scale) if source is not None else 0.0
            bias = graph.constant(original[2]) if len(original) > 2 and original[2] else None
            value, parameters = self._weight(node, original[1], array, x_scale, bias)
            node.input[1] = value
            if bias is not None and rules.bias == "int32" and x_scale > 0.0:
                self._bias(node, original[2], bias, x_scale, parameters)
            return
        for index, name in enumerate(original):
            array = graph.constant(name) if name else None
            if array is not None and array.dtype == np.float32 and node.op_type in ("Add", "Mul", "Concat"):
                node.input[index] = self._constant(name, array)

    def _constant(self, name: str, array: Array) -> str:
        """A constant operand, stored with the activations' scheme."""
        if name not in self.constants:
            parameters = qparams(float(array.min(initial=0.0)), float(array.max(initial=0.0)), self.plan.activation)
            self.constants[name] = self._store(name, array, parameters)
        return self.constants[name]

    def _weight(
        self, node: onnx.NodeProto, name: str, array: Array, x_scale: float, bias: Array | None
    ) -> tuple[str, QParams]:
        scheme = self.weight
        axis: int | None = None
        if scheme.granularity is Granularity.BLOCK:
            axis = _reduced_axis(node, array.ndim)
        elif scheme.granularity is Granularity.CHANNEL:
            grouped = node.op_type == "ConvTranspose" and int(attributes(node).get("group", 1)) > 1
            if node.op_type in self.plan.rules.per_channel and not grouped:
                axis = weight_axis(node, array.ndim)
            else:
                scheme = _per_tensor(scheme)
        if name in self.weight_scales:
            given = np.asarray(self.weight_scales[name], np.float32)
            if scheme.granularity is Granularity.CHANNEL and axis is not None and given.shape != (array.shape[axis],):
                raise ModelError(
                    f"the scales given for {name!r} have shape {given.shape}, wanted is ({array.shape[axis]},)",
                    where=name,
                )
            middle = 0 if scheme.signed else (scheme.qmax + 1) // 2
            parameters = QParams(given, np.full(given.shape, middle, np.int32), scheme, axis)
        else:
            parameters = weight_qparams(array, scheme, axis, self.method)
        parameters = _sensible(parameters, array, bias if self.plan.rules.bias == "int32" else None, x_scale)
        key = (name, axis, parameters.scale.tobytes())
        if key not in self.weights:
            self.weights[key] = (self._store(name, array, parameters), parameters)
        return self.weights[key]

    def _store(self, name: str, array: Array, parameters: QParams) -> str:
        net, scheme = self.net, parameters.scheme
        integers = parameters.quantize(np.asarray(array, np.float64))
        as_float = self.plan.rules.store_weights == "float"
        stored = (
            net.add_constant(f"{name}_on_grid", parameters.dequantize(integers))
            if as_float
            else net.add_constant(f"{name}_quantized", integers)
        )
        scale = net.add_constant(f"{name}_scale", parameters.scale)
        zero = net.add_constant(f"{name}_zero_point", parameters.zero_point.astype(storage_dtype(scheme)))
        attrs: dict[str, Any] = {}
        if parameters.axis is not None:
            attrs["axis"] = parameters.axis % array.ndim
        if scheme.granularity is Granularity.BLOCK:
            attrs["block_size"] = scheme.block
        codes = stored
        if as_float:
            codes = net.fresh(f"{name}_QuantizeLinear_Output")
            net.nodes.append(
                net.new_node("QuantizeLinear", [stored, scale, zero], [codes], f"{name}_QuantizeLinear", **attrs)
            )
        value = net.fresh(f"{name}_DequantizeLinear_Output")
        net.nodes.append(
            net.new_node("DequantizeLinear", [codes, scale, zero], [value], f"{name}_DequantizeLinear", **attrs)
        )
        return value

    def _bias(self, node: onnx.NodeProto, name: str, bias: Array, x_scale: float, weight: QParams) -> None:
        net = self.net
        found = attributes(node)
        if weight.scheme.granularity is Granularity.BLOCK or (bias.ndim > 1 and bias.size != bias.shape[-1]):
            return
        if node.op_type == "Gemm" and (found.get("alpha", 1.0) != 1.0 or found.get("beta", 1.0) != 1.0):
            return
        scale = np.asarray(np.float32(x_scale) * weight.scale, np.float32)
        if scale.ndim and scale.size != bias.size:
            return
        codes = np.clip(np.rint(bias.reshape(-1).astype(np.float64) / scale.astype(np.float64)), -(2**31), 2**31 - 1)
        stored = net.add_constant(f"{name}_quantized", codes.astype(np.int32))
        scales = net.add_constant(f"{name}_quantized_scale", scale)
        zero = net.add_constant(f"{name}_quantized_zero_point", np.zeros(scale.shape, np.int32))
        value = net.fresh(f"{name}_DequantizeLinear_Output")
        attrs = {"axis": 0} if scale.ndim else {}
        net.nodes.append(
            net.new_node("DequantizeLinear", [stored, scales, zero], [value], f"{name}_DequantizeLinear", **attrs)
        )
        node.input[2] = value


def _per_tensor(scheme: Scheme) -> Scheme:
    return Scheme(scheme.bits, scheme.signed, scheme.symmetric, Granularity.TENSOR, scheme.restricted, scheme.reduced)


def _type_limits(kind: np.dtype[Any]) -> tuple[int, int]:
    bits = {"int4": 4, "uint4": 4}.get(kind.name, kind.itemsize * 8)
    return (0, (1 << bits) - 1) if kind.name.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _sensible(parameters: QParams, array: Array, bias: Array | None, x_scale: float) -> QParams:
    """Scales of dead channels take the size of their neighbours'; scales too small for an int32 bias grow."""
    if parameters.scheme.granularity is not Granularity.CHANNEL or parameters.axis is None:
        scale = parameters.scale
    else:
        axis = parameters.axis % array.ndim
        rest = tuple(index for index in range(array.ndim) if index != axis)
        dead = np.abs(array).max(axis=rest) == 0
        scale = parameters.scale.copy()
        if dead.any() and not dead.all():
            scale[dead] = np.median(scale[~dead])
        if bias is not None and x_scale > 0 and bias.size == scale.size:
            scale = np.maximum(scale, np.abs(bias.reshape(-1).astype(np.float64)) / (x_scale * 2.0**30)).astype(
                np.float32
            )
    return QParams(scale, parameters.zero_point, parameters.scheme, parameters.axis)


def raise_opset(graph: Graph, opset: int) -> Graph:
    """The graph in at least that operator set.

    Raises:
        ModelError: The ONNX project's converter cannot do it.
    """
    if graph.opset >= opset:
        return graph
    proto = graph.editable()
    del proto.graph.value_info[:]
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except Exception as error:
        raise ModelError(
            f"the graph cannot be raised from operator set {graph.opset} to {opset}, which these integer types need: {error}",
            where=graph.proto.graph.name,
            remedy="use 8-bit types, or export the network with a newer operator set",
        ) from error
    converted.ir_version = max(converted.ir_version, 10 if opset >= 21 else 9)
    return Graph(converted)


def insert_qdq(
    graph: Graph,
    ranges: Mapping[str, Range],
    *,
    activation: Scheme,
    weight: Scheme,
    rules: PlacementRules | None = None,
    op_types: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    bias: Literal["int32", "float"] | None = None,
    quantize_outputs: bool | None = None,
    weight_method: Literal["minmax", "mse"] = "minmax",
    weight_scales: Mapping[str, Array] | None = None,
    schemes: Mapping[str, Scheme] | None = None,
) -> Graph:
    """Write Q/DQ into a float graph.

    Args:
        graph: Batch normalization folded.
        ranges: Range of every activation that may be rounded; nodes with an operand of unknown range stay in float.
        activation: Scheme of activations (per tensor).
        weight: Scheme of weights (per tensor, per channel or block-wise).
        rules: Where Q/DQ may stand.
        op_types: Instead of the rules' `compute`.
        exclude: Names of nodes that stay in float, besides those of the rules.
        bias: Instead of the rules' `bias`.
        quantize_outputs: Instead of the rules' `quantize_outputs`.
        weight_method: ``minmax`` or ``mse``.
        weight_scales: Initializer name to given scales (per output channel), instead of a search.
        schemes: Value that a node reads -> scheme that it is to be rounded with, instead of `activation` (with ``round_outputs="read"``).

    Returns:
        The new graph; its operator set is raised to 21 where the integer types ask for it.
    """
    rules = rules or PlacementRules()
    changes: dict[str, Any] = {"exclude": rules.exclude | set(exclude)}
    if op_types is not None:
        changes["compute"] = frozenset(op_types)
    if bias is not None:
        changes["bias"] = bias
    if quantize_outputs is not None:
        changes["quantize_outputs"] = quantize_outputs
    rules = dataclasses.replace(rules, **changes)
    needed = max(_OPSET_OF_TYPE.get(onnx_type(scheme), 13) for scheme in (activation, weight))
    if weight.granularity is Granularity.BLOCK:
        needed = 21
    graph = raise_opset(graph, needed)
    plan = _Plan(graph, ranges, activation, rules, schemes or {})
    return Graph(_Writer(plan, weight, weight_method, weight_scales or {}).write())
