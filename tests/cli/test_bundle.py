"""Bundles: what is in them, that the agent runs alone, agrees with the workstation, and refuses whatever was changed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq_deploy.device import agent
from zsq_deploy.device.bundle import open_bundle
from zsq_deploy.errors import ZsqError
from zsq_deploy.verify import compare

ALLOWED = {"numpy", "onnxruntime", "openvino"}


@pytest.fixture(scope="module")
def bundle(place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from zsq_deploy.pipeline.bundling import bundle_target

    return bundle_target(place.out / "ort-x86-vnni", tmp_path_factory.mktemp("bundle") / "net.zsq.tar", samples=20)


def run_agent(folder: Path, *arguments: str, program: str = "agent.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", program, "--seconds", "0.05", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_agent_needs_python_3_9_numpy_and_a_runtime() -> None:
    """Syntax and imports; that nothing else is needed is seen where it runs."""
    tree = ast.parse(Path(agent.__file__).read_text(), feature_version=(3, 9))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            found.add((node.module or "").split(".")[0])
    assert found - set(sys.stdlib_module_names) == ALLOWED
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not {"zip_strict", "aiter", "anext"} & calls
    zips = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip"]
    assert not any(word.arg == "strict" for call in zips for word in call.keywords)  # Python 3.10


def test_a_bundle_proves_and_measures_its_engine_where_it_is_unpacked(place, bundle: Path, tmp_path: Path) -> None:
    with tarfile.open(bundle) as tar:
        tar.extractall(tmp_path, filter="data")
    said = run_agent(tmp_path, "--streams", "2", "--threads", "2")
    assert said.returncode == 0, said.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    report = small.read(place.out / "report.json")["targets"]["ort-x86-vnni"]
    assert result["verdict"] == {"passed": True, "failed": []}
    assert result["parity"]["workstation"]["equal_share"] == 1.0  # the same machine and runtime
    assert result["parity"]["integer"]["equal_share"] == report["parity"]["integer"]["equal_share"]
    assert result["parity"]["twin"]["images"] == 20
    assert result["parity"]["twin"]["within_2_lsb"] >= 0.995
    assert 0 < result["latency"]["min_ms"] <= result["latency"]["median_ms"] <= result["latency"]["p99_ms"]
    assert result["latency"]["load_ms"] > 0 < result["latency"]["first_ms"]
    assert result["throughput"]["samples_per_second"] > 0
    assert result["throughput"]["streams"] == 2
    assert result["memory"]["peak_bytes"] > 10_000_000
    assert result["device"]["cpu"]["cores"] >= 1
    assert result["engine_bytes"] == report["engine"]["bytes"]
    again = tmp_path / "again"
    again.mkdir()
    said = run_agent(again, "--bundle", str(bundle), "--events", "-o", "mine.json", program=agent.__file__)
    assert said.returncode == 0, said.stderr
    events = [json.loads(line)["event"] for line in said.stdout.splitlines()]
    assert events[0] == "digests"
    assert events[-1] == "done"
    assert [item.name for item in again.iterdir()] == ["mine.json"]


def test_an_engine_that_disagrees_is_found(bundle: Path, tmp_path: Path) -> None:
    """Reference outputs of another network, in a bundle that is whole."""
    manifest = open_bundle(bundle, tmp_path)
    name = manifest["samples"][0]
    with np.load(tmp_path / name) as file:
        arrays = {key: value[::-1] if key.startswith("twin::") else value for key, value in file.items()}
    with (tmp_path / name).open("wb") as file:
        np.savez(file, **arrays)
    manifest["files"][name] = {"bytes": (tmp_path / name).stat().st_size, "sha256": agent.sha256(tmp_path / name)}
    (tmp_path / agent.MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / agent.SEAL).write_text(agent.sha256(tmp_path / agent.MANIFEST))
    said = run_agent(tmp_path)
    assert said.returncode == 1
    assert "within_2_lsb against the twin reference" in said.stdout
    assert json.loads((tmp_path / "result.json").read_text())["verdict"]["passed"] is False


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_bundle_with_one_changed_byte_is_refused(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, where: float, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    data = bytearray(bundle.read_bytes())
    data[int(where * len(data))] ^= flip
    changed = folder / "changed.zsq.tar"
    changed.write_bytes(data)
    with pytest.raises(ZsqError):
        open_bundle(changed, folder / "open")
    changed.unlink()


def test_every_header_and_padding_byte_counts(bundle: Path, tmp_path: Path) -> None:
    """The bytes that are no file's content: names, sizes, owners, times, the filling of the last block, the end marks."""
    data = bundle.read_bytes()
    with tarfile.open(bundle) as tar:
        first, second = tar.getmembers()[:2]
    places = [
        *range(0, 512, 37),
        first.offset_data + first.size,
        second.offset + 110,
        second.offset + 330,
        len(data) - 1,
    ]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        file = tmp_path / "changed.zsq.tar"
        file.write_bytes(changed)
        with pytest.raises(ZsqError):
            open_bundle(file, tmp_path / f"at-{place}")


