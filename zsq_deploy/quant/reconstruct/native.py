"""The memory-bound loops of block reconstruction in C, for machines with a compiler; everything works without one, slower.

Rounding an activation with QDrop takes about ten passes over memory with torch operators, its gradient as many, and the random mask as long
as a small convolution. Here it is one pass each, and the mask is a hash of key and position that both passes compute anew. A soft weight
is one pass, too; and one more is its gradient, that of its scale, the regulariser's, and Adam's step, so that the gradient of the logits is never
written. The source is below; it is compiled once per process for the processor at hand (about a second) and loaded with ctypes.

``ZSQ_NATIVE=0`` in the environment switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsq_deploy.quant.loops import compile_loops

if TYPE_CHECKING:
    from zsq_deploy.quant.reconstruct.quantizers import Range

__all__ = ["Kernels", "kernels"]

_SOURCE = r"""
#include <math.h>
#include <stddef.h>
#include <stdint.h>

static inline uint32_t hash(uint32_t position, uint32_t key)
{
    uint32_t h = position * 0x9E3779B1u + key;
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    return h ^ (h >> 16);
}

static inline float limited(float v, float low, float high)
{
    v = v < low ? low : v;
    return v > high ? high : v;
}

/* out = rounded x, or x within floor .. ceiling where the hash of the position is below `below` */
void round_forward(const float *restrict x, float *restrict out, ptrdiff_t first, ptrdiff_t count, float scale, float low, float high,
                   float floor, float ceiling, uint32_t below, uint32_t key)
{
    if (below == 0) {
        for (ptrdiff_t i = first; i < first + count; i++) out[i] = limited(rintf(x[i] / scale), low, high) * scale;
        return;
    }
    for (ptrdiff_t i = first; i < first + count; i++) {
        float v = x[i];
        float code = limited(rintf(v / scale), low, high) * scale;
        float kept = limited(v, floor, ceiling);
        out[i] = hash((uint32_t)i, key) < below ? kept : code;
    }
}

/* gradient of x, and the sum of the gradient of the scale, block by block in float, blocks added up in double */
double round_backward(const float *restrict g, const float *restrict x, float *restrict d, ptrdiff_t first, ptrdiff_t count, float scale,
                      float low, float high, float floor, float ceiling, uint32_t below, uint32_t key)
{
    double total = 0.0;
    for (ptrdiff_t start = first; start < first + count; start += 1024) {
        ptrdiff_t end = start + 1024 < first + count ? start + 1024 : first + count;
        float part = 0.0f;
        for (ptrdiff_t i = start; i < end; i++) {
            float v = x[i], steps = v / scale, rounded = rintf(steps), code = limited(rounded, low, high);
            float passes = rounded == code ? 1.0f : 0.0f;
            float slope = code - passes * steps;
            int drop = hash((uint32_t)i, key) < below;
            float kept = (v >= floor) & (v <= ceiling) ? 1.0f : 0.0f;
            passes = drop ? kept : passes;
            slope = drop ? 0.0f : slope;
            d[i] = g[i] * passes;
            part += g[i] * slope;
        }
        total += part;
    }
    return total;
}

/* out = a where the hash of the position is below `below`, else b */
void choose(const float *restrict a, const float *restrict b, float *restrict out, ptrdiff_t first, ptrdiff_t count, uint32_t below,
            uint32_t key)
{
    for (ptrdiff_t i = first; i < first + count; i++) out[i] = hash((uint32_t)i, key) < below ? a[i] : b[i];
}

/* e to the power of x, -80 .. 80, to about 1e-6: a power of two by its bits, the rest as a Taylor series */
static inline float exponential(float x)
{
    float t = limited(x, -80.0f, 80.0f) * 1.44269504088896f, whole = rintf(t), r = (t - whole) * 0.693147180559945f;
    float s = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    union { int32_t i; float f; } power = {((int32_t)whole + 127) * 8388608};
    return s * power.f;
}

