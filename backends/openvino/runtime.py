"""OpenVINO itself, as this package uses it: imported once, silent, with one core object a process.

Importing OpenVINO already reports to its makers unless somebody objected before (:mod:`zsq_deploy.backends.openvino.quiet`), so every
module of this folder gets it from here.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from zsq_deploy.backends.openvino.quiet import forbid_telemetry

__all__ = ["core", "cpu_features", "devices", "ov", "version"]


forbid_telemetry()
ov: Any = importlib.import_module("openvino")


@cache
def core() -> Any:
    """The ``openvino.Core`` of this process."""
    return ov.Core()


@cache
def devices() -> tuple[str, ...]:
    """The devices that OpenVINO finds here: ``CPU``, ``GPU``, ``GPU.1``, ``NPU``."""
    return tuple(core().available_devices)


def version() -> str:
    """OpenVINO's version, without its build: ``2026.4.1``."""
    return str(ov.__version__).split("-", maxsplit=1)[0]


@cache
def cpu_features() -> frozenset[str]:
    """The CPU features that the operating system reports, in Linux's spelling; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()
