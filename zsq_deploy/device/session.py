"""One visit to a device: connect, copy, run, fetch, clean up; and what happens when the line breaks in any of these.

Nothing is run there but the agent, with the interpreter that the user named. Everything that is brought lies in one new folder, which is removed in
the end, whatever happened. A connection that breaks is made again a bounded number of times: a copy goes on where it broke, an agent that was
measuring is started again, or its result taken if it had finished alone. What cannot be mended ends in an error that says how far it came and what to
do; a folder that had to be left behind is remembered and removed on the next visit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from zsq_deploy.device import agent
from zsq_deploy.device.address import Device
from zsq_deploy.device.leftovers import Leftovers
from zsq_deploy.device.link import CHUNK, PREFIX, BrokenLinkError, Ended, Link, LocalLink
from zsq_deploy.device.result import LIMIT, Probe, Result, parse_probe, parse_result
from zsq_deploy.device.work import Heard, Job, Measure, plain
from zsq_deploy.errors import DeviceError, UsageError
from zsq_deploy.progress import SILENT, Progress

__all__ = ["Session", "visit"]

_T = TypeVar("_T")
_Connect = Callable[[Device], Awaitable[Link]]

RETRIES = 3
"""Connections that are made again in one phase."""

PAUSE = 1.0
"""Seconds before a broken connection is made again; three times as long each further time."""

_SIGNALS = {one.value: one.name.removeprefix("SIG") for one in signal.Signals}
_LOOK = 600.0  # seconds that a look at a device may take
_GRACE = 20.0  # seconds that cleaning up may take when something else went wrong


@asynccontextmanager
async def visit(
    device: Device,
    *,
    accept_new: bool = False,
    progress: Progress = SILENT,
    leftovers: Leftovers | None = None,
    passwords: dict[str, str] | None = None,
    connect: _Connect | None = None,
) -> AsyncIterator[Session]:
    """Connect to a device and make a folder there; remove it in the end.

    Args:
        device: The device.
        accept_new: Take the host key of a device that is not known.
        progress: Where to report.
        leftovers: Folders that earlier visits could not remove.
        passwords: What was typed on an earlier visit, so that it need not be typed again.
        connect: How to connect; ``None``: as the device's address says.

    Raises:
        DeviceError: It cannot be reached, or no folder can be made there.
    """
    session = Session(
        device, connect or _connector(accept_new, progress, passwords), progress, leftovers or Leftovers()
    )
    log = logging.getLogger("asyncio")
    log.addFilter(_told_otherwise)
    try:
        try:
            await session.open()
            yield session
        except BaseException:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(session.leave(patient=False), _GRACE)
            raise
        await session.leave(patient=True)
    finally:
        session.remember()
        log.removeFilter(_told_otherwise)


def _told_otherwise(record: logging.LogRecord) -> bool:
    """Leave out of the log what every piece says that is written to a broken connection: the visit tells it once."""
    return "socket.send() raised exception" not in str(record.msg)


def _connector(accept_new: bool, progress: Progress, passwords: dict[str, str] | None) -> _Connect:
    typed: dict[str, str] = {} if passwords is None else passwords

    async def connect(device: Device) -> Link:
        if device.local:
            return LocalLink()
        try:
            from zsq_deploy.device import ssh
        except ImportError as error:
            raise UsageError(
                f"SSH needs a library that is not installed ({error})",
                where=device.address,
                remedy="pip install 'zsq-deploy[ssh]'; or by hand: zsq bundle, copy, run, and zsq bench --result",
            ) from error
        return await ssh.connect(device, accept_new=accept_new, passwords=typed, say=progress.say)

    return connect


class Session:
    """A visit; made by :func:`visit`."""

    def __init__(self, device: Device, connect: _Connect, progress: Progress, leftovers: Leftovers) -> None:
        self.device = device
        self.folder = ""
        self._made = ""
        self._connect = connect
        self._progress = progress
        self._leftovers = leftovers
        self._link: Link | None = None
        self._name = PREFIX + secrets.token_hex(8)
        self._agent_sent = False
        self._jobs = 0

    @property
    def _where(self) -> str:
        return f"{self.device.name} ({self.device.address})"

    def _say(self, text: str) -> None:
        self._progress.say(f"{self.device.name}: {text}")

    # --- the line -----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and make the folder."""
        try:
            self._link = await self._connect(self.device)
        except BrokenLinkError as error:
            raise DeviceError(
                f"the device cannot be reached ({error})",
                where=self._where,
                remedy="check that it is on, its address and port, and that its SSH server runs; then run the command again",
            ) from error
        await self._sweep()

        async def make(link: Link) -> str:
            with contextlib.suppress(DeviceError):  # it may have been made before the connection broke
                if self.folder:
                    await link.remove(self.folder)
            return await link.make_folder(self.device.folder, self._name)

        self.folder = await self._through("its folder was made", make)
        self._made = self.folder
        self._leftovers.claim(self.device.address, self.folder)

    async def _sweep(self) -> None:
        """Remove what earlier visits had to leave behind."""
        for folder in self._leftovers.of(self.device.address):

            async def remove(link: Link, folder: str = folder) -> None:
                await link.remove(folder)

            try:
                await self._through("an old folder was removed", remove)
            except DeviceError as error:
                self._say(f"the folder of an earlier visit is still there: {error.what}")
                continue
            self._leftovers.forget(self.device.address, folder)
            self._say(f"removed the folder of an earlier visit, {folder}")

    async def _through(
        self, during: str, work: Callable[[Link], Awaitable[_T]], how_far: Callable[[], str] = str
    ) -> _T:
        """Do something over the link, and do it again over a new one if the link breaks."""
        broken = 0
        while True:
            try:
                if self._link is None:
                    self._link = await self._connect(self.device)
                return await work(self._link)
            except BrokenLinkError as error:
                await self._drop()
                broken += 1
                if broken > RETRIES:
                    raise self._lost(during, how_far(), error) from error
                wait = PAUSE * 3 ** (broken - 1)
                self._say(
                    f"the connection broke while {during}{how_far()} ({error}); trying again in {wait:.0f} s "
                    f"({broken} of {RETRIES})"
                )
                await asyncio.sleep(wait)

    def _lost(self, during: str, how_far: str, error: BrokenLinkError) -> DeviceError:
        left = ""
        if self.folder:
            left = f"; {self.folder} was left there, and is removed the next time zsq connects to it"
        return DeviceError(
            f"the connection broke while {during}{how_far}, and could not be made again in {RETRIES} attempts ({error}); "
            "the report is as it was before this measurement",
            where=self._where,
            remedy="check power and network of the device, then run the same command again" + left,
        )

    async def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(Exception):
                await link.close()

    async def leave(self, *, patient: bool) -> None:
        """Remove the folder and close the connection; if that cannot be done, the folder is remembered for the next visit."""
        if self.folder:

            async def remove(link: Link) -> None:
                await link.remove(self.folder)

            if patient:
                try:
                    await self._through("its folder was removed", remove)
                    self.folder = ""
                except DeviceError as error:
                    self._say(f"{self.folder} was left there ({error.what}); it is removed on the next visit")
            else:
                if self._link is None:
                    self._link = await self._connect(self.device)
                await remove(self._link)
                self.folder = ""
        await self._drop()

    def remember(self) -> None:
        """Keep in mind a folder that is still there, and strike out one that is not."""
        if self.folder:
            self._leftovers.leave(self.device.address, self.folder)
        elif self._made:
            self._leftovers.forget(self.device.address, self._made)

    # --- the work -----------------------------------------------------------------------------------------------------

    async def _send(self, source: Path, name: str, title: str, *, whole: bool = False) -> bool:
        """Copy a file; whether it was put together from pieces."""
        path, size = f"{self.folder}/{name}", source.stat().st_size
        done, pieces = 0, 0

        # The agent is small: it goes without a bar.
        watch = SILENT if name == "agent.py" else self._progress
        with watch.task(f"{self.device.name}: {title}, kB", round(size / 1000)) as task:

            async def copy(link: Link) -> None:
                nonlocal done, pieces
                there = 0 if whole and not pieces else await link.size(path) or 0
                # All pieces but the last one are known to have arrived.
                start = 0 if there > size else max(0, (there - 1) // CHUNK * CHUNK)
                pieces += 1
                task.advance((start - done) / 1000)
                done = start

                def sent(count: int) -> None:
                    nonlocal done
                    done += count
                    task.advance(count / 1000)

                await link.put(source, path, start, sent)
                if await link.size(path) != size:
                    raise BrokenLinkError("the copy is not as long as the file")

            await self._through(f"{title} was copied", copy, lambda: f" ({done / 1e6:.1f} of {size / 1e6:.1f} MB)")
        return pieces > 1

    async def _command(self, *words: str) -> list[str]:
        if not self._agent_sent:
            await self._send(Path(agent.__file__), "agent.py", "the agent", whole=True)
            self._agent_sent = True
        python = self.device.python or (sys.executable if self.device.local else "python3")
        return [python, f"{self.folder}/agent.py", "--events", "--tether", *words]

    async def _run(self, link: Link, command: Sequence[str], hear: Callable[[dict[str, Any]], None]) -> Ended:
        """Run the agent to its end, and hear what it says."""
        running = await link.start(command)
        try:
            async for line in running.lines():
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line)
                    if isinstance(event, dict) and isinstance(event.get("event"), str):
                        hear(event)
            return await running.ended()
        except BaseException:
            with contextlib.suppress(Exception):
                await running.stop()
            raise

    def _failed(self, ended: Ended, refused: str) -> DeviceError:
        """Why the agent did not do what it should."""
        if refused:
            return DeviceError(
                f"the agent refused: {refused}", where=self._where, remedy="do what it says, and run again"
            )
        said = [plain(line) for line in ended.stderr.strip().splitlines()[-6:]]
        shown = "; ".join(line for line in said if line) or "it said nothing"
        python = self.device.python or "python3"
        if ended.code in (126, 127):
            return DeviceError(
                f"{python} cannot be started on the device ({shown})",
                where=self._where,
                remedy="name an interpreter that is there, 3.9 or newer with numpy and the runtime: --python /path/to/python3",
            )
        killed = ended.signal or (_SIGNALS.get(ended.code - 128) if ended.code and ended.code > 128 else None)
        if killed:
            crashed = killed in ("SEGV", "ILL", "BUS", "FPE", "ABRT", "SYS")
            return DeviceError(
                f"the agent {'crashed' if crashed else 'was killed'} on the device (signal {killed}); {shown}",
                where=self._where,
                remedy="the runtime there does not fit the processor or system: install another version of it"
                if crashed
                else "the device may be out of memory: use a smaller batch or fewer threads, or end other programs there",
            )
        return DeviceError(
            f"the agent ended with code {ended.code}: {shown}",
            where=self._where,
            remedy="it needs Python 3.9 or newer with numpy and the runtime: name such an interpreter with --python",
        )

    async def probe(self) -> Probe:
        """What the device is and has.

        Raises:
            DeviceError: The agent cannot run there.
        """
        found: dict[str, Any] = {}
        command = await self._command("--probe")

        async def ask(link: Link) -> Ended:
            return await self._run(link, command, lambda event: found.update(event))

        ended = await self._within(self._through("the device was looked at", ask), _LOOK)
        if found.get("event") != "probe":
            raise self._failed(ended, "")
        return parse_probe(found, where=self._where)

    async def run(self, job: Job, measure: Measure) -> Result:
        """Copy a bundle, let the agent prove and measure it, and fetch the result.

        Raises:
            DeviceError: The connection is gone for good, the agent refused or failed, or the result is not that of this bundle.
        """
        self._jobs += 1
        name = f"{self._jobs:02d}"
        pieced = await self._send(job.archive, f"{name}.zsq.tar", f"bundle of {job.target}")
        heard = await self._measure(job, measure, name)
        if heard.refused and pieced:
            self._say("the bundle did not arrive as it was sent; copying it once more")
            await self._send(job.archive, f"{name}.zsq.tar", f"bundle of {job.target}", whole=True)
            heard = await self._measure(job, measure, name)
        if not heard.done:
            raise self._failed(heard.ended, heard.refused)

        async def fetch(link: Link) -> bytes:
            return await link.get(f"{self.folder}/{name}.json", LIMIT)

        data = await self._through("the result was fetched", fetch)
        return parse_result(data, manifest_sha256=job.manifest_sha256, target=job.target, where=self._where)

    async def _measure(self, job: Job, measure: Measure, name: str) -> Heard:
        words = [
            "--bundle",
            f"{self.folder}/{name}.zsq.tar",
            "--out",
            f"{self.folder}/{name}.json",
            "--work",
            self.folder,
        ]
        command = await self._command(*words, *measure.arguments())
        heard = Heard(job.target, self._say)
        first = True

        async def work(link: Link) -> None:
            nonlocal first
            if not first and await link.size(f"{self.folder}/{name}.json"):
                heard.done = True  # the agent came to its end without us
                return
            first = False
            heard.ended = await self._run(link, command, heard)

        await self._within(self._through(f"{job.target} was measured", work, heard.how_far), measure.limit)
        return heard

    async def _within(self, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
        """Wait for an agent, but not for ever."""
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError as error:
            raise DeviceError(
                f"the agent did not come to its end within {seconds:g} s, and was ended",
                where=self._where,
                remedy="give it more time with --time-limit; if it stands still at the same step again, try another version of the runtime",
            ) from error
