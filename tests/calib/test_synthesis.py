"""Synthesis end to end on small networks: the loss against a hooked torch module, exact resumption, bad use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts import native
from zsq_deploy.calib.parts.engine import Objective
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.priors import NATURAL_MEAN, NATURAL_STD, InputSpace
from zsq_deploy.calib.parts.sizing import batch_sizes
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import CalibrationError, InterruptedRunError, StaleArtifactError, UsageError
from zsq_deploy.model import Graph, Model, Preprocess, TensorSpec, load_model
from zsq_deploy.progress import Silent, Task

NORMALISED = Preprocess(mean=NATURAL_MEAN, std=NATURAL_STD)


def normed(channels: int, *, dead: bool = False, offset: float = 0.5) -> nn.BatchNorm2d:
    """A batch norm as training leaves it; with `dead` channels, whose scale is (nearly) zero."""
    bn = nn.BatchNorm2d(channels)
    nn.init.normal_(bn.weight, 1.0, 0.3)
    nn.init.normal_(bn.bias, 0.0, offset)
    nn.init.normal_(bn.running_mean, 0.0, 0.5)
    nn.init.uniform_(bn.running_var, 0.3, 2.0)
    if dead:
        with torch.no_grad():
            bn.weight[0], bn.weight[1], bn.running_var[2] = 0.0, 1e-9, 0.0
    return bn


class Everything(nn.Module):
    """Residual, depthwise, Relu6, strided, a concatenation with a batch norm behind it, dead channels, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn_stem = nn.Conv2d(3, 8, 3, padding=1, bias=False), normed(8)
        self.depthwise, self.bn_depthwise = (
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),
            normed(8, dead=True),
        )
        self.point, self.bn_point = nn.Conv2d(8, 12, 1), normed(12)
        self.inner, self.bn_inner = nn.Conv2d(12, 12, 3, padding=1, bias=False), normed(12)
        self.side = nn.Conv2d(12, 4, 3, padding=1)  # a convolution without batch norm
        self.bn_concat = normed(16)  # behind a concatenation: cannot be folded
        self.last, self.bn_last = nn.Conv2d(16, 10, 3, stride=2, padding=1), normed(10)
        self.classes, self.boxes = nn.Linear(10, 5), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.bn_stem(self.stem(x)))
        x = F.relu6(self.bn_depthwise(self.depthwise(x)))
        x = F.relu(self.bn_point(self.point(x)))
        x = F.relu(self.bn_inner(self.inner(x)) + x)
        x = torch.cat([x, self.side(x)], 1)
        x = self.last(F.relu(self.bn_concat(x)))
        x = F.relu(self.bn_last(x)).mean((2, 3))
        return self.classes(x), self.boxes(x)


@pytest.fixture(scope="module")
def everything() -> tuple[nn.Module, Model]:
    torch.manual_seed(4)
    module = Everything().eval()
    return module, load_model(module, input_shape=(1, 3, 16, 12), preprocess=NORMALISED, name="everything")


