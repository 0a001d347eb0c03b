"""Images from formulas: fractals, textured shapes and dead leaves with the statistics of photographs, without a photograph.

What a network's layers answer to is edges, colours, textures and contrasts at all scales; noise has next to none of them. The
``fractal`` baseline draws pictures that do, from random numbers only:

* **Fractals**: attractors of random iterated function systems of 2 to 4 affine maps, played as a chaos game and coloured by
  density (Kataoka et al., "Pre-training without natural images", ACCV 2020). The maps are sampled by their singular values with
  bounds on a weighted sum of them, which avoids the many systems that collapse to a speck (Anderson and Farrell, "Improving
  fractal pre-training", WACV 2022). A bank of 48 of them is made once; each picture places some, turned, stretched and recoloured.
* **Visual atoms**: closed contours whose radius is modulated by two sinusoids of whole frequencies (Takashima et al., "Visual
  atoms: pre-training vision transformers with sinusoidal waves", CVPR 2023). The paper draws them as thin nested orbits; here
  they are filled, single or one inside the other.
* **Dead leaves**: shapes that hide each other, with sizes drawn from a density proportional to r^-3 between two bounds. The
  result is scale invariant and has the heavy-tailed edges and the 1/f spectrum of photographs (Ruderman, "Origins of scaling in
  natural images", Vision Research 1997; Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001).
* **Things**: large shapes with parts, with mirror symmetry, made of rings, or repeated in rows, as made and grown things are.
* **Surfaces**: each leaf has a colour from the picture's small palette, shading (a plane plus a bulge), and a texture (power-law
  noise, gratings, cells) at its own scale and direction. Luminance varies most, blue-yellow less and red-green least
  (Ruderman, Cronin and Chiao, "Statistics of cone responses to natural images", JOSA A 1998).
* **Camera**: a blurred background behind sharp objects, light that changes across the picture, contrast and brightness that
  change from picture to picture. Most pictures roll off softly towards black and white; a share of them is harsh, because a few
  hundred pictures have to stand for all that a network will ever see, and ranges are set by extremes.

The parameters come from these papers and from what is published of photographs in general (mid gray on average, an RMS contrast
of about 0.2, few clipped pixels, standard deviations of about 7 : 2 : 1 along luminance, blue-yellow and red-green); none was
fitted to a network or to evaluation images. Pictures are drawn at twice the resolution and averaged, so edges are as smooth as a
lens leaves them. Each picture depends on (seed, stream, index) and its size only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from zsq_deploy.calib.baselines import PixelPreprocess, image_generator, image_shape
from zsq_deploy.calib.leaves import Look, join, leaf_map, power_law_radii, random_look, random_object, scatter, surfaces
from zsq_deploy.calib.textures import TILE, bank
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import TensorSpec

__all__ = ["fractal", "render"]

Array = npt.NDArray[Any]
Random = np.random.Generator

_LARGEST_CANVAS = 640  # pixels on the long side; larger pictures are drawn at this size and enlarged

# Rows: luminance, blue-yellow, red-green. An orthonormal opponent basis (Ruderman et al. 1998, without the logarithm).
_OPPONENT = np.array(
    [
        [1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)],
        [1 / math.sqrt(6), 1 / math.sqrt(6), -2 / math.sqrt(6)],
        [1 / math.sqrt(2), -1 / math.sqrt(2), 0.0],
    ],
    np.float32,
)


def _draw(random: Random, height: int, width: int) -> Array:
    """One picture as RGB levels 0..1, float32 [H, W, 3], not yet averaged down."""
    textures, fractals = bank()
    look = random_look(random)
    side = min(height, width)

    # far: dead leaves from the size of the picture down to a few pixels, drawn small and enlarged where it is out of focus
    blur = int(random.choice([1, 2, 4, 8], p=[0.55, 0.2, 0.15, 0.1]))
    blur = max(1, min(blur, side // 16))
    h, w = -(-height // blur), -(-width // blur)
    smallest = max(0.01 * min(h, w), 1.5) * math.exp(random.uniform(0, 1.7))
    count = int(random.integers(80, 400) * min(1.0, max(0.3, min(h, w) / 200)))  # small pictures are full sooner
    radii = power_law_radii(random, count, smallest, 0.6 * min(h, w))
    leaves = scatter(random, radii, random.uniform(-0.1, 1.1, (count, 2)) * (w, h))
    picture = surfaces(random, look, leaves, leaf_map(leaves, h, w), textures, side / TILE / blur)
    if blur > 1:
        picture = _resized(picture, height, width)

    # near: a few large sharp things
    objects = int(random.integers(0, 5))
    if objects:
        places = random.uniform(0.1, 0.9, (objects, 2)) * (width, height)
        sizes = side * random.uniform(0.12, 0.5, objects)
        things = join(
            [
                random_object(random, place, size, small=side < 100)
                for place, size in zip(places, sizes.tolist(), strict=True)
            ]
        )
        seen = leaf_map(things, height, width)
        other = look if random.random() < 0.5 else random_look(random)
        front = surfaces(random, other, things, seen, textures, side / TILE)
        picture = np.where((seen > 0)[..., None], front, picture)
    for _ in range(int(random.integers(0, 4))):
        _place_fractal(random, look, picture, fractals)
    _expose(random, picture)
    picture[..., 0] *= math.sqrt(3)  # gray level g has the opponent luminance g sqrt(3)
    return np.clip(picture @ _OPPONENT, 0, 1)


def _expose(random: Random, picture: Array) -> None:
    """Light across the picture, then contrast and brightness, in place."""
    height, width = picture.shape[:2]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    gain = random.normal(0, 0.12, 3)
    level = picture[..., 0]
    level += gain[0] * x + gain[1] * y - abs(gain[2]) * (x * x + y * y)
    contrast, shift = math.exp(random.normal(0.0, 0.3)), random.normal(0, 0.06)
    level -= 0.5
    if random.random() < 0.2:  # flash, back light, studio: what goes beyond black and white is cut
        level *= 1.5 * contrast
        level += 0.5 + 1.5 * shift
        picture[..., 1:] *= 1.3
    else:  # film and sensors roll off; a little beyond 0..1 is left to be cut
        level[:] = 0.5 + 0.54 * np.tanh(2 * contrast * level + 2 * shift)


def _resized(picture: Array, height: int, width: int) -> Array:
    """A float picture [H, W, C] in another size, bicubic."""
    planes = [
        Image.fromarray(np.ascontiguousarray(picture[..., plane])).resize((width, height), Image.Resampling.BICUBIC)
        for plane in range(picture.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def _place_fractal(random: Random, look: Look, picture: Array, fractals: Array) -> None:
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
    u = ((math.cos(turn) * x - math.sin(turn) * y) * (0.5 * stretch) + 0.5) * TILE
    v = ((math.sin(turn) * x + math.cos(turn) * y) * (0.5 / stretch) + 0.5) * TILE
    inside = (u >= 0) & (u < TILE) & (v >= 0) & (v < TILE)
    cells = np.clip(v, 0, TILE - 1).astype(np.int32) * TILE + np.clip(u, 0, TILE - 1).astype(np.int32)
    value = np.where(inside, density.reshape(-1)[cells], 0)
    ends = look.palette[random.integers(0, len(look.palette), 2)].copy()
    ends[:, 0] += random.normal(0, 0.25, 2)
    opacity = np.clip(value * random.uniform(1.5, 6), 0, 1)[..., None]
    colour = ends[0] + value[..., None] * (ends[1] - ends[0])
    part = picture[top:bottom, left:right]
    part += opacity * (colour - part)


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
    picture = _draw(random, *canvas)
    if canvas == (2 * height, 2 * width):
        rows = picture[0::2] + picture[1::2]
        picture = (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)
    picture = picture * 255
    if picture.shape[:2] != (height, width):
        picture = _resized(picture, height, width)
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
            remedy="say the size with --input-shape if it is not fixed; other inputs of floats can be drawn with --method gaussian or uniform"
            if spec.dtype.kind == "f"
            else "make inputs of your own and give them as a calibration set (CalibrationSet.from_arrays)",
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
