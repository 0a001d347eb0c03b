"""Random one-node engines for every integer kernel, and how a reference compares with the runtime on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.onnxruntime.integer import IntegerReference
from zsq_deploy.backends.onnxruntime.runner import session_options
from zsq_deploy.quant.scheme import Scheme

TARGET = Target("ort-x86-vnni", "onnxruntime", "", Scheme(bits=8, signed=False, symmetric=False), Scheme(), 17, 8)

F32 = np.float32


@dataclass
class Case:
    """A node, its constants and one batch."""

    op: str
    inputs: Sequence[str]
    feeds: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    domain: str = "com.microsoft"
    outputs: Sequence[str] = ("y",)

    def model(self) -> onnx.ModelProto:
        node = helper.make_node(
            self.op, list(self.inputs), list(self.outputs), "node", domain=self.domain, **self.attrs
        )
        graph = helper.make_graph(
            [node],
            "case",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
                for name, array in self.feeds.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in self.outputs],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def both(case: Case, folder: Path, *, threads: int = 1, **options: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the runtime computes for a case, and what the reference computes."""
    path = folder / "case.onnx"
    onnx.save(case.model(), path)
    session = ort.InferenceSession(
        str(path), session_options(TARGET, threads=threads), providers=["CPUExecutionProvider"]
    )
    theirs = session.run(None, case.feeds)
    reference = IntegerReference(path, TARGET, threads=threads, **options)
    ours = reference.run(case.feeds)
    return theirs, [ours[name] for name in case.outputs]


def codes(rng: np.random.Generator, shape: Sequence[int], dtype: Any, spread: float = 1.0) -> np.ndarray:
    """Random codes; with `spread` below 1 they bunch around the middle of the range."""
    limits = np.iinfo(dtype)
    if spread >= 1:
        return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    middle = (limits.min + limits.max) / 2
    return np.clip(np.rint(rng.normal(middle, spread * 128, shape)), limits.min, limits.max).astype(dtype)


