"""Multiply-accumulates against closed forms and against counting in a direct loop."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.model import Graph, load_model, node_macs


def one_node(node, shape, constants, out_rank) -> Graph:
    return Graph(
        helper.make_model(
            helper.make_graph(
                [node],
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * out_rank)],
                [numpy_helper.from_array(np.ones(size, np.float32), name) for name, size in constants.items()],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
        )
    )


@pytest.mark.parametrize(
    ("op", "shape", "weight", "attributes", "wanted"),
    [
        ("Conv", [1, 3, 32, 32], (16, 3, 3, 3), {"pads": [1, 1, 1, 1]}, 32 * 32 * 16 * 27),
        ("Conv", [1, 3, 32, 32], (16, 3, 3, 3), {"strides": [2, 2]}, 15 * 15 * 16 * 27),
        ("Conv", [1, 8, 10, 10], (8, 1, 3, 3), {"group": 8}, 8 * 8 * 8 * 9),
        ("Conv", [1, 4, 10], (6, 4, 3), {}, 8 * 6 * 12),
        ("ConvTranspose", [1, 4, 5, 5], (4, 6, 2, 2), {"strides": [2, 2]}, 4 * 25 * 6 * 4),
        ("Gemm", [1, 12], (12, 7), {}, 84),
        ("Gemm", [1, 12], (7, 12), {"transB": 1}, 84),
        ("MatMul", [1, 5, 12], (12, 7), {}, 5 * 84),
    ],
)
def test_closed_forms(op, shape, weight, attributes, wanted):
    node = helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes)
    graph = one_node(node, ["N", *shape[1:]], {"w": weight}, len(shape))
    assert node_macs(graph) == {"layer": wanted}
    assert node_macs(graph, batch=5) == {"layer": 5 * wanted}


def test_sizes_beside_the_batch_can_be_given():
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="layer")
    graph = one_node(node, ["N", 1, "H", "W"], {"w": (2, 1, 3, 3)}, 4)
    assert node_macs(graph, input_shapes={"x": (1, 1, 10, 12)}) == {"layer": 8 * 10 * 2 * 9}


def test_other_nodes_do_not_count():
    graph = one_node(helper.make_node("Relu", ["x"], ["y"], name="relu"), [1, 3], {}, 2)
    assert node_macs(graph) == {}


@pytest.mark.assets
def test_known_networks(assets):
    resnet = load_model(assets / "models" / "resnet20_cifar10.onnx")
    counts = node_macs(resnet.graph)
    assert len(counts) == 20
    first = 32 * 32 * 16 * 27
    stages = (
        6 * 32 * 32 * 16 * 144
        + (16 * 16 * 32 * 144 + 5 * 16 * 16 * 32 * 288)
        + (8 * 8 * 64 * 288 + 5 * 8 * 8 * 64 * 576)
    )
    assert sum(counts.values()) == first + stages + 640
    assert counts == node_macs(resnet.folded().graph)


@pytest.mark.assets
def test_quantized_graphs_count_as_the_float_graph(assets, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    model = load_model(assets / "models" / "mlperf_tiny_resnet8_cifar10.onnx")
    float_path, path = tmp_path / "float.onnx", tmp_path / "qdq.onnx"
    onnx.save(model.folded().graph.proto, float_path)

    class Reader(CalibrationDataReader):
        left = 1

        def get_next(self):
            self.left -= 1
            return (
                {"image": np.random.default_rng(0).random((1, 3, 32, 32), np.float32) * 255} if self.left >= 0 else None
            )

    quantize_static(float_path, path, Reader(), quant_format=QuantFormat.QDQ)
    counts = node_macs(Graph.load(path))
    assert counts == node_macs(model.graph)
    assert all(counts.values())
