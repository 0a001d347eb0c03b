"""An Arm user land to test in; without it (``make arm-root``) these tests are skipped, visibly."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zsq_deploy.errors import ZsqError

TOOLS = Path(__file__).parents[2] / "tools" / "arm"


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


arm_root = sys.modules.get("arm_root") or _load(TOOLS / "arm_root.py")
arm_ssh = sys.modules.get("arm_ssh") or _load(TOOLS / "arm_ssh.py")


@pytest.fixture(scope="session")
def root() -> Path:
    """The Arm root; tests are skipped where it has not been built, and fail with ``ZSQ_REQUIRE_ARM``."""
    try:
        return Path(arm_root.find_root())
    except ZsqError as error:
        if os.environ.get("ZSQ_REQUIRE_ARM"):
            pytest.fail(f"the Arm root is required here: {error}")
        pytest.skip(f"{error.what} (make arm-root)")


@pytest.fixture(scope="session")
def board(root: Path) -> Iterator[Any]:
    """An SSH server whose sessions land in the root."""
    with arm_ssh.serve(root) as server:
        yield server
