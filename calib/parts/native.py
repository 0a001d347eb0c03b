"""The two memory-bound loops of statistics matching in C, for machines with a compiler; everything works without one, slower.

Between two convolutions synthesis has to sum a map and its square, normalise and limit it, and later add a closed-form gradient under a mask. With torch
operators that is eight passes over memory forward and eight backward; here it is one and one. The source is below; it is compiled once per process for the processor at hand (about a second) and loaded with ctypes.

``ZSQ_NATIVE=0`` in the environment switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zsq_deploy.quant.loops import compile_loops

if TYPE_CHECKING:
    from zsq_deploy.calib.parts.moments import Follow

__all__ = ["Kernels", "kernels"]

# Maps are [images, pixels, channels], channels innermost. `wide` is channels times however many pixels the caller lays side by side.
_SOURCE = r"""
#include <stddef.h>

#define BLOCK 64

/* Gradients through dead channels underflow to denormal numbers, and the convolutions that read them next become a hundred
   times slower; what is below 1e-30 is nothing. */
static inline float flushed(float v) { return (v > -1e-30f) & (v < 1e-30f) ? 0.0f : v; }

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int mask __attribute__((vector_size(4 * LANES)));

static inline vec choose(mask where, vec a, vec b) { return (vec)(((mask)a & where) | ((mask)b & ~where)); }

/* One column of LANES values down a block of rows: sums about `about`, and out = min(max(scale * y + shift + more, low), high). */
static inline void column(const float *y, const float *more, float *out, ptrdiff_t rows, ptrdiff_t wide,
                          vec about, vec scale, vec shift, vec low, vec high, vec *sum, vec *square)
{
    vec s0 = {0}, q0 = {0}, s1 = {0}, q1 = {0};
    for (ptrdiff_t r = 0; r < rows; r++) {
        vec v = *(const vec *)(y + r * wide), d = v - about;
        if (r & 1) {
            s1 += d;
            q1 += d * d;
        } else {
            s0 += d;
            q0 += d * d;
        }
        if (out) {
            v = v * scale + shift;
            if (more) v += *(const vec *)(more + r * wide);
            v = choose(v < low, low, v);
            *(vec *)(out + r * wide) = choose(v > high, high, v);
        }
    }
    *sum = s0 + s1;
    *square = q0 + q1;
}

/* means[i][c] and vars[i][c] (divided by n) of y over the pixels of image i;
   out = min(max(scale * y + shift + addend, low), high). addend may be NULL (zero), and out too (nothing is written).
   A row holds `beside` pixels of `wide / beside` channels. Values are summed about the mean of the first rows, so that nothing
   cancels, block by block in float; blocks are added up in double. scratch holds wide floats, total 2 * wide doubles. */
