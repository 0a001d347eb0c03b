"""What the page says of the quality of a calibration set."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

from zsq_deploy.errors import ZsqError
from zsq_deploy.report import quality, render_html
from zsq_deploy.report.quality_schema import SetQuality
from zsq_deploy.report.schema import parse

sys.path.insert(0, str(Path(__file__).parent))
import sample


def made(**changes: object) -> SetQuality:
    return SetQuality.model_validate({**sample.quality(), **changes})


def test_the_page_shows_figures_numbers_and_the_reason_for_the_method():
    page = render_html(sample.report())
    for text in (
        "How good the set is, without real data",
        "68.4",
        "worst logits",
        "0.034",
        "8 of 10 classes",
        "0.54 bits too narrow",
        "Reach of the set in",
        "Distance to the statistics of 19 batch norms",
        "Ranges against real images; the farthest off is -2.64 bits at logits",
        "Why zeroq: chosen by",
        "zeroq lost 0.1 points in W8A8",
    ):
        assert text in page, text


def test_without_quality_the_page_says_nothing_of_it():
    value = sample.report().to_json()
    value["calibration"]["quality"] = value["calibration"]["recommendation"] = None
    page = render_html(parse(value))
    assert "How good the set is" not in page
    assert "chosen by" not in page


def test_what_was_not_measured_is_left_out():
    bare = SetQuality.model_validate(
        {"images": 4, "coverage": {"summary": None}, "diversity": {"images": 4}, "batch_norm": None}
    )
    assert quality.cards(bare) == []
    assert quality.coverage_figure(bare, "a") is None
    assert quality.distance_figure(bare, "b") is None
    assert quality.real_figure(bare, "c") is None
    assert ("Held against", "0 images of its kind, 0 pictures") in quality.facts(bare)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 1.0, 50.0])
def test_a_coverage_of_any_size_can_be_drawn(share):
    row = {"name": "a$b_{c}", "share_witnessed": share, "channels": 1, "real_extent_bits": -20.0}
    drawn = made(tensors=[row])
    figure = quality.coverage_figure(drawn, "x")
    assert figure is not None
    assert "a$b_{c}" in figure
    assert ("--warn" in figure) == (share < 0.5)  # less than half is marked
    assert "-20.00 bits at a$b_{c}" in (quality.real_figure(drawn, "y") or "")


def test_wide_ranges_are_called_so():
    real = {**sample.quality()["real"], "bias_bits": 0.3}
    (card,) = [card for card in quality.cards(made(real=real)) if card["title"] == "Range error"]
    assert "0.30 bits too wide" in card["detail"]


def test_a_share_beyond_one_is_refused_where_it_cannot_be():
    value = copy.deepcopy(sample.report().to_json())
    value["calibration"]["quality"]["coverage"]["summary"] = 1.2
    with pytest.raises(ZsqError, match=r"calibration.quality.coverage.summary"):
        parse(value)
