"""The state of an unfinished synthesis on disk: finished batches, and the exact state of the current one.

::

    run.json                 what the run is (network, method, parameters, seed, ...) and its digest
    prepared.safetensors     what was computed before the first batch, for methods that do that
    batch-00000.safetensors  a finished batch, and what it leaves to the later ones
    current-00003.safetensors  a batch that is being made: parameters, optimisers, random state, schedules

All files are written atomically, and a batch's file appears before the state of the next one, so whenever the process ends, what is
there is one consistent state. Methods of several stages keep the later ones in folders of the same form, ``stage-1`` and so on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zsq_deploy.artifact import atomic_writer, digest_json, read_json, write_json
from zsq_deploy.errors import StaleArtifactError, ZsqError

__all__ = ["Checkpoint"]

_START_OVER = "start over without --resume, or remove the folder"


class Checkpoint:
    """The checkpoint folder of one run.

    Args:
        folder: Where it is kept; ``None``: nowhere (an interrupted run is lost).
        run: What the run is, as JSON values; a state of another run is refused.
        resume: Go on from what is there. Otherwise an earlier state is removed.

    Raises:
        StaleArtifactError: What is there belongs to another run.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self._held: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        if folder is None:
            return
        record = json.loads(json.dumps({"run": dict(run), "digest": digest_json(dict(run))}))
        path = folder / "run.json"
        if resume and path.exists():
            found = read_json(path)
            old = found.get("run", {}) if isinstance(found, dict) else {}
            if old != record["run"]:
                changed = sorted(key for key in {*old, *record["run"]} if old.get(key) != record["run"].get(key))
                raise StaleArtifactError(
                    "the interrupted synthesis in this folder is another one; different: "
                    + "; ".join(f"{key} (there {old.get(key)!r}, now {record['run'].get(key)!r})" for key in changed),
                    where=str(folder),
                    remedy=f"resume with the same options as before, or {_START_OVER}",
                )
            return
        if folder.exists():
            for name in [*_files(folder), path]:
                name.unlink(missing_ok=True)
        write_json(path, record)

    def _batch(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"batch-{index:05d}.safetensors"

    def _current(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"current-{index:05d}.safetensors"

    @property
    def _prepared(self) -> Path | None:
        return None if self.folder is None else self.folder / "prepared.safetensors"

    def save_prepared(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what was computed before the first batch."""
        _write(self._prepared, tensors, {})

    def load_prepared(self) -> dict[str, Tensor] | None:
        """What was computed before the first batch, or ``None``."""
        found = _read(self._prepared)
        return None if found is None else found[0]

    def save_batch(self, index: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Keep a finished batch (in memory if there is no folder); the state in which it was under way is no longer needed."""
        path, current = self._batch(index), self._current(index)
        if path is None:
            self._held[index] = _as_kept(tensors), dict(plain)
            return
        _write(path, tensors, plain)
        if current is not None:
            current.unlink(missing_ok=True)

    def has_batch(self, index: int) -> bool:
        """Whether a batch is finished."""
        path = self._batch(index)
        return index in self._held if path is None else path.exists()

    def load_batch(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished batch, or ``None``."""
        return self._held.get(index) if self.folder is None else _read(self._batch(index))

    def save_current(self, index: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Keep the state of a batch that is being made."""
        _write(self._current(index), tensors, plain)

    def load_current(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of batch `index`, if it was being made."""
        found = _read(self._current(index))
        return found if found is not None and found[1].get("index") == index else None

    def remove(self) -> None:
        """Forget everything: the run is complete."""
        self._held.clear()
        if self.folder is None or not self.folder.exists():
            return
        for path in _files(self.folder):
            path.unlink(missing_ok=True)
        (self.folder / "run.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _files(folder: Path) -> list[Path]:
    kinds = ("batch-*", "current*", "prepared")
    return [path for kind in kinds for path in folder.glob(f"{kind}.safetensors")]


def _as_kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file keeps them. The layout of memory decides the order of sums, so what stays in memory has to have the same."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write(path: Path | None, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    if path is None:
        return
    data = safetensors.torch.save(_as_kept(tensors), metadata={"state": json.dumps(plain)})
    with atomic_writer(path) as file:
        file.write(data)


def _read(path: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if path is None or not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            plain = json.loads(file.metadata()["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, plain  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ZsqError(f"this checkpoint is damaged ({error})", where=str(path), remedy=_START_OVER) from error
