"""`zsq bench --device`, `zsq devices` and `zsq doctor --device`, from the command line to the report."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import loopback
import packed
import pytest

from zsq_deploy.cli import main
from zsq_deploy.device import agent, session
from zsq_deploy.pipeline import on_device, verification
from zsq_deploy.report import load
from zsq_deploy.report.devices import device_rows


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network, deployed for two targets."""
    spec = importlib.util.spec_from_file_location("small_cli", Path(__file__).parents[1] / "cli" / "small.py")
    assert spec is not None
    assert spec.loader is not None
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    home = tmp_path_factory.mktemp("deployed")
    network, out = small.write_onnx(home / "net.onnx"), home / "out"
    data = small.write_eval(home / "data.npz")
    words = ["deploy", network, "-o", out, "--method", "fractal", "--images", 8, "--eval-data", data, "-q"]
    words += ["--target", "ort-x86-vnni", "--target", "ort-arm64"]
    patch = pytest.MonkeyPatch()
    brief = partial(verification.compare_latency, starts=1, round_seconds=0.01, round_runs=2, warmup=1)
    patch.setattr(verification, "compare_latency", lambda specs, **more: brief(specs, **{**more, "rounds": 2}))
    try:
        assert main([str(word) for word in words]) == 0
    finally:
        patch.undo()
    return out


