"""The quantization core on real networks, with noise as images: everything loads, runs in integers and stays near float."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from zsq_deploy.model import load_model
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant import (
    Granularity,
    Scheme,
    analytic_ranges,
    apply_biases,
    collect,
    correct_bias,
    insert_qdq,
    read_qdq,
)

pytestmark = pytest.mark.assets

U8 = Scheme(8, signed=False, symmetric=False)
W8 = Scheme(8, granularity=Granularity.CHANNEL)

# network, input shape, number of convolutions and matrix products with weights, SQNR in dB on the images that gave the ranges
NETWORKS = [
    ("resnet20_cifar10", (3, 32, 32), 20, 20.0),
    ("mlperf_tiny_resnet8_cifar10", (3, 32, 32), 10, 15.0),
    ("mlperf_tiny_mobilenet_v1_025_vww", (3, 96, 96), 28, 8.0),
    ("squeezenet11_imagenet", (3, 224, 224), 26, 15.0),
    ("vit_cifar10", (3, 32, 32), 26, 10.0),
    ("dncnn25", (1, 48, 48), 17, 20.0),
    ("ultraface_rfb320", (3, 240, 320), 52, 10.0),
]


def run(graph, feeds, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL, path=None):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if path is not None:
        options.optimized_model_filepath = str(path)
    session = ort.InferenceSession(graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def sqnr(wanted, found):
    return 10 * np.log10(np.square(wanted).mean() / max(np.square(wanted - found).mean(), 1e-30))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "products", "least"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_real_networks(assets, tmp_path, name, shape, products, least):
    model = load_model(assets / "models" / f"{name}.onnx", input_shape=(1, *shape))
    graph = model.folded().graph
    scale = 255.0 if "resnet8" in name else 1.0
    x = (np.random.default_rng(0).uniform(0, 1, (4, *shape)) * scale).astype(np.float32)
    feeds = {graph.inputs[0].name: x[:1] if not model.dynamic_batch else x}
    ranges = collect(graph, [feeds], device="cpu").ranges()
    q = insert_qdq(graph, ranges, activation=U8, weight=W8)
    onnx.checker.check_model(q.proto)
    tensors = read_qdq(q)
    matrices = {node.input[1] for node in graph.nodes if node.op_type in ("Conv", "Gemm", "MatMul")}
    weights = [t for t in tensors if t.is_weight and t.name in matrices]
    assert len(weights) == products
    wanted = run(graph, feeds)[0]
    found = run(q, feeds, path=tmp_path / "optimized.onnx")[0]
    assert sqnr(wanted, found) > least
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "Conv" not in kinds
    assert "FusedConv" not in kinds
    with torch.no_grad():
        twin = Twin(q, device="cpu")(torch.from_numpy(feeds[graph.inputs[0].name]))
    twin = (twin[0] if isinstance(twin, tuple) else twin).numpy()
    plain = run(q, feeds, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)[0]
    assert sqnr(plain, twin) > 30
    # a sweep over the images that gave the ranges must not make the mean error larger
    biases = correct_bias(graph, q, [feeds], device="cpu")
    assert len(biases) >= products - 12
    better = insert_qdq(apply_biases(graph, biases), ranges, activation=U8, weight=W8)
    assert sqnr(wanted, run(better, feeds)[0]) > sqnr(wanted, found) - 1.0


@pytest.mark.parametrize("name", [row[0] for row in NETWORKS if row[0] not in ("vit_cifar10",)])
def test_analytic_ranges_of_real_networks(assets, name):
    shape = next(row[1] for row in NETWORKS if row[0] == name)
    model = load_model(assets / "models" / f"{name}.onnx", input_shape=(1, *shape))
    ranges = analytic_ranges(model)
    graph = model.folded().graph
    products = [node for node in graph.nodes if node.op_type in ("Conv", "Gemm")]
    assert all(node.input[0] in ranges and node.output[0] in ranges for node in products)
    assert len(insert_qdq(graph, ranges, activation=U8, weight=W8).nodes) > len(graph.nodes) + 3 * len(products)
