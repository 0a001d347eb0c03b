"""Which value of a runtime's fused graph holds which quantized tensor of the Q/DQ graph.

Fusing replaces the names of values, but not those of the scales: a fused integer kernel takes the scale of its output as an
input, and that is the very initializer that the tensor's QuantizeLinear had. So the codes of most layers can be compared one
by one although the runtime has renamed everything. A kernel may also have moved the channels to the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import read_qdq
from zsq_deploy.verify.divergence import Divergence, Fetch, TensorWalk

__all__ = ["fused_codes", "walk_fused"]

Array = npt.NDArray[Any]


class FusedReference(Protocol):
    """A fused graph that can be evaluated value by value."""

    @property
    def graph(self) -> Graph:
        """The runtime's optimized graph."""

    def run(self, feeds: Mapping[str, Array], fetch: Sequence[str] | None = None) -> dict[str, Array]:
        """The named values for one batch."""


def fused_codes(fused: Graph, qdq: Graph) -> dict[str, str]:
    """The codes of the Q/DQ graph that can be found in the fused graph.

    Args:
        fused: The runtime's optimized graph.
        qdq: The Q/DQ graph that it was made from.

    Returns:
        Value name of a tensor's codes in `qdq` -> value name of the same codes in `fused`, in the order of `qdq`. Tensors
        that cannot be told apart by scale and zero point, or that the runtime fused away, are not in it.
    """
    wanted = [tensor.codes for tensor in read_qdq(qdq) if not tensor.is_weight and tensor.quantize is not None]
    present = {value for node in fused for value in node.output}
    found = {codes: codes for codes in wanted if codes in present}
    owners = _Owners(qdq, wanted, fused)
    for node in fused:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        codes = owners.of_result(node)
        if codes is not None:
            found.setdefault(codes, node.output[0])
    order = {codes: place for place, codes in enumerate(value for node in qdq for value in node.output)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


class _Owners:
    """Which tensor a pair of scale and zero point belongs to.

    A runtime may merge constants of equal value and keep one of their names, so scales are looked up by value; tensors of equal
    scale and zero point are told apart by the name of the zero point, where the runtime kept all of these.
    """

    def __init__(self, qdq: Graph, wanted: Sequence[str], fused: Graph) -> None:
        self._fused = fused
        self._constants = set(fused.initializer_names)
        self._scales: set[str] = set()
        self._equal: dict[
            tuple[bytes, bytes], dict[str, str]
        ] = {}  # (scale, zero point) -> codes -> name of zero point
        for codes in wanted:
            producer = qdq.producer(codes)
            if producer is None or len(producer.input) < 2:
                continue
            scale, zero = producer.input[1], producer.input[2] if len(producer.input) > 2 else ""
            self._scales.add(scale)
            self._equal.setdefault((_value(qdq, scale), _value(qdq, zero)), {})[codes] = zero

    def of_result(self, node: onnx.NodeProto) -> str | None:
        """Codes of the tensor whose scale and zero point a fused kernel gives its result; ``None`` if that is not certain."""
        # The scale of an operand stands right behind the operand; the scale of the result behind a zero point or a bias.
        places = [place for place, name in enumerate(node.input) if name in self._scales and self._behind(node, place)]
        if not places:
            return None
        scale = node.input[places[-1]]
        zero = node.input[places[-1] + 1] if places[-1] + 1 < len(node.input) else ""
        same = self._equal.get((_value(self._fused, scale), _value(self._fused, zero)), {})
        if len(same) == 1:
            return next(iter(same))
        if len(set(same.values())) != len(same) or not self._constants.issuperset(same.values()):
            return None
        return next((codes for codes, name in same.items() if name == zero), None)

    def _behind(self, node: onnx.NodeProto, place: int) -> bool:
        if place == 0 or not node.input[place - 1]:
            return True
        if node.input[place - 1] not in self._constants:
            return False
        before = self._fused.constant(node.input[place - 1])
        return before is None or before.size == 1 or before.dtype.itemsize != 1  # behind 8-bit weights: their own scale


def _value(graph: Graph, name: str) -> bytes:
    array = graph.constant(name) if name else None
    return b"" if array is None else array.tobytes()


def _like(codes: Array, reference: Array) -> Array:
    """Codes of a kernel with the channels last, in the reference's order of axes.

    Where the shape does not tell the two orders apart, the one with fewer differing codes is right: the wrong one is not
    off by a few codes, but scrambled.
    """
    if codes.ndim < 3 or codes.ndim != reference.ndim:
        return codes
    moved = np.moveaxis(codes, -1, 1)
    if moved.shape != reference.shape:
        return codes
    if codes.shape != reference.shape:
        return moved
    return moved if np.count_nonzero(moved != reference) < np.count_nonzero(codes != reference) else codes


def walk_fused(
    batches: Iterable[Mapping[str, Array]], fused: FusedReference, qdq: Graph, reference: Fetch
) -> Divergence | None:
    """Follow a fused graph and a Q/DQ reference tensor by tensor, in codes.

    Args:
        batches: Inputs by name.
        fused: The engine's fused graph, evaluated value by value; its exact integer reference is one.
        qdq: The Q/DQ graph that it was made from.
        reference: ``reference(feeds, names)`` gives values of `qdq` by name, such as the fake-quant twin.

    Returns:
        Tensors are named as in the float network; ``None`` if no codes can be matched.
    """
    pairs = fused_codes(fused.graph, qdq)
    if not pairs:
        return None
    titles: dict[str, str] = {}
    for tensor in read_qdq(qdq):  # one value may be rounded more than once, in different ways
        again = tensor.name in titles.values()
        titles[tensor.codes] = f"{tensor.name} ({tensor.codes})" if again else tensor.name
    walk = TensorWalk([titles[codes] for codes in pairs], dict.fromkeys(titles.values(), 1.0))
    for feeds in batches:
        wanted = reference(feeds, list(pairs))
        given = fused.run(feeds, list(dict.fromkeys(pairs.values())))
        walk.update(
            {
                titles[codes]: _like(np.asarray(given[value]), np.asarray(wanted[codes]))
                for codes, value in pairs.items()
            },
            {titles[codes]: np.asarray(wanted[codes]) for codes in pairs},
        )
    return walk.result()
