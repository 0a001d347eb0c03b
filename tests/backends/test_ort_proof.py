"""The proof of integers, the lint rules, and the summary: checked on engines that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.onnxruntime.lint import lint
from zsq_deploy.backends.onnxruntime.proof import kernels
from zsq_deploy.backends.onnxruntime.quantizer import build
from zsq_deploy.backends.onnxruntime.runner import runner
from zsq_deploy.backends.onnxruntime.summary import summarize
from zsq_deploy.model import Model, node_macs
from zsq_deploy.model.graph import Graph

from .ort_engines import convnet, loaded, ranges_of

VNNI, AVX2, ARM = (get_target(name) for name in ("ort-x86-vnni", "ort-x86-avx2", "ort-arm64"))
ONE = {"x": np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32)}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(convnet(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(network: Model, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    feeds = {"x": np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)}
    return build(network, ranges_of(network, feeds), VNNI, tmp_path_factory.mktemp("engine"))


def test_macs_are_those_of_the_network_and_traced_to_its_nodes(network: Model, engine: Engine) -> None:
    expected = node_macs(network.folded().graph)
    records = runner(engine.path, VNNI).kernels(ONE)
    found = {record.sources[0]: record.macs for record in records if record.macs}
    assert found == expected
    assert all(record.integer for record in records if record.macs)
    floats = {r.sources[0]: r.macs for r in kernels(engine.float_path, VNNI, ONE, mode="float") if r.macs}
    assert floats == expected


def test_macs_do_not_depend_on_the_batch(engine: Engine) -> None:
    four = {"x": np.repeat(ONE["x"], 4, 0)}
    assert sum(r.macs for r in kernels(engine.path, VNNI, four)) == sum(r.macs for r in kernels(engine.path, VNNI, ONE))


def test_only_conversions_are_left_in_float(engine: Engine) -> None:
    floats = [record for record in kernels(engine.path, VNNI, ONE) if not record.integer]
    assert {record.op for record in floats} <= {"QuantizeLinear", "DequantizeLinear"}
    assert all("conversion" in record.reason for record in floats)


def test_without_fusion_nothing_is_integer(engine: Engine) -> None:
    records = kernels(engine.path, VNNI, ONE, mode="unfused")
    assert not any(record.integer for record in records if record.macs)
    assert {record.reason for record in records if record.macs} == {"graph optimization is off"}


def test_times_are_those_of_the_profile(engine: Engine) -> None:
    records = kernels(engine.path, VNNI, ONE, repeats=5)
    assert all(record.microseconds >= 0 for record in records)
    assert sum(record.microseconds for record in records) > 0


# --- engines that are broken on purpose -------------------------------------------------------------------------------


def _tensor(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def _feeding(proto: onnx.ModelProto, weight: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.op_type == "Conv" and weight in n.input[1])


def _maker(proto: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if value in node.output)


def _scale_bias_wrongly(proto: onnx.ModelProto) -> None:
    scale = _tensor(proto, _maker(proto, _feeding(proto, "res_w").input[2]).input[1])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(3), scale.name))


def _float_weight(proto: onnx.ModelProto) -> None:
    conv = _feeding(proto, "res_w")
    made = _maker(proto, conv.input[1])
    codes, scale = (numpy_helper.to_array(_tensor(proto, name)) for name in made.input[:2])
    values = codes.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    proto.graph.initializer.append(numpy_helper.from_array(values, "plain_weight"))
    conv.input[1] = "plain_weight"


def _float_output(proto: onnx.ModelProto) -> None:
    conv = _feeding(proto, "res_w")
    quantize = next(node for node in proto.graph.node if node.input[0] == conv.output[0])
    dequantize = next(node for node in proto.graph.node if node.input[0] == quantize.output[0])
    for node in proto.graph.node:
        for slot, name in enumerate(node.input):
            if name == dequantize.output[0]:
                node.input[slot] = conv.output[0]
    proto.graph.node.remove(quantize)
    proto.graph.node.remove(dequantize)


@pytest.mark.parametrize(
    ("damage", "rule", "words"),
    [
        (_scale_bias_wrongly, "bias-scale", "scale of its bias"),
        (_float_weight, "weight-not-quantized", "weights are not quantized"),
        (_float_output, "output-not-quantized", "output is not quantized"),
    ],
)
def test_a_convolution_that_falls_back_to_float_is_found_before_and_explained_after(
    engine: Engine, tmp_path: Path, damage: Callable[[onnx.ModelProto], None], rule: str, words: str
) -> None:
    proto = onnx.load(engine.path)
    damage(proto)
    broken = tmp_path / "broken.onnx"
    onnx.save(proto, broken)
    name = _feeding(proto, "res_w").name if rule != "weight-not-quantized" else None
    findings = [finding for finding in lint(broken, VNNI) if finding.rule == rule]
    assert findings
    assert all(finding.message and finding.remedy for finding in findings)
    if name:
        assert {finding.node for finding in findings} == {name}
    floats = [record for record in kernels(broken, VNNI, ONE) if record.macs and not record.integer]
    assert len(floats) == 1  # lint told the truth: ONNX Runtime did leave it in float
    assert words in floats[0].reason


def test_a_good_engine_has_no_findings(engine: Engine, network: Model, tmp_path: Path) -> None:
    assert lint(engine.path, VNNI) == []
    for target in (AVX2, ARM):
        feeds = {"x": np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)}
        made = build(network, ranges_of(network, feeds), target, tmp_path / target.name)
        assert lint(made.path, target) == []


def test_an_engine_of_another_target_is_found_out(engine: Engine, network: Model, tmp_path: Path) -> None:
    rules = {finding.rule for finding in lint(engine.path, AVX2)}
    assert "int16-saturation" in rules
    assert {finding.rule for finding in lint(engine.path, ARM)} == {"activation-type"}
    feeds = {"x": np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)}
    arm = build(network, ranges_of(network, feeds), ARM, tmp_path)
    assert any("slow" in finding.message for finding in lint(arm.path, VNNI))


def _change(proto: onnx.ModelProto, what: str) -> None:
    if what == "ir-version":
        proto.ir_version = 11
    elif what == "opset":
        proto.opset_import[0].version = 12
    elif what == "contrib-domain":
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        next(n for n in proto.graph.node if n.op_type == "QuantizeLinear").domain = "com.microsoft"
    elif what == "bad-scale":
        scale = _tensor(proto, next(n for n in proto.graph.node if n.op_type == "QuantizeLinear").input[1])
        scale.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), scale.name))
    elif what == "weight-zero-point":
        zero = _tensor(proto, _maker(proto, _feeding(proto, "res_w").input[1]).input[2])
        zero.CopyFrom(numpy_helper.from_array(np.full(zero.dims, 3, np.int8), zero.name))
    elif what == "16-bit-activation":
        made = next(n for n in proto.graph.node if n.op_type == "QuantizeLinear")
        zero = _tensor(proto, made.input[2])
        zero.CopyFrom(numpy_helper.from_array(np.array(7, np.uint16), zero.name))
    elif what == "bias-type":
        conv = _feeding(proto, "res_w")
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(16, np.float32), "float_bias"))
        conv.input[2] = "float_bias"
    elif what == "gemm-form":
        next(n for n in proto.graph.node if n.op_type == "Gemm").attribute.append(helper.make_attribute("alpha", 2.0))
    else:
        raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        "ir-version",
        "opset",
        "contrib-domain",
        "bad-scale",
        "weight-zero-point",
        "16-bit-activation",
        "bias-type",
        "gemm-form",
    ],
)
def test_each_rule_fires_on_what_it_is_about(engine: Engine, what: str) -> None:
    proto = onnx.load(engine.path)
    _change(proto, what)
    findings = lint(Graph(proto), VNNI)
    assert what in {finding.rule for finding in findings}
    assert [finding.severity for finding in findings] == sorted(finding.severity for finding in findings)


def test_an_idle_pair_is_found() -> None:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])
    nodes = [
        helper.make_node("Exp", ["x"], ["a"], "exp"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dq"),
        helper.make_node("Log", ["d"], ["y"], "log"),
    ]
    constants = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(0), "z")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    assert [finding.rule for finding in lint(Graph(proto), VNNI)] == ["idle-pair"]


def test_the_summary_counts_what_is_in_the_file(engine: Engine) -> None:
    found = summarize(engine.path)
    assert found["convolutions_and_products"] == {"all": 7, "between_pairs": 7}
    assert set(found["quantized_activations"]) == {"uint8"}
    assert found["quantized_constants"] == {"int8 per channel": 7, "int32 per channel": 7}
    assert found["file_bytes"] == engine.path.stat().st_size
    assert (found["opset"], found["ir_version"]) == (17, 8)
    assert found["outputs"]["logits"][1] == [None, 10]
    assert summarize(engine.float_path)["convolutions_and_products"] == {"all": 7, "between_pairs": 0}
