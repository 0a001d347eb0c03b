"""What stands between two roundings of a Q/DQ graph: which rounded tensors and which integer layers a rounded tensor is made from.

A *site* is one QuantizeLinear with its DequantizeLinear nodes on an activation. A *layer* is a convolution or matrix product that
multiplies one site with a constant quantized weight. Behind every site, the float part of the graph is followed backwards; what is found
is a list of *alternatives* (one for each part of a concatenation), each of them a sum of *terms*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.quant.qdq import TRANSPARENT, weight_axis
from zsq_deploy.quant.reader import QuantizedTensor, dequantized_weight, is_quantize, read_qdq

__all__ = ["Layer", "Regions", "Term", "read_regions"]

Array = npt.NDArray[Any]

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_BOUNDED = frozenset({"Relu", "Clip"})
_SLOPED = frozenset({"LeakyRelu", "PRelu"})
_MOVING = TRANSPARENT | {"Dropout"}
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_MOST_ALTERNATIVES = 256


@dataclass(frozen=True)
class Term:
    """One summand of what is rounded.

    Attributes:
        site: Name of the QuantizeLinear node whose rounded numbers are summed; empty for a layer, and for the graph's input.
        layer: Name of the layer whose products are summed; empty for a site.
        divisor: The numbers are divided by this many (average pooling). 0: a product with something else, or otherwise not on a grid.
        sloped: Negative numbers are multiplied by a slope.
    """

    site: str = ""
    layer: str = ""
    divisor: int = 1
    sloped: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or matrix product with integer operands.

    Attributes:
        node: Name of the node.
        op: Its operator.
        site: The site that it reads (directly, or through nodes that move numbers); of a concatenation the first one.
        sites: All sites that it reads; they have one scale.
        weight: The quantized weight.
        codes: Name of the constant that holds the weight: integers, or floats in front of QuantizeLinear.
        axis: Axis of the weight that counts output channels.
        channels: Number of output channels.
        taps: Products in each sum.
        bias: The bias as float64 [channels]; ``None`` if it has none or one that is computed.
        bias_at: Node and input index where a bias can be written; ``None`` if the layer cannot have one.
        bias_name: Name of the constant that holds the bias.
    """

    node: str
    op: str
    site: str
    sites: tuple[str, ...]
    weight: QuantizedTensor
    codes: str
    axis: int
    channels: int
    taps: int
    bias: npt.NDArray[np.float64] | None
    bias_at: tuple[str, int] | None
    bias_name: str


@dataclass(frozen=True, eq=False)
class Regions:
    """The outcome of :func:`read_regions`.

    Attributes:
        sites: QuantizeLinear node -> its tensor: 8 bits, per tensor.
        layers: Node name -> layer.
        behind: Site -> alternatives of sums that are rounded there.
        left: What is left alone, and why: one line each.
    """

    sites: Mapping[str, QuantizedTensor]
    layers: Mapping[str, Layer]
    behind: Mapping[str, tuple[tuple[Term, ...], ...]]
    left: tuple[str, ...] = field(default=())


_Alternatives = tuple[tuple[Term, ...], ...]


