"""NNCF through our hands: what it is told reaches it, what it made is read back, and what cannot be is said clearly."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import ValidationData
from zsq_deploy.backends.openvino.convert import convert, read
from zsq_deploy.backends.openvino.design import Design
from zsq_deploy.backends.openvino.nncf_accuracy import Metric, read_steps
from zsq_deploy.backends.openvino.nncf_route import Samples, design_nncf, quantize_arguments
from zsq_deploy.backends.openvino.nncf_scope import ignored_operators, operators_of
from zsq_deploy.backends.openvino.options import BuildOptions, NncfOptions
from zsq_deploy.backends.openvino.quiet import load_nncf, quiet
from zsq_deploy.backends.openvino.runtime import core
from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.errors import CalibrationError, EngineError, UsageError
from zsq_deploy.model import Model, Twin
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import read_qdq

from .ort_engines import Builder, asset_model, calibration_set, convnet, loaded, transformer

CPU = get_target("openvino-cpu")
GPU = get_target("openvino-gpu")


def _feeds(count: int = 8, seed: int = 0, size: int = 16) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype(np.float32)}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(convnet(), tmp_path_factory.mktemp("network"))


def _design(model: Model, folder: Path, *, feeds: dict[str, np.ndarray] | None = None, **more: Any) -> Design:
    told = {name: more.pop(name) for name in list(more) if name in NncfOptions.__dataclass_fields__}
    rest = {name: more.pop(name) for name in ("target", "validation", "probes") if name in more}
    options = BuildOptions(quantizer="nncf", nncf=NncfOptions(**told), **more)
    target = rest.pop("target", CPU)
    return design_nncf(model, calibration_set(model, feeds or _feeds()), target, options, folder, **rest)


def _run(ir: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """In float arithmetic: fake-quantization as the IR says it, without low-precision kernels."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "LP_TRANSFORMS_MODE": "NO"}
    return np.asarray(core().compile_model(ir, "CPU", settings)(feeds)[0])


