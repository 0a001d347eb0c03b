"""The two memory-bound loops of statistics matching in C, for machines with a compiler; everything works without one, slower.

Between two convolutions synthesis has to sum a map and its square, limit it, and later add a closed-form gradient under a mask. With torch
operators that is eight passes over memory forward and eight backward; here it is one and one. The source is below, sixty
lines; it is compiled once per process for the processor at hand (about a second) and loaded with ctypes.

``ZSQ_NATIVE=0`` in the environment switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Kernels", "kernels"]

# Maps are [images, pixels, channels], channels innermost. `wide` is channels times however many pixels the caller lays side by side.
_SOURCE = r"""
#include <stddef.h>

#define BLOCK 64

/* out = min(max(y, low), high) unless out is NULL; sums[i][c] = sum of (y - centre), squares[i][c] = sum of (y - centre)^2.
   Blocks of rows are summed in float and added up in double, so that large maps lose nothing. */
void watch_forward(const float *restrict y, const float *restrict centre, float *restrict out, float low, float high,
                   double *restrict sums, double *restrict squares, float *restrict scratch,
                   ptrdiff_t images, ptrdiff_t rows, ptrdiff_t wide)
{
    float *restrict s = scratch;
    float *restrict q = scratch + wide;
    for (ptrdiff_t i = 0; i < images; i++) {
        double *restrict total = sums + i * wide;
        double *restrict total_square = squares + i * wide;
        for (ptrdiff_t c = 0; c < wide; c++) total[c] = total_square[c] = 0.0;
        for (ptrdiff_t start = 0; start < rows; start += BLOCK) {
            ptrdiff_t stop = start + BLOCK < rows ? start + BLOCK : rows;
            for (ptrdiff_t c = 0; c < wide; c++) s[c] = q[c] = 0.0f;
            for (ptrdiff_t r = start; r < stop; r++) {
                const float *restrict from = y + (i * rows + r) * wide;
                if (out) {
                    float *restrict to = out + (i * rows + r) * wide;
                    for (ptrdiff_t c = 0; c < wide; c++) {
                        float v = from[c], d = v - centre[c];
                        s[c] += d;
                        q[c] += d * d;
                        v = v < low ? low : v;
                        to[c] = v > high ? high : v;
                    }
                } else {
                    for (ptrdiff_t c = 0; c < wide; c++) {
                        float d = from[c] - centre[c];
                        s[c] += d;
                        q[c] += d * d;
                    }
                }
            }
            for (ptrdiff_t c = 0; c < wide; c++) {
                total[c] += s[c];
                total_square[c] += q[c];
            }
        }
    }
}

