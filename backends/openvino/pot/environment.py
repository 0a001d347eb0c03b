"""Interpreters of their own for tools that cannot live beside current libraries: POT needs Python up to 3.11 and an old NumPy.

An environment is an ordinary virtual environment in the user's cache folder, made once from a list of pinned versions
(`requirements.txt` beside this file). It counts as finished only when its stamp is there, which is written last, after the tool was
imported in it; the stamp holds the digest of the list, so an environment of an older list is noticed. Whatever an interrupted
creation left behind is removed by the next one.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from zsq_deploy import __version__
from zsq_deploy.artifact import digest_file, explain_os_error, write_json
from zsq_deploy.errors import EngineError, StaleArtifactError, UsageError, ZsqError
from zsq_deploy.progress import SILENT, Progress

__all__ = [
    "SPECS",
    "Environment",
    "EnvironmentSpec",
    "EnvironmentState",
    "check",
    "create",
    "home",
    "list_environments",
    "locate",
    "remove",
]

STAMP = "zsq-environment.json"
_RETRIES = 2

Version = tuple[int, int]


@dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment consists of.

    Attributes:
        name: As on the command line.
        summary: What it is for, in a few words.
        requirements: File with one pinned version a line.
        imports: Modules that must be importable in it.
        oldest: Oldest Python that the versions exist for.
        newest: Newest one.
    """

    name: str
    summary: str
    requirements: Path
    imports: tuple[str, ...] = ()
    oldest: Version = (3, 8)
    newest: Version = (3, 11)

    @property
    def digest(self) -> str:
        """SHA-256 of the list of versions."""
        return digest_file(self.requirements)

    @property
    def pythons(self) -> str:
        """The Python versions in words, ``3.8 to 3.11``."""
        return f"{_dotted(self.oldest)} to {_dotted(self.newest)}"


POT = EnvironmentSpec(
    name="pot",
    summary="OpenVINO's Post-training Optimization Tool, 2023.3",
    requirements=Path(__file__).with_name("requirements.txt"),
    imports=("numpy", "scipy.stats", "openvino.runtime", "openvino.tools.mo", "openvino.tools.pot"),
)

SPECS: Mapping[str, EnvironmentSpec] = {POT.name: POT}
"""Every environment that can be made, by name."""


@dataclass(frozen=True)
class Environment:
    """A finished environment.

    Attributes:
        name: Its name.
        folder: Where it is.
        python: Its interpreter.
        version: Version of that Python.
        packages: Installed version by package name.
        created: When it was made (UTC, ISO 8601).
    """

    name: str
    folder: Path
    python: Path
    version: str
    packages: Mapping[str, str] = field(default_factory=dict)
    created: str = ""


@dataclass(frozen=True)
class EnvironmentState:
    """One line of ``zsq env list``: a name, its folder, ``ready``, ``missing``, ``unfinished``, ``stale`` or ``broken``, and why."""

    name: str
    folder: Path
    state: str
    summary: str
    detail: str = ""
    bytes: int = 0


def home() -> Path:
    """The folder of all environments: ``ZSQ_ENV_DIR``, or ``zsq-deploy/envs`` in the user's cache folder."""
    override = os.environ.get("ZSQ_ENV_DIR")
    if override:
        return Path(override).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "zsq-deploy" / "envs"


def locate(name: str | EnvironmentSpec = "pot") -> Path:
    """Where an environment is, or would be.

    Raises:
        UsageError: There is no environment of that name.
    """
    return home() / _spec(name).name


