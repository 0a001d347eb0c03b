"""Placement of Q/DQ by NVIDIA's rules, rule by rule on small networks, and on real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.fusion import describe_fusion, expect_fusion
from zsq_deploy.backends.tensorrt.lint import lint
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import Placed, place_int4, place_qdq
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.model import load_model
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant import read_qdq

from .tensorrt_networks import NETWORKS, images, network, outputs, ranges_of

TARGET = get_target("tensorrt-10")
TARGETS = [get_target(f"tensorrt-{number}") for number in (8, 10, 11)]


def placed(name: str, target=TARGET, **options) -> Placed:
    model = network(name)
    return place_qdq(model.folded().graph, ranges_of(model), target, BuildOptions(**options))


def rounded(result: Placed) -> set[str]:
    return {tensor.name for tensor in read_qdq(result.graph) if not tensor.is_weight}


def sqnr_db(value: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / max(np.square(value - wanted).sum(), 1e-30)))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("exact", [False, True])
def test_is_lint_clean_and_near_the_float_network(name, target, exact):
    model = network(name)
    graph = model.folded().graph
    result = place_qdq(graph, ranges_of(model), target, BuildOptions(exact_scales=exact))
    assert lint(result.graph, target) == []
    x = images(model)
    wanted, found = outputs(graph, x), outputs(result.graph, x)
    for key, value in wanted.items():
        assert sqnr_db(found[key], value) > 20.0


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_are_signed_symmetric_and_biases_float(name):
    graph = placed(name).graph
    for tensor in read_qdq(graph):
        assert tensor.dtype == "int8"
        assert not tensor.zero_point.any()
        assert tensor.is_weight or tensor.scale.size == 1
    for node in graph:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2:
            assert graph.constant(node.input[2]).dtype == np.float32


def test_weights_have_a_scale_for_each_output_channel():
    graph = placed("transposed").graph
    tensors = {tensor.output: tensor for tensor in read_qdq(graph)}
    conv, up = tensors[graph.node("n_stem").input[1]], tensors[graph.node("n_up").input[1]]
    assert (conv.axis, conv.scale.shape) == (0, (8,))
    assert (up.axis, up.scale.shape) == (1, (4,))
    for tensor in (conv, up):
        assert graph.constant(tensor.codes).min() >= -127


def test_a_residual_rounds_the_skip_and_not_the_convolution():
    result = placed("residual")
    assert rounded(result) == {"image", "stem_relu", "left_relu", "out", "flat"}
    add = result.graph.node("n_sum")
    assert result.graph.producer(add.input[0]).op_type == "Conv"
    assert result.graph.producer(add.input[1]).op_type == "DequantizeLinear"
    # One pair serves the skip and the convolution.
    assert add.input[1] == result.graph.node("n_left").input[0]


def test_of_two_convolutions_one_is_rounded():
    result = placed("projection")
    makers = [result.graph.producer(value).op_type for value in result.graph.node("n_sum").input]
    assert sorted(makers) == ["Conv", "DequantizeLinear"]


def test_nothing_stands_between_a_convolution_and_its_activation():
    for name in NETWORKS:
        graph = placed(name).graph
        for node in graph:
            if node.op_type in ("Relu", "Clip"):
                assert graph.producer(node.input[0]).op_type not in ("DequantizeLinear", "QuantizeLinear")


def test_all_sides_of_a_concatenation_and_of_what_moves_it_share_one_scale():
    result = placed("concat")
    tensors = {tensor.name: tensor for tensor in read_qdq(result.graph) if not tensor.is_weight}
    assert {float(tensors[name].scale) for name in ("small_relu", "wide_relu", "max")} == {float(tensors["max"].scale)}
    assert "both" not in tensors  # the maximum is transparent: rounded once, in front of the convolution
    assert float(tensors["stem_relu"].scale) != float(tensors["max"].scale)


def test_settling_keeps_one_scale_across_a_concatenation():
    tensors = {t.name: t for t in read_qdq(placed("concat", exact_scales=True).graph) if not t.is_weight}
    assert len({float(tensors[name].scale) for name in ("small_relu", "wide_relu", "max")}) == 1


def test_attention_stays_in_float_unless_asked_for():
    plain, asked = placed("transformer"), placed("transformer", attention=True)
    assert set(plain.nodes) == {"n_q", "n_k", "n_v", "n_project", "n_fc1", "n_fc2"}
    assert "fuses attention" in plain.skipped["n_scores"]
    assert set(asked.nodes) - set(plain.nodes) == {"n_scores", "n_mix"}
    # Residual sums of a transformer have no convolution to be part of.
    assert "no operand comes straight" in plain.skipped["n_sum"]
    assert lint(asked.graph, TARGET) == []


def test_outputs_stay_in_float_and_so_do_sums_that_lead_to_them():
    result = placed("transposed")
    assert "last" not in rounded(result)
    assert result.graph.producer("last").op_type == "Conv"


def test_tensorrt_8_gets_float_weights_with_the_same_numbers():
    eight, ten = placed("residual", TARGETS[0], exact_scales=True), placed("residual", exact_scales=True)
    kinds = [(t.quantize is None) for t in read_qdq(eight.graph) if t.is_weight]
    assert not any(kinds)
    x = images(network("residual"))
    assert np.array_equal(outputs(eight.graph, x)["logits"], outputs(ten.graph, x)["logits"])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_is_what_onnx_runtime_computes(name):
    """With settled scales codes do not depend on who rounds them: float32 differs in its last bits only."""
    ort = pytest.importorskip("onnxruntime")
    result = placed(name, exact_scales=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(result.graph.editable().SerializeToString(), options)
    x = images(network(name), seed=9)
    for key, value in outputs(result.graph, x).items():
        found = session.run([key], {"image": x})[0]
        if not result.inexact:
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
        assert sqnr_db(found, value) > 60.0


def test_exclusions_and_operator_types_are_kept():
    result = placed("residual", exclude=("n_left",))
    assert "n_left" not in result.nodes
    assert result.skipped["n_left"] == "excluded by the options"
    assert lint(result.graph, TARGET) == []
    only = placed("residual", op_types=("Gemm",))
    assert only.nodes == ("n_logits",)
    with pytest.raises(UsageError, match="not in the network"):
        placed("residual", exclude=("nobody",))
    with pytest.raises(EngineError, match="can be quantized"):
        placed("residual", op_types=("Add",))


def test_what_will_fuse_is_told():
    groups = expect_fusion(placed("residual").graph)
    kinds = {group.nodes[0]: group for group in groups}
    right = kinds["n_right"]
    assert (right.kind, right.nodes, right.computes, right.writes, right.apart) == (
        "Conv+Add+Relu",
        ("n_right", "n_sum", "n_out"),
        "int8",
        "int8",
        "",
    )
    assert (kinds["n_logits"].kind, kinds["n_logits"].writes) == ("Gemm", "float")
    assert describe_fusion(groups).splitlines()[-1] == (
        "expected: 4 kernels, 4 of them in 8 bits, 3 write 8 bits, 1 with the sum inside"
    )
    two = {group.nodes[0]: group for group in expect_fusion(placed("projection").graph)}
    assert sorted(two[name].kind for name in ("n_main", "n_side")) == ["Conv", "Conv+Add+Relu"]
    words = expect_fusion(placed("transformer").graph)
    assert {group.nodes[0]: group.kind for group in words}["n_fc1"] == "MatMul+bias+Relu"
    assert {group.nodes[0]: group.computes for group in words}["n_scores"] == "float"
    assert expect_fusion(network("residual").folded().graph)[0].computes == "float"


def test_long_lists_of_kernels_are_put_together():
    groups = expect_fusion(placed("residual").graph)
    assert describe_fusion(groups, most=4) == describe_fusion(groups)
    assert describe_fusion(groups, most=3).splitlines() == [
        "2 x Conv+Relu: n_stem ... n_left: computes int8, writes int8",
        "Conv+Add+Relu: n_right, n_sum, n_out: computes int8, writes int8",
        "Gemm: n_logits: computes int8, writes float",
        describe_fusion(groups).splitlines()[-1],
    ]
    # what could have been in a kernel and is not is never put together with others
    odd = [dataclasses.replace(group, apart="Add: why") for group in groups[:2]]
    assert describe_fusion([*odd, *groups[2:]], most=1).count("apart: Add: why") == 2


def test_four_bit_weights_in_blocks_of_matrix_products():
    model = network("transformer")
    graph = model.folded().graph
    result = place_int4(graph, TARGET)
    assert set(result.nodes) == {"n_q", "n_k", "n_v", "n_project", "n_fc1", "n_fc2"}
    stored = {tensor.name: tensor for tensor in read_qdq(result.graph)}
    assert {(tensor.dtype, tensor.axis, tensor.block) for tensor in stored.values()} == {
        ("int4", 0, 64),
        ("int4", 0, 128),
    }
    assert all(tensor.is_weight for tensor in stored.values())
    assert result.graph.opset == 21
    assert lint(result.graph, TARGET) == []
    x = images(model)
    assert sqnr_db(outputs(result.graph, x)["end"], outputs(graph, x)["end"]) > 12.0
    assert {group.computes for group in expect_fusion(result.graph)} == {"int4 weights", "float"}
    with pytest.raises(UsageError, match="no 4-bit weights"):
        place_int4(graph, TARGETS[0])
    with pytest.raises(EngineError, match="4-bit weights in blocks"):
        place_int4(network("residual").folded().graph, TARGET)


REAL = {
    "resnet20_cifar10": (20, 9),
    "mlperf_tiny_resnet8_cifar10": (10, 3),
    "mlperf_tiny_mobilenet_v1_025_vww": (28, 0),
    "mobilenet_v1_025_imagenet": (28, 0),
    "squeezenet11_imagenet": (26, 0),
    "vit_cifar10": (26, 0),
    "ultraface_rfb320": (52, 1),
    "dncnn25": (17, 0),
}
"""Network -> integer kernels, and sums that are expected inside of them."""


@pytest.mark.assets
def test_the_transformer_of_the_assets_takes_four_bit_weights(assets: Path):
    model = load_model(assets / "models" / "vit_cifar10.onnx")
    graph = model.folded().graph
    result = place_int4(graph, TARGETS[2])
    stored = {tensor.name: tensor for tensor in read_qdq(result.graph)}
    products = [
        node for node in graph if node.op_type in ("MatMul", "Gemm") and graph.constant(node.input[1]) is not None
    ]
    assert set(result.nodes) == {node.name for node in products}
    assert len(result.nodes) == 25
    assert {tensor.dtype for tensor in stored.values()} == {"int4"}
    assert lint(result.graph, TARGETS[2]) == []
    x = np.random.default_rng(0).normal(0, 1, graph.inputs[0].with_batch(2)).astype(np.float32)
    with torch.no_grad():
        value, wanted = (
            next(iter(Twin(one, device="cpu").run({graph.inputs[0].name: torch.from_numpy(x)}).values())).numpy()
            for one in (result.graph, graph)
        )
    assert sqnr_db(value, wanted) > 10.0


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_networks_are_lint_clean(name: str, assets: Path):
    shape = (1, 1, 64, 64) if name == "dncnn25" else None  # its file leaves the size open
    model = load_model(assets / "models" / f"{name}.onnx", input_shape=shape)
    graph = model.folded().graph
    x = np.random.default_rng(0).normal(0, 1, graph.inputs[0].with_batch(1)).astype(np.float32)
    names = [value for node in graph for value in node.output if graph.constant(value) is None]
    with torch.no_grad():
        found = Twin(graph, device="cpu").run({graph.inputs[0].name: torch.from_numpy(x)}, fetch=names)
    ranges = {name: (float(value.min()), float(value.max())) for name, value in found.items()}
    ranges[graph.inputs[0].name] = (float(x.min()), float(x.max()))
    for target in TARGETS:
        result = place_qdq(graph, ranges, target, BuildOptions(exact_scales=True))
        assert lint(result.graph, target) == []
    groups = expect_fusion(result.graph)
    kernels = sum(group.computes == "int8" for group in groups)
    sums = sum("Add" in group.kind.split("+") for group in groups if group.computes == "int8")
    assert (kernels, sums) == REAL[name]
