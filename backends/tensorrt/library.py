"""TensorRT's Python library and the GPU: whether they are here, whether they fit a target, and what to do where they do not.

The library is imported by :func:`load` and nowhere else. Whoever imports this module alone has not loaded it.
"""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from typing import Any

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.tensorrt.cuda import Cuda, Gpu
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.errors import EngineError

__all__ = ["OLDEST", "check_runs", "gpu", "installed", "load", "missing", "numbers"]

_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")

OLDEST = (8, 5)
"""The first version with named tensors (``set_tensor_address``, ``execute_async_v3``), which engines are run with here."""

_INSTALL = {
    8: "on JetPack 5 and 6.0 it comes with the system (python3-libnvinfer); elsewhere the wheels in NVIDIA's archive of TensorRT 8.6",
    10: "pip install 'tensorrt-cu12>=10,<11'; on a Jetson it comes with JetPack (python3-libnvinfer)",
    11: "pip install 'tensorrt-cu13>=11,<12'; on a Jetson with JetPack 7.2.2 or later, python3-libnvinfer",
}


def installed() -> str:
    """The version of TensorRT's Python package on this machine; empty without one. The library is not loaded."""
    for name in _PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """``10.3.0.30`` -> ``(10, 3, 0, 30)``; empty if it is no version."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _elsewhere(target: Target) -> str:
    return (
        f"make the folder for the device with zsq quantize --target {target.name}, carry it there, and follow its README.md: "
        "bash trtexec.sh build, bash trtexec.sh time, python3 engine.py compare"
    )


def load(target: Target) -> Any:
    """The ``tensorrt`` module, of the generation that a target is for.

    Raises:
        EngineError: It is not installed, cannot be loaded, or is of another generation or too old.
    """
    number = generation(target)
    try:
        module = importlib.import_module("tensorrt")
        version = str(module.__version__)
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise _broken(target, error) from error
        raise EngineError(
            f"TensorRT for Python is not installed here, and engines for {target.name} are built, run and measured where it is, "
            "on the device",
            where="--target",
            remedy=f"{_elsewhere(target)}. To measure on this machine, install TensorRT {number}: {_INSTALL[number]}",
        ) from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise _broken(target, error) from error
    found = numbers(version)
    if found[:1] != (number,):
        major = found[0] if found else 0
        other = f"choose --target tensorrt-{major}, or " if major in _INSTALL else ""
        raise EngineError(
            f"{target.name} is for TensorRT {number}, and TensorRT {version} is installed here",
            where="--target",
            remedy=f"{other}{_elsewhere(target)}",
        )
    if found < OLDEST:
        raise EngineError(
            f"TensorRT {version} is too old to run engines here: its Python API knows no named tensors",
            where="tensorrt",
            remedy=f"use TensorRT {OLDEST[0]}.{OLDEST[1]} or later (JetPack 5.1); or {_elsewhere(target)}",
        )
    return module


def _broken(target: Target, error: BaseException) -> EngineError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return EngineError(
        f"TensorRT for Python is installed here, but cannot be loaded: {said[:300]}",
        where="tensorrt",
        remedy="install TensorRT's libraries too, and put their folder on LD_LIBRARY_PATH "
        f"({_INSTALL[generation(target)]}); or {_elsewhere(target)}",
    )


def gpu(target: Target) -> Gpu:
    """The GPU that engines are built for here.

    Raises:
        EngineError: There is none that CUDA can use.
    """
    return Cuda(remedy=f"look at nvidia-smi (on a Jetson: tegrastats); or {_elsewhere(target)}").gpu()


def check_runs(target: Target) -> None:
    """Refuse to verify engines for a target where they cannot be run, before anything is made.

    Raises:
        EngineError: TensorRT or a GPU is missing here, or TensorRT is of another generation; with what to do.
    """
    module = load(target)
    try:
        gpu(target)
    except EngineError as error:
        raise EngineError(
            f"TensorRT {module.__version__} is installed here, but there is no GPU that it could use: {error.what}",
            where=error.where,
            remedy=error.remedy,
        ) from error


def missing(target: Target) -> str:
    """What this machine lacks to build and measure engines for a target, in one sentence; empty if nothing."""
    number, version = generation(target), installed()
    try:
        check_runs(target)
    except EngineError as error:
        if not version:
            return f"TensorRT {number} (its Python package is not installed here)"
        return f"TensorRT {number} with a GPU ({error.what})"
    return ""
