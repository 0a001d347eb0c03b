"""Iterated function systems: random contractive ones, and pictures of their attractors by the chaos game."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["AffineSystem", "attractor", "random_system"]

Array = npt.NDArray[Any]
Random = np.random.Generator


@dataclass(frozen=True)
class AffineSystem:
    """An iterated function system ``x -> matrices[k] @ x + shifts[k]``, map k chosen with probability ``weights[k]``.

    Attributes:
        matrices: [K, 2, 2]; all singular values are below 1, so the attractor exists and is unique (Hutchinson 1981).
        shifts: [K, 2].
        weights: [K], proportional to the absolute determinants, which covers the attractor evenly.
    """

    matrices: Array
    shifts: Array
    weights: Array


def random_system(random: Random) -> AffineSystem:
    """A random contractive system of 2 to 4 maps.

    Each matrix is ``R(a) diag(s1, s2) R(b) diag(+-1, +-1)`` with ``1 > s1 >= s2 >= 0``. The singular values are scaled so that
    ``sum(s1 + 2 s2)`` lies in ``[(5 + K) / 2, (6 + K) / 2]``, where attractors are neither dust nor blots.
    """
    count = int(random.integers(2, 5))
    wanted = random.uniform(0.5 * (5 + count), 0.5 * (6 + count))
    for _ in range(1000):
        first = random.uniform(0.3, 1.0, count)
        second = first * random.uniform(0.0, 1.0, count)
        factor = wanted / float(np.sum(first + 2 * second))
        if factor * first.max() < 0.98:
            first, second = first * factor, second * factor
            break
    else:  # the middle of the admissible set
        first = np.full(count, min(0.97, wanted / (2.5 * count)))
        second = 0.75 * first
    turn = random.uniform(0, 2 * math.pi, (2, count))
    sign = random.choice([-1.0, 1.0], (2, count))
    left, right = _rotations(turn[0]), _rotations(turn[1])
    matrices = left @ (np.stack([first, second], 1)[:, :, None] * right) * np.stack([sign[0], sign[1]], 1)[:, None, :]
    area = np.abs(first * second) + 1e-2
    return AffineSystem(matrices, random.uniform(-1, 1, (count, 2)), area / area.sum())


def _rotations(angles: Array) -> Array:
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)


def attractor(system: AffineSystem, random: Random, *, size: int, points: int) -> Array:
    """How often a chaos game visits each cell of a size x size grid that just holds the attractor.

    Args:
        system: The maps.
        random: Random numbers.
        size: Side of the grid.
        points: Number of visits.

    Returns:
        int64 [size, size], counts that add up to `points` rounded to whole rounds of the game.
    """
    walkers = max(64, points // 40)
    rounds = max(1, round(points / walkers))
    position = random.uniform(-1, 1, (walkers, 2))
    choice = random.choice(len(system.weights), p=system.weights, size=(rounds + 24, walkers))
    visits = np.empty((rounds, walkers, 2))
    for step, chosen in enumerate(choice):
        matrix, shift = system.matrices[chosen], system.shifts[chosen]
        position = matrix[:, :, 0] * position[:, :1] + matrix[:, :, 1] * position[:, 1:] + shift
        if step >= 24:  # by then the start is forgotten
            visits[step - 24] = position
    flat = visits.reshape(-1, 2)
    low, high = flat.min(0), flat.max(0)
    side = max(float((high - low).max()), 1e-9)
    cells = ((flat - (low + high) / 2) / side * 0.96 + 0.5) * size
    index = np.clip(cells.astype(np.int64), 0, size - 1)
    return np.bincount(index[:, 1] * size + index[:, 0], minlength=size * size).reshape(size, size)
