"""Sessions: modes, threads, repeatability, and what is said when a file cannot be run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.onnxruntime.quantizer import build
from zsq_deploy.backends.onnxruntime.runner import float_modes, runner
from zsq_deploy.errors import EngineError, UsageError

from .ort_engines import convnet, loaded, ranges_of, run

VNNI, ARM = get_target("ort-x86-vnni"), get_target("ort-arm64")


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, feeds: dict[str, np.ndarray]) -> Engine:
    folder = tmp_path_factory.mktemp("engine")
    model = loaded(convnet(), folder / "model")
    return build(model, ranges_of(model, feeds), VNNI, folder / "engine")


def test_the_unfused_mode_is_a_plain_session(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one = runner(engine.path, VNNI, mode="unfused")
    assert (one.input_names, one.output_names) == (("x",), ("logits",))
    assert one.load_ms > 0
    np.testing.assert_array_equal(one.run(feeds)["logits"], run(engine.path, feeds)[0])


def test_engine_and_unfused_differ_by_little(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    fused = runner(engine.path, VNNI).run(feeds)["logits"]
    plain = runner(engine.path, VNNI, mode="unfused").run(feeds)["logits"]
    floats = runner(engine.float_path, VNNI, mode="float").run(feeds)["logits"]
    assert np.abs(fused - plain).max() < np.abs(floats - plain).max()
    assert (fused.argmax(1) == plain.argmax(1)).mean() >= 0.85


def test_results_do_not_depend_on_threads_batch_or_repetition(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one, two = runner(engine.path, VNNI), runner(engine.path, VNNI, threads=2)
    first = one.run(feeds)["logits"]
    np.testing.assert_array_equal(first, one.run(feeds)["logits"])
    np.testing.assert_array_equal(first, two.run(feeds)["logits"])
    single = np.concatenate([one.run({"x": feeds["x"][i : i + 1]})["logits"] for i in range(8)])
    np.testing.assert_array_equal(first, single)


def test_the_arm_target_is_fused_here_too(tmp_path: Path, feeds: dict[str, np.ndarray]) -> None:
    model = loaded(convnet(), tmp_path)
    made = build(model, ranges_of(model, feeds), ARM, tmp_path / "e")
    records = runner(made.path, ARM).kernels({"x": feeds["x"][:1]})
    assert [r.node for r in records if r.macs and not r.integer] == []
    assert any(note for note in ARM.notes if "x86" in note)


def test_broken_files_give_one_clear_error(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        runner(tmp_path / "none.onnx", VNNI)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(engine.path.read_bytes()[:2000])
    with pytest.raises(EngineError, match="cannot load") as caught:
        runner(cut, VNNI)
    assert "cut.onnx" in str(caught.value)
    future = onnx.load(engine.path)
    future.opset_import[0].version = 99
    onnx.save(future, tmp_path / "future.onnx")
    with pytest.raises(EngineError, match="cannot load"):
        runner(tmp_path / "future.onnx", VNNI)


def test_wrong_inputs_are_named(engine: Engine) -> None:
    one = runner(engine.path, VNNI)
    with pytest.raises(EngineError) as caught:
        one.run({"x": np.zeros((1, 3, 5, 5, 5), np.float32)})
    assert "float32[1, 3, 5, 5, 5]" in str(caught.value)
    with pytest.raises(EngineError):
        one.run({"y": np.zeros((1, 3, 16, 16), np.float32)})


def test_wrong_use_is_told(engine: Engine) -> None:
    with pytest.raises(UsageError, match="unknown mode"):
        runner(engine.path, VNNI, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads"):
        runner(engine.path, VNNI, threads=0)


def test_the_float_baseline_is_forced_float32() -> None:
    assert float_modes(VNNI)["float32"] == {}
