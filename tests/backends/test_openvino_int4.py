"""4-bit storage with 8-bit arithmetic, and weight-only compression: what is stored, what is computed, and that both are said truly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from zsq_deploy.backends import get_target
from zsq_deploy.backends.openvino.convert import convert, read, save, weights_of
from zsq_deploy.backends.openvino.int4 import FOUR_BITS, float_weights, int4_storage, pack, store_int4
from zsq_deploy.backends.openvino.ir import ir_to_qdq
from zsq_deploy.backends.openvino.nncf_route import prepare
from zsq_deploy.backends.openvino.options import BuildOptions, NncfOptions
from zsq_deploy.backends.openvino.quantizer import build
from zsq_deploy.backends.openvino.runner import OvRunner
from zsq_deploy.backends.openvino.weight_only import compress, stored_types
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.model import Model
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import insert_qdq
from zsq_deploy.quant.ranges import Ranges
from zsq_deploy.quant.reader import dequantized_weight, read_qdq

from .openvino_engines import noise, twin_outputs
from .ort_engines import calibration_set, convnet, loaded, ranges_of, transformer

CPU = get_target("openvino-cpu")
LAYERS = ("Conv", "Gemm", "MatMul")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(convnet(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"x": noise((8, 3, 16, 16))}


@pytest.fixture(scope="module")
def ranges(network: Model, feeds: dict[str, np.ndarray]) -> Ranges:
    return ranges_of(network, feeds)


@pytest.fixture(scope="module")
def qdq(network: Model, ranges: Ranges) -> Graph:
    return insert_qdq(network.folded().graph, ranges, activation=CPU.activation, weight=CPU.weight)


def weights(graph: Graph) -> dict[str, np.ndarray]:
    """Weight of every layer as the graph computes with it, by the layer's name."""
    found = {node.name: dequantized_weight(graph, node.input[1]) for node in graph if node.op_type in LAYERS}
    return {name: value for name, value in found.items() if value is not None}


def floats_of(graph: Graph) -> dict[str, np.ndarray]:
    found = {node.name: graph.constant(node.input[1]) for node in graph if node.op_type in LAYERS}
    return {name: value for name, value in found.items() if value is not None}


def through_pairs(qdq: Graph, floats: dict[str, np.ndarray]) -> Graph:
    """The same graph with float constants behind Quantize/Dequantize pairs, as NNCF's weights come."""
    from zsq_deploy.model.editing import Net

    net = Net(qdq.proto)
    makers = {node.output[0]: node for node in net.nodes}
    for node in list(net.nodes):
        if node.op_type in LAYERS and node.name in floats and node.input[1] in makers:
            dequantize = makers[node.input[1]]
            stem = dequantize.input[0].removesuffix("_quantized")
            source = net.add_constant(f"{stem}_float", floats[node.name])
            codes = net.fresh(f"{stem}_codes")
            axis = next(a.i for a in dequantize.attribute if a.name == "axis")
            pair = net.new_node(
                "QuantizeLinear", [source, *dequantize.input[1:]], [codes], f"{stem}_QuantizeLinear", axis=axis
            )
            net.insert_before(dequantize, pair)
            dequantize.input[0] = codes
    net.touch()
    net.sweep()
    return Graph(net.proto())


def test_the_numbers_are_the_nearest_of_fifteen_codes(network: Model, qdq: Graph) -> None:
    floats = floats_of(network.folded().graph)
    four = store_int4(qdq, floats, method="minmax")
    onnx.checker.check_model(four.proto, full_check=True)
    assert four.opset >= 21
    stored = {tensor.output: tensor for tensor in read_qdq(four) if tensor.is_weight and tensor.dtype == "int4"}
    seen = 0
    for node in four:
        if node.op_type not in LAYERS or node.input[1] not in stored:
            continue
        tensor = stored[node.input[1]]
        wanted = np.asarray(floats[node.name], np.float64)
        rest = tuple(axis for axis in range(wanted.ndim) if axis != tensor.axis)
        step = np.abs(wanted).max(axis=rest, keepdims=True) / 7
        codes = four.constant(tensor.codes)
        assert codes is not None
        assert codes.dtype.name == "int4"
        assert np.abs(codes.astype(int)).max() == 7  # the largest weight takes the outermost code, -8 is not used
        got = dequantized_weight(four, node.input[1])
        assert got is not None
        assert (np.abs(got - wanted) <= step * 0.5001).all()
        seen += 1
    assert seen == len(floats)


