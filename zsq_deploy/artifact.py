"""Files that are never half-written: atomic writes, digests, and an output folder that one run owns.

A file is written under a temporary name in its own folder and renamed when it is complete, so a reader sees the old file
or the new one and nothing else, also when the disk fills up or the process is killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import filelock

from zsq_deploy.errors import OutputExistsError, ZsqError

__all__ = [
    "OutputFolder",
    "atomic_path",
    "atomic_writer",
    "digest_bytes",
    "digest_file",
    "digest_json",
    "read_json",
    "write_json",
]


def digest_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Translate what a full or read-only disk says into an error that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ZsqError(
                "the disk is full; nothing was left half-written",
                where=str(path),
                remedy="free some space, or choose an output folder on another disk, and run the command again",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ZsqError(
                f"this place cannot be written to ({error.strerror})",
                where=str(path),
                remedy="choose another output folder with -o/--output, or change its permissions",
            ) from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` for code that insists on writing a file by name.

    The temporary file replaces `path` when the block ends without an error and is removed otherwise. The suffix is kept,
    because some writers look at it.
    """
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` only when it has been written completely."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON file atomically; NaN and infinities are refused, because JSON has none."""
    with atomic_writer(path) as file:
        file.write(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ZsqError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ZsqError("the file does not exist", where=str(path), remedy="check the path") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ZsqError(
            f"this is not a JSON file ({error})",
            where=str(path),
            remedy="make the file again with the command that wrote it",
        ) from error


class OutputFolder:
    """The output folder of one run: claimed before anything is written, and owned by one process at a time.

    A run writes a marker file first. A folder with a *finished* run is refused unless `force`; one with an *interrupted* run
    is refused unless `force` or `resume`. A folder that holds files of somebody else is never touched.

    Args:
        path: The folder; it is made when it is missing.
        force: Replace what an earlier run left there (files of earlier runs only).
        resume: Go on with an interrupted run.
    """

    MARKER = ".zsq-run.json"
    LOCK = ".zsq-lock"

    def __init__(self, path: Path, *, force: bool = False, resume: bool = False) -> None:
        self.path = Path(path)
        self.force = force
        self.resume = resume
        self._lock: filelock.FileLock | None = None

    def __enter__(self) -> OutputFolder:
        """Claim the folder.

        Raises:
            OutputExistsError: Another run is writing here, or something is there already.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputExistsError(
                "the output is a file, not a folder",
                where=str(self.path),
                remedy="choose another name with -o/--output",
            )
        with _disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.path / self.LOCK)
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout as error:
                self._lock = None
                raise OutputExistsError(
                    "another run is writing into this folder right now",
                    where=str(self.path),
                    remedy="wait for it to end, or choose another folder with -o/--output",
                ) from error
            try:
                self._claim()
            except BaseException:
                self._release()
                raise
        return self

    def _claim(self) -> None:
        marker = self.path / self.MARKER
        others = [entry for entry in self.path.iterdir() if entry.name not in (self.MARKER, self.LOCK)]
        if others and not marker.exists():
            raise OutputExistsError(
                f"the folder holds files that no run of zsq made ({', '.join(sorted(e.name for e in others)[:3])}, ...)",
                where=str(self.path),
                remedy="choose an empty or new folder with -o/--output; --force does not remove other people's files",
            )
        state = "none"
        if marker.exists():
            try:
                state = str(json.loads(marker.read_text())["state"])
            except (json.JSONDecodeError, KeyError, TypeError):
                state = "interrupted"
        if others and state == "finished" and not self.force:
            raise OutputExistsError(
                "the folder holds the result of an earlier run",
                where=str(self.path),
                remedy="choose another folder with -o/--output, or replace the old result with --force",
            )
        if others and state != "finished" and not (self.force or self.resume):
            raise OutputExistsError(
                "the folder holds a run that was interrupted",
                where=str(self.path),
                remedy="go on with --resume, or start over with --force",
            )
        if others and self.force and not self.resume:
            for entry in others:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        write_json(marker, {"state": "running"})

    def finish(self) -> None:
        """Mark the run as complete."""
        write_json(self.path / self.MARKER, {"state": "finished"})

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            (self.path / self.LOCK).unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        """Give the folder back; a run that did not :meth:`finish` stays resumable. A folder left empty is removed."""
        marker = self.path / self.MARKER
        if error and error[0] is not None:
            left = [entry for entry in self.path.iterdir() if entry.name not in (self.MARKER, self.LOCK)]
            if not left:
                marker.unlink(missing_ok=True)
        self._release()
