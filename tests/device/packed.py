"""Bundles of a network of one layer, and an agent that only pretends: for tests of the way to the device."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from zsq_deploy.device.bundle import Contents, Sample, write_bundle
from zsq_deploy.device.work import Job

STEP = 0.5


def engine(path: Path) -> Path:
    """y = max(x, 0)."""
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4])  # noqa: E731
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def job(folder: Path, *, padding: int = 0, wrong: bool = False, rank: int = 2) -> Job:
    """A bundle; `padding` random bytes lie beside the engine; `wrong`: its reference says something else than the engine;
    `rank`: of its inputs, where the engine takes 2."""
    import onnxruntime

    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(0).integers(-5, 5, (6, 4)).astype(np.float32) * STEP
    x = x.reshape(x.shape + (1,) * (rank - 2))
    y = np.maximum(x, 0)
    beside = ()
    if padding:
        (folder / "weights.bin").write_bytes(np.random.default_rng(1).bytes(padding))
        beside = (folder / "weights.bin",)
    contents = Contents(
        network="relu",
        network_digest="0" * 64,
        target="ort-x86-vnni",
        runtime="onnxruntime",
        runtime_version=onnxruntime.__version__,
        engine=engine(folder / "engine.onnx"),
        steps={"y": STEP},
        beside=beside,
        limits={"twin": {"within_2_lsb": 0.995}},
    )
    samples = [Sample({"x": x}, {"twin": {"y": y + 9 * STEP if wrong else y}, "workstation": {"y": y}})]
    archive = write_bundle(folder / "relu.zsq.tar", contents, samples)
    return Job(archive, contents.target, sealed(archive))


def sealed(archive: Path) -> str:
    """Digest of the manifest of a bundle."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile("bundle.json")
        assert file is not None
        return hashlib.sha256(file.read()).hexdigest()


def result(manifest_sha256: str, **changes: Any) -> dict[str, Any]:
    """A result as an agent writes it."""
    numbers = {
        "images": 6, "elements": 24, "equal_share": 1.0, "within_half_lsb": 1.0, "within_1_lsb": 1.0, "within_2_lsb": 1.0,
        "max_lsb": 0.0, "mean_lsb": 0.0, "sqnr_db": 320.0, "non_finite": 0, "top1_agreement": 1.0,
    }  # fmt: skip
    clock = {"mhz": 1500.0, "governor": "ondemand", "celsius": {"0 cpu-thermal": 55.0}}
    keys = ("median_ms", "p90_ms", "p95_ms", "p99_ms", "iqr_ms", "min_ms", "mean_ms", "first_ms", "load_ms")
    times = dict.fromkeys(keys, 1.5)
    return {
        "format": "zsq-result",
        "schema_version": 1,
        "network": "relu",
        "target": "ort-x86-vnni",
        "bundle_sha256": manifest_sha256,
        "engine_bytes": 100,
        "started": "2026-01-02T03:04:05Z",
        "device": {
            "machine": "aarch64", "system": "Linux", "kernel": "6.1", "python": "3.9.2", "numpy": "1.26.4",
            "cpu": {"model": "Raspberry Pi 4", "features": ["asimd"], "cores": 4}, "memory_bytes": 4_000_000_000,
            "affinity": [0, 1, 2, 3], "emulated": False,
        },
        "runtime": {"name": "onnxruntime", "version": "1.24.4", "built_with": "1.32.0"},
        "threads": 4,
        "parity": {"twin": numbers, "workstation": numbers},
        "latency": {**times, "runs": 100, "threads": 4, "batch": 1},
        "thermal": {
            "before": clock, "after": {**clock, "mhz": 1000.0}, "drift": 1.3, "throttled": True, "why": "the clock fell",
        },
        "memory": {"peak_bytes": 50_000_000, "added_by_loading_bytes": 1_000_000},
        "verdict": {"passed": True, "failed": []},
        "notes": [],
        "seconds": 3.0,
        **changes,
    }  # fmt: skip


AGENT = """
import hashlib, json, os, sys, tarfile, threading, time
def tether():
    while os.read(0, 100):
        pass
    os._exit(3)
threading.Thread(target=tether, daemon=True).start()
word = lambda name: sys.argv[sys.argv.index(name) + 1]
say = lambda what, **more: print(json.dumps(dict(event=what, **more)), flush=True)
if "--probe" in sys.argv:
    say("probe", **json.loads({probe!r}))
    sys.exit(0)
with open(word("--bundle"), "rb") as file:
    data = file.read()
if hashlib.sha256(data).hexdigest() != {archive!r}:
    say("refused", message="the bundle was changed after it was made")
    sys.exit(2)
say("digests")
open(word("--out") + ".runs", "a").write("x")
say("latency", seconds=1.0)
time.sleep({seconds!r})
with open(word("--out") + ".new", "w") as file:
    file.write({result!r})
os.rename(word("--out") + ".new", word("--out"))
say("done")
"""


def pretend(path: Path, work: Job, *, seconds: float = 0.0, **changes: Any) -> Path:
    """Write an agent that checks the archive, waits, and gives a result without measuring anything."""
    found = result(work.manifest_sha256, **changes)
    probe = {
        "agent": 1,
        "device": found["device"],
        "runtimes": {"onnxruntime": {"version": "1.24.4", "providers": ["CPUExecutionProvider"]}},
        "clocks": found["thermal"]["before"],
    }
    digest = hashlib.sha256(work.archive.read_bytes()).hexdigest()
    text = AGENT.format(probe=json.dumps(probe), archive=digest, seconds=seconds, result=json.dumps(found))
    path.write_text(text)
    return path
