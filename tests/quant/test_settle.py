"""Settled Q/DQ graphs: equality of every order of operations, closeness to what they were, and what is left alone."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.model.fold import fold
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant import Granularity, PlacementRules, Scheme, collect, insert_qdq, read_qdq
from zsq_deploy.quant.regions import read_regions
from zsq_deploy.quant.settle import INVERTIBLE, Settled, settle
from zsq_deploy.quant.settled_sums import trailing_step

from .nets import Builder, images, small_net

U8 = Scheme(8, signed=False, symmetric=False)
W8 = Scheme(8, granularity=Granularity.CHANNEL, restricted=True)
RULES = PlacementRules(
    residual="skip",
    bias="float",
    always_output=frozenset(),
    drop_activations=False,
    split_activations=False,
    round_outputs="read",
    float_readers=True,
)
F = np.float32


def settled(qdq: Graph, floats: Graph | None = None) -> Settled:
    weights = {} if floats is None else {name: floats.constant(name) for name in floats.initializer_names}
    return settle(qdq, activation=U8, weight=W8, float_weights=weights)


def quantized(graph: Graph, batch: np.ndarray, rules: PlacementRules = RULES) -> tuple[Graph, Graph]:
    floats = fold(graph).graph
    ranges = collect(floats, [{"image": batch}], device="cpu").ranges("minmax")
    return floats, insert_qdq(floats, ranges, activation=U8, weight=W8, rules=rules)


def wild_net(seed: int) -> Graph:
    """Residual, depthwise and joined branches, whose channels have very different sizes."""
    b = Builder(seed)
    zero, six = b.constant(np.float32(0)), b.constant(np.float32(6))
    x = b.node("Relu", b.conv("image", 3, 8, bias=True))
    y = b.node("Clip", b.conv(x, 8, 8, group=8, bias=True), zero, six)
    y = b.node("Add", b.conv(y, 8, 8, k=1, bias=True), x)
    z = b.node("Concat", b.node("Relu", y), b.node("Relu", b.conv(y, 8, 4, k=1, bias=True)), axis=1)
    z = b.node("MaxPool", z, kernel_shape=[2, 2], strides=[2, 2])
    z = b.node("Add", b.conv(z, 12, 6, bias=True), b.conv(z, 12, 6, k=1))
    z = b.node("Flatten", b.node("GlobalAveragePool", b.node("Relu", b.conv(z, 6, 6, bias=True))))
    graph = b.graph([b.gemm(z, 6, 5)])
    proto = graph.editable()
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 4:
            spread = np.exp(b.rng.normal(0, 1.5, (array.shape[0], 1, 1, 1)))
            tensor.CopyFrom(numpy_helper.from_array((array * spread).astype(np.float32), tensor.name))
    return Graph(proto)


def codes(graph: Graph, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        tensor.name: np.rint(values[tensor.output].astype(np.float64) / float(tensor.scale)).astype(int)
        for tensor in read_qdq(graph)
        if not tensor.is_weight
    }


def by_twin(graph: Graph, batch: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    wanted = [tensor.output for tensor in read_qdq(graph) if not tensor.is_weight]
    with torch.no_grad():
        found = Twin(graph, dtype=dtype, device="cpu").run({"image": torch.from_numpy(batch).to(dtype)}, fetch=wanted)
    return {name: np.asarray(value) for name, value in found.items()}


def by_ort(graph: Graph, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Node by node in float32, by ONNX Runtime without any fusion."""
    wanted = [tensor.output for tensor in read_qdq(graph) if not tensor.is_weight]
    proto = graph.editable()
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(wanted, session.run(wanted, {"image": batch}), strict=True))


# -- numbers --


@given(st.integers(-(2**40), 2**40).filter(bool), st.integers(-80, 80))
def test_trailing_step_is_the_largest_power_of_two_that_divides(whole: int, exponent: int) -> None:
    value = whole * 2.0**exponent
    step = trailing_step(value)
    assert (value / 2.0**step).is_integer()
    assert not (value / 2.0 ** (step + 1)).is_integer()


@given(st.sampled_from(INVERTIBLE), st.integers(-20, 10), st.integers(-(2**24), 2**24), st.integers(-20, 20))
def test_float32_reciprocals_of_invertible_significands_lose_nothing(a: int, i: int, whole: int, exponent: int) -> None:
    scale, wanted = F(a * 2.0**i), F(whole * 2.0**exponent)
    x = float(wanted) * float(scale)
    if float(F(x)) == x:  # x itself must be a float32 number
        assert F(x) * (F(1) / scale) == wanted


def test_the_reciprocal_of_seven_does_lose() -> None:
    halves = np.arange(0.5, 256, 1, dtype=np.float32)
    assert ((halves * F(7)) * (F(1) / F(7)) != halves).any()


