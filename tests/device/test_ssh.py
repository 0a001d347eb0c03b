"""SSH as a user knows it: host keys, keys and configuration, and what is said when something is not as it should be."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncssh
import loopback
import packed
import pytest

from zsq_deploy.device import agent, ssh
from zsq_deploy.device.address import Device, parse_address
from zsq_deploy.device.hostkeys import HostKeys, entry_name
from zsq_deploy.device.session import visit
from zsq_deploy.device.work import Measure
from zsq_deploy.errors import DeviceError, InterruptedRunError


def device_at(port: int, there: Path, **changes: Any) -> Device:
    device = parse_address(f"ssh://{loopback.USER}@127.0.0.1:{port}{there}", name="board")
    return replace(device, **{"python": sys.executable, **changes})


def probe(device: Device, said: Any = None, **more: Any) -> Any:
    async def go() -> Any:
        async with visit(device, progress=said or loopback.Said(), **more) as there:
            return await there.probe()

    return asyncio.run(go())


def run(device: Device, work: Any, said: Any = None) -> Any:
    async def go() -> Any:
        async with visit(device, progress=said or loopback.Said()) as there:
            return await there.run(work, Measure(seconds=0.02, streams=1))

    return asyncio.run(go())


def login(device: Device, **more: Any) -> None:
    """Connect only."""

    async def go() -> None:
        link = await ssh.connect(device, **more)
        await link.close()

    asyncio.run(go())


@pytest.fixture
def light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Any:
    """A small bundle and an agent that pretends."""
    made = packed.job(tmp_path / "made")
    monkeypatch.setattr(agent, "__file__", str(packed.pretend(tmp_path / "pretended.py", made)))
    return made


# --- the whole way, with the agent itself ------------------------------------------------------------------------------


def test_an_engine_is_proved_and_measured_over_ssh(server, home, there, tmp_path) -> None:
    device = device_at(server.port, there)
    said = loopback.Said()
    found = probe(device)
    assert found.runtimes["onnxruntime"].version == pytest.importorskip("onnxruntime").__version__
    assert found.device.python == ".".join(map(str, sys.version_info[:3]))
    result = run(device, packed.job(tmp_path / "made"), said)
    assert result.verdict.passed
    assert result.parity["twin"].equal_share == 1.0
    assert result.parity["twin"].elements == 24
    assert result.latency.runs >= 20
    assert result.throughput is not None
    heard = [line for line in said.lines if "ort-x86-vnni: " in line]
    assert [line.rpartition(": ")[2].split()[0] for line in heard] == [
        "checking",
        "loading",
        "comparing",
        "measuring",
        "measuring",
    ]
    assert list(there.iterdir()) == []
    wrong = run(device, packed.job(tmp_path / "wrong", wrong=True))
    assert wrong.verdict.passed is False
    assert "within_2_lsb against the twin" in wrong.verdict.failed[0]


def test_a_bundle_that_is_changed_on_the_way_is_refused(server, home, there, tmp_path, monkeypatch) -> None:
    whole = ssh.SshLink.put

    async def spoiling(self: Any, source: Path, path: str, start: int, sent: Any) -> None:
        if path.endswith(".tar"):
            data = bytearray(source.read_bytes())
            data[len(data) // 2] ^= 1
            source = tmp_path / "spoiled"
            source.write_bytes(data)
        await whole(self, source, path, start, sent)

    monkeypatch.setattr(ssh.SshLink, "put", spoiling)
    with pytest.raises(DeviceError, match=r"the agent refused: .*changed"):
        run(device_at(server.port, there), packed.job(tmp_path / "made"))
    assert list(there.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bundle_sha256": "1" * 64}, "belongs to another bundle"),
        ({"target": "ort-arm64"}, "belongs to another bundle"),
        ({"latency": {"median_ms": "fast"}}, "no result of an agent"),
        ({"schema_version": 2}, "no result of an agent"),
    ],
)
def test_a_result_that_is_not_of_the_bundle_is_refused(
    server, light, there, tmp_path, monkeypatch, changes, message
) -> None:
    monkeypatch.setattr(agent, "__file__", str(packed.pretend(tmp_path / "other.py", light, **changes)))
    with pytest.raises(DeviceError, match=message):
        run(device_at(server.port, there), light)
    assert list(there.iterdir()) == []


# --- host keys ---------------------------------------------------------------------------------------------------------


def test_a_host_that_is_not_known(server, light, there, tmp_path) -> None:
    """Refused with its fingerprint; taken and remembered when the user says so; then known."""
    known = Path.home() / ".ssh" / "known_hosts"
    known.unlink()
    device = device_at(server.port, there)
    with pytest.raises(DeviceError) as caught:
        probe(device)
    assert server.fingerprint in str(caught.value)
    assert f"[127.0.0.1]:{server.port} is not known" in str(caught.value)
    assert "--accept-new-host-key" in str(caught.value)
    assert not known.exists()
    known.write_text("# no line end")
    said = loopback.Said()
    probe(device, said, accept_new=True)
    assert "is new and remembered" in said.text()
    assert known.read_text().splitlines() == ["# no line end", f"[127.0.0.1]:{server.port} {server.host_key}"]
    said = loopback.Said()
    probe(device, said)
    assert said.lines == []


def test_a_host_key_that_changed_is_never_taken(server, light, there, tmp_path) -> None:
    loopback.keygen(tmp_path / "other")
    other = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    known = Path.home() / ".ssh" / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {other}\n")
    for accept in (False, True):
        with pytest.raises(DeviceError) as caught:
            probe(device_at(server.port, there), accept_new=accept)
        assert "is another one than the known" in str(caught.value)
        assert f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in str(caught.value)
        assert server.fingerprint in str(caught.value)
    assert known.read_text().count("\n") == 1
    known.write_text(f"@revoked [127.0.0.1]:{server.port} {server.host_key}\n")
    with pytest.raises(DeviceError, match="revoked"):
        probe(device_at(server.port, there), accept_new=True)


def test_hashed_names_and_certified_hosts_are_known(server, light, there, tmp_path) -> None:
    import subprocess

    known = Path.home() / ".ssh" / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {server.host_key}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True, timeout=30)
    assert "127.0.0.1" not in known.read_text()
    login(device_at(server.port, there))


def test_no_configuration_turns_the_check_off(server, light, there) -> None:
    """`UserKnownHostsFile none` and `StrictHostKeyChecking no` make ssh trust anybody; not us."""
    (Path.home() / ".ssh" / "known_hosts").unlink()
    (Path.home() / ".ssh" / "config").write_text("Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile none\n")
    with pytest.raises(DeviceError, match="is not known"):
        login(device_at(server.port, there))


def test_names_of_hosts() -> None:
    assert entry_name("pi4", 22) == "pi4"
    assert entry_name("::1", 2222) == "[::1]:2222"


def test_known_hosts_that_cannot_be_read(home) -> None:
    (home / ".ssh" / "known_hosts").write_text("alone\n")
    with pytest.raises(DeviceError, match="known hosts cannot be read"):
        HostKeys()


# --- logging in --------------------------------------------------------------------------------------------------------


def test_aliases_users_keys_and_jumps_of_the_configuration(server, light, there, tmp_path) -> None:
    ssh_folder = Path.home() / ".ssh"
    for name in ("id_ed25519", "id_ed25519.pub"):
        (ssh_folder / name).rename(ssh_folder / name.replace("id_ed25519", "elsewhere"))
    (ssh_folder / "known_hosts").write_text(
        f"board-key {server.host_key}\n[127.0.0.1]:{server.port} {server.host_key}\n"
    )
    (ssh_folder / "config").write_text(
        f"""
        Host jump
            HostName 127.0.0.1
            Port {server.port}
        Host Board
            HostName 127.0.0.1
            Port {server.port}
            HostKeyAlias board-key
            ProxyJump jump
        Host *
            User {loopback.USER}
            IdentityFile {ssh_folder / "elsewhere"}
            SendEnv LANG LC_*
        """
    )
    assert probe(replace(parse_address(f"ssh://Board{there}"), python=sys.executable)).device.machine
    assert list(there.iterdir()) == []


def test_an_agent_holds_the_key(server, light, there, tmp_path, monkeypatch) -> None:
    import subprocess

    said = subprocess.run(
        ["ssh-agent", "-a", str(tmp_path / "agent")], capture_output=True, text=True, check=True, timeout=20
    )
    pid = said.stdout.partition("SSH_AGENT_PID=")[2].partition(";")[0]
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    monkeypatch.setenv("SSH_AGENT_PID", pid)
    try:
        key = Path.home() / ".ssh" / "id_ed25519"
        subprocess.run(["ssh-add", "-q", str(key)], check=True, capture_output=True, timeout=20)
        key.unlink()
        key.with_suffix(".pub").unlink()
        login(device_at(server.port, there))
    finally:
        subprocess.run(["ssh-agent", "-k"], check=True, capture_output=True, timeout=20)


def test_a_login_that_is_refused(server, light, there) -> None:
    for file in (Path.home() / ".ssh").glob("id_*"):
        file.unlink()
    with pytest.raises(DeviceError) as caught:
        login(device_at(server.port, there))
    assert "does not let us in" in str(caught.value)
    assert "ssh-copy-id" in str(caught.value)


class _Passwords(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == ("me", "open sesame")


@pytest.mark.parametrize("typed", [["wrong", "open sesame"], ["wrong"] * 9])
def test_a_password_is_asked_for_at_a_terminal_only(light, typed, monkeypatch) -> None:
    """Asked again when it was wrong, at most three times; remembered for a connection that is made again."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return typed[len(asked) - 1]

    monkeypatch.setattr(ssh.getpass, "getpass", answer)

    async def go(terminal: bool, passwords: dict[str, str]) -> None:
        monkeypatch.setattr(ssh, "_terminal", lambda: terminal)
        async with await asyncssh.create_server(_Passwords, "127.0.0.1", 0, server_host_keys=[key]) as server:
            port = server.sockets[0].getsockname()[1]
            line = key.export_public_key().decode().strip()
            (Path.home() / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {line}\n")
            link = await ssh.connect(parse_address(f"ssh://me@127.0.0.1:{port}"), passwords=passwords)
            await link.close()

    with pytest.raises(DeviceError, match="does not let us in"):
        asyncio.run(go(False, {}))
    assert asked == []
    with monkeypatch.context() as patch:
        patch.setattr(ssh.getpass, "getpass", lambda _: signal.raise_signal(signal.SIGINT))  # Ctrl-C
        with pytest.raises(InterruptedRunError):
            asyncio.run(go(True, {}))
    known: dict[str, str] = {}
    if "open sesame" in typed:
        asyncio.run(go(True, known))
        assert len(asked) == 2
        assert asked[0].lower() == "password of me@127.0.0.1: "
        asyncio.run(go(True, known))
        assert len(asked) == 2
    else:
        with pytest.raises(DeviceError):
            asyncio.run(go(True, known))
        assert len(asked) == 3


# --- devices that are not as they should be ----------------------------------------------------------------------------


def test_nobody_is_there(light, there) -> None:
    with pytest.raises(DeviceError, match="cannot be reached") as caught:
        probe(device_at(loopback.free_port(), there))
    assert "check that it is on" in str(caught.value)
    with pytest.raises(DeviceError, match="there is no host"):
        probe(parse_address("ssh://no-such-host.invalid"))


def test_no_interpreter_an_old_one_and_none_with_a_runtime(server, light, there, tmp_path, monkeypatch) -> None:
    with pytest.raises(DeviceError, match="cannot be started on the device") as caught:
        probe(device_at(server.port, there, python="/no/python3"))
    assert "--python" in str(caught.value)
    old = tmp_path / "old python"
    old.write_text("#!/bin/sh\necho 'SyntaxError: future feature annotations is not defined' >&2\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(DeviceError, match=r"ended with code 1: SyntaxError.*\n.*\n.*3\.9"):
        probe(device_at(server.port, there, python=str(old)))
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    with pytest.raises(DeviceError, match="was killed on the device") as caught:
        probe(device_at(server.port, there, python=str(killed)))
    assert "out of memory" in str(caught.value)
    killed.write_text("#!/bin/sh\nkill -ILL $$\n")
    with pytest.raises(DeviceError, match=r"crashed on the device \(signal ILL") as caught:
        probe(device_at(server.port, there, python=str(killed)))
    assert "install another version" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    bare = tmp_path / "bare"  # this interpreter without anything that was installed
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    found = probe(device_at(server.port, there, python=str(bare)))
    assert found.device.numpy is None
    assert "onnxruntime" in found.runtimes["onnxruntime"].missing
    with pytest.raises(DeviceError, match="python -m pip install onnxruntime=="):
        run(device_at(server.port, there, python=str(bare)), light)
    assert list(there.iterdir()) == []


def test_an_interpreter_in_the_home(server, light, there) -> None:
    home = Path(f"~{loopback.USER}").expanduser()
    inside = home / f".zsq-test-{server.port}"
    inside.mkdir()
    try:
        (inside / "my python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (inside / "my python").chmod(0o755)
        assert probe(device_at(server.port, there, python=f"~/{inside.name}/my python")).agent == 1
        device = replace(device_at(server.port, there), folder=f"~/{inside.name}")
        assert probe(device).agent == 1
        assert [one.name for one in inside.iterdir()] == ["my python"]
    finally:
        shutil.rmtree(inside)


def test_a_folder_that_cannot_be_used(server, light, there) -> None:
    with pytest.raises(DeviceError, match=r"no folder can be made in .*nowhere") as caught:
        probe(device_at(server.port, there / "nowhere"))
    assert "ssh://user@host/folder" in str(caught.value)


def test_a_server_without_sftp(light, there, home, tmp_path_factory) -> None:
    place = tmp_path_factory.mktemp("plain")
    plain = loopback.Server(loopback.find_sshd(), place)
    plain.furnish(place / "home")
    for name in ("user", "user.pub"):
        shutil.copy(place / name, home / ".ssh" / name.replace("user", "id_ed25519"))
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{plain.port} {plain.host_key}\n")
    plain.start(sftp=False)
    try:
        with pytest.raises(DeviceError) as caught:
            probe(device_at(plain.port, there))
    finally:
        plain.stop()
    assert "files cannot be copied" in str(caught.value)
    assert "openssh-sftp-server" in str(caught.value)


def test_an_agent_that_stands_still(server, light, there, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(agent, "__file__", str(packed.pretend(tmp_path / "still.py", light, seconds=300.0)))

    async def go() -> None:
        async with visit(device_at(server.port, there), progress=loopback.Said()) as there_:
            await there_.run(light, Measure(limit=2.0))

    with pytest.raises(DeviceError, match="did not come to its end within 2 s"):
        asyncio.run(go())
    assert list(there.iterdir()) == []


def test_a_device_cannot_confuse_the_terminal(server, light, there, tmp_path, monkeypatch) -> None:
    evil = tmp_path / "evil.py"
    event = json.dumps({"event": "refused", "message": "\x1b[2J\x07gone\n" + "x" * 5000})
    evil.write_text(
        f"import sys\nsys.stderr.write('\\x1b[31m' * 9000)\nprint('noise {{')\nprint({event!r})\nsys.exit(2)\n"
    )
    monkeypatch.setattr(agent, "__file__", str(evil))
    with pytest.raises(DeviceError) as caught:
        run(device_at(server.port, there), light)
    assert "gone" in caught.value.what
    assert len(caught.value.what) < 700
    assert all(letter.isprintable() for letter in caught.value.what)
