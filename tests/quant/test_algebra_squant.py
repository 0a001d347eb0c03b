"""SQuant: what its flips promise, and that nothing better exists on kernels small enough to try all."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zsq_deploy.errors import UsageError
from zsq_deploy.model.fold import fold
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import Granularity, PlacementRules, Scheme, insert_qdq, read_qdq
from zsq_deploy.quant.algebra import flip, float_weights_of, squant
from zsq_deploy.quant.reader import dequantized_weight
from zsq_deploy.quant.statistics import collect

from .nets import Builder, images, small_net

HALF = 0.5 + 1e-9
U8 = Scheme(8, signed=False, symmetric=False)
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

steps_inside = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(-7.0, 7.0, width=32),
)


@settings(max_examples=100, deadline=None)
@given(steps_inside)
def test_sums_stay_within_half_a_step(steps):
    codes = flip(steps, -7, 7)
    error = codes - steps
    assert codes.min() >= -7
    assert codes.max() <= 7
    assert np.abs(error).max() < 1.0
    assert np.abs(error.sum(axis=(1, 2))).max() <= HALF
    assert np.abs(error.sum(axis=2)).max() < 1.0
    # no kernel gets more than one flip beyond what brings it within half a step, and only towards its channel's needs
    moved = codes - np.rint(steps)
    assert np.isin(moved, (-1, 0, 1)).all()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.just(1), st.integers(1, 25)), elements=st.floats(-7, 7)))
def test_a_single_kernel_stays_within_half_a_step(steps):
    error = flip(steps, -7, 7) - steps
    assert np.abs(error.sum(axis=2)).max() <= HALF


@settings(max_examples=100, deadline=None)
@given(steps_inside, st.integers(-4, 0), st.integers(1, 4))
def test_clipped_weights_never_leave_the_grid(steps, low, high):
    codes = flip(steps, low, high)
    assert codes.min() >= low
    assert codes.max() <= high
    nearest = np.clip(np.rint(steps), low, high)
    clipped = np.abs(nearest - steps) > 0.5
    np.testing.assert_array_equal(codes[clipped], nearest[clipped])
    # every kernel is better than before or within a step, its own sum and one more flip for the channel
    before, after = np.abs((nearest - steps).sum(axis=2)), np.abs((codes - steps).sum(axis=2))
    assert (after <= np.maximum(before, 1.0) + 1e-9).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("kernels", "elements"), [(1, 9), (3, 3), (9, 1), (2, 5)])
def test_nothing_better_exists(seed, kernels, elements):
    """All ways to round up or down, compared by channel sum, squares of kernel sums, squares of errors, in this order."""
    rng = np.random.default_rng(seed)
    steps = rng.uniform(-6, 6, (1, kernels, elements))
    floors = np.floor(steps)
    choices = np.array(list(itertools.product((0, 1), repeat=kernels * elements))).reshape(-1, kernels, elements)
    error = floors + choices - steps
    costs = np.stack(
        [np.abs(error.sum(axis=(1, 2))), np.square(error.sum(axis=2)).sum(axis=1), np.square(error).sum(axis=(1, 2))]
    ).round(9)
    best = np.lexsort(costs[::-1])[0]
    found = flip(steps, -7, 7)
    np.testing.assert_array_equal(found[0], (floors + choices[best])[0])


def test_a_kernel_without_flips_has_a_candidate():
    # Four kernels of one element each, error 0.3: no kernel needs a flip, the channel does (sum 1.2).
    steps = np.full((1, 4, 1), -0.3)
    assert flip(steps, -7, 7).sum() == -1
    np.testing.assert_array_equal(flip(np.zeros((2, 3, 4)), -7, 7), 0)


def ranges_of(graph):
    return collect(graph, [{"image": images(8)}], device="cpu").ranges()


def weights_of(graph):
    return {
        node.name: dequantized_weight(graph, node.input[1])
        for node in graph.nodes
        if node.op_type in LAYERS and graph.constant(node.input[1]) is None
    }


SCHEMES = [
    (Scheme(4, granularity=Granularity.CHANNEL, restricted=True), PlacementRules()),
    (Scheme(4, granularity=Granularity.CHANNEL), PlacementRules(store_weights="float")),
    (Scheme(8, granularity=Granularity.CHANNEL, reduced=True), PlacementRules()),
    (Scheme(8, signed=False, symmetric=False), PlacementRules()),
    (Scheme(3, signed=False, symmetric=False, granularity=Granularity.CHANNEL), PlacementRules()),
]


@pytest.mark.parametrize(("weight", "rules"), SCHEMES, ids=[str(row[0]) for row in SCHEMES])
def test_graphs_keep_everything_but_codes(weight, rules):
    graph = fold(small_net(2)).graph
    qdq = insert_qdq(graph, ranges_of(graph), activation=U8, weight=weight, rules=rules)
    done = squant(qdq, graph)
    onnx.checker.check_model(done.proto)
    floats = float_weights_of(graph)
    before, after = weights_of(qdq), weights_of(done)
    scales = {t.name: t for t in read_qdq(qdq)}
    changed = 0
    for tensor in read_qdq(done):
        old = scales[tensor.name]
        np.testing.assert_array_equal(tensor.scale, old.scale)
        np.testing.assert_array_equal(tensor.zero_point, old.zero_point)
    for node in graph.nodes:
        if node.op_type not in LAYERS:
            continue
        tensor = next(t for t in read_qdq(qdq) if t.output == qdq.node(node.name).input[1])
        w = floats[node.name].astype(np.float64)
        form = [1] * w.ndim
        if tensor.scale.size > 1:
            form[tensor.axis] = -1
        step = tensor.scale.astype(np.float64).reshape(form)
        error = (after[node.name] - w) / step
        assert np.abs(error).max() < 1.0 + 1e-5
        rows = error.reshape(len(w), -1)  # the output channels come first in all of these layers
        # Rounded zero points clip up to half a step of an asymmetric grid; what cannot flip cannot help.
        slack = 0.5 + 1e-4 if weight.symmetric else 1.0
        assert np.abs(rows.sum(1)).max() <= slack
        assert (
            np.abs(after[node.name]).max()
            <= np.abs(before[node.name]).max() + 1.5 * step.max() * (not weight.symmetric) + 1e-6
        )
        changed += int((before[node.name] != after[node.name]).sum())
    assert changed > 0
    first = {t.name: qdq.constant(t.codes) for t in read_qdq(qdq) if t.is_bias}
    assert first
    for name, codes in first.items():
        np.testing.assert_array_equal(codes, next(done.constant(t.codes) for t in read_qdq(done) if t.name == name))


def test_four_bit_storage_behind_a_cast():
    from zsq_deploy.model.editing import Net

    graph = fold(small_net(1)).graph
    qdq = insert_qdq(graph, ranges_of(graph), activation=U8, weight=SCHEMES[0][0])
    net = Net(qdq.proto)
    for node in list(net.nodes):
        constant = net.constant(node.input[0]) if node.input else None
        if node.op_type == "DequantizeLinear" and constant is not None and constant.dtype.name == "int4":
            wide = net.fresh(f"{node.input[0]}_wide")
            net.insert_before(node, net.new_node("Cast", [node.input[0]], [wide], f"{node.name}/Cast", to=3))
            node.input[0] = wide
            zero = net.constant(node.input[2])
            net.add_constant(node.input[2], zero.astype(np.int8), exact=True)
    cast = Graph(net.proto())
    plain, behind = squant(qdq, graph), squant(cast, graph)
    for name, values in weights_of(plain).items():
        np.testing.assert_array_equal(values, weights_of(behind)[name])


def test_a_channel_mean_is_kept():
    """With equal inputs the output error of SQuant is at most half a step of the weights; nearest's grows with the taps."""
    rng = np.random.default_rng(0)
    b = Builder()
    w = b.constant(rng.normal(0, 1, (8, 3, 5, 5)).astype(np.float32))
    graph = b.graph([b.node("Conv", "image", w)])
    qdq = insert_qdq(
        graph,
        {"image": (-1.0, 1.0), graph.outputs[0].name: (-9.0, 9.0)},
        activation=U8,
        weight=SCHEMES[0][0],
        quantize_outputs=False,
    )
    floats = graph.constant(w).astype(np.float64)
    errors = []
    for q in (qdq, squant(qdq, graph)):
        (tensor,) = [t for t in read_qdq(q) if t.is_weight]
        found = next(iter(weights_of(q).values()))
        errors.append(np.abs((found - floats).sum(axis=(1, 2, 3)) / tensor.scale).max())
    assert errors[1] <= 0.5 + 1e-4 < errors[0]


def test_wrong_floats_are_refused():
    graph = fold(small_net(2)).graph
    qdq = insert_qdq(graph, ranges_of(graph), activation=U8, weight=SCHEMES[0][0])
    floats = float_weights_of(graph)
    name = next(iter(floats))
    with pytest.raises(UsageError, match="shape"):
        squant(qdq, {name: floats[name][:1]})
    assert squant(qdq, {}).digest == qdq.digest
