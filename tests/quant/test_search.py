"""Range searches against brute force on the numbers themselves, and their properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.errors import UsageError
from zsq_deploy.quant.fakequant import qparams
from zsq_deploy.quant.histogram import Histogram
from zsq_deploy.quant.scheme import Scheme
from zsq_deploy.quant.search import METHODS, entropy, expected_squared_error, minmax, mse, percentile, search

U8 = Scheme(8, signed=False, symmetric=False)
S8 = Scheme(8, signed=True, symmetric=True)
U4 = Scheme(4, signed=False, symmetric=False)


def heavy(seed=0, n=200_000, relu=False):
    x = np.random.default_rng(seed).standard_t(3, n).astype(np.float32)
    return np.maximum(x, 0) if relu else x


def true_error(x, low, high, scheme):
    p = qparams(low, high, scheme)
    x = x.astype(np.float64)
    codes = np.clip(np.rint(x / float(p.scale)) + int(p.zero_point), scheme.qmin, scheme.qmax)
    return np.square((codes - int(p.zero_point)) * float(p.scale) - x).mean()


@pytest.mark.parametrize("scheme", [U8, S8, U4, Scheme(8, signed=False, symmetric=True), Scheme(6, reduced=True)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.6, 0.2, 0.05])
def test_the_expected_error_is_the_error(scheme, relu, clip):
    x = heavy(1, relu=relu)
    h = Histogram.of(x)
    low, high = minmax(h)
    assert expected_squared_error(h, low * clip, high * clip, scheme) == pytest.approx(
        true_error(x, low * clip, high * clip, scheme), rel=0.02
    )


@pytest.mark.parametrize("scheme", [U8, S8, U4])
@pytest.mark.parametrize("relu", [False, True])
def test_mse_is_as_good_as_brute_force(scheme, relu):
    x = heavy(2, 50_000, relu)
    h = Histogram.of(x)
    low, high = mse(h, scheme)
    full = minmax(h)
    ratios = np.linspace(0.02, 1, 80)
    if scheme.symmetric or relu:
        reach = max(-full[0], full[1])
        rivals = [(max(full[0], -reach * r), min(full[1], reach * r)) for r in ratios]
    else:
        rivals = [(full[0] * a, full[1] * b) for a in ratios[::3] for b in ratios[::3]]
    best = min(true_error(x, *pair, scheme) for pair in rivals)
    assert true_error(x, low, high, scheme) <= 1.03 * best
    assert true_error(x, low, high, scheme) <= (0.5 if scheme is U4 else 1.0) * true_error(x, *full, scheme)


def test_percentile_cuts_the_share_it_says():
    x = heavy(3)
    h = Histogram.of(x)
    low, high = percentile(h, 99.0)
    exact = np.quantile(x, [0.005, 0.995])
    assert low == pytest.approx(exact[0], abs=2 * h.width)
    assert high == pytest.approx(exact[1], abs=2 * h.width)
    assert percentile(h, 100.0) == minmax(h)
    outside = ((x < low) | (x > high)).mean()
    assert outside <= 0.01


def test_percentile_leaves_the_zeros_of_a_relu_alone():
    h = Histogram.of(heavy(4, relu=True))
    assert percentile(h, 99.9)[0] == 0.0


@pytest.mark.parametrize("percent", [50, 0, 101, -3])
def test_percentile_refuses_nonsense(percent):
    with pytest.raises(UsageError, match="percentile"):
        percentile(Histogram.of(heavy(0, 100)), percent)


@pytest.mark.parametrize("scheme", [U8, S8])
@pytest.mark.parametrize("relu", [False, True])
def test_entropy_beats_minmax_on_heavy_tails(scheme, relu):
    """A Gaussian with a few far outliers: the threshold belongs near the Gaussian, and the error falls."""
    rng = np.random.default_rng(5)
    x = rng.normal(0, 1, 400_000).astype(np.float32)
    x[:40] *= 25
    x = np.maximum(x, 0) if relu else x
    h = Histogram.of(x)
    low, high = entropy(h, scheme)
    assert high < 0.5 * h.maximum
    assert high > 2.0
    bulk = x[np.abs(x) < 2]
    assert true_error(bulk, low, high, scheme) < 0.1 * true_error(bulk, *minmax(h), scheme)


def test_entropy_never_clips_more_than_it_may():
    """Activations crowded at a few values are where the measure goes wrong."""
    rng = np.random.default_rng(6)
    x = np.concatenate([np.repeat(rng.uniform(0, 2, 30), 3000), rng.exponential(2.0, 20_000)]).astype(np.float32)
    h = Histogram.of(x)
    _, high = entropy(h, U8)
    assert (x > high).mean() <= 0.0051


def test_entropy_keeps_a_uniform_tensor():
    x = np.random.default_rng(7).uniform(-1, 1, 500_000).astype(np.float32)
    low, high = entropy(Histogram.of(x), U8)
    assert low < -0.97
    assert high > 0.97


@settings(max_examples=25, deadline=None)
@given(method=st.sampled_from(sorted(METHODS)), power=st.integers(-20, 20), seed=st.integers(0, 50), relu=st.booleans())
def test_units_do_not_matter(method, power, seed, relu):
    """Multiplied by a power of two: exactly the multiplied range."""
    x = heavy(seed, 5000, relu)
    low, high = search(Histogram.of(x), method, U8)
    scaled = search(Histogram.of(x * np.float32(2.0**power)), method, U8)
    assert scaled == (low * 2.0**power, high * 2.0**power)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("factor", [3.0, 0.0137, 1e4])
def test_any_unit_gives_nearly_the_same(method, factor):
    x = heavy(8, 100_000)
    h = Histogram.of(x)
    low, high = search(h, method, U8)
    found = search(Histogram.of(x * np.float32(factor)), method, U8)
    tolerance = (0.03 if method == "mse" else 0.001) * max(-low, high)
    assert found[0] / factor == pytest.approx(low, abs=tolerance)
    assert found[1] / factor == pytest.approx(high, abs=tolerance)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("scheme", [U8, S8, U4, Scheme(16, signed=False, symmetric=False)])
def test_edge_cases(method, scheme):
    assert search(Histogram.of(np.zeros(10, np.float32)), method, scheme) == (0.0, 0.0)
    low, high = search(Histogram.of(np.array([2.5], np.float32)), method, scheme)
    assert low <= 2.5
    assert high == pytest.approx(2.5, rel=0.1)
    low, high = search(Histogram.of(np.array([-1e-20, -2e-20], np.float32)), method, scheme)
    assert low == pytest.approx(-2e-20, rel=0.3)


def test_an_unknown_method_is_named():
    with pytest.raises(UsageError, match="no range method 'best'"):
        search(Histogram.of(np.ones(3, np.float32)), "best", U8)