void watch_forward(const float *restrict y, const float *restrict addend,
                   const float *restrict scale, const float *restrict shift, float *restrict out,
                   float low, float high, double *restrict means, double *restrict vars,
                   double *restrict total, float *restrict about,
                   ptrdiff_t images, ptrdiff_t rows, ptrdiff_t wide, ptrdiff_t beside)
{
    double *restrict total_square = total + wide;
    ptrdiff_t channels = wide / beside, full = wide - wide % LANES;
    vec lowest = low - (vec){0}, highest = high - (vec){0};
    for (ptrdiff_t i = 0; i < images; i++) {
        ptrdiff_t some = rows < BLOCK ? rows : BLOCK;
        for (ptrdiff_t c = 0; c < wide; c++) about[c] = 0.0f;
        for (ptrdiff_t r = 0; r < some; r++) {
            const float *restrict from = y + (i * rows + r) * wide;
            for (ptrdiff_t c = 0; c < wide; c++) about[c] += from[c];
        }
        for (ptrdiff_t c = 0; c < wide; c++) {
            about[c] /= (float)some;
            total[c] = total_square[c] = 0.0;
        }
        for (ptrdiff_t start = 0; start < rows; start += BLOCK) {
            ptrdiff_t height = start + BLOCK < rows ? BLOCK : rows - start, at = (i * rows + start) * wide;
            for (ptrdiff_t c = 0; c < full; c += LANES) {
                vec s, q, a = *(const vec *)(about + c), k = *(const vec *)(scale + c), t = *(const vec *)(shift + c);
                if (addend)
                    column(y + at + c, addend + at + c, out + at + c, height, wide, a, k, t, lowest, highest, &s, &q);
                else if (out)
                    column(y + at + c, NULL, out + at + c, height, wide, a, k, t, lowest, highest, &s, &q);
                else
                    column(y + at + c, NULL, NULL, height, wide, a, k, t, lowest, highest, &s, &q);
                for (ptrdiff_t l = 0; l < LANES; l++) {
                    total[c + l] += s[l];
                    total_square[c + l] += q[l];
                }
            }
            for (ptrdiff_t c = full; c < wide; c++) {
                float s = 0.0f, q = 0.0f;
                for (ptrdiff_t r = 0; r < height; r++) {
                    ptrdiff_t here = at + r * wide + c;
                    float v = y[here], d = v - about[c];
                    s += d;
                    q += d * d;
                    if (out) {
                        v = v * scale[c] + shift[c] + (addend ? addend[here] : 0.0f);
                        v = v < low ? low : v;
                        out[here] = v > high ? high : v;
                    }
                }
                total[c] += s;
                total_square[c] += q;
            }
        }
        for (ptrdiff_t c = 0; c < channels; c++) {
            double mean = 0.0, spread = 0.0;
            for (ptrdiff_t k = c; k < wide; k += channels) mean += about[k] + total[k] / rows;
            mean /= beside;
            for (ptrdiff_t k = c; k < wide; k += channels) {
                double part = total[k] / rows, away = about[k] + part - mean;
                spread += total_square[k] / rows - part * part + away * away;
            }
            means[i * channels + c] = mean;
            vars[i * channels + c] = spread > 0.0 ? spread / beside : 0.0;
        }
    }
}

/* pass = gradient where low < limited < high, else 0; out = scale * pass + level[i][c] + slope[i][c] * y; rest = pass.
   gradient may be NULL (zero); limited may be NULL (scale * y + shift); rest may be NULL (not wanted) or equal to gradient;
   without rest, out may equal gradient. level and slope are [images, channels], or [channels] for all images (stride 0);
   scratch holds 2 * wide floats. */