def zero_point(rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """Any zero point, the ends of the range among them."""
    limits = np.iinfo(dtype)
    return np.asarray(rng.choice([limits.min, limits.max, 0, int(rng.integers(limits.min, limits.max + 1))]), dtype)


def scale(rng: np.random.Generator, low: float = -4, high: float = 1) -> np.ndarray:
    """A positive float32 scale, log-uniform between powers of ten."""
    return np.asarray(10 ** rng.uniform(low, high), F32)


def conv_case(
    rng: np.random.Generator,
    *,
    activation: Any = np.uint8,
    weight: Any = np.int8,
    last: bool = False,
    rank: int = 2,
    groups: int = 1,
    depthwise: bool = False,
    channels: int | None = None,
) -> Case:
    """A random QLinearConv."""
    group = groups
    per_group_in = int(rng.integers(1, 20)) if channels is None else channels
    per_group_out = int(rng.integers(1, 20))
    if depthwise:
        group, per_group_in, per_group_out = int(rng.integers(1, 70)), 1, int(rng.choice([1, 1, 2]))
    kernel = [int(rng.integers(1, 6 if rank == 1 else 4)) for _ in range(rank)]
    dilations = [int(rng.integers(1, 3)) for _ in range(rank)]
    strides = [int(rng.integers(1, 4)) for _ in range(rank)]
    pads = [int(rng.integers(0, 3)) for _ in range(2 * rank)]
    spatial = [int(rng.integers((k - 1) * d + 1, (k - 1) * d + 12)) for k, d in zip(kernel, dilations, strict=True)]
    batch, cin, cout = int(rng.integers(1, 4)), group * per_group_in, group * per_group_out
    x = codes(rng, (batch, cin, *spatial), activation)
    w = codes(rng, (cout, per_group_in, *kernel), weight, float(rng.choice([0.3, 1.0])))
    per_channel = bool(rng.integers(2))
    sx = scale(rng)
    sw = np.exp(rng.uniform(-6, -2, cout if per_channel else 1)).astype(F32)
    w_zero = zero_point(rng, weight) if rng.integers(2) else np.zeros((), weight)
    depth = per_group_in * int(np.prod(kernel))
    # an output scale that puts the accumulators' spread into the range, so that roundings (not clamps) are tested
    sy = np.asarray(float(sx) * float(sw.mean()) * 74 * 74 * np.sqrt(depth) / rng.uniform(20, 90), F32)
    constants = {
        "sx": sx,
        "zx": zero_point(rng, activation),
        "w": w,
        "sw": sw if per_channel else sw[0],
        "zw": np.full(cout, w_zero, weight) if per_channel else w_zero,
        "sy": sy,
        "zy": zero_point(rng, activation),
    }
    names = ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy"]
    if rng.integers(3):
        constants["b"] = rng.integers(-(2**14), 2**14, cout).astype(np.int32)
        names.append("b")
    attrs: dict[str, Any] = {
        "kernel_shape": kernel,
        "dilations": dilations,
        "strides": strides,
        "pads": pads,
        "group": group,
    }
    if last:
        attrs["channels_last"] = 1
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    return Case("QLinearConv", names, {"x": x}, constants, attrs, "com.microsoft" if last else "")


def binary_case(rng: np.random.Generator, op: str, dtype: Any, a_shape: Sequence[int], b_shape: Sequence[int]) -> Case:
    """A random QLinearAdd or QLinearMul."""
    sa, sb = scale(rng), scale(rng)
    typical = max(sa, sb) if op == "QLinearAdd" else sa * sb * 100
    constants = {
        "sa": sa,
        "za": zero_point(rng, dtype),
        "sb": sb,
        "zb": zero_point(rng, dtype),
        "sy": np.asarray(typical * rng.uniform(0.4, 3), F32),
        "zy": zero_point(rng, dtype),
    }
    feeds = {"a": codes(rng, a_shape, dtype), "b": codes(rng, b_shape, dtype)}
    return Case(op, ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], feeds, constants)


def gemm_case(
    rng: np.random.Generator, *, activation: Any = np.uint8, weight: Any = np.int8, output: str = "codes"
) -> Case:
    """A random QGemm with quantized or float output."""
    m, k, n = (int(v) for v in rng.integers(1, (20, 200, 70)))
    trans_a, trans_b = bool(rng.integers(2)), bool(rng.integers(2))
    per_channel = bool(rng.integers(2))
    sa = scale(rng)
    sb = np.exp(rng.uniform(-6, -2, n if per_channel else 1)).astype(F32)
    zb = codes(rng, (n,), weight) if per_channel else zero_point(rng, weight)
    constants = {
        "sa": sa,
        "za": zero_point(rng, activation),
        "b": codes(rng, (n, k) if trans_b else (k, n), weight),
        "sb": sb if per_channel else sb[0],
        "zb": zb,
    }
    names = ["a", "sa", "za", "b", "sb", "zb", ""]
    if rng.integers(3):
        shape = [(n,), (1, n), (m, n), (m, 1), (1,)][int(rng.integers(5))]
        constants["c"] = rng.integers(-(2**14), 2**14, shape).astype(np.int32)
        names[6] = "c"
    if output == "codes":
        constants["sy"] = np.asarray(float(sa) * float(sb.mean()) * 74 * 74 * np.sqrt(k) / rng.uniform(10, 90), F32)
        constants["zy"] = zero_point(rng, activation)
        names += ["sy", "zy"]
    attrs = {"transA": int(trans_a), "transB": int(trans_b), "alpha": float(rng.choice([1.0, 0.7]))}
    return Case("QGemm", names, {"a": codes(rng, (k, m) if trans_a else (m, k), activation)}, constants, attrs)


