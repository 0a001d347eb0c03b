"""The integer reference against OpenVINO itself, kernel by kernel: every bit of every output."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino")

from zsq_deploy.backends import get_target
from zsq_deploy.backends.openvino.convert import save
from zsq_deploy.backends.openvino.integer import IntegerReference
from zsq_deploy.backends.openvino.kernels.float32 import fused_multiply_add
from zsq_deploy.backends.openvino.runner import OvRunner
from zsq_deploy.backends.openvino.runtime import cpu_features

from . import openvino_cases as cases

CPU = get_target("openvino-cpu")
VNNI = bool(cpu_features() & {"avx512_vnni", "avx_vnni"})

needs_vnni = pytest.mark.skipif(not VNNI, reason="this machine's products of codes saturate")

FLOAT = {"nearest resize": ["Interpolate"], "transposed convolution": ["Deconvolution+Add"]}
"""What OpenVINO computes in float there, and so does the reference, with OpenVINO's kernel."""


def differing(name: str, seed: int, path: Path, largest: int = 127) -> tuple[int, int]:
    """How many outputs differ, of how many."""
    model, arrays = cases.case(name, seed, largest)
    save(model, path)
    runner, reference = OvRunner(path, CPU), IntegerReference(path)
    feeds = dict(zip(runner.input_names, arrays, strict=True))
    theirs, ours = runner.run(feeds), reference.run(feeds)
    assert [node.op for node in reference.float_nodes] == FLOAT.get(name, [])
    wrong = total = 0
    for key, array in theirs.items():
        assert array.shape == ours[key].shape
        assert array.dtype == ours[key].dtype
        wrong, total = wrong + int(np.count_nonzero(array != ours[key])), total + array.size
    return wrong, total


@needs_vnni
@pytest.mark.parametrize("name", list(cases.CASES))
def test_every_bit_is_openvinos(name: str, tmp_path: Path) -> None:
    wrong, total = differing(name, 1, tmp_path / "engine.xml")
    assert (wrong, total) == (0, total)


@needs_vnni
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("name", list(cases.CASES))
def test_every_bit_is_openvinos_with_other_numbers(name: str, seed: int, tmp_path: Path) -> None:
    assert differing(name, seed, tmp_path / "engine.xml")[0] == 0


SCRIPT = """
import sys
from pathlib import Path
from tests.backends.test_openvino_integer_kernels import differing
for largest in sys.argv[2:]:
    print(*(differing(name, 1, Path(sys.argv[1]) / "engine.xml", int(largest))[0] for name in ("conv 3x3", "conv 1x1", "dense")))
"""


def limited(isa: str, folder: Path, *largest: int) -> list[list[int]]:
    """Numbers of differing outputs without newer instructions than `isa`: for each bound of the weights' codes one a case."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *map(str, largest)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return [[int(part) for part in line.split()] for line in result.stdout.splitlines()]


@pytest.mark.skipif("avx_vnni" not in cpu_features(), reason="no AVX2-VNNI here")
def test_avx2_vnni_gives_the_same_bits(tmp_path: Path) -> None:
    assert limited("AVX2_VNNI", tmp_path, 127) == [[0, 0, 0]]


@pytest.mark.skipif("avx2" not in cpu_features(), reason="no AVX2 here")
def test_without_vnni_sums_saturate_unless_weights_have_seven_bits(tmp_path: Path) -> None:
    seven, eight = limited("AVX2", tmp_path, 63, 127)
    assert seven == [0, 0, 0]
    assert all(eight)


def test_fused_multiply_add_rounds_once() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(3000).astype(np.float32)
    factor = rng.standard_normal(3000).astype(np.float32)
    shift = (-x * factor * (1 + rng.integers(-3, 4, 3000) * 2.0**-23)).astype(np.float32)
    shift[::3] = np.float32(1) + np.spacing(np.float32(1)) * rng.integers(0, 8, shift[::3].size)
    for a, b, c, found in zip(x, factor, shift, fused_multiply_add(x, factor, shift), strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        error = abs(exact - Fraction(float(found)))
        for other in (np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(-np.inf))):
            assert error <= abs(exact - Fraction(float(other)))


def test_halfway_sums_are_rounded_by_what_lies_below() -> None:
    """The sum lies a little above the middle of two float32 numbers: rounding to float64 first would make it a tie."""
    step = np.float32(2.0**-23)
    x = np.array([np.float32(2.0**-24 + 2.0**-47), np.float32(2.0**-24)])
    found = fused_multiply_add(x, np.float32(1 + 2.0**-23) * np.ones(2, np.float32), np.array([1, 1], np.float32))
    assert found[0] == np.float32(1) + step
    tiny = fused_multiply_add(
        np.array([1.0], np.float32), np.array([2.0**-60], np.float32), np.array([1.0], np.float32)
    )
    assert tiny[0] == 1
