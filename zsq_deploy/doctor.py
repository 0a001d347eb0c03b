"""What this machine has, what it lacks, and what that costs."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zsq_deploy import __version__
from zsq_deploy.backends import TARGETS, get_backend
from zsq_deploy.backends.openvino.pot.environment import list_environments
from zsq_deploy.errors import ZsqError
from zsq_deploy.verify import machine_info

__all__ = ["examine", "print_examination"]

_PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt",
    "numpy",
    "safetensors",
    "timm",
    "asyncssh",
)

_EXTRAS = {
    "openvino": ("openvino", "the targets openvino-cpu, openvino-gpu, openvino-npu cannot be built"),
    "nncf": ("openvino", "--quantizer nncf is not there; our own Q/DQ graphs and POT still are"),
    "onnxruntime": ("onnxruntime", "the targets ort-* cannot be built"),
    "tensorrt": (
        "tensorrt",
        "engines for tensorrt-* are prepared here (zsq quantize), but built and measured on the device, by the scripts of their folder",
    ),
    "timm": ("timm", "networks cannot be named timm:NAME"),
    "asyncssh": ("ssh", "devices cannot be reached over SSH (zsq bench --device ssh://...)"),
}
"""Optional package -> the extra that installs it, and what is missing without it."""


_OTHER_NAMES = {"tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")}
"""Package -> names under which it may be installed instead."""

_MEASURED_ELSEWHERE = "engines are built here; measure them on a machine that has it"


def _version(name: str) -> str | None:
    for candidate in (name, *_OTHER_NAMES.get(name, ())):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def examine() -> dict[str, Any]:
    """Everything that `zsq doctor` tells, as JSON values."""
    targets = {}
    facts: dict[str, dict[str, Any]] = {}
    measured: set[str] = set()
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
            backend = get_backend(target)
            missing = backend.missing_features(target)
        except ZsqError as error:
            row.update(builds=False, measures=False, missing=[error.what])
            row["notes"].append(error.remedy or "")
        else:
            if missing:
                row["measures"] = False
                row["missing"] = [item if " " in item else f"CPU feature {item}" for item in missing]
                row["notes"].append(getattr(backend, "MEASURED_ELSEWHERE", _MEASURED_ELSEWHERE))
            if target.runtime not in facts or (row["measures"] and target.runtime not in measured):
                facts[target.runtime] = dict(backend.device_facts(target))
            measured.update([target.runtime] if row["measures"] else [])
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
        "environments": [
            {
                "name": item.name,
                "state": item.state,
                "folder": str(item.folder),
                "summary": item.summary,
                "detail": item.detail,
            }
            for item in list_environments()
        ],
        "targets": targets,
        "runtimes": facts,
    }


def print_examination(found: dict[str, Any], console: Console) -> None:
    """Draw what :func:`examine` found."""

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    machine = found["machine"]
    say(f"zsq-deploy {found['zsq-deploy']}, Python {found['python']} ({found['executable']})")
    say(f"CPU: {machine.get('cpu') or machine.get('model') or platform.processor() or 'unknown'}")
    devices = found["cuda"]["devices"]
    say(f"CUDA: {', '.join(devices) or 'none; images are made on the CPU, which takes longer'}")
    say("packages: " + ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version))
    absent = [name for name, version in found["packages"].items() if not version]
    for name in absent:
        extra, cost = _EXTRAS.get(name, (name, "some of the work cannot be done"))
        say(f"not installed: {name}: {cost}; to have it: pip install 'zsq-deploy[{extra}]'")
    for item in found["environments"]:
        if item["state"] == "ready":
            say(f"environment {item['name']}: ready ({item['summary']}; {item['detail']})")
        else:
            say(
                f"environment {item['name']}: {item['state']} ({item['summary']}): --quantizer {item['name']} is not there; "
                f"to have it: zsq env create {item['name']}"
            )
    for name, row in found["runtimes"].items():
        if "capabilities" in row:
            say(
                f"{name}: {row['device']} ({row['name']}), computes {', '.join(row['capabilities'])}; float networks in "
                f"{', '.join(row['float modes'])}"
            )
        elif "compute capability" in row:
            say(
                f"{name}: {row['tensorrt']} on {row['name']} (compute capability {row['compute capability']}, CUDA {row['cuda runtime']}); "
                f"float networks in {', '.join(row['float modes'])}"
            )
    say()
    table = Table(title="targets", title_justify="left")
    for column in ("--target", "builds", "latency is real here", "activations", "weights"):
        table.add_column(column, no_wrap=column == "--target")
    for name, row in found["targets"].items():
        yes = {True: "yes", False: "no"}
        table.add_row(name, yes[row["builds"]], yes[row["measures"]], row["activation"], row["weight"])
    console.print(table)
    for name, row in found["targets"].items():
        say(f"{name}: {row['summary']}")
        for remark in [*(f"not here: {item}" for item in row["missing"]), *row["notes"]]:
            say(f"  {remark}")
    ready = [name for name, row in found["targets"].items() if row["measures"]]
    say()
    if ready:
        say(
            f"all is well: `zsq demo` runs the whole job here; targets that are built and measured here: {', '.join(ready)}"
        )
    elif any(row["builds"] for row in found["targets"].values()):
        say("engines can be built here; none of the targets can be measured on this machine")
    else:
        say("no target can be built here: install a runtime, pip install zsq-deploy")
