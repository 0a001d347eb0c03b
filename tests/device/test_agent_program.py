"""The agent as a program that another one starts: its probe, its tether, its claim on a result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import packed
import pytest

from zsq_deploy.device import agent


def start(*words: object, **more: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, agent.__file__, *map(str, words)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **more)


def test_the_probe() -> None:
    program = start("--probe")
    said, _ = program.communicate(timeout=60)
    found = json.loads(said)
    assert program.returncode == 0
    assert found["event"] == "probe"
    assert found["device"]["machine"] == platform.machine()
    assert found["device"]["cpu"]["cores"] == os.cpu_count()
    import onnxruntime

    assert found["runtimes"]["onnxruntime"]["version"] == onnxruntime.__version__


def test_a_tethered_agent_ends_with_its_caller(tmp_path: Path) -> None:
    job = packed.job(tmp_path / "made")
    program = start(
        "--bundle",
        job.archive,
        "--out",
        tmp_path / "r.json",
        "--work",
        tmp_path,
        "--events",
        "--tether",
        "--seconds",
        60,
    )
    assert program.stdout is not None
    assert program.stdin is not None
    while "latency" not in program.stdout.readline():
        pass
    started = time.monotonic()
    program.stdin.close()
    assert program.wait(20) == agent.GONE
    assert time.monotonic() - started < 10
    assert not (tmp_path / "r.json").exists()
    program.stdout.close()
    assert program.stderr is not None
    program.stderr.close()


def test_two_agents_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The second waits, and takes what the first has found."""
    job = packed.job(tmp_path / "made")
    out = tmp_path / "r.json"
    words = ("--bundle", job.archive, "--out", out, "--work", tmp_path, "--events", "--tether", "--seconds", 2)
    first = start(*words)
    assert first.stdout is not None
    while "latency" not in first.stdout.readline():
        pass
    second = start(*words)
    assert second.stdout is not None
    assert json.loads(second.stdout.readline())["event"] == "waiting"
    assert json.loads(first.stdout.read().splitlines()[-1])["event"] == "done"
    told = json.loads(out.read_text())
    assert [json.loads(line)["event"] for line in second.stdout.read().splitlines()] == ["done"]
    for program in (first, second):
        program.communicate(timeout=60)
    assert json.loads(out.read_text()) == told
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("zsq-agent")] == []


CPUINFO = {
    "x86": "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512_vnni\n",
    "arm": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nHardware\t: BCM2711\n",
}


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "emulated", "features"),
    [
        ("x86_64", "x86", False, ["avx2", "avx512_vnni"]),
        ("aarch64", "arm", False, ["asimd", "asimddp"]),
        ("aarch64", "x86", True, ["asimd"]),  # an emulator for one program, which shows the system below
    ],
)
def test_an_emulated_processor_is_known(machine, cpuinfo, emulated, features, monkeypatch) -> None:
    monkeypatch.setattr(agent.platform, "machine", lambda: machine)
    monkeypatch.setattr(agent.platform, "processor", lambda: "")
    monkeypatch.setattr(agent, "read_text", {"/proc/cpuinfo": CPUINFO[cpuinfo]}.get)
    monkeypatch.delenv("QEMU_CPU", raising=False)
    found = agent.device()
    assert found["emulated"] is emulated
    assert found["cpu"]["features"] == features
    assert found["cpu"]["model"] == {"x86": "Xeon", "arm": "BCM2711"}[cpuinfo] if not emulated else machine


def test_openvino_takes_the_session_of_its_targets(tmp_path: Path) -> None:
    """The device's name is not one of the runtime's properties."""
    pytest.importorskip("openvino")
    import numpy as np

    from zsq_deploy.backends import get_target

    target = get_target("openvino-cpu")
    assert target.session["device"] == "CPU"
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    engine = agent.OpenVino(packed.engine(tmp_path / "relu.onnx"), target.session, 1)
    (name,) = engine.outputs
    np.testing.assert_array_equal(engine.run({"x": x[:1]})[name], np.maximum(x[:1], 0))
    np.testing.assert_array_equal(engine.run({"x": x})[name], np.maximum(x, 0))  # compiled for one sample


def test_what_a_runtime_cannot_do_is_said_in_a_line(tmp_path: Path) -> None:
    job = packed.job(tmp_path / "made", rank=3)
    program = start("--bundle", job.archive, "--out", tmp_path / "r.json", "--work", tmp_path)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 2
    assert said.startswith("refused: onnxruntime ")
    assert "cannot run the engine: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "r.json").exists()
