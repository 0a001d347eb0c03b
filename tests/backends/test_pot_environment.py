"""The interpreter that POT runs in: made once, atomically, checked, listed and removed. Real virtual environments, tiny lists of packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zsq_deploy.backends.openvino.pot import environment
from zsq_deploy.backends.openvino.pot.environment import STAMP, EnvironmentSpec
from zsq_deploy.errors import EngineError, StaleArtifactError, UsageError

HERE = sys.version_info[:2]


@pytest.fixture
def envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "envs"
    monkeypatch.setenv("ZSQ_ENV_DIR", str(folder))
    return folder


def spec(folder: Path, *lines: str, imports: tuple[str, ...] = ("json",)) -> EnvironmentSpec:
    path = folder / "requirements.txt"
    path.write_text("# nothing but what the test needs\n" + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return EnvironmentSpec("tiny", "a test", path, imports, oldest=(3, 8), newest=HERE)


def wheel(folder: Path, name: str, code: str = "VALUE = 7\n") -> Path:
    """A pure Python wheel, so that pip has something to install without any network."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", code)
        info = f"{name}-1.0.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EnvironmentSpec]:
    """One finished environment for the tests that only look, or work on a copy."""
    folder = tmp_path_factory.mktemp("finished")
    made = spec(folder, str(wheel(folder, "zsq_tiny")), imports=("zsq_tiny",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSQ_ENV_DIR", str(folder / "envs"))
        environment.create(made, python=sys.executable)
    return folder / "envs", made


@pytest.fixture
def ready(finished: tuple[Path, EnvironmentSpec], envs: Path) -> EnvironmentSpec:
    """A copy of the finished one that may be broken."""
    home, made = finished
    shutil.copytree(home, envs, symlinks=True)
    return made


def test_where_environments_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZSQ_ENV_DIR", str(tmp_path / "mine"))
    assert environment.locate("pot") == tmp_path / "mine" / "pot"
    monkeypatch.delenv("ZSQ_ENV_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert environment.locate("pot") == tmp_path / "cache" / "zsq-deploy" / "envs" / "pot"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.locate("pot") == Path.home() / ".cache" / "zsq-deploy" / "envs" / "pot"


def test_a_new_environment_imports_what_was_installed_and_nothing_of_ours(
    finished: tuple[Path, EnvironmentSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, made = finished
    monkeypatch.setenv("ZSQ_ENV_DIR", str(home))
    found = environment.check(made, deep=True)
    assert found.packages["zsq_tiny"] == "1.0"
    assert found.version.startswith(f"{HERE[0]}.{HERE[1]}")
    code = "import zsq_tiny, importlib.util as u; print(zsq_tiny.VALUE, u.find_spec('zsq_deploy'))"
    done = subprocess.run([str(found.python), "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "None"]


def test_a_second_creation_finds_the_first(ready: EnvironmentSpec) -> None:
    before = (environment.locate(ready) / STAMP).read_bytes()
    environment.create(ready, python="/no/such/python")  # not looked at: nothing is made
    assert (environment.locate(ready) / STAMP).read_bytes() == before


def test_missing_unfinished_stale_and_broken_are_told_apart(
    ready: EnvironmentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = environment.locate(ready)
    monkeypatch.setattr(environment, "SPECS", {"tiny": ready})

    def state() -> str:
        return environment.list_environments(deep=True)[0].state

    assert state() == "ready"

    changed = replace(ready, requirements=tmp_path / "new.txt")
    changed.requirements.write_text("another==2.0\n", encoding="utf-8")
    with pytest.raises(StaleArtifactError, match="another version of zsq-deploy") as stale:
        environment.check(changed)
    assert "--force" in (stale.value.remedy or "")

    module = next(folder.rglob("zsq_tiny.py"))
    module.write_text("import no_such_module_anywhere\n", encoding="utf-8")
    environment.check(ready)  # files only
    with pytest.raises(EngineError, match=r"broken.*No module named 'no_such_module_anywhere'"):
        environment.check(ready, deep=True)
    assert state() == "broken"

    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to("/no/such/python3")
    with pytest.raises(EngineError, match="no longer there"):
        environment.check(ready)

    (folder / STAMP).unlink()
    with pytest.raises(EngineError, match="unfinished"):
        environment.check(ready)
    assert state() == "unfinished"

    assert environment.remove("tiny")
    assert not environment.remove("tiny")
    with pytest.raises(EngineError, match="not been made") as missing:
        environment.check(ready)
    assert "zsq env create" in (missing.value.remedy or "")
    assert state() == "missing"


def test_a_failed_creation_leaves_nothing_and_puts_the_old_one_back(ready: EnvironmentSpec, tmp_path: Path) -> None:
    failing = spec(tmp_path, imports=("no_such_module_anywhere",))
    folder = environment.locate(ready)
    before = sorted(path.name for path in folder.rglob("*.py"))
    with pytest.raises(EngineError, match="no_such_module_anywhere"):
        environment.create(failing, python=sys.executable, force=True)
    assert sorted(path.name for path in folder.rglob("*.py")) == before
    environment.check(ready, deep=True)
    assert environment.remove("tiny") if "tiny" in environment.SPECS else shutil.rmtree(folder) is None
    with pytest.raises(EngineError, match="no_such_module_anywhere"):
        environment.create(failing, python=sys.executable)
    assert not folder.exists()


def test_what_a_killed_creation_left_is_not_taken_for_finished(ready: EnvironmentSpec) -> None:
    """The state after a kill in the middle of making it again: the old one set aside, the new one without its stamp."""
    folder = environment.locate(ready)
    folder.rename(folder.with_name(".tiny-before"))
    (folder / "bin").mkdir(parents=True)
    with pytest.raises(EngineError, match="unfinished"):
        environment.check(ready)
    environment.create(ready, python="/no/such/python")  # the old one still fits: nothing has to be made
    environment.check(ready, deep=True)
    assert not folder.with_name(".tiny-before").exists()


def test_pip_errors_are_told_in_one_sentence(
    ready: EnvironmentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = environment.check(ready).python
    wanted = spec(tmp_path, "zsq-no-such-package==1.0")

    def install() -> EngineError:
        with pytest.raises(EngineError) as caught:
            environment._install(wanted, python, progress_step=lambda *_, **__: None)
        return caught.value

    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    error = install()
    assert "does not find a package" in error.what
    assert "zsq-no-such-package" in error.what
    assert "--python" in (error.remedy or "")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(environment, "_RETRIES", 1)
    error = install()
    assert "cannot reach its package index" in error.what
    assert "proxy" in (error.remedy or "")


def test_the_wrong_python_is_named_with_what_to_do(envs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(spec(tmp_path), oldest=(3, 1), newest=(3, 2))
    with pytest.raises(UsageError, match=r"is Python \d\.\d+; a test runs on Python 3\.1 to 3\.2") as caught:
        environment.create(old, python=sys.executable)
    assert "--python /path/to/python3.2" in (caught.value.remedy or "")
    with pytest.raises(UsageError, match="the PATH holds no other"):
        environment.create(old)
    with pytest.raises(UsageError, match="no interpreter 'no-such-python'"):
        environment.create(old, python="no-such-python")
    fake = tmp_path / "python3.2"
    fake.write_text("#!/bin/sh\necho this is no Python\n", encoding="utf-8")
    fake.chmod(0o755)
    with pytest.raises(UsageError, match="does not run as a Python"):
        environment.create(old, python=fake)
    monkeypatch.setenv("PATH", str(tmp_path))  # a shim that refuses is passed over
    with pytest.raises(UsageError, match="the PATH holds no other"):
        environment.create(old)
    assert not (envs / "tiny").exists()


def test_a_python_on_the_path_is_found(tmp_path: Path, envs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / f"python{HERE[0]}.{HERE[1]}"
    link.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert environment._find_python(spec(tmp_path), None) == (link, HERE)
    del envs


def test_two_at_once_make_one(envs: Path, tmp_path: Path) -> None:
    wanted = spec(tmp_path)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(environment.create(wanted, python=sys.executable)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0].created == results[1].created
    del envs


def test_removing_what_is_being_made_is_refused(envs: Path, tmp_path: Path) -> None:
    holder = textwrap.dedent(f"""
        import filelock, time, pathlib
        pathlib.Path({str(envs)!r}).mkdir(parents=True)
        with filelock.FileLock({str(envs / ".tiny.lock")!r}):
            print("held", flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(EngineError, match="right now"):
            environment.remove(spec(tmp_path))
    finally:
        process.kill()
        process.wait()


def test_an_unknown_environment_and_a_place_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no environment 'pott'") as caught:
        environment.check("pott")
    assert "'pot'" in (caught.value.remedy or "")
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("ZSQ_ENV_DIR", str(blocked / "envs"))
    with pytest.raises(Exception, match="ZSQ_ENV_DIR"):
        environment.create(spec(tmp_path), python=sys.executable)


def test_every_package_of_pot_is_pinned_and_no_registry_is_named() -> None:
    text = environment.SPECS["pot"].requirements.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    assert "://" not in text
    assert "openvino-dev==2023.3.0" in lines
    assert "scipy==1.10.1" in lines
    assert not any(line.startswith("openvino-telemetry") for line in lines)


def test_the_stamp_is_json_with_the_digest(finished: tuple[Path, EnvironmentSpec]) -> None:
    home, made = finished
    stamp = json.loads((home / "tiny" / STAMP).read_text(encoding="utf-8"))
    assert stamp["requirements_sha256"] == made.digest