/* natural logarithm of a positive normal number: exponent by its bits, the rest as the series of the inverse hyperbolic tangent */
static inline float logarithm(float x)
{
    union { float f; int32_t i; } bits = {x};
    int32_t exponent = ((bits.i - 0x3F3504F3) >> 23);
    union { int32_t i; float f; } rest = {bits.i - exponent * 8388608};
    float s = (rest.f - 1.0f) / (rest.f + 1.0f), q = s * s;
    return (float)exponent * 0.693147180559945f + 2.0f * s * (1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
}

/* soft weights, row by row: a scale each */
void soft_forward(const float *restrict v, const float *restrict base, const float *restrict scale, float *restrict out, ptrdiff_t first,
                  ptrdiff_t rows, ptrdiff_t width, float low, float high)
{
    for (ptrdiff_t row = first; row < first + rows; row++) {
        float s = scale[row];
        for (ptrdiff_t i = row * width; i < (row + 1) * width; i++) {
            float h = limited(1.2f / (1.0f + exponential(-v[i])) - 0.1f, 0.0f, 1.0f);
            out[i] = limited(base[i] + h, low, high) * s;
        }
    }
}

static inline float soft_element(float g, float v, float b, float s, float low, float high, float push, float power, float *code)
{
    float p = 1.0f / (1.0f + exponential(-v)), wide = 1.2f * p - 0.1f, h = limited(wide, 0.0f, 1.0f), raw = b + h;
    *code = limited(raw, low, high);
    float d = (raw >= low) & (raw <= high) ? g * s : 0.0f;
    if (push != 0.0f) {
        float away = 2.0f * h - 1.0f, size = fabsf(away);
        float slope = push * exponential(power * logarithm(size < 1e-30f ? 1e-30f : size));
        d -= away < 0.0f ? -slope : (away > 0.0f ? slope : 0.0f);
    }
    return (wide > 0.0f) & (wide < 1.0f) ? d * p * (1.0f - p) * 1.2f : 0.0f;
}

/* gradient of the scales, and one step of Adam for the logits; push = 2 strength beta, power = beta - 1 */
void soft_step(const float *restrict g, float *restrict v, const float *restrict base, const float *restrict scale, float *restrict mean,
               float *restrict square, float *restrict d_scale, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t width, float low, float high,
               float push, float power, float rate, float root)
{
    for (ptrdiff_t row = first; row < first + rows; row++) {
        float s = scale[row];
        double total = 0.0;
        for (ptrdiff_t start = row * width; start < (row + 1) * width; start += 1024) {
            ptrdiff_t end = start + 1024 < (row + 1) * width ? start + 1024 : (row + 1) * width;
            float part = 0.0f;
            for (ptrdiff_t i = start; i < end; i++) {
                float code, d = soft_element(g[i], v[i], base[i], s, low, high, push, power, &code);
                part += g[i] * code;
                float m = mean[i] + 0.1f * (d - mean[i]), q = 0.999f * square[i] + 0.001f * d * d;
                mean[i] = m;
                square[i] = q;
                v[i] -= rate * m / (sqrtf(q) / root + 1e-8f);
            }
            total += part;
        }
        d_scale[row] = (float)total;
    }
}
"""

_SMALLEST = 1 << 15  # elements a thread


class Kernels:
    """The compiled loops. Tensors are float32 on the CPU, their elements side by side in memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, real, word = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float, ctypes.c_uint32
        self._forward, self._backward, self._choose = library.round_forward, library.round_backward, library.choose
        self._forward.argtypes = [pointer] * 2 + [size] * 2 + [real] * 5 + [word] * 2
        self._backward.argtypes = [pointer] * 3 + [size] * 2 + [real] * 5 + [word] * 2
        self._choose.argtypes = [pointer] * 3 + [size] * 2 + [word] * 2
        self._soft_forward, self._soft_step = library.soft_forward, library.soft_step
        self._soft_forward.argtypes = [pointer] * 4 + [size] * 3 + [real] * 2
        self._soft_step.argtypes = [pointer] * 7 + [size] * 3 + [real] * 6
        self._forward.restype = self._choose.restype = self._soft_forward.restype = self._soft_step.restype = None
        self._backward.restype = ctypes.c_double
        self._pool: ThreadPoolExecutor | None = None

    def _run(self, count: int, call: Any, width: int = 1) -> list[Any]:
        """`call(first, count)` for the parts of all threads; ctypes lets go of Python's lock while C runs. `width`: elements behind each count."""
        threads = min(torch.get_num_threads(), count, max(1, count * width // _SMALLEST))
        if threads == 1:
            return [call(0, count)]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads())
        bounds = [count * number // threads for number in range(threads + 1)]
        parts = [self._pool.submit(call, a, b - a) for a, b in itertools.pairwise(bounds)]
        return [part.result() for part in parts]

    def round(self, x: Tensor, scale: float, limits: Range, share: float, key: int) -> Tensor:
        """See :class:`zsq_deploy.quant.reconstruct.quantizers.RoundedActivation`."""
        out = torch.empty_like(x)
        values = (scale, limits.low, limits.high, limits.floor, limits.ceiling, _below(share), key)
        self._run(x.numel(), lambda first, count: self._forward(x.data_ptr(), out.data_ptr(), first, count, *values))
        return out

    def round_backward(
        self, g: Tensor, x: Tensor, scale: float, limits: Range, share: float, key: int
    ) -> tuple[Tensor, float]:
        """Gradients of x and of the scale."""
        out = torch.empty_like(x)
        values = (scale, limits.low, limits.high, limits.floor, limits.ceiling, _below(share), key)
        parts = self._run(
            x.numel(),
            lambda first, count: self._backward(g.data_ptr(), x.data_ptr(), out.data_ptr(), first, count, *values),
        )
        return out, float(sum(parts))

    def choose(self, a: Tensor, b: Tensor, share: float, key: int) -> Tensor:
        """`share` of the elements from `a`, the others from `b`."""
        out = torch.empty_like(b)
        self._run(
            b.numel(),
            lambda first, count: self._choose(
                a.data_ptr(), b.data_ptr(), out.data_ptr(), first, count, _below(share), key
            ),
        )
        return out

    def soft_weight(self, v: Tensor, base: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
        """A soft weight; see :class:`zsq_deploy.quant.reconstruct.quantizers.RoundedWeight`.

        Args:
            v: Logits; one row of memory (its first axis) for each scale.
            base: Integers, laid out in the same way.
            scale: ``[rows]``.
            low: Smallest code.
            high: Largest code.
        """
        out = torch.empty_like(v)
        rows, width = scale.numel(), v.numel() // scale.numel()
        pointers = [each.data_ptr() for each in (v, base, scale, out)]
        self._run(rows, lambda first, count: self._soft_forward(*pointers, first, count, width, low, high), width)
        return out

    def soft_step(
        self,
        g: Tensor,
        v: Tensor,
        base: Tensor,
        scale: Tensor,
        moments: tuple[Tensor, Tensor],
        limits: tuple[float, float],
        regulariser: tuple[float, float],
        rate: float,
        steps: int,
    ) -> Tensor:
        """One step of Adam for the logits (betas 0.9 and 0.999), in place; the gradient of the scales, ``[rows]``.

        Args:
            g: Gradient of the soft weight, laid out as the logits.
            v: Logits.
            base: Integers.
            scale: ``[rows]``.
            moments: Adam's running means of the gradient and of its square.
            limits: Smallest and largest code.
            regulariser: Strength (0 for none) and beta.
            rate: Adam's step.
            steps: Number of this step, from 1.
        """
        out = torch.empty_like(scale)
        rows, width = scale.numel(), v.numel() // scale.numel()
        strength, beta = regulariser
        pointers = [each.data_ptr() for each in (g, v, base, scale, *moments, out)]
        values = (2.0 * strength * beta, beta - 1.0, rate / (1.0 - 0.9**steps), (1.0 - 0.999**steps) ** 0.5)
        self._run(rows, lambda first, count: self._soft_step(*pointers, first, count, width, *limits, *values), width)
        return out


def _below(share: float) -> int:
    return min(int(share * 2.0**32), 2**32 - 1)


# No contraction: the codes have to be those that division and rounding in float32 give. Sums may be reordered.
_FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fassociative-math",
    "-fno-signed-zeros",
)


@functools.cache
def kernels() -> Kernels | None:
    """The loops, compiled for this processor; ``None`` where there is no working C compiler or ``ZSQ_NATIVE=0``."""
    library = compile_loops(_SOURCE, _FLAGS)
    return None if library is None else Kernels(library)
