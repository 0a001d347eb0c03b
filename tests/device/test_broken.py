"""The connection breaks in every phase: once, and then the visit goes on; for good, and then nothing is half done."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import loopback
import packed
import pytest

from zsq_deploy.device import agent, session, ssh
from zsq_deploy.device.address import parse_address
from zsq_deploy.device.leftovers import Leftovers
from zsq_deploy.device.session import visit
from zsq_deploy.device.work import Measure
from zsq_deploy.errors import DeviceError

PHASES = {
    "make_folder": "its folder was made",
    "put": "bundle of ort-x86-vnni was copied",
    "start": "ort-x86-vnni was measured",
    "get": "the result was fetched",
}
"""What breaks -> what a person is told that was going on."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PAUSE", 0.01)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, home: Path) -> Any:
    """A bundle of several pieces, and an agent that pretends."""
    made = packed.job(tmp_path / "made", padding=5_300_000)
    monkeypatch.setattr(agent, "__file__", str(packed.pretend(tmp_path / "pretended.py", made)))
    return made


def device_at(port: int, there: Path) -> Any:
    device = parse_address(f"ssh://{loopback.USER}@127.0.0.1:{port}{there}", name="board")
    return type(device)(**{**vars(device), "python": sys.executable})


def tour(device: Any, work: Any, said: Any, **more: Any) -> Any:
    async def go() -> Any:
        async with visit(device, progress=said, **more) as there:
            return await there.run(work, Measure(seconds=0.01))

    return asyncio.run(go())


def before(monkeypatch: pytest.MonkeyPatch, name: str, act: Any, times: int = 1, matches: str = "") -> None:
    """Do something before a call of the link, the first `times` times that its arguments hold a word."""
    whole, left = getattr(ssh.SshLink, name), [times]

    async def first(self: Any, *given: Any) -> Any:
        if left[0] and matches in str(given):
            left[0] -= 1
            act()
        return await whole(self, *given)

    monkeypatch.setattr(ssh.SshLink, name, first)


@pytest.mark.parametrize("phase", [*PHASES, "remove"])
def test_a_connection_that_breaks_once(phase, work, wire, there, monkeypatch) -> None:
    """Whatever was going on, it goes on over a new connection, and the result is whole."""
    before(monkeypatch, phase, wire.cut, matches=".zsq.tar" if phase == "put" else "")
    said = loopback.Said()
    result = tour(device_at(wire.port, there), work, said)
    assert result.bundle_sha256 == work.manifest_sha256
    assert wire.connections == 2
    assert sum("trying again" in line for line in said.lines) == 1
    assert list(there.iterdir()) == []
    assert Leftovers().of(device_at(wire.port, there).address) == []


@pytest.mark.parametrize("phase", PHASES)
def test_a_connection_that_breaks_for_good(phase, work, wire, server, there, monkeypatch) -> None:
    """The error says how far it came and what to do; the folder that was left is removed on the next visit."""
    before(monkeypatch, phase, lambda: wire.cut(dead=True), matches=".zsq.tar" if phase == "put" else "")
    said = loopback.Said()
    device = device_at(wire.port, there)
    with pytest.raises(DeviceError) as caught:
        tour(device, work, said)
    text = str(caught.value)
    assert f"the connection broke while {PHASES[phase]}" in text
    assert "3 attempts" in text
    assert "check power and network of the device" in text
    assert wire.connections >= 4
    left = list(there.iterdir())
    if phase == "make_folder":
        assert left == []
        return
    (folder,) = left
    assert str(folder) in text
    assert Leftovers().of(device.address) == [str(folder)]
    wire.dead = False
    again = loopback.Said()
    assert tour(device, work, again).target == work.target
    assert f"removed the folder of an earlier visit, {folder}" in again.text()
    assert list(there.iterdir()) == []
    assert Leftovers().of(device.address) == []


def test_cleaning_up_that_fails_for_good_keeps_the_result(work, wire, there, monkeypatch) -> None:
    before(monkeypatch, "remove", lambda: wire.cut(dead=True))
    said = loopback.Said()
    device = device_at(wire.port, there)
    assert tour(device, work, said).verdict.passed
    assert "it is removed on the next visit" in said.text()
    assert Leftovers().of(device.address) == [str(one) for one in there.iterdir()]


