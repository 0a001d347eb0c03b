"""What this machine has, what it lacks, and what that costs."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zsq_deploy import __version__
from zsq_deploy.backends import TARGETS, get_backend
from zsq_deploy.errors import ZsqError
from zsq_deploy.verify import machine_info

__all__ = ["examine", "print_examination"]

_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "safetensors", "timm")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def examine() -> dict[str, Any]:
    """Everything that `zsq doctor` tells, as JSON values."""
    targets = {}
    for name, target in TARGETS.items():
        row: dict[str, Any] = {
            "summary": target.summary,
            "activation": str(target.activation),
            "weight": str(target.weight),
            "builds": True,
            "measures": True,
            "missing": [],
            "notes": list(target.notes),
        }
        try:
            missing = get_backend(target).missing_features(target)
        except ZsqError as error:
            row.update(builds=False, measures=False, missing=[error.what])
            row["notes"].append(error.remedy or "")
        else:
            if missing:
                row["measures"] = False
                row["missing"] = [f"CPU feature {feature}" for feature in missing]
                row["notes"].append("engines are built here; measure them on a machine that has the feature")
        targets[name] = row
    cuda = torch.cuda.is_available()
    return {
        "zsq-deploy": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": machine_info(),
        "cuda": {
            "available": cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        },
        "synthesis_device": "cuda" if cuda else "cpu",
        "timm": importlib.util.find_spec("timm") is not None,
        "targets": targets,
    }


def print_examination(found: dict[str, Any], console: Console) -> None:
    """Draw what :func:`examine` found."""
    machine = found["machine"]
    console.print(
        f"zsq-deploy {found['zsq-deploy']}, Python {found['python']} ({found['executable']})",
        highlight=False,
        soft_wrap=True,
    )
    cpu = machine.get("cpu") or machine.get("model") or platform.processor()
    console.print(f"CPU: {cpu}", highlight=False, soft_wrap=True)
    devices = (
        ", ".join(found["cuda"]["devices"])
        or "none: synthesis runs on the CPU, which is slower and gives the same kind of images"
    )
    console.print(f"CUDA: {devices}\n", highlight=False, soft_wrap=True)
    packages = Table(title="packages", title_justify="left")
    packages.add_column("package")
    packages.add_column("version")
    for name, version in found["packages"].items():
        packages.add_row(name, version or "not installed (optional)")
    console.print(packages)
    table = Table(title="targets", title_justify="left")
    for column in ("target", "builds", "measures here", "types", "remarks"):
        table.add_column(column)
    for name, row in found["targets"].items():
        remarks = "; ".join([*row["missing"], *row["notes"]]) or row["summary"]
        table.add_row(
            name,
            "yes" if row["builds"] else "no",
            "yes" if row["measures"] else "no",
            f"{row['activation']} x {row['weight']}",
            remarks,
        )
    console.print(table)
