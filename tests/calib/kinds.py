"""Small networks of every kind that a user may bring, as ONNX written by hand: weights at random, batch norms as training leaves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["KINDS", "Net"]


class Net:
    """A graph in the making; every method returns the name of the value that it made.

    Args:
        inputs: Name -> shape behind the batch.
        opset: Of the file.
        dtype: Element type of inputs, outputs and weights.
    """

    def __init__(self, inputs: dict[str, Sequence[object]], opset: int = 17, dtype: int = TensorProto.FLOAT) -> None:
        self.inputs, self.opset, self.dtype = dict(inputs), opset, dtype
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: np.ndarray) -> str:
        """A constant; floats in the type of the network."""
        if array.dtype.kind == "f":
            array = array.astype(helper.tensor_dtype_to_np_dtype(self.dtype))
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def op(self, kind: str, *values: str, **attributes: object) -> str:
        """One operator."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, values, [name], f"{kind.lower()}{len(self.nodes)}", **attributes))
        return name

    def weight(self, *shape: int, kind: str = "Conv") -> str:
        """Weights that keep the size of what they read."""
        reads = shape[0] if kind == "MatMul" else int(np.prod(shape[1:]))
        return self.constant(self.rng.normal(0, reads**-0.5, shape))

    def norm(self, value: str, channels: int, *, var: np.ndarray | None = None, gain: np.ndarray | None = None) -> str:
        """Batch norm."""
        rng = self.rng
        var = rng.uniform(0.3, 1.5, channels) if var is None else var
        gain = rng.uniform(0.5, 1.5, channels) if gain is None else gain
        numbers = gain, rng.normal(0, 0.3, channels), rng.normal(0, 0.3, channels), var
        return self.op("BatchNormalization", value, *(self.constant(number) for number in numbers))

    def conv(
        self, value: str, before: int, after: int, stride: int = 1, group: int = 1, size: int = 3, dims: int = 2
    ) -> str:
        """Convolution without bias, padded to keep the size."""
        weight = self.weight(after, before // group, *[size] * dims)
        window = {"pads": [size // 2] * 2 * dims, "strides": [stride] * dims}
        return self.op("Conv", value, weight, group=group, **window)

    def block(self, value: str, before: int, after: int, stride: int = 1, group: int = 1, dims: int = 2) -> str:
        """Convolution, batch norm, Relu."""
        return self.op("Relu", self.norm(self.conv(value, before, after, stride, group, dims=dims), after))

    def up(self, value: str, before: int, after: int) -> str:
        """Transposed convolution to twice the size."""
        return self.op("ConvTranspose", value, self.weight(before, after, 2, 2), strides=[2, 2])

    def head(self, value: str, channels: int, classes: int) -> str:
        """Pooling and a matrix."""
        flat = self.op("Flatten", self.op("GlobalAveragePool", value))
        return self.op("MatMul", flat, self.weight(channels, classes, kind="MatMul"))

    def model(self, *outputs: tuple[str, Sequence[object]], integers: Sequence[str] = ()) -> onnx.ModelProto:
        """The finished network; outputs with their shapes behind the batch."""

        def info(name: str, shape: Sequence[object], dtype: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, dtype, ["N", *shape])

        graph = helper.make_graph(
            self.nodes,
            "net",
            [info(k, v, TensorProto.INT64 if k in integers else self.dtype) for k, v in self.inputs.items()],
            [info(name, shape, self.dtype) for name, shape in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8 if self.opset < 20 else 9)


def classifier(
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    shape: Sequence[object] = (3, 16, 16),
    classes: int = 4,
    **norm: np.ndarray,
) -> onnx.ModelProto:
    """Two convolutions and a matrix; `norm` changes the second batch norm."""
    net = Net({"image": shape}, opset, dtype)
    value = net.block("image", int(str(shape[0])), 8, 2)
    value = net.op("Relu", net.norm(net.conv(value, 8, 8, group=8), 8, **norm))
    return net.model((net.head(value, 8, classes), [classes]))


def detector() -> onnx.ModelProto:
    """Boxes and scores for every place, no softmax; not square."""
    net = Net({"image": (3, 12, 20)})
    value = net.block(net.block("image", 3, 8, 2), 8, 8, 2)
    heads = []
    for each in (4, 3):
        moved = net.op("Transpose", net.conv(value, 8, 2 * each), perm=[0, 2, 3, 1])
        heads.append(net.op("Reshape", moved, net.constant(np.array([0, -1, each]))))
    return net.model((heads[0], [30, 4]), (heads[1], [30, 3]))


def denoiser() -> onnx.ModelProto:
    """Gray in, gray out: the noise is taken away."""
    net = Net({"image": (1, 16, 16)})
    value = net.block(net.op("Relu", net.conv("image", 1, 8)), 8, 8)
    return net.model((net.op("Sub", "image", net.conv(value, 8, 1)), [1, 16, 16]))


def super_resolution() -> onnx.ModelProto:
    """Twice the size by moving channels into places."""
    net = Net({"image": (3, 12, 12)})
    value = net.conv(net.block("image", 3, 8), 8, 12)
    return net.model((net.op("DepthToSpace", value, blocksize=2, mode="CRD"), [3, 24, 24]))


def u_net() -> onnx.ModelProto:
    """Skip concatenations and transposed convolutions."""
    net = Net({"image": (3, 16, 24)})
    first = net.block("image", 3, 8)
    second = net.block(net.op("MaxPool", first, kernel_shape=[2, 2], strides=[2, 2]), 8, 12)
    deep = net.block(net.op("MaxPool", second, kernel_shape=[2, 2], strides=[2, 2]), 12, 12)
    second = net.block(net.op("Concat", net.up(deep, 12, 8), second, axis=1), 20, 8)
    first = net.block(net.op("Concat", net.up(second, 8, 8), first, axis=1), 16, 8)
    return net.model((net.conv(first, 8, 2, size=1), [2, 16, 24]))


def two_images() -> onnx.ModelProto:
    """Left and right."""
    net = Net({"left": (3, 12, 12), "right": (3, 12, 12)})
    both = net.op("Mul", net.block("left", 3, 8, 2), net.block("right", 3, 8, 2))
    return net.model((net.head(both, 8, 4), [4]))


def image_and_vector() -> onnx.ModelProto:
    """An image and six numbers."""
    net = Net({"image": (3, 12, 12), "vector": (6,)})
    seen = net.op("Flatten", net.op("GlobalAveragePool", net.block("image", 3, 8, 2)))
    told = net.op("Relu", net.norm(net.op("MatMul", "vector", net.weight(6, 8, kind="MatMul")), 8))
    both = net.op("Concat", seen, told, axis=1)
    return net.model((net.op("MatMul", both, net.weight(16, 4, kind="MatMul")), [4]))


def folded() -> onnx.ModelProto:
    """Batch norms folded into the convolutions."""
    net = Net({"image": (3, 16, 16)})
    value = net.op("Relu", net.conv(net.op("Relu", net.conv("image", 3, 8, 2)), 8, 8))
    return net.model((net.head(value, 8, 4), [4]))


def pre_activation() -> onnx.ModelProto:
    """Batch norm and Relu in front of each convolution."""
    net = Net({"image": (3, 16, 16)})
    value = net.conv("image", 3, 8, 2)
    inner = net.conv(net.op("Relu", net.norm(value, 8)), 8, 8)
    value = net.op("Add", value, net.conv(net.op("Relu", net.norm(inner, 8)), 8, 8))
    return net.model((net.head(net.op("Relu", net.norm(value, 8)), 8, 4), [4]))


def perceptron() -> onnx.ModelProto:
    """A vector, matrices, batch norm."""
    net = Net({"vector": (12,)})
    value = net.op("Relu", net.norm(net.op("MatMul", "vector", net.weight(12, 16, kind="MatMul")), 16))
    return net.model((net.op("MatMul", value, net.weight(16, 4, kind="MatMul")), [4]))


def group_norm() -> onnx.ModelProto:
    """Normalised by the image itself: instance norm over reshaped groups, as exporters write group norm."""
    net = Net({"image": (3, 16, 16)})
    value = net.op("Reshape", net.conv("image", 3, 8, 2), net.constant(np.array([0, 2, -1])))
    value = net.op("InstanceNormalization", value, net.constant(np.ones(2)), net.constant(np.zeros(2)))
    value = net.op("Relu", net.op("Reshape", value, net.constant(np.array([0, 8, 8, 8]))))
    return net.model((net.head(value, 8, 4), [4]))


def grouped() -> onnx.ModelProto:
    """Four channels in, grouped and depthwise convolutions."""
    net = Net({"image": (4, 16, 16)})
    value = net.block(net.block(net.block("image", 4, 8, 2, 2), 8, 16, 1, 4), 16, 16, 2, 16)
    return net.model((net.head(value, 16, 4), [4]))


def video() -> onnx.ModelProto:
    """Frames: five axes."""
    net = Net({"clip": (3, 4, 8, 8)})
    return net.model((net.head(net.block(net.block("clip", 3, 8, 2, dims=3), 8, 8, dims=3), 8, 4), [4]))


def sound() -> onnx.ModelProto:
    """A signal: three axes."""
    net = Net({"signal": (2, 64)})
    return net.model((net.head(net.block(net.block("signal", 2, 8, 4, dims=1), 8, 8, dims=1), 8, 4), [4]))


def tokens() -> onnx.ModelProto:
    """Numbers of words."""
    net = Net({"words": (7,)})
    value = net.op("Gather", net.weight(50, 8), "words")
    value = net.op("ReduceMean", value, axes=[1], keepdims=0)
    return net.model((net.op("MatMul", value, net.weight(8, 3, kind="MatMul")), [3]), integers=["words"])


def norm_first() -> onnx.ModelProto:
    """The input itself is normalised."""
    net = Net({"image": (3, 16, 16)})
    return net.model((net.head(net.block(net.norm("image", 3), 3, 8, 2), 8, 4), [4]))


def norm_last() -> onnx.ModelProto:
    """Features behind a batch norm, which are no classes but look like them."""
    net = Net({"image": (3, 16, 16)})
    return net.model((net.norm(net.head(net.block("image", 3, 8, 2), 8, 4), 4), [4]))


def blind() -> onnx.ModelProto:
    """The output does not depend on the input."""
    net = Net({"image": (3, 16, 16)})
    black = net.op("Mul", "image", net.constant(np.zeros(())))
    return net.model((net.head(net.block(black, 3, 8, 2), 8, 4), [4]))


def _some_zero(share: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.where(np.arange(8) < 8 * share, 0.0, rng.uniform(0.3, 1.5, 8))


KINDS: dict[str, Callable[[], onnx.ModelProto]] = {
    "classifier": classifier,
    "detector": detector,
    "denoiser": denoiser,
    "super-resolution": super_resolution,
    "u-net": u_net,
    "two images": two_images,
    "image and vector": image_and_vector,
    "folded": folded,
    "pre-activation": pre_activation,
    "perceptron": perceptron,
    "group norm": group_norm,
    "grouped": grouped,
    "video": video,
    "sound": sound,
    "tokens": tokens,
    "norm first": norm_first,
    "norm last": norm_last,
    "blind": blind,
    "dead channels": lambda: classifier(var=_some_zero(0.5), gain=_some_zero(0.5)[::-1].copy()),
    "all dead": lambda: classifier(var=np.zeros(8), gain=np.zeros(8)),
    "one score": lambda: classifier(classes=1),
    "4 x 4": lambda: classifier(shape=(3, 4, 4)),
    "float16": lambda: classifier(dtype=TensorProto.FLOAT16),
    "opset 9": lambda: classifier(opset=9),
    "opset 21": lambda: classifier(opset=21),
}
"""Name -> a function that makes the network."""
