"""UDFC: the closed form is the least-squares solution, and the next layer's weights make up for the damage."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from zsq_deploy.model.fold import fold
from zsq_deploy.quant import Granularity, Scheme, weight_qparams
from zsq_deploy.quant.algebra import combine, udfc
from zsq_deploy.quant.algebra.udfc import ALPHA_BIAS, ALPHA_IDENTITY

from .nets import Builder, images

W3 = Scheme(3, granularity=Granularity.CHANNEL, restricted=True)


def damaged(rng, channels=6, size=20):
    w, b = rng.normal(0, 1, (channels, size)), rng.normal(0, 1, channels)
    found = weight_qparams(w.astype(np.float32), W3, 0)
    return w, b, found.dequantize(found.quantize(w)).astype(np.float64), b + rng.normal(0, 0.01, channels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("alpha_bias", "alpha_identity"), [(ALPHA_BIAS, ALPHA_IDENTITY), (0.0, 0.3), (2.0, 1e-6)])
def test_the_closed_form_is_the_least_squares_solution(seed, alpha_bias, alpha_identity):
    w, b, hat, hat_bias = damaged(np.random.default_rng(seed))
    found = combine(w, b, hat, hat_bias, alpha_bias=alpha_bias, alpha_identity=alpha_identity)
    size = np.square(w).sum(1).mean()
    eye = np.eye(len(w))
    # rows of the stacked system: weights, bias, pull towards the identity
    system = np.concatenate(
        [hat.T / np.sqrt(size), np.sqrt(alpha_bias / size) * hat_bias[None], np.sqrt(alpha_identity) * eye]
    )
    for i in range(len(w)):
        wanted = np.concatenate(
            [w[i] / np.sqrt(size), [np.sqrt(alpha_bias / size) * b[i]], np.sqrt(alpha_identity) * eye[i]]
        )
        solution, *_ = np.linalg.lstsq(system, wanted, rcond=None)
        np.testing.assert_allclose(found[i], solution, rtol=1e-8, atol=1e-10)


def test_a_depthwise_reader_scales_only():
    w, b, hat, hat_bias = damaged(np.random.default_rng(1))
    found = combine(w, b, hat, hat_bias, diagonal=True)
    np.testing.assert_array_equal(found, np.diag(np.diag(found)))
    size = np.square(w).sum(1).mean()
    for i in range(len(w)):
        system = np.concatenate(
            [hat[i] / np.sqrt(size), [np.sqrt(ALPHA_BIAS / size) * hat_bias[i], np.sqrt(ALPHA_IDENTITY)]]
        )
        wanted = np.concatenate([w[i] / np.sqrt(size), [np.sqrt(ALPHA_BIAS / size) * b[i], np.sqrt(ALPHA_IDENTITY)]])
        np.testing.assert_allclose(found[i, i], np.linalg.lstsq(system[:, None], wanted, rcond=None)[0][0], rtol=1e-10)


def test_nothing_damaged_changes_nothing():
    w, b, *_ = damaged(np.random.default_rng(2))
    np.testing.assert_allclose(combine(w, b, w, b), np.eye(len(w)), atol=1e-12)


def run(graph, x):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph.proto.SerializeToString(), options).run(None, {"image": x})[0]


def rounded_graph(graph, names):
    """The graph with the weights of these layers rounded to nearest."""
    from zsq_deploy.model.constants import replace_constants

    changed = {}
    for name in names:
        key = graph.node(name).input[1]
        found = weight_qparams(graph.constant(key), W3, 0)
        changed[key] = found.dequantize(found.quantize(graph.constant(key).astype(np.float64)))
    return replace_constants(graph, changed)


def chain(relu, seed=0, group=1):
    b = Builder(seed)
    x = b.conv("image", 3, 24, k=1, bias=True)
    x = b.node("Relu", x) if relu else b.node("Identity", x)
    return b.graph([b.conv(x, 24, 24 if group > 1 else 6, k=3, group=group)])


@pytest.mark.parametrize("group", [1, 24])
def test_linear_channels_are_restored_as_far_as_the_error_says(group):
    """24 channels of 3 inputs depend on each other, so that a combination can undo nearly all of the rounding."""
    graph = chain(relu=False, group=group)
    first = next(node.name for node in graph if node.op_type == "Conv")
    found = udfc(graph, W3, alpha_identity=1e-7)
    x = images(8)
    wanted = run(graph, x)
    before = np.square(run(rounded_graph(graph, [first]), x) - wanted).sum()
    after = np.square(run(rounded_graph(found.graph, [first]), x) - wanted).sum()
    assert found.damage.keys() == {first}
    assert after < (1e-2 if group == 1 else 1.0) * before
    assert found.left[first] < (1e-2 if group == 1 else 1.0) * found.damage[first]


def test_it_helps_behind_relu():
    ratios = []
    for seed in range(6):
        graph = chain(relu=True, seed=seed)
        first = next(node.name for node in graph if node.op_type == "Conv")
        found = udfc(graph, W3)
        x = images(8, seed)
        wanted = run(graph, x)
        before = np.square(run(rounded_graph(graph, [first]), x) - wanted).sum()
        ratios.append(np.square(run(rounded_graph(found.graph, [first]), x) - wanted).sum() / before)
    assert np.median(ratios) < 0.9


def test_layers_are_compensated_one_after_the_other():
    b = Builder(3)
    x = b.node("Relu", b.bn(b.conv("image", 3, 8), 8))
    x = b.node("Relu", b.bn(b.conv(x, 8, 8), 8))
    x = b.node("Flatten", b.node("GlobalAveragePool", x))
    graph = fold(b.graph([b.gemm(x, 8, 4)])).graph
    found = udfc(graph, W3)
    layers = [node.name for node in graph if node.op_type in ("Conv", "Gemm")]
    assert list(found.damage) == layers[:2]
    assert [node.name for node in found.graph] == [node.name for node in graph]
    unchanged = graph.node(layers[0]).input[1]
    np.testing.assert_array_equal(found.graph.constant(unchanged), graph.constant(unchanged))
    for layer in layers[1:]:
        key = graph.node(layer).input[1]
        assert not np.array_equal(found.graph.constant(key), graph.constant(key))
    # what is excluded is not damaged, and nothing has to make up for it
    assert not udfc(graph, W3, exclude=frozenset(layers)).damage
