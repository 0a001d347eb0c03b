"""Pictures from formulas: contractive systems, and the statistics that photographs are known for."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.attractors import AffineSystem, attractor, random_system
from zsq_deploy.calib.fractal import fractal, render
from zsq_deploy.model import Preprocess, TensorSpec

F32 = np.dtype(np.float32)


def pictures(count: int, size: int, **options: int) -> np.ndarray:
    return np.stack([render(size, size, 3, seed=0, index=index, **options) for index in range(count)])


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    return pictures(48, 128)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_systems_contract(seed):
    system = random_system(np.random.default_rng(seed))
    singular = np.linalg.svd(system.matrices, compute_uv=False)
    count = len(system.weights)
    assert 2 <= count <= 4
    assert singular.max() < 1
    bound = float(np.sum(singular[:, 0] + 2 * singular[:, 1]))
    assert 0.5 * (5 + count) - 1e-9 <= bound <= 0.5 * (6 + count) + 1e-9
    assert system.weights.sum() == pytest.approx(1)
    assert (system.weights > 0).all()


def test_attractor_of_a_known_system():
    """The Sierpinski triangle: of the 4^4 cells of a grid of 16 that is fitted to it, 3^4 are visited."""
    half = np.tile(np.eye(2) * 0.5, (3, 1, 1))
    system = AffineSystem(half, np.array([[0.0, 0], [0.5, 0], [0, 0.5]]), np.full(3, 1 / 3))
    size, margin = 400, 8
    counts = attractor(system, np.random.default_rng(0), size=size, points=400_000)
    assert 0.99 < counts.sum() / 400_000 < 1.01
    inner = counts[margin:-margin, margin:-margin]  # 4 % of the grid is left free around it
    cells = inner.reshape(16, 24, 16, 24).sum((1, 3))
    y, x = np.mgrid[0:16, 0:16]
    expected = (x & y) == 0
    assert expected.sum() == 81
    # neighbours of filled cells catch a few points through rounding of the fitted grid
    share = cells[expected].sum() / cells.sum()
    assert share > 0.97
    assert cells[expected].min() > 0.8 * cells.sum() / 81
    assert cells[~expected].max() < 0.5 * cells.sum() / 81


def test_the_same_picture_in_another_process():
    code = (
        "import hashlib\nfrom zsq_deploy.calib.fractal import render\n"
        "print(hashlib.sha256(render(40, 56, 3, seed=5, index=9).tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == hashlib.sha256(render(40, 56, 3, seed=5, index=9).tobytes()).hexdigest()


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 31), (32, 32), (96, 40), (240, 320), (500, 700)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size(size, channels):
    picture = render(*size, channels, seed=1, index=0)
    assert picture.shape == (*size, channels)
    assert picture.dtype == np.uint8
    if min(size) > 30:
        assert picture.std() > 5


def test_through_the_preprocessing():
    spec = TensorSpec("x", (None, 3, 32, 40), F32)
    pixels = np.stack([render(32, 40, 3, seed=2, index=index) for index in (3, 4)])
    for preprocess in (
        Preprocess(raw_pixels=True),
        Preprocess(),
        Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
    ):
        made = fractal(spec, 2, seed=2, preprocess=preprocess, offset=3)
        expected = pixels.transpose(0, 3, 1, 2).astype(np.float64)
        if not preprocess.raw_pixels:
            expected /= 255
        if preprocess.mean is not None:
            expected = (expected - np.reshape(preprocess.mean, (3, 1, 1))) / np.reshape(preprocess.std, (3, 1, 1))
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


def test_gray_is_the_luma_of_the_colour_picture():
    colour = render(48, 48, 3, seed=0, index=2).astype(float)
    gray = render(48, 48, 1, seed=0, index=2)[..., 0].astype(float)
    assert np.abs(gray - colour @ [0.299, 0.587, 0.114]).mean() < 1.5


def test_light_and_contrast_are_those_of_photographs(large):
    """Photographs: mid gray on average, RMS contrast around 0.2; a share is harsh, and all of it varies."""
    level = large.astype(float) / 255
    means, contrasts = level.mean((1, 2, 3)), level.mean(3).std((1, 2))
    assert 0.38 < means.mean() < 0.55
    assert means.std() > 0.08
    assert 0.13 < np.median(contrasts) < 0.26
    assert np.quantile(contrasts, 0.9) > 1.5 * np.quantile(contrasts, 0.1)
    clipped = ((large == 0) | (large == 255)).mean()
    assert 0.002 < clipped < 0.2
    assert large.min() == 0
    assert large.max() == 255


def test_colours_vary_as_those_of_photographs(large):
    """Most variance in luminance, then along blue-yellow, then red-green (Ruderman, Cronin and Chiao 1998)."""
    values, vectors = np.linalg.eigh(np.cov(large.reshape(-1, 3).T / 255))
    ratio = np.sqrt(values[::-1] / values[-1])
    assert 0.15 < ratio[1] < 0.5
    assert 0.08 < ratio[2] < 0.3
    assert abs(vectors[:, 2] @ np.ones(3) / np.sqrt(3)) > 0.97
    assert abs(vectors[:, 1] @ np.array([1, 1, -2]) / np.sqrt(6)) > 0.8


def test_spectrum_falls_as_that_of_photographs(large):
    """Power about 1/f^2 over the middle frequencies (noise: flat)."""

    def slope(images: np.ndarray) -> float:
        size = images.shape[1]
        window = np.outer(np.hanning(size), np.hanning(size))
        power = np.mean([np.abs(np.fft.fft2((g - g.mean()) * window)) ** 2 for g in images], axis=0)
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size) * size, np.fft.fftfreq(size) * size))
        bands = np.arange(3, size // 3)
        radial = [power[(frequency >= band - 0.5) & (frequency < band + 0.5)].mean() for band in bands]
        return float(np.polyfit(np.log(bands), np.log(radial), 1)[0])

    assert -3.0 < slope(large.mean(3)) < -1.6
    assert abs(slope(np.random.default_rng(0).normal(size=(8, 128, 128)))) < 0.3


def test_edges_are_sparse_as_those_of_photographs(large):
    """Differences of neighbours have heavy tails: kurtosis far above the 3 of noise (Lee, Mumford and Huang 2001)."""
    difference = np.diff(large.mean(3), axis=2).ravel()
    kurtosis = np.mean(difference**4) / np.mean(difference**2) ** 2
    assert kurtosis > 8


def test_every_picture_shows_something():
    many = pictures(200, 32)
    assert np.quantile(many.std((1, 2, 3)), 0.01) > 8
    flat = many.reshape(200, -1).astype(float)
    assert np.abs(np.corrcoef(flat) - np.eye(200)).max() < 0.97
