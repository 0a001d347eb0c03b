"""Numbers of few bits in OpenVINO's Q/DQ graph: where they are found, and how the graph is written with them.

The graph that numbers are found on is our own 8-bit placement with settled scales, so that activations which keep 8 bits have the ranges of the
8-bit engine. With the numbers in it the graph is settled once more: scales of few bits are on a grid already that settling keeps (or leaves by
less than a code), and biases move to where no sum is on a rounding boundary.

Activations of fewer than 8 bits are cut to their codes by a Clip in front of QuantizeLinear. The CPU plugin computes it in the
convolution's kernel, like the activation functions of the network.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.openvino.design import Design
from zsq_deploy.backends.openvino.merging import drop_merged_pairs
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.model.constants import own_constants, replace_constants
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.bias import apply_biases
from zsq_deploy.quant.reader import read_qdq
from zsq_deploy.quant.reconstruct.deployed import Numbers, Places, pack_int4
from zsq_deploy.quant.reconstruct.template import WEIGHTED

__all__ = ["low_bit_graph", "places_of"]

Array = npt.NDArray[Any]


def places_of(design: Design, folded: Graph, target: Target, options: BuildOptions) -> Places:
    """Our 8-bit placement with settled scales, beside the float graph with the biases of the options.

    Args:
        design: Of our own route.
        folded: The float graph.
        target: What to build for.
        options: Corrected biases and replaced weights; whether scales are exact.
    """
    floating = own_constants(replace_constants(apply_biases(folded, options.biases), options.weights), WEIGHTED)
    qdq = design.qdq
    if options.exact_scales:
        qdq, _ = drop_merged_pairs(qdq)
        qdq = _settled(qdq, target, _float_weights(floating)).graph
    return Places(floating, qdq, target.activation, target.weight)


def low_bit_graph(
    design: Design, folded: Graph, target: Target, options: BuildOptions, numbers: Numbers
) -> tuple[Graph, dict[str, Any]]:
    """The Q/DQ graph with numbers of few bits and settled biases, and what to write down about it.

    Raises:
        ModelError: The numbers were found on another graph.
    """
    places = places_of(design, folded, target, options)
    qdq = pack_int4(numbers.write(places), through="int8")
    record: dict[str, Any] = {"activation_steps_grew_by": 1.0, "inexact_layers": {}, "notes": list(design.notes)}
    if options.exact_scales:
        settled = _settled(qdq, target, None)
        qdq = _with_bounds(settled.graph, numbers, places)
        record["inexact_layers"] = dict(settled.inexact)
        record["notes"].extend(settled.notes)
    return numbers.rounded(qdq, places.floating), record


def _settled(qdq: Graph, target: Target, floats: Mapping[str, Array] | None) -> Any:
    settle = importlib.import_module("zsq_deploy.quant.settle").settle
    return settle(qdq, activation=target.activation, weight=target.weight, float_weights=floats)


def _float_weights(graph: Graph) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for node in graph.nodes:
        if node.op_type in WEIGHTED:
            weight = graph.constant(node.input[1])
            if weight is not None:
                found[node.name] = weight
    return found


def _with_bounds(qdq: Graph, numbers: Numbers, places: Places) -> Graph:
    """The graph with every Clip of few bits at the codes of its (settled) scale and zero point."""
    groups = {site.name: site.group for site in places.template().sites}
    tensors = [tensor for tensor in read_qdq(qdq) if tensor.quantize and not tensor.is_weight]
    net = Net(qdq.proto)
    makers = net.producers()
    for tensor in tensors:
        clip = makers.get(tensor.name)
        group = groups.get(str(clip.input[0])) if clip is not None and clip.op_type == "Clip" else None
        if clip is None or group is None or clip.name != f"{clip.input[0]}_Clip":
            continue
        scheme = numbers.state.activations[group].scheme
        factor = np.float32(tensor.scale)
        for constant, code in zip(clip.input[1:], (scheme.qmin, scheme.qmax), strict=True):
            bound = np.float32(code - int(tensor.zero_point)) * factor
            net.add_constant(constant, np.asarray(bound, np.float32), exact=True)
    net.touch()
    return Graph(net.proto())