def _interpolates(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "Resize" and attributes(node).get("mode", "nearest") != "nearest")


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.left: list[str] = []
        self.sites: dict[str, QuantizedTensor] = {}
        self.site_of: dict[str, str] = {}
        self.weights: dict[str, QuantizedTensor] = {}
        for tensor in read_qdq(graph):
            outputs = [graph.node(name).output[0] for name in tensor.dequantize]
            if tensor.is_weight:
                self.weights.update(dict.fromkeys(outputs, tensor))
            elif tensor.quantize is None:
                continue
            elif tensor.axis is not None or tensor.block or tensor.dtype not in ("int8", "uint8"):
                kind = "per channel" if tensor.axis is not None else tensor.dtype
                self.left.append(f"{tensor.quantize}: the activation {tensor.name!r} is rounded {kind}")
            else:
                self.sites[tensor.quantize] = tensor
                self.site_of.update(dict.fromkeys(outputs, tensor.quantize))
        self.known: dict[str, _Alternatives] = {}
        self.layers: dict[str, Layer] = {}
        for node in graph:
            if node.op_type in WEIGHTED and node.domain in ("", "ai.onnx"):
                layer = self._layer(node)
                if layer is not None:
                    self.layers[node.name] = layer

    def read(self) -> Regions:
        behind = {name: self.terms(tensor.name) for name, tensor in self.sites.items()}
        return Regions(self.sites, self.layers, behind, tuple(self.left))

    # -- layers --

    def _layer(self, node: onnx.NodeProto) -> Layer | None:
        graph = self.graph
        weight = self.weights.get(node.input[1])
        if weight is None:
            return None
        sites = self._moved_sites(node.input[0])
        if not sites or len({self._same(site) for site in sites}) > 1:
            return None
        array = dequantized_weight(graph, node.input[1])
        found = attributes(node)
        if array is None:
            return self._leave(node, "its weight is not a constant")
        if weight.block or np.any(weight.zero_point):
            return self._leave(node, "its weight has blocks or a zero point")
        if weight.dtype not in ("int8", "int4"):
            return self._leave(node, f"its weight is stored as {weight.dtype}")
        if len(graph.consumers(node.input[1])) > 1:
            return self._leave(node, "it shares its weight with another layer")
        if node.op_type == "Gemm" and (
            found.get("alpha", 1.0) != 1.0 or found.get("beta", 1.0) != 1.0 or found.get("transA", 0)
        ):
            return self._leave(node, "alpha, beta or transA is set")
        if node.op_type == "MatMul" and array.ndim != 2:
            return self._leave(node, f"its weight has {array.ndim} dimensions")
        axis = weight_axis(node, array.ndim)
        group = int(found.get("group", 1))
        grouped = node.op_type == "ConvTranspose" and group > 1
        if weight.scale.size > 1 and (
            grouped or weight.axis is None or weight.axis % array.ndim != axis or weight.scale.size != array.shape[axis]
        ):
            return self._leave(node, "the scales of its weight do not belong to its output channels")
        channels = array.shape[axis] * (group if grouped else 1)
        codes = weight.codes
        maker = graph.producer(codes)
        while maker is not None and (is_quantize(maker) or maker.op_type == "Cast"):
            codes = str(maker.input[0])
            maker = graph.producer(codes)
        if graph.constant(codes) is None:
            return self._leave(node, "its weight is computed")
        bias, place, name = self._bias(node, channels)
        taps = array.size // array.shape[axis]
        return Layer(node.name, node.op_type, sites[0], sites, weight, codes, axis, channels, taps, bias, place, name)

    def _leave(self, node: onnx.NodeProto, why: str) -> Layer | None:
        self.left.append(f"{node.name}: {why}")
        return None

    def _moved_sites(self, value: str) -> tuple[str, ...]:
        """The sites that a value comes from, through nodes that move numbers or choose among them; empty if not only from sites."""
        while value not in self.site_of:
            node = self.graph.producer(value)
            if node is not None and node.op_type == "Concat":
                parts = [self._moved_sites(name) for name in node.input]
                return tuple(dict.fromkeys(site for part in parts for site in part)) if all(parts) else ()
            if node is None or not (node.op_type in _MOVING or node.op_type in _BOUNDED) or _interpolates(node):
                return ()
            value = node.input[0]
        return (self.site_of[value],)

    def _same(self, site: str) -> tuple[float, int, str]:
        tensor = self.sites[site]
        return float(tensor.scale), int(tensor.zero_point), tensor.dtype

    def _bias(
        self, node: onnx.NodeProto, channels: int
    ) -> tuple[npt.NDArray[np.float64] | None, tuple[str, int] | None, str]:
        if node.op_type != "MatMul":
            if len(node.input) > 2 and node.input[2]:
                values = self._constant(node.input[2])
                if values is None or values.size != channels:
                    return None, None, ""
                return values.reshape(-1), (node.name, 2), self._constant_name(node.input[2])
            return None, (node.name, 2), f"{node.name}_bias"
        readers = self.graph.consumers(node.output[0])
        if len(readers) == 1 and readers[0].op_type == "Add" and not self.graph.is_output(node.output[0]):
            index = 1 if readers[0].input[0] == node.output[0] else 0
            values = self._constant(readers[0].input[index])
            if values is not None and values.size == channels and values.shape[-1] == channels:
                name = self._constant_name(readers[0].input[index])
                return values.reshape(-1), (readers[0].name, index), name
        return None, None, ""

    def _constant(self, value: str) -> npt.NDArray[np.float64] | None:
        found = dequantized_weight(self.graph, value) if value else None
        return None if found is None else np.asarray(found, np.float64)

    def _constant_name(self, value: str) -> str:
        tensor = self.weights.get(value)
        return value if tensor is None else tensor.name

    # -- sums --

    def terms(self, value: str) -> _Alternatives:
        """What a float value is made from."""
        if value not in self.known:
            self.known[value] = ((Term(divisor=0),),)  # a cycle cannot be; a guard against it costs nothing
            self.known[value] = self._terms(value)
        return self.known[value]

    def _terms(self, value: str) -> _Alternatives:
        if value in self.site_of:
            return ((Term(site=self.site_of[value]),),)
        node = self.graph.producer(value)
        if node is None:
            return ((Term(),),)
        if node.name in self.layers:
            return ((Term(layer=node.name),),)
        op = node.op_type
        if op in _BOUNDED or op in _MOVING:
            if _interpolates(node):
                return self._off_grid(node)
            return self.terms(node.input[0])
        if op in _SLOPED:
            return tuple(
                tuple(Term(t.site, t.layer, t.divisor, True) for t in terms) for terms in self.terms(node.input[0])
            )
        if op == "Add":
            constant = [self._constant(name) is not None for name in node.input]
            if any(constant):
                inner = self.terms(node.input[0] if constant[1] else node.input[1])
                ours = any(
                    layer.bias_at is not None and layer.bias_at[0] == node.name for layer in self.layers.values()
                )
                return inner if ours else tuple((*terms, Term(divisor=0)) for terms in inner)
            first, second = (self.terms(name) for name in node.input)
            if len(first) * len(second) > _MOST_ALTERNATIVES:
                return self._off_grid(node)
            return tuple((*a, *b) for a in first for b in second)
        if op in ("Concat", "Max", "Min"):
            return tuple(dict.fromkeys(terms for name in node.input for terms in self.terms(name)))
        if op in _POOLS:
            count = self._pooled(node)
            return tuple(
                tuple(Term(t.site, t.layer, t.divisor * count, t.sloped) for t in terms)
                for terms in self.terms(node.input[0])
            )
        return self._off_grid(node)

    def _off_grid(self, node: onnx.NodeProto) -> _Alternatives:
        """Products of rounded tensors still want one significand; anything else has no grid at all."""
        if node.op_type not in ("Mul", "Resize", "Sub"):
            return ((Term(divisor=0),),)
        sites = [t.site for name in node.input if name for terms in self._computed(name) for t in terms if t.site]
        return (tuple(Term(site=site, divisor=0) for site in dict.fromkeys(sites)) or (Term(divisor=0),),)

    def _computed(self, value: str) -> _Alternatives:
        return () if self._constant(value) is not None else self.terms(value)

    def _pooled(self, node: onnx.NodeProto) -> int:
        """How many numbers a pooling averages; 0 if that is not the same everywhere or not known."""
        found = attributes(node)
        if node.op_type == "AveragePool":
            if any(found.get("pads", ())) or found.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
                return 0
            return math.prod(int(k) for k in found.get("kernel_shape", (0,)))
        shape = self.graph.shape(node.input[0])
        if shape is None:
            return 0
        axes: list[int] = list(range(2, len(shape)))
        if node.op_type == "ReduceMean":
            given = found.get("axes")
            if given is None and len(node.input) > 1 and node.input[1]:
                constant = self.graph.constant(node.input[1])
                given = None if constant is None else constant.reshape(-1).tolist()
            if given is None:
                return 0
            axes = [int(axis) % len(shape) for axis in given]
        sizes = [shape[axis] for axis in axes]
        return 0 if any(size is None for size in sizes) else math.prod(int(size or 0) for size in sizes)


def read_regions(graph: Graph) -> Regions:
    """Sites, layers and the sums between them of any Q/DQ graph."""
    return _Reader(graph).read()


def axis_form(values: Array, rank: int, axis: int) -> Array:
    """A vector along one axis of a tensor with `rank` dimensions; a single value stays as it is."""
    if values.size == 1:
        return values.reshape(())
    form = [1] * rank
    form[axis] = -1
    return values.reshape(form)
