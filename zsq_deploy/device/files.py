"""Where the user's devices are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["config_folder", "state_folder"]


def _folder(variable: str, default: str) -> Path:
    value = os.environ.get(variable)
    base = Path(value) if value and Path(value).is_absolute() else Path.home() / default
    return base / "zsq-deploy"


def config_folder() -> Path:
    """What the user wrote: ``$XDG_CONFIG_HOME/zsq-deploy``, else ``~/.config/zsq-deploy``."""
    return _folder("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path:
    """What the program remembers: ``$XDG_STATE_HOME/zsq-deploy``, else ``~/.local/state/zsq-deploy``."""
    return _folder("XDG_STATE_HOME", ".local/state")
