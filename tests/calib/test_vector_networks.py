"""A network whose input is a vector: every method makes vectors for it, or says why it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model import Model, load_model

WORKS = {"zeroq", "dsg", "hast", "gaussian", "uniform", "ones"}
DRAWN = [name for name, method in METHODS.items() if method.images]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    rng = np.random.default_rng(0)
    shapes = {"w0": (12, 16), "b0": (16,), "gain": (16,), "shift": (16,), "mean": (16,), "w1": (16, 4), "b1": (4,)}
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    values["var"] = rng.uniform(4, 16, 16).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h"], "first"),
        helper.make_node("BatchNormalization", ["h", "gain", "shift", "mean", "var"], ["n"], "norm"),
        helper.make_node("Relu", ["n"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["y"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "vectors",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    file = tmp_path_factory.mktemp("vectors") / "net.onnx"
    file.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    return load_model(file)


@pytest.mark.parametrize("method", DRAWN)
def test_every_method_makes_vectors_or_says_why_it_cannot(network, method):
    steps = {name: 4 for name in METHODS[method].defaults if name == "steps"}
    if method in WORKS:
        made = synthesize(network, method=method, images=4, seed=0, parameters=steps)
        assert made.manifest.method == method
        (batch,) = made.batches(4)
        assert batch["x"].shape == (4, 12)
        assert np.isfinite(batch["x"]).all()
        return
    with pytest.raises(CalibrationError) as refused:
        synthesize(network, method=method, images=4, seed=0, parameters=steps)
    assert "'x'" in str(refused.value)
    assert "image" in str(refused.value) or "picture" in str(refused.value)