def _twin(graph: Graph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        found = Twin(graph, dtype=torch.float64, device="cpu")(
            *(torch.tensor(v, dtype=torch.float64) for v in feeds.values())
        )
    return np.asarray(found)


def _activation_scales(graph: Graph) -> dict[str, np.ndarray]:
    return {tensor.name: np.atleast_1d(tensor.scale) for tensor in read_qdq(graph) if not tensor.is_weight}


def _quantized_layers(graph: Graph) -> set[str]:
    """Convolutions and matrix products whose weight is behind a DequantizeLinear."""
    found = set()
    for node in graph.nodes:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            maker = graph.producer(node.input[1])
            if maker is not None and maker.op_type == "DequantizeLinear":
                found.add(node.name)
    return found


def test_the_graph_says_what_the_vendors_ir_computes(network: Model, tmp_path: Path) -> None:
    design = _design(network, tmp_path)
    folded = network.folded().graph
    feeds = _feeds(32, 1)
    from_ir = _run(read(tmp_path / "vendor.xml"), feeds)
    from_graph = _twin(design.qdq, feeds)
    floating = _twin(folded, feeds)
    assert design.vendor_ir == tmp_path / "vendor.xml"
    step = np.ptp(floating) / 255
    # Float32 against float64: a value on the edge of two codes may fall on either side.
    assert np.mean(np.abs(from_ir - from_graph) < 2 * step) > 0.995
    assert np.abs(floating - from_graph).max() > 0
    assert 10 * np.log10(np.square(floating).sum() / np.square(floating - from_graph).sum()) > 20
    assert {node.name for node in folded.nodes if node.op_type == "Conv"} <= {node.name for node in design.qdq.nodes}
    assert design.corrects_biases
    assert design.record["bias_correction"] == "full"


def test_weights_stay_float_in_the_graph_and_are_integers_in_the_vendors_ir(network: Model, tmp_path: Path) -> None:
    design = _design(network, tmp_path)
    for node in design.qdq.nodes:
        if node.name in _quantized_layers(design.qdq):
            dequantize = design.qdq.producer(node.input[1])
            assert dequantize is not None
            assert design.qdq.producer(dequantize.input[0]) is not None  # a QuantizeLinear, not an integer initializer
    stored = [op for op in read(tmp_path / "vendor.xml").get_ops() if op.get_type_name() == "Constant"]
    integers = [op for op in stored if op.get_element_type().get_type_name() in ("i8", "u8")]
    assert len(integers) == len(_quantized_layers(design.qdq))
    assert not any(op.get_element_type().get_type_name() == "f16" for op in stored)


def test_equal_builds_give_equal_files(network: Model, tmp_path: Path) -> None:
    first, second = (_design(network, tmp_path / name) for name in "ab")
    assert first.qdq.digest == second.qdq.digest
    for suffix in ("xml", "bin"):
        assert (tmp_path / f"a/vendor.{suffix}").read_bytes() == (tmp_path / f"b/vendor.{suffix}").read_bytes()


def test_ranges_are_minimum_and_maximum_of_all_images_and_probes(network: Model, tmp_path: Path) -> None:
    feeds = _feeds()
    feeds["x"][3, 0, 0, 0], feeds["x"][5, 1, 2, 2] = -9.0, 11.0
    scales = {
        "plain": _activation_scales(_design(network, tmp_path, feeds=feeds).qdq)["x"],
        "mean": _activation_scales(_design(network, tmp_path, feeds=feeds, activations_range="mean_minmax").qdq)["x"],
        "probed": _activation_scales(_design(network, tmp_path, feeds=feeds, probes={"x": feeds["x"] * 2}).qdq)["x"],
    }
    assert scales["plain"] == pytest.approx(20 / 255, rel=0.02)  # the zero point is moved onto a code
    assert scales["probed"] == pytest.approx(40 / 255, rel=0.02)
    assert scales["mean"] < 0.6 * scales["plain"]


def test_one_scale_for_each_activation_unless_asked_otherwise(network: Model, tmp_path: Path) -> None:
    ours = _activation_scales(_design(network, tmp_path).qdq)
    theirs = _activation_scales(_design(network, tmp_path, per_channel_activations=True).qdq)
    assert {scale.size for scale in ours.values()} == {1}
    assert max(scale.size for scale in theirs.values()) == 8  # in front of the depthwise convolution


def test_preset_bias_correction_and_overflow_fix_reach_nncf(network: Model, tmp_path: Path) -> None:
    def codes(design: Design) -> np.ndarray:
        tensor = next(tensor for tensor in read_qdq(design.qdq) if tensor.is_weight and "stem" in tensor.name)
        weight = design.qdq.constant(tensor.name)
        assert weight is not None
        return np.abs(weight / np.reshape(tensor.scale, (-1, 1, 1, 1))).max(axis=(1, 2, 3))

    plain = _design(network, tmp_path)
    assert codes(plain) == pytest.approx(np.full(8, 127.0), abs=1.0)
    assert codes(_design(network, tmp_path, overflow_fix="first_layer_only")) == pytest.approx(
        np.full(8, 63.5), abs=1.0
    )
    assert plain.record["overflow_fix"] == "disable"
    symmetric = _design(network, tmp_path, preset="performance")
    zero_points = {int(np.max(tensor.zero_point)) for tensor in read_qdq(symmetric.qdq) if tensor.name == "x"}
    assert zero_points <= {0, 128}

    def bias(design: Design) -> np.ndarray:
        node = next(node for node in design.qdq.nodes if node.op_type == "Conv" and "res" in node.name)
        value = design.qdq.constant(node.input[2])
        assert value is not None
        return value

    off = _design(network, tmp_path, bias_correction=False)
    fast = _design(network, tmp_path, fast_bias_correction=True)
    float_bias = network.folded().graph.constant(
        next(n for n in network.folded().graph.nodes if "res" in n.name).input[2]
    )
    assert np.array_equal(bias(off), float_bias)
    assert not off.corrects_biases
    assert not np.array_equal(bias(plain), float_bias)
    assert not np.array_equal(bias(plain), bias(fast))
    assert (plain.record["bias_correction"], fast.record["bias_correction"], off.record["bias_correction"]) == (
        "full",
        "fast",
        "off",
    )


def test_another_device_another_default(network: Model, tmp_path: Path) -> None:
    design = _design(network, tmp_path, target=GPU)
    assert design.record["target_device"] == "GPU"
    assert design.record["overflow_fix"] is None
    assert _design(network, tmp_path, target=GPU, target_device="CPU").record["target_device"] == "CPU"


def test_a_subset_of_the_images_is_enough_when_asked_for(network: Model, tmp_path: Path) -> None:
    feeds = _feeds()
    feeds["x"][7, 0, 0, 0] = 40.0
    design = _design(network, tmp_path, feeds=feeds, subset_size=4, probes={"x": feeds["x"][:2]})
    assert (design.record["images"], design.record["probes"]) == (4, 2)
    assert _activation_scales(design.qdq)["x"] < 12 / 255


def test_what_is_ignored_stays_float(network: Model, tmp_path: Path) -> None:
    everything = _quantized_layers(_design(network, tmp_path).qdq)
    name = next(node for node in everything if "left" in node)
    assert everything - _quantized_layers(_design(network, tmp_path, exclude=(name,)).qdq) == {name}
    assert everything - _quantized_layers(_design(network, tmp_path, ignored_names=(name,)).qdq) == {name}
    grouped = everything - _quantized_layers(_design(network, tmp_path, ignored_types=("GroupConvolution",)).qdq)
    assert {node for node in everything if "dw" in node} == grouped
    matched = everything - _quantized_layers(_design(network, tmp_path, ignored_patterns=("(left|right)",)).qdq)
    assert matched == {node for node in everything if "left" in node or "right" in node}
    only = _quantized_layers(_design(network, tmp_path, op_types=("Gemm",)).qdq)
    assert only == {node for node in everything if "logits" in node}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"ignored_names": ("left_nod",)}, ("left_nod", "left_node")),
        ({"ignored_names": ("nothing like it at all",)}, ("nothing like it", "zsq inspect")),
        ({"ignored_types": ("Convolutio",)}, ("Convolutio", "Convolution")),
        ({"ignored_types": ("Quux",)}, ("Quux", "GroupConvolution")),
        ({"ignored_patterns": ("(",)}, ("no regular expression",)),
        ({"ignored_patterns": ("encoder",)}, ("encoder", "zsq inspect")),
    ],
)
def test_what_does_not_exist_is_refused_with_near_names(
    network: Model, tmp_path: Path, told: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        _design(network, tmp_path, **told)
    assert all(word in str(caught.value) for word in words)


def test_a_set_that_does_not_fit_is_refused(network: Model, tmp_path: Path) -> None:
    manifest = CalibrationManifest(method="gaussian")
    cases = {
        "'y'": {"y": np.zeros((2, 3, 16, 16), np.float32)},
        "[3, 16, 15]": {"x": np.zeros((2, 3, 16, 15), np.float32)},
        "float64": {"x": np.zeros((2, 3, 16, 16))},
    }
    for words, arrays in cases.items():
        with pytest.raises(CalibrationError) as caught:
            design_nncf(network, CalibrationSet.from_arrays(arrays, manifest), CPU, BuildOptions(), tmp_path)
        assert words in str(caught.value)
    with pytest.raises(CalibrationError, match="probes"):
        _design(network, tmp_path, probes={"x": np.zeros((2, 3, 8, 8), np.float32)})
    with pytest.raises(CalibrationError, match="none was given"):
        design_nncf(network, None, CPU, BuildOptions(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_with_nothing_to_quantize_is_refused(tmp_path: Path) -> None:
    b = Builder()
    b.node("Softmax", [b.node("Tanh", ["x"], "t")], "y", axis=-1)
    model = loaded(b.model(["n", 3, 16, 16], {"y": ["n", 3, 16, 16]}), tmp_path)
    with pytest.raises(EngineError, match="nothing to quantize"):
        _design(model, tmp_path / "out")


def test_given_weights_and_biases_are_quantized(network: Model, tmp_path: Path) -> None:
    folded = network.folded().graph
    node = next(node for node in folded.nodes if "res" in node.name)
    weight, bias = (folded.constant(name) for name in node.input[1:3])
    assert weight is not None
    assert bias is not None
    design = _design(network, tmp_path, weights={node.input[1]: weight * 3}, biases={node.name: bias + 1})
    given = design.qdq.node(node.name)
    tensor = next(tensor for tensor in read_qdq(design.qdq) if tensor.is_weight and "res" in tensor.name)
    assert np.max(tensor.scale) == pytest.approx(np.abs(weight * 3).max() / 127, rel=0.02)
    assert np.array_equal(np.asarray(design.qdq.constant(given.input[2])).reshape(-1), (bias + 1).reshape(-1))
    assert not design.corrects_biases
    with pytest.raises(UsageError, match="no weight"):
        _design(network, tmp_path, weights={"nothing": weight})


def test_a_transformer(tmp_path: Path) -> None:
    model = loaded(transformer(), tmp_path)
    feeds = {"x": np.random.default_rng(0).standard_normal((8, 5, 8)).astype(np.float32)}
    for kind in (None, "transformer"):
        design = _design(model, tmp_path / "out", feeds=feeds, model_type=kind)
        floating, quantized = (_twin(graph, feeds) for graph in (model.folded().graph, design.qdq))
        assert 10 * np.log10(np.square(floating).sum() / np.square(floating - quantized).sum()) > 15
        assert design.record["model_type"] == kind


def test_every_node_is_traced_to_the_operators_that_compute_it(network: Model) -> None:
    graph = network.folded().graph
    ir = convert(graph)
    parts = operators_of(ir, graph)
    assert set(parts) == {node.name for node in graph.nodes}
    computed = [operator for operators in parts.values() for operator in operators]
    assert len(computed) == len(set(computed))
    kinds = {op.get_friendly_name(): op.get_type_name() for op in ir.get_ops()}
    for node in graph.nodes:
        if node.op_type == "Conv":
            assert sorted(kinds[name] for name in parts[node.name]) in (
                ["Add", "Convolution"],
                ["Add", "GroupConvolution"],
            )
    # A type that only ONNX knows means its nodes; one that OpenVINO knows means its operators.
    assert set(ignored_operators(ir, graph, types=("Gemm",)).operators) == set(parts["logits_node"])
    assert len(ignored_operators(ir, graph, types=("Convolution",)).operators) == 5


# ---------------------------------------------------------------------------------------------------------------------
# accuracy control
# ---------------------------------------------------------------------------------------------------------------------


def _delicate(folder: Path) -> Model:
    """A network with one layer that 8 bits ruin: one channel of its input is huge and of no use, and all the others matter."""
    b = Builder(3)
    w = b.rng.standard_normal((8, 3, 3, 3)) * 0.3
    w[0] *= 4000.0
    x = b.node("Conv", ["x", b.constant("one_w", w), b.constant("one_b", np.zeros(8))], "one", pads=[1] * 4)
    x = b.node("Relu", [x], "one_act")
    w = b.rng.standard_normal((8, 8, 1, 1))
    w[:, 0] = 0.0
    x = b.node("Conv", [x, b.constant("two_w", w), b.constant("two_b", np.zeros(8))], "two", kernel_shape=[1, 1])
    x = b.node("Relu", [x], "two_act")
    x = b.node("Relu", [b.conv(x, "three", 8, 8, 3)], "three_act")
    x = b.node("ReduceMean", [x], "mean", axes=[2, 3], keepdims=0)
    b.gemm(x, "logits", 8, 10)
    return loaded(b.model(["n", 3, 16, 16], {"logits": ["n", 10]}), folder)


def test_layers_that_8_bits_ruin_go_back_to_float_and_the_record_says_why(tmp_path: Path) -> None:
    model = _delicate(tmp_path / "model")
    feeds = _feeds(24, 5)
    validation = ValidationData([{"x": feeds["x"][:16]}, {"x": feeds["x"][16:]}], None, "24 synthetic images")
    plain = _design(model, tmp_path / "a", feeds=feeds)
    design = _design(model, tmp_path / "b", feeds=feeds, validation=validation, accuracy_control=True, max_drop=0.05)
    control = design.record["accuracy_control"]
    assert control["metric"] == "top-1 agreement with the float network on 24 synthetic images"
    assert control["samples"] == 24
    assert control["float"] == 1.0
    assert control["quantized"] < 0.95
    assert control["final"] >= 0.95
    assert control["final"] > control["quantized"]
    assert control["reached"]
    assert any("two" in name for name in control["returned_to_float"])
    assert all(reason for reason in control["returned_to_float"].values())
    assert "two_node" in _quantized_layers(plain.qdq) - _quantized_layers(design.qdq)
    assert any("accuracy control" in note for note in design.notes)
    wanted, got = _twin(model.folded().graph, feeds).argmax(1), _twin(design.qdq, feeds).argmax(1)
    assert np.mean(wanted == got) >= 0.9


def test_the_metric_is_named_for_what_it_is(network: Model) -> None:
    ir = convert(network.folded().graph)
    feeds = _feeds(6, 2)
    floating = core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    wanted = np.asarray(floating(feeds)[0]).argmax(1)
    right = Metric(ir, ValidationData([feeds], [wanted], "labelled images"))
    wrong = Metric(ir, ValidationData([feeds], [(wanted + np.array([0, 1, 1, 0, 0, 0])) % 10], "labelled images"))
    assert right.name == "top-1 accuracy on labelled images"
    assert (right.floating, wrong.floating) == (1.0, pytest.approx(4 / 6))
    assert right(floating, right.items) == (1.0, [1.0] * 6)
    assert wrong(floating, wrong.items) == (pytest.approx(4 / 6), [1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    with pytest.raises(CalibrationError, match="5 labels"):
        Metric(ir, ValidationData([feeds], [wanted[:5]], "labelled images"))
    with pytest.raises(CalibrationError, match="no samples"):
        Metric(ir, ValidationData([], None))


def test_without_classes_the_metric_is_the_energy_of_the_error(tmp_path: Path) -> None:
    b = Builder()
    b.conv("x", "y", 3, 3, 3)
    model = loaded(b.model(["n", 3, 16, 16], {"y": ["n", 3, 16, 16]}), tmp_path)
    ir = convert(model.folded().graph)
    metric = Metric(ir, ValidationData([_feeds(4, 3)], None, "synthetic images"))
    assert "energy" in metric.name

    class _Louder:
        """The network, 10 % too loud: an error of 1 % of the energy."""

        def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {
                "y": np.asarray(core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds)[0]) * 1.1
            }

    value, each = metric(_Louder(), metric.items)
    assert value == pytest.approx(0.99, abs=1e-6)
    assert each == pytest.approx([0.99] * 4, abs=1e-6)


def test_steps_are_read_from_what_nncf_says() -> None:
    steps = read_steps(
        [
            "Accuracy drop: 0.5 (absolute)",
            "Reverted 2 operations to the floating-point precision: \n\ta\n\tb/c",
            "Accuracy drop with the new quantization scope is 0.25 (absolute)",
            "Reverted 1 operations to the floating-point precision: \n\td",
            "Algorithm completed: achieved required accuracy drop 0.005 (absolute)",
        ]
    )
    assert [(step.operators, step.drop) for step in steps] == [(("a", "b/c"), 0.25), (("d",), 0.005)]


# ---------------------------------------------------------------------------------------------------------------------
# real networks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.assets
@pytest.mark.slow
def test_resnet20_with_pictures_and_the_time_that_our_hands_add(assets: Path, tmp_path: Path) -> None:
    """On a trained network: agreement with float, the graph against the IR, and less than 10 % beside nncf.quantize itself."""
    model, feeds = asset_model(assets, "resnet20_cifar10")
    image = feeds["image"]
    shifted = [np.roll(image, shift, axis) for axis in (2, 3) for shift in range(1, 11)]
    images = {"image": np.concatenate([image, *shifted])[:96]}
    own: list[float] = []
    ours: list[float] = []
    for _ in range(3):
        started = time.process_time()
        design = _design(model, tmp_path, feeds=images)
        ours.append(time.process_time() - started)
        ir = convert(model.folded().graph)
        samples = Samples(model.folded().graph.inputs, calibration_set(model, images))
        with quiet():
            nncf = load_nncf()
            started = time.process_time()
            nncf.quantize(ir, nncf.Dataset(samples), **quantize_arguments(NncfOptions(), CPU, len(samples)))
            own.append(time.process_time() - started)
    assert min(ours) < 1.1 * min(own) + 0.2  # the reading back and the writing of the IR included
    wanted, got = _twin(model.folded().graph, images).argmax(1), _twin(design.qdq, images).argmax(1)
    assert np.mean(wanted == got) > 0.95
    from_ir = _run(read(tmp_path / "vendor.xml"), images)
    step = np.ptp(from_ir) / 255
    assert np.mean(np.abs(from_ir - _twin(design.qdq, images)) <= 2 * step) > 0.98
    assert isinstance(design.qdq.proto, onnx.ModelProto)
