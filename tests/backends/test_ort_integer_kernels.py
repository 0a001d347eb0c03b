"""Every integer kernel against the runtime's own: random one-node engines, all outputs equal.

On x86 without VNNI the runtime's u8 x s8 products saturate; the reference then models that, and the same equality is asserted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_deploy.backends.onnxruntime.kernels import Arithmetic, arithmetic_here

from . import ort_integer_cases as cases
from .ort_integer_cases import F32, Case, both

U8, S8 = np.uint8, np.int8
Make = Callable[[np.random.Generator], Case]

exact = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**32 - 1)


def assert_equal(case: Case, folder: Path, **options: Any) -> None:
    theirs, ours = both(case, folder, **options)
    for a, b in zip(theirs, ours, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


CONV = {
    "u8s8": {},
    "u8u8": {"weight": U8},
    "s8s8": {"activation": S8},
    "depthwise": {"depthwise": True},
    "depthwise-s8": {"depthwise": True, "activation": S8},
    "depthwise-last": {"depthwise": True, "last": True},
    "groups": {"groups": 3},
    "groups-last": {"groups": 2, "last": True},
    "last": {"last": True},
    "last-s8": {"last": True, "activation": S8},
    "last-u8u8": {"last": True, "weight": U8},
    "wide": {"last": True, "channels": 128},
    "1d": {"rank": 1},
    "3d": {"rank": 3},
}


@pytest.mark.parametrize("kind", CONV)
@exact
@given(seed=seeds)
def test_convolutions(kind: str, seed: int, tmp_path: Path) -> None:
    assert_equal(cases.conv_case(np.random.default_rng(seed), **CONV[kind]), tmp_path)


TYPES = {"u8s8": (U8, S8), "u8u8": (U8, U8), "s8s8": (S8, S8)}


@pytest.mark.parametrize("output", ["codes", "float"])
@pytest.mark.parametrize("types", TYPES)
@exact
@given(seed=seeds)
def test_fully_connected_layers(types: str, output: str, seed: int, tmp_path: Path) -> None:
    a, w = TYPES[types]
    assert_equal(cases.gemm_case(np.random.default_rng(seed), activation=a, weight=w, output=output), tmp_path)


@pytest.mark.parametrize("batch", ["none", "left", "both", "broadcast"])
@pytest.mark.parametrize("types", TYPES)
@exact
@given(seed=seeds, constant=st.booleans())
def test_matrix_products(types: str, batch: str, seed: int, constant: bool, tmp_path: Path) -> None:
    a, w = TYPES[types]
    case = cases.matmul_case(np.random.default_rng(seed), activation=a, weight=w, batch=batch, constant=constant)
    assert_equal(case, tmp_path)


@pytest.mark.parametrize(
    "make", [cases.to_float_case, cases.dynamic_case, cases.integer_matmul_case, cases.integer_conv_case]
)
@pytest.mark.parametrize("types", ["u8s8", "u8u8"])
@exact
@given(seed=seeds)
def test_products_that_leave_the_codes(make: Callable[..., Case], types: str, seed: int, tmp_path: Path) -> None:
    assert_equal(make(np.random.default_rng(seed), weight=TYPES[types][1]), tmp_path)


OTHERS: dict[str, Callable[[np.random.Generator, Any], Case]] = {
    "add": lambda rng, t: cases.binary_case(rng, "QLinearAdd", t, (3, 1111), (3, 1111)),
    "add-broadcast": lambda rng, t: cases.binary_case(rng, "QLinearAdd", t, *cases.broadcast_shapes(rng)),
    "mul": lambda rng, t: cases.binary_case(rng, "QLinearMul", t, (3, 1111), (3, 1111)),
    "mul-broadcast": lambda rng, t: cases.binary_case(rng, "QLinearMul", t, *cases.broadcast_shapes(rng)),
    "global-average": cases.global_average_case,
    "average": lambda rng, t: cases.average_case(rng, t, last=False),
    "average-last": lambda rng, t: cases.average_case(rng, t, last=True),
    "max": cases.max_pool_case,
    "sigmoid": lambda rng, t: cases.unary_case(rng, "QLinearSigmoid", t, (7, 50), float(rng.uniform(1, 20))),
    "leaky-relu": lambda rng, t: cases.unary_case(rng, "QLinearLeakyRelu", t, (7, 50), alpha=float(rng.uniform(0, 1))),
    "softmax": cases.softmax_case,
    "concat": cases.concat_case,
    "where": cases.where_case,
    "quantize": cases.quantize_case,
    "dequantize": cases.dequantize_case,
    "resize": cases.resize_case,
}


@pytest.mark.parametrize("dtype", [U8, S8], ids=["u8", "s8"])
@pytest.mark.parametrize("kind", OTHERS)
@exact
@given(seed=seeds)
def test_everything_else(kind: str, dtype: Any, seed: int, tmp_path: Path) -> None:
    assert_equal(OTHERS[kind](np.random.default_rng(seed), dtype), tmp_path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16], ids=["u16", "s16"])
@exact
@given(seed=seeds)
def test_sixteen_bit_codes(dtype: Any, seed: int, tmp_path: Path) -> None:
    case = cases.quantize_case(np.random.default_rng(seed), dtype)
    case.domain = "com.microsoft"
    assert_equal(case, tmp_path)


def test_all_pairs_of_codes_are_added_and_multiplied_alike(tmp_path: Path) -> None:
    """The tables of sums and products, whole: 65,536 pairs, ten random parameter sets each."""
    rng = np.random.default_rng(5)
    pairs = np.arange(65536)
    for op in ("QLinearAdd", "QLinearMul"):
        for _ in range(10):
            case = cases.binary_case(rng, op, U8, (65536,), (65536,))
            case.feeds = {"a": (pairs >> 8).astype(U8), "b": (pairs & 255).astype(U8)}
            assert_equal(case, tmp_path)


def test_the_swap_of_a_broadcast_first_operand_is_seen(tmp_path: Path) -> None:
    """Sums depend on which operand is broadcast: over many parameter sets, adding in the other order must differ somewhere."""
    rng = np.random.default_rng(0)
    arithmetic = arithmetic_here()
    differing = 0
    for _ in range(60):
        case = cases.binary_case(rng, "QLinearAdd", U8, (256, 1), (256, 256))
        case.feeds = {"a": np.arange(256, dtype=U8)[:, None], "b": np.tile(np.arange(256, dtype=U8), (256, 1))}
        theirs, ours = both(case, tmp_path)
        np.testing.assert_array_equal(theirs[0], ours[0])
        c = case.constants
        table = arithmetic.add_table((c["sa"], c["za"]), (c["sb"], c["zb"]), (c["sy"], c["zy"]), U8)
        differing += int((table != theirs[0]).sum())
    assert differing > 0


def test_half_a_million_different_products(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    for _ in range(4):
        assert_equal(_many_products_case(rng), tmp_path)


class _ScaleOfOnePiece(Arithmetic):
    """Forms a multiplier in float64 and rounds once, instead of twice."""

    def multiplier(self, a_scale: Any, b_scale: Any, y_scale: Any) -> Any:
        ratio = np.asarray(a_scale, np.float64) * np.asarray(b_scale, np.float64) / np.asarray(y_scale, np.float64)
        return ratio.astype(F32)


class _HalfUp(Arithmetic):
    """Rounds halves up instead of to even."""

    def requantize(self, accumulator: torch.Tensor, multiplier: Any, zero_point: int, dtype: Any) -> Any:
        limits = np.iinfo(dtype)
        scaled = np.floor(accumulator.to(torch.float32).numpy() * np.atleast_1d(multiplier) + F32(0.5))
        return np.clip(scaled + zero_point, limits.min, limits.max).astype(dtype)


class _Unfused(Arithmetic):
    """Adds without fused multiply-adds."""

    def add_table(self, a: Any, b: Any, y: Any, dtype: Any) -> Any:
        (sa, za), (sb, zb), (sy, zy) = a, b, y
        q = np.arange(256, dtype=np.uint8).view(dtype).astype(np.int32)
        total = (F32(sa) * (q[:, None] - int(za)) + F32(sb) * (q[None] - int(zb))).astype(F32) / F32(sy)
        limits = np.iinfo(dtype)
        return np.clip(np.rint(total + F32(zy)), limits.min, limits.max).astype(dtype)


def _half_way_case() -> Case:
    """A 1x1 convolution whose results lie exactly between codes: accumulators times 1/2."""
    x = np.arange(256, dtype=U8).reshape(1, 1, 16, 16)
    constants = {
        "sx": F32(1),
        "zx": U8(0),
        "w": np.ones((1, 1, 1, 1), S8),
        "sw": F32(0.5),
        "zw": S8(0),
        "sy": F32(1),
        "zy": U8(0),
    }
    return Case(
        "QLinearConv", ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy"], {"x": x}, constants, {"kernel_shape": [1, 1]}, ""
    )


def _many_products_case(rng: np.random.Generator) -> Case:
    """Every code times 4,000 weights with a scale each: about half a million different accumulators and multipliers."""
    x = np.arange(256, dtype=U8).reshape(1, 1, 16, 16)
    constants = {
        "sx": cases.scale(rng),
        "zx": U8(0),
        "w": cases.codes(rng, (4000, 1, 1, 1), S8),
        "sw": rng.uniform(0.5, 1, 4000).astype(F32),
        "zw": np.zeros(4000, S8),
        "sy": F32(0),
        "zy": U8(128),
    }
    constants["sy"] = F32(constants["sx"] * 255)
    return Case(
        "QLinearConv", ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy"], {"x": x}, constants, {"kernel_shape": [1, 1]}, ""
    )


@pytest.mark.parametrize("wrong", [_ScaleOfOnePiece, _HalfUp, _Unfused])
def test_a_wrong_rounding_rule_does_not_pass(wrong: type[Arithmetic], tmp_path: Path) -> None:
    """The comparison is sharp: one wrong last bit in a scale, a tie, or a missing fusion is found."""
    rng = np.random.default_rng(1)
    vnni = dataclasses.asdict(arithmetic_here())
    differing = 0
    for _ in range(60):
        if wrong is _HalfUp:
            case = _half_way_case()
        elif wrong is _Unfused:
            case = cases.binary_case(rng, "QLinearAdd", U8, (65536,), (65536,))
            case.feeds = {"a": (np.arange(65536) >> 8).astype(U8), "b": (np.arange(65536) & 255).astype(U8)}
        else:
            case = _many_products_case(rng)
        theirs, ours = both(case, tmp_path, arithmetic=wrong(**vnni))
        differing += int((theirs[0] != ours[0]).sum())
        if differing:
            break
    assert differing > 0, "the wrong rule was not told from the right one"


def test_threads_do_not_change_a_code(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        case = cases.conv_case(rng, last=True, channels=32)
        one, ours = both(case, tmp_path, threads=1)
        two, ours_two = both(case, tmp_path, threads=2)
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(ours[0], ours_two[0])
