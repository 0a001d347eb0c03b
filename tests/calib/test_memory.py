"""Peak memory: how several processes and stages add up, and where it is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zsq_deploy.calib.manifest import CalibrationManifest
from zsq_deploy.calib.parts.memory import Peak, forget_peak, peak_so_far
from zsq_deploy.calib.synthesis import synthesize

from .test_synthesis import small

CPU = torch.device("cpu")


def test_processes_add_up_and_stages_do_not() -> None:
    one, two = Peak(100, {0: 7}), Peak(50, {0: 5, 1: 30})
    assert one.beside(two) == Peak(150, {0: 12, 1: 30})
    assert one.or_later(two) == Peak(100, {0: 7, 1: 30})
    assert Peak().beside(one) == one
    assert (one.gpu, two.gpu, Peak(3).gpu) == (7, 30, None)


def test_the_peak_of_a_process_is_what_it_held_and_gave_back() -> None:
    code = (
        "import torch, numpy as np\n"
        "from zsq_deploy.calib.parts.memory import peak_so_far\n"
        "cpu = torch.device('cpu')\n"
        "before = peak_so_far(cpu).host\n"
        "held = np.ones(2**27, np.uint8)\n"
        "del held\n"
        "print(peak_so_far(cpu).host - before)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert 2**27 - 2**24 < int(done.stdout) < 2**27 + 2**25


def test_a_gpu_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: torch's answers are put in its mouth."""
    forgotten: list[object] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + (device.index or 0))
    forget_peak(CPU)
    assert not forgotten
    forget_peak(torch.device("cuda", 1))
    assert forgotten == [torch.device("cuda", 1)]
    assert peak_so_far(torch.device("cuda", 1)).gpus == {1: 1001}
    assert peak_so_far(torch.device("cuda")).gpus == {2: 1000}
    assert peak_so_far(CPU).gpus == {}


def test_it_stands_in_the_manifest(tmp_path: Path) -> None:
    made = synthesize(small(), images=2, device="cpu", parameters={"steps": 2}, output=tmp_path / "set")
    found = made.manifest
    assert 5e7 < found.peak_rss_bytes <= peak_so_far(CPU).host
    assert found.peak_gpu_bytes is None
    older = found.model_dump()
    del older["peak_gpu_bytes"]  # as sets made before it was measured
    assert CalibrationManifest.model_validate(older).peak_gpu_bytes is None
