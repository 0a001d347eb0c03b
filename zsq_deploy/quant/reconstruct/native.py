"""The memory-bound loops of block reconstruction in C, for machines with a compiler; everything works without one, slower.

Rounding an activation with QDrop takes about ten passes over memory with torch operators, its gradient as many, and the random mask as long
as a small convolution. Here it is one pass each, and the mask is a hash of key and position that both passes compute anew. The source is
below; it is compiled once per process for the processor at hand (about a second) and loaded with ctypes.

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
        self._forward.restype = self._choose.restype = None
        self._backward.restype = ctypes.c_double
        self._pool: ThreadPoolExecutor | None = None

    def _run(self, count: int, call: Any) -> list[Any]:
        """`call(first, count)` for the parts of all threads; ctypes lets go of Python's lock while C runs."""
        threads = min(torch.get_num_threads(), max(1, count // _SMALLEST))
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
