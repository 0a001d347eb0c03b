"""Recipes: what is written is what is read, and every mistake is named with its line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from zsq_deploy.backends.openvino.options import NncfOptions, PotOptions
from zsq_deploy.errors import UsageError
from zsq_deploy.recipe import GatesSection, NncfSection, PotSection, Recipe, describe, parse_shape
from zsq_deploy.verify.gates import Gates

FULL = """
model:
  source: nets.small:build
  path: code
  weights: weights/small.safetensors
  input_shape: 1x3x32x32
  mean: 0.485, 0.456, 0.406
  std: [0.229, 0.224, 0.225]
calibration:
  method: genie
  images: 128
  parameters: {steps: 500, lr: 0.1}
  device: cpu
  holdout: 32
quantization:
  bits: w8a8
  ranges: percentile
  bias_correction: false
  exclude: [/head/Gemm]
  op_types: Conv,Gemm
  search: no
targets: [ort-x86-vnni, ort-arm64]
verification:
  eval_data: ../data/test.npz
  limit: 1000
  gates:
    min_agreement: 0.995
    min_speedup: 2
run:
  threads: 2
  seed: 7
  output: out
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_everything_is_read(tmp_path):
    recipe = Recipe.load(write(tmp_path, FULL))
    assert recipe.model.source == "nets.small:build"
    assert recipe.model.input_shape == (1, 3, 32, 32)
    assert recipe.model.mean == (0.485, 0.456, 0.406)
    assert recipe.model.std == (0.229, 0.224, 0.225)
    assert recipe.calibration.parameters == {"steps": 500, "lr": 0.1}
    assert recipe.quantization.op_types == ("Conv", "Gemm")
    assert recipe.quantization.search is False
    assert recipe.targets == ("ort-x86-vnni", "ort-arm64")
    assert recipe.verification.gates.min_agreement == 0.995
    assert recipe.run.seed == 7


def test_paths_count_from_the_recipe(tmp_path):
    recipe = Recipe.load(write(tmp_path, FULL))
    assert recipe.model.path == str(tmp_path / "code")
    assert recipe.model.weights == str(tmp_path / "weights" / "small.safetensors")
    assert recipe.verification.eval_data == str(tmp_path / ".." / "data" / "test.npz")
    assert recipe.run.output == str(tmp_path / "out")
    assert Recipe.load(write(tmp_path, "model: {source: a.onnx}")).model.source == str(tmp_path / "a.onnx")
    assert Recipe.load(write(tmp_path, "model: {source: /abs/a.pt2}")).model.source == "/abs/a.pt2"
    assert Recipe.load(write(tmp_path, "model: {source: 'timm:resnet18'}")).model.source == "timm:resnet18"


def test_the_smallest_recipe_has_the_defaults_of_the_command_line(tmp_path):
    recipe = Recipe.load(write(tmp_path, "model: {source: a.onnx}"))
    assert (recipe.calibration.method, recipe.calibration.images) == ("zeroq", 256)
    assert recipe.quantization.bits == "w8a8"
    assert recipe.targets == ("ort-x86-vnni",)
    assert recipe.run.seed == 0
    assert recipe.verification.gates == GatesSection()


def test_resolved_says_everything_and_gives_the_same_recipe_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(write(tmp_path, FULL)).resolved()
    assert recipe.calibration.seed == 7
    assert recipe.verification.eval_data == str(tmp_path.parent / "data" / "test.npz")
    elsewhere = tmp_path / "deep" / "er"
    elsewhere.mkdir(parents=True)
    recipe.dump(elsewhere / "recipe.resolved.yaml")
    again = Recipe.load(elsewhere / "recipe.resolved.yaml")
    assert again == recipe
    assert again.resolved() == recipe
    assert again.digest == recipe.digest
    assert Recipe.of({"model": {"source": "a.onnx"}}).resolved().model.source == str(tmp_path / "a.onnx")
    assert Recipe.of({"model": {"source": "a.onnx"}}).resolved().run.threads == 1


