"""The targets as values, and how they are found."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zsq_deploy.backends import TARGETS, get_backend, get_target, target_names
from zsq_deploy.backends.onnxruntime.runner import missing_features
from zsq_deploy.backends.onnxruntime.targets import weight_limit
from zsq_deploy.errors import UsageError


def test_the_three_targets_are_there_in_order() -> None:
    names = [name for name in target_names() if name.startswith("ort-")]
    assert names == ["ort-x86-vnni", "ort-x86-avx2", "ort-arm64"]
    assert all(TARGETS[name].runtime == "onnxruntime" for name in names)


def test_types_of_the_targets() -> None:
    vnni, avx2, arm = (get_target(name) for name in ("ort-x86-vnni", "ort-x86-avx2", "ort-arm64"))
    assert (vnni.activation.signed, vnni.activation.symmetric) == (False, False)
    assert (arm.activation.signed, arm.activation.symmetric) == (True, False)
    for target in (vnni, avx2, arm):
        assert target.weight.signed
        assert target.weight.symmetric
        assert target.weight.bits == 8
    assert (weight_limit(vnni), weight_limit(avx2)) == (127, 64)
    # Two products of an unsigned activation and a weight at its limit fit into int16: that is what the reduced range is for.
    assert 2 * 255 * weight_limit(avx2) <= 32767 < 2 * 255 * weight_limit(vnni)


@pytest.mark.parametrize(
    ("typed", "meant"), [("ort-x86-vnn", "ort-x86-vnni"), ("ORT-ARM64", "ort-arm64"), ("avx2", "")]
)
def test_an_unknown_target_names_the_close_one_and_all(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        get_target(typed)
    assert caught.value.where == "--target"
    for name in target_names():
        assert name in str(caught.value)
    if meant:
        assert f"did you mean {meant!r}" in str(caught.value)


def test_looking_at_targets_imports_no_runtime() -> None:
    code = (
        "import sys; from zsq_deploy.backends import TARGETS, get_target; list(TARGETS); get_target('ort-arm64');"
        "assert 'onnxruntime' not in sys.modules, 'onnxruntime was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_backend_offers_what_is_promised() -> None:
    backend = get_backend("ort-x86-vnni")
    for name in (
        "build",
        "runner",
        "integer_reference",
        "float_modes",
        "missing_features",
        "lint",
        "summarize",
        "choose",
    ):
        assert callable(getattr(backend, name)), name


def test_missing_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from zsq_deploy.backends.onnxruntime import runner

    monkeypatch.setattr(runner, "cpu_features", lambda: frozenset(("avx2", "avx_vnni")))
    assert missing_features(get_target("ort-x86-vnni")) == ()
    assert missing_features(get_target("ort-x86-avx2")) == ()
    assert missing_features(get_target("ort-arm64")) == ("asimd",)
    monkeypatch.setattr(runner, "cpu_features", lambda: frozenset(("avx2",)))
    assert missing_features(get_target("ort-x86-vnni")) == ("avx512_vnni|avx_vnni",)
