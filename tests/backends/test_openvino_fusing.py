"""Residuals added inside convolutions: fewer kernels, and not one number changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.openvino.convert import convert, save
from zsq_deploy.backends.openvino.fusing import fuse_residuals, same_outputs
from zsq_deploy.backends.openvino.merging import drop_merged_pairs
from zsq_deploy.backends.openvino.runner import OvRunner
from zsq_deploy.model import Model
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import PlacementRules, insert_qdq
from zsq_deploy.quant.settle import settle

from .openvino_engines import noise
from .ort_engines import Builder, loaded, ranges_of

CPU = get_target("openvino-cpu")


SHAPE = ("n", 3, 16, 16)


def residual(seed: int = 0, act: bool = True) -> onnx.ModelProto:
    """Two convolutions beside a shortcut, and their sum, which a last one reads."""
    b = Builder(seed)
    x = b.node("Relu", [b.conv("x", "stem", 3, 16, 3)], "stem_act")
    y = b.node("Relu", [b.conv(x, "first", 16, 16, 3)], "first_act")
    y = b.conv(y, "branch", 16, 16, 3)
    y = b.node("Add", [y, x] if seed % 2 else [x, y], "sum")
    if act:
        y = b.node("Relu", [y], "sum_act")
    y = b.conv(y, "last", 16, 8, 1)
    return b.model(SHAPE, {y: ("n", 8, 16, 16)})


def settled(model: Model) -> Graph:
    feeds = {"x": noise((8, 3, 16, 16))}
    rules = PlacementRules(residual="skip", bias="float", always_output=frozenset())
    graph = insert_qdq(
        model.folded().graph, ranges_of(model, feeds), activation=CPU.activation, weight=CPU.weight, rules=rules
    )
    return settle(graph, activation=CPU.activation, weight=CPU.weight).graph


def runner_of(graph: Graph, path: Path) -> OvRunner:
    save(convert(graph), path)
    return OvRunner(path, CPU)


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_number_changes_and_a_kernel_is_saved(seed: int, act: bool, tmp_path: Path) -> None:
    graph = settled(loaded(residual(seed, act), tmp_path))
    fused = fuse_residuals(graph)
    onnx.checker.check_model(fused.proto, full_check=True)
    plain, merged = runner_of(graph, tmp_path / "a.xml"), runner_of(fused, tmp_path / "b.xml")
    # Far outside of the calibrated range as well: what the pair cuts off, the sum's own rounding cuts off.
    for scale in (1.0, 5.0):
        feeds = {"x": noise((4, 3, 16, 16), seed + 7) * scale}
        assert same_outputs(plain.run(feeds), merged.run(feeds))
    records = merged.kernels({"x": noise((1, 3, 16, 16))})
    assert not [
        record.op for record in records if "sum_node" in record.sources and not record.macs
    ]  # no kernel of its own


def test_the_pair_is_what_the_contract_leaves_out(tmp_path: Path) -> None:
    """Dropping merged pairs gives back the graph that was fused."""
    graph = settled(loaded(residual(), tmp_path))
    back, sums = drop_merged_pairs(fuse_residuals(graph))
    assert len(sums) == 1
    assert [list(node.input) for node in back] == [list(node.input) for node in graph]


def test_graphs_without_residuals_are_left_alone(tmp_path: Path) -> None:
    b = Builder(0)
    x = b.node("Relu", [b.conv("x", "stem", 3, 8, 3)], "stem_act")
    graph = settled(loaded(b.model(SHAPE, {b.conv(x, "last", 8, 8, 1): ("n", 8, 16, 16)}), tmp_path))
    assert fuse_residuals(graph) is graph


def test_sums_that_others_read_in_float_are_left_alone(tmp_path: Path) -> None:
    """The graph's output is the sum itself: nothing behind it cuts off what the pair would."""
    b = Builder(0)
    x = b.node("Relu", [b.conv("x", "stem", 3, 16, 3)], "stem_act")
    y = b.node("Add", [x, b.conv(x, "branch", 16, 16, 3)], "sum")
    graph = settled(loaded(b.model(SHAPE, {y: ("n", 16, 16, 16)}), tmp_path))
    assert fuse_residuals(graph) is graph


def test_a_convolution_that_reads_the_other_operand_is_left_alone(tmp_path: Path) -> None:
    """The plugin makes the sum in place of the other operand, which this convolution still reads: it would not merge the pair."""
    b = Builder(0)
    x = b.node("Relu", [b.conv("x", "stem", 3, 16, 3)], "stem_act")
    y = b.node("Add", [x, b.conv(x, "branch", 16, 16, 3)], "sum")
    y = b.conv(b.node("Relu", [y], "sum_act"), "last", 16, 8, 1)
    graph = settled(loaded(b.model(SHAPE, {y: ("n", 8, 16, 16)}), tmp_path))
    assert fuse_residuals(graph) is graph


def test_a_projection_shortcut_is_left_alone_and_the_identity_behind_it_is_not(tmp_path: Path) -> None:
    """Both operands come from convolutions: the plugin chooses one of the two to add in, and needs no asking."""
    b = Builder(3)
    x = b.node("Relu", [b.conv("x", "stem", 3, 16, 3)], "stem_act")
    y = b.conv(b.node("Relu", [b.conv(x, "first", 16, 16, 3)], "first_act"), "branch", 16, 16, 3)
    x = b.node("Relu", [b.node("Add", [y, b.conv(x, "short", 16, 16, 1)], "projected")], "projected_act")
    y = b.conv(b.node("Relu", [b.conv(x, "second", 16, 16, 3)], "second_act"), "branch2", 16, 16, 3)
    x = b.node("Relu", [b.node("Add", [y, x], "identity")], "identity_act")
    y = b.conv(x, "last", 16, 8, 1)
    graph = settled(loaded(b.model(SHAPE, {y: ("n", 8, 16, 16)}), tmp_path))
    fused = fuse_residuals(graph)
    assert len([node for node in fused if "_fusing_Q" in node.name]) == 1
    feeds = {"x": noise((4, 3, 16, 16), 5)}
    plain, merged = runner_of(graph, tmp_path / "a.xml"), runner_of(fused, tmp_path / "b.xml")
    assert same_outputs(plain.run(feeds), merged.run(feeds))
    sums = [record for record in merged.kernels({"x": noise((1, 3, 16, 16))}) if not record.macs]
    assert not [record.op for record in sums if {"projected_node", "identity_node"} & set(record.sources)]


def test_equal_means_every_bit() -> None:
    a = {"y": np.array([1.0, 2.0], np.float32)}
    assert same_outputs(a, {"y": a["y"].copy()})
    assert not same_outputs(a, {"y": np.nextafter(a["y"], 9, dtype=np.float32)})
    assert not same_outputs(a, {"z": a["y"]})
