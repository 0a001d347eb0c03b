"""A machine with TensorRT and a GPU, pretended: NVIDIA's bindings, a hand-written builder and runtime, and a libcudart of host memory.

What is NVIDIA's and what is not is told in ``tensorrt_fake/tensorrt.py``. Everything runs in processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from .tensorrt_bindings import Bindings, bindings, compiled

__all__ = ["VERSIONS", "Device", "device"]

_HERE = Path(__file__).parent
VERSIONS = {8: ("8.6.2", 10), 10: ("", 10), 11: ("", 11)}
"""Generation -> version that is pretended (empty: that of the bindings), and the generation of the bindings."""


@dataclass(frozen=True)
class Device:
    """A pretended machine.

    Attributes:
        generation: 8, 10 or 11.
        version: What its TensorRT says.
        environment: Environment of its processes.
    """

    generation: int
    version: str
    environment: dict[str, str]

    def run(self, code: str, *arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """Run Python code there; `more` goes into the environment."""
        return self._start([sys.executable, "-P", "-c", textwrap.dedent(code), *arguments], check, more)

    def zsq(self, *words: str | Path, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the command line there."""
        code = "from zsq_deploy.cli import main; main()"
        return self._start([sys.executable, "-P", "-c", code, *map(str, words)], check, more)

    def _start(self, command: list[str], check: bool, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, env={**self.environment, **more}, capture_output=True, text=True, check=False, timeout=600
        )
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done


def device(generation: int, home: Path) -> Device:
    """A machine with TensorRT of a generation; its caches lie under `home`."""
    version, number = VERSIONS[generation]
    found: Bindings = bindings(number)
    libraries = home / "libraries"
    libraries.mkdir(exist_ok=True)
    compiled(_HERE / "tensorrt_stubs" / "cudart.c", libraries / "libcudart.so")
    environment = dict(os.environ)
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        filter(None, (str(libraries), str(found.libraries), environment.get("LD_LIBRARY_PATH", "")))
    )
    environment["PYTHONPATH"] = os.pathsep.join(
        (str(_HERE / "tensorrt_fake"), str(found.packages), *filter(None, sys.path))
    )
    environment.update(XDG_CACHE_HOME=str(home / "cache"), OMP_NUM_THREADS="1", NO_COLOR="1")
    if version:
        environment["PRETEND_TENSORRT"] = version
    return Device(generation, version or found.version, environment)
