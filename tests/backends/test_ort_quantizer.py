"""Building engines: ONNX Runtime's quantizer really gets our ranges, stale files are refused, and rewrites are exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.onnxruntime import static
from zsq_deploy.backends.onnxruntime.calibrators import METHODS, calibrate
from zsq_deploy.backends.onnxruntime.choose import candidates, choose
from zsq_deploy.backends.onnxruntime.options import MAC_OPS, BuildOptions
from zsq_deploy.backends.onnxruntime.placement import place
from zsq_deploy.backends.onnxruntime.prepare import prepare
from zsq_deploy.backends.onnxruntime.quantizer import build
from zsq_deploy.backends.onnxruntime.runner import runner
from zsq_deploy.errors import CalibrationError, EngineError, ModelError, StaleArtifactError, UsageError
from zsq_deploy.model import Model
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.ranges import Ranges

from .ort_engines import (
    ASSET_NETWORKS,
    Builder,
    asset_model,
    calibration_set,
    convnet,
    everything,
    loaded,
    ranges_of,
    run,
    transformer,
)

VNNI = get_target("ort-x86-vnni")
AVX2 = get_target("ort-x86-avx2")
ARM = get_target("ort-arm64")


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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
    return build(network, ranges, VNNI, tmp_path_factory.mktemp("engine"))


# --- our ranges, their quantizer ----------------------------------------------------------------------------------------


def test_quantize_static_is_called_with_our_cache(
    network: Model, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    real = onnxruntime.quantization.quantize_static

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append({**kwargs, "reader": args[2]})
        return real(*args, **kwargs)

    monkeypatch.setattr(static, "quantize_static", watched)
    build(network, ranges, VNNI, tmp_path)
    (call,) = calls
    assert call["reader"] is None  # no calibration pass of its own
    stored = json.loads(Path(call["calibration_cache_path"]).read_text())
    assert stored["CLS"] == "TensorsData"
    low, high = (stored["data"]["x"][key]["data"] for key in ("lowest", "highest"))
    assert (low, high) == tuple(float(np.float32(v)) for v in ranges["x"])


def scales_of(path: Path) -> dict[str, tuple[float, int, str]]:
    """Name of each quantized float tensor -> scale, zero point, type, read from the file."""
    graph = Graph.load(path)
    return {
        node.input[0]: (
            float(graph.constant(node.input[1])),
            int(graph.constant(node.input[2])),
            str(graph.constant(node.input[2]).dtype),
        )
        for node in graph
        if node.op_type == "QuantizeLinear"
    }


@pytest.mark.parametrize("target", [VNNI, AVX2, ARM], ids=lambda target: target.name)
def test_activation_scales_in_the_file_are_ours(network: Model, ranges: Ranges, target: Any, tmp_path: Path) -> None:
    made = build(network, ranges, target, tmp_path, options=BuildOptions(share_concat=False))
    found = scales_of(made.path)
    assert {"x", "stem_act", "dw_act", "pw_act", "res", "sum_act", "left_act", "right_act", "cat"} <= set(found)
    qmin = -128 if target is ARM else 0
    for name, (scale, zero, kind) in found.items():
        if name not in ranges:
            continue
        low, high = (np.float32(v) for v in ranges[name])
        if name == "stem_act":
            high = min(high, np.float32(6))
        low, high = min(low, np.float32(0)), max(high, np.float32(0))
        expected = np.float32((np.float64(high) - np.float64(low)) / 255)
        if name != "max":  # moves codes: has the scale of its input
            assert scale == pytest.approx(float(expected), rel=1e-6), name
            assert zero == round(qmin - float(low) / float(expected)), name
        assert kind == ("int8" if target is ARM else "uint8")


@pytest.mark.parametrize(
    ("target", "limit"), [(VNNI, 127), (AVX2, 64), (ARM, 127)], ids=lambda v: getattr(v, "name", "")
)
def test_weights_are_symmetric_per_channel_within_the_limit(
    network: Model, ranges: Ranges, target: Any, limit: int, tmp_path: Path
) -> None:
    graph = Graph.load(build(network, ranges, target, tmp_path).path)
    seen = 0
    for node in graph:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        dequantize = graph.producer(node.input[1])
        assert dequantize is not None
        assert dequantize.op_type == "DequantizeLinear"
        codes, scale, zero = (graph.constant(name) for name in dequantize.input)
        assert codes.dtype == np.int8
        assert not zero.any()
        assert scale.size == codes.shape[0]
        peaks = np.abs(codes.reshape(codes.shape[0], -1).astype(int)).max(1)
        assert (peaks == limit).all()
        bias = graph.producer(node.input[2])
        assert bias is not None
        assert graph.constant(bias.input[0]).dtype == np.int32
        source = graph.constant(graph.producer(node.input[0]).input[1])
        np.testing.assert_allclose(graph.constant(bias.input[1]), source * scale, rtol=1e-6)
        seen += 1
    assert seen == 7


def test_the_same_build_gives_the_same_bytes(network: Model, ranges: Ranges, engine: Engine, tmp_path: Path) -> None:
    again = build(network, ranges, VNNI, tmp_path)
    assert again.path.read_bytes() == engine.path.read_bytes()


def test_the_manifest_says_what_was_made_from_what(network: Model, engine: Engine) -> None:
    from zsq_deploy.artifact import digest_file

    manifest = json.loads((engine.path.parent / "manifest.json").read_text())
    assert manifest["engine"]["sha256"] == digest_file(engine.path)
    assert manifest["model"]["digest"] == network.digest
    assert manifest["target"] == "ort-x86-vnni"
    assert manifest["versions"]["onnxruntime"]
    assert manifest["choices"]["ranges"] == "minmax"


# --- stale and missing --------------------------------------------------------------------------------------------------


def test_a_cache_of_other_ranges_is_refused(network: Model, ranges: Ranges, engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.path.parent, tmp_path / "old")
    before = (tmp_path / "old" / "engine.onnx").read_bytes()
    wider = ranges.updated({"x": (-9.0, 9.0)})
    with pytest.raises(StaleArtifactError, match="other ranges"):
        build(network, wider, VNNI, tmp_path / "old")
    assert (tmp_path / "old" / "engine.onnx").read_bytes() == before
    build(network, ranges, VNNI, tmp_path / "old")  # the same ones are fine


def test_a_cache_of_another_set_or_method_is_refused(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    build(network, ranges.bound(model_digest=ranges.model_digest, set_digest="a" * 64), VNNI, tmp_path)
    with pytest.raises(StaleArtifactError, match="another calibration set"):
        build(network, ranges.bound(model_digest=ranges.model_digest, set_digest="b" * 64), VNNI, tmp_path)
    with pytest.raises(StaleArtifactError, match="another method"):
        build(
            network,
            ranges.bound(model_digest=ranges.model_digest, set_digest="a" * 64).replace(method="mse"),
            VNNI,
            tmp_path,
        )


def test_a_cache_of_another_network_is_refused(ranges: Ranges, engine: Engine, tmp_path: Path) -> None:
    other = loaded(convnet(seed=1), tmp_path / "other")
    with pytest.raises(StaleArtifactError, match="another network"):
        build(other, ranges, VNNI, tmp_path / "new")
    shutil.copytree(engine.path.parent, tmp_path / "old")
    unbound = ranges.bound()  # says nothing about its network; the cache in the folder does
    with pytest.raises(StaleArtifactError, match="another network"):
        build(other, unbound, VNNI, tmp_path / "old")


@pytest.mark.parametrize("damage", ["changed", "unbound"])
def test_a_cache_that_was_changed_or_lost_its_binding_is_refused(
    network: Model, ranges: Ranges, engine: Engine, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(engine.path.parent, tmp_path / "old")
    cache = tmp_path / "old" / "calibration_cache.json"
    if damage == "changed":
        cache.write_text(cache.read_text().replace("MinMax", "minmax"))
    else:
        (tmp_path / "old" / "calibration_cache.binding.json").unlink()
    with pytest.raises(StaleArtifactError):
        build(network, ranges, VNNI, tmp_path / "old")


def test_a_set_of_another_network_is_refused(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    other = loaded(convnet(seed=1), tmp_path / "other")
    with pytest.raises(StaleArtifactError, match="synthesized from another network"):
        build(network, "ort-minmax", VNNI, tmp_path / "e", calibration=calibration_set(other, feeds))


def test_a_tensor_without_a_range_is_named(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    fewer = ranges.replace(values_by_name={k: v for k, v in ranges.items() if k not in ("sum", "pw_act")})
    with pytest.raises(CalibrationError, match=r"pw_act.*sum|sum.*pw_act"):
        build(network, fewer, VNNI, tmp_path)
    assert not (tmp_path / "engine.onnx").exists()


# --- ONNX Runtime's own calibrators ------------------------------------------------------------------------------------


def test_its_minmax_sees_all_of_the_data(network: Model, tmp_path: Path) -> None:
    images = noise((21, 3, 16, 16), seed=3)
    images[0] *= 10  # the first sample is the widest: what a buffer that is cleared too early loses
    feeds = {"x": images}
    found = calibrate(network.folded().graph, calibration_set(network, feeds), "ort-minmax", batch=4)
    for name, array in everything(network.folded().graph, feeds).items():
        if name in found:
            np.testing.assert_allclose(found[name], (array.min(), array.max()), rtol=1e-4, atol=1e-5, err_msg=name)
    assert found["x"] == pytest.approx((float(images.min()), float(images.max())))
    assert found.method == "ort-minmax"


@pytest.mark.parametrize("method", ["ort-entropy", "ort-percentile"])
def test_its_histogram_calibrators_clip(tmp_path: Path, method: str) -> None:
    b = Builder()
    b.conv("x", "y", 1, 2, 3)
    tiny = loaded(b.model(["n", 1, 16, 16], {"y": ["n", 2, 16, 16]}), tmp_path)
    images = noise((24, 1, 16, 16), seed=4)
    images[5, 0, 3, 3] = 40.0  # one outlier
    found = calibrate(tiny.folded().graph, calibration_set(tiny, {"x": images}), method, percentile=99.9)
    assert set(found) == {"x", "y"}
    assert found["x"][1] < 20  # with 128 bins the entropy method would keep 40
    assert found["x"][0] < 0 < found["x"][1]


def test_its_calibrators_go_the_same_way_into_an_engine(
    network: Model, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    made = build(network, "ort-minmax", VNNI, tmp_path, calibration=calibration_set(network, feeds))
    direct = build(network, ranges_of(network, feeds), VNNI, tmp_path / "direct")
    ours, theirs = scales_of(direct.path), scales_of(made.path)
    assert set(ours) == set(theirs)
    for name in ours:
        assert theirs[name][0] == pytest.approx(ours[name][0], rel=1e-4), name
    assert made.choices["ranges"] == "ort-minmax"


def test_wrong_use_of_calibrators_is_told(network: Model, feeds: dict[str, np.ndarray], tmp_path: Path) -> None:
    some = calibration_set(network, feeds)
    with pytest.raises(UsageError, match="unknown calibrator"):
        build(network, "ort-magic", VNNI, tmp_path, calibration=some)
    with pytest.raises(CalibrationError, match="none was given"):
        build(network, "ort-minmax", VNNI, tmp_path)
    with pytest.raises(UsageError, match="nothing to search"):
        calibrate(network.folded().graph, some, "ort-entropy", bins=128)
    assert set(METHODS) == {"ort-minmax", "ort-entropy", "ort-percentile"}


# --- what is rewritten stays what it was -------------------------------------------------------------------------------


def test_preparation_keeps_the_function(network: Model, feeds: dict[str, np.ndarray]) -> None:
    graph = network.folded().graph
    prepared = prepare(graph)
    ops = [node.op_type for node in prepared.graph]
    assert "GlobalAveragePool" in ops
    assert "Pad" not in ops
    (before,), (after,) = run(graph.proto, feeds), run(prepared.graph.proto, feeds)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    values = everything(graph, feeds)
    for name, array in everything(prepared.graph, feeds).items():
        old = values[prepared.aliases.get(name, name)]
        np.testing.assert_allclose(array.reshape(old.shape), old, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("target", [VNNI, AVX2, ARM], ids=lambda target: target.name)
@pytest.mark.parametrize("weight_method", ["minmax", "mse"])
def test_widening_gives_the_same_integers(
    network: Model, ranges: Ranges, target: Any, weight_method: str, tmp_path: Path
) -> None:
    options = BuildOptions(weight_method=weight_method)
    narrow = build(network, ranges, target, tmp_path / "narrow", options=options)
    wide = build(network, ranges, target, tmp_path / "wide", options=options.with_(widen=True))
    assert (
        wide.qdq_path.read_bytes() == narrow.path.read_bytes()
    )  # what is computed is still said in the network's shapes
    shapes = [tuple(t.dims) for t in Graph.load(wide.path).proto.graph.initializer]
    assert (16, 4, 3, 3) in shapes  # 3 -> 8 channels became 4 -> 16
    assert (16, 1, 3, 3) in shapes
    x = noise((9, 3, 16, 16), seed=5)
    for mode in ("engine", "unfused"):
        first, second = (runner(e.path, target, mode=mode).run({"x": x})["logits"] for e in (narrow, wide))  # type: ignore[arg-type]
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-6 if mode == "unfused" else 0)
    records = runner(wide.path, target).kernels({"x": x[:1]})
    assert [r.node for r in records if r.macs and not r.integer] == []


@settings(max_examples=25, deadline=None)
@given(
    begin=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    end=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    own=st.integers(0, 1),
    stride=st.integers(1, 2),
)
def test_padding_merges_into_a_convolution(begin: tuple[int, int], end: tuple[int, int], own: int, stride: int) -> None:
    b = Builder(1)
    pads = b.constant("pads", [0, 0, *begin, 0, 0, *end], np.int64)
    padded = b.node("Pad", ["x", pads], "padded")
    b.conv(padded, "y", 3, 4, 3, pads=[own, own, 0, 0], strides=[stride, stride])
    proto = b.model(["n", 3, 9, 7], {"y": ["n", 4, "h", "w"]})
    prepared = prepare(Graph(proto))
    assert [node.op_type for node in prepared.graph] == ["Conv"]
    x = {"x": noise((2, 3, 9, 7))}
    np.testing.assert_allclose(run(prepared.graph.proto, x)[0], run(proto, x)[0], rtol=1e-6, atol=1e-6)


def test_a_pointwise_classifier_becomes_a_product_with_float_output(tmp_path: Path) -> None:
    b = Builder(2)
    x = b.node("Relu", [b.conv("x", "c", 3, 16, 3)], "act")
    x = b.node("GlobalAveragePool", [x], "gap")
    b.node("Flatten", [b.conv(x, "classifier", 16, 7, 1, pads=[0, 0, 0, 0])], "logits")
    model = loaded(b.model(["n", 3, 8, 8], {"logits": ["n", 7]}), tmp_path)
    x_feeds = {"x": noise((8, 3, 8, 8))}
    made = build(model, ranges_of(model, x_feeds), VNNI, tmp_path / "e")
    ops = [node.op_type for node in Graph.load(made.path)]
    assert ops.count("Gemm") == 1
    values = runner(made.path, VNNI).run(x_feeds)["logits"]
    assert len(np.unique(values)) > 0.9 * values.size  # float, not 256 levels


def test_a_lonely_batch_norm_becomes_an_integer_convolution(tmp_path: Path) -> None:
    b = Builder(3)
    x = b.node("Relu", [b.conv("x", "c1", 3, 16, 3)], "a1")
    y = b.node("Relu", [b.conv(x, "c2", 16, 16, 3)], "a2")
    x = b.node("Relu", [b.norm(b.node("Concat", [x, y], "cat", axis=1), "bn", 32)], "a3")
    x = b.node("GlobalAveragePool", [b.conv(x, "c3", 32, 8, 1, pads=[0] * 4)], "gap")
    b.gemm(b.node("Flatten", [x], "flat"), "logits", 8, 5)
    model = loaded(b.model(["n", 3, 8, 8], {"logits": ["n", 5]}), tmp_path)
    x_feeds = {"x": noise((8, 3, 8, 8))}
    made = build(model, ranges_of(model, x_feeds), VNNI, tmp_path / "e")
    graph = Graph.load(made.path)
    assert not any(node.op_type == "BatchNormalization" for node in graph)
    want = runner(made.float_path, VNNI, mode="float").run(x_feeds)["logits"]
    got = runner(made.path, VNNI).run(x_feeds)["logits"]
    assert 10 * np.log10((want**2).sum() / ((want - got) ** 2).sum()) > 25


def test_a_channel_without_weights_keeps_its_bias(tmp_path: Path) -> None:
    b = Builder(4)
    b.conv("x", "c", 3, 16, 3)
    weight = numpy_helper.to_array(b.tensors[0]).copy()
    weight[5] = 0
    b.tensors[0].CopyFrom(numpy_helper.from_array(weight, "c_w"))
    b.gemm(b.node("Flatten", [b.node("GlobalAveragePool", ["c"], "gap")], "flat"), "y", 16, 3)
    model = loaded(b.model(["n", 3, 8, 8], {"y": ["n", 3]}), tmp_path)
    made = build(model, ranges_of(model, {"x": noise((4, 3, 8, 8)) * 50}), VNNI, tmp_path / "e")
    graph = Graph.load(made.path)
    conv = next(node for node in graph if node.op_type == "Conv")
    codes, scale = (graph.constant(name) for name in graph.producer(conv.input[2]).input[:2])
    bias = numpy_helper.to_array(b.tensors[1])
    assert codes[5] * scale[5] == pytest.approx(
        bias[5], rel=1e-3
    )  # with a scale of 1 it would be rounded to steps of 0.8


# --- options ------------------------------------------------------------------------------------------------------------


def test_outputs_stay_float_unless_asked(network: Model, ranges: Ranges, engine: Engine, tmp_path: Path) -> None:
    graph = Graph.load(engine.path)
    maker = graph.producer("logits")
    assert maker is not None
    assert maker.op_type == "Gemm"
    other = Graph.load(build(network, ranges, VNNI, tmp_path, options=BuildOptions(quantize_outputs=True)).path)
    maker = other.producer("logits")
    assert maker is not None
    assert maker.op_type == "DequantizeLinear"


def test_excluded_nodes_stay_float(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    conv = next(node.name for node in network.folded().graph if "res_w" in node.input)
    made = build(network, ranges, VNNI, tmp_path, options=BuildOptions(exclude=(conv,)))
    graph = Graph.load(made.path)
    assert graph.constant(graph.node(conv).input[1]).dtype == np.float32
    assert made.choices["float_nodes"][conv] == "excluded by the options"
    with pytest.raises(UsageError, match="not in the network"):
        build(network, ranges, VNNI, tmp_path / "b", options=BuildOptions(exclude=("no such node",)))


def test_nothing_to_quantize_is_told(tmp_path: Path) -> None:
    b = Builder()
    b.node("Relu", ["x"], "y")
    model = loaded(b.model(["n", 3, 4, 4], {"y": ["n", 3, 4, 4]}), tmp_path)
    with pytest.raises(EngineError, match="no convolution or matrix product"):
        build(model, {"x": (-1, 1), "y": (0, 1)}, VNNI, tmp_path / "e")


@pytest.mark.parametrize("bits", ["w9a8", "w8a16", "w1a4"])
def test_other_bit_widths_are_refused(bits: str) -> None:
    with pytest.raises(UsageError, match="does not build"):
        BuildOptions(bits=bits)


def test_fewer_bits_need_numbers(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="numbers that were found before"):
        build(network, ranges, VNNI, tmp_path / "a", options=BuildOptions(bits="w4a8"))


def test_corrected_biases_and_replaced_weights_reach_the_engine(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    graph = network.folded().graph
    conv = next(node for node in graph if "res_w" in node.input)
    bias = graph.constant(conv.input[2]) + np.float32(0.25)
    weight = graph.constant("left_w") * np.float32(0.5)
    by_name = build(network, ranges, VNNI, tmp_path / "a", options=BuildOptions(biases={conv.input[2]: bias}))
    by_node = build(network, ranges, VNNI, tmp_path / "b", options=BuildOptions(biases={conv.name: bias}))
    assert by_name.path.read_bytes() == by_node.path.read_bytes()
    made = Graph.load(by_node.path)
    codes, scale = (made.constant(n) for n in made.producer(made.node(conv.name).input[2]).input[:2])
    np.testing.assert_allclose(codes * scale, bias, atol=float(scale.max()))
    halved = build(network, ranges, VNNI, tmp_path / "c", options=BuildOptions(weights={"left_w": weight}))
    plain = build(network, ranges, VNNI, tmp_path / "d")
    name = next(
        n.input[1] for n in Graph.load(plain.path) if n.op_type == "DequantizeLinear" and "left_w" in n.input[0]
    )
    np.testing.assert_allclose(
        Graph.load(halved.path).constant(name), Graph.load(plain.path).constant(name) * 0.5, rtol=1e-6
    )
    with pytest.raises(ModelError, match="shape"):
        build(network, ranges, VNNI, tmp_path / "e", options=BuildOptions(weights={"left_w": np.zeros(3)}))
    with pytest.raises(ModelError, match="neither a bias"):
        build(network, ranges, VNNI, tmp_path / "f", options=BuildOptions(biases={"nothing": bias}))


def test_learned_weight_scales_are_used_exactly(network: Model, ranges: Ranges, tmp_path: Path) -> None:
    weight = network.folded().graph.constant("res_w")
    scales = (np.abs(weight.reshape(16, -1)).max(1) / 127 * np.linspace(0.5, 1.0, 16)).astype(np.float32)
    for target, limit in ((VNNI, 127), (AVX2, 64)):
        made = Graph.load(
            build(
                network, ranges, target, tmp_path / target.name, options=BuildOptions(weight_scales={"res_w": scales})
            ).path
        )
        codes, stored = (made.constant(n) for n in made.producer(
            next(n.input[1] for n in made if n.op_type == "Conv" and "res_w" in n.input[1])
        ).input[:2])  # fmt: skip
        np.testing.assert_array_equal(stored, scales)
        expected = np.clip(np.rint(weight / scales.reshape(-1, 1, 1, 1)), -limit, limit)
        np.testing.assert_array_equal(codes, expected)


def test_concatenated_tensors_share_a_scale(network: Model, ranges: Ranges, engine: Engine) -> None:
    del network, ranges
    found = scales_of(engine.path)
    assert found["left_act"] == found["right_act"] == found["cat"]


# --- transformers and real networks -------------------------------------------------------------------------------------


def test_a_transformer_block_keeps_its_norms_and_softmax_in_float(tmp_path: Path) -> None:
    model = loaded(transformer(), tmp_path)
    x = {"x": noise((16, 5, 8))}
    made = build(model, ranges_of(model, x), VNNI, tmp_path / "e")
    graph = Graph.load(made.path)
    ops = [node.op_type for node in graph]
    assert ops.count("Gemm") == 7  # MatMul and its bias became one node, with an int32 bias
    for node in graph:
        if node.op_type in ("LayerNormalization", "Softmax"):
            maker = graph.producer(node.input[0])
            assert maker is not None
            assert maker.op_type != "DequantizeLinear", node.name
    records = runner(made.path, VNNI).kernels(x)
    assert sum(r.macs for r in records if r.integer) == sum(r.macs for r in records) > 0
    want = runner(made.float_path, VNNI, mode="float").run(x)["logits"]
    got = runner(made.path, VNNI).run(x)["logits"]
    assert 10 * np.log10((want**2).sum() / ((want - got) ** 2).sum()) > 25


@pytest.mark.assets
@pytest.mark.parametrize("widen", [False, True], ids=["as it is", "widened"])
@pytest.mark.parametrize("name", ASSET_NETWORKS)
def test_every_asset_network_runs_all_macs_in_integers(assets: Path, tmp_path: Path, name: str, widen: bool) -> None:
    model, feeds = asset_model(assets, name)
    made = build(model, ranges_of(model, feeds), VNNI, tmp_path, options=BuildOptions(widen=widen))
    one = {key: value[:1] for key, value in feeds.items()}
    run_it = runner(made.path, VNNI)
    records = run_it.kernels(one)
    macs = sum(record.macs for record in records)
    assert macs >= sum(r.macs for r in runner(made.float_path, VNNI, mode="float").kernels(one)) > 0
    assert [r.node for r in records if r.macs and not r.integer] == []
    # The float kernels see the same MACs as the engine's graph, unless channels were added.
    if not widen:
        assert macs == sum(r.macs for r in runner(made.float_path, VNNI, mode="float").kernels(one))
    want = runner(made.float_path, VNNI, mode="float").run(one)
    got, unfused = run_it.run(one), runner(made.path, VNNI, mode="unfused").run(one)
    for output, expected in want.items():
        power = float((expected.astype(np.float64) ** 2).sum())
        ratio = 10 * np.log10(power / float(((got[output] - expected) ** 2).sum()))
        # Fusion may round otherwise here and there, but it may not change what the engine is.
        fused = 10 * np.log10(power / max(float(((got[output] - unfused[output]) ** 2).sum()), 1e-20))
        assert ratio > 8, (output, ratio)
        assert fused > ratio, (output, fused, ratio)
    assert all(kind == np.float32 for kind in (value.dtype for value in got.values()))


# --- choosing by measurement --------------------------------------------------------------------------------------------


def test_candidates_differ_in_what_they_quantize(network: Model, tmp_path: Path) -> None:
    graph = network.folded().graph
    labels = [option.label for option in candidates(graph, VNNI)]
    assert labels == ["wide", "widened"]
    block = loaded(transformer(), tmp_path).folded().graph
    labels = [option.label for option in candidates(block, VNNI)]
    assert labels[0] == "wide"
    assert "all" in labels
    fixed = BuildOptions(op_types=MAC_OPS)
    assert candidates(graph, VNNI, fixed) == [fixed]


def test_the_choice_is_measured_and_kept_alone(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    choice = choose(network, ranges, VNNI, tmp_path, images=[feeds], rounds=10)
    assert choice.engine.path == tmp_path / "engine.onnx"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == []
    assert {one.options.label for one in choice.measured} == {"wide", "widened"}
    assert choice.chosen.sqnr_db > max(one.sqnr_db for one in choice.measured) - 1
    assert choice.engine.choices["chosen"] == choice.chosen.options.label
    assert all(one.median_ms > 0 and one.float_ms > 0 for one in choice.measured)
    if choice.slower_than_float:
        assert any("faster" in note for note in choice.notes)
    got = runner(choice.engine.path, VNNI).run(feeds)["logits"]
    assert np.isfinite(got).all()


def test_the_prepared_graph_needs_no_shape_inference_of_the_vendor(network: Model) -> None:
    prepared = prepare(network.folded().graph)
    placement = place(prepared.graph, BuildOptions())
    assert len(placement.nodes) == len(set(placement.nodes))
    assert all(name in prepared.graph for name in placement.nodes)
    assert placement.tails == ("logits",)
    onnx.checker.check_model(prepared.graph.proto, full_check=True)


def test_for_another_processor_only_exactness_counts(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zsq_deploy.backends.onnxruntime import choose as module

    monkeypatch.setattr(module, "missing_features", lambda target: ("asimd",))
    monkeypatch.setattr(
        module, "paired_latency", lambda runners, feeds, **more: [1.0, *([2.0] * (len(runners) - 2)), 0.1]
    )
    choice = choose(network, ranges, ARM, tmp_path, images=[feeds])
    assert choice.chosen.options.label == "wide"  # the last candidate is exactly as good, and "faster"
    assert not choice.slower_than_float
    assert any("asimd" in note for note in choice.notes)


def test_slow_layers_are_offered_in_float(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zsq_deploy.backends.base import KernelRecord
    from zsq_deploy.backends.onnxruntime import choose as module

    stem = next(node.name for node in network.folded().graph if "stem_w" in node.input)
    rest = [node.name for node in network.folded().graph if node.op_type in ("Conv", "Gemm") and node.name != stem]

    def profile(path: Path, *args: Any, mode: str = "engine", **more: Any) -> list[KernelRecord]:
        slow = 50.0 if mode == "engine" else 10.0
        fast = 5.0 if mode == "engine" else 9.0
        times = {stem: slow, **dict.fromkeys(rest, fast)}
        return [KernelRecord(name, "Conv", mode == "engine", t, (name,), 1) for name, t in times.items()]

    def clock(runners: Any, feeds: Any, **more: Any) -> list[float]:
        assert more
        return (
            [1.0, 1.5, 0.8]
            if len(runners) == 3 and "mixed" in str(runners[2].path)
            else [1.0, *([1.5] * (len(runners) - 1))]
        )

    monkeypatch.setattr(module, "kernels", profile)
    monkeypatch.setattr(module, "paired_latency", clock)
    offered = choose(network, ranges, VNNI, tmp_path / "a", images=[feeds])
    assert offered.slower_than_float
    assert offered.mixed is not None
    assert offered.mixed.options.exclude == (stem,)
    assert offered.chosen.options.exclude == ()  # integer everywhere, unless the user allows float layers
    assert any(stem in note for note in offered.notes)
    taken = choose(network, ranges, VNNI, tmp_path / "b", images=[feeds], allow_float_layers=True)
    assert taken.chosen.options.exclude == (stem,)
    assert taken.engine.path == tmp_path / "b" / "engine.onnx"
    assert Graph.load(taken.engine.path).constant(Graph.load(taken.engine.path).node(stem).input[1]).dtype == np.float32
    assert sorted(p.name for p in (tmp_path / "b").iterdir() if p.is_dir()) == []
