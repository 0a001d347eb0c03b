"""The scripts of the folder on a pretended device: ``engine.py`` builds and compares, ``trtexec.sh`` makes the cache fit.

NVIDIA's bindings are real, the builder and the runtime behind them are not (see ``tensorrt_fake/tensorrt.py``); ``trtexec`` writes down
what it was called with.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.bundle import DEVICE_CACHE, trtexec_layer_flags, write_bundle
from zsq_deploy.backends.tensorrt.cache import CalibrationCache, read_cache
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import place_qdq

from .tensorrt_device import Device, device
from .tensorrt_networks import images, network, outputs, ranges_of
from .test_tensorrt_bundle import fake_trtexec, run


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


def bundle(folder: Path, number: int, mode: str) -> tuple[Path, np.ndarray]:
    """A folder as a build writes it, and the outputs of the reference."""
    target = get_target(f"tensorrt-{number}")
    model = network("residual")
    folder.mkdir()
    graph = model.folded().graph
    onnx.save(graph.editable(), folder / "float.onnx")
    cache = None
    if mode == "explicit":
        graph = place_qdq(graph, ranges_of(model), target, BuildOptions()).graph
        onnx.save(graph.editable(), folder / "qdq.onnx")
    else:
        cache = folder / "calibration.cache"
        cache.write_bytes(CalibrationCache.from_ranges(ranges_of(model), version="8.5.2").to_bytes())
    x = images(model)
    wanted = outputs(graph, x)["logits"]
    write_bundle(
        folder,
        folder / ("qdq.onnx" if mode == "explicit" else "float.onnx"),
        target,
        mode=mode,  # type: ignore[arg-type]
        float_network=folder / "float.onnx",
        cache=cache,
        samples={"image": x},
        expected={"logits": wanted},
    )
    return folder, wanted


def script(machine: Device, folder: Path, word: str, **more: str) -> str:
    code = "import runpy, sys\nsys.argv[:] = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    return machine.run(code, str(folder / "engine.py"), word, **more).stdout


@pytest.mark.parametrize(
    ("number", "mode"), [(8, "explicit"), (8, "implicit"), (10, "explicit"), (10, "implicit"), (11, "explicit")]
)
def test_the_python_script_builds_and_compares(machines: Path, number: int, mode: str, tmp_path: Path) -> None:
    machine = device(number, machines)
    folder, wanted = bundle(tmp_path / "out", machine.generation, mode)
    assert "int8.plan" in script(machine, folder, "build")
    said = script(machine, folder, "compare")
    found = re.match(
        r"logits: (?:(\S+) dB|no difference), largest difference (\S+), largest number (\S+), same class (\S+) of 8",
        said,
    )
    assert found, said
    assert float(found[3]) == pytest.approx(np.abs(wanted).max(), rel=1e-4)
    assert float(found[2]) < 0.05 * np.abs(wanted).max()
    head = machine.run(
        "import sys; from pathlib import Path; print(Path(sys.argv[1]).read_bytes().split(b'\\n')[1].decode())",
        str(folder / "int8.plan"),
    ).stdout
    # The cache names 8.5.2, the device has another version: TensorRT would not have used it as it is.
    assert ('"image"' in head.split('"scales": ')[1]) == (mode == "implicit")
    assert '"detailed": true' in head
    layers = (folder / "int8.layers.json").read_text()
    assert "N/A due to dynamic shapes" not in layers
    assert ("Int8" in layers) == (mode == "explicit")


def test_the_shell_script_builds_with_a_cache_that_fits(tmp_path: Path) -> None:
    for number, digits in ((8, "8602"), (10, "100300")):
        folder, _ = bundle(tmp_path / f"out{number}", number, "implicit")
        done = run(folder, "build", TRTEXEC=str(fake_trtexec(tmp_path, digits)))
        assert done.returncode == 0, done.stderr
        called = (tmp_path / "called.txt").read_text().split("\n")
        assert {"--int8", f"--calib={DEVICE_CACHE}", "--onnx=float.onnx"} <= set(called)
        assert read_cache(folder / DEVICE_CACHE).version == int(digits)
        assert read_cache(folder / "calibration.cache").version == 8502
        silent = run(folder, "build", TRTEXEC=str(fake_trtexec(tmp_path, "")))
        assert silent.returncode == 1
        assert "version is needed" in silent.stderr


@pytest.mark.parametrize("number", [8, 10, 11])
def test_timing_ends_with_what_the_layers_compute_in(number: int, tmp_path: Path) -> None:
    folder, _ = bundle(tmp_path / "out", number, "explicit")
    tool = fake_trtexec(tmp_path, {8: "8602", 10: "100300", 11: "110401"}[number])
    assert run(folder, "time", TRTEXEC=str(tool)).returncode == 0
    called = (tmp_path / "called.txt").read_text().split("\n")[:-1]
    flags = trtexec_layer_flags(get_target(f"tensorrt-{number}"), plan="int8.plan")
    assert called == [*flags, "--shapes=image:1x3x8x8"]
    assert {"--exportLayerInfo=int8.layers.json", "--exportProfile=int8.profile.json"} <= set(called)
    assert ("--separateProfileRun" in called) == (number < 11)
