"""Gates hold or fail on the report's figures; what was not measured fails."""

from __future__ import annotations

import copy

import pytest

from zsq_deploy.errors import UsageError
from zsq_deploy.verify.gates import Gates, evaluate_gates

REPORT = {
    "targets": {
        "t": {
            "engine": {"bytes": 1000},
            "integer": {"macs_share": 0.98},
            "parity": {
                "top1_agreement": 0.997,
                "within_2_lsb": 0.999,
                "integer": {"equal_share": 1.0},
                "float": {"sqnr_db": 31.0},
            },
            "accuracy": {"metric": "top1", "float": 0.921, "engine": 0.918, "agreement_with_float": {"engine": 0.99}},
            "latency": {"engine": {"median_ms": 2.0}, "speedup": 3.1},
        }
    }
}

# (gate, a limit that is kept exactly, a limit that is not)
CASES = [
    ("min_agreement", 0.997, 0.9971),
    ("min_float_agreement", 0.99, 0.991),
    ("max_accuracy_drop", 0.003, 0.0029),
    ("min_speedup", 3.1, 3.2),
    ("min_within_2_lsb", 0.999, 0.9995),
    ("min_integer_macs", 0.98, 0.99),
    ("min_integer_equal", 1.0, None),
    ("min_sqnr_db", 31.0, 31.1),
    ("max_latency_ms", 2.0, 1.99),
    ("max_engine_bytes", 1000, 999),
]


@pytest.mark.parametrize(("name", "kept", "broken"), CASES)
def test_a_limit_holds_at_equality_and_breaks_beyond(name, kept, broken):
    (result,) = evaluate_gates(REPORT, Gates(**{name: kept}))
    assert result.passed
    assert result.name == name
    assert result.target == "t"
    if broken is not None:
        (result,) = evaluate_gates(REPORT, Gates(**{name: broken}))
        assert not result.passed
        assert "demanded" in result.text


def test_every_gate_has_a_case():
    assert {name for name, *_ in CASES} == set(Gates.__dataclass_fields__)


@pytest.mark.parametrize("name", [name for name, *_ in CASES])
def test_what_was_not_measured_has_failed(name):
    for empty in ({"targets": {"t": {}}}, {"targets": {}}, {}):
        (result,) = evaluate_gates(empty, Gates(**{name: 0.5 if name.startswith("min") else 0.9}))
        assert not result.passed
        assert result.value is None
        assert "not measured" in result.text


@pytest.mark.parametrize(
    ("metric", "reason"), [("agreement_with_float", "only estimated"), ("psnr_db", "measured as psnr_db")]
)
def test_an_estimate_never_passes_an_accuracy_gate(metric, reason):
    report = copy.deepcopy(REPORT)
    report["targets"]["t"]["accuracy"]["metric"] = metric
    (result,) = evaluate_gates(report, Gates(max_accuracy_drop=0.5))
    assert not result.passed
    assert reason in result.text


def test_the_share_of_integer_equality_fails_by_one_element():
    report = copy.deepcopy(REPORT)
    report["targets"]["t"]["parity"]["integer"]["equal_share"] = 1 - 1e-7
    (result,) = evaluate_gates(report, Gates(min_integer_equal=1.0))
    assert not result.passed
    assert "99.99999 %" in result.text


def test_each_target_is_checked():
    report = {"targets": {"a": REPORT["targets"]["t"], "b": {}}}
    results = evaluate_gates(report, Gates(min_speedup=3, min_agreement=0.99))
    assert [(r.target, r.passed) for r in results] == [("a", True), ("a", True), ("b", False), ("b", False)]
    assert evaluate_gates(report, Gates()) == []


def test_percent_written_as_a_share_is_refused():
    with pytest.raises(UsageError, match="share between 0 and 1"):
        Gates(min_agreement=99.5)
    with pytest.raises(UsageError, match="share between 0 and 1"):
        Gates(max_accuracy_drop=float("nan"))
    with pytest.raises(UsageError, match="above 0"):
        Gates(min_speedup=0)
