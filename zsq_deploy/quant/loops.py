"""C loops that are compiled on the machine that runs them, for the few passes over memory that torch has no vectorised operator for."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["compile_loops"]

_TUNED = ("-march=native", "-mprefer-vector-width=512")


def compile_loops(source: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    """A library of C functions, tuned for this processor where the compiler can do that.

    Args:
        source: The C file.
        flags: How it may be optimised, such as ``-O3`` and what arithmetic may be reordered.

    Returns:
        The library, or ``None`` where there is no working C compiler or ``ZSQ_NATIVE=0``.
    """
    if os.environ.get("ZSQ_NATIVE", "1") == "0":
        return None
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="zsq-native-", ignore_cleanup_errors=True) as folder:
        file, library = Path(folder) / "loops.c", Path(folder) / "loops.so"
        file.write_text(source)
        for tuned in (_TUNED, ()):
            command = [compiler, *tuned, *flags, "-fPIC", "-shared", "-o", str(library), str(file), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, timeout=60, check=False)
                if done.returncode == 0:
                    return ctypes.CDLL(str(library))
            except (OSError, subprocess.SubprocessError):
                continue
    return None
