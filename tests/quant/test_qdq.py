"""The Q/DQ writer: structure by rules, values by an independent computation, behaviour in ONNX Runtime and in the twin."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.fold import fold
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant import (
    Granularity,
    PlacementRules,
    Scheme,
    collect,
    dequantized_weight,
    insert_qdq,
    qparams,
    read_qdq,
    weight_qparams,
)

from .nets import Builder, images, small_net

U8 = Scheme(8, signed=False, symmetric=False)
S8 = Scheme(8, signed=True, symmetric=False)
W8 = Scheme(8, granularity=Granularity.CHANNEL)
ALL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
OFF = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def session(graph, level, path=None):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(graph, x, level=ALL):
    return session(graph, level).run(None, {"image": x})[0]


def sqnr(x, y):
    return 10 * np.log10(np.square(x).mean() / np.square(x - y).mean())


FOLDED = fold(small_net()).graph
X = images(24, seed=5)
RANGES = collect(FOLDED, [{"image": images(64, seed=1)}], device="cpu").ranges("minmax")


@pytest.mark.parametrize("activation", [U8, S8, Scheme(8, signed=True, symmetric=True), Scheme(16, False, False)])
@pytest.mark.parametrize("weight", [W8, Scheme(8), Scheme(4, granularity=Granularity.CHANNEL), Scheme(8, reduced=True)])
def test_the_runtime_loads_it_and_the_twin_computes_the_same(activation, weight):
    q = insert_qdq(FOLDED, RANGES, activation=activation, weight=weight)
    onnx.checker.check_model(q.proto, full_check=True)
    if activation.bits == 16 or weight.bits == 4:
        assert q.opset >= 21
    plain = run(q, X, OFF)
    with torch.no_grad():
        twin = Twin(q, device="cpu")(torch.from_numpy(X)).numpy()
        exact = Twin(q, dtype=torch.float64, device="cpu")(torch.from_numpy(X)).numpy()
    wanted = run(FOLDED, X)
    assert sqnr(wanted, plain) > (9 if weight.bits == 4 else 25)
    # float32 sums differ in the last bit, which flips a rounding now and then
    step = (wanted.max() - wanted.min()) / 255
    assert np.abs(twin - plain).max() <= 2 * step
    assert np.median(np.abs(twin - plain)) <= 1e-5 * np.abs(plain).max()
    assert np.abs(exact - plain).max() <= 2 * step


def test_all_products_run_in_integers(tmp_path):
    q = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8)
    session(q, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, tmp_path / "optimized.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "Conv" not in kinds
    assert "Gemm" not in kinds
    assert kinds.count("QLinearConv") == 6
    assert "Relu" not in kinds
    assert sqnr(run(FOLDED, X), run(q, X)) > 25


def test_scales_are_those_of_the_ranges():
    q = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8)
    tensors = {t.name: t for t in read_qdq(q)}
    for name, tensor in tensors.items():
        if tensor.is_weight or name not in RANGES:
            continue
        maker = FOLDED.producer(name)
        if maker is None or maker.op_type in ("Relu", "GlobalAveragePool"):
            readers = [n.op_type for n in FOLDED.consumers(name)]
            if "Concat" in readers or "MaxPool" in readers:
                continue
            low, high = RANGES[name]
            expected = qparams(max(low, 0.0) if maker is not None else low, high, U8)
            assert tensor.scale == expected.scale, name
            assert tensor.zero_point == expected.zero_point, name
            assert tensor.dtype == "uint8"


def test_read_back_is_what_was_written():
    q = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8)
    found = read_qdq(q)
    weights = {t.name: t for t in found if t.is_weight and not t.is_bias}
    for node in FOLDED.nodes:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        array = FOLDED.constant(node.input[1])
        tensor = weights[node.input[1]]
        expected = weight_qparams(array, W8, axis=0)
        np.testing.assert_array_equal(tensor.scale, expected.scale)
        assert tensor.axis == 0
        assert tensor.dtype == "int8"
        codes = q.constant(tensor.codes)
        np.testing.assert_array_equal(codes, expected.quantize(array.astype(np.float64)))
        np.testing.assert_array_equal(dequantized_weight(q, tensor.output), tensor.dequantized(codes))
    for node in q.nodes:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        maker = {t.output: t for t in found}
        x, w, b = (maker[name] for name in node.input)
        assert b.is_bias
        np.testing.assert_array_equal(b.scale, np.float32(x.scale) * w.scale)
        assert not b.zero_point.any()
        original = FOLDED.node(node.name)
        np.testing.assert_allclose(
            q.constant(b.codes) * b.scale.astype(np.float64),
            FOLDED.constant(original.input[2]),
            atol=float(b.scale.max()) / 2 * 1.001,
        )


def test_each_activation_is_rounded_once_and_shared():
    q = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8)
    quantizers = [node for node in q.nodes if node.op_type == "QuantizeLinear"]
    assert len({node.input[0] for node in quantizers}) == len(quantizers)
    by_name = {t.name: t for t in read_qdq(q)}
    concat = next(node for node in FOLDED.nodes if node.op_type == "Concat")
    shared = [by_name[name] for name in (*concat.input, concat.output[0])]
    assert len({(float(t.scale), int(t.zero_point)) for t in shared}) == 1
    pool = next(node for node in FOLDED.nodes if node.op_type == "MaxPool")
    a, b = by_name[pool.input[0]], by_name[pool.output[0]]
    assert (a.scale, a.zero_point) == (b.scale, b.zero_point)


def test_outputs_stay_in_float_unless_asked():
    name = FOLDED.outputs[0].name
    assert all(t.name != name for t in read_qdq(insert_qdq(FOLDED, RANGES, activation=U8, weight=W8)))
    q = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8, quantize_outputs=True)
    assert [spec.name for spec in q.outputs] == [name]
    tensor = next(t for t in read_qdq(q) if t.output == name)
    y = run(q, X, OFF)
    codes = y / tensor.scale
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)


def test_a_last_convolution_is_rounded_because_its_kernel_gives_integers():
    b = Builder()
    graph = b.graph([b.conv(b.node("Relu", b.conv("image", 3, 4, bias=True)), 4, 3, bias=True)])
    ranges = collect(graph, [{"image": images(8)}], device="cpu").ranges()
    q = insert_qdq(graph, ranges, activation=U8, weight=W8)
    assert any(t.output == graph.outputs[0].name for t in read_qdq(q))
    rules = PlacementRules(always_output=frozenset())
    q = insert_qdq(graph, ranges, activation=U8, weight=W8, rules=rules)
    assert all(t.name != graph.outputs[0].name for t in read_qdq(q))


def test_symmetric_activations_round_in_front_of_a_relu_that_the_type_does_not_enforce():
    symmetric = Scheme(8, signed=True, symmetric=True)
    q = insert_qdq(FOLDED, RANGES, activation=symmetric, weight=W8)
    assert any(node.op_type == "Relu" for node in q.nodes)
    for node in q.nodes:
        if node.op_type == "Relu":
            assert q.producer(node.input[0]).op_type == "DequantizeLinear"
    q = insert_qdq(FOLDED, RANGES, activation=symmetric, weight=W8, rules=PlacementRules(split_activations=False))
    relus = [node for node in q.nodes if node.op_type == "Relu"]
    assert relus
    assert all(q.producer(node.input[0]).op_type in ("Conv", "Add") for node in relus)


def test_a_clip_stays_where_the_range_goes_beyond_it():
    clip = next(node for node in FOLDED.nodes if node.op_type == "Clip")
    concat = next(node for node in FOLDED.nodes if node.op_type == "Concat")
    wide = RANGES.updated({concat.output[0]: (0.0, 20.0)})
    q = insert_qdq(FOLDED, wide, activation=U8, weight=W8)
    assert clip.name in q
    assert sqnr(run(FOLDED, X), run(q, X, OFF)) > 15


def test_one_sided_residual():
    both = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8)
    skip = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8, rules=PlacementRules(residual="skip"))

    def sides(graph):
        add = next(node for node in graph.nodes if node.op_type == "Add")
        return sorted(graph.producer(name).op_type for name in add.input)

    assert sides(both) == ["DequantizeLinear", "DequantizeLinear"]
    assert sides(skip) == ["Conv", "DequantizeLinear"]


def test_excluded_nodes_read_and_write_floats():
    node = next(n for n in FOLDED.nodes if n.op_type == "Conv" and n.input[0] != "image")
    q = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8, exclude=[node.name])
    assert q.constant(q.node(node.name).input[1]) is not None
    assert sqnr(run(FOLDED, X), run(q, X, OFF)) > 25


def test_float_biases():
    q = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8, bias="float")
    assert not any(t.is_bias for t in read_qdq(q))
    assert sqnr(run(FOLDED, X), run(q, X, OFF)) > 25


@pytest.mark.parametrize("op", ["ConvTranspose", "MatMul", "Gemm0", "Gemm1"])
def test_weight_axes(op):
    b = Builder()
    if op == "ConvTranspose":
        w = b.rng.normal(0, 1, (3, 5, 2, 2)).astype(np.float32)
        graph = b.graph([b.node("ConvTranspose", "image", b.constant(w), strides=[2, 2])])
        axis, size = 1, 5
    elif op == "MatMul":
        w = b.rng.normal(0, 1, (12, 7)).astype(np.float32)
        graph = b.graph([b.node("MatMul", "image", b.constant(w))])
        axis, size = 1, 7
    else:
        trans = int(op[-1])
        w = b.rng.normal(0, 1, (7, 432) if trans else (432, 7)).astype(np.float32)
        flat = b.node("Flatten", "image")
        graph = b.graph([b.node("Gemm", flat, b.constant(w), b.constant(np.zeros(7, np.float32)), transB=trans)])
        axis, size = 1 - trans, 7
    ranges = collect(graph, [{"image": images(8)}], device="cpu").ranges()
    q = insert_qdq(graph, ranges, activation=U8, weight=W8)
    tensor = next(t for t in read_qdq(q) if t.is_weight and not t.is_bias)
    assert (tensor.axis, tensor.scale.shape) == (axis, (size,))
    assert sqnr(run(graph, X), run(q, X, OFF)) > 30


@pytest.mark.parametrize("bits", [4, 8])
def test_block_wise_weights(bits):
    b = Builder()
    w = b.rng.normal(0, 1, (7, 432)).astype(np.float32) * np.repeat(10.0 ** b.rng.uniform(-2, 1, 27), 16).astype("f4")
    flat = b.node("Flatten", "image")
    graph = b.graph([b.node("Gemm", flat, b.constant(w), b.constant(np.zeros(7, np.float32)), transB=1)])
    ranges = collect(graph, [{"image": images(8)}], device="cpu").ranges()
    block = insert_qdq(graph, ranges, activation=U8, weight=Scheme(bits, granularity=Granularity.BLOCK, block=16))
    channel = insert_qdq(graph, ranges, activation=U8, weight=Scheme(bits, granularity=Granularity.CHANNEL))
    tensor = next(t for t in read_qdq(block) if t.is_weight and not t.is_bias)
    assert (tensor.block, tensor.axis, tensor.scale.shape) == (16, 1, (7, 27))
    wanted = run(graph, X)
    assert sqnr(wanted, run(block, X, OFF)) >= sqnr(wanted, run(channel, X, OFF)) - 0.5
    with torch.no_grad():
        np.testing.assert_allclose(
            Twin(block, device="cpu")(torch.from_numpy(X)).numpy(), run(block, X, OFF), rtol=1e-4, atol=1e-3
        )


def test_fewer_bits_than_the_type_has():
    six = Scheme(6, signed=False, symmetric=False)
    q = insert_qdq(FOLDED, RANGES, activation=six, weight=W8)
    tensor = next(t for t in read_qdq(q) if not t.is_weight)
    proto = q.editable()
    proto.graph.output.append(helper.make_tensor_value_info(tensor.codes, TensorProto.UINT8, None))
    codes = session(Graph(proto), OFF).run([tensor.codes], {"image": X * 5})[0]
    assert codes.max() == 63
    assert codes.min() == 0


def test_dead_channels_and_huge_biases_do_not_overflow():
    b = Builder()
    w = b.rng.normal(0, 1, (4, 3, 3, 3)).astype(np.float32)
    w[1] = 0.0
    w[2] *= 1e-9
    bias = np.array([0.1, 0.7, 3.0, -0.2], np.float32)
    graph = b.graph([b.node("Relu", b.node("Conv", "image", b.constant(w), b.constant(bias)))])
    ranges = collect(graph, [{"image": X}], device="cpu").ranges()
    q = insert_qdq(graph, ranges, activation=U8, weight=W8)
    tensor = next(t for t in read_qdq(q) if t.is_bias)
    np.testing.assert_allclose(q.constant(tensor.codes) * tensor.scale.astype(np.float64), bias, rtol=0.01)
    assert np.abs(run(graph, X) - run(q, X)).max() < 3 * ranges[graph.outputs[0].name][1] / 255


def test_given_weight_scales_are_used():
    node = next(n for n in FOLDED.nodes if n.op_type == "Conv")
    name = node.input[1]
    scales = np.full(FOLDED.constant(name).shape[0], 2.0**-6, np.float32)
    q = insert_qdq(FOLDED, RANGES, activation=U8, weight=W8, weight_scales={name: scales})
    np.testing.assert_array_equal(next(t for t in read_qdq(q) if t.name == name).scale, scales)


def test_without_ranges_nodes_stay_in_float():
    q = insert_qdq(FOLDED, {}, activation=U8, weight=W8)
    assert read_qdq(q) == []
    np.testing.assert_array_equal(run(q, X), run(FOLDED, X))


def test_integer_arithmetic_of_shapes_is_left_alone():
    b = Builder()
    shape = b.node("Concat", b.node("Shape", "image", start=0, end=1), b.constant(np.array([-1])), axis=0)
    flat = b.node("Reshape", "image", shape)
    w = b.rng.normal(0, 1, (432, 4)).astype(np.float32)
    graph = b.graph([b.node("MatMul", flat, b.constant(w))])
    ranges = collect(graph, [{"image": images(8)}], device="cpu").ranges()
    q = insert_qdq(graph, ranges, activation=U8, weight=W8)
    assert sqnr(run(graph, X), run(q, X)) > 30


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 200))
def test_random_networks_stay_close_to_float(seed):
    graph = fold(small_net(seed)).graph
    ranges = collect(graph, [{"image": images(48, seed)}], device="cpu").ranges()
    q = insert_qdq(graph, ranges, activation=U8, weight=W8)
    assert sqnr(run(graph, X), run(q, X)) > 20


@pytest.mark.parametrize(("opset21", "weight"), [(False, "QInt8"), (True, "QInt4"), (False, "QInt4")])
def test_graphs_of_the_runtimes_own_quantizer_are_read(tmp_path, opset21, weight):
    """Also 4-bit weights of the com.microsoft domain."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    from zsq_deploy.quant.qdq import raise_opset

    graph = raise_opset(FOLDED, 21) if opset21 else FOLDED

    class Images:
        def __init__(self):
            self.items = iter([{"image": images(8)}])

        def get_next(self):
            return next(self.items, None)

    path = tmp_path / "q.onnx"
    quantize_static(
        graph.editable(),
        path,
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=getattr(QuantType, weight),
    )
    q = Graph.load(path)
    found = read_qdq(q)
    assert sum(node.op_type == "DequantizeLinear" for node in q.nodes) == sum(len(t.dequantize) for t in found)
    weights = [t for t in found if t.is_weight and not t.is_bias]
    assert {t.name for t in weights} == {n.input[1] for n in FOLDED.nodes if n.op_type in ("Conv", "Gemm")}
    assert all(t.dtype == weight.lower()[1:] for t in weights)
    assert all(t.scale.size > 1 for t in weights)
    activations = {t.name: t for t in found if not t.is_weight}
    assert "image" in activations
    assert activations["image"].dtype == "uint8"
    assert activations["image"].output
    assert activations["image"].low == pytest.approx(images(8).min(), abs=float(activations["image"].scale))
    for t in weights:
        error = np.abs(dequantized_weight(q, t.output) - FOLDED.constant(t.name))
        assert error.max() <= 1.01 * t.scale.max()


