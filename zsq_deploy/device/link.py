"""The way to a device: what is asked of a connection, and the shortest one, to this machine.

A link moves files, starts the agent and removes what it brought. Whoever uses it (:mod:`zsq_deploy.device.session`) has to expect
:class:`BrokenLinkError` from every call: networks break.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zsq_deploy.errors import DeviceError

__all__ = ["CHUNK", "PREFIX", "BrokenLinkError", "Ended", "Lines", "Link", "LocalLink", "Running"]

PREFIX = "zsq-bench-"
"""How the folders begin that are made on devices."""

CHUNK = 1 << 20
"""Bytes that are sent at once, and by which an interrupted copy goes back."""

_LONGEST = 1 << 20  # of a line: an agent writes short ones
_LAST = 8192  # of what a program said on standard error


class BrokenLinkError(Exception):
    """The connection is gone; a new one may go on."""


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        code: Exit code; ``None`` if it was killed.
        signal: Name of the signal that killed it.
        stderr: The end of what it said on standard error.
    """

    code: int | None
    signal: str | None = None
    stderr: str = ""


class Running(Protocol):
    """A program at work on the device; its standard input stays open until :meth:`stop`, or until the link is gone."""

    def lines(self) -> AsyncIterator[str]:
        """What it writes on standard output, line by line."""

    async def ended(self) -> Ended:
        """Wait for its end."""

    async def stop(self) -> None:
        """End it, if it still runs."""


class Link(Protocol):
    """An open connection to a device. Paths are those of the device, absolute and with slashes."""

    async def make_folder(self, parent: str | None, name: str) -> str:
        """Make a new folder that only its user may read; its absolute path."""

    async def size(self, path: str) -> int | None:
        """Size of a file in bytes; ``None`` if there is none."""

    async def put(self, source: Path, path: str, start: int, sent: Callable[[int], None]) -> None:
        """Write a file of this machine to `path`, from byte `start` on; `sent` hears of every piece."""

    async def get(self, path: str, limit: int) -> bytes:
        """Read a small file, of at most `limit` bytes."""

    async def start(self, command: Sequence[str]) -> Running:
        """Start a program."""

    async def remove(self, folder: str) -> None:
        """Remove a folder that :meth:`make_folder` made, with all that is in it; fine if it is gone."""

    async def close(self) -> None:
        """End the connection."""


class Lines:
    """Pieces of text cut into lines; a line that never ends is cut off."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[str]:
        """The lines that are complete now."""
        *whole, self._rest = (self._rest + text).split("\n")
        self._rest = self._rest[:_LONGEST]
        return whole

    def last(self) -> list[str]:
        """What came after the last line end."""
        return [self._rest] if self._rest else []


class _LocalRun:
    """A program of this machine."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said = asyncio.create_task(self._errors())

    async def _errors(self) -> str:
        assert self._process.stderr is not None
        kept = b""
        while part := await self._process.stderr.read(4096):
            kept = (kept + part)[-_LAST:]
        return kept.decode(errors="replace")

    async def lines(self) -> AsyncIterator[str]:
        assert self._process.stdout is not None
        cut = Lines()
        while part := await self._process.stdout.read(4096):
            for line in cut.feed(part.decode(errors="replace")):
                yield line
        for line in cut.last():
            yield line

    async def ended(self) -> Ended:
        code = await self._process.wait()
        said = await self._said
        return (
            Ended(code, None, said) if code >= 0 else Ended(None, signal.Signals(-code).name.removeprefix("SIG"), said)
        )

    async def stop(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._said.cancel()


class LocalLink:
    """This machine as a device: the same agent in a process of its own, in a temporary folder."""

    async def make_folder(self, parent: str | None, name: str) -> str:
        """Make a folder."""
        home = Path(parent).expanduser() if parent else Path(tempfile.gettempdir())
        path = home / name
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise DeviceError(
                f"no folder can be made there ({error.strerror})", where=str(home), remedy="choose another folder"
            ) from error
        return str(path.resolve())

    async def size(self, path: str) -> int | None:
        """Size of a file."""
        return Path(path).stat().st_size if Path(path).is_file() else None

    async def put(self, source: Path, path: str, start: int, sent: Callable[[int], None]) -> None:
        """Copy a file."""
        with source.open("rb") as file, Path(path).open("r+b" if start else "wb") as out:
            file.seek(start)
            out.seek(start)
            while part := file.read(CHUNK):
                out.write(part)
                sent(len(part))
                await asyncio.sleep(0)

    async def get(self, path: str, limit: int) -> bytes:
        """Read a file."""
        with Path(path).open("rb") as file:
            return file.read(limit + 1)

    async def start(self, command: Sequence[str]) -> Running:
        """Start a program."""
        program = str(Path(command[0]).expanduser()) if command[0].startswith("~") else command[0]
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                program, *command[1:], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=os.name == "posix"
            )
        except OSError as error:
            raise DeviceError(
                f"{command[0]} cannot be started ({error.strerror})",
                where=f"this machine, {sys.platform}",
                remedy="name an interpreter that is there with --python",
            ) from error
        return _LocalRun(process)

    async def remove(self, folder: str) -> None:
        """Remove a folder."""
        if Path(folder).name.startswith(PREFIX):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def close(self) -> None:
        """Nothing to close."""
