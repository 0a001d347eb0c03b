"""Images from formulas: fractals, textured shapes and dead leaves with the statistics of photographs, without a photograph.

What a network's layers answer to is edges, colours, textures and contrasts at all scales; noise has next to none of them. The
``fractal`` baseline draws pictures that do, from random numbers only:

* **Fractals**: attractors of random iterated function systems of 2 to 4 affine maps, played as a chaos game and coloured by
  density (Kataoka et al., "Pre-training without natural images", ACCV 2020). The maps are sampled by their singular values with
  bounds on a weighted sum of them, which avoids the many systems that collapse to a speck (Anderson and Farrell, "Improving
  fractal pre-training", WACV 2022). A bank of 48 of them is made once; each picture places some, turned, stretched and recoloured.
* **Visual atoms**: closed contours whose radius is modulated by two sinusoids of whole frequencies (Takashima et al., "Visual
  atoms: pre-training vision transformers with sinusoidal waves", CVPR 2023). The paper draws thin nested orbits; here each
  contour is one filled shape among others.
* **Dead leaves**: shapes that hide each other, with sizes drawn from a density proportional to r^-3 between two bounds. The
  result is scale invariant and has the heavy-tailed edges and the 1/f spectrum of photographs (Ruderman, "Origins of scaling in
  natural images", Vision Research 1997; Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001).
* **Surfaces**: each leaf has a colour from the picture's small palette, shading (a plane plus a bulge), and a texture (power-law
  noise, gratings, cells) at its own scale and direction. Luminance varies most, blue-yellow less and red-green least
  (Ruderman, Cronin and Chiao, "Statistics of cone responses to natural images", JOSA A 1998).
* **Camera**: a blurred background behind sharp objects, light that changes across the picture, contrast and brightness that
  change from picture to picture, over- and under-exposure included.

The parameters come from these papers and from what is published of photographs in general (mid gray on average, an RMS contrast
of about 0.2, few clipped pixels, standard deviations of about 7 : 2 : 1 along luminance, blue-yellow and red-green); none was
fitted to a network or to evaluation images. Pictures are drawn at twice the resolution and averaged, so edges are as smooth as a
lens leaves them. Each picture depends on (seed, stream, index) and its size only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from zsq_deploy.calib.baselines import PixelPreprocess, image_generator, image_shape
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import TensorSpec

__all__ = ["AffineSystem", "attractor", "fractal", "random_system", "render"]

Array = npt.NDArray[Any]
Random = np.random.Generator

_LARGEST_CANVAS = 640  # pixels on the long side; larger pictures are drawn at this size and enlarged
_TEXTURES = 24  # of each kind in the bank
_TILE = 128  # side of a texture; they are periodic

# Rows: luminance, blue-yellow, red-green. An orthonormal opponent basis (Ruderman et al. 1998, without the logarithm).
_OPPONENT = np.array(
    [
        [1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)],
        [1 / math.sqrt(6), 1 / math.sqrt(6), -2 / math.sqrt(6)],
        [1 / math.sqrt(2), -1 / math.sqrt(2), 0.0],
    ],
    np.float32,
)


# ---------------------------------------------------------------------------------------------------------------------
# iterated function systems
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# textures
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _bank() -> tuple[Array, Array]:
    """The textures and fractals that all pictures choose from, always the same ones; how they are placed makes the variety.

    Takes about half a second, once a process.

    Returns:
        Periodic textures [4 * _TEXTURES, _TILE, _TILE] with mean 0 and deviation 1 (clipped at 3), and fractal densities
        [2 * _TEXTURES, _TILE, _TILE] from 0 to 1; both float32.
    """
    random = image_generator("fractal", 0, 2**31, 0)
    noise = [_power_noise(random) for _ in range(2 * _TEXTURES)]
    waves = [_waves(random) for _ in range(_TEXTURES)]
    cells = [_cells(random) for _ in range(_TEXTURES)]
    textures = np.stack([*noise, *waves, *cells])
    textures -= textures.mean((1, 2), keepdims=True)
    textures /= textures.std((1, 2), keepdims=True) + 1e-6
    fractals: list[Array] = []
    while len(fractals) < 2 * _TEXTURES:
        density = np.log1p(attractor(random_system(random), random, size=_TILE, points=3 * _TILE * _TILE))
        if np.count_nonzero(density) > 0.04 * _TILE * _TILE:  # else a speck or a line
            fractals.append(np.clip(density / np.quantile(density[density > 0], 0.99), 0, 1))
    return np.clip(textures, -3, 3).astype(np.float32), np.stack(fractals).astype(np.float32)


def _power_noise(random: Random) -> Array:
    """Noise whose amplitude falls as 1/f^a, a from 0.6 to 1.6 (photographs: about 1), some of it stretched."""
    frequency = np.fft.fftfreq(_TILE) * _TILE
    fy, fx = frequency[:, None], frequency[None, :]
    angle, stretch = random.uniform(0, math.pi), math.exp(random.uniform(0, 1.6))
    along = fx * math.cos(angle) + fy * math.sin(angle)
    across = fy * math.cos(angle) - fx * math.sin(angle)
    radius = np.sqrt((along * stretch) ** 2 + (across / stretch) ** 2) if random.random() < 0.5 else np.hypot(fx, fy)
    amplitude = np.maximum(radius, 1.0) ** -random.uniform(0.6, 1.6)
    amplitude[0, 0] = 0
    spectrum = amplitude * np.exp(2j * math.pi * random.random((_TILE, _TILE)))
    return np.asarray(np.fft.ifft2(spectrum).real)


def _waves(random: Random) -> Array:
    """One to three gratings (whole periods a tile), smooth or hard: stripes, grids, weave."""
    y, x = np.mgrid[0:_TILE, 0:_TILE] * (2 * math.pi / _TILE)
    field = np.zeros((_TILE, _TILE))
    for _ in range(int(random.integers(1, 4))):
        kx, ky = random.integers(-12, 13, 2)
        field += np.sin(kx * x + max(ky, 1) * y + random.uniform(0, 2 * math.pi) + random.uniform(0, 1) * np.sin(x + y))
    return np.asarray(np.tanh(field * math.exp(random.uniform(-1, 2.5))))


def _cells(random: Random) -> Array:
    """Distance to the nearest of scattered points (Worley 1996): pebbles, scales, spots."""
    count = int(random.integers(6, 60))
    spots = random.integers(0, _TILE, (count, 2))
    axis = np.arange(_TILE)
    dy = np.abs(axis[None, :] - spots[:, :1])
    dx = np.abs(axis[None, :] - spots[:, 1:])
    dy, dx = np.minimum(dy, _TILE - dy), np.minimum(dx, _TILE - dx)  # periodic
    nearest = np.full((_TILE, _TILE), np.inf)
    second = nearest.copy()
    mosaic = np.zeros((_TILE, _TILE))
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


# ---------------------------------------------------------------------------------------------------------------------
# one picture
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What the surfaces of one picture have in common."""

    palette: Array  # [P, 3] opponent coordinates, luminance 0..1 (as gray level), chroma around 0
    texture: float  # typical texture contrast
    shading: float  # typical shading contrast