def test_the_squared_error_is_smaller_with_searched_scales(network: Model, qdq: Graph) -> None:
    floats = floats_of(network.folded().graph)
    errors = {
        method: {
            name: np.square(value - floats[name]).sum()
            for name, value in weights(store_int4(qdq, floats, method=method)).items()
        }
        for method in ("minmax", "mse")
    }
    assert all(errors["mse"][name] <= errors["minmax"][name] * 1.0001 for name in floats)
    assert sum(errors["mse"].values()) < 0.95 * sum(errors["minmax"].values())


def test_it_does_not_matter_how_the_weights_came(network: Model, qdq: Graph) -> None:
    """Integers with given floats, floats behind a pair, and 4-bit integers again: one result."""
    floats = floats_of(network.folded().graph)
    first = store_int4(qdq, floats)
    pairs = through_pairs(qdq, floats)
    assert float_weights(pairs)  # they are seen as floats that nobody has rounded yet
    for other in (store_int4(pairs), store_int4(first, floats)):
        for name, value in weights(first).items():
            np.testing.assert_array_equal(weights(other)[name], value)
    again = store_int4(first)
    assert {tensor.name for tensor in read_qdq(again)} == {tensor.name for tensor in read_qdq(first)}
    assert {tensor.name for tensor in read_qdq(first)} == {tensor.name for tensor in read_qdq(qdq)}


def test_named_layers_keep_their_weights(network: Model, qdq: Graph) -> None:
    names = list(floats_of(network.folded().graph))
    four = store_int4(qdq, keep=names[:1])
    np.testing.assert_array_equal(weights(four)[names[0]], weights(qdq)[names[0]])
    found = int4_storage(four)
    assert found.others == (names[0],)
    assert found.weights == len(names) - 1
    assert 0 < found.share < 1
    assert int4_storage(qdq).share == 0
    assert found.to_json()["layers_in_8_bits"] == [names[0]]


def test_dead_channels_get_a_scale(network: Model, qdq: Graph) -> None:
    floats = {name: value.copy() for name, value in floats_of(network.folded().graph).items()}
    first = next(iter(floats))
    floats[first][0] = 0.0
    four = store_int4(qdq, floats)
    assert (weights(four)[first][0] == 0).all()
    scales = next(tensor.scale for tensor in read_qdq(four) if tensor.output == four.node(first).input[1])
    assert scales[0] == pytest.approx(np.median(scales[1:]))


def test_the_graph_means_the_same_to_everybody(
    qdq: Graph, network: Model, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The twin, the ONNX project's reference and OpenVINO without low precision agree on the 4-bit graph."""
    four = store_int4(qdq, floats_of(network.folded().graph))
    one = {"x": feeds["x"][:1]}
    twin = twin_outputs(four, one)
    plain = ReferenceEvaluator(four.editable()).run(None, one)
    path = tmp_path / "four.onnx"
    path.write_bytes(four.proto.SerializeToString())
    unfused = OvRunner(path, CPU, mode="unfused").run(one)
    for (name, wanted), other in zip(twin.items(), plain, strict=True):
        span = wanted.max() - wanted.min()
        assert np.abs(other - wanted).max() < 0.03 * span
        assert np.abs(unfused[name] - wanted).max() < 0.03 * span


@pytest.mark.parametrize("quantizer", ["qdq", "nncf"])
def test_an_engine_stores_4_bits_and_computes_in_8(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path, quantizer: str
) -> None:
    options = BuildOptions(quantizer=quantizer, exact_scales=True)  # type: ignore[arg-type]
    images = calibration_set(network, feeds)
    eight = build(network, ranges, CPU, tmp_path / "8", options=options, calibration=images)
    four = build(network, ranges, CPU, tmp_path / "4", options=options.with_(bits="w4a8"), calibration=images)
    numbers = {path: stored_types(read(path)) for path in (eight.path, four.path)}
    assert numbers[four.path]["i4"] == numbers[eight.path]["i8"]
    assert "i8" not in numbers[four.path]
    saved = weights_of(eight.path).stat().st_size - weights_of(four.path).stat().st_size
    assert saved >= 0.45 * numbers[eight.path]["i8"]  # half a byte a weight

    loaded_engine = OvRunner(four.path, CPU)
    executed = [record for record in loaded_engine.kernels(feeds) if record.macs]
    assert executed
    assert all(record.integer for record in executed)
    got, wanted = loaded_engine.run(feeds), twin_outputs(four, feeds)
    for name, reference in wanted.items():
        step = (reference.max() - reference.min()) / 255
        assert (np.abs(got[name] - reference) <= 2 * step).mean() >= 0.995
    # It is 4 bits that the engine computes with, not 8: their error shows.
    assert any(np.abs(got[name] - OvRunner(eight.path, CPU).run(feeds)[name]).max() > 0 for name in wanted)
    assert four.choices["int4"]["share_of_numbers"] == 1.0


def test_without_the_cast_convolutions_would_run_in_float(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    """Why the Cast is there; when OpenVINO learns to do without it, this test says so."""
    direct = insert_qdq(network.folded().graph, ranges, activation=CPU.activation, weight=FOUR_BITS)
    path = tmp_path / "direct.xml"
    save(convert(direct), path)
    records = OvRunner(path, CPU).kernels({"x": noise((1, 3, 16, 16))})
    assert not any(record.integer for record in records if record.op.startswith("Convolution"))


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 2, 3, 3)])
def test_packing_changes_no_number(shape: tuple[int, ...]) -> None:
    from zsq_deploy.backends.openvino.runtime import core, ov

    opset = __import__("openvino.opset13", fromlist=["opset13"])
    codes = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    wide = opset.convert(opset.constant(codes), "f32")
    large = opset.convert(opset.constant(np.full(shape, 9, np.int8)), "f32")
    model = ov.Model([opset.multiply(wide, opset.constant(np.float32(0.5))).output(0), large.output(0)], [])
    assert pack(model) == 1  # 9 does not fit
    first, second = core().compile_model(model, "CPU")([]).values()
    np.testing.assert_array_equal(first, codes * np.float32(0.5))
    np.testing.assert_array_equal(second, np.full(shape, 9.0, np.float32))


