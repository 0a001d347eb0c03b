"""Bits per layer: the frontier is exact and monotone, the budget is kept, sensitivities are what an independent computation gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant.allocation import (
    LayerSensitivity,
    Prober,
    Sensitivities,
    allocate,
    best_within,
    choose,
    cost_of,
    divergence,
    pareto,
    separability,
)
from zsq_deploy.quant.reconstruct import Bits, LayerBits, round_to_nearest

from .nets import images, small_net

OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=5
)


def every_choice(options):
    """Cost, loss and choice of all combinations, added in the order of the layers."""
    for choice in itertools.product(*(range(len(layer)) for layer in options)):
        cost, loss = 0, 0.0
        for layer, number in zip(options, choice, strict=True):
            cost, loss = cost + layer[number][0], loss + layer[number][1]
        yield cost, loss, choice


@settings(max_examples=150, deadline=None)
@given(OPTIONS)
def test_the_frontier_is_that_of_all_combinations(options):
    points = pareto(options)
    everything = list(every_choice(options))
    assert [point.cost for point in points] == sorted({point.cost for point in points})
    assert all(a.loss > b.loss for a, b in itertools.pairwise(points))
    totals = {choice: (cost, loss) for cost, loss, choice in everything}
    for point in points:
        assert totals[point.choice] == (point.cost, point.loss)
    for budget in {cost for cost, _, _ in everything}:
        wanted = min(loss for cost, loss, _ in everything if cost <= budget)
        found = best_within(points, budget)
        assert found.cost <= budget
        assert found.loss == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(OPTIONS, st.integers(2, 8))
def test_a_thinned_frontier_keeps_every_budget_that_can_be_kept(options, limit):
    points = pareto(options, limit=limit)
    assert len(points) <= limit
    cheapest = min(cost for cost, _, _ in every_choice(options))
    assert points[0].cost == cheapest
    totals = {choice: (cost, loss) for cost, loss, choice in every_choice(options)}
    assert all(totals[point.choice] == (point.cost, point.loss) for point in points)
    with pytest.raises(UsageError, match=r"cheapest choice|cannot be kept"):
        best_within(points, cheapest - 1)


def test_many_layers_are_quick_and_close_to_the_best():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1_000, 3_000_000, 120)
    options = [[(int(n * b // 8), float(rng.exponential() * 4.0**-b)) for b in (2, 3, 4, 8)] for n in sizes]
    points = pareto(options, limit=20_000)
    budget = int(sizes.sum() // 2)
    # the bound of the linear relaxation: no choice has a smaller loss
    best = max(
        sum(min(loss + price * cost for cost, loss in layer) for layer in options) - price * budget
        for price in np.geomspace(1e-16, 1e-4, 400)
    )
    found = best_within(points, budget).loss
    assert best <= found <= 1.02 * best + 1e-12


@pytest.mark.parametrize("bad", [[[]], [[(1, -0.5)]], [[(-1, 0.5)]], [[(1, float("nan"))]]])
def test_options_that_make_no_sense_are_refused(bad):
    with pytest.raises(UsageError, match="layer 0"):
        pareto(bad)


def test_divergence_against_numpy():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 2, (6, 5)), rng.normal(0, 2, (6, 5))

    def soft(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    wanted = (soft(a) * (np.log(soft(a)) - np.log(soft(b)))).sum(1)
    scores = divergence(torch.from_numpy(b), torch.from_numpy(a))
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=1e-9)
    behind = divergence(torch.from_numpy(soft(b)), torch.from_numpy(soft(a)))
    np.testing.assert_allclose(behind.numpy(), wanted, rtol=1e-6)
    planes = rng.normal(size=(4, 2, 3, 3))
    shifted = divergence(torch.from_numpy(planes + 0.5), torch.from_numpy(planes))
    np.testing.assert_allclose(shifted.numpy(), 0.25 / planes.var(ddof=1), rtol=1e-9)


def test_costs_are_those_of_the_file_or_of_the_bits():
    layer = LayerSensitivity("a", 27, 1000, {})
    assert [cost_of(layer, Bits.of(w), "bytes") for w in ("w8a8", "w5a8", "w4a8", "w2a2")] == [27, 27, 14, 14]
    assert [cost_of(layer, Bits.of(w), "packed-bytes") for w in ("w8a8", "w4a8", "w3a8", "w2a2")] == [27, 14, 11, 7]
    assert cost_of(layer, Bits.of("w4a8"), "bit-operations") == 32_000


@pytest.fixture(scope="module")
def model():
    return Model(small_net(3), name="small")


@pytest.fixture(scope="module")
def data(model):
    return CalibrationSet.from_arrays({"image": images(40, seed=5)}, CalibrationManifest.of(model, method="gaussian"))


@pytest.fixture(scope="module")
def prober(model, data):
    return Prober(model, data, ("w8a8", "w4a8", "w3a3", "w2a2"), device="cpu")


@pytest.fixture(scope="module")
def found(prober):
    return prober.sensitivities()


def test_fewer_bits_lose_more_and_nothing_quantized_loses_nothing(prober, found):
    assert prober.loss({}) < 1e-9
    assert len(found.layers) == len(prober.template.layers)
    for layer in found.layers:
        losses = [layer.losses[Bits.of(word)] for word in ("w8a8", "w3a3", "w2a2")]
        assert losses[0] < losses[1] < losses[2]
    assert sum(layer.macs > 0 for layer in found.layers) == len(found.layers)


def test_one_layer_alone_is_what_the_float_network_with_that_weight_gives(model, data, prober):
    """Weights only: the layer reads the network's input, which keeps 8 bits, so its rounding is written out here."""
    folded = model.folded().graph
    first = next(layer for layer in prober.template.layers if layer.node in prober.ends.first)
    bits = Bits.of("w2a2")
    state = prober._states[bits]
    x = data.arrays()["image"]
    scale, zero = (
        np.float32(state.activations[first.x].scale),
        state.activations[first.x].zero_point,
    )
    rounded = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero).astype(np.float32) * scale
    twin = Twin(folded, device="cpu")
    weight = folded.node(first.node).input[1]
    name = folded.outputs[0].name
    with torch.no_grad():
        wanted = twin.run({"image": torch.from_numpy(np.array(x))})[name]
        feeds = {"image": torch.from_numpy(rounded), weight: torch.from_numpy(state.weights[first.node].numbers())}
        got = twin.run(feeds)[name]
    expected = float(divergence(got, wanted).mean())
    assert prober.loss({first.node: bits}) == pytest.approx(expected, rel=1e-3)


