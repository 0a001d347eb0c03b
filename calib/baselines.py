"""What one would feed a network without thinking: the baselines that every synthesized set is compared with.

They stay as naive as they are used in the field: Gaussian noise is N(0, 1) per value whatever the network's input scale is,
uniform noise covers the valid pixel values, ones are ones. :mod:`zsq_deploy.calib.fractal` is the one that has seen some
thought. Every value depends only on (seed, stream, index of the image), never on how images are cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import TensorSpec

__all__ = ["Baseline", "PixelPreprocess", "gaussian", "image_generator", "image_shape", "ones", "uniform"]

Array = npt.NDArray[Any]


class PixelPreprocess(Protocol):
    """What the baselines need of :class:`zsq_deploy.model.Preprocess`."""

    def apply(self, images_u8_nhwc: Array) -> Array:
        """uint8 images [N, H, W, C] as network input, float32 [N, C, H, W]."""

    def bounds(self, channels: int) -> tuple[Array, Array]:
        """Smallest and largest valid input value of each channel, float32 [C]."""


class Baseline(Protocol):
    """A baseline: inputs for images ``offset .. offset + images - 1``."""

    def __call__(
        self,
        spec: TensorSpec,
        images: int,
        *,
        seed: int,
        preprocess: PixelPreprocess,
        offset: int = 0,
        stream: int = 0,
    ) -> Array:
        """An array of the spec's type with `images` samples."""


# One number a baseline, so that the same seed does not give related noise in two of them.
_TAGS = {"gaussian": 1, "uniform": 2, "fractal": 3}


def image_generator(kind: str, seed: int, stream: int, index: int) -> np.random.Generator:
    """The random numbers of one image.

    Args:
        kind: Name of the baseline.
        seed: The user's seed, 0 or more.
        stream: Number of the network's input, so that two inputs do not get the same values.
        index: Number of the image.
    """
    if seed < 0:
        raise CalibrationError(f"the seed {seed} is negative", where="--seed", remedy="give 0 or more")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_TAGS[kind], seed, stream, index])))


def image_shape(spec: TensorSpec) -> tuple[int, int, int] | None:
    """(channels, height, width) if the input is a gray or colour image of known size, else ``None``."""
    if len(spec.shape) != 4 or spec.shape[1] not in (1, 3) or spec.shape[2] is None or spec.shape[3] is None:
        return None
    return int(spec.shape[1]), int(spec.shape[2]), int(spec.shape[3])


def _checked(spec: TensorSpec, images: int, kind: str, *, only_float: bool = True) -> tuple[int, ...]:
    if images < 1:
        raise CalibrationError(f"{images} images were asked for", where="--images", remedy="ask for 1 or more")
    if only_float and spec.dtype.kind != "f":
        raise CalibrationError(
            f"input {spec.name!r} takes {spec.dtype} values (indices, flags), for which {kind} noise makes no sense",
            where=spec.name,
            remedy="make inputs of your own and give them as a calibration set (CalibrationSet.from_arrays)",
        )
    return spec.with_batch(images)


def _each_image(
    spec: TensorSpec, images: int, kind: str, seed: int, stream: int, offset: int, draw: Callable[[Any, Any], Array]
) -> Array:
    shape = _checked(spec, images, kind)
    out = np.empty(shape, spec.dtype)
    for number in range(images):
        out[number] = draw(image_generator(kind, seed, stream, offset + number), shape[1:])
    return out


def gaussian(
    spec: TensorSpec, images: int, *, seed: int, preprocess: PixelPreprocess, offset: int = 0, stream: int = 0
) -> Array:
    """Independent N(0, 1) values in network input space.

    For inputs normalized with mean and standard deviation this is noise of the right power. For networks that take 0..1 or
    0..255 it is far off, and it is what people do all the same: the baseline says what that costs.

    Args:
        spec: The network input; any rank, floating point.
        images: Number of samples.
        seed: Seed.
        preprocess: Not used; the same signature as the other baselines.
        offset: Number of the first image.
        stream: Number of the network's input.

    Raises:
        CalibrationError: The input does not take floating-point values.
    """
    del preprocess
    return _each_image(
        spec,
        images,
        "gaussian",
        seed,
        stream,
        offset,
        lambda random, shape: random.standard_normal(shape, dtype=np.float32),
    )


def uniform(
    spec: TensorSpec, images: int, *, seed: int, preprocess: PixelPreprocess, offset: int = 0, stream: int = 0
) -> Array:
    """Independent values, uniform over the valid pixel range of each channel (``preprocess.bounds``).

    Inputs that are no images (rank other than 4, or channels other than 1 and 3) get values from 0 to 1.

    Args:
        spec: The network input; any rank, floating point.
        images: Number of samples.
        seed: Seed.
        preprocess: Says which values pixels can have.
        offset: Number of the first image.
        stream: Number of the network's input.

    Raises:
        CalibrationError: The input does not take floating-point values.
    """
    low: Array = np.zeros((), np.float32)
    high: Array = np.ones((), np.float32)
    if len(spec.shape) == 4 and spec.shape[1] in (1, 3):
        low, high = (np.asarray(bound, np.float32)[:, None, None] for bound in preprocess.bounds(int(spec.shape[1])))

    def draw(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return low + (high - low) * random.random(shape, dtype=np.float32)

    return _each_image(spec, images, "uniform", seed, stream, offset, draw)


def ones(
    spec: TensorSpec, images: int, *, seed: int, preprocess: PixelPreprocess, offset: int = 0, stream: int = 0
) -> Array:
    """All ones in network input space: what a placeholder data loader feeds.

    Args:
        spec: The network input; any rank and type.
        images: Number of samples.
        seed: Not used.
        preprocess: Not used.
        offset: Not used.
        stream: Not used.
    """
    del seed, preprocess, offset, stream
    return np.ones(_checked(spec, images, "ones", only_float=False), spec.dtype)
