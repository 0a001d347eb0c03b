"""Quantizers in one pass: the same bits as node by node, the same gradients, and only where the pair is one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.calib.parts import rounding
from zsq_deploy.calib.parts.rounding import Rounding, fused, rounded_twin
from zsq_deploy.model import Graph, Twin


def _constant(name: str, values: object, kind: type) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def quantized(*, codes_out: bool = False, per_channel: bool = False, relu: str = "") -> Graph:
    """x (-> Relu) -> Q -> two DQ -> conv with dequantized weights, + the second DQ; 4-bit activations as unsigned codes."""
    random = np.random.default_rng(0)
    constants = [
        _constant("s", [0.1, 0.2, 0.3] if per_channel else 0.13, np.float32),
        _constant("z", [3, 4, 5] if per_channel else 3, np.uint8),
        _constant("w", random.integers(-8, 8, (3, 3, 3, 3)), np.int8),
        _constant("ws", random.uniform(0.05, 0.2, 3), np.float32),
        _constant("wz", [0, 0, 0], np.int8),
    ]
    axis = {"axis": 1} if per_channel else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["r" if relu else "x", "s", "z"], ["q"], "quantize", **axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"], "first", **axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["b"], "second", **axis),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"], "weights", axis=0),
        helper.make_node("Conv", ["a", "weight"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Add", ["c", "b"], ["y"], "add"),
    ]
    if relu:
        nodes.insert(0, helper.make_node("Relu", ["x"], ["r"], "relu"))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 6, 5])]
    if relu == "read":
        outputs.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", 3, 6, 5]))
    if codes_out:
        outputs.append(helper.make_tensor_value_info("q", TensorProto.UINT8, ["N", 3, 6, 5]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 5])]
    proto = helper.make_graph(nodes, "quantized", inputs, outputs, constants)
    return Graph(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def _images(layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    """Some within the codes' range, some far outside, some exactly between two codes."""
    x = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(1)) * 20
    x[0, 0] = torch.arange(30).view(6, 5) * 0.13 + 0.065
    return x.contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("relu", ["", "alone", "read"])
def test_a_quantized_graph_computes_the_same(
    loops: bool, layout: torch.memory_format, relu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loops:
        monkeypatch.setattr(rounding, "_loops", lambda: None)
    graph, x, again = quantized(relu=relu), _images(layout), _images(layout)
    expected = Twin(graph, device="cpu").run({"x": x}, fetch=("y", "b"))
    twin, taps = rounded_twin(graph, torch.float32, torch.device("cpu"))
    front = ["Relu"] if relu == "read" else []
    assert [node.op_type for node in twin.graph] == [*front, "Identity", "Identity", "Conv", "Add"]
    found = twin.run({"x": again}, fetch=("y", "b"), taps=taps)
    assert torch.equal(found["b"], expected["b"])
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-6, atol=1e-6)
    slope = torch.randn(found["y"].shape, generator=torch.Generator().manual_seed(2))
    expected["y"].backward(slope)
    found["y"].backward(slope)
    assert x.grad is not None
    assert again.grad is not None
    cut = (np.rint(x.detach().numpy() / np.float32(0.13)) + 3 < 0) | (x.detach().numpy() / 0.13 > 252.5)
    if relu:
        cut |= x.detach().numpy() <= 0
    assert 0 < cut.sum() < cut.size
    assert not again.grad.numpy()[cut].any()
    torch.testing.assert_close(again.grad, x.grad, rtol=1e-5, atol=1e-5)


def test_threads_change_nothing() -> None:
    rule, x = Rounding(0.13, 3, 0, 15), torch.randn(7, 3, 9, 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rule(x)
        torch.set_num_threads(3)
        three = rule(x)
    finally:
        torch.set_num_threads(before)
    codes = np.clip(np.rint(x.numpy() / np.float32(0.13)) + 3, 0, 15)
    assert np.array_equal(one.numpy(), ((codes - 3) * np.float32(0.13)).astype(np.float32))
    assert torch.equal(one, three)


def test_double_precision_is_kept() -> None:
    graph, x = quantized(), _images().detach().double()
    twin, taps = rounded_twin(graph, torch.float64, torch.device("cpu"))
    expected = Twin(graph, dtype=torch.float64, device="cpu").run({"x": x})["y"]
    torch.testing.assert_close(twin.run({"x": x}, taps=taps)["y"], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("form", [{"codes_out": True}, {"per_channel": True}])
def test_what_is_no_simple_pair_is_left(form: dict[str, bool]) -> None:
    graph = quantized(**form)
    lean, roundings, fixed = fused(graph)
    assert not roundings
    assert fixed == ("weight",)
    assert [node.op_type for node in lean].count("QuantizeLinear") == 1
    x = _images().detach()
    twin, taps = rounded_twin(graph, torch.float32, torch.device("cpu"))
    expected = Twin(graph, device="cpu").run({"x": x})["y"]
    torch.testing.assert_close(twin.run({"x": x}, fetch=("y",), taps=taps)["y"], expected, rtol=1e-6, atol=1e-6)
