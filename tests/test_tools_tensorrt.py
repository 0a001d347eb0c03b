"""The comparison of TensorRT's graphs with float runs, goes on where it stopped, and names what falls short."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


def tool() -> Any:
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module("compare_tensorrt")


def row(accuracy: float | None, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "agreement": 0.98, "same_as_twin": 1.0, "sqnr_db": 30.0, "psnr_db": None, **more}


def rows(floating: float | None, twin: float | None, **more: Any) -> dict[str, Any]:
    every = {"float": row(floating), **{which: row(twin, **more) for which in ("twin", "ort", "ort_optimized")}}
    return {**every, "calibration": "zeroq 4", "lint": {"8": 0, "10": 0, "11": 1}}


def test_the_table_names_what_is_further_from_float_than_it_may_be() -> None:
    text = tool().markdown(
        {
            "near": {"explicit/data-free": rows(0.9, 0.8975)},
            "far": {"explicit/data-free": rows(0.9, 0.8965), "plain/data-free": rows(0.9, 0.8)},
            "odd": {
                "explicit/data-free": rows(None, None, agreement=None, same_as_twin=None, psnr_db=31.25),
                "implicit/data-free": {"error": "CalibrationError: no layer"},
            },
        }
    )
    assert "| near | explicit | zeroq 4 | 90.00 | 89.75 | -0.25 | 98.0 | 30.0 dB | 89.75 | 100.0 |" in text
    assert "| 0/0/1 |" in text
    assert "| odd | explicit | zeroq 4 | - | 31.25 dB | - | - | 30.0 dB |" in text
    assert "failed: CalibrationError: no layer" in text
    assert [line for line in text.splitlines() if line.startswith("* ")] == ["* far: 0.35 points below float."]


@pytest.mark.assets
def test_it_goes_on_where_it_stopped(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare, out = tool(), tmp_path / "out.json"
    told = ["--assets", str(assets), "--out", str(out), "--network", "mlperf_tiny_resnet8_cifar10", "--limit", "24"]
    told += ["--images", "4", "--way", "plain", "--way", "implicit", "--method", "real"]
    assert compare.main(told) == 0
    first = json.loads(out.read_text())
    found = first["mlperf_tiny_resnet8_cifar10"]
    for way in ("plain/real", "implicit/real"):
        assert found[way]["images"] == 24  # each half calibrates once and is scored once
        assert found[way]["ort"]["same_as_twin"] > 0.9
        assert found[way]["twin"]["sqnr_db"] > 10
    assert found["plain/real"]["lint"] == {"8": 0, "10": 0, "11": 0}
    assert compare.main(told) == 0
    assert json.loads(out.read_text()) == first
    capsys.readouterr()
    assert compare.main(["--out", str(out), "--markdown"]) == 0
    assert "| mlperf_tiny_resnet8_cifar10 | plain | real 4 |" in capsys.readouterr().out