def small(
    preprocess: Preprocess = NORMALISED, channels: int = 3, shape: tuple[int, int] = (12, 10), batch: object = "N"
) -> Model:
    """Three convolutions with batch norm, made by hand so that tests stay quick; its statistics are those of smooth pictures."""
    generator, random = torch.Generator().manual_seed(7), np.random.default_rng(7)
    spec = TensorSpec("image", (None, channels, *shape), np.dtype(np.float32))
    pictures = F.interpolate(torch.randn(64, channels, 4, 4, generator=generator), size=shape, mode="bilinear")
    x = InputSpace.of(spec, preprocess).to_network(pictures)
    nodes, constants, value = [], [], "image"
    for number, (before, after, stride) in enumerate([(channels, 8, 1), (8, 8, 2), (8, 6, 1)]):
        weight = torch.randn(after, before, 3, 3, generator=generator) * 0.25
        x = F.conv2d(x, weight, stride=stride, padding=1)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        gamma, beta = random.uniform(0.5, 1.5, after), random.normal(0, 0.3, after)
        parts = {"w": weight.numpy(), "g": gamma, "b": beta, "m": mean.numpy(), "v": var.numpy()}
        x = F.relu(F.batch_norm(x, mean, var, torch.as_tensor(gamma).float(), torch.as_tensor(beta).float()))
        constants += [numpy_helper.from_array(v.astype(np.float32), f"{k}{number}") for k, v in parts.items()]
        norm = [f"z{number}", *(f"{k}{number}" for k in "gbmv")]
        window = {"pads": [1] * 4, "strides": [stride] * 2}
        nodes += [
            helper.make_node("Conv", [value, f"w{number}"], [f"z{number}"], f"conv{number}", **window),
            helper.make_node("BatchNormalization", norm, [f"y{number}"], f"bn{number}"),
            helper.make_node("Relu", [f"y{number}"], [f"r{number}"], f"relu{number}"),
        ]
        value = f"r{number}"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["out"], "pool"))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [batch, channels, *shape])],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [batch, 6, 1, 1])],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Model(Graph(proto), preprocess, "small", "small.onnx", batch == "N")