names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12).filter(
    lambda text: "," not in text
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=names.map(lambda n: f"timm:{n}"),
    method=names,
    seed=st.none() | st.integers(0, 2**40),
    images=st.integers(1, 10**6),
    parameters=st.dictionaries(
        names, st.none() | st.booleans() | st.integers() | st.floats(-1e6, 1e6) | names, max_size=4
    ),
    shape=st.none() | st.lists(st.integers(1, 999), min_size=1, max_size=5),
    mean=st.none() | st.lists(st.floats(1e-6, 10), min_size=1, max_size=4),
    exclude=st.lists(names, max_size=3),
    targets=st.lists(names, min_size=1, max_size=3, unique=True),
    agreement=st.none() | st.floats(0, 1),
)
def test_what_is_dumped_is_loaded(
    tmp_path, source, method, seed, images, parameters, shape, mean, exclude, targets, agreement
):
    recipe = Recipe.of(
        {
            "model": {"source": source, "input_shape": shape, "mean": mean, "std": mean},
            "calibration": {"method": method, "seed": seed, "images": images, "parameters": parameters},
            "quantization": {"exclude": exclude},
            "targets": targets,
            "verification": {"gates": {"min_agreement": agreement}},
        }
    )
    recipe.dump(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {source: a.onnx}\ncalibration:\n  metod: zeroq\n",
            ["'calibration.metod' (line 3)", "calibration.method?"],
        ),
        ("model: {source: a.onnx}\ncalibraton: {}\n", ["'calibraton' (line 2)", "did you mean calibration?"]),
        (
            "model:\n  source: a.onnx\n  images: 5\n",
            ["'model.images' (line 3)", "belongs to another section: calibration.images"],
        ),
        (
            "model: {source: a.onnx}\nmin-agreement: 0.9\n",
            ["'min-agreement' (line 2)", "verification.gates.min_agreement"],
        ),
        (
            "model: {source: a.onnx}\nverification: {gates: {min-speedup: 2}}\n",
            ["min-speedup", "did you mean verification.gates.min_speedup?"],
        ),
        ("model: {source: a.onnx}\nrun: {colour: red}\n", ["'run.colour'", "run knows threads, seed, output"]),
        ("calibration: {images: 5}\n", ["'model' is missing"]),
        ("model: {path: x}\n", ["'model.source' is missing"]),
        ("model: {source: a.onnx}\ncalibration:\n  images: many\n", ["calibration.images (line 3)", "'many'"]),
        ("model: {source: a.onnx}\ncalibration: {images: 0}\n", ["greater than 0", "not 0"]),
        ("model: {source: a.onnx, mean: [0.5]}\n", ["mean and std go together"]),
        ("model: {source: a.onnx, mean: [0.5], std: [0.5], raw_pixels: true}\n", ["raw_pixels excludes"]),
        ("model: {source: a.onnx, mean: [0.5, 0.5], std: [0.5]}\n", ["mean has 2 values and std has 1"]),
        ("model: {source: a.onnx, mean: [0.5], std: [0]}\n", ["above 0"]),
        ("model: {source: a.onnx, mean: [.nan], std: [1]}\n", ["model.mean", "finite"]),
        ("model: {source: a.onnx, input_shape: 1x3xWx32}\n", ["model.input_shape (line 1)", "1x3x224x224"]),
        ("model: {source: a.onnx, input_shape: [1, 3, -1]}\n", ["model.input_shape", "greater than 0"]),
        ("model: {source: a.onnx}\nquantization: {bits: int8}\n", ["quantization.bits", "int8", "w8a8"]),
        ("model: {source: a.onnx}\ntargets: []\n", ["targets (line 2)", "at least 1"]),
        ("model: {source: a.onnx}\ntargets: [a, a]\n", ["named twice"]),
        (
            "model: {source: a.onnx}\nverification: {gates: {min_agreement: 99.5}}\n",
            ["less than or equal to 1", "0.995"],
        ),
        ("model: a.onnx\n", ["model (line 1)"]),
        ("", ["empty", "source: network.onnx"]),
        ("- a\n- b\n", ["no mapping"]),
        ("model:\n  source: 'a.onnx\n", ["not YAML", "line 3"]),
        ("model:\n\tsource: a.onnx\n", ["not YAML", "line 2, column 1"]),
        ("model: {source: a.onnx}\nrun: {seed: 1}\nrun: {seed: 2}\n", ["run is given twice", "lines 2 and 3"]),
        ("model: !!python/object/apply:os.system ['true']\n", ["not YAML", "could not determine a constructor"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        Recipe.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert caught.value.remedy
    for part in expected:
        assert part in message


def test_several_mistakes_are_named_at_once(tmp_path):
    path = write(tmp_path, "model: {source: a.onnx, wieghts: w.pt}\ncalibration: {images: -3}\n")
    with pytest.raises(UsageError) as caught:
        Recipe.load(path)
    assert "model.weights?" in str(caught.value)
    assert "-3" in str(caught.value)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(UsageError, match="no such recipe"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.load(tmp_path / "b.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.load(tmp_path)


def test_replace_checks_again():
    recipe = Recipe.of({"model": {"source": "a.onnx"}})
    changed = recipe.replace(
        {"calibration.method": "genie", "targets": ["ort-arm64"], "verification.gates.min_speedup": 2}
    )
    assert changed.calibration.method == "genie"
    assert changed.targets == ("ort-arm64",)
    assert changed.verification.gates.min_speedup == 2
    assert recipe.calibration.method == "zeroq"
    with pytest.raises(UsageError, match="greater than 0"):
        recipe.replace({"calibration.images": 0})
    with pytest.raises(UsageError, match=r"calibration\.methd"):
        recipe.replace({"calibration.methd": "genie"})
    with pytest.raises(UsageError, match=r"no 'calibratio\.method'"):
        recipe.replace({"calibratio.method": "genie"})


def test_recipes_do_not_change():
    recipe = Recipe.of({"model": {"source": "a.onnx"}})
    with pytest.raises(ValidationError):
        recipe.run.seed = 1  # type: ignore[misc]


def test_digest_is_about_the_result():
    recipe = Recipe.of({"model": {"source": "a.onnx"}})
    same = recipe.replace({"run.output": "x", "run.threads": 4, "calibration.seed": 0})
    assert recipe.digest == same.digest
    for change in ({"run.seed": 1}, {"calibration.images": 1}, {"model.source": "b.onnx"}, {"targets": ["b"]}):
        assert recipe.replace(change).digest != recipe.digest


def test_shapes():
    assert parse_shape("1x3x224x224") == (1, 3, 224, 224)
    assert parse_shape(" 1X3 ") == (1, 3)
    for bad in ("", "1x", "axb", "1x-3", "0x3", "1.5x2"):
        with pytest.raises(ValueError, match="is no shape"):
            parse_shape(bad)
    several = Recipe.of({"model": {"source": "a.onnx", "input_shape": {"a": "1x3", "b": [2, 4]}}})
    assert several.model.input_shape == {"a": (1, 3), "b": (2, 4)}


def test_every_word_is_described():
    described = describe()
    assert len(described) > 30
    for field in described:
        assert field.description.endswith(".") or field.description.endswith(".)"), field
        assert len(field.description) > 10
    words = {field.name: field.default for field in described}
    assert words["model.source"] == "required"
    assert words["calibration.images"] == "256"
    assert words["targets"] == "ort-x86-vnni"
    assert words["quantization.search"] == "true"
    dumped = yaml.safe_load(FULL)

    def leaves(values: dict, prefix: str = "") -> list[str]:
        return [
            leaf
            for key, value in values.items()
            for leaf in (
                leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and key != "parameters" else [prefix + key]
            )
        ]

    assert set(leaves(dumped)) <= set(words)


@pytest.mark.parametrize(("section", "options"), [(NncfSection, NncfOptions), (PotSection, PotOptions)])
def test_what_vendors_are_told_is_what_their_backend_knows(section, options):
    assert list(section.model_fields) == [field.name for field in fields(options)]
    told = section().model_dump()
    for field in fields(options):
        assert told[field.name] == getattr(options(), field.name), field.name
    assert options(**told) == options()


def recipe_of(**quantization):
    return Recipe.of({"model": {"source": "a.onnx"}, "targets": ["openvino-cpu"], "quantization": quantization})


def test_a_null_that_differs_from_the_default_is_written(tmp_path):
    recipe = recipe_of(nncf={"preset": None, "activations_range": None})
    recipe.dump(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml").quantization == recipe.quantization
    assert recipe.quantization.nncf.preset is None


def test_only_sections_that_are_read_are_written():
    assert set(yaml.safe_load(recipe_of().to_yaml())["quantization"]) & {"nncf", "pot"} == {"nncf"}
    assert set(yaml.safe_load(recipe_of(quantizer="pot").to_yaml())["quantization"]) & {"nncf", "pot"} == {"pot"}
    assert set(yaml.safe_load(recipe_of(quantizer="qdq").to_yaml())["quantization"]) & {"nncf", "pot"} == set()


def test_pots_own_words_may_be_null(tmp_path):
    recipe = recipe_of(quantizer="pot", pot={"config": {"activations": {"range_estimator": None}}})
    recipe.dump(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml").quantization.pot.config == {"activations": {"range_estimator": None}}


def test_paths_of_quantization_count_from_the_recipe(tmp_path):
    text = """
model: {source: a.onnx}
targets: [openvino-cpu]
quantization:
  quantizer: pot
  validation_data: data/held.npz
  pot: {config_path: pot.json, algorithm: AccuracyAwareQuantization}
"""
    spec = Recipe.load(write(tmp_path, text)).quantization
    assert spec.validation_data == str(tmp_path / "data" / "held.npz")
    assert spec.pot.config_path == str(tmp_path / "pot.json")


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quantizer": "qdq", "nncf": {"preset": "performance"}}, "does not read it"),
        ({"quantizer": "nncf", "pot": {"preset": "performance"}}, "does not read it"),
        ({"pot": {"preset": "performance"}}, "does not read it"),
        ({"validation_data": "x.npz"}, "accuracy control"),
        ({"quantizer": "pot", "validation_data": "x.npz"}, "accuracy control"),
        ({"quantizer": "nncf", "ranges": "entropy"}, "finds ranges itself"),
        ({"quantizer": "tensorrt"}, "'auto', 'qdq', 'nncf', 'pot' or 'implicit'"),
        ({"nncf": {"prest": "mixed"}}, r"no 'quantization\.nncf\.prest'"),
        ({"nncf": {"range_quantile": 0.7}}, r"quantization\.nncf\.range_quantile"),
        ({"nncf": {"max_drop": -1}}, r"quantization\.nncf\.max_drop"),
        ({"compress_weights": "int3"}, r"quantization\.compress_weights"),
    ],
)
def test_mistakes_about_quantizers(quantization, expected):
    with pytest.raises(UsageError, match=expected):
        recipe_of(**quantization)


def test_accuracy_control_is_that_of_the_chosen_quantizer():
    assert not recipe_of().quantization.accuracy_control
    assert recipe_of(nncf={"accuracy_control": True}).quantization.accuracy_control
    assert recipe_of(quantizer="pot", pot={"algorithm": "AccuracyAwareQuantization"}).quantization.accuracy_control


def test_gates_are_those_that_are_checked():
    assert list(GatesSection.model_fields) == [field.name for field in fields(Gates)]
