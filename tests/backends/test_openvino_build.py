"""Building OpenVINO engines: what lands in the folder, that it computes what its Q/DQ graph says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from zsq_deploy.artifact import digest_file
from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.openvino.convert import convert, read, save
from zsq_deploy.backends.openvino.merging import drop_merged_pairs
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.quantizer import build
from zsq_deploy.backends.openvino.runner import runner
from zsq_deploy.errors import CalibrationError, EngineError, StaleArtifactError, UsageError
from zsq_deploy.model import Model
from zsq_deploy.model.graph import Graph
from zsq_deploy.pipeline.stages import open_engine
from zsq_deploy.quant import PlacementRules, insert_qdq
from zsq_deploy.quant.ranges import Ranges
from zsq_deploy.quant.reader import read_qdq

from .openvino_engines import noise, twin_outputs
from .ort_engines import ASSET_NETWORKS, asset_model, calibration_set, convnet, loaded, ranges_of

CPU, NPU = get_target("openvino-cpu"), get_target("openvino-npu")
EXACT = BuildOptions(quantizer="qdq", exact_scales=True)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(convnet(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"x": noise((12, 3, 16, 16))}


@pytest.fixture(scope="module")
def ranges(network: Model, feeds: dict[str, np.ndarray]) -> Ranges:
    return ranges_of(network, feeds)


@pytest.fixture(scope="module")
def engine(network: Model, ranges: Ranges, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build(network, ranges, CPU, tmp_path_factory.mktemp("engine"), options=EXACT)


def lsb(values: np.ndarray) -> float:
    return float(values.max() - values.min()) / 255


def test_the_folder_holds_what_the_manifest_says(engine: Engine) -> None:
    folder = engine.path.parent
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["target"] == "openvino-cpu"
    for part, file in (
        ("engine", "engine.xml"),
        ("weights", "engine.bin"),
        ("qdq", "qdq.onnx"),
        ("float", "float.onnx"),
    ):
        assert manifest[part] == {"file": file, "sha256": digest_file(folder / file)}
    assert {file.name for file in folder.iterdir()} == {
        "engine.xml",
        "engine.bin",
        "qdq.onnx",
        "float.onnx",
        "manifest.json",
    }
    assert manifest["versions"]["openvino"].count(".") == 2
    assert engine.weights_path == folder / "engine.bin"
    assert engine.bytes == sum((folder / name).stat().st_size for name in ("engine.xml", "engine.bin"))


def test_equal_builds_give_equal_files(engine: Engine, network: Model, ranges: Ranges, tmp_path: Path) -> None:
    again = build(network, ranges, CPU, tmp_path, options=EXACT)
    for name in ("engine.xml", "engine.bin", "qdq.onnx", "float.onnx"):
        assert digest_file(again.path.parent / name) == digest_file(engine.path.parent / name), name


def test_the_engine_computes_what_its_graph_says(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    got = runner(engine.path, CPU).run(feeds)["logits"]
    wanted = twin_outputs(engine, feeds)["logits"]
    assert np.abs(got - wanted).max() < 1e-3 * lsb(wanted)
    # ... also by an implementation that has nothing to do with ours or OpenVINO's
    session = ort.InferenceSession(str(engine.qdq_path), _unoptimized(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, feeds)[0], got, atol=1e-3 * lsb(wanted))


def _unoptimized() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return options


def test_the_engine_is_close_to_float(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    got = runner(engine.path, CPU).run(feeds)["logits"].astype(np.float64)
    floats = runner(engine.float_path, CPU, mode="float").run(feeds)["logits"].astype(np.float64)
    assert 10 * np.log10(np.square(floats).sum() / np.square(got - floats).sum()) > 20


def test_weights_are_stored_as_integers_and_never_as_half_floats(engine: Engine, network: Model) -> None:
    types = [
        port.get_element_type().get_type_name()
        for node in read(engine.path).get_ordered_ops()
        for port in node.outputs()
    ]
    assert "f16" not in types
    assert types.count("i8") > 0
    weights = sum(network.graph.constant(name).size for name in network.graph.initializer_names if name.endswith("_w"))
    assert weights < (engine.path.parent / "engine.bin").stat().st_size < 2 * weights + 8000


def test_corrected_biases_move_the_outputs_by_just_that(
    engine: Engine, network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    gemm = next(node for node in network.folded().graph if node.op_type == "Gemm")
    old = network.folded().graph.constant(gemm.input[2])
    shift = np.linspace(-1, 1, old.size).astype(np.float32)
    moved = build(network, ranges, CPU, tmp_path, options=EXACT.with_(biases={gemm.name: old + shift}))
    before, after = (runner(item.path, CPU).run(feeds)["logits"] for item in (engine, moved))
    np.testing.assert_allclose(after - before, np.broadcast_to(shift, after.shape), atol=0.02)
    assert moved.choices["corrected_biases"].keys() == {gemm.name}
    with pytest.raises(UsageError, match="nobody"):
        build(network, ranges, CPU, tmp_path, options=EXACT.with_(biases={"nobody": shift}))


def test_excluded_layers_stay_in_float(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    stem = next(node.name for node in network.folded().graph if "stem_w" in node.input)
    made = build(network, ranges, CPU, tmp_path, options=EXACT.with_(exclude=(stem,)))
    records = runner(made.path, CPU).kernels({"x": feeds["x"][:1]})
    floats = {name for record in records if record.macs and not record.integer for name in record.sources}
    assert stem in floats
    with pytest.raises(UsageError, match="nonsense"):
        build(network, ranges, CPU, tmp_path, options=EXACT.with_(exclude=("nonsense",)))


def test_what_does_not_belong_together_is_refused(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    other = loaded(convnet(seed=5), tmp_path, "other")
    with pytest.raises(StaleArtifactError, match="another network"):
        build(other, ranges, CPU, tmp_path / "a", options=EXACT)
    with pytest.raises(StaleArtifactError, match="another network"):
        build(network, ranges, CPU, tmp_path / "b", options=EXACT, calibration=calibration_set(other, feeds))
    with pytest.raises(CalibrationError, match="NNCF"):
        build(network, ranges, CPU, tmp_path / "c", options=BuildOptions(quantizer="nncf"))
    with pytest.raises(UsageError, match="ort-entropy"):
        build(network, "ort-entropy", CPU, tmp_path / "d", options=EXACT)


def test_npu_engines_have_a_fixed_batch(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    made = build(network, ranges, NPU, tmp_path, options=EXACT)
    one = runner(made.path, NPU)
    assert one.fixed_batch == 1
    x = noise((3, 3, 16, 16))
    wanted = np.concatenate([one.run({"x": x[place : place + 1]})["logits"] for place in range(3)])
    np.testing.assert_array_equal(one.run({"x": x})["logits"], wanted)  # larger batches sample by sample
    with pytest.raises(EngineError, match="shape"):
        one.run({"x": noise((3, 4, 16, 16))})


def test_a_changed_engine_is_noticed(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    build(network, ranges, CPU, tmp_path / CPU.name, options=EXACT)
    opened = open_engine(tmp_path, CPU.name)
    assert opened.weights_path == tmp_path / CPU.name / "engine.bin"
    with (tmp_path / CPU.name / "engine.bin").open("r+b") as file:
        file.write(b"\x01\x02\x03")
    with pytest.raises(StaleArtifactError, match=r"engine\.bin|changed"):
        open_engine(tmp_path, CPU.name)


def test_networks_that_openvino_does_not_read_are_refused_by_name() -> None:
    graph = helper.make_graph(
        [helper.make_node("Mystery", ["x"], ["y"], "odd_node", domain="com.nobody")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.nobody", 1)]
    with pytest.raises(EngineError, match=r"com\.nobody\.Mystery"):
        convert(Graph(helper.make_model(graph, opset_imports=opsets)))


def test_a_reader_sees_the_old_pair_or_the_new_pair(engine: Engine, tmp_path: Path) -> None:
    model = read(engine.path)
    save(model, tmp_path / "e.xml")
    assert {file.name for file in tmp_path.iterdir()} == {"e.xml", "e.bin"}
    before = (tmp_path / "e.xml").read_bytes()
    save(model, tmp_path / "e.xml")
    assert (tmp_path / "e.xml").read_bytes() == before


def test_sums_inside_convolutions_are_not_rounded_before(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Rounding both operands of a sum gives a graph that OpenVINO does not compute; leaving one out gives one that it does."""
    folded = network.folded().graph
    both = insert_qdq(
        folded,
        dict(ranges),
        activation=CPU.activation,
        weight=CPU.weight,
        rules=PlacementRules(residual="both", bias="float"),
    )
    lean, sums = drop_merged_pairs(both)
    adds = [node.name for node in folded if node.op_type == "Add"]
    assert list(sums) == adds
    assert drop_merged_pairs(lean) == (lean, ())
    assert len(read_qdq(both)) - len(read_qdq(lean)) == len(sums)
    # measured, so that this module goes when OpenVINO changes its mind
    errors = []
    for name, graph in (("both", both), ("lean", lean)):
        save(convert(graph), tmp_path / f"{name}.xml")
        got = runner(tmp_path / f"{name}.xml", CPU).run(feeds)["logits"]
        wanted = twin_outputs(graph, feeds)["logits"]
        errors.append(np.abs(got - wanted).mean() / lsb(wanted))
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize(
    "name", ["resnet20_cifar10", "mlperf_tiny_resnet8_cifar10", "mlperf_tiny_mobilenet_v1_025_vww"]
)
def test_real_networks_compute_what_their_graphs_say(name: str, assets: Path, tmp_path: Path) -> None:
    assert name in ASSET_NETWORKS
    model, feeds = asset_model(assets, name)
    made = get_backend(CPU).build(model, ranges_of(model, feeds), CPU, tmp_path, options=EXACT)
    (output,) = (spec.name for spec in model.outputs)
    got, wanted = runner(made.path, CPU).run(feeds)[output], twin_outputs(made, feeds)[output]
    assert (np.abs(got - wanted) <= 2 * lsb(wanted)).mean() >= 0.995
    assert (got.argmax(-1) == wanted.argmax(-1)).all()
    records = runner(made.path, CPU).kernels({key: value[:1] for key, value in feeds.items()})
    assert sum(record.macs for record in records if record.integer) == sum(record.macs for record in records) > 0


@pytest.mark.slow
def test_what_nncf_wrote_is_the_engine_or_is_settled(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    images = calibration_set(network, feeds)
    free = BuildOptions(quantizer="nncf")
    kept = build(network, ranges, CPU, tmp_path / "kept", options=free, calibration=images)
    assert kept.vendor_path == tmp_path / "kept" / "vendor.xml"
    assert kept.choices["corrects_biases"]
    got = runner(kept.path, CPU).run(feeds)["logits"]
    np.testing.assert_array_equal(got, runner(kept.vendor_path, CPU).run(feeds)["logits"])
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    assert {"vendor", "vendor_weights"} <= manifest.keys()

    settled = build(
        network, ranges, CPU, tmp_path / "settled", options=free.with_(exact_scales=True), calibration=images
    )
    # the design was remembered: NNCF's files are the same, and only what was done with them differs
    assert digest_file(settled.vendor_path) == digest_file(kept.vendor_path)
    assert not settled.choices["corrects_biases"]  # its weights were rounded again
    wanted = twin_outputs(settled, feeds)["logits"]
    assert np.abs(runner(settled.path, CPU).run(feeds)["logits"] - wanted).max() < 2 * lsb(wanted)
