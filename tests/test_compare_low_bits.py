"""tools/compare_low_bits.py: engines are built and counted, a run goes on where it stopped, and the table names sizes side by side."""

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
    return importlib.import_module("compare_low_bits")


@pytest.mark.assets
def test_both_runtimes_equal_their_graphs_in_integer_convolutions(assets: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    out, name = tmp_path / "out.json", "mlperf_tiny_resnet8_cifar10"
    told = ["--assets", str(assets), "--out", str(out), "--network", name, "--limit", "32", "--parity", "16"]
    told += [
        "--method",
        "gaussian",
        "--images",
        "8",
        "--case",
        "ort-x86-vnni/w4a8/nearest",
        "--case",
        "openvino-cpu/w4a8/nearest",
    ]
    assert tool().main(told) == 0
    first = json.loads(out.read_text())
    rows = first[name]
    assert len(rows) == 2
    for row in rows.values():
        assert row["top1_as_twin"] == 1.0
        assert row["outputs_that_differ"] == 0.0
        assert row["integer_convolutions"] == row["convolutions"] == 9
        assert row["integer_macs"] == 1.0
        assert row["images"] == 32
        assert row["bytes"] < 0.5 * row["float_bytes"]
    assert tool().main(told) == 0
    assert json.loads(out.read_text()) == first


def test_the_table_has_sizes_beside_those_of_8_bits() -> None:
    row = {
        "float": 0.9, "engine": 0.88, "images": 50, "top1_as_twin": 1.0, "outputs_that_differ": 0.001, "convolutions": 9,
        "integer_convolutions": 8, "integer_macs": 0.9, "bytes": 196_000,
    }  # fmt: skip
    text = tool().markdown(
        {
            "net": {
                "ort-x86-vnni/w8a8/nearest/ends-8bit/0": {**row, "bytes": 326_000},
                "ort-x86-vnni/w4a8/learned/ends-8bit/0": row,
                "openvino-cpu/w4a8/squant/all-layers/0": {**row, "engine": None, "float": None},
                "openvino-cpu/w4a4/learned/all-layers/0": {"error": "no"},
            }
        }
    )
    assert "| net (90.00) | ort-x86-vnni | w8a8 nearest | 88.00 (50) | 100.0 | 0.10 | 8 of 9 | 90.0 | 326 |" in text
    assert (
        "| net (90.00) | ort-x86-vnni | w4a8 learned | 88.00 (50) | 100.0 | 0.10 | 8 of 9 | 90.0 | 196 (326) |" in text
    )
    assert "| net (-) | openvino-cpu | w4a8 squant, all-layers | - (50) |" in text
    assert "| net | openvino-cpu | w4a4 learned | no |" in text
