"""Accuracy of OpenVINO engines by quantizer and calibration images, network by network.

Quantizers: ``qdq`` (our own Q/DQ graph), ``nncf`` (NNCF with our settings), ``pot`` (the real POT in its own environment), and ``plain``: what
``nncf.quantize`` with the mixed preset and nothing else said gives to anybody. Images: ``real`` in two halves (the engine calibrated on
one half is scored on the other, so that no image both calibrates and scores), ``zeroq``, ``genie``, ``fractal``, ``gaussian``.

    python tools/compare_openvino.py --assets ../shared/assets --out openvino.json [--sets FOLDER ...]
    python tools/compare_openvino.py --out openvino.json --markdown

``--sets`` names folders with finished calibration sets (at any depth): one that was made from the network by the method is taken instead
of making it again. Results are written after every engine; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _comparison import NETWORKS, Network, Tally, cell, finished_sets, keep_row, real_halves

from zsq_deploy.artifact import read_json
from zsq_deploy.backends import get_backend, get_target
from zsq_deploy.backends.openvino.convert import convert, save
from zsq_deploy.backends.openvino.quiet import load_nncf, quiet
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.evaldata import EvalData, load_eval_data
from zsq_deploy.model import Model, load_model
from zsq_deploy.pipeline import EngineSettings, Images, build_engine, make_images, measure_ranges

QUANTIZERS = ("qdq", "nncf", "plain", "pot", "auto")
IMAGES = ("real", "zeroq", "genie", "fractal", "gaussian")
MARGIN = 0.2
"""Points of accuracy that NNCF on synthetic images may be below NNCF on real ones."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, or print the table of an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--out", type=Path, default=Path("openvino.json"), help="results; also what is gone on with")
    parser.add_argument("--network", action="append", choices=sorted(NETWORKS), help="only these")
    parser.add_argument("--quantizer", action="append", choices=QUANTIZERS, help="only these (default: all but auto)")
    parser.add_argument("--method", action="append", choices=IMAGES, help="only these images")
    parser.add_argument("--sets", type=Path, action="append", default=[], help="folders with finished calibration sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="score on at most so many images (for a first look)")
    parser.add_argument("--images", type=int, help="calibration images (default: per network)")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--free-scales", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="WORD=VALUE", help="an option of NNCF, as JSON")
    parser.add_argument("--label", default="", help="goes into the key of the results (for variants)")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.out) if options.out.is_file() else {}
    if options.markdown:
        sys.stdout.write(markdown(results))
        return 0
    torch.set_num_threads(options.threads)
    finished = sorted(finished_sets(options.sets), key=len, reverse=True)
    for name in options.network or NETWORKS:
        network = NETWORKS[name]
        model = load_model(
            options.assets / "models" / network.file, preprocess=network.preprocess, input_shape=network.input_shape
        )
        data = load_eval_data(
            options.assets / "data" / network.data, model.inputs[0], resize=network.resize, limit=options.limit
        )
        for method in options.method or IMAGES:
            for quantizer in options.quantizer or QUANTIZERS[:-1]:
                key = f"{quantizer}{options.label}/{method}/{options.seed}"
                keep_row(
                    results,
                    options.out,
                    name,
                    key,
                    partial(score, model, network, data, quantizer, method, finished, options),
                )
    sys.stdout.write(markdown(results))
    return 0


def parts(
    model: Model, network: Network, data: EvalData, method: str, finished: list[CalibrationSet], options: Any
) -> Iterator[tuple[Images, EvalData]]:
    """Calibration images, and what the engine that they make is scored on."""
    count = options.images or network.images
    if method == "real":
        for calibration, scored in real_halves(model, data, count, options.seed):
            yield Images(calibration, calibration, "real", 0.0), scored
        return
    for found in finished:
        if (found.manifest.model_digest, found.manifest.method) == (model.digest, method):
            chosen = found.take(0, min(count, len(found)))
            yield Images(chosen, chosen, method, 0.0), data
            return
    parameters = network.parameters.get(method)
    made = make_images(model, method=method, images=count, holdout=1, seed=options.seed, parameters=parameters)
    if made.calibration is not None:
        finished.append(made.calibration)  # for the next quantizer
    yield made, data


