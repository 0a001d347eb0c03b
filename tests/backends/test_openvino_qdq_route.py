"""Our own placement of Q/DQ for OpenVINO, against OpenVINO itself: integer kernels, and equality with the settled graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.backends import get_target
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.qdq_route import OPS, design_qdq, plan_qdq
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.model import load_model
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant import collect, read_qdq
from zsq_deploy.quant.settle import settle

ov = pytest.importorskip("openvino")

TARGET = get_target("openvino-cpu")


class Net:
    """Nodes and random constants, one call a node."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def op(self, kind: str, *inputs: str, **attrs: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        outputs = attrs.pop("outputs", 1)
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"n_{name}", **attrs))
        return names[0]

    def weight(self, *shape: int, axis: int = 0) -> str:
        spread = np.exp(self.rng.normal(0, 0.7, [n if i == axis else 1 for i, n in enumerate(shape)]))
        fan = np.prod([n for i, n in enumerate(shape) if i != axis])
        return self.constant((self.rng.normal(0, 1.4 / fan**0.5, shape) * spread).astype(np.float32))

    def conv(self, x: str, cin: int, cout: int, k: int = 3, group: int = 1, bias: bool = True) -> str:
        names = [self.weight(cout, cin // group, k, k)]
        if bias:
            names.append(self.constant(self.rng.normal(0, 0.4, cout).astype(np.float32)))
        return self.op("Conv", x, *names, pads=[k // 2] * 4, group=group)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def gemm(self, x: str, cin: int, cout: int) -> str:
        return self.op(
            "Gemm",
            x,
            self.weight(cout, cin),
            self.constant(self.rng.normal(0, 0.4, cout).astype(np.float32)),
            transB=1,
        )

    def model(self, output: str, shape: tuple[int, ...] = (3, 12, 12)) -> Model:
        proto = helper.make_model(
            helper.make_graph(
                self.nodes,
                "net",
                [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *shape])],
                [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
                self.constants,
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
        proto = onnx.shape_inference.infer_shapes(proto)
        onnx.checker.check_model(proto)
        return Model(Graph(proto), name="net")


def residual(n: Net) -> str:
    x = n.relu(n.conv("image", 3, 16))
    y = n.relu(n.op("Add", n.conv(n.relu(n.conv(x, 16, 16)), 16, 16), x))
    z = n.relu(n.op("Add", n.conv(y, 16, 32, k=1), n.conv(n.relu(n.conv(y, 16, 32)), 32, 32)))
    return n.gemm(n.op("Flatten", n.op("GlobalAveragePool", z)), 32, 10)


def plain_residual(n: Net) -> str:
    """No rectifier behind the sum: codes with a zero point, several readers."""
    x = n.conv("image", 3, 16)
    for _ in range(3):
        x = n.op("Add", n.conv(n.relu(n.conv(x, 16, 24, k=1)), 24, 16, k=1, bias=False), x)
    return n.gemm(n.op("Flatten", n.op("MaxPool", x, kernel_shape=[12, 12])), 16, 10)


def depthwise(n: Net) -> str:
    zero, six = n.constant(np.float32(0)), n.constant(np.float32(6))
    x = n.op("Clip", n.conv("image", 3, 16), zero, six)
    x = n.op("Clip", n.conv(x, 16, 16, group=16), zero, six)
    x = n.op("Clip", n.conv(x, 16, 32, k=1), zero, six)
    x = n.op("Clip", n.conv(n.conv(x, 32, 32, k=5, group=32), 32, 16, k=1), zero, six)
    return n.gemm(n.op("Flatten", n.op("ReduceMean", x, axes=[2, 3], keepdims=1)), 16, 10)


def concat(n: Net) -> str:
    x = n.relu(n.conv("image", 3, 8))
    for i in range(2):
        y = n.relu(n.conv(x, 8 * (i + 1), 8))
        x = n.op("Concat", x, y, axis=1)
    x = n.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    return n.conv(n.relu(n.conv(x, 24, 16, k=1)), 16, 4)


def pooling(n: Net) -> str:
    x = n.relu(n.conv("image", 3, 16))
    x = n.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = n.relu(n.conv(x, 16, 16))
    x = n.op("AveragePool", x, kernel_shape=[3, 3], strides=[1, 1])
    x = n.op("Flatten", n.op("GlobalAveragePool", n.relu(n.conv(x, 16, 16))))
    return n.gemm(x, 16, 10)


def shuffle(n: Net) -> str:
    """Halves that are moved about: Split, Reshape, Transpose, Resize."""
    x = n.relu(n.conv("image", 3, 16))
    n.op("Split", x, axis=1, outputs=2)
    left, right = n.nodes[-1].output
    y = n.op("Concat", left, n.relu(n.conv(right, 8, 8, group=8)), axis=1)
    y = n.op("Reshape", y, n.constant(np.array([0, 2, 8, 12, 12])))
    y = n.op("Reshape", n.op("Transpose", y, perm=[0, 2, 1, 3, 4]), n.constant(np.array([0, 16, 12, 12])))
    y = n.relu(n.conv(y, 16, 8))
    y = n.op("Resize", y, "", n.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest",
             coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    return n.conv(y, 8, 4)


def decoder(n: Net) -> str:
    x = n.relu(n.conv("image", 3, 16))
    x = n.op("ConvTranspose", x, n.weight(16, 8, 2, 2, axis=1), n.constant(np.zeros(8, np.float32)), strides=[2, 2])
    return n.conv(n.relu(x), 8, 2)


CASES: dict[str, tuple[Callable[[Net], str], int]] = {
    "residual": (residual, 7),
    "residual without rectifier": (plain_residual, 8),
    "depthwise": (depthwise, 6),
    "concat": (concat, 5),
    "pooling": (pooling, 4),
    "shuffle": (shuffle, 4),
    "decoder": (decoder, 3),
}


def compiled(graph: Graph) -> Any:
    core = ov.Core()
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(graph.proto.SerializeToString()), "CPU", options)


def kernels(engine: Any) -> Counter[tuple[str, bool]]:
    """Type of kernel and whether it computes in integers -> how many."""
    found: Counter[tuple[str, bool]] = Counter()
    for op in engine.get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind, precision = (info[key].astype(str) for key in ("layerType", "runtimePrecision"))
        found[kind, precision in ("u8", "i8")] += 1
    return found


def integer_macs(engine: Any) -> int:
    macs = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
    return sum(count for (kind, integer), count in kernels(engine).items() if integer and kind in macs)


def outputs(engine: Any, batch: np.ndarray) -> np.ndarray:
    return np.concatenate([np.array(engine(batch[i : i + 1])[0]) for i in range(len(batch))])


def twin_outputs(graph: Graph, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(Twin(graph, dtype=torch.float64, device="cpu")(torch.from_numpy(batch).double()))


def designed(model: Model, batch: np.ndarray, **options: Any) -> Any:
    ranges = collect(model.folded().graph, [{"image": batch}], device="cpu").ranges("minmax")
    return design_qdq(model, ranges, TARGET, BuildOptions(**options))


def settled(model: Model, qdq: Graph) -> Graph:
    floats = model.folded().graph
    weights = {name: floats.constant(name) for name in floats.initializer_names}
    return settle(qdq, activation=TARGET.activation, weight=TARGET.weight, float_weights=weights).graph


def pictures(count: int, seed: int = 0, shape: tuple[int, ...] = (3, 12, 12)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, *shape)).astype(np.float32)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CASES)
def test_the_engine_computes_what_the_settled_graph_says(name: str, seed: int) -> None:
    build, macs = CASES[name]
    net = Net(seed)
    model = net.model(build(net))
    batch = pictures(40, seed)
    graph = settled(model, designed(model, batch[:20]).qdq)
    engine = compiled(graph)
    assert integer_macs(engine) == macs
    wanted = twin_outputs(graph, batch)
    step = (wanted.max() - wanted.min()) / 255
    # The last layer gives float32: rounded once more than float64, but no code is a different one.
    np.testing.assert_allclose(outputs(engine, batch), wanted, rtol=0, atol=1e-3 * step)


def attention(n: Net) -> str:
    def dense(x: str, cin: int, cout: int) -> str:
        return n.op("Add", n.op("MatMul", x, n.weight(cin, cout, axis=1)), n.constant(np.full(cout, 0.1, np.float32)))

    x = "image"
    q, k, v = (dense(x, 16, 16) for _ in range(3))
    scores = n.op("Softmax", n.op("MatMul", q, n.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    x = n.op("Add", dense(n.op("MatMul", scores, v), 16, 16), x)
    ones, zeros = n.constant(np.ones(16, np.float32)), n.constant(np.zeros(16, np.float32))
    y = n.op("LayerNormalization", x, ones, zeros, axis=-1)
    return n.op("Add", dense(n.relu(dense(y, 16, 32)), 32, 16), y)


def test_products_of_computed_matrices_stay_in_float_unless_named() -> None:
    net = Net(0)
    model = net.model(attention(net), (9, 16))
    graph = model.folded().graph
    products = {n.name for n in graph if n.op_type == "MatMul" and graph.constant(n.input[1]) is None}
    assert len(products) == 2
    batch = pictures(40, shape=(9, 16))
    ranges = dict(collect(graph, [{"image": batch}], device="cpu").ranges("minmax"))
    plan = plan_qdq(graph, ranges, TARGET.activation)
    assert products <= set(plan.skipped)
    assert not products & set(plan_qdq(graph, ranges, TARGET.activation, op_types=tuple(OPS)).skipped)


def test_products_of_computed_matrices_have_no_zero_points() -> None:
    net = Net(0)
    model = net.model(attention(net), (9, 16))
    batch = pictures(40, shape=(9, 16))
    design = designed(model, batch, op_types=tuple(OPS))
    by_output = {t.output: t for t in read_qdq(design.qdq) if not t.is_weight}
    products = [node for node in design.qdq if node.op_type == "MatMul" and design.qdq.constant(node.input[1]) is None]
    dynamic = [
        node
        for node in products
        if design.qdq.producer(node.input[1]).op_type != "DequantizeLinear" or node.input[1] in by_output
    ]
    checked = 0
    for node in dynamic:
        for index, value in enumerate(node.input):
            tensor = by_output.get(value)
            while tensor is None:
                value = design.qdq.producer(value).input[0]
                tensor = by_output.get(value)
            assert int(tensor.zero_point) == 0
            assert tensor.dtype == "int8" or index == 0
            checked += 1
    assert checked == 4
    graph = settled(model, design.qdq)
    wanted = twin_outputs(graph, batch)
    step = (wanted.max() - wanted.min()) / 255
    off = np.abs(outputs(compiled(graph), batch) - wanted) / step
    assert (off <= 2).mean() >= 0.995


def test_sums_and_pooling_at_the_end_stay_in_float() -> None:
    net = Net(0)
    x = net.relu(net.conv("image", 3, 8))
    model = net.model(net.op("GlobalAveragePool", net.op("Add", net.conv(x, 8, 8), x)))
    batch = pictures(8)
    design = designed(model, batch)
    assert {tensor.name for tensor in read_qdq(design.qdq) if not tensor.is_weight} == {"image", x}
    assert len(design.record["float_nodes"]) == 2
    assert design.record["nodes_quantized"] == 2
    more = designed(model, batch, quantize_outputs=True)
    assert len(read_qdq(more.qdq)) >= len(read_qdq(design.qdq))


def test_options_are_followed() -> None:
    net = Net(0)
    model = net.model(residual(net))
    batch = pictures(8)
    convs = [node.name for node in model.folded().graph if node.op_type == "Conv"]
    design = designed(model, batch, exclude=(convs[1],))
    node = design.qdq.node(convs[1])
    assert design.qdq.constant(node.input[1]) is not None  # its weights are plain floats
    assert design.record["float_nodes"][convs[1]] == "excluded by the options"
    only = designed(model, batch, op_types=("Conv",))
    assert only.record["op_types"] == ["Conv"]
    gemm = next(node for node in only.qdq if node.op_type == "Gemm")
    assert only.qdq.constant(gemm.input[1]) is not None
    bias = np.full(16, 7.0, np.float32)
    corrected = designed(model, batch, biases={convs[0]: bias})
    np.testing.assert_array_equal(corrected.qdq.constant(corrected.qdq.node(convs[0]).input[2]), bias)
    name = model.folded().graph.node(convs[0]).input[1]
    weight = np.ones(model.folded().graph.constant(name).shape, np.float32)
    replaced = designed(model, batch, weights={name: weight})
    scale = next(t for t in read_qdq(replaced.qdq) if t.name == name).scale
    np.testing.assert_allclose(scale, 1 / 127, rtol=1e-6)


def test_shared_weights_get_scales_of_their_own() -> None:
    net = Net(0)
    shared = net.weight(8, 8, 3, 3)
    x = net.relu(net.conv("image", 3, 8))
    x = net.relu(net.op("Conv", x, shared, pads=[1] * 4))
    model = net.model(net.op("Conv", x, shared, pads=[1] * 4))
    batch = pictures(20)
    done = settle(designed(model, batch).qdq, activation=TARGET.activation, weight=TARGET.weight)
    assert not done.notes
    wanted = twin_outputs(done.graph, batch)
    step = (wanted.max() - wanted.min()) / 255
    np.testing.assert_allclose(outputs(compiled(done.graph), batch), wanted, rtol=0, atol=1e-3 * step)


def test_errors_name_what_is_wrong() -> None:
    net = Net(0)
    model = net.model(residual(net))
    with pytest.raises(UsageError, match="nowhere"):
        designed(model, pictures(4), exclude=("nowhere",))
    with pytest.raises(UsageError, match="nothing_like_it"):
        designed(model, pictures(4), weights={"nothing_like_it": np.zeros(3, np.float32)})
    with pytest.raises(EngineError, match="can be quantized"):
        designed(model, pictures(4), op_types=("Add",))
    with pytest.raises(EngineError, match="can be quantized"):
        plan_qdq(model.folded().graph, {}, TARGET.activation)


@pytest.mark.assets
def test_resnet20_equals_its_graph_in_every_logit(assets: Any) -> None:
    model = load_model(assets / "models" / "resnet20_cifar10.onnx")
    data = np.load(assets / "data" / "cifar10_test.npz")["x"][:48]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    batch = np.ascontiguousarray(((data / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2))
    free = designed(model, batch).qdq
    graph = settled(model, free)
    engine = compiled(graph)
    assert integer_macs(engine) == 20
    wanted = twin_outputs(graph, batch)
    got = outputs(engine, batch)
    step = (wanted.max() - wanted.min()) / 255
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3 * step)
    # With free scales the engine and its graph are different functions.
    assert np.abs(outputs(compiled(free), batch) - twin_outputs(free, batch)).max() > 1e-2 * step
    real = twin_outputs(model.folded().graph, batch)
    assert (got.argmax(1) == real.argmax(1)).mean() > 0.95
