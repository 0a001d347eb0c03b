"""Rounding by moments: covariances against whole covariance matrices, codes against all codes, measurements against numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from zsq_deploy.errors import UsageError
from zsq_deploy.model.graph import attributes
from zsq_deploy.quant import Granularity, Scheme, analytic_ranges, insert_qdq, propagate_model
from zsq_deploy.quant.algebra import (
    analytic_moments,
    dfq,
    equalized_model,
    measured_moments,
    recode_by_moments,
    round_by_moments,
)
from zsq_deploy.quant.algebra.covariance import (
    Field,
    clipped_field,
    covariances,
    filtered,
    hermite_of_clip,
    picture_field,
)
from zsq_deploy.quant.algebra.rounding import damped, error_of, round_weights, search_scales
from zsq_deploy.quant.algebra.weights import form_of
from zsq_deploy.quant.reader import dequantized_weight

from .nets import images, small_model

W4 = Scheme(4, granularity=Granularity.CHANNEL, restricted=True)
U8 = Scheme(8, signed=False, symmetric=False)
SIDE = 6


def whole(field):
    """Covariance of all numbers of a field on its torus, ``[C * Y * X, C * Y * X]``."""
    channels, _, rows, columns = field.cov.shape
    places = list(itertools.product(range(rows), range(columns)))
    found = np.empty((channels, len(places), channels, len(places)))
    for (i, p), (j, q) in itertools.product(enumerate(places), enumerate(places)):
        found[:, i, :, j] = field.cov[:, :, (q[0] - p[0]) % rows, (q[1] - p[1]) % columns]
    return found.reshape(channels * len(places), -1)


def random_field(channels, seed):
    """The field that a random filter makes of independent numbers, written down from its definition."""
    rng = np.random.default_rng(seed)
    taps = rng.normal(size=(channels, 3, SIDE, SIDE))
    cov = np.zeros((channels, channels, SIDE, SIDE))
    for y, x in itertools.product(range(SIDE), repeat=2):
        cov[:, :, y, x] = np.einsum("cnyx,dnyx->cd", taps, np.roll(taps, (-y, -x), (2, 3)))
    return Field(cov)


def layer_matrix(weight, groups, dilation):
    """A convolution on the torus as one matrix."""
    outputs, inner, rows, columns = weight.shape
    matrix = np.zeros((outputs, SIDE, SIDE, groups * inner, SIDE, SIDE))
    for o, i, r, c in itertools.product(range(outputs), range(inner), range(rows), range(columns)):
        channel = o // (outputs // groups) * inner + i
        for y, x in itertools.product(range(SIDE), repeat=2):
            matrix[o, y, x, channel, (y + r * dilation) % SIDE, (x + c * dilation) % SIDE] += weight[o, i, r, c]
    return matrix.reshape(outputs * SIDE * SIDE, -1)


@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_a_convolution_maps_the_whole_covariance(groups, dilation):
    field = random_field(4, 0)
    weight = np.random.default_rng(1).normal(size=(4, 4 // groups, 3, 2))
    matrix = layer_matrix(weight, groups, dilation)
    found = filtered(field, weight, groups, (SIDE, SIDE), (1, 1), (dilation, dilation))
    np.testing.assert_allclose(whole(found), matrix @ whole(field) @ matrix.T, atol=1e-9 * found.var.max())


def test_a_stride_picks_places():
    field = random_field(2, 3)
    places = np.arange(2 * SIDE * SIDE).reshape(2, SIDE, SIDE)[:, ::2, ::2].reshape(-1)
    found = field.sampled((SIDE // 2, SIDE // 2), (2, 2))
    np.testing.assert_allclose(whole(found), whole(field)[np.ix_(places, places)])


def test_patches_are_parts_of_the_whole():
    field = random_field(2, 4)
    places = np.array([(0, 0), (0, 2), (2, 0), (2, 2)])
    rows = [c * SIDE * SIDE + y * SIDE + x for c in range(2) for y, x in places]
    np.testing.assert_allclose(field.patches(places), whole(field)[np.ix_(rows, rows)])


def test_scaling_keeps_correlations():
    field = random_field(3, 5)
    found = field.scaled_to(np.array([1.0, 4.0, 0.0]))
    np.testing.assert_allclose(found.var, [1.0, 4.0, 0.0])
    ratio = found.cov[0, 1] / field.cov[0, 1]
    np.testing.assert_allclose(ratio, ratio[0, 0])


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.0, 6.0), (-1.0, 0.5), (-math.inf, math.inf)])
def test_hermite_coefficients_of_corners(bounds):
    mean, std = np.array([-1.0, 0.3, 5.0]), np.array([0.5, 2.0, 1.5])
    u = np.linspace(-12, 12, 400_001)
    density = np.exp(-0.5 * u**2) / math.sqrt(2 * math.pi) * (u[1] - u[0])
    values = np.clip(mean[:, None] + std[:, None] * u, *bounds)
    found = hermite_of_clip(mean, std, *bounds, orders=6)
    for order in range(1, 7):
        wanted = (values * np.polynomial.hermite_e.hermeval(u, [0] * order + [1]) * density).sum(axis=1)
        np.testing.assert_allclose(found[order - 1], wanted, atol=1e-6)


@pytest.mark.parametrize("rho", [-0.9, -0.3, 0.0, 0.5, 0.95])
def test_rectified_pairs_have_the_arc_cosine_covariance(rho):
    cov = np.array([[1.0, rho], [rho, 1.0]])[:, :, None, None]
    var = np.full(2, 0.5 - 0.5 / math.pi)
    found = clipped_field(Field(cov), np.zeros(2), 0.0, math.inf, var).cov[:, :, 0, 0]
    wanted = (math.sqrt(1 - rho**2) + rho * (math.pi - math.acos(rho)) - 1.0) / (2 * math.pi)
    np.testing.assert_allclose(np.diagonal(found), var, rtol=1e-9)
    assert found[0, 1] == pytest.approx(wanted, abs=2e-3)


def test_neighbours_in_pictures_are_alike():
    field = picture_field(np.array([1.0, 2.0, 3.0]), (16, 16))
    np.testing.assert_allclose(field.var, [1.0, 2.0, 3.0])
    along = field.cov[0, 0, 0, :9]
    assert (np.diff(along) < 0).all()
    np.testing.assert_allclose(field.cov[0, 0, 0, 1:], field.cov[0, 0, 0, :0:-1])  # distances -1 and 1 are the same
    assert np.linalg.eigvalsh(whole(picture_field(np.ones(2), (5, 5)))).min() > -1e-9


def problem(seed, inputs, outputs=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * inputs, inputs)) @ rng.normal(size=(inputs, inputs)) + rng.normal(size=inputs)
    return rng.uniform(-6, 6, (outputs, inputs)), damped(x.T @ x / len(x), 0.01)


@pytest.mark.parametrize("seed", range(8))
def test_codes_are_near_the_best_of_all(seed):
    steps, hessian = problem(seed, 5)
    codes = round_weights(steps, hessian, -7, 7)
    found, nearest = error_of(codes - steps, hessian), error_of(np.rint(steps) - steps, hessian)
    choices = np.array(list(itertools.product(range(-3, 5), repeat=5)))
    for row in range(len(steps)):
        every = np.clip(np.floor(steps[row]) + choices, -7, 7)
        best = error_of(every - steps[row], hessian).min()
        assert best <= found[row] + 1e-9
        assert found[row] <= nearest[row] + 1e-9
        assert found[row] <= 4.0 * best  # rounding to nearest is up to a hundred times worse here
    assert codes.min() >= -7
    assert codes.max() <= 7


@pytest.mark.parametrize("seed", range(4))
def test_no_single_code_can_be_improved(seed):
    steps, hessian = problem(seed, 12, outputs=4)
    codes = round_weights(steps, hessian, -7, 7, sweeps=100)
    found = error_of(codes - steps, hessian)
    for k, move in itertools.product(range(12), (-2, -1, 1, 2)):
        other = codes.copy()
        other[:, k] = np.clip(other[:, k] + move, -7, 7)
        assert (error_of(other - steps, hessian) >= found - 1e-9).all()


def test_independent_inputs_round_to_nearest():
    steps = np.random.default_rng(0).uniform(-9, 9, (5, 7))
    np.testing.assert_array_equal(
        round_weights(steps, np.diag(np.arange(1.0, 8.0)), -7, 7), np.clip(np.rint(steps), -7, 7)
    )


@pytest.mark.parametrize("seed", range(4))
def test_scales_are_no_worse_than_those_of_the_largest_weight(seed):
    weight, hessian = problem(seed, 10)
    weight[1] = 0.0  # a dead channel
    scale, codes = search_scales(weight, hessian, -7, 7)
    assert (scale > 0).all()
    plain = np.abs(weight).max(axis=1) / 7
    plain[plain == 0] = 1.0
    nearest = np.rint(weight / plain[:, None]) * plain[:, None]
    assert (error_of(codes * scale[:, None] - weight, hessian) <= error_of(nearest - weight, hessian) + 1e-9).all()
    # twice the weight has twice the scale and the same codes
    twice, same = search_scales(2.0 * weight, hessian, -7, 7)
    live = [0, 2]
    np.testing.assert_allclose(twice[live], 2.0 * scale[live])
    np.testing.assert_array_equal(same, codes)


def test_measured_moments_are_those_of_the_patches():
    graph = small_model().folded().graph
    x = images(6)
    found = measured_moments(graph, [{"image": x[:4]}, {"image": x[4:]}], patches=10**9)
    node = next(node for node in graph.nodes if node.op_type == "Conv" and node.input[0] == "image")
    attrs, weight = attributes(node), graph.constant(node.input[1])
    top, left, bottom, right = attrs.get("pads", (0, 0, 0, 0))
    stride = attrs.get("strides", (1, 1))
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    rows = windows[:, :, :: stride[0], :: stride[1]].transpose(0, 2, 3, 1, 4, 5).reshape(-1, weight[0].size)
    np.testing.assert_allclose(found[node.name].mean[0], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found[node.name].cov[0], np.cov(rows.T, bias=True), atol=1e-5)
    with pytest.raises(UsageError, match="nothing to measure"):
        measured_moments(graph, [])


def test_analytic_moments_have_the_known_variances():
    model = small_model()
    known, found = propagate_model(model).channels, analytic_moments(model)
    assert found
    together = 0
    for node in model.graph.nodes:
        if node.name not in found:
            continue
        moments, marginal = found[node.name], known[node.input[0]]
        groups, size = moments.mean.shape
        repeats = groups * size // len(marginal.mean)
        np.testing.assert_allclose(moments.mean.reshape(-1), np.repeat(marginal.mean, repeats))
        assert all(np.allclose(cov, cov.T) for cov in moments.cov)
        assert all(np.linalg.eigvalsh(cov).min() > -1e-6 * np.trace(cov) for cov in moments.cov)
        if marginal.kind == "bn":
            variances = np.einsum("gkk->gk", moments.cov).reshape(-1)
            np.testing.assert_allclose(variances, np.repeat(marginal.var, repeats), rtol=1e-6, atol=1e-9)
        together += any(np.abs(cov - np.diag(np.diag(cov))).max() > 0 for cov in moments.cov)
    assert together  # somewhere channels or places were followed together


def test_a_graph_gets_exactly_the_codes_that_were_found():
    model = small_model()
    graph = model.folded().graph
    done = round_by_moments(graph, analytic_moments(model), W4, candidates=4)
    assert done.layers
    qdq = insert_qdq(done.graph, analytic_ranges(model), activation=U8, weight=W4, weight_scales=done.scales)
    compared = 0
    for name in done.layers:
        weight = done.graph.constant(done.graph.node(name).input[1])
        written = dequantized_weight(qdq, qdq.node(name).input[1])
        if written is not None:
            compared += 1
            np.testing.assert_allclose(written, weight, atol=1e-6 * np.abs(weight).max())
    assert compared
    with pytest.raises(UsageError, match="zero point"):
        round_by_moments(graph, analytic_moments(model), U8)


def output_error(graph, qdq, moments):
    """Expected squared error of every layer's output, mean share and damping as they are by default."""
    found = {}
    for name, known in moments.items():
        node = graph.node(name)
        written = dequantized_weight(qdq, qdq.node(name).input[1])
        if written is None:
            continue
        form = form_of(graph, node)
        error = form.read(written.astype(np.float64) - graph.constant(node.input[1]))
        hessians = [damped(second, 0.01) for second in known.second(0.1)]
        rows = error.reshape(*error.shape[:2], -1)
        found[name] = sum(error_of(part, hessian).sum() for part, hessian in zip(rows, hessians, strict=True))
    return found