# -- weights only --


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(transformer(width=32), tmp_path_factory.mktemp("tokens"))


def token_feeds(model: Model) -> dict[str, np.ndarray]:
    spec = model.inputs[0]
    return {spec.name: noise(spec.with_batch(2))}


@pytest.mark.parametrize(
    ("bits", "mode", "narrow"),
    [("w8a32", None, "i8"), ("w4a32", None, "i4"), ("w8a32", "int8_asym", "u8"), ("w4a32", "int4_asym", "u4")],
)
def test_weights_only_engines_compute_what_their_graph_says(
    tokens: Model, tmp_path: Path, bits: str, mode: str | None, narrow: str
) -> None:
    feeds = token_feeds(tokens)
    options = BuildOptions(bits=bits, compress_weights=mode, nncf=NncfOptions(group_size=32), exact_scales=True)
    engine = build(tokens, None, CPU, tmp_path, options=options)
    assert stored_types(read(engine.path)).get(narrow, 0) > 0
    one = OvRunner(engine.path, CPU)
    wanted = twin_outputs(engine, feeds)
    floats = OvRunner(engine.float_path, CPU, mode="float").run(feeds)
    for name, got in one.run(feeds).items():
        span = wanted[name].max() - wanted[name].min()
        assert np.abs(got - wanted[name]).max() < 1e-4 * span  # float32 arithmetic: no activation is rounded
        assert np.abs(got - floats[name]).max() > 1e-4 * span  # and the weights are
    assert not any(record.integer for record in one.kernels(feeds) if record.macs)


def test_activations_stay_float_at_run_time(tokens: Model, tmp_path: Path) -> None:
    """The property is in the file, so that every program that loads it computes the same."""
    from zsq_deploy.backends.openvino.runtime import core

    path = tmp_path / "w.xml"
    save(compress(prepare(tokens.folded().graph), "int8_sym"), path)
    compiled = core().compile_model(core().read_model(str(path)), "CPU")
    assert int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 0


def test_convolutions_are_said_to_stay_at_8_bit(network: Model, tmp_path: Path) -> None:
    engine = build(network, None, CPU, tmp_path, options=BuildOptions(bits="w4a32", nncf=NncfOptions(group_size=-1)))
    types = stored_types(read(engine.path))
    assert types.get("u8", 0) + types.get("i8", 0) > 0
    said = " ".join(engine.choices["notes"])
    convolutions = sum(node.op_type == "Conv" for node in network.folded().graph)
    assert f"keeps convolutions at 8 bit: {convolutions} of them" in said
    assert len(engine.choices["decided"]["convolutions_in_8_bits"]) == convolutions


def test_a_compressed_model_reads_back_as_integers(tokens: Model) -> None:
    graph = tokens.folded().graph
    found = read_qdq(ir_to_qdq(compress(prepare(graph), "int8_sym"), like=graph))
    assert {tensor.dtype for tensor in found if tensor.is_weight} == {"int8"}


def test_what_cannot_be_compressed_is_one_clear_error(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[1,3,4,4] x) => (float[1,3,4,4] y) { y = Relu(x) }"""
    )
    with pytest.raises(EngineError, match="no weight that it could compress"):
        build(loaded(proto, tmp_path), None, CPU, tmp_path / "engine", options=BuildOptions(bits="w8a32"))
    with pytest.raises(UsageError):
        BuildOptions(bits="w2a32")
    with pytest.raises(UsageError):
        NncfOptions(group_size=0)
