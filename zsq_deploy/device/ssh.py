"""The way to a device over SSH: the protocol is asyncssh's, the rules are OpenSSH's.

asyncssh was chosen over paramiko because it reads ``~/.ssh/config`` itself (aliases, users, ports, identity files, ``ProxyJump``,
``ProxyCommand``), knows hashed, revoked and certified host keys, notices a dead line (unanswered keep-alives, which paramiko sends but does
not count), is fully typed, and needs nothing but ``cryptography``. Its licence, EPL-2.0, binds changes to asyncssh itself, not programs that
import it; it is an extra, and nothing else in this package needs it.

Files go by SFTP, so that nothing has to be run on the device to receive them. Keys and ``ssh-agent`` log in; a password is only asked for at a
terminal, and is neither stored nor shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import shlex
import signal
import socket
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import asyncssh

from zsq_deploy.device.address import Device
from zsq_deploy.device.hostkeys import HostKeys
from zsq_deploy.device.link import CHUNK, PREFIX, BrokenLinkError, Ended, Lines, Running
from zsq_deploy.errors import DeviceError, InterruptedRunError

__all__ = ["SshLink", "Timing", "connect"]

_LAST = 8192
_CLOSED = "SSH connection closed"  # how asyncssh refuses a channel over a connection that is gone
_GONE = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.DisconnectError)


class Timing:
    """How long is waited.

    Attributes:
        connect: Seconds for the TCP connection.
        login: Seconds for the SSH handshake and login.
        alive: Seconds of silence after which the device is asked whether it is there; three unanswered questions end the connection.
    """

    connect: float = 15
    login: float = 60
    alive: float = 10


class _Client(asyncssh.SSHClient):
    """Decides about host keys, and asks for passwords where somebody sits at a terminal."""

    def __init__(self, keys: HostKeys, who: str, passwords: dict[str, str]) -> None:
        self._keys = keys
        self._who = who
        self._passwords = passwords
        self._tries = 0
        self.stopped = False
        """The user pressed Ctrl-C instead of an answer."""

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        try:
            return self._keys.unknown(host, addr, port, key)
        except DeviceError as error:
            self._keys.problem = error
            return False

    async def password_auth_requested(self) -> str | None:
        return await self._answer("password")

    def kbdint_auth_requested(self) -> str | None:
        return "" if _terminal() else None

    async def kbdint_challenge_received(
        self, name: str, instructions: str, lang: str, prompts: Sequence[tuple[str, bool]]
    ) -> list[str] | None:
        del name, instructions, lang
        answers = [await self._answer(_plain(prompt).strip(" :")) for prompt, _ in prompts]
        return None if any(answer is None for answer in answers) else [str(answer) for answer in answers]

    async def _answer(self, what: str) -> str | None:
        self._tries += 1
        if not _terminal() or self._tries > 3 or self.stopped:
            return None
        if self._tries == 1 and what in self._passwords:  # a connection that is made again
            return self._passwords[what]
        try:
            said = _ask(f"{what} of {self._who}: ")
        except (KeyboardInterrupt, EOFError):
            self.stopped = True
            return None
        self._passwords[what] = said
        return said


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _ask(prompt: str) -> str:
    """Ask at the terminal; the loop stands still meanwhile, so that Ctrl-C ends the question, and the terminal shows letters again."""
    if threading.current_thread() is not threading.main_thread():
        return getpass.getpass(prompt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return getpass.getpass(prompt)
    finally:
        signal.signal(signal.SIGINT, before)


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200]


def _configuration() -> list[str]:
    found = [Path("~/.ssh/config").expanduser(), Path("/etc/ssh/ssh_config")]
    return [str(path) for path in found if os.access(path, os.R_OK)]


async def connect(
    device: Device,
    *,
    accept_new: bool = False,
    timing: Timing | None = None,
    passwords: dict[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> SshLink:
    """Connect, check the host key, log in.

    Args:
        device: Where to.
        accept_new: Take the key of a host that is not known.
        timing: How long to wait.
        passwords: What was typed before, by what was asked; kept in memory for a connection that has to be made again.
        say: Hears of a host key that was taken.

    Raises:
        DeviceError: The device cannot be reached, is another one, or refuses the login.
        BrokenLinkError: The connection broke while it was made.
    """
    timing = timing or Timing()
    where = f"{device.name} ({device.address})"
    options: dict[str, Any] = {
        "host": device.host,
        "config": _configuration(),
        "connect_timeout": timing.connect,
        "login_timeout": timing.login,
        "keepalive_interval": timing.alive,
        "keepalive_count_max": 3,
        "agent_forwarding": False,
        "x11_forwarding": False,
        "request_pty": False,
        "command": None,
        "send_env": None,
        "env": None,
    }
    if device.user is not None:
        options["username"] = device.user
    if device.port is not None:
        options["port"] = device.port
    try:
        read = await asyncssh.SSHClientConnectionOptions.construct(None, **options)
    except (ValueError, OSError, asyncssh.Error) as error:
        raise DeviceError(
            f"SSH's configuration cannot be used for this device ({error})",
            where=where,
            remedy="mend ~/.ssh/config or the key file that it names",
        ) from error
    keys = HostKeys([str(name) for name in read.config.get("UserKnownHostsFile") or ()], accept_new=accept_new)
    who = f"{read.username}@{device.host}"
    known: dict[str, str] = {} if passwords is None else passwords
    clients: list[_Client] = []

    def client() -> _Client:
        clients.append(_Client(keys, who, known))
        return clients[-1]

    try:
        connection = await asyncssh.connect(**options, known_hosts=keys.known, client_factory=client)
    except (OSError, asyncssh.Error, ValueError, TimeoutError) as error:
        if any(one.stopped for one in clients):
            raise InterruptedRunError("interrupted") from error
        raise _explain(error, keys, device, where) from error
    if keys.accepted:
        say(keys.accepted)
    return SshLink(connection, where)


def _explain(error: Exception, keys: HostKeys, device: Device, where: str) -> Exception:
    """Why a connection was not made."""
    if keys.problem is not None:
        keys.problem.where = f"{where}; known hosts: {keys.problem.where}"
        return keys.problem
    words = _plain(str(error)) or type(error).__name__
    if isinstance(error, asyncssh.PermissionDenied):
        return DeviceError(
            f"the device does not let us in ({words})",
            where=where,
            remedy="check the user; put a key there with ssh-copy-id, or load it with ssh-add; a password is asked for at a terminal only",
        )
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return DeviceError(
            f"a host key on the way cannot be trusted ({words})",
            where=where,
            remedy="connect once with ssh to every host on the way (ProxyJump), and compare the fingerprints",
        )
    if isinstance(error, socket.gaierror):
        return DeviceError(
            f"there is no host {device.host!r}", where=where, remedy="check the name, or use its address"
        )
    if isinstance(error, asyncssh.KeyExchangeFailed | asyncssh.ProtocolNotSupported):
        return DeviceError(
            f"the two sides have no way to speak in common ({words})",
            where=where,
            remedy="update the SSH server of the device; if its host key is of another kind than the known one: ssh-keygen -R HOST",
        )
    return BrokenLinkError(words)


@contextmanager
def _told(where: str, what: str, closed: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Say what went wrong on the device, and tell a broken connection from it."""
    try:
        yield
    except _GONE as error:
        raise BrokenLinkError(_plain(str(error)) or type(error).__name__) from error
    except asyncssh.SFTPError as error:
        if closed():
            raise BrokenLinkError(_plain(error.reason)) from error
        remedies = {
            asyncssh.SFTPPermissionDenied: "choose a folder that you may write to: ssh://user@host/folder",
            asyncssh.SFTPNoSuchFile: "choose a folder that is there: ssh://user@host/folder",
            asyncssh.SFTPNoSpaceOnFilesystem: "free some space there, or choose a folder on another disk: ssh://user@host/folder",
        }
        remedy = remedies.get(
            type(error), "check space and permissions there, or choose another folder: ssh://user@host/folder"
        )
        raise DeviceError(f"{what} ({_plain(error.reason)})", where=where, remedy=remedy) from error
    except asyncssh.ChannelOpenError as error:
        if error.reason == _CLOSED or closed():
            raise BrokenLinkError(_plain(error.reason)) from error
        raise DeviceError(
            f"{what}: the device opens no session for it ({_plain(error.reason)})",
            where=where,
            remedy="allow sessions and the sftp subsystem in its SSH server (Debian: the package openssh-sftp-server)",
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise BrokenLinkError(_plain(str(error)) or type(error).__name__) from error


class _SshRun:
    """A program on the device."""

    def __init__(self, process: asyncssh.SSHClientProcess[str], where: str) -> None:
        self._process = process
        self._where = where
        self._said = asyncio.create_task(self._errors())

    async def _errors(self) -> str:
        kept = ""
        with contextlib.suppress(asyncssh.Error, OSError):  # a broken connection shows where lines are read
            while part := await self._process.stderr.read(4096):
                kept = (kept + part)[-_LAST:]
        return kept

    async def lines(self) -> AsyncIterator[str]:
        cut = Lines()
        while True:
            with _told(self._where, "the agent cannot be heard"):
                part = await self._process.stdout.read(4096)
            if not part:
                break
            for line in cut.feed(part):
                yield line
        for line in cut.last():
            yield line

    async def ended(self) -> Ended:
        with _told(self._where, "the end of the agent is not known"):
            await self._process.wait_closed()
            stderr = await self._said
        killed = self._process.exit_signal
        if self._process.exit_status is None and not killed:
            raise BrokenLinkError("the connection was closed while the agent was at work")
        code = None if killed else self._process.exit_status
        return Ended(code, killed[0] if killed else None, stderr)

    async def stop(self) -> None:
        self._said.cancel()
        self._process.close()  # its standard input ends with the channel, and the tethered agent with that


class SshLink:
    """An SSH connection to a device."""

    def __init__(self, connection: asyncssh.SSHClientConnection, where: str) -> None:
        self._connection = connection
        self._where = where
        self._files: asyncssh.SFTPClient | None = None

    def _told(self, what: str) -> AbstractContextManager[None]:
        return _told(self._where, what, self._connection.is_closed)

    async def _sftp(self) -> asyncssh.SFTPClient:
        if self._files is None:
            try:
                with self._told("files cannot be copied"):
                    self._files = await asyncio.wait_for(self._connection.start_sftp_client(), 60)
            except BrokenLinkError as error:
                if self._connection.is_closed():
                    raise
                # The server said yes and its SFTP program ended at once, or wrote something else.
                raise DeviceError(
                    f"files cannot be copied: the device's SFTP does not answer ({error})",
                    where=self._where,
                    remedy="see that the package openssh-sftp-server is there, and that the user's shell prints nothing when it starts",
                ) from error
        return self._files

    async def make_folder(self, parent: str | None, name: str) -> str:
        """Make a folder."""
        files = await self._sftp()
        with self._told(f"no folder can be made in {parent or 'the home'}"):
            parent = parent or "."
            if parent == "~" or parent.startswith("~/"):
                parent = "./" + parent[2:]
            home = str(await files.realpath(parent))
            path = f"{home.rstrip('/')}/{name}"
            await files.mkdir(path, asyncssh.SFTPAttrs(permissions=0o700))
        return path

    async def size(self, path: str) -> int | None:
        """Size of a file."""
        files = await self._sftp()
        with self._told(f"{path} cannot be looked at"):
            try:
                found = await files.lstat(path)
            except asyncssh.SFTPNoSuchFile:
                return None
        regular = found.permissions is None or stat.S_ISREG(found.permissions)
        return found.size if regular else None

    async def put(self, source: Path, path: str, start: int, sent: Callable[[int], None]) -> None:
        """Copy a file; one piece after the other, so that all but the last one are there whenever the connection breaks."""
        files = await self._sftp()
        with self._told(f"{path} cannot be written"), source.open("rb") as file:
            file.seek(start)
            async with files.open(path, "r+b" if start else "wb") as out:
                place = start
                while part := file.read(CHUNK):
                    await out.write(part, place)
                    place += len(part)
                    sent(len(part))

    async def get(self, path: str, limit: int) -> bytes:
        """Read a file."""
        files = await self._sftp()
        with self._told(f"{path} cannot be read"):
            async with files.open(path, "rb") as file:
                return cast("bytes", await file.read(limit + 1))  # opened as bytes, typed as text

    async def start(self, command: Sequence[str]) -> Running:
        """Start a program."""
        program = command[0]
        shown = "~/" + shlex.quote(program[2:]) if program.startswith("~/") else shlex.quote(program)
        line = f"{shown} {shlex.join(command[1:])}"
        with self._told("the agent cannot be started"):
            process = await self._connection.create_process(line, encoding="utf-8", errors="replace")
        return _SshRun(process, self._where)

    async def remove(self, folder: str) -> None:
        """Remove a folder."""
        if not folder.rpartition("/")[2].startswith(PREFIX):
            return
        files = await self._sftp()
        with self._told(f"{folder} cannot be removed"):
            for wait in (0.2, 1.0, 0.0):  # an agent that was just ended may still be writing
                try:
                    await files.rmtree(folder)
                    return
                except asyncssh.SFTPNoSuchFile:
                    return
                except asyncssh.SFTPError as error:
                    if not wait or isinstance(error, _GONE):
                        raise
                    await asyncio.sleep(wait)

    async def close(self) -> None:
        """End the connection."""
        self._connection.close()
        try:
            await asyncio.wait_for(self._connection.wait_closed(), 5)
        except (OSError, asyncssh.Error, TimeoutError):
            self._connection.abort()