def check(name: str | EnvironmentSpec = "pot", *, deep: bool = False) -> Environment:
    """The finished environment of that name.

    Args:
        name: Its name.
        deep: Also import the tool in it (takes a few seconds); otherwise only the files are looked at.

    Raises:
        UsageError: There is no environment of that name.
        EngineError: It is missing, unfinished or broken.
        StaleArtifactError: It was made from another list of versions.
    """
    spec = _spec(name)
    folder = locate(spec)
    again = f"make it again: zsq env create {spec.name} --force"
    if not folder.is_dir():
        raise EngineError(
            f"the environment {spec.name!r} ({spec.summary}) has not been made yet",
            where=str(folder),
            remedy=f"make it once, it takes a minute: zsq env create {spec.name}",
        )
    stamp = _read_stamp(folder)
    if stamp is None:
        raise EngineError(
            f"the environment {spec.name!r} is unfinished: its creation was interrupted, or is still running",
            where=str(folder),
            remedy=f"wait for it, or make it again: zsq env create {spec.name}",
        )
    if stamp.get("requirements_sha256") != spec.digest:
        raise StaleArtifactError(
            f"the environment {spec.name!r} was made by another version of zsq-deploy, from another list of packages",
            where=str(folder),
            remedy=again,
        )
    python = _python_of(folder)
    if not python.exists():  # a link to an interpreter that is gone
        raise EngineError(
            f"the environment {spec.name!r} is broken: the Python that it was made from is no longer there",
            where=str(python),
            remedy=again,
        )
    if deep:
        _probe(spec, python, remedy=again)
    return Environment(
        name=spec.name,
        folder=folder,
        python=python,
        version=str(stamp.get("python", "")),
        packages={str(key): str(value) for key, value in dict(stamp.get("packages", {})).items()},
        created=str(stamp.get("created", "")),
    )


