"""The folders that visits have on devices, so that none is left for good.

A visit writes its folder here before anything is put into it and strikes it out once it is removed. What a visit could not remove, because the connection
was gone for good or because this program was killed, the next visit to the device removes. Only folders that this program made are written here,
only those are removed, and never that of a visit that is still going on.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import psutil

from zsq_deploy.artifact import read_json, write_json
from zsq_deploy.device.files import state_folder
from zsq_deploy.device.link import PREFIX
from zsq_deploy.errors import ZsqError

__all__ = ["Leftovers"]

_Owners = dict[str, dict[str, Any]]


class Leftovers:
    """The list, in a file: address -> folder -> who is at work there.

    Args:
        file: The file; ``None``: in the folder of what the program remembers.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or state_folder() / "left-on-devices.json"

    def _read(self) -> dict[str, _Owners]:
        try:
            value = read_json(self.file) if self.file.is_file() else {}
        except ZsqError:
            return {}  # a list that cannot be read is only a lost convenience
        if not isinstance(value, dict):
            return {}
        return {
            str(address): {
                folder: owner for folder, owner in folders.items() if _ours(folder) and isinstance(owner, dict)
            }
            for address, folders in value.items()
            if isinstance(folders, dict)
        }

    def of(self, address: str) -> list[str]:
        """The folders on one device at which nobody is at work any more."""
        return [folder for folder, owner in self._read().get(address, {}).items() if not _at_work(owner)]

    def claim(self, address: str, folder: str) -> None:
        """This process is at work there."""
        me = {"host": platform.node(), "pid": os.getpid(), "since": psutil.Process().create_time()}
        self._change(address, lambda folders: {**folders, folder: me})

    def leave(self, address: str, folder: str) -> None:
        """It could not be removed, and nobody is at work there any more."""
        self._change(address, lambda folders: {**folders, folder: {}})

    def forget(self, address: str, folder: str) -> None:
        """It is gone."""
        self._change(address, lambda folders: {name: owner for name, owner in folders.items() if name != folder})

    def _change(self, address: str, change: Callable[[_Owners], _Owners]) -> None:
        # Where nothing can be remembered, the visit goes on all the same.
        with contextlib.suppress(OSError, ZsqError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.file.with_suffix(".lock")):
                value = self._read()
                value[address] = change(value.get(address, {}))
                write_json(self.file, {key: folders for key, folders in value.items() if folders})


def _ours(folder: object) -> bool:
    return isinstance(folder, str) and folder.rpartition("/")[2].startswith(PREFIX)


def _at_work(owner: dict[str, Any]) -> bool:
    """Whether the process that claimed a folder may still be there; one of another machine is left in peace."""
    if not owner:
        return False
    if owner.get("host") != platform.node():
        return True
    try:
        return bool(psutil.Process(int(owner["pid"])).create_time() == owner["since"])
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
