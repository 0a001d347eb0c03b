"""POT configurations: read with comments, checked, turned into recipes for POT or NNCF, and written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsq_deploy.backends.openvino.options import NncfOptions, PotOptions
from zsq_deploy.backends.openvino.pot import jsonc
from zsq_deploy.backends.openvino.pot.config import export_pot_config, import_pot_config, read_pot_config
from zsq_deploy.errors import UsageError
from zsq_deploy.recipe import QuantizationSection

TEMPLATE = """
/* what a team has had in its repository for years */
{
    "model": {
        "model_name": "resnet", // the name
        "model": "models/resnet.xml",
        "weights": "models/resnet.bin", /* "weights": "old.bin", */
    },
    "engine": {"config": "http://example.com//data.yml"},
    "compression": {
        "target_device": "CPU",
        "algorithms": [
            {
                "name": "DefaultQuantization",
                "params": {
                    "preset": "mixed",
                    "stat_subset_size": 300,
                    "ignored": {"scope": ["conv1", "fc"], "operations": [{"type": "Add"}]},
                    "activations": {"range_estimator": {"max": {"aggregator": "mean", "type": "quantile", "outlier_prob": 0.001},
                                                        "min": {"aggregator": "mean", "type": "quantile", "outlier_prob": 0.001}}},
                    "saturation_fix": "first_layer",
                }
            },
        ]
    }
}
"""


def write(folder: Path, config: object, name: str = "pot.json") -> Path:
    path = folder / name
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


def algorithm(name: str = "DefaultQuantization", device: str | None = None, **params: object) -> dict[str, object]:
    compression: dict[str, object] = {"algorithms": [{"name": name, "params": params}]}
    if device:
        compression["target_device"] = device
    return {"compression": compression}


# --- comments ------------------------------------------------------------------------------------------------------------


def test_comments_and_last_commas_are_no_obstacle_and_strings_stay() -> None:
    text = '{"a": "x // y /* z */ ,}", /* one\n two */ "b": [1, 2,], // end\n "c": "quote \\" // still text",}'
    assert jsonc.loads(text, where="here") == {"a": "x // y /* z */ ,}", "b": [1, 2], "c": 'quote " // still text'}


def test_errors_name_the_line_of_the_file_with_its_comments() -> None:
    with pytest.raises(UsageError, match="line 3"):
        jsonc.loads('{ /* a\n b */\n "a" 1}', where="here")


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="'preset' is there twice"):
        jsonc.loads('{"preset": 1, "preset": 2}', where="here")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_plain_json_reads_as_json_does(value: object) -> None:
    assert jsonc.loads(json.dumps(value, indent=1), where="here") == value


# --- import ----------------------------------------------------------------------------------------------------------------


def test_everything_of_a_usual_file_reaches_the_recipe_for_pot(tmp_path: Path) -> None:
    found = import_pot_config(write(tmp_path, TEMPLATE))
    assert found.quantization["quantizer"] == "pot"
    section = found.quantization["pot"]
    assert section["algorithm"] == "DefaultQuantization"
    assert section["preset"] == "mixed"
    assert section["stat_subset_size"] == 300
    assert section["use_fast_bias"] is True
    assert section["ignored"] == ["conv1", "fc"]
    assert section["ignored_types"] == ["Add"]
    assert section["config"]["target_device"] == "CPU"
    assert section["config"]["saturation_fix"] == "first_layer"
    assert section["config"]["activations"]["range_estimator"]["max"]["outlier_prob"] == 0.001
    assert found.model == "models/resnet.xml"
    assert set(found.dropped) == {"engine", "model.model_name", "model.weights"}
    assert all(found.dropped.values())
    assert any("--model" in note for note in found.notes)
    QuantizationSection(**found.quantization)  # the recipe takes it
    PotOptions(**section)


def test_the_same_file_in_nncfs_words(tmp_path: Path) -> None:
    found = import_pot_config(write(tmp_path, TEMPLATE), quantizer="nncf")
    assert found.quantization == {
        "quantizer": "nncf",
        "nncf": {
            "preset": "mixed",
            "fast_bias_correction": True,
            "subset_size": 300,
            "target_device": "CPU",
            "ignored_names": ["conv1", "fc"],
            "ignored_types": ["Add"],
            "overflow_fix": "first_layer_only",
            "activations_range": "mean_quantile",
            "range_quantile": 0.001,
        },
    }
    QuantizationSection(**found.quantization)
    NncfOptions(**found.quantization["nncf"])


def test_accuracy_aware_quantization_becomes_accuracy_control(tmp_path: Path) -> None:
    config = algorithm(
        "AccuracyAwareQuantization",
        maximal_drop=0.005,
        drop_type="relative",
        max_iter_num=7,
        ranking_subset_size=40,
        tune_hyperparams=True,
        metric_subset_ratio=0.5,
        convert_to_mixed_preset=True,
    )
    section = import_pot_config(write(tmp_path, config), quantizer="nncf")
    assert (
        section.quantization["nncf"]
        | {
            "accuracy_control": True,
            "max_drop": 0.005,
            "drop_type": "relative",
            "max_iterations": 7,
            "ranking_subset_size": 40,
            "tune_parameters": True,
        }
        == section.quantization["nncf"]
    )
    assert {"metric_subset_ratio", "convert_to_mixed_preset"} <= set(section.dropped)
    own = import_pot_config(write(tmp_path, config)).quantization["pot"]
    assert own["algorithm"] == "AccuracyAwareQuantization"
    assert own["max_drop"] == 0.005
    assert own["config"]["ranking_subset_size"] == 40


def test_what_nncf_has_no_word_for_is_listed_with_the_reason(tmp_path: Path) -> None:
    config = algorithm(
        preset="accuracy",
        device="GNA",
        shuffle_data=True,
        use_layerwise_tuning=True,
        threshold=10,
        weights={"bits": 4, "mode": "asymmetric"},
        ignored={"operations": [{"type": "Convolution", "attributes": {"group": 1}}]},
    )
    found = import_pot_config(write(tmp_path, config), quantizer="nncf")
    told = " ".join(found.dropped)
    for key in (
        "GNA",
        "shuffle_data",
        "use_layerwise_tuning",
        "threshold",
        "weights.bits",
        "weights.mode",
        "Convolution",
    ):
        assert key in told
    assert found.quantization["nncf"]["preset"] == "mixed"
    assert "ignored_types" not in found.quantization["nncf"] or found.quantization["nncf"]["ignored_types"] == []


def test_the_parts_of_default_quantization_are_default_quantization(tmp_path: Path) -> None:
    parts = [
        {"name": "ActivationChannelAlignment", "params": {"stat_subset_size": 100}},
        {"name": "MinMaxQuantization", "params": {"preset": "symmetric", "stat_subset_size": 200}},
        {"name": "BiasCorrection", "params": {"stat_subset_size": 200}},
    ]
    section = import_pot_config(write(tmp_path, {"compression": {"algorithms": parts}})).quantization["pot"]
    assert section["algorithm"] == "DefaultQuantization"
    assert section["preset"] == "performance"
    assert section["stat_subset_size"] == 200
    assert section["use_fast_bias"] is False


def test_yaml_is_read_as_pot_reads_it(tmp_path: Path) -> None:
    text = "compression:\n  algorithms:\n    - name: DefaultQuantization\n      params: {preset: mixed}\n"
    assert import_pot_config(write(tmp_path, text, "pot.yml")).quantization["pot"]["preset"] == "mixed"


# --- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said", "meant"),
    [
        (algorithm("DefaultQuantisation"), "no algorithm 'DefaultQuantisation'", "'DefaultQuantization'"),
        (algorithm(prest="mixed"), "prest", "preset"),
        (algorithm(weights={"range_estimator": {"max": {"aggregator": "mean"}}}), "weights.range_estimator.max.aggregator", ""),
        (algorithm(maximal_drop=0.1), "maximal_drop", ""),
        (algorithm("DataFreeQuantization"), "no get_op_nodes", "bn-analytic"),
        (algorithm("WeightSparsity"), "sparse", "DefaultQuantization"),
        (algorithm(preset="fast"), "preset is one of", ""),
        (algorithm(stat_subset_size=0), "stat_subset_size is a number of images", ""),
        (algorithm(ignored={"scope": "conv1"}), "ignored is", ""),
        ({"compresion": {}}, "'compresion'", "'compression'"),
        ({"compression": {"algorithm": []}}, "'algorithm'", "'algorithms'"),
        ({"compression": {"algorithms": []}}, "list of objects", "DefaultQuantization"),
        ({"model": {}}, "no section 'compression'", "algorithms"),
        ([], "a JSON object", ""),
        ("{", "not JSON", ""),
    ],
)  # fmt: skip
def test_one_clear_error(tmp_path: Path, config: object, said: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        import_pot_config(write(tmp_path, config))
    assert said in caught.value.what
    assert meant in (caught.value.remedy or "")
    assert "pot.json" in (caught.value.where or "")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_pot_config(tmp_path / "none.json")
    with pytest.raises(UsageError, match="folder or a binary"):
        read_pot_config(tmp_path)


# --- and back --------------------------------------------------------------------------------------------------------------


def test_a_recipe_for_pot_survives_the_way_out_and_back(tmp_path: Path) -> None:
    first = import_pot_config(write(tmp_path, TEMPLATE))
    out = export_pot_config(first.quantization, model="models/resnet.xml")
    again = import_pot_config(write(tmp_path, out.text))
    assert again.quantization == first.quantization
    assert not out.dropped
    original = jsonc.loads(TEMPLATE, where="here")["compression"]
    original["algorithms"][0]["params"]["use_fast_bias"] = True  # POT's default, written out
    assert out.config["compression"] == original


names = st.lists(st.text("abc/_.", min_size=1, max_size=8), max_size=3, unique=True)
sections = st.fixed_dictionaries(
    {
        "algorithm": st.sampled_from(["DefaultQuantization", "AccuracyAwareQuantization"]),
        "preset": st.sampled_from(["performance", "mixed", "accuracy"]),
        "stat_subset_size": st.none() | st.integers(1, 1000),
        "use_fast_bias": st.booleans(),
        "max_drop": st.floats(0, 1),
        "ignored": names,
        "ignored_types": st.lists(st.sampled_from(["Add", "MatMul", "Convolution"]), unique=True),
        "config": st.fixed_dictionaries(
            {}, optional={"saturation_fix": st.sampled_from(["no", "all"]), "model_type": st.just("transformer")}
        ),
    }
)


@given(sections)
def test_any_section_for_pot_survives(tmp_path_factory: pytest.TempPathFactory, section: dict[str, object]) -> None:
    out = export_pot_config({"quantizer": "pot", "pot": section})
    found = import_pot_config(write(tmp_path_factory.mktemp("pot"), out.text)).quantization["pot"]
    expected = {**section, "config": {"target_device": "ANY", **section["config"]}}  # type: ignore[dict-item]
    if section["algorithm"] == "DefaultQuantization":
        expected.pop("max_drop")
    assert found == expected


@given(
    st.fixed_dictionaries(
        {
            "preset": st.sampled_from(["performance", "mixed"]),
            "fast_bias_correction": st.booleans(),
            "subset_size": st.integers(1, 1000),
            "target_device": st.sampled_from(["ANY", "CPU", "GPU", "NPU"]),
            "activations_range": st.sampled_from(["minmax", "mean_minmax", "median_minmax", "mean_no_outliers_minmax"]),
        },
        optional={
            "ignored_names": names.filter(bool),
            "ignored_types": st.just(["Add"]),
            "overflow_fix": st.sampled_from(["disable", "enable", "first_layer_only"]),
            "model_type": st.just("transformer"),
        },
    )
)
def test_any_section_for_nncf_survives(tmp_path_factory: pytest.TempPathFactory, section: dict[str, object]) -> None:
    out = export_pot_config({"quantizer": "nncf", "nncf": section})
    assert not out.dropped
    path = write(tmp_path_factory.mktemp("pot"), out.text)
    assert import_pot_config(path, quantizer="nncf").quantization["nncf"] == section


def test_what_pot_has_no_word_for_is_listed(tmp_path: Path) -> None:
    section = {
        "ignored_patterns": ["conv.*"],
        "smooth_quant_alpha": 0.9,
        "target_device": "CPU_SPR",
        "bias_correction": False,
    }
    out = export_pot_config({"quantizer": "nncf", "nncf": section})
    assert {"ignored_patterns", "smooth_quant_alpha", "target_device: CPU_SPR", "bias_correction: false"} == set(
        out.dropped
    )
    assert out.config["compression"]["target_device"] == "CPU"
    with pytest.raises(UsageError, match="'qdq' has no POT configuration"):
        export_pot_config({"quantizer": "qdq"})
