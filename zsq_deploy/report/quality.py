"""What the page shows of the quality of a calibration set: figures and facts, drawn from the report."""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.ticker import FuncFormatter

from zsq_deploy.report import words
from zsq_deploy.report.drawing import (
    ENGINE,
    FLOAT,
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
from zsq_deploy.report.quality_schema import SetQuality

__all__ = ["cards", "coverage_figure", "distance_figure", "facts", "real_figure"]

_FLOOR = 1 / 16


def cards(quality: SetQuality) -> list[dict[str, str]]:
    """The figures that matter most: title, figure, unit, detail."""
    found: list[dict[str, str]] = []
    coverage, variety, norm, real = quality.coverage, quality.diversity, quality.batch_norm, quality.real
    if coverage.summary is not None and coverage.worst is not None:
        detail = f"of the reach that batch norm and other images show; worst {coverage.worst.name}: {words.percent(coverage.worst.share, 0)}"
        found.append(_card("Coverage of the ranges", words.percent(coverage.summary, 1), "on average", detail))
    if norm is not None:
        detail = f"gap of the means, and {norm.spread:.3f} of the spreads; {words.count(norm.images)} images"
        found.append(_card("Batch-norm distance", f"{norm.mean:.3f}", "stored σ", detail))
    if variety.effective_images is not None:
        detail = f"as varied as so many wholly different images, of {words.count(variety.images)}"
        if variety.classes is not None and variety.classes_seen is not None:
            detail += f"; {variety.classes_seen} of {variety.classes} classes"
        found.append(_card("Variety", f"{variety.effective_images:.1f}", "images", detail))
    if real is not None:
        side = "too narrow" if real.bias_bits < 0 else "too wide"
        detail = f"against {words.count(real.images)} real images; {abs(real.bias_bits):.2f} bits {side} on average"
        found.append(_card("Range error", f"{real.extent_bits:.2f}", "bits", detail))
    return found


def _card(title: str, figure: str, unit: str, detail: str) -> dict[str, str]:
    return {"title": title, "figure": figure, "unit": unit, "detail": detail}


def facts(quality: SetQuality) -> list[tuple[str, str]]:
    """Everything else, as rows."""
    coverage, variety, like = quality.coverage, quality.diversity, quality.agreement
    bits = None if coverage.excess_bits is None else f"{coverage.excess_bits:.2f} bits"
    rows: list[tuple[str, str | None]] = [
        (
            "Held against",
            f"{words.count(quality.held_out)} images of its kind, {words.count(quality.pictures)} pictures",
        ),
        ("Tensors judged", words.count(coverage.judged)),
        ("Reached to less than half", words.count(coverage.below_half)),
        ("Channels that never change", words.percent(coverage.unexcited)),
        ("Numbers of other images clipped", words.percent(coverage.clipped, 3)),
        ("Wider than batch norm implies", bits),
        ("Directions", None if variety.effective_directions is None else f"{variety.effective_directions:.1f}"),
        ("Mean cosine of two images", None if variety.mean_cosine is None else f"{variety.mean_cosine:.3f}"),
        ("Effective classes", None if variety.effective_classes is None else f"{variety.effective_classes:.1f}"),
        ("Confidence of float", words.percent(variety.confidence, 1)),
    ]
    if like is not None:
        rows.append(("8 bits simulated, like float", f"{words.percent(like.top1)}, {words.decibel(like.sqnr_db)}"))
    if quality.real is not None:
        rows.append(("Real numbers clipped", words.percent(quality.real.clipped, 3)))
    return [(key, text) for key, text in rows if text and text != words.NOTHING]


def coverage_figure(quality: SetQuality, name: str) -> str | None:
    """The share of its reach that every judged tensor has, on a logarithmic axis; what is below a half is marked."""
    rows = [
        (tensor.name, min([share for share in (tensor.share_implied, tensor.share_witnessed) if share is not None]))
        for tensor in quality.tensors
        if tensor.share_implied is not None or tensor.share_witnessed is not None
    ]
    if not rows:
        return None
    values = [min(max(share, _FLOOR), 2.0) for _, share in rows]
    with mpl.rc_context(SETTINGS):
        figure, axes = new_figure(WIDE, 3.3 if len(rows) <= NAMED_LAYERS else 2.5)
        colours = [WARN if value < 0.5 else ENGINE for value in values]
        axes.vlines(range(len(rows)), 1.0, values, color=colours, linewidth=2.2 if len(rows) < 120 else 0.8)
        if len(rows) < 200:
            axes.scatter(range(len(rows)), values, s=14, color=colours, zorder=3)
        axes.axhline(1.0, color=SOFT, linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.set_ylim(_FLOOR * 0.9, 2.2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        axes.set_ylabel("reach of the set")
        axes.grid(axis="y")
        layer_axis(axes, [row[0] for row in rows])
        worst = min(rows, key=lambda row: row[1])
        label = f"Reach of the set in {len(rows)} tensors; the least is {100 * worst[1]:.3g} % at {worst[0]}"
        return svg_of(figure, name, label)


def distance_figure(quality: SetQuality, name: str) -> str | None:
    """Gaps of mean and standard deviation at every batch normalization."""
    norm = quality.batch_norm
    if norm is None or not norm.layers:
        return None
    layers = norm.layers
    with mpl.rc_context(SETTINGS):
        figure, axes = new_figure(WIDE, 3.0 if len(layers) <= NAMED_LAYERS else 2.3)
        axes.bar([place - 0.2 for place in range(len(layers))], [row.mean for row in layers], 0.38, color=ENGINE)
        axes.bar([place + 0.2 for place in range(len(layers))], [row.spread for row in layers], 0.38, color=REFERENCE)
        axes.set_ylabel("stored σ")
        axes.grid(axis="y")
        layer_axis(axes, [row.name for row in layers])
        worst = max(layers, key=lambda row: row.mean)
        label = f"Distance to the statistics of {len(layers)} batch norms; the largest gap of means is {worst.mean:.3g} at {worst.name}"
        return svg_of(figure, name, label)


def real_figure(quality: SetQuality, name: str) -> str | None:
    """How many bits the range of every tensor is off, against real images."""
    rows = [(row.name, row.real_extent_bits) for row in quality.tensors if row.real_extent_bits is not None]
    if not rows:
        return None
    values = [min(max(bits, -6.0), 6.0) for _, bits in rows]
    with mpl.rc_context(SETTINGS):
        figure, axes = new_figure(WIDE, 3.0 if len(rows) <= NAMED_LAYERS else 2.3)
        axes.bar(range(len(rows)), values, width=0.7, color=[WARN if value < -1 else FLOAT for value in values])
        axes.axhline(0.0, color=SOFT, linewidth=0.8)
        reach = max(0.5, math.ceil(2 * max(abs(value) for value in values)) / 2)
        axes.set_ylim(-reach, reach)
        axes.set_ylabel("bits: narrower, wider")
        axes.grid(axis="y")
        layer_axis(axes, [row[0] for row in rows])
        worst = max(rows, key=lambda row: abs(row[1]))
        return svg_of(
            figure, name, f"Ranges against real images; the farthest off is {worst[1]:+.2f} bits at {worst[0]}"
        )
