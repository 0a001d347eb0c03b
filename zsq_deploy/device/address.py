"""Devices as values: where they are and how the agent is started there."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from zsq_deploy.errors import UsageError

__all__ = ["LOCAL", "NAME", "Device", "parse_address"]

LOCAL = "local"
"""The address of this machine."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a device in the inventory may be called."""

_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@+$-]*")
_HOST = re.compile(r"[A-Za-z0-9_.:%-]+")


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: What it is called in reports.
        host: Name or address for SSH, or an alias of ``~/.ssh/config``; empty for this machine.
        user: User there; ``None``: what SSH's configuration says, else the user here.
        port: Port; ``None``: what SSH's configuration says, else 22.
        folder: Folder there that the agent's own folder is made in; ``None``: the user's home (here: the temporary folder).
            ``~/`` at the start stands for the home.
        python: Interpreter there (3.9 or newer, with numpy and the runtime); ``None``: ``python3`` (here: this one).
        threads: Threads of the runtime there; ``None``: what the command says.
        affinity: Cores to run on, such as ``0-3``; ``None``: any.
        note: What a person wants to remember of it.
    """

    name: str
    host: str = ""
    user: str | None = None
    port: int | None = None
    folder: str | None = None
    python: str | None = None
    threads: int | None = None
    affinity: str | None = None
    note: str = ""

    @property
    def local(self) -> bool:
        """It is this machine."""
        return not self.host

    @property
    def address(self) -> str:
        """``local`` or ``ssh://user@host:port/folder``, as :func:`parse_address` reads it."""
        if self.local:
            return LOCAL
        user = f"{urllib.parse.quote(self.user)}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        folder = self.folder or ""
        return f"ssh://{user}{host}{port}" + urllib.parse.quote(f"/{folder}" if folder.startswith("~") else folder)


def parse_address(text: str, *, name: str | None = None) -> Device:
    """``local`` or ``ssh://[user@]host[:port][/folder]`` as a device.

    The folder is absolute; ``/~/work`` is a folder in the user's home. IPv6 addresses stand in brackets.

    Args:
        text: The address.
        name: What to call the device; ``None``: after its address.

    Raises:
        UsageError: It is no such address, or it holds a password.
    """
    if text == LOCAL:
        return Device(name or LOCAL)
    remedy = "write ssh://user@host, ssh://user@host:port/folder, local, or the name of a device (zsq devices list)"
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"this is no address of a device ({error})", where=_hidden(text), remedy=remedy) from error
    if parts.password is not None:
        raise UsageError(
            "the address holds a password, which others can read on the command line and in files",
            where=_hidden(text),
            remedy="leave it out: use a key or ssh-agent (ssh-copy-id puts a key on the device), or type the password when asked",
        )
    user = urllib.parse.unquote(parts.username) if parts.username else None
    host = parts.hostname or ""
    # urlsplit makes host names small; aliases of ssh_config may be large.
    spelled = parts.netloc.rpartition("@")[2]
    host = spelled[: len(host)] if spelled.lower().startswith(host) else host
    if parts.scheme != "ssh" or not host or parts.query or parts.fragment:
        raise UsageError("this is no address of a device", where=_hidden(text), remedy=remedy)
    if not _HOST.fullmatch(host) or host.startswith("-") or (user is not None and not _USER.fullmatch(user)):
        raise UsageError("the user or host of this address cannot be right", where=_hidden(text), remedy=remedy)
    folder = urllib.parse.unquote(parts.path)
    folder = folder[1:] if folder.startswith("/~/") else folder
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in folder):
        raise UsageError("the folder of this address holds control characters", where=_hidden(text), remedy=remedy)
    folder = folder.rstrip("/") or ("/" if folder else "")
    shown = Device("", host, user, port).address.removeprefix("ssh://")
    return Device(name or shown, host, user, port, folder or None)


def _hidden(text: str) -> str:
    """An address without its password."""
    return re.sub(r"(://[^/@:]*):[^@/]*@", r"\1:***@", text)
