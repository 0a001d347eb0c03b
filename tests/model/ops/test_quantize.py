"""QuantizeLinear and DequantizeLinear: exact codes, every width and granularity, and the straight-through gradient."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from zsq_deploy.model.carried import carried_codes
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin

sys.path.insert(0, str(Path(__file__).parent))
from one_node import Array, by_runtime, by_twin, one_node

TYPES = {"int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16}


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fake_quant_graph(
    nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: list[int | None], opset: int = 21
) -> Graph:
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return Graph(onnx.shape_inference.infer_shapes(model))


def pair(scale: Any, zero: Any, shape: list[int | None], **attributes: Any) -> Graph:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    return fake_quant_graph(nodes, {"s": np.asarray(scale, np.float32), "z": np.asarray(zero)}, shape)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(TYPES)),
    exponent=st.floats(-12, 6),
    spread=st.floats(0.1, 3.0),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_codes_equal_the_runtime(kind: str, exponent: float, spread: float, seed: int, data: st.DataObject) -> None:
    limits = np.iinfo(TYPES[kind])
    zero = data.draw(st.integers(limits.min, limits.max))
    scale = np.float32(2.0**exponent)
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(400) * spread * float(scale) * (limits.max - limits.min) / 4).astype(np.float32)
    # exact ties and the borders
    x[:100] = (rng.integers(-300, 300, 100) + 0.5).astype(np.float32) * scale
    graph, feeds = one_node(
        "QuantizeLinear", [x, np.array(scale), np.array(zero, TYPES[kind])], opset=21, constants=[1, 2]
    )
    found = by_twin(graph, feeds)["o0"]
    assert found.dtype == TYPES[kind]
    np.testing.assert_array_equal(found, by_runtime(graph, feeds, optimize=False)["o0"])
    expected = np.clip(np.rint(x / scale) + zero, limits.min, limits.max)
    np.testing.assert_array_equal(found, expected.astype(TYPES[kind]))


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_fake_quantization_equals_the_runtime(kind: str, granularity: str) -> None:
    x = noise(4, 6, 5) * 3
    limits = np.iinfo(TYPES[kind])
    rng = np.random.default_rng(1)
    shape = {"tensor": (), "channel": (6,), "block": (4, 2, 5)}[granularity]
    scale = rng.uniform(0.5, 2.0, shape).astype(np.float32) * np.float32(6 / (limits.max - limits.min))
    zero = rng.integers(limits.min, limits.max, shape).astype(TYPES[kind])
    attributes = {"axis": 1} | ({"block_size": 3} if granularity == "block" else {})
    graph = pair(scale, zero, [None, 6, 5], **attributes)
    assert set(carried_codes(graph)) == {"q"}
    np.testing.assert_array_equal(by_twin(graph, {"x": x})["y"], by_runtime(graph, {"x": x}, optimize=False)["y"])


def test_the_last_block_may_be_short() -> None:
    x = noise(2, 7)
    scale = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], np.float32)
    graph = pair(scale, np.zeros((2, 3), np.int8), [None, 7], axis=1, block_size=3)
    wide = np.repeat(scale, 3, axis=1)[:, :7]
    expected = np.clip(np.rint(x / wide), -128, 127).astype(np.float32) * wide
    np.testing.assert_array_equal(by_twin(graph, {"x": x})["y"], expected)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_four_bits(kind: str) -> None:
    low, high = (-8, 7) if kind == "int4" else (0, 15)
    dtype = getattr(ml_dtypes, kind)
    x = noise(3, 50) * 4
    graph = pair(np.float32(0.5), np.array(3).astype(dtype), [None, 50])
    expected = (np.clip(np.rint(x / np.float32(0.5)) + 3, low, high) - 3) * np.float32(0.5)
    np.testing.assert_array_equal(by_twin(graph, {"x": x})["y"], expected.astype(np.float32))
    # as stored weights
    codes = np.arange(low, high + 1).astype(dtype)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"]),
        helper.make_node("Mul", ["x", "v"], ["y"]),
    ]
    constants = {"w": codes, "s": np.array(0.25, np.float32), "z": np.array(1).astype(dtype)}
    graph = fake_quant_graph(nodes, constants, [16])
    ones = np.ones(16, np.float32)
    expected = (np.arange(low, high + 1) - 1) * np.float32(0.25)
    np.testing.assert_array_equal(by_twin(graph, {"x": ones})["y"], expected.astype(np.float32))


def test_int32_bias_is_exact_in_float64() -> None:
    codes = np.array([2**30 + 1, -(2**30) - 3, 7], np.int32)
    scale = np.float32(3e-9)
    nodes = [helper.make_node("DequantizeLinear", ["b", "s"], ["v"]), helper.make_node("Add", ["x", "v"], ["y"])]
    graph = fake_quant_graph(nodes, {"b": codes, "s": np.array(scale)}, [3])
    with torch.no_grad():
        found = Twin(graph, dtype=torch.float64, device="cpu")(torch.zeros(3))
    np.testing.assert_array_equal(found.numpy(), codes.astype(np.float64) * np.float64(scale))


def test_microsoft_domain() -> None:
    x = noise(2, 9)
    scale, zero = np.array(0.01, np.float32), np.array(1000, np.uint16)
    graph, feeds = one_node("QuantizeLinear", [x, scale, zero], domain="com.microsoft", constants=[1, 2])
    expected = np.clip(np.rint(x / scale) + 1000, 0, 65535).astype(np.uint16)
    np.testing.assert_array_equal(by_twin(graph, feeds)["o0"], expected)
    graph, feeds = one_node("DequantizeLinear", [expected, scale, zero], domain="com.microsoft", constants=[1, 2])
    back = by_twin(graph, feeds)["o0"]
    np.testing.assert_array_equal(back, (expected.astype(np.float32) - 1000) * scale)


def test_gradients_are_those_of_lsq() -> None:
    """Input: passed inside the range, stopped outside. Scale: rint(x/s) - x/s inside, the limit outside."""
    graph = pair(np.float32(0.1), np.array(10, np.uint8), [None])
    twin = Twin(graph, device="cpu")
    scale = twin.parameter_of("s").requires_grad_()
    x = torch.tensor([-2.0, -1.04, -0.3333, 0.0, 0.26, 5.21, 24.51, 30.0], requires_grad=True)
    weight = torch.arange(1.0, 9.0)
    (twin(x) * weight).sum().backward()
    v = x.detach() / 0.1
    inside = (torch.round(v) + 10 >= 0) & (torch.round(v) + 10 <= 255)
    assert inside.tolist() == [False, True, True, True, True, True, True, False]
    torch.testing.assert_close(x.grad, torch.where(inside, weight, 0.0))
    local = torch.where(inside, torch.round(v) - v, torch.where(v < 0, -10.0, 245.0))
    torch.testing.assert_close(scale.grad, (local * weight).sum(), rtol=1e-4, atol=1e-3)


def test_gradient_reaches_per_channel_scales() -> None:
    graph = pair(np.array([0.1, 0.2], np.float32), np.zeros(2, np.int8), [None, 2], axis=1)
    twin = Twin(graph, device="cpu")
    scale = twin.parameter_of("s").requires_grad_()
    twin(torch.full((3, 2), 100.0)).sum().backward()
    torch.testing.assert_close(scale.grad, torch.tensor([3 * 127.0, 3 * 127.0]))


def test_codes_travel_through_operators_that_move_them() -> None:
    """Through pooling and reshaping the gradient survives; where anybody else reads a value, it has its integer type."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("MaxPool", ["q"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Transpose", ["p"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("DequantizeLinear", ["t", "s", "z"], ["y"]),
    ]
    constants = {"s": np.array(0.05, np.float32), "z": np.array(7, np.uint8)}
    graph = fake_quant_graph(nodes, constants, [None, 3, 4, 4])
    twin = Twin(graph, device="cpu")
    x = noise(2, 3, 4, 4)
    feeds = torch.from_numpy(x).requires_grad_()
    found = twin.run({"x": feeds}, ["y", "p"])
    np.testing.assert_array_equal(found["y"].detach().numpy(), by_runtime(graph, {"x": x}, optimize=False)["y"])
    assert found["p"].dtype is torch.uint8
    found["y"].sum().backward()
    assert feeds.grad is not None
    assert int((feeds.grad != 0).sum()) == 2 * 3 * 4  # one winner in every window

    nodes[2:] = [
        helper.make_node("Cast", ["p"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["c"], ["y"]),
    ]
    graph = fake_quant_graph(nodes, constants, [None, 3, 4, 4])
    assert not carried_codes(graph)
    np.testing.assert_array_equal(by_twin(graph, {"x": x})["y"], by_runtime(graph, {"x": x}, optimize=False)["y"])


def test_concatenated_codes() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["k"]),
        helper.make_node("Concat", ["q", "k"], ["c"], axis=1),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    constants = {"s": np.array(0.02, np.float32), "z": np.array(0, np.int8)}
    graph = fake_quant_graph(nodes, constants, [None, 5])
    assert set(carried_codes(graph)) == {"q", "k", "c"}
    x = noise(3, 5)
    np.testing.assert_array_equal(by_twin(graph, {"x": x})["y"], by_runtime(graph, {"x": x}, optimize=False)["y"])
    # a constant of an integer type among them keeps everything in that type
    nodes[3] = helper.make_node("Concat", ["q", "k", "w"], ["c"], axis=1)
    graph = fake_quant_graph(nodes, {**constants, "w": np.ones((3, 2), np.int8)}, [None, 5])
    assert not carried_codes(graph)
    np.testing.assert_array_equal(by_twin(graph, {"x": x})["y"], by_runtime(graph, {"x": x}, optimize=False)["y"])


def test_gradient_mode_does_not_change_the_codes() -> None:
    graph = pair(np.float32(0.013), np.array(31, np.uint8), [None])
    twin = Twin(graph, device="cpu")
    x = torch.from_numpy(noise(4096) * 2)
    with torch.no_grad():
        plain = twin(x)
    assert torch.equal(plain, twin(x.requires_grad_()).detach())
