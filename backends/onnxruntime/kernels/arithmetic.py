"""Where and how a CPU rounds: the one place that differs between instruction sets.

ONNX Runtime's integer kernels accumulate in int32 and come back to 8 bits through float32. The order of the float32
operations, and which of them are fused, decides the last bit; everything here was found by comparing random layers with the
runtime, and is asserted by the tests for every kernel.

Notation: ``f(.)`` rounds to float32, ``fma(a, b, c) = f(a * b + c)`` with a single rounding, ``rint`` rounds half to even,
``sat`` clamps to the range of the output type.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from zsq_deploy.backends.base import Target

__all__ = ["Arithmetic", "Arm64Arithmetic", "arithmetic_for", "arithmetic_here", "codes", "fma"]

Array = npt.NDArray[Any]
F32 = np.float32


def fma(a: Array | Any, b: Array | Any, c: Array | Any) -> npt.NDArray[np.float32]:
    """``float32(a * b + c)`` with one rounding, for float32 arguments.

    The product of two float32 is exact in float64. Their sum with ``c`` is rounded to float64 *to odd* (an inexact result with
    an even last bit moves one step towards the true value), which makes the second rounding to float32 the only one that counts.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    even = (np.ascontiguousarray(total).reshape(-1).view(np.int64) & 1 == 0).reshape(total.shape)
    moved = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, moved, total).astype(F32)


def codes(dtype: npt.DTypeLike) -> npt.NDArray[np.int32]:
    """The 256 codes of an 8-bit type in the order of their bytes: 0..127, 128..255 or -128..-1."""
    return np.arange(256, dtype=np.uint8).view(np.dtype(dtype)).astype(np.int32)


def _saturate(values: npt.NDArray[np.float32], dtype: npt.DTypeLike) -> Array:
    """``sat(rint(values))`` for values that already hold the zero point."""
    limits = np.iinfo(np.dtype(dtype))
    return np.clip(np.rint(values), F32(limits.min), F32(limits.max)).astype(np.int32).astype(dtype)


