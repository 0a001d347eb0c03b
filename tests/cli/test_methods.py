"""`zsq methods` and `--method auto`: what is listed, explained and chosen."""

from __future__ import annotations

import pytest
import small

from zsq_deploy.calib.catalogue import facts, method_named
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.recipe import stages
from zsq_deploy.errors import UsageError


def test_all_methods_are_listed_with_what_they_need(zsq):
    said = zsq("methods")
    assert said.code == 0
    for name in METHODS:
        assert f"\n{name} " in said.out
    rows = {row["name"]: row for row in zsq("methods", "--json").json}
    assert set(rows) == set(METHODS)
    assert rows["zeroq"]["needs"] == ["batch norm"]
    assert rows["genie"]["generator"] is True
    assert rows["real"]["needs"] == ["your images"]
    assert rows["gaussian"]["needs"] == []
    assert rows["zeroq"]["measured"], "the table of evidence knows it"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_explained(zsq, name):
    said = zsq("methods", "show", name)
    assert said.code == 0
    known = zsq("methods", "show", name, "--json").json
    assert METHODS[name].paper in said.out
    for parameter in known["parameters"]:
        assert parameter["meaning"], (
            f"{parameter['name']} of {name}: add it to MEANINGS of its module, or to the glossary"
        )
        assert f"  {parameter['name']} " in said.out
        assert parameter["meaning"] in said.out
    method = METHODS[name]
    if method.run is not None:
        parts = stages(method.run(method.defaults))
        assert known["steps"] == sum(part.steps for part in parts)
        assert ("a classifier" in known["needs"]) == any(part.needs_labels for part in parts)
        assert len(known["explanation"]) > 200, "the module's docstring is the explanation"
    assert ":mod:" not in said.out
    assert "``" not in said.out


def test_deviations_are_read_from_the_docstring():
    found = facts(METHODS["genie"]).deviations
    assert len(found) >= 5
    assert found[0].startswith("`steps` is 500 by default")
    assert not any(item.endswith(";") for item in found)
    assert facts(METHODS["gaussian"]).deviations == ()


def test_an_unknown_method_is_refused(zsq):
    said = zsq("methods", "show", "geni")
    assert said.code == 2
    assert "genie" in said.err
    with pytest.raises(UsageError):
        method_named("")


def test_auto_chooses_and_says_why(place, tmp_path, zsq):
    out = tmp_path / "set"
    said = zsq("synth", place.network, "--method", "auto", "--images", 8, "-o", out, "--json")
    assert said.code == 0, said.err
    advice = said.json["recommendation"]
    assert said.json["method"] == advice["method"]
    assert advice["reasons"][0].startswith("measured in w8a8 on ")
    assert {each["method"] for each in advice["candidates"]} <= set(METHODS)
    spoken = zsq("synth", place.network, "--method", "auto", "--images", 8, "-o", out, "--force")
    for reason in advice["reasons"]:
        assert f"auto: {reason}\n" in spoken.out


def test_auto_reaches_the_report_and_the_resolved_recipe(place, tmp_path, zsq):
    out = tmp_path / "out"
    said = zsq(
        "deploy", place.network, "--method", "auto", "--time-limit", 5, "--images", 8, "-o", out, "--no-search", "-q"
    )
    assert said.code == 0, said.err
    calibration = small.read(out / "report.json")["calibration"]
    assert calibration["recommendation"]["method"] == calibration["method"]
    text = (out / "recipe.resolved.yaml").read_text()
    assert f"method: {calibration['method']}" in text
    assert "auto" not in text.partition("calibration:")[2].partition("quantization:")[0]
    assert "chosen by" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (("--method", "auto", "--param", "steps=3"), ("--param", "auto has yet to choose")),
        (("--method", "zeroq", "--time-limit", "9"), ("--time-limit", "--method auto")),
        (("--method", "auto", "--time-limit", "0"), ("time-limit",)),
    ],
)
def test_what_makes_no_sense_with_auto_is_refused(place, tmp_path, zsq, told, words):
    said = zsq("synth", place.network, *told, "-o", tmp_path / "out")
    assert said.code == 2
    for word in words:
        assert word in said.err
    assert not (tmp_path / "out").exists()
