"""Integer proof of an engine: what its layers compute in, by multiply-accumulates and by time.

Which layers there are and in which types they compute is what TensorRT's inspector says of the built engine
(:mod:`zsq_deploy.backends.tensorrt.inspector`); times are those of TensorRT's own profiler; how much arithmetic a layer is comes from the
shapes of the ONNX graph. A convolution or matrix product that no layer owns up to is noticed, and counts as float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx

from zsq_deploy.backends.base import KernelRecord
from zsq_deploy.backends.tensorrt.inspector import Layer, kernel_types
from zsq_deploy.backends.tensorrt.walking import Rounded, is_product
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.macs import node_macs
from zsq_deploy.quant.reader import is_dequantize, is_quantize

__all__ = ["kernel_records"]

_KERNEL_WORDS = 48


def kernel_records(
    layers: Sequence[Layer], graph: Graph, microseconds: Mapping[str, float] | None = None, *, mode: str = "engine"
) -> list[KernelRecord]:
    """One record for each layer that executes something, in TensorRT's order, and one for each product that no layer names.

    Args:
        layers: The engine's layers.
        graph: The ONNX graph that it was built from.
        microseconds: Time of each layer by name; layers without one took none.
        mode: ``engine``; ``implicit`` for an engine from a float network with a calibration cache; or the reason why all is float.
    """
    times = microseconds or {}
    places = {node.name: place for place, node in enumerate(graph)}
    shown = {node.name for node in graph if not (is_quantize(node) or is_dequantize(node))}
    macs = {name: count for name, count in node_macs(graph).items() if count}
    named = [layer.stands_for(places) for layer in layers]
    owners = _owners(layers, named, macs)
    rounded = Rounded(graph)
    records: list[KernelRecord] = []
    for place, layer in enumerate(layers):
        mine = [name for name, owner in owners.items() if owner == place]
        time = times.get(layer.name, 0.0)
        if not layer.works and not time and not mine:
            continue
        hidden = layer.is_region and bool(mine)
        integer = layer.integer and not hidden
        record = KernelRecord(
            node=layer.name,
            op=_kernel(layer),
            integer=integer,
            microseconds=time,
            sources=tuple(name for name in named[place] if name in shown),
            macs=sum(macs[name] for name in mine),
        )
        if not integer:
            record = replace(record, reason=_reason(layer, [graph.node(name) for name in mine], rounded, mode))
        records.append(record)
    records.extend(
        KernelRecord(
            node=name,
            op=str(graph.node(name).op_type),
            integer=False,
            microseconds=0.0,
            sources=(name,),
            macs=count,
            reason="TensorRT's layer information does not say which layer computed it",
        )
        for name, count in macs.items()
        if name not in owners
    )
    return records


def _owners(layers: Sequence[Layer], named: Sequence[tuple[str, ...]], macs: Mapping[str, int]) -> dict[str, int]:
    """Product of the graph -> the layer that computes it: of those that name it, the one that looks most like a product.

    Layers that only prepare its factors may name it too. Where several look alike, one in float counts, and then the first.
    """
    found: dict[str, int] = {}
    for name in macs:
        candidates = [place for place, names in enumerate(named) if name in names and layers[place].may_multiply]
        if candidates:
            found[name] = min(candidates, key=lambda place: (-layers[place].may_multiply, layers[place].integer, place))
    return found


def _kernel(layer: Layer) -> str:
    """The layer's type and the beginning of its kernel's name: what is after that are tile sizes."""
    words = layer.kernel.split("_tilesize")[0][:_KERNEL_WORDS]
    return f"{layer.kind} {words}".strip()


def _reason(layer: Layer, products: Sequence[onnx.NodeProto], rounded: Rounded, mode: str) -> str:
    """Why a layer does not compute in 8-bit integers."""
    if mode not in ("engine", "implicit"):
        return mode
    reads = {one.dtype for one in layer.inputs} - {""}
    writes = {one.dtype for one in layer.outputs} - {""}
    if products:
        if layer.is_region:
            return "part of a region that this TensorRT compiles as a whole and does not describe"
        return "; ".join(dict.fromkeys(_float_product(layer, node, rounded, mode) for node in products))
    if "int8" in writes and "int8" not in reads:
        return "conversion from float to 8-bit integers"
    if "int8" in reads and "int8" not in writes:
        return "conversion from 8-bit integers to float"
    if layer.kind == "Reformat":
        return "float values in another memory layout"
    if "int8" in reads:
        return "adds or compares 8-bit numbers of different scales, which takes float numbers in between"
    return f"TensorRT computes {layer.kind} in float here: its inputs are not quantized, or it has no 8-bit kernel"


def _float_product(layer: Layer, node: onnx.NodeProto, rounded: Rounded, mode: str) -> str:
    depthwise = node.op_type == "Conv" and next((a.i for a in node.attribute if a.name == "group"), 1) > 1
    kind = "grouped convolution" if depthwise else str(node.op_type)
    if mode == "engine" and is_product(node):
        reads, weight = rounded.behind(node.input[0]), rounded.behind(node.input[1])
        if reads is None:
            return f"{kind}: its input is not quantized in the graph"
        if weight is None:
            return f"{kind}: its weights are not quantized in the graph"
        if weight.dtype == "int4":
            return f"{kind}: only its weights are stored in 4 bits; it computes in float"
    types = kernel_types(layer.kernel)
    if types is not None:
        return f"{kind}: TensorRT chose a kernel that multiplies {types[0]} and {types[1]}"
    told = next((one.dtype for one in layer.inputs if one.dtype), "")
    if not told:
        return f"{kind}: TensorRT does not say in which type this layer computes"
    if told != "int8":
        return f"{kind}: TensorRT gives this layer {told} numbers"
    return f"{kind}: it reads 8-bit integers, but TensorRT does not say that it multiplies them as such"
