"""How many bits which tensor gets: the word behind every low-bit number.

Published numbers with the same "W4A4" differ in what stays at 8 bits: block reconstruction (BRECQ, QDrop, Genie) keeps the first and the
last layer at 8 bits, the line of ZeroQ and GDFQ quantizes all layers but leaves image, residual sums and pooled features in float. Here
everything that an integer engine computes with is an integer, and :meth:`Protocol.describe` says with how many bits; the sentence is meant
to stand beside every number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from zsq_deploy.errors import UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reconstruct.template import PRODUCTS, Layer, Template

__all__ = ["PROTOCOLS", "Assignment", "Bits", "LayerBits", "Protocol", "assign", "bits_of"]


@dataclass(frozen=True)
class Bits:
    """Bits of the weights and of the activations that products read.

    Attributes:
        weights: 2 to 8.
        activations: 2 to 8.
    """

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for bits in (self.weights, self.activations):
            if not 2 <= bits <= 8:
                raise UsageError(f"{bits} bits are not supported", where="bits", remedy="choose 2 to 8 bits")

    @classmethod
    def of(cls, word: str | Bits) -> Bits:
        """Read ``w4a4``.

        Raises:
            UsageError: The word has another form.
        """
        if isinstance(word, Bits):
            return word
        found = re.fullmatch(r"w(\d)a(\d)", word.lower())
        if found is None:
            raise UsageError(f"{word!r} does not say bits", where="bits", remedy="write them like w4a4 or w4a8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """Short form: ``w4a4``."""
        return f"w{self.weights}a{self.activations}"


@dataclass(frozen=True)
class LayerBits:
    """Bits that differ from layer to layer.

    A layer that is named has its bits whatever the protocol keeps at 8 bits elsewhere; only the network's input goes on having 8.

    Attributes:
        layers: Layer node -> bits of its weight and of what it reads.
        others: Bits of all other layers, to which the protocol applies.
    """

    layers: Mapping[str, Bits]
    others: Bits = Bits(8, 8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.layers.items(), key=lambda item: item[0])), self.others))

    def __str__(self) -> str:
        """Every layer with its bits; equal only for equal bits."""
        named = ", ".join(f"{name}={bits}" for name, bits in sorted(self.layers.items()))
        return f"mixed ({named}; others {self.others})"


def bits_of(word: str | Bits | LayerBits | Mapping[str, str | Bits]) -> Bits | LayerBits:
    """Bits for all layers (``w4a4``), or layer by layer (a mapping of node names).

    Raises:
        UsageError: A word does not say bits, or no layer is named.
    """
    if isinstance(word, LayerBits):
        return word
    if isinstance(word, Mapping):
        if not word:
            raise UsageError("the mapping names no layer", where="bits", remedy="give node name -> w4a4 or the like")
        return LayerBits({name: Bits.of(bits) for name, bits in word.items()})
    return Bits.of(word)


@dataclass(frozen=True)
class Protocol:
    """Which tensors keep 8 bits.

    A *first* layer reads the network's input, a *last* layer is not followed by another product (Conv, Gemm, MatMul, ...).

    Attributes:
        name: Short name.
        ends_8bit: Weights of the first and last layers, and what they read, have 8 bits.
        second_input_8bit: So does what the first layers give to the second ones (the convention of BRECQ and Genie).
        input_8bit: The network's input has 8 bits in any case (pixels have no more).
        other_bits: Bits of what no product reads: operands of sums, inputs of average pooling. Published protocols leave them in float.
    """

    name: str
    ends_8bit: bool
    second_input_8bit: bool = False
    input_8bit: bool = True
    other_bits: int = 8

    @classmethod
    def of(cls, word: str | Protocol) -> Protocol:
        """The protocol of that name.

        Raises:
            UsageError: There is none.
        """
        if isinstance(word, Protocol):
            return word
        if word not in PROTOCOLS:
            raise UsageError(
                f"there is no protocol {word!r}", where="protocol", remedy=f"choose one of {', '.join(PROTOCOLS)}"
            )
        return PROTOCOLS[word]

    def describe(self, bits: Bits | LayerBits) -> str:
        """One sentence: which tensors have how many bits."""
        if isinstance(bits, LayerBits):
            input_ = "; the network's input 8 bits" if self.input_8bit else ""
            others = self.describe(bits.others)
            named = ", ".join(f"{name} {one}" for name, one in bits.layers.items())
            return f"mixed bits, weights and inputs of each layer: {named}{input_}; all other layers: {others}"
        if bits.weights == bits.activations == 8:
            return f"{bits} {self.name}: all weights and activations have 8 bits"
        eight = []
        if self.ends_8bit:
            eight.append("first and last layer (weights and inputs)")
        elif self.input_8bit:
            eight.append("the network's input")
        if self.second_input_8bit:
            eight.append("the second layer's input")
        ends = f"; at 8 bits: {', '.join(eight)}" if eight else ""
        return (
            f"{bits} {self.name}: weights {bits.weights} bits, inputs of products {bits.activations} bits{ends}; "
            f"what only sums and pooling read {max(self.other_bits, bits.activations)} bits; biases 32 bits"
        )


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("ends-8bit", ends_8bit=True),
        Protocol("ends-8bit+second-input", ends_8bit=True, second_input_8bit=True),
        Protocol("all-layers", ends_8bit=False),
    )
}
"""By name."""


@dataclass(frozen=True)
class Assignment:
    """The outcome of :func:`assign`.

    Attributes:
        weights: Layer node -> bits of its weight.
        sites: Group of sites -> bits.
        first: Nodes of the first products.
        last: Nodes of the last products.
    """

    weights: Mapping[str, int]
    sites: Mapping[str, int]
    first: frozenset[str]
    last: frozenset[str]


def assign(template: Template, bits: Bits | LayerBits, protocol: Protocol) -> Assignment:
    """Bits of every weight and of every group of activations.

    A tensor that several products read gets the fewest bits that one of them asks for.

    Raises:
        UsageError: A layer that is named is not there.
    """
    graph = template.plain
    first, last, second = _ends(graph)
    mixed = bits if isinstance(bits, LayerBits) else LayerBits({}, bits)
    unknown = sorted(set(mixed.layers) - {node.name for node in graph.nodes if node.op_type in PRODUCTS})
    if unknown:
        some = ", ".join([layer.node for layer in template.layers][:5])
        raise UsageError(
            f"no layer of this network is called {', '.join(unknown)}",
            where="bits",
            remedy=f"name nodes that multiply, like {some}",
        )
    wanted: dict[str, int] = {}
    sites = {site.output: site for site in template.sites}
    for node in graph.nodes:
        if node.op_type not in PRODUCTS:
            continue
        named = mixed.layers.get(node.name)
        eight = protocol.ends_8bit and (node.name in first or node.name in last)
        eight = named is None and (eight or (protocol.second_input_8bit and node.name in second))
        for value in node.input[:2]:
            site = sites.get(value)
            if site is None:
                continue
            own = eight or (protocol.input_8bit and site.from_input)
            own_bits = 8 if own else (named or mixed.others).activations
            wanted[site.group] = min(wanted.get(site.group, 8), own_bits)
    groups = {site.group for site in template.sites}
    other = max(protocol.other_bits, mixed.others.activations)
    weights = {}
    for layer in template.layers:
        named = mixed.layers.get(layer.node)
        kept = named is None and protocol.ends_8bit and _at_end(layer, first, last)
        weights[layer.node] = 8 if kept else (named or mixed.others).weights
    return Assignment(
        weights=weights,
        sites={group: wanted.get(group, other) for group in sorted(groups)},
        first=frozenset(first),
        last=frozenset(last),
    )


def _at_end(layer: Layer, first: set[str], last: set[str]) -> bool:
    return layer.node in first or layer.node in last


def _ends(graph: Graph) -> tuple[set[str], set[str], set[str]]:
    """First products, last products, and those that read what the first ones give, by node name."""
    inputs = {spec.name for spec in graph.inputs}
    # How many products lie in front of a value along the longest way: none, one, more.
    most: dict[str, int] = dict.fromkeys(inputs, 0)
    first, second = set(), set()
    for node in graph.nodes:
        counts = [most[name] for name in node.input if name in most]
        if not counts or node.op_type in ("Shape", "Size"):
            continue
        count = max(counts)
        if node.op_type in PRODUCTS:
            if count == 0:
                first.add(node.name)
            elif count == 1:
                second.add(node.name)
            count = min(count + 1, 2)
        for name in node.output:
            most[name] = count
    followed: set[str] = set()
    last = set()
    for node in reversed(graph.nodes):
        behind = any(name in followed for name in node.output)
        if node.op_type in PRODUCTS and not behind:
            last.add(node.name)
        if node.op_type in PRODUCTS or behind:
            followed.update(node.input)
    return first, last, second
