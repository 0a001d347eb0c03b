"""report.json: its keys, its round trip, its documentation, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import jsonschema
import pytest

from zsq_deploy import docs
from zsq_deploy.artifact import write_json
from zsq_deploy.errors import StaleArtifactError, ZsqError
from zsq_deploy.report import describe
from zsq_deploy.report.schema import Report, json_schema, load, parse, save

sys.path.insert(0, str(Path(__file__).parent))
import sample

# The keys that programs rely on: renaming one of them is a new schema version.
STABLE = {
    "calibration": ["method", "images", "seconds", "peak_rss_bytes"],
    "targets.*.engine": ["path", "bytes"],
    "targets.*.integer": ["macs_share"],
    "targets.*.parity": ["top1_agreement", "within_2_lsb", "max_lsb", "mean_lsb", "sqnr_db"],
    "targets.*.parity.integer": ["equal_share", "max_lsb"],
    "targets.*.accuracy": ["float", "reference", "engine", "images"],
    **{
        f"targets.*.latency.{form}": ["median_ms", "p90_ms", "p95_ms", "p99_ms", "iqr_ms", "first_ms", "load_ms"]
        for form in ("engine", "float32", "float_best")
    },
    "targets.*.latency": ["speedup"],
}


@pytest.fixture(scope="module")
def value():
    return sample.report(targets=2).to_json()


def at(value, path):
    for key in path.split("."):
        value = value["ort-x86-vnni" if key == "*" else key]
    return value


@pytest.mark.parametrize("place", STABLE)
def test_the_stable_keys_are_there_and_measured(value, place):
    for key in STABLE[place]:
        assert at(value, place)[key] is not None, f"{place}.{key}"


def test_the_schema_version_is_one(value):
    assert value["schema_version"] == 1


def test_round_trip_through_a_file(value, tmp_path):
    report = parse(value)
    save(report, tmp_path / "report.json")
    assert load(tmp_path / "report.json") == report
    assert load(tmp_path / "report.json").to_json() == value


def test_the_json_schema_accepts_what_is_written_and_refuses_what_is_not(value):
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    validator.validate(value)
    broken = copy.deepcopy(value)
    broken["targets"]["ort-x86-vnni"]["integer"]["macs_share"] = 1.5
    assert not validator.is_valid(broken)
    broken = copy.deepcopy(value)
    broken["calibration"]["typo"] = 1
    assert not validator.is_valid(broken)


def test_every_field_is_described():
    def walk(model, seen):
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            section = describe._section(field.annotation)
            if section is not None and section not in seen:
                seen.add(section)
                walk(section, seen)
        return seen

    assert len(walk(Report, {Report})) > 25


def test_the_documentation_is_what_the_schema_says():
    """If this fails: python -m zsq_deploy.report.describe zsq_deploy/docs"""
    folder = Path(docs.__file__).parent
    assert (folder / "report.md").read_text(encoding="utf-8") == describe.markdown()
    assert json.loads((folder / "report.schema.json").read_text(encoding="utf-8")) == json_schema()


def test_the_documentation_names_every_stable_key():
    text = describe.markdown()
    for keys in STABLE.values():
        for key in keys:
            assert f"| `{key}` |" in text
    assert "Keys as in `targets.<T>.latency.engine`" in text


def test_a_report_with_the_least_content_is_valid():
    report = parse(
        {
            "schema_version": 1,
            "tool": {"version": "0"},
            "model": {"name": "m"},
            "calibration": {"method": "ones", "images": 1, "seconds": 0},
            "targets": {"t": {"engine": {"path": "e", "bytes": 1}}},
        }
    )
    assert isinstance(report, Report)
    assert report.to_json()["targets"]["t"]["latency"]["speedup"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["calibration"].pop("method"), "calibration.method: Field required"),
        (lambda v: v["calibration"].update(images=-1), "calibration.images"),
        (lambda v: v["targets"]["ort-arm64"]["engine"].update(size=3), r"targets.ort-arm64.engine.size"),
        (lambda v: v["targets"]["ort-arm64"]["latency"].update(speedup=float("nan")), "speedup"),
    ],
)
def test_a_broken_report_is_named(change, message):
    value = sample.report(targets=3).to_json()
    change(value)
    with pytest.raises(ZsqError, match=message):
        parse(value)


def test_other_versions_and_other_files_are_refused(value, tmp_path):
    with pytest.raises(StaleArtifactError, match="schema version 2"):
        parse({**value, "schema_version": 2})
    with pytest.raises(ZsqError, match="not a report"):
        parse([1, 2])
    write_json(tmp_path / "other.json", {"hello": 1})
    with pytest.raises(ZsqError, match="no schema_version") as caught:
        load(tmp_path / "other.json")
    assert str(tmp_path / "other.json") in str(caught.value)
    with pytest.raises(ZsqError, match="does not exist"):
        load(tmp_path / "missing.json")


def test_gates_reach_the_verdict():
    assert sample.report().verdict.passed is True
    failed = sample.report(estimate=True)
    assert failed.verdict.passed is False
    assert [gate.name for gate in failed.gates if not gate.passed] == ["max_accuracy_drop"]
    assert "1 of 5" in failed.verdict.text
    assert sample.report(gates=None).verdict.passed is None