def score(
    model: Model,
    network: Network,
    data: EvalData,
    quantizer: str,
    method: str,
    finished: list[CalibrationSet],
    options: Any,
) -> dict[str, Any]:
    """Accuracy of float and engine, and their agreement, over all images."""
    target = get_target("openvino-cpu")
    backend = get_backend(target)
    told = {word: json.loads(value) for word, _, value in (item.partition("=") for item in options.set)}
    tally, seconds, count, chosen = Tally(), 0.0, 0, ""
    for images, scored in parts(model, network, data, method, finished, options):
        seconds += images.seconds
        assert images.calibration is not None
        count = len(images.calibration)
        with tempfile.TemporaryDirectory() as scratch:
            if quantizer == "plain":
                path, float_path = plain(model, images.calibration, Path(scratch))
            else:
                settings = EngineSettings(
                    bits=options.bits,
                    quantizer=quantizer,
                    search=quantizer == "auto",
                    exact_scales=not options.free_scales,
                    vendor={"nncf": told} if told else {},
                )
                built = build_engine(
                    model,
                    images,
                    measure_ranges(model, images, "auto"),
                    target,
                    Path(scratch),
                    settings,
                    threads=options.threads,
                )
                path, float_path = built.engine.path, built.engine.float_path
                chosen = str(built.engine.choices.get("quantizer", ""))
            runner = backend.runner(path, target, threads=options.threads)
            floating = backend.runner(float_path, target, threads=options.threads, mode="float")
            tally.add(model, runner, floating, scored)
    return {
        **tally.row(network.labelled),
        "calibration_images": count,
        "chosen": chosen,
        "synthesis_seconds": seconds,
    }


def plain(model: Model, calibration: CalibrationSet, folder: Path) -> tuple[Path, Path]:
    """NNCF's own IR with the mixed preset, and the float network, as files."""
    nncf = load_nncf()
    graph = model.folded().graph
    save(convert(graph), folder / "float.xml")
    with quiet():
        quantized = nncf.quantize(
            convert(graph),
            nncf.Dataset(list(calibration.batches(1))),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
        )
    save(quantized, folder / "plain.xml")
    return folder / "plain.xml", folder / "float.xml"


def markdown(results: dict[str, Any]) -> str:
    """The table, accuracy % (agreement with float %), mean over seeds; and where NNCF on synthetic images misses NNCF on real ones."""
    lines = ["| network | float | quantizer | " + " | ".join(IMAGES) + " |", "|---" * (len(IMAGES) + 3) + "|"]
    misses: list[str] = []
    for name, rows in results.items():
        known = [row["float"] for row in rows.values() if row.get("float") is not None]
        floating = f"{100 * known[-1]:.2f}" if known else "-"
        for quantizer in dict.fromkeys(key.split("/")[0] for key in rows):
            found = {
                method: [row for key, row in rows.items() if key.split("/")[:2] == [quantizer, method]]
                for method in IMAGES
            }
            cells = " | ".join(cell(found[method]) for method in IMAGES)
            lines.append(f"| {name} | {floating} | {quantizer} | {cells} |")
            misses.extend(_misses(name, quantizer, found) if quantizer.startswith("nncf") else ())
    if misses:
        lines += ["", *misses]
    return "\n".join(lines) + "\n"


def _misses(name: str, quantizer: str, found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    def accuracy(method: str) -> float | None:
        values = [row["engine"] for row in found[method] if row.get("engine") is not None]
        return 100 * sum(values) / len(values) if values else None

    real = accuracy("real")
    for method in ("zeroq", "genie"):
        got = accuracy(method)
        if real is not None and got is not None and got < real - MARGIN:
            yield f"* {name}: {quantizer} on {method} images is {real - got:.2f} points below {quantizer} on real images."


if __name__ == "__main__":
    raise SystemExit(main())
