"""The report in a terminal: one compact table, a column a target, and the gates below it."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from zsq_deploy.report import words
from zsq_deploy.report.devices import device_line
from zsq_deploy.report.schema import LatencyNumbers, Report, TargetSection

__all__ = ["print_summary", "summary"]

_Cell = Callable[[TargetSection], str]


def _quality_rows(report: Report) -> list[tuple[str, _Cell]]:
    metrics = {target.accuracy.metric for target in report.targets.values() if target.accuracy}
    if not metrics:
        return []
    metric = metrics.pop()
    title = {
        "top1": "accuracy",
        "agreement_with_float": "agreement with float",
        "psnr_db": "PSNR",
        "sqnr_db": "SQNR against float",
    }[metric]

    def cell(form: str) -> _Cell:
        def text(target: TargetSection) -> str:
            return words.quality(getattr(target.accuracy, form), metric) if target.accuracy else words.NOTHING

        return text

    def agreement(target: TargetSection) -> str:
        return words.percent(target.accuracy.agreement_with_float.get("engine")) if target.accuracy else words.NOTHING

    estimate = metric in ("agreement_with_float", "sqnr_db")
    rows = [] if estimate else [(f"{title}, float", cell("float_"))]
    rows.append((f"{title}, twin", cell("reference")))
    rows.append((f"{title}, engine" + (" (estimate)" if estimate else ""), cell("engine")))
    if metric == "top1":
        rows.append(("agreement with float, engine", agreement))
    return rows


def _time(form: str, percentile: str = "median_ms") -> _Cell:
    def text(target: TargetSection) -> str:
        numbers: LatencyNumbers | None = getattr(target.latency, form)
        return words.milliseconds(getattr(numbers, percentile)) if numbers else words.NOTHING

    return text


def _smaller(target: TargetSection) -> str:
    if target.float_model is None or not target.engine.bytes:
        return words.NOTHING
    return words.times(target.float_model.bytes / target.engine.bytes)


def _exact(target: TargetSection) -> str:
    return words.percent(target.parity.integer.equal_share) if target.parity.integer else words.NOTHING


def summary(report: Report) -> RenderableType:
    """The table, the gates and the verdict, for a rich console."""
    calibration = report.calibration
    head = Text.assemble((report.model.name, "bold"), f"  ·  {calibration.method}, {calibration.images} images")
    head.append(f" in {words.seconds(calibration.seconds)}")
    if calibration.peak_rss_bytes:
        head.append(f", {words.bytes_text(calibration.peak_rss_bytes)}")
    if calibration.peak_gpu_bytes:
        head.append(f", {words.bytes_text(calibration.peak_gpu_bytes)} on the GPU")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in report.targets:
        table.add_column(escape(name), justify="right")
    rows: list[tuple[str, _Cell]] = [
        *_quality_rows(report),
        ("latency, engine", _time("engine")),
        ("latency, engine, spread", _time("engine", "iqr_ms")),
        ("latency, engine, p95", _time("engine", "p95_ms")),
        ("latency, engine, p99", _time("engine", "p99_ms")),
        ("latency, engine, on the device alone", _time("engine", "device_median_ms")),
        ("latency, best float mode", _time("float_best")),
        ("latency, fp32", _time("float32")),
        ("speed-up over fp32", lambda target: words.times(target.latency.speedup)),
        ("quantized by", lambda target: target.engine.quantizer or words.NOTHING),
        ("engine file", lambda target: words.bytes_text(target.engine.bytes)),
        ("smaller than float", _smaller),
        ("MACs in integer kernels", lambda target: words.percent(target.integer.macs_share)),
        ("time in integer kernels", lambda target: words.percent(target.integer.time_share)),
        ("equal to exact integers", _exact),
        ("within 2 LSB of the twin", lambda target: words.percent(target.parity.within_2_lsb)),
        ("largest difference, LSB", lambda target: words.lsb(target.parity.max_lsb)),
        ("top-1 agreement with the twin", lambda target: words.percent(target.parity.top1_agreement)),
    ]
    for title, cell in rows:
        cells = [cell(target) for target in report.targets.values()]
        if any(text != words.NOTHING for text in cells):
            table.add_row(title, *(escape(text) for text in cells))
    parts: list[RenderableType] = [head, table]
    for name, target in report.targets.items():
        parts += [Text(f"{name} on {device}: {device_line(found)}") for device, found in target.devices.items()]
    for gate in report.gates:
        mark = ("kept    ", "green") if gate.passed else ("not kept", "bold red")
        parts.append(Text.assemble(mark, f"  {gate.target}: {gate.text}"))
    for name, target in report.targets.items():
        parts += [Text(f"{name}: {path} was not measured: {why}", "dim") for path, why in target.not_measured.items()]
    if report.verdict.passed is not None:
        parts.append(Text(report.verdict.text, "bold green" if report.verdict.passed else "bold red"))
    return Group(*parts)


def print_summary(report: Report, console: Console | None = None) -> None:
    """Print the summary."""
    (console or Console()).print(summary(report), highlight=False)
