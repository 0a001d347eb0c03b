"""NVIDIA's own Python bindings for contract tests, without TensorRT: its wheels, and stand-ins for the libraries that they link.

The wheels are fetched once by pip into a cache folder (``ZSQ_TENSORRT_BINDINGS``, else under ``XDG_CACHE_HOME``). Where they cannot be
had, or there is no C compiler, the tests are skipped with the reason, or fail with ``ZSQ_REQUIRE_TENSORRT_BINDINGS=1``. Each generation
runs in its own process, because both call themselves ``tensorrt_bindings`` and the libraries have to be found before it starts.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import filelock
import pytest

__all__ = ["CALLING", "GENERATIONS", "SETUP", "VIRTUAL", "Bindings", "bindings", "compiled"]

GENERATIONS = (10, 11)
_HERE = Path(__file__).parent / "tensorrt_stubs"
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")

_PROLOGUE = """
import sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt  # the name under which NVIDIA's package offers it
"""


SETUP = """
import numpy as np
from pathlib import Path
from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.backends.tensorrt import calibrators, cache
from zsq_deploy.errors import ZsqError

class Host:
    '''Plain memory in the place of the GPU's.'''
    def __init__(self):
        self.held, self.freed = {}, 0
    def upload(self, name, array):
        self.held[name] = np.ascontiguousarray(array)
        return self.held[name].ctypes.data
    def free(self):
        self.freed += 1

rng = np.random.default_rng(0)
arrays = {"image": rng.normal(size=(12, 3, 4, 4)).astype(np.float32), "mask": rng.normal(size=(12, 5)).astype(np.float32)}
images = CalibrationSet.from_arrays(arrays, CalibrationManifest(method="gaussian"))
"""
"""A set of 12 images with two inputs, and memory to put them, for the code that :meth:`Bindings.run` is given."""

CALLING = """
import ctypes as C

class Virtual:
    '''A calibrator as TensorRT sees it: a pointer to a C++ object with a table of virtual functions.'''
    def __init__(self, calibrator):
        self.calibrator = calibrator
        # CPython object header, then the first word of pybind11's instance: the C++ pointer
        self.pointer = C.c_void_p.from_address(id(calibrator) + 2 * C.sizeof(C.c_void_p)).value
        self.table = C.c_void_p.from_address(self.pointer).value
    def call(self, slot, result, *typed):
        # slots: 0 language, 1 interface, 2 and 3 destructors, then as NvInfer.h declares them
        function = C.PYFUNCTYPE(result, C.c_void_p, *(kind for kind, _ in typed))
        return function(C.c_void_p.from_address(self.table + 8 * slot).value)(self.pointer, *(value for _, value in typed))
    def batch_size(self):
        return self.call(4, C.c_int)
    def batch(self, *names):
        found = (C.c_void_p * len(names))()
        wanted = (C.c_char_p * len(names))(*(name.encode() for name in names))
        more = self.call(5, C.c_bool, (C.c_void_p, found), (C.c_void_p, wanted), (C.c_int, len(names)))
        return list(found) if more else None
    def read(self):
        length = C.c_size_t()
        at = self.call(6, C.c_void_p, (C.c_void_p, C.addressof(length)))
        return C.string_at(at, length.value) if at else None
    def write(self, data):
        self.call(7, None, (C.c_char_p, data), (C.c_size_t, len(data)))
    def algorithm(self):
        return self.call(8, C.c_int)
"""
"""A calibrator as TensorRT sees it: called through the virtual functions of NVIDIA's C++ class (Itanium ABI, x86-64)."""

VIRTUAL = SETUP + CALLING


@dataclass(frozen=True)
class Bindings:
    """One generation, ready to be imported by a new process.

    Attributes:
        generation: 10 or 11.
        version: The pinned version.
        packages: Folder with ``tensorrt_bindings``.
        libraries: Folder with the stand-ins.
    """

    generation: int
    version: str
    packages: Path
    libraries: Path

    def run(self, code: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Python code in its own process, with ``trt`` imported (also as ``tensorrt``)."""
        environment = dict(os.environ)
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, (str(self.libraries), environment.get("LD_LIBRARY_PATH", "")))
        )
        environment["PYTHONPATH"] = os.pathsep.join((str(self.packages), *filter(None, sys.path)))
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROLOGUE + textwrap.dedent(code), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stderr
        return done


_missing: dict[int, str] = {}


def compiled(source: Path, library: Path) -> Path:
    """A shared library from a C file; skips the test (or fails it) where there is no compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        _unavailable("there is no C compiler for the stand-ins of its libraries")
    subprocess.run([str(compiler), "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def _unavailable(reason: str, generation: int | None = None) -> None:
    if generation is not None:
        _missing[generation] = reason  # the next test does not try again
    if os.environ.get("ZSQ_REQUIRE_TENSORRT_BINDINGS"):
        pytest.fail(f"TensorRT's bindings are required here: {reason}")
    pytest.skip(f"TensorRT's bindings cannot be had: {reason}")


def _cache() -> Path:
    if os.environ.get("ZSQ_TENSORRT_BINDINGS"):
        return Path(os.environ["ZSQ_TENSORRT_BINDINGS"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zsq-deploy" / "tensorrt-bindings"


def bindings(generation: int) -> Bindings:
    """One generation of the bindings; skips the test (or fails it) where they cannot be had."""
    requirements = _HERE / f"bindings-{generation}.txt"
    pinned = next(line for line in requirements.read_text(encoding="utf-8").splitlines() if "==" in line)
    version = pinned.split("==")[1]
    if sys.platform != "linux":
        _unavailable(f"they are tried on Linux, this is {sys.platform}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        _unavailable("there is no C compiler for the stand-ins of its libraries")
    tag = f"{sys.implementation.cache_tag}-{platform.machine()}"
    home = _cache() / f"{version}-{tag}"
    home.parent.mkdir(parents=True, exist_ok=True)
    if generation in _missing:
        _unavailable(_missing[generation])
    with filelock.FileLock(str(home) + ".lock"):
        if not home.is_dir():
            _make(home, requirements, generation, str(compiler))
    return Bindings(generation, version, home / "packages", home / "libraries")


def _make(home: Path, requirements: Path, generation: int, compiler: str) -> None:
    with tempfile.TemporaryDirectory(prefix=".making-", dir=home.parent) as scratch:
        made = Path(scratch) / "made"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        try:
            done = subprocess.run(
                [*pip, "--only-binary", ":all:", "--target", str(made / "packages"), "-r", str(requirements)],
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
        except subprocess.TimeoutExpired:
            _unavailable("pip did not finish within five minutes", generation)
        if done.returncode != 0:
            _unavailable(f"pip: {(done.stderr.strip() or 'no message').splitlines()[-1][:300]}", generation)
        (made / "libraries").mkdir()
        for name in _LIBRARIES:
            file = f"lib{name}.so.{generation}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(made / "libraries" / file)]
            built = subprocess.run(
                [*command, str(_HERE / "stubs.c")], capture_output=True, text=True, check=False, timeout=60
            )
            if built.returncode != 0:
                _unavailable(f"the stand-ins do not compile: {built.stderr.strip()[:300]}")
        made.rename(home)
