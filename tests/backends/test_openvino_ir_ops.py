"""Every operation of an IR against OpenVINO itself: the twin of the graph that was read, in float64, computes the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch

ov = pytest.importorskip("openvino")

import openvino.opset7 as op7  # noqa: E402
import openvino.opset13 as op  # noqa: E402
from openvino.utils.node_factory import NodeFactory  # noqa: E402
from openvino.utils.types import as_nodes  # noqa: E402

from zsq_deploy.backends.openvino.ir import read_ir  # noqa: E402
from zsq_deploy.errors import UnsupportedOpError  # noqa: E402
from zsq_deploy.model import Twin  # noqa: E402

Array = np.ndarray[Any, Any]
CONFIG = {
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
    "LP_TRANSFORMS_MODE": "NO",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


def f(*shape: int, seed: int = 7, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def c(values: Any, kind: Any = np.float32) -> Any:
    return op.constant(np.asarray(values, kind))


def i(*values: int) -> Any:
    return op.constant(np.asarray(values, np.int64))


@dataclass(frozen=True)
class Case:
    """`build` takes one parameter a shape and returns the node (or nodes) under test."""

    name: str
    shapes: Sequence[Sequence[int]]
    build: Callable[..., Any]
    dynamic: bool = True
    kind: Any = np.float32
    draw: Callable[[np.random.Generator, Sequence[int]], Array] | None = None
    tolerance: float = 1e-5


X = [(2, 6, 8, 8)]
T = [(2, 5, 12)]


def positive(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    return (rng.random(shape) + 0.5).astype(np.float32)


def unit(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    return (rng.random(shape) * 1.8 - 0.9).astype(np.float32)


def conv(x: Any, w: Array, **more: Any) -> Any:
    rank = w.ndim - 2
    given = {"strides": [1] * rank, "pads_begin": [0] * rank, "pads_end": [0] * rank, "dilations": [1] * rank, **more}
    return op.convolution(x, op.constant(w), **given)


def group_conv(x: Any, w: Array, **more: Any) -> Any:
    rank = w.ndim - 3
    given = {"strides": [1] * rank, "pads_begin": [0] * rank, "pads_end": [0] * rank, "dilations": [1] * rank, **more}
    return op.group_convolution(x, op.constant(w), **given)


UNARY = [
    Case(name, T, getattr(op, name), draw=draw)
    for name, draw in {
        "abs": None, "acos": unit, "acosh": lambda r, s: positive(r, s) + 1, "asin": unit, "asinh": None, "atan": None, "atanh": unit,
        "ceiling": None, "cos": None, "cosh": None, "erf": None, "exp": None, "floor": None, "log": positive, "negative": None,
        "relu": None, "sigmoid": None, "sign": None, "sin": None, "sinh": None, "sqrt": positive, "tan": unit, "tanh": None,
        "hswish": None, "hsigmoid": None, "mish": None, "softplus": None, "softsign": None,
    }.items()
]  # fmt: skip

BINARY = [
    Case(name, [(2, 5, 12), (5, 1)], getattr(op, name), dynamic=False, draw=positive)
    for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "squared_difference", "mod", "floor_mod")
]  # fmt: skip

COMPARE = [
    Case(name, [(2, 5, 12), (2, 5, 12)], lambda a, b, n=name: op.select(getattr(op, n)(a, b), a, b), draw=lambda r, s: r.integers(0, 3, s).astype(np.float32))
    for name in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
]  # fmt: skip

ACTIVATION = [
    Case("gelu_erf", T, lambda x: op.gelu(x, "erf")),
    Case("gelu_tanh", T, lambda x: op.gelu(x, "tanh")),
    Case("elu", T, lambda x: op.elu(x, 0.7)),
    Case("selu", T, lambda x: op.selu(x, c(1.6732632), c(1.0507))),
    Case("swish", T, op.swish),
    Case("swish_beta", T, lambda x: op.swish(x, c(1.702))),
    Case("hard_sigmoid", T, lambda x: op.hard_sigmoid(x, c(0.2), c(0.5))),
    Case("clamp", T, lambda x: op.clamp(x, -0.5, 1.0)),
    Case("clamp_upper", T, lambda x: op.clamp(x, -3.5e38, 1.0)),
    Case("prelu_scalar", X, lambda x: op.prelu(x, c([0.1]))),
    Case("prelu_channels", X, lambda x: op.prelu(x, c(f(6)))),
    Case("softmax", T, lambda x: op.softmax(x, -1)),
    Case("softmax_axis_1", X, lambda x: op.softmax(x, 1)),
    Case("log_softmax", T, lambda x: op.log_softmax(x, -1)),
    Case("round_even", T, lambda x: op.round(x, "half_to_even"), draw=lambda r, s: r.integers(-9, 9, s).astype(np.float32) / 2),
    Case("round_away", T, lambda x: op.round(x, "half_away_from_zero"), draw=lambda r, s: r.integers(-9, 9, s).astype(np.float32) / 2),
]  # fmt: skip

CONV = [
    Case("conv", X, lambda x: conv(x, f(4, 6, 3, 3))),
    Case("conv_padded", X, lambda x: conv(x, f(4, 6, 3, 3), strides=[2, 1], pads_begin=[1, 0], pads_end=[0, 2])),
    Case("conv_dilated", X, lambda x: conv(x, f(4, 6, 3, 3), dilations=[2, 1])),
    Case("conv_same_upper", X, lambda x: conv(x, f(4, 6, 3, 2), strides=[2, 2], auto_pad="same_upper")),
    Case("conv_same_lower", X, lambda x: conv(x, f(4, 6, 3, 2), strides=[2, 2], auto_pad="same_lower")),
    Case("conv_valid", X, lambda x: conv(x, f(4, 6, 3, 2), auto_pad="valid")),
    Case("conv_1d", T, lambda x: conv(x, f(4, 5, 3), pads_begin=[1], pads_end=[1])),
    Case("conv_3d", [(2, 3, 4, 4, 4)], lambda x: conv(x, f(4, 3, 3, 3, 3))),
    Case("conv_bias", X, lambda x: op.add(conv(x, f(4, 6, 3, 3)), c(f(1, 4, 1, 1)))),
    Case("conv_bias_first", X, lambda x: op.add(c(f(1, 4, 1, 1)), conv(x, f(4, 6, 3, 3)))),
    Case("conv_one_bias", X, lambda x: op.add(conv(x, f(4, 6, 3, 3)), c(f(1, 1, 1, 1)))),
    Case("conv_bias_twice_read", X, lambda x: (lambda y: op.multiply(op.add(y, c(f(1, 4, 1, 1))), y))(conv(x, f(4, 6, 3, 3)))),
    Case("depthwise", X, lambda x: group_conv(x, f(6, 1, 1, 3, 3), pads_begin=[1, 1], pads_end=[1, 1])),
    Case("grouped", X, lambda x: op.add(group_conv(x, f(2, 4, 3, 3, 3)), c(f(1, 8, 1, 1)))),
    Case("conv_computed_weight", [(2, 6, 8, 8), (4, 6, 3, 3)], lambda x, w: op.convolution(x, w, [1, 1], [0, 0], [0, 0], [1, 1]), dynamic=False),
    Case("transposed", X, lambda x: op.convolution_backprop_data(x, c(f(6, 4, 3, 3)), [2, 2], pads_begin=[1, 1], pads_end=[1, 1], output_padding=[1, 1])),
    Case("transposed_bias", X, lambda x: op.add(op.convolution_backprop_data(x, c(f(6, 4, 3, 3)), [2, 2]), c(f(1, 4, 1, 1)))),
    Case("transposed_shape", X, lambda x: op.convolution_backprop_data(x, c(f(6, 4, 3, 3)), [2, 2], output_shape=i(16, 17), auto_pad="same_upper")),
    Case("transposed_shape_lower", X, lambda x: op.convolution_backprop_data(x, c(f(6, 4, 3, 3)), [2, 2], output_shape=i(16, 17), auto_pad="same_lower")),
    Case("transposed_shape_explicit", X, lambda x: op.convolution_backprop_data(x, c(f(6, 4, 3, 3)), [2, 2], output_shape=i(15, 17))),
    Case("transposed_grouped", X, lambda x: op.group_convolution_backprop_data(x, c(f(2, 3, 4, 3, 3)), [2, 2], pads_begin=[0, 1], pads_end=[1, 0])),
    Case("matmul", T, lambda x: op.matmul(x, c(f(12, 7)), False, False)),
    Case("matmul_transposed", T, lambda x: op.matmul(x, c(f(7, 12)), False, True)),
    Case("matmul_left", T, lambda x: op.matmul(x, c(f(5, 7)), True, False)),
    Case("matmul_bias", [(3, 12)], lambda x: op.add(op.matmul(x, c(f(7, 12)), False, True), c(f(1, 7)))),
    Case("matmul_flat_bias", [(3, 12)], lambda x: op.add(op.matmul(x, c(f(12, 7)), False, False), c(f(7)))),
    Case("matmul_rows_bias", [(3, 12)], lambda x: op.add(op.matmul(x, c(f(12, 7)), False, False), c(f(3, 1))), dynamic=False),
    Case("matmul_computed", [(2, 5, 12), (2, 7, 12)], lambda a, b: op.matmul(a, b, False, True)),
    Case("matmul_vector", T, lambda x: op.matmul(x, c(f(12)), False, True)),
    Case("attention", [(2, 3, 5, 8)] * 3, lambda q, k, v: op.scaled_dot_product_attention(q, k, v)),
    Case("attention_mask", [(2, 3, 5, 8)] * 3, lambda q, k, v: op.scaled_dot_product_attention(q, k, v, c(f(5, 5)))),
    Case("attention_scale", [(2, 3, 5, 8)] * 3, lambda q, k, v: op.scaled_dot_product_attention(q, k, v, c(np.zeros((5, 5))), c(0.3))),
    Case("attention_causal", [(2, 3, 5, 8)] * 3, lambda q, k, v: op.scaled_dot_product_attention(q, k, v, causal=True)),
    Case("einsum", [(2, 5, 12), (2, 12, 3)], lambda a, b: op.einsum([a, b], "bij,bjk->bik")),
]  # fmt: skip

NORM = [
    Case("batch_norm", X, lambda x: op.batch_norm_inference(x, c(f(6)), c(f(6, seed=1)), c(f(6, seed=2)), c(np.abs(f(6, seed=3)) + 0.5), 1e-3)),
    Case("mvn_last", T, lambda x: op.mvn(x, i(-1), True, 1e-5, "inside_sqrt")),
    Case("mvn_two", T, lambda x: op.mvn(x, i(1, 2), True, 1e-5, "inside_sqrt")),
    Case("mvn_outside", T, lambda x: op.mvn(x, i(-1), True, 1e-2, "outside_sqrt")),
    Case("mvn_spatial", X, lambda x: op.mvn(x, i(2, 3), True, 1e-5, "inside_sqrt")),
    Case("mvn_mean_only", X, lambda x: op.mvn(x, i(1), False, 1e-5, "inside_sqrt")),
    Case("layer_norm", T, lambda x: op.add(op.multiply(op.mvn(x, i(-1), True, 1e-5, "inside_sqrt"), c(f(12))), c(f(12, seed=2)))),
    Case("normalize_add", X, lambda x: op.normalize_l2(x, i(1), 1e-3, "add")),
    Case("normalize_max", X, lambda x: op.normalize_l2(x, i(1), 3.0, "max")),
    Case("lrn", X, lambda x: op.lrn(x, i(1), 1e-2, 0.75, 1.0, 5)),
    Case("group_norm", X, lambda x: op.group_normalization(x, c(f(6)), c(f(6, seed=1)), 3, 1e-4)),
]  # fmt: skip

POOL = [
    Case("max_pool", X, lambda x: op.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [3, 3]).output(0)),
    Case("max_pool_pad", X, lambda x: op.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)),
    Case("max_pool_ceil", X, lambda x: op.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [3, 3], rounding_type="ceil").output(0)),
    Case("max_pool_same", X, lambda x: op.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [3, 3], auto_pad="same_upper").output(0)),
    Case("max_pool_dilated", X, lambda x: op.max_pool(x, [1, 1], [2, 2], [0, 0], [0, 0], [3, 3]).output(0)),
    Case("avg_pool", X, lambda x: op.avg_pool(x, [2, 2], [0, 0], [0, 0], [2, 2], True)),
    Case("avg_pool_exclude", X, lambda x: op.avg_pool(x, [2, 2], [1, 1], [1, 1], [3, 3], True)),
    Case("avg_pool_include", X, lambda x: op.avg_pool(x, [2, 2], [1, 1], [1, 1], [3, 3], False)),
    Case("avg_pool_ceil", X, lambda x: op.avg_pool(x, [2, 2], [0, 0], [0, 0], [3, 3], True, rounding_type="ceil")),
    Case("adaptive_one", X, lambda x: op.adaptive_avg_pool(x, i(1, 1))),
    Case("adaptive_four", X, lambda x: op.adaptive_avg_pool(x, i(4, 2))),
    Case("adaptive_max", X, lambda x: op.adaptive_max_pool(x, i(4, 2), "i32").output(0)),
]  # fmt: skip

REDUCE = [
    Case(f"{name}_{keep}", X, lambda x, n=name, k=keep: getattr(op, n)(x, i(1, 3), k), draw=positive)
    for name in ("reduce_mean", "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_l1", "reduce_l2")
    for keep in (True, False)
] + [
    Case("cum_sum", T, lambda x: op.cumsum(x, c(1, np.int64), True, True)),
    Case("topk_values", T, lambda x: op.topk(x, c(3, np.int64), -1, "max", "value").output(0)),
    Case("topk_places", T, lambda x: op.convert(op.topk(x, c(3, np.int32), 2, "min", "value").output(1), "f32")),
    Case("logical", [(2, 5, 12), (2, 5, 12)], lambda a, b: op.select(op.logical_and(op.greater(a, c(0)), op.logical_not(op.logical_or(op.less(b, c(0)), op.logical_xor(op.less(a, b), op.less(b, a))))), a, b)),
    Case("reduce_logical", T, lambda x: op.select(op.reduce_logical_or(op.greater(x, c(1.8)), i(2), True), x, op.negative(x))),
    Case("reduce_all", T, lambda x: op.select(op.reduce_logical_and(op.greater(x, c(-1.5)), i(2), True), x, op.negative(x))),
]  # fmt: skip

SHAPE = [
    Case("reshape_zero", X, lambda x: op.reshape(x, i(0, -1), True)),
    Case("reshape_plain", X, lambda x: op.reshape(x, i(-1, 6, 64), False)),
    Case("reshape_computed", X, lambda x: op.reshape(x, op.concat([op.gather(op.shape_of(x, "i64"), i(0), i(0)), i(-1)], 0), False)),
    Case("reshape_i32", X, lambda x: op.reshape(x, op.concat([op.gather(op.shape_of(x, "i32"), i(0), i(0)), c([-1], np.int32)], 0), False)),
    Case("squeeze", [(2, 1, 5, 1)], lambda x: op.squeeze(x, i(1, 3))),
    Case("unsqueeze", T, lambda x: op.unsqueeze(x, i(1, -1))),
    Case("transpose", X, lambda x: op.transpose(x, i(0, 2, 3, 1))),
    Case("transpose_reversed", T, lambda x: op.transpose(x, c([], np.int64))),
    Case("concat", [(2, 5, 12), (2, 3, 12)], lambda a, b: op.concat([a, b], 1)),
    Case("split", X, lambda x: op.concat(list(reversed(op.split(x, c(1, np.int64), 3).outputs())), 1)),
    Case("variadic_split", X, lambda x: op.concat(list(reversed(op.variadic_split(x, c(1, np.int64), i(1, -1, 2)).outputs())), 1)),
    Case("tile", T, lambda x: op.tile(x, i(1, 2, 3))),
    Case("tile_more", T, lambda x: op.tile(x, i(2, 1, 1, 1))),
    Case("broadcast", [(1, 5, 1)], lambda x: op.broadcast(x, i(3, 5, 4)), dynamic=False),
    Case("broadcast_both", [(2, 5, 1)], lambda x: op.broadcast(x, i(1, 1, 4), broadcast_spec="BIDIRECTIONAL")),
    Case("broadcast_explicit", [(5,)], lambda x: op.broadcast(x, i(3, 5, 4), i(1), "EXPLICIT"), dynamic=False),
    Case("pad_constant", X, lambda x: op.pad(x, i(0, 0, 1, 2), i(0, 1, 0, 3), "constant", c(0.5))),
    Case("pad_edge", X, lambda x: op.pad(x, i(0, 0, 1, 2), i(0, 0, 0, 3), "edge")),
    Case("pad_reflect", X, lambda x: op.pad(x, i(0, 0, 1, 2), i(0, 0, 0, 3), "reflect")),
    Case("depth_to_space_dcr", [(2, 8, 3, 4)], lambda x: op.depth_to_space(x, "blocks_first", 2)),
    Case("depth_to_space_crd", [(2, 8, 3, 4)], lambda x: op.depth_to_space(x, "depth_first", 2)),
    Case("space_to_depth", X, lambda x: op.space_to_depth(x, "blocks_first", 2)),
    Case("space_to_depth_deep", X, lambda x: op.space_to_depth(x, "depth_first", 2)),
    Case("shuffle_channels", X, lambda x: op.shuffle_channels(x, 1, 3)),
    Case("roll", X, lambda x: op.roll(x, i(2, -1), i(2, 3))),
    Case("shape_arithmetic", X, lambda x: op.multiply(x, op.convert(op.reduce_prod(op.slice(op.shape_of(x), i(1), i(9), i(1)), i(0), True), "f32"))),
]  # fmt: skip


def strided(x: Any, first: Sequence[int], last: Sequence[int], steps: Sequence[int], **masks: Sequence[int]) -> Any:
    empty = [0] * len(first)
    return op.strided_slice(
        x,
        i(*first),
        i(*last),
        i(*steps),
        masks.get("begin", empty),
        masks.get("end", empty),
        masks.get("new", empty),
        masks.get("shrink", empty),
        masks.get("ellipsis", empty),
    )


INDEX = [
    Case("slice", X, lambda x: op.slice(x, i(1, 6), i(5, 0), i(2, -2), i(1, 2))),
    Case("slice_no_axes", X, lambda x: op.slice(x, i(0, 1), i(9, -1), i(1, 1))),
    Case("strided", X, lambda x: strided(x, (0, 1, 0, 7), (0, 5, 8, -9), (1, 2, 1, -2), begin=(1, 0, 0, 0), end=(1, 0, 1, 0))),
    Case("strided_shrink", X, lambda x: strided(x, (0, -1, 2), (0, 0, 8), (1, 1, 3), begin=(1, 0, 0), end=(1, 0, 0), shrink=(0, 1, 0))),
    Case("strided_new", X, lambda x: strided(x, (0, 0, 1), (0, 0, 4), (1, 1, 1), begin=(1, 0, 0), end=(1, 0, 0), new=(0, 1, 0))),
    Case("strided_ellipsis", X, lambda x: strided(x, (0, 0, 1), (0, 0, 5), (1, 1, 1), begin=(1, 1, 0), end=(1, 1, 0), ellipsis=(0, 1, 0))),
    Case("strided_ellipsis_shrink", X, lambda x: strided(x, (0, 3), (0, 4), (1, 1), ellipsis=(1, 0), shrink=(0, 1))),
    Case("strided_computed", X, lambda x: op.strided_slice(x, op.gather(op.shape_of(c(f(2, 3))), i(0, 0, 1), i(0)), i(9, 9, 9), i(1, 1, 1), [1, 0, 0], [1, 1, 0])),
    Case("gather", X, lambda x: op.gather(x, i(3, 0, -1), i(1))),
    Case("gather_scalar", X, lambda x: op.gather(x, c(2, np.int64), i(1))),
    Case("gather_matrix", X, lambda x: op.gather(x, c([[0, 1], [2, 5]], np.int32), i(2))),
    Case("gather_elements", T, lambda x: op.gather_elements(x, op.topk(x, c(4, np.int64), 2, "max", "value").output(1), 2)),
    Case("gather_nd", T, lambda x: op.gather_nd(x, c([[0, 1], [1, 4]], np.int64)), dynamic=False),
    Case("scatter_elements", T, lambda x: op.scatter_elements_update(x, c([[[1, 0]]], np.int64), c([[[5.0, 6.0]]]), c(2, np.int64)), dynamic=False),
    Case("scatter_nd", T, lambda x: op.scatter_nd_update(x, c([[0, 1], [1, 4]], np.int64), c(f(2, 12)))),
    Case("scatter", T, lambda x: op.scatter_update(x, c([1], np.int64), c(f(1, 5, 12)), c(0, np.int64)), dynamic=False),
    Case("one_hot", T, lambda x: op.one_hot(op.topk(x, c(2, np.int64), 2, "max", "value").output(1), c(12, np.int64), c(1.5), c(-0.5), -1)),
    Case("range", X, lambda x: op.multiply(x, op.convert(op.range(c(0, np.int64), op.gather(op.shape_of(x), c(3, np.int64), i(0)), c(1, np.int64), "i64"), "f32"))),
    Case("eye", [(2, 4, 4)], lambda x: op.add(x, op.eye(c(4, np.int64), c(4, np.int64), c(1, np.int64), "f32"))),
    Case("reverse_sequence", T, lambda x: op.reverse_sequence(x, i(3, 5), 0, 1), dynamic=False),
    Case("grid_sample", [(2, 3, 8, 8), (2, 5, 6, 2)], lambda x, g: op.grid_sample(x, g, {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}), draw=unit),
    Case("int_divide", [(3, 4), (3, 4)], lambda a, b: op.convert(op.divide(op.convert(a, "i32"), op.convert(b, "i32")), "f32"), draw=lambda r, s: (r.integers(1, 9, s) * r.choice([-1, 1], s)).astype(np.float32)),
]  # fmt: skip


def resize(x: Any, sizes: Sequence[int], how: dict[str, Any]) -> Any:
    given = {
        "mode": "nearest",
        "shape_calculation_mode": "sizes",
        "coordinate_transformation_mode": "half_pixel",
        **how,
    }
    if given["shape_calculation_mode"] == "scales":
        return op.interpolate(x, c([1.7, 0.6]), **given, axes=i(2, 3))
    return op.interpolate(x, i(*sizes), **given, axes=i(2, 3))


RESIZE = [
    Case(f"resize_{mode}_{coordinates}_{calculation}_{'_'.join(map(str, sizes))}", X, lambda x, h={"mode": mode, "coordinate_transformation_mode": coordinates, "shape_calculation_mode": calculation, **more}, s=sizes: resize(x, s, h), tolerance=2e-5)
    for mode, coordinates, calculation, sizes, more in [
        ("nearest", "asymmetric", "sizes", (16, 16), {"nearest_mode": "floor"}),
        ("nearest", "half_pixel", "sizes", (11, 5), {"nearest_mode": "round_prefer_floor"}),
        ("nearest", "half_pixel", "scales", (0, 0), {"nearest_mode": "round_prefer_ceil"}),
        ("nearest", "tf_half_pixel_for_nn", "sizes", (13, 3), {"nearest_mode": "floor"}),
        ("linear_onnx", "half_pixel", "sizes", (16, 16), {}),
        ("linear_onnx", "align_corners", "sizes", (16, 13), {}),
        ("linear_onnx", "pytorch_half_pixel", "sizes", (5, 13), {}),
        ("linear_onnx", "asymmetric", "scales", (0, 0), {}),
        ("linear", "half_pixel", "sizes", (16, 13), {}),
        ("cubic", "half_pixel", "sizes", (16, 13), {"cube_coeff": -0.75}),
    ]
]  # fmt: skip

CASES = [*UNARY, *BINARY, *COMPARE, *ACTIVATION, *CONV, *NORM, *POOL, *REDUCE, *SHAPE, *INDEX, *RESIZE]


def model_of(case: Case, dynamic: bool) -> Any:
    parameters = [op.parameter([-1, *shape[1:]] if dynamic else list(shape), case.kind, f"x{k}") for k, shape in enumerate(case.shapes)]  # fmt: skip
    return ov.Model([case.build(*parameters)], parameters, case.name)


def compare(model: Any, feeds: Sequence[Array], tolerance: float) -> None:
    read = read_ir(model)
    onnx.checker.check_model(read.graph.proto, full_check=True)
    assert not read.notes
    wanted = ov.Core().compile_model(model, "CPU", CONFIG)(list(feeds))
    twin = Twin(read.graph, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        found = twin(*[torch.from_numpy(feed) for feed in feeds])
    for index, tensor in enumerate(found if isinstance(found, tuple) else (found,)):
        a, b = np.asarray(wanted[index], np.float64), tensor.numpy().astype(np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(np.abs(a).max(), 1e-6)


FORMS = [(case, dynamic) for case in CASES for dynamic in (False, True) if case.dynamic or not dynamic]


@pytest.mark.parametrize(("case", "dynamic"), FORMS, ids=[f"{c.name}-{'batch' if d else 'static'}" for c, d in FORMS])
def test_operation_computes_what_openvino_computes(case: Case, dynamic: bool) -> None:
    rng = np.random.default_rng(3)
    draw = case.draw or (lambda r, s: r.standard_normal(s).astype(np.float32))
    feeds = [draw(rng, [3, *shape[1:]] if dynamic else shape) for shape in case.shapes]
    compare(model_of(case, dynamic), feeds, case.tolerance)


def test_suppressed_boxes() -> None:
    rng = np.random.default_rng(4)
    corner = rng.random((2, 30, 2)).astype(np.float32)
    boxes = np.concatenate([corner, corner + rng.random((2, 30, 2)).astype(np.float32) * 0.4], -1)
    scores = rng.random((2, 3, 30)).astype(np.float32)
    parameters = [op.parameter([2, 30, 4], np.float32), op.parameter([2, 3, 30], np.float32)]
    kept = op.non_max_suppression(
        *parameters,
        c(5, np.int64),
        c(0.4),
        c(0.2),
        box_encoding="corner",
        sort_result_descending=False,
        output_type="i64",
    )
    compare(ov.Model([op.convert(kept.output(0), "f32")], parameters), [boxes, scores], 1e-6)


def test_older_operator_sets_are_read() -> None:
    x = op7.parameter([-1, 4, 8, 8], np.float32, "x")
    sizes, scales, axes = i(12, 12), c([1.5, 1.5]), i(2, 3)
    how = {"mode": "nearest", "shape_calculation_mode": "sizes", "coordinate_transformation_mode": "asymmetric"}
    y = NodeFactory("opset4").create(
        "Interpolate",
        as_nodes(x, sizes, scales, axes),
        {**how, "nearest_mode": "floor", "pads_begin": [0], "pads_end": [0]},
    )
    y = op7.softmax(op7.max_pool(y, [2, 2], [0, 0], [0, 0], [2, 2]), 1)
    compare(ov.Model([op7.gather(y, op7.constant(np.asarray([2, 0])), op7.constant(1))], [x]), [f(3, 4, 8, 8)], 1e-5)


def test_unknown_operations_are_named_once_with_all_places() -> None:
    x = op.parameter([2, 3, 8, 8], np.float32, "x")
    a = op.grn(x, 1e-3)
    a.set_friendly_name("first")
    b = op.grn(op.relu(a), 1e-3)
    b.set_friendly_name("second")
    d = op.pad(b, i(0, 0, 1, 1), i(0, 0, 1, 1), "symmetric")
    d.set_friendly_name("mirror")
    with pytest.raises(UnsupportedOpError) as caught:
        read_ir(ov.Model([d], [x]))
    text = str(caught.value)
    assert text.count("GRN") == 1
    for expected in ("first, second", "mirror", "symmetric", "2 form(s)", "3 place(s)"):
        assert expected in text
