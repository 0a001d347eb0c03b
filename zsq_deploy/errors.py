"""Errors that say what is wrong, where, and what to do.

Every error that a user can cause is a :class:`ZsqError`. The command line prints it without a traceback and exits with
:attr:`ZsqError.exit_code` (2: wrong use or unusable input). A failed gate is not an error: it is a result, exit code 1.
"""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "DataError",
    "DeviceError",
    "EngineError",
    "InterruptedRunError",
    "ModelError",
    "OutputExistsError",
    "StaleArtifactError",
    "UnsupportedOpError",
    "UsageError",
    "ZsqError",
]


class ZsqError(Exception):
    """A problem that the user can mend.

    Args:
        what: One sentence: what is wrong.
        where: The file, tensor, node or option that it is about.
        remedy: What to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        """Everything in one block of text: what, where, remedy."""
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  to do: {self.remedy}")
        return "\n".join(lines)


class UsageError(ZsqError):
    """An option or argument does not make sense."""


class ModelError(ZsqError):
    """The network cannot be read, exported or understood."""


class UnsupportedOpError(ModelError):
    """The network holds operators that the op table does not know; raised once, naming all of them."""


class CalibrationError(ZsqError):
    """A calibration set cannot be made, read or used."""


class DataError(ZsqError):
    """Evaluation data are empty, mislabelled or do not fit the network."""


class StaleArtifactError(ZsqError):
    """A file belongs to another network, set or recipe: its digest does not fit."""


class EngineError(ZsqError):
    """An engine cannot be built, loaded or run."""


class OutputExistsError(ZsqError):
    """The output is there already, or another run is writing it."""


class InterruptedRunError(ZsqError):
    """The user interrupted the work; what was done is kept and can be resumed."""

    exit_code = 130


class DeviceError(ZsqError):
    """A device cannot be reached, or something went wrong there."""
