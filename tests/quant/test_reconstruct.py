"""Block reconstruction end to end: what is learned lowers the error, is written exactly, comes again with the same seed and after a stop."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.errors import ModelError, OutputExistsError, StaleArtifactError, UsageError
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.progress import SILENT
from zsq_deploy.quant import PlacementRules, collect, insert_qdq
from zsq_deploy.quant.reader import read_qdq
from zsq_deploy.quant.reconstruct import PRESETS, PROTOCOLS, Bits, Preset, clip_codes, reconstruct, round_to_nearest
from zsq_deploy.quant.reconstruct.blocks import find_blocks
from zsq_deploy.quant.reconstruct.runner import Runner
from zsq_deploy.quant.scheme import Granularity, Scheme

from .nets import Builder, images, small_net

SHORT = Preset("short", steps=60, batch=16, rounding_lr=3e-2, weight_scale_lr=1e-3, activation_scale_lr=1e-3, drop=0.2)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return Model(small_net(3), name="small")


def image_set(model, count=48, seed=5):
    x = images(count, seed=seed)
    return CalibrationSet.from_arrays({"image": x}, CalibrationManifest.of(model, method="gaussian"))


@pytest.fixture(scope="module")
def data(model):
    return image_set(model)


@pytest.fixture(scope="module")
def learned(model, data):
    return reconstruct(model, data, "w3a3", "ends-8bit", SHORT)


def logits(graph, x):
    with torch.no_grad():
        return Twin(graph, device="cpu")(torch.from_numpy(x)).numpy()


def error(model, graph, x):
    return float(np.square(logits(graph, x) - logits(model.folded().graph, x)).sum())


def test_the_loss_of_low_bit_blocks_falls_and_the_network_gets_better(model, data, learned):
    low = [b for b in learned.blocks if any(learned.state.weights[name].scheme.bits == 3 for name in b.layers)]
    assert len(low) >= 3
    assert sum(block.after < block.before for block in low) * 2 > len(low)
    assert sum(block.after for block in low) < 0.9 * sum(block.before for block in low)
    fresh = images(64, seed=99)
    nearest = round_to_nearest(model, data, "w3a3", "ends-8bit", bias_correction=False)
    assert error(model, learned.graph, fresh) < error(model, nearest.graph, fresh)


def test_the_twin_of_the_graph_gives_the_codes_of_the_learned_network(learned):
    runner = Runner(learned.template, torch.device("cpu"))
    x = torch.from_numpy(images(16, seed=7))
    values: dict[str, torch.Tensor] = {"image": x}
    seen: dict[str, torch.Tensor] = {}
    for block in find_blocks(learned.template.plain):
        found = runner.hard(block, {name: values[name] for name in block.inputs}, learned.state)
        values.update(found)
        seen.update(found)
    sites = {site.output for site in learned.template.sites}
    rounded = [name for name in seen if name in sites]
    assert len(rounded) >= 4
    expected = Twin(learned.graph, device="cpu").run(
        {"image": x}, fetch=[*rounded, *(spec.name for spec in learned.graph.outputs)]
    )
    for name, tensor in expected.items():
        assert torch.equal(tensor, seen[name]), name


def test_the_graph_holds_what_was_learned_in_8_bit_containers(learned):
    weights = {t.codes: t for t in read_qdq(learned.graph) if t.is_weight and not t.is_bias}
    narrow = 0
    for layer in learned.template.layers:
        weight = learned.state.weights[layer.node]
        node = learned.graph.node(layer.node)
        stored = learned.graph.producer(node.input[1])
        codes = learned.graph.constant(stored.input[0])
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, weight.codes)
        np.testing.assert_array_equal(learned.graph.constant(stored.input[1]), weight.scale)
        assert weights[stored.input[0]].dtype == "int8"
        if weight.scheme.bits == 3:
            narrow += 1
            assert codes.min() >= -4
            assert codes.max() <= 3
            assert len(np.unique(codes)) > 4
        bias = learned.graph.producer(node.input[2])
        x_scale = np.float32(learned.state.activations[layer.x].scale)
        np.testing.assert_array_equal(learned.graph.constant(bias.input[1]), x_scale * weight.scale)
    assert narrow >= 3


def test_onnxruntime_computes_the_same_and_activations_keep_to_their_codes(learned):
    x = images(8, seed=11)
    proto = learned.graph.editable()
    codes = [(t.codes, t.name) for t in read_qdq(learned.graph) if t.quantize]
    for value, _ in codes:
        proto.graph.output.add().name = value
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": x})
    np.testing.assert_allclose(found[0], logits(learned.graph, x), atol=1e-3)
    three = {site.name for site in learned.template.sites if learned.assignment.sites[site.group] == 3}
    used = [array for (_, name), array in zip(codes, found[1:], strict=True) if name.removesuffix("_in_range") in three]
    assert len(used) >= 4
    assert all(array.max() <= 7 for array in used)
    assert any(array.max() == 7 for array in used)


def operators(graph, tmp_path):
    """What ONNX Runtime makes of a graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def test_codes_cut_behind_quantizelinear_are_the_same_and_let_onnxruntime_fuse(learned, tmp_path):
    cut = clip_codes(learned.graph)
    x = images(8, seed=17)
    np.testing.assert_array_equal(logits(cut, x), logits(learned.graph, x))
    before, after = operators(learned.graph, tmp_path), operators(cut, tmp_path)
    layers = sum(node.op_type == "Conv" for node in learned.graph.nodes)
    assert after["QLinearConv"] == layers
    assert after["Conv"] + after["FusedConv"] == 0
    assert before["QLinearConv"] < layers
    own = round_to_nearest(Model(small_net(3), name="small"), image_set(learned.model), "w8a8", "all-layers")
    assert clip_codes(own.graph).digest == own.graph.digest


