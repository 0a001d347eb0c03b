"""POT for real: its own interpreter quantizes a network, and what comes back is loaded, run and compared here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import ValidationData
from zsq_deploy.backends.openvino.convert import convert, read, save
from zsq_deploy.backends.openvino.design import Design
from zsq_deploy.backends.openvino.options import BuildOptions, PotOptions
from zsq_deploy.backends.openvino.pot import route
from zsq_deploy.backends.openvino.pot.environment import check
from zsq_deploy.backends.openvino.pot.route import design_pot
from zsq_deploy.backends.openvino.runtime import core
from zsq_deploy.errors import CalibrationError, EngineError, StaleArtifactError, UsageError
from zsq_deploy.model import Model, Twin
from zsq_deploy.quant.reader import read_qdq

from .ort_engines import asset_model, calibration_set, convnet, loaded

pytestmark = pytest.mark.pot

TARGET = get_target("openvino-cpu")


def images(count: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)


def options(**told: Any) -> BuildOptions:
    return BuildOptions(quantizer="pot", pot=PotOptions(**told))


def outputs(model: Any, x: np.ndarray, **properties: str) -> np.ndarray:
    compiled = core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, **properties}
    )
    return np.array(compiled(x)[0])


def sqnr(got: np.ndarray, want: np.ndarray) -> float:
    return float(10 * np.log10(np.square(want).sum() / max(np.square(got.astype(np.float64) - want).sum(), 1e-30)))


def weight_of(design: Design, layer: str) -> np.ndarray:
    """The float weight of a layer, behind QuantizeLinear and DequantizeLinear."""
    value = design.qdq.node(layer).input[1]
    kinds = []
    while (maker := design.qdq.producer(value)) is not None:
        kinds.append(maker.op_type)
        value = maker.input[0]
    assert kinds in (["DequantizeLinear", "QuantizeLinear"], []), kinds
    weight = design.qdq.constant(value)
    assert weight is not None
    return weight


class Watcher:
    """A progress that can act while POT runs."""

    def __init__(self, act: Callable[[str], None] | None = None) -> None:
        self.act = act
        self.done = 0.0
        self.steps: list[str] = []

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Watcher]:
        assert title.startswith("POT ")
        assert total == 100
        yield self

    def advance(self, steps: float = 1, **values: float | str) -> None:
        assert steps >= 0
        self.done += steps
        self.steps.append(str(values.get("step", "")))
        if self.act is not None:
            self.act(self.steps[-1])

    def say(self, message: str) -> None:
        raise AssertionError(message)


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "worker.py" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(convnet(), tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def made(
    pot_environment: Path, network: Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Design, Path, Watcher]:
    """One real run that most tests look at: 12 images, and one probe that reaches much further than they do."""
    del pot_environment
    folder, watcher = tmp_path_factory.mktemp("pot"), Watcher()
    design = design_pot(
        network,
        calibration_set(network, {"x": images(12)}),
        TARGET,
        options(),
        folder,
        progress=watcher,
        probes={"x": images(1) * 5},
    )
    return design, folder, watcher


def test_the_finished_model_of_pot_runs_here_and_every_convolution_in_integers(
    made: tuple[Design, Path, Watcher], network: Model
) -> None:
    design, folder, watcher = made
    x = images(64, seed=9)
    floats = outputs(convert(network.folded().graph), x)
    assert design.vendor_ir == folder / "vendor.xml"
    assert sqnr(outputs(read(design.vendor_ir), x), floats) > 20
    compiled = core().compile_model(read(design.vendor_ir), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = []
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected"):
            kinds.append(info["primitiveType"].astype(str))
    assert len(kinds) == 7
    assert all(kind.endswith(("_I8", "_i8")) for kind in kinds), kinds  # the depthwise convolution too
    assert sorted(path.name for path in folder.iterdir()) == ["vendor.bin", "vendor.xml"]
    assert watcher.done == pytest.approx(100)
    assert "read the network" in watcher.steps


def test_the_graph_says_what_the_model_computes(made: tuple[Design, Path, Watcher], network: Model) -> None:
    design, _, _ = made
    x = images(32, seed=5)
    assert design.vendor_ir is not None
    reference = outputs(read(design.vendor_ir), x, LP_TRANSFORMS_MODE="NO")
    with torch.no_grad():
        twin = Twin(design.qdq, dtype=torch.float64, device="cpu")(torch.from_numpy(x).double()).numpy()
        single = Twin(design.qdq, dtype=torch.float32, device="cpu")(torch.from_numpy(x)).numpy()
    # Where float32 and float64 round a step apart, so may OpenVINO; where they agree, it gives the same.
    assert sqnr(reference, twin) > sqnr(single, twin) - 3
    assert (np.abs(reference - twin).max(axis=1) < 1e-4).any()
    names = {node.name for node in network.folded().graph.nodes if node.op_type == "Conv"}
    assert names <= {node.name for node in design.qdq.nodes}
    assert design.qdq.inputs[0].shape == network.inputs[0].shape  # any batch


def test_weights_are_still_float_and_biases_are_corrected(made: tuple[Design, Path, Watcher], network: Model) -> None:
    design, _, _ = made
    folded = network.folded().graph
    assert design.corrects_biases
    moved = 0
    for node in design.qdq.nodes:
        if node.op_type != "Conv":
            continue
        weight, original = weight_of(design, node.name), folded.constant(folded.node(node.name).input[1])
        assert original is not None
        np.testing.assert_allclose(weight, original, rtol=1e-6)
        before, after = folded.constant(folded.node(node.name).input[2]), design.qdq.constant(node.input[2])
        assert before is not None
        assert after is not None
        moved += int(np.abs(after.reshape(-1) - before).max() > 0)
    assert moved >= 4


def test_probes_count_for_the_ranges(made: tuple[Design, Path, Watcher]) -> None:
    design, _, _ = made
    peak = float(np.abs(images(1) * 5).max())
    sites = [site for site in read_qdq(design.qdq) if site.name == "x"]
    assert design.record["probes"] == 1
    assert design.record["images"] == 12
    assert len(sites) == 1
    scale = design.qdq.constant(design.qdq.node(sites[0].quantize).input[1])
    assert scale is not None
    assert float(scale) * 255 > peak


def test_what_was_decided_is_written_down(made: tuple[Design, Path, Watcher]) -> None:
    record = made[0].record
    assert record["version"] == "2023.3.0"
    assert record["algorithm"] == "DefaultQuantization"
    assert record["layers_with_8_bit_weights"] == 7
    assert json.loads(json.dumps(record)) == record


def test_layers_go_back_to_float_until_the_drop_is_allowed(
    pot_environment: Path, network: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No drop at all is allowed, in two steps: whatever POT returns to float is float in the graph and named with its reason."""
    del pot_environment
    x = images(8, seed=11)
    wrong = outputs(convert(network.folded().graph), x).argmin(axis=1)  # labels that no step can please
    wrong[:4] = outputs(convert(network.folded().graph), x)[:4].argmax(axis=1)
    monkeypatch.chdir(tmp_path)
    path = Path("pot.json")
    params = {
        "preset": "performance",
        "maximal_drop": 0.0,
        "max_iter_num": 1,
        "ranking_subset_size": 2,
        "saturation_fix": "first_layer",  # halved weights come back whole
    }
    algorithm = {"name": "AccuracyAwareQuantization", "params": params}
    path.write_text(json.dumps({"compression": {"algorithms": [algorithm]}}), encoding="utf-8")
    design = design_pot(
        network,
        calibration_set(network, {"x": images(4)}),
        TARGET,
        options(config_path=path),
        Path("out"),  # relative folders too
        validation=ValidationData([{"x": x[:3]}, {"x": x[3:]}], [wrong[:3], wrong[3:]], "eight images"),
    )
    control = design.record["accuracy_control"]
    assert control["metric"] == "top-1 accuracy on eight images"
    assert control["float"] == pytest.approx(0.5)
    assert any(note.startswith("accuracy control") for note in design.notes)
    assert control["quantized"] is not None
    assert control["max_drop"] == 0.0
    assert weight_of(design, "stem_node") is not None
    np.testing.assert_allclose(
        weight_of(design, "stem_node"), network.folded().graph.constant("stem_w"), rtol=1e-6, atol=1e-7
    )


