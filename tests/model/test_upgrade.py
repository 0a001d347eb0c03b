"""Old files: the ONNX project's own single-operator models and hand-made ones in old operator sets, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.model import load_model
from zsq_deploy.model.upgrade import upgrade

GENERATOR = np.random.default_rng(0)


def old_network(opset: int, ir_version: int) -> onnx.ModelProto:
    """Convolution, batch norm, pooling, resizing, slicing and a head, as exporters of that time wrote them."""
    constants = {
        "w": GENERATOR.standard_normal((6, 3, 3, 3)).astype(np.float32),
        "g": GENERATOR.standard_normal(6).astype(np.float32),
        "b": GENERATOR.standard_normal(6).astype(np.float32),
        "m": GENERATOR.standard_normal(6).astype(np.float32),
        "v": np.ones(6, np.float32),
        "fc": GENERATOR.standard_normal((5, 72)).astype(np.float32),
        "fb": GENERATOR.standard_normal(5).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["c"]),
    ]
    if opset < 11:
        nodes.append(helper.make_node("Clip", ["c"], ["d"], min=0.0, max=6.0))
    else:
        constants |= {"low": np.float32(0).reshape(()), "high": np.float32(6).reshape(())}
        nodes.append(helper.make_node("Clip", ["c", "low", "high"], ["d"]))
    if opset < 10:
        constants["up"] = np.asarray([1, 1, 2, 2], np.float32)
        nodes.append(helper.make_node("Upsample", ["d", "up"], ["e"], mode="nearest"))
        nodes.append(helper.make_node("Slice", ["e"], ["f"], axes=[2, 3], starts=[0, 1], ends=[8, 9]))
    elif opset < 11:
        constants["up"] = np.asarray([1, 1, 2, 2], np.float32)
        nodes.append(helper.make_node("Resize", ["d", "up"], ["e"], mode="nearest"))
    else:
        constants |= {"roi": np.zeros(0, np.float32), "up": np.asarray([1, 1, 2, 2], np.float32)}
        nodes.append(
            helper.make_node(
                "Resize",
                ["d", "roi", "up"],
                ["e"],
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        )
    if opset >= 10:
        for name, value in (("s", [0, 1]), ("t", [8, 9]), ("ax", [2, 3])):
            constants[name] = np.asarray(value, np.int64)
        nodes.append(helper.make_node("Slice", ["e", "s", "t", "ax"], ["f"]))
    nodes.append(helper.make_node("MaxPool", ["f"], ["h"], kernel_shape=[2, 2], strides=[2, 2]))
    if opset < 13:
        nodes.append(helper.make_node("Unsqueeze", ["h"], ["i"], axes=[1]))
        nodes.append(helper.make_node("Squeeze", ["i"], ["j"], axes=[1]))
    else:
        constants["one"] = np.asarray([1], np.int64)
        nodes.append(helper.make_node("Unsqueeze", ["h", "one"], ["i"]))
        nodes.append(helper.make_node("Squeeze", ["i", "one"], ["j"]))
    nodes += [
        helper.make_node("Flatten", ["j"], ["k"]),
        helper.make_node("Gemm", ["k", "fc", "fb"], ["l"], transB=1),
        helper.make_node("Softmax", ["l"], ["y"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4])]
    if ir_version < 4:  # every initializer was an input as well
        inputs += [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in constants.items()
        ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            inputs,
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )


@pytest.mark.parametrize(
    ("opset", "ir_version"),
    [(9, 3), (9, 4), (10, 5), (11, 6), (12, 7), (13, 7), (14, 7), (15, 8), (16, 8), (17, 8), (18, 8)],
)
def test_old_networks_compute_the_same(opset, ir_version, tmp_path, ort_run, relative_error, images):
    path = tmp_path / "old.onnx"
    onnx.save(old_network(opset, ir_version), path)
    model = load_model(path)
    assert model.graph.opset == max(opset, 17)
    assert len(model.batch_norms()) == 1
    assert model.batch_norms()[0].conv is not None
    assert [spec.name for spec in model.inputs] == ["x"]
    feeds = images(model.graph, 3)
    (wanted,) = ort_run(path, feeds)
    for graph in (model.graph, model.folded().graph):
        assert relative_error(ort_run(graph, feeds)[0], wanted) < 1e-5


@pytest.mark.parametrize("opset", [17, 18, 19, 20, 21])
def test_current_operator_sets_are_kept(opset):
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N] x) => (float[N] y) {{ y = Relu (x) }}'
    )
    assert upgrade(model).opset_import[0].version == opset


def test_newer_operator_sets_come_down(tmp_path, ort_run, relative_error):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 22]> g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }'
    )
    assert upgrade(model).opset_import[0].version == 21


def test_the_given_model_is_left_alone():
    model = old_network(11, 6)
    content = model.SerializeToString(deterministic=True)
    upgrade(model)
    assert model.SerializeToString(deterministic=True) == content


@pytest.mark.parametrize("name", ["densenet121", "inception_v1", "shufflenet", "squeezenet"])
def test_light_networks_of_the_onnx_project(name, ort_run, relative_error):
    """The architectures that the ONNX project tests backends with, weights replaced by constants: operator set 9, IR 3."""
    import onnx.backend.test

    path = Path(onnx.backend.test.__file__).parent / "data" / "light" / f"light_{name}.onnx"
    model = load_model(path)
    original = onnx.load(path)
    assert sum(n.op_type == "BatchNormalization" for n in original.graph.node) == len(model.batch_norms())
    x = np.random.default_rng(0).random((1, *model.inputs[0].shape[1:]), np.float32)
    wanted = ort_run(path, x)
    for graph in (model.graph, model.folded().graph):
        for one, other in zip(ort_run(graph, x), wanted, strict=True):
            assert relative_error(one, other) < 1e-5
