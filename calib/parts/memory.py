"""Memory that is used again instead of being returned and asked for again, and the most of it that was held.

Every step of an optimisation allocates and frees the same few hundred megabytes. glibc hands large blocks back to the kernel as soon as
they are free, and every step then pays a page fault for each 4 KiB of them: a tenth to a third of the step. Inside
:func:`steady_memory` free memory is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = ["Peak", "forget_peak", "peak_so_far", "steady_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
_KEEP = 2**31 - 1
# What glibc itself raises the thresholds to when a program frees large blocks.
_USUAL_MMAP, _USUAL_TRIM = 32 * 2**20, 64 * 2**20


@contextlib.contextmanager
def steady_memory() -> Iterator[None]:
    """Keep freed memory inside the block, return it at the end. Does nothing where the C library is not glibc."""
    library = None
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            library.mallopt, library.malloc_trim  # noqa: B018
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, 2**30)
    library.mallopt(_TRIM_THRESHOLD, _KEEP)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        library.malloc_trim(0)


@dataclass(frozen=True)
class Peak:
    """The most memory that was held.

    Attributes:
        host: Bytes of resident memory.
        gpus: Bytes that torch's allocator held, by number of the GPU; empty without one.
    """

    host: int = 0
    gpus: Mapping[int, int] = field(default_factory=dict)

    def beside(self, other: Peak) -> Peak:
        """Of two processes at the same time: the sum, which is an upper bound, because their peaks need not coincide."""
        gpus = {gpu: self.gpus.get(gpu, 0) + other.gpus.get(gpu, 0) for gpu in {*self.gpus, *other.gpus}}
        return Peak(self.host + other.host, gpus)

    def or_later(self, other: Peak) -> Peak:
        """Of two times: the greater one."""
        gpus = {gpu: max(self.gpus.get(gpu, 0), other.gpus.get(gpu, 0)) for gpu in {*self.gpus, *other.gpus}}
        return Peak(max(self.host, other.host), gpus)

    @property
    def gpu(self) -> int | None:
        """Bytes on the GPU that held most; ``None`` without one."""
        return max(self.gpus.values(), default=None)


def forget_peak(device: torch.device) -> None:
    """Count a GPU's peak from here on. (That of the process counts from its start.)"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_so_far(device: torch.device) -> Peak:
    """The peak of this process: resident since its start, on the GPU since :func:`forget_peak`."""
    gpus: dict[int, int] = {}
    if device.type == "cuda":
        number = device.index if device.index is not None else torch.cuda.current_device()
        gpus[number] = int(torch.cuda.max_memory_allocated(device))
    return Peak(_resident(), gpus)


def _resident() -> int:
    """Largest resident memory of this process. Linux keeps it for the program that runs now; ``ru_maxrss`` also remembers the one that started it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
