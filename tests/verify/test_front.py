"""The package's front door: every public name is there, and opening it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zsq_deploy import verify


def test_every_public_name_can_be_loaded():
    for name in verify.__all__:
        assert getattr(verify, name) is not None
    assert set(verify.__all__) == {name for names in verify._HOME.values() for name in names}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        verify.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "module", ["zsq_deploy.verify.bench_child", "zsq_deploy.verify.latency", "zsq_deploy.verify.parity"]
)
def test_measuring_imports_no_runtime_and_no_torch(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'onnx', 'onnxruntime', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