def _random_look(random: Random) -> _Look:
    count = int(random.integers(3, 12))
    mean = random.beta(2.5, 2.7)
    spread = math.exp(random.normal(math.log(0.2), 0.35))
    saturation = math.exp(random.normal(math.log(0.1), 0.6))
    # daylight scenes lean to yellow: earth, wood, skin and dry leaves more often than sky and water
    cast = (0.04 + random.normal(0, 0.05), random.normal(0, 0.025))
    luminance = mean + spread * random.standard_normal(count)
    chroma = cast + saturation * random.standard_t(4, (count, 2)) * (1.0, 0.5)
    return _Look(
        np.column_stack([luminance, np.clip(chroma, -0.6, 0.6)]).astype(np.float32),
        texture=math.exp(random.normal(math.log(0.08), 0.7)),
        shading=math.exp(random.normal(math.log(0.12), 0.6)),
    )


def _power_law_radii(random: Random, count: int, low: float, high: float) -> Array:
    """Radii with density proportional to r^-3 between two bounds, by inverting the distribution function."""
    u = random.random(count)
    return np.asarray((low**-2 - u * (low**-2 - high**-2)) ** -0.5)


def _leaf_map(random: Random, height: int, width: int, radii: Array, centres: Array) -> Array:
    """Draw opaque shapes in order; every pixel gets the number of the shape that is seen there (0: none)."""
    canvas = Image.new("I", (width, height), 0)
    draw = ImageDraw.Draw(canvas)
    kinds = random.choice(5, p=[0.25, 0.2, 0.15, 0.3, 0.1], size=len(radii))
    turns = random.uniform(0, 2 * math.pi, len(radii))
    aspects = np.exp(random.uniform(-1.1, 0, len(radii)))
    for number, (radius, (x, y), kind, turn, aspect) in enumerate(
        zip(radii.tolist(), centres.tolist(), kinds.tolist(), turns.tolist(), aspects.tolist(), strict=True), start=1
    ):
        if kind == 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=number)
            continue
        if radius < 3:  # a few pixels: the shape cannot be seen
            draw.rectangle((x - radius, y - radius * aspect, x + radius, y + radius * aspect), fill=number)
            continue
        if kind == 1:  # rectangle
            outline = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
        elif kind == 2:  # irregular polygon
            angles = np.sort(random.uniform(0, 2 * math.pi, int(random.integers(3, 8))))
            outline = np.column_stack([np.cos(angles), np.sin(angles)])
        elif kind == 3:  # visual atom
            outline = _atom(random, 72 if radius > 20 else 36)
        else:  # a stroke
            outline = np.array([[-2.5, -0.12], [2.5, -0.12], [2.5, 0.12], [-2.5, 0.12]])
            aspect = 1.0
        cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
        matrix = np.array([[cos, sin], [-sin * aspect, cos * aspect]])
        points = outline @ matrix + (x, y)
        draw.polygon(points.ravel().tolist(), fill=number)
    return np.asarray(canvas, dtype=np.int32)


