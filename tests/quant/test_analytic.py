"""Analytic ranges: closed forms against sampling, propagation against networks whose batch statistics are true."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.model.fold import fold
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant import Ranges, analytic_ranges, collect, implied_ranges, propagate_model, widen
from zsq_deploy.quant.analytic import clipped_normal, propagate
from zsq_deploy.quant.coverage import coverage

from .nets import Builder, images, small_model


@settings(max_examples=60, deadline=None)
@given(
    mean=st.floats(-3, 3),
    std=st.floats(0.05, 3),
    bounds=st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 0.5)]),
)
def test_moments_of_a_clipped_normal(mean, std, bounds):
    # quadrature over quantiles, an independent route
    q = (np.arange(200_000) + 0.5) / 200_000
    normal = torch.special.ndtri(torch.from_numpy(q)).numpy()
    x = np.clip(mean + std * normal, *bounds)
    found_mean, found_var = clipped_normal(np.array([mean]), np.array([std**2]), *bounds)
    assert found_mean[0] == pytest.approx(x.mean(), abs=2e-4 * std)
    assert found_var[0] == pytest.approx(x.var(), abs=2e-3 * std**2)


INPUTS = {"image": (np.full(3, -3.0), np.full(3, 3.0))}


def sampled(graph, x):
    names = [name for node in graph.nodes for name in node.output]
    with torch.no_grad():
        return Twin(graph, dtype=torch.float64, device="cpu").run({"image": torch.from_numpy(x)}, fetch=names)


OPS = [
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("HardSwish", {}),
    ("HardSigmoid", {"alpha": 1 / 6}),
    ("LeakyRelu", {"alpha": 0.1}),
    ("Elu", {}),
    ("Softplus", {}),
    ("Abs", {}),
    ("Neg", {}),
    ("Mish", {}),
    ("Selu", {}),
]


@pytest.mark.parametrize(("op", "attrs"), OPS)
def test_elementwise_functions_of_a_normal(op, attrs):
    b = Builder()
    # A normalization of independent normal inputs gives exactly the normal that it promises.
    scale, shift = np.array([0.5, 1.0, 2.0], np.float32), np.array([-1.0, 0.2, 1.0], np.float32)
    zero, one = b.constant(np.zeros(3, np.float32)), b.constant(np.ones(3, np.float32))
    x = b.node("BatchNormalization", "image", b.constant(scale), b.constant(shift), zero, one, epsilon=0.0)
    graph = b.graph([b.node(op, x, **attrs)], opset=18)
    found = propagate(graph, INPUTS, sigmas=4.0).channels[graph.outputs[0].name]
    y = sampled(graph, np.random.default_rng(0).normal(0, 1, (2000, 3, 12, 12)))[graph.outputs[0].name].numpy()
    np.testing.assert_allclose(found.mean, y.mean((0, 2, 3)), atol=0.01)
    np.testing.assert_allclose(found.var, y.var((0, 2, 3)), rtol=0.03)
    inside = ((y >= found.low.reshape(1, 3, 1, 1) - 1e-4) & (y <= found.high.reshape(1, 3, 1, 1) + 1e-4)).mean()
    assert inside > 0.9998


def test_linear_layers_of_independent_pixels():
    b = Builder(1)
    x = b.conv("image", 3, 6, k=1, bias=True)
    y = b.conv(x, 6, 4, k=3, pad=0, group=2, bias=True)
    graph = b.graph([y])
    found = propagate(graph, {"image": (np.full(3, 0.0), np.full(3, 1.0))}, sigmas=4.0).channels
    values = sampled(graph, np.random.default_rng(0).uniform(0, 1, (500, 3, 12, 12)))
    np.testing.assert_allclose(found[x].mean, values[x].mean((0, 2, 3)), atol=0.01)
    np.testing.assert_allclose(found[x].var, values[x].var((0, 2, 3)), rtol=0.05)
    np.testing.assert_allclose(found[y].mean, values[y].mean((0, 2, 3)), atol=0.01)
    assert (found[y].var >= 0.5 * values[y].var((0, 2, 3)).numpy()).all()
    assert (found[y].low <= values[y].amin((0, 2, 3)).numpy() + 1e-6).all() or found[y].kind == "derived"


def test_bounds_are_never_exceeded_by_what_they_bound():
    b = Builder(2)
    x = b.conv("image", 3, 4, k=3, bias=True)
    graph = b.graph([b.node("Relu", x)])
    low, high = np.array([-1.0, -2.0, 0.0]), np.array([1.0, 0.5, 3.0])
    found = propagate(graph, {"image": (low, high)}, sigmas=1e6).channels
    rng = np.random.default_rng(0)
    corners = np.where(rng.random((400, 3, 12, 12)) < 0.5, low.reshape(1, 3, 1, 1), high.reshape(1, 3, 1, 1))
    values = sampled(graph, corners)
    for name in (x, graph.outputs[0].name):
        assert (values[name].amin((0, 2, 3)).numpy() >= found[name].low - 1e-5).all()
        assert (values[name].amax((0, 2, 3)).numpy() <= found[name].high + 1e-5).all()


def true_statistics(seed=0):
    """The small network with batch statistics as its own images have them."""
    model = small_model(seed)
    x = images(512, seed)
    proto = model.graph.editable()
    # one normalization after the other, in graph order
    from onnx import numpy_helper

    from zsq_deploy.model.graph import Graph

    place = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in [n for n in proto.graph.node if n.op_type == "BatchNormalization"]:
        with torch.no_grad():
            z = Twin(Graph(proto), device="cpu").run({"image": torch.from_numpy(x)}, fetch=[node.input[0]])[
                node.input[0]
            ]
        for name, value in ((node.input[3], z.mean((0, 2, 3))), (node.input[4], z.var((0, 2, 3)))):
            place[name].CopyFrom(numpy_helper.from_array(value.numpy().astype(np.float32), name))
    return Model(Graph(proto), name="true"), x


MODEL, X = true_statistics()
OBSERVED = collect(MODEL.folded().graph, [{"image": X}], device="cpu").ranges("minmax")


def test_moments_behind_true_statistics_are_true():
    found = propagate_model(MODEL).channels
    statistics = collect(MODEL.folded().graph, [{"image": X}], device="cpu")
    checked = 0
    for node in MODEL.graph.nodes:
        name = node.output[0]
        if node.op_type not in ("Relu", "Clip", "Add", "MaxPool"):
            continue
        # Behind a normalization the moments are nearly exact; sums and linear layers take independence for granted.
        exact = MODEL.graph.producer(node.input[0]).op_type == "BatchNormalization"
        checked += exact
        tolerance = 0.1 if exact else 0.6
        seen = statistics[name].channels
        np.testing.assert_allclose(found[name].mean, seen.mean, atol=tolerance * np.sqrt(seen.var.max()))
        np.testing.assert_allclose(found[name].std, np.sqrt(seen.var), rtol=0.4 if exact else 0.6)
    assert checked >= 4


def test_every_activation_of_the_deployed_graph_gets_a_range():
    ranges = analytic_ranges(MODEL)
    graph = MODEL.folded().graph
    names = {name for node in graph.nodes for name in node.output} | {"image"}
    assert names <= set(ranges)
    assert ranges.notes == ()
    assert ranges.model_digest == MODEL.digest
    for name in names - {"image"}:
        low, high = ranges[name]
        seen_low, seen_high = OBSERVED[name]
        assert low <= 0.5 * seen_low + 1e-9, name
        assert 0.5 * seen_high <= high <= 8 * seen_high + 1e-6, name


def test_the_nonlinearity_bounds_the_reach():
    ranges = analytic_ranges(MODEL, sigmas=50.0)
    for node in MODEL.graph.nodes:
        if node.op_type == "Relu":
            assert ranges[node.output[0]][0] == 0.0
        if node.op_type == "Clip":
            assert ranges[node.output[0]] == (0.0, 6.0)


def test_unknown_operators_are_named_and_known_ones_go_on():
    b = Builder()
    x = b.node("Relu", b.bn(b.conv("image", 3, 4), 4))
    y = b.node("CumSum", x, b.constant(np.array(1)))
    z = b.node("Relu", b.bn(b.conv(y, 4, 4), 4))
    ranges = analytic_ranges(Model(b.graph([z])))
    assert y not in ranges
    assert x in ranges
    assert any("CumSum" in note for note in ranges.notes)


def test_networks_without_batch_norm_are_told_what_that_means():
    b = Builder()
    ranges = analytic_ranges(Model(b.graph([b.node("Relu", b.conv("image", 3, 3, bias=True))])))
    assert len(ranges) == 3
    assert any("no batch normalization" in note for note in ranges.notes)


def test_implied_ranges_speak_only_of_what_batch_norm_determines():
    implied = implied_ranges(MODEL, sigmas=3.0)
    kinds = {node.output[0]: node.op_type for node in MODEL.graph.nodes}
    assert {kinds[name] for name in implied} <= {"BatchNormalization", "Relu", "Clip", "MaxPool", "Concat"}
    for norm in MODEL.batch_norms():
        low, high = implied[norm.output]
        assert low == pytest.approx((norm.beta - 3 * np.abs(norm.gamma)).min())
        assert high == pytest.approx((norm.beta + 3 * np.abs(norm.gamma)).max())
    plain = Builder()
    bare = Model(plain.graph([plain.conv("image", 3, 3, bias=True)]))
    assert len(implied_ranges(bare)) == 0


def test_coverage_and_widening():
    observed = Ranges({"a": (0.0, 4.0), "b": (-1.0, 1.0), "c": (0.0, 1.0)}, "minmax")
    implied = {"a": (0.0, 8.0), "b": (-0.5, 0.5), "d": (0.0, 1.0)}
    assert coverage(observed, implied) == {"a": 0.5, "b": 2.0}
    wide, shares = widen(observed, implied)
    assert shares == {"a": 0.5, "b": 2.0}
    assert dict(wide) == {"a": (0.0, 8.0), "b": (-1.0, 1.0), "c": (0.0, 1.0)}
    assert wide.method == "minmax + coverage"
    half, _ = widen(observed, implied, strength=0.5)
    assert half["a"] == (0.0, 6.0)
    none, _ = widen(observed, implied, strength=0.0)
    assert dict(none) == dict(observed)
    capped, _ = widen(observed, {"a": (0.0, 1000.0)}, most=3.0)
    assert capped["a"] == pytest.approx((0.0, 12.0))


@settings(max_examples=50, deadline=None)
@given(
    low=st.floats(-10, 0),
    high=st.floats(0, 10),
    want_low=st.floats(-50, 0),
    want_high=st.floats(0, 50),
    strength=st.floats(0, 1),
    most=st.floats(1, 10),
)
def test_widening_never_narrows_and_never_exceeds_its_limits(low, high, want_low, want_high, strength, most):
    observed = Ranges({"a": (low, high)}, "minmax")
    new_low, new_high = widen(observed, {"a": (want_low, want_high)}, strength=strength, most=most)[0]["a"]
    assert new_low <= low
    assert new_high >= high
    assert new_low >= min(low, want_low) - 1e-9
    assert new_high <= max(high, want_high) + 1e-9
    if high - low > 0:
        assert new_high - new_low <= most * (high - low) * (1 + 1e-9) + 1e-12


def test_fold_keeps_the_names_that_ranges_speak_of():
    assert set(fold(MODEL.graph).graph.nodes[0].output) <= set(analytic_ranges(MODEL))
