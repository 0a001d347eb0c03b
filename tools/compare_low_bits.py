"""What engines of few bits are worth, network by network: parity with their graph, integer kernels, size of the file, accuracy.

    python tools/compare_low_bits.py --assets ../shared/assets --sets FOLDER --out low_bits.json [--network NAME] [--case TARGET/BITS/ROUNDING]
    python tools/compare_low_bits.py --out low_bits.json --markdown

Every engine is built as ``zsq deploy --no-search --target T --bits B --rounding R`` builds it. ``--sets`` names folders with finished
calibration sets (at any depth); all sets that were made from the network by ``--method`` are joined. Without one, images are made. Parity is counted
on ``--parity`` images against the float64 twin of the engine's Q/DQ graph, accuracy on ``--limit`` images, both labelled ones that nothing was
tuned on. Results are written after every engine; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _comparison import NETWORKS, Network, Tally, finished_sets, keep_row

from zsq_deploy.artifact import read_json
from zsq_deploy.backends import Engine, get_backend, get_target
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.evaldata import EvalData, load_eval_data
from zsq_deploy.model import Graph, Model, load_model
from zsq_deploy.model.twin import Twin
from zsq_deploy.pipeline import EngineSettings, Images, build_engine, make_images, measure_ranges

TARGETS = ("ort-x86-vnni", "openvino-cpu")
CASES = tuple(f"{target}/{case}" for case in ("w8a8/nearest", "w4a8/squant") for target in TARGETS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, or print the table of an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--out", type=Path, default=Path("low_bits.json"), help="results; also what is gone on with")
    parser.add_argument("--network", action="append", choices=sorted(NETWORKS), help="only these")
    parser.add_argument("--case", action="append", metavar="TARGET/BITS/ROUNDING", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--protocol", default="ends-8bit")
    parser.add_argument("--preset", default="fast", help="schedule of learned rounding")
    parser.add_argument("--sets", type=Path, action="append", default=[], help="folders with finished calibration sets")
    parser.add_argument("--method", default="zeroq", help="how images are made")
    parser.add_argument(
        "--images", type=int, help="calibration images (default: all of the finished ones, or per network)"
    )
    parser.add_argument("--no-bias-correction", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="accuracy on at most so many images")
    parser.add_argument("--parity", type=int, default=64, help="images for parity")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.out) if options.out.is_file() else {}
    if not options.markdown:
        torch.set_num_threads(1)
        for name in options.network or NETWORKS:
            network = NETWORKS[name]
            model = load_model(options.assets / "models" / network.file, preprocess=network.preprocess)
            images = images_for(model, network, options)
            data = load_eval_data(
                options.assets / "data" / network.data, model.inputs[0], resize=network.resize, limit=options.limit
            )
            for case in options.case or CASES:
                key = f"{case}/{options.protocol}/{options.seed}" + "/biases as they are" * options.no_bias_correction
                keep_row(results, options.out, name, key, partial(row, model, network, images, data, case, options))
    sys.stdout.write(markdown(results))
    return 0


def images_for(model: Model, network: Network, options: Any) -> Images:
    """Finished sets of the method, joined; or new images."""
    fitting = [
        found
        for found in finished_sets(options.sets)
        if (found.manifest.model_digest, found.manifest.method) == (model.digest, options.method)
    ]
    if not fitting:
        return make_images(
            model, method=options.method, images=options.images or network.images, holdout=1, seed=options.seed
        )
    name = model.inputs[0].name
    # a set that is a part of another one is met once
    arrays = {found.digest: np.concatenate([batch[name] for batch in found.batches(64)]) for found in fitting}
    joined = CalibrationSet.from_arrays({name: np.concatenate(list(arrays.values()))}, fitting[0].manifest)
    chosen = joined.take(0, min(options.images or len(joined), len(joined)))
    return Images(chosen, chosen, options.method, 0.0)


def row(model: Model, network: Network, images: Images, data: EvalData, case: str, options: Any) -> dict[str, Any]:
    """Build one engine and look at it."""
    target_name, bits, rounding = case.split("/")
    target = get_target(target_name)
    settings = EngineSettings(
        bits=bits,
        rounding=rounding,
        protocol=options.protocol,
        reconstruct_preset=options.preset,
        quantizer="auto" if target.runtime == "onnxruntime" else "qdq",
        search=False,
        bias_correction=not options.no_bias_correction,
    )
    with tempfile.TemporaryDirectory() as scratch:
        built = build_engine(
            model, images, measure_ranges(model, images, "auto"), target, Path(scratch), settings, seed=options.seed
        )
        runner = get_backend(target).runner(built.engine.path, target)
        floating = get_backend(target).runner(built.engine.float_path, target, mode="float")
        tally = Tally()
        tally.add(model, runner, floating, data)
        return {
            **tally.row(network.labelled),
            **parity(model, built.engine, runner, data.take(np.arange(min(options.parity, len(data))))),
            "bytes": built.engine.bytes,
            "float_bytes": built.engine.float_path.stat().st_size,
            "calibration_images": len(images.calibration or ()),
            "build_seconds": built.seconds,
            "notes": list(built.notes),
        }


def parity(model: Model, engine: Engine, runner: Any, data: EvalData) -> dict[str, Any]:
    """The engine beside the float64 twin of its Q/DQ graph, and how many of its layers ran in integer kernels."""
    twin = Twin(Graph.load(engine.qdq_path), dtype=torch.float64)
    name = model.inputs[0].name
    same = different = outputs = count = 0
    worst = 0.0
    feeds: dict[str, Any] = {}
    for pixels, _ in data.batches(16):
        feeds = {name: model.preprocess.apply(pixels)}
        with torch.no_grad():
            wanted = next(iter(twin.run({name: torch.tensor(feeds[name], dtype=torch.float64)}).values())).numpy()
        got = next(iter(runner.run(feeds).values()))
        step = (wanted.max() - wanted.min()) / 255
        worst = max(worst, float(np.abs(got - wanted).max() / step))
        different += int((np.abs(got - wanted) > 1e-3 * step).sum())
        same += int((got.argmax(-1) == wanted.argmax(-1)).sum())
        count, outputs = count + len(got), outputs + got.size
    kernels = [kernel for kernel in runner.kernels({name: feeds[name][:1]}) if kernel.macs]
    convolutions = [kernel for kernel in kernels if "conv" in kernel.op.lower()]
    return {
        "parity_images": count,
        "top1_as_twin": same / count,
        "outputs_that_differ": different / outputs,
        "largest_lsb": worst,
        "convolutions": len(convolutions),
        "integer_convolutions": sum(kernel.integer for kernel in convolutions),
        "integer_macs": sum(k.macs for k in kernels if k.integer) / max(sum(k.macs for k in kernels), 1),
    }


def markdown(results: dict[str, Any]) -> str:
    """One line an engine; sizes against the 8-bit engine of the same target."""
    lines = [
        (
            "| network (float %) | target | bits, rounding | accuracy % (images) | top-1 as twin % | outputs that differ % | "
            "convolutions in integers | integer MACs % | kB (8-bit engine) |"
        ),
        "|---" * 9 + "|",
    ]
    for name, rows in results.items():
        for key, found in rows.items():
            target, bits, rounding, protocol, _, *more = key.split("/")
            if "bytes" not in found:
                lines.append(
                    f"| {name} | {target} | {bits} {rounding} | {found.get('error', 'no result')} |" + " |" * 5
                )
                continue
            eight = next((r for k, r in rows.items() if k.startswith(f"{target}/w8a8/nearest/") and "bytes" in r), None)
            exact = "-" if found.get("float") is None else f"{100 * found['float']:.2f}"
            got = "-" if found.get("engine") is None else f"{100 * found['engine']:.2f}"
            beside = "" if bits == "w8a8" or eight is None else f" ({eight['bytes'] / 1e3:.0f})"
            told = ", ".join([f"{bits} {rounding}", *([protocol] if protocol != "ends-8bit" else []), *more])
            lines.append(
                f"| {name} ({exact}) | {target} | {told} | {got} ({found['images']}) | {100 * found['top1_as_twin']:.1f} | "
                f"{100 * found['outputs_that_differ']:.2f} | {found['integer_convolutions']} of {found['convolutions']} | "
                f"{100 * found['integer_macs']:.1f} | {found['bytes'] / 1e3:.0f}{beside} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
