"""The user's devices by name, in one small YAML file that a person can edit::

    devices:
      pi4:
        address: ssh://pi@pi4.local/srv/work
        python: ~/venv/bin/python
        threads: 4
        affinity: 0-3
        note: the one on the window sill

The file is ``$ZSQ_DEVICES``, else ``devices.yaml`` in :func:`zsq_deploy.device.files.config_folder`. It never holds a password.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pydantic
import yaml

from zsq_deploy.artifact import atomic_writer
from zsq_deploy.device.address import LOCAL, NAME, Device, parse_address
from zsq_deploy.device.files import config_folder
from zsq_deploy.errors import UsageError, ZsqError

__all__ = ["Inventory", "inventory_file"]


class _Entry(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    address: str
    python: str | None = None
    threads: int | None = pydantic.Field(None, ge=1)
    affinity: str | None = pydantic.Field(None, pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$")
    note: str = ""


class _File(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    devices: dict[str, _Entry] = {}


def inventory_file() -> Path:
    """The file of the inventory."""
    named = os.environ.get("ZSQ_DEVICES")
    return Path(named).expanduser() if named else config_folder() / "devices.yaml"


class Inventory:
    """The devices of a file.

    Args:
        file: The file; ``None``: :func:`inventory_file`. It need not be there.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or inventory_file()

    def devices(self) -> dict[str, Device]:
        """All devices by name.

        Raises:
            ZsqError: The file is not an inventory.
        """
        return {name: self._device(name, entry) for name, entry in self._read().items()}

    def find(self, text: str) -> Device:
        """A device by its name here, or by an address.

        Raises:
            UsageError: It is neither.
        """
        if text == LOCAL or "://" in text:
            return parse_address(text)
        entries = self._read()
        if text not in entries:
            known = ", ".join(sorted(entries)) or "none yet"
            raise UsageError(
                f"there is no device {text!r}",
                where=str(self.file),
                remedy=f"known are: {known}; add it with zsq devices add {text} ssh://user@host, or give its address",
            )
        return self._device(text, entries[text])

    def add(self, device: Device, *, force: bool = False) -> None:
        """Write a device.

        Raises:
            UsageError: Its name cannot be used, or is taken and `force` is not set.
        """
        if not NAME.fullmatch(device.name) or device.name == LOCAL:
            raise UsageError(
                f"a device cannot be called {device.name!r}",
                where="zsq devices add",
                remedy="use letters, digits, dots, dashes and underscores, and another word than local",
            )
        values = {
            "address": device.address,
            "python": device.python,
            "threads": device.threads,
            "affinity": device.affinity,
            "note": device.note or None,
        }
        given = {key: value for key, value in values.items() if value is not None}
        try:
            _Entry.model_validate(given)
        except pydantic.ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UsageError(
                f"{problem['loc'][0]}: {problem['msg']}",
                where=f"device {device.name}",
                remedy="write cores as 0-3 or 0,2",
            ) from error
        with self._locked():
            entries = self._plain()
            if device.name in entries and not force:
                raise UsageError(
                    f"there is a device {device.name!r} already",
                    where=str(self.file),
                    remedy="choose another name, or replace it with --force",
                )
            entries[device.name] = given
            self._write(entries)

    def remove(self, names: Sequence[str]) -> None:
        """Take devices out.

        Raises:
            UsageError: One of them is not there; then none is taken out.
        """
        with self._locked():
            entries = self._plain()
            for name in names:
                if name not in entries:
                    raise UsageError(
                        f"there is no device {name!r}", where=str(self.file), remedy="zsq devices list shows them"
                    )
            self._write({name: entry for name, entry in entries.items() if name not in names})

    def _locked(self) -> filelock.BaseFileLock:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.file.with_name(f".{self.file.name}.lock"))

    def _read(self) -> dict[str, _Entry]:
        if not self.file.is_file():
            return {}
        remedy = "mend it, or remove it and add the devices again with zsq devices add"
        try:
            value = yaml.safe_load(self.file.read_text(encoding="utf-8"))
            found = _File.model_validate(value or {}).devices
        except pydantic.ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise ZsqError(
                f"this is no list of devices ({place}: {problem['msg']})", where=str(self.file), remedy=remedy
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ZsqError(f"this is no YAML ({error})", where=str(self.file), remedy=remedy) from error
        for name in found:
            if not NAME.fullmatch(name) or name == LOCAL:
                raise ZsqError(f"a device cannot be called {name!r}", where=str(self.file), remedy=remedy)
        for name, entry in found.items():
            self._device(name, entry)
        return found

    def _plain(self) -> dict[str, dict[str, Any]]:
        return {name: entry.model_dump(exclude_defaults=True) for name, entry in self._read().items()}

    def _write(self, entries: dict[str, dict[str, Any]]) -> None:
        text = yaml.safe_dump({"devices": entries}, sort_keys=False, allow_unicode=True, default_flow_style=False)
        with atomic_writer(self.file) as out:
            out.write(text.encode())

    def _device(self, name: str, entry: _Entry) -> Device:
        try:
            device = parse_address(entry.address, name=name)
        except UsageError as error:
            raise UsageError(error.what, where=f"{self.file}, device {name}", remedy=error.remedy) from error
        return replace(device, python=entry.python, threads=entry.threads, affinity=entry.affinity, note=entry.note)
