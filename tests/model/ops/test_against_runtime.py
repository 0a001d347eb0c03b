"""Operators whose corners the node tests leave out, against ONNX Runtime on whole grids of attributes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.model.graph import Graph

sys.path.insert(0, str(Path(__file__).parent))
from one_node import Array, by_runtime, by_twin, one_node


def compare(op_type: str, inputs: list[Array | None], *, atol: float = 2e-5, **options: Any) -> None:
    graph, feeds = one_node(op_type, inputs, **options)
    expected, found = by_runtime(graph, feeds), by_twin(graph, feeds)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape, options
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=atol, err_msg=str(options))


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_pooling(op_type: str, ceil_mode: int) -> None:
    for k, s, p, size in itertools.product((2, 3), (1, 2, 3), ((0, 0), (1, 1), (0, 1), (1, 0)), (5, 6, 7, 8)):
        options = {"kernel_shape": [k, k], "strides": [s, s], "pads": [p[0], p[0], p[1], p[1]], "ceil_mode": ceil_mode}
        if op_type == "LpPool":
            if ceil_mode:
                continue  # comes with opset 18, where runtime and specification part
            options.pop("ceil_mode")
        compare(op_type, [noise(1, 2, size, size)], **options)
        if op_type == "AveragePool":
            compare(op_type, [noise(1, 2, size, size)], count_include_pad=1, **options)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(auto_pad: str) -> None:
    for stride, size in itertools.product((1, 2, 3), (6, 7)):
        x = noise(1, 2, size, size)
        options = {"auto_pad": auto_pad, "strides": [stride, stride], "kernel_shape": [3, 3]}
        compare("MaxPool", [x], **options)
        compare("AveragePool", [x], **options)
        compare("Conv", [x, noise(4, 2, 3, 3, seed=1)], constants=[1], **options)
        if auto_pad != "VALID":
            compare("ConvTranspose", [x, noise(2, 4, 3, 3, seed=1)], constants=[1], **options)


@pytest.mark.parametrize("group", [1, 2])
def test_convolution(group: int) -> None:
    for pads, stride, dilation in itertools.product(([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 2, 0]), (1, 2), (1, 2)):
        options = {"pads": pads, "strides": [stride] * 2, "dilations": [dilation] * 2, "group": group}
        compare("Conv", [noise(2, 4, 9, 8), noise(6, 4 // group, 3, 2, seed=1), noise(6, seed=2)], **options)
        compare("ConvTranspose", [noise(2, 4, 5, 6), noise(4, 3, 3, 2, seed=1), noise(3 * group, seed=2)], **options)
        if stride > 1:
            extra = {"output_padding": [1, 0], **options}
            compare("ConvTranspose", [noise(2, 4, 5, 6), noise(4, 3, 3, 2, seed=1), noise(3 * group, seed=2)], **extra)


def test_convolution_in_one_and_three_dimensions() -> None:
    compare("Conv", [noise(2, 3, 11), noise(4, 3, 3, seed=1)], pads=[2, 1])
    compare("Conv", [noise(1, 2, 5, 6, 7), noise(3, 2, 3, 2, 3, seed=1)], pads=[1, 0, 1, 1, 1, 0])
    compare("ConvTranspose", [noise(2, 3, 7), noise(3, 4, 3, seed=1)], strides=[2], pads=[1, 0])


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
def test_resize(mode: str, coordinates: str) -> None:
    x = noise(1, 2, 7, 9)
    nearest = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil") if mode == "nearest" else ("floor",)
    for rule, outside in itertools.product(nearest, (0, 1) if mode == "cubic" else (0,)):
        options = {
            "mode": mode,
            "coordinate_transformation_mode": coordinates,
            "nearest_mode": rule,
            "exclude_outside": outside,
        }
        for scale in ((2, 2), (0.5, 0.5), (1.5, 2.3), (0.6, 0.7), (3, 1), (0.3, 0.34)):
            compare("Resize", [x, None, np.array([1, 1, *scale], np.float32)], constants=[2], **options)
        for size in ((14, 18), (3, 4), (10, 21)):
            compare("Resize", [x, None, None, np.array([1, 2, *size], np.int64)], constants=[3], **options)


def test_pools_without_node_tests() -> None:
    for p in (1, 2, 3):
        compare("GlobalLpPool", [noise(2, 3, 5, 6)], p=p)
    regions = np.array([[0, 0, 0, 6, 6], [1, 2, 1, 5, 4], [0, 3, 3, 3, 3]], np.float32)
    compare("MaxRoiPool", [noise(2, 3, 8, 8), regions], pooled_shape=[2, 3], spatial_scale=0.9)


def test_group_normalization_before_opset_21() -> None:
    # no node test has scales per group; the runtime's function body does not know them either: closed form
    x, scale, bias = noise(2, 6, 4, 5), noise(3, seed=1), noise(3, seed=2)
    graph, feeds = one_node("GroupNormalization", [x, scale, bias], opset=18, num_groups=3, epsilon=1e-3)
    parts = x.reshape(2, 3, -1)
    normal = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + 1e-3)
    expected = normal * scale[:, None] + bias[:, None]
    np.testing.assert_allclose(by_twin(graph, feeds)["o0"], expected.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_reductions_before_opset_18() -> None:
    for name in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare"):
        compare(name, [noise(2, 3, 4)], opset=13, axes=[0, -1], keepdims=0)
        compare(name, [noise(2, 3, 4)], opset=13)
    compare("ReduceSum", [noise(2, 3, 4), np.array([1], np.int64)], opset=13)
    compare("Split", [noise(7, 2)], opset=13, outputs=1, axis=0)


def test_exact_integer_operators() -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(0, 256, (2, 8, 9, 9), np.uint8)
    w = rng.integers(-127, 128, (16, 8, 3, 3), np.int8)
    bias = rng.integers(-5000, 5000, 16).astype(np.int32)
    w_scale = rng.uniform(0.001, 0.02, 16).astype(np.float32)
    inputs = [
        x,
        np.float32(0.0173).reshape(()),
        np.uint8(131).reshape(()),
        w,
        w_scale,
        np.zeros(16, np.int8),
        np.float32(0.47).reshape(()),
        np.uint8(117).reshape(()),
        bias,
    ]
    compare("QLinearConv", inputs, atol=0, constants=range(1, 9), pads=[1, 1, 1, 1])
    compare("ConvInteger", [x, w.view(np.uint8), np.uint8(7).reshape(())], atol=0)
    a, b = rng.integers(0, 256, (3, 20, 64), np.uint8), rng.integers(-128, 128, (64, 12), np.int8)
    compare("MatMulInteger", [a, b, np.uint8(90).reshape(()), np.int8(3).reshape(())], atol=0, constants=[1, 3])
    scale, zero = np.float32(0.02).reshape(()), np.uint8(128).reshape(())
    inputs = [a, scale, zero, b, scale, np.int8(0).reshape(()), np.float32(1.3).reshape(()), zero]
    compare("QLinearMatMul", inputs, atol=0, constants=range(1, 8))


@pytest.mark.parametrize("centred", [0, 1])
def test_suppression_of_overlapping_boxes(centred: int) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        batch, kinds, count = int(rng.integers(1, 3)), int(rng.integers(1, 4)), int(rng.integers(1, 60))
        corners = rng.random((batch, count, 4)) * (10, 10, 5, 5) if centred else rng.random((batch, count, 4)) * 10
        scores = np.round(rng.random((batch, kinds, count)), 2)  # with equal scores among them
        inputs: list[Array | None] = [
            corners.astype(np.float32),
            scores.astype(np.float32),
            rng.integers(0, 20, 1),
            rng.choice(np.array([0, 0.3, 0.5, 0.7, 1.0], np.float32), 1),
        ]
        if rng.random() < 0.7:
            inputs.append(rng.choice(np.array([0, 0.2, 0.5], np.float32), 1))
        compare("NonMaxSuppression", inputs, atol=0, center_point_box=centred)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("transformation", ["half_pixel", "output_half_pixel"])
def test_region_alignment(mode: str, transformation: str) -> None:
    rng = np.random.default_rng(4)
    start = rng.random((5, 2)) * 6 - 1
    regions = np.concatenate([start, start + rng.random((5, 2)) * 8], 1).astype(np.float32)
    for ratio in (0, 1, 3):
        compare(
            "RoiAlign",
            [noise(2, 3, 9, 8), regions, rng.integers(0, 2, 5)],
            mode=mode,
            coordinate_transformation_mode=transformation,
            output_height=3,
            output_width=2,
            sampling_ratio=ratio,
            spatial_scale=0.8,
        )


def test_resampling_on_grids() -> None:
    for mode, padding, align in itertools.product(
        ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (0, 1)
    ):
        grid = np.random.default_rng(2).uniform(-1.3, 1.3, (2, 5, 4, 2)).astype(np.float32)
        compare(
            "GridSample", [noise(2, 3, 6, 7), grid], mode=mode, padding_mode=padding, align_corners=align, atol=1e-4
        )


@pytest.mark.parametrize("reduction", ["none", "add", "mul"])
def test_scattering(reduction: str) -> None:
    index = np.array([[0, 2], [1, -1], [-2, 0]], np.int64)
    compare("ScatterND", [noise(3, 4, 5), index, noise(3, 5, seed=1)], reduction=reduction)
    places = np.array([[0, 2, -1], [1, 0, 2]], np.int64)
    compare("ScatterElements", [noise(3, 5), places, noise(2, 3, seed=1)], axis=1, reduction=reduction)


def test_slices_of_every_kind() -> None:
    x = noise(5, 7)
    numbers = (-9, -5, -1, 0, 2, 6, 9)
    for start, end, step in itertools.product(numbers, numbers, (-3, -1, 1, 2)):
        given = [np.array([value], np.int64) for value in (start, end, 1, step)]
        compare("Slice", [x, *given], atol=0)


def test_parts_of_a_tensor_as_a_sequence() -> None:
    """Cut apart in every way, picked by place, counted, and joined again in another order."""
    x = noise(2, 7, 3)
    for split, keep in ((np.array(3, np.int64), 1), (np.array([1, 4, 2], np.int64), 1), (None, 1), (None, 0)):
        parts = ["x"] if split is None else ["x", "split"]
        nodes = [
            helper.make_node("SplitToSequence", parts, ["s"], axis=1, keepdims=keep),
            helper.make_node("SequenceAt", ["s", "last"], ["a"]),
            helper.make_node("SequenceAt", ["s", "first"], ["b"]),
            helper.make_node("SequenceConstruct", ["a", "b", "a"], ["t"]),
            helper.make_node("ConcatFromSequence", ["t"], ["joined"], axis=1),
            helper.make_node("ConcatFromSequence", ["s"], ["all"], axis=1, new_axis=0 if keep else 1),
            helper.make_node("SequenceLength", ["s"], ["count"]),
        ]
        constants = {"last": np.array(-1, np.int64), "first": np.array(0, np.int64)}
        if split is not None:
            constants["split"] = split
        names = ["a", "joined", "all", "count"]
        graph = helper.make_graph(
            nodes,
            "parts",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 7, 3])],
            [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in names],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        net = Graph(onnx.shape_inference.infer_shapes(model))
        expected, found = by_runtime(net, {"x": x}), by_twin(net, {"x": x})
        for name in names:
            np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(found["all"], x)


def test_padding_of_every_kind() -> None:
    x = noise(2, 3, 5)
    for mode in ("constant", "reflect", "edge"):
        for pads in ([0, 1, 2, 0, 0, 3], [0, 0, -1, 1, 1, 2] if mode == "constant" else [0, 2, 0, 0, 1, 4]):
            compare("Pad", [x, np.array(pads, np.int64)], mode=mode, atol=0)
    compare("Pad", [x, np.array([1, 2], np.int64), np.array(3.5, np.float32), np.array([-1])], opset=18, atol=0)
    compare("Pad", [x, np.array([4, 7], np.int64), None, np.array([-1])], opset=19, mode="wrap", atol=0)
