"""How fast OpenVINO's integer engines are, side by side, on networks of ResNet-18's and MobileNetV2's size at 224.

Random weights, a few noise images (speed does not depend on either). Measured in turns in one run, with 1 thread and with 2:

    float32      the float network with ``INFERENCE_PRECISION_HINT=f32``
    best float   the fastest float mode of this machine (bfloat16 products where the processor has them)
    plain NNCF   what ``nncf.quantize(model, images)`` gives with its defaults, saved and loaded as any user would
    qdq, nncf    our engines: our own Q/DQ graph, and NNCF with our settings

    python tools/bench_openvino.py [--threads 1 2] [--rounds 60] [--size 224] [--json FILE] [--wrapping] [--cpu]

``calm x`` compares the 5 % quantiles: on a machine that does other work as well, medians tell how busy it was. Goals on a machine with
VNNI: 3.0x float32 (ResNet-18) and 1.9x (MobileNetV2), and not slower than plain NNCF. ``--wrapping`` also measures what our way to call
NNCF costs beside a bare ``nncf.quantize`` with the same settings and images (goal: under 10 % more processor time).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _networks import mobilenet_v2, resnet18

from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.openvino.convert import convert, save
from zsq_deploy.backends.openvino.nncf_route import design_nncf, quantize_arguments
from zsq_deploy.backends.openvino.options import BuildOptions
from zsq_deploy.backends.openvino.quiet import load_nncf, quiet
from zsq_deploy.backends.openvino.runner import OvRunner, float_modes, missing_features
from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.model import Model, load_model
from zsq_deploy.pipeline import Images, measure_ranges

GOALS = {"resnet18": 3.0, "mobilenet_v2": 1.9}
_TURN = 5
SAME = 0.03
"""Two engines whose calm times differ by less are equally fast."""


def calibration_set(model: Model, count: int, size: int) -> CalibrationSet:
    """Noise images."""
    images = np.random.default_rng(0).normal(size=(count, 3, size, size)).astype(np.float32)
    return CalibrationSet.from_arrays(
        {model.inputs[0].name: images}, CalibrationManifest.of(model, method="noise", seed=0)
    )


def plain_nncf(model: Model, images: CalibrationSet, path: Path) -> Path:
    """The IR that a user of NNCF gets who changes nothing."""
    nncf = load_nncf()
    with quiet():
        quantized = nncf.quantize(convert(model.folded().graph), nncf.Dataset(list(images.batches(1))))
    save(quantized, path)
    return path


def measure(
    name: str,
    network: torch.nn.Module,
    size: int,
    threads: tuple[int, ...],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Build everything once and measure it in turns: one row for each number of threads."""
    target = get_target("openvino-cpu")
    backend: Any = get_backend(target)
    model = load_model(network, input_shape=(1, 3, size, size), name=name)
    images = calibration_set(model, 4, size)
    feeds = next(iter(images.batches(1)))
    ranges = measure_ranges(model, Images(images, images, "noise", 0.0), "minmax").ranges
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        engines = {
            quantizer: backend.build(
                model,
                ranges,
                target,
                folder / quantizer,
                options=BuildOptions(quantizer=quantizer, exact_scales=True),  # type: ignore[arg-type]
                calibration=images,
            )
            for quantizer in ("qdq", "nncf")
        }
        float_path = engines["qdq"].float_path
        plain = plain_nncf(model, images, folder / "plain" / "plain.xml")
        for count in threads:
            runners: dict[str, OvRunner] = {"float32": OvRunner(float_path, target, threads=count, mode="float")}
            for mode, session in float_modes(target).items():
                if session:
                    runners[mode] = OvRunner(float_path, target, threads=count, mode="float", session=session)
            modes = len(runners)
            runners["plain NNCF"] = OvRunner(plain, target, threads=count)
            runners.update((who, OvRunner(engine.path, target, threads=count)) for who, engine in engines.items())
            series = paired_quantiles(list(runners.values()), feeds, rounds, clock)
            median = dict(zip(runners, series[0], strict=True))
            calm = dict(zip(runners, series[1], strict=True))
            macs = {who: share(one.kernels(feeds)) for who, one in runners.items() if who in ("plain NNCF", *engines)}
            floats = list(runners)[:modes]
            rows.append(
                {
                    "network": name,
                    "threads": count,
                    "goal": GOALS.get(name),
                    "median_ms": median,
                    "calm_ms": calm,
                    "best_float": min(floats, key=calm.__getitem__),
                    "integer_macs_share": macs,
                    "bytes": {who: engine.bytes for who, engine in engines.items()},
                }
            )
    return rows


