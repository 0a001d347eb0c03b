"""Codes are found again after fusion: in a hand-made fused graph, and in what ONNX Runtime really makes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from zsq_deploy.backends import get_target
from zsq_deploy.backends.onnxruntime.integer import IntegerReference
from zsq_deploy.model import Graph, Twin
from zsq_deploy.verify.fused import fused_codes, walk_fused

QDQ = """
<ir_version: 8, opset_import: ["": 17]>
net (float[N, 8, 8, 8] x) => (float[N, 8, 8, 8] y)
<float x_s = {0.05}, uint8 x_z = {128}, float a_s = {0.04}, uint8 a_z = {0}, float b_s = {0.06}, uint8 b_z = {120},
 float w_s = {0.01}, int8 w_z = {0}>
{
   x_q = QuantizeLinear (x, x_s, x_z)
   x_d = DequantizeLinear (x_q, x_s, x_z)
   w1_d = DequantizeLinear (w1, w_s, w_z)
   a_c = Conv <pads = [1, 1, 1, 1]> (x_d, w1_d)
   a = Relu (a_c)
   a_q = QuantizeLinear (a, a_s, a_z)
   a_d = DequantizeLinear (a_q, a_s, a_z)
   w2_d = DequantizeLinear (w2, w_s, w_z)
   b = Conv <pads = [1, 1, 1, 1]> (a_d, w2_d)
   b_q = QuantizeLinear (b, b_s, b_z)
   y = DequantizeLinear (b_q, b_s, b_z)
}
"""


@pytest.fixture(scope="module")
def qdq():
    proto = onnx.parser.parse_model(QDQ)
    rng = np.random.default_rng(0)
    for name in ("w1", "w2"):
        weight = rng.integers(-60, 60, (8, 8, 3, 3)).astype(np.int8)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return Graph(proto)


FUSED = """
<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
fused (float[N, 8, 8, 8] x) => (float[N, 8, 8, 8] y)
<float x_s = {0.05}, uint8 x_z = {128}, float a_s = {0.04}, uint8 a_z = {0}, float b_s = {0.06}, uint8 b_z = {120},
 float w_s = {0.01}, int8 w_z = {0}, int8[1] w1 = {1}, int8[1] w2 = {1}>
{
   x_q = QuantizeLinear (x, x_s, x_z)
   renamed = QLinearConv (x_q, x_s, x_z, w1, w_s, w_z, a_s, a_z)
   also = QLinearConv (renamed, a_s, a_z, w2, w_s, w_z, b_s, b_z)
   y = DequantizeLinear (also, b_s, b_z)
}
"""


def test_the_scale_of_the_result_names_the_codes(qdq):
    found = fused_codes(Graph(onnx.parser.parse_model(FUSED)), qdq)
    assert found == {"x_q": "x_q", "a_q": "renamed", "b_q": "also"}
    assert list(found) == ["x_q", "a_q", "b_q"]


def test_a_kernel_with_a_float_result_holds_no_codes(qdq):
    text = FUSED.replace(
        "also = QLinearConv (renamed, a_s, a_z, w2, w_s, w_z, b_s, b_z)\n   y = DequantizeLinear (also, b_s, b_z)",
        "y = com.microsoft.MatMulIntegerToFloat (renamed, w2, a_s, w_s, a_z, w_z)",
    )
    assert fused_codes(Graph(onnx.parser.parse_model(text)), qdq) == {"x_q": "x_q", "a_q": "renamed"}


def test_tensors_that_share_a_scale_are_left_out(qdq):
    text = QDQ.replace("b_s, b_z)", "a_s, a_z)")
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(t for t in qdq.proto.graph.initializer if t.name in ("w1", "w2"))
    shared = FUSED.replace("b_s, b_z)", "a_s, a_z)")
    assert fused_codes(Graph(onnx.parser.parse_model(shared)), Graph(proto)) == {"x_q": "x_q"}


def twin_codes(graph):
    twin = Twin(graph, dtype=torch.float64, device="cpu")

    def fetch(feeds, names):
        with torch.no_grad():
            given = {name: torch.from_numpy(value).double() for name, value in feeds.items()}
            return {name: value.numpy() for name, value in twin.run(given, fetch=list(names)).items()}

    return fetch


class Fake:
    """A fused graph whose convolution has the channels last, and whose first layer flips one code."""

    def __init__(self, reference):
        self.graph = Graph(onnx.parser.parse_model(FUSED))
        self.reference = reference

    def run(self, feeds, fetch=None):
        names = {"x_q": "x_q", "renamed": "a_q", "also": "b_q"}
        values = {name: self.reference(feeds, [names[name]])[names[name]].copy() for name in fetch}
        if "renamed" in values:
            values["renamed"][1, 2, 3, 4] += 1
            values["renamed"] = np.moveaxis(values["renamed"], 1, -1)
        return values


def test_a_flip_is_found_also_where_channels_are_last(qdq):
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 8)).astype(np.float32)
    found = walk_fused([{"x": x}], Fake(twin_codes(qdq)), qdq, twin_codes(qdq))
    assert [tensor.name for tensor in found.tensors] == ["x", "a", "b"]
    assert found.first == "a"
    assert found.tensors[1].differing_share == 1 / x.size
    assert found.flip.sample == 1


def test_nothing_in_common_gives_no_walk(qdq):
    class Other(Fake):
        def __init__(self):
            self.graph = Graph(
                onnx.parser.parse_model(
                    "<ir_version: 8, opset_import: ['': 17]> g (float[1] x) => (float[1] y) { y = Relu (x) }".replace(
                        "'", '"'
                    )
                )
            )

    assert walk_fused([], Other(), qdq, twin_codes(qdq)) is None


def test_the_runtime_s_own_fused_graph(qdq, tmp_path):
    path = tmp_path / "engine.onnx"
    onnx.save(qdq.proto, path)
    integer = IntegerReference(path, get_target("ort-x86-vnni"))
    assert "QLinearConv" in {node.op_type for node in integer.graph}
    assert set(fused_codes(integer.graph, qdq)) == {"x_q", "a_q", "b_q"}
    x = np.random.default_rng(2).normal(size=(4, 8, 8, 8)).astype(np.float32)
    found = walk_fused([{"x": x}], integer, qdq, twin_codes(qdq))
    # Rounding an exact sum and rounding the same sum in float64 differ on ties only.
    assert all(tensor.differing_share < 0.01 and (tensor.max_lsb or 0) <= 2 for tensor in found.tensors)
    assert found.tensors[0].differing_share == 0