# -- one layer, all orders of operations --


def layer_graph(rng: np.random.Generator, taps: int, channels: int, skip: bool, scales: tuple[float, float, float]):
    """Codes -> matrix product [-> sum with another rounded tensor] -> rectifier -> codes, with free scales."""
    sx, ss, sy = scales
    zx, zy = (int(rng.integers(0, 200)) for _ in range(2))
    weight = (rng.normal(0, 1, (channels, taps)) * np.exp(rng.normal(0, 2, (channels, 1)))).astype(np.float32)
    # Sums shall fill the output's range, whatever the scales are.
    weight *= F(40 * sy / (np.sqrt(taps) * 60 * sx * np.median(np.abs(weight).max(1)) / 3))
    ws = (np.abs(weight).max(1) / 127).astype(np.float32)
    bias = (rng.normal(0, 60, channels) * sy).astype(np.float32)
    arrays = {
        "sx": F(sx), "zx": np.uint8(zx), "ss": F(ss), "zs": np.uint8(rng.integers(0, 255)), "sy": F(sy), "zy": np.uint8(zy),
        "w_quantized": np.rint(weight / ws[:, None]).astype(np.int8), "ws": ws, "wz": np.zeros(channels, np.int8), "b": bias,
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"], "x_Q"),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"], "x_DQ"),
        helper.make_node("DequantizeLinear", ["w_quantized", "ws", "wz"], ["wd"], "w_DQ", axis=0),
        helper.make_node("Gemm", ["xd", "wd", "b"], ["p"], "layer", transB=1),
    ]
    last = "p"
    if skip:
        nodes += [
            helper.make_node("QuantizeLinear", ["s", "ss", "zs"], ["sq"], "s_Q"),
            helper.make_node("DequantizeLinear", ["sq", "ss", "zs"], ["sd"], "s_DQ"),
            helper.make_node("Add", ["p", "sd"], ["t"], "sum"),
        ]
        last = "t"
    nodes += [
        helper.make_node("QuantizeLinear", [last, "sy", "zy"], ["yq"], "y_Q"),
        helper.make_node("DequantizeLinear", ["yq", "sy", "zy"], ["y"], "y_DQ"),
    ]
    inputs = [("x", taps), ("s", channels)] if skip else [("x", taps)]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", channels])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return Graph(model), weight


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([9, 27, 64, 576]),
    st.booleans(),
    st.tuples(st.floats(1e-3, 3.0), st.floats(0.2, 1.5), st.floats(1e-3, 3.0)),
)
def test_every_order_of_float32_operations_gives_the_codes_of_float64(
    seed: int, taps: int, skip: bool, scales: tuple[float, float, float]
) -> None:
    rng = np.random.default_rng(seed)
    sx, ss, sy = scales
    graph, weight = layer_graph(rng, taps, 24, skip, (sx, ss * sy, sy))
    done = settle(graph, activation=U8, weight=W8, float_weights={"w": weight})
    assume(not done.inexact)  # a large second operand can ask for more bits than float32 has
    regions = read_regions(done.graph)
    layer, y = regions.layers["layer"], regions.sites["y_Q"]
    x = regions.sites["x_Q"]
    sx, sy, sw = float(x.scale), float(y.scale), layer.weight.scale.astype(np.float64)
    w = done.graph.constant("w_quantized").astype(np.int64)
    b = done.graph.constant(done.graph.node("layer").input[2])
    assert b.dtype == np.float32
    q = rng.integers(0, 256, (400, taps)) - int(x.zero_point)
    acc = q @ w.T
    added = np.zeros_like(acc, np.float64)
    if skip:
        s = regions.sites["s_Q"]
        added = (rng.integers(0, 256, acc.shape) - int(s.zero_point)) * float(s.scale)
    zero = int(y.zero_point)
    assert zero % 2 == 0 or zero == 255

    real = (acc * (sx * sw) + b.astype(np.float64) + added) / sy
    wanted = np.clip(np.rint(real) + zero, 0, 255)

    def check(value: np.ndarray, name: str) -> None:
        assert value.dtype == np.float32, name
        for code in (np.rint(value) + F(zero), np.rint(value + F(zero))):
            np.testing.assert_array_equal(np.clip(code, 0, 255), wanted, err_msg=name)

    f, m, add, one = acc.astype(F), (sx * sw / sy).astype(F), added.astype(F), F(1) / F(sy)
    step = (sx * sw).astype(F)
    check((f * m + b * one) + add * one, "everything in units of the output")
    check((f * m + add * one) + b / F(sy), "the other operand first")
    check(((f * step + b) + add) / F(sy), "real numbers, divided")
    check(((f * step + add) + b) * one, "real numbers, times the reciprocal")
    check((f + b / step) * m + add * one, "the bias in units of the accumulator")
    fused = (f.astype(np.float64) * m + (b * one).astype(np.float64)).astype(F) + add * one
    check(fused, "fused multiply-add")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.tuples(st.floats(1e-3, 3.0), st.floats(0.2, 1.5), st.floats(1e-3, 3.0)))
