"""Writing the numbers of a quantized network into its Q/DQ graph, by name.

Codes of fewer than 8 bits stay in 8-bit integers. QuantizeLinear saturates to its type, so the narrower range of an activation is cut by a Clip
in front of it; :func:`clip_codes` cuts the codes behind it instead, which is the same and lets ONNX Runtime fuse.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import ModelError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.qdq import raise_opset
from zsq_deploy.quant.reader import is_quantize
from zsq_deploy.quant.reconstruct.state import State
from zsq_deploy.quant.reconstruct.template import Template
from zsq_deploy.quant.scheme import Scheme

__all__ = ["clip_codes", "write"]

Array = npt.NDArray[Any]


def write(template: Template, state: State, *, int4_weights: bool = False) -> Graph:
    """The Q/DQ graph with the numbers of a state.

    Codes of fewer than 8 bits stay in 8-bit integers; a Clip in front of QuantizeLinear keeps activations within the range of the codes that
    are used.

    Args:
        template: The network.
        state: Its numbers.
        int4_weights: Store weights of up to 4 bits as INT4 or UINT4, two in a byte (operator set 21).
    """
    graph = raise_opset(template.qdq, 21) if int4_weights else template.qdq
    net = Net(graph.proto)
    makers = {name: node for node in net.nodes for name in node.output if name}
    readers: dict[str, int] = {}
    for node in net.nodes:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    done: set[str] = set()

    def store(old: str, array: Array) -> str:
        """Put an array in the place of a constant, under its own name if nothing else was written there."""
        if old not in done:
            done.add(old)
            return net.add_constant(old, array, exact=True)
        return net.add_constant(old, array)

    for layer in template.layers:
        weight = state.weights[layer.node]
        kind = _container(weight.scheme, narrow=int4_weights)
        node = makers[layer.weight]
        inputs = [
            store(node.input[0], weight.codes.astype(kind)),
            store(node.input[1], weight.scale),
            store(node.input[2], weight.zero_point.astype(kind)),
        ]
        _set_inputs(node, inputs)
        stored = state.bias_codes(layer)
        if stored is not None:
            node = makers[layer.bias]
            inputs = [store(node.input[0], stored[0]), store(node.input[1], stored[1]), node.input[2]]
            _set_inputs(node, inputs)
        elif layer.bias:
            store(layer.bias, np.asarray(state.biases[layer.node], np.float32))
    quantizers = {node.input[0]: node for node in net.nodes if is_quantize(node)}
    for site in template.sites:
        activation = state.activations[site.group]
        scheme = activation.scheme
        kind = _container(scheme, narrow=False)
        node, back = quantizers[site.name], makers[site.output]
        scale = store(node.input[1], np.asarray(activation.scale, np.float32))
        zero = store(node.input[2], np.asarray(activation.zero_point, kind))
        source = node.input[0]
        if (scheme.qmin, scheme.qmax) != _type_limits(kind):
            factor = np.float32(activation.scale)
            low = np.float32(scheme.qmin - activation.zero_point) * factor
            high = np.float32(scheme.qmax - activation.zero_point) * factor
            names = [net.add_constant(f"{site.name}_range_low", np.asarray(low, np.float32))]
            names.append(net.add_constant(f"{site.name}_range_high", np.asarray(high, np.float32)))
            source = net.fresh(f"{site.name}_in_range")
            net.insert_before(node, net.new_node("Clip", [site.name, *names], [source], f"{site.name}_Clip"))
        _set_inputs(node, [source, scale, zero])
        _set_inputs(back, [back.input[0], scale, zero])
    net.touch()
    net.sweep()
    return Graph(net.proto())


def _set_inputs(node: Any, inputs: list[str]) -> None:
    del node.input[:]
    node.input.extend(inputs)


def _container(scheme: Scheme, *, narrow: bool) -> np.dtype[Any]:
    """The integer type that holds the codes."""
    if scheme.bits > 8:
        raise ModelError(f"{scheme} does not fit 8-bit integers", where="write", remedy="choose 2 to 8 bits")
    if narrow and scheme.bits <= 4:
        small: np.dtype[Any] = np.dtype(ml_dtypes.int4 if scheme.signed else ml_dtypes.uint4)
        return small
    return np.dtype(np.int8 if scheme.signed else np.uint8)


def _type_limits(kind: np.dtype[Any]) -> tuple[int, int]:
    limits = np.iinfo(kind)
    return int(limits.min), int(limits.max)


def clip_codes(graph: Graph) -> Graph:
    """The Q/DQ graph with every Clip that cuts an activation to fewer than 8 bits behind QuantizeLinear, on its integers, instead of in front.

    The numbers are the same, since the bounds are multiples of the scale. ONNX Runtime (1.24 to 1.32) leaves a convolution in float that is
    followed by Clip and QuantizeLinear, and makes QLinearConv of one that is followed by QuantizeLinear and Clip. Other readers of Q/DQ graphs,
    :func:`zsq_deploy.quant.reader.read_qdq` among them, want the pair together: this is for the file that the runtime gets, at the very end.

    Args:
        graph: As :func:`write` gives it.
    """
    net = Net(graph.proto)
    makers = {name: node for node in net.nodes for name in node.output if name}
    for node in list(net.nodes):
        if not is_quantize(node):
            continue
        clip = makers.get(node.input[0])
        if clip is None or clip.op_type != "Clip" or len(clip.input) != 3 or len(graph.consumers(clip.output[0])) != 1:
            continue
        low, high = (graph.constant(name) for name in clip.input[1:])
        scale, zero = graph.constant(node.input[1]), graph.constant(node.input[2])
        if low is None or high is None or scale is None or zero is None or scale.size != 1:
            continue
        codes = [np.rint(np.float64(bound) / np.float64(scale)) + np.float64(zero) for bound in (low, high)]
        limits = np.iinfo(zero.dtype)
        exact = all(
            np.float32(code - np.float64(zero)) * scale == b for code, b in zip(codes, (low, high), strict=True)
        )
        if not exact or codes[0] < limits.min or codes[1] > limits.max:
            continue  # the activation function of the network itself
        bounds = [
            net.add_constant(f"{node.name}_code_{word}", np.asarray(code, zero.dtype))
            for word, code in zip(("low", "high"), codes, strict=True)
        ]
        wide = node.output[0]
        inner = net.fresh(f"{wide}_uncut")
        node.input[0] = clip.input[0]
        node.output[0] = inner
        after = net.new_node("Clip", [inner, *bounds], [wide], f"{node.name}_Clip")
        place = next(index for index, item in enumerate(net.nodes) if item is node)
        net.nodes.insert(place + 1, after)
        net.remove([clip])
    net.touch()
    net.sweep()
    return Graph(net.proto())
