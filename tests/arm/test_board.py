"""From a network to a proof on an Arm board: ``zsq bench --device ssh://...`` against a real OpenSSH server that lands in the Arm root."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arm_root
import numpy as np
import onnx
import pytest

from zsq_deploy.device import agent

pytestmark = [pytest.mark.arm, pytest.mark.timeout(1200)]

ZSQ = [sys.executable, "-c", "import sys; from zsq_deploy.cli import main; sys.exit(main())"]


def zsq(*words: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    line = [*ZSQ, *(str(word) for word in words)]
    return subprocess.run(line, check=False, capture_output=True, text=True, env=environment, timeout=900)


def residual(path: Path) -> Path:
    """Convolutions, depthwise ones, and a chain of residual sums: what rounds in its own way on Arm."""
    rng = np.random.default_rng(3)
    lines, weights, value = ["r0 = Conv <pads = [1,1,1,1]> (x, w0, b0)", "a0 = Relu (r0)"], {"w0": (16, 3, 3, 3)}, "a0"
    for block in range(1, 5):
        group, depth = (16, 1) if block % 2 else (1, 16)
        lines += [
            f"c{block} = Conv <pads = [1,1,1,1], group = {group}> ({value}, w{block}, b{block})",
            f"s{block} = Add (c{block}, {value})",
            f"a{block} = Relu (s{block})",
        ]
        weights[f"w{block}"] = (16, depth, 3, 3)
        value = f"a{block}"
    lines += [f"g = GlobalAveragePool ({value})", "f = Flatten (g)", "y = Gemm <transB = 1> (f, w9, b9)"]
    weights["w9"] = (10, 16)
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,16,16] x) => (float[N,10] y) {\n'
        + "\n".join(lines)
        + "\n}"
    )
    proto = onnx.parser.parse_model(text)
    for name, shape in weights.items():
        spread = 1.4 / np.sqrt(np.prod(shape[1:]))
        for key, array in ((name, rng.normal(0, spread, shape)), (f"b{name[1:]}", rng.normal(0, 0.1, shape[0]))):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), key))
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("arm")
    network, out = residual(home / "net.onnx"), home / "out"
    words = ["--mean", ".5,.5,.5", "--std", ".25,.25,.25", "--method", "fractal", "--images", 32, "--no-search", "-q"]
    said = zsq("deploy", network, *words, "--target", "ort-arm64", "-o", out)
    assert said.returncode == 0, said.stderr
    return out


def section(out: Path) -> dict[str, Any]:
    devices = json.loads((out / "report.json").read_text())["targets"]["ort-arm64"]["devices"]
    assert len(devices) == 1
    return dict(next(iter(devices.values())))


def home_of(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "home" / arm_root.USER).iterdir() if path.name != ".cache")


def test_a_board_proves_the_engine(deployed: Path, root: Path, board: Any) -> None:
    words = ["--samples", 32, "--seconds", 0.05, "--streams", 0]
    said = zsq("bench", deployed, "--device", board.address, *words, environment=board.environment())
    assert said.returncode == 0, said.stderr
    found = section(deployed)
    assert (found["machine"], found["emulated"], found["passed"]) == ("aarch64", True, True)
    assert any("times say nothing" in note for note in found["notes"])
    assert "asimddp" in found["features"]
    parity = found["parity"]
    assert parity["integer"]["equal_share"] >= 0.9999
    assert parity["twin"]["within_2_lsb"] >= 0.995
    assert parity["twin"]["top1_agreement"] >= 0.995
    assert parity["twin"]["elements"] > 0
    assert home_of(root) == []  # cleaned up
    page = zsq("report", deployed)
    assert page.returncode == 0, page.stderr


def test_a_board_that_dies_at_work(deployed: Path, root: Path, board: Any) -> None:
    """The server and everything that runs in its sessions are killed while the agent computes."""
    before = (deployed / "report.json").read_bytes()
    words: Sequence[object] = ["bench", deployed, "--device", board.address, "--samples", 32, "--seconds", 60]
    line = [*ZSQ, *(str(word) for word in words)]
    running = subprocess.Popen(
        line,
        env=board.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 300
        while running.poll() is None and time.monotonic() < end and not _agent_at_work(board):
            time.sleep(0.2)
        assert running.poll() is None
        board.stop()
        _, err = running.communicate(timeout=600)
    finally:
        running.kill()
        board.start()
    assert running.returncode == 2
    assert "to do:" in err
    assert "Traceback" not in err
    assert (deployed / "report.json").read_bytes() == before
    said = zsq(
        "bench", deployed, "--device", board.address, "--samples", 8, "--seconds", 0.05, environment=board.environment()
    )
    assert said.returncode == 0, said.stderr
    assert section(deployed)["passed"]


def _agent_at_work(board: Any) -> bool:
    """Whether a Python of the board runs the agent (seen in /proc, among the server's descendants)."""
    del board
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"agent.py") for word in words) and any(b"aarch64" in word for word in words[:2]):
            return True
    return False


def test_a_bundle_altered_by_one_byte_is_refused(deployed: Path, root: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "net.zsq.tar"
    said = zsq("bundle", deployed / "ort-arm64", "-o", bundle, "--samples", 8)
    assert said.returncode == 0, said.stderr
    data = bytearray(bundle.read_bytes())
    rng = np.random.default_rng(0)
    Path(tmp_path / "agent.py").write_bytes(Path(agent.__file__).read_bytes())
    line = ["python3", "/data/agent.py", "--bundle", "/data/net.zsq.tar", "--seconds", "0.01", "--runs", "1"]
    for place in rng.integers(0, len(data), 3):
        data[place] ^= 1
        bundle.write_bytes(data)
        done = arm_root.run(root, line, binds={str(tmp_path): "/data"}, timeout=300)
        assert done.returncode == 2, done.stdout
        assert "refused" in done.stderr
        data[place] ^= 1
    bundle.write_bytes(data)
    done = arm_root.run(root, line, binds={str(tmp_path): "/data"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["device"]["machine"] == "aarch64"
