"""Exact scales: short significands, and the equality that they buy, against ONNX Runtime itself."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.onnxruntime.kernels import Arm64Arithmetic
from zsq_deploy.model import Graph, Twin, load_model
from zsq_deploy.quant import Granularity, Scheme, collect
from zsq_deploy.quant.exact_scales import exact_scales, exactly_representable, snap_scale

U8 = Scheme(bits=8, signed=False, symmetric=False)
S8 = Scheme(bits=8, signed=True, symmetric=True, granularity=Granularity.CHANNEL, restricted=True)


def residual_network(seed: int, channels: int = 9) -> onnx.ModelProto:
    """Depthwise, pointwise and residual layers, Clip and pooling, with odd sizes and wild weights."""
    rng = np.random.default_rng(seed)
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,11,11] image) => (float[N,5] logits)
    <float zero = {{0.0}}, float six = {{6.0}}>
    {{
        a = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (image, w0, b0)
        ar = Relu (a)
        d = Conv <kernel_shape = [3,3], pads = [1,1,1,1], group = {channels}> (ar, w1, b1)
        dr = Clip (d, zero, six)
        p = Conv <kernel_shape = [1,1]> (dr, w2, b2)
        s = Add (p, ar)
        sr = Relu (s)
        g = GlobalAveragePool (sr)
        f = Flatten (g)
        logits = Gemm <transB = 1> (f, w3, b3)
    }}
    """
    proto = onnx.parser.parse_model(text)
    shapes = {
        "w0": (channels, 3, 3, 3),
        "b0": (channels,),
        "w1": (channels, 1, 3, 3),
        "b1": (channels,),
        "w2": (channels, channels, 1, 1),
        "b2": (channels,),
        "w3": (5, channels),
        "b3": (5,),
    }
    for name, shape in shapes.items():
        spread = np.exp(rng.normal(0, 1.5, (shape[0],) + (1,) * (len(shape) - 1)))
        array = (rng.normal(0, 0.3, shape) * spread).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


@given(st.floats(1e-12, 1e9), st.sampled_from([(4, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15), (5,)]))
def test_snapped_scales_have_the_form_and_the_size(scale: float, significands: tuple[int, ...]) -> None:
    snapped = snap_scale(scale, significands, shrink=0.0)
    fraction, _ = math.frexp(snapped)
    assert any(math.frexp(m)[0] == fraction for m in significands)
    assert snapped >= scale
    # The next smaller candidate would be too small: the choice is the tightest.
    below = max(m * 2.0**e for m in significands for e in range(-60, 60) if m * 2.0**e < snapped)
    assert below < scale


def test_a_limit_from_above_is_kept() -> None:
    assert snap_scale(6 / 255, [6], largest=6 / 255) == 6 * 2.0**-8
    assert snap_scale(1.0, [4], shrink=0.0, largest=0.9) == 0.5


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_impossible_scales_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        snap_scale(bad, [4])


@given(st.integers(-(2**24), 2**24), st.integers(-100, 100))
def test_short_numbers_are_representable(significand: int, exponent: int) -> None:
    value = significand * 2.0**exponent
    assert exactly_representable(value)
    assert float(np.float32(value)) == value


