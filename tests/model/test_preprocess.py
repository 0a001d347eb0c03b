from __future__ import annotations

import numpy as np
import pytest

from zsq_deploy.errors import UsageError
from zsq_deploy.model import Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_normalization_against_float64():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
    found = Preprocess(MEAN, STD).apply(images)
    wanted = ((images / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2)
    assert found.dtype == np.float32
    assert found.shape == (4, 3, 5, 6)
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_without_anything_pixels_are_divided_by_255():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(Preprocess().apply(images)[0, 0], images[0, :, :, 0] / np.float32(255))


def test_raw_pixels_stay():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(Preprocess(raw_pixels=True).apply(images)[0, 0], images[0, :, :, 0])


@pytest.mark.parametrize(
    "preprocess", [Preprocess(), Preprocess(MEAN, STD), Preprocess(raw_pixels=True), Preprocess((0.5,), (0.25,))]
)
def test_bounds_are_what_black_and_white_become(preprocess):
    low, high = preprocess.bounds(3)
    every = preprocess.apply(np.tile(np.arange(256, dtype=np.uint8)[:, None, None, None], (1, 1, 1, 3)))
    np.testing.assert_array_equal(low, every.min((0, 2, 3)))
    np.testing.assert_array_equal(high, every.max((0, 2, 3)))
    assert low.dtype == high.dtype == np.float32
    assert low.shape == high.shape == (3,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"raw_pixels": True, "mean": (0.5,), "std": (0.5,)}, "--raw-pixels"),
        ({"raw_pixels": True, "mean": (0.5,)}, "--raw-pixels"),
        ({"mean": (0.5,)}, "--mean is given without --std"),
        ({"std": (0.5,)}, "--std is given without --mean"),
        ({"mean": (0.5,), "std": (0.0,)}, "greater than zero"),
        ({"mean": (0.5,), "std": (-0.2,)}, "greater than zero"),
        ({"mean": (float("nan"),), "std": (0.5,)}, "--mean is nan"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5)}, "3 numbers"),
        ({"mean": (), "std": ()}, "empty"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "divided by 255"),
    ],
)
def test_contradictions_are_refused(options, words):
    with pytest.raises(UsageError, match=words) as caught:
        Preprocess(**options)
    assert caught.value.remedy


def test_channels_have_to_fit():
    with pytest.raises(UsageError, match="3 numbers, but the network's input has 1"):
        Preprocess(MEAN, STD).bounds(1)


def test_only_bytes_are_images():
    with pytest.raises(UsageError, match="float32"):
        Preprocess().apply(np.zeros((1, 4, 4, 3), np.float32))
