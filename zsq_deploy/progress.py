"""Progress that library code can report without knowing who watches.

Library functions take a ``progress: Progress`` (default :data:`SILENT`) and call :meth:`Progress.task`. The command line hands
in :class:`RichProgress`, which draws bars with the time left and the current losses; a pipeline gets plain lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as _Bars

__all__ = ["SILENT", "PlainProgress", "Progress", "RichProgress", "Silent", "Task", "default_progress"]


class Task(Protocol):
    """One running piece of work with a known number of steps."""

    def advance(self, steps: float = 1, **values: float | str) -> None:
        """Report `steps` more steps done; `values` (losses and the like) are shown beside the bar."""


class Progress(Protocol):
    """Where work reports how far it is."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        """Open a task of `total` steps; use it as a context manager."""

    def say(self, message: str) -> None:
        """Say one line that stays on the screen."""


class _Nothing:
    def advance(self, steps: float = 1, **values: float | str) -> None:
        """Ignore it."""


class Silent:
    """Reports nothing."""

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        """A task that nobody watches."""
        del title, total
        yield _Nothing()

    def say(self, message: str) -> None:
        """Ignore it."""


def _values(values: Mapping[str, float | str]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


class RichProgress:
    """Bars with elapsed time, time left and current values, on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = _Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=self._console,
        )
        self._open = 0

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        """Draw a bar for one task."""
        if self._open == 0:
            self._bars.start()
        self._open += 1
        bars = self._bars
        ident = bars.add_task(title, total=total, values="")

        class _Bar:
            def advance(self, steps: float = 1, **values: float | str) -> None:
                if values:
                    bars.update(ident, advance=steps, values=_values(values))
                else:
                    bars.advance(ident, steps)

        try:
            yield _Bar()
        finally:
            bars.stop_task(ident)
            self._open -= 1
            if self._open == 0:
                bars.stop()
                for task in list(bars.task_ids):
                    bars.remove_task(task)

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self._console.print(message, highlight=False, markup=False)


class PlainProgress:
    """One line every few seconds, for logs and pipelines without a terminal."""

    def __init__(self, every_seconds: float = 10.0) -> None:
        self._every = every_seconds

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Task]:
        """Write a line now and then for one task."""
        every, started = self._every, time.monotonic()

        class _Line:
            done = 0.0
            last = time.monotonic()

            def advance(self, steps: float = 1, **values: float | str) -> None:
                self.done += steps
                now = time.monotonic()
                if now - self.last >= every:
                    self.last = now
                    left = (now - started) / max(self.done, 1e-9) * max(total - self.done, 0)
                    sys.stderr.write(f"{title}: {self.done:g}/{total:g}, {left:.0f} s left  {_values(values)}\n")
                    sys.stderr.flush()

        yield _Line()
        sys.stderr.write(f"{title}: done in {time.monotonic() - started:.1f} s\n")
        sys.stderr.flush()

    def say(self, message: str) -> None:
        """Write a line."""
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


SILENT = Silent()


def default_progress(*, quiet: bool = False) -> Progress:
    """Bars on a terminal, plain lines elsewhere, nothing when `quiet`."""
    if quiet:
        return SILENT
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
