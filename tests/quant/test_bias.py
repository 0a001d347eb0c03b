"""Bias correction: the mean error goes away, layer after layer, and the network gets better."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.fold import fold
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant import (
    Granularity,
    Scheme,
    apply_biases,
    collect,
    correct_bias,
    correct_bias_analytically,
    insert_qdq,
)
from zsq_deploy.quant.bias import bias_sites

from .nets import Builder, images, small_net

U8 = Scheme(8, signed=False, symmetric=False)
W4 = Scheme(4, granularity=Granularity.CHANNEL)


def setup(seed=0, weight=W4):
    model = Model(small_net(seed), name="small")
    folded = model.folded()
    x = images(64, seed=seed)
    ranges = collect(folded.graph, [{"image": x}], device="cpu").ranges()

    def quantize(graph):
        return insert_qdq(graph, ranges, activation=U8, weight=weight)

    return model, folded, x, quantize


def values(graph, x, names):
    with torch.no_grad():
        return {
            k: v.numpy() for k, v in Twin(graph, device="cpu").run({"image": torch.from_numpy(x)}, fetch=names).items()
        }


def mean_errors(folded, q, x):
    """Per layer: largest mean error of a channel, in units of the channel's spread."""
    sites = bias_sites(folded.graph)
    wanted = values(folded.graph, x, [site.output for site in sites])
    found = values(q, x, [q.node(site.node).output[0] for site in sites])
    errors = {}
    for site in sites:
        a, b = wanted[site.output], found[q.node(site.node).output[0]]
        rest = tuple(axis for axis in range(a.ndim) if axis != 1)
        if q.node(site.node).output[0] == site.output or a.shape == b.shape:
            errors[site.node] = float((np.abs((b - a).mean(rest)) / (a.std(rest) + 1e-6)).max())
    return errors


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_error_of_every_layer_goes_away(seed):
    _, folded, x, quantize = setup(seed)
    before = quantize(folded.graph)
    biases = correct_bias(folded, before, [{"image": x[:40]}, {"image": x[40:]}], device="cpu")
    after = quantize(apply_biases(folded.graph, biases))
    worst, left = mean_errors(folded, before, x), mean_errors(folded, after, x)
    assert set(biases) == set(worst)
    assert max(worst.values()) > 0.1
    for node in worst:
        # what is left behind the last pooling are codes that flipped: its output hardly varies
        assert left[node] < max(0.01, 0.05 * worst[node]), (node, worst[node], left[node])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_output_gets_closer_to_float_on_other_images(seed):
    _, folded, x, quantize = setup(seed)
    other = images(200, seed=seed + 100)

    def run(graph):
        return ort.InferenceSession(graph.proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"image": other}
        )[0]

    wanted = run(folded.graph)
    before = quantize(folded.graph)
    after = quantize(apply_biases(folded.graph, correct_bias(folded, before, [{"image": x}], device="cpu")))
    errors = [np.square(run(graph) - wanted).mean() for graph in (before, after)]
    assert errors[1] < 0.8 * errors[0]


def test_images_beyond_the_ranges_do_no_harm():
    """What clipping does to images five times too bright says nothing about real ones."""
    _, folded, x, quantize = setup(1, weight=Scheme(6, granularity=Granularity.CHANNEL))
    q = quantize(folded.graph)
    bright = [{"image": 5 * x}]

    def error(biases):
        graph = quantize(apply_biases(folded.graph, biases))
        name = folded.graph.outputs[0].name
        return np.square(values(graph, x, [name])[name] - values(folded.graph, x, [name])[name]).mean()

    untouched = error({})
    assert error(correct_bias(folded, q, bright, device="cpu")) < 1.5 * untouched
    assert error(correct_bias(folded, q, bright, device="cpu", saturate=False)) > 3 * untouched


def test_less_memory_uses_fewer_images_and_still_works():
    _, folded, x, quantize = setup()
    q = quantize(folded.graph)
    full = correct_bias(folded, q, [{"image": x}], device="cpu")
    less = correct_bias(folded, q, [{"image": x}], device="cpu", memory=12 * 12 * 8 * 4 * 8 * 16)
    sixteen = correct_bias(folded, q, [{"image": x[:16]}], device="cpu")
    for name in full:
        np.testing.assert_array_equal(less[name], sixteen[name])
        assert np.abs(less[name] - full[name]).max() < 0.2


