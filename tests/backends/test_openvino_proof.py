"""What OpenVINO executed: which kernels, how much arithmetic, of which nodes, and why something stayed in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.openvino import proof as proof_module
from zsq_deploy.backends.openvino.convert import convert, save
from zsq_deploy.backends.openvino.lint import lint
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.quantizer import build
from zsq_deploy.backends.openvino.runner import runner
from zsq_deploy.backends.openvino.summary import summarize
from zsq_deploy.errors import EngineError
from zsq_deploy.model import Model, node_macs
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import PlacementRules, insert_qdq
from zsq_deploy.verify import prove

from .openvino_engines import noise
from .ort_engines import convnet, loaded, ranges_of, transformer

CPU = get_target("openvino-cpu")
X = {"x": noise((1, 3, 16, 16))}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(convnet(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(network: Model, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    ranges = ranges_of(network, {"x": noise((8, 3, 16, 16))})
    options = BuildOptions(quantizer="qdq", exact_scales=True)
    return build(network, ranges, CPU, tmp_path_factory.mktemp("engine"), options=options)


@pytest.mark.parametrize("mode", ["engine", "unfused", "float"])
def test_macs_are_those_of_the_network_and_traced_to_its_nodes(network: Model, engine: Engine, mode: str) -> None:
    expected = node_macs(network.folded().graph)
    path = engine.float_path if mode == "float" else engine.path
    records = runner(path, CPU, mode=mode).kernels(X)  # type: ignore[arg-type]
    found = {name: record.macs for record in records if record.macs for name in record.sources if name in expected}
    assert found == expected
    assert sum(record.macs for record in records) == sum(expected.values())
    assert all(record.integer == (mode == "engine") for record in records if record.macs)
    assert all(record.microseconds > 0 for record in records if record.macs > 10000)


def test_macs_do_not_depend_on_the_batch(engine: Engine) -> None:
    one, four = (
        sum(record.macs for record in runner(engine.path, CPU).kernels({"x": noise((size, 3, 16, 16))}))
        for size in (1, 4)
    )
    assert one == four


def test_products_of_a_transformer_are_all_counted(tmp_path: Path) -> None:
    model = loaded(transformer(tokens=9, width=16), tmp_path)
    name = model.inputs[0].name
    feeds = {name: noise((8, 9, 16))}
    made = build(model, ranges_of(model, feeds), CPU, tmp_path / "e", options=BuildOptions(quantizer="qdq"))
    expected = sum(node_macs(model.folded().graph).values())
    one = {name: feeds[name][:1]}
    for path, mode in ((made.path, "engine"), (made.path, "unfused"), (made.float_path, "float")):
        records = runner(path, CPU, mode=mode).kernels(one)  # type: ignore[arg-type]
        assert sum(record.macs for record in records) == expected, mode
        if mode != "engine":
            assert not any(record.integer for record in records if record.macs)


def test_only_conversions_are_left_in_float(engine: Engine) -> None:
    proof = prove(runner(engine.path, CPU).kernels(X))
    assert proof.macs_share == 1
    assert proof.islands
    assert all("conversion" in island.reason or "rounding" in island.reason for island in proof.islands)


def test_layers_too_fast_for_the_profile_are_listed_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO calls a layer of less than a microsecond ``NOT_RUN``; on a fast machine these are the conversions."""
    whole = [(record.node, record.integer, record.reason) for record in runner(engine.path, CPU).kernels(X)]
    monkeypatch.setattr(proof_module, "_measured", lambda compiled, inputs: {})
    records = runner(engine.path, CPU).kernels(X)
    assert [(record.node, record.integer, record.reason) for record in records] == whole
    assert {record.microseconds for record in records} == {0.0}
    assert not any("Reshape" in record.op for record in records)  # another view of the same memory


def without_pair(graph: Graph, value: str) -> Graph:
    """The graph without the Q/DQ pair of one value."""
    net = Net(graph.proto)
    for node in net.nodes:
        for place, name in enumerate(node.input):
            if name == f"{value}_DequantizeLinear_Output" and node.op_type != "QuantizeLinear":
                node.input[place] = value
    net.touch()
    net.sweep()
    return Graph(net.proto())


