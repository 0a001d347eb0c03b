"""Files that are never half-written: atomic writes, digests, and an output folder that one run owns.

A file is written under a temporary name in its own folder and renamed when it is complete, so a reader sees the old file
or the new one and nothing else, also when the disk fills up or the process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import filelock

from zsq_deploy.errors import OutputExistsError, StaleArtifactError, UsageError, ZsqError

__all__ = [
    "OutputFolder",
    "atomic_path",
    "atomic_writer",
    "digest_bytes",
    "digest_file",
    "digest_json",
    "explain_os_error",
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


def explain_os_error(error: OSError) -> ZsqError | None:
    """What the system says about a file or disk, as an error with a remedy; ``None`` if it is about something else."""
    name = error.filename if isinstance(error.filename, str) else None
    try:
        with _disk_errors(Path(name or ".")):
            raise error
    except ZsqError as explained:
        if name is None:
            explained.where = None
        return explained
    except OSError:
        pass
    remedies: dict[int | None, str] = {
        errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write to another file system",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
        errno.ENOMEM: "free some memory, or use a smaller network or fewer images",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "check the path: a part of it is a file",
        errno.EISDIR: "name a file, not a folder",
        errno.EIO: "the disk reports a fault: use another one",
        errno.ENAMETOOLONG: "use a shorter path",
    }
    if error.errno not in remedies:
        return None
    return ZsqError(str(error.strerror), where=name, remedy=remedies[error.errno])


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
    is refused unless `force` or `resume`. Files of somebody else are never removed: a folder that no run has marked is refused,
    and from a marked one only what runs wrote is removed.

    Args:
        path: The folder; it is made when it is missing.
        force: Replace what an earlier run left there (files of earlier runs only).
        resume: Go on with an interrupted run.
        owns: Names in the folder that this run writes. Only these, and those that earlier runs claimed, are removed by `force`.
        identity: What the run is, in one word (the digest of its recipe); `resume` refuses the rest of another run.
    """

    MARKER = ".zsq-run.json"
    LOCK = ".zsq-lock"

    def __init__(
        self,
        path: Path,
        *,
        force: bool = False,
        resume: bool = False,
        owns: Sequence[str] = (),
        identity: str = "",
    ) -> None:
        self.path = Path(path)
        self.force = force
        self.resume = resume
        self.owns = tuple(owns)
        self.identity = identity
        self._lock: filelock.FileLock | None = None
        self._made = False
        self._foreign: set[str] = set()

    @classmethod
    def reopen(cls, path: Path) -> OutputFolder:
        """The folder of a *finished* run, to write into it again (``zsq verify``); use it as a context manager.

        Its result stays finished whatever happens, because each file is replaced as a whole.
        """
        return _Finished(path)

    def __enter__(self) -> OutputFolder:
        """Claim the folder.

        Raises:
            OutputExistsError: Another run is writing here, or something is there already.
        """
        for part in (self.path, *self.path.parents):
            if part.exists() and not part.is_dir():
                raise OutputExistsError(
                    "the output is a file, not a folder" if part == self.path else f"{part} is a file, not a folder",
                    where=str(self.path),
                    remedy="choose another name with -o/--output",
                )
        with _disk_errors(self.path):
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self._claim()
            except BaseException:
                self._release()
                raise
        return self

    def _acquire(self) -> None:
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

    def _others(self) -> list[Path]:
        return sorted(entry for entry in self.path.iterdir() if entry.name not in (self.MARKER, self.LOCK))

    def _read_marker(self) -> dict[str, Any]:
        """What the marker of an earlier run says; ``{}`` without a marker."""
        marker = self.path / self.MARKER
        if not marker.exists():
            return {}
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
            if isinstance(found, dict) and isinstance(found.get("state"), str):
                return found
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            pass
        return {"state": "interrupted"}

    def _claim(self) -> None:
        before = self._read_marker()
        others = self._others()
        if others and not before:
            names = [entry.name for entry in others]
            raise OutputExistsError(
                "the folder holds files that no run of zsq made "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})",
                where=str(self.path),
                remedy="choose an empty or new folder with -o/--output; --force does not remove other people's files",
            )
        state = before.get("state")
        if others and state == "finished" and not self.force:
            raise OutputExistsError(
                "the folder holds the result of an earlier run"
                + (", which is complete: there is nothing to resume" if self.resume else ""),
                where=str(self.path),
                remedy="choose another folder with -o/--output, or replace the old result with --force",
            )
        if others and state != "finished" and not (self.force or self.resume):
            raise OutputExistsError(
                "the folder holds a run that was interrupted",
                where=str(self.path),
                remedy="go on with --resume, or start over with --force",
            )
        if others and self.resume and not self.force and before.get("identity", self.identity) != self.identity:
            raise StaleArtifactError(
                "the interrupted run in this folder is another one: its recipe differs",
                where=str(self.path),
                remedy="resume with the same options as before (they are in recipe.resolved.yaml there), or start over with --force",
            )
        owned = {str(name) for name in before.get("owns", ())} | set(self.owns)
        self.owns = tuple(sorted(name for name in owned if Path(name).name == name and name != ".."))
        self._foreign = {str(name) for name in before.get("foreign", ())}
        if self.force and not self.resume:
            self._remove_results(before.get("files"))
            self._foreign = set(self._files())
        self._mark("running")

    def _mark(self, state: str, **more: Any) -> None:
        marker = {"state": state, "identity": self.identity, "owns": list(self.owns), "foreign": sorted(self._foreign)}
        write_json(self.path / self.MARKER, {**marker, **more})

    def _remove_results(self, files: object) -> None:
        """Remove what an earlier run wrote. Of a finished one every file is known, so that files put beside them stay."""
        known = {str(name) for name in files} if isinstance(files, list) else set(self._files()) - self._foreign
        for entry in (self.path / name for name in self.owns):
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink(missing_ok=True)
                continue
            for file in sorted(entry.rglob("*"), reverse=True):
                if file.is_dir() and not file.is_symlink():
                    with contextlib.suppress(OSError):  # somebody's file is in it
                        file.rmdir()
                elif str(file.relative_to(self.path)) in known:
                    file.unlink()
            with contextlib.suppress(OSError):
                entry.rmdir()

    def _files(self) -> list[str]:
        """All files in the folders that runs own."""
        found: list[str] = []
        for entry in (self.path / name for name in self.owns):
            if entry.is_dir() and not entry.is_symlink():
                inner = (file for file in sorted(entry.rglob("*")) if file.is_symlink() or not file.is_dir())
                found.extend(str(file.relative_to(self.path)) for file in inner)
        return found

    def finish(self) -> None:
        """Mark the run as complete."""
        self._mark("finished", files=[name for name in self._files() if name not in self._foreign])

    def _release(self) -> None:
        if self._lock is not None:
            # Removed while it is still held: whoever waits for the old file notices that it is gone.
            (self.path / self.LOCK).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def __exit__(self, *error: object) -> None:
        """Give the folder back; a run that did not :meth:`finish` stays resumable. A folder left without results is removed."""
        if error and error[0] is not None and not [e for e in self._others() if e.name not in _CHEAP and _holds(e)]:
            for entry in (*self._others(), self.path / self.MARKER):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
            self._release()
            if self._made:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
            return
        self._release()


_CHEAP = ("recipe.resolved.yaml",)
"""Files that are no loss: a run that ended in an error with nothing but these leaves nothing behind."""


def _holds(entry: Path) -> bool:
    """Whether there is a file in it."""
    return not entry.is_dir() or any(not inner.is_dir() for inner in entry.rglob("*"))


class _Finished(OutputFolder):
    """A finished folder that is written to again; see :meth:`OutputFolder.reopen`."""

    def __enter__(self) -> OutputFolder:
        if not self.path.is_dir():
            raise UsageError(
                "there is no such folder" if not self.path.exists() else "this is a file, not a folder",
                where=str(self.path),
                remedy="name the output folder of zsq deploy or zsq quantize",
            )
        with _disk_errors(self.path):
            before = self._read_marker()
            self._acquire()
        if before and before.get("state") != "finished":
            self._release()
            raise OutputExistsError(
                "the run in this folder was interrupted; its engines are not complete",
                where=str(self.path),
                remedy="go on with it first: the same command with --resume",
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._release()