def test_the_cut_of_the_images_does_not_matter():
    _, folded, x, quantize = setup()
    q = quantize(folded.graph)
    one = correct_bias(folded, q, [{"image": x}], device="cpu")
    other = correct_bias(folded, q, [{"image": part} for part in np.split(x, [5, 6, 40])], device="cpu")
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_faithful_graph_needs_no_correction():
    _, folded, x, _ = setup()
    found = correct_bias(folded, folded.graph, [{"image": x}], device="cpu")
    for site in bias_sites(folded.graph):
        np.testing.assert_allclose(found[site.key], site.bias, atol=1e-5)


def test_no_images_are_refused():
    _, folded, _, quantize = setup()
    with pytest.raises(CalibrationError, match="needs images"):
        correct_bias(folded, quantize(folded.graph), [], device="cpu")


def test_analytic_correction_is_the_weight_error_times_the_mean():
    """conv -> BN -> Relu -> conv: the mean behind the Relu is known in closed form."""
    b = Builder(4)
    x = b.node("Relu", b.bn(b.conv("image", 3, 8), 8))
    model = Model(b.graph([b.conv(x, 8, 4, bias=True)]), name="two")
    folded = model.folded()
    rng = np.random.default_rng(0)
    # Q/DQ with coarse weights and nothing else, so that the weights' error is all there is
    ranges = collect(folded.graph, [{"image": images(16)}], device="cpu").ranges()
    q = insert_qdq(
        folded.graph, ranges, activation=Scheme(16, False, False), weight=Scheme(3, granularity=Granularity.CHANNEL)
    )
    found = correct_bias_analytically(model, q)
    norm = model.batch_norms()[0]
    samples = np.maximum(norm.beta + np.abs(norm.gamma) * rng.normal(0, 1, (400_000, 8)), 0)
    mean = samples.mean(0)
    node = folded.graph.nodes[-1]
    from zsq_deploy.quant import dequantized_weight

    error = dequantized_weight(q, q.node(node.name).input[1]) - folded.graph.constant(node.input[1])
    expected = folded.graph.constant(node.input[2]) - (error.sum((2, 3)) * mean).sum(1)
    np.testing.assert_allclose(found[node.name], expected, atol=5e-3)
    assert np.abs(found[node.name] - folded.graph.constant(node.input[2])).max() > 0.05


def test_a_matrix_product_with_an_add_behind_it():
    b = Builder(5)
    w, c = b.rng.normal(0, 0.3, (12, 6)).astype(np.float32), b.rng.normal(0, 1, 6).astype(np.float32)
    y = b.node("Add", b.node("MatMul", "image", b.constant(w)), b.constant(c, "offset"))
    graph = b.graph([b.node("Relu", y)])
    x = np.abs(images(32))
    ranges = collect(graph, [{"image": x}], device="cpu").ranges()
    q = insert_qdq(graph, ranges, activation=U8, weight=Scheme(2, granularity=Granularity.CHANNEL), op_types=["MatMul"])
    found = correct_bias(graph, q, [{"image": x}], device="cpu")
    assert list(found) == ["offset"]
    fixed = insert_qdq(
        apply_biases(graph, found),
        ranges,
        activation=U8,
        weight=Scheme(2, granularity=Granularity.CHANNEL),
        op_types=["MatMul"],
    )
    wanted = values(graph, x, [y])[y].mean((0, 1, 2))
    errors = [np.abs(values(g, x, [y])[y].mean((0, 1, 2)) - wanted).max() for g in (q, fixed)]
    assert errors[0] > 0.1
    assert errors[1] < 1e-3


def test_images_along_another_axis_than_the_first():
    """Attention layers compute on [tokens, images, features]; the float pass goes in chunks of 16 images."""
    b = Builder(7)
    w, c = b.rng.normal(0, 0.3, (12, 6)).astype(np.float32), b.rng.normal(0, 1, 6).astype(np.float32)
    x = b.node("Transpose", "image", perm=[2, 0, 1, 3])
    graph = b.graph([b.node("Add", b.node("MatMul", x, b.constant(w)), b.constant(c, "offset"))])
    found = correct_bias(graph, graph, [{"image": np.abs(images(40))}], device="cpu")
    np.testing.assert_allclose(found["offset"], c, atol=1e-5)


def test_layers_without_a_bias_get_one():
    graph = fold(small_net()).graph
    bare = graph.editable()
    for node in bare.graph.node:
        if node.op_type == "Conv":
            del node.input[2]
    graph = Graph(bare)
    sites = [site for site in bias_sites(graph) if graph.node(site.node).op_type == "Conv"]
    biases = {site.key: np.arange(len(site.bias), dtype=np.float32) for site in sites}
    assert all(not site.bias.any() for site in sites)
    changed = apply_biases(graph, biases)
    for site in sites:
        np.testing.assert_array_equal(changed.constant(changed.node(site.node).input[2]), biases[site.key])
