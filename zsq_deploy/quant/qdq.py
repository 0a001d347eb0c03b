"""Writing QuantizeLinear / DequantizeLinear into a float graph by frozen rules.

The written graph says of every tensor which scale, zero point and type it has. Where activations are rounded is said in
:mod:`zsq_deploy.quant.placement`; weights are stored as integers, per output channel (convolution: axis 0, transposed convolution: axis 1,
matrix products: the output's axis), per tensor or in blocks; biases as int32 of scale ``x_scale * w_scale``.

Names are those that ONNX Runtime's quantizer uses: ``V_scale``, ``V_zero_point``, ``V_QuantizeLinear_Output``,
``V_DequantizeLinear_Output``, ``W_quantized``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.errors import ModelError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.fakequant import QParams, onnx_type, qparams, storage_dtype, weight_qparams
from zsq_deploy.quant.placement import COMPUTE, TRANSPARENT, WEIGHTED, PlacementRules, Plan, reduced_axis, weight_axis
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["COMPUTE", "TRANSPARENT", "PlacementRules", "insert_qdq", "raise_opset", "weight_axis"]

Array = npt.NDArray[Any]
Range = tuple[float, float]

_OPSET_OF_TYPE = {
    onnx.TensorProto.INT4: 21,
    onnx.TensorProto.UINT4: 21,
    onnx.TensorProto.INT16: 21,
    onnx.TensorProto.UINT16: 21,
}


class _Writer:
    """Writes a plan into a graph."""

    def __init__(
        self,
        plan: Plan,
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
        if node.op_type in WEIGHTED:
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
            axis = reduced_axis(node, array.ndim)
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
    plan = Plan(graph, ranges, activation, rules, schemes or {})
    return Graph(_Writer(plan, weight, weight_method, weight_scales or {}).write())
