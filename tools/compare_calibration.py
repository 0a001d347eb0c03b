"""Accuracy of engines by calibration method, network by network: the table of docs/results.md.

Every engine of one network is made by the same quantizer with the same settings; only the calibration images differ. Real images
calibrate a baseline of their own, in two halves: the engine calibrated on one half is scored on the other, so that no image both
calibrates and scores. A further row, `plain`, is ONNX Runtime's own min-max with per-channel weights on the same real images: what
a user gets without this project.

    python tools/compare_calibration.py --assets ../shared/assets --out compare.json
    python tools/compare_calibration.py --out compare.json --markdown

Results are written after every engine; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _comparison import NETWORKS, Network, Tally, cell, keep_row, real_halves

from zsq_deploy.artifact import read_json
from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.evaldata import EvalData, load_eval_data
from zsq_deploy.model import Model, load_model
from zsq_deploy.pipeline import EngineSettings, Images, build_engine, make_images, measure_ranges

METHODS = ("zeroq", "genie", "real", "plain", "fractal", "gaussian", "uniform", "ones", "bn-analytic")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, or print the table of an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--out", type=Path, default=Path("compare.json"), help="results; also what is gone on with")
    parser.add_argument("--network", action="append", choices=sorted(NETWORKS), help="only these")
    parser.add_argument("--method", action="append", choices=METHODS, help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="score on at most so many images (for a first look)")
    parser.add_argument("--images", type=int, help="calibration images (default: per network)")
    parser.add_argument("--free-scales", action="store_true")
    parser.add_argument("--no-bias-correction", action="store_true")
    parser.add_argument("--ranges", default="auto")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.out) if options.out.is_file() else {}
    if options.markdown:
        sys.stdout.write(markdown(results))
        return 0
    torch.set_num_threads(options.threads)
    settings = EngineSettings(
        search=False, exact_scales=not options.free_scales, bias_correction=not options.no_bias_correction
    )
    for name in options.network or NETWORKS:
        network = NETWORKS[name]
        model = load_model(
            options.assets / "models" / network.file, preprocess=network.preprocess, input_shape=network.input_shape
        )
        data = load_eval_data(
            options.assets / "data" / network.data, model.inputs[0], resize=network.resize, limit=options.limit
        )
        for method in options.method or METHODS:
            key = f"{method}/{options.seed}"
            if method == "bn-analytic" and not model.batch_norms():
                continue
            keep_row(results, options.out, name, key, partial(score, model, network, data, method, options, settings))
    sys.stdout.write(markdown(results))
    return 0


def parts(
    model: Model, network: Network, data: EvalData, method: str, options: Any
) -> Iterator[tuple[Images, EvalData]]:
    """Calibration images, and what the engine that they make is scored on."""
    count = options.images or network.images
    if method in ("real", "plain"):
        for calibration, scored in real_halves(model, data, count, options.seed):
            yield Images(calibration, calibration, "real", 0.0), scored
        return
    images = make_images(
        model,
        method=method,
        images=count,
        holdout=1,
        seed=options.seed,
        parameters=network.parameters.get(method),
    )
    yield images, data


def score(
    model: Model, network: Network, data: EvalData, method: str, options: Any, settings: EngineSettings
) -> dict[str, Any]:
    """Accuracy of float and engine, and their agreement, over all images."""
    target = get_target("ort-x86-vnni")
    backend = get_backend(target)
    tally, seconds = Tally(), 0.0
    for images, scored in parts(model, network, data, method, options):
        seconds += images.seconds
        if method == "plain":
            measured = measure_ranges(model, images, "minmax")
            chosen = EngineSettings(search=False, exact_scales=False, bias_correction=False)
        else:
            measured, chosen = measure_ranges(model, images, options.ranges), settings
        with tempfile.TemporaryDirectory() as scratch:
            engine = build_engine(
                model, images, measured, target, Path(scratch), chosen, threads=options.threads
            ).engine
            runner = backend.runner(engine.path, target, threads=options.threads)
            floating = backend.runner(engine.float_path, target, threads=options.threads, mode="float")
            tally.add(model, runner, floating, scored)
    return {**tally.row(network.labelled), "synthesis_seconds": seconds}


def markdown(results: dict[str, Any]) -> str:
    """The table: accuracy % (agreement with float %), mean over seeds."""
    lines = [
        "| network | float | " + " | ".join(METHODS) + " |",
        "|---" * (len(METHODS) + 2) + "|",
    ]
    for name, rows in results.items():
        found = {method: [row for key, row in rows.items() if key.split("/")[0] == method] for method in METHODS}
        cells = [cell(found[method]) for method in METHODS]
        known = [row["float"] for row in rows.values() if row.get("float") is not None]
        floating = f"{100 * known[-1]:.2f}" if known else "-"
        lines.append(f"| {name} | {floating} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
