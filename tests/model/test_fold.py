"""Folding batch normalization: against ONNX Runtime on the graph that still has it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.errors import ModelError
from zsq_deploy.model import Graph, batch_norms, fold

GENERATOR = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def norm_constants(channels: int, name: str = "bn") -> dict[str, np.ndarray]:
    return {
        f"{name}.gamma": normal(channels),
        f"{name}.beta": normal(channels),
        f"{name}.mean": normal(channels),
        f"{name}.var": np.abs(normal(channels)) + np.float32(0.1),
    }


def graph(nodes, constants, shape, out_rank=4, opset=17) -> Graph:
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * out_rank)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    return Graph(model)


def bn(source: str, target: str, name: str = "bn", **attributes) -> onnx.NodeProto:
    inputs = [source, *(f"{name}.{part}" for part in ("gamma", "beta", "mean", "var"))]
    return helper.make_node("BatchNormalization", inputs, [target], name=name, epsilon=1e-3, **attributes)


LAYERS = {
    "conv": (["Conv"], {"w": (6, 4, 3, 3)}, {}, (2, 4, 8, 8)),
    "conv with bias": (["Conv"], {"w": (6, 4, 3, 3), "b": (6,)}, {}, (2, 4, 8, 8)),
    "grouped conv": (["Conv"], {"w": (6, 2, 3, 3), "b": (6,)}, {"group": 2}, (2, 4, 8, 8)),
    "depthwise conv": (["Conv"], {"w": (6, 1, 3, 3)}, {"group": 6}, (2, 6, 8, 8)),
    "conv 1d": (["Conv"], {"w": (6, 4, 3)}, {}, (2, 4, 8)),
    "conv 3d": (["Conv"], {"w": (6, 4, 2, 2, 2)}, {}, (1, 4, 4, 4, 4)),
    "transposed": (["ConvTranspose"], {"w": (4, 6, 3, 3), "b": (6,)}, {"strides": [2, 2]}, (2, 4, 5, 5)),
    "grouped transposed": (["ConvTranspose"], {"w": (4, 3, 2, 2)}, {"group": 2}, (2, 4, 5, 5)),
    "gemm": (["Gemm"], {"w": (4, 6), "b": (6,)}, {}, (5, 4)),
    "gemm transposed": (["Gemm"], {"w": (6, 4), "b": (1, 6)}, {"transB": 1, "alpha": 0.5, "beta": 2.0}, (5, 4)),
    "gemm, scalar bias": (["Gemm"], {"w": (4, 6), "b": (1,)}, {"beta": 0.25}, (5, 4)),
    "gemm without bias": (["Gemm"], {"w": (4, 6)}, {"alpha": 3.0}, (5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_batch_norm_become_one_layer(name, ort_run, relative_error):
    (op,), constants, attributes, shape = LAYERS[name]
    values = {key: normal(*size) for key, size in constants.items()} | norm_constants(6)
    layer = helper.make_node(op, ["x", *constants], ["z"], name="layer", **attributes)
    before = graph([layer, bn("z", "y")], values, list(shape), len(shape))
    folded = fold(before)
    assert [node.op_type for node in folded.graph] == [op]
    assert folded.graph.node("layer").output[0] == "y"
    assert folded.graph.constant("layer.bias").shape == (6,)
    norm = folded.batch_norms["layer"]
    assert (norm.node, norm.input, norm.output, norm.conv) == ("bn", "z", "y", "layer")
    np.testing.assert_array_equal(norm.gamma, values["bn.gamma"].astype(np.float64))
    assert norm.eps == pytest.approx(1e-3)
    feeds = normal(*shape)
    assert relative_error(ort_run(folded.graph, feeds)[0], ort_run(before, feeds)[0]) < 2e-6


def test_folding_rounds_once():
    """The folded weight is the float32 nearest to the exact one; float32 arithmetic all along would miss it often."""
    values = {"w": normal(16, 8, 3, 3)} | norm_constants(16)
    before = graph([helper.make_node("Conv", ["x", "w"], ["z"], name="layer"), bn("z", "y")], values, [1, 8, 5, 5])
    g, b, m, v = (values[f"bn.{part}"].astype(np.float64) for part in ("gamma", "beta", "mean", "var"))
    epsilon = np.float64(np.float32(1e-3))
    scale = g / np.sqrt(v + epsilon)
    after = fold(before).graph
    np.testing.assert_array_equal(
        after.constant("w"), (values["w"].astype(np.float64) * scale[:, None, None, None]).astype(np.float32)
    )
    np.testing.assert_array_equal(after.constant("layer.bias"), (b - m * scale).astype(np.float32))


@pytest.mark.parametrize(("shape", "op"), [((2, 6, 4, 4), "Conv"), ((2, 6, 7), "Conv"), ((3, 6), "Add")])
def test_batch_norm_that_stands_alone_becomes_an_affine_layer(shape, op, ort_run, relative_error):
    nodes = [helper.make_node("Relu", ["x"], ["z"], name="relu"), bn("z", "y")]
    before = graph(nodes, norm_constants(6), list(shape), len(shape))
    assert batch_norms(before)[0].conv is None
    folded = fold(before)
    assert folded.batch_norms["bn"].conv is None
    assert folded.graph.node("bn").op_type == op
    assert folded.graph.node("bn").output[0] == "y"
    feeds = normal(*shape)
    assert relative_error(ort_run(folded.graph, feeds)[0], ort_run(before, feeds)[0]) < 2e-6


def test_shared_constants_are_copied(ort_run, relative_error):
    """Two layers with one weight and two different batch normalizations, and a third reader without any."""
    values = {"w": normal(4, 4, 1, 1), "b": normal(4)} | norm_constants(4, "one") | norm_constants(4, "two")
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], name="first"),
        bn("a", "c", "one"),
        helper.make_node("Conv", ["c", "w", "b"], ["d"], name="second"),
        bn("d", "e", "two"),
        helper.make_node("Conv", ["e", "w", "b"], ["y"], name="third"),
    ]
    before = graph(nodes, values, [1, 4, 3, 3])
    folded = fold(before)
    assert [node.op_type for node in folded.graph] == ["Conv"] * 3
    assert len({node.input[1] for node in folded.graph}) == 3
    assert [node.output[0] for node in folded.graph] == ["c", "e", "y"]
    np.testing.assert_array_equal(folded.graph.constant(folded.graph.node("third").input[1]), values["w"])
    feeds = normal(1, 4, 3, 3)
    assert relative_error(ort_run(folded.graph, feeds)[0], ort_run(before, feeds)[0]) < 5e-6


def test_one_norm_for_two_layers_stays_shared(ort_run, relative_error):
    """Two normalizations with the same statistics, as a module that is called twice exports."""
    values = {"w": normal(4, 4, 1, 1)} | norm_constants(4)
    again = bn("c", "d")
    again.name = "bn again"
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
        bn("a", "b"),
        helper.make_node("Conv", ["b", "w"], ["c"], name="second"),
        again,
        helper.make_node("Relu", ["d"], ["y"], name="relu"),
    ]
    before = graph(nodes, values, [1, 4, 3, 3])
    folded = fold(before)
    feeds = normal(1, 4, 3, 3)
    assert relative_error(ort_run(folded.graph, feeds)[0], ort_run(before, feeds)[0]) < 5e-6


@pytest.mark.parametrize("case", ["branches", "output", "computed weight"])
def test_layers_that_others_need_are_left_alone(case, ort_run, relative_error):
    values = {"w": normal(4, 4, 1, 1)} | norm_constants(4)
    weight, nodes, outputs = "w", [], ["y"]
    if case == "computed weight":
        nodes.append(helper.make_node("Softmax", ["x"], ["s"], name="softmax"))
        nodes.append(helper.make_node("Reshape", ["s", "shape"], ["v"], name="reshape"))
        values["shape"] = np.asarray([4, 4, 1, 1], np.int64)
        weight = "v"
    nodes += [helper.make_node("Conv", ["x", weight], ["a"], name="layer"), bn("a", "b")]
    nodes.append(helper.make_node("Add", ["b", "a" if case == "branches" else "b"], ["y"], name="add"))
    before = graph(nodes, values, [1, 4, 2, 2])
    if case == "output":
        before.proto.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [None] * 4))
        before, outputs = Graph(before.proto), ["y", "a"]
    folded = fold(before)
    assert folded.graph.node("bn").op_type == "Conv"
    assert batch_norms(before)[0].conv is None
    assert [spec.name for spec in folded.graph.outputs] == outputs
    feeds = normal(1, 4, 2, 2)
    for one, other in zip(ort_run(folded.graph, feeds), ort_run(before, feeds), strict=True):
        assert relative_error(one, other) < 5e-6


@pytest.mark.parametrize("layer", ["conv with bias", "grouped transposed", "gemm transposed", "conv 1d"])
def test_constants_behind_a_layer_become_part_of_it(layer, ort_run, relative_error):
    """A frozen batch normalization, written as multiplication and addition, with the constant on either side."""
    (op,), sizes, attributes, shape = LAYERS[layer]
    channel = (6, *[1] * (len(shape) - 2))
    values = {key: normal(*size) for key, size in sizes.items()}
    values |= {"s": normal(1, *channel), "t": normal(*channel), "u": normal(1), "d": np.float32(3).reshape(())}
    nodes = [
        helper.make_node(op, ["x", *sizes], ["a"], name="layer", **attributes),
        helper.make_node("Mul", ["s", "a"], ["p"], name="mul"),
        helper.make_node("Add", ["p", "t"], ["c"], name="add"),
        helper.make_node("Sub", ["c", "u"], ["e"], name="sub"),
        helper.make_node("Div", ["e", "d"], ["y"], name="div"),
    ]
    before = graph(nodes, values, list(shape), len(shape))
    folded = fold(before)
    assert [node.op_type for node in folded.graph] == [op]
    assert not folded.batch_norms
    feeds = normal(*shape)
    assert relative_error(ort_run(folded.graph, feeds)[0], ort_run(before, feeds)[0]) < 2e-6


@pytest.mark.parametrize(
    ("op", "inputs", "constant"),
    [
        ("Add", "ac", (1, 4, 2, 2)),  # another number at every position
        ("Add", "ac", (2,)),  # along the last axis, not along the channels
        ("Add", "ac", (3, 1, 4, 1, 1)),  # one dimension more
        ("Sub", "ca", (4, 1, 1)),  # the other way round
        ("Div", "ca", (4, 1, 1)),
    ],
)
def test_constants_that_are_not_per_channel_stay(op, inputs, constant, ort_run, relative_error):
    values = {"w": normal(4, 4, 1, 1), "c": normal(*constant)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="layer"),
        helper.make_node(op, list(inputs), ["y"], name="after"),
    ]
    before = graph(nodes, values, [1, 4, 2, 2], max(4, len(constant)))
    folded = fold(before)
    assert [node.op_type for node in folded.graph] == ["Conv", op]


def test_a_layer_with_a_batch_norm_keeps_the_name_of_what_it_produces(ort_run, relative_error):
    values = {"w": normal(4, 4, 1, 1), "c": normal(4, 1, 1)} | norm_constants(4)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="layer"),
        bn("a", "b"),
        helper.make_node("Mul", ["b", "c"], ["y"], name="scale"),
    ]
    folded = fold(graph(nodes, values, [1, 4, 2, 2]))
    assert folded.graph.node("layer").output[0] == folded.batch_norms["layer"].output == "b"


def test_statistics_that_are_computed_are_refused():
    values = norm_constants(4)
    del values["bn.mean"]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["bn.mean"], name="mean", axes=[0, 2, 3], keepdims=0),
        bn("x", "y"),
    ]
    with pytest.raises(ModelError, match="computes its parameters") as caught:
        fold(graph(nodes, values, [1, 4, 2, 2]))
    assert caught.value.where == "bn"


def test_folding_leaves_its_argument_alone():
    values = {"w": normal(4, 4, 1, 1)} | norm_constants(4)
    before = graph([helper.make_node("Conv", ["x", "w"], ["z"], name="layer"), bn("z", "y")], values, [1, 4, 2, 2])
    content = before.proto.SerializeToString(deterministic=True)
    fold(before)
    assert before.proto.SerializeToString(deterministic=True) == content
