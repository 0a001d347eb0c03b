"""tools/compare_reconstruct.py: rows survive a kill, mixtures have equal parts, and the table gives means and spreads."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


def tool(name: str) -> Any:
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name)


def line(part: str, seed: int, **more: Any) -> dict[str, Any]:
    found = {"network": "net", "method": "zeroq", "seed": seed, "protocol": "8 images", "part": part}
    found |= {
        "float": 0.92,
        "accuracy": 0.90 + 0.01 * seed,
        "agreement": 0.95,
        "sqnr_db": 20.0,
        "processor_seconds": 10.0 + seed,
    }
    return {**found, **more}


def test_the_table_gives_means_and_spreads():
    lines = [line("w4a4 ends-8bit fast", seed) for seed in (0, 1)]
    lines += [line("w8a8 ends-8bit nearest", 0, accuracy=None, float=None), line("w3a3 all-layers fast", 0, error="no")]
    text = tool("compare_reconstruct").markdown(lines)
    assert "**net**, float 92.00 % (8 images)" in text
    # 90 and 91 against 92; standard deviation of two numbers that differ by 1 is sqrt(1/2)
    assert "| w4a4 | ends-8bit | fast | zeroq | 2 | 90.50 ± 0.71 | -1.50 ± 0.71 | 95.0 ± 0.00 | 20.0 | 10 |" in text
    head, rule = text.splitlines()[2:4]
    assert head.count("|") == rule.count("|") == 11
    assert {row.count("|") for row in text.splitlines() if row.startswith("| w")} == {11}
    assert "| w8a8 | ends-8bit | nearest | zeroq | 1 | - | - | 95.0 | 20.0 | 10 |" in text
    assert "| w3a3 | all-layers | fast | zeroq | 0 | failed |" in text
    rows = [row for row in text.splitlines() if row.startswith("| w")]
    assert [row.split()[1] for row in rows] == ["w3a3", "w8a8", "w4a4"]


@pytest.mark.assets
def test_a_killed_comparison_goes_on_and_mixtures_have_equal_parts(assets, tmp_path, capsys):
    compare, network = tool("compare_reconstruct"), "mlperf_tiny_resnet8_cifar10"
    out = tmp_path / "out.jsonl"
    told = ["--assets", str(assets), "--out", str(out), "--networks", network, "--limit", "24", "--images", "8"]
    told += ["--methods", "gaussian+uniform,real", "--bits", "w8a8,w4a4", "--protocols", "ends-8bit"]
    told += ["--presets", "nearest", "--seeds", "0,1", "--images-seed", "3"]
    assert compare.main(told) == 0
    first = out.read_text().splitlines()
    found = [json.loads(text) for text in first]
    assert [(each["seed"], each["method"], each["part"]) for each in found] == [
        (seed, method, f"{bits} ends-8bit nearest")
        for seed in (0, 1)
        for method in ("gaussian+uniform", "real")
        for bits in ("w8a8", "w4a4")
    ]
    assert all("error" not in each and each["scored"] == 24 for each in found)
    assert all("ends-8bit: " in each["description"] for each in found)
    assert [each["images"] for each in found] == [8] * 8
    # the same images for both seeds, and rounding to nearest draws nothing
    assert found[1]["sqnr_db"] == found[5]["sqnr_db"]
    kept = sorted(path.name.split("-")[1:3] for path in out.with_suffix(".sets").iterdir())
    assert kept == [["gaussian", "3"], ["uniform", "3"]]
    out.write_text("\n".join(first[:3]) + "\n" + first[3][:30])
    assert compare.main(told) == 0
    again = [json.loads(text) for text in out.read_text().splitlines()]

    def plain(lines):
        return [{k: v for k, v in each.items() if k not in ("seconds", "processor_seconds")} for each in lines]

    assert plain(again) == plain(found)
    capsys.readouterr()
    assert compare.main(["--out", str(out), "--markdown"]) == 0
    table = capsys.readouterr().out
    assert f"**{network}**, float" in table
    assert table.count("| gaussian+uniform | 2 |") == 2


@pytest.mark.assets
def test_a_part_that_fails_is_a_row_and_is_tried_again(assets, tmp_path, monkeypatch):
    compare = tool("compare_reconstruct")
    out = tmp_path / "out.jsonl"
    told = ["--assets", str(assets), "--out", str(out), "--networks", "resnet20_cifar10", "--limit", "8"]
    told += ["--images", "8", "--methods", "gaussian", "--bits", "w4a4", "--presets", "nearest", "--seeds", "0"]

    def broken(*_, **__):
        raise ValueError("no")

    told += ["--protocols", "ends-8bit"]
    with monkeypatch.context() as change:
        change.setattr(compare, "round_to_nearest", broken)
        compare.main(told)
    compare.main([*told, "--bits", "w4a4,mixed-w4a4"])
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [each.get("error") for each in lines] == ["ValueError: no", None, None]
    assert [each["part"].split()[0] for each in lines] == ["w4a4", "w4a4", "mixed-w4a4"]
    assert "packed-bytes" in lines[-1]["allocation"]
    assert "w5a4" in lines[-1]["description"]


def test_unknown_words_are_refused(tmp_path, capsys):
    for wrong in (["--methods", "zeroq+magic"], ["--protocols", "some"], ["--presets", "slow"], ["--networks", "net"]):
        with pytest.raises(SystemExit):
            tool("compare_reconstruct").main(["--out", str(tmp_path / "r.jsonl"), *wrong])
        assert "unknown" in capsys.readouterr().err
