"""Batch normalization: where it is, what sits in front of it, and folding it away for deployment.

In inference a batch normalization is an affine map per channel, ``y = s * z + t`` with ``s = gamma / sqrt(var + eps)`` and
``t = beta - s * mean``. Behind a linear layer ``z = W x + b`` it becomes part of it: ``W' = s W``, ``b' = s b + t``
(Jacob et al. 2018, arXiv:1712.05877, section 3.2). All of it is computed in float64 and rounded to float32 once.

The folded layer produces the value that the batch normalization produced, so names of activations are the same before and
after folding, and :attr:`Folded.batch_norms` says which statistics stood behind which layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.errors import ModelError
from zsq_deploy.model.editing import Net, is_default
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["BatchNorm", "Folded", "batch_norms", "fold"]

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BatchNorm:
    """One batch normalization with its statistics.

    Attributes:
        node: Name of the BatchNormalization node.
        input: Value that it normalizes.
        output: Value that it produces.
        gamma: Scale, ``[C]``.
        beta: Shift, ``[C]``.
        mean: Running mean of its input, ``[C]``.
        var: Running variance of its input, ``[C]``.
        eps: Added to the variance.
        conv: The Conv, ConvTranspose or Gemm node in front, into which it can be folded; ``None`` if there is none.
    """

    node: str
    input: str
    output: str
    gamma: Doubles = field(repr=False)
    beta: Doubles = field(repr=False)
    mean: Doubles = field(repr=False)
    var: Doubles = field(repr=False)
    eps: float
    conv: str | None

    @property
    def scale(self) -> Doubles:
        """``s`` of the affine map ``s * z + t``."""
        scale: Doubles = self.gamma / np.sqrt(self.var + self.eps)
        return scale

    @property
    def shift(self) -> Doubles:
        """``t`` of the affine map ``s * z + t``."""
        shift: Doubles = self.beta - self.scale * self.mean
        return shift


@dataclass(frozen=True)
class Folded:
    """A deployable graph.

    Attributes:
        graph: No BatchNormalization is left in it.
        batch_norms: Name of a layer of `graph` -> the batch normalization that went into it. Where one had no layer in front,
            the name is that of the batch normalization itself, and the layer is a depthwise convolution with a 1x1 kernel
            (or the Add of a Mul and an Add where the input is no feature map).
    """

    graph: Graph
    batch_norms: Mapping[str, BatchNorm]


def batch_norms(graph: Graph) -> list[BatchNorm]:
    """All batch normalizations in graph order.

    Raises:
        ModelError: One takes its statistics from another node instead of from the file.
    """
    found = []
    for node in graph.nodes:
        if not is_default(node, "BatchNormalization"):
            continue
        parts = [graph.constant(name) for name in node.input[1:5]]
        if any(part is None for part in parts):
            raise ModelError(
                "a batch normalization computes its parameters while it runs",
                where=node.name,
                remedy="export the network in evaluation mode, so that they are constants",
            )
        gamma, beta, mean, var = (np.asarray(part, np.float64) for part in parts)
        layer = _layer_in_front(graph, node)
        found.append(
            BatchNorm(
                node=node.name,
                input=node.input[0],
                output=node.output[0],
                gamma=gamma,
                beta=beta,
                mean=mean,
                var=var,
                eps=float(attributes(node).get("epsilon", 1e-5)),
                conv=None if layer is None else layer.name,
            )
        )
    return found


def _layer_in_front(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The linear layer whose only purpose is to feed this batch normalization."""
    layer = graph.producer(node.input[0])
    if layer is None or graph.is_output(node.input[0]) or len(graph.consumers(node.input[0])) != 1:
        return None
    if not is_default(layer, "Conv", "ConvTranspose", "Gemm") or graph.constant(layer.input[1]) is None:
        return None
    bias = graph.constant(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else np.zeros(1)
    if bias is None or (bias.ndim > 1 and bias.size != bias.shape[-1]):  # a bias per sample cannot be folded
        return None
    return layer


def fold(graph: Graph) -> Folded:
    """Fold every batch normalization into the layer in front of it.

    One that has no such layer (in front of the activation, or behind a concatenation) becomes a depthwise convolution with a
    1x1 kernel, which integer runtimes compute with one scale a channel; on inputs that are no feature maps it becomes Mul and
    Add. Constants that two layers share are copied before they change.

    Args:
        graph: Batch normalization in inference form.

    Returns:
        The new graph, and which batch normalization went where.
    """
    norms = {norm.node: norm for norm in batch_norms(graph)}
    net = Net(graph.proto)
    done: dict[str, BatchNorm] = {}
    for node in list(net.nodes):
        norm = norms.get(node.name)
        if norm is None:
            continue
        if norm.conv is not None:
            layer = net.producers()[node.input[0]]
            _fold_into(net, layer, norm.scale, norm.shift)
            net.remove([node])
            layer.output[0] = norm.output
            net.touch()
            done[norm.conv] = norm
        else:
            done[node.name] = norm
            _as_affine(net, node, norm, graph.shape(norm.input))
    _fold_constants(net, set(done))
    net.sweep()
    proto = net.proto()
    boundary = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    alive = {name for node in proto.graph.node for name in node.output} - boundary
    proto.graph.value_info.extend(value for value in graph.proto.graph.value_info if value.name in alive)
    return Folded(Graph(proto), MappingProxyType(done))


def _float32(value: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(value, np.float32)


def _fold_constants(net: Net, taken: set[str]) -> None:
    """Fold a constant per channel that is added to a layer's output or multiplied with it into the layer, in place.

    That is how exporters write a bias, a frozen batch normalization or a layer scale. Layers in `taken` hold a batch
    normalization already; what they produce keeps its name, so they are left alone.
    """
    for layer in list(net.nodes):
        if layer.name in taken or not is_default(layer, "Conv", "ConvTranspose", "Gemm"):
            continue
        while (found := _constant_behind(net, layer)) is not None:
            node, scale, shift = found
            _fold_into(net, layer, scale, shift)
            net.remove([node])
            layer.output[0] = node.output[0]
            net.touch()


def _constant_behind(net: Net, layer: onnx.NodeProto) -> tuple[onnx.NodeProto, Doubles, Doubles] | None:
    """The Add, Sub, Mul or Div with a constant that alone reads a layer's output, as scale and shift per channel."""
    value = layer.output[0]
    readers = net.consumers().get(value, [])
    if value in net.output_names or len(readers) != 1 or not is_default(readers[0], "Add", "Sub", "Mul", "Div"):
        return None
    node = readers[0]
    weight, bias = net.constant(layer.input[1]), np.zeros(1)
    if len(layer.input) > 2 and layer.input[2]:
        stored = net.constant(layer.input[2])
        if stored is None or (stored.ndim > 1 and stored.size != stored.shape[-1]):
            return None
        bias = stored
    if weight is None or list(node.input).count(value) != 1:
        return None
    other = node.input[1 - list(node.input).index(value)]
    array = net.constant(other)
    if array is None or (node.op_type in ("Sub", "Div") and node.input[0] != value):
        return None
    attributes_of = net.attributes(layer)
    if layer.op_type == "Conv":
        channels, rank, axis = weight.shape[0], weight.ndim, 1
    elif layer.op_type == "ConvTranspose":
        channels, rank, axis = weight.shape[1] * int(attributes_of.get("group", 1)), weight.ndim, 1
    else:
        channels, rank, axis = weight.shape[0 if attributes_of.get("transB", 0) else 1], 2, 1
    if array.ndim > rank or bias.size not in (1, channels):
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(size != 1 for position, size in enumerate(shape) if position != axis) or shape[axis] not in (1, channels):
        return None
    constant = np.broadcast_to(np.asarray(array, np.float64).reshape(-1), (channels,))
    if node.op_type in ("Add", "Sub"):
        return node, np.ones(channels), constant if node.op_type == "Add" else -constant
    if node.op_type == "Div":
        if not np.all(constant):
            return None
        constant = 1.0 / constant
    return node, constant, np.zeros(channels)


def _fold_into(net: Net, layer: onnx.NodeProto, scale: Doubles, shift: Doubles) -> None:
    """Scale a layer's weight and set its bias, in place; the constants are new, because others may share the old ones."""
    weight_name = layer.input[1]
    weight = np.asarray(net.constant(weight_name), np.float64)
    found = net.attributes(layer)
    bias_name = layer.input[2] if len(layer.input) > 2 else ""
    bias = np.asarray(net.constant(bias_name), np.float64).reshape(-1) if bias_name else np.zeros(1)
    if layer.op_type == "Conv":
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    elif layer.op_type == "ConvTranspose":  # [C in, C out / groups, ...]: output channels are counted group by group
        groups = int(found.get("group", 1))
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        per_group = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = (grouped * per_group).reshape(weight.shape)
    else:
        bias = bias * float(found.get("beta", 1.0))
        weight = weight * (scale[:, None] if found.get("transB", 0) else scale)
        kept = [attribute for attribute in layer.attribute if attribute.name != "beta"]
        del layer.attribute[:]
        layer.attribute.extend(kept)
    shared = sum(weight_name in node.input for node in net.nodes) > 1
    new_weight = net.add_constant(f"{layer.name}.weight" if shared else weight_name, _float32(weight), exact=not shared)
    new_bias = net.add_constant(f"{layer.name}.bias", _float32(np.broadcast_to(bias * scale + shift, scale.shape)))
    inputs = [layer.input[0], new_weight, new_bias]
    del layer.input[:]
    layer.input.extend(inputs)


def _as_affine(net: Net, node: onnx.NodeProto, norm: BatchNorm, shape: tuple[int | None, ...] | None) -> None:
    """Replace a batch normalization that stands alone by an equal layer, in place."""
    channels = len(norm.gamma)
    rank = 0 if shape is None else len(shape)
    if rank in (3, 4, 5):
        ones = [1] * (rank - 2)
        weight = net.add_constant(f"{node.name}.weight", _float32(norm.scale.reshape(channels, 1, *ones)))
        bias = net.add_constant(f"{node.name}.bias", _float32(norm.shift))
        inputs = [norm.input, weight, bias]
        node.CopyFrom(
            onnx.helper.make_node("Conv", inputs, [norm.output], name=node.name, group=channels, kernel_shape=ones)
        )
        net.touch()
        return
    dims = (channels, *[1] * max(rank - 2, 0)) if rank else None
    if dims is None:
        raise ModelError(
            "the rank of a batch normalization's input is not known",
            where=node.name,
            remedy="give --input-shape, or export the network again",
        )
    product = net.fresh(f"{norm.output}.scaled")
    scale = net.add_constant(f"{node.name}.scale", _float32(norm.scale.reshape(dims)))
    shift = net.add_constant(f"{node.name}.shift", _float32(norm.shift.reshape(dims)))
    net.insert_before(node, net.new_node("Mul", [norm.input, scale], [product], f"{node.name}/Mul"))
    node.CopyFrom(onnx.helper.make_node("Add", [product, shift], [norm.output], name=node.name))
    net.touch()
