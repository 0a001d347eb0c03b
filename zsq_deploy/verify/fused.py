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
        that share one scale initializer with others, or that the runtime fused away, are not in it.
    """
    wanted = [tensor.codes for tensor in read_qdq(qdq) if not tensor.is_weight and tensor.quantize is not None]
    present = {value for node in fused for value in node.output}
    found = {codes: codes for codes in wanted if codes in present}
    owners: dict[str, list[str]] = {}
    for codes in wanted:
        producer = qdq.producer(codes)
        if producer is not None and len(producer.input) > 1:
            owners.setdefault(producer.input[1], []).append(codes)
    constants = set(fused.initializer_names)
    for node in fused:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        # The scale of an operand stands right behind the operand; the scale of the result behind a zero point or a bias.
        scales = [
            name
            for place, name in enumerate(node.input)
            if name in owners and (place == 0 or not node.input[place - 1] or node.input[place - 1] in constants)
        ]
        if not scales or len(owners[scales[-1]]) != 1:
            continue
        (codes,) = owners[scales[-1]]
        found.setdefault(codes, node.output[0])
    order = {codes: place for place, codes in enumerate(value for node in qdq for value in node.output)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


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
    titles = {tensor.codes: tensor.name for tensor in read_qdq(qdq)}
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