def test_a_copy_goes_on_where_it_broke(work, wire, there, caplog) -> None:
    """Cut in the middle of the bytes, twice: only what had not arrived is sent again."""
    wire.limits = {1: 2_500_000, 2: 1_900_000}
    said = loopback.Said()
    assert tour(device_at(wire.port, there), work, said).target == work.target
    size = work.archive.stat().st_size / 1000
    forth = sum(step for step in said.moved if step > 0)
    assert sum(said.moved) == pytest.approx(size)
    assert size <= forth < 1.5 * size
    assert sum("trying again" in line for line in said.lines) == 2
    assert wire.connections == 3
    assert [one.message for one in caplog.records if one.name == "asyncio"] == []


def test_a_line_that_only_breaks_ends_in_an_error(work, wire, there) -> None:
    wire.limits = dict.fromkeys(range(1, 100), 300_000)  # never enough for one piece
    said = loopback.Said()
    with pytest.raises(DeviceError, match=r"was copied \(0.0 of 5.\d MB\)"):
        tour(device_at(wire.port, there), work, said)
    assert not list(there.glob("*"))  # its folder could be removed: that takes few bytes


def test_pieces_that_do_not_fit_are_sent_anew(work, wire, there, monkeypatch) -> None:
    """A copy that was put together wrongly is refused by the agent, and sent once more as a whole."""
    wire.limits = {1: 3_000_000}
    whole, seen = ssh.SshLink.put, []

    async def spoiling(self: Any, source: Path, path: str, start: int, sent: Any) -> None:
        if start:
            with Path(path).open("r+b") as file:
                file.write(b"?")
        seen.append(start)
        await whole(self, source, path, start, sent)

    monkeypatch.setattr(ssh.SshLink, "put", spoiling)
    said = loopback.Said()
    assert tour(device_at(wire.port, there), work, said).target == work.target
    assert "copying it once more" in said.text()
    assert seen[-1] == 0


def test_an_agent_that_finished_alone_is_not_run_again(work, wire, there, tmp_path, monkeypatch) -> None:
    """The line breaks while it measures; it finishes before the new connection stands, and its result is taken."""
    slow = packed.pretend(tmp_path / "slow.py", work, seconds=0.3)
    # It does not notice that nobody listens any more.
    slow.write_text(slow.read_text().replace("os._exit(3)", "pass"))
    monkeypatch.setattr(agent, "__file__", str(slow))
    monkeypatch.setattr(session, "PAUSE", 1.5)
    said = loopback.Said()
    said.when("measuring latency", wire.cut)
    runs = []
    before(monkeypatch, "get", lambda: runs.extend(there.glob("*/01.json.runs")))
    assert tour(device_at(wire.port, there), work, said).target == work.target
    assert wire.connections == 2
    assert len(runs) == 1


def test_an_agent_ends_when_its_line_is_cut(work, wire, there, tmp_path, monkeypatch) -> None:
    """It measures for a minute; after the cut another one is started, and nothing of the first goes on."""
    slow = packed.pretend(tmp_path / "slow.py", work, seconds=60.0)
    monkeypatch.setattr(agent, "__file__", str(slow))
    said = loopback.Said()
    said.when("measuring latency", lambda: wire.cut(dead=True))
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"was measured \(latency\)"):
        tour(device_at(wire.port, there), work, said)
    (folder,) = there.iterdir()
    assert _gone(str(folder))
    assert time.monotonic() - started < 40


def _gone(word: str) -> bool:
    """Whether no program has this word in its command line any more."""
    for _ in range(100):
        if not any(word in line for line in loopback.programs().values()):
            return True
        time.sleep(0.1)
    return False


def test_a_cable_that_is_pulled_is_noticed(work, wire, there, tmp_path, monkeypatch) -> None:
    """No word that the connection ended: unanswered questions tell it."""
    monkeypatch.setattr(ssh.Timing, "alive", 0.3)
    slow = packed.pretend(tmp_path / "slow.py", work, seconds=4.0)
    monkeypatch.setattr(agent, "__file__", str(slow))
    said = loopback.Said()
    said.when("measuring latency", wire.freeze)
    assert tour(device_at(wire.port, there), work, said).target == work.target
    assert "the connection broke while ort-x86-vnni was measured (latency)" in said.text()