def test_a_layer_that_falls_back_to_float_is_found_before_and_explained_after(
    engine: Engine, network: Model, tmp_path: Path
) -> None:
    graph = Graph.load(engine.qdq_path)
    assert lint(graph, CPU) == []
    layer = next(node for node in graph if node.op_type == "Conv" and "dw" in node.name)
    source = graph.producer(graph.producer(layer.input[0]).input[0]).input[0]
    broken = without_pair(graph, source)
    assert [finding.node for finding in lint(broken, CPU) if finding.rule == "input-not-quantized"] == [layer.name]
    save(convert(broken), tmp_path / "e.xml")
    (record,) = [r for r in runner(tmp_path / "e.xml", CPU).kernels(X) if layer.name in r.sources and r.macs]
    assert not record.integer
    assert "depthwise convolution" in record.reason
    assert "input is not quantized" in record.reason


def test_a_scale_for_each_channel_of_an_activation_is_found_and_explained(engine: Engine, tmp_path: Path) -> None:
    graph = Graph.load(engine.qdq_path)
    layer = next(node for node in graph if node.op_type == "Conv" and "pw" in node.name)
    dequantize = graph.producer(layer.input[0])
    quantize = graph.producer(dequantize.input[0])
    channels = graph.constant(graph.producer(layer.input[1]).input[0]).shape[1]
    net = Net(graph.proto)
    scale = graph.constant(quantize.input[1]) * np.linspace(0.5, 1, channels, dtype=np.float32)
    zero = np.arange(channels, dtype=np.uint8)
    for node in net.nodes:
        if node.name in (quantize.name, dequantize.name):
            node.input[1] = net.add_constant("wide_scale", scale.astype(np.float32), exact=True)
            node.input[2] = net.add_constant("wide_zero", zero, exact=True)
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("axis", 1))
    net.touch()
    wide = Graph(net.proto())
    assert "activation-granularity" in {finding.rule for finding in lint(wide, CPU)}
    save(convert(wide), tmp_path / "e.xml")
    records = [r for r in runner(tmp_path / "e.xml", CPU).kernels(X) if layer.name in r.sources and r.macs]
    assert [record.integer for record in records] == [False]
    assert "scale for each channel" in records[0].reason


def test_rounding_before_a_sum_is_found(network: Model) -> None:
    ranges = dict(ranges_of(network, {"x": noise((4, 3, 16, 16))}))
    for residual, found in (("both", True), ("skip", False)):
        graph = insert_qdq(
            network.folded().graph,
            ranges,
            activation=CPU.activation,
            weight=CPU.weight,
            rules=PlacementRules(residual=residual, bias="float"),  # type: ignore[arg-type]
        )
        assert any(finding.rule == "rounded-before-sum" for finding in lint(graph, CPU)) == found


def test_bad_scales_are_errors_and_come_first(engine: Engine) -> None:
    net = Net(Graph.load(engine.qdq_path).proto)
    node = next(node for node in net.nodes if node.op_type == "QuantizeLinear")
    node.input[1] = net.add_constant("bad", np.asarray(0.0, np.float32), exact=True)
    net.touch()
    findings = lint(Graph(net.proto()), CPU)
    assert (findings[0].rule, findings[0].severity) == ("bad-scale", "error")


def test_the_summary_counts_what_is_in_the_file(engine: Engine, network: Model) -> None:
    found = summarize(engine.path)
    layers = len(node_macs(network.folded().graph))
    assert found["convolutions_and_products"] == {"all": layers, "between_pairs": layers}
    assert found["file_bytes"] == engine.bytes
    assert found["constants"]["i8"] == layers
    assert summarize(engine.float_path)["convolutions_and_products"] == {"all": layers, "between_pairs": 0}
    with pytest.raises(EngineError):
        summarize(engine.path.with_name("none.xml"))
