"""The integer reference of whole OpenVINO engines: equal to the engine bit for bit, walked tensor by tensor, honest about bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openvino")

from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.openvino.integer import IntegerReference
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.quantizer import build
from zsq_deploy.backends.openvino.runner import runner
from zsq_deploy.errors import DataError, EngineError
from zsq_deploy.model import Graph, Preprocess, Twin, load_model
from zsq_deploy.verify import fused_codes, walk_fused

from .openvino_engines import noise
from .ort_engines import convnet, loaded, ranges_of, transformer

CPU = get_target("openvino-cpu")


def made(network: object, feeds: dict[str, np.ndarray], folder: Path, *, exact: bool) -> Engine:
    model = loaded(network, folder / "model")
    options = BuildOptions(quantizer="qdq", exact_scales=exact)
    return build(model, ranges_of(model, feeds), CPU, folder / "engine", options=options)


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"x": noise((8, 3, 16, 16))}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, feeds: dict[str, np.ndarray]) -> Engine:
    return made(convnet(), feeds, tmp_path_factory.mktemp("engine"), exact=True)


def fetch_twin(engine: Engine) -> object:
    twin = Twin(Graph.load(engine.qdq_path), dtype=torch.float64, device="cpu")

    def fetch(feeds: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            given = {name: torch.tensor(value, dtype=torch.float64) for name, value in feeds.items()}
            return {name: value.numpy() for name, value in twin.run(given, fetch=list(names)).items()}

    return fetch


def same(engine: Engine, feeds: dict[str, np.ndarray], reference: IntegerReference) -> None:
    theirs, ours = runner(engine.path, engine.target).run(feeds), reference.run(feeds)
    assert set(theirs) == set(ours)
    for name, array in theirs.items():
        assert array.dtype == ours[name].dtype
        np.testing.assert_array_equal(array, ours[name])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("network", [convnet, transformer])
def test_outputs_are_the_engines_bit_for_bit(
    network: object, exact: bool, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model = network()  # type: ignore[operator]
    shape = [size.dim_value or 8 for size in model.graph.input[0].type.tensor_type.shape.dim]
    given = {model.graph.input[0].name: noise(tuple(shape))} if shape[1:] != [3, 16, 16] else feeds
    engine = made(model, given, tmp_path, exact=exact)
    same(engine, given, IntegerReference(engine))


def test_batches_of_any_size_give_the_same_numbers(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    reference = get_backend(CPU).integer_reference(engine)
    together = reference.run(feeds)
    for index in range(3):
        alone = reference.run({"x": feeds["x"][index : index + 1]})
        for name, array in alone.items():
            np.testing.assert_array_equal(array, together[name][index : index + 1])


def test_codes_are_found_again_by_name_and_equal_the_twin(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    reference = IntegerReference(engine)
    pairs = fused_codes(reference.graph, Graph.load(engine.qdq_path))
    assert len(pairs) >= 3
    divergence = walk_fused([feeds], reference, Graph.load(engine.qdq_path), fetch_twin(engine))
    assert divergence is not None
    assert divergence.first is None


def test_fetching_gives_codes_and_refuses_unknown_names(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    reference = IntegerReference(engine)
    name = next(iter(fused_codes(reference.graph, Graph.load(engine.qdq_path)).values()))
    assert reference.run(feeds, [name])[name].dtype == np.uint8
    assert set(reference.intermediates(feeds)) >= {name}
    with pytest.raises(EngineError, match="no value"):
        reference.run(feeds, ["nobody"])
    with pytest.raises(DataError, match="no data for input"):
        reference.run({})


def test_threads_do_not_change_a_bit(engine: Engine, feeds: dict[str, np.ndarray]) -> None:
    one, two = (IntegerReference(engine, threads=threads).run(feeds) for threads in (1, 2))
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])


def test_a_file_that_is_no_model_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "engine.xml"
    path.write_text("nothing")
    with pytest.raises(EngineError):
        IntegerReference(path)


@pytest.mark.assets
@pytest.mark.parametrize("exact", [True, False])
def test_resnet20_on_real_images(assets: Path, exact: bool, tmp_path: Path) -> None:
    preprocess = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    model = load_model(assets / "models" / "resnet20_cifar10.onnx", preprocess=preprocess)
    images = np.load(assets / "data" / "cifar10_test.npz")["x"][:50]
    name = model.graph.inputs[0].name
    x = preprocess.apply(images)
    options = BuildOptions(quantizer="qdq", exact_scales=exact)
    engine = build(model, ranges_of(model, {name: x[:8]}), CPU, tmp_path / "engine", options=options)
    reference = IntegerReference(engine)
    assert not reference.float_nodes
    same(engine, {name: x}, reference)
    divergence = walk_fused([{name: x[:10]}], reference, Graph.load(engine.qdq_path), fetch_twin(engine))
    assert divergence is not None
    if exact:
        assert divergence.first is None
