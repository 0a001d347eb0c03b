"""What a calibration cache means: the graph is held against numbers computed by hand, and against ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zsq_deploy.backends import BuildSettings, get_target
from zsq_deploy.backends.tensorrt.cache import CalibrationCache, check_binding, read_cache
from zsq_deploy.backends.tensorrt.options import FLOAT_MACS, BuildOptions, options_from
from zsq_deploy.backends.tensorrt.quantizer import build
from zsq_deploy.backends.tensorrt.reference import reference_of_cache
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import Ranges, read_qdq

from .tensorrt_networks import NETWORKS, images, network, outputs, ranges_of
from .test_tensorrt_bundle import Images

CONVOLUTIONAL = [name for name in NETWORKS if name != "transformer"]
TEN, ELEVEN = get_target("tensorrt-10"), get_target("tensorrt-11")


def cache_for(name: str, **changes: float | None) -> CalibrationCache:
    """A cache of min-max ranges, with other largest magnitudes for some tensors (``None``: no scale)."""
    ranges = ranges_of(network(name))
    ranges |= {key: (-value, value) for key, value in changes.items() if value is not None}
    return CalibrationCache.from_ranges(
        {key: value for key, value in ranges.items() if changes.get(key, 0.0) is not None}, version="8.6.2"
    )


def rounded(graph: Graph) -> set[str]:
    return {tensor.name for tensor in read_qdq(graph) if not tensor.is_weight}


def by_hand(name: str, scales: dict[str, float], x: np.ndarray) -> np.ndarray:
    """The network ``concat`` in 8 bits, operation by operation in float64."""
    graph = network(name).folded().graph

    def weight(node: str) -> tuple[torch.Tensor, torch.Tensor]:
        _, w, b = graph.node(node).input
        w = graph.constant(w).astype(np.float64)
        step = np.float32(np.abs(w).reshape(len(w), -1).max(1) / 127).astype(np.float64)
        step = step.reshape(-1, *[1] * (w.ndim - 1))
        return torch.from_numpy(np.rint(w / step) * step), torch.from_numpy(graph.constant(b).astype(np.float64))

    def q(value: torch.Tensor, tensor: str) -> torch.Tensor:
        return torch.clamp(torch.round(value / scales[tensor]), -128, 127) * scales[tensor]

    value = q(torch.from_numpy(x.astype(np.float64)), "image")
    value = q(F.relu(F.conv2d(value, *weight("n_stem"), padding=1)), "stem_relu")
    small = F.relu(F.conv2d(value, *weight("n_small")))
    wide = F.relu(F.conv2d(value, *weight("n_wide"), padding=1))
    value = F.max_pool2d(q(torch.cat([small, wide], 1), "both"), 2, stride=1)
    value = q(F.relu(F.conv2d(value, *weight("n_last"), padding=1)), "last_relu")
    value = q(value.mean((2, 3)), "pool")
    return F.linear(value, *weight("n_logits")).numpy()


def test_the_graph_computes_what_the_cache_says():
    cache = cache_for("concat", both=3.0, pool=0.4)
    found = reference_of_cache(network("concat").folded().graph, cache)
    assert found.layers == ("n_stem", "n_small", "n_wide", "n_last", "n_pool", "n_logits")
    x = images(network("concat"), 4, seed=11)
    wanted = by_hand("concat", dict(cache.scales), x)
    value = outputs(found.graph, x)["logits"]
    # float32 may put a number on the other side of a rounding boundary: one code of one tensor
    assert np.abs(value - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.median(np.abs(value - wanted)) < 1e-5


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_scales_are_those_of_the_cache_bit_for_bit(name):
    graph = network(name).folded().graph
    # a largest magnitude beyond the bound of the activation is what the cache says all the same
    cache = cache_for(name, stem_relu=7.25)
    found = reference_of_cache(graph, cache)
    tensors = read_qdq(found.graph)
    for tensor in tensors:
        assert (tensor.dtype, int(tensor.zero_point.any())) == ("int8", 0)
        if not tensor.is_weight:
            assert float(tensor.scale) == cache.scales[tensor.name]
    for node in found.graph:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            maker = found.graph.producer(node.input[1])
            assert maker.op_type == "DequantizeLinear"
            assert found.graph.constant(node.input[2]).dtype == np.float32
    x = images(network(name))
    value, wanted = outputs(found.graph, x), outputs(graph, x)
    for key, right in wanted.items():
        assert 10 * np.log10(np.square(right).sum() / np.square(value[key] - right).sum()) > 20.0


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_onnx_runtime_computes_the_same(name):
    ort = pytest.importorskip("onnxruntime")
    found = reference_of_cache(network(name).folded().graph, cache_for(name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(found.graph.editable().SerializeToString(), options)
    x = images(network(name), seed=9)
    for key, value in outputs(found.graph, x).items():
        got = session.run([key], {"image": x})[0]
        assert np.median(np.abs(got - value)) < 1e-5
        assert 10 * np.log10(np.square(value).sum() / max(np.square(got - value).sum(), 1e-30)) > 35.0


def test_what_is_fused_needs_no_scale_and_is_not_rounded():
    found = reference_of_cache(
        network("residual").folded().graph, cache_for("residual", stem=None, left=None, right=None, sum=None)
    )
    assert rounded(found.graph) == {"image", "stem_relu", "left_relu", "out", "pool"}
    assert found.floats == {}
    assert "stem" in found.without_scale
    add = found.graph.node("n_sum")
    assert sorted(found.graph.producer(value).op_type for value in add.input) == ["Conv", "DequantizeLinear"]


def test_a_tensor_without_a_scale_takes_its_layers_to_float():
    found = reference_of_cache(network("residual").folded().graph, cache_for("residual", left_relu=None))
    assert set(found.floats) == {"n_left", "n_right"}
    assert "right" in rounded(found.graph)  # the sum computes in 8 bits still, and no convolution writes into it
    assert "its output 'left_relu' has no scale" in found.floats["n_left"]
    assert "its input 'left_relu' has no scale" in found.floats["n_right"]
    assert found.without_scale == ("left_relu",)
    zero = CalibrationCache(8602, "EntropyCalibration2", {**cache_for("residual").scales, "left_relu": 0.0})
    assert set(reference_of_cache(network("residual").folded().graph, zero).floats) == set(found.floats)


def test_layers_that_the_device_shows_in_float_can_be_named():
    graph, cache = network("residual").folded().graph, cache_for("residual")
    found = reference_of_cache(graph, cache, floats=("n_left",))
    assert found.floats["n_left"] == "it was named"
    assert "n_left" not in found.layers
    with pytest.raises(UsageError, match="no node 'nobody'"):
        reference_of_cache(graph, cache, floats=("nobody",))


def test_what_cannot_be_a_reference_is_said():
    graph = network("residual").folded().graph
    with pytest.raises(CalibrationError, match="tensors of the cache are not in the network"):
        reference_of_cache(
            graph, CalibrationCache(8602, "EntropyCalibration2", {**cache_for("residual").scales, "x": 1})
        )
    with pytest.raises(CalibrationError, match="no layer of this network computes in 8 bits"):
        reference_of_cache(graph, CalibrationCache(8602, "EntropyCalibration2", {"logits": 1.0}))
    with pytest.raises(CalibrationError, match="no layer") as caught:
        reference_of_cache(network("transformer").folded().graph, cache_for("transformer"))
    assert "matrix products in float" in str(caught.value)


# -- built --


def test_an_implicit_engine(tmp_path: Path):
    model = network("depthwise")
    ranges = Ranges(ranges_of(model), "minmax", model_digest=model.folded().graph.digest)
    x = images(model, 24)
    options = options_from(BuildSettings(quantizer="implicit"), TEN).with_(bias_correction=True)
    engine = build(model, ranges, TEN, tmp_path, options=options, calibration=Images(x))
    assert (engine.path.name, engine.qdq_path.name, engine.float_path.name) == (
        "network.onnx",
        "implicit.onnx",
        "float.onnx",
    )
    given = Graph.load(engine.path)
    assert not read_qdq(given)
    # the corrected biases are in the network that TensorRT gets, and nowhere else
    other = {
        name
        for name in given.initializer_names
        if not np.array_equal(given.constant(name), model.folded().graph.constant(name))
    }
    assert other
    assert all(given.constant(name).ndim == 1 for name in other)
    cache = read_cache(tmp_path / "calibration.cache")
    assert check_binding(tmp_path / "calibration.cache", model_digest=given.digest).method == "minmax"
    meant = reference_of_cache(given, cache)
    reference = Graph.load(engine.qdq_path)
    assert np.array_equal(outputs(reference, x[:8])["logits"], outputs(meant.graph, x[:8])["logits"])
    samples = np.load(tmp_path / "samples.npz", allow_pickle=False)
    assert np.array_equal(samples["output:logits"], outputs(reference, x[:8])["logits"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["choices"]["mode"], manifest["choices"]["quantizer"]) == ("implicit", "implicit")
    assert manifest["choices"]["implicit"]["layers_8_bit"] == len(meant.layers)
    held = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(manifest["bundle"]) == held - {"manifest.json"}
    assert "--calib=" in (tmp_path / "trtexec.sh").read_text()


def test_an_explicit_engine_has_the_other_reference_beside_it(tmp_path: Path):
    model = network("residual")
    engine = build(model, Ranges(ranges_of(model), "minmax"), TEN, tmp_path, calibration=Images(images(model, 8)))
    record = engine.choices["implicit"]
    assert record["layers_8_bit"] == 6
    assert record["sqnr_db"] > 20
    found = outputs(Graph.load(tmp_path / "implicit.onnx"), images(model))["logits"]
    meant = reference_of_cache(model.folded().graph, read_cache(tmp_path / "calibration.cache"))
    assert np.array_equal(found, outputs(meant.graph, images(model))["logits"])


def test_a_cache_that_stands_for_a_float_engine_is_told(tmp_path: Path):
    model = network("transformer")
    engine = build(model, Ranges(ranges_of(model), "minmax"), TEN, tmp_path)
    assert not (tmp_path / "implicit.onnx").exists()
    assert any("stands for a float engine" in note for note in engine.choices["notes"])


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (ELEVEN, {"quantizer": "implicit"}, "neither calibrators nor calibration caches"),
        (TEN, {"quantizer": "implicit", "bits": "w4a32"}, "cannot say which operators"),
        (TEN, {"quantizer": "implicit", "op_types": ("Conv",)}, "cannot say which operators"),
        (TEN, {"quantizer": "implicit", "float_type": "float16"}, "types other than float32"),
        (TEN, {"quantizer": "nncf"}, "does not quantize for TensorRT"),
    ],
)
def test_what_an_implicit_engine_cannot_have(target, settings, message):
    with pytest.raises(UsageError, match=message):
        options_from(BuildSettings(**settings), target)
    assert options_from(BuildSettings(), TEN) == BuildOptions(exact_scales=True, float_macs=FLOAT_MACS)