@pytest.fixture
def out(deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may write to, and a home without devices."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("ZSQ_DEVICES", raising=False)
    monkeypatch.setattr(session, "PAUSE", 0.01)
    return Path(shutil.copytree(deployed, tmp_path / "out"))


@pytest.fixture
def zsq(capfd: Any) -> Callable[..., Any]:
    def call(*words: object) -> Any:
        capfd.readouterr()
        code = main([str(word) for word in words])
        said, err = capfd.readouterr()
        assert "Traceback" not in err
        return type("Said", (), {"code": code, "out": said, "err": err})

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_this_machine_as_a_device(out: Path, zsq: Any) -> None:
    before = load(out / "report.json")
    said = zsq(
        "bench", out, "--device", "local", "--seconds", 0.05, "--samples", 8, "--target", "ort-x86-vnni", "--streams", 2
    )
    assert said.code == 0, said.err
    assert "Equal to the workstation" in said.out
    after = load(out / "report.json")
    section = after.targets["ort-x86-vnni"].devices["local"]
    assert section.parity["workstation"].equal_share == 1.0
    assert section.parity["twin"].images == 8
    assert section.latency.p95_ms >= section.latency.median_ms > 0
    assert section.throughput is not None
    assert section.passed is True
    # Nothing else of the report is another than before.
    bare = after.to_json()
    bare["targets"]["ort-x86-vnni"]["devices"] = {}
    assert bare == before.to_json()
    page = (out / "report.html").read_text()
    assert "On the device, beside the workstation" in page
    assert section.bundle_sha256[:16] in page
    # Measuring the same engine here again keeps it.
    assert zsq("verify", out, "--target", "ort-x86-vnni", "-q").code == 0
    assert load(out / "report.json").targets["ort-x86-vnni"].devices["local"] == section


def test_several_devices_one_of_which_is_off(
    server: Any, home: Path, out: Path, there: Path, zsq: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HOME", str(home))
    place = f"ssh://{loopback.USER}@127.0.0.1:{server.port}{there}"
    assert (
        zsq("devices", "add", "board", place, "--python", sys.executable, "--threads", 2, "--note", "a note").code == 0
    )
    assert zsq("devices", "add", "off", f"ssh://{loopback.USER}@127.0.0.1:{loopback.free_port()}").code == 0
    assert json.loads(zsq("devices", "list", "--json").out)["board"]["address"] == place
    said = zsq("bench", out, "--device", "off", "--device", "board", "--seconds", 0.05, "--samples", 4, "--json",
               "--target", "ort-x86-vnni")  # fmt: skip
    assert said.code == 2
    shown = json.loads(said.out)
    assert "cannot be reached" in shown["failures"]["off"]
    assert "check that it is on" in shown["failures"]["off"]
    assert shown["results"]["ort-x86-vnni"]["board"]["passed"] is True
    section = load(out / "report.json").targets["ort-x86-vnni"].devices["board"]
    assert section.address == place
    assert section.latency.threads == 2
    assert list(there.iterdir()) == []


def test_looking_at_a_device(server: Any, home: Path, there: Path, zsq: Any) -> None:
    place = f"ssh://{loopback.USER}@127.0.0.1:{server.port}{there}"
    assert zsq("devices", "add", "board", place, "--python", sys.executable).code == 0
    said = zsq("devices", "check", "board", "-q")
    assert said.code == 0
    assert "runs ort-x86-" in said.out
    assert zsq("devices", "check", "board", f"ssh://127.0.0.1:{loopback.free_port()}", "-q").code == 1
    said = zsq("doctor", "--device", "board")
    assert said.code == 0
    assert "onnxruntime: " in said.out
    assert "tensorrt-10" in said.out
    shown = json.loads(zsq("doctor", "--device", place, "--python", sys.executable, "--json").out)
    assert shown["targets"]["ort-x86-avx2"] == []
    assert zsq("devices", "remove", "board").code == 0
    assert zsq("devices", "check").code == 2


@pytest.mark.parametrize("phase", ["copy", "measuring latency"])
def test_a_report_is_whole_whatever_breaks(
    phase: str, server: Any, wire: Any, home: Path, out: Path, there: Path, zsq: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The line breaks for good in the middle of the second target: the first one's result stands, nothing of the second is there."""
    monkeypatch.setenv("HOME", str(home))
    heard = loopback.Said()
    heard.when("ort-arm64", lambda: heard.when(phase, lambda: wire.cut(dead=True)))
    monkeypatch.setattr("zsq_deploy.cli.benches.progress_for", lambda *_: heard)
    words = (
        "--device",
        f"ssh://{loopback.USER}@127.0.0.1:{wire.port}{there}",
        "--python",
        sys.executable,
        "--seconds",
        0.05,
    )
    said = zsq("bench", out, *words, "--samples", 4, "--target", "ort-x86-vnni", "--target", "ort-arm64")
    assert said.code == 2
    assert "the connection broke while" in said.err
    assert "check power and network" in said.err
    report = load(out / "report.json")
    assert list(report.targets["ort-x86-vnni"].devices) == [f"{loopback.USER}@127.0.0.1:{wire.port}"]
    assert report.targets["ort-arm64"].devices == {}
    assert not [name for name in files(out) if "zsq.tar" in name or name.endswith(".lock")]
    assert "On the device" in (out / "report.html").read_text()


def test_a_result_that_was_brought_by_hand(out: Path, zsq: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "net.zsq.tar"
    assert zsq("bundle", out / "ort-x86-vnni", "-o", bundle, "--samples", 4).code == 0
    away = tmp_path / "away"
    away.mkdir()
    subprocess.run(["tar", "xf", str(bundle), "-C", str(away)], check=True, timeout=30)
    subprocess.run(
        [sys.executable, "agent.py", "--seconds", "0.05"], cwd=away, check=True, capture_output=True, timeout=120
    )
    words = ("bench", out, "--bundle", bundle, "--result", away / "result.json", "--device")
    said = zsq(*words, "board7")
    assert said.code == 0, said.err
    section = load(out / "report.json").targets["ort-x86-vnni"].devices["board7"]
    assert section.address == "by hand"
    assert section.parity["workstation"].equal_share == 1.0
    before = files(out)
    # Another bundle of the same engine is another bundle.
    other = tmp_path / "other.zsq.tar"
    assert zsq("bundle", out / "ort-x86-vnni", "-o", other, "--samples", 3).code == 0
    said = zsq("bench", out, "--bundle", other, "--result", away / "result.json", "--device", "board7")
    assert said.code == 2
    assert "belongs to another bundle" in said.err
    # One changed byte of the bundle.
    data = bytearray(bundle.read_bytes())
    data[len(data) // 3] ^= 4
    (tmp_path / "changed.zsq.tar").write_bytes(data)
    for more in (("--result", away / "result.json", "--device", "board7"), ("--device", "local")):
        said = zsq("bench", out, "--bundle", tmp_path / "changed.zsq.tar", *more)
        assert said.code == 2
        assert "changed after" in said.err
    # Half a result, none, and words that do not fit together.
    (tmp_path / "half.json").write_bytes((away / "result.json").read_bytes()[:300])
    assert "not whole" in zsq("bench", out, "--bundle", bundle, "--result", tmp_path / "half.json", "--device", "x").err
    assert zsq("bench", out, "--bundle", bundle, "--result", tmp_path / "none.json", "--device", "x").code == 2
    assert zsq("bench", out, "--bundle", bundle, "--result", away / "result.json").code == 2
    assert zsq("bench", out, "--bundle", bundle).code == 2
    assert files(out) == before


def test_a_bundle_of_another_engine_is_refused(out: Path, zsq: Any, tmp_path: Path) -> None:
    job = packed.job(tmp_path / "made")
    before = files(out)
    said = zsq("bench", out, "--bundle", job.archive, "--device", "local")
    assert said.code == 2
    assert "another engine" in said.err
    assert files(out) == before


def test_a_device_where_the_engine_disagrees(out: Path, zsq: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Exit code 1, and the report says it."""
    bundle = tmp_path / "net.zsq.tar"
    assert zsq("bundle", out / "ort-x86-vnni", "-o", bundle, "--samples", 4).code == 0
    sealed = packed.sealed(bundle)
    numbers = {**packed.result("")["parity"]["twin"], "within_2_lsb": 0.5}
    found = packed.result(
        sealed, parity={"twin": numbers}, verdict={"passed": False, "failed": ["within_2_lsb is 0.5 <script>"]}
    )
    (tmp_path / "result.json").write_text(json.dumps(found))
    said = zsq("bench", out, "--bundle", bundle, "--result", tmp_path / "result.json", "--device", "board")
    assert said.code == 1
    assert "within_2_lsb is 0.5" in said.out
    page = (out / "report.html").read_text()
    assert "<script>" not in page
    assert "board: within_2_lsb is 0.5 &lt;script&gt;" in page
    assert "1,500\u00a0MHz → 1,000\u00a0MHz" in page
    assert "55\u00a0°C → 55\u00a0°C" in page
    assert "yes: the clock fell" in page
    assert "1.24.4 ran an engine that was built and verified with" in page


def test_times_of_an_emulator_are_marked(out: Path, zsq: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "net.zsq.tar"
    assert zsq("bundle", out / "ort-x86-vnni", "-o", bundle, "--samples", 4).code == 0
    found = packed.result(packed.sealed(bundle))
    found["device"]["emulated"] = True
    (tmp_path / "result.json").write_text(json.dumps(found))
    assert zsq("bench", out, "--bundle", bundle, "--result", tmp_path / "result.json", "--device", "board").code == 0
    rows = {row.title: row.cells[1] for row in device_rows(load(out / "report.json"), "ort-x86-vnni")}
    assert rows["Median"] == "1.50\u00a0ms (emulated)"
    assert rows["Peak"].endswith(" (emulated)")
    assert rows["Within 2 LSB of the twin"] == "100\u00a0%"
    assert "Throttled" not in rows
    said = zsq("report", out)
    assert "ort-x86-vnni on board: passed, within 2 LSB of the twin 100\u00a0%" in said.out
    assert "(emulated: says nothing)" in " ".join(said.out.split())


def test_targets_that_a_device_cannot_run_are_left_out(out: Path, zsq: Any, monkeypatch: Any) -> None:
    """This machine has no Arm processor: left out unless it is asked for by name, and then noted."""
    asked = ("bench", out, "--device", "local", "--seconds", 0.02, "--samples", 2, "--json")
    whole = on_device.lacks

    def as_if_x86(target: Any, probe: Any) -> list[str]:
        return whole(target, probe) if target.name != "ort-x86-vnni" else []

    monkeypatch.setattr(on_device, "lacks", as_if_x86)
    shown = json.loads(zsq(*asked).out)
    if agent.platform.machine() == "x86_64":
        assert [(row["device"], row["target"]) for row in shown["skipped"]] == [("local", "ort-arm64")]
        shown = json.loads(zsq(*asked, "--target", "ort-arm64").out)
        assert "asimd" in shown["results"]["ort-arm64"]["local"]["notes"][-1]
    monkeypatch.setattr(on_device, "lacks", lambda *_: ["CPU feature nothing"])
    said = zsq(*asked)
    assert said.code == 2
    assert "can run none of the engines" in json.loads(said.out)["failures"]["local"]


def test_wrong_use(out: Path, zsq: Any, tmp_path: Path) -> None:
    before = files(out)
    for words, message in (
        (("--device", "nothing"), "there is no device 'nothing'"),
        (("--device", "local", "--device", "local"), "named twice"),
        (("--device", "local", "--target", "ort-x86-avx2"), "no engine"),
        (("--device", "local", "--samples", 0), "0 samples prove nothing"),
        (("--device", "local", "--bundle", tmp_path / "none.tar"), "no such bundle"),
        (("--device", "ssh://me:geheim@host"), "holds a password"),
        (("--affinity", "0"), "is about devices"),
        (("--device", "local", "--affinity", "999"), "--affinity 999 cannot be set"),
        (("--device", "local", "--python", "/no/python"), "/no/python"),
    ):
        said = zsq("bench", out, *words, "--seconds", 0.01)
        assert said.code == 2, words
        assert message in said.err, words
        assert "geheim" not in said.err
    assert files(out) == before
    (out / "report.json").unlink()
    said = zsq("bench", out, "--device", "local")
    assert said.code == 2
    assert "zsq verify" in said.err


def test_ssh_is_an_extra(out: Path, zsq: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    monkeypatch.delitem(sys.modules, "zsq_deploy.device.ssh", raising=False)
    import zsq_deploy.device as package

    monkeypatch.delattr(package, "ssh", raising=False)
    said = zsq("bench", out, "--device", "ssh://pi4")
    assert said.code == 2
    assert "pip install 'zsq-deploy[ssh]'" in said.err
