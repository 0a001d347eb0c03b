"""Every integer kernel of ONNX Runtime on Arm, on random layers, against the integer reference with Arm's rules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arm_root
import numpy as np
import onnx
import pytest

from zsq_deploy.backends.onnxruntime.integer import IntegerReference
from zsq_deploy.backends.onnxruntime.kernels import Arithmetic, Arm64Arithmetic

pytestmark = pytest.mark.arm

U8, S8 = np.uint8, np.int8
Make = Callable[[np.random.Generator], Any]


def _cases() -> Any:
    if "ort_integer_cases" not in sys.modules:
        path = Path(__file__).parents[1] / "backends" / "ort_integer_cases.py"
        spec = importlib.util.spec_from_file_location("ort_integer_cases", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["ort_integer_cases"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["ort_integer_cases"]


cases = _cases()

LAYERS: dict[str, Make] = {
    "conv u8s8": lambda rng: cases.conv_case(rng),
    "conv s8s8": lambda rng: cases.conv_case(rng, activation=S8),
    "conv s8s8, channels last": lambda rng: cases.conv_case(rng, activation=S8, last=True),
    "conv u8s8, channels last, wide": lambda rng: cases.conv_case(rng, last=True, channels=128),
    "conv s8s8, groups": lambda rng: cases.conv_case(rng, activation=S8, groups=3),
    "depthwise s8s8": lambda rng: cases.conv_case(rng, activation=S8, depthwise=True),
    "depthwise s8s8, channels last": lambda rng: cases.conv_case(rng, activation=S8, depthwise=True, last=True),
    "gemm s8s8": lambda rng: cases.gemm_case(rng, activation=S8, weight=S8, output="codes"),
    "gemm s8s8, float": lambda rng: cases.gemm_case(rng, activation=S8, weight=S8, output="float"),
    "gemm u8s8": lambda rng: cases.gemm_case(rng, activation=U8, weight=S8, output="codes"),
    "matmul s8s8": lambda rng: cases.matmul_case(rng, activation=S8, weight=S8, batch="both", constant=False),
    "matmul to float": lambda rng: cases.to_float_case(rng, weight=S8),
    "add": lambda rng: cases.binary_case(rng, "QLinearAdd", S8, (3, 1111), (3, 1111)),
    "add u8": lambda rng: cases.binary_case(rng, "QLinearAdd", U8, (3, 1111), (3, 1111)),
    "mul": lambda rng: cases.binary_case(rng, "QLinearMul", S8, (3, 1111), (3, 1111)),
    "global average": lambda rng: cases.global_average_case(rng, S8),
    "average": lambda rng: cases.average_case(rng, S8, last=False),
    "max": lambda rng: cases.max_pool_case(rng, S8),
    "leaky relu": lambda rng: cases.unary_case(rng, "QLinearLeakyRelu", S8, (7, 50), alpha=0.1),
    "concat": lambda rng: cases.concat_case(rng, S8),
    "quantize": lambda rng: cases.quantize_case(rng, S8),
    "dequantize": lambda rng: cases.dequantize_case(rng, S8),
}
EACH = 4

RUN = """
import pathlib, sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
for path in sorted(pathlib.Path('/data').glob('*.onnx')):
    session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    found = session.run(None, dict(np.load(path.with_suffix('.in.npz'))))
    np.savez(path.with_suffix('.out.npz'), *found)
"""


@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76", "max"])
def test_random_layers_are_computed_bit_for_bit(cpu: str, root: Path, tmp_path: Path) -> None:
    """Without dot products, with them, and with 8-bit matrix products: the same numbers."""
    made = {}
    rng = np.random.default_rng(7)
    for place, (name, make) in enumerate(LAYERS.items()):
        for number in range(EACH):
            case = make(rng)
            stem = f"{place:02}-{number}"
            onnx.save(case.model(), tmp_path / f"{stem}.onnx")
            np.savez(tmp_path / f"{stem}.in.npz", **case.feeds)
            made[stem] = (name, case)
    done = arm_root.run(root, ["python3", "-c", RUN], cpu=cpu, binds={str(tmp_path): "/data"}, timeout=600)
    assert done.returncode == 0, done.stderr
    wrong, x86 = [], 0
    for stem, (name, case) in made.items():
        with np.load(tmp_path / f"{stem}.out.npz") as found:
            theirs = [found[key] for key in found.files]
        reference = IntegerReference(tmp_path / f"{stem}.onnx", cases.TARGET, arithmetic=Arm64Arithmetic())
        ours = reference.run(case.feeds)
        wrong += [name for got, out in zip(theirs, case.outputs, strict=True) if not np.array_equal(got, ours[out])]
        other = IntegerReference(tmp_path / f"{stem}.onnx", cases.TARGET, arithmetic=Arithmetic()).run(case.feeds)
        x86 += any(not np.array_equal(got, other[out]) for got, out in zip(theirs, case.outputs, strict=True))
    assert wrong == []
    assert x86 > 0  # the comparison is sharp: the rules of x86 do not pass


def test_halves_are_rounded_away_from_zero_in_sums(root: Path, tmp_path: Path) -> None:
    """All pairs of codes, scales whose ratio is a half: what the graph says and what Arm computes differ, as the docs say."""
    codes = np.arange(-128, 128).astype(S8)
    a, b = (grid.reshape(1, -1) for grid in np.meshgrid(codes, codes, indexing="ij"))
    scales = {name: np.float32(value) for name, value in (("sa", 0.5), ("sb", 1.0), ("sy", 1.0))}
    zeros = {name: np.int8(0) for name in ("za", "zb", "zy")}
    case = cases.Case(
        "QLinearAdd", ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], {"a": a, "b": b}, {**scales, **zeros}
    )
    onnx.save(case.model(), tmp_path / "add.onnx")
    np.savez(tmp_path / "add.in.npz", **case.feeds)
    assert arm_root.run(root, ["python3", "-c", RUN], binds={str(tmp_path): "/data"}, timeout=300).returncode == 0
    with np.load(tmp_path / "add.out.npz") as found:
        got = found["arr_0"].astype(np.float64)
    exact = a / 2.0 + b
    away = np.clip(np.trunc(exact + np.copysign(0.5, exact)), -128, 127)
    np.testing.assert_array_equal(got, away)
    assert (got != np.clip(np.rint(exact), -128, 127)).mean() > 0.1
