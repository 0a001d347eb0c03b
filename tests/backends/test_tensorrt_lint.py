"""Each rule of TensorRT finds the violation that was planted, names its node, and finds nothing in a clean graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import Finding
from zsq_deploy.backends.tensorrt.lint import RULES, lint
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import place_int4, place_qdq
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph

from .tensorrt_networks import images, network, ranges_of

TEN, EIGHT = get_target("tensorrt-10"), get_target("tensorrt-8")


def clean(name: str = "residual", target=TEN) -> Net:
    model = network(name)
    return Net(place_qdq(model.folded().graph, ranges_of(model), target, BuildOptions()).graph.proto)


def find(net: Net, name: str) -> onnx.NodeProto:
    return next(node for node in net.nodes if node.name == name)


def pair(net: Net, value: str, scale: float = 0.1, *, before: str) -> str:
    """A Q/DQ pair on a value, in front of a node; returns the rounded value."""
    codes, rounded = net.fresh(f"{value}_q"), net.fresh(f"{value}_dq")
    step = net.add_constant(f"{value}_planted_scale", np.float32(scale).reshape(()))
    zero = net.add_constant(f"{value}_planted_zero", np.zeros((), np.int8))
    net.insert_before(
        find(net, before),
        net.new_node("QuantizeLinear", [value, step, zero], [codes], f"{value}_planted_q"),
        net.new_node("DequantizeLinear", [codes, step, zero], [rounded], f"{value}_planted_dq"),
    )
    return rounded


def set_constants(net: Net, name: str, place: int, value: np.ndarray) -> None:
    """Give a Q/DQ pair another scale (place 1) or zero point (place 2)."""
    node = find(net, name)
    key = net.add_constant(f"planted_{place}", value)
    for other in net.nodes:
        if other.name == name or (other.input and other.input[0] == node.output[0] and len(other.input) > 1):
            other.input[place] = key


def zero_point(net: Net) -> None:
    set_constants(net, "stem_relu_QuantizeLinear", 2, np.asarray(3, np.int8))


def unsigned(net: Net) -> None:
    set_constants(net, "stem_relu_QuantizeLinear", 2, np.asarray(0, np.uint8))


def implied_unsigned(net: Net) -> None:
    """Without a zero point, QuantizeLinear gives uint8."""
    for name in ("stem_relu_QuantizeLinear", "stem_relu_DequantizeLinear"):
        del find(net, name).input[2]


def wide(net: Net) -> None:
    set_constants(net, "stem_relu_QuantizeLinear", 2, np.asarray(0, np.int16))


def bad_scale(net: Net) -> None:
    set_constants(net, "stem_relu_QuantizeLinear", 1, np.asarray(0.0, np.float32))


def nan_scale(net: Net) -> None:
    set_constants(net, "stem_relu_QuantizeLinear", 1, np.asarray(np.nan, np.float32))


def computed_scale(net: Net) -> None:
    net.insert_before(net.nodes[0], net.new_node("ReduceMax", ["image"], ["its_scale"], "n_scale", keepdims=0))
    for name in ("stem_relu_QuantizeLinear", "stem_relu_DequantizeLinear"):
        find(net, name).input[1] = "its_scale"


def per_channel_activation(net: Net) -> None:
    set_constants(net, "stem_relu_QuantizeLinear", 1, np.full(8, 0.1, np.float32))
    set_constants(net, "stem_relu_QuantizeLinear", 2, np.zeros(8, np.int8))


def weight_axis(net: Net) -> None:
    node = find(net, net.producers()[find(net, "n_left").input[1]].name)
    for attribute in node.attribute:
        if attribute.name == "axis":
            attribute.i = 1


def quantized_bias(net: Net) -> None:
    conv = find(net, "n_left")
    codes = net.add_constant("planted_bias", np.zeros(8, np.int32))
    scale = net.add_constant("planted_bias_scale", np.full(8, 0.01, np.float32))
    net.insert_before(conv, net.new_node("DequantizeLinear", [codes, scale], ["planted_b"], "n_bias_dq", axis=0))
    conv.input[2] = "planted_b"


def float_input(net: Net) -> None:
    find(net, "n_left").input[0] = "stem_relu"


def float_weight(net: Net) -> None:
    conv = find(net, "n_left")
    conv.input[1] = net.add_constant("planted_w", np.ones((8, 8, 3, 3), np.float32))


def inside(net: Net) -> None:
    find(net, "n_left_relu").input[0] = pair(net, "left", before="n_left_relu")


def branch(net: Net) -> None:
    find(net, "n_sum").input[0] = pair(net, "right", before="n_sum")


def float_skip(net: Net) -> None:
    find(net, "n_sum").input[1] = "stem_relu"


def output(net: Net) -> None:
    find(net, "n_logits").output[0] = "inner"
    rounded = pair(net, "inner", before=net.nodes[-1].name)
    net.nodes.append(net.nodes.pop(next(i for i, node in enumerate(net.nodes) if node.name == "n_logits")))
    for name in ("inner_planted_q", "inner_planted_dq"):
        net.nodes.append(net.nodes.pop(next(i for i, node in enumerate(net.nodes) if node.name == name)))
    for node in net.nodes:
        node.output[0] = "logits" if node.output[0] == rounded else node.output[0]


def left_as_integers(net: Net) -> None:
    node = find(net, "stem_relu_DequantizeLinear")
    node.op_type = "Cast"
    node.attribute.append(helper.make_attribute("to", onnx.TensorProto.FLOAT))
    del node.input[1:]


def domain(net: Net) -> None:
    find(net, "stem_relu_QuantizeLinear").domain = "com.microsoft"


def integer_operator(net: Net) -> None:
    find(net, "n_pool").op_type = "QLinearGlobalAveragePool"


def concat_scales(net: Net) -> None:
    set_constants(net, "small_relu_QuantizeLinear", 1, np.asarray(0.5, np.float32))


def concat_mixed(net: Net) -> None:
    find(net, "n_both").input[0] = "small_relu"


def move(net: Net) -> None:
    rounded = pair(net, "both", 0.7, before="n_max")
    find(net, "n_max").input[0] = rounded


PLANTED: list[tuple[Callable[[Net], None], str, str, str, str]] = [
    (zero_point, "residual", "zero-point", "stem_relu_QuantizeLinear", "error"),
    (unsigned, "residual", "unsigned", "stem_relu_QuantizeLinear", "error"),
    (implied_unsigned, "residual", "unsigned", "stem_relu_QuantizeLinear", "error"),
    (wide, "residual", "type", "stem_relu_QuantizeLinear", "error"),
    (bad_scale, "residual", "bad-scale", "stem_relu_QuantizeLinear", "error"),
    (nan_scale, "residual", "bad-scale", "stem_relu_QuantizeLinear", "error"),
    (computed_scale, "residual", "computed-scale", "stem_relu_QuantizeLinear", "error"),
    (per_channel_activation, "residual", "activation-granularity", "stem_relu_QuantizeLinear", "error"),
    (weight_axis, "residual", "weight-axis", "n_left", "error"),
    (quantized_bias, "residual", "quantized-bias", "n_left", "error"),
    (float_input, "residual", "half-quantized", "n_left", "warning"),
    (float_weight, "residual", "half-quantized", "n_left", "warning"),
    (inside, "residual", "inside-fusion", "left_planted_q", "warning"),
    (branch, "residual", "rounded-branch", "right_planted_q", "warning"),
    (float_skip, "residual", "residual-not-quantized", "n_sum", "warning"),
    (output, "residual", "output-quantized", "inner_planted_q", "warning"),
    (left_as_integers, "residual", "not-dequantized", "stem_relu_QuantizeLinear", "error"),
    (domain, "residual", "domain", "stem_relu_QuantizeLinear", "error"),
    (integer_operator, "residual", "integer-operator", "n_pool", "error"),
    (concat_scales, "concat", "concat-scales", "n_both", "warning"),
    (concat_mixed, "concat", "concat-mixed", "n_both", "warning"),
    (move, "concat", "scale-across-move", "max_QuantizeLinear", "warning"),
]


@pytest.mark.parametrize(
    ("plant", "name", "rule", "node", "severity"), PLANTED, ids=[one[0].__name__ for one in PLANTED]
)
def test_a_planted_violation_is_found(plant, name, rule, node, severity):
    net = clean(name)
    assert lint(Graph(net.proto()), TEN) == []
    plant(net)
    net.touch()
    found = lint(Graph(net.proto()), TEN)
    hits = [item for item in found if item.rule == rule]
    assert [(item.node, item.severity) for item in hits[:1]] == [(node, severity)], found
    assert all(item.message and item.remedy for item in found)


def rules(found: list[Finding]) -> set[str]:
    return {item.rule for item in found}


def test_integer_weights_are_refused_for_tensorrt_8_only():
    graph = Graph(clean().proto())
    assert rules(lint(graph, EIGHT)) == {"integer-weight"}
    assert lint(Graph(clean(target=EIGHT).proto()), EIGHT) == []
    assert lint(Graph(clean(target=EIGHT).proto()), TEN) == []


def test_new_operator_sets_are_named():
    graph = Graph(clean(target=EIGHT).proto())
    proto = graph.editable()
    proto.opset_import[0].version = 18
    assert [(item.rule, item.severity) for item in lint(Graph(proto), EIGHT)] == [("opset", "warning")]
    proto.opset_import[0].version = 11
    assert ("opset", "error") in {(item.rule, item.severity) for item in lint(Graph(proto), TEN)}


def test_four_bit_numbers():
    graph = place_int4(network("transformer").folded().graph, TEN).graph
    assert lint(graph, TEN) == []
    assert rules(lint(graph, EIGHT)) == {"int4", "opset"}
    net = Net(graph.proto)
    for node in net.nodes:
        for attribute in node.attribute:
            if attribute.name == "block_size":
                attribute.i = 32
    for name in [name for name in list(net.constants) if name.endswith(("_scale", "_zero_point"))]:
        old = net.constant(name)
        net.add_constant(name, np.repeat(old, 4 if old.shape[0] == 1 and "12" in name else 2, axis=0), exact=True)
    found = lint(Graph(net.proto()), TEN)
    assert rules(found) == {"int4"}
    assert all("blocks of 32" in item.message for item in found)


def test_errors_come_first_and_files_are_read(tmp_path: Path):
    net = clean()
    inside(net)
    zero_point(net)
    net.touch()
    path = tmp_path / "q.onnx"
    onnx.save(Graph(net.proto()).editable(), path)
    found = lint(path, TEN)
    assert [item.severity for item in found] == sorted(
        (item.severity for item in found), key=lambda one: one != "error"
    )
    assert {"zero-point", "inside-fusion"} <= rules(found)


def test_a_float_network_is_clean():
    assert lint(network("residual").folded().graph, TEN) == []
    assert len(RULES) == 14


@pytest.mark.parametrize("symmetric", [False, True])
def test_graphs_of_quantize_static(tmp_path: Path, symmetric: bool):
    tool = pytest.importorskip("onnxruntime.quantization")
    model = network("residual")
    source, made = tmp_path / "f.onnx", tmp_path / "q.onnx"
    onnx.save(model.folded().graph.editable(), source)

    class Reader(tool.CalibrationDataReader):
        def __init__(self):
            self.left = iter([{"image": images(model)}])

        def get_next(self):
            return next(self.left, None)

    extra = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False} if symmetric else {}
    tool.quantize_static(
        source,
        made,
        Reader(),
        quant_format=tool.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tool.QuantType.QInt8,
        weight_type=tool.QuantType.QInt8,
        extra_options=extra,
    )
    found = lint(made, TEN)
    names = {node.name for node in Graph.load(made)}
    assert all(item.node in names for item in found if item.node)
    if symmetric:
        assert not rules(found) & {"zero-point", "quantized-bias", "unsigned"}
        assert {"inside-fusion", "rounded-branch", "output-quantized"} & rules(found)
    else:
        assert {"zero-point", "quantized-bias"} <= rules(found)


def test_rounding_in_front_of_a_concatenation_is_enough():
    """As NNCF does it: what reads the concatenation needs no pair of its own."""
    net = clean("concat")
    find(net, "n_last").input[0] = "max"
    net.touch()
    net.sweep()
    assert lint(Graph(net.proto()), TEN) == []


@pytest.mark.slow
def test_graphs_of_nncf():
    nncf = pytest.importorskip("nncf")
    model = network("residual")
    x = images(model)
    made = nncf.quantize(
        model.folded().graph.editable(),
        nncf.Dataset([{"image": x[place : place + 1]} for place in range(len(x))]),
        preset=nncf.QuantizationPreset.PERFORMANCE,
    )
    found = lint(Graph(made), TEN)
    # Its unsigned activations cannot be helped, and it rounds the convolution's side of the sum.
    assert rules(found) == {"unsigned", "rounded-branch"}
    assert all(item.node in {node.name for node in made.graph.node} for item in found)