@dataclass(frozen=True)
class Arithmetic:
    """The rules of x86-64 with AVX2 or newer.

    Attributes:
        name: For reports.
        saturating_pairs: Products of u8 activations with s8 weights are summed in pairs in saturating int16 before they enter
            the int32 accumulator (``vpmaddubsw``), as on x86 without VNNI. False: exact sums (``vpdpbusd``).
        runtime: Major and minor version of the runtime, where a rule changed between versions (QLinearSoftmax).
    """

    name: str = "x86-64"
    saturating_pairs: bool = False
    runtime: tuple[int, int] = (1, 32)

    def multiplier(self, a_scale: Array | Any, b_scale: Array | Any, y_scale: Array | Any) -> npt.NDArray[np.float32]:
        """The factor of a requantization, ``f(f(sa * sb) / sy)``; `b_scale` may hold one value a channel."""
        product = np.asarray(a_scale, F32) * np.asarray(b_scale, F32)
        return np.asarray(product / np.asarray(y_scale, F32), F32)

    def requantize(self, accumulator: torch.Tensor, multiplier: Array, zero_point: int, dtype: npt.DTypeLike) -> Array:
        """``sat(rint(f(f(acc) * multiplier)) + zp)``, with the multiplier along the last axis.

        The int32 accumulator is rounded to float32 first, the product is clamped to the range of the type less the zero point,
        then rounded half to even; the zero point is added as an integer.
        """
        limits = np.iinfo(np.dtype(dtype))
        scaled = accumulator.to(torch.float32)
        scaled.mul_(torch.from_numpy(np.atleast_1d(multiplier).astype(F32)))
        scaled.clamp_(limits.min - zero_point, limits.max - zero_point).round_().add_(zero_point)
        kind = torch.int8 if np.dtype(dtype) == np.int8 else torch.uint8
        return np.asarray(scaled.to(kind).numpy())

    def to_float(self, accumulator: torch.Tensor, factor: Array, bias: Array | None) -> Array:
        """``f(f(f(acc) * factor[n]) + bias[n])``: multiplication and addition round separately."""
        value = accumulator.to(torch.float32).numpy() * np.asarray(factor, F32)
        return np.asarray(value if bias is None else value + np.asarray(bias, F32))

    def quantize(self, x: Array, scale: Array | Any, zero_point: Array | Any, dtype: npt.DTypeLike) -> Array:
        """``sat(rint(f(x / scale)) + zp)``; NaN becomes the smallest code, as the vector instructions make it."""
        limits = np.iinfo(np.dtype(dtype))
        zero = np.asarray(zero_point).astype(np.int32)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            scaled = np.asarray(x, F32) / np.asarray(scale, F32)
        low, high = (limits.min - zero).astype(F32), (limits.max - zero).astype(F32)
        bounded = np.minimum(np.where(np.isnan(scaled), low, np.maximum(scaled, low)), high)
        return (np.rint(bounded).astype(np.int32) + zero).astype(dtype)

    def dequantize(self, q: Array, scale: Array | Any, zero_point: Array | Any) -> npt.NDArray[np.float32]:
        """``f(f(q - zp) * scale)``; the difference is formed in int32."""
        difference = q.astype(np.int32) - np.asarray(zero_point).astype(np.int32)
        return difference.astype(F32) * np.asarray(scale, F32)

    def add_table(
        self, a: tuple[Any, Any], b: tuple[Any, Any], y: tuple[Any, Any], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """The sum of two quantized tensors for every pair of codes.

        With ``ra = f(sa / sy)``, ``rb = f(sb / sy)``::

            offset = f(zy - fma(ra, za, f(rb * zb)))
            y      = sat(rint(fma(qa, ra, fma(qb, rb, offset))))

        The arguments are not interchangeable: `b` is added first. Where one operand is broadcast along the innermost
        contiguous run, the runtime passes that one as `b`.

        Args:
            a: Scale and zero point of the first operand.
            b: The same of the second.
            y: The same of the output.
            dtype: Type of all three.

        Returns:
            ``[256, 256]`` codes, indexed by the bytes of ``qa`` and ``qb``.
        """
        (sa, za), (sb, zb), (sy, zy) = a, b, y
        ra, rb = F32(sa) / F32(sy), F32(sb) / F32(sy)
        offset = F32(zy) - fma(ra, F32(za), F32(rb * F32(zb)))
        q = codes(dtype).astype(F32)
        inner = fma(q, rb, offset)
        return _saturate(fma(q[:, None], ra, inner[None, :]), dtype)

    def mul_table(
        self, a: tuple[Any, Any], b: tuple[Any, Any], y: tuple[Any, Any], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """The product of two quantized tensors for every pair of codes.

        ``y = sat(rint(f(f((qa - za) * (qb - zb) * r) + zy)))`` with ``r = f(f(sa * sb) / sy)``; the integer product is exact,
        and the zero point is added in float32, *before* rounding (and not fused).
        """
        (sa, za), (sb, zb), (sy, zy) = a, b, y
        ratio = F32(F32(sa) * F32(sb)) / F32(sy)
        qa, qb = codes(dtype) - np.int32(za), codes(dtype) - np.int32(zb)
        product = (qa[:, None] * qb[None, :]).astype(F32)
        return _saturate(product * ratio + F32(zy), dtype)

    def softmax(
        self, value: Array, total: Array, inverse_scale: np.float32, zero_point: int, dtype: npt.DTypeLike
    ) -> Array:
        """Codes of ``value / total``, both float32: ``sat(rint(value * Y / total) + zy)``.

        The quotient is formed in float64 from ONNX Runtime 1.32 on. Before, it was float32, where ``value * Y`` may overflow for
        rows of a few elements (what becomes of an infinity is the CPU's choice). Signed codes were not clamped before 1.29: a
        result above 127 wraps to a negative code.
        """
        limits = np.iinfo(np.dtype(dtype))
        if self.runtime >= (1, 32):
            exact = np.rint(value.astype(np.float64) * np.float64(inverse_scale) / total) + zero_point
            return np.asarray(np.minimum(exact, limits.max).astype(np.int32).astype(dtype))
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = np.rint(value * inverse_scale / total)
        signed = limits.min < 0
        finite = np.isfinite(ratio)
        whole = np.minimum(np.where(finite, ratio, 0), F32(2.0**30)).astype(np.int64)
        whole = np.where(finite, whole, self._integer_infinity(signed)) + zero_point
        if not signed:
            return np.asarray(np.minimum(whole % 2**32, 255).astype(dtype))
        whole = (whole + 2**31) % 2**32 - 2**31
        if self.runtime >= (1, 29):
            return np.asarray(np.clip(whole, limits.min, limits.max).astype(dtype))
        return np.asarray(np.where(whole > 255, -1, whole).astype(dtype))

    def _integer_infinity(self, signed: bool) -> int:
        """What converting an infinite float to a 32-bit integer gives on this CPU."""
        return -(2**31) if signed else 0

    def average_multiplier(self, x_scale: Any, y_scale: Any, count: int) -> np.float32:
        """The factor of a global average pool, ``f(sx / f(sy * count))``."""
        return F32(F32(x_scale) / F32(F32(y_scale) * F32(count)))


@dataclass(frozen=True)
class Arm64Arithmetic(Arithmetic):
    """The rules of 64-bit Arm, as far as they differ: sums of two tensors are fixed-point, biases fused.

    Convolutions, matrix products and averages round as on x86. Compared with the runtime on an emulated Arm processor.
    """

    name: str = "arm64"

    def to_float(self, accumulator: torch.Tensor, factor: Array, bias: Array | None) -> Array:
        """``fma(f(acc), factor[n], bias[n])``."""
        value = accumulator.to(torch.float32).numpy()
        return np.asarray(
            value * np.asarray(factor, F32) if bias is None else fma(value, np.asarray(factor, F32), bias)
        )

    def _integer_infinity(self, signed: bool) -> int:
        return 2**31 - 1 if signed else 2**32 - 1

    def mul_table(
        self, a: tuple[Any, Any], b: tuple[Any, Any], y: tuple[Any, Any], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """The product of two quantized tensors: as on x86, with the zero point added by a fused multiply-add."""
        (sa, za), (sb, zb), (sy, zy) = a, b, y
        ratio = F32(F32(sa) * F32(sb)) / F32(sy)
        qa, qb = codes(dtype) - np.int32(za), codes(dtype) - np.int32(zb)
        return _saturate(fma((qa[:, None] * qb[None, :]).astype(F32), ratio, F32(zy)), dtype)

    def add_table(
        self, a: tuple[Any, Any], b: tuple[Any, Any], y: tuple[Any, Any], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """The sum of two quantized tensors for every pair of codes, in fixed point.

        With ``e = floor(log2(max(ra, rb)))``, ``s = 21 - e`` and ``m = rint(r * 2**s)`` for both operands::

            y = sat(round_half_away((qa - za) * ma + (qb - zb) * mb, 2**s) + zy)

        Ratios outside ``[2**-14, 2**8)``, or a shift outside ``[13, 31]``, fall back to plain float32:
        ``sat(rint(clamp(f(f(f(sa * (qa - za)) + f(sb * (qb - zb))) / sy)) + zy))``.
        """
        (sa, za), (sb, zb), (sy, zy) = a, b, y
        ra, rb = F32(sa) / F32(sy), F32(sb) / F32(sy)
        qa, qb = codes(dtype) - np.int32(za), codes(dtype) - np.int32(zb)
        low, high = F32(2.0**-14), F32(2.0**8)
        limits = np.iinfo(np.dtype(dtype))
        if low <= min(ra, rb) and max(ra, rb) < high:
            exponent = int(np.frexp(max(ra, rb))[1]) - 1
            shift = 21 - exponent
            ma, mb = (int(np.rint(r * F32(2.0**shift))) for r in (ra, rb))
            if 13 <= shift <= 31 and max(ma, mb) < 1 << 22 and max(ma, mb) >= 1 << 21:
                total = qa[:, None].astype(np.int64) * ma + qb[None, :].astype(np.int64) * mb
                total -= (total < 0).astype(np.int64)  # halves away from zero: the rounding shift alone rounds them up
                rounded = (total + (1 << (shift - 1))) >> shift
                return np.asarray(np.clip(rounded + int(zy), limits.min, limits.max).astype(dtype))
        total32 = (F32(sa) * qa[:, None].astype(F32) + F32(sb) * qb[None, :].astype(F32)) / F32(sy)
        bounded = np.clip(total32, F32(limits.min - int(zy)), F32(limits.max - int(zy)))
        return np.asarray(np.rint(bounded + F32(zy)).astype(np.int32).astype(dtype))


def arithmetic_for(target: Target, *, saturating_pairs: bool | None = None) -> Arithmetic:
    """The rules of the CPU that a target names: what the engine will compute *there*.

    Args:
        target: A target of this runtime; names with ``arm`` use :class:`Arm64Arithmetic`, the others x86.
        saturating_pairs: Override. Default: targets with ``avx2`` in their name have no VNNI.
    """
    if "arm" in target.name:
        return Arm64Arithmetic(saturating_pairs=bool(saturating_pairs))
    if saturating_pairs is None:
        saturating_pairs = "avx2" in target.name
    return Arithmetic(saturating_pairs=saturating_pairs)


def arithmetic_here(runtime: tuple[int, int] = (1, 32)) -> Arithmetic:
    """The rules of this machine's CPU: what an engine computes *here*, whatever target it was built for."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return Arm64Arithmetic(runtime=runtime)
    return Arithmetic(saturating_pairs=not _has_vnni(), runtime=runtime)


def _has_vnni() -> bool:
    """Whether the CPU sums u8 x s8 products exactly; assumed where the operating system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return not flags or "avx512_vnni" in flags or "avx_vnni" in flags