def test_codes_on_given_scales_are_better_than_the_nearest():
    model = small_model()
    graph, moments = model.folded().graph, analytic_moments(model)
    qdq = insert_qdq(graph, analytic_ranges(model), activation=U8, weight=U8)
    done = recode_by_moments(qdq, graph, moments)
    before, after = output_error(graph, qdq, moments), output_error(graph, done, moments)
    assert all(after[name] <= before[name] * (1 + 1e-5) for name in before)
    assert sum(after.values()) < 0.9 * sum(before.values())
    for node in qdq.nodes:  # nothing but codes of weights has changed
        for name in node.input:
            old, new = qdq.constant(name), done.constant(name)
            if old is not None and old.dtype != np.uint8:
                np.testing.assert_array_equal(old, new)
    wrong = dict.fromkeys(moments, next(iter(moments.values())))
    with pytest.raises(UsageError, match="moments of shape"):
        recode_by_moments(qdq, graph, wrong)


def test_capped_channels_are_followed_too():
    model = small_model()
    capped, _ = equalized_model(model, clips="cap")
    before, after = covariances(model), covariances(capped)
    relus = [
        node
        for node in capped.graph.nodes
        if node.op_type == "Relu" and capped.graph.producer(node.input[0]).op_type == "Min"
    ]
    assert relus
    for node in relus:
        name = node.output[0]
        factors = np.sqrt(after[name].var / before[name].var)
        wanted = before[name].cov * factors[:, None, None, None] * factors[None, :, None, None]
        np.testing.assert_allclose(after[name].cov, wanted, atol=1e-3 * after[name].var.max())
    assert set(dfq(model, clips="cap", rounding="moments").biases) == set(dfq(model, clips="cap").biases)
