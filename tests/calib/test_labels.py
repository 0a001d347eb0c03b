"""Where networks say what they see, the features in front of it, and what images are asked to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from zsq_deploy.calib.parts.labels import Softened, Targets, balanced, find_features, find_labels, uniform
from zsq_deploy.model import Graph, Model, TensorSpec, Twin, load_model

FLOAT = onnx.TensorProto.FLOAT


def graph_of(nodes: list[onnx.NodeProto], shape: list, constants: dict[str, np.ndarray], start: list) -> Graph:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, start)],
        [helper.make_tensor_value_info("out", FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return Graph(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def output(*shape: int | None, dtype: type = np.float32) -> tuple[TensorSpec, ...]:
    return (TensorSpec("out", shape, np.dtype(dtype)),)


DENSE = {"w": np.ones((5, 3), np.float32), "b": np.zeros(3, np.float32), "shape": np.array([-1, 3], np.int64)}


@pytest.mark.parametrize(
    ("nodes", "value", "features"),
    [
        (["MatMul x w -> out"], "out", "x"),
        (["MatMul x w -> m", "Add b m -> out"], "out", "x"),
        (["MatMul x w -> m", "Add m b -> s", "Softmax s -> out"], "s", "x"),
        (["Relu x -> r", "Gemm r w b -> g", "LogSoftmax g -> l", "Identity l -> out"], "g", "r"),
        (["Gemm x w b -> g", "Softmax g -> p", "Reshape p shape -> out"], "g", "x"),
        (["MatMul x w -> a", "MatMul x w -> c", "Add a c -> out"], "out", "out"),  # two branches: no last weights
    ],
)
def test_class_scores_of_heads(nodes: list[str], value: str, features: str) -> None:
    made = []
    for number, text in enumerate(nodes):
        left, right = text.split(" -> ")
        kind, *inputs = left.split()
        made.append(helper.make_node(kind, inputs, [right], f"n{number}"))
    graph = graph_of(made, ["N", 3], DENSE, ["N", 5])
    labels = find_labels(graph, output(None, 3))
    assert labels is not None
    assert (labels.value, labels.classes) == (value, 3)
    assert find_features(graph, labels) == features


def test_class_scores_of_a_convolutional_head() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["out"], "pool"),
    ]
    graph = graph_of(nodes, ["N", 3, 1, 1], {"k": np.ones((3, 4, 1, 1), np.float32)}, ["N", 4, 6, 6])
    labels = find_labels(graph, output(None, 3, 1, 1))
    assert labels is not None
    assert labels.value == "out"
    assert find_features(graph, labels) == "x"


@pytest.mark.parametrize(
    "outputs",
    [
        output(None, 1),
        output(None, 3, 4, 4),
        output(3),
        output(None, 3, dtype=np.int64),
        output(None, None),
        (*output(None, 3), *output(None, 4)),
    ],
)
def test_other_outputs_are_no_class_scores(outputs: tuple[TensorSpec, ...]) -> None:
    graph = graph_of([helper.make_node("MatMul", ["x", "w"], ["out"], "m")], ["N", 3], DENSE, ["N", 5])
    assert find_labels(graph, outputs) is None


def test_a_softmax_over_something_else_is_no_classifier() -> None:
    graph = graph_of([helper.make_node("Softmax", ["x"], ["out"], "s", axis=0)], ["N", 3], {}, ["N", 3])
    assert find_labels(graph, output(None, 3)) is None


def test_a_softmax_behind_the_scores_changes_nothing(classifier: Callable[..., Model]) -> None:
    plain, soft = classifier(), classifier(softmax=True)
    found = [find_labels(model.graph, model.outputs) for model in (plain, soft)]
    assert [space.value for space in found if space] == ["out", "scores"]
    assert [find_features(m.graph, s) for m, s in zip((plain, soft), found, strict=True) if s] == ["features"] * 2


CLASSIFIERS = {
    "resnet20_cifar10": (10, 64),
    "mlperf_tiny_resnet8_cifar10": (10, 64),
    "mlperf_tiny_mobilenet_v1_025_vww": (2, 256),
    "mobilenet_v1_025_imagenet": (1000, 256),
    "squeezenet11_imagenet": (1000, 512),
    "vit_cifar10": (10, 128),
}


@pytest.mark.assets
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_of_real_classifiers_are_what_the_last_weights_make_of_the_features(assets: Path, name: str) -> None:
    model = load_model(assets / "models" / f"{name}.onnx")
    labels = find_labels(model.graph, model.outputs)
    assert labels is not None
    assert labels.classes == CLASSIFIERS[name][0]
    features = find_features(model.graph, labels)
    x = torch.randn(model.inputs[0].with_batch(2), generator=torch.Generator().manual_seed(0))
    values = Twin(model.graph).run({model.inputs[0].name: x}, fetch=(features, labels.value))
    seen = values[features].double().numpy()
    assert seen.shape[:2] == (2, CLASSIFIERS[name][1])
    weights = [
        c for node in model.graph for c in node.input if node.op_type in ("Gemm", "Conv") and features in node.input
    ]
    matrix = model.graph.constant(weights[1]).astype(np.float64)
    bias = model.graph.constant(weights[2]).astype(np.float64)
    matrix = matrix.reshape(matrix.shape[:2])
    matrix = matrix if matrix.shape[0] == labels.classes else matrix.T
    scores = np.einsum("cf,nf...->nc...", matrix, seen) + bias.reshape(1, -1, *[1] * (seen.ndim - 2))
    if name.startswith("squeezenet"):
        scores = np.maximum(scores, 0)  # it has a rectifier behind its last convolution
    scores = scores.reshape(2, labels.classes, -1).mean(2)
    np.testing.assert_allclose(values[labels.value].numpy().reshape(2, -1), scores, rtol=1e-3, atol=1e-3)


@pytest.mark.assets
@pytest.mark.parametrize("name", ["dncnn25", "ultraface_rfb320"])
def test_denoisers_and_detectors_have_no_classes(assets: Path, name: str) -> None:
    shape = {"input_shape": (1, 1, 64, 64)} if name == "dncnn25" else {}
    model = load_model(assets / "models" / f"{name}.onnx", **shape)
    assert find_labels(model.graph, model.outputs) is None


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 80), classes=st.integers(2, 30), seed=st.integers(0, 9))
def test_rules_draw_what_they_promise(count: int, classes: int, seed: int) -> None:
    for rule in (uniform, balanced, Softened(0.6)):
        one, two = (rule(count, classes, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert torch.equal(one.classes, two.classes)
        assert one.classes.shape == (count,)
        assert one.classes.dtype == torch.int64
        assert 0 <= int(one.classes.min()) <= int(one.classes.max()) < classes
        wanted = one.probabilities(classes)
        assert wanted.shape == (count, classes)
        assert torch.equal(wanted.argmax(1), one.classes)
    even = torch.bincount(balanced(count, classes, torch.Generator().manual_seed(seed)).classes, minlength=classes)
    assert int(even.max() - even.min()) <= 1


def test_half_of_the_images_are_asked_for_less() -> None:
    targets = Softened(0.6).__call__(4000, 10, torch.Generator().manual_seed(1))
    own = targets.probabilities(10).gather(1, targets.classes[:, None])[:, 0].double()
    soft = own[own < 1]
    assert 0.47 < len(soft) / 4000 < 0.53
    assert 0.6 <= float(soft.min()) < 0.61
    assert float(soft.mean()) == pytest.approx(0.8, abs=0.01)
    assert float(targets.probabilities(10).sum(1).max()) == 1
    assert torch.equal(targets.probabilities(10).sum(1).double(), own)  # nothing on the other classes
    everyone = Softened(1.0)(50, 10, torch.Generator().manual_seed(1))
    assert torch.equal(everyone.probabilities(10).gather(1, everyone.classes[:, None]), torch.ones(50, 1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Softened(1.5)


def test_rows_of_targets() -> None:
    targets = Softened(0.5)(9, 4, torch.Generator().manual_seed(2))
    part = targets.rows(3, 4)
    assert torch.equal(part.classes, targets.classes[3:7])
    assert torch.equal(part.probabilities(4), targets.probabilities(4)[3:7])
    hard = Targets(targets.classes).rows(1, 2)
    assert hard.soft is None
    assert torch.equal(hard.probabilities(4), torch.eye(4)[targets.classes[1:3]])
