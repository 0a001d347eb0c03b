"""Ranges as a value: JSON, digests, refusals."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsq_deploy.errors import CalibrationError, StaleArtifactError, ZsqError
from zsq_deploy.quant import Ranges

pairs = st.tuples(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30)).map(lambda p: (min(p), max(p)))


@given(st.dictionaries(st.text(max_size=8), pairs, max_size=6), st.text(max_size=5))
def test_json_keeps_everything(values, digest):
    ranges = Ranges(values, "mse", digest, "set")
    again = Ranges.from_json(json.loads(json.dumps(ranges.to_json())))
    assert dict(again) == dict(ranges)
    assert again.digest == ranges.digest
    assert again == ranges


def test_the_order_of_names_does_not_matter_but_everything_else_does():
    a = Ranges({"x": (0, 1), "y": (-1, 2)}, "minmax", "m", "s")
    assert a.digest == Ranges({"y": (-1, 2), "x": (0, 1)}, "minmax", "m", "s").digest
    others = [
        a.updated({"x": (0.0, 1.0000000001)}),
        a.replace(method="mse"),
        a.bound(model_digest="n", set_digest="s"),
        a.bound(model_digest="m", set_digest="t"),
    ]
    assert len({a.digest, *(other.digest for other in others)}) == 5


def test_another_network_or_set_is_refused(tmp_path):
    path = tmp_path / "ranges.json"
    Ranges({"x": (0, 1)}, "minmax", "m" * 64, "s" * 64).save(path)
    assert Ranges.load(path, model_digest="m" * 64, set_digest="s" * 64)["x"] == (0.0, 1.0)
    with pytest.raises(StaleArtifactError, match="another network"):
        Ranges.load(path, model_digest="n" * 64)
    with pytest.raises(StaleArtifactError, match="another calibration set"):
        Ranges.load(path, set_digest="t" * 64)


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "ranges.json"
    Ranges({"x": (0, 1)}, "minmax").save(path)
    content = json.loads(path.read_text())
    content["ranges"]["x"][1] = 2.0
    path.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="changed after it was written"):
        Ranges.load(path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 1}', '{"schema_version": 9}', "nonsense"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "ranges.json"
    path.write_text(text)
    with pytest.raises(ZsqError):
        Ranges.load(path)


@pytest.mark.parametrize("pair", [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_ranges_that_make_no_sense_are_refused(pair):
    with pytest.raises(CalibrationError, match="'x' is not usable"):
        Ranges({"x": pair}, "minmax")


def test_it_cannot_be_changed():
    ranges = Ranges({"x": (0, 1)}, "minmax")
    with pytest.raises(TypeError):
        ranges.values_by_name["x"] = (0, 2)  # type: ignore[index]
