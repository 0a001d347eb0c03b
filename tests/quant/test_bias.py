"""Bias correction: the mean error goes away, layer after layer, and the network gets better."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

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


def read_values(folded, q, x, site):
    """What the next layer reads of a layer, ``[C, n]`` float64: float and quantized, the latter in front of the Relu, too."""
    readers = folded.graph.consumers(site.output)
    top = {("Relu",): np.inf, ("Clip",): 6.0}.get(tuple(node.op_type for node in readers))
    inner = q.node(site.node).output[0]
    wanted = values(folded.graph, x, [site.output])[site.output]
    found = values(q, x, [inner])[inner]
    wanted, found = (np.moveaxis(a.astype(np.float64), 1, 0).reshape(a.shape[1], -1) for a in (wanted, found))
    return (wanted if top is None else np.clip(wanted, 0, top)), found, top


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_other_bias_is_nearer_to_float_behind_the_activation_function(seed):
    _, folded, x, quantize = setup(seed)
    before = quantize(folded.graph)
    biases = correct_bias(folded, before, [{"image": x[:40]}, {"image": x[40:]}], device="cpu")
    after = quantize(apply_biases(folded.graph, biases))
    sites = bias_sites(folded.graph)
    assert set(biases) == {site.key for site in sites}
    kinds = set()
    for site in sites:
        wanted, found, top = read_values(folded, after, x, site)
        kinds.add(top)
        if top is None:
            uncorrected = read_values(folded, before, x, site)[1]
            worst, left = (np.abs((y - wanted).mean(1) / wanted.std(1)).max() for y in (uncorrected, found))
            # what is left behind the last pooling are codes that flipped: its output hardly varies
            assert left < max(0.01, 0.05 * worst), site.node
            continue
        spread = wanted.std(1, keepdims=True) + 1e-6
        errors = [
            np.square(np.clip(found + share * spread, 0, top) - wanted).mean(1) for share in np.linspace(-0.5, 0.5, 41)
        ]
        own = np.square(np.clip(found, 0, top) - wanted).mean(1)
        answers = ((found > 0) & (found < top)).mean(1) > 0.1  # others are moved on the word of many places only
        assert answers.any()
        assert (own <= 1.02 * np.min(errors, axis=0))[answers].all(), site.node
    assert kinds == {None, np.inf, 6.0}


def test_means_in_front_of_a_relu_do_not_count():
    """Answers get weaker and silence gets louder: the mean says "lower", what is read says "higher"."""
    b = Builder(1)
    rng = np.random.default_rng(0)
    w = np.ones((1, 1, 1, 1), np.float32)
    graph = b.graph([b.node("Relu", b.node("Conv", "image", b.constant(w), b.constant(np.zeros(1, np.float32))))])
    loud = rng.random((64, 3, 12, 12)) < 0.1
    x = np.where(loud, 4.0, -4.0).astype(np.float32)[:, :1]
    layer = graph.nodes[0]
    weaker = graph.editable()
    for tensor in weaker.graph.initializer:
        if tensor.name == layer.input[1]:
            tensor.CopyFrom(numpy_helper.from_array(np.full((1, 1, 1, 1), 0.75, np.float32), tensor.name))
    found = correct_bias(graph, Graph(weaker), [{"image": x}], device="cpu")[layer.name]
    # 0.75 * 4 + 1 = 4, while the mean of 0.75 x is higher than that of x
    assert (0.75 * x).mean() > x.mean() + 0.7
    assert found == pytest.approx(1.0, abs=0.05)


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