def test_a_weight_with_its_own_quantizer_is_read():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {0.1, -0.2, 0.33, 0.04}, float s = {0.01}, int8 z = {0}> {
            q = QuantizeLinear (w, s, z)
            d = DequantizeLinear (q, s, z)
            y = MatMul (x, d) }"""
    )
    (tensor,) = read_qdq(Graph(model))
    assert (tensor.name, tensor.is_weight, tensor.output, tensor.dtype) == ("w", True, "d", "int8")
    np.testing.assert_allclose(dequantized_weight(Graph(model), "d"), [[0.1, -0.2], [0.33, 0.04]], atol=1e-6)


def test_missing_ranges_are_named():
    b = Builder()
    graph = b.graph([b.conv("image", 3, 3, bias=True)])
    with pytest.raises(CalibrationError, match="has no range"):
        insert_qdq(graph, {"image": (-1, 1)}, activation=U8, weight=W8)  # the output of the convolution is wanted too


def test_rounding_late_and_storing_weights_as_float_changes_no_number() -> None:
    """Where Q/DQ stands around nodes that move numbers, and how weights are stored, is a matter of the reader's taste."""
    builder = Builder(3)
    first = builder.node("Relu", builder.conv("image", 3, 6))
    moved = builder.node("MaxPool", first, kernel_shape=[2, 2], strides=[2, 2])
    graph = builder.graph([builder.conv(moved, 6, 4)])
    x = np.random.default_rng(0).normal(0, 1, (2, 3, 12, 12)).astype(np.float32)
    ranges = {"image": (-3.0, 3.0), **{node.output[0]: (-4.0, 4.0) for node in graph}}
    ranges[moved] = (0.0, 2.0)  # a narrower range behind the maximum
    s8 = Scheme(bits=8, signed=True, symmetric=True)
    w8 = Scheme(bits=8, signed=True, symmetric=True, granularity=Granularity.CHANNEL, restricted=True)
    base = PlacementRules(round_outputs="read", always_output=frozenset(), bias="float", drop_activations=False)
    written = {}
    for place, store in (("early", "integers"), ("late", "integers"), ("late", "float")):
        rules = dataclasses.replace(base, place_reads=place, store_weights=store, split_activations=False)
        written[place, store] = insert_qdq(
            graph, {**ranges, first: ranges[moved]}, activation=s8, weight=w8, rules=rules
        )
    assert written["early", "integers"].producer("maxpool_3").input[0].endswith("DequantizeLinear_Output")
    assert written["late", "integers"].producer("maxpool_3").input[0] == first
    weights = [tensor for tensor in read_qdq(written["late", "float"]) if tensor.is_weight]
    assert len(weights) == 2
    assert all(tensor.quantize is not None for tensor in weights)
    found = [
        Twin(one, device="cpu").run({"image": torch.from_numpy(x)})[graph.outputs[0].name] for one in written.values()
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