def test_the_same_seed_gives_the_same_network_and_another_one_another(model, data, learned):
    again = reconstruct(model, data, "w3a3", "ends-8bit", SHORT)
    assert again.graph.digest == learned.graph.digest
    other = reconstruct(model, data, "w3a3", "ends-8bit", SHORT, seed=1)
    assert other.graph.digest != learned.graph.digest


class _HaltError(Exception):
    pass


class _Halting:
    """Progress that stops the work after some steps."""

    def __init__(self, steps):
        self.left = steps

    def task(self, title, total):
        stop = self

        class Bar:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def advance(self, steps=1, **values):
                if title == "reconstruction":
                    stop.left -= steps
                    if stop.left < 0:
                        raise _HaltError

        return Bar()

    def say(self, message):
        pass


def test_a_stopped_run_goes_on_and_gives_the_same_network(model, data, learned, tmp_path):
    with pytest.raises(_HaltError):
        reconstruct(model, data, "w3a3", "ends-8bit", SHORT, workdir=tmp_path / "w", progress=_Halting(150))
    done = sorted(path.name for path in (tmp_path / "w").glob("block-*.npz"))
    assert len(done) == 2
    assert not list((tmp_path / "w").glob("activations-*"))
    with pytest.raises(OutputExistsError):
        reconstruct(model, data, "w3a3", "ends-8bit", SHORT, workdir=tmp_path / "w")
    with pytest.raises(StaleArtifactError):
        reconstruct(model, data, "w4a4", "ends-8bit", SHORT, workdir=tmp_path / "w", resume=True)
    result = reconstruct(model, data, "w3a3", "ends-8bit", SHORT, workdir=tmp_path / "w", resume=True)
    assert result.graph.digest == learned.graph.digest


def test_activations_on_disk_give_the_same_network(model, data, learned, tmp_path):
    result = reconstruct(model, data, "w3a3", "ends-8bit", SHORT, workdir=tmp_path / "w", memory=0)
    assert result.graph.digest == learned.graph.digest


def test_int4_weights_are_the_same_numbers_in_half_the_space(learned):
    graph = learned.with_int4_weights()
    x = images(8, seed=13)
    np.testing.assert_array_equal(logits(graph, x), logits(learned.graph, x))
    small = [t for t in read_qdq(graph) if t.dtype == "int4"]
    assert len(small) >= 3
    assert len(graph.proto.SerializeToString()) < len(learned.graph.proto.SerializeToString())


def test_rounding_to_nearest_leaves_every_weight_within_half_a_step(model, data):
    result = round_to_nearest(model, data, "w4a8", "all-layers")
    for layer in result.template.layers:
        weight = result.state.weights[layer.node]
        assert weight.scheme.bits == 4
        array = result.template.weights[layer.weight]
        steps = array / weight.along(weight.scale)
        inside = (steps > weight.scheme.qmin - 0.5) & (steps < weight.scheme.qmax + 0.5)
        assert np.abs(steps - weight.codes)[inside].max() <= 0.5 + 1e-5
        assert inside.mean() > 0.9


def test_bias_correction_helps_rounding_to_nearest(model, data):
    fresh = images(64, seed=21)
    plain = round_to_nearest(model, data, "w4a8", "all-layers", bias_correction=False)
    corrected = round_to_nearest(model, data, "w4a8", "all-layers")
    assert error(model, corrected.graph, fresh) < error(model, plain.graph, fresh)


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w2a4"])
def test_more_bits_are_never_far_off(model, data, bits):
    fresh = images(32, seed=31)
    result = reconstruct(model, data, bits, "all-layers", dataclasses.replace(SHORT, steps=20))
    power = float(np.square(logits(model.folded().graph, fresh)).sum())
    assert error(model, result.graph, fresh) < {"w8a8": 0.002, "w4a8": 0.2, "w2a4": 1.0}[bits] * power


