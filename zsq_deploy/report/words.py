"""Numbers as a reader wants them: never rounded up to something that is not true."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "count", "decibel", "milliseconds", "percent", "points", "quality", "seconds", "times"]

#: What is written where nothing was measured.
NOTHING = "–"


def percent(share: float | None, digits: int = 2) -> str:
    """A share in percent; 99.9996 % is not written as 100 %, and 0.0004 % not as 0 %."""
    if share is None:
        return NOTHING
    value = 100 * share
    for places in range(digits, 9):
        shown = round(value, places)
        if (value >= 100 or shown < 100) and (value == 0 or shown != 0):
            break
    else:
        places = 9
    text = f"{value:.{places}f}"
    if value in (0, 100):
        text = f"{value:.0f}"
    return f"{text}\u00a0%"


def points(difference: float | None) -> str:
    """A difference of two shares in percentage points, with its sign."""
    if difference is None:
        return NOTHING
    value = 100 * difference
    if round(value, 2) == 0:
        return "±0\u00a0points" if value == 0 else f"{value:+.4f}\u00a0points".replace("-", "−")
    return f"{value:+.2f}\u00a0points".replace("-", "−")


def times(ratio: float | None) -> str:
    """A factor: ``2.3×``."""
    if ratio is None:
        return NOTHING
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def milliseconds(value: float | None) -> str:
    """A time given in milliseconds, with three significant digits and a fitting unit."""
    if value is None:
        return NOTHING
    if value >= 1000:
        return f"{_significant(value / 1000)}\u00a0s"
    return f"{_significant(value)}\u00a0ms" if value >= 0.1 else f"{_significant(value * 1000)}\u00a0µs"


def _significant(value: float, digits: int = 3) -> str:
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def seconds(value: float | None) -> str:
    """A duration: seconds, then minutes, then hours."""
    if value is None:
        return NOTHING
    if value < 60:
        return f"{_significant(value, 2) if value < 10 else format(value, '.0f')}\u00a0s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d}\u00a0s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bytes_text(value: float | None) -> str:
    """A size in decimal units."""
    if value is None:
        return NOTHING
    for unit in ("bytes", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f}\u00a0bytes" if unit == "bytes" else f"{_significant(value)}\u00a0{unit}"
        value /= 1000
    return f"{_significant(value)}\u00a0GB"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return NOTHING if value is None else f"{value:,.0f}"


def short_count(value: float | None) -> str:
    """A large number with three digits: ``40.8 M``."""
    if value is None:
        return NOTHING
    for unit in ("", " k", " M", " G"):
        if abs(value) < 1000:
            return f"{value:.0f}" if not unit else f"{_significant(value)}{unit}"
        value /= 1000
    return f"{_significant(value)}\u00a0T"


def lsb(value: float | None) -> str:
    """A difference in LSB."""
    if value is None:
        return NOTHING
    return "0" if value == 0 else f"{value:.3g}"


def decibel(value: float | None) -> str:
    """A ratio in dB; the limit of what can be measured is called identical."""
    if value is None:
        return NOTHING
    return "identical" if value >= 320 else f"{value:.1f}\u00a0dB"


def quality(value: float | None, metric: str) -> str:
    """A quality figure in its own unit."""
    return percent(value) if metric in ("top1", "agreement_with_float") else decibel(value)
