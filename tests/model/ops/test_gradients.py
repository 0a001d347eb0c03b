"""Gradients of the operators that synthesis and reconstruction live on, against finite differences in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zsq_deploy.model.twin import Twin

sys.path.insert(0, str(Path(__file__).parent))
from one_node import Array, one_node


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).random(shape) + 0.5).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


CASES: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    ("Conv", [noise(2, 4, 6, 5), noise(6, 2, 3, 3, seed=1), noise(6, seed=2)], {"group": 2, "pads": [1, 0, 1, 2]}),
    ("Conv", [noise(1, 3, 6, 6), noise(3, 1, 3, 3, seed=1)], {"group": 3, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("ConvTranspose", [noise(1, 3, 4, 4), noise(3, 2, 3, 3, seed=1), noise(2, seed=2)], {"strides": [2, 2]}),
    ("BatchNormalization", [noise(2, 3, 4, 4), noise(3), noise(3, seed=1), noise(3, seed=2), positive(3)], {}),
    ("InstanceNormalization", [noise(2, 3, 4, 4), noise(3), noise(3, seed=1)], {}),
    ("LayerNormalization", [noise(2, 3, 5), noise(5), noise(5, seed=1)], {}),
    ("GroupNormalization", [noise(2, 4, 3), noise(4), noise(4, seed=1)], {"num_groups": 2, "opset": 21}),
    ("LRN", [noise(1, 6, 3, 3)], {"size": 3}),
    ("Gemm", [noise(3, 4), noise(5, 4, seed=1), noise(5, seed=2)], {"transB": 1}),
    ("Gemm", [noise(4, 3), noise(4, 5, seed=1), noise(3, 1, seed=2)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("MatMul", [noise(2, 3, 4), noise(4, 5, seed=1)], {}),
    ("Einsum", [noise(2, 3, 4), noise(2, 5, 4, seed=1)], {"equation": "bij,bkj->bik"}),
    ("Relu", [noise(3, 7)], {}),
    ("Clip", [noise(3, 7), np.float32(-0.5).reshape(()), np.float32(0.7).reshape(())], {"constants": [1, 2]}),
    ("LeakyRelu", [noise(3, 7)], {}),
    ("PRelu", [noise(2, 3, 4), noise(3, 1, seed=1)], {}),
    ("HardSwish", [noise(3, 7)], {}),
    ("HardSigmoid", [noise(3, 7)], {}),
    ("Sigmoid", [noise(3, 7)], {}),
    ("Tanh", [noise(3, 7)], {}),
    ("Softplus", [noise(3, 7)], {}),
    ("Mish", [noise(3, 7)], {"opset": 18}),
    ("Gelu", [noise(3, 7)], {"opset": 20}),
    ("Elu", [noise(3, 7)], {}),
    ("Erf", [noise(3, 7)], {}),
    ("Softmax", [noise(3, 7)], {"axis": 0}),
    ("LogSoftmax", [noise(3, 7)], {}),
    ("Add", [noise(2, 3, 4), noise(3, 1, seed=1)], {}),
    ("Mul", [noise(2, 3, 4), noise(3, 1, seed=1)], {}),
    ("Div", [noise(2, 3, 4), positive(3, 1, seed=1)], {}),
    ("Sub", [noise(2, 3, 4), noise(4, seed=1)], {}),
    ("Pow", [positive(3, 4), np.float32(2.0).reshape(())], {"constants": [1]}),
    ("Sqrt", [positive(3, 4)], {}),
    ("Concat", [noise(2, 3), noise(2, 5, seed=1)], {"axis": 1}),
    ("Split", [noise(6, 3)], {"axis": 0, "outputs": 3}),
    ("MaxPool", [noise(1, 2, 6, 6)], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", [noise(1, 2, 6, 6)], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", [noise(1, 2, 6, 6)], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    ("LpPool", [noise(1, 2, 4, 4)], {"kernel_shape": [2, 2]}),
    ("GlobalAveragePool", [noise(2, 3, 4, 4)], {}),
    ("GlobalMaxPool", [noise(2, 3, 4, 4)], {}),
    ("ReduceMean", [noise(2, 3, 4)], {"axes": [1, 2]}),
    ("ReduceMax", [noise(2, 3, 4)], {"axes": [1]}),
    ("ReduceL2", [noise(2, 3, 4)], {"axes": [1]}),
    ("ReduceLogSumExp", [noise(2, 3, 4)], {"axes": [1]}),
    ("Resize", [noise(1, 2, 3, 4), None, np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest", "constants": [2]}),
    ("Resize", [noise(1, 2, 3, 4), None, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear", "constants": [2]}),
    ("Resize", [noise(1, 2, 4, 5), None, np.array([1, 1, 1.7, 0.6], np.float32)], {"mode": "cubic", "constants": [2]}),
    (
        "Resize",
        [noise(1, 2, 6, 6), None, np.array([1, 1, 0.5, 0.6], np.float32)],
        {"mode": "linear", "antialias": 1, "constants": [2], "opset": 18},
    ),
    ("GridSample", [noise(1, 2, 4, 4), noise(1, 3, 3, 2, seed=1) * 0.7], {}),
    ("Pad", [noise(2, 3), ints(0, 1, 1, 2)], {"mode": "reflect", "constants": [1]}),
    ("Slice", [noise(4, 6), ints(0, -1), ints(3, -7), ints(0, 1), ints(1, -2)], {"constants": [1, 2, 3, 4]}),
    ("Gather", [noise(4, 6), ints(2, 0, 2)], {"constants": [1]}),
    ("GatherND", [noise(4, 6), np.array([[0, 1], [3, 2]], np.int64)], {"constants": [1]}),
    ("ScatterND", [noise(4, 3), np.array([[0], [2]], np.int64), noise(2, 3, seed=1)], {"constants": [1]}),
    ("Transpose", [noise(2, 3, 4)], {"perm": [2, 0, 1]}),
    ("DepthToSpace", [noise(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("Where", [np.array([True, False, True]), noise(2, 3), noise(3, seed=1)], {}),
    ("CumSum", [noise(3, 4), ints(1)], {"constants": [1], "exclusive": 1}),
    ("TopK", [noise(3, 5), ints(2)], {"constants": [1], "outputs": 2}),
    ("DeformConv", [noise(1, 2, 5, 5), noise(3, 2, 2, 2, seed=1), noise(1, 8, 4, 4, seed=2) * 0.3], {"opset": 19}),
    (
        "RoiAlign",
        [noise(1, 2, 6, 6), np.array([[0.7, 0.8, 4.2, 5.1]], np.float32), ints(0)],
        {"output_height": 2, "output_width": 2, "sampling_ratio": 2, "constants": [1, 2]},
    ),
]


@pytest.mark.parametrize(
    ("op_type", "inputs", "options"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_gradient(op_type: str, inputs: list[Array | None], options: dict[str, Any]) -> None:
    graph, feeds = one_node(op_type, inputs, **options)
    twin = Twin(graph, dtype=torch.float64, device="cpu")
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = twin.run({**tensors, **dict(zip(floats, values, strict=True))})
        return tuple(tensor for tensor in found.values() if tensor.is_floating_point())

    points = [tensors[name].double().requires_grad_() for name in floats]
    assert torch.autograd.gradcheck(function, points, eps=1e-6, atol=1e-6, rtol=1e-4)
