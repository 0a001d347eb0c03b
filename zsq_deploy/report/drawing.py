"""How every figure of the report is drawn: size, colours, and the way from matplotlib to SVG text that stands inside the page.

Figures are drawn without a display and are the same for the same numbers (no dates, fixed identifiers). They take their colours from the
page's style sheet, so that they follow light and dark. The four series colours are those of Okabe and Ito, which stay apart for
colour-blind readers.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    "ENGINE",
    "FLOAT",
    "INK",
    "LINE",
    "NAMED_LAYERS",
    "REFERENCE",
    "SETTINGS",
    "SOFT",
    "WARN",
    "WIDE",
    "layer_axis",
    "new_figure",
    "short_name",
    "svg_of",
]

# Colours are written as these stand-ins and become variables of the style sheet afterwards.
INK, SOFT, LINE = "#010101", "#020202", "#030303"
ENGINE, FLOAT, REFERENCE, WARN = "#040404", "#050505", "#060606", "#070707"
_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    ENGINE: "--engine",
    FLOAT: "--float",
    REFERENCE: "--reference",
    WARN: "--warn",
}
SETTINGS: Any = {  # newer stubs name every setting, older ones do not
    "svg.hashsalt": "zsq-deploy",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}
#: So many layers get a name in a figure; longer networks are shown by number, and by name in the table.
NAMED_LAYERS = 80
#: Width of a figure over the whole page, in inches.
WIDE = 10.9


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def svg_of(figure: Figure, name: str, label: str) -> str:
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


def layer_axis(axes: Axes, names: Sequence[str]) -> None:
    """Tensors along the horizontal axis, by name where there is room."""
    count = len(names)
    if count <= NAMED_LAYERS:
        axes.set_xticks(range(count), [short_name(name, 26) for name in names], rotation=90, fontsize=7)
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("tensor, in topological order (names in the table)")
    axes.set_xlim(-0.8, count - 0.2)


def short_name(name: str, length: int) -> str:
    """The end of a long name, without what exporters add to every name."""
    name = name.removesuffix("_output_0").lstrip("/").replace("Normalization", "Norm")
    return name if len(name) <= length else "…" + name[1 - length :]
