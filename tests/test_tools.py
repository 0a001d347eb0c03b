"""The measuring tools run, and say what they measured. (Their numbers are for people; here everything is tiny.)"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

TOOLS = Path(__file__).parent.parent / "tools"


def tool(name: str) -> Any:
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


def test_openvino_speeds_stand_side_by_side() -> None:
    bench = tool("bench_openvino")
    (row,) = bench.measure("small", small(), 32, (1,), 5)
    assert set(row["median_ms"]) == set(row["calm_ms"]) >= {"float32", "plain NNCF", "qdq", "nncf"}
    assert all(0 < row["calm_ms"][who] <= row["median_ms"][who] for who in row["median_ms"])
    assert row["integer_macs_share"]["qdq"] == row["integer_macs_share"]["nncf"] == 1.0
    json.dumps(row)


def test_what_an_openvino_bench_misses_is_said() -> None:
    missed = tool("bench_openvino").missed
    row = {"goal": 3.0, "calm_ms": {"float32": 9.0, "plain NNCF": 2.0, "qdq": 2.9, "nncf": 2.0}}
    assert missed(row) == []
    assert len(missed({**row, "goal": 5.0})) == 1
    slow = {**row, "calm_ms": {**row["calm_ms"], "nncf": 2.5}}
    assert missed(slow) == ["25.0% slower than plain NNCF"]


def test_wrapping_counts_processor_time() -> None:
    found = tool("bench_openvino").wrapping("small", small(), 32, 4, 1)
    assert found["bare_s"] > 0
    assert found["more"] == pytest.approx(found["ours_s"] / found["bare_s"] - 1.0)


def row(engine: float | None, agreement: float) -> dict[str, Any]:
    return {"float": None if engine is None else 0.9, "engine": engine, "agreement": agreement}


def test_the_table_of_quantizers_names_what_falls_short() -> None:
    compare = tool("compare_openvino")
    text = compare.markdown(
        {
            "net": {
                "nncf/real/0": row(0.90, 0.99),
                "nncf/zeroq/0": row(0.8985, 0.98),
                "nncf/genie/0": row(0.895, 0.97),
                "plain/real/0": row(0.85, 0.90),
                "pot/real/0": {"error": "no POT here"},
            },
            "unlabelled": {"nncf/real/0": row(None, 0.75)},
        }
    )
    assert "| net | 90.00 | nncf | 90.00 (99.0) | 89.85 (98.0) | 89.50 (97.0) | - | - |" in text
    assert "| net | 90.00 | pot | failed | - | - | - | - |" in text
    assert "| unlabelled | - | nncf | (75.0) | - | - | - | - |" in text
    assert [line for line in text.splitlines() if line.startswith("* ")] == [
        "* net: nncf on genie images is 0.50 points below nncf on real images."
    ]


@pytest.mark.assets
def test_a_comparison_goes_on_where_it_stopped(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = tool("compare_openvino")
    out = tmp_path / "out.json"
    told = ["--assets", str(assets), "--out", str(out), "--network", "mlperf_tiny_resnet8_cifar10", "--limit", "24"]
    told += ["--images", "4", "--quantizer", "plain", "--method", "real"]
    assert compare.main(told) == 0
    first = json.loads(out.read_text())
    result = first["mlperf_tiny_resnet8_cifar10"]["plain/real/0"]
    assert result["images"] == 24  # each half calibrates once and is scored once
    assert 0.5 < result["agreement"] <= 1.0
    assert compare.main(told) == 0
    assert json.loads(out.read_text()) == first
    capsys.readouterr()
    assert compare.main(["--out", str(out), "--markdown"]) == 0
    assert "| mlperf_tiny_resnet8_cifar10 |" in capsys.readouterr().out
