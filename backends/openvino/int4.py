"""4-bit storage, 8-bit arithmetic: weights as INT4 initializers that are widened to INT8 before they are dequantized.

OpenVINO's CPU plugin has no 4-bit convolution. A DequantizeLinear that reads INT4 directly makes it compute in float; with a Cast to
INT8 in between, its low-precision transformations see an 8-bit weight, fold the Cast when the engine is loaded, and run every
convolution in the same int8 kernels as with 8-bit weights, at the same speed. What is saved is the file: half of what 8-bit weights
take. OpenVINO's converter folds the Cast, and the IR would be as large as before; :func:`pack` puts it back.

Weights are symmetric per output channel in -7 .. 7. With 15 codes the scale matters: the default takes, channel by channel, the one with
the smallest squared error.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.backends.openvino.runtime import ov
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.fakequant import weight_qparams
from zsq_deploy.quant.qdq import raise_opset, weight_axis
from zsq_deploy.quant.reader import dequantized_weight, is_dequantize, is_quantize, read_qdq
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["FOUR_BITS", "Int4Storage", "float_weights", "int4_storage", "pack", "store_int4"]

Array = npt.NDArray[Any]

FOUR_BITS = Scheme(bits=4, signed=True, symmetric=True, granularity=Granularity.CHANNEL, restricted=True)
"""The weights of ``w4a8``."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Int4Storage:
    """What is stored in 4 bits.

    Attributes:
        weights: Number of weights stored in 4 bits.
        elements: Numbers in them.
        others: Names of nodes whose quantized weight is stored in 8 bits.
        other_elements: Numbers in those.
    """

    weights: int
    elements: int
    others: tuple[str, ...]
    other_elements: int

    @property
    def share(self) -> float:
        """Share of the quantized weights' numbers that are stored in 4 bits."""
        total = self.elements + self.other_elements
        return self.elements / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values for a manifest."""
        return {
            "weights_in_4_bits": self.weights,
            "share_of_numbers": self.share,
            "layers_in_8_bits": list(self.others),
            "storage": "INT4 constant, widened to INT8 when the engine is loaded; arithmetic is in 8 bits",
        }


def store_int4(
    qdq: Graph,
    float_weights: Mapping[str, Array] | None = None,
    *,
    method: Literal["minmax", "mse"] = "mse",
    keep: Collection[str] = (),
) -> Graph:
    """Quantize the weights of a Q/DQ graph to 4 bits per output channel, and store them so.

    Args:
        qdq: Any Q/DQ graph whose weights are integers behind DequantizeLinear, or floats behind QuantizeLinear and
            DequantizeLinear. Weights that are not quantized are left alone.
        float_weights: Name of a weight's constant (without ``_quantized``) or of the layer -> the float numbers, in the weight's
            shape. Without them the numbers of the graph are taken, which may have been rounded once already.
        method: How the scale of a channel is found: ``mse`` (smallest squared error) or ``minmax``.
        keep: Names of nodes whose weight stays as it is.

    Returns:
        The graph in operator set 21 or later; names of nodes and values are the old ones.
    """
    qdq = raise_opset(qdq, 21)
    given = float_weights or {}
    net = Net(qdq.proto)
    makers = {node.output[0]: node for node in net.nodes}
    jobs: dict[str, tuple[str, int, list[onnx.NodeProto]]] = {}
    for node in net.nodes:
        if node.op_type not in _WEIGHTED or node.domain not in ("", "ai.onnx") or node.name in keep:
            continue
        found = _weight(qdq, node, makers.get(node.input[1]))
        if found is not None:
            # Layers that share a weight share its axis: another one would need another constant, and is left alone.
            name, axis = found
            job = jobs.setdefault(node.input[1], (name, axis, []))
            if job[:2] == found:
                job[2].append(node)
    for value, (name, axis, layers) in jobs.items():
        stem = name.removesuffix("_quantized")
        floats = next((given[key] for key in (stem, name, *(node.name for node in layers)) if key in given), None)
        constant = qdq.constant(name)
        assert constant is not None
        if floats is None or np.shape(floats) != constant.shape:
            floats = constant if constant.dtype.kind == "f" else dequantized_weight(qdq, value)
        _write(net, makers[value], name, stem, np.asarray(floats, np.float64), axis, method, layers)
    net.touch()
    net.sweep()
    return Graph(net.proto())


def _weight(qdq: Graph, node: onnx.NodeProto, dequantize: onnx.NodeProto | None) -> tuple[str, int] | None:
    """The constant behind a layer's quantized weight and the axis of its output channels; ``None``: it stays as it is."""
    if dequantize is None or not is_dequantize(dequantize):
        return None
    name = _constant_behind(qdq, dequantize)
    constant = None if name is None else qdq.constant(name)
    if name is None or constant is None:
        return None
    grouped = node.op_type == "ConvTranspose" and int(attributes(node).get("group", 1)) > 1
    if constant.ndim < 2 or grouped or (node.op_type == "MatMul" and constant.ndim != 2):
        return None
    return name, weight_axis(node, constant.ndim)


def _constant_behind(graph: Graph, dequantize: onnx.NodeProto) -> str | None:
    """The initializer that a DequantizeLinear gives in float, through QuantizeLinear or Cast; ``None`` for computed numbers."""
    value = str(dequantize.input[0])
    while graph.constant(value) is None:
        maker = graph.producer(value)
        if maker is None or not (is_quantize(maker) or maker.op_type == "Cast"):
            return None
        value = str(maker.input[0])
    return value


