"""The figures of the report, as SVG text that stands inside the page (see :mod:`zsq_deploy.report.drawing`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from zsq_deploy.report import words
from zsq_deploy.report.drawing import (
    ENGINE,
    FLOAT,
    INK,
    LINE,
    NAMED_LAYERS,
    REFERENCE,
    SETTINGS,
    SOFT,
    WARN,
    WIDE,
    layer_axis,
    new_figure,
    svg_of,
)
from zsq_deploy.report.parity_schema import AccuracySection, Histogram, TensorRow
from zsq_deploy.report.schema import LatencySection, LayerRange

__all__ = ["accuracy_bars", "growth", "latency_bars", "layer_sqnr", "lsb_histogram", "range_bars", "size_bars"]


def _bars(
    rows: Sequence[tuple[str, float, str, str]],
    *,
    errors: Sequence[Sequence[tuple[float, str]]] = (),
    unit: str,
    whiskers: Sequence[tuple[float, float]] = (),
    most: float = math.inf,
) -> tuple[Figure, Axes]:
    """Horizontal bars from 0 with the value written behind each: ``(label, value, colour, text)``; no tick lies beyond `most`."""
    figure, axes = new_figure(5.2, 0.42 * len(rows) + 0.75)
    places = list(range(len(rows)))[::-1]
    reach = max([value for _, value, _, _ in rows] + [1e-12])
    # A rare slow run must not press the bars together: marks far out are drawn at the edge, as an arrow.
    limit = 1.7 * reach
    reach = max([reach] + [min(mark, limit) for row in errors for mark, _ in row])
    for place, (_, value, colour, text) in zip(places, rows, strict=True):
        axes.barh(place, value, height=0.56, color=colour)
        end = value
        for mark, style in errors[places[0] - place] if errors else ():
            shown = min(mark, limit)
            axes.plot([value, shown], [place, place], color=SOFT, linewidth=1)
            axes.plot(shown, place, marker=style if mark <= limit else ">", color=INK, markersize=5, linestyle="none")
        if whiskers:
            low, high = whiskers[places[0] - place]
            axes.plot([low, high], [place, place], color=INK, linewidth=1.4)
            end = max(end, high)
        # With marks behind the bar the value stands above them, so that it is not taken for that of the last mark.
        height, anchor = (place + 0.1, "bottom") if errors else (place, "center")
        axes.text(end + reach * 0.02, height, text, va=anchor, ha="left", parse_math=False, fontsize=9)
    axes.set_yticks(places, [label for label, *_ in rows])
    for label in axes.get_yticklabels():
        label.set_color(INK)
        label.set_parse_math(False)
    axes.set_xlim(0, reach * 1.28)
    axes.set_xlabel(unit)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, reach * 1.28)
    axes.set_xticks([tick for tick in ticks if tick <= min(most, reach * 1.28)])
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure, axes


def latency_bars(latency: LatencySection, name: str) -> str | None:
    """Median of engine, best float mode and fp32, with p90 and p99 as marks."""
    rows, errors = [], []
    same = latency.float_best is not None and latency.float_best == latency.float32
    for key, label, colour in (
        ("engine", "engine", ENGINE),
        ("float_best", "float, best mode", FLOAT),
        ("float32", "float, fp32", FLOAT),
    ):
        numbers = getattr(latency, key)
        if numbers is None or numbers.median_ms is None or (same and key == "float_best"):
            continue
        rows.append((label, numbers.median_ms, colour, words.milliseconds(numbers.median_ms)))
        marks = ((numbers.p90_ms, "|"), (numbers.p99_ms, "d"))
        errors.append([(value, style) for value, style in marks if value is not None])
    if not rows:
        return None
    with mpl.rc_context(SETTINGS):
        figure, _ = _bars(rows, errors=errors, unit="milliseconds an inference")
        return svg_of(figure, name, "Median latency: " + ", ".join(f"{row[0]} {row[3]}" for row in rows))


def accuracy_bars(accuracy: AccuracySection, name: str, texts: Sequence[str]) -> str | None:
    """Float, reference and engine; shares in percent, with one standard error of the sample as a whisker."""
    percent = accuracy.metric in ("top1", "agreement_with_float")
    factor = 100.0 if percent else 1.0
    rows, whiskers = [], []
    for (label, value, colour), text in zip(
        (
            ("float", accuracy.float_, FLOAT),
            ("fake-quant twin", accuracy.reference, REFERENCE),
            ("engine", accuracy.engine, ENGINE),
        ),
        texts,
        strict=True,
    ):
        # Float agrees with itself, and has no noise against itself: that is no result.
        if value is None or value < 0 or (label == "float" and accuracy.estimate):
            continue
        rows.append((label, value * factor, colour, text))
        error = (accuracy.standard_error or 0.0) * factor
        whiskers.append((value * factor - error, value * factor + error))
    if not rows:
        return None
    unit = {
        "top1": "accuracy in %, with one standard error",
        "agreement_with_float": "agreement with float in % (an estimate)",
        "psnr_db": "PSNR in dB",
        "sqnr_db": "SQNR against float in dB",
    }[accuracy.metric]
    with mpl.rc_context(SETTINGS):
        figure, _ = _bars(
            rows, unit=unit, whiskers=whiskers if accuracy.standard_error else (), most=100.0 if percent else math.inf
        )
        return svg_of(figure, name, f"{unit}: " + ", ".join(f"{row[0]} {row[3]}" for row in rows))


def size_bars(float_bytes: int | None, engine_bytes: int, name: str, texts: Sequence[str]) -> str | None:
    """File sizes of float network and engine."""
    if not float_bytes:
        return None
    scale, unit = (1e6, "megabytes") if max(float_bytes, engine_bytes) >= 1e6 else (1e3, "kilobytes")
    rows = [
        ("engine", engine_bytes / scale, ENGINE, texts[0]),
        ("float", float_bytes / scale, FLOAT, texts[1]),
    ]
    with mpl.rc_context(SETTINGS):
        figure, _ = _bars(rows, unit=unit)
        return svg_of(figure, name, f"File size: engine {texts[0]}, float {texts[1]}")


def lsb_histogram(histogram: Histogram, name: str) -> str | None:
    """Signed differences against the fake-quant twin in LSB, on a logarithmic scale of shares."""
    total = sum(histogram.counts) + histogram.below + histogram.above
    if not total or not histogram.lsb:
        return None
    used = [abs(lsb) for lsb, count in zip(histogram.lsb, histogram.counts, strict=True) if count]
    reach = max(4, *used) if used else 4
    outside = bool(histogram.below or histogram.above)
    if outside:
        reach = max(abs(histogram.lsb[0]), abs(histogram.lsb[-1]))
    pairs = [(lsb, count) for lsb, count in zip(histogram.lsb, histogram.counts, strict=True) if abs(lsb) <= reach]
    with mpl.rc_context(SETTINGS):
        figure, axes = new_figure(5.2, 2.5)
        for lsb, count in pairs:
            colour = ENGINE if abs(lsb) <= 2 else WARN
            axes.bar(lsb, 100 * count / total, width=0.82, color=colour)
        for place, count in ((-reach - 1, histogram.below), (reach + 1, histogram.above)):
            if outside:
                axes.bar(place, 100 * count / total, width=0.82, color=WARN)
        axes.set_yscale("log")
        axes.set_ylim(100 / total / 2, 250)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        axes.set_xlabel("engine minus fake-quant twin, in LSB" + (" (outer bars: beyond)" if outside else ""))
        axes.set_ylabel("share of outputs")
        axes.grid(axis="y")
        centre = next((count for lsb, count in pairs if lsb == 0), 0)
        return svg_of(
            figure, name, f"LSB histogram: {100 * centre / total:.4g} % of {total} outputs within half an LSB"
        )


def layer_sqnr(layers: Sequence[TensorRow], name: str) -> str | None:
    """SQNR of every tensor of the quantized twin against the float twin."""
    rows = [row for row in layers if row.sqnr_db is not None]
    if not rows:
        return None
    values = [min(max(float(row.sqnr_db or 0.0), -10.0), 80.0) for row in rows]
    named = len(rows) <= NAMED_LAYERS
    with mpl.rc_context(SETTINGS):
        figure, axes = new_figure(WIDE, 3.3 if named else 2.5)
        lowest = min(range(len(rows)), key=values.__getitem__)
        axes.vlines(range(len(rows)), 0, values, color=ENGINE, linewidth=2.2 if len(rows) < 120 else 0.8)
        if len(rows) < 200:
            axes.plot(range(len(rows)), values, "o", color=ENGINE, markersize=3.6)
        axes.plot(lowest, values[lowest], "o", color=WARN, markersize=5.5)
        axes.axhline(0, color=LINE, linewidth=0.8)
        axes.set_ylabel("SQNR in dB")
        axes.grid(axis="y")
        layer_axis(axes, [row.name for row in rows])
        label = f"SQNR of {len(rows)} tensors; the lowest is {values[lowest]:.1f} dB at {rows[lowest].name}"
        return svg_of(figure, name, label)


def range_bars(ranges: Sequence[LayerRange], name: str) -> str | None:
    """The range of every tensor as a bar; where some are far wider than others, the axis is logarithmic away from zero."""
    if not ranges:
        return None
    named = len(ranges) <= NAMED_LAYERS
    sizes = sorted(max(abs(row.low), abs(row.high)) for row in ranges)
    middle = sizes[len(sizes) // 2]
    threshold = 10.0 ** math.floor(math.log10(middle)) if middle > 0 else 1.0
    with mpl.rc_context(SETTINGS):
        figure, axes = new_figure(WIDE, 3.6 if named else 2.8)
        for place, row in enumerate(ranges):
            axes.bar(place, row.high - row.low, bottom=row.low, width=0.62, color=ENGINE)
            seen = [value for value in (row.seen_low, row.seen_high) if value is not None]
            if seen:
                axes.plot([place] * len(seen), seen, "_", color=INK, markersize=6, markeredgewidth=1.1)
        if sizes[-1] > 30 * middle:
            axes.set_yscale("symlog", linthresh=threshold)
        axes.axhline(0, color=SOFT, linewidth=0.8)
        axes.set_ylabel("value")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        axes.grid(axis="y")
        layer_axis(axes, [row.name for row in ranges])
        widest = max(ranges, key=lambda row: row.high - row.low)
        label = f"Ranges of {len(ranges)} tensors; the widest is {widest.low:.3g} to {widest.high:.3g} at {widest.name}"
        return svg_of(figure, name, label)


def growth(tensors: Sequence[TensorRow], name: str) -> str | None:
    """Share of differing codes in every tensor, engine against a reference."""
    rows = [row for row in tensors if row.differing_share is not None]
    if not any(row.differing_share for row in rows):
        return None
    values = [100 * (row.differing_share or 0.0) for row in rows]
    named = len(rows) <= NAMED_LAYERS
    with mpl.rc_context(SETTINGS):
        figure, axes = new_figure(WIDE, 3.0 if named else 2.2)
        axes.bar(range(len(rows)), values, width=0.7, color=ENGINE)
        axes.set_ylabel("codes that differ")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_ylim(0, max(values) * 1.1)
        axes.grid(axis="y")
        layer_axis(axes, [row.name for row in rows])
        return svg_of(figure, name, f"Differing codes by tensor, from 0 to {max(values):.3g} %")
