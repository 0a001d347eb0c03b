"""The device beside the workstation: one row a figure, one column a place, for the page and for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from zsq_deploy.report import words
from zsq_deploy.report.device_schema import ClockNumbers, DeviceSection
from zsq_deploy.report.schema import Report, TargetSection

__all__ = ["DeviceRow", "device_line", "device_rows", "device_tables", "remarks"]


@dataclass(frozen=True)
class DeviceRow:
    """One figure on every place.

    Attributes:
        group: What it belongs to; empty: the same as the row before.
        title: Its name.
        cells: The workstation's, then one for every device, in the order of the report.
    """

    group: str
    title: str
    cells: tuple[str, ...]


def _celsius(clock: ClockNumbers) -> str:
    return f"{max(clock.celsius.values()):.0f}\u00a0°C" if clock.celsius else words.NOTHING


def _mhz(value: float | None) -> str:
    return f"{value:,.0f}\u00a0MHz" if value else words.NOTHING


def _pair(before: str, after: str) -> str:
    return words.NOTHING if words.NOTHING in (before, after) else f"{before} → {after}"


def _parity(section: DeviceSection, kind: str, key: str) -> float | None:
    found = section.parity.get(kind)
    return getattr(found, key) if found is not None else None


def _flag(value: bool | None, why: str) -> str:
    return words.NOTHING if value is None else (f"yes: {why}" if value else "no")


_Here = Callable[[TargetSection, Report], str]
_There = Callable[[DeviceSection], str]


def _latency(key: str) -> tuple[_Here, _There]:
    def here(target: TargetSection, _: Report) -> str:
        numbers = target.latency.engine
        return words.milliseconds(getattr(numbers, key, None)) if numbers else words.NOTHING

    return here, lambda section: words.milliseconds(getattr(section.latency, key))


def _machine(report: Report, key: str) -> str:
    return str(report.environment.machine.get(key) or words.NOTHING)


def _twin(key: str, show: Callable[[float | None], str]) -> tuple[_Here, _There]:
    return (
        lambda target, _: show(getattr(target.parity, key)),
        lambda section: show(_parity(section, "twin", key)),
    )


def _nothing(_: TargetSection, __: Report) -> str:
    return words.NOTHING


def _table() -> Iterable[tuple[str, str, _Here, _There]]:
    yield (
        "",
        "Processor",
        lambda _, report: _machine(report, "cpu"),
        lambda section: f"{section.cpu} ({section.machine})" + (", emulated" if section.emulated else ""),
    )
    yield (
        "",
        "Runtime",
        lambda target, _: f"{target.runtime} {target.runtime_version}".strip() or words.NOTHING,
        lambda section: f"{section.runtime} {section.runtime_version}",
    )
    yield (
        "Parity",
        "Equal to exact integers",
        lambda target, _: words.percent(target.parity.integer.equal_share) if target.parity.integer else words.NOTHING,
        lambda section: words.percent(_parity(section, "integer", "equal_share")),
    )
    yield (
        "Parity",
        "Equal to the workstation",
        lambda _, __: words.percent(1.0),
        lambda section: words.percent(_parity(section, "workstation", "equal_share")),
    )
    yield ("Parity", "Within 2 LSB of the twin", *_twin("within_2_lsb", words.percent))
    yield ("Parity", "Largest difference from the twin, LSB", *_twin("max_lsb", words.lsb))
    yield ("Parity", "Top-1 agreement with the twin", *_twin("top1_agreement", words.percent))
    yield (
        "Parity",
        "As demanded",
        _nothing,
        lambda section: "yes" if section.passed else "no",
    )
    names = {"median_ms": "Median", "iqr_ms": "Spread (75th − 25th percentile)", "p90_ms": "p90", "p95_ms": "p95"}
    rest = {"p99_ms": "p99", "min_ms": "Fastest", "mean_ms": "Mean", "first_ms": "First run", "load_ms": "Load"}
    for key, title in {**names, **rest}.items():
        yield ("Latency", title, *_latency(key))
    yield (
        "Latency",
        "Threads",
        lambda target, _: words.count(target.latency.engine.threads if target.latency.engine else None),
        lambda section: words.count(section.latency.threads),
    )
    yield (
        "Latency",
        "Throughput",
        _nothing,
        lambda section: (
            f"{section.throughput.samples_per_second:,.1f}/s, {section.throughput.streams} streams"
            if section.throughput
            else words.NOTHING
        ),
    )
    yield (
        "Memory",
        "Peak",
        lambda target, _: words.bytes_text(target.latency.engine.peak_rss_bytes if target.latency.engine else None),
        lambda section: words.bytes_text(section.peak_rss_bytes),
    )
    yield (
        "Memory",
        "Of the machine",
        lambda _, report: (
            words.bytes_text(report.environment.machine["memory_bytes"])
            if isinstance(report.environment.machine.get("memory_bytes"), int | float)
            else words.NOTHING
        ),
        lambda section: words.bytes_text(section.memory_bytes),
    )
    yield (
        "Clocks",
        "Clock, before and after",
        _nothing,
        lambda section: _pair(_mhz(section.before.mhz), _mhz(section.after.mhz)),
    )
    yield (
        "Clocks",
        "Temperature, before and after",
        _nothing,
        lambda section: _pair(_celsius(section.before), _celsius(section.after)),
    )
    yield (
        "Clocks",
        "Governor",
        lambda _, report: _machine(report, "governor"),
        lambda section: section.after.governor or words.NOTHING,
    )
    yield (
        "Clocks",
        "Throttled",
        _nothing,
        lambda section: _flag(section.throttled, section.throttled_why),
    )


def _marked(group: str, text: str, section: DeviceSection) -> str:
    """A figure that an emulator makes meaningless, marked as such; whether it was throttled, an emulator cannot say at all."""
    if not section.emulated or text == words.NOTHING or group not in ("Latency", "Memory", "Clocks"):
        return text
    return words.NOTHING if group == "Clocks" else f"{text} (emulated)"


def device_rows(report: Report, name: str) -> list[DeviceRow]:
    """The figures of a target on every place; rows that nobody has are left out."""
    target = report.targets[name]
    rows, group = [], ""
    for part, title, here, there in _table():
        cells = (here(target, report), *(_marked(part, there(one), one) for one in target.devices.values()))
        if all(cell == words.NOTHING for cell in cells[1:]):
            continue
        rows.append(DeviceRow(part if part != group else "", title, cells))
        group = part
    return rows


def remarks(report: Report, name: str) -> list[str]:
    """What a reader should know of the devices of a target, and what does not hold there."""
    found = []
    for device, section in report.targets[name].devices.items():
        found += [f"{device}: {line}" for line in (*section.failed, *section.notes)]
    return found


def device_line(section: DeviceSection) -> str:
    """One device in one line."""
    twin = section.parity.get("twin")
    parts = ["passed" if section.passed else "FAILED: " + "; ".join(section.failed)]
    if twin is not None:
        parts.append(f"within 2 LSB of the twin {words.percent(twin.within_2_lsb)}")
    times = section.latency
    shown = f"median {words.milliseconds(times.median_ms)}, p95 {words.milliseconds(times.p95_ms)}, p99 {words.milliseconds(times.p99_ms)}"
    parts.append(f"{shown} (emulated: says nothing)" if section.emulated else shown)
    if section.throttled:
        parts.append("throttled")
    return ", ".join(parts)


def device_tables(report: Report, name: str) -> RenderableType:
    """The same for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=escape(name), title_justify="left")
    table.add_column("")
    for place in ("workstation", *report.targets[name].devices):
        table.add_column(escape(place), justify="right", overflow="fold")
    for row in device_rows(report, name):
        table.add_row(escape(f"{row.title}"), *(escape(cell) for cell in row.cells))
    return Group(table, *(Text(f"! {line}", "yellow") for line in remarks(report, name)))