def eager(method: str, module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The method's loss as its paper's code has it: hooked batch-norm inputs, torch.var, plain layout."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [norm.register_forward_pre_hook(lambda part, given: seen.__setitem__(part, given[0])) for norm in norms]
    module(images)
    for hook in hooks:
        hook.remove()
    axes = (2, 3) if method == "zeroq" else (0, 2, 3)
    prior = images.mean((2, 3)).square().sum() + ((images.var((2, 3)) + 1e-6).sqrt() - 1).square().sum()
    total = prior / len(images) if method == "zeroq" else prior
    for norm in norms:
        z = seen[norm]
        mean, std = z.mean(axes), (z.var(axes) + 1e-6).sqrt()
        gap = (mean - norm.running_mean).square().sum() + (std - (norm.running_var + 1e-6).sqrt()).square().sum()
        total = total + gap / z.shape[1]
    return total


def objective(
    method: str, model: Model, *, fast: bool, dtype: torch.dtype = torch.float32, piece: int | None = None
) -> Objective:
    chosen = METHODS[method]
    assert chosen.run is not None
    recipe = chosen.run({**chosen.defaults, "clip": False, **({"swing": 0} if method == "genie" else {})})
    space = InputSpace(None, None, None, None, None, None)
    return Objective(
        recipe, prepare(model, fast=fast), model.inputs[0], space, device=torch.device("cpu"), dtype=dtype, piece=piece
    )


@pytest.mark.parametrize("method", ["zeroq", "genie"])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("piece", [None, 2])
def test_loss_and_gradient_are_the_eager_ones(
    everything: tuple[nn.Module, Model], method: str, fast: bool, piece: int | None
) -> None:
    module, model = everything
    noise = torch.randn(5, 3, 16, 12, generator=torch.Generator().manual_seed(1))
    for dtype, loss_error, gradient_error in ((torch.float64, 1e-6, 1e-5), (torch.float32, 1e-4, 1e-3)):
        ours = objective(method, model, fast=fast, dtype=dtype, piece=piece)
        x = noise.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        value = ours.backward(x)["loss"]
        y = noise.double().requires_grad_()
        expected = eager(method, module.double(), y)
        expected.backward()
        module.float()
        assert value == pytest.approx(expected.item(), rel=loss_error)
        distance = (x.grad.double() - y.grad).norm() / y.grad.norm()
        assert float(distance) < gradient_error


def test_every_layer_is_watched_where_it_can_be(everything: tuple[nn.Module, Model]) -> None:
    network = prepare(everything[1])
    assert len(network.layers) == 6
    assert len(network.affine) == 6
    assert len(network.bounds) == 6
    assert len(network.joins) == 1  # the inner one goes into a sum
    assert {node.op_type for node in network.graph}.isdisjoint({"BatchNormalization", "Relu", "Clip", "Add"})
    only_conv = prepare(everything[1], hook="conv_out")
    assert len(only_conv.affine) == 5  # the one behind the concatenation stays
    plain = prepare(everything[1], fast=False)
    assert (len(plain.affine), len(plain.bounds), len(plain.joins)) == (0, 0, 0)
    assert len(prepare(everything[1], swing=True).edges) == 2


class Recorder(Silent):
    """Counts steps, and interrupts where it is told to."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.steps, self.said, self.values = at, 0.0, list[str](), list[dict]()

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        outer = self

        class Counting:
            def advance(self, steps: float = 1, **values: float | str) -> None:
                outer.steps += steps
                if values:
                    outer.values.append(values)
                if outer.at is not None and len(outer.values) == outer.at:
                    raise KeyboardInterrupt

        self.total = total
        yield Counting()

    def say(self, message: str) -> None:
        self.said.append(message)


QUICK = {"zeroq": {"steps": 9}, "genie": {"steps": 9, "latent": 16}}


@pytest.mark.parametrize("method", ["zeroq", "genie"])
def test_same_seed_same_bits(method: str) -> None:
    model = small()
    sets = [
        synthesize(model, method=method, images=6, batch_size=3, seed=seed, device="cpu", parameters=QUICK[method])
        for seed in (3, 3, 4)
    ]
    assert sets[0].digest == sets[1].digest
    assert sets[0].digest != sets[2].digest
    assert not np.array_equal(sets[0].arrays()["image"][:3], sets[0].arrays()["image"][3:])


@pytest.mark.parametrize("method", ["zeroq", "genie"])
def test_a_batch_does_not_depend_on_the_others(method: str) -> None:
    model, common = small(), {"method": method, "batch_size": 4, "parameters": QUICK[method], "device": "cpu"}
    few, many = (synthesize(model, images=count, **common).arrays()["image"] for count in (4, 12))
    assert np.array_equal(few, many[:4])


@settings(max_examples=8, deadline=None)
@given(at=st.integers(1, 18), method=st.sampled_from(["zeroq", "genie"]))
def test_an_interrupted_run_goes_on_exactly(at: int, method: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, folder = small(), tmp_path_factory.mktemp("state")
    common = {"method": method, "images": 6, "batch_size": 3, "parameters": QUICK[method], "device": "cpu"}
    whole = synthesize(model, **common)
    with pytest.raises(InterruptedRunError, match="--resume") as caught:
        synthesize(model, workdir=folder, progress=Recorder(at), **common)
    assert caught.value.exit_code == 130
    again = Recorder()
    resumed = synthesize(model, workdir=folder, resume=True, progress=again, **common)
    assert resumed.digest == whole.digest
    assert resumed.manifest.parameters == whole.manifest.parameters
    assert len(again.values) == 18 - at  # nothing was computed twice
    assert again.steps == again.total == 18
    assert not list(folder.glob("*"))


_CHILD = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
import zsq_deploy.calib.running as running
import zsq_deploy.calib.synthesis as synthesis
from zsq_deploy.errors import InterruptedRunError
from zsq_deploy.model import load_model
from zsq_deploy.progress import PlainProgress
running._SAVE_EVERY = 0.0
try:
    made = synthesis.synthesize(
        load_model(sys.argv[1]), images=6, batch_size=3, device="cpu", workdir=Path(sys.argv[2]), resume=True,
        parameters={"steps": 300, "stop_patience": 0}, progress=PlainProgress(0.0),
    )
    print("digest", made.digest)
except InterruptedRunError as error:
    print("interrupted", error.exit_code)
"""


@pytest.mark.slow
def test_real_signals(tmp_path: Path) -> None:
    """Ctrl-C ends cleanly between two steps; even SIGKILL leaves a state that is gone on from exactly."""
    file, folder = tmp_path / "small.onnx", tmp_path / "state"
    onnx.save(small().graph.proto, file)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parameters = {"steps": 300, "stop_patience": 0}
    whole = synthesize(load_model(file), images=6, batch_size=3, device="cpu", parameters=parameters)
    torch.set_num_threads(threads)

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(file), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def let_run(child: subprocess.Popen, lines: int) -> None:
        assert child.stderr is not None
        seen = 0
        for line in child.stderr:
            seen += "loss" in line
            if seen == lines:
                return

    child = start()
    let_run(child, 40)
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=120)
    assert out.strip() == "interrupted 130", errors
    child = start()
    let_run(child, 330)  # into the second batch
    child.kill()
    child.communicate(timeout=120)
    out, errors = start().communicate(timeout=240)
    assert out.strip() == f"digest {whole.digest}", errors


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    common = {"images": 4, "parameters": {"steps": 5}, "device": "cpu", "workdir": tmp_path}
    with pytest.raises(InterruptedRunError):
        synthesize(small(), seed=0, progress=Recorder(3), **common)
    with pytest.raises(StaleArtifactError, match="seed"):
        synthesize(small(), seed=1, resume=True, **common)
    with pytest.raises(StaleArtifactError, match="model"):
        synthesize(small(shape=(8, 8)), seed=0, resume=True, **common)
    (tmp_path / "current-00000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(Exception, match="damaged"):
        synthesize(small(), seed=0, resume=True, **common)
    assert len(synthesize(small(), seed=1, **common)) == 4  # without --resume it starts over


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plain operators do the same; a run that began with the loops does not go on without them, because bits differ."""
    common = {"images": 4, "parameters": {"steps": 5}, "device": "cpu", "workdir": tmp_path}
    with pytest.raises(InterruptedRunError):
        synthesize(small(), progress=Recorder(3), **common)
    began = native.kernels() is not None
    monkeypatch.setattr(native, "kernels", lambda: None)
    recorder = Recorder()
    if began:
        with pytest.raises(StaleArtifactError, match="native_loops"):
            synthesize(small(), resume=True, **common)
    made = synthesize(small(), progress=recorder, **common)
    assert any("no C compiler" in message for message in recorder.said)
    assert made.manifest.parameters["outcome"]["native_loops"] is False


def test_interrupted_without_a_folder_says_so() -> None:
    with pytest.raises(InterruptedRunError, match="no folder"):
        synthesize(small(), images=4, device="cpu", progress=Recorder(2))


@pytest.mark.parametrize("method", ["zeroq", "genie"])
@pytest.mark.parametrize(
    ("preprocess", "channels"),
    [(NORMALISED, 3), (Preprocess(raw_pixels=True), 3), (Preprocess(), 1), (Preprocess(mean=(0.5,), std=(0.5,)), 1)],
)
def test_distance_falls_and_images_are_valid(method: str, preprocess: Preprocess, channels: int) -> None:
    model = small(preprocess, channels, (11, 18))
    parameters = {"steps": 60, "stop_patience": 0}
    made = synthesize(model, method=method, images=5, device="cpu", parameters=parameters)
    images = made.arrays()["image"]
    assert images.shape == (5, channels, 11, 18)
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    low, high = (np.asarray(side).reshape(1, -1, 1, 1) for side in preprocess.bounds(channels))
    assert (images >= low).all()
    assert (images <= high).all()
    outcome = made.manifest.parameters["outcome"]
    assert outcome["last"][0]["loss"] < 0.5 * outcome["first"][0]["loss"]
    assert made.manifest.seconds > 0
    assert made.manifest.peak_rss_bytes > 1e7
    assert any("batch-norm distance" in note for note in made.manifest.notes)
    json.dumps(made.manifest.parameters, allow_nan=False)


def test_early_stop_is_reported() -> None:
    made = synthesize(
        small(), images=4, device="cpu", parameters={"steps": 500, "stop_patience": 8, "stop_threshold": 0.05}
    )
    steps = made.manifest.parameters["outcome"]["steps"][0]
    assert steps < 500
    assert any(f"after {steps} to {steps} of at most 500" in note for note in made.manifest.notes)


def test_a_network_without_batch_norm_is_told_so() -> None:
    folded = small().folded().graph
    model = Model(folded, NORMALISED, "folded", "folded.onnx", True)
    recorder = Recorder()
    made = synthesize(model, method="zeroq", images=3, progress=recorder)
    assert made.manifest.method == "fractal"
    assert made.manifest.parameters["requested_method"] == "zeroq"
    assert "no batch-norm statistics" in recorder.said[0]
    assert made.manifest.notes[0] == recorder.said[0]


@pytest.mark.parametrize("method", ["gaussian", "uniform", "ones", "fractal"])
def test_baselines_go_through_the_same_door(method: str) -> None:
    made = synthesize(small(shape=(32, 32)), method=method, images=20, seed=5)
    again = synthesize(small(shape=(32, 32)), method=method, images=20, seed=5)
    assert made.digest == again.digest
    assert made.arrays()["image"].shape == (20, 3, 32, 32)
    assert made.manifest.method == method


def two_inputs() -> Model:
    proto = small().graph.editable()
    proto.graph.input.append(helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, ["N", 6, 1, 1]))
    proto.graph.output[0].name = "sum"
    proto.graph.node.append(helper.make_node("Add", ["out", "other"], ["sum"], "add"))
    return Model(Graph(proto), NORMALISED, "two", "two.onnx", True)


def test_several_inputs_are_refused_with_a_reason_or_drawn() -> None:
    with pytest.raises(CalibrationError, match="2 inputs"):
        synthesize(two_inputs(), images=2)
    arrays = synthesize(two_inputs(), method="gaussian", images=2).arrays()
    assert {name: array.shape for name, array in arrays.items()} == {"image": (2, 3, 12, 10), "other": (2, 6, 1, 1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "zerok"}, "no synthesis method"),
        ({"images": 0}, "0 images"),
        ({"seed": -1}, "negative"),
        ({"batch_size": 0}, "makes no sense"),
        ({"parameters": {"stepz": 1}}, "no parameter 'stepz'"),
        ({"parameters": {"steps": "many"}}, "has to be int"),
        ({"method": "bn-analytic"}, "makes no images"),
        ({"method": "real"}, "makes no images"),
    ],
)
def test_wrong_use_is_named(options: dict, message: str) -> None:
    with pytest.raises((UsageError, CalibrationError), match=message):
        synthesize(small(), **options)


def test_a_loss_that_is_no_number_is_named() -> None:
    proto = small().graph.editable()
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w1")
    weight.CopyFrom(numpy_helper.from_array(np.full((8, 8, 3, 3), 3e38, np.float32), "w1"))
    with pytest.raises(CalibrationError, match="loss became"):
        synthesize(Model(Graph(proto), NORMALISED, "huge", "huge.onnx", True), images=2, device="cpu")


@pytest.mark.parametrize("method", ["zeroq", "genie"])
def test_a_network_with_one_batch_size(method: str) -> None:
    made = synthesize(small(batch=2), method=method, images=5, device="cpu", parameters=QUICK[method])
    assert len(made) == 5
    assert any("batches of 2 only" in note for note in made.manifest.notes) is (method == "genie")


@settings(max_examples=50, deadline=None)
@given(images=st.integers(1, 500), largest=st.integers(1, 200), unit=st.integers(1, 4))
def test_batches_are_even(images: int, largest: int, unit: int) -> None:
    sizes = batch_sizes(images, largest, unit)
    assert images <= sum(sizes) < images + unit
    assert max(sizes) <= max(largest, unit)
    assert max(sizes) - min(sizes) <= unit
    assert all(size % unit == 0 for size in sizes)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["zeroq", "genie"])
def test_cuda_is_deterministic_and_agrees(method: str) -> None:
    made = [synthesize(small(), method=method, images=4, device="cuda", parameters=QUICK[method]) for _ in range(2)]
    assert made[0].digest == made[1].digest
    assert made[0].manifest.device == "cuda"
