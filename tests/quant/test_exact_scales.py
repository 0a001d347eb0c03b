"""Exact scales: short significands, and the equality that they buy, against ONNX Runtime itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.backends import get_backend, get_target
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
