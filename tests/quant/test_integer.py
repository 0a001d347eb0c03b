"""Exact integer accumulation against numpy's own integers and against ONNX's reference operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from zsq_deploy.quant.integer import (
    accumulate_conv,
    accumulate_conv_transpose,
    accumulate_matmul,
    quantize_bias,
    requantize,
)


def naive_conv(x, w, strides, pads, dilations, group):
    n, _channels, *size = x.shape
    m, per, *kernel = w.shape
    rank = len(size)
    x = np.pad(x, [(0, 0), (0, 0), *[(pads[i], pads[rank + i]) for i in range(rank)]])
    out = [(x.shape[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(rank)]
    y = np.zeros((n, m, *out), np.int64)
    for channel in range(m):
        g = channel // (m // group)
        for place in np.ndindex(*out):
            window = tuple(
                slice(place[i] * strides[i], place[i] * strides[i] + dilations[i] * (kernel[i] - 1) + 1, dilations[i])
                for i in range(rank)
            )
            patch = x[(slice(None), slice(g * per, (g + 1) * per), *window)]
            y[(slice(None), channel, *place)] = (patch * w[channel]).reshape(n, -1).sum(1)
    return y


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pad=st.integers(0, 2),
    sixteen=st.booleans(),
)
def test_conv_equals_python_integers(seed, rank, group, stride, dilation, pad, sixteen):
    rng = np.random.default_rng(seed)
    size, kernel = [5, 6, 5][:rank], [2, 3, 2][:rank]
    low, high, dtype = (0, 65536, np.uint16) if sixteen else (0, 256, np.uint8)
    x = rng.integers(low, high, (2, 3 * group, *size)).astype(dtype)
    w = rng.integers(-128, 128, (2 * group, 3, *kernel)).astype(np.int8)
    w_zp = rng.integers(-3, 4, 2 * group)
    pads = [pad] * rank + [min(pad + 1, 2)] * rank
    attrs = {"strides": [stride] * rank, "pads": pads, "dilations": [dilation] * rank, "group": group}
    expected = naive_conv(
        x.astype(np.int64) - 7,
        w.astype(np.int64) - w_zp.reshape(-1, *[1] * (rank + 1)),
        attrs["strides"],
        pads,
        attrs["dilations"],
        group,
    )
    np.testing.assert_array_equal(accumulate_conv(x, 7, w, w_zp, attrs), expected)


@pytest.mark.parametrize("largest", [1, 255, 65535])
def test_conv_is_exact_where_float32_is_not(largest):
    """Long reductions of large codes leave float32's integers; the pieces must not."""
    rng = np.random.default_rng(0)
    x = rng.integers(largest // 2, largest + 1, (1, 512, 3, 3)).astype(np.uint16)
    w = rng.integers(100, 128, (4, 512, 3, 3)).astype(np.int8)
    expected = np.einsum("nchw,mchw->nm", x.astype(np.int64), w.astype(np.int64)).reshape(1, 4, 1, 1)
    np.testing.assert_array_equal(accumulate_conv(x, 0, w, 0), expected)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_auto_pad_agrees_with_the_standard(mode):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (1, 2, 7, 8)).astype(np.uint8)
    w = rng.integers(0, 256, (3, 2, 3, 2)).astype(np.uint8)
    node = onnx.helper.make_node("ConvInteger", ["x", "w", "xz", "wz"], ["y"], auto_pad=mode, strides=[2, 2])
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in ("x", "w", "xz", "wz")],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x, "w": w, "xz": np.array(5, np.uint8), "wz": np.array(9, np.uint8)})
    np.testing.assert_array_equal(accumulate_conv(x, 5, w, 9, {"auto_pad": mode, "strides": [2, 2]}), expected)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    group=st.sampled_from([1, 2]),
    stride=st.integers(1, 3),
    mode=st.sampled_from(["", "SAME_UPPER", "SAME_LOWER"]),
)
def test_conv_transpose_equals_the_standard(seed, group, stride, mode):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (2, 2 * group, 4, 3)).astype(np.uint8)
    w = rng.integers(-128, 128, (2 * group, 3, 3, 3)).astype(np.int8)
    attrs = {"strides": [stride, stride], "group": group}
    if mode:
        attrs["auto_pad"] = mode
    else:
        attrs |= {"pads": [1, 0, 0, 1], "output_padding": [stride - 1, 0], "dilations": [1, 2]}
    node = onnx.helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attrs)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in ("x", "w")],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, None)],
    )
    graph.input[0].type.tensor_type.elem_type = graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x.astype(np.float32) - 3, "w": w.astype(np.float32)})
    np.testing.assert_array_equal(accumulate_conv_transpose(x, 3, w, 0, attrs), expected.astype(np.int64))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.sampled_from([1, 7, 300, 3000]), batched=st.booleans())
def test_matmul_equals_python_integers(seed, depth, batched):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (2, 4, depth) if batched else (4, depth)).astype(np.uint8)
    b = rng.integers(-128, 128, (depth, 5)).astype(np.int8)
    b_zp = rng.integers(-5, 5, 5)
    expected = (a.astype(np.int64) - 128) @ (b.astype(np.int64) - b_zp)
    np.testing.assert_array_equal(accumulate_matmul(a, 128, b, b_zp), expected)


def test_requantize_is_the_standards_rounding():
    rng = np.random.default_rng(2)
    acc = rng.integers(-200_000, 200_000, (2, 3, 8, 8))
    factor = np.array([0.0011, 0.002, 0.0005], np.float32)
    got = requantize(acc, factor, 130, np.uint8)
    expected = np.clip(np.rint(acc.astype(np.float32) * factor.reshape(1, 3, 1, 1)) + 130, 0, 255)
    np.testing.assert_array_equal(got, expected.astype(np.uint8))
    assert got.dtype == np.uint8
    assert got.min() == 0
    assert got.max() == 255
    half = requantize(np.array([1, 3, -1, -3]), 0.5, 0, np.int8)
    np.testing.assert_array_equal(half, [0, 2, 0, -2])


def test_requantize_saturates_huge_accumulators():
    np.testing.assert_array_equal(requantize(np.array([2**31 - 1, -(2**31)]), 1e3, 3, np.int8), [127, -128])


def test_bias_codes():
    codes = quantize_bias(np.array([0.1, -0.2, 1e9], np.float32), 0.01, np.array([0.1, 0.2, 0.1], np.float32))
    np.testing.assert_array_equal(codes, [100, -100, 2**31 - 1])


def test_reference_evaluator_agrees_on_integer_conv():
    rng = np.random.default_rng(4)
    x = rng.integers(0, 256, (1, 4, 6, 6)).astype(np.uint8)
    w = rng.integers(0, 256, (2, 4, 3, 3)).astype(np.uint8)
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (uint8[1,4,6,6] x, uint8[2,4,3,3] w, uint8 xz) => (int32[1,2,6,6] y) {
            y = ConvInteger <pads = [1, 1, 1, 1]> (x, w, xz) }"""
    )
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x, "w": w, "xz": np.array(11, np.uint8)})
    np.testing.assert_array_equal(accumulate_conv(x, 11, w, 0, {"pads": [1, 1, 1, 1]}), expected)
