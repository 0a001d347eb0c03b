"""The comparison of the data-free algebra runs on the assets, and its table says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.mark.assets
def test_rows_are_written_and_gone_on_with(assets, tmp_path, capsys):
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    tool = importlib.import_module("compare_algebra")
    out = tmp_path / "algebra.json"
    words = ["--assets", str(assets), "--out", str(out), "--network", "mlperf_tiny_resnet8_cifar10", "--limit", "64"]
    assert tool.main([*words, "--row", "w4a8 nearest"]) == 0
    assert tool.main([*words, "--row", "w4a8 nearest", "--row", "w4a8 squant"]) == 0
    rows = json.loads(out.read_text())["mlperf_tiny_resnet8_cifar10"]
    assert list(rows) == ["w4a8 nearest", "w4a8 squant"]
    assert rows["w4a8 squant"]["images"] == 64
    assert rows["w4a8 squant"]["sqnr_db"] > rows["w4a8 nearest"]["sqnr_db"] + 3
    assert capsys.readouterr().out.count("mlperf_tiny_resnet8_cifar10") == 3
