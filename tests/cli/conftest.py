"""One deployed folder for all tests that only look at it, and latencies that are measured briefly."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from zsq_deploy.cli import main
from zsq_deploy.pipeline import verification


def _load_small() -> Any:
    spec = importlib.util.spec_from_file_location("small", Path(__file__).with_name("small.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["small"] = module
    spec.loader.exec_module(module)
    return module


small = sys.modules.get("small") or _load_small()


@pytest.fixture(scope="session", autouse=True)
def brief_latency():
    """What is measured stays the same; only fewer rounds of it."""
    patch = pytest.MonkeyPatch()
    brief = partial(verification.compare_latency, starts=1, round_seconds=0.01, round_runs=2, warmup=1)
    patch.setattr(
        verification,
        "compare_latency",
        lambda specs, **more: brief(specs, **{**more, "rounds": min(2, more.get("rounds", 2))}),
    )
    yield
    patch.undo()


@dataclass(frozen=True)
class Said:
    """What one command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def zsq(capfd) -> Callable[..., Said]:
    """The command line in this process: exit code, standard output and standard error, native code's included."""

    def call(*arguments: object) -> Said:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Said(code, out, err)

    return call


@dataclass(frozen=True)
class Place:
    """A network, labelled images for it, and the folder that it was deployed into."""

    network: Path
    data: Path
    out: Path


@pytest.fixture(scope="session")
def place(tmp_path_factory, brief_latency) -> Place:
    """Two targets, labelled data, ZeroQ with few steps."""
    home = tmp_path_factory.mktemp("deployed")
    network, data = small.write_onnx(home / "net.onnx"), small.write_eval(home / "data.npz")
    out = home / "out"
    code = main(
        [
            "deploy",
            str(network),
            "-o",
            str(out),
            "--images",
            "16",
            "--param",
            "steps=20",
            "--eval-data",
            str(data),
            "--target",
            "ort-x86-vnni",
            "--target",
            "ort-arm64",
            "-q",
        ]
    )
    assert code == 0
    return Place(network, data, out)
