"""OpenVINO runners: modes, shapes, threads, repeatability, and what is said when a file cannot be run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.openvino.convert import convert, save
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.quantizer import build
from zsq_deploy.backends.openvino.runner import float_modes, open_runner, properties, runner
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.model.graph import Graph

from .openvino_engines import noise, twin_outputs
from .ort_engines import convnet, loaded, ranges_of, transformer

CPU, GPU = get_target("openvino-cpu"), get_target("openvino-gpu")


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"x": noise((8, 3, 16, 16))}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, feeds: dict[str, np.ndarray]) -> Engine:
    folder = tmp_path_factory.mktemp("engine")
    model = loaded(convnet(), folder / "model")
    options = BuildOptions(quantizer="qdq", exact_scales=True)
    return build(model, ranges_of(model, feeds), CPU, folder / "engine", options=options)


def test_float_mode_is_float32_whatever_the_processor_prefers(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one = runner(engine.float_path, CPU, mode="float")
    assert (one.input_names, one.output_names) == (("x",), ("logits",))
    assert one.load_ms > 0
    assert properties(CPU, mode="float")["INFERENCE_PRECISION_HINT"] == "f32"
    session = ort.InferenceSession(str(engine.float_path), providers=["CPUExecutionProvider"])
    wanted = session.run(None, feeds)[0]
    np.testing.assert_allclose(one.run(feeds)["logits"], wanted, atol=2e-5 * np.abs(wanted).max())
    kernels = one.kernels({"x": feeds["x"][:1]})
    assert not any("bf16" in record.op or "f16" in record.op for record in kernels)


def test_other_float_modes_really_compute_in_less(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    modes = float_modes(CPU)
    assert modes.pop("float32") == {}
    exact = runner(engine.float_path, CPU, mode="float").run(feeds)["logits"]
    for name, session in modes.items():
        other = runner(engine.float_path, CPU, mode="float", session=session).run(feeds)["logits"]
        assert 0 < np.abs(other - exact).max() < 0.1 * np.abs(exact).max(), name


def test_the_unfused_mode_simulates_in_float(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one = runner(engine.path, CPU, mode="unfused")
    assert not any(record.integer for record in one.kernels({"x": feeds["x"][:1]}) if record.macs)
    wanted = twin_outputs(engine, feeds)["logits"]
    step = float(wanted.max() - wanted.min()) / 255
    assert (np.abs(one.run(feeds)["logits"] - wanted) <= 2 * step).mean() >= 0.99


def test_results_do_not_depend_on_threads_batch_or_repetition(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one, two = runner(engine.path, CPU), runner(engine.path, CPU, threads=2)
    assert one.fixed_batch is None
    first = one.run(feeds)["logits"]
    np.testing.assert_array_equal(first, one.run(feeds)["logits"])
    np.testing.assert_array_equal(first, two.run(feeds)["logits"])
    single = np.concatenate([one.run({"x": feeds["x"][i : i + 1]})["logits"] for i in range(8)])
    np.testing.assert_array_equal(first, single)
    for size in (2, 3, 5, 7):  # more shapes than are kept
        np.testing.assert_array_equal(one.run({"x": feeds["x"][:size]})["logits"], first[:size])


def test_earlier_results_are_not_overwritten_by_later_runs(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one = runner(engine.path, CPU)
    first = one.run({"x": feeds["x"][:1]})["logits"]
    kept = first.copy()
    one.run({"x": feeds["x"][1:2]})
    np.testing.assert_array_equal(first, kept)


def test_inputs_may_be_views(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one = runner(engine.path, CPU)
    turned = np.ascontiguousarray(feeds["x"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not turned.flags.c_contiguous
    np.testing.assert_array_equal(one.run({"x": turned})["logits"], one.run(feeds)["logits"])


def test_several_open_sizes_are_compiled_when_they_are_known(tmp_path: Path) -> None:
    proto = transformer()
    for value in (*proto.graph.input, *proto.graph.output):
        for place in (0, 1):
            value.type.tensor_type.shape.dim[place].Clear()
    path = tmp_path / "open.onnx"
    path.write_bytes(proto.SerializeToString())
    one = runner(path, CPU, mode="float")
    name = one.input_names[0]
    width = proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for shape in ((1, 5, width), (3, 5, width)):
        x = noise(shape)
        np.testing.assert_allclose(
            one.run({name: x})[one.output_names[0]], session.run(None, {name: x})[0], rtol=1e-5, atol=1e-6
        )


def test_broken_files_give_one_clear_error(engine: Engine, tmp_path: Path) -> None:
    def says(path: Path, match: str) -> None:
        with pytest.raises(EngineError, match=match) as caught:
            runner(path, CPU)
        assert path.stem in str(caught.value)
        assert "src/" not in str(caught.value)  # no places in OpenVINO's sources
        assert caught.value.remedy

    says(tmp_path / "none.xml", "does not exist")
    xml = engine.path.read_text()
    alone = tmp_path / "alone.xml"
    alone.write_text(xml)
    says(alone, "weights of this IR are missing")
    for name, text in (
        ("old.xml", re.sub(r'(<net [^>]*version=)"\d+"', r'\1"6"', xml)),
        ("cut.xml", xml[: len(xml) // 2]),
        ("page.xml", "<html></html>"),
        ("empty.xml", ""),
    ):
        (tmp_path / name).write_text(text)
        shutil.copy(engine.path.with_suffix(".bin"), (tmp_path / name).with_suffix(".bin"))
    says(tmp_path / "old.xml", "version 6")
    says(tmp_path / "cut.xml", "cannot read")
    says(tmp_path / "page.xml", "no OpenVINO IR")
    says(tmp_path / "empty.xml", "no OpenVINO IR")
    (tmp_path / "short.xml").write_text(xml)
    (tmp_path / "short.bin").write_bytes(engine.path.with_suffix(".bin").read_bytes()[:-100])
    says(tmp_path / "short.xml", "cut short")
    (tmp_path / "cut.onnx").write_bytes(engine.qdq_path.read_bytes()[:5000])
    says(tmp_path / "cut.onnx", "cannot read")


def test_wrong_inputs_are_named(engine: Engine) -> None:
    one = runner(engine.path, CPU)
    for feeds, says in (
        ({"x": np.zeros((1, 3, 5, 5, 5), np.float32)}, "float32[1, 3, 5, 5, 5]"),
        ({"x": np.zeros((1, 4, 16, 16), np.float32)}, "float32[1, 4, 16, 16]"),
        ({"x": np.zeros((1, 3, 16, 16), np.float64)}, "float64"),
        ({"y": np.zeros((1, 3, 16, 16), np.float32)}, "inputs are x"),
        ({}, "inputs are x"),
    ):
        with pytest.raises(EngineError) as caught:
            one.run(feeds)
        assert says in str(caught.value)


def test_wrong_use_is_told(engine: Engine) -> None:
    with pytest.raises(UsageError, match="unknown mode"):
        runner(engine.path, CPU, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads"):
        runner(engine.path, CPU, threads=0)


def test_another_device_s_engine_is_checked_on_the_cpu_where_there_is_none(
    engine: Engine, feeds: dict[str, np.ndarray]
) -> None:
    from zsq_deploy.backends.openvino.runtime import devices

    one = runner(engine.path, GPU)
    if not any(name.startswith("GPU") for name in devices()):
        assert one.device == "CPU"
        np.testing.assert_array_equal(one.run(feeds)["logits"], runner(engine.path, CPU).run(feeds)["logits"])


def test_a_runner_is_made_from_plain_values(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one = open_runner(str(engine.path), "openvino-cpu", threads=1, mode="engine", session={"NUM_STREAMS": "1"})
    np.testing.assert_array_equal(one.run(feeds)["logits"], runner(engine.path, CPU).run(feeds)["logits"])


def test_an_output_keeps_its_name_behind_an_identity(tmp_path: Path) -> None:
    """A tensor with two names (its own, and the output's) is found under the output's."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["aa_inner"], "relu"),
            helper.make_node("Identity", ["aa_inner"], ["zz_out"], "copy"),
            helper.make_node("Neg", ["aa_inner"], ["bb_out"], "neg"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [
            helper.make_tensor_value_info("zz_out", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("bb_out", TensorProto.FLOAT, ["n", 3]),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "g.onnx").write_bytes(proto.SerializeToString())
    save(convert(Graph(proto)), tmp_path / "g.xml")
    x = noise((2, 3))
    for file, mode in (("g.onnx", "float"), ("g.xml", "engine")):
        got = runner(tmp_path / file, CPU, mode=mode).run({"x": x})  # type: ignore[arg-type]
        assert list(got) == ["zz_out", "bb_out"]
        np.testing.assert_array_equal(got["zz_out"], np.maximum(x, 0))
        np.testing.assert_array_equal(got["bb_out"], -np.maximum(x, 0))