def _atom(random: Random, points: int) -> Array:
    """A closed contour: the unit circle with a radius modulated by two sinusoids of whole frequencies."""
    angle = np.linspace(0, 2 * math.pi, points, endpoint=False)
    slow, fast = random.integers(1, 7), random.integers(3, 20)
    wave = random.uniform(0, 0.5) * np.sin(slow * angle + random.uniform(0, 6.3))
    wave += random.uniform(0, 0.25) * np.sin(fast * angle + random.uniform(0, 6.3))
    radius = (1 + wave)[:, None]
    return np.asarray(radius * np.column_stack([np.cos(angle), np.sin(angle)]))


def _surfaces(
    random: Random, look: _Look, leaves: Array, radii: Array, centres: Array, textures: Array, scale: float
) -> Array:
    """Colour, shading and texture for a map of leaves: opponent coordinates [H, W, 3]."""
    count = len(radii) + 1
    height, width = leaves.shape
    chosen = random.integers(0, len(look.palette), count)
    colour = look.palette[chosen] + random.standard_normal((count, 3)).astype(np.float32) * (0.06, 0.02, 0.012)
    x0 = np.concatenate([[width / 2], centres[:, 0]])
    y0 = np.concatenate([[height / 2], centres[:, 1]])
    r0 = np.concatenate([[max(height, width)], np.maximum(radii, 1.0)])
    light = random.uniform(0, 2 * math.pi)  # one light for the whole picture, roughly
    direction = light + 0.5 * random.standard_normal(count)
    slope = look.shading * random.exponential(1.0, count) / r0
    bulge = 0.7 * look.shading * random.exponential(1.0, count) / r0**2
    kind = random.integers(0, len(textures), count)
    strength = look.texture * random.exponential(1.0, count)
    zoom = np.exp(random.uniform(-1.0, 1.8, count)) / scale
    turn = random.uniform(0, 2 * math.pi, count)
    offset = random.uniform(0, _TILE, (2, count))
    tint = 0.35 * random.standard_normal((count, 2))

    table = np.stack(
        [
            colour[:, 0] - slope * (np.cos(direction) * x0 + np.sin(direction) * y0) + bulge * r0**2 * 0.4,
            slope * np.cos(direction),
            slope * np.sin(direction),
            bulge,
            x0,
            y0,
            np.cos(turn) * zoom,
            np.sin(turn) * zoom,
            offset[0],
            offset[1],
            strength,
        ]
    ).astype(np.float32)
    base, gx, gy, round_, cx, cy, c, s, ox, oy, amp = (row.take(leaves) for row in table)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    dx, dy = x - cx, y - cy
    u = (c * dx - s * dy + ox).astype(np.int32) & (_TILE - 1)
    v = (s * dx + c * dy + oy).astype(np.int32) & (_TILE - 1)
    flat = (kind.astype(np.int32) * (_TILE * _TILE)).take(leaves) + v * _TILE + u
    pattern = textures.reshape(-1).take(flat) * amp
    out = np.empty((height, width, 3), np.float32)
    out[..., 0] = base + gx * x + gy * y - round_ * np.minimum(dx * dx + dy * dy, 4e6) + pattern
    chroma = np.concatenate([colour[:, 1:], tint], 1).astype(np.float32).T.copy()
    for channel in (0, 1):
        out[..., 1 + channel] = chroma[channel].take(leaves) + chroma[2 + channel].take(leaves) * pattern
    return out