void watch_backward(const float *gradient, const float *y, const float *limited, const float *restrict scale,
                    const float *restrict shift, const float *restrict level, const float *restrict slope,
                    float *out, float *rest, float low, float high, float *restrict scratch,
                    ptrdiff_t images, ptrdiff_t rows, ptrdiff_t wide, ptrdiff_t beside, ptrdiff_t stride)
{
    float *restrict a = scratch;
    float *restrict b = scratch + wide;
    ptrdiff_t channels = wide / beside;
    for (ptrdiff_t i = 0; i < images; i++) {
        for (ptrdiff_t k = 0; k < beside; k++)
            for (ptrdiff_t c = 0; c < channels; c++) {
                a[k * channels + c] = level[i * stride + c];
                b[k * channels + c] = slope[i * stride + c];
            }
        for (ptrdiff_t r = 0; r < rows; r++) {
            ptrdiff_t at = (i * rows + r) * wide;
            const float *from = y + at;
            float *to = out + at;
            if (gradient && rest) {
                const float *g = gradient + at, *mask = limited ? limited + at : NULL;
                float *keep = rest + at;
                if (mask) {
#pragma GCC ivdep
                    for (ptrdiff_t c = 0; c < wide; c++) {
                        float v = mask[c];
                        float pass = (v > low) & (v < high) ? g[c] : 0.0f;
                        keep[c] = pass;
                        to[c] = flushed(scale[c] * pass + (a[c] + b[c] * from[c]));
                    }
                } else {
#pragma GCC ivdep
                    for (ptrdiff_t c = 0; c < wide; c++) {
                        float pass = g[c];
                        keep[c] = pass;
                        to[c] = flushed(scale[c] * pass + (a[c] + b[c] * from[c]));
                    }
                }
            } else if (gradient) {
                const float *g = gradient + at;
#pragma GCC ivdep
                for (ptrdiff_t c = 0; c < wide; c++) {
                    float v = from[c] * scale[c] + shift[c];
                    float pass = (v > low) & (v < high) ? g[c] : 0.0f;
                    to[c] = flushed(scale[c] * pass + (a[c] + b[c] * from[c]));
                }
            } else {
#pragma GCC ivdep
                for (ptrdiff_t c = 0; c < wide; c++) to[c] = flushed(a[c] + b[c] * from[c]);
            }
        }
    }
}
"""

_CACHED = 1000  # batch norms whose constants are kept ready
_WIDE = 64  # lay pixels side by side until a row has at least this many values, so that vectors are full


class Kernels:
    """The compiled loops. Maps are float32, [N, C, ...] in channels-last memory, on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forward, self._backward = library.watch_forward, library.watch_backward
        pointer, size, real = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float
        self._forward.argtypes = [pointer] * 5 + [real] * 2 + [pointer] * 4 + [size] * 4
        self._backward.argtypes = [pointer] * 9 + [real] * 2 + [pointer] + [size] * 5
        self._forward.restype = self._backward.restype = None
        self._pool: ThreadPoolExecutor | None = None
        self._constants: dict[tuple[int, int, int], tuple[Tensor | None, Tensor]] = {}

    @staticmethod
    def fits(y: Tensor) -> bool:
        """Whether a map has the form that the loops want."""
        return (
            y.dim() == 4
            and y.dtype is torch.float32
            and y.device.type == "cpu"
            and y.is_contiguous(memory_format=torch.channels_last)
        )

    @staticmethod
    def _layout(y: Tensor) -> tuple[int, int, int]:
        """Rows, values per row, and how many pixels stand side by side in one."""
        rows, channels, beside = y.shape[2] * y.shape[3], y.shape[1], 1
        while channels * beside < _WIDE and rows % 2 == 0:
            rows, beside = rows // 2, beside * 2
        return rows, channels * beside, beside

    def share_out(self, images: int, call: Callable[[int, int, int], None]) -> None:
        """Images, or other things that are done one by one, are shared out among threads (thread, first, count); a result does not depend on how."""
        threads = min(torch.get_num_threads(), images)
        if threads == 1:
            call(0, 0, images)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="zsq-native")
        cuts = [images * thread // threads for thread in range(threads + 1)]
        spans = [(thread, first, last - first) for thread, (first, last) in enumerate(itertools.pairwise(cuts))]
        waiting = [self._pool.submit(call, *span) for span in spans[1:]]
        call(*spans[0])
        for job in waiting:
            job.result()

    def measure(
        self, y: Tensor, addend: Tensor | None, per_sample: bool, follow: Follow
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is passed on, and mean and variance (divided by n) of y, [N, C] or [C]."""
        images, channels = y.shape[:2]
        rows, wide, beside = self._layout(y)
        low, high = follow.bounds if follow.bounds is not None else (-math.inf, math.inf)
        plain = follow.bounds is None and follow.scale is None and addend is None
        out = None if plain else torch.empty_like(y)
        moments = torch.empty((2, images, channels), dtype=torch.float64)
        threads = torch.get_num_threads()
        sums, scratch = torch.empty((threads, 2 * wide), dtype=torch.float64), torch.empty((threads, wide + 32))
        constants = self._affine(follow, channels, beside)
        step, lane, double_lane = rows * wide * 4, scratch.stride(0) * 4, sums.stride(0) * 8
        start, more, result = y.data_ptr(), _address(addend), _address(out)
        first, total, work = moments.data_ptr(), sums.data_ptr(), scratch.data_ptr()
        scale, shift = constants[0].data_ptr(), constants[1].data_ptr()
        second, big = first + images * channels * 8, channels * 8

        def call(thread: int, begin: int, count: int) -> None:
            self._forward(
                start + begin * step,
                more + begin * step if more else None,
                scale,
                shift,
                result + begin * step if result else None,
                low,
                high,
                first + begin * big,
                second + begin * big,
                total + thread * double_lane,
                work + thread * lane,
                count,
                rows,
                wide,
                beside,
            )

        self.share_out(images, call)
        mean, var = moments[0], moments[1]
        if not per_sample:
            mean, var = mean.mean(0), (var + (mean - mean.mean(0)).square()).mean(0)
        return y if out is None else out, mean.to(y.dtype), var.to(y.dtype)

    def _affine(self, follow: Follow, channels: int, beside: int) -> Tensor:
        """Scale and shift, [2, channels * beside]."""
        key = (0 if follow.scale is None else id(follow.scale), channels, beside)
        found = self._constants.get(key)
        if found is None:
            if follow.scale is None or follow.shift is None:
                row = torch.stack([torch.ones(channels), torch.zeros(channels)])
            else:
                row = torch.stack([follow.scale, follow.shift])
            if len(self._constants) > _CACHED:
                self._constants.clear()
            # The key's tensor is kept, so that its id stays its own.
            found = self._constants[key] = (follow.scale, row.repeat(1, beside))
        return found[1]

    def add(
        self,
        gradient: Tensor | None,
        y: Tensor,
        limited: Tensor | None,
        level: Tensor,
        slope: Tensor,
        follow: Follow,
        *,
        in_place: bool,
        joined: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients to y (through what follows it, and through its moments: level + slope * y) and to the addend."""
        low, high = follow.bounds if follow.bounds is not None else (-math.inf, math.inf)
        if gradient is not None and not gradient.is_contiguous(memory_format=torch.channels_last):
            gradient, in_place = gradient.contiguous(memory_format=torch.channels_last), True
        rest = None
        if joined and gradient is not None:
            rest = gradient if in_place or follow.bounds is None else torch.empty_like(y)
            out = torch.empty_like(y)
        else:
            out = gradient if in_place and gradient is not None else torch.empty_like(y)
        rows, wide, beside = self._layout(y)
        constants = self._affine(follow, y.shape[1], beside)
        level, slope = level.contiguous(), slope.contiguous()
        stride = y.shape[1] if level.dim() == 2 else 0
        step = rows * wide * 4
        scratch = torch.empty((torch.get_num_threads(), 2 * wide + 32))
        work, lane = scratch.data_ptr(), scratch.stride(0) * 4
        start, result, source = y.data_ptr(), out.data_ptr(), _address(gradient)
        mask, other = _address(limited), _address(rest)
        scale, shift, a, b = constants[0].data_ptr(), constants[1].data_ptr(), level.data_ptr(), slope.data_ptr()

        def call(thread: int, begin: int, count: int) -> None:
            self._backward(
                source + begin * step if source else None,
                start + begin * step,
                mask + begin * step if mask else None,
                scale,
                shift,
                a + begin * stride * 4,
                b + begin * stride * 4,
                result + begin * step,
                other + begin * step if other else None,
                low,
                high,
                work + thread * lane,
                count,
                rows,
                wide,
                beside,
                stride,
            )

        self.share_out(y.shape[0], call)
        return out, rest


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def kernels() -> Kernels | None:
    """The loops, compiled for this processor; ``None`` where there is no working C compiler or ``ZSQ_NATIVE=0``."""
    library = compile_loops(_SOURCE, ("-O3", "-fno-math-errno"))
    return None if library is None else Kernels(library)