def _write(
    net: Net,
    dequantize: onnx.NodeProto,
    name: str,
    stem: str,
    floats: Array,
    axis: int,
    method: Literal["minmax", "mse"],
    layers: Collection[onnx.NodeProto],
) -> None:
    """Let these layers read 4-bit integers; constants that nobody else reads keep their names."""
    parameters = weight_qparams(floats, FOUR_BITS, axis, method)
    scale = parameters.scale.copy()
    rest = tuple(index for index in range(floats.ndim) if index != axis)
    dead = np.abs(floats).max(axis=rest) == 0
    if dead.any() and not dead.all():
        scale[dead] = np.median(scale[~dead])
    shape = [1] * floats.ndim
    shape[axis] = -1
    codes = np.clip(np.rint(floats / scale.astype(np.float64).reshape(shape)), FOUR_BITS.qmin, FOUR_BITS.qmax)

    value = dequantize.output[0]
    alone = {id(node) for node in net.consumers()[value]} == {id(node) for node in layers}
    old = [name, *dequantize.input] if alone else []
    if not alone:
        copy = net.new_node("DequantizeLinear", dequantize.input, [net.fresh(value)], f"{stem}_DequantizeLinear")
        net.insert_before(dequantize, copy)
        for node in layers:
            node.input[1] = copy.output[0]
        dequantize = copy
    users = [dequantize]
    maker = net.producers().get(dequantize.input[0])
    while maker is not None:  # QuantizeLinear or Cast, which nobody needs any more
        users.append(maker)
        maker = net.producers().get(maker.input[0])
    was_integer = "int" in str(getattr(net.constant(name), "dtype", ""))

    def put(wanted: str, existing: str, array: Array) -> str:
        allowed = {id(node) for node in users}
        own = existing in old and all(id(node) in allowed for node in net.consumers().get(existing, []))
        return net.add_constant(existing if own else wanted, array, exact=own)

    narrow_codes = codes.astype(np.int8).astype(ml_dtypes.int4)
    narrow = put(f"{stem}_quantized", name if was_integer else "", narrow_codes)
    scales = put(f"{stem}_scale", dequantize.input[1], scale)
    previous = dequantize.input[2] if len(dequantize.input) > 2 else ""
    zero = put(f"{stem}_zero_point", previous, np.zeros(scale.shape, np.int8))
    wide = net.fresh(f"{stem}_quantized_int8")
    net.insert_before(
        dequantize, net.new_node("Cast", [narrow], [wide], f"{stem}_quantized_Cast", to=onnx.TensorProto.INT8)
    )
    del dequantize.input[:]
    dequantize.input.extend([wide, scales, zero])
    del dequantize.attribute[:]
    dequantize.attribute.append(onnx.helper.make_attribute("axis", axis))
    net.touch()


def pack(ir: Any) -> int:
    """Store the 8-bit constants of an OpenVINO model whose numbers fit into 4 bits as INT4 behind a Convert, in place.

    Only constants that are rescaled right away (weights) are looked at; no number changes.

    Returns:
        How many constants were packed.
    """
    opset = importlib.import_module("openvino.opset13")
    packed = 0
    for node in ir.get_ordered_ops():
        if node.get_type_name() != "Constant" or str(node.get_element_type().get_type_name()) != "i8":
            continue
        readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
        codes = np.asarray(node.data)
        if codes.ndim < 2 or any(reader.get_type_name() != "Convert" for reader in readers):
            continue
        if not codes.size or codes.min() < -8 or codes.max() > 7:
            continue
        octets = codes.reshape(-1).view(np.uint8) & 15
        octets = np.append(octets, np.zeros(codes.size % 2, np.uint8)).reshape(-1, 2)
        tensor = ov.Tensor(
            ov.Type.i4, ov.Shape(list(codes.shape))
        )  # owns its memory: a constant of a numpy array would not
        tensor.data[:] = (octets[:, 0] | (octets[:, 1] << 4)).view(tensor.data.dtype)
        narrow = opset.constant(tensor, name=node.get_friendly_name())
        wide = opset.convert(narrow, "i8", name=f"{node.get_friendly_name()}/int8")
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(wide.output(0))
        packed += 1
    return packed


def float_weights(qdq: Graph) -> dict[str, Array]:
    """The float constants behind the weights of a Q/DQ graph that are not stored as integers yet, by name."""
    found: dict[str, Array] = {}
    for node in qdq:
        if node.op_type in _WEIGHTED and len(node.input) > 1:
            maker = qdq.producer(node.input[1])
            name = _constant_behind(qdq, maker) if maker is not None and is_dequantize(maker) else None
            constant = None if name is None else qdq.constant(name)
            if name is not None and constant is not None and constant.dtype.kind == "f":
                found[name] = constant
    return found


def int4_storage(qdq: Graph) -> Int4Storage:
    """How much of a Q/DQ graph's weights is stored in 4 bits."""
    layers = {node.input[1]: node.name for node in qdq if node.op_type in _WEIGHTED and len(node.input) > 1}
    weights = elements = other_elements = 0
    others: list[str] = []
    for tensor in read_qdq(qdq):
        if not tensor.is_weight or tensor.output not in layers:
            continue
        codes = qdq.constant(tensor.codes)
        if tensor.dtype == "int4" and codes is not None:
            weights, elements = weights + 1, elements + codes.size
        else:
            numbers = dequantized_weight(qdq, tensor.output)
            others.append(layers[tensor.output])
            other_elements += 0 if numbers is None else numbers.size
    return Int4Storage(weights, elements, tuple(others), other_elements)
