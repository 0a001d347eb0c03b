"""tools/compare_methods.py: results that survive a kill, its table, and the evidence that it writes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zsq_deploy.artifact import read_json
from zsq_deploy.calib.evidence import Evidence
from zsq_deploy.model import Preprocess
from zsq_deploy.model.graph import TensorSpec

TOOLS = Path(__file__).parent.parent / "tools"


def tool(name: str) -> Any:
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name)


def line(part: str, method: str = "zeroq", seed: int = 0, **more: Any) -> dict[str, Any]:
    found = {"network": "net", "method": method, "seed": seed, "protocol": "p", "part": part}
    if part == "set":
        quality = {
            "coverage": {"summary": 0.5 + 0.1 * seed},
            "batch_norm": {"mean": 0.25, "spread": 0.125},
            "diversity": {"effective_images": 3.0},
            "real": {"extent_bits": 0.75, "bias_bits": -0.5},
        }
        found |= {
            "images": 64, "seconds": 8.0 + seed, "image_steps_per_s": 500.0, "method_used": method, "quality": quality,
            "parameters": {}, "kind": {"batch_norm": True, "classifier": True, "depthwise": False, "pixels": 9, "macs": 1000},
        }  # fmt: skip
    else:
        found |= {"float": 0.9, "accuracy": 0.89 - 0.02 * seed, "agreement": 0.95, "scored": 1000, "seconds": 1.0}
    return {**found, **more}


def test_finished_parts_are_kept_and_a_torn_line_is_dropped(tmp_path):
    results = tool("_method_results").Results
    file = tmp_path / "deep" / "r.jsonl"
    first = results(file)
    first.add(line("set"))
    first.add(line("w8a8"))
    with file.open("ab") as out:
        out.write(json.dumps(line("w4a4")).encode()[:40])  # the kill
    second = results(file)
    assert list(second.lines.values()) == [line("set"), line("w8a8")]
    assert second.get(network="net", method="zeroq", seed=0, protocol="p", part="w4a4") is None
    second.add(line("w4a4"))
    second.add(line("w8a8", accuracy=0.5))  # measured again: the last one counts
    third = results(file)
    assert [each["part"] for each in third.lines.values()] == ["set", "w8a8", "w4a4"]
    assert third.get(network="net", method="zeroq", seed=0, protocol="p", part="w8a8")["accuracy"] == 0.5
    file.write_bytes(file.read_bytes().rstrip(b"\n"))  # whole but unended: not trusted
    assert len(results(file).lines) == 3
    assert results(tmp_path / "none.jsonl").lines == {}


def test_the_table_gives_means_and_spreads():
    lines = [line(part, seed=seed) for seed in (0, 1) for part in ("set", "w8a8")]
    lines += [line("set", "fractal"), line("w8a8", "fractal", error="ValueError: no")]
    lines += [line("set", "genie", method_used="fractal"), line("w8a8", "genie", accuracy=None, float=None)]
    text = tool("_method_results").markdown(lines, ["w8a8", "w4a4"])
    assert "**net**, float 90.00 % (p)" in text
    # mean of 89 and 87, standard deviation sqrt(2)
    assert (
        "| zeroq | 2 | 64 | 8.5 | 500 | 0.250 | 0.125 | 0.75 | -0.50 | 0.550 | 3.0 | 88.00 ± 1.41 (95.0) | - |" in text
    )
    assert "| fractal | 1 | 64 | 8.0 | 500 | 0.250 | 0.125 | 0.75 | -0.50 | 0.500 | 3.0 | failed | - |" in text
    assert "| genie (= fractal) | 1 |" in text
    assert "| (95.0) | - |" in text


def test_networks_without_classes_are_scored_by_signal_to_noise_and_a_refusal_is_no_failure(tmp_path):
    signal = {"accuracy": None, "float": None, "agreement": None, "sqnr_db": 30.0}
    lines = [line("set"), line("w8a8", **signal), line("w4a4", "hast", error="CalibrationError: needs classes")]
    lines += [line("set", seed=1), line("w8a8", seed=1, **{**signal, "sqnr_db": 32.0})]
    lines.append(line("set", "hast", error="CalibrationError: needs classes"))
    results = tool("_method_results")
    text = results.markdown(lines, ["w8a8", "w4a4"])
    assert "| 31.0 ± 1.4 dB | - |" in text
    assert next(row for row in text.splitlines() if row.startswith("| hast")).count("refused") == 2
    assert results.to_evidence(lines, {"p": "p"}, tmp_path / "e.json") == 0  # no accuracy: nothing to choose by


def test_the_denoiser_is_scored_on_noisy_patches_as_a_camera_gives_them(tmp_path):
    comparison = tool("_comparison")
    clean = np.random.default_rng(3).integers(60, 190, (70, 135), dtype=np.uint8)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "gray.npz", x00=clean, x01=clean[:64, :64])
    network = comparison.Network("n.onnx", Preprocess(), "gray.npz", labelled=False, classes=False, noise=25 / 255)
    model = SimpleNamespace(inputs=[TensorSpec("x", (1, 1, 64, 64), np.dtype(np.float32))])
    data = comparison.open_data(network, model, tmp_path)
    pixels = data.images(0, 3)[..., 0]
    assert pixels.dtype == np.uint8
    assert len(data) == 3  # two patches of the first, whose rest is cut off, and one of the second
    wanted = np.stack([clean[:64, :64], clean[:64, 64:128], clean[:64, :64]])
    gone = pixels - wanted.astype(np.float64)
    assert abs(gone.std() - 25) < 0.5
    assert abs(gone.mean()) < 0.7  # 12,288 pixels: standard errors 0.16 and 0.23
    assert not np.array_equal(pixels[0], pixels[2])
    assert np.array_equal(comparison.open_data(network, model, tmp_path).images(0, 3)[..., 0], pixels)


def test_the_evidence_replaces_what_it_measured_again(tmp_path):
    make = tool("_method_results").to_evidence
    file = tmp_path / "evidence.json"
    lines = [line(part, seed=seed) for seed in (0, 1) for part in ("set", "w8a8")]
    others = [
        line("set", "genie", method_used="fractal"),
        line("w8a8", "genie"),
        line("set", "real"),
        line("w8a8", "real"),
    ]
    assert make([*lines, *others], {"p": "spoken"}, file, leave_out=["real"]) == 1
    (row,) = Evidence.from_json(read_json(file)).rows
    assert (row.network, row.method, row.protocol, row.images, row.seconds) == ("net", "zeroq", "spoken", 64, 8.5)
    found = row.results["w8a8"]
    assert found.drop == pytest.approx(0.02)
    assert found.spread == pytest.approx(0.02 / 2**0.5)
    assert (found.seeds, found.images, found.agreement) == (2, 1000, pytest.approx(0.95))
    assert row.quality == {"coverage": 0.55, "batch_norm_mean": 0.25, "range_error_bits": 0.75}
    make([line("set", "fractal"), line("w8a8", "fractal")], {"p": "spoken"}, file, times=False)
    make([line("set"), line("w8a8", accuracy=0.7)], {"p": "spoken"}, file)
    rows = {each.method: each for each in Evidence.from_json(read_json(file)).rows}
    assert set(rows) == {"zeroq", "fractal"}
    assert rows["fractal"].seconds is None
    assert rows["zeroq"].results["w8a8"].drop == pytest.approx(0.2)


@pytest.mark.assets
def test_a_killed_comparison_goes_on(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = tool("compare_methods")
    out = tmp_path / "out.jsonl"
    told = ["--assets", str(assets), "--out", str(out), "--networks", "mlperf_tiny_resnet8_cifar10", "--limit", "24"]
    told += ["--methods", "gaussian,zeroq,real", "--images", "8", "--steps-scale", "0.02", "--quantizer", "minmax"]
    told += ["--bits", "w8a8"]
    assert compare.main(told) == 0
    first = out.read_text().splitlines()
    found = [json.loads(text) for text in first]
    assert [(each["method"], each["part"]) for each in found] == [
        (method, part) for method in ("gaussian", "zeroq", "real") for part in ("set", "w8a8")
    ]
    assert all("error" not in each for each in found)
    zeroq = found[2]
    assert zeroq["parameters"] == {"steps": 4}
    assert zeroq["image_steps_per_s"] > 0
    assert zeroq["quality"]["real"]["images"] == 24
    assert found[5]["scored"] == 24  # real images: each half is scored by what the other one calibrated
    out.write_text("\n".join(first[:3]) + "\n" + first[3][:30])
    assert compare.main(told) == 0
    again = [json.loads(text) for text in out.read_text().splitlines()]

    def plain(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in each.items() if name != "seconds"} for each in lines]

    assert plain(again) == plain(found)
    table = capsys.readouterr().out
    assert compare.main([*told, "--markdown"]) == 0
    assert capsys.readouterr().out == table[table.rindex("**mlperf_tiny") :]
    assert compare.main(["--out", str(out), "--evidence", str(tmp_path / "e.json")]) == 0
    assert {row.method for row in Evidence.from_json(read_json(tmp_path / "e.json")).rows} == {"gaussian", "zeroq"}