@pytest.mark.slow
def test_similarity_is_the_metric_where_there_are_no_classes(
    pot_environment: Path, network: Model, tmp_path: Path
) -> None:
    del pot_environment
    proto = network.graph.editable()
    keep = next(node for node in proto.graph.node if node.op_type == "MaxPool")
    del proto.graph.output[:]
    proto.graph.output.append(proto.graph.value_info.add())
    proto.graph.output[0].name = keep.output[0]
    proto.graph.output[0].type.tensor_type.elem_type = 1
    model = loaded(proto, tmp_path)
    design = design_pot(
        model,
        calibration_set(model, {"x": images(4)}),
        TARGET,
        options(
            algorithm="AccuracyAwareQuantization", max_drop=1e-6, config={"max_iter_num": 2, "ranking_subset_size": 2}
        ),
        tmp_path / "out",
    )
    control = design.record["accuracy_control"]
    assert "energy" in control["metric"]
    assert control["float"] == pytest.approx(1.0)
    assert control["quantized"] < 1 - 1e-6
    assert control["returned_to_float"]
    named = set(control["returned_to_float"])
    assert named <= {node.name for node in model.folded().graph.nodes}
    assert control["final"] >= control["quantized"]


# --- what can go wrong -----------------------------------------------------------------------------------------------------