def create(
    name: str | EnvironmentSpec = "pot",
    *,
    python: str | Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Environment:
    """Make an environment, unless it is there already.

    It is made in its final place (virtual environments cannot be moved) and stamped last. An older one is set aside first and put
    back if anything goes wrong. Two processes that want the same one wait for each other.

    Args:
        name: Its name.
        python: The interpreter to make it from, by path or command; ``None``: this one, or the newest suitable one on the ``PATH``.
        force: Make it again even if it is there and fits.
        progress: Watches.

    Returns:
        The finished environment.

    Raises:
        UsageError: Unknown name, or no suitable Python.
        EngineError: pip or the interpreter gave up; the message holds their own last words.
    """
    spec = _spec(name)
    folder = locate(spec)
    with _os_errors(), _locked(folder, progress):
        aside = folder.with_name(f".{folder.name}-before")
        _restore_or_clear(folder, aside)
        if not force:
            try:
                return check(spec)
            except (EngineError, StaleArtifactError):
                pass
        base, version = _find_python(spec, python)
        if folder.is_dir():
            folder.rename(aside)
        try:
            _build(spec, folder, base, version, progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            if aside.is_dir():
                aside.rename(folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        return check(spec)


def remove(name: str | EnvironmentSpec = "pot") -> bool:
    """Remove an environment; whether there was anything to remove.

    Raises:
        UsageError: There is no environment of that name.
        EngineError: Another process is making it.
    """
    spec = _spec(name)
    folder = locate(spec)
    found = False
    if not folder.parent.is_dir():
        return False
    with _os_errors(), _locked(folder, SILENT, wait=False):
        for path in (folder, folder.with_name(f".{folder.name}-before")):
            if path.is_dir():
                found = True
                (path / STAMP).unlink(
                    missing_ok=True
                )  # first: what is left after an interruption must not count as finished
                shutil.rmtree(path)
    return found


def list_environments(*, deep: bool = False) -> tuple[EnvironmentState, ...]:
    """The state of every environment that can be made."""
    found = []
    for spec in SPECS.values():
        folder = locate(spec)
        detail = ""
        try:
            ready = check(spec, deep=deep)
            state, detail = "ready", f"Python {ready.version}"
        except StaleArtifactError as error:
            state, detail = "stale", error.what
        except EngineError as error:
            state = "missing" if not folder.is_dir() else "unfinished" if _read_stamp(folder) is None else "broken"
            detail = error.what
        found.append(EnvironmentState(spec.name, folder, state, spec.summary, detail, _size(folder)))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------
# making one
# ---------------------------------------------------------------------------------------------------------------------


def _build(spec: EnvironmentSpec, folder: Path, base: Path, version: Version, progress: Progress) -> None:
    wanted = _requirements(spec.requirements)
    with progress.task(f"make environment {spec.name}", len(wanted) + 3) as task:
        task.advance(0, step=f"virtual environment of Python {_dotted(version)}")
        _call(
            [str(base), "-m", "venv", *([] if wanted else ["--without-pip"]), str(folder)],
            what=f"Python {_dotted(version)} could not make a virtual environment",
            where=str(base),
            remedy="install its venv module (Debian, Ubuntu: apt install "
            f"python{_dotted(version)}-venv), or name another interpreter with --python",
        )
        task.advance(step="packages")
        python = _python_of(folder)
        if wanted:
            _install(spec, python, progress_step=task.advance)
        task.advance(step="imports")
        packages = _probe(spec, python, remedy="try again; if it stays like this, report the message with your system")
        stamp = {
            "schema_version": 1,
            "name": spec.name,
            "requirements_sha256": spec.digest,
            "python": packages.pop("python"),
            "packages": packages,
            "zsq-deploy": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(folder / STAMP, stamp)
        task.advance(step="done")


def _install(spec: EnvironmentSpec, python: Path, *, progress_step: Any) -> None:
    command = [
        str(python),
        "-I",
        "-m",
        "pip",
        "install",
        "--no-deps",  # the list is complete
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        f"--retries={_RETRIES}",
        "--requirement",
        str(spec.requirements),
    ]
    last: deque[str] = deque(maxlen=40)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=_clean_environment()
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            last.append(line.rstrip())
            match = re.match(r"(?:Collecting|Processing|Requirement already satisfied:) +([^ ]+)", line)
            if match:
                progress_step(step=Path(match[1]).name[:40])
            elif line.startswith("Installing collected packages"):
                progress_step(0, step="installing")
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        process.stdout.close()
    if code != 0:
        raise _explain_pip(spec, python, list(last))


_OFFLINE = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "name resolution",
    "Network is unreachable",
    "Connection refused",
    "ProxyError",
    "Max retries exceeded",
    "Connection broken",
    "SSLError",
    "CERTIFICATE_VERIFY_FAILED",
)


def _explain_pip(spec: EnvironmentSpec, python: Path, lines: Sequence[str]) -> EngineError:
    said = [line for line in lines if line.strip() and not line.startswith(("WARNING: Location", "[notice]"))]
    errors = [line for line in said if line.lower().startswith("error")]
    message = (errors or said or ["pip said nothing"])[0].strip()
    text = "\n".join(said)
    if any(mark in text for mark in _OFFLINE):
        what = "pip cannot reach its package index"
        remedy = (
            "check the network, the proxy and pip's own settings (`pip config list`); on a machine without network, point PIP_FIND_LINKS "
            f"to a folder with the wheels of {spec.requirements.name} and set PIP_NO_INDEX=1"
        )
    elif "No space left" in text:
        what = "the disk is full"
        remedy = "free about 1 GB, or choose another disk with ZSQ_ENV_DIR"
    elif "No matching distribution" in text or "Could not find a version" in text:
        what = "pip does not find a package that is needed"
        remedy = (
            f"Python {spec.pythons} on x86-64 Linux has all of them: name another interpreter with --python, or check that pip's index "
            "carries them"
        )
    else:
        what = "pip could not install the packages"
        remedy = "mend what the message names and run the command again"
    return EngineError(f"{what}: {message[:400]}", where=str(python), remedy=remedy)


def _probe(spec: EnvironmentSpec, python: Path, *, remedy: str) -> dict[str, str]:
    """Import what must be importable; versions of Python and of all packages."""
    code = (
        "import importlib, json, sys, platform\n"
        "from importlib import metadata\n"
        f"for name in {list(spec.imports)!r}:\n"
        "    importlib.import_module(name)\n"
        "found = {(item.metadata['Name'] or '').lower(): item.version for item in metadata.distributions()}\n"
        "found['python'] = platform.python_version()\n"
        "sys.__stdout__.write('\\n' + json.dumps(found) + '\\n')\n"
    )
    output = _call(
        [str(python), "-I", "-c", code],
        what=f"the environment {spec.name!r} is broken: its modules cannot be imported",
        where=str(python),
        remedy=remedy,
    )
    try:
        found: dict[str, str] = json.loads(output.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise EngineError(
            f"the environment {spec.name!r} is broken: its Python answers with {output.strip()[-200:]!r}",
            where=str(python),
            remedy=remedy,
        ) from error
    return found


def _call(command: Sequence[str], *, what: str, where: str, remedy: str) -> str:
    """Standard output of a command; its last line of complaint goes into the error."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", env=_clean_environment(), check=False
        )
    except OSError as error:
        raise EngineError(f"{what}: {error.strerror}", where=where, remedy=remedy) from error
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
        complaint = next((line for line in reversed(said) if re.match(r"[\w.]*(Error|Exception)\b", line)), None)
        message = complaint or (said[-1] if said else f"exit code {done.returncode}")
        raise EngineError(f"{what}: {message[:400]}", where=where, remedy=remedy)
    return done.stdout


def _clean_environment() -> dict[str, str]:
    """The process environment without what would mix this Python's packages into the other one."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    return {name: value for name, value in os.environ.items() if name not in dropped}


# ---------------------------------------------------------------------------------------------------------------------
# finding an interpreter
# ---------------------------------------------------------------------------------------------------------------------


def _find_python(spec: EnvironmentSpec, python: str | Path | None) -> tuple[Path, Version]:
    if python is not None:
        found = shutil.which(str(Path(python).expanduser()) if os.sep in str(python) else str(python))
        if found is None:
            raise UsageError(
                f"there is no interpreter {str(python)!r}",
                where="--python",
                remedy=f"give the path of a Python {spec.pythons}",
            )
        version = _version_of(found)
        if version is None:
            raise UsageError(f"{found} does not run as a Python", where="--python", remedy="check the path")
        if not spec.oldest <= version <= spec.newest:
            raise UsageError(
                f"{found} is Python {_dotted(version)}; {spec.summary} runs on Python {spec.pythons}",
                where="--python",
                remedy=f"name another interpreter: zsq env create {spec.name} --python /path/to/python{_dotted(spec.newest)}",
            )
        return Path(found), version
    for candidate in _candidates(spec):
        version = _version_of(candidate)
        if version is not None and spec.oldest <= version <= spec.newest:
            return Path(candidate), version
    raise UsageError(
        f"{spec.summary} runs on Python {spec.pythons}; this is Python {_dotted(sys.version_info[:2])}, and the PATH holds no other",
        where=f"zsq env create {spec.name}",
        remedy=f"install one (your package manager, pyenv, uv or conda) and name it: zsq env create {spec.name} --python "
        f"/path/to/python{_dotted(spec.newest)}",
    )


def _candidates(spec: EnvironmentSpec) -> Iterator[str]:
    yield sys.executable
    for minor in range(spec.newest[1], spec.oldest[1] - 1, -1):
        command = f"python{spec.newest[0]}.{minor}"
        # Every folder of the PATH: the first hit may be a shim that refuses.
        for folder in os.environ.get("PATH", "").split(os.pathsep):
            found = shutil.which(command, path=folder) if folder else None
            if found:
                yield found


def _version_of(command: str) -> Version | None:
    code = "import sys; print(sys.version_info[0], sys.version_info[1])"
    try:
        done = subprocess.run(
            [command, "-I", "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            env=_clean_environment(),
            check=False,
        )
        major, minor = done.stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# small things
# ---------------------------------------------------------------------------------------------------------------------


def _spec(name: str | EnvironmentSpec) -> EnvironmentSpec:
    if isinstance(name, EnvironmentSpec):
        return name
    if name in SPECS:
        return SPECS[name]
    close = difflib.get_close_matches(name.lower(), SPECS, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise UsageError(
        f"there is no environment {name!r}", where="zsq env", remedy=f"{meant}environments: {', '.join(SPECS)}"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def _requirements(path: Path) -> list[str]:
    lines = (line.split("#", 1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) else None


def _restore_or_clear(folder: Path, aside: Path) -> None:
    """Put back what a killed creation had set aside, or remove what is left over."""
    if aside.is_dir():
        if _read_stamp(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)
    elif folder.is_dir() and _read_stamp(folder) is None:
        shutil.rmtree(folder)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


@contextmanager
def _locked(folder: Path, progress: Progress, *, wait: bool = True) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        if not wait:
            raise EngineError(
                f"another process is making the environment {folder.name!r} right now",
                where=str(folder),
                remedy="wait until it has finished",
            ) from error
        progress.say(f"another process is making the environment {folder.name!r}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except ZsqError:
        raise
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        explained.remedy = f"choose another folder for environments with ZSQ_ENV_DIR, or: {explained.remedy}"
        raise explained from error