def _place_fractal(random: Random, look: _Look, picture: Array, fractals: Array) -> None:
    """Put one fractal into the picture, turned, stretched, coloured along its density."""
    height, width = picture.shape[:2]
    side = min(height, width)
    radius = side * random.uniform(0.12, 0.7)
    x0, y0 = random.uniform(0, width), random.uniform(0, height)
    left, right = max(0, int(x0 - radius)), min(width, int(x0 + radius) + 1)
    top, bottom = max(0, int(y0 - radius)), min(height, int(y0 + radius) + 1)
    if right - left < 2 or bottom - top < 2:
        return
    density = fractals[random.integers(len(fractals))]
    turn, stretch = random.uniform(0, 2 * math.pi), math.exp(random.uniform(-0.5, 0.5))
    x = (np.arange(left, right, dtype=np.float32) - np.float32(x0)) / np.float32(radius)
    y = (np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y0)) / np.float32(radius)
    u = ((math.cos(turn) * x - math.sin(turn) * y) * (0.5 * stretch) + 0.5) * _TILE
    v = ((math.sin(turn) * x + math.cos(turn) * y) * (0.5 / stretch) + 0.5) * _TILE
    inside = (u >= 0) & (u < _TILE) & (v >= 0) & (v < _TILE)
    cells = np.clip(v, 0, _TILE - 1).astype(np.int32) * _TILE + np.clip(u, 0, _TILE - 1).astype(np.int32)
    value = np.where(inside, density.reshape(-1)[cells], 0)
    ends = look.palette[random.integers(0, len(look.palette), 2)].copy()
    ends[:, 0] += random.normal(0, 0.25, 2)
    opacity = np.clip(value * random.uniform(1.5, 6), 0, 1)[..., None]
    colour = ends[0] + value[..., None] * (ends[1] - ends[0])
    part = picture[top:bottom, left:right]
    part += opacity * (colour - part)


