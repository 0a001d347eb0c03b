"""The quality of a calibration set: every figure against float64 numpy or a closed form, whatever way the images are cut."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.calib.quality import (
    DiversityBuilder,
    agreement,
    batch_norm_distance,
    diversity,
    feature_of,
    lines,
    measure_quality,
    measure_reach,
    outside,
    range_error,
)
from zsq_deploy.calib.quality.diversity import LARGEST
from zsq_deploy.calib.quality.measure import float_runner, split
from zsq_deploy.model import Graph, Model
from zsq_deploy.quant import collect
from zsq_deploy.quant.histogram import Histogram

CLASSES = 4


def network(*, softmax: bool = False, norm: bool = True, silent: bool = False) -> Model:
    """conv, batch norm, relu, pool, linear: small enough to be computed again by hand."""
    random = np.random.default_rng(3)
    weight = random.normal(0, 0.5, (5, 3, 1, 1)).astype(np.float32)
    gamma, beta = random.uniform(0.5, 1.5, 5), random.normal(0.2, 0.3, 5)
    mean, var = random.normal(0, 0.2, 5), random.uniform(0.2, 1.0, 5)
    if silent:
        gamma[1], beta[1], weight[2], beta[2] = 0.0, 0.3, 0.0, 0.4
    last = random.normal(0, 1, (CLASSES, 5)).astype(np.float32)
    constants = {"w": weight, "g": gamma, "b": beta, "m": mean, "v": var, "l": last, "lb": np.arange(CLASSES) / 10}
    nodes = [helper.make_node("Conv", ["x", "w"], ["z"], "conv")]
    nodes += [helper.make_node("BatchNormalization", ["z", "g", "b", "m", "v"], ["y"], "norm")] if norm else []
    nodes += [
        helper.make_node("Relu", ["y" if norm else "z"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "l", "lb"], ["s" if softmax else "out"], "last", transB=1),
    ]
    nodes += [helper.make_node("Softmax", ["s"], ["out"], "softmax")] if softmax else []
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 5])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items() if k in used],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(proto)
    return Model(Graph(proto), name="tiny", source="tiny.onnx")


def draw(count: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, scale, (count, 3, 6, 5))).astype(np.float32)


def a_set(model: Model, x: np.ndarray) -> CalibrationSet:
    return CalibrationSet.from_arrays({"x": x}, CalibrationManifest.of(model, method="test"))


def constants(model: Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(model.graph.constant(name), np.float64) for name in model.graph.initializer_names}


def by_hand(model: Model, x: np.ndarray) -> dict[str, np.ndarray]:
    """Every activation in float64."""
    c = constants(model)
    z = np.einsum("oc,nchw->nohw", c["w"][:, :, 0, 0], x.astype(np.float64))
    y = c["g"][:, None, None] * (z - c["m"][:, None, None]) / np.sqrt(c["v"] + 1e-5)[:, None, None]
    y = y + c["b"][:, None, None]
    r = np.maximum(y, 0)
    p = r.mean((2, 3))
    return {"z": z, "y": y, "r": r, "f": p, "out": p @ c["l"].T + c["lb"]}


# -- batch norm --


def test_batch_norm_distance_is_that_of_numpy():
    model, x = network(), draw(21)
    found = batch_norm_distance(model, [{"x": x}])
    assert found is not None
    c, z = constants(model), by_hand(model, x)["z"]
    m, v = z.mean((0, 2, 3)), z.var((0, 2, 3))
    d = np.sqrt(c["v"] + 1e-5)
    (layer,) = found.layers
    assert (layer.name, layer.channels, found.images) == ("norm", 5, 21)
    assert layer.mean == pytest.approx(np.sqrt(np.mean(((m - c["m"]) / d) ** 2)), rel=1e-5)
    assert layer.spread == pytest.approx(np.sqrt(np.mean(((np.sqrt(v) - np.sqrt(c["v"])) / d) ** 2)), rel=1e-5)
    # the divergence by numerical integration of p log(p / q)
    for_each = []
    for a, b, mu, s2 in zip(m, v + 1e-5, c["m"], c["v"] + 1e-5, strict=True):
        grid = np.linspace(a - 12 * np.sqrt(b), a + 12 * np.sqrt(b), 20_001)
        log_p = -0.5 * (grid - a) ** 2 / b - 0.5 * np.log(2 * np.pi * b)
        log_q = -0.5 * (grid - mu) ** 2 / s2 - 0.5 * np.log(2 * np.pi * s2)
        for_each.append(np.trapezoid(np.exp(log_p) * (log_p - log_q), grid))
    assert layer.kl == pytest.approx(np.mean(for_each), rel=1e-5)
    assert (found.mean, found.spread, found.kl) == (layer.mean, layer.spread, layer.kl)


def test_images_with_the_stored_statistics_have_no_distance():
    model = network()
    c = constants(model)
    x = draw(64)
    z = by_hand(model, x)["z"]
    again = Model(model.graph, name="again")
    proto = again.graph.editable()
    for tensor in proto.graph.initializer:
        if tensor.name in ("m", "v"):
            value = z.mean((0, 2, 3)) if tensor.name == "m" else z.var((0, 2, 3))
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    found = batch_norm_distance(Model(Graph(proto)), [{"x": x}])
    assert found is not None
    assert found.mean < 1e-5
    assert found.spread < 1e-5
    assert found.kl < 1e-8
    assert c["v"].min() > 0
    assert batch_norm_distance(network(norm=False), [{"x": x}]) is None


# -- diversity --


def entropy_number(weights: np.ndarray) -> float:
    kept = weights[weights > 1e-15]
    return float(np.exp(-(kept * np.log(kept)).sum()))


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_diversity_is_that_of_the_whole_kernel_matrix(seed, images, length):
    x = np.random.default_rng(seed).normal(0.5, 1, (images, length))
    builder = DiversityBuilder()
    for row in np.array_split(x, min(3, images)):
        builder.add(row)
    found = builder.finish("f")
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    kernel = units @ units.T
    assert found.effective_images == pytest.approx(entropy_number(np.linalg.eigvalsh(kernel / images)), rel=1e-8)
    off = kernel[~np.eye(images, dtype=bool)]
    assert found.mean_cosine == pytest.approx(off.mean(), abs=1e-10)
    spectrum = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    assert found.effective_directions == pytest.approx(spectrum.sum() ** 2 / np.square(spectrum).sum(), rel=1e-6)


def test_diversity_of_known_sets():
    def of(x: np.ndarray):
        builder = DiversityBuilder()
        builder.add(x)
        return builder.finish("f")

    same = of(np.tile([1.0, 2.0, 3.0], (9, 1)))
    assert same.effective_images == pytest.approx(1)
    assert same.mean_cosine == pytest.approx(1)
    assert same.effective_directions == 0
    orthogonal = of(np.eye(7) * np.arange(1, 8)[:, None])
    assert orthogonal.effective_images == pytest.approx(7)
    assert orthogonal.mean_cosine == pytest.approx(0, abs=1e-12)
    dead = of(np.zeros((3, 4)))
    assert (dead.effective_images, dead.effective_directions) == (1.0, 0.0)
    assert of(np.ones((1, 4))).mean_cosine is None


def test_long_features_keep_their_angles():
    x = np.abs(np.random.default_rng(0).normal(0.3, 1, (40, 5 * LARGEST)))
    builder = DiversityBuilder()
    builder.add(x)
    found = builder.finish("f")
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert found.effective_images == pytest.approx(entropy_number(np.linalg.eigvalsh(units @ units.T / 40)), rel=0.05)


@pytest.mark.parametrize("softmax", [False, True])
def test_classes_are_those_of_the_float_network(softmax):
    model, x = network(softmax=softmax), draw(50)
    found = diversity(model, [{"x": x}])
    values = by_hand(model, x)
    assert found.feature == "f"
    assert feature_of(model.graph) == "f"
    scores = values["out"]
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    votes = np.bincount(scores.argmax(1), minlength=CLASSES)
    assert (found.images, found.classes, found.classes_seen) == (50, CLASSES, int((votes > 0).sum()))
    assert found.effective_classes == pytest.approx(entropy_number(votes / 50))
    assert found.confidence == pytest.approx(probabilities.max(1).mean(), rel=1e-5)


# -- reach --


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=300), st.floats(-6, 6), st.floats(0, 6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_share_outside_of_a_range(numbers, low, width, zeros):
    x = np.array([*numbers, *([0.0] * 40 if zeros else [])], np.float32)
    high = low + width
    histogram = Histogram.of(x)
    exact = float(((x < low) | (x > high)).mean())
    near = float(((np.abs(x - low) < histogram.width) | (np.abs(x - high) < histogram.width)).mean())
    assert abs(outside(histogram, low, high) - exact) <= near + 1e-12
    assert outside(histogram, float(x.min()), float(x.max())) == 0.0


def test_reach_against_numpy():
    model, x, more = network(), draw(40, scale=0.3), draw(30, seed=1, scale=1.0)
    graph = model.folded().graph
    reach = measure_reach(model, collect(graph, [{"x": x}]), collect(graph, [{"x": more}]))
    c, near, far = constants(model), by_hand(model, x), by_hand(model, more)
    rows = {row.name: row for row in reach.tensors}
    relu = rows["r"]
    high = (c["b"] + 6 * np.abs(c["g"])).max()
    assert relu.implied == pytest.approx((0.0, high), rel=1e-6)
    assert relu.share_implied == pytest.approx(near["r"].max() / high, rel=1e-5)
    assert relu.share_witnessed == pytest.approx(near["r"].max() / far["r"].max(), rel=1e-5)
    assert relu.clipped == pytest.approx((far["r"] > near["r"].max()).mean(), abs=1e-4)
    assert relu.share == min(1.0, relu.share_implied, relu.share_witnessed)
    image = rows["x"]
    assert image.share_implied is None
    assert image.share == pytest.approx(min(x.max() / more.max(), x.min() / more.min()), rel=1e-6)
    shares = [max(row.share, 0.01) for row in reach.tensors if row.share is not None]
    assert reach.coverage == pytest.approx(math.prod(shares) ** (1 / len(shares)), rel=1e-9)
    assert reach.coverage < 0.6
    assert reach.worst is not None
    assert reach.worst.share == min(row.share for row in reach.judged)
    assert reach.excess == 0.0
    assert reach.witnesses == 30


def test_wide_images_lose_resolution_instead():
    model = network()
    reach = measure_reach(model, collect(model.folded().graph, [{"x": draw(20, scale=30.0)}]))
    c, wide = constants(model), by_hand(model, draw(20, scale=30.0))
    row = next(row for row in reach.tensors if row.name == "r")
    assert row.share == 1.0
    assert row.excess == pytest.approx(math.log2(wide["r"].max() / (c["b"] + 6 * np.abs(c["g"])).max()), rel=1e-5)
    assert reach.coverage == 1.0
    assert reach.clipped is None


def test_silent_channels_that_the_network_silences_do_not_count():
    model = network(silent=True)
    reach = measure_reach(model, collect(model.folded().graph, [{"x": draw(20)}]))
    row = next(row for row in reach.tensors if row.name == "r")
    # channel 1 has gamma 0: constant by the network's own word; channel 2 has weights of zero, which batch norm does not say
    assert row.unexcited == 1
    channels = sum(row.channels for row in reach.tensors)
    assert reach.unexcited == pytest.approx(sum(row.unexcited for row in reach.tensors) / channels)


def test_nothing_to_judge_by():
    model = network(norm=False)
    reach = measure_reach(model, collect(model.folded().graph, [{"x": draw(4)}]))
    assert reach.coverage is None
    assert reach.worst is None
    assert reach.excess is None


# -- real images, agreement --


def test_range_errors_are_ratios_of_ranges():
    model, ours, real = network(), draw(20, scale=0.5), draw(25, seed=3)
    graph = model.folded().graph
    seen = collect(graph, [{"x": ours}])
    found = range_error({name: (t.minimum, t.maximum) for name, t in seen.items()}, collect(graph, [{"x": real}]))
    a, b = by_hand(model, ours), by_hand(model, real)
    rows = {row.name: row for row in found.tensors}
    assert rows["r"].extent == pytest.approx(np.log2(a["r"].max() / b["r"].max()), rel=1e-4)
    extent = [np.maximum(v["out"].max(), 0) - np.minimum(v["out"].min(), 0) for v in (a, b)]
    assert rows["out"].extent == pytest.approx(np.log2(extent[0] / extent[1]), rel=1e-4)
    assert rows["out"].magnitude == pytest.approx(np.log2(np.abs(a["out"]).max() / np.abs(b["out"]).max()), rel=1e-4)
    assert found.bias == pytest.approx(np.mean([row.extent for row in found.tensors]))
    assert found.extent == pytest.approx(np.mean([abs(row.extent) for row in found.tensors]))
    assert [abs(row.extent) for row in found.worst(3)] == sorted(abs(row.extent) for row in found.tensors)[:-4:-1]
    assert found.images == 25


def test_agreement_with_float():
    model, x = network(), draw(30)
    exact = float_runner(model)
    same = agreement(exact, exact, [{"x": x}])
    assert (same.images, same.top1, same.sqnr_db) == (30, 1.0, 320.0)
    noise = np.random.default_rng(0).normal(0, 0.3, (30, CLASSES))
    position = 0

    def noisy(feeds):
        nonlocal position
        out = exact(feeds)["out"]
        position += len(out)
        return {"out": out + noise[position - len(out) : position]}

    found = agreement(exact, noisy, [{"x": x}])
    out = by_hand(model, x)["out"]
    assert found.top1 == pytest.approx((out.argmax(1) == (out + noise).argmax(1)).mean())
    assert found.sqnr_db == pytest.approx(10 * np.log10(np.square(out).sum() / np.square(noise).sum()), abs=1e-3)


def test_outputs_that_cannot_be_compared_do_not_stop_the_comparison():
    ones = np.ones((3, 4))
    boxes = agreement(lambda _: {"boxes": ones, "n": ones}, lambda _: {"boxes": ones[:2], "n": ones}, [{"x": draw(3)}])
    assert boxes.top1 is None
    assert boxes.sqnr_db == pytest.approx(10 * np.log10(24 / 12))
    broken = agreement(lambda _: {"out": ones}, lambda _: {"out": ones * np.nan}, [{"x": draw(3)}])
    assert broken.sqnr_db == -320.0
    silent = agreement(lambda _: {"out": ones * 0}, lambda _: {"out": ones}, [{"x": draw(3)}])
    assert silent.sqnr_db == -320.0


# -- together --


@given(st.lists(st.integers(1, 19), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_nothing_depends_on_how_the_images_are_cut(cuts):
    model, x = network(), draw(19)
    places = sorted({cut for cut in cuts if cut < 19})
    pieces = [{"x": part} for part in np.split(x, places)]
    assert batch_norm_distance(model, pieces) == batch_norm_distance(model, [{"x": x}])
    assert diversity(model, pieces) == diversity(model, [{"x": x}])
    graph = model.folded().graph
    assert measure_reach(model, collect(graph, pieces)) == measure_reach(model, collect(graph, [{"x": x}]))
    exact = float_runner(model)

    def rounded(feeds):
        return {name: np.rint(value * 4) / 4 for name, value in exact(feeds).items()}

    assert agreement(exact, rounded, pieces) == agreement(exact, rounded, [{"x": x}])


def test_the_whole_quality_as_json_and_as_text():
    model = network()
    held, real = a_set(model, draw(8, seed=2)), [{"x": draw(9, seed=7)}]
    quality = measure_quality(
        model, a_set(model, draw(12)), held_out=held, real=real, quantize=lambda _: float_runner(model)
    )
    found = json.loads(json.dumps(quality.to_json(), allow_nan=False))
    assert (found["images"], found["held_out"], found["pictures"]) == (12, 8, 32)
    assert found["coverage"]["summary"] == quality.reach.coverage
    assert found["batch_norm"]["images"] == 8
    assert found["diversity"]["images"] == 12
    assert found["agreement"] == {"images": 8, "top1": 1.0, "sqnr_db": 320.0}
    assert found["real"]["images"] == 9
    assert {row["name"] for row in found["tensors"]} >= {"x", "r", "f", "out"}
    text = "\n".join(lines(quality))
    for part in (
        f"coverage {quality.reach.coverage:.3f}",
        "batch-norm distance over 8",
        "of 12 wholly",
        "9 real images",
    ):
        assert part in text
    again = measure_quality(
        model,
        a_set(model, draw(12)),
        held_out=held,
        statistics=collect(model.folded().graph, [{"x": draw(12)}]),
    )
    assert again.reach == quality.reach


def test_without_held_out_images_the_last_quarter_is_the_witness():
    model, x = network(), draw(16)
    whole = a_set(model, x)
    judged, witness = split(whole)
    assert (len(judged), len(witness or ())) == (12, 4)
    quality = measure_quality(model, whole)
    assert quality.held_out == 4
    assert "first 12 images" in quality.notes[0]
    assert quality.diversity.images == 16
    other = measure_quality(model, a_set(model, x[:12]), held_out=a_set(model, x[12:]))
    assert other.reach == quality.reach
    assert other.batch_norm == quality.batch_norm
    real = [{"x": draw(9, seed=7)}]
    against = measure_quality(model, whole, real=real).real  # the whole set's ranges, not those of a part
    assert against == measure_quality(model, whole, held_out=a_set(model, x[:2]), real=real).real
    assert split(a_set(model, x[:3]))[1] is None
    assert measure_quality(model, a_set(model, x[:3]), picture_count=0).reach.witnesses == 0