def matmul_case(
    rng: np.random.Generator,
    *,
    activation: Any = np.uint8,
    weight: Any = np.int8,
    batch: str = "none",
    constant: bool = True,
) -> Case:
    """A random QLinearMatMul."""
    m, k, n = (int(v) for v in rng.integers(1, (20, 200, 70)))
    per_column = batch == "none" and bool(rng.integers(2))
    a_shape: tuple[int, ...] = (m, k)
    b_shape: tuple[int, ...] = (k, n)
    if batch == "left":
        a_shape = (2, 3, m, k)
    elif batch == "both":
        a_shape, b_shape = (2, 3, m, k), (2, 3, k, n)
    elif batch == "broadcast":
        a_shape, b_shape = (2, 1, m, k), (3, k, n)
    sa, sb = scale(rng), np.exp(rng.uniform(-6, -2, n if per_column else 1)).astype(F32)
    zb = codes(rng, (n,), weight) if per_column else zero_point(rng, weight)
    constants = {
        "sa": sa,
        "za": zero_point(rng, activation),
        "sb": sb if per_column else sb[0],
        "zb": zb,
        "sy": np.asarray(float(sa) * float(sb.mean()) * 74 * 74 * np.sqrt(k) / rng.uniform(10, 90), F32),
        "zy": zero_point(rng, activation),
    }
    feeds = {"a": codes(rng, a_shape, activation)}
    b = codes(rng, b_shape, weight)
    (constants if constant else feeds)["b"] = b
    return Case("QLinearMatMul", ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], feeds, constants, {}, "")


def unary_case(
    rng: np.random.Generator, op: str, dtype: Any, shape: Sequence[int], ratio: float = 1.0, **attrs: Any
) -> Case:
    """A random operator with inputs ``x, sx, zx, sy, zy``; `ratio` is the typical ``sx / sy``."""
    sx = scale(rng)
    sy = np.asarray(float(sx) / ratio * rng.uniform(0.3, 3), F32)
    constants = {"sx": sx, "zx": zero_point(rng, dtype), "sy": sy, "zy": zero_point(rng, dtype)}
    return Case(op, ["x", "sx", "zx", "sy", "zy"], {"x": codes(rng, shape, dtype)}, constants, attrs)


