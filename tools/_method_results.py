"""Results of tools/compare_methods.py: lines of a file that survive a kill, the table made of them, and the evidence for ``--method auto``."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zsq_deploy.artifact import read_json, write_json
from zsq_deploy.calib.evidence import Evidence, Kind, Measured, Row
from zsq_deploy.calib.methods import METHODS

__all__ = ["Results", "markdown", "to_evidence"]

Line = dict[str, Any]
_KEYS = ("network", "method", "seed", "protocol", "part")


class Results:
    """A JSON-lines file: one line a finished part, keyed by network, method, seed, protocol and part; the last line of a key counts.

    A line that a kill tore is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[Any, ...], Line] = {}
        if not path.is_file():
            return
        whole = 0
        for text in path.read_bytes().splitlines(keepends=True):
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not text.endswith(b"\n"):
                break
            whole += len(text)
            self.lines[self._key(line)] = line
        if whole < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(whole)

    @staticmethod
    def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in _KEYS)

    def get(self, **key: Any) -> Line | None:
        """The line of a key, if it is there."""
        return self.lines.get(self._key(key))

    def add(self, line: Line) -> None:
        """Append a line, on the disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[self._key(line)] = line


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _groups(lines: Iterable[Line]) -> dict[tuple[str, str, str], list[Line]]:
    """Lines by (protocol, network, method), in the order in which they were made."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line["protocol"], line["network"], line["method"]), []).append(line)
    return found


def _why_not(lines: Sequence[Line]) -> str:
    """``refused``: the method said why it cannot work on the network; ``failed``: anything else."""
    return "refused" if all(line["error"].startswith("CalibrationError: ") for line in lines) else "failed"


def _accuracy(lines: Sequence[Line], bits: str) -> str:
    """``91.32 ± 0.11 (98.9)``: accuracy in percent, spread over seeds, agreement with float."""
    found = [line for line in lines if line["part"] == bits]
    good = [line for line in found if "error" not in line]
    if not good:
        return _why_not(found) if found else "-"
    if good[0]["agreement"] is None:
        values = [line["sqnr_db"] for line in good]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread} dB"
    agreement = 100 * statistics.fmean(line["agreement"] for line in good)
    if good[0]["accuracy"] is None:
        values = [100 * line["agreement"] for line in good]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"({agreement:.1f}{spread})"
    values = [100 * line["accuracy"] for line in good]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({agreement:.1f})"


def markdown(lines: Iterable[Line], bits: Sequence[str]) -> str:
    """One table a protocol and network; the baselines stand beside the methods."""
    groups, text, last = _groups(lines), list[str](), ("", "")
    head = [
        "method",
        "seeds",
        "images",
        "seconds",
        "image-steps/s",
        "BN means",
        "BN spreads",
        "range error",
        "range bias",
    ]
    head += ["coverage", "varied as", *(word.upper() for word in bits)]
    for (protocol, network, method), found in sorted(groups.items(), key=lambda each: each[0][:2]):
        if (protocol, network) != last:
            float_ = next((line["float"] for line in found if line.get("float") is not None), None)
            accuracy = "" if float_ is None else f", float {100 * float_:.2f} %"
            text += [
                "",
                f"**{network}**{accuracy} ({protocol})",
                "",
                "| " + " | ".join(head) + " |",
                "|---" * len(head) + "|",
            ]
            last = (protocol, network)
        sets = [line for line in found if line["part"] == "set"]
        good = [line for line in sets if "error" not in line]
        quality = [line["quality"] for line in good]

        def of(*path: str, rows: Sequence[Any] = quality) -> float | None:
            values: list[Any] = list(rows)
            for name in path:
                values = [None if value is None else value[name] for value in values]
            return _mean(values)

        seeds = len({line["seed"] for line in found if line["part"] != "set" and "error" not in line})
        used = next((line["method_used"] for line in good), method)
        cells = [method if used == method or method not in METHODS else f"{method} (= {used})", str(seeds or len(good))]
        cells += [
            str(good[0]["images"]) if good else _why_not(sets),
            _number(_mean([line["seconds"] for line in good]), ".1f"),
        ]
        cells += [_number(_mean([line["image_steps_per_s"] for line in good]), ".0f")]
        cells += [_number(of("batch_norm", "mean"), ".3f"), _number(of("batch_norm", "spread"), ".3f")]
        cells += [_number(of("real", "extent_bits"), ".2f"), _number(of("real", "bias_bits"), "+.2f")]
        cells += [_number(of("coverage", "summary"), ".3f"), _number(of("diversity", "effective_images"), ".1f")]
        cells += [_accuracy(found, word) for word in bits]
        text.append("| " + " | ".join(cells) + " |")
    legend = (
        "Accuracy % ± standard deviation over seeds (agreement with float %); of networks without classes the signal to noise of the worst output. "
        "BN: gaps in stored standard deviations, on held-out images. Range error: mean absolute error of the extents against real images, in bits; bias below 0: too narrow. Coverage and variety: "
        "docs/synthesis.md."
    )
    text += ["", legend]
    return "\n".join(text).lstrip() + "\n"


