"""Is this the device that it says it is? Host keys are compared with the known ones, as OpenSSH's ``StrictHostKeyChecking=yes`` does.

A key that is not known ends the connection, unless the user said that new ones may be taken (``accept-new``). A key that is *another*
one than the known ends it in any case. ``StrictHostKeyChecking no`` in SSH's configuration is not heard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import asyncssh

from zsq_deploy.errors import DeviceError

__all__ = ["HostKeys", "entry_name"]

_DEFAULT_PORT = 22
_GLOBAL = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")


def entry_name(host: str, port: int) -> str:
    """What a host is called in a file of known hosts: ``host``, or ``[host]:port`` on another port than 22."""
    return host if port == _DEFAULT_PORT else f"[{host}]:{port}"


class HostKeys:
    """The known hosts of the user, and what happened to one key.

    Args:
        files: The user's files of known hosts, the first of which takes new keys; empty: ``~/.ssh/known_hosts``.
        accept_new: Take the key of a host that is not known, and remember it.
    """

    def __init__(self, files: Sequence[str] = (), *, accept_new: bool = False) -> None:
        own = [Path(name).expanduser() for name in files] or [Path("~/.ssh/known_hosts").expanduser()]
        self.file = own[0]
        self.accept_new = accept_new
        self.problem: DeviceError | None = None
        self.accepted = ""
        text = []
        for path in [*own, *map(Path, _GLOBAL)]:
            with contextlib.suppress(OSError):
                text.append(path.read_text(encoding="utf-8", errors="replace"))
        try:
            self.known = asyncssh.import_known_hosts("\n".join(text))
        except ValueError as error:
            raise DeviceError(
                f"the known hosts cannot be read ({error})", where=str(self.file), remedy="mend or remove that line"
            ) from error

    def unknown(self, host: str, address: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Decide about a key that is not among the known ones of its host; the reason for a "no" is kept in `problem`."""
        name, print_ = entry_name(host, port), key.get_fingerprint()
        kind = key.get_algorithm()
        if key in self._revoked(host, address, port):
            self.problem = DeviceError(
                f"the host key of {name} is revoked: {kind} {print_}",
                where=str(self.file),
                remedy="do not connect; ask whoever runs the device",
            )
            return False
        known = self.known.match(host, address, None if port == _DEFAULT_PORT else port)[0]
        if known:
            shown = ", ".join(f"{one.get_algorithm()} {one.get_fingerprint()}" for one in known)
            self.problem = DeviceError(
                f"the host key of {name} is another one than the known: it shows {kind} {print_}, known is {shown}; "
                "somebody may be listening in between, or the device was set up anew",
                where=str(self.file),
                remedy=f"ask whoever runs the device for its fingerprint; if it was set up anew: ssh-keygen -R '{name}', and connect again",
            )
            return False
        if not self.accept_new:
            self.problem = DeviceError(
                f"the host key of {name} is not known: {kind} {print_}",
                where=str(self.file),
                remedy="compare the fingerprint with that of the device (there: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub), then connect "
                "once with ssh, or repeat the command with --accept-new-host-key, which remembers it",
            )
            return False
        self._remember(name, key)
        self.accepted = f"host key of {name} is new and remembered from now on: {kind} {print_} ({self.file})"
        return True

    def _revoked(self, host: str, address: str, port: int) -> list[asyncssh.SSHKey]:
        # The library forgets what is revoked of a host on another port that has no known key.
        names = {host, address, entry_name(host, port), entry_name(address, port)}
        return [key for name in names if name for key in self.known.match(name, "", None)[2]]

    def _remember(self, name: str, key: asyncssh.SSHKey) -> None:
        kind, data = key.export_public_key("openssh").decode().split()[:2]
        line = f"{name} {kind} {data}\n"
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.file.exists():
                with contextlib.suppress(IndexError):
                    line = line if self.file.read_bytes()[-1:] in (b"\n", b"") else "\n" + line
            with self.file.open("a", encoding="utf-8") as out:
                out.write(line)
        except OSError as error:
            raise DeviceError(
                f"the new host key cannot be remembered ({error.strerror})",
                where=str(self.file),
                remedy="make the file writable, or connect once with ssh",
            ) from error
