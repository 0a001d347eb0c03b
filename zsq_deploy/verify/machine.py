"""What machine the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

__all__ = ["CPU_FLAGS", "machine_info", "peak_rss_bytes"]

#: Instruction sets that decide how fast integer arithmetic is.
CPU_FLAGS = (
    "ssse3",
    "sse4_1",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def machine_info() -> dict[str, Any]:
    """CPU model, its relevant flags, cores, governor, load and memory; what cannot be read is ``None``.

    Keys are those of the report's ``environment.machine``.
    """
    model: str | None = None
    flags: set[str] = set()
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key in ("model name", "hardware", "cpu model") and not model:
            model = value.strip()
        elif key in ("flags", "features") and not flags:
            flags = set(value.split())
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    frequency = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    turbo = _read("/sys/devices/system/cpu/intel_pstate/no_turbo")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        load: list[float] | None = [round(value, 2) for value in os.getloadavg()]
    except OSError:
        load = None
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "logical_cpus": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cpus": usable,
        "governor": governor.strip() if governor else None,
        "max_mhz": int(frequency) / 1000 if frequency and frequency.strip().isdigit() else None,
        "turbo_off": turbo.strip() == "1" if turbo else None,
        "load_average": load,
        "memory_bytes": int(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.release()}",
    }


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux keeps it for the program that runs now (``VmHWM``); the ``ru_maxrss`` of a child also remembers the parent that
    it was started from, and is only used elsewhere.
    """
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