def test_a_missing_or_stale_environment_is_one_clear_error(
    network: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSQ_ENV_DIR", str(tmp_path / "none"))
    with pytest.raises(EngineError, match="not been made yet") as caught:
        design_pot(network, calibration_set(network, {"x": images(2)}), TARGET, options(), tmp_path)
    assert "zsq env create pot" in (caught.value.remedy or "")
    folder = tmp_path / "none" / "pot"
    folder.mkdir(parents=True)
    (folder / "zsq-environment.json").write_text('{"requirements_sha256": "0"}', encoding="utf-8")
    with pytest.raises(StaleArtifactError, match="another list of packages"):
        design_pot(network, calibration_set(network, {"x": images(2)}), TARGET, options(), tmp_path)


def test_what_is_to_stay_in_float_has_to_exist(pot_environment: Path, network: Model, tmp_path: Path) -> None:
    del pot_environment
    inputs = calibration_set(network, {"x": images(2)})
    with pytest.raises(UsageError, match="no node 'stemm'"):
        design_pot(network, inputs, TARGET, options(ignored=("stemm",)), tmp_path)
    path = tmp_path / "pot.json"
    params = {"ignored": {"operations": [{"type": "Convolutionn"}]}}
    path.write_text(
        json.dumps({"compression": {"algorithms": [{"name": "DefaultQuantization", "params": params}]}}),
        encoding="utf-8",
    )
    with pytest.raises(UsageError, match="Convolutionn"):
        design_pot(network, inputs, TARGET, options(config_path=path), tmp_path)


def test_a_set_that_does_not_fit(pot_environment: Path, network: Model, tmp_path: Path) -> None:
    del pot_environment
    with pytest.raises(CalibrationError, match="network has"):
        design_pot(network, calibration_set(network, {"y": images(2)}), TARGET, options(), tmp_path)
    with pytest.raises(CalibrationError, match="shape"):
        design_pot(network, calibration_set(network, {"x": images(2)[:, :2]}), TARGET, options(), tmp_path)


def test_pots_own_words_are_passed_on(pot_environment: Path, network: Model, tmp_path: Path) -> None:
    del pot_environment
    told = options(config={"weights": {"bits": 3}})
    with pytest.raises(EngineError, match=r"^POT stopped: \w+Error.*last message before") as caught:
        design_pot(network, calibration_set(network, {"x": images(2)}), TARGET, told, tmp_path)
    assert "/" not in caught.value.what.split("last message")[0]  # no paths of this machine
    assert not list(tmp_path.iterdir())


def test_a_killed_pot_is_told_apart_and_leaves_nothing(pot_environment: Path, network: Model, tmp_path: Path) -> None:
    del pot_environment

    def kill(step: str) -> None:
        if step == "quantize":
            for process in workers():
                process.kill()

    with pytest.raises(EngineError, match="ended by signal 9") as caught:
        design_pot(
            network, calibration_set(network, {"x": images(2)}), TARGET, options(), tmp_path, progress=Watcher(kill)
        )
    assert "memory" in (caught.value.remedy or "")
    assert not list(tmp_path.iterdir())


def test_an_interruption_ends_pot_as_well(pot_environment: Path, network: Model, tmp_path: Path) -> None:
    del pot_environment

    def interrupt(step: str) -> None:
        if step == "POT starts":
            assert workers()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        design_pot(
            network,
            calibration_set(network, {"x": images(2)}),
            TARGET,
            options(),
            tmp_path,
            progress=Watcher(interrupt),
        )
    assert not workers()
    assert not list(tmp_path.iterdir())


def test_pot_ends_when_whoever_started_it_is_killed(pot_environment: Path, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}", encoding="utf-8")
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([{str(pot_environment)!r}, '-I', {str(route._WORKER)!r}, {str(tmp_path)!r}],\n"
        "    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child.wait(30)


def test_data_free_quantization_of_pot_is_broken(pot_environment: Path, network: Model, tmp_path: Path) -> None:
    """What the docs say of it; our `bn-analytic` ranges stand in."""
    del pot_environment
    save(convert(network.folded().graph), tmp_path / "float.xml")
    np.savez(tmp_path / "images.npz", x=images(2))
    algorithm = {"name": "DataFreeQuantization", "params": {"target_device": "ANY", "preset": "mixed"}}
    job = {"model": "float.xml", "calibration": ["images.npz"], "algorithms": [algorithm]}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    with route._worker(check("pot"), tmp_path, subprocess.DEVNULL) as process:
        assert process.stdout is not None
        events = [json.loads(line) for line in process.stdout]
    assert events[-1]["event"] == "error"
    assert "'CompressedModel' object has no attribute 'get_op_nodes'" in events[-1]["message"]


@pytest.mark.assets
@pytest.mark.slow
def test_a_real_network(pot_environment: Path, assets: Path, tmp_path: Path) -> None:
    del pot_environment
    model, feeds = asset_model(assets, "resnet20_cifar10")
    design = design_pot(model, calibration_set(model, feeds), TARGET, options(), tmp_path)
    data = np.load(assets / "data" / "cifar10_test.npz")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((data["x"][:300] / 255.0 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    floats = outputs(convert(model.folded().graph), x)
    assert design.vendor_ir is not None
    for engine in (read(design.vendor_ir), convert(design.qdq)):
        assert (outputs(engine, x).argmax(1) == floats.argmax(1)).mean() > 0.95
