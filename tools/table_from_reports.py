"""One row a report: the figures that an engine is judged by, as a Markdown table.

python tools/table_from_reports.py out/*/report.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from zsq_deploy.report.schema import Report, TargetSection, load

COLUMNS = (
    "network",
    "quantizer",
    "images",
    "float",
    "twin",
    "engine",
    "agrees with float",
    "integer MACs",
    "= exact integers",
    "top-1 = twin",
    "within 2 LSB of twin",
    "largest LSB",
    "ms (fp32)",
    "speed-up",
    "KiB (float)",
)


def share(value: float | None, digits: int = 2) -> str:
    """A share as percent; a dash for what was not measured."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def row(report: Report, name: str, target: TargetSection) -> list[str]:
    """The cells of one target of one report."""
    accuracy, parity = target.accuracy, target.parity
    percent = accuracy is not None and accuracy.metric in ("top1", "agreement_with_float")
    labelled = percent and accuracy is not None and not accuracy.estimate

    def quality(value: float | None) -> str:
        if accuracy is None or value is None or (percent and accuracy.estimate):
            return "-"
        if not percent and value > 300:
            return "-"  # float against float
        return share(value) if percent else f"{value:.1f} dB"

    agreement = accuracy.agreement_with_float.get("engine") if accuracy is not None else None
    engine_ms, float_ms = target.latency.engine, target.latency.float32
    timed = engine_ms is not None and float_ms is not None
    times = f"{engine_ms.median_ms:.2f} ({float_ms.median_ms:.2f})" if timed else "-"
    whole = f" ({target.float_model.bytes / 1024:.0f})" if target.float_model else ""
    calibration = report.calibration
    return [
        report.model.name + ("" if name == "ort-x86-vnni" else f" ({name})"),
        target.engine.quantizer or "-",
        f"{calibration.method} {calibration.images}",
        quality(accuracy.float_ if accuracy else None),
        quality(accuracy.reference if accuracy else None),
        quality(accuracy.engine if accuracy else None),
        share(agreement, 1) + ("" if labelled or agreement is None else " (est.)"),
        share(target.integer.macs_share, 1),
        share(parity.integer.equal_share if parity.integer else None),
        share(parity.top1_agreement),
        share(parity.within_2_lsb),
        "-" if parity.max_lsb is None else f"{parity.max_lsb:.2g}",
        times,
        "-" if target.latency.speedup is None else f"{target.latency.speedup:.2f}x",
        f"{target.engine.bytes / 1024:.0f}{whole}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for file in options.reports:
        report = load(file)
        lines += ["| " + " | ".join(row(report, name, target)) + " |" for name, target in report.targets.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
