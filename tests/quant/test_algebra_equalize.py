"""Equalization and absorption: the float function stays what it was, and the ranges become what they shall be."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from zsq_deploy.errors import UsageError
from zsq_deploy.model import load_model
from zsq_deploy.model.editing import Net
from zsq_deploy.model.fold import fold
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.model import Model
from zsq_deploy.quant import Scheme, analytic_ranges, insert_qdq
from zsq_deploy.quant.algebra import absorb, clips_to_relu, dfq, equalize, equalized_model, find_sites
from zsq_deploy.quant.algebra.equalize import _rescale
from zsq_deploy.quant.analytic import clipped_normal, propagate_model

from .nets import Builder, images, small_net


def run(graph, x):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {graph.inputs[0].name: x})


def assert_same(first, second, x, tolerance=1e-5):
    for wanted, found in zip(run(first, x), run(second, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(np.abs(wanted).max(), 1e-3))


def uneven(graph, seed=0, decades=2.0):
    """The graph with channels of every batch norm scaled at random, so that there is something to equalize."""
    rng = np.random.default_rng(seed)
    proto = graph.editable()
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        gamma = numpy_helper.to_array(tensors[node.input[1]])
        factor = 10 ** rng.uniform(-decades / 2, decades / 2, gamma.shape)
        for name in node.input[1:3]:
            array = numpy_helper.to_array(tensors[name])
            tensors[name].CopyFrom(numpy_helper.from_array((array * factor).astype(np.float32), name))
    return Graph(proto)


def reaches(model):
    return {n.conv: (n.beta - 6 * np.abs(n.gamma), n.beta + 6 * np.abs(n.gamma)) for n in model.batch_norms()}


def depthwise_net(seed=0, relu="Relu", k=3):
    """Convolution, depthwise, pointwise, transposed, grouped, pooling, Flatten of a feature map, matrix product."""
    b = Builder(seed)

    def act(x):
        return b.node(relu, x) if relu != "LeakyRelu" else b.node(relu, x, alpha=0.1)

    x = act(b.bn(b.conv("image", 3, 8), 8))
    x = act(b.bn(b.conv(x, 8, 8, group=8, k=k), 8))
    x = act(b.bn(b.conv(x, 8, 12, k=1), 12))
    x = act(b.bn(b.conv(x, 12, 12, group=4, k=3), 12))
    w = b.constant(b.rng.normal(0, 0.3, (12, 3, 2, 2)).astype(np.float32))
    x = act(b.node("ConvTranspose", x, w, strides=[2, 2], group=2))
    x = b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.node("AveragePool", x, kernel_shape=[4, 4], strides=[4, 4])
    x = b.node("Relu", b.gemm(b.node("Flatten", x), 6 * 9, 14))
    return b.graph([b.gemm(x, 14, 5)])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["Relu", "LeakyRelu"]), st.booleans(), st.booleans())
def test_the_function_stays(seed, relu, folded, powers):
    graph = uneven(depthwise_net(seed, relu), seed)
    graph = fold(graph).graph if folded else graph
    done = equalize(graph, powers_of_two=powers)
    assert len(done.sites) == 6  # all layers but the last one
    assert max(np.abs(np.log2(factors)).max() for factors in done.factors.values()) > 1
    x = images(4, seed)
    assert_same(graph, done.graph, x)
    if powers:
        for factors in done.factors.values():
            np.testing.assert_array_equal(factors, np.exp2(np.rint(np.log2(factors))))


def test_powers_of_two_change_no_bit():
    graph = uneven(depthwise_net(3), 3)
    x = images(4)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # folding would round anew
    options.intra_op_num_threads = 1
    outputs = [
        ort.InferenceSession(g.proto.SerializeToString(), options).run(None, {"image": x})[0]
        for g in (graph, equalize(graph, powers_of_two=True).graph)
    ]
    np.testing.assert_array_equal(*outputs)


def test_ranges_become_equal():
    graph = fold(uneven(depthwise_net(1), 1)).graph
    done = equalize(graph, tolerance=1e-6, sweeps=500)
    assert done.moved <= 1e-6
    weights = {node.name: done.graph.constant(node.input[1]) for node in done.graph if len(node.input) > 1}
    first, second = done.sites[1], done.sites[1].readers[0].node  # depthwise, then pointwise
    r1 = np.abs(weights[first.layer]).reshape(8, -1).max(1)
    r2 = np.abs(weights[second]).max(axis=(0, 2, 3))
    ratio = r2 / r1
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
    # the precision of a channel is its range over the tensor's; their product over both layers has grown (section 4.1)
    before = {node.name: graph.constant(node.input[1]) for node in graph if len(node.input) > 1}

    def precision(w):
        p1 = np.abs(w[first.layer]).reshape(8, -1).max(1)
        p2 = np.abs(w[second]).max(axis=(0, 2, 3))
        return (p1 / p1.max() * p2 / p2.max()).sum()

    assert precision(weights) > precision(before)


def test_residuals_and_outputs_are_left_alone():
    graph = small_net()
    layers = {site.layer: site for site in find_sites(graph)}
    adds = [node for node in graph if node.op_type == "Add"]
    for add in adds:
        for value in add.input:
            maker = graph.producer(value)
            while maker is not None and maker.op_type in ("BatchNormalization", "Relu"):
                maker = graph.producer(maker.input[0])
            assert maker is None or maker.name not in layers
    assert all(not any(graph.is_output(v) for v in graph.node(name).output) for name in layers)
    done = equalize(uneven(graph))
    assert_same(uneven(graph), done.graph, images(4))


def test_concatenations_and_several_readers():
    b = Builder(5)
    x = b.node("Relu", b.conv("image", 3, 4, k=1, bias=True))
    left = b.node("Relu", b.conv(x, 4, 6, k=1, bias=True))
    right = b.node("Relu", b.conv(x, 4, 5, k=3, bias=True))
    x = b.node("Concat", left, right, axis=1)
    x = b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    graph = b.graph([b.conv(x, 11, 3, k=1)])
    sites = list(find_sites(graph))
    assert [len(site.readers) for site in sites] == [2, 1, 1]
    assert [site.readers[0].offset for site in sites] == [0, 0, 6]
    done = equalize(graph)
    assert max(np.abs(np.log2(f)).max() for f in done.factors.values()) > 0.1
    assert_same(graph, done.graph, images(3))


def test_matrix_products_with_biases_behind_them():
    rng = np.random.default_rng(0)
    b = Builder()

    def c(*shape):
        return b.constant(rng.normal(0, 1, shape).astype(np.float32))

    x = b.node("Flatten", "image")
    x = b.node("Add", b.node("MatMul", x, c(432, 16)), c(16))
    x = b.node("Relu", x)
    graph = b.graph([b.node("Add", c(7), b.node("MatMul", x, c(16, 7)))])
    (site,) = find_sites(graph)
    assert len(site.shifts) == 1
    assert_same(graph, equalize(graph).graph, images(5))


def test_shared_weights_get_copies():
    b = Builder(2)
    w = b.constant(b.rng.normal(0, 1, (3, 3, 1, 1)).astype(np.float32))
    x = b.node("Relu", b.node("Conv", "image", w))
    x = b.node("Relu", b.node("Conv", x, w))
    graph = b.graph([b.node("Conv", x, w)])
    done = equalize(graph)
    assert len(done.sites) == 2
    assert_same(graph, done.graph, images(3))


def test_what_is_not_homogeneous_ends_a_site():
    for op in ("Sigmoid", "Tanh", "Softplus"):
        b = Builder()
        graph = b.graph([b.conv(b.node(op, b.conv("image", 3, 4)), 4, 2)])
        assert not list(find_sites(graph))
    b = Builder()
    y = b.node("Relu", b.conv("image", 3, 4))
    graph = b.graph([b.conv(y, 4, 2), y])  # also an output
    assert not list(find_sites(graph))


# -- clips --


def clipped_net(seed=0, k=3):
    b = Builder(seed)
    zero, six = b.constant(np.float32(0)), b.constant(np.float32(6))

    def clip(x):
        return b.node("Clip", x, zero, six)

    x = clip(b.bn(b.conv("image", 3, 8), 8))
    x = clip(b.bn(b.conv(x, 8, 8, group=8, k=k), 8))
    x = clip(b.bn(b.conv(x, 8, 12, k=1), 12))
    return b.graph([b.gemm(b.node("Flatten", b.node("GlobalAveragePool", x)), 12, 4)])


def test_clips_are_kept_capped_or_respected():
    graph = uneven(clipped_net(), decades=3)
    model = Model(graph, name="clipped")
    x = 3 * images(6)
    assert not equalize(graph).sites
    capped = equalize(graph, clips="cap")
    assert len(capped.sites) == 3
    assert sum(node.op_type == "Min" for node in capped.graph) == 3
    assert_same(graph, capped.graph, x)
    reach = reaches(model)
    within = equalize(graph, clips="within", reach=reach)
    for site in within.sites:
        factors, far = within.factors[site.layer], reach[site.layer][1]
        assert (factors[far >= 6] == 1).all()
        assert (factors * np.maximum(far, 0) <= 6 * (1 + 1e-9))[far < 6].all()
    with pytest.raises(UsageError, match="reach"):
        equalize(graph, clips="within")
    relu, names = clips_to_relu(graph)
    assert len(names) == 3
    assert [node.op_type for node in relu].count("Relu") == 3


def test_no_channel_takes_the_range_of_all():
    graph = uneven(depthwise_net(4), 4)
    reach = reaches(Model(graph))
    done = equalize(graph, reach=reach, spread=2.0)
    for layer, (low, high) in reach.items():
        scaled = done.factors[layer] * np.maximum(np.maximum(high, -low), 0)
        assert scaled.max() <= 2.0 * np.median(scaled[scaled > 0]) * (1 + 1e-6)
    assert_same(graph, done.graph, images(3))


def test_moments_of_a_relu_with_one_bound_a_channel():
    graph = uneven(clipped_net(), decades=1)
    model = Model(graph, name="clipped")
    capped = dataclasses.replace(model, graph=equalize(graph, clips="cap").graph)
    plain, found = propagate_model(model).channels, propagate_model(capped).channels
    done = equalize(graph, clips="cap")
    for site in done.sites:
        value = graph.node(site.clips[0]).output[0]
        np.testing.assert_allclose(found[value].mean, plain[value].mean * done.factors[site.layer], rtol=1e-5)
        np.testing.assert_allclose(found[value].high, plain[value].high * done.factors[site.layer], rtol=1e-5)
    rng = np.random.default_rng(0)
    mean, std, high = np.array([0.5, 2.0]), np.array([1.0, 2.0]), np.array([1.5, 2.5])
    draws = np.clip(mean + std * rng.standard_normal((200_000, 2)), 0, high)
    m, v = clipped_normal(mean, std**2, 0.0, high)
    np.testing.assert_allclose(m, draws.mean(0), atol=0.01)
    np.testing.assert_allclose(v, draws.var(0), atol=0.01)


# -- absorption --


def test_absorption_changes_nothing_where_channels_stay_above():
    b = Builder(7)
    x = b.node("Relu", b.bn(b.conv("image", 3, 6), 6))
    x = b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.node("Relu", b.bn(b.conv(x, 6, 8, k=1), 8))
    x = b.node("Relu", b.bn(b.conv(x, 8, 8, k=3, group=8, pad=0), 8))
    x = b.node("Flatten", b.node("GlobalAveragePool", x))
    graph = b.graph([b.gemm(x, 8, 4)])
    # beta far above gamma: channels stay positive by far more than three standard deviations of anything that noise does
    proto = graph.editable()
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization":
            gamma = numpy_helper.to_array(tensors[node.input[1]])
            beta = np.float32(4) * gamma
            beta[0] = -beta[0]
            tensors[node.input[2]].CopyFrom(numpy_helper.from_array(beta, node.input[2]))
            # the statistics are wide enough for three standard deviations to hold on all images below
            var = numpy_helper.to_array(tensors[node.input[4]]) * 400
            tensors[node.input[4]].CopyFrom(numpy_helper.from_array(var, node.input[4]))
    graph = Graph(proto)
    done = absorb(graph)
    assert len(done.shifts) == 3
    for shift in done.shifts.values():
        assert shift[0] == 0
        assert (shift[1:] > 0).all()
    x = 0.3 * images(4)
    names = [graph.node(layer).output[0] for layer in done.shifts]
    norms = {graph.consumers(name)[0].output[0]: layer for name, layer in zip(names, done.shifts, strict=True)}
    watched = graph.editable()
    watched.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in norms)
    values = run(Graph(watched), x)[1:]
    for value, layer in zip(values, norms.values(), strict=True):  # what the equality rests on
        assert (value.min(axis=(0, 2, 3)) >= done.shifts[layer] - 1e-6)[1:].all()
    assert_same(graph, done.graph, x)
    # folded, the biases have moved
    assert_same(fold(graph).graph, fold(done.graph).graph, x)


def test_absorption_into_padding_layers_only_when_asked():
    b = Builder(1)
    x = b.node("Relu", b.bn(b.conv("image", 3, 6), 6))
    graph = b.graph([b.conv(x, 6, 4, k=3)])
    many = {"sigmas": 0.0}
    assert not absorb(graph, **many).shifts
    done = absorb(graph, padded=True, **many)
    assert len(done.shifts) == 1
    x = images(2, size=12)
    wanted, found = run(graph, x)[0], run(done.graph, x)[0]
    assert wanted.shape == found.shape
    statistics = {next(iter(done.shifts)): (np.full(6, 9.0), np.full(6, 1.0))}
    folded = fold(graph).graph
    shifts = absorb(folded, statistics=statistics, padded=True).shifts
    np.testing.assert_allclose(next(iter(shifts.values())), 6.0)


# -- everything together --


def consistent(graph, seed=0):
    """The graph with batch norm statistics measured on noise, and channels scaled so that equalization has work to do."""
    x = np.random.default_rng(seed).uniform(0, 1, (64, 3, 12, 12)).astype(np.float32)  # what pixels are taken for
    norms = [node for node in graph if node.op_type == "BatchNormalization"]
    for norm in norms:  # from the first to the last: each is measured behind settled ones
        proto = graph.editable()
        proto.graph.output.append(helper.make_tensor_value_info(norm.input[0], 1, None))
        value = run(Graph(proto), x)[-1]
        proto.graph.output.pop()
        tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name, array in zip(norm.input[3:5], (value.mean((0, 2, 3)), value.var((0, 2, 3))), strict=True):
            tensors[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))
        graph = Graph(proto)
    rng, net = np.random.default_rng(seed), Net(graph.proto)
    for site in find_sites(graph):
        _rescale(net, graph, site, 10 ** rng.uniform(-1, 1, site.channels))
    return Graph(net.proto()), x


def separable_net(seed):
    b = Builder(seed)
    x = b.node("Relu", b.bn(b.conv("image", 3, 16), 16))
    for _ in range(2):
        x = b.node("Relu", b.bn(b.conv(x, 16, 16, group=16), 16))
        x = b.node("Relu", b.bn(b.conv(x, 16, 16, k=1), 16))
    return b.graph([b.gemm(b.node("Flatten", b.node("GlobalAveragePool", x)), 16, 10)])


def test_dfq_needs_no_image_and_helps():
    graph, x = consistent(separable_net(11), 11)
    model = Model(graph, name="uneven")
    found = dfq(model, weight=Scheme(8))
    wanted = run(graph, x)[0]

    def noise(q):
        return float(np.square(run(q, x)[0] - wanted).sum() / np.square(wanted).sum())

    u8 = Scheme(8, signed=False, symmetric=False)
    plain = insert_qdq(model.folded().graph, analytic_ranges(model), activation=u8, weight=Scheme(8))
    assert noise(plain) > 0.1
    assert noise(found.qdq) < 0.02
    assert found.biases
    assert any("equalized" in note for note in found.notes)
    with pytest.raises(UsageError, match="keep, within"):
        equalized_model(model, clips="never")


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "clips", "least"),
    [
        ("resnet20_cifar10", "keep", 9),
        ("mlperf_tiny_resnet8_cifar10", "keep", 3),
        ("mobilenet_v1_025_imagenet", "cap", 27),
        ("mlperf_tiny_mobilenet_v1_025_vww", "keep", 27),
        ("squeezenet11_imagenet", "keep", 25),
        ("ultraface_rfb320", "keep", 20),
    ],
)
def test_real_networks_stay_the_same(assets, name, clips, least):
    model = load_model(assets / "models" / f"{name}.onnx")
    done, notes = equalized_model(model, clips=clips)
    sites = list(find_sites(model.graph, clips=clips != "keep"))
    assert len(sites) >= least, notes
    shape = (2, *model.inputs[0].shape[1:]) if model.dynamic_batch else model.inputs[0].shape
    x = np.random.default_rng(0).normal(0, 1, [size or 1 for size in shape]).astype(np.float32)
    if "resnet8" in name:
        x = np.abs(x) * 80
    assert_same(model.graph, done.graph, x)
    assert_same(model.folded().graph, done.folded().graph, x)
