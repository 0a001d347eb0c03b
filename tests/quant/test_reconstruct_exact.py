"""Scales of few bits on the exact grid: what is near, what is shared, and that integer arithmetic is the graph's."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant.exact_scales import exact_scales
from zsq_deploy.quant.qdq import insert_qdq
from zsq_deploy.quant.reconstruct.deployed import LowBits, Places, find_numbers, pack_int4
from zsq_deploy.quant.reconstruct.exact import exact_activations, exact_weights
from zsq_deploy.quant.reconstruct.protocol import Bits, Protocol
from zsq_deploy.quant.reconstruct.template import make_template, take_apart
from zsq_deploy.quant.scheme import Granularity, Scheme
from zsq_deploy.quant.statistics import collect

from .nets import images, small_model

ACTIVATION = Scheme(8, signed=False, symmetric=False)
WEIGHT = Scheme(8, signed=True, symmetric=True, granularity=Granularity.CHANNEL, restricted=True)


@pytest.fixture(scope="module")
def setting():
    model = small_model()
    data = CalibrationSet.from_arrays({"image": images(32)}, CalibrationManifest.of(model, method="noise", seed=0))
    graph = model.folded().graph
    ranges = collect(graph, data.batches(32)).ranges()
    exact = exact_scales(graph, ranges, activation=ACTIVATION, weight=WEIGHT)
    qdq = insert_qdq(graph, exact.ranges, activation=ACTIVATION, weight=WEIGHT, weight_scales=exact.weight_scales)
    return model, data, Places(graph, qdq, ACTIVATION, WEIGHT)


def found(setting, bits, *, exact, rounding="nearest", protocol="all-layers"):
    _, data, places = setting
    return find_numbers(places, data, LowBits(Bits.of(bits), Protocol.of(protocol), rounding, exact=exact))


def odd_bits(value):
    """Significant bits of a float."""
    number = Fraction(value).numerator
    return (number // (number & -number)).bit_length()


def test_a_graph_taken_apart_is_the_template_that_it_was_written_from(setting):
    model, data, _ = setting
    graph = model.folded().graph
    ranges = collect(graph, data.batches(32)).ranges()
    made = make_template(graph, ranges, activation=ACTIVATION, weight=WEIGHT)
    again = take_apart(made.floating, made.qdq, activation=ACTIVATION, weight=WEIGHT)
    assert again.sites == made.sites
    assert again.layers == made.layers
    assert again.plain.digest == made.plain.digest


def test_weight_scales_move_little_and_multipliers_become_short(setting):
    free, exact = (found(setting, "w4a8", exact=on) for on in (False, True))
    assert not exact.inexact
    template = setting[2].template()
    behind = {"node_conv_1": "relu_3"}  # the stem's sum is rounded behind its Relu
    for layer in template.layers:
        old, new = free.state.weights[layer.node], exact.state.weights[layer.node]
        ratio = new.scale / old.scale
        assert (
            (ratio >= 1 - 1e-6) & (ratio <= 1.14)
        ).all()  # never finer: these are rounded anew, and must not be clipped
        assert np.median(ratio) < 1.04
    stem = exact.state.weights["node_conv_1"]
    x, y = exact.state.activations["image"].scale, exact.state.activations[behind["node_conv_1"]].scale
    for scale in stem.scale:
        multiplier = Fraction(float(scale)) * Fraction(x) / Fraction(y)
        assert multiplier.denominator & (multiplier.denominator - 1) == 0  # a dyadic number
        assert math.log2(multiplier.denominator) <= 16
        assert odd_bits(float(scale)) <= 9


def test_learned_codes_stay_and_their_scales_go_to_the_nearest(setting):
    template = setting[2].template()
    state = found(setting, "w4a8", exact=False).state
    rng = np.random.default_rng(0)
    jittered = {
        name: dataclasses.replace(w, scale=(w.scale * rng.uniform(0.9, 1.1, w.scale.shape)).astype(np.float32))
        for name, w in state.weights.items()
    }
    moved, _ = exact_weights(template, state.updated(weights=jittered))
    ratios = np.concatenate([moved.weights[n].scale / w.scale for n, w in jittered.items()])
    for name, weight in jittered.items():
        np.testing.assert_array_equal(moved.weights[name].codes, weight.codes)
    assert np.abs(np.log(ratios)).max() < 0.07
    assert (ratios < 1).any()
    assert (ratios > 1).any()


def test_activations_that_meet_share_a_significand_and_8_bit_engines_keep_theirs(setting):
    places = setting[2]
    template = places.template()
    exact = found(setting, "w4a4", exact=True, protocol="ends-8bit").state.activations
    odd = {name: Fraction(one.scale) for name, one in exact.items()}
    significand = {name: value.numerator // (value.numerator & -value.numerator) for name, value in odd.items()}
    assert all(odd_bits(one.scale) <= 4 for one in exact.values())
    add = next(node for node in template.plain.nodes if node.op_type == "Add")
    by_output = {site.output: site.group for site in template.sites}
    shared = {significand[by_output[name]] for name in add.input}
    assert len(shared) == 1
    few = [name for name, one in exact.items() if one.scheme.bits == 4]
    assert few
    free = found(setting, "w4a4", exact=False, protocol="ends-8bit").state.activations
    ratios = [exact[name].scale / free[name].scale for name in few]
    assert max(abs(math.log2(ratio)) for ratio in ratios) <= 0.5  # at most half an octave, where several have to share
    eight = found(setting, "w4a8", exact=True).state
    again = exact_activations(template, eight)
    assert again.activations == eight.activations


@pytest.mark.parametrize("bits", ["w4a8", "w4a4", "w2a3"])
def test_float32_and_float64_agree_on_every_code(setting, bits):
    """The twin in float32 rounds sums in its own order; on the exact grid no rounding before the last one happens at all."""
    places = setting[2]
    graph = found(setting, bits, exact=True).write(places)
    outputs = [site.output for site in places.template().sites]
    x = images(24, seed=5)
    with torch.no_grad():
        narrow = Twin(graph).run({"image": torch.tensor(x)}, fetch=outputs)
        wide = Twin(graph, dtype=torch.float64).run({"image": torch.tensor(x, dtype=torch.float64)}, fetch=outputs)
    pools = 0
    for name in outputs:
        pools += not np.array_equal(narrow[name].numpy(), wide[name].numpy().astype(np.float32))
    assert pools <= 1  # the mean over 36 places is no dyadic number


def test_packed_weights_are_the_same_numbers_in_half_the_bytes(setting):
    graph = found(setting, "w4a8", exact=True).write(setting[2])
    x = torch.tensor(images(4, seed=6))
    with torch.no_grad():
        (wanted,) = Twin(graph).run({"image": x}).values()
        for through in ("", "int8"):
            packed = pack_int4(graph, through=through)
            assert packed.opset >= 21
            (got,) = Twin(packed).run({"image": x}).values()
            np.testing.assert_array_equal(got.numpy(), wanted.numpy())
            kinds = [packed.constant(name).dtype.name for name in packed.initializer_names]
            assert kinds.count("int4") >= 7


def test_numbers_of_another_graph_are_refused(setting):
    from zsq_deploy.errors import ModelError

    numbers = found(setting, "w4a8", exact=True)
    weights = dict(numbers.state.weights)
    weights.pop(next(iter(weights)))
    other = dataclasses.replace(numbers, state=dataclasses.replace(numbers.state, weights=weights))
    with pytest.raises(ModelError, match="learned on another graph"):
        other.write(setting[2])


@pytest.fixture(scope="module")
def arm(setting):
    """The same network on scales whose sums are never half-way between two codes."""
    model, data, _ = setting
    graph = model.folded().graph
    ranges = collect(graph, data.batches(32)).ranges()
    exact = exact_scales(graph, ranges, activation=ACTIVATION, weight=WEIGHT, tie_free_sums=True)
    assert not exact.tying
    qdq = insert_qdq(graph, exact.ranges, activation=ACTIVATION, weight=WEIGHT, weight_scales=exact.weight_scales)
    return Places(graph, qdq, ACTIVATION, WEIGHT)


def half_ways(numbers, places):
    """Sums of two codes that are half-way between two codes of their output, counted over all pairs of codes."""
    groups = {site.output: site.group for site in places.template().sites}
    groups |= {site.name: site.group for site in places.template().sites}
    count = 0
    for node in places.template().plain.nodes:
        if node.op_type != "Add" or not all(name in groups for name in node.input):
            continue
        reader = places.floating.consumers(node.output[0])[0]
        output = node.output[0] if node.output[0] in groups else reader.output[0]
        one, other, out = (numbers.state.activations[groups[name]] for name in (node.input[0], node.input[1], output))
        a, b = (np.arange(each.scheme.qmin, each.scheme.qmax + 1) - each.zero_point for each in (one, other))
        # scales are short numbers: exact in float64
        steps = (a[:, None] * one.scale + b[None, :] * other.scale) / out.scale
        exactly = [Fraction(one.scale) / Fraction(out.scale), Fraction(other.scale) / Fraction(out.scale)]
        assert steps[-1, -1] == pytest.approx(float(int(a[-1]) * exactly[0] + int(b[-1]) * exactly[1]), rel=1e-12)
        doubled = [2 * each for each in exactly]
        scale = math.lcm(*(each.denominator for each in doubled))
        whole = a[:, None] * int(doubled[0] * scale) + b[None, :] * int(doubled[1] * scale)
        count += int((whole % (2 * scale) == scale).sum())
    return count


@pytest.mark.parametrize(("bits", "protocol"), [("w4a4", "all-layers"), ("w4a4", "ends-8bit"), ("w2a3", "all-layers")])
def test_sums_are_never_half_way_where_the_runtime_rounds_halves_its_own_way(setting, arm, bits, protocol):
    _, data, _ = setting

    def numbers(tie_free):
        asked = LowBits(Bits.of(bits), Protocol.of(protocol), "nearest", tie_free_sums=tie_free)
        return find_numbers(arm, data, asked)

    kept = numbers(True)
    assert not kept.tying
    assert half_ways(kept, arm) == 0
    assert not any("half-way" in note for note in kept.notes)
    free = numbers(False)
    assert half_ways(free, arm) > 0
    # they are still near what was found, and multipliers are short
    start = find_numbers(arm, data, LowBits(Bits.of(bits), Protocol.of(protocol), "nearest", exact=False))
    for name, one in kept.state.activations.items():
        if one.scheme.bits < 8:
            assert abs(math.log(one.scale / start.state.activations[name].scale)) < math.log(1.5)
    assert not kept.inexact


def test_sums_that_stay_half_way_are_named(setting):
    """Free scales lie on no common grid."""
    _, data, places = setting
    template = places.template()
    asked = LowBits(Bits.of("w4a4"), Protocol.of("all-layers"), "nearest", exact=False, tie_free_sums=True)
    numbers = find_numbers(places, data, asked)
    assert numbers.tying
    assert set(numbers.tying) <= set(template.groups())
    assert any("half-way" in note and numbers.tying[0] in note for note in numbers.notes)
