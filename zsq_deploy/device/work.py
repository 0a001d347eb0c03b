"""What the agent is told, and what it says while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq_deploy.device.link import Ended

__all__ = ["Heard", "Job", "Measure", "plain"]


@dataclass(frozen=True)
class Measure:
    """What the agent is told.

    Attributes:
        threads: Threads inside an operator.
        affinity: Cores; ``None``: any.
        seconds: How long runs are timed.
        runs: And how many at least.
        streams: Engines at once for the throughput; 0: it is not measured.
        limit: Seconds after which an agent that has not come to its end is given up.
    """

    threads: int = 1
    affinity: str | None = None
    seconds: float = 5.0
    runs: int = 20
    streams: int = 0
    limit: float = 3600.0

    def arguments(self) -> list[str]:
        """As the agent's options."""
        words = ["--threads", str(self.threads), "--seconds", str(self.seconds), "--runs", str(self.runs)]
        words += ["--streams", str(self.streams)]
        return [*words, "--affinity", self.affinity] if self.affinity else words


@dataclass(frozen=True)
class Job:
    """A bundle to run.

    Attributes:
        archive: The ``.zsq.tar``.
        target: Its target.
        manifest_sha256: Digest of its ``bundle.json``.
    """

    archive: Path
    target: str
    manifest_sha256: str


class Heard:
    """What the agent said while it worked."""

    def __init__(self, target: str, say: Callable[[str], None]) -> None:
        self._target = target
        self._say = say
        self._phase = ""
        self.done = False
        self.refused = ""
        self.ended = Ended(None)

    def __call__(self, event: dict[str, Any]) -> None:
        """Hear one line."""
        what = str(event["event"])
        texts = {
            "waiting": "waiting for the agent of the broken connection to end",
            "digests": "checking the bundle",
            "loading": "loading the engine",
            "parity": "comparing with the references",
            "latency": f"measuring latency for {_number(event.get('seconds'))} s",
            "throughput": f"measuring throughput for {_number(event.get('seconds'))} s",
        }
        if what == "done":
            self.done = True
        elif what == "refused":
            self.refused = plain(str(event.get("message", "")))[:600] or "without a reason"
        elif what in texts and (what != self._phase):
            self._phase = what
            self._say(f"{self._target}: {texts[what]}")

    def how_far(self) -> str:
        """For a message about a broken connection."""
        return f" ({self._phase})" if self._phase else ""


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "some"


def plain(text: str) -> str:
    """A text of a device without what could confuse a terminal, and of bounded length."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:600]
