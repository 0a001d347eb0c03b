"""16-bit floats in the graph itself: scales are numbers of the type, types meet in Casts, and the numbers stay near."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsq_deploy.backends import BuildSettings, get_target
from zsq_deploy.backends.tensorrt.fusion import expect_fusion
from zsq_deploy.backends.tensorrt.halves import Half, to_half, up_to_type
from zsq_deploy.backends.tensorrt.lint import lint
from zsq_deploy.backends.tensorrt.options import BuildOptions, options_from
from zsq_deploy.backends.tensorrt.placement import floats_of, place_int4, place_qdq
from zsq_deploy.backends.tensorrt.quantizer import build
from zsq_deploy.backends.tensorrt.walking import element_types
from zsq_deploy.errors import UsageError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import Ranges, read_qdq
from zsq_deploy.quant.reader import dequantized_weight

from .tensorrt_networks import NETWORKS, images, network, outputs, ranges_of
from .test_tensorrt_bundle import Images

ELEVEN = get_target("tensorrt-11")
NUMBERS = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ONNX = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}


def halved(
    name: str, kind: str = "float16", *, exact: bool = True, **ranges: tuple[float, float]
) -> tuple[Half, Graph]:
    """A network with 16-bit floats, and its Q/DQ graph in float32."""
    model = network(name)
    graph, options = model.folded().graph, BuildOptions(exact_scales=exact)
    known = ranges_of(model)
    placed = place_qdq(graph, known, ELEVEN, options).graph
    return to_half(placed, kind, ranges={**known, **ranges}, weights=floats_of(graph, options)), placed


def sqnr_db(value: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / max(np.square(value - wanted).sum(), 1e-30)))


@given(st.floats(2.0**-24, 60000.0, width=32), st.sampled_from(sorted(NUMBERS)))
def test_scales_are_rounded_up_to_the_next_number_of_the_type(value, kind):
    found = up_to_type(np.float32(value), kind)
    assert found.astype(NUMBERS[kind]).astype(np.float32) == found
    assert found >= np.float32(value)
    below = (found.astype(NUMBERS[kind]).reshape(1).view(np.uint16) - 1).view(NUMBERS[kind]).astype(np.float32)[0]
    assert below < np.float32(value)


@pytest.mark.parametrize(
    ("name", "exact", "kind"),
    [
        *((name, True, "float16") for name in NETWORKS),
        ("residual", False, "float16"),
        ("transformer", False, "bfloat16"),
        ("concat", True, "bfloat16"),
    ],
)
def test_the_graph_is_valid_clean_and_near_the_one_in_float32(name, exact, kind):
    half, placed = halved(name, kind, exact=exact)
    proto = half.graph.editable()
    proto.ir_version = 9
    onnx.checker.check_model(proto, full_check=True)
    assert half.graph.opset == 19
    for number in (10, 11):
        assert lint(half.graph, get_target(f"tensorrt-{number}")) == []
    # what fuses does not change, and inputs and outputs keep their type
    assert expect_fusion(half.graph) == expect_fusion(placed)
    assert [spec.dtype for spec in (*half.graph.inputs, *half.graph.outputs)] == ["float32", "float32"]
    types = element_types(half.graph)
    assert (half.nodes > 0) == any(kind_of == ONNX[kind] for kind_of in types.values())
    for tensor in read_qdq(half.graph):
        assert np.array_equal(tensor.scale.astype(NUMBERS[kind]).astype(np.float32), tensor.scale)
    x = images(network(name), seed=9)
    for key, wanted in outputs(placed, x).items():
        found = outputs(half.graph, x)[key]
        assert found.dtype == np.float32
        # some codes fall on the other side of a boundary, as with any other order of operations
        assert sqnr_db(found, wanted) > 28.0


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "transformer"])
def test_onnx_runtime_computes_what_the_twin_does(name):
    ort = pytest.importorskip("onnxruntime")
    half, _ = halved(name)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = half.graph.editable()
    proto.ir_version = 9
    session = ort.InferenceSession(proto.SerializeToString(), options)
    x = images(network(name), seed=9)
    for key, value in outputs(half.graph, x).items():
        assert sqnr_db(session.run([key], {"image": x})[0], value) > 45.0


def test_weights_are_rounded_once_from_the_float_numbers():
    half, _ = halved("residual", "bfloat16", exact=False)
    graph = network("residual").folded().graph
    checked = 0
    for node in half.graph:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        exact = graph.constant(graph.node(node.name).input[1]).astype(np.float64)
        step = np.abs(exact).reshape(len(exact), -1).max(1) / 127
        step = up_to_type(np.float32(step), "bfloat16").astype(np.float64).reshape(-1, *[1] * (exact.ndim - 1))
        np.testing.assert_allclose(
            dequantized_weight(half.graph, node.input[1]).astype(np.float64), np.rint(exact / step) * step, rtol=1e-6
        )
        checked += 1
    assert checked == 4


def test_what_is_delicate_or_large_stays_in_float32():
    half, _ = halved("transformer")
    types = element_types(half.graph)
    assert set(half.kept) == {"n_layernormalization0", "n_softmax10"}
    for name in half.kept:
        assert {types[value] for value in half.graph.node(name).input} == {onnx.TensorProto.FLOAT}
    scores = half.graph.node("n_scores")
    assert {types[value] for value in scores.input} == {onnx.TensorProto.FLOAT16}
    # 65,504 is the largest number, and the device may see eight times what the images gave
    large, _ = halved("transformer", scores=(-9000.0, 9000.0))
    assert "its values reach 9e+03" in large.kept["n_scores"]
    assert any("too large for float16" in note for note in large.notes)
    wide, _ = halved("transformer", "bfloat16", scores=(-9000.0, 9000.0))
    assert "n_scores" not in wide.kept


def test_bfloat16_leaves_convolutions_and_what_fuses_with_them():
    """Up to operator set 21 ONNX has no convolution of that type; a Cast in front of an activation would part the two."""
    half, _ = halved("residual", "bfloat16")
    assert set(half.kept) >= {"n_stem", "n_stem_relu", "n_left", "n_left_relu", "n_right", "n_sum", "n_out"}
    assert "does not take bfloat16" in half.kept["n_stem"]
    assert "one kernel with" in half.kept["n_out"]


def test_an_output_that_is_read_inside_too():
    net = Net(halved("projection")[1].proto)
    add = next(node for node in net.nodes if node.name == "n_sum")
    info = onnx.helper.make_tensor_value_info(add.output[0], onnx.TensorProto.FLOAT, None)
    proto = net.proto()
    proto.graph.output.append(info)
    graph = Graph(proto)
    half = to_half(graph, "float16", ranges={})
    onnx.checker.check_model(half.graph.proto, full_check=True)
    x = images(network("projection"))
    for key, wanted in outputs(graph, x).items():
        assert sqnr_db(outputs(half.graph, x)[key], wanted) > 28.0


def test_four_bit_weights_with_16_bit_floats():
    model = network("transformer")
    placed = place_int4(model.folded().graph, ELEVEN)
    half = to_half(placed.graph, "float16", ranges=ranges_of(model))
    onnx.checker.check_model(half.graph.proto, full_check=True)
    assert half.graph.opset == 21
    assert lint(half.graph, ELEVEN) == []
    x = images(model)
    assert sqnr_db(outputs(half.graph, x)["end"], outputs(placed.graph, x)["end"]) > 40.0


def test_a_build_with_16_bit_floats(tmp_path: Path):
    model = network("residual")
    options = options_from(BuildSettings(float_type="float16"), ELEVEN)
    x = images(model, 16)
    engine = build(model, Ranges(ranges_of(model), "minmax"), ELEVEN, tmp_path, options=options, calibration=Images(x))
    graph = Graph.load(engine.path)
    assert onnx.TensorProto.FLOAT16 in element_types(graph).values()
    assert graph.proto.ir_version == 9
    assert engine.choices["float_type"] == "float16"
    assert (engine.choices["half_nodes"], engine.choices["float32_nodes"]) == (10, {})
    samples = np.load(tmp_path / "samples.npz", allow_pickle=False)
    assert np.array_equal(samples["output:logits"], outputs(graph, x[:8])["logits"])


def test_what_has_no_16_bit_floats():
    with pytest.raises(UsageError, match="no 16-bit type"):
        to_half(network("residual").folded().graph, "float8", ranges={})
    for target in ("tensorrt-8", "ort-x86-vnni", "openvino-cpu"):
        from zsq_deploy.backends import get_backend

        with pytest.raises(UsageError, match="float32"):
            get_backend(target).options_from(BuildSettings(float_type="float16"), get_target(target))


# -- lint --


def plant(net: Net, name: str, place: int, kind: str) -> None:
    """Give a constant operand another type."""
    node = next(node for node in net.nodes if node.name == name)
    value = net.constant(node.input[place])
    node.input[place] = net.add_constant("planted", value.astype(NUMBERS.get(kind, np.float32)))


@pytest.mark.parametrize(
    ("name", "place", "kind", "rule", "message"),
    [
        ("n_logits", 2, "float32", "mixed-types", "float16 and float32"),
        ("stem_relu_QuantizeLinear", 1, "float32", "scale-type", "reads float16 and its scale is float32"),
        ("image_QuantizeLinear", 1, "float16", "scale-type", "reads float32 and its scale is float16"),
    ],
)
def test_types_that_do_not_meet(name, place, kind, rule, message):
    net = Net(halved("residual")[0].graph.proto)
    plant(net, name, place, kind)
    found = lint(Graph(net.proto()), ELEVEN)
    assert [(item.node, item.rule, item.severity) for item in found] == [(name, rule, "error")]
    assert message in found[0].message


def test_casts_that_part_a_kernel():
    net = Net(halved("residual")[1].proto)
    conv = next(node for node in net.nodes if node.name == "n_left")
    relu = next(node for node in net.nodes if node.name == "n_left_relu")
    net.insert_before(relu, net.new_node("Cast", [conv.output[0]], ["half"], "down", to=ONNX["float16"]))
    relu.input[0] = "half"
    found = lint(Graph(net.proto()), ELEVEN)
    assert ("n_left", "cast-in-fusion") in {(item.node, item.rule) for item in found}


def test_generations_and_operator_sets():
    graph = halved("residual")[0].graph
    assert {item.rule for item in lint(graph, get_target("tensorrt-8"))} >= {"half-scale"}
    proto = graph.editable()
    proto.opset_import[0].version = 17
    assert "half-scale" in {item.rule for item in lint(Graph(proto), ELEVEN)}
