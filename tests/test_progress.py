"""Progress: bars on a terminal, a few plain lines elsewhere, nothing when nobody watches."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from zsq_deploy import progress
from zsq_deploy.progress import SILENT, PlainProgress, RichProgress, default_progress


def test_silence(capsys):
    with SILENT.task("x", 10) as task:
        task.advance(5, loss=0.5)
    SILENT.say("x")
    assert capsys.readouterr() == ("", "")


def test_plain_lines_are_few(capsys, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    plain = PlainProgress(every_seconds=10)
    with plain.task("work", 200) as task:
        for _ in range(200):
            task.advance(1, loss=0.25)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 15 <= len(lines) <= 25
    assert "s left" in lines[0]
    assert "loss 0.25" in lines[0]
    assert lines[-1].startswith("work: done in")


def test_what_was_not_done_is_not_called_done(capsys):
    with pytest.raises(KeyboardInterrupt), PlainProgress().task("work", 2) as task:  # noqa: PT012
        task.advance(1)
        raise KeyboardInterrupt
    assert "done in" not in capsys.readouterr().err


def test_bars():
    text = io.StringIO()
    bars = RichProgress(Console(file=text, force_terminal=True, width=120))
    with bars.task("outer", 2) as outer:
        outer.advance(1, loss=0.125)
        with bars.task("inner", 4) as inner:
            inner.advance(4)
        bars.say("a word [in] brackets")
        outer.advance(1)
    shown = text.getvalue()
    for words in ("outer", "inner", "loss 0.125", "4/4", "a word [in] brackets"):
        assert words in shown
    with pytest.raises(ValueError, match="x"), bars.task("again", 1):  # usable after an error, and after the first task
        raise ValueError("x")


def test_the_choice(monkeypatch):
    assert default_progress(quiet=True) is SILENT
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    assert isinstance(default_progress(), PlainProgress)
