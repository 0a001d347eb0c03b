"""Gates: the limits that a result has to keep, checked on the report and nothing else.

A gate that was asked for and cannot be checked, because the figure was not measured, has failed; it says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from zsq_deploy.errors import UsageError

__all__ = ["GateResult", "Gates", "evaluate_gates"]


@dataclass(frozen=True)
class Gates:
    """Limits; ``None`` means that nothing is demanded. Shares are written 0 to 1.

    Attributes:
        min_agreement: Least top-1 agreement of the engine with its fake-quant reference.
        min_float_agreement: Least top-1 agreement of the engine with the float network.
        max_accuracy_drop: Largest loss of accuracy against float on labelled data (0.01 is one percentage point).
        min_speedup: Least speed-up over the same network in fp32 (2 is twice as fast).
        min_within_2_lsb: Least share of outputs within 2 LSB of the fake-quant reference.
        min_integer_macs: Least share of multiply-accumulates in integer kernels.
        min_integer_equal: Least share of outputs equal, bit for bit, to exact integer arithmetic.
        min_sqnr_db: Least SQNR of the engine's outputs against float, in dB (for networks without classes).
        max_latency_ms: Largest median latency of one inference at batch 1.
        max_engine_bytes: Largest size of the engine file.
    """

    min_agreement: float | None = None
    min_float_agreement: float | None = None
    max_accuracy_drop: float | None = None
    min_speedup: float | None = None
    min_within_2_lsb: float | None = None
    min_integer_macs: float | None = None
    min_integer_equal: float | None = None
    min_sqnr_db: float | None = None
    max_latency_ms: float | None = None
    max_engine_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(
                    f"{name} is {value:g}, but it is a share between 0 and 1",
                    where=_option(name),
                    remedy="write 99.5 % as 0.995, and one percentage point as 0.01",
                )
        for name in ("min_speedup", "max_latency_ms", "max_engine_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(
                    f"{name} is {value:g}, but it has to be above 0",
                    where=_option(name),
                    remedy="give a positive number",
                )

    def demanded(self) -> dict[str, float]:
        """The gates that are set, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


_SHARES = (
    "min_agreement",
    "min_float_agreement",
    "max_accuracy_drop",
    "min_within_2_lsb",
    "min_integer_macs",
    "min_integer_equal",
)


@dataclass(frozen=True)
class GateResult:
    """One gate on one target.

    Attributes:
        name: Field of :class:`Gates`.
        target: Deployment target that it was checked on.
        limit: What was demanded.
        value: What was measured; ``None`` if it was not.
        passed: Whether the limit is kept. Never true without a value.
        text: One sentence for a reader.
    """

    name: str
    target: str
    limit: float
    value: float | None
    passed: bool
    text: str

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the keys are those of the report."""
        return {
            "name": self.name,
            "target": self.target,
            "limit": self.limit,
            "value": self.value,
            "passed": self.passed,
            "text": self.text,
        }


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at(report: Mapping[str, Any], *path: str) -> float | None:
    value: Any = report
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _percent(value: float) -> str:
    """A share in percent, with as many digits as it takes not to call 99.9999 % all of it."""
    digits = next((d for d in range(2, 8) if value >= 1 or round(100 * value, d) < 100), 8)
    return f"{100 * value:.{digits}f}".rstrip("0").rstrip(".") + " %"


def _points(value: float) -> str:
    return f"{100 * value:.3g} points"


def _drop(target: Mapping[str, Any]) -> tuple[float | None, str]:
    metric = target.get("accuracy", {}).get("metric", "top1") if isinstance(target.get("accuracy"), Mapping) else "top1"
    if metric == "agreement_with_float":
        return None, "no labelled data were given, so the accuracy is only estimated (--eval-data)"
    if metric != "top1":
        return None, f"the quality of this network is measured as {metric}, not as accuracy; use --min-sqnr-db"
    before, after = _at(target, "accuracy", "float"), _at(target, "accuracy", "engine")
    if before is None or after is None:
        return None, "the accuracy of float and engine was not measured (--eval-data)"
    return before - after, ""


def _value(name: str, target: Mapping[str, Any]) -> tuple[float | None, str]:
    """The measured value of one gate, or why there is none."""
    match name:
        case "min_agreement":
            return _at(target, "parity", "top1_agreement"), "the outputs are no class scores, or were not compared"
        case "min_float_agreement":
            found = _at(target, "accuracy", "agreement_with_float", "engine")
            return found, "the engine was not compared with float, or its outputs are no class scores"
        case "max_accuracy_drop":
            return _drop(target)
        case "min_speedup":
            return _at(target, "latency", "speedup"), "the latency was not measured"
        case "min_within_2_lsb":
            return _at(target, "parity", "within_2_lsb"), "the engine was not compared with its fake-quant reference"
        case "min_integer_macs":
            return _at(target, "integer", "macs_share"), "the executed kernels were not recorded"
        case "min_integer_equal":
            found = _at(target, "parity", "integer", "equal_share")
            return found, "the engine was not compared with exact integer arithmetic"
        case "min_sqnr_db":
            return _at(target, "parity", "float", "sqnr_db"), "the engine was not compared with float"
        case "max_latency_ms":
            return _at(target, "latency", "engine", "median_ms"), "the latency was not measured"
        case "max_engine_bytes":
            return _at(target, "engine", "bytes"), "the size of the engine is not known"
    raise UsageError(f"there is no gate {name!r}", where="gates", remedy=f"choose from {', '.join(_SUBJECTS)}")


_SUBJECTS = {
    "min_agreement": ("top-1 agreement with the fake-quant reference", _percent),
    "min_float_agreement": ("top-1 agreement with the float network", _percent),
    "max_accuracy_drop": ("loss of accuracy against float", _points),
    "min_speedup": ("speed-up over fp32", lambda value: f"{value:.3g}x"),
    "min_within_2_lsb": ("outputs within 2 LSB of the fake-quant reference", _percent),
    "min_integer_macs": ("multiply-accumulates in integer kernels", _percent),
    "min_integer_equal": ("outputs equal to exact integer arithmetic", _percent),
    "min_sqnr_db": ("SQNR against float", lambda value: f"{value:.4g} dB"),
    "max_latency_ms": ("median latency", lambda value: f"{value:.4g} ms"),
    "max_engine_bytes": ("size of the engine", lambda value: f"{value:,.0f} bytes"),
}


def evaluate_gates(report: Mapping[str, Any], gates: Gates) -> list[GateResult]:
    """Check every demanded gate on every target of a report.

    Args:
        report: The report as a JSON value (``targets`` by name).
        gates: The limits.
    """
    results = []
    targets = report.get("targets") or {}
    for target, content in targets.items():
        for name, limit in gates.demanded().items():
            subject, write = _SUBJECTS[name]
            value, why = _value(name, content)
            least = name.startswith("min_")
            if value is None:
                passed, text = False, f"{subject}: not measured ({why})"
            else:
                # A difference of two shares (3 of 1,000 images) is not exactly the number that a user writes (0.003).
                slack = 1e-9 * max(abs(limit), abs(value))
                passed = value >= limit - slack if least else value <= limit + slack
                relation = "at least" if least else "at most"
                text = f"{subject}: {write(value)}, demanded {relation} {write(float(limit))}"
            results.append(GateResult(name, target, float(limit), value, passed, text))
    if not targets:
        for name, limit in gates.demanded().items():
            text = f"{_SUBJECTS[name][0]}: not measured (the report has no target)"
            results.append(GateResult(name, "", float(limit), None, False, text))
    return results
