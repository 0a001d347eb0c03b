"""Memory that is used again instead of being returned and asked for again.

Every step of an optimisation allocates and frees the same few hundred megabytes. glibc hands large blocks back to the kernel as soon as
they are free, and every step then pays a page fault for each 4 KiB of them: a tenth to a third of the step. Inside
:func:`steady_memory` free memory is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

__all__ = ["steady_memory"]

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
