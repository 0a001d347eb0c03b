"""Small networks, ranges and sets for the tests of the ONNX Runtime backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.model import Model, Preprocess, load_model
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.ranges import Ranges

ASSET_NETWORKS = {
    "resnet20_cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mlperf_tiny_resnet8_cifar10": None,
    "vit_cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "mobilenet_v1_025_imagenet": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "squeezenet11_imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mlperf_tiny_mobilenet_v1_025_vww": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "dncnn25": ((0.0,), (1.0,)),
    "ultraface_rfb320": ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502)),
}


class Builder:
    """An ONNX graph, node by node; every call returns the name of its value."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def constant(self, name: str, array: Any, dtype: Any = np.float32) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [name], f"{name}_node", **attributes))
        return name

    def conv(
        self,
        x: str,
        name: str,
        cin: int,
        cout: int,
        k: int,
        *,
        group: int = 1,
        bias: bool = True,
        pads: list[int] | None = None,
        **more: Any,
    ) -> str:
        w = self.rng.standard_normal((cout, cin // group, k, k)) * np.sqrt(2 / (cin // group * k * k))
        inputs = [x, self.constant(f"{name}_w", w)]
        if bias:
            inputs.append(self.constant(f"{name}_b", self.rng.normal(0, 0.2, cout)))
        return self.node("Conv", inputs, name, group=group, pads=pads or [k // 2] * 4, kernel_shape=[k, k], **more)

    def norm(self, x: str, name: str, channels: int) -> str:
        rng = self.rng
        names = [
            self.constant(f"{name}_{part}", values)
            for part, values in (
                ("gamma", rng.uniform(0.5, 1.5, channels)),
                ("beta", rng.normal(0, 0.3, channels)),
                ("mean", rng.normal(0, 0.3, channels)),
                ("var", rng.uniform(0.5, 1.5, channels)),
            )
        ]
        return self.node("BatchNormalization", [x, *names], name, epsilon=1e-5)

    def gemm(self, x: str, name: str, cin: int, cout: int, **more: Any) -> str:
        w = self.constant(f"{name}_w", self.rng.standard_normal((cout, cin)) * 0.4)
        b = self.constant(f"{name}_b", self.rng.normal(0, 0.2, cout))
        return self.node("Gemm", [x, w, b], name, transB=1, **more)

    def model(
        self,
        shape: Sequence[int | str],
        outputs: Mapping[str, Sequence[int | str]],
        *,
        opset: int = 17,
        ir: int = 8,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(size)) for name, size in outputs.items()],
            self.tensors,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
        onnx.checker.check_model(proto)
        return proto


def convnet(seed: int = 0) -> onnx.ModelProto:
    """Everything that a small convolutional network has: padding, batch norm, Relu6, depthwise, residual, concat, pool, Gemm."""
    b = Builder(seed)
    pads = b.constant("pads", [0, 0, 0, 0, 0, 0, 1, 1], np.int64)
    x = b.node("Pad", ["x", pads, b.constant("pad_zero", 0.0)], "padded")
    x = b.norm(b.conv(x, "stem", 3, 8, 3, bias=False, pads=[0, 0, 0, 0], strides=[2, 2]), "stem_bn", 8)
    x = b.node("Clip", [x, b.constant("lo", 0.0), b.constant("hi", 6.0)], "stem_act")
    x = b.node("Relu", [b.norm(b.conv(x, "dw", 8, 8, 3, group=8, bias=False), "dw_bn", 8)], "dw_act")
    x = b.node("Relu", [b.norm(b.conv(x, "pw", 8, 16, 1, bias=False), "pw_bn", 16)], "pw_act")
    y = b.conv(x, "res", 16, 16, 3)
    x = b.node("Relu", [b.node("Add", [x, y], "sum")], "sum_act")
    left = b.node("Relu", [b.conv(x, "left", 16, 8, 1)], "left_act")
    right = b.node("Relu", [b.conv(x, "right", 16, 8, 3)], "right_act")
    x = b.node("Concat", [left, right], "cat", axis=1)
    x = b.node("MaxPool", [x], "max", kernel_shape=[2, 2], strides=[2, 2])
    x = b.node("ReduceMean", [x], "mean", axes=[2, 3], keepdims=0)
    b.gemm(x, "logits", 16, 10)
    return b.model(["n", 3, 16, 16], {"logits": ["n", 10]})


def transformer(seed: int = 0, tokens: int = 5, width: int = 8) -> onnx.ModelProto:
    """One attention block with biases as Add, softmax and layer normalization."""
    b = Builder(seed)

    def dense(x: str, name: str, cin: int, cout: int) -> str:
        w = b.constant(f"{name}_w", b.rng.standard_normal((cin, cout)) * 0.4)
        bias = b.constant(f"{name}_b", b.rng.normal(0, 0.3, cout))
        return b.node("Add", [b.node("MatMul", [x, w], f"{name}_mm"), bias], name)

    def layer_norm(x: str, name: str) -> str:
        gamma, beta = b.constant(f"{name}_g", np.ones(width)), b.constant(f"{name}_be", np.zeros(width))
        return b.node("LayerNormalization", [x, gamma, beta], name, axis=-1)

    q, k, v = (dense("x", name, width, width) for name in "qkv")
    scores = b.node("MatMul", [q, b.node("Transpose", [k], "kt", perm=[0, 2, 1])], "scores")
    scaled = b.node("Mul", [scores, b.constant("scale", 0.35)], "scaled")
    mixed = b.node("MatMul", [b.node("Softmax", [scaled], "attention", axis=-1), v], "mixed")
    x = layer_norm(b.node("Add", ["x", dense(mixed, "out", width, width)], "sum1"), "ln1")
    hidden = b.node("Relu", [dense(x, "up", width, 16)], "hidden")
    x = layer_norm(b.node("Add", [x, dense(hidden, "down", 16, width)], "sum2"), "ln2")
    x = b.node("ReduceMean", [x], "pooled", axes=[1], keepdims=0)
    b.gemm(x, "logits", width, 10)
    return b.model(["n", tokens, width], {"logits": ["n", 10]})


def loaded(proto: onnx.ModelProto, folder: Path, name: str = "network") -> Model:
    """Through the front door: a file that is loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    onnx.save(proto, path)
    return load_model(path)


def run(
    path: Path | onnx.ModelProto, feeds: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Outputs of a file or model in a plain session, without graph optimization."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None if names is None else list(names), dict(feeds)))


def everything(graph: Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All float values of a graph, computed by ONNX Runtime."""
    proto = onnx.shape_inference.infer_shapes(graph.editable())
    present = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        value
        for value in proto.graph.value_info
        if value.name not in present and value.type.tensor_type.elem_type == TensorProto.FLOAT
    )
    names = [value.name for value in proto.graph.output]
    return {**feeds, **dict(zip(names, run(proto, feeds), strict=True))}


def ranges_of(model: Model, feeds: Mapping[str, np.ndarray], *, set_digest: str = "") -> Ranges:
    """Minimum and maximum of every float value of the folded graph."""
    graph = model.folded().graph
    values = everything(graph, feeds)
    return Ranges(
        {name: (float(array.min()), float(array.max())) for name, array in values.items()},
        "minmax",
        graph.digest,
        set_digest,
    )


def calibration_set(model: Model, feeds: Mapping[str, np.ndarray]) -> CalibrationSet:
    """A set in memory that says it belongs to the model."""
    return CalibrationSet.from_arrays(feeds, CalibrationManifest(method="gaussian", model_digest=model.digest))


def asset_model(assets: Path, name: str) -> tuple[Model, dict[str, np.ndarray]]:
    """A network of the assets and a few images: smooth colour noise, in the network's input space."""
    moments = ASSET_NETWORKS[name]
    preprocess = Preprocess(raw_pixels=True) if moments is None else Preprocess(mean=moments[0], std=moments[1])
    shape = {"input_shape": (1, 1, 48, 48)} if name == "dncnn25" else {}
    model = load_model(assets / "models" / f"{name}.onnx", preprocess=preprocess, **shape)
    _, channels, height, width = model.inputs[0].with_batch(1)
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 256, (6, height // 8 + 1, width // 8 + 1, channels))
    images = np.repeat(np.repeat(coarse, 8, 1), 8, 2)[:, :height, :width]
    images = np.clip(images + rng.normal(0, 20, images.shape), 0, 255).astype(np.uint8)
    return model, {model.inputs[0].name: preprocess.apply(images)}
