"""A bank of periodic textures and of fractals, made once a process from fixed random numbers."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.calib.attractors import attractor, random_system
from zsq_deploy.calib.baselines import image_generator

__all__ = ["TILE", "bank"]

Array = npt.NDArray[Any]
Random = np.random.Generator

TILE = 128
"""Side of a texture and of a fractal's density, in cells."""

_EACH = 24  # of each kind; twice as many of noise and of fractals


@lru_cache(maxsize=1)
def bank() -> tuple[Array, Array]:
    """The textures and fractals that all pictures choose from, always the same ones; how they are placed makes the variety.

    Takes about half a second, once a process.

    Returns:
        Periodic textures [4 * _EACH, TILE, TILE] with mean 0 and deviation 1 (clipped at 3), and fractal densities
        [2 * _EACH, TILE, TILE] from 0 to 1; both float32.
    """
    random = image_generator("fractal", 0, 2**31, 0)
    noise = [_power_noise(random) for _ in range(2 * _EACH)]
    waves = [_waves(random) for _ in range(_EACH)]
    cells = [_cells(random) for _ in range(_EACH)]
    textures = np.stack([*noise, *waves, *cells])
    textures -= textures.mean((1, 2), keepdims=True)
    textures /= textures.std((1, 2), keepdims=True) + 1e-6
    fractals: list[Array] = []
    while len(fractals) < 2 * _EACH:
        density = np.log1p(attractor(random_system(random), random, size=TILE, points=3 * TILE * TILE))
        if np.count_nonzero(density) > 0.04 * TILE * TILE:  # else a speck or a line
            fractals.append(np.clip(density / np.quantile(density[density > 0], 0.99), 0, 1))
    return np.clip(textures, -3, 3).astype(np.float32), np.stack(fractals).astype(np.float32)


def _power_noise(random: Random) -> Array:
    """Noise whose amplitude falls as 1/f^a, a from 0.6 to 1.6 (photographs: about 1), some of it stretched."""
    frequency = np.fft.fftfreq(TILE) * TILE
    fy, fx = frequency[:, None], frequency[None, :]
    angle, stretch = random.uniform(0, math.pi), math.exp(random.uniform(0, 1.6))
    along = fx * math.cos(angle) + fy * math.sin(angle)
    across = fy * math.cos(angle) - fx * math.sin(angle)
    radius = np.sqrt((along * stretch) ** 2 + (across / stretch) ** 2) if random.random() < 0.5 else np.hypot(fx, fy)
    amplitude = np.maximum(radius, 1.0) ** -random.uniform(0.6, 1.6)
    amplitude[0, 0] = 0
    spectrum = amplitude * np.exp(2j * math.pi * random.random((TILE, TILE)))
    return np.asarray(np.fft.ifft2(spectrum).real)


def _waves(random: Random) -> Array:
    """One to three gratings (whole periods a tile), smooth or hard: stripes, grids, weave."""
    y, x = np.mgrid[0:TILE, 0:TILE] * (2 * math.pi / TILE)
    field = np.zeros((TILE, TILE))
    for _ in range(int(random.integers(1, 4))):
        kx, ky = random.integers(-12, 13, 2)
        field += np.sin(kx * x + max(ky, 1) * y + random.uniform(0, 2 * math.pi) + random.uniform(0, 1) * np.sin(x + y))
    return np.asarray(np.tanh(field * math.exp(random.uniform(-1, 2.5))))


def _cells(random: Random) -> Array:
    """Distance to the nearest of scattered points (Worley 1996): pebbles, scales, spots."""
    count = int(random.integers(6, 60))
    spots = random.integers(0, TILE, (count, 2))
    axis = np.arange(TILE)
    dy = np.abs(axis[None, :] - spots[:, :1])
    dx = np.abs(axis[None, :] - spots[:, 1:])
    dy, dx = np.minimum(dy, TILE - dy), np.minimum(dx, TILE - dx)  # periodic
    nearest = np.full((TILE, TILE), np.inf)
    second = nearest.copy()
    mosaic = np.zeros((TILE, TILE))
    shades = random.standard_normal(count)
    for column, row, shade in zip(dy, dx, shades, strict=True):
        distance = np.hypot(column[:, None], row)
        mosaic[distance < nearest] = shade
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    kind = random.random()
    if kind < 0.4:
        return nearest
    return second - nearest if kind < 0.7 else mosaic
