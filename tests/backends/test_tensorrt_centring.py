"""Clips in the middle of the signed range: the network stays what it is, and its steps are half as long."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.centring import centre
from zsq_deploy.backends.tensorrt.lint import lint
from zsq_deploy.backends.tensorrt.making import Job
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import place_qdq
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT
from zsq_deploy.quant import Ranges, read_qdq

from .tensorrt_networks import NETWORKS, Net, images, network, outputs, ranges_of
from .test_tensorrt_bundle import Images

TEN = get_target("tensorrt-10")


def computed(graph: Graph, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What ONNX Runtime computes, node by node."""
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.editable().SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": x})[0])


def bounded(graph: Graph) -> dict[str, tuple[float, float]]:
    """Ranges as the Clips of the network give them."""
    found = ranges_of(network("depthwise"))
    return {
        name: (0.0, 6.0) if name.endswith("_relu") else pair for name, pair in found.items() if name in known(graph)
    }


def known(graph: Graph) -> set[str]:
    return {name for node in graph for name in (*node.input, *node.output)}


def test_only_what_an_unpadded_layer_reads_is_moved():
    graph = network("depthwise").folded().graph
    found = centre(graph, bounded(graph))
    assert found.moved == {"n_deep_relu": 3.0}  # a padded convolution reads stem_relu
    assert found.ranges["deep_relu_centred"] == (-3.0, 3.0)
    assert "deep_relu" not in known(found.graph)


def test_constants_are_those_of_the_closed_form():
    graph = network("depthwise").folded().graph
    new = centre(graph, bounded(graph)).graph

    def constant(of: Graph, node: str, place: int) -> np.ndarray[Any, Any]:
        value = of.constant(of.node(node).input[place])
        assert value is not None
        return value.astype(np.float64)

    weight = constant(graph, "n_point", 1)
    assert np.allclose(constant(new, "n_deep", 2), constant(graph, "n_deep", 2) - 3.0, rtol=0, atol=1e-6)
    expected = constant(graph, "n_point", 2) + 3.0 * weight.sum((1, 2, 3))
    assert np.allclose(constant(new, "n_point", 2), expected, rtol=0, atol=1e-5)
    assert [float(constant(new, "n_deep_relu", place)) for place in (1, 2)] == [-3.0, 3.0]
    for node, place in (("n_stem", 2), ("n_stem_relu", 2), ("n_point", 1), ("n_deep", 1)):
        assert np.array_equal(constant(new, node, place), constant(graph, node, place))


def test_the_network_computes_what_it_did():
    model = network("depthwise")
    graph, x = model.folded().graph, 3 * images(model, 32)
    wanted, found = computed(graph, x), computed(centre(graph, bounded(graph)).graph, x)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_product_and_layers_without_bias(bias: bool):
    net = Net(11)
    low, high = net.constant(np.float32(0)), net.constant(np.float32(1))
    first = net.op("Conv", "image", net.weight(4, 3, 8, 8, fan=192), name="stem")
    flat = net.op("Clip", first, low, high, name="clip")
    last = net.op("Conv", flat, net.weight(6, 4, 1, 1, fan=4), name="middle")
    wide = net.op("Clip", last, low, high, name="second")
    shape = net.constant(np.asarray([-1, 6], np.int64))
    reshaped = net.op("Reshape", wide, shape, name="flat")
    more = [net.bias(5)] if bias else []
    model = net.model(net.op("Gemm", reshaped, net.weight(6, 5, fan=6), *more, name="logits"))
    graph, x = model.folded().graph, images(model, 16)
    found = centre(graph, {"clip": (0.0, 1.0), "second": (0.0, 1.0)})
    assert found.moved == {"n_clip": 0.5}  # a Reshape stands behind the other one
    assert np.allclose(computed(found.graph, x), computed(graph, x), rtol=0, atol=1e-5)


def test_a_clip_in_front_of_a_matrix_product():
    net = Net(12)
    low, high = net.constant(np.float32(-1)), net.constant(np.float32(7))
    hidden = net.op("Conv", "image", net.weight(6, 3, 1, fan=3), net.bias(6), name="stem")
    clip = net.op("Clip", hidden, low, high, name="clip")
    model = net.model(net.op("Conv", clip, net.weight(4, 6, 1, fan=6), name="end"), shape=(3, 8))
    graph, x = model.folded().graph, 5 * images(model, 16)
    found = centre(graph, {"clip": (-1.0, 7.0), "stem": (-9.0, 11.0)})
    assert found.moved == {"n_clip": 3.0}
    assert found.ranges == {"clip_centred": (-4.0, 4.0), "stem_centred": (-12.0, 8.0)}
    assert np.allclose(computed(found.graph, x), computed(graph, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "depthwise"])
def test_networks_without_such_clips_stay_as_they_are(name: str):
    model = network(name)
    graph = model.folded().graph
    found = centre(graph, ranges_of(model))
    assert found.graph is graph
    assert found.moved == {}


def test_a_range_around_zero_and_a_clip_that_is_an_output_stay():
    graph = network("depthwise").folded().graph
    assert centre(graph, {**bounded(graph), "deep_relu": (-3.0, 4.0)}).moved == {}
    net = Net(4)
    low, high = net.constant(np.float32(0)), net.constant(np.float32(6))
    model = net.model(net.op("Clip", net.conv("image", 3, 8, name="stem"), low, high, name="end"))
    assert centre(model.folded().graph, {"end": (0.0, 6.0)}).moved == {}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("number", [8, 10, 11])
def test_steps_are_half_as_long_and_the_graph_is_clean(number: int, exact: bool):
    target = get_target(f"tensorrt-{number}")
    graph = network("depthwise").folded().graph
    ranges = bounded(graph)
    found = centre(graph, ranges)
    options = BuildOptions(exact_scales=exact)
    old = place_qdq(graph, ranges, target, options).graph
    new = place_qdq(found.graph, {**ranges, **found.ranges}, target, options).graph
    assert lint(new, target) == []
    before, after = (
        next(float(tensor.scale) for tensor in read_qdq(one) if tensor.name == name)
        for one, name in ((old, "deep_relu"), (new, "deep_relu_centred"))
    )
    assert after == pytest.approx(before / 2, rel=1e-6)
    x = images(network("depthwise"), 32)
    assert np.median(np.abs(outputs(new, x)["logits"] - computed(new, x))) < 1e-5  # a code may fall on the other side


def test_a_job_takes_it_where_the_reference_gets_better():
    model = network("depthwise")
    graph = model.folded().graph
    probes = {"image": images(model, 16, seed=3)}
    ranges = Ranges(bounded(graph), "minmax", model_digest=graph.digest)
    one = Job(model, ranges, TEN, Images(images(model, 24)), probes, SILENT)
    moved = centre(graph, ranges)
    x = [images(model, 24)[-16:], probes["image"]]
    gain = np.mean(
        [
            10
            * np.log10(np.square(errors(graph, ranges, part)).sum() / np.square(errors(moved.graph, both, part)).sum())
            for both in [{**ranges, **moved.ranges}]
            for part in x
        ]
    )
    other, notes = one.centred(BuildOptions())
    assert (other is not one) == bool(notes) == bool(gain >= 0.3)
    assert one.centred(BuildOptions(biases={"n_stem": np.zeros(8, np.float32)})) == (one, ())


def errors(graph: Graph, ranges: Any, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How far the Q/DQ graph is from its float network, in ONNX Runtime."""
    placed = place_qdq(graph, dict(ranges), TEN, BuildOptions()).graph
    return computed(placed, x).astype(np.float64) - computed(graph, x)
