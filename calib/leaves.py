"""Opaque shapes that hide each other: which one is seen at which pixel, and what its surface looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from zsq_deploy.calib.textures import TILE

__all__ = [
    "Leaves",
    "Look",
    "join",
    "leaf_map",
    "power_law_radii",
    "random_look",
    "random_object",
    "scatter",
    "surfaces",
]

Array = npt.NDArray[Any]
Random = np.random.Generator


@dataclass(frozen=True)
class Leaves:
    """Shapes in the order in which they are laid down.

    Attributes:
        radii: [K], pixels.
        centres: [K, 2], pixels (x, y).
        outlines: K polygons [P, 2] around the origin, for radius 1; ``None`` is a disc.
        groups: [K]; shapes of one group have the same surface.
    """

    radii: Array
    centres: Array
    outlines: Sequence[Array | None]
    groups: Array


@dataclass(frozen=True)
class Look:
    """What the surfaces of one picture have in common."""

    palette: Array  # [P, 3] opponent coordinates, luminance 0..1 (as gray level), chroma around 0
    texture: float  # typical texture contrast
    shading: float  # typical shading contrast


def random_look(random: Random) -> Look:
    """Colours that belong together, and how much texture and shading there is."""
    count = int(random.integers(3, 12))
    mean = random.beta(2.5, 2.7)
    spread = math.exp(random.normal(math.log(0.2), 0.35))
    saturation = math.exp(random.normal(math.log(0.1), 0.6))
    # daylight scenes lean to yellow: earth, wood, skin and dry leaves more often than sky and water
    cast = (0.04 + random.normal(0, 0.05), random.normal(0, 0.025))
    luminance = mean + spread * random.standard_normal(count)
    chroma = cast + saturation * random.standard_t(4, (count, 2)) * (1.0, 0.5)
    return Look(
        np.column_stack([luminance, np.clip(chroma, -0.6, 0.6)]).astype(np.float32),
        texture=math.exp(random.normal(math.log(0.08), 0.7)),
        shading=math.exp(random.normal(math.log(0.12), 0.6)),
    )


def power_law_radii(random: Random, count: int, low: float, high: float) -> Array:
    """Radii with density proportional to r^-3 between two bounds, by inverting the distribution function."""
    u = random.random(count)
    return np.asarray((low**-2 - u * (low**-2 - high**-2)) ** -0.5)


def scatter(random: Random, radii: Array, centres: Array) -> Leaves:
    """Shapes of all kinds, each with a surface of its own."""
    kinds = random.choice(len(_KINDS), p=_KINDS, size=len(radii)).tolist()
    outlines = [
        _outline(random, kind, float(radius)) if radius >= 3 or kind == 0 else _SQUARE
        for kind, radius in zip(kinds, radii, strict=True)
    ]
    return Leaves(radii, centres, outlines, np.arange(len(radii)))


_KINDS = (0.25, 0.2, 0.15, 0.3, 0.1)  # disc, rectangle, irregular polygon, visual atom, stroke
_SQUARE = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
_STROKE = np.array([[-2.5, -0.12], [2.5, -0.12], [2.5, 0.12], [-2.5, 0.12]])


def _outline(random: Random, kind: int, radius: float) -> Array | None:
    """A random polygon of one kind, turned and, but for strokes, flattened."""
    if kind == 0:
        return None
    if kind == 1:
        outline = _SQUARE
    elif kind == 2:
        angles = np.sort(random.uniform(0, 2 * math.pi, int(random.integers(3, 8))))
        outline = np.column_stack([np.cos(angles), np.sin(angles)])
    elif kind == 3:
        outline = _atom(random, 72 if radius > 20 else 36)
    else:
        outline = _STROKE
    turn, aspect = random.uniform(0, 2 * math.pi), math.exp(random.uniform(-1.1, 0)) if kind < 4 else 1.0
    cos, sin = math.cos(turn), math.sin(turn)
    return np.asarray(outline @ np.array([[cos, sin], [-sin * aspect, cos * aspect]]))


def _atom(random: Random, points: int) -> Array:
    """A closed contour: the unit circle with a radius modulated by two sinusoids of whole frequencies."""
    angle = np.linspace(0, 2 * math.pi, points, endpoint=False)
    slow, fast = random.integers(1, 7), random.integers(3, 20)
    wave = random.uniform(0, 0.5) * np.sin(slow * angle + random.uniform(0, 6.3))
    wave += random.uniform(0, 0.25) * np.sin(fast * angle + random.uniform(0, 6.3))
    radius = (1 + wave)[:, None]
    return np.asarray(radius * np.column_stack([np.cos(angle), np.sin(angle)]))


def random_object(random: Random, place: Array, size: float, *, small: bool) -> Leaves:
    """A thing: a shape with parts on it; made of rings, as eyes, wheels and flowers are; the same on both sides, as animals
    and tools are; or one shape repeated in rows, as windows, keys and scales are.

    Args:
        random: Random numbers.
        place: Its centre [x, y], pixels.
        size: Its radius, pixels.
        small: The picture is too small for many parts.
    """
    kind = random.random()
    if kind < 0.2:
        return _rings(random, place, size)
    if kind < 0.35:
        return _rows(random, place, size)
    parts = int(random.integers(1, 10 if small else 24))
    offsets = size * 0.6 * random.standard_normal((parts, 2))
    radii = size * power_law_radii(random, parts, 0.06, 0.7)
    pieces = scatter(random, np.concatenate([[size], radii]), np.concatenate([[place], place + offsets]))
    if kind < 0.7:
        return pieces
    return _mirrored(random, pieces, place)


def _rings(random: Random, place: Array, size: float) -> Leaves:
    """One contour inside the other, with surfaces that take turns."""
    count, kinds = int(random.integers(3, 9)), int(random.integers(2, 4))
    outline = _outline(random, int(random.choice([0, 0, 1, 3, 3])), size)
    radii = size * (1 - np.arange(count) / count) ** random.uniform(0.7, 1.5)
    return Leaves(radii, np.tile(place, (count, 1)), [outline] * count, np.arange(count) % kinds)


def _rows(random: Random, place: Array, size: float) -> Leaves:
    """One or two shapes again and again, on a background of their own."""
    rows, columns = (int(n) for n in random.integers(1, 7, 2))
    pitch = 2 * size / max(rows, columns)
    y, x = np.mgrid[0:rows, 0:columns].reshape(2, -1)
    turn = random.choice([0.0, random.uniform(0, 2 * math.pi)])
    grid = np.column_stack([x - (columns - 1) / 2, y - (rows - 1) / 2]) * pitch
    grid = grid @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    shapes = [_outline(random, int(kind), pitch) for kind in random.integers(0, 4, 2)]
    which = (x + y) % 2 if random.random() < 0.4 else np.zeros(len(x), np.int64)
    radius = pitch * random.uniform(0.25, 0.55)
    return Leaves(
        np.concatenate([[1.3 * size], np.full(len(grid), radius)]),
        np.concatenate([[place], place + grid]),
        [_outline(random, 1, size), *(shapes[index] for index in which)],
        np.concatenate([[2], which]),
    )


def _mirrored(random: Random, pieces: Leaves, place: Array) -> Leaves:
    """Every part a second time, on the other side of an axis through the first one."""
    angle = random.uniform(0, math.pi)
    normal = np.array([math.cos(angle), math.sin(angle)])
    flip = np.eye(2) - 2 * np.outer(normal, normal)
    twins = [None if outline is None else outline @ flip for outline in pieces.outlines[1:]]
    return Leaves(
        np.concatenate([pieces.radii, pieces.radii[1:]]),
        np.concatenate([pieces.centres, (pieces.centres[1:] - place) @ flip + place]),
        [*pieces.outlines, *twins],
        np.concatenate([pieces.groups, pieces.groups[1:]]),
    )


def join(objects: Sequence[Leaves]) -> Leaves:
    """Several sets of leaves, one after the other; groups stay apart."""
    groups, first = [], 0
    for each in objects:
        groups.append(each.groups + first)
        first += int(each.groups.max()) + 1
    return Leaves(
        np.concatenate([each.radii for each in objects]),
        np.concatenate([each.centres for each in objects]),
        [outline for each in objects for outline in each.outlines],
        np.concatenate(groups),
    )


def leaf_map(leaves: Leaves, height: int, width: int) -> Array:
    """Which leaf is seen where.

    Returns:
        int32 [height, width]: 0 where there is none, k + 1 for leaf k.
    """
    canvas = Image.new("I", (width, height), 0)
    draw = ImageDraw.Draw(canvas)
    shapes = zip(leaves.radii.tolist(), leaves.centres, leaves.outlines, strict=True)
    for number, (radius, centre, outline) in enumerate(shapes, start=1):
        if outline is None:
            x, y = centre.tolist()
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=number)
        else:
            draw.polygon((outline * radius + centre).ravel().tolist(), fill=number)
    return np.asarray(canvas, dtype=np.int32)


def surfaces(random: Random, look: Look, leaves: Leaves, seen: Array, textures: Array, scale: float) -> Array:
    """Colour, shading and texture of everything in a map of leaves.

    Args:
        random: Random numbers.
        look: What the surfaces have in common.
        leaves: The leaves.
        seen: Their map [H, W], see :func:`leaf_map`.
        textures: Periodic textures [T, TILE, TILE].
        scale: Size of the picture in tiles, so that textures look the same at any resolution.

    Returns:
        float32 [H, W, 3]: gray level (0 black, 1 white), blue-yellow, red-green.
    """
    height, width = seen.shape
    group = np.concatenate([[0], leaves.groups + 1])
    count = int(group.max()) + 1
    chosen = random.integers(0, len(look.palette), count)
    colour = (look.palette[chosen] + random.standard_normal((count, 3)) * (0.06, 0.02, 0.012))[group]
    light = random.uniform(0, 2 * math.pi)  # one light for the whole picture, roughly
    direction = (light + 0.5 * random.standard_normal(count))[group]
    slope = (look.shading * random.exponential(1.0, count))[group]
    bulge = (0.7 * look.shading * random.exponential(1.0, count))[group]
    kind = random.integers(0, len(textures), count)[group]
    strength = (look.texture * random.exponential(1.0, count))[group]
    zoom = (np.exp(random.uniform(-1.0, 1.8, count)) / scale)[group]
    turn = random.uniform(0, 2 * math.pi, count)[group]
    offset = random.uniform(0, TILE, (count, 2))[group]
    tint = (0.35 * random.standard_normal((count, 2)))[group]
    x0 = np.concatenate([[width / 2], leaves.centres[:, 0]])
    y0 = np.concatenate([[height / 2], leaves.centres[:, 1]])
    r0 = np.concatenate([[max(height, width)], np.maximum(leaves.radii, 1.0)])
    slope, round_off = slope / r0, bulge / r0**2

    table = np.stack(
        [
            colour[:, 0] - slope * (np.cos(direction) * x0 + np.sin(direction) * y0) + 0.4 * bulge,
            slope * np.cos(direction),
            slope * np.sin(direction),
            round_off,
            x0,
            y0,
            np.cos(turn) * zoom,
            np.sin(turn) * zoom,
            offset[:, 0],
            offset[:, 1],
            strength,
        ]
    ).astype(np.float32)
    base, gx, gy, fall, cx, cy, c, s, ox, oy, amplitude = (row.take(seen) for row in table)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    dx, dy = x - cx, y - cy
    u = (c * dx - s * dy + ox).astype(np.int32) & (TILE - 1)
    v = (s * dx + c * dy + oy).astype(np.int32) & (TILE - 1)
    cell = (kind.astype(np.int32) * (TILE * TILE)).take(seen) + v * TILE + u
    pattern = textures.reshape(-1).take(cell) * amplitude
    out = np.empty((height, width, 3), np.float32)
    out[..., 0] = base + gx * x + gy * y - fall * (dx * dx + dy * dy) + pattern
    chroma = np.concatenate([colour[:, 1:], tint], 1).astype(np.float32).T.copy()
    for channel in (0, 1):
        out[..., 1 + channel] = chroma[channel].take(seen) + chroma[2 + channel].take(seen) * pattern
    return out
