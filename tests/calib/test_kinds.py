"""Every method on every kind of network: valid inputs come out, or an error says why not, and what it advises works."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.calib.fitting import fitting
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import CalibrationError, ModelError
from zsq_deploy.model import Model, load_model

from . import kinds

MADE = [name for name, method in METHODS.items() if method.images]
GUIDED = {name for name in MADE if METHODS[name].needs_bn}
UNLABELLED = {"zeroq", "genie", "dsg", "dgh", "fast"}
VECTORS = {"zeroq", "dsg", "hast"}
NOISE = {"gaussian", "uniform", "ones"}
PICTURES = {*NOISE, "fractal"}

WORKS: dict[str, set[str]] = {
    **dict.fromkeys(kinds.KINDS, GUIDED | PICTURES),
    **dict.fromkeys(("detector", "denoiser", "super-resolution", "u-net", "one score"), UNLABELLED | PICTURES),
    **dict.fromkeys(("perceptron", "video", "sound"), VECTORS | NOISE),
    "two images": PICTURES,
    "image and vector": NOISE,
    "grouped": GUIDED | NOISE,
    "4 x 4": (GUIDED - {"texq"}) | PICTURES,
    "tokens": {"ones"},
    "vectors without norm": NOISE,
}
"""Kind -> methods that make inputs for it; the others refuse it."""

PICTURES_INSTEAD = ("folded", "group norm")
"""Networks without batch norm: every method that needs it makes pictures instead, and says so."""


def quick(method: str) -> dict[str, Any]:
    """Two steps of everything."""
    defaults = METHODS[method].defaults
    few = {name: 2 for name in defaults if name.endswith("steps")}
    few |= {name: value for name, value in (("warmup", 1), ("latent", 8)) if name in defaults}
    return few


def plain_vectors() -> Any:
    net = kinds.Net({"vector": (12,)})
    value = net.op("Relu", net.op("MatMul", "vector", net.weight(12, 16, kind="MatMul")))
    return net.model((net.op("MatMul", value, net.weight(16, 4, kind="MatMul")), [4]))


BUILD = {**kinds.KINDS, "vectors without norm": plain_vectors}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for number, (kind, make) in enumerate(BUILD.items()):
        file = folder / f"{number}.onnx"
        file.write_bytes(make().SerializeToString())
        found[kind] = load_model(file)
    return found


@pytest.mark.parametrize("method", MADE)
@pytest.mark.parametrize("kind", WORKS)
def test_valid_inputs_or_a_reason(kind: str, method: str, networks: dict[str, Model]) -> None:
    model = networks[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if method not in WORKS[kind]:
            with pytest.raises(CalibrationError) as refused:
                synthesize(model, method=method, images=3, parameters=quick(method), device="cpu")
            error = refused.value
            assert error.where in {model.name, *(spec.name for spec in model.inputs)}
            assert error.remedy
            advised = {word for word in re.findall(r"[a-z-]+", error.remedy) if word in METHODS and word != "real"}
            assert advised <= WORKS[kind]
            assert advised or "CalibrationSet" in error.remedy
            return
        made = synthesize(model, method=method, images=3, parameters=quick(method), device="cpu")
    assert len(made) == 3
    arrays = made.arrays()
    assert set(arrays) == {spec.name for spec in model.inputs}
    for spec in model.inputs:
        values = arrays[spec.name]
        assert values.shape == spec.with_batch(3)
        assert values.dtype == spec.dtype
        assert np.isfinite(values).all()
        if method != "ones":
            assert values.std() > 0.05
        if method not in ("gaussian", "ones") and len(spec.shape) == 4 and spec.shape[1] in (1, 3):
            assert values.min() >= 0  # the pixels of a network without --mean and --std
            assert values.max() <= 1
    if kind in PICTURES_INSTEAD and method in GUIDED:
        assert made.manifest.method == "fractal"
        assert made.manifest.parameters["requested_method"] == method
        assert "no batch-norm statistics" in made.manifest.notes[0]
    else:
        assert made.manifest.method == method
    made.check_fits(model)


@pytest.mark.parametrize("kind", WORKS)
def test_what_is_advised_is_what_works(kind: str, networks: dict[str, Model]) -> None:
    expected = WORKS[kind] - {"ones"}
    if kind in PICTURES_INSTEAD:
        expected -= GUIDED
    # Laws' filters are larger than 4 x 4 pixels: only texq itself knows
    assert set(fitting(networks[kind])) - ({"texq"} if kind == "4 x 4" else set()) == expected


@pytest.mark.parametrize("kind", ["tokens", "image and vector"])
def test_own_inputs_as_the_remedy_says(kind: str, networks: dict[str, Model], tmp_path: Path) -> None:
    model, rng = networks[kind], np.random.default_rng(0)
    own = {
        spec.name: rng.integers(0, 50, spec.with_batch(9)).astype(spec.dtype)
        if spec.dtype.kind == "i"
        else rng.random(spec.with_batch(9), np.float32)
        for spec in model.inputs
    }
    CalibrationSet.from_arrays(own, CalibrationManifest.of(model, method="real")).save(tmp_path / "own")
    back = CalibrationSet.open(tmp_path / "own")
    back.check_fits(model)
    for name, array in back.arrays().items():
        assert np.array_equal(array, own[name])


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("c3", lambda array: np.where(np.arange(array.size) == 2, np.nan, array), "NaN"),
        ("c4", lambda array: np.where(np.arange(array.size) == 2, -1.0, array), "negative"),
        ("c4", lambda array: np.where(np.arange(array.size) == 2, np.inf, array), "inf"),
    ],
)
def test_statistics_that_are_no_numbers_are_refused(name: str, change: Any, word: str, tmp_path: Path) -> None:
    """Constants of the first batch norm: c0 are the weights in front of it, c1 its gain, c2 its shift, c3 mean, c4 variance."""
    proto = kinds.KINDS["classifier"]()
    held = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    held.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(held)).astype(np.float32), name))
    file = tmp_path / "net.onnx"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=word) as refused:
        load_model(file)
    assert name in str(refused.value)
    assert refused.value.remedy