@pytest.mark.parametrize("cut", [0, 100, 512, 0.5, -1])
def test_half_a_bundle_is_refused(bundle: Path, tmp_path: Path, cut: float) -> None:
    data = bundle.read_bytes()
    file = tmp_path / "half.zsq.tar"
    file.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    said = run_agent(tmp_path, "--bundle", str(file), program=agent.__file__)
    assert said.returncode == 2
    assert said.stderr.startswith("refused: ")
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:evil", "a\\evil"])
def test_nothing_is_unpacked_outside(tmp_path: Path, name: str) -> None:
    file = tmp_path / "evil.zsq.tar"
    with tarfile.open(file, "w") as tar:
        info = tarfile.TarInfo(name)
        tar.addfile(info)
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(agent.RefusedError, match="no plain file inside"):
        agent.unpack(file, inner)
    assert not list(inner.iterdir())
    assert {item.name for item in tmp_path.iterdir()} == {"evil.zsq.tar", "inner"}


def test_a_missing_runtime_and_wrong_use(bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(bundle, tmp_path)
    with pytest.raises(agent.RefusedError, match="cannot run engines of tensorrt"):
        agent.runtime_of({**manifest, "runtime": {"name": "tensorrt", "version": "10"}})
    said = subprocess.run(
        [sys.executable, "-I", "-S", "agent.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 2
    assert "python -m pip install onnxruntime==" in said.stderr
    assert run_agent(tmp_path, "--affinity", "9999").returncode == 2
    assert run_agent(tmp_path, "--threads", "0").returncode == 2


def test_the_command(place, zsq, tmp_path: Path) -> None:
    out = tmp_path / "net.zsq.tar"
    said = zsq("bundle", place.out / "ort-x86-vnni", "-o", out, "--samples", 4, "--json")
    assert said.code == 0
    shown = json.loads(said.out)
    assert shown["sha256"] == agent.sha256(out)
    first = out.read_bytes()
    assert zsq("bundle", place.out / "ort-x86-vnni", "-o", out, "--samples", 4).code == 2  # it is there
    assert zsq("bundle", place.out / "ort-x86-vnni", "-o", out, "--samples", 4, "--force").code == 0
    assert out.read_bytes() == first  # bit for bit the same
    said = zsq("bundle", place.out / "nothing", "-o", tmp_path / "x.tar")
    assert said.code == 2
    assert "holds no engine" in said.err
    assert zsq("bundle", place.out / "ort-x86-vnni", "-o", tmp_path / "y.tar", "--samples", 0).code == 2
    assert not (tmp_path / "x.tar").exists()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), step=st.sampled_from([0.01, 0.5, 3.0]), spoil=st.booleans())
def test_parity_is_the_workstations(seed: int, step: float, spoil: bool) -> None:
    random = np.random.default_rng(seed)
    wanted = (step * random.integers(-40, 40, (7, 5))).astype(np.float32)
    got = (wanted + step * random.integers(-4, 5, wanted.shape) * (random.random(wanted.shape) < 0.3)).astype(
        np.float32
    )
    if spoil:
        got[2, 3] = np.nan
    theirs = compare({"y": got}, {"y": wanted}, {"y": step}).to_json()
    mine = agent.parity([({"y": got}, {"y": wanted})], {"y": step})
    for key, value in mine.items():
        assert value == pytest.approx(theirs[key], rel=1e-9), key
    halves = [({"y": got[part]}, {"y": wanted[part]}) for part in (slice(0, 3), slice(3, 7))]
    assert agent.parity(halves, {"y": step}) == pytest.approx(mine)


def test_a_device_that_slows_down_is_told_of() -> None:
    cold = {"mhz": 2000.0}
    assert agent.throttled(cold, {"mhz": 1700.0}, 1.0)[0] is True
    assert agent.throttled(cold, {"mhz": 1950.0}, 1.0) == (False, "")
    assert agent.throttled({"mhz": None}, {"mhz": None}, 1.2)[0] is True
    assert agent.throttled({"mhz": None}, {"mhz": None}, None) == (None, "")
    assert agent.summary([1.0] * 50 + [2.0] * 50)["drift"] == 2.0
    assert agent.cores("0,2-4") == {0, 2, 3, 4}