def test_weights_are_rounded_once_and_scales_grow_little(seed: int, scales: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(seed)
    graph, weight = layer_graph(rng, 64, 24, True, (scales[0], scales[1] * scales[2], scales[2]))
    old = {tensor.name: tensor for tensor in read_qdq(graph)}
    new = {
        tensor.name: tensor
        for tensor in read_qdq(settle(graph, activation=U8, weight=W8, float_weights={"w": weight}).graph)
    }
    for name in ("x", "s", "t"):
        ratio = float(new[name].scale) / float(old[name].scale)
        # One alone grows by a third at most; two that share a significand can do worse.
        assert 0.994 < ratio < 2.0, name
        fraction, _ = math.frexp(float(new[name].scale))
        assert fraction * 8 in (4, 5, 6, 7), name
        lost = max(new[name].low - old[name].low, old[name].high - new[name].high, 0.0)
        assert lost <= 2.01 * float(new[name].scale), name
    grown = new["w"].scale / old["w"].scale
    assert (grown > 0.999).all()
    # A multiplier is a multiple of `unit`: the odd part of x's significand times the last bit that leaves no ties, which is the 13th
    # behind the point, less the bits that float32 needs for sums beyond 340 codes. So rounding up costs up to one unit, or one part in
    # 64 where the seven bits of the weight's own significand are the coarser grid; no fixed factor holds for all scales.
    x, s, t = new["x"], new["s"], new["t"]
    multiplier = float(x.scale) * new["w"].scale.astype(np.float64) / float(t.scale) / grown
    bias = graph.constant("b").astype(np.float64)
    added = max(abs(limit - int(s.zero_point)) for limit in s.limits) * float(s.scale)
    reach = (np.maximum(np.abs(t.low - bias), np.abs(t.high - bias)) + added) / float(t.scale)
    significand = int(math.frexp(float(x.scale))[0] * 8)
    unit = (significand // (significand & -significand)) * 2.0 ** (np.ceil(np.log2(np.maximum(reach / 340, 1))) - 13)
    assert (grown <= 1.000001 + np.maximum(1 / 64, unit / multiplier)).all()
    assert (grown[multiplier > 2.0**-6] < 1.25).all()  # 7 units of 2**-11; far below one code it may be coarser
    settled_graph = settle(graph, activation=U8, weight=W8, float_weights={"w": weight}).graph
    stored = settled_graph.constant("w_quantized")
    np.testing.assert_array_equal(
        stored, np.clip(np.rint(weight / new["w"].scale.astype(np.float64)[:, None]), -127, 127)
    )
    moved = settled_graph.constant(settled_graph.node("layer").input[2]).astype(np.float64) - graph.constant("b")
    assert np.abs(moved).max() <= 0.02 * float(new["t"].scale)


def test_a_settled_graph_stays_as_it_is() -> None:
    graph, weight = layer_graph(np.random.default_rng(3), 27, 8, True, (0.02, 0.013, 0.05))
    once = settle(graph, activation=U8, weight=W8, float_weights={"w": weight})
    again = settle(once.graph, activation=U8, weight=W8)
    assert again.coarser == 1.0
    for name in ("sx", "sy", "ss", "zx", "zy", "zs", "ws", "w_quantized"):
        np.testing.assert_array_equal(once.graph.constant(name), again.graph.constant(name))


# -- networks --


@pytest.mark.parametrize("make", [small_net, wild_net])
@pytest.mark.parametrize("seed", range(3))
def test_float32_and_float64_give_the_same_codes_everywhere(make, seed: int) -> None:
    batch = images(24, seed)
    floats, qdq = quantized(make(seed), batch[:12])
    done = settled(qdq, floats)
    exact = codes(done.graph, by_twin(done.graph, batch, torch.float64))
    assert len(exact) >= 7
    for other in (by_twin(done.graph, batch, torch.float32), by_ort(done.graph, batch)):
        for name, found in codes(done.graph, other).items():
            np.testing.assert_array_equal(found, exact[name], err_msg=name)


def test_free_scales_do_not() -> None:
    rng = np.random.default_rng(0)
    graph, _ = layer_graph(rng, 64, 24, False, (0.0213, 0.1, 0.0497))
    regions = read_regions(graph)
    sx, sy = (float(regions.sites[name].scale) for name in ("x_Q", "y_Q"))
    layer = regions.layers["layer"]
    multiplier = sx * layer.weight.scale.astype(np.float64) / sy
    acc = rng.integers(-int(100 / multiplier.mean()), int(100 / multiplier.mean()), (100_000, 24))
    real = np.rint(acc * multiplier + layer.bias / sy)
    fused = np.rint(acc.astype(F) * multiplier.astype(F) + (layer.bias / sy).astype(F))
    inside = np.abs(real) < 256
    assert (real != fused)[inside].any()  # or the tests above would prove nothing


@pytest.mark.parametrize("seed", range(3))
def test_a_settled_network_is_as_close_to_float_as_before(seed: int) -> None:
    batch = images(32, seed)
    floats, qdq = quantized(small_net(seed), batch)
    done = settled(qdq, floats)
    x = torch.from_numpy(batch).double()
    with torch.no_grad():
        real, before, after = (Twin(g, dtype=torch.float64, device="cpu")(x) for g in (floats, qdq, done.graph))
    noise = [float(((y - real) ** 2).mean()) for y in (before, after)]
    assert noise[1] < 2.0 * noise[0] + 1e-12
    assert [spec.name for spec in done.graph.outputs] == [spec.name for spec in qdq.outputs]
    assert [node.name for node in done.graph] == [node.name for node in qdq]
    assert 0.99 < done.coarser < 1.3


def test_layers_without_bias_get_one_that_leaves_no_tie() -> None:
    b = Builder(1)
    graph = b.graph([b.conv(b.node("Relu", b.conv("image", 3, 4)), 4, 4)])
    floats, qdq = quantized(graph, images(8))
    done = settled(qdq, floats).graph
    first = next(node for node in done if node.op_type == "Conv")
    assert len(first.input) == 3
    site = next(t for t in read_qdq(done) if not t.is_weight and t.name != "image")
    offset = done.constant(first.input[2]).astype(np.float64) / float(site.scale)
    assert (offset != 0).all()
    assert (np.abs(offset) <= 2.0**-7).all()


# -- graphs of others --


def change(graph: Graph, edit) -> Graph:
    proto = graph.editable()
    edit(proto.graph)
    return Graph(proto)


def test_float_weights_behind_quantize_are_understood() -> None:
    graph, weight = layer_graph(np.random.default_rng(5), 27, 8, False, (0.02, 0.013, 0.05))

    def edit(g: onnx.GraphProto) -> None:
        for tensor in g.initializer:
            if tensor.name == "w_quantized":
                tensor.CopyFrom(numpy_helper.from_array(weight, "w"))
        quantize = helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["w_quantized"], "w_Q", axis=0)
        g.node.insert(0, quantize)

    floating = settle(change(graph, edit), activation=U8, weight=W8)
    stored = settle(graph, activation=U8, weight=W8, float_weights={"w": weight})
    x = {"x": np.random.default_rng(0).normal(0, 1, (50, 27)).astype(np.float32)}
    a, b = (
        Twin(g, dtype=torch.float64, device="cpu")(torch.from_numpy(x["x"]).double()).detach()
        for g in (floating.graph, stored.graph)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not floating.notes


@pytest.mark.parametrize("case", ["per channel activation", "weight zero point", "shared weight"])
def test_what_is_unusual_is_left_and_noted(case: str) -> None:
    rng = np.random.default_rng(7)
    graph, _ = layer_graph(rng, 27, 8, False, (0.02, 0.013, 0.05))

    def edit(g: onnx.GraphProto) -> None:
        place = {tensor.name: tensor for tensor in g.initializer}
        if case == "per channel activation":
            for name, kind in (("sx", np.float32), ("zx", np.uint8)):
                value = np.full(27, numpy_helper.to_array(place[name]), kind)
                place[name].CopyFrom(numpy_helper.from_array(value, name))
        elif case == "weight zero point":
            place["wz"].CopyFrom(numpy_helper.from_array(np.full(8, 3, np.int8), "wz"))
        else:
            g.node.append(helper.make_node("Gemm", ["xd", "wd"], ["second"], "second", transB=1))
            g.output.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, None))

    changed = change(graph, edit)
    done = settle(changed, activation=U8, weight=W8)
    assert done.notes
    assert any(case.split()[0] in note or "zero point" in note or "shares" in note for note in done.notes)
    for name in ("w_quantized", "ws", "b"):
        np.testing.assert_array_equal(done.graph.constant(name), changed.constant(name))
    x = torch.from_numpy((rng.integers(0, 256, (50, 27)) - int(graph.constant("zx"))) * 0.02)
    with torch.no_grad():
        before, after = (
            Twin(g, dtype=torch.float64, device="cpu").run({"x": x}, fetch=["y"])["y"] for g in (changed, done.graph)
        )
    after = after.clamp(float(before.min()), float(before.max()))  # the new range may be longer
    assert float((before - after).square().mean().sqrt()) < 0.1 * float(before.square().mean().sqrt())
