"""Files that are never half-written, and folders that one run owns."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat

import pytest

from zsq_deploy.artifact import (
    OutputFolder,
    atomic_path,
    atomic_writer,
    digest_file,
    digest_json,
    explain_os_error,
    read_json,
    write_json,
)
from zsq_deploy.errors import OutputExistsError, StaleArtifactError, UsageError, ZsqError


def test_digests(tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert digest_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert digest_json({"b": 1, "a": [1.5, None]}) == digest_json({"a": [1.5, None], "b": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})


def test_a_file_appears_when_it_is_complete(tmp_path):
    file = tmp_path / "deep" / "file.bin"
    with atomic_writer(file) as out:
        out.write(b"whole")
        assert not file.exists()
    assert file.read_bytes() == b"whole"
    assert list(file.parent.iterdir()) == [file]
    os.umask(mask := os.umask(0))
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path, error):
    file = tmp_path / "file.json"
    write_json(file, {"old": 1})
    with pytest.raises(error), atomic_writer(file) as out:  # noqa: PT012
        out.write(b"half")
        raise error
    assert read_json(file) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_writer_that_wants_a_name_gets_the_suffix(tmp_path):
    with atomic_path(tmp_path / "net.onnx") as temporary:
        assert temporary.suffix == ".onnx"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"x")
    assert (tmp_path / "net.onnx").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written"), (errno.EACCES, "cannot be written")],
)
def test_what_the_disk_says(tmp_path, number, words):
    file = tmp_path / "file"
    with pytest.raises(ZsqError, match=words) as caught, atomic_writer(file):
        raise OSError(number, os.strerror(number))
    assert str(file) in str(caught.value)
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_errors_of_the_system_in_words():
    told = explain_os_error(OSError(errno.ENOSPC, "No space left on device", "/x/y"))
    assert told is not None
    assert told.where == "/x/y"
    assert "full" in told.what
    assert explain_os_error(OSError(errno.EFBIG, "File too large")).where is None  # type: ignore[union-attr]
    assert explain_os_error(OSError("no number")) is None


def test_json_refuses_what_json_has_not(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())
    (tmp_path / "broken.json").write_text('{"a": ')
    with pytest.raises(ZsqError, match="not a JSON file"):
        read_json(tmp_path / "broken.json")
    with pytest.raises(ZsqError, match="does not exist"):
        read_json(tmp_path / "missing.json")


def run(path, finish=True, write=("a.txt",), **more):
    with OutputFolder(path, owns=("a.txt", "b", "c"), **more) as folder:
        for name in write:
            (folder.path / name).parent.mkdir(exist_ok=True)
            (folder.path / name).write_text("made by zsq")
        if finish:
            folder.finish()


def names(path):
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def test_a_finished_folder(tmp_path):
    out = tmp_path / "out"
    run(out)
    assert names(out) == [".zsq-run.json", "a.txt"]
    for more in ({}, {"resume": True}):
        with pytest.raises(OutputExistsError, match="earlier run"):
            run(out, **more)
    run(out, force=True, write=("b/x",))
    assert names(out) == [".zsq-run.json", "b", "b/x"]


def test_an_interrupted_folder(tmp_path):
    out = tmp_path / "out"
    run(out, finish=False, identity="one")
    with pytest.raises(OutputExistsError, match="interrupted"):
        run(out, identity="one")
    with pytest.raises(StaleArtifactError, match="recipe differs"):
        run(out, identity="two", resume=True)
    run(out, identity="one", resume=True, write=("b/x",))
    assert names(out) == [".zsq-run.json", "a.txt", "b", "b/x"]


def test_files_of_somebody_in_the_rest_of_an_interrupted_run(tmp_path):
    out = tmp_path / "out"
    run(out, write=("b/x",))
    (out / "b" / "mine.txt").write_text("mine")
    run(out, force=True, finish=False, write=("b/x", "b/y"))
    run(out, resume=True, finish=False, write=("b/z",))
    run(out, force=True, write=("c/z",))
    assert names(out) == [".zsq-run.json", "b", "b/mine.txt", "c", "c/z"]


def test_a_marker_that_is_damaged_counts_as_interrupted(tmp_path):
    out = tmp_path / "out"
    run(out)
    (out / OutputFolder.MARKER).write_text("{")
    with pytest.raises(OutputExistsError, match="interrupted"):
        run(out)
    run(out, force=True)


def test_force_removes_what_runs_made_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    run(out, write=("a.txt", "b/x", "b/y"))
    for name in ("mine.txt", "b/mine.txt"):
        (out / name).write_text("mine")
    run(out, force=True, write=("c/z",))
    assert names(out) == [".zsq-run.json", "b", "b/mine.txt", "c", "c/z", "mine.txt"]
    run(out, force=True, write=())
    assert names(out) == [".zsq-run.json", "b", "b/mine.txt", "mine.txt"]


def test_a_marker_cannot_point_outside(tmp_path):
    """Whoever edits the marker does not make --force remove other folders."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("mine")
    out = tmp_path / "out"
    run(out)
    marker = {"state": "interrupted", "owns": ["../precious", "..", "a.txt"]}
    (out / OutputFolder.MARKER).write_text(json.dumps(marker))
    run(out, force=True, write=())
    assert (tmp_path / "precious" / "x").read_text() == "mine"


def test_links_are_removed_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("mine")
    out = tmp_path / "out"
    run(out, finish=False)
    (out / "b").symlink_to(tmp_path / "elsewhere")
    run(out, force=True)
    assert (tmp_path / "elsewhere" / "x").read_text() == "mine"
    assert not (out / "b").exists()


def test_a_failure_before_anything_was_made_leaves_no_folder(tmp_path):
    out = tmp_path / "out"
    owns = ("recipe.resolved.yaml",)
    with pytest.raises(ValueError, match="early"), OutputFolder(out, owns=owns) as folder:  # noqa: PT012
        (folder.path / "recipe.resolved.yaml").write_text("x")
        (folder.path / "empty").mkdir()
        raise ValueError("early")
    assert not out.exists()
    out.mkdir()  # a folder that was there stays
    with pytest.raises(ValueError, match="early"), OutputFolder(out):
        raise ValueError("early")
    assert names(out) == []


def test_one_run_at_a_time(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out) as folder:
        (folder.path / "x").write_text("x")
        for more in ({}, {"force": True}, {"resume": True}):
            with pytest.raises(OutputExistsError, match="another run"):
                run(out, **more)
        folder.finish()
    assert not (out / OutputFolder.LOCK).exists()
    with OutputFolder.reopen(out), pytest.raises(OutputExistsError, match="another run"):
        run(out, force=True)


def test_reopening(tmp_path):
    with pytest.raises(UsageError, match="no such folder"), OutputFolder.reopen(tmp_path / "nowhere"):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file"), OutputFolder.reopen(tmp_path / "file"):
        pass
    run(tmp_path / "out", finish=False)
    with pytest.raises(OutputExistsError, match="interrupted"), OutputFolder.reopen(tmp_path / "out"):
        pass
    run(tmp_path / "done")
    with pytest.raises(KeyError), OutputFolder.reopen(tmp_path / "done"):
        raise KeyError("what a reader does")
    assert names(tmp_path / "done") == [".zsq-run.json", "a.txt"]
