"""What all commands print in the same way."""

from __future__ import annotations

import json
import sys
from typing import Any

from zsq_deploy.progress import Progress, default_progress

__all__ = ["print_json", "progress_for"]


def print_json(value: Any) -> None:
    """A JSON value on standard output, for machines."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def progress_for(quiet: bool, as_json: bool) -> Progress:
    """Bars or lines on standard error; none if the user wants it quiet, or if nobody sits there and JSON was asked for."""
    return default_progress(quiet=quiet or (as_json and not sys.stderr.isatty()))