def test_a_choice_keeps_its_budget_and_reconstruct_takes_it(model, data, found):
    whole = sum(cost_of(layer, Bits(8, 8), "packed-bytes") for layer in found.layers)
    before = float("inf")
    for share in (0.3, 0.45, 0.6, 0.9):
        allocation = choose(found, int(share * whole), unit="packed-bytes")
        spent = sum(
            cost_of(layer, allocation.bits.layers[layer.node], "packed-bytes")
            for layer in allocation.sensitivities.layers
        )
        assert spent == allocation.point.cost <= int(share * whole)
        assert allocation.point.loss <= before
        before = allocation.point.loss
    narrow = choose(found, int(0.45 * whole), unit="packed-bytes")
    result = round_to_nearest(model, data, narrow.bits, "all-layers", bias_correction=False)
    assert len({str(bits) for bits in narrow.bits.layers.values()}) > 1
    for layer in result.template.layers:
        wanted = narrow.bits.layers[layer.node]
        assert result.state.weights[layer.node].scheme.bits == wanted.weights
        assert f"{layer.node} {wanted}" in result.description
    with pytest.raises(UsageError, match="cannot be kept"):
        choose(found, 10, unit="packed-bytes")


def test_losses_add_up_well_enough_to_rank(prober, found):
    everything = choose(found, 10**9, unit="packed-bytes")
    points = everything.frontier[:: max(1, len(everything.frontier) // 8)]
    outcome = separability(prober, found, points)
    assert len(outcome.measured) == len(points) >= 5
    assert outcome.rank_correlation > 0.8
    assert 0.2 < outcome.ratio < 5.0


def test_ends_keep_8_bits_where_the_protocol_says_so(model, data):
    allocation = allocate(model, data, 0.5, ("w8a8", "w2a2"), "ends-8bit", unit="packed-bytes", device="cpu")
    nodes = list(allocation.bits.layers)
    assert allocation.bits.layers[nodes[0]] == Bits(8, 8)
    assert allocation.bits.layers[nodes[-1]] == Bits(8, 8)
    assert Bits(2, 2) in allocation.bits.layers.values()
    record = allocation.to_json()
    assert record["cost"] <= record["budget"]
    assert [point["loss"] for point in record["frontier"]] == sorted(
        (point["loss"] for point in record["frontier"]), reverse=True
    )
    assert "w2a2" in allocation.description


def test_wrong_use_is_refused(model, data):
    with pytest.raises(UsageError, match="budget"):
        allocate(model, data, 0.0)
    with pytest.raises(UsageError, match="choose from"):
        Prober(model, data, ())
    with pytest.raises(CalibrationError):
        Prober(model, data.take(0, 0), ("w8a8",))
    with pytest.raises(UsageError, match="no layer"):
        round_to_nearest(model, data, {"somewhere": "w4a4"})
    with pytest.raises(UsageError, match="names no layer"):
        round_to_nearest(model, data, {})


def test_a_layer_that_is_named_has_its_bits_and_others_have_8(model, data):
    nodes = [layer.node for layer in round_to_nearest(model, data, "w8a8", bias_correction=False).template.layers]
    result = round_to_nearest(model, data, {nodes[0]: "w3a8", nodes[2]: "w4a4"}, "ends-8bit", bias_correction=False)
    bits = {node: weight.scheme.bits for node, weight in result.state.weights.items()}
    assert bits == {node: {0: 3, 2: 4}.get(number, 8) for number, node in enumerate(nodes)}
    reads = next(layer.x for layer in result.template.layers if layer.node == nodes[2])
    assert result.assignment.sites[reads] == 4
    assert isinstance(result.bits, LayerBits)
    assert str(LayerBits({nodes[0]: Bits(3, 8)})) != str(LayerBits({nodes[0]: Bits(4, 8)}))


def test_sensitivities_as_json(found):
    record = found.to_json()
    assert isinstance(found, Sensitivities)
    assert record["images"] == 40
    assert set(record["layers"][0]["losses"]) == {"w8a8", "w4a8", "w3a3", "w2a2"}