def paired_quantiles(
    runners: list[OvRunner], feeds: Any, rounds: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Milliseconds, medians and 5 % quantiles, of several runners measured in turns of a few runs; the first of a turn is not counted."""
    times: list[list[float]] = [[] for _ in runners]
    for number in range(-(-rounds // _TURN) + 1):
        for runner, kept in zip(runners, times, strict=True):
            for again in range(_TURN + 1):
                started = clock()
                runner.run(feeds)
                if number and again:
                    kept.append((clock() - started) * 1e3)
    return [float(np.median(kept)) for kept in times], [float(np.quantile(kept, 0.05)) for kept in times]


def share(records: Any) -> float:
    """Share of the multiply-accumulates that ran in integer kernels."""
    total = sum(record.macs for record in records)
    return sum(record.macs for record in records if record.integer) / total if total else 0.0


def wrapping(name: str, network: torch.nn.Module, size: int, images: int, rounds: int) -> dict[str, Any]:
    """Processor time of a bare ``nncf.quantize``, and of our route with the same settings and images; the best of some rounds."""
    nncf = load_nncf()
    target = get_target("openvino-cpu")
    model = load_model(network, input_shape=(1, 3, size, size), name=name)
    graph = model.folded().graph
    calibration = calibration_set(model, images, size)
    options = BuildOptions(quantizer="nncf")
    feeds = list(calibration.batches(1))
    ov = importlib.import_module("openvino")

    def bare(folder: Path) -> None:
        path = folder / "float.onnx"
        path.write_bytes(graph.proto.SerializeToString())
        with quiet():
            quantized = nncf.quantize(
                ov.convert_model(str(path)), nncf.Dataset(feeds), **quantize_arguments(options.nncf, target, len(feeds))
            )
        ov.save_model(quantized, str(folder / "bare.xml"), compress_to_fp16=False)

    def ours(folder: Path) -> None:
        design_nncf(model, calibration, target, options, folder)

    best = {"bare": np.inf, "ours": np.inf}
    for _ in range(rounds):
        for who, work in (("bare", bare), ("ours", ours)):
            best[who] = min(best[who], seconds(work))
    return {"network": name, "bare_s": best["bare"], "ours_s": best["ours"], "more": best["ours"] / best["bare"] - 1.0}


def seconds(work: Callable[[Path], None]) -> float:
    """Processor time of a piece of work, in a folder of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.process_time()
        work(Path(scratch))
        return time.process_time() - started


def missed(row: dict[str, Any]) -> list[str]:
    """What a row fails to reach."""
    calm = row["calm_ms"]
    best = min(calm["qdq"], calm["nncf"])
    found = []
    if row["goal"] is not None and calm["float32"] / best < row["goal"]:
        found.append(f"{calm['float32'] / best:.2f}x float32, not {row['goal']}x")
    if best > calm["plain NNCF"] * (1 + SAME):
        found.append(f"{best / calm['plain NNCF'] - 1:.1%} slower than plain NNCF")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit code is 1 if a goal is missed on a machine that can reach it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--network", action="append", choices=sorted(GOALS))
    parser.add_argument("--wrapping", action="store_true", help="also measure what our way to call NNCF costs")
    parser.add_argument("--images", type=int, default=16, help="for --wrapping")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of the clock, for busy machines")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lacking = missing_features(get_target("openvino-cpu"))
    clock = time.process_time if told.cpu else time.perf_counter
    rows: list[dict[str, Any]] = []
    wrapped: list[dict[str, Any]] = []
    failed = False
    print(
        f"{'network':14} {'threads':>7} {'float32':>9} {'best float':>22} {'plain NNCF':>11} {'qdq':>9} {'nncf':>9} "
        f"{'x':>6} {'calm x':>7} {'/ plain':>8}"
    )
    for name, make in (("resnet18", resnet18), ("mobilenet_v2", mobilenet_v2)):
        if told.network and name not in told.network:
            continue
        for row in measure(name, make(size=told.size), told.size, tuple(told.threads), told.rounds, clock):
            rows.append(row)
            median, calm = row["median_ms"], row["calm_ms"]
            fast = min(("qdq", "nncf"), key=calm.__getitem__)
            best = f"{row['best_float']} {median[row['best_float']]:.2f} ms"
            print(
                f"{name:14} {row['threads']:7} {median['float32']:6.2f} ms {best:>22} {median['plain NNCF']:8.2f} ms "
                f"{median['qdq']:6.2f} ms {median['nncf']:6.2f} ms {median['float32'] / median[fast]:5.2f}x "
                f"{calm['float32'] / calm[fast]:6.2f}x {calm[fast] / calm['plain NNCF']:7.3f}",
                flush=True,
            )
            problems = missed(row)
            failed |= bool(problems)
            if problems:
                print(f"{'':14} missed: {'; '.join(problems)}")
        if told.wrapping:
            wrapped.append(wrapping(name, make(size=told.size), told.size, told.images, 2))
            found = wrapped[-1]
            print(
                f"{name:14} nncf.quantize {found['bare_s']:.1f} s, our route {found['ours_s']:.1f} s ({found['more']:+.1%})"
            )
            failed |= found["more"] > 0.10
    if told.json:
        text = {"threads": told.threads, "lacking": lacking, "rows": rows, "wrapping": wrapped}
        told.json.write_text(json.dumps(text, indent=2))
    if lacking:
        print(f"this machine lacks {', '.join(lacking)}: the goals do not hold here")
        return 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
