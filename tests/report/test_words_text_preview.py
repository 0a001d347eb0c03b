"""Numbers in words, the terminal summary, and the contact sheet."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from zsq_deploy.report import contact_sheet, parse, summary, words

sys.path.insert(0, str(Path(__file__).parent))
import sample


def plain(text):
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100 %"), (0, "0 %"), (0.9222, "92.22 %"), (0.999999, "99.9999 %"), (0.0000012, "0.0001 %"), (None, "–")],
)
def test_percent(share, text):
    assert plain(words.percent(share)) == text


@given(st.floats(0, 1))
def test_percent_never_rounds_to_all_or_nothing(share):
    text = plain(words.percent(share))
    number = float(text.removesuffix(" %"))
    if 1e-10 < share < 1 - 1e-10:
        assert 0 < number < 100
    assert number == pytest.approx(100 * share, abs=0.0051)


@pytest.mark.parametrize(
    ("call", "value", "text"),
    [
        (words.points, -0.0006, "−0.06 points"),
        (words.points, 0.0, "±0 points"),
        (words.points, -0.000002, "−0.0002 points"),
        (words.milliseconds, 0.4123, "0.412 ms"),
        (words.milliseconds, 12.345, "12.3 ms"),
        (words.milliseconds, 2345.0, "2.35 s"),
        (words.milliseconds, 0.0305, "30.5 µs"),
        (words.milliseconds, 0.0, "0 µs"),
        (words.seconds, 3.21, "3.2 s"),
        (words.seconds, 71.5, "1 min 12 s"),
        (words.seconds, 7260.0, "2 h 01 min"),
        (words.bytes_text, 311_204, "311 kB"),
        (words.bytes_text, 12, "12 bytes"),
        (words.bytes_text, 1_083_000, "1.08 MB"),
        (words.bytes_text, 16e9, "16.0 GB"),
        (words.times, 2.304, "2.30×"),
        (words.short_count, 40_813_184, "40.8 M"),
        (words.short_count, 640, "640"),
        (words.decibel, 320.0, "identical"),
        (words.decibel, 29.44, "29.4 dB"),
    ],
)
def test_units(call, value, text):
    assert plain(call(value)) == text
    assert call(None) == words.NOTHING


def printed(report, width=100):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(summary(report), highlight=False)
    return plain(console.file.getvalue())


def test_the_summary_says_what_matters():
    text = printed(sample.report(targets=2))
    for figure in ("resnet20_cifar10", "zeroq, 256 images", "2.30×", "84.30 %", "ort-x86-avx2", "311 kB"):
        assert figure in text
    assert "not kept  ort-x86-avx2: speed-up" in text


def test_the_memory_of_synthesis_is_said():
    value = sample.report().to_json()
    assert "812 MB" in printed(parse(value)).replace("\u00a0", " ")
    value["calibration"]["peak_gpu_bytes"] = 3_400_000_000
    assert "812 MB, 3.40 GB on the GPU" in printed(parse(value)).replace("\u00a0", " ")


def test_the_summary_takes_names_as_they_are():
    value = sample.report().to_json()
    value["targets"] = {"[red]odd[/red]": value["targets"]["ort-x86-vnni"]}
    value["model"]["name"] = "[bold]m"
    text = printed(parse(value))
    assert "[red]odd[/red]" in text
    assert "[bold]m" in text


def test_the_summary_of_little_is_short():
    least = {
        "schema_version": 1,
        "tool": {"version": "0"},
        "model": {"name": "m"},
        "calibration": {"method": "ones", "images": 1, "seconds": 0},
        "targets": {"t": {"engine": {"path": "e", "bytes": 1}, "not_measured": {"latency": "not asked for"}}},
    }
    text = printed(parse(least))
    assert "t: latency was not measured: not asked for" in text
    assert "speed-up" not in text


def picture(preview):
    return Image.open(io.BytesIO(base64.b64decode(preview["data_uri"].partition(",")[2])))


def test_the_contact_sheet_undoes_the_preprocessing():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    colours = np.array([[255, 0, 0], [10, 200, 30]], np.uint8)
    inputs = (colours / 255 - mean) / std
    images = np.broadcast_to(inputs[:, :, None, None], (2, 3, 8, 8))
    preview = contact_sheet(images, mean=mean, std=std, size=16, gap=4)
    sheet = picture(preview)
    assert sheet.size == (36, 16)
    assert sheet.getpixel((8, 8)) == (255, 0, 0, 255)
    assert sheet.getpixel((28, 8)) == (10, 200, 30, 255)
    assert sheet.getpixel((18, 8))[3] == 0
    assert preview["images"] == 2


def test_the_caption_counts_the_whole_set():
    first = np.zeros((24, 1, 4, 6), np.float32)
    assert contact_sheet(first, total=48)["caption"] == "The first 24 of 48 images, 6×4"
    assert contact_sheet(first)["caption"] == "All 24 images, 6×4"
    assert contact_sheet(first, limit=5, total=5)["caption"] == "The first 5 of 24 images, 6×4"
    assert contact_sheet(first[:1])["caption"] == "The only image, 6×4"


def test_raw_pixels_gray_and_feature_maps():
    gray = picture(contact_sheet(np.full((1, 1, 4, 4), 128.0), raw_pixels=True))
    assert gray.getpixel((2, 2)) == (128, 128, 128, 255)
    preview = contact_sheet(np.random.default_rng(0).normal(size=(3, 16, 4, 4)))
    assert "first of 16 channels" in preview["caption"]
    broken = contact_sheet(np.full((1, 3, 2, 2), np.nan))
    assert picture(broken).getpixel((0, 0)) == (0, 0, 0, 255)


def test_what_is_no_image_has_no_contact_sheet():
    assert contact_sheet(np.zeros((4, 10))) is None
    assert contact_sheet(np.zeros((0, 3, 4, 4))) is None


def test_many_large_images_stay_a_small_picture():
    noise = np.random.default_rng(0).random((64, 3, 224, 224))
    preview = contact_sheet(noise)
    assert preview["images"] == 24
    assert preview["caption"] == "The first 24 of 64 images, 224×224"
    assert len(preview["data_uri"]) < 1_500_000
