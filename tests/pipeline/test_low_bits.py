"""Engines of few bits through the whole job: codes are put into the target's graph, and the runtime computes what that graph says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.errors import UsageError
from zsq_deploy.model import Graph, load_model
from zsq_deploy.model.twin import Twin
from zsq_deploy.pipeline import make_images
from zsq_deploy.pipeline.deploy import images_and_ranges, load_recipe_model
from zsq_deploy.pipeline.engines import build_engine, settings_of
from zsq_deploy.pipeline.stages import quantize_only
from zsq_deploy.progress import SILENT
from zsq_deploy.quant.reader import read_qdq
from zsq_deploy.quant.reconstruct import PRESETS, Preset
from zsq_deploy.quant.reconstruct.checkpoint import Checkpoints
from zsq_deploy.recipe import Recipe
from zsq_deploy.verify import prove

BRIEF = Preset("brief", steps=12, batch=8, rounding_lr=5e-2, weight_scale_lr=1e-2, relative=True)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setitem(PRESETS, "brief", BRIEF)


def save(path, nodes, arrays):
    """A network of images 3 x 8 x 8 with four classes."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", 4))],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A stem, a residual block, a depthwise convolution with ReLU6, padding of channels as shortcut, and a classifier."""
    rng = np.random.default_rng(0)
    arrays = {
        "w0": rng.normal(size=(8, 3, 3, 3)) / 4, "b0": rng.normal(size=8) / 4,
        "w1": rng.normal(size=(8, 8, 3, 3)) / 7, "b1": rng.normal(size=8) / 4,
        "w2": rng.normal(size=(8, 8, 3, 3)) / 7, "b2": rng.normal(size=8) / 4,
        "w3": rng.normal(size=(8, 1, 3, 3)) / 2, "b3": rng.normal(size=8) / 4,
        "w4": rng.normal(size=(12, 8, 1, 1)) / 2, "b4": rng.normal(size=12) / 4,
        "fc": rng.normal(size=(12, 4)), "fb": rng.normal(size=4) / 4, "zero": np.array(0.0), "six": np.array(6.0),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="stem", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], name="relu0"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], name="one", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="two", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r0"], ["s"], name="sum"),
        helper.make_node("Relu", ["s"], ["r2"], name="relu2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], name="depthwise", pads=[1] * 4, group=8),
        helper.make_node("Clip", ["c3", "zero", "six"], ["r3"], name="relu6"),
        helper.make_node("Conv", ["r3", "w4", "b4"], ["c4"], name="point"),
        helper.make_node("Relu", ["c4"], ["r4"], name="relu4"),
        helper.make_node("GlobalAveragePool", ["r4"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "fc", "fb"], ["logits"], name="head"),
    ]
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    save(path, nodes, arrays)
    make_images(load_model(path), method="gaussian", images=24, holdout=8, seed=0).calibration.save(path.parent / "set")
    return path


def recipe_of(source, target, **quantization):
    if target.startswith("openvino"):
        pytest.importorskip("openvino")
    values = {
        "model": {"source": str(source)},
        "calibration": {"set": str(source.parent / "set"), "holdout": 4},
        "quantization": {"search": False, "reconstruct_preset": "brief", **quantization},
        "targets": [target],
    }
    return Recipe.of(values).resolved()


def fresh(n=16):
    return np.random.default_rng(7).normal(size=(n, 3, 8, 8)).astype(np.float32)


def reference(engine, x):
    """The float64 twin of the Q/DQ graph."""
    with torch.no_grad():
        twin = Twin(Graph.load(engine.qdq_path), dtype=torch.float64)
        return twin.run({"x": torch.tensor(x, dtype=torch.float64)})["logits"].numpy()


CASES = [
    (target, *case)
    for target in ("ort-x86-vnni", "openvino-cpu")
    for case in (
        ("w8a8", "learned", "ends-8bit"),
        ("w4a8", "nearest", "ends-8bit"),
        ("w4a8", "squant", "all-layers"),
        ("w4a8", "moments", "ends-8bit"),
        ("w8a8", "moments", "all-layers"),
        ("w4a8", "learned", "ends-8bit"),
        ("w4a4", "learned", "ends-8bit"),
        ("w2a3", "nearest", "all-layers"),
    )
]


@pytest.mark.parametrize(("target", "bits", "rounding", "protocol"), CASES)
def test_the_engine_is_its_graph_in_integer_kernels_with_narrow_weights(
    source, tmp_path, target, bits, rounding, protocol
):
    recipe = recipe_of(source, target, bits=bits, rounding=rounding, protocol=protocol)
    (engine,) = quantize_only(recipe, tmp_path / "out").values()
    backend, x = get_backend(engine.target), fresh()
    runner = backend.runner(engine.path, engine.target)
    wanted = reference(engine, x)
    np.testing.assert_allclose(runner.run({"x": x})["logits"], wanted, atol=1e-4 * np.abs(wanted).max())
    proof = [kernel for kernel in runner.kernels({"x": x[:1]}) if kernel.macs]
    assert len(proof) == 6
    assert all(kernel.integer for kernel in proof), proof
    assert prove(proof).macs_share == 1.0

    qdq = Graph.load(engine.qdq_path)
    weights = {t.name.removesuffix("_quantized"): t for t in read_qdq(qdq) if t.is_weight and not t.is_bias}
    few, ends = int(bits[1]), {"w0", "fc"} if protocol == "ends-8bit" else set()
    for name in ("w0", "w1", "w2", "w3", "w4", "fc"):
        found = next(t for key, t in weights.items() if key.startswith(name))
        assert found.dtype == ("int8" if name in ends or few > 4 else "int4")
        codes = qdq.constant(found.codes).astype(int)
        assert len(np.unique(codes)) <= 2 ** (8 if name in ends else few)
    if target.startswith("ort") and few <= 4:
        stored = {t.name: t.data_type for t in onnx.load(engine.path).graph.initializer}
        assert sum(kind == TensorProto.INT4 for kind in stored.values()) == 6 - len(ends)
    assert engine.choices["low_bits"]["weights_by_bits"] == (
        {"8": 6} if few == 8 else {str(few): 6 - len(ends), **({"8": len(ends)} if ends else {})}
    )
    assert engine.choices["low_bits"]["rounding"] == rounding

    activations = int(bits[3])
    sites = {t.name: t for t in read_qdq(qdq) if not t.is_weight}
    with torch.no_grad():
        values = Twin(qdq, dtype=torch.float64).run(
            {"x": torch.tensor(x, dtype=torch.float64)}, fetch=[t.output for t in sites.values()]
        )
    counts = {name: len(np.unique(values[t.output].numpy())) for name, t in sites.items()}
    inner = [count for name, count in counts.items() if name.startswith(("r1", "r3"))]
    assert inner
    assert max(inner) <= 2**activations


@pytest.mark.parametrize("target", ["ort-x86-vnni", "openvino-cpu"])
def test_4_bit_files_are_half_as_large_and_learning_beats_rounding(tmp_path, target, source):
    """On a network whose weights outweigh everything else; the error is that of the outputs on images that nothing saw."""
    if target.startswith("openvino"):
        pytest.importorskip("openvino")
    rng = np.random.default_rng(1)
    shapes = {"w0": (32, 3, 3, 3), "w1": (96, 32, 3, 3), "w2": (96, 96, 3, 3), "fc": (96, 4)}
    arrays = {name: rng.normal(size=s) / np.sqrt(np.prod(s) / s[0]) * 1.4 for name, s in shapes.items()}
    nodes = []
    x = "x"
    for i, stride in enumerate((2, 2, 1)):
        nodes += [
            helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[1] * 4, strides=[stride] * 2),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
        x = f"r{i}"
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "fc"], ["logits"], name="head"),
    ]
    path = tmp_path / "net.onnx"
    save(path, nodes, arrays)
    model = load_model(path)
    make_images(model, method="gaussian", images=40, holdout=8, seed=0).calibration.save(tmp_path / "set")
    x = fresh(32)
    with torch.no_grad():
        wanted = Twin(model.folded().graph).run({"x": torch.tensor(x)})["logits"].numpy()
    sizes, errors = {}, {}
    for bits, rounding in (("w8a8", "nearest"), ("w3a8", "nearest"), ("w3a8", "moments"), ("w3a8", "learned")):
        recipe = recipe_of(path, target, bits=bits, rounding=rounding, bias_correction=False)
        (engine,) = quantize_only(recipe, tmp_path / f"{bits}-{rounding}").values()
        sizes[bits] = engine.bytes
        got = get_backend(engine.target).runner(engine.path, engine.target).run({"x": x})["logits"]
        errors[rounding, bits] = float(np.square(got - wanted).mean())
    inner = sum(np.prod(shapes[name]) for name in ("w1", "w2"))
    assert sizes["w8a8"] - sizes["w3a8"] > 0.45 * inner
    assert errors["learned", "w3a8"] < errors["nearest", "w3a8"]
    assert errors["moments", "w3a8"] < errors["nearest", "w3a8"]


SIZES = {"w0": 216, "w1": 576, "w2": 576, "w3": 72, "w4": 96, "fc": 48}
"""Weights of the layers, in bytes of 8 bits; all but the ends may have 4: 924 bytes of 1,584 then."""


@pytest.mark.parametrize("target", ["ort-x86-vnni", "openvino-cpu"])
@pytest.mark.parametrize(("budget", "few"), [(0.59, {"w1", "w2", "w3", "w4"}), (0.8, None), (1.0, set())])
def test_a_size_budget_gives_8_bits_to_some_layers_and_is_kept(source, tmp_path, target, budget, few):
    recipe = recipe_of(source, target, bits="w4a8", size_budget=budget)
    (engine,) = quantize_only(recipe, tmp_path / "out").values()
    qdq = Graph.load(engine.qdq_path)
    weights = {t.name.removesuffix("_quantized"): t.dtype for t in read_qdq(qdq) if t.is_weight and not t.is_bias}
    kinds = {name: next(kind for key, kind in weights.items() if key.startswith(name)) for name in SIZES}
    assert sum(size if kinds[name] == "int8" else size // 2 for name, size in SIZES.items()) <= budget * 1584
    found = {name for name, kind in kinds.items() if kind == "int4"}
    if few is None:
        assert found & {"w1", "w2"}  # 0.8 cannot be kept without one of the two large ones
        assert len(found) < 4
    else:
        assert found == few
    assert engine.choices["low_bits"]["description"].startswith("mixed bits (")
    x = fresh()
    wanted = reference(engine, x)
    got = get_backend(engine.target).runner(engine.path, engine.target).run({"x": x})["logits"]
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_size_budget_that_cannot_be_kept_says_which_could(source, tmp_path):
    with pytest.raises(UsageError, match=r"at least 0\.584") as refused:
        quantize_only(recipe_of(source, "ort-x86-vnni", bits="w4a8", size_budget=0.5), tmp_path / "out")
    assert "--size-budget" in str(refused.value)


def test_an_interrupted_run_goes_on_and_gives_the_same_engine(source, tmp_path, monkeypatch):
    recipe = recipe_of(source, "ort-x86-vnni", bits="w4a4", rounding="learned")
    quantize_only(recipe, tmp_path / "whole")
    assert not (tmp_path / "whole" / ".learned").exists()
    saved: list[int] = []
    save = Checkpoints.save

    def watched(self, number, *args):
        save(self, number, *args)
        saved.append(number)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", watched)
    with pytest.raises(KeyboardInterrupt):
        quantize_only(recipe, tmp_path / "cut")
    assert len(list((tmp_path / "cut" / ".learned").rglob("block-*.npz"))) == 3
    quantize_only(recipe, tmp_path / "cut", resume=True)
    assert len(set(saved)) == len(saved) > 3  # the finished ones were not learned again
    for name in ("engine.onnx", "qdq.onnx"):
        files = [folder / "ort-x86-vnni" / name for folder in (tmp_path / "whole", tmp_path / "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "cut" / ".learned").exists()


def test_the_report_says_what_few_bits_are_worth(source, tmp_path):
    target = get_target("ort-x86-vnni")
    for bits, words in (("w4a4", "saves space, not time"), ("w4a8", "save space, not time")):
        recipe = recipe_of(source, target.name, bits=bits)
        model = load_recipe_model(recipe)
        images, measured = images_and_ranges(tmp_path, model, recipe, resume=False, progress=SILENT)
        built = build_engine(model, images, measured, target, tmp_path / bits, settings_of(recipe))
        assert any(words in note for note in built.notes)
        assert any(note.startswith(f"{bits} ends-8bit: ") and "rounded to nearest" in note for note in built.notes)


def test_corrected_biases_are_added_to_those_of_the_numbers(source, tmp_path):
    """Means of the outputs are those of the float network, within a step of the biases' noise, once biases are corrected."""
    model = load_model(source)
    with torch.no_grad():
        x = next(CalibrationSet.open(source.parent / "set").batches(24))["x"]
        wanted = Twin(model.folded().graph).run({"x": torch.tensor(x)})["logits"].numpy().mean(0)
    far = {}
    for corrected in (False, True):
        recipe = recipe_of(source, "ort-x86-vnni", bits="w3a8", rounding="nearest", bias_correction=corrected)
        (engine,) = quantize_only(recipe, tmp_path / str(corrected)).values()
        got = get_backend(engine.target).runner(engine.path, engine.target).run({"x": x})["logits"].mean(0)
        far[corrected] = float(np.abs(got - wanted).max())
    assert far[True] < 0.6 * far[False]


@pytest.mark.parametrize(
    ("target", "said", "words"),
    [
        ("tensorrt-10", {"rounding": "learned"}, "not learned for TensorRT"),
        ("tensorrt-10", {"rounding": "moments"}, "nor done by moments"),
        ("openvino-cpu", {"quantizer": "nncf", "bits": "w4a4"}, "NNCF does not build"),
        ("openvino-cpu", {"quantizer": "nncf", "rounding": "learned"}, "NNCF and POT round"),
        ("openvino-cpu", {"bits": "w4a32", "rounding": "learned"}, "NNCF and POT round"),
    ],
)
def test_what_nobody_builds_is_refused(source, target, said, words):
    if target.startswith("openvino"):
        pytest.importorskip("openvino")
    recipe = recipe_of(source, target, **said)
    with pytest.raises(UsageError, match=words):
        get_backend(target).options_from(settings_of(recipe), get_target(target))
    assert Path(source).exists()
