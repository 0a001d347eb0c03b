"""The naive baselines: values as promised, independent of how images are cut into batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.baselines import gaussian, image_generator, image_shape, ones, uniform
from zsq_deploy.calib.fractal import fractal
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model import Preprocess, TensorSpec

F32 = np.dtype(np.float32)
SPEC = TensorSpec("x", (None, 3, 20, 24), F32)
IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FIRST = {"gaussian": [1807797818, 286912445, 746180478], "fractal": [302732093, 2791238067, 55849585]}
ALL = {"gaussian": gaussian, "uniform": uniform, "ones": ones, "fractal": fractal}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_shape_and_type(name, dtype):
    spec = TensorSpec("x", (None, 3, 20, 24), np.dtype(dtype))
    made = ALL[name](spec, 3, seed=0, preprocess=IMAGENET)
    assert made.shape == (3, 3, 20, 24)
    assert made.dtype == dtype
    assert np.isfinite(made).all()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=5, deadline=None)
@given(cut=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_images_do_not_depend_on_the_cut(name, cut, seed):
    whole = ALL[name](SPEC, 6, seed=seed, preprocess=IMAGENET)
    parts = [
        ALL[name](SPEC, cut, seed=seed, preprocess=IMAGENET),
        ALL[name](SPEC, 6 - cut, seed=seed, preprocess=IMAGENET, offset=cut),
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", ["gaussian", "uniform", "fractal"])
def test_every_image_seed_and_input_is_another_one(name):
    draw = ALL[name]
    first = draw(SPEC, 4, seed=0, preprocess=IMAGENET)
    others = [
        *first[1:],
        *draw(SPEC, 2, seed=1, preprocess=IMAGENET),
        *draw(SPEC, 2, seed=0, preprocess=IMAGENET, stream=1),
    ]
    for other in others:
        assert abs(np.corrcoef(first[0].ravel(), other.ravel())[0, 1]) < 0.9
        assert np.abs(first[0] - other).mean() > 0.1


def test_gaussian_is_standard_normal():
    made = gaussian(TensorSpec("x", (None, 100, 100), F32), 10, seed=3, preprocess=Preprocess()).ravel()
    count = len(made)
    assert abs(made.mean()) < 5 / np.sqrt(count)
    assert abs(made.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs((np.abs(made) < 1).mean() - 0.682689) < 5 * np.sqrt(0.22 / count)


@pytest.mark.parametrize("preprocess", [IMAGENET, Preprocess(), Preprocess(raw_pixels=True)])
def test_uniform_fills_the_valid_range_of_each_channel(preprocess):
    made = uniform(TensorSpec("x", (None, 3, 64, 64), F32), 10, seed=0, preprocess=preprocess)
    # what an image can become, from the other direction: black and white through the preprocessing
    black, white = preprocess.apply(np.array([0, 255], np.uint8)[:, None, None, None].repeat(3, -1))
    for channel in range(3):
        low, high = float(black[channel, 0, 0]), float(white[channel, 0, 0])
        values = made[:, channel].ravel()
        assert low <= values.min() < low + 0.001 * (high - low)
        assert high - 0.001 * (high - low) < values.max() <= high
        counts = np.histogram(values, 16, (low, high))[0]
        expected = len(values) / 16
        assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-square, 15 degrees of freedom


def test_uniform_of_inputs_that_are_no_images_is_0_to_1():
    made = uniform(TensorSpec("x", (None, 300), F32), 9, seed=0, preprocess=IMAGENET)
    assert 0 <= made.min() < 0.01
    assert 0.99 < made.max() < 1


def test_ones():
    assert (ones(SPEC, 2, seed=0, preprocess=IMAGENET) == 1).all()
    assert ones(TensorSpec("ids", (None, 7), np.dtype(np.int64)), 2, seed=0, preprocess=IMAGENET).dtype == np.int64


@pytest.mark.parametrize("name", ["gaussian", "uniform", "fractal"])
def test_indices_are_no_noise(name):
    with pytest.raises(CalibrationError, match="ids") as caught:
        ALL[name](TensorSpec("ids", (None, 7), np.dtype(np.int64)), 2, seed=0, preprocess=IMAGENET)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ALL)
def test_no_images_and_negative_seeds_are_refused(name):
    with pytest.raises(CalibrationError, match="0 images"):
        ALL[name](SPEC, 0, seed=0, preprocess=IMAGENET)
    if name != "ones":
        with pytest.raises(CalibrationError, match="seed -1"):
            ALL[name](SPEC, 1, seed=-1, preprocess=IMAGENET)


@pytest.mark.parametrize(
    "shape", [(None, 4, 8, 8), (None, 3, 8), (None, 8, 8, 3), (None, 3, None, 8), (None, None, 8, 8), (None, 2, 8, 8)]
)
def test_fractals_are_refused_for_what_is_no_picture(shape):
    with pytest.raises(CalibrationError, match="fractals are pictures"):
        fractal(TensorSpec("x", shape, F32), 1, seed=0, preprocess=Preprocess())
    assert image_shape(TensorSpec("x", shape, F32)) is None


def test_a_free_size_is_refused_with_the_option_to_give():
    with pytest.raises(Exception, match="--input-shape"):
        gaussian(TensorSpec("x", (None, 3, None, 8), F32), 1, seed=0, preprocess=Preprocess())


def test_the_generator_is_what_it_was():
    """Sets that were made before have to be made again bit for bit: the first numbers are written down here."""
    assert image_generator("gaussian", 0, 0, 0).integers(0, 2**32, 3).tolist() == FIRST["gaussian"]
    assert image_generator("fractal", 7, 1, 5).integers(0, 2**32, 3).tolist() == FIRST["fractal"]
