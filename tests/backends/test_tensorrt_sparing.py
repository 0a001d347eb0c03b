"""Layers left in float where 8 bits lose too much: which, how many, and what it wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.base import BuildSettings
from zsq_deploy.backends.tensorrt.lint import lint
from zsq_deploy.backends.tensorrt.making import Job
from zsq_deploy.backends.tensorrt.options import FLOAT_MACS, BuildOptions, options_from
from zsq_deploy.backends.tensorrt.placement import place_qdq, plan_nodes
from zsq_deploy.backends.tensorrt.quantizer import build
from zsq_deploy.backends.tensorrt.sparing import ENOUGH_DB, layer_noise, spare
from zsq_deploy.errors import UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.macs import node_macs
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.progress import SILENT
from zsq_deploy.quant import Ranges, read_qdq
from zsq_deploy.quant.bias import apply_biases, bias_sites

from .tensorrt_networks import Net, images, network, ranges_of
from .test_tensorrt_bundle import Images

TEN = get_target("tensorrt-10")
CORRECTED = BuildOptions(bias_correction=True, float_macs=0.4)


def uneven() -> Model:
    """One channel between stem and depthwise convolution is 300 times as large as the others, and weighs 300 times less behind."""
    net = Net(21)
    weight = net.rng.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32)
    weight[0] *= 300
    first = net.op("Conv", "image", net.constant(weight), net.bias(8), name="stem", pads=[1] * 4)
    kernels = net.rng.normal(0, 0.5, (8, 1, 3, 3)).astype(np.float32)
    kernels[0] /= 300
    clipped = net.op("Relu", first, name="stem_relu")
    deep = net.op("Conv", clipped, net.constant(kernels), net.bias(8), name="deep", pads=[1] * 4, group=8)
    last = net.conv(net.op("Relu", deep, name="deep_relu"), 8, 24, 1, name="point")
    pooled = net.op("Flatten", net.op("GlobalAveragePool", last, name="pool"), name="flat")
    return net.model(net.op("Gemm", pooled, net.weight(5, 24, fan=24), net.bias(5), name="logits", transB=1))


def job_of(model: Model, *, target: Any = TEN) -> Job:
    ranges = Ranges(ranges_of(model), "minmax", model_digest=model.folded().graph.digest)
    return Job(model, ranges, target, Images(images(model, 24)), {"image": images(model, 16, seed=3)}, SILENT)


def run(graph: Graph, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.editable().SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": x})[0]).astype(np.float64)


def sqnr_db(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()))


def channel_means(graph: Graph, name: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found = Twin(graph, device="cpu").run({"image": torch.from_numpy(x)}, fetch=[name])[name].double().numpy()
    return np.asarray(np.moveaxis(found, 1, 0).reshape(found.shape[1], -1).mean(1))


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "uneven"])
def test_the_noise_of_a_layer_is_what_it_does_alone(name: str):
    """Against another way: the layer alone in the public placement, its mean error taken out of its bias, run by ONNX Runtime."""
    model = uneven() if name == "uneven" else network(name)
    graph, ranges, x = model.folded().graph, ranges_of(model), images(model, 16)
    found = layer_noise(graph, ranges, TEN, CORRECTED, [[{"image": x}]])
    assert sum(found.values()) == pytest.approx(1.0)
    planned, _ = plan_nodes(graph, ranges, CORRECTED)
    assert list(found) == [one for one in planned if graph.node(one).op_type in ("Conv", "Gemm")]
    wanted, powers = run(graph, x), {}
    for one in found:
        alone = place_qdq(graph, ranges, TEN, BuildOptions(exclude=tuple(set(planned) - {one}))).graph
        site = next(site for site in bias_sites(graph) if site.node == one)
        shift = channel_means(graph, site.output, x) - channel_means(alone, alone.node(one).output[0], x)
        changed = apply_biases(alone, {one: (site.bias + shift).astype(np.float32)})
        powers[one] = np.square(run(changed, x) - wanted).sum()
    for one, share in found.items():
        assert share == pytest.approx(powers[one] / sum(powers.values()), rel=0.05, abs=1e-3)


def test_the_layer_that_costs_most_is_left_in_float():
    one = job_of(uneven())
    placed = one.corrected(CORRECTED)[0]
    found = one.spared(placed, CORRECTED)
    assert found is not None
    assert "n_deep" in found.nodes
    assert found.before < ENOUGH_DB < found.after
    macs = node_macs(one.folded)
    assert found.share == pytest.approx(sum(macs[name] for name in found.nodes) / sum(macs.values()))
    assert found.share <= CORRECTED.float_macs
    made = one.explicit(CORRECTED)
    x = images(one.model, 32, seed=5)
    plain = one.explicit(CORRECTED.with_(float_macs=0.0))
    wanted = run(one.folded, x)
    assert sqnr_db(run(made.reference, x), wanted) > sqnr_db(run(plain.reference, x), wanted) + 5.0
    assert made.record["spared"]["nodes"] == list(found.nodes)
    assert all("too much" in made.record["float_nodes"][name] for name in found.nodes)
    assert any("stay in float" in note and "--float-macs 0" in note for note in made.notes)
    assert "spared" not in plain.record


def test_the_limit_holds_and_zero_turns_it_off():
    one = job_of(uneven())
    placed = one.corrected(CORRECTED)[0]
    share = node_macs(one.folded)["n_deep"] / sum(node_macs(one.folded).values())
    assert one.spared(placed, CORRECTED.with_(float_macs=0.0)) is None
    for limit in (share * 0.9, share * 1.01):
        found = one.spared(placed, CORRECTED.with_(float_macs=limit))
        assert (found is not None and "n_deep" in found.nodes) == (limit > share)
        assert found is None or found.share <= limit


def test_a_reference_that_is_good_enough_keeps_all_in_8_bits():
    one = job_of(network("residual"))
    assert one.judged(one.corrected(CORRECTED)[0].graph)["sqnr_db"] > ENOUGH_DB
    assert "spared" not in one.explicit(CORRECTED).record


def test_what_does_not_help_is_not_done():
    """Whatever is left in float, the measured quality stays: then nothing is."""
    model = uneven()
    asked: list[tuple[str, ...]] = []

    def measure(options: BuildOptions) -> float:
        asked.append(options.spared)
        return 10.5

    kinds = [[{"image": images(model, 8)}]]
    found = spare(
        model.folded().graph,
        ranges_of(model),
        TEN,
        CORRECTED.with_(float_macs=0.9),
        kinds,
        before=10.0,
        measure=measure,
    )
    assert found is None
    assert [len(nodes) for nodes in asked] == sorted(
        {len(nodes) for nodes in asked}
    )  # more each time, until nothing is left
    assert asked


@pytest.mark.parametrize("number", [8, 10, 11])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_the_graph_is_clean_and_its_float_layers_read_no_rounded_numbers(number: int, kind: str):
    if number == 8 and kind == "float16":
        return  # its graphs hold no 16-bit floats
    target = get_target(f"tensorrt-{number}")
    made = job_of(uneven(), target=target).explicit(CORRECTED.with_(float_type=kind, exact_scales=True))
    assert lint(made.network, target) == []
    rounded = {tensor.output for tensor in read_qdq(made.network)}
    for name in made.record["spared"]["nodes"]:
        assert not rounded & set(made.network.node(name).input)
    assert any(rounded & set(node.input) for node in made.network if node.op_type == "Conv")


def test_the_manifest_and_the_notes_say_it(tmp_path: Path):
    model = uneven()
    ranges = Ranges(ranges_of(model), "minmax")
    options = options_from(BuildSettings(float_macs=0.4), TEN).with_(bias_correction=True)
    engine = build(model, ranges, TEN, tmp_path, options=options, calibration=Images(images(model, 24)))
    assert engine.choices["float_macs"] == 0.4
    assert engine.choices["spared"]["nodes"]
    assert 0.0 < engine.choices["spared"]["macs_share"] <= 0.4
    assert any("of the multiply-accumulates" in note for note in engine.choices["notes"])


def test_what_can_be_asked_for():
    assert options_from(BuildSettings(), TEN).float_macs == FLOAT_MACS
    assert options_from(BuildSettings(float_macs=0.0), TEN).float_macs == 0.0
    assert options_from(BuildSettings(quantizer="implicit"), TEN).float_macs == 0.0
    for settings in (BuildSettings(quantizer="implicit", float_macs=0.1), BuildSettings(bits="w4a32", float_macs=0.1)):
        with pytest.raises(UsageError, match="float"):
            options_from(settings, TEN)
    for wrong in (-0.1, 1.0):
        with pytest.raises(UsageError, match="share of the multiply-accumulates"):
            options_from(BuildSettings(float_macs=wrong), TEN)
    with pytest.raises(UsageError, match="not in the network"):
        plan_nodes(uneven().folded().graph, {}, BuildOptions(spared=("nothing",)))
    for other in ("ort-x86-vnni", "openvino-cpu"):
        with pytest.raises(UsageError, match="which layers stay in float"):
            get_backend(other).options_from(BuildSettings(float_macs=0.1), get_target(other))
