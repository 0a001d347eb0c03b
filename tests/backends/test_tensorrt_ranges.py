"""TensorRT's ranges against a plain formulation: loops over bins, as the published pseudocode reads."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from zsq_deploy.backends.tensorrt.ranges import (
    BINS,
    LEVELS,
    METHODS,
    Magnitudes,
    calibrate,
    collect_magnitudes,
    divergences,
    entropy_amax,
    magnitudes,
    tensorrt_ranges,
)
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.quant.histogram import Histogram
from zsq_deploy.quant.statistics import collect

from .ort_engines import calibration_set, convnet, loaded
from .tensorrt_networks import images, network, outputs
from .test_tensorrt_bundle import Images


def plain_divergence(counts: np.ndarray, kept: int) -> float:
    """One threshold of the published search, bin by bin."""
    bins = counts.astype(np.float64).copy()
    bins[0] = bins[1]
    p = bins[:kept].copy()
    p[-1] += bins[kept:].sum()
    levels: dict[int, list[int]] = {}
    for k in range(kept):
        if bins[k] > 0:
            levels.setdefault(math.floor(k * LEVELS / kept), []).append(k)
    q = np.zeros(kept)
    for members in levels.values():
        q[members] = sum(bins[k] for k in members) / len(members)
    if q.sum() == 0:
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    result = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            result += math.inf if b == 0 else a * math.log(a / b)
    return result


def of(values: np.ndarray) -> Magnitudes:
    size = np.abs(values.astype(np.float64))
    counts, _ = np.histogram(size, BINS, (0.0, size.max()))
    return Magnitudes(counts.astype(np.float64), float(size.max()))


def samples(kind: str, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = {
        "normal": lambda: rng.normal(size=200_000),
        "relu": lambda: np.maximum(rng.normal(size=200_000), 0),
        "laplace": lambda: rng.laplace(size=200_000),
        "heavy": lambda: rng.standard_t(2.5, size=100_000),
        "uniform": lambda: rng.uniform(-1, 1, 100_000),
        "sparse": lambda: rng.choice([0.0, 0.3, 0.31, 1.0, 7.0], 5_000),
        "outlier": lambda: np.concatenate([rng.normal(size=100_000), [60.0]]),
    }
    return made[kind]().astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "heavy", "uniform", "sparse", "outlier"])
def test_divergences_equal_the_plain_formulation(kind: str) -> None:
    histogram = of(samples(kind))
    found = divergences(histogram.counts)
    assert found.shape == (BINS - LEVELS + 1,)
    some = [*range(LEVELS, BINS + 1, 97), LEVELS + 1, 1000, BINS - 1, BINS]
    for kept in some:
        wanted = plain_divergence(histogram.counts, kept)
        if math.isinf(wanted):
            assert math.isinf(found[kept - LEVELS])
        else:
            assert found[kept - LEVELS] == pytest.approx(wanted, abs=1e-11)


def test_the_whole_search_equals_the_plain_one() -> None:
    fine = of(samples("laplace")[:20_000])
    histogram = Magnitudes(fine.counts.reshape(-1, 4).sum(1), fine.amax)  # fewer bins: loops are slow
    bins = len(histogram.counts)
    plain = [plain_divergence(histogram.counts, kept) for kept in range(LEVELS, bins + 1)]
    best = max(k for k, value in enumerate(plain) if value <= min(plain) + 1e-12) + LEVELS
    assert entropy_amax(histogram) == histogram.amax * best / bins


def test_outliers_are_clipped_and_uniform_numbers_are_not() -> None:
    assert entropy_amax(of(samples("outlier"))) < 10.0
    uniform = of(samples("uniform"))
    assert entropy_amax(uniform) > 0.95 * uniform.amax


def test_one_magnitude_keeps_its_range() -> None:
    assert entropy_amax(of(np.full(100, -2.5, np.float32))) == 2.5
    assert entropy_amax(Magnitudes(np.zeros(BINS), 0.0)) == 0.0
    with pytest.raises(UsageError, match="nothing to search"):
        divergences(np.ones(64))


@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "heavy", "sparse", "outlier"])
def test_our_histograms_cut_anew_hold_the_same_numbers(kind: str) -> None:
    values = samples(kind)
    exact, cut = of(values), magnitudes(Histogram.of(values))
    assert cut.amax == exact.amax
    assert cut.counts.sum() == pytest.approx(values.size)
    assert (cut.counts >= 0).all()
    # a number is at most one of our bins away from where it belongs, which is half of these bins or less
    difference = np.abs(np.cumsum(cut.counts) - np.cumsum(exact.counts))
    neighbours = exact.counts + np.append(exact.counts[1:], 0)
    assert (difference <= neighbours + 1e-6).all()


@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "uniform", "outlier"])
def test_the_streaming_range_is_near_the_exact_one(kind: str) -> None:
    values = samples(kind)
    exact, streamed = entropy_amax(of(values)), entropy_amax(magnitudes(Histogram.of(values)))
    assert streamed == pytest.approx(exact, rel=0.1)
    found = divergences(of(values).counts)
    at = round(streamed / of(values).amax * BINS) - LEVELS
    # and loses hardly more information (a window whose last bin happens to be empty counts as infinitely bad: look beside it too)
    assert found[max(at - 2, 0) : at + 3].min() <= found.min() * 1.25 + 1e-4


def test_ranges_of_a_network_by_both_ways(tmp_path: Path) -> None:
    model = loaded(convnet(), tmp_path)
    graph = model.folded().graph
    shape = (6, *model.inputs[0].with_batch(1)[1:])
    images = calibration_set(
        model, {model.inputs[0].name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    )
    statistics = collect(graph, images.batches(4), set_digest=images.digest, micro_batch=2, device="cpu")
    streamed = tensorrt_ranges(statistics, "minmax")
    for name, (low, high) in streamed.items():
        assert -low == high == max(-statistics[name].minimum, statistics[name].maximum, 0.0)
    assert (streamed.model_digest, streamed.set_digest) == (graph.digest, images.digest)
    amax = {name: high for name, (_, high) in streamed.items()}
    counted = collect_magnitudes(graph, images.batches(3), amax, micro_batch=2, device="cpu")
    assert all(counted[name].counts.sum() == statistics[name].count for name in amax)
    exact = tensorrt_ranges(counted, model_digest=graph.digest, set_digest=images.digest)
    assert exact.method == "tensorrt-entropy"
    assert exact.keys() == streamed.keys()
    assert all(0 <= exact[name][1] <= streamed[name][1] for name in exact)
    assert tensorrt_ranges(counted, "minmax", model_digest=graph.digest, set_digest=images.digest) == streamed

    with pytest.raises(CalibrationError, match="beyond its largest magnitude"):
        collect_magnitudes(
            graph, images.batches(3), {name: value / 2 for name, value in amax.items()}, device="cpu", micro_batch=2
        )
    with pytest.raises(CalibrationError, match="empty"):
        collect_magnitudes(graph, iter(()), amax, device="cpu")
    with pytest.raises(UsageError, match="no range method"):
        tensorrt_ranges(statistics, "legacy")


def test_merging_counts() -> None:
    a, b = Magnitudes(np.ones(BINS), 2.0), Magnitudes(np.ones(BINS), 2.0)
    assert a.merge(b).counts.sum() == 2 * BINS
    with pytest.raises(UsageError, match="different bins"):
        a.merge(Magnitudes(np.ones(BINS), 3.0))


# -- calibrators as range methods --


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrator_is_computed_on_the_set(method: str) -> None:
    model = network("residual")
    graph, x = model.folded().graph, images(model, 24)
    found = calibrate(graph, Images(x), f"tensorrt-{method}")
    assert (found.method, found.set_digest, found.model_digest) == (f"tensorrt-{method}", "d" * 64, graph.digest)
    every = ["image", *(value for node in graph for value in node.output if graph.constant(value) is None)]
    values = outputs(graph, x, every)
    assert set(found) == set(every)
    for name, value in values.items():
        low, high = found[name]
        amax = float(np.abs(value).max())
        assert low == -high
        if method == "minmax":
            assert high == pytest.approx(amax, rel=1e-6)
        else:
            # the search over a histogram that numpy counted
            counts, _ = np.histogram(np.abs(value).astype(np.float64), BINS, (0.0, amax))
            assert high == pytest.approx(entropy_amax(Magnitudes(counts.astype(np.float64), amax)), rel=2e-2)


def test_what_is_not_published_is_not_computed() -> None:
    graph = network("residual").folded().graph
    for name in ("tensorrt-legacy", "ort-minmax", "minmax"):
        with pytest.raises(UsageError, match="cannot be computed here") as refused:
            calibrate(graph, Images(np.zeros((1, 3, 8, 8), np.float32)), name)
        assert "tensorrt-entropy2" in str(refused.value)