def _measured(lines: Sequence[Line]) -> Measured:
    labelled = lines[0]["accuracy"] is not None
    drops = [line["float"] - line["accuracy"] for line in lines] if labelled else None
    agreements = [line["agreement"] for line in lines]
    spread = statistics.stdev(drops if drops is not None else agreements) if len(lines) > 1 else 0.0
    drop = statistics.fmean(drops) if drops is not None else None
    return Measured(drop, statistics.fmean(agreements), lines[0]["scored"], len(lines), spread)


def to_evidence(
    lines: Iterable[Line],
    protocols: Mapping[str, str],
    file: Path,
    *,
    leave_out: Sequence[str] = (),
    times: bool = True,
) -> int:
    """Write the results into the table that ``--method auto`` reads; rows of other networks, methods and protocols stay.

    Args:
        lines: Of the results file.
        protocols: The name of each protocol in the results, and the one it gets in the table.
        file: The table.
        leave_out: Methods that are no choice (``real``).
        times: Take the times over; not those of a machine that was busy with other things.

    Returns:
        Number of rows written.
    """
    before = Evidence.from_json(read_json(file)) if file.is_file() else Evidence(())
    fresh: dict[tuple[str, str, str], Row] = {}
    for (protocol, network, method), found in _groups(lines).items():
        sets = [line for line in found if line["part"] == "set" and "error" not in line]
        if protocol not in protocols or method in leave_out or not sets or sets[0]["method_used"] != method:
            continue
        # Signal to noise cannot be averaged with losses of accuracy: networks without classes say nothing to `--method auto` yet.
        scored = [line for line in found if line["part"] != "set" and line.get("agreement") is not None]
        results = {
            bits: _measured([line for line in scored if line["part"] == bits])
            for bits in dict.fromkeys(line["part"] for line in scored)
        }
        if not results:
            continue
        quality = {
            "coverage": _mean([line["quality"]["coverage"]["summary"] for line in sets]),
            "batch_norm_mean": _mean([(line["quality"]["batch_norm"] or {}).get("mean") for line in sets]),
            "range_error_bits": _mean([(line["quality"]["real"] or {}).get("extent_bits") for line in sets]),
        }
        name = protocols[protocol]
        fresh[network, method, name] = Row(
            network=network,
            kind=Kind(**sets[0]["kind"]),
            method=method,
            protocol=name,
            images=sets[0]["images"],
            seconds=round(statistics.fmean(line["seconds"] for line in sets), 2) if times else None,
            parameters=sets[0]["parameters"],
            results=results,
            quality={key: round(value, 4) for key, value in quality.items() if value is not None},
        )
    kept = [row for row in before.rows if (row.network, row.method, row.protocol) not in fresh]
    rows = sorted((*kept, *fresh.values()), key=lambda row: (row.protocol, row.network, row.method))
    write_json(file, Evidence(tuple(rows), before.notes).to_json())
    return len(fresh)
