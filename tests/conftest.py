"""Shared fixtures: where the evaluation assets are, and one thread for everything, so that runs can be repeated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("ZSQ_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real networks and real data, named by ``ZSQ_ASSETS``; tests that need it are skipped without it."""
    folder = Path(os.environ.get("ZSQ_ASSETS", Path(__file__).parent.parent.parent / "shared" / "assets"))
    if not (folder / "models").is_dir():
        if os.environ.get("ZSQ_REQUIRE_ASSETS"):
            pytest.fail(f"the evaluation assets are required here, but {folder} does not hold them")
        pytest.skip(f"evaluation assets not found at {folder} (set ZSQ_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def pot_environment() -> Path:
    """POT's own interpreter; tests that need it are skipped where it has not been made, and fail with ``ZSQ_REQUIRE_POT``."""
    from zsq_deploy.backends.openvino.pot import environment
    from zsq_deploy.errors import ZsqError

    try:
        return environment.check("pot").python
    except ZsqError as error:
        if os.environ.get("ZSQ_REQUIRE_POT"):
            pytest.fail(f"POT is required here: {error}")
        pytest.skip(f"{error.what} (zsq env create pot)")
