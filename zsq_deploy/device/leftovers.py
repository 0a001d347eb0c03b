"""Folders that had to be left on devices when a connection broke for good; the next visit removes them.

Only folders that this program made are written here, and only those are removed.
"""

from __future__ import annotations

from pathlib import Path

import filelock

from zsq_deploy.artifact import read_json, write_json
from zsq_deploy.device.files import state_folder
from zsq_deploy.device.link import PREFIX
from zsq_deploy.errors import ZsqError

__all__ = ["Leftovers"]


class Leftovers:
    """The list, in a file.

    Args:
        file: The file; ``None``: in the folder of what the program remembers.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or state_folder() / "left-on-devices.json"

    def _read(self) -> dict[str, list[str]]:
        try:
            value = read_json(self.file) if self.file.is_file() else {}
        except ZsqError:
            return {}  # a list that cannot be read is only a lost convenience
        if not isinstance(value, dict):
            return {}
        return {
            str(address): [folder for folder in folders if _ours(folder)]
            for address, folders in value.items()
            if isinstance(folders, list)
        }

    def of(self, address: str) -> list[str]:
        """The folders on one device."""
        return self._read().get(address, [])

    def add(self, address: str, folder: str) -> None:
        """Remember a folder."""
        self._change(address, lambda folders: [*folders, folder] if folder not in folders else folders)

    def forget(self, address: str, folder: str) -> None:
        """It is gone."""
        self._change(address, lambda folders: [one for one in folders if one != folder])

    def _change(self, address: str, change: object) -> None:
        assert callable(change)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.file.with_suffix(".lock")):
            value = self._read()
            value[address] = change(value.get(address, []))
            write_json(self.file, {key: folders for key, folders in value.items() if folders})


def _ours(folder: object) -> bool:
    return isinstance(folder, str) and folder.rpartition("/")[2].startswith(PREFIX)
