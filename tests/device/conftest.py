"""A real OpenSSH server on loopback, a wire that can be cut, and bundles that are made in no time."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


loopback = sys.modules.get("loopback") or _load("loopback")
packed = sys.modules.get("packed") or _load("packed")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An SSH server that lets one key in; skipped, visibly, where there is no OpenSSH server."""
    program = loopback.find_sshd()
    if program is None:
        reason = "no OpenSSH server here (Debian: apt-get install openssh-server)"
        if os.environ.get("ZSQ_REQUIRE_SSHD") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with loopback.Server(program, tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def home(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own with the key that the server knows, and with its host key among the known ones."""
    place = tmp_path / "home"
    server.furnish(place)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(place))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return place


@pytest.fixture
def wire(server: Any) -> Iterator[Any]:
    """A way to the server that can be cut."""
    with loopback.Wire(server.port) as found:
        yield found


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder on the "device" that everything is brought into."""
    place = tmp_path / "there"
    place.mkdir()
    return place
