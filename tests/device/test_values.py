"""Addresses, the inventory, and what is taken from a device: everything that needs no network."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import packed
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.backends import TARGETS
from zsq_deploy.device import agent
from zsq_deploy.device.address import Device, parse_address
from zsq_deploy.device.inventory import Inventory
from zsq_deploy.device.link import Lines
from zsq_deploy.device.result import LIMIT, parse_probe, parse_result
from zsq_deploy.errors import DeviceError, UsageError, ZsqError
from zsq_deploy.pipeline.on_device import BY_HAND, lacks, section_of
from zsq_deploy.report.device_schema import DeviceLatency, DeviceSection
from zsq_deploy.report.schema import LatencyNumbers
from zsq_deploy.verify.latency import summarize


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("local", ("", None, None, None)),
        ("ssh://pi4", ("pi4", None, None, None)),
        ("ssh://Board", ("Board", None, None, None)),
        ("ssh://pi@pi4.local:2222/srv/work", ("pi4.local", "pi", 2222, "/srv/work")),
        ("ssh://pi@pi4/", ("pi4", "pi", None, "/")),
        ("ssh://pi4/~/work", ("pi4", None, None, "~/work")),
        ("ssh://root@[fe80::1%25eth0]:22/tmp", ("fe80::1%25eth0", "root", 22, "/tmp")),
        ("ssh://a%40b@host/with%20space", ("host", "a@b", None, "/with space")),
    ],
)
def test_addresses(text: str, parts: tuple[Any, ...]) -> None:
    device = parse_address(text)
    assert (device.host, device.user, device.port, device.folder) == parts
    assert parse_address(device.address) == replace(device, name=parse_address(device.address).name)
    assert device.local == (text == "local")


@pytest.mark.parametrize(
    "text",
    [
        "", "pi4", "http://pi4", "ssh://", "ssh://:22", "ssh://pi4:99999", "ssh://pi4:x", "ssh://pi4?x=1", "ssh://-oProxyCommand=x",
        "ssh://a;b@host", "ssh://ho st", "ssh://[::1", "ssh://pi4/a%0ab", "ssh://-l@host", "ssh://$(x)@host",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


@pytest.mark.parametrize("text", ["ssh://pi:geheim@pi4", "ssh://pi:geheim@pi4:22/x", "ssh://:geheim@pi4"])
def test_passwords_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert "password" in caught.value.what
    assert "geheim" not in str(caught.value)
    assert "ssh-copy-id" in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(
    user=st.none() | st.from_regex(r"[a-z_][a-z0-9_.@-]{0,9}", fullmatch=True),
    host=st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,9}[a-z0-9])?", fullmatch=True),
    port=st.none() | st.integers(1, 65535),
    folder=st.none()
    | st.text(st.characters(exclude_categories=["C"], exclude_characters="/\\"), min_size=1, max_size=9),
    home=st.booleans(),
)
def test_an_address_says_all_of_where_a_device_is(user, host, port, folder, home) -> None:
    place = None if folder is None else (f"~/{folder}" if home else f"/{folder}")
    device = Device("x", host, user, port, place)
    assert parse_address(device.address, name="x") == device


def test_the_inventory(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "new" / "devices.yaml")
    assert inventory.devices() == {}
    pi = replace(
        parse_address("ssh://pi@pi4.local/srv/work", name="pi4"),
        python="~/venv/bin/python",
        threads=4,
        affinity="0-3",
        note="am Fenster",
    )
    inventory.add(pi)
    inventory.add(parse_address("local", name="here"))
    assert inventory.devices() == {"pi4": pi, "here": Device("here")}
    assert inventory.find("pi4") == pi
    assert inventory.find("local") == Device("local")
    assert inventory.find("ssh://a").host == "a"
    text = yaml.safe_load(inventory.file.read_text())
    assert text["devices"]["here"] == {"address": "local"}
    assert text["devices"]["pi4"]["address"] == "ssh://pi@pi4.local/srv/work"
    with pytest.raises(UsageError, match="already"):
        inventory.add(pi)
    inventory.add(replace(pi, threads=2), force=True)
    assert inventory.find("pi4").threads == 2
    with pytest.raises(UsageError, match="there is no device 'pi5'") as caught:
        inventory.find("pi5")
    assert "pi4" in str(caught.value)
    with pytest.raises(UsageError):
        inventory.remove(["here", "pi5"])
    assert set(inventory.devices()) == {"pi4", "here"}
    inventory.remove(["here", "pi4"])
    assert inventory.devices() == {}
    for name in ("local", "", "a b", "../x", "-x"):
        with pytest.raises(UsageError):
            inventory.add(replace(pi, name=name))
    for change in ({"threads": 0}, {"affinity": "all"}):
        with pytest.raises(UsageError):
            inventory.add(replace(pi, **change))


@pytest.mark.parametrize(
    "text",
    [
        "devices: [",
        "devices: [1]",
        "devices: {pi4: {}}",
        "devices: {pi4: {address: ssh://a, password: geheim}}",
        "devices: {'a b': {address: ssh://a}}",
        "devices: {pi4: {address: 'ssh://a:geheim@b'}}",
        "hosts: {}",
    ],
)
def test_an_inventory_that_a_person_spoiled(tmp_path: Path, text: str) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text(text)
    with pytest.raises(ZsqError) as caught:
        Inventory(file).devices()
    assert str(file) in str(caught.value)
    assert "geheim" not in str(caught.value)
    with pytest.raises(ZsqError):
        Inventory(file).add(Device("x"))
    assert file.read_text() == text


def test_a_result_is_taken_and_shown_as_it_is() -> None:
    value = packed.result("a" * 64)
    result = parse_result(json.dumps(value).encode(), manifest_sha256="a" * 64, target="ort-x86-vnni", where="board")
    section = DeviceSection.model_validate(section_of(result, BY_HAND, ["a note"]))
    assert section.latency.p95_ms == 1.5
    assert section.before.mhz == 1500
    assert section.after.mhz == 1000
    assert section.throttled is True
    assert section.parity["twin"].equal_share == 1
    assert any("1.24.4 ran an engine that was built and verified with 1.32.0" in note for note in section.notes)
    assert "a note" in section.notes
    del value["latency"]["iqr_ms"]  # an agent of an earlier bundle does not tell the spread
    old = parse_result(json.dumps(value).encode(), manifest_sha256="a" * 64, target="ort-x86-vnni", where="board")
    assert DeviceSection.model_validate(section_of(old, BY_HAND, [])).latency.iqr_ms is None


def test_device_and_workstation_tell_the_same_statistics() -> None:
    times = [0.5 + 0.01 * ((37 * index) % 101) ** 1.5 for index in range(240)]
    there, here = agent.summary(times), summarize(times, threads=1).to_json()
    told = {name for name in DeviceLatency.model_fields if name.endswith("_ms")}
    assert told == {name for name in LatencyNumbers.model_fields if name.endswith("_ms") and "device" not in name}
    for name in told - {"first_ms", "load_ms"}:
        assert there[name] == pytest.approx(here[name], rel=1e-12), name


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"median_ms": 1.5', b'"median_ms": NaN'),
        lambda text: text.replace(b'"median_ms": 1.5', b'"median_ms": 1e999'),
        lambda text: text.replace(b'"median_ms": 1.5', b'"median_ms": -1'),
        lambda text: text.replace(b'"equal_share": 1.0', b'"equal_share": 1.5'),
        lambda text: text.replace(b'"a', b'"b', 1),
        lambda text: text.replace(b"zsq-result", b"zsq-bundle"),
        lambda text: b"\xff" + text,
        lambda text: b"[" * 100_000,
        lambda text: b" " * (LIMIT + 1),
        lambda text: b"",
        lambda text: b"[]",
    ],
)
def test_a_result_that_is_not_whole_is_refused(spoil: Any) -> None:
    text = json.dumps(packed.result("a" * 64)).encode()
    assert parse_result(text, manifest_sha256="a" * 64, target="ort-x86-vnni", where="board")
    with pytest.raises(DeviceError):
        parse_result(spoil(text), manifest_sha256="a" * 64, target="ort-x86-vnni", where="board")


def probe(features: list[str], **runtimes: Any) -> Any:
    device = {**packed.result("")["device"], "cpu": {"model": "a board", "features": features, "cores": 4}}
    return parse_probe({"agent": 1, "device": device, "runtimes": runtimes, "clocks": {"mhz": None}}, where="board")


def test_what_a_device_can_run() -> None:
    ort = {"version": "1.24.4", "providers": ["CPUExecutionProvider"]}
    arm = probe(["asimd"], onnxruntime=ort, openvino={"version": None, "missing": "No module named 'openvino'"})
    can = {name for name, target in TARGETS.items() if not lacks(target, arm)}
    assert can == {"ort-arm64"}
    assert lacks(TARGETS["ort-x86-vnni"], arm) == ["CPU feature avx512_vnni|avx_vnni"]
    assert "No module named 'openvino'" in lacks(TARGETS["openvino-cpu"], arm)[0]
    assert "folder of scripts" in lacks(TARGETS["tensorrt-10"], arm)[0]
    new = probe(["avx2", "avx_vnni"], onnxruntime=ort, openvino={"version": "2026.4", "devices": ["CPU", "GPU.0"]})
    can = {name for name, target in TARGETS.items() if not lacks(target, new)}
    assert can == {"ort-x86-vnni", "ort-x86-avx2", "openvino-cpu", "openvino-gpu"}
    assert lacks(TARGETS["openvino-npu"], new) == ["OpenVINO finds no NPU"]
    old = probe(["avx2"], onnxruntime=ort)
    assert {name for name, target in TARGETS.items() if not lacks(target, old)} == {"ort-x86-avx2"}
    with pytest.raises(DeviceError):
        parse_probe({"event": "probe"}, where="board")
    assert not math.isnan(new.device.memory_bytes or 0)


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="ab\n", max_size=30), size=st.integers(1, 7))
def test_lines_are_the_same_however_they_come(text: str, size: int) -> None:
    cut = Lines()
    found = [line for start in range(0, len(text), size) for line in cut.feed(text[start : start + size])]
    found += cut.last()
    assert found == [*text.split("\n")[:-1], *([text.split("\n")[-1]] if text.split("\n")[-1] else [])]