def _draw(random: Random, height: int, width: int, bank: tuple[Array, Array]) -> Array:
    """One picture as RGB levels 0..1, float32 [H, W, 3], not yet averaged down."""
    textures, fractals = bank
    look = _random_look(random)
    side = min(height, width)

    # far: dead leaves from the size of the picture down to a few pixels, drawn small and enlarged where it is out of focus
    blur = int(random.choice([1, 2, 4, 8], p=[0.55, 0.2, 0.15, 0.1]))
    blur = max(1, min(blur, side // 16))
    h, w = -(-height // blur), -(-width // blur)
    smallest = max(0.01, 1.5 / min(h, w)) * min(h, w) * math.exp(random.uniform(0, 1.7))
    count = int(random.integers(80, 400) * min(1.0, max(0.3, min(h, w) / 200)))  # small pictures are full sooner
    radii = _power_law_radii(random, count, smallest, 0.6 * min(h, w))
    centres = random.uniform(-0.1, 1.1, (len(radii), 2)) * (w, h)
    leaves = _leaf_map(random, h, w, radii, centres)
    picture = _surfaces(random, look, leaves, radii, centres, textures, side / _TILE / blur)
    if blur > 1:
        planes = [
            Image.fromarray(picture[..., plane]).resize((width, height), Image.Resampling.BICUBIC) for plane in range(3)
        ]
        picture = np.stack([np.asarray(plane) for plane in planes], -1)

    # near: a few large sharp objects, each with parts
    objects = int(random.integers(0, 5))
    if objects:
        sizes, places = [], []
        for _ in range(objects):
            place, size = random.uniform(0.1, 0.9, 2) * (width, height), side * random.uniform(0.12, 0.5)
            parts = int(random.integers(1, 24 if side > 100 else 10))
            sizes.append(np.concatenate([[size], size * _power_law_radii(random, parts, 0.06, 0.7)]))
            places.append(np.concatenate([[place], place + size * 0.6 * random.standard_normal((parts, 2))]))
        radii, centres = np.concatenate(sizes), np.concatenate(places)
        leaves = _leaf_map(random, height, width, radii, centres)
        front = _surfaces(
            random,
            look if random.random() < 0.5 else _random_look(random),
            leaves,
            radii,
            centres,
            textures,
            side / _TILE,
        )
        picture = np.where((leaves > 0)[..., None], front, picture)
    for _ in range(int(random.integers(0, 4))):
        _place_fractal(random, look, picture, fractals)

    # light across the picture, then exposure
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    gain = random.normal(0, 0.12, 3)
    picture[..., 0] += gain[0] * x + gain[1] * y - abs(gain[2]) * (x * x + y * y)
    contrast, shift = math.exp(random.normal(0.0, 0.3)), random.normal(0, 0.06)
    luminance = 2 * contrast * (picture[..., 0] - 0.5) + 2 * shift
    # film and sensors roll off towards black and white instead of cutting; a little beyond 0..1 is left to be cut
    picture[..., 0] = math.sqrt(3) * (
        0.5 + 0.54 * np.tanh(luminance)
    )  # gray level g has the opponent luminance g sqrt(3)
    return np.clip(picture @ _OPPONENT, 0, 1)


def render(height: int, width: int, channels: int, *, seed: int, index: int, stream: int = 0) -> Array:
    """One picture.

    Args:
        height: In pixels.
        width: In pixels.
        channels: 3 for RGB, 1 for gray (ITU-R BT.601 luma of the colour picture).
        seed: Seed.
        index: Number of the picture.
        stream: Number of the network's input.

    Returns:
        uint8 [height, width, channels].
    """
    random = image_generator("fractal", seed, stream, index)
    long_side = max(height, width)
    fine = 2 if 2 * long_side <= _LARGEST_CANVAS else 1
    scale = min(1.0, _LARGEST_CANVAS / long_side) * fine
    canvas = max(8, round(height * scale)), max(8, round(width * scale))
    picture = _draw(random, *canvas, _bank())
    if canvas == (2 * height, 2 * width):
        rows = picture[0::2] + picture[1::2]
        picture = (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)
    picture = picture * 255
    if picture.shape[:2] != (height, width):
        planes = [
            Image.fromarray(np.ascontiguousarray(picture[..., plane])).resize((width, height), Image.Resampling.BICUBIC)
            for plane in range(3)
        ]
        picture = np.stack([np.asarray(plane) for plane in planes], -1)
    # a sensor's noise, a level or so, also breaks flat areas up
    picture = picture + random.standard_normal(picture.shape, dtype=np.float32) * np.float32(random.exponential(1.2))
    if channels == 1:
        picture = (picture @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    levels: Array = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return levels


def fractal(
    spec: TensorSpec, images: int, *, seed: int, preprocess: PixelPreprocess, offset: int = 0, stream: int = 0
) -> Array:
    """Fractals, visual atoms and dead leaves as network input.

    Args:
        spec: The network input: gray or colour images of known size.
        images: Number of pictures.
        seed: Seed.
        preprocess: Turns pixels into network input.
        offset: Number of the first picture.
        stream: Number of the network's input.

    Returns:
        [images, C, H, W] of the spec's type.

    Raises:
        CalibrationError: The input is no image.
    """
    shape = image_shape(spec)
    if shape is None or spec.dtype.kind != "f":
        raise CalibrationError(
            f"fractals are pictures, but input {spec.name!r} is {spec.dtype} {_say(spec.shape)}: "
            "not N x 1 x H x W or N x 3 x H x W floating-point values of known size",
            where=spec.name,
            remedy="say the size with --input-shape if it is not fixed; for other inputs choose --method gaussian or zeroq",
        )
    if images < 1:
        raise CalibrationError(f"{images} images were asked for", where="--images", remedy="ask for 1 or more")
    channels, height, width = shape
    pixels = np.stack(
        [render(height, width, channels, seed=seed, index=offset + k, stream=stream) for k in range(images)]
    )
    return np.asarray(preprocess.apply(pixels), dtype=spec.dtype)


def _say(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)