def test_stopping_in_the_middle_leaves_nothing(work, wire, there, tmp_path, monkeypatch) -> None:
    """Ctrl-C while the agent measures: the agent is ended, and the folder removed."""
    slow = packed.pretend(tmp_path / "slow.py", work, seconds=60.0)
    monkeypatch.setattr(agent, "__file__", str(slow))
    device = device_at(wire.port, there)
    folders = []

    async def go() -> None:
        said = loopback.Said()
        task = asyncio.current_task()
        assert task is not None
        said.when("measuring latency", lambda: (folders.extend(there.iterdir()), task.cancel()))
        async with visit(device, progress=said) as session_:
            await session_.run(work, Measure())

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(go())
    assert len(folders) == 1
    assert _gone(str(folders[0]))
    assert list(there.iterdir()) == []
    assert Leftovers().of(device.address) == []


def test_a_server_that_is_killed(server, work, there) -> None:
    """Not the wire but the SSH server goes away with all its sessions, while the bundle is copied; then it is there again."""
    device = device_at(server.port, there)
    said = loopback.Said()
    said.when("copy", server.kill)
    try:
        with pytest.raises(DeviceError, match="the connection broke while bundle"):
            tour(device, work, said)
    finally:
        server.start()
    assert len(list(there.iterdir())) == 1
    assert tour(device, work, loopback.Said()).target == work.target
    assert list(there.iterdir()) == []


def test_a_workstation_that_dies_leaves_nothing_for_good(work, server, there, tmp_path, monkeypatch) -> None:
    """Killed in the middle, without a chance to clean up: the next visit does it, and a visit that goes on is left in peace."""
    slow = packed.pretend(tmp_path / "slow.py", work, seconds=60.0)
    device = device_at(server.port, there)
    program = f"""
import asyncio
from pathlib import Path
from zsq_deploy.device import agent
from zsq_deploy.device.address import parse_address
from zsq_deploy.device.session import visit
from zsq_deploy.device.work import Job, Measure

agent.__file__ = {str(slow)!r}

class Said:
    def say(self, text):
        print(text, flush=True)
    def task(self, title, total):
        from zsq_deploy.progress import SILENT
        return SILENT.task(title, total)

async def go():
    device = parse_address({device.address!r}, name="board")
    device = type(device)(**{{**vars(device), "python": {sys.executable!r}}})
    async with visit(device, progress=Said()) as there:
        await there.run(Job(Path({str(work.archive)!r}), {work.target!r}, {work.manifest_sha256!r}), Measure())

asyncio.run(go())
"""
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    while "measuring latency" not in (line := running.stdout.readline()):
        assert line, "it ended"
    (folder,) = there.iterdir()
    said = loopback.Said()
    assert tour(device, work, said).target == work.target
    assert folder.exists()
    running.kill()
    running.communicate()
    assert _gone(f"{folder}/agent.py")
    assert tour(device, work, said).target == work.target
    assert f"removed the folder of an earlier visit, {folder}" in said.text()
    assert list(there.iterdir()) == []


def test_a_list_of_leftovers_holds_only_our_folders(tmp_path) -> None:
    file = tmp_path / "state" / "left.json"
    left = Leftovers(file)
    left.claim("ssh://a", "/srv/zsq-bench-1")
    assert left.of("ssh://a") == []
    left.leave("ssh://a", "/srv/zsq-bench-1")
    left.leave("ssh://b", "/zsq-bench-2")
    assert left.of("ssh://a") == ["/srv/zsq-bench-1"]
    dead = {"host": platform.node(), "pid": os.getpid(), "since": 1.0}
    far = {**dead, "host": "another machine"}
    file.write_text(
        json.dumps(
            {
                "ssh://a": {
                    "/": {},
                    "/srv": {},
                    "/srv/zsq-bench-9": dead,
                    "/srv/zsq-bench-8": far,
                    "/srv/zsq-bench-7": 1,
                },
                "ssh://b": "/",
            }
        )
    )
    assert left.of("ssh://a") == ["/srv/zsq-bench-9"]
    assert left.of("ssh://b") == []
    left.forget("ssh://a", "/srv/zsq-bench-9")
    assert left.of("ssh://a") == []
    file.write_text("broken")
    assert left.of("ssh://a") == []
    nowhere = Leftovers(file / "a file is no folder" / "left.json")
    nowhere.claim("ssh://a", "/srv/zsq-bench-1")
    assert nowhere.of("ssh://a") == []
