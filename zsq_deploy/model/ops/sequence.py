"""Lists of tensors, as far as exporters use them to cut a tensor apart and to join the parts again.

A sequence is a Python list between nodes. ``torch.chunk``, ``torch.split`` and ``torch.unbind`` come out of torch's exporter as
SplitToSequence with one SequenceAt a part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsq_deploy.model.ops.registry import Kernel, Node, op

__all__: list[str] = []


@op("SplitToSequence", host=(1,))
def split_to_sequence(node: Node) -> Kernel:
    """Parts along an axis: of one length (the last may be shorter), of given lengths, or single slices."""
    axis, keep, read = int(node.get("axis", 0)), bool(node.get("keepdims", 1)), node.ints(1)
    constant = node.constant(1)
    scalar = None if constant is None else constant.ndim == 0

    def kernel(x: Tensor, given: Tensor | None = None) -> tuple[list[Tensor]]:
        lengths = read(given)
        if lengths is None:
            parts = list(torch.split(x, 1, axis))
            return (parts if keep else [part.squeeze(axis) for part in parts],)
        one = scalar if scalar is not None else given is not None and given.dim() == 0
        return (list(torch.split(x, lengths[0] if one else lengths, axis)),)

    return kernel


@op("SequenceConstruct")
def sequence_construct(_node: Node) -> Kernel:
    """A list of the given tensors."""
    return lambda *tensors: (list(tensors),)


@op("SequenceAt", host=(1,))
def sequence_at(node: Node) -> Kernel:
    """The tensor at a place; negative places count from the end."""
    read = node.ints(1)
    return lambda sequence, given: sequence[(read(given) or [0])[0]]


@op("SequenceLength")
def sequence_length(_node: Node) -> Kernel:
    """How many tensors there are, as int64 on the CPU."""
    return lambda sequence: torch.tensor(len(sequence), dtype=torch.int64)


@op("ConcatFromSequence")
def concat_from_sequence(node: Node) -> Kernel:
    """The tensors joined along an axis, or along a new one."""
    axis, new = int(node.get("axis")), bool(node.get("new_axis", 0))
    return lambda sequence: (torch.stack if new else torch.cat)(sequence, axis)
