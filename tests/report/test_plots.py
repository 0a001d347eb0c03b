"""The figures: what is drawn has the size of the numbers, read back from the SVG."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

from zsq_deploy.report import plots
from zsq_deploy.report.drawing import short_name
from zsq_deploy.report.parity_schema import AccuracySection, Histogram, TensorRow
from zsq_deploy.report.schema import LatencySection, LayerRange

sys.path.insert(0, str(Path(__file__).parent))
import sample


def boxes(svg, *colours):
    """Every filled rectangle of the colours: left, right, top, bottom (in points, downwards), in the order of drawing."""
    found = []
    for path, style in re.findall(r'<path d="([^"]*)"[^>]*?style="([^"]*)"', svg):
        points = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)
        if "z" in path and len(points) == 4 and any(f"fill: var(--{colour})" in style for colour in colours):
            x, y = ([float(value) for value in values] for values in zip(*points, strict=True))
            found.append((min(x), max(x), min(y), max(y)))
    return found


def widths(svg, *colours):
    return [right - left for left, right, _, _ in boxes(svg, *colours)]


def heights(svg, *colours):
    return [bottom - top for _, _, top, bottom in boxes(svg, *colours)]


def words_of(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def ticks(svg):
    return [float(word.replace("−", "-")) for word in words_of(svg) if re.fullmatch(r"[−\d.]+", word)]


def test_bars_of_sizes_are_in_proportion():
    svg = plots.size_bars(4_000_000, 1_100_000, "s", ("1.10 MB", "4.00 MB"))
    engine, float_ = widths(svg, "engine", "float")
    assert engine / float_ == pytest.approx(1.1 / 4, rel=1e-4)
    assert {"engine", "float", "1.10 MB", "4.00 MB", "megabytes"} <= set(words_of(svg))
    assert "kilobytes" in words_of(plots.size_bars(4000, 1100, "s", ("1.10 kB", "4.00 kB")))
    assert plots.size_bars(None, 1100, "s", ("", "")) is None


def latency(**changes):
    return LatencySection.model_validate(
        {
            "engine": {"median_ms": 0.5, "p90_ms": 0.6, "p99_ms": 0.8},
            "float_best": {"median_ms": 0.9, "p90_ms": 1.0, "p99_ms": 1.1},
            "float32": {"median_ms": 1.0, "p90_ms": 1.2, "p99_ms": 50.0},
            **changes,
        }
    )


def test_bars_of_latencies_are_medians_and_a_rare_slow_run_does_not_press_them_together():
    svg = plots.latency_bars(latency(), "l")
    assert [width / widths(svg, "float")[-1] for width in (*widths(svg, "engine"), *widths(svg, "float"))] == [
        pytest.approx(0.5, rel=1e-3), pytest.approx(0.9, rel=1e-3), 1.0,
    ]  # fmt: skip
    assert max(ticks(svg)) <= 1.7 * 1.28
    assert "Median latency: engine 0.500" in svg
    # A float mode that is fp32 itself is no bar of its own.
    same = {"median_ms": 1.0, "p90_ms": 1.2, "p99_ms": 50.0}
    assert len(widths(plots.latency_bars(latency(float_best=same), "l"), "float")) == 1
    assert plots.latency_bars(LatencySection.model_validate({}), "l") is None


def test_the_median_stands_at_its_bar_and_not_behind_its_marks():
    svg = plots.latency_bars(latency(), "l")
    (bar,) = boxes(svg, "engine")
    (place,) = (
        (float(x), float(y))
        for x, y, word in re.findall(r'<text[^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg)
        if word.startswith("0.500")
    )
    assert bar[1] < place[0] < bar[1] + 0.2 * (bar[1] - bar[0])  # p90 and p99 are farther out
    assert bar[2] - 10 < place[1] < (bar[2] + bar[3]) / 2  # above the line to them


def test_shares_end_at_100_percent():
    accuracy = AccuracySection.model_validate(
        {"metric": "top1", "float": 0.99, "reference": 0.98, "engine": 0.495, "images": 100}
    )
    svg = plots.accuracy_bars(accuracy, "a", ["99 %", "98 %", "49.5 %"])
    (float_,), (twin,), (engine,) = (widths(svg, colour) for colour in ("float", "reference", "engine"))
    assert (twin / float_, engine / float_) == (pytest.approx(98 / 99, rel=1e-3), pytest.approx(0.5, rel=1e-3))
    assert max(ticks(svg)) == 100
    # An estimate is measured against float, so float itself is no result.
    guess = accuracy.model_copy(update={"metric": "agreement_with_float", "estimate": True})
    assert widths(plots.accuracy_bars(guess, "a", ["", "98 %", "49.5 %"]), "float") == []


def test_the_histogram_shows_shares_and_marks_what_is_far():
    counts = {-3: 10, -1: 100, 0: 890}
    numbers = list(range(-4, 5))
    histogram = Histogram.model_validate(
        {"lsb": numbers, "counts": [counts.get(lsb, 0) for lsb in numbers], "below": 0, "above": 0}
    )
    svg = plots.lsb_histogram(histogram, "h")
    near = [height for height in heights(svg, "engine") if height > 1e-6]
    far = [height for height in heights(svg, "warn") if height > 1e-6]
    assert (len(near), len(far)) == (2, 1)  # beyond 2 LSB stands out
    # On a logarithmic axis heights differ by the logarithms of the shares.
    assert (near[1] - near[0]) / (near[0] - far[0]) == pytest.approx(math.log10(8.9) / 1.0, rel=1e-3)
    assert "89 % of 1000 outputs" in svg


def test_ranges_are_bars_from_low_to_high():
    rows = [LayerRange(name=f"t{i}", low=-float(i), high=2.0 * i + 1) for i in range(4)]
    svg = plots.range_bars(rows, "r")
    found = heights(svg, "engine")
    assert [height / found[0] for height in found] == [pytest.approx(3 * i + 1, rel=1e-3) for i in range(4)]
    assert "the widest is -3 to 7 at t3" in svg


def test_the_tensor_that_quantization_hurts_most_is_marked():
    rows = [TensorRow(name=f"t{i}", index=i, sqnr_db=value) for i, value in enumerate((40.0, 12.5, 30.0))]
    svg = plots.layer_sqnr(rows, "q")
    assert svg.count("var(--warn)") >= 1
    assert "the lowest is 12.5 dB at t1" in svg
    assert plots.layer_sqnr([TensorRow(name="t", sqnr_db=None)], "q") is None


def test_differences_that_grow_are_in_proportion():
    rows = [TensorRow(name=f"t{i}", index=i, differing_share=share) for i, share in enumerate((0.0, 0.01, 0.04))]
    svg = plots.growth(rows, "g")
    drawn = [height for height in heights(svg, "engine") if height > 1e-6]
    assert drawn[1] / drawn[0] == pytest.approx(4.0, rel=1e-3)
    assert plots.growth(rows[:1], "g") is None  # nothing differs: nothing to draw


def test_identifiers_of_two_figures_do_not_meet():
    first, second = (set(re.findall(r'\bid="([^"]+)"', plots.size_bars(8, 4, name, ("4", "8")))) for name in ("a", "b"))
    assert first
    assert not first & second


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/layer1/layer1.0/Relu_output_0", "layer1/layer1.0/Relu"),
        ("block1.bn1/BatchNormalization_output_0", "block1.bn1/BatchNorm"),
        ("/" + "a" * 30 + "/Conv_output_0", "…" + "a" * 20 + "/Conv"),
    ],
)
def test_names_keep_what_tells_them_apart(name, shown):
    assert short_name(name, 26) == shown
    assert len(shown) <= 26


def test_the_sample_draws_everything():
    """The report that the tests of the page look at has something for every figure."""
    target = sample.report().targets["ort-x86-vnni"]
    assert target.parity.histogram is not None
    assert all(
        (
            plots.latency_bars(target.latency, "l"),
            plots.lsb_histogram(target.parity.histogram, "h"),
            plots.growth(target.parity.divergence.tensors, "g"),
        )
    )