def broadcast_shapes(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Two shapes that broadcast: axes of size 1 and missing leading axes on either side."""
    a = [int(v) for v in rng.integers(1, 12, int(rng.integers(1, 5)))]
    b = list(a)
    for axis in range(len(a)):
        if rng.integers(3) == 0:
            (a if rng.integers(2) else b)[axis] = 1
    if rng.integers(3) == 0:
        (a if rng.integers(2) else b).pop(0)
    return a, b


def to_float_case(rng: np.random.Generator, *, weight: Any = np.int8) -> Case:
    """A random MatMulIntegerToFloat, with and without bias."""
    batch = str(rng.choice(["none", "left"]))
    case = matmul_case(rng, weight=weight, batch=batch, constant=bool(rng.integers(2)))
    case.op, case.domain, case.inputs = "MatMulIntegerToFloat", "com.microsoft", ["a", "b", "sa", "sb", "za", "zb"]
    del case.constants["sy"], case.constants["zy"]
    if rng.integers(2):
        columns = (case.constants if "b" in case.constants else case.feeds)["b"].shape[-1]
        case.constants["bias"] = rng.standard_normal(columns).astype(F32)
        case.inputs.append("bias")
    return case


def dynamic_case(rng: np.random.Generator, *, weight: Any = np.int8) -> Case:
    """A random DynamicQuantizeMatMul."""
    case = to_float_case(rng, weight=weight)
    case.op, case.inputs = "DynamicQuantizeMatMul", ["a", "b", "sb", "zb", *case.inputs[6:]]
    del case.constants["sa"], case.constants["za"]
    case.feeds["a"] = (rng.standard_normal(case.feeds["a"].shape) * 10 ** rng.uniform(-2, 2)).astype(F32)
    return case


def integer_matmul_case(rng: np.random.Generator, *, weight: Any = np.int8) -> Case:
    """A random MatMulInteger."""
    case = matmul_case(rng, weight=weight, batch=str(rng.choice(["none", "left", "both"])))
    case.op, case.inputs = "MatMulInteger", ["a", "b", "za", "zb"]
    case.constants = {name: case.constants[name] for name in ("b", "za", "zb")}
    return case


def integer_conv_case(rng: np.random.Generator, *, weight: Any = np.int8) -> Case:
    """A random ConvInteger."""
    case = conv_case(rng, weight=weight)
    case.op, case.inputs = "ConvInteger", ["x", "w", "zx", "zw"]
    case.constants = {name: case.constants[name] for name in ("w", "zx", "zw")}
    case.constants["zw"] = np.asarray(case.constants["zw"]).reshape(-1)[0]
    return case


def global_average_case(rng: np.random.Generator, dtype: Any) -> Case:
    """A random QLinearGlobalAveragePool."""
    shape = [int(v) for v in rng.integers(1, 20, 4)]
    return unary_case(rng, "QLinearGlobalAveragePool", dtype, shape, channels_last=int(rng.integers(2)))


def average_case(rng: np.random.Generator, dtype: Any, *, last: bool) -> Case:
    """A random QLinearAveragePool of 1 to 3 spatial axes, the whole input as window among them."""
    rank = int(rng.integers(1, 4))
    kernel = [int(v) for v in rng.integers(1, 4, rank)]
    spatial = [int(v) for v in rng.integers(4, 8, rank)]
    pads = [int(rng.integers(0, k)) for k in kernel * 2]
    if rng.integers(5) == 0:
        kernel, pads = spatial, [0] * (2 * rank)
    shape = (2, *spatial, 5) if last else (2, 5, *spatial)
    return unary_case(
        rng, "QLinearAveragePool", dtype, shape,
        kernel_shape=kernel, strides=[int(v) for v in rng.integers(1, 4, rank)], pads=pads,
        ceil_mode=int(rng.integers(2)), count_include_pad=int(rng.integers(2)), channels_last=int(last),
    )  # fmt: skip


def max_pool_case(rng: np.random.Generator, dtype: Any) -> Case:
    """A random MaxPool of codes."""
    kernel = [int(v) for v in rng.integers(1, 4, 2)]
    attrs = {
        "kernel_shape": kernel,
        "strides": [int(v) for v in rng.integers(1, 4, 2)],
        "pads": [int(rng.integers(0, k)) for k in kernel * 2],
        "dilations": [int(v) for v in rng.integers(1, 3, 2)],
        "ceil_mode": int(rng.integers(2)),
    }
    x = codes(rng, (2, 5, *(int(v) for v in rng.integers(7, 14, 2))), dtype)
    return Case("MaxPool", ["x"], {"x": x}, {}, attrs, "")


def softmax_case(rng: np.random.Generator, dtype: Any) -> Case:
    """A random QLinearSoftmax, mostly with the scale 1/256 that quantizers choose."""
    shape = [int(v) for v in rng.integers(1, 30, int(rng.integers(1, 4)))]
    attrs = {"axis": int(rng.integers(-1, 1)), "opset": int(rng.choice([12, 13]))}
    case = unary_case(rng, "QLinearSoftmax", dtype, shape, **attrs)
    case.constants["sy"] = np.asarray(1 / 256, F32) if rng.integers(2) else scale(rng, -3, -1)
    if rng.integers(2):
        case.constants["zy"] = np.asarray(np.iinfo(dtype).min, dtype)
    return case


def concat_case(rng: np.random.Generator, dtype: Any) -> Case:
    """A random QLinearConcat of one to three inputs, some with the output's scale."""
    names = ["sy", "zy"]
    constants: dict[str, np.ndarray] = {"sy": scale(rng), "zy": zero_point(rng, dtype)}
    feeds: dict[str, np.ndarray] = {}
    base = [int(v) for v in rng.integers(1, 8, 3)]
    for index in range(int(rng.integers(1, 4))):
        feeds[f"x{index}"] = codes(rng, (base[0], int(rng.integers(1, 9)), base[2]), dtype)
        same = rng.integers(3) == 0
        constants[f"s{index}"] = constants["sy"] if same else np.asarray(constants["sy"] * rng.uniform(0.2, 3), F32)
        constants[f"z{index}"] = constants["zy"] if same else zero_point(rng, dtype)
        names += [f"x{index}", f"s{index}", f"z{index}"]
    return Case("QLinearConcat", names, feeds, constants, {"axis": 1})


def where_case(rng: np.random.Generator, dtype: Any) -> Case:
    """A random QLinearWhere with broadcast operands."""
    shape = [int(v) for v in rng.integers(1, 9, 3)]
    constants: dict[str, np.ndarray] = {}
    for name in "abz":
        constants[f"s{name}"], constants[f"z{name}"] = scale(rng, -2, 0), zero_point(rng, dtype)
    if rng.integers(3) == 0:
        constants["sa"], constants["za"] = constants["sz"], constants["zz"]
    feeds = {
        "c": rng.integers(0, 2, shape).astype(bool),
        "a": codes(rng, shape if rng.integers(2) else (1,), dtype),
        "b": codes(rng, shape if rng.integers(2) else (shape[0], 1, 1), dtype),
    }
    return Case("QLinearWhere", ["c", "a", "sa", "za", "b", "sb", "zb", "sz", "zz"], feeds, constants)


def quantize_case(rng: np.random.Generator, dtype: Any) -> Case:
    """A random QuantizeLinear, per tensor or channel; infinities, NaN and huge values among the inputs."""
    x = (rng.standard_normal([int(v) for v in rng.integers(1, 12, 4)]) * 10 ** rng.uniform(-2, 2)).astype(F32)
    x.flat[0] = rng.choice([np.inf, -np.inf, np.nan, 1e30])
    case = Case("QuantizeLinear", ["x", "s", "z"], {"x": x}, {"s": scale(rng), "z": zero_point(rng, dtype)}, {}, "")
    if rng.integers(2):
        scales = np.array([scale(rng) for _ in range(x.shape[1])], F32)
        case.constants, case.attrs = {"s": scales, "z": codes(rng, scales.shape, dtype)}, {"axis": 1}
    return case


def dequantize_case(rng: np.random.Generator, dtype: Any) -> Case:
    """A random DequantizeLinear, per tensor or channel, sometimes of int32."""
    shape = [int(v) for v in rng.integers(1, 12, 4)]
    if rng.integers(3) == 0:
        x = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
        return Case("DequantizeLinear", ["x", "s"], {"x": x}, {"s": scale(rng)}, {}, "")
    x = codes(rng, shape, dtype)
    case = Case("DequantizeLinear", ["x", "s", "z"], {"x": x}, {"s": scale(rng), "z": zero_point(rng, dtype)}, {}, "")
    if rng.integers(2):
        scales = np.array([scale(rng) for _ in range(x.shape[1])], F32)
        case.constants, case.attrs = {"s": scales, "z": codes(rng, scales.shape, dtype)}, {"axis": 1}
    return case


def resize_case(rng: np.random.Generator, dtype: Any) -> Case:
    """A random nearest-neighbour Resize."""
    factors = np.array([1, 1, *rng.choice([0.5, 1, 1.5, 2, 3], 2)], F32)
    attrs = {
        "mode": "nearest",
        "coordinate_transformation_mode": str(
            rng.choice(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
        ),
        "nearest_mode": str(rng.choice(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])),
    }
    x = codes(rng, (2, 3, *(int(v) for v in rng.integers(2, 9, 2))), dtype)
    return Case("Resize", ["x", "", "factors"], {"x": x}, {"factors": factors}, attrs, "")
