"""What this machine can say and do about TensorRT engines: which TensorRT it has, and why it runs none.

Engines are built and run on the device, by the scripts of the folder that :func:`~zsq_deploy.backends.tensorrt.quantizer.build` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.errors import EngineError

__all__ = [
    "check_runs",
    "device_facts",
    "float_modes",
    "installed",
    "integer_reference",
    "missing_features",
    "open_runner",
    "runner",
]

_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")


def installed() -> str:
    """The version of TensorRT's Python package on this machine; empty without one. The library is not loaded."""
    for name in _PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def check_runs(target: Target) -> NoReturn:
    """Refuse to verify engines for a target here, before anything is made.

    Raises:
        EngineError: Always, with what to do instead.
    """
    raise EngineError(
        f"engines for {target.name} are built, run and measured on the device, not by this program",
        where="--target",
        remedy=f"make the folder for the device with zsq quantize --target {target.name}, and follow its README.md there",
    )


def runner(path: Path, target: Target, *, threads: int = 1, mode: Any = "engine") -> NoReturn:
    """Refuse to run an engine here.

    Raises:
        EngineError: Always, with what to do instead.
    """
    del threads, mode
    raise EngineError(
        f"engines for {target.name} are built, run and measured on the device, not by this program",
        where=str(path),
        remedy=f"carry {Path(path).parent} to the device and follow its README.md: bash trtexec.sh build, bash trtexec.sh time, "
        "python3 engine.py compare (zsq quantize makes the folder without measuring)",
    )


def open_runner(path: str, target: str, **_: Any) -> NoReturn:
    """As :func:`runner`, by names.

    Raises:
        EngineError: Always.
    """
    from zsq_deploy.backends import get_target

    runner(Path(path), get_target(target))


def integer_reference(engine: Any, *, threads: int = 1) -> NoReturn:
    """Refuse to compute the engine in exact integers.

    Raises:
        EngineError: Always: how TensorRT's kernels round has not been measured.
    """
    del threads
    raise EngineError(
        "there is no exact integer reference for TensorRT: how its kernels round has not been measured",
        where=str(engine.path),
        remedy="compare with the twin of the Q/DQ graph: samples.npz holds its outputs, and `python3 engine.py compare` does it",
    )


def float_modes(target: Target) -> Mapping[str, Mapping[str, Any]]:
    """The float modes that can be measured here: none. The scripts build the float network on the device."""
    del target
    return {}


def device_facts(target: Target, *, threads: int = 1) -> Mapping[str, Any]:
    """What is known of TensorRT on this machine."""
    del threads
    return {"tensorrt": installed() or "not installed", "wanted": f"TensorRT {generation(target)}"}


def missing_features(target: Target) -> tuple[str, ...]:
    """What this machine lacks to measure the target: it never measures one."""
    found = installed()
    here = f"TensorRT {found} is installed here, but" if found else "TensorRT is not installed here, and"
    return (
        f"TensorRT {generation(target)} on the device itself ({here} engines are measured by the folder's own scripts)",
    )