def test_numbers_of_25_bits_are_not() -> None:
    assert not exactly_representable(2.0**24 + 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_requantization_never_rounds_before_the_last_step(seed: int) -> None:
    graph = Graph(residual_network(seed))
    rng = np.random.default_rng(seed)
    names = ["image", "a", "ar", "d", "dr", "p", "s", "sr", "g", "f", "logits"]
    ranges = {name: (-float(rng.exponential(3)), float(rng.exponential(8))) for name in names}
    for name in ("ar", "sr", "g", "f"):
        ranges[name] = (0.0, ranges[name][1])
    ranges["dr"] = (0.0, 6.0)
    found = exact_scales(graph, ranges, activation=U8, weight=S8)

    def scale(name: str) -> float:
        low, high = found.ranges[name]
        assert low <= 0 <= high
        return (high - low) / 255

    for name in names:
        if name in ("a", "d", "s"):
            continue
        assert exactly_representable(scale(name), 3), name
        assert scale(name) >= (1 - 0.006) * (max(ranges[name][1], 0) - min(ranges[name][0], 0)) / 255 or name == "dr"
    assert found.ranges["dr"][1] <= 6.0
    # Values that meet in Add, and what pooling and flattening make of them, differ by powers of two.
    for name in ("sr", "p", "g", "f"):
        assert math.log2(scale(name) / scale("ar")).is_integer(), name
    for node, x, y in (("w0", "image", "ar"), ("w1", "ar", "dr"), ("w2", "dr", "p")):
        for weight_scale in found.weight_scales[node].astype(np.float64):
            multiplier = scale(x) * weight_scale / scale(y)
            assert exactly_representable(multiplier, 7)
            assert float(np.float32(scale(x) * weight_scale)) == scale(x) * weight_scale


@pytest.mark.parametrize("seed", range(6))
def test_engine_unfused_file_and_twin_agree_in_every_output(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(residual_network(seed), path)
    model = load_model(path)
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 1, (48, 3, 11, 11)).astype(np.float32)
    statistics = collect(model.folded().graph, [{"image": images[:16]}], device="cpu")
    target = get_target("ort-x86-vnni")
    backend = get_backend(target)
    outputs = {}
    for exact in (True, False):
        options = backend.BuildOptions(exact_scales=exact)  # type: ignore[attr-defined]
        engine = backend.build(model, statistics.ranges("minmax"), target, tmp_path / str(exact), options=options)
        fused = backend.runner(engine.path, target).run({"image": images})["logits"]
        unfused = backend.runner(engine.path, target, mode="unfused").run({"image": images})["logits"]
        with torch.no_grad():
            twin = Twin(Graph.load(engine.qdq_path), dtype=torch.float64)(torch.from_numpy(images).double()).numpy()
        outputs[exact] = fused
        if exact:
            step = (fused.max() - fused.min()) / 255
            # The last product gives float32: it is rounded once more than in float64, and differently when unfused.
            np.testing.assert_allclose(fused, twin, rtol=0, atol=1e-4 * step)
            np.testing.assert_allclose(fused, unfused, rtol=0, atol=1e-4 * step)
    # The two engines are different ones, or nothing was tested.
    assert not np.array_equal(outputs[True], outputs[False])


def test_per_tensor_weights_get_one_scale() -> None:
    graph = Graph(residual_network(1))
    ranges = dict.fromkeys(("image", "a", "ar", "d", "dr", "p", "s", "sr", "g", "f", "logits"), (-1.0, 3.0))
    found = exact_scales(graph, ranges, activation=U8, weight=Scheme(bits=8, restricted=True))
    assert found.weight_scales["w0"].size == 1


def sums_of(graph: Graph) -> list[tuple[str, tuple[str, str]]]:
    return [(graph.consumers(n.output[0])[0].output[0], (n.input[0], n.input[1])) for n in graph if n.op_type == "Add"]


def step(bounds: tuple[float, float]) -> float:
    return (bounds[1] - bounds[0]) / 255


@pytest.mark.parametrize("seed", range(6))
def test_no_sum_is_half_way_where_halves_are_rounded_away(seed: int, tmp_path: Path) -> None:
    """All 65,536 pairs of codes of every sum: Arm's fixed-point rule, exact arithmetic and the graph's rule agree."""
    path = tmp_path / "net.onnx"
    onnx.save(residual_network(seed), path)
    model = load_model(path)
    graph = model.folded().graph
    rng = np.random.default_rng(seed)
    names = [value for node in graph for value in (*node.input, *node.output) if graph.constant(value) is None]
    ranges = {name: (-float(rng.uniform(0.1, 3)), float(rng.uniform(0.1, 6))) for name in dict.fromkeys(names)}
    ranges[sums_of(graph)[0][0]] = (0.0, float(rng.uniform(1, 8)))
    s8 = Scheme(bits=8, signed=True, symmetric=False)
    plain = exact_scales(graph, ranges, activation=s8, weight=S8)
    found = exact_scales(graph, ranges, activation=s8, weight=S8, tie_free_sums=True)
    assert plain.tying == found.tying == ()
    assert found.coarser < 1.25

    def differing(exact: object) -> int:
        count = 0
        for output, (first, second) in sums_of(graph):
            scales = [step(exact.ranges[name]) for name in (first, second, output)]  # type: ignore[attr-defined]
            parameters = [(np.float32(scale), 0) for scale in scales]
            arm = Arm64Arithmetic().add_table(*parameters, np.int8).astype(np.int64)
            codes = np.arange(256).astype(np.uint8).view(np.int8).astype(np.float64)
            exactly = (codes[:, None] * scales[0] + codes[None, :] * scales[1]) / scales[2]
            count += int((np.clip(np.rint(exactly), -128, 127) != arm).sum())
            if exact is found:
                assert np.abs(np.abs(exactly - np.trunc(exactly)) - 0.5).min() > 1 / 200
        return count

    assert differing(found) == 0


def test_a_chain_of_sums_stays_off_the_middle() -> None:
    """Nine residual sums in a row, as in ResNet-20: the significands do not run out."""
    lines, value = [], "x"
    for block in range(9):
        lines += [
            f"c{block} = Conv ({value}, w{block})",
            f"s{block} = Add (c{block}, {value})",
            f"r{block} = Relu (s{block})",
        ]
        value = f"r{block}"
    body = "\n".join(lines)
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[N,4,5,5] x) => (float[N,4,5,5] {value}) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    for block in range(9):
        weight = rng.normal(0, 0.3, (4, 4, 1, 1)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{block}"))
    ranges = {"x": (-2.0, 2.0)}
    for block in range(9):
        top = float(rng.uniform(2, 8))
        ranges |= {f"c{block}": (-top / 2, top / 1.5), f"r{block}": (0.0, top)}
        ranges[f"s{block}"] = ranges[f"r{block}"]
    graph = Graph(proto)
    s8 = Scheme(bits=8, signed=True, symmetric=False)
    found = exact_scales(graph, ranges, activation=s8, weight=S8, tie_free_sums=True)
    assert found.tying == ()
    assert found.coarser < 1.4
    for output, pair in sums_of(graph)[:-1]:
        scales = [Fraction(step(found.ranges[name])).limit_denominator(2**30) for name in (*pair, output)]
        for ratio in (scales[0] / scales[2], scales[1] / scales[2]):
            assert ratio.denominator % 2 == 1


def test_a_sum_of_a_value_with_what_follows_from_it_is_still_given_scales() -> None:
    """Where inputs and output must share a significand (a circle), the scales are the usual ones, and the sum is named."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[N,4,6,6] x) => (float[N,8,6,6] y) '
        "{ s = Add (x, x)  y = Concat <axis = 1> (x, s) }"
    )
    s8 = Scheme(bits=8, signed=True, symmetric=False)
    ranges = {"x": (-1.0, 1.0), "s": (-2.0, 2.0), "y": (-2.0, 2.0)}
    found = exact_scales(Graph(proto), ranges, activation=s8, weight=S8, tie_free_sums=True)
    assert found.tying == ("s",)
    assert all(step(found.ranges[name]) >= step(ranges[name]) * 0.99 for name in ranges)
