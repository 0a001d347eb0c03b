"""A run of several workers through the pipeline: the same sets, kept on disk, and nothing left of the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zsq_deploy.pipeline.calibration import images_in
from zsq_deploy.recipe import CalibrationSection

from ..calib.test_synthesis import small


@pytest.mark.slow
def test_workers_in_a_run(tmp_path: Path) -> None:
    fields = {
        "method": "zeroq",
        "images": 4,
        "holdout": 2,
        "seed": 3,
        "device": "cpu",
        "parameters": {"steps": 5, "batch_size": 2},
    }
    before = torch.get_num_threads()
    digests = []
    try:
        for workers in (1, 2):
            torch.set_num_threads(workers)
            root = tmp_path / str(workers)
            images = images_in(root, small(), CalibrationSection.model_validate({**fields, "workers": workers}))
            assert images.calibration is not None
            assert images.calibration.folder == root / "calibration"
            assert images.holdout.folder == root / "holdout"
            assert {item.name for item in root.iterdir()} == {"calibration", "holdout"}
            digests.append((images.calibration.digest, images.holdout.digest))
    finally:
        torch.set_num_threads(before)
    assert digests[0] == digests[1]