def test_asymmetric_weights_and_signed_activations(model, data):
    weight = Scheme(8, signed=False, symmetric=False, granularity=Granularity.CHANNEL)
    result = reconstruct(
        model,
        data,
        "w3a4",
        "all-layers",
        dataclasses.replace(SHORT, steps=20, bias_lr=1e-2, relative=True),
        activation=Scheme(8, signed=True, symmetric=False),
        weight=weight,
    )
    zero_points = np.concatenate([w.zero_point.reshape(-1) for w in result.state.weights.values()])
    assert len(np.unique(zero_points)) > 2
    assert all(w.codes.min() >= 0 and w.codes.max() <= 7 for w in result.state.weights.values())
    for layer in result.template.layers:  # biases were learned, too, and stay close
        before, after = result.template.biases[layer.bias], result.state.biases[layer.node]
        assert 0 < np.abs(after - before).max() < 0.5
    x = images(16, seed=41)
    assert error(model, result.graph, x) < np.square(logits(model.folded().graph, x)).sum()


def test_the_protocol_says_what_has_how_many_bits(model, data, learned):
    bits = {layer.node: learned.state.weights[layer.node].scheme.bits for layer in learned.template.layers}
    products = [node.name for node in learned.template.plain.nodes if node.name in bits]
    assert bits[products[0]] == 8
    assert bits[products[-1]] == 8
    assert {bits[name] for name in products[1:-1]} == {3}
    assert "w3a3 ends-8bit" in learned.description
    all_layers = round_to_nearest(model, data, "w3a3", "all-layers", bias_correction=False)
    assert {weight.scheme.bits for weight in all_layers.state.weights.values()} == {3}
    by_group = all_layers.assignment.sites
    of = {site.name: site.group for site in all_layers.template.sites}
    assert by_group[of["image"]] == 8
    second = round_to_nearest(model, data, "w3a3", "ends-8bit+second-input", bias_correction=False)
    changed = {
        group for group in second.assignment.sites if second.assignment.sites[group] != learned.assignment.sites[group]
    }
    assert len(changed) == 1
    assert "second layer" in second.description


@pytest.mark.parametrize(
    "change", [{"round_outputs": "read"}, {"residual": "skip", "bias": "float"}, {"exclude": "last"}]
)
def test_other_rules_of_placement(model, data, change):
    if "exclude" in change:
        last = [node.name for node in model.folded().graph.nodes if node.op_type == "Gemm"]
        change = {"exclude": frozenset(last), "store_weights": "float"}
    rules = PlacementRules(**change)
    result = reconstruct(model, data, "w4a4", "all-layers", dataclasses.replace(SHORT, steps=5), rules=rules)
    x = images(16, seed=43)
    assert error(model, result.graph, x) < np.square(logits(model.folded().graph, x)).sum()
    expected = insert_qdq(
        model.folded().graph,
        collect(model.folded().graph, data.batches(16), device="cpu").ranges(),
        activation=Scheme(8, signed=False, symmetric=False),
        weight=Scheme(8, granularity=Granularity.CHANNEL),
        rules=dataclasses.replace(rules, store_weights="integers"),
    )
    placed = {t.name.removesuffix("_in_range") for t in read_qdq(result.graph) if t.quantize}
    assert placed == {t.name for t in read_qdq(expected) if t.quantize}


def test_wrong_words_are_refused(model, data):
    with pytest.raises(UsageError, match="cannot be learned"):
        reconstruct(model, data, "w4a4", weight=Scheme(4, granularity=Granularity.CHANNEL))
    with pytest.raises(UsageError, match="bits"):
        reconstruct(model, data, "w1a4")
    with pytest.raises(UsageError, match="bits"):
        Bits.of("four")
    with pytest.raises(UsageError, match="protocol"):
        reconstruct(model, data, "w4a4", "some-layers")
    with pytest.raises(UsageError, match="preset"):
        reconstruct(model, data, "w4a4", preset="slow")
    assert set(PRESETS) == {"full", "fast"}
    assert set(PROTOCOLS) == {"ends-8bit", "ends-8bit+second-input", "all-layers"}


def test_the_published_schedule_is_what_the_paper_says():
    full = PRESETS["full"]
    assert (full.steps, full.batch, full.rounding_lr, full.weight_scale_lr) == (20_000, 32, 1e-3, 1e-4)
    assert (full.activation_scale_lr, full.beta, full.warmup, full.drop) == (4e-5, (20.0, 2.0), 0.2, 0.5)
    assert PRESETS["fast"].steps * 10 <= full.steps


def test_a_network_without_layers_is_refused():
    b = Builder()
    net = Model(b.graph([b.node("Relu", "image")]), name="none")
    with pytest.raises(ModelError, match="no layer"):
        round_to_nearest(net, image_set(net), progress=SILENT)
