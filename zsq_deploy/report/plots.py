"""The figures of the report, as SVG text that stands inside the page.

Every figure is drawn by matplotlib without a display, is the same for the same numbers (no dates, fixed identifiers), and
takes its colours from the page's style sheet, so that it follows light and dark. The four series colours are those of Okabe
and Ito, which stay apart for colour-blind readers.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from zsq_deploy.report import words
from zsq_deploy.report.schema import AccuracySection, Histogram, LatencySection, LayerRange, TensorRow

__all__ = ["accuracy_bars", "growth", "latency_bars", "layer_sqnr", "lsb_histogram", "range_bars", "size_bars"]

# Colours are written as these stand-ins and become variables of the style sheet afterwards.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_ENGINE, _FLOAT, _REFERENCE, _WARN = "#040404", "#050505", "#060606", "#070707"
_VARIABLES = {
    _INK: "--ink",
    _SOFT: "--soft",
    _LINE: "--line",
    _ENGINE: "--engine",
    _FLOAT: "--float",
    _REFERENCE: "--reference",
    _WARN: "--warn",
}
_SETTINGS: Any = {  # newer stubs name every setting, older ones do not
    "svg.hashsalt": "zsq-deploy",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.linewidth": 0.8,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
}
#: So many layers get a name in a figure; longer networks are shown by number, and by name in the table.
_NAMED_LAYERS = 80
#: Width of a figure over the whole page, in inches.
_WIDE = 10.9


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element for the page: no prolog, unique identifiers, theme colours, a text for readers."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    text = re.sub(r"(font: [^;\"]*?[\d.]+px )[^;\"]+", r"\1var(--font)", text)
    width, height = re.findall(r'\b(?:width|height)="([\d.]+)pt"', text)[:2]
    opening = (
        f'<svg class="plot" role="img" aria-label="{html.escape(label, quote=True)}" '
        f'style="width:{float(width) * 4 / 3:.0f}px" viewBox="0 0 {width} {height}">'
        f"<title>{html.escape(label)}</title>"
    )
    return opening + text[text.index(">") + 1 :].strip()


def _bars(
    rows: Sequence[tuple[str, float, str, str]],
    *,
    errors: Sequence[Sequence[tuple[float, str]]] = (),
    unit: str,
    whiskers: Sequence[tuple[float, float]] = (),
) -> tuple[Figure, Axes]:
    """Horizontal bars from 0 with the value written behind each: ``(label, value, colour, text)``."""
    figure, axes = _figure(5.2, 0.42 * len(rows) + 0.75)
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
            axes.plot([value, shown], [place, place], color=_SOFT, linewidth=1)
            axes.plot(shown, place, marker=style if mark <= limit else ">", color=_INK, markersize=5, linestyle="none")
            end = max(end, shown)
        if whiskers:
            low, high = whiskers[places[0] - place]
            axes.plot([low, high], [place, place], color=_INK, linewidth=1.4)
            end = max(end, high)
        axes.text(end + reach * 0.02, place, text, va="center", ha="left", parse_math=False, fontsize=9)
    axes.set_yticks(places, [label for label, *_ in rows])
    for label in axes.get_yticklabels():
        label.set_color(_INK)
        label.set_parse_math(False)
    axes.set_xlim(0, reach * 1.28)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure, axes


def latency_bars(latency: LatencySection, name: str) -> str | None:
    """Median of engine, best float mode and fp32, with p90 and p99 as marks."""
    rows, errors = [], []
    same = latency.float_best is not None and latency.float_best == latency.float32
    for key, label, colour in (
        ("engine", "engine", _ENGINE),
        ("float_best", "float, best mode", _FLOAT),
        ("float32", "float, fp32", _FLOAT),
    ):
        numbers = getattr(latency, key)
        if numbers is None or numbers.median_ms is None or (same and key == "float_best"):
            continue
        rows.append((label, numbers.median_ms, colour, words.milliseconds(numbers.median_ms)))
        marks = ((numbers.p90_ms, "|"), (numbers.p99_ms, "d"))
        errors.append([(value, style) for value, style in marks if value is not None])
    if not rows:
        return None
    with mpl.rc_context(_SETTINGS):
        figure, _ = _bars(rows, errors=errors, unit="milliseconds an inference")
        return _svg(figure, name, "Median latency: " + ", ".join(f"{row[0]} {row[3]}" for row in rows))


def accuracy_bars(accuracy: AccuracySection, name: str, texts: Sequence[str]) -> str | None:
    """Float, reference and engine; shares in percent, with one standard error of the sample as a whisker."""
    percent = accuracy.metric in ("top1", "agreement_with_float")
    factor = 100.0 if percent else 1.0
    rows, whiskers = [], []
    for (label, value, colour), text in zip(
        (
            ("float", accuracy.float_, _FLOAT),
            ("fake-quant twin", accuracy.reference, _REFERENCE),
            ("engine", accuracy.engine, _ENGINE),
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
    with mpl.rc_context(_SETTINGS):
        figure, _ = _bars(rows, unit=unit, whiskers=whiskers if accuracy.standard_error else ())
        return _svg(figure, name, f"{unit}: " + ", ".join(f"{row[0]} {row[3]}" for row in rows))


def size_bars(float_bytes: int | None, engine_bytes: int, name: str, texts: Sequence[str]) -> str | None:
    """File sizes of float network and engine."""
    if not float_bytes:
        return None
    scale, unit = (1e6, "megabytes") if max(float_bytes, engine_bytes) >= 1e6 else (1e3, "kilobytes")
    rows = [
        ("engine", engine_bytes / scale, _ENGINE, texts[0]),
        ("float", float_bytes / scale, _FLOAT, texts[1]),
    ]
    with mpl.rc_context(_SETTINGS):
        figure, _ = _bars(rows, unit=unit)
        return _svg(figure, name, f"File size: engine {texts[0]}, float {texts[1]}")


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
    with mpl.rc_context(_SETTINGS):
        figure, axes = _figure(5.2, 2.5)
        for lsb, count in pairs:
            colour = _ENGINE if abs(lsb) <= 2 else _WARN
            axes.bar(lsb, 100 * count / total, width=0.82, color=colour)
        for place, count in ((-reach - 1, histogram.below), (reach + 1, histogram.above)):
            if outside:
                axes.bar(place, 100 * count / total, width=0.82, color=_WARN)
        axes.set_yscale("log")
        axes.set_ylim(100 / total / 2, 250)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        axes.set_xlabel("engine minus fake-quant twin, in LSB" + (" (outer bars: beyond)" if outside else ""))
        axes.set_ylabel("share of outputs")
        axes.grid(axis="y")
        centre = next((count for lsb, count in pairs if lsb == 0), 0)
        return _svg(figure, name, f"LSB histogram: {100 * centre / total:.4g} % of {total} outputs within half an LSB")


def _layer_axis(axes: Axes, names: Sequence[str]) -> None:
    count = len(names)
    if count <= _NAMED_LAYERS:
        axes.set_xticks(range(count), [_short(name, 26) for name in names], rotation=90, fontsize=7)
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("tensor, in topological order (names in the table)")
    axes.set_xlim(-0.8, count - 0.2)


def _short(name: str, length: int) -> str:
    """The end of a long name, without what exporters add to every name."""
    name = name.removesuffix("_output_0").lstrip("/")
    return name if len(name) <= length else "…" + name[1 - length :]


def layer_sqnr(layers: Sequence[TensorRow], name: str) -> str | None:
    """SQNR of every tensor of the quantized twin against the float twin."""
    rows = [row for row in layers if row.sqnr_db is not None]
    if not rows:
        return None
    values = [min(max(float(row.sqnr_db or 0.0), -10.0), 80.0) for row in rows]
    named = len(rows) <= _NAMED_LAYERS
    with mpl.rc_context(_SETTINGS):
        figure, axes = _figure(_WIDE, 3.3 if named else 2.5)
        lowest = min(range(len(rows)), key=values.__getitem__)
        axes.vlines(range(len(rows)), 0, values, color=_ENGINE, linewidth=2.2 if len(rows) < 120 else 0.8)
        if len(rows) < 200:
            axes.plot(range(len(rows)), values, "o", color=_ENGINE, markersize=3.6)
        axes.plot(lowest, values[lowest], "o", color=_WARN, markersize=5.5)
        axes.axhline(0, color=_LINE, linewidth=0.8)
        axes.set_ylabel("SQNR in dB")
        axes.grid(axis="y")
        _layer_axis(axes, [row.name for row in rows])
        label = f"SQNR of {len(rows)} tensors; the lowest is {values[lowest]:.1f} dB at {rows[lowest].name}"
        return _svg(figure, name, label)


def range_bars(ranges: Sequence[LayerRange], name: str) -> str | None:
    """The range of every tensor as a bar; where some are far wider than others, the axis is logarithmic away from zero."""
    if not ranges:
        return None
    named = len(ranges) <= _NAMED_LAYERS
    sizes = sorted(max(abs(row.low), abs(row.high)) for row in ranges)
    middle = sizes[len(sizes) // 2]
    threshold = 10.0 ** math.floor(math.log10(middle)) if middle > 0 else 1.0
    with mpl.rc_context(_SETTINGS):
        figure, axes = _figure(_WIDE, 3.6 if named else 2.8)
        for place, row in enumerate(ranges):
            axes.bar(place, row.high - row.low, bottom=row.low, width=0.62, color=_ENGINE)
            seen = [value for value in (row.seen_low, row.seen_high) if value is not None]
            if seen:
                axes.plot([place] * len(seen), seen, "_", color=_INK, markersize=6, markeredgewidth=1.1)
        if sizes[-1] > 30 * middle:
            axes.set_yscale("symlog", linthresh=threshold)
        axes.axhline(0, color=_SOFT, linewidth=0.8)
        axes.set_ylabel("value")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(axis="y")
        _layer_axis(axes, [row.name for row in ranges])
        widest = max(ranges, key=lambda row: row.high - row.low)
        label = f"Ranges of {len(ranges)} tensors; the widest is {widest.low:.3g} to {widest.high:.3g} at {widest.name}"
        return _svg(figure, name, label)


def growth(tensors: Sequence[TensorRow], name: str) -> str | None:
    """Share of differing codes in every tensor, engine against a reference."""
    rows = [row for row in tensors if row.differing_share is not None]
    if not any(row.differing_share for row in rows):
        return None
    values = [100 * (row.differing_share or 0.0) for row in rows]
    named = len(rows) <= _NAMED_LAYERS
    with mpl.rc_context(_SETTINGS):
        figure, axes = _figure(_WIDE, 3.0 if named else 2.2)
        axes.bar(range(len(rows)), values, width=0.7, color=_ENGINE)
        axes.set_ylabel("codes that differ")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_ylim(0, max(values) * 1.1)
        axes.grid(axis="y")
        _layer_axis(axes, [row.name for row in rows])
        return _svg(figure, name, f"Differing codes by tensor, from 0 to {max(values):.3g} %")
