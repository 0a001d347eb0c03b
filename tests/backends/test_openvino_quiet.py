"""OpenVINO and NNCF report to nobody, leave nothing in the user's home, and say nothing on the terminal."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zsq_deploy.backends.openvino.quiet import load_nncf, quiet
from zsq_deploy.backends.openvino.runtime import ov

_WATCH = """
import json, os, socket, sys
LOG = os.environ["WATCHED"]

def refuse(*args, **kwargs):
    with open(LOG, "a") as file:
        file.write(repr(args[-1] if args else kwargs)[:60] + chr(10))
    raise OSError("no network in this test")

socket.socket.connect = refuse
socket.socket.sendto = refuse
socket.getaddrinfo = refuse
socket.create_connection = refuse
"""

_WORK = """
import numpy as np
import openvino as ov
import onnx
from onnx import helper, numpy_helper

weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], "g",
    [helper.make_tensor_value_info("x", 1, [1, 3, 8, 8])], [helper.make_tensor_value_info("y", 1, [1, 4, 8, 8])],
    [numpy_helper.from_array(weight, "w")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "net.onnx")
model = ov.convert_model("net.onnx")
import nncf
quantized = nncf.quantize(model, nncf.Dataset([np.zeros((1, 3, 8, 8), np.float32)] * 2), subset_size=2)
assert any(op.get_type_name() == "FakeQuantize" for op in quantized.get_ops())
"""

_OURS = "import zsq_deploy.backends.openvino\n"
_LATE = """
import openvino, nncf, time
time.sleep(1.0)  # what the import itself reports has left its thread
import zsq_deploy.backends.openvino
with open(LOG, "a") as file:
    file.write("from here on" + chr(10))
"""


def _script(folder: Path, code: str) -> tuple[list[str], list[str], str]:
    """Run code in a process of its own, with an empty home: the files that it leaves there, where it wanted to connect, what it printed."""
    home = folder / "home"
    home.mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NNCF_", "PYTEST", "CI", "TF_BUILD", "JENKINS"))
    }
    environment.update(HOME=str(home), WATCHED=str(folder / "calls.txt"), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    calls = folder / "calls.txt"
    return files, calls.read_text().splitlines() if calls.exists() else [], done.stdout + done.stderr


def test_left_alone_the_libraries_do_report(tmp_path: Path) -> None:
    """The control: without our package the same work leaves an identity, so the next test can fail."""
    files, calls, printed = _script(tmp_path, _WATCH + _WORK)
    assert calls
    assert any("openvino" in name for name in files)
    assert "Statistics collection" in printed


def test_nothing_is_reported_and_nothing_is_left_at_home(tmp_path: Path) -> None:
    files, calls, _ = _script(tmp_path, _WATCH + _OURS + _WORK)
    assert files == []
    assert calls == []


def test_a_program_that_was_there_before_us_is_disarmed(tmp_path: Path) -> None:
    """Somebody imported OpenVINO and NNCF first, and has an instance of the telemetry: it sends nothing from then on."""
    code = _WATCH + _LATE + _WORK + "\ntime.sleep(1.0)\n"
    _, calls, _ = _script(tmp_path, code)
    assert calls[-1] == "from here on"


class _Recorded:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[float]] = {}

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Any]:
        steps: list[float] = [total, 0.0]
        self.tasks[title] = steps

        class _Task:
            def advance(self, done: float = 1, **values: float | str) -> None:
                del values
                steps[1] += done

        yield _Task()

    def say(self, message: str) -> None:
        raise AssertionError(message)


def _model() -> Any:
    op = ov.opset13
    x = op.parameter([1, 3, 8, 8], np.float32, name="x")
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    bias = op.constant(np.ones((1, 4, 1, 1), np.float32))
    y = op.relu(op.add(op.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1]), bias))
    return ov.Model([y], [x])


def test_bars_become_tasks_and_logs_become_messages(capfd: pytest.CaptureFixture[str]) -> None:
    progress = _Recorded()
    with quiet(progress) as messages:
        nncf = load_nncf()
        data = nncf.Dataset([np.ones((1, 3, 8, 8), np.float32)] * 4)
        nncf.quantize(_model(), data, subset_size=9)
    assert progress.tasks["NNCF: statistics collection"] == [4, 4]
    assert len(progress.tasks) > 1
    assert any("smaller than the requested subset size" in text for text in messages.texts(logging.WARNING))
    assert capfd.readouterr() == ("", "")


def test_everything_is_put_back_also_after_an_error() -> None:
    others = "nncf" in sys.modules  # somebody imported it without us, and keeps the handlers of that import
    with quiet():
        pass
    track = sys.modules["nncf.common.logging.track_progress"].track
    logger = logging.getLogger("nncf")
    before = (dict(vars(track)), list(logger.handlers), logger.level)

    def fail() -> None:
        with quiet(_Recorded()) as outer, quiet(_Recorded()):
            assert track.__iter__ is not before[0]["__iter__"]
            logger.warning("said inside")
            raise ValueError(json.dumps(outer.lines))

    with pytest.raises(ValueError, match=r"\[\]"):  # the inner of two nested contexts hears it
        fail()
    assert dict(vars(track)) == before[0]
    assert (list(logger.handlers), logger.level) == before[1:]
    assert others or not any(type(handler) is logging.StreamHandler for handler in logger.handlers)
