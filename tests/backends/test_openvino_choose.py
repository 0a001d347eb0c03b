"""Who quantizes by default: both ways are built and measured, and the better one stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.measured import Measured, pick
from zsq_deploy.backends.openvino import choose as module
from zsq_deploy.backends.openvino.choose import candidates, choose
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.runner import runner
from zsq_deploy.errors import CalibrationError, EngineError
from zsq_deploy.model import Model
from zsq_deploy.quant.ranges import Ranges

from .openvino_engines import noise, twin_outputs
from .ort_engines import calibration_set, convnet, loaded, ranges_of

CPU = get_target("openvino-cpu")
EXACT = BuildOptions(exact_scales=True)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(convnet(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"x": noise((16, 3, 16, 16))}


@pytest.fixture(scope="module")
def ranges(network: Model, feeds: dict[str, np.ndarray]) -> Ranges:
    return ranges_of(network, feeds)


def labels(options: BuildOptions, network: Model) -> list[str]:
    return [option.label for option in candidates(network.folded().graph, CPU, options)]


def test_who_is_a_candidate(network: Model) -> None:
    assert labels(EXACT, network)[:2] == ["qdq", "nncf"]
    assert labels(EXACT.with_(quantizer="nncf"), network) == ["nncf"]
    assert labels(EXACT.with_(quantizer="pot"), network) == ["pot"]
    assert "nncf" not in labels(EXACT.with_(op_types=("Conv",)), network)


@pytest.mark.slow
def test_both_are_built_and_the_chosen_one_computes_what_its_graph_says(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    choice = choose(
        network,
        ranges,
        CPU,
        tmp_path / "out",
        images=[feeds],
        options=EXACT,
        calibration=calibration_set(network, feeds),
        rounds=10,
    )
    assert {item.options.label for item in choice.measured} >= {"qdq", "nncf"}
    assert choice.chosen in choice.measured
    assert {item["label"] for item in choice.engine.choices["candidates"]} >= {"qdq", "nncf"}
    assert choice.engine.choices["chosen"] == choice.chosen.options.label == choice.engine.choices["quantizer"]
    assert not (tmp_path / "out" / "candidates").exists()
    assert choice.engine.path == tmp_path / "out" / "engine.xml"
    assert choice.engine.weights_path == tmp_path / "out" / "engine.bin"
    got, wanted = runner(choice.engine.path, CPU).run(feeds)["logits"], twin_outputs(choice.engine, feeds)["logits"]
    assert np.abs(got - wanted).max() <= 2 * (wanted.max() - wanted.min()) / 255


def test_without_images_nncf_is_no_candidate(
    network: Model, ranges: Ranges, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    choice = choose(network, ranges, CPU, tmp_path, images=[feeds], options=EXACT, rounds=5)
    assert [item.options.quantizer for item in choice.measured] == ["qdq"] * len(choice.measured)
    with pytest.raises(CalibrationError, match="no images"):
        choose(network, ranges, CPU, tmp_path, images=[], options=EXACT)


def test_a_candidate_that_fails_is_told_and_left_out(
    network: Model,
    ranges: Ranges,
    feeds: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = module.build

    def failing(*args: object, options: BuildOptions, **more: object) -> object:
        if options.quantizer == "nncf":
            raise EngineError("it gave up on layer seven", where="here", remedy="none")
        return real(*args, options=options, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "build", failing)
    given = {"images": [feeds], "calibration": calibration_set(network, feeds), "rounds": 5}
    choice = choose(network, ranges, CPU, tmp_path / "a", options=EXACT, **given)  # type: ignore[arg-type]
    assert choice.chosen.options.quantizer == "qdq"
    assert any("layer seven" in note for note in choice.notes)
    with pytest.raises(EngineError, match="layer seven"):
        choose(network, ranges, CPU, tmp_path / "b", options=EXACT.with_(quantizer="nncf"), **given)  # type: ignore[arg-type]


def measured(ms: float, db: float, agreement: float = 1.0) -> Measured:
    return Measured(BuildOptions(), ms, 2.0, agreement, db, 1)


def test_a_slower_candidate_is_only_taken_if_it_is_better() -> None:
    fast = measured(1.0, 30.0)
    for slow, wins in (
        (measured(1.2, 30.5), False),  # not better by more than noise
        (measured(1.2, 34.0), True),
        (measured(1.2, 28.0), False),
        (measured(1.02, 30.5), True),  # as fast, within noise
    ):
        assert pick([fast, slow], 0.005, 1.0) == int(wins)
        assert pick([slow, fast], 0.005, 1.0) == int(not wins)
    assert pick([fast, replace(fast, median_ms=0.5, agreement=0.9)], 0.005, 1.0) == 0
