"""The streaming pass: numbers against numpy, independence of how the set is cut, constant memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.fold import fold
from zsq_deploy.quant import Statistics, collect
from zsq_deploy.quant.statistics import StatisticsBuilder, micro_batches

from .nets import Builder, images, small_net


def cut(x, places):
    return [{"image": part} for part in np.split(x, sorted(places)) if len(part)]


def identical(a: Statistics, b: Statistics):
    assert list(a) == list(b)
    assert a.images == b.images
    for name in a:
        p, q = a[name], b[name]
        np.testing.assert_array_equal(p.histogram.counts, q.histogram.counts)
        assert (p.histogram.first, p.histogram.exponent, p.histogram.zeros) == (
            q.histogram.first,
            q.histogram.exponent,
            q.histogram.zeros,
        )
        assert p.channels.count == q.channels.count
        for field in ("minimum", "maximum", "mean", "var"):
            np.testing.assert_array_equal(getattr(p.channels, field), getattr(q.channels, field))


GRAPH = fold(small_net()).graph
IMAGES = images(45)
WHOLE = collect(GRAPH, cut(IMAGES, []), device="cpu")


@settings(max_examples=15, deadline=None)
@given(places=st.lists(st.integers(0, 45), max_size=12))
def test_every_cut_gives_identical_statistics_and_ranges(places):
    found = collect(GRAPH, cut(IMAGES, places), device="cpu")
    identical(found, WHOLE)
    for method in ("minmax", "percentile"):  # the searches see nothing but these statistics
        assert found.ranges(method).digest == WHOLE.ranges(method).digest


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), places=st.lists(st.integers(0, 64), max_size=5))
def test_tensors_counts_do_not_depend_on_order_or_cut(seed, places):
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed + 1))
    one, other = StatisticsBuilder(), StatisticsBuilder()
    one.add("x", x)
    for part in np.split(x[order].numpy(), sorted(places)):
        other.add("x", torch.from_numpy(part))
    a, b = one.finish(64)["x"], other.finish(64)["x"]
    np.testing.assert_array_equal(a.histogram.counts, b.histogram.counts)
    assert (a.minimum, a.maximum, a.count) == (b.minimum, b.maximum, b.count)
    np.testing.assert_allclose(a.channels.mean, b.channels.mean, rtol=0, atol=1e-6 * float(x.std()))
    np.testing.assert_allclose(a.channels.var, b.channels.var, rtol=1e-5)


def test_numbers_equal_numpys_on_what_the_runtime_computes():
    """Activations from ONNX Runtime, statistics from numpy in float64."""
    watched = [name for name in WHOLE if name != "image"]
    proto = GRAPH.editable()
    del proto.graph.output[:]
    for name in watched:
        proto.graph.output.append(onnx_value(name))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = dict(zip(watched, session.run(watched, {"image": IMAGES}), strict=True))
    for name, value in outputs.items():
        x = value.astype(np.float64)
        rest = tuple(axis for axis in range(x.ndim) if axis != 1)
        found = WHOLE[name]
        scale = max(abs(x.min()), abs(x.max()))
        assert found.count == x.size
        assert found.minimum == pytest.approx(x.min(), abs=1e-5 * scale)
        assert found.maximum == pytest.approx(x.max(), abs=1e-5 * scale)
        assert found.mean == pytest.approx(x.mean(), abs=1e-6 * scale)
        assert found.var == pytest.approx(x.var(), rel=1e-4)
        np.testing.assert_allclose(found.channels.mean, x.mean(rest), atol=1e-5 * scale)
        np.testing.assert_allclose(found.channels.var, x.var(rest), rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(found.channels.minimum, x.min(rest), atol=1e-5 * scale)
        np.testing.assert_allclose(found.channels.maximum, x.max(rest), atol=1e-5 * scale)


def onnx_value(name):
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def test_a_small_spread_around_a_large_mean_is_not_lost():
    rng = np.random.default_rng(0)
    x = (1000 + 0.01 * rng.normal(0, 1, (40, 2, 16, 16))).astype(np.float32)
    builder = StatisticsBuilder()
    for part in np.split(x, 5):
        builder.add("x", torch.from_numpy(part))
    found = builder.finish(40)["x"].channels
    exact = x.astype(np.float64)
    np.testing.assert_allclose(found.var, exact.var((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(found.mean, exact.mean((0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("numbers", [32, 45])
def test_images_along_axis_one_are_no_channels(numbers):
    """Attention layers compute on [tokens, images, features]."""
    b = Builder(6)
    x = b.node("Transpose", "image", perm=[2, 0, 1, 3])
    graph = b.graph([b.node("Relu", x)])
    found = collect(graph, cut(IMAGES[:numbers], [7]), device="cpu")[x]
    exact = IMAGES[:numbers].astype(np.float64)
    assert found.channels.mean.shape == (1,)
    assert found.count == found.channels.count == exact.size
    assert found.mean == pytest.approx(exact.mean(), abs=1e-6)
    assert found.var == pytest.approx(exact.var(), rel=1e-5)
    builder = StatisticsBuilder()  # without the graph's shapes, it is seen when the size changes
    for part in np.split(IMAGES, [16, 32]):
        builder.add("x", torch.from_numpy(part.transpose(2, 0, 1, 3).copy()))
    found = builder.finish(45)["x"]
    assert found.channels.mean.shape == (1,)
    assert found.mean == pytest.approx(IMAGES.astype(np.float64).mean(), abs=1e-6)
    assert found.var == pytest.approx(IMAGES.astype(np.float64).var(), rel=1e-5)
    assert (found.channels.minimum[0], found.channels.maximum[0]) == (IMAGES.min(), IMAGES.max())


def test_merging_parts_gives_the_whole():
    """Cut at a multiple of the micro-batch, the activations are the same, so counts and extremes merge exactly."""
    a = collect(GRAPH, cut(IMAGES[:16], []), device="cpu")
    b = collect(GRAPH, cut(IMAGES[16:32], []), device="cpu")
    c = collect(GRAPH, cut(IMAGES[32:], []), device="cpu")
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    for name in WHOLE:
        for merged in (left, right):
            np.testing.assert_array_equal(merged[name].histogram.counts, WHOLE[name].histogram.counts)
            np.testing.assert_array_equal(merged[name].channels.maximum, WHOLE[name].channels.maximum)
            np.testing.assert_allclose(merged[name].channels.mean, WHOLE[name].channels.mean, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(merged[name].channels.var, WHOLE[name].channels.var, rtol=1e-6, atol=1e-10)
    assert left.images == WHOLE.images
    assert left.ranges("mse").digest == WHOLE.ranges("mse").digest


def test_merging_strangers_is_refused():
    with pytest.raises(CalibrationError, match="different networks"):
        WHOLE.merge(collect(fold(small_net(1)).graph, cut(IMAGES[:4], []), device="cpu"))


def test_saved_and_loaded(tmp_path):
    WHOLE.save(tmp_path / "statistics.npz")
    found = Statistics.load(tmp_path / "statistics.npz")
    identical(found, WHOLE)
    assert found.ranges("entropy").digest == WHOLE.ranges("entropy").digest
    (tmp_path / "bad.npz").write_bytes(b"nothing of the kind")
    for bad in ("bad.npz", "missing.npz"):
        with pytest.raises(CalibrationError, match="not a statistics file"):
            Statistics.load(tmp_path / bad)


def test_channels_that_never_change_are_named():
    b = Builder(3)
    w = b.rng.normal(0, 1, (4, 3, 1, 1)).astype(np.float32)
    w[2] = 0
    x = b.node("Conv", "image", b.constant(w), b.constant(np.array([0, 0, 0.5, -100], np.float32)))
    y = b.node("Relu", x)
    found = collect(b.graph([y]), cut(images(20), []), device="cpu")
    assert dict(found.unexcited()) == {x: [2], y: [2, 3]}


def test_all_float_activations_are_seen_and_nothing_else():
    expected = {"image"} | {name for node in GRAPH for name in node.output}
    assert set(WHOLE) == expected
    some = sorted(expected)[:3]
    assert set(collect(GRAPH, cut(IMAGES[:3], []), values=some, device="cpu")) == set(some)
    with pytest.raises(UsageError, match="no activation named nonsense"):
        collect(GRAPH, cut(IMAGES[:3], []), values=["nonsense"], device="cpu")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_named(bad):
    x = images(4)
    x[2, 1, 3, 3] = bad
    with pytest.raises(CalibrationError, match="'image' is not finite"):
        collect(GRAPH, cut(x, []), device="cpu")


def test_no_images_are_refused():
    with pytest.raises(CalibrationError, match="empty"):
        collect(GRAPH, [], device="cpu")


@settings(max_examples=50, deadline=None)
@given(places=st.lists(st.integers(0, 45), max_size=10), size=st.integers(1, 50))
def test_micro_batches_are_the_same_stream(places, size):
    found = list(micro_batches(cut(IMAGES, places), size))
    np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in found]), IMAGES)
    assert [len(batch["image"]) for batch in found[:-1]] == [size] * (len(found) - 1)


def test_inputs_of_different_length_are_refused():
    with pytest.raises(CalibrationError, match="same number of images"):
        list(micro_batches([{"a": np.zeros((3, 1)), "b": np.zeros((2, 1))}], 2))


_PROBE = """
import resource, sys
import numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
from nets import Builder
from zsq_deploy.quant import collect
b = Builder()
x = b.node("Relu", b.conv("image", 3, 16, bias=True))
x = b.node("Relu", b.conv(x, 16, 16, bias=True))
graph = b.graph([x], size=64)
rng = np.random.default_rng(0)
def batches(n):
    for _ in range(n // 8):
        yield {{"image": rng.normal(0, 1, (8, 3, 64, 64)).astype(np.float32)}}
collect(graph, batches(int(sys.argv[1])), device="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    """The numbers of all activations of 400 images would take 1.7 GB; the peaks differ by less than 30 MB."""
    folder = os.path.dirname(__file__)  # noqa: PTH120
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", _PROBE.format(folder=folder), str(number)],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout
        )
        for number in (40, 400)
    ]
    assert peaks[1] - peaks[0] < 30 * 1024, peaks
