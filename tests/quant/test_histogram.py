"""Histograms: exact counts, independence of order and of cuts, exact merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.quant.histogram import SIDE, Histogram, HistogramBuilder, exponent_for


def same(a, b):
    assert (a.first, a.exponent, a.minimum, a.maximum, a.zeros) == (b.first, b.exponent, b.minimum, b.maximum, b.zeros)
    np.testing.assert_array_equal(a.counts, b.counts)


def numbers(seed, n=2000):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, n) * 10.0 ** rng.uniform(-6, 6)
    x[rng.random(n) < 0.2] = 0.0
    if seed % 3 == 0:
        x = np.maximum(x, 0)
    return x.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_counts_equal_numpys(seed):
    x = numbers(seed)
    h = Histogram.of(x)
    expected, _ = np.histogram(x.astype(np.float64), h.edges)
    # numpy's last bin includes its upper edge; ours are half open, and the maximum is always inside.
    np.testing.assert_array_equal(h.counts, expected)
    assert h.total == len(x)
    assert h.zeros == int((x == 0).sum())
    assert (h.minimum, h.maximum) == (x.min(), x.max())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 2000), max_size=6), shuffle=st.booleans())
def test_cuts_and_order_do_not_matter(seed, cuts, shuffle):
    x = numbers(seed)
    whole = Histogram.of(x)
    if shuffle:
        x = np.random.default_rng(seed).permutation(x)
    builder = HistogramBuilder()
    for part in np.split(x, sorted(cuts)):
        builder.add(torch.from_numpy(part))
    same(builder.finish(), whole)


@settings(max_examples=60, deadline=None)
@given(seeds=st.tuples(st.integers(0, 999), st.integers(0, 999), st.integers(0, 999)))
def test_merging_is_exact_associative_and_commutative(seeds):
    parts = [numbers(seed, 300) for seed in seeds]
    a, b, c = (Histogram.of(part) for part in parts)
    whole = Histogram.of(np.concatenate(parts))
    same(a.merge(b).merge(c), whole)
    same(a.merge(b.merge(c)), whole)
    same(c.merge(a).merge(b), whole)


@pytest.mark.parametrize("magnitude", [1e-30, 0.7, 1.0, 1.0001, 255.0, 256.0, 3e38])
def test_the_grid_holds_and_resolves(magnitude):
    h = Histogram.of(np.array([magnitude, -magnitude, magnitude / 3], np.float32))
    assert h.total == 3
    assert h.first >= -SIDE
    assert h.first + len(h.counts) <= SIDE
    used = max(h.first + len(h.counts), -h.first)
    assert used > SIDE // 2


def test_exponents_are_the_smallest_that_fit():
    for magnitude in (0.1, 1.0, 1.5, 100.0):
        exponent = exponent_for(magnitude)
        assert magnitude < SIDE * 2.0**exponent
        assert magnitude >= SIDE * 2.0 ** (exponent - 1)


def test_layouts_do_not_matter():
    x = torch.randn(3, 5, 7, 6, generator=torch.Generator().manual_seed(0))
    same(Histogram.of(x), Histogram.of(x.to(memory_format=torch.channels_last)))
    same(Histogram.of(x), Histogram.of(x.transpose(1, 3)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), bins=st.sampled_from([16, 512, 2048]))
def test_coarser_keeps_the_counts(seed, bins):
    h = Histogram.of(numbers(seed))
    c = h.coarser(bins)
    assert c.total == h.total
    expected, _ = np.histogram(numbers(seed).astype(np.float64), c.edges)
    np.testing.assert_array_equal(c.counts, expected)
    assert bins <= max(c.first + len(c.counts), -c.first) < 2 * bins + 2


def test_large_tensors_go_in_chunks():
    x = np.random.default_rng(0).normal(0, 3, 1_000_003).astype(np.float32)
    h = Histogram.of(x)
    expected, _ = np.histogram(x.astype(np.float64), h.edges)
    np.testing.assert_array_equal(h.counts, expected)
