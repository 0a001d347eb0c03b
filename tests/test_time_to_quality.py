"""tools/bench_time_to_quality.py: its table, and that finished parts are not made again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zsq_deploy.model import Preprocess
from zsq_deploy.model.graph import TensorSpec

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def bench() -> Any:
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module("bench_time_to_quality")


def line(method: str, seed: int, part: str, **more: Any) -> dict[str, Any]:
    return {"network": "net", "method": method, "seed": seed, "protocol": "p", "part": part, **more}


def test_the_table_holds_methods_against_the_given_set(bench: Any, tmp_path: Path) -> None:
    results = bench.Results(tmp_path / "r.jsonl")
    for seed, accuracy in enumerate((0.80, 0.82, 0.84)):
        results.add(line(bench.GIVEN, seed, "set", seconds=3000.0 + 300 * seed))  # mean 3300
        results.add(line(bench.GIVEN, seed, "w4a4", accuracy=accuracy, agreement=0.9))
        results.add(line("fast", seed, "set", seconds=30.0))
        results.add(line("fast", seed, "w4a4", accuracy=accuracy + 0.01, agreement=0.95))
    results.add(line("slow", 0, "set", seconds=9.0))  # not scored yet: no row
    rows = [row for row in bench.table(results).splitlines() if row.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {bench.GIVEN}", "| fast"]
    assert rows[2].split(" | ")[1:] == ["3", "3300.0", "1", "82.00 ± 2.00", "+0.00", "90.00 |"]
    assert rows[3].split(" | ")[1:] == ["3", "30.0", "110", "83.00 ± 2.00", "+1.00", "95.00 |"]


def test_without_the_given_set_nothing_is_held_against_it(bench: Any, tmp_path: Path) -> None:
    results = bench.Results(tmp_path / "r.jsonl")
    results.add(line("fast", 0, "set", seconds=30.0))
    results.add(line("fast", 0, "w4a4", accuracy=0.5, agreement=0.6))
    assert "| fast | 1 | 30.0 | - | 50.00 | - | 60.00 |" in bench.table(results)


def test_a_killed_bench_goes_on(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides in turn, seed by seed; what is in the file is not made again."""
    calls: list[tuple[str, Any]] = []

    class Tried(bench.Bench):  # type: ignore[name-defined,misc]
        def __init__(self, options: Any, results: Any) -> None:
            self.options, self.results, self.protocol = options, results, "p"

        def given(self, found: Any) -> tuple[Any, Any]:
            calls.append(("given", found is None))
            return "given", {"images": 5, "seconds": 100.0, "estimated": True}

        def made(self, method: str, seed: int, found: Any) -> tuple[Any, Any]:
            calls.append((f"{method} {seed}", found is None))
            return f"{method} {seed}", {"images": 2, "seconds": 1.0, "estimated": False}

        def score(self, images: Any, seed: int) -> Any:
            if images == "given" and seed == 1 and not calls.count(("killed", True)):
                calls.append(("killed", True))
                raise KeyboardInterrupt
            calls.append((f"score {images}", seed))
            return {"float": 0.9, "accuracy": 0.8, "agreement": 0.85, "quantizer_seconds": 2.0}

    options = SimpleNamespace(network="net", bits="w4a4", seeds=[0, 1], methods=["fast"], set=tmp_path)
    file = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Tried(options, bench.Results(file)).run()
    Tried(options, bench.Results(file)).run()
    assert [call for call in calls if call[0].startswith("score")] == [
        ("score fast 0", 0),
        ("score given", 0),
        ("score fast 1", 1),
        ("score given", 1),
    ]
    assert len(bench.Results(file).lines) == 8
    assert sum(1 for text in file.read_text().splitlines()) == 8


def test_steps_and_images_give_the_time_of_the_given_set(bench: Any, tmp_path: Path) -> None:
    given = tmp_path / "given.npy"
    np.save(given, np.zeros((5, 3, 4, 4), np.float32))
    options = SimpleNamespace(set=given, set_steps=4000)

    class Tried(bench.Bench):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            spec = TensorSpec("x", (None, 3, 4, 4), np.dtype(np.float32))
            self.options = options
            self.model = SimpleNamespace(name="net", digest="0" * 64, preprocess=Preprocess(), inputs=(spec,))

        def plain_rate(self) -> float:
            return 250.0

    images, said = Tried().given(None)
    assert said == {"images": 5, "seconds": 5 * 4000 / 250.0, "image_steps_per_s": 250.0, "estimated": True}
    assert len(images) == 5
    assert Tried().given({"seconds": 7.0})[1] == {"seconds": 7.0}
