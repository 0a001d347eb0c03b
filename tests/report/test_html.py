"""The page: complete, self-contained, escaped, deterministic, and drawn whatever is missing."""

from __future__ import annotations

import functools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from zsq_deploy.errors import ZsqError
from zsq_deploy.report import parse, render_html, words, write_html
from zsq_deploy.report.build import finish

sys.path.insert(0, str(Path(__file__).parent))
import sample

VOID = {"meta", "img", "br", "link", "input", "hr", "path", "use", "rect", "circle", "line", "polygon", "polyline"}


class Checker(HTMLParser):
    """Counts elements, and checks that they close in order, that identifiers are unique and that references exist."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        doubled = {name for name in self.ids if self.ids.count(name) > 1}
        assert not doubled, f"identifiers used twice: {doubled}"
        missing = {link for link in self.links if link not in self.ids}
        assert not missing, f"references to nothing: {missing}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on")], "event handler"
        if "id" in values:
            self.ids.append(values["id"])
        for name in ("href", "aria-labelledby"):
            if name in values:
                target = values[name]
                if name == "href":
                    assert target.startswith("#"), target
                self.links.append(target.removeprefix("#"))
        self.links += re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in values.values()))
        if tag == "img":
            assert values["src"].startswith("data:image/")
            assert values["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return render_html(sample.report(targets=2))


@functools.cache
def slim_text():
    value = sample.report().to_json()
    value["calibration"]["ranges"] = value["calibration"]["ranges"][:2]
    value["calibration"]["quality"] = None
    target = value["targets"]["ort-x86-vnni"]
    target["layers"] = target["layers"][:2]
    target["parity"]["divergence"] = None
    return json.dumps(value)


def slim():
    """A report without the figures that take long to draw."""
    return json.loads(slim_text())


@functools.cache
def whole_text():
    return text_of(render_html(parse(slim())))


def text_of(page):
    """What a reader sees, in one line; nothing that a program wrote by mistake is among it."""
    text = re.sub(r"\s+", " ", " ".join(Checker(page).text)).strip()
    assert not re.search(r"\b(None|nan|inf|Undefined)\b|[{}]{2}", text)
    return text


def test_the_page_is_well_formed(page):
    checker = Checker(page)
    assert checker.tags.count("svg") >= 10
    assert checker.tags.count("img") == 1
    assert "script" not in checker.tags
    assert "link" not in checker.tags


def test_nothing_is_loaded_from_anywhere(page):
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|src=[\"'](?!data:)", page)
    assert "default-src 'none'" in page


def test_the_figures_are_those_of_the_report(page):
    text = text_of(page)
    times = sample.report(targets=2).targets["ort-x86-avx2"].latency.engine
    row = (times.median_ms, times.iqr_ms, times.p90_ms, times.p95_ms, times.p99_ms, times.first_ms, times.load_ms)
    assert " ".join(words.milliseconds(each) for each in row).replace("\u00a0", " ") in text
    for figure in (
        "resnet20_cifar10",
        "2.30×",
        "84.30 %",
        "−0.40 points",
        "311 kB",
        "1 of 10 demanded limits",
        "98.70 %",
    ):
        assert figure in text, figure
    for title in (
        "Exact integer arithmetic",
        "Calibrated without data",
        "Beside other calibration sets",
        "ort-x86-avx2",
    ):
        assert title in text


def test_every_picture_has_a_text_for_those_who_do_not_see_it(page):
    drawn = re.findall(r"<svg[^>]*>", page)
    assert drawn
    assert all('role="img"' in tag and re.search(r'aria-label="[^"]{10,}"', tag) for tag in drawn)


def test_the_same_report_gives_the_same_page(page):
    report = parse(parse(sample.report(targets=2).to_json()).to_json())
    again = render_html(report)
    stamp = re.compile(r"<span>\d{4}-\d\d-\d\d \d\d:\d\d</span>")
    assert stamp.sub("", again) == stamp.sub("", page)


def test_an_estimate_is_called_one():
    text = " ".join(Checker(render_html(sample.report(estimate=True))).text)
    assert "estimate" in text
    assert "Agreement with float" in text
    assert "1 of 5 demanded limits is not kept" in text


ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & $\\frac{x}$ $ ]]>"


def poison(value):
    """The attack in every free text of a report."""
    if isinstance(value, dict):
        return {key: poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def test_text_from_a_model_or_a_machine_cannot_become_markup():
    value = sample.report().to_json()
    keep = {
        "calibration": {"preview": value["calibration"]["preview"]["data_uri"]},
        "metric": value["targets"]["ort-x86-vnni"]["accuracy"]["metric"],
    }
    poisoned = poison(value)
    poisoned["calibration"]["preview"]["data_uri"] = keep["calibration"]["preview"]
    poisoned["targets"] = {ATTACK: poisoned["targets"]["ort-x86-vnni"]}
    poisoned["targets"][ATTACK]["accuracy"]["metric"] = keep["metric"]
    poisoned["evaluation"]["kind"] = "labelled"
    poisoned["recipe"] = {ATTACK: {ATTACK: [ATTACK]}}
    checker = Checker(render_html(parse(poisoned)))
    assert "script" not in checker.tags
    assert checker.tags.count("img") == 1
    assert "alert(1)" in " ".join(checker.text)


LEAST = {
    "schema_version": 1,
    "tool": {"version": "0"},
    "model": {"name": "m"},
    "calibration": {"method": "ones", "images": 1, "seconds": 0},
    "targets": {"t": {"engine": {"path": "e", "bytes": 1}}},
}


def test_the_least_report_is_drawn():
    text = " ".join(Checker(render_html(parse(LEAST))).text)
    assert "not measured" in text
    assert "no evaluation data" in text


def test_a_report_without_targets_is_drawn():
    assert "Calibrated without data" in render_html(parse({**LEAST, "targets": {}}))


SHOWN_BY = {
    "accuracy": ("Accuracy", "84.30 %"),
    "float_model": ("", "311 kB instead of 1.08 MB"),
    "integer": ("Integer arithmetic", "98.2 % of kernel time"),
    "parity": ("As simulated", "largest 2 LSB"),
    "latency": ("Speed", "2.30× as fast as fp32"),
    "layers": ("", "SQNR by tensor"),
    "notes": ("", "activations have one scale a tensor"),
}
"""Part of a target -> title of its card, and what only it can say."""


@pytest.mark.parametrize("part", SHOWN_BY)
def test_any_part_of_a_target_may_be_missing(part):
    value = slim()
    target = value["targets"]["ort-x86-vnni"]
    title, there = SHOWN_BY[part]
    assert there in whole_text()
    del target[part]
    target["not_measured"] = {part: "this was not asked for"}
    text = text_of(render_html(parse(value)))
    assert there not in text
    assert f"Not measured {part} this was not asked for" in text
    if title:  # the card stays, and says why it is empty
        assert re.search(rf"{title} – this was not asked for", text)


@pytest.mark.parametrize("part", ["float", "integer", "unfused", "histogram", "top1_agreement"])
def test_any_part_of_parity_may_be_missing(part):
    value = slim()
    value["targets"]["ort-x86-vnni"]["parity"][part] = None
    value["targets"]["ort-x86-vnni"]["not_measured"] = {f"parity.{part}": "this was not asked for"}
    text = text_of(render_html(parse(value)))
    reference = {"float": "Float network", "integer": "Exact integer arithmetic", "unfused": "Runtime, fusion off"}.get(
        part
    )
    if reference:
        assert f"{reference} this was not asked for" in text
    assert ("Differences from the fake-quant twin" in text) == (part != "histogram")
    assert ("; top-1 agreement 98.70 %" in text) == (part != "top1_agreement")


@pytest.mark.parametrize("part", ["engine", "float32", "float_best", "speedup"])
def test_any_part_of_latency_may_be_missing(part):
    value = slim()
    value["targets"]["ort-x86-vnni"]["latency"][part] = None
    text = text_of(render_html(parse(value)))
    if part != "float_best":
        assert "Speed – not measured" in text
    if part == "speedup":
        assert "× as fast" not in text
    runners = {"engine": "int8 engine", "float32": "fp32, all optimizations", "float_best": "NCHWc layout"}
    for runner, mode in runners.items():
        assert (mode in text) == (runner != part)


@pytest.mark.parametrize("metric", ["psnr_db", "sqnr_db"])
def test_networks_without_classes_are_drawn(metric):
    value = slim()
    value["targets"]["ort-x86-vnni"]["accuracy"] = {
        "metric": metric, "float": 31.25, "reference": 31.0, "engine": 30.75, "images": 12, "estimate": metric == "sqnr_db",
    }  # fmt: skip
    text = text_of(render_html(parse(value)))
    assert (
        f"PSNR 30.8 dB −0.50 dB float {31.25:.1f} dB; 12 images"
        if metric == "psnr_db"
        else "Output SQNR estimate 30.8 dB"
    ) in text
    assert "%  accuracy" not in text


@pytest.mark.parametrize(
    ("method", "images", "said"),
    [
        ("zeroq", 256, "256 calibration images were made from the network alone"),
        ("gaussian", 64, "64 computed patterns"),
        ("real", 32, "calibrated with 32 real images"),
        ("bn-analytic", 0, "its ranges come from the network alone"),
    ],
)
def test_the_page_says_where_the_calibration_set_came_from(method, images, said):
    value = slim()
    value["calibration"].update(method=method, images=images)
    text = " ".join(Checker(render_html(parse(value))).text)
    assert said in text
    assert ("No training data" in text or "No image" in text) == (method != "real")


def test_the_page_says_how_much_memory_synthesis_took():
    value = slim()
    value["calibration"].update(peak_rss_bytes=812_000_000, peak_gpu_bytes=None)
    text = " ".join(" ".join(Checker(render_html(parse(value))).text).split())
    assert "Peak memory 812 MB" in text
    assert "Peak memory of the GPU" not in text
    value["calibration"]["peak_gpu_bytes"] = 3_400_000_000
    assert "Peak memory of the GPU 3.4" in " ".join(" ".join(Checker(render_html(parse(value))).text).split())


def test_a_slow_and_large_engine_is_not_praised():
    value = slim()
    target = value["targets"]["ort-x86-vnni"]
    target["latency"]["speedup"] = 0.8
    target["float_model"]["bytes"] = 100_000
    text = " ".join(Checker(render_html(parse(value))).text)
    assert "0.80× as fast as fp32: slower" in re.sub(r"\s+", " ", text)
    assert "3.11× larger" in text


def test_a_very_deep_network_is_drawn():
    value = slim()
    target = value["targets"]["ort-x86-vnni"]
    row = target["layers"][0]
    target["layers"] = [{**row, "name": f"layer{i}", "index": i} for i in range(400)]
    value["calibration"]["ranges"] = [
        {"name": f"layer{i}", "low": -(10.0 ** (i % 7)), "high": 0.0 if i == 5 else 1.0} for i in range(400)
    ]
    page = render_html(parse(value))
    assert len(page) < 2_000_000
    assert 'aria-label="SQNR of 400 tensors' in page
    assert 'aria-label="Ranges of 400 tensors; the widest is -1e+06 to 1 at layer6"' in page
    assert "Ranges as a table (400 tensors)" in page


def test_a_picture_by_its_file_is_taken_in_from_the_report_s_own_folder_only(tmp_path):
    value = slim()
    value["targets"] = {}
    (tmp_path / "out").mkdir()
    for folder in (tmp_path, tmp_path / "out"):
        Image.new("RGB", (4, 4)).save(folder / "sheet.png")
    preview = {"images": 1, "caption": "one"}
    value["calibration"]["preview"] = {**preview, "file": "sheet.png"}
    write_html(parse(value), tmp_path / "out" / "report.html")
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for outside in ("../sheet.png", str(tmp_path / "sheet.png"), "missing.png"):
        value["calibration"]["preview"] = {**preview, "file": outside}
        assert "data:image" not in render_html(parse(value), folder=tmp_path / "out").replace("img-src data:", "")
    (tmp_path / "out" / "fake.png").write_text("no picture")
    value["calibration"]["preview"] = {**preview, "file": "fake.png"}
    with pytest.raises(ZsqError, match="neither PNG nor JPEG"):
        render_html(parse(value), folder=tmp_path / "out")


def test_layers_that_went_back_to_float_are_shown_with_the_reason():
    parts = sample.parts()
    engine = next(iter(parts["targets"].values()))["engine"]
    engine.update(
        quantizer="nncf",
        weights={"path": "openvino-cpu/engine.bin", "bytes": 1234, "sha256": "0" * 64},
        vendor={"path": "openvino-cpu/vendor.xml", "bytes": 99, "sha256": "1" * 64},
        accuracy_control={
            "metric": "agreement with float on synthetic images",
            "samples": 32,
            "max_drop": 0.01,
            "float": 1.0,
            "quantized": 0.9,
            "final": 0.995,
            "reached": True,
            "returned_to_float": [{"node": "layer3/<conv>", "reason": "0.0500 below float with it"}],
        },
    )
    page = render_html(finish(parts))
    Checker(page)
    for word in (
        "Accuracy control",
        "layer3/&lt;conv&gt;",
        "0.0500 below float with it",
        "vendor.xml",
        "engine.bin",
        "nncf",
    ):
        assert word in page, word
    engine["accuracy_control"].update(returned_to_float=[], reached=False)
    page = render_html(finish(parts))
    assert "No layer had to go back to float" in page
    assert "was not reached" in page
