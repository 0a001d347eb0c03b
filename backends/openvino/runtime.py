"""OpenVINO itself, as this package uses it: imported once, silent, with one core object a process.

Importing OpenVINO reports the import to its makers unless somebody objected before. Here nothing is ever sent, and no identifier is
left in the user's home: what would send is put out of action first, and only then is OpenVINO imported. Every module of this folder
gets it from here.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["core", "cpu_features", "devices", "ov", "telemetry_off", "version"]


def telemetry_off() -> None:
    """Make the telemetry package of OpenVINO (NNCF and POT use it too) decline, whatever its own files say; may be called again."""
    try:
        checker = importlib.import_module("openvino_telemetry.utils.opt_in_checker")
        sender = importlib.import_module("openvino_telemetry.utils.sender")
    except ImportError:
        return

    def declined(*_: Any, **__: Any) -> Any:
        return checker.ConsentCheckResult.DECLINED

    def dropped(*_: Any, **__: Any) -> None:
        return None

    checker.OptInChecker.check = declined
    sender.TelemetrySender.send = dropped


telemetry_off()
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
