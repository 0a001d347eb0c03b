"""Scale, zero point and fake-quantization against ONNX's reference operators and against float64 formulas."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from zsq_deploy.errors import UsageError
from zsq_deploy.quant import Granularity, Scheme, fake_quant, onnx_type, qparams, storage_dtype, weight_qparams

SCHEMES = [
    Scheme(bits, signed, symmetric) for bits in (2, 4, 8, 16) for signed in (True, False) for symmetric in (True, False)
] + [
    Scheme(8, restricted=True),
    Scheme(8, reduced=True),
    Scheme(6, signed=False, symmetric=False),
]
finite = st.floats(-1e6, 1e6, allow_subnormal=False)


@settings(max_examples=200, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), a=finite, b=finite)
def test_a_range_becomes_representable(scheme, a, b):
    low, high = min(a, b), max(a, b)
    p = qparams(low, high, scheme)
    scale, zero = float(p.scale), int(p.zero_point)
    assert scale > 0
    assert scheme.qmin <= zero <= scheme.qmax
    assert p.dequantize(np.array([zero])).item() == 0.0
    low, high = min(low, 0.0), max(high, 0.0)
    # half a step for the rounded zero point, and the rounding of the scale to float32
    slack = scale * (0.0 if scheme.symmetric else 0.5) + 1e-7 * (high - low)
    assert float(p.low) <= low + slack
    assert float(p.high) >= high - slack
    if not scheme.symmetric and high - low > 1e-3:
        assert scale == pytest.approx((high - low) / (scheme.qmax - scheme.qmin), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([8, 16]), signed=st.booleans(), seed=st.integers(0, 1000), per_channel=st.booleans())
def test_codes_and_numbers_equal_the_standard(bits, signed, seed, per_channel):
    rng = np.random.default_rng(seed)
    x = (rng.normal(0, 1, (2, 3, 5)) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32)
    scheme = Scheme(
        bits, signed, symmetric=False, granularity=Granularity.CHANNEL if per_channel else Granularity.TENSOR
    )
    if per_channel:
        p = qparams(x.min((0, 2)) * 0.7, x.max((0, 2)) * 0.7, scheme, axis=1)
    else:
        p = qparams(x.min() * 0.7, x.max() * 0.7, scheme)
    kind = onnx.TensorProto.DataType.Name(onnx_type(scheme)).lower()
    shape = "[3]" if per_channel else ""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2,3,5] x, float{shape} s, {kind}{shape} z) => ({kind}[2,3,5] q, float[2,3,5] y) {{
            q = QuantizeLinear <axis = 1> (x, s, z)  y = DequantizeLinear <axis = 1> (q, s, z) }}"""
    )
    codes, numbers = ReferenceEvaluator(model).run(
        None, {"x": x, "s": p.scale, "z": p.zero_point.astype(storage_dtype(scheme))}
    )
    np.testing.assert_array_equal(p.quantize(x), codes)
    np.testing.assert_array_equal(p.dequantize(p.quantize(x)), numbers)
    simulated = fake_quant(
        torch.from_numpy(x),
        torch.from_numpy(p.scale),
        torch.from_numpy(p.zero_point.astype(np.float32)),
        scheme.qmin,
        scheme.qmax,
        axis=1 if per_channel else None,
    )
    np.testing.assert_array_equal(simulated.numpy(), numbers)


def test_rounding_is_half_to_even_and_saturates():
    scheme = Scheme(8, signed=False, symmetric=False)
    p = qparams(0.0, 255.0, scheme)
    np.testing.assert_array_equal(p.quantize(np.array([0.5, 1.5, 2.5, -3.0, 300.0])), [0, 2, 2, 0, 255])


def test_gradients_are_straight_through_inside_and_zero_outside():
    x = torch.tensor([-2.0, -1.0, 0.3, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    y = fake_quant(x, scale, 0.0, -8, 7)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0, 1, 0, 0])
    # LSQ: clipped numbers contribute their code, others rint(u) - u.
    expected = -8 - 8 + (3 - 3.0) + 7 + 7
    assert float(scale.grad) == pytest.approx(expected, abs=1e-6)


def test_scale_gradient_equals_lsq_in_between():
    x = torch.tensor([0.34, -0.27], dtype=torch.float64)
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    fake_quant(x, scale, 0.0, -8, 7).sum().backward()
    assert float(scale.grad) == pytest.approx((3 - 3.4) + (-3 + 2.7))


@pytest.mark.parametrize("with_grad", [False, True])
def test_simulation_is_the_same_with_and_without_gradients(with_grad):
    x = torch.linspace(-9, 9, 10_007, requires_grad=with_grad)
    y = fake_quant(x, 0.037, 3.0, -128, 127).detach().numpy()
    u = np.linspace(-9, 9, 10_007, dtype=np.float32)
    u = x.detach().numpy()
    expected = (np.clip(np.rint(u / np.float32(0.037)) + 3, -128, 127) - 3) * np.float32(0.037)
    np.testing.assert_array_equal(y, expected.astype(np.float32))


def test_blocks_equal_the_standard():
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, (4, 10, 3)).astype(np.float32)
    scheme = Scheme(4, granularity=Granularity.BLOCK, block=4)
    p = weight_qparams(w, scheme, axis=1)
    assert p.scale.shape == (4, 3, 3)
    for o in range(4):
        for block in range(3):
            part = w[o, 4 * block : 4 * block + 4, :]
            for k in range(3):
                wanted = max(part[:, k].max() / 7, -part[:, k].min() / 8)
                assert p.scale[o, block, k] == pytest.approx(wanted, rel=1e-6)
    codes = p.quantize(w)
    assert codes.dtype == ml_dtypes.int4
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (int8[4,8,3] q, float[4,2,3] s, int8[4,2,3] z) => (float[4,8,3] y) {
            y = DequantizeLinear <axis = 1, block_size = 4> (q, s, z) }"""
    )
    (expected,) = ReferenceEvaluator(model).run(
        None, {"q": codes[:, :8].astype(np.int8), "s": p.scale[:, :2], "z": p.zero_point[:, :2].astype(np.int8)}
    )
    np.testing.assert_array_equal(p.dequantize(codes)[:, :8], expected)
    simulated = fake_quant(torch.from_numpy(w[:, :8]), torch.from_numpy(p.scale[:, :2]), 0.0, -8, 7, axis=1)
    np.testing.assert_array_equal(simulated.numpy(), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("granularity", [Granularity.TENSOR, Granularity.CHANNEL])
def test_mse_weights_are_never_worse_than_minmax(bits, granularity):
    rng = np.random.default_rng(1)
    w = rng.standard_t(3, (6, 5, 3, 3)).astype(np.float32)
    scheme = Scheme(bits, granularity=granularity)
    errors = {}
    for method in ("minmax", "mse"):
        p = weight_qparams(w, scheme, axis=0, method=method)
        errors[method] = np.square(p.dequantize(p.quantize(w)) - w).sum((1, 2, 3) if granularity == "channel" else None)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all()
    if bits == 3:
        assert errors["mse"].sum() < 0.9 * errors["minmax"].sum()


def test_a_dead_range_gets_scale_one():
    p = qparams(0.0, 0.0, Scheme(8))
    assert float(p.scale) == 1.0
    p = qparams(np.array([0.0, -1.0]), np.array([0.0, 1.0]), Scheme(8, granularity=Granularity.CHANNEL), axis=0)
    assert p.scale[0] == 1.0


def test_ranges_that_are_not_finite_are_refused():
    with pytest.raises(UsageError, match="not finite"):
        qparams(0.0, np.inf, Scheme(8))
