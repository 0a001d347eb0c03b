"""Which shift of a channel brings what its activation function lets through nearest to the float network's.

In front of a Relu, means mislead. Coarse weights blur what a channel looks for: where it answered, the answer gets weaker, and where it was
far below zero it gets nearer to it. The mean over all places then says "too high", though nothing that is read is too high, and a bias lowered
by that mean cuts the answers further. What is read is ``clamp(x + shift)``, so the shift here is the one with the smallest mean square of
``clamp(quantized + shift) - clamp(float)``. Where nothing is cut off this is the difference of the means.

One number a channel needs no more than some thousand places; both networks are looked at in the same ones, so what the images differ in drops out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zsq_deploy.model.editing import is_default
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["bounds_behind", "least_squares_shift", "sampled"]

_PLACES = 4096  # of a channel, over all images
_STEPS = 16
_STAY = 16.0
"""So many places more vote for no shift: a channel that hardly ever answers is not moved on the word of a few."""


def bounds_behind(graph: Graph, value: str, limits: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
    """What the Relu or Clip that alone reads a value lets through; ``None`` where something else reads it.

    Args:
        graph: The float graph.
        value: Output of a layer.
        limits: Value -> numbers that the quantized network can hold there.
    """
    readers = graph.consumers(value)
    if len(readers) != 1 or graph.is_output(value) or not is_default(readers[0], "Relu", "Clip"):
        return None
    node = readers[0]
    low, high = 0.0, math.inf
    if node.op_type == "Clip":
        found = attributes(node)
        ends = [float(found.get("min", -math.inf)), float(found.get("max", math.inf))]
        for index in (0, 1):
            if len(node.input) > index + 1 and node.input[index + 1]:
                given = graph.constant(node.input[index + 1])
                if given is None or given.size != 1:
                    return None
                ends[index] = float(given.reshape(-1)[0])
        low, high = ends
    held = limits.get(str(node.output[0]), (-math.inf, math.inf))
    low, high = max(low, held[0]), min(high, held[1])
    return (low, high) if low < high else None


def sampled(x: Tensor, first: int, images: int) -> Tensor:
    """Some places of every image, other ones in each.

    Args:
        x: ``[N, C]``, ``[N, C, L]`` or ``[N, C, H, W]``.
        first: Number of the first image in the whole set.
        images: In the whole set.

    Returns:
        ``[C, N * P]``; the same for an image, however the set is cut into batches.
    """
    count, channels = x.shape[:2]
    if x.dim() == 2:
        return x.T.contiguous()
    total = x[0, 0].numel()
    taken = min(total, max(1, _PLACES // images))
    number = torch.arange(first, first + count, dtype=torch.float64)
    # Steps of the golden ratio spread the first places of all images evenly.
    start = ((number * 0.6180339887498949) % 1.0 * total).long()
    places = (start[:, None] + torch.arange(taken) * total // taken) % total
    places = places.to(x.device)
    rows = torch.arange(count, device=x.device)[:, None]
    found = x[rows, :, places] if x.dim() == 3 else x[rows, :, places // x.shape[3], places % x.shape[3]]
    return found.permute(2, 0, 1).reshape(channels, -1)


def least_squares_shift(found: Tensor, wanted: Tensor, low: float, high: float) -> Tensor:
    """The shift of each channel with the smallest squared error behind the activation function.

    Steps are those of Newton's method where the number of places that are cut off stays; the best one on the way counts, and it is never worse than none.

    Args:
        found: In front of the activation function, quantized: ``[C, n]``.
        wanted: Behind the activation function, float: ``[C, n]``.
        low: What the activation function lets through at least.
        high: What it lets through at most.

    Returns:
        float64 ``[C]``.
    """
    shift = torch.zeros(len(found), dtype=torch.float64, device=found.device)
    best, least = shift, torch.full_like(shift, math.inf)
    for _ in range(_STEPS):
        moved = found + shift[:, None].to(found.dtype)
        error = moved.clamp(low, high) - wanted
        cost = error.square().sum(1, dtype=torch.float64) + _STAY * shift.square()
        better = cost < least
        best, least = torch.where(better, shift, best), torch.where(better, cost, least)
        inside = (moved > low) & (moved < high)
        slope = (error * inside).sum(1, dtype=torch.float64) + _STAY * shift
        shift = shift - slope / (inside.sum(1) + _STAY)
    return best