/* out = (low < y < high ? gradient : 0) + level[i][c] + slope[i][c] * y; gradient may be NULL (zero) or equal to out. */
void watch_backward(const float *gradient, const float *restrict y, const float *restrict level,
                    const float *restrict slope, float *out, float low, float high,
                    ptrdiff_t images, ptrdiff_t rows, ptrdiff_t wide, ptrdiff_t stride)
{
    for (ptrdiff_t i = 0; i < images; i++) {
        const float *restrict a = level + i * stride;
        const float *restrict b = slope + i * stride;
        for (ptrdiff_t r = 0; r < rows; r++) {
            ptrdiff_t at = (i * rows + r) * wide;
            const float *restrict from = y + at;
            float *to = out + at;
            if (gradient) {
                const float *g = gradient + at;
#pragma GCC ivdep
                for (ptrdiff_t c = 0; c < wide; c++) {
                    float v = from[c];
                    float pass = (v > low) & (v < high) ? g[c] : 0.0f;
                    to[c] = pass + (a[c] + b[c] * v);
                }
            } else {
#pragma GCC ivdep
                for (ptrdiff_t c = 0; c < wide; c++) to[c] = a[c] + b[c] * from[c];
            }
        }
    }
}
"""

_WIDE = 64  # lay pixels side by side until a row has at least this many values, so that vectors are full


class Kernels:
    """The compiled loops. Maps are float32, [N, C, ...] in channels-last memory, on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forward, self._backward = library.watch_forward, library.watch_backward
        pointer, size, real = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float
        self._forward.argtypes = [pointer] * 3 + [real] * 2 + [pointer] * 3 + [size] * 3
        self._backward.argtypes = [pointer] * 5 + [real] * 2 + [size] * 4
        self._forward.restype = self._backward.restype = None
        self._pool: ThreadPoolExecutor | None = None

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

    def _run(self, images: int, call: Callable[[int, int], None]) -> None:
        """Images are shared out among threads; each image's result does not depend on how."""
        threads = min(torch.get_num_threads(), images)
        if threads == 1:
            call(0, images)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="zsq-native")
        cuts = [images * t // threads for t in range(threads + 1)]
        waiting = [self._pool.submit(call, a, b - a) for a, b in itertools.pairwise(cuts[1:])]
        call(0, cuts[1])
        for job in waiting:
            job.result()

    def measure(
        self, y: Tensor, centre: Tensor, per_sample: bool, bounds: tuple[float, float] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is passed on (y within the bounds), and the means of y - centre and of its square, float64 [N, C] or [C]."""
        images, channels = y.shape[:2]
        rows, wide, beside = self._layout(y)
        low, high = bounds if bounds is not None else (-math.inf, math.inf)
        out = torch.empty_like(y) if bounds is not None else None
        sums = torch.empty((2, images, wide), dtype=torch.float64)
        scratch = torch.empty((max(torch.get_num_threads(), 1) + 1, 2 * wide + 32))
        shifted = centre.repeat(beside)
        step, big = rows * wide * 4, wide * 8
        start, result = y.data_ptr(), 0 if out is None else out.data_ptr()
        first, second, work = sums[0].data_ptr(), sums[1].data_ptr(), scratch.data_ptr()
        lanes, lane_bytes = iter(range(scratch.shape[0])), scratch.stride(0) * 4

        def call(begin: int, count: int) -> None:
            self._forward(
                start + begin * step,
                shifted.data_ptr(),
                result + begin * step if result else None,
                low,
                high,
                first + begin * big,
                second + begin * big,
                work + next(lanes) * lane_bytes,
                count,
                rows,
                wide,
            )

        self._run(images, call)
        total = sums.view(2, images, beside, channels).sum(2) if beside > 1 else sums
        pixels = y.shape[2] * y.shape[3]
        total = total / pixels if per_sample else total.sum(1) / (pixels * images)
        return y if out is None else out, total[0], total[1]

    def add(
        self,
        gradient: Tensor | None,
        y: Tensor,
        level: Tensor,
        slope: Tensor,
        bounds: tuple[float, float] | None,
        *,
        in_place: bool,
    ) -> Tensor:
        """The gradient where y lies within the bounds, plus level + slope * y; level and slope are [N, C] or [C]."""
        low, high = bounds if bounds is not None else (-math.inf, math.inf)
        if gradient is not None and not gradient.is_contiguous(memory_format=torch.channels_last):
            gradient, in_place = gradient.contiguous(memory_format=torch.channels_last), True
        out = gradient if in_place and gradient is not None else torch.empty_like(y)
        level, slope = level.reshape(-1, y.shape[1]), slope.reshape(-1, y.shape[1])
        rows, wide, beside = self._layout(y)
        levels, slopes = (item.repeat(1, beside).contiguous() for item in (level, slope))
        stride = wide if level.shape[0] > 1 else 0
        step = rows * wide * 4
        start, result, source = y.data_ptr(), out.data_ptr(), 0 if gradient is None else gradient.data_ptr()

        def call(begin: int, count: int) -> None:
            self._backward(
                source + begin * step if source else None,
                start + begin * step,
                levels.data_ptr() + begin * stride * 4,
                slopes.data_ptr() + begin * stride * 4,
                result + begin * step,
                low,
                high,
                count,
                rows,
                wide,
                stride,
            )

        self._run(y.shape[0], call)
        return out


@functools.cache
def kernels() -> Kernels | None:
    """The loops, compiled for this processor; ``None`` where there is no working C compiler or ``ZSQ_NATIVE=0``."""
    if os.environ.get("ZSQ_NATIVE", "1") == "0":
        return None
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="zsq-native-", ignore_cleanup_errors=True) as folder:
        source, library = Path(folder) / "loops.c", Path(folder) / "loops.so"
        source.write_text(_SOURCE)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fPIC", "-shared"]
        for chosen in (flags, [flag for flag in flags if not flag.startswith("-m")]):
            command: list[Any] = [compiler, *chosen, "-o", str(library), str(source)]
            try:
                done = subprocess.run(command, capture_output=True, timeout=60, check=False)
                if done.returncode == 0:
                    return Kernels(ctypes.CDLL(str(library)))
            except (OSError, subprocess.SubprocessError):
                continue
    return None
