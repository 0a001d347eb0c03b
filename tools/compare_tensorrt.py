"""Accuracy of what TensorRT is given, without TensorRT: the twin of each graph, and ONNX Runtime's execution of it, against float.

Ways: ``explicit`` (the Q/DQ graph, as ``zsq quantize`` writes it), ``implicit`` (``--quantizer implicit``: what the calibration cache means
for a network with corrected biases), ``plain`` (the Q/DQ graph of minimum and maximum, with nothing else done to it). Images: ``data-free`` (ZeroQ where the network has batch norm, structured
pictures where it has none), ``real`` (two halves: what calibrates one is scored on the other). The lint column counts the findings for
TensorRT 8, 10 and 11.

    python tools/compare_tensorrt.py --assets ../shared/assets --out tensorrt.json [--sets FOLDER ...]
    python tools/compare_tensorrt.py --out tensorrt.json --markdown

``--sets`` names folders with finished calibration sets (at any depth): one that was made from the network by the method is taken instead
of making it again. Results are written after every row; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _comparison import NETWORKS, SIGNALS, Network, finished_sets, keep_row, real_halves

from zsq_deploy.artifact import read_json
from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.lint import lint
from zsq_deploy.backends.tensorrt.options import options_from
from zsq_deploy.backends.tensorrt.placement import place_int4, place_qdq
from zsq_deploy.evaldata import load_eval_data
from zsq_deploy.model import Graph, Model, Twin, load_model
from zsq_deploy.pipeline import EngineSettings, Images, build_engine, make_images, measure_ranges
from zsq_deploy.quant import read_qdq

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
Predict = Callable[[Mapping[str, Array]], Mapping[str, Array]]

WAYS = ("explicit", "implicit", "plain")
IMAGES = ("data-free", "real")
GENERATIONS = (8, 10, 11)
MARGIN = 0.3
"""Points of accuracy that the reference may be below float."""

SIGMA = 25 / 255
"""Noise that the denoiser was trained for; drawn with a fixed seed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, or print the table of an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {**NETWORKS, **SIGNALS}
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--out", type=Path, default=Path("tensorrt.json"), help="results; also what is gone on with")
    parser.add_argument("--network", action="append", choices=sorted(every), help="only these")
    parser.add_argument("--way", action="append", choices=WAYS, help="only these")
    parser.add_argument("--method", action="append", choices=IMAGES, help="only these images (default: data-free)")
    parser.add_argument("--ranges", default="auto", help="range method of explicit and implicit")
    parser.add_argument("--free-scales", action="store_true")
    parser.add_argument("--no-bias-correction", action="store_true")
    parser.add_argument("--weight-method", default="minmax", choices=("minmax", "mse"))
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--sets", type=Path, action="append", default=[], help="folders with finished calibration sets")
    parser.add_argument("--images", type=int, help="calibration images (default: per network)")
    parser.add_argument("--limit", type=int, help="score on at most so many images (for a first look)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--label", default="", help="goes into the key of the results (for variants)")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.out) if options.out.is_file() else {}
    if options.markdown:
        sys.stdout.write(markdown(results))
        return 0
    torch.set_num_threads(options.threads)
    finished = sorted(finished_sets(options.sets), key=len, reverse=True)
    for name in options.network or every:
        network = every[name]
        model = load_model(
            options.assets / "models" / network.file, preprocess=network.preprocess, input_shape=network.input_shape
        )
        for method in options.method or IMAGES[:1]:
            for way in options.way or WAYS:
                key = f"{way}{options.label}/{method}"
                keep_row(
                    results,
                    options.out,
                    name,
                    key,
                    partial(score, model, name, network, way, method, finished, options),
                )
    sys.stdout.write(markdown(results))
    return 0


# -- images --


def calibrations(
    model: Model, name: str, network: Network, method: str, finished: list[Any], options: Any
) -> Iterator[tuple[Images, Any]]:
    """Calibration images, and the images to score on (``None``: those of :func:`noisy`)."""
    data = (
        None
        if name == "dncnn25"
        else load_eval_data(
            options.assets / "data" / network.data, model.inputs[0], resize=network.resize, limit=options.limit
        )
    )
    count = options.images or network.images
    if method == "real":
        if data is None:
            raise ValueError("its images are scored on only")
        for calibration, scored in real_halves(model, data, count, options.seed):
            yield Images(calibration, calibration, "real", 0.0), scored
        return
    wanted = "zeroq" if any(node.op_type == "BatchNormalization" for node in model.graph) else "fractal"
    for found in finished:
        if (found.manifest.model_digest, found.manifest.method) == (model.digest, wanted):
            chosen = found.take(0, min(count, len(found)))
            yield Images(chosen, chosen, wanted, 0.0), data
            return
    made = make_images(
        model, method=wanted, images=count, holdout=1, seed=options.seed, parameters=network.parameters.get(wanted)
    )
    if made.calibration is not None:
        finished.append(made.calibration)  # for the next row
    yield made, data


def scored_batches(
    model: Model, network: Network, data: Any, assets: Path
) -> Iterator[tuple[Feeds, Array | None, Array | None]]:
    """Inputs, labels (where there are any) and clean images (for the denoiser)."""
    if data is None:
        yield from ((feeds, None, clean) for feeds, clean in noisy(model, assets / "data" / network.data))
        return
    size = 32 if model.dynamic_batch else 1
    for pixels, labels in data.batches(size):
        yield {model.inputs[0].name: model.preprocess.apply(pixels)}, labels if network.labelled else None, None


def noisy(model: Model, file: Path) -> Iterator[tuple[Feeds, Array]]:
    """Gray images with noise of a fixed seed, in patches of the size that the network was loaded with."""
    rng = np.random.default_rng(0)
    side = model.inputs[0].shape[-1] or 64
    with np.load(file) as held:
        for name in sorted(held.files):
            clean = held[name].astype(np.float32) / 255
            dirty = clean + rng.normal(0, SIGMA, clean.shape).astype(np.float32)
            places = [
                (top, left)
                for top in range(0, clean.shape[0] - side + 1, side)
                for left in range(0, clean.shape[1] - side + 1, side)
            ]
            cut = [
                np.stack([image[a : a + side, b : b + side] for a, b in places])[:, None] for image in (dirty, clean)
            ]
            for start in range(0, len(places), step := 32 if model.dynamic_batch else 1):
                yield {model.inputs[0].name: cut[0][start : start + step]}, cut[1][start : start + step]


# -- counting --


class Counts:
    """Right answers, agreement, noise and errors of several predictors on the same images."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.total = self.labelled = 0
        self.right = dict.fromkeys(names, 0)
        self.same = dict.fromkeys(names, 0)
        self.twin = dict.fromkeys(names, 0)
        self.signal: dict[str, float] = {}
        self.noise: dict[str, dict[str, float]] = {name: {} for name in names}
        self.error = dict.fromkeys(names, 0.0)
        self.pixels = 0

    def add(self, outputs: Mapping[str, Mapping[str, Array]], labels: Array | None, clean: Array | None) -> None:
        """Count one batch; `outputs` by predictor, ``float`` and ``twin`` among them."""
        first = next(iter(outputs["float"]))
        base = outputs["float"][first]
        self.total += len(base)
        classes = base.ndim == 2
        for key, value in outputs["float"].items():
            self.signal[key] = self.signal.get(key, 0.0) + float(np.square(value, dtype=np.float64).sum())
        for name in self.names:
            for key, value in outputs["float"].items():
                gone = float(np.square(outputs[name][key].astype(np.float64) - value).sum())
                self.noise[name][key] = self.noise[name].get(key, 0.0) + gone
            if classes:
                answers = outputs[name][first].argmax(1)
                self.same[name] += int((answers == base.argmax(1)).sum())
                self.twin[name] += int((answers == outputs["twin"][first].argmax(1)).sum())
                if labels is not None:
                    self.right[name] += int((answers == labels).sum())
            if clean is not None:
                self.error[name] += float(np.square(outputs[name][first].astype(np.float64) - clean).sum())
        self.labelled += 0 if labels is None else len(labels)
        self.pixels += 0 if clean is None else clean.size

    def row(self, name: str, classes: bool) -> dict[str, Any]:
        """JSON values of one predictor."""
        worst = min(
            10 * float(np.log10(self.signal[key] / max(noise, 1e-30))) for key, noise in self.noise[name].items()
        )
        return {
            "accuracy": self.right[name] / self.labelled if self.labelled else None,
            "agreement": self.same[name] / self.total if classes else None,
            "same_as_twin": self.twin[name] / self.total if classes else None,
            "sqnr_db": None if name == "float" else worst,
            "psnr_db": 10 * float(np.log10(self.pixels / self.error[name])) if self.pixels else None,
        }


def twin_of(graph: Graph) -> Predict:
    """The twin in float32."""
    twin = Twin(graph, device="cpu")

    def predict(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.no_grad():
            found = twin.run({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feeds.items()})
            return {name: value.numpy() for name, value in found.items()}

    return predict


def session_of(graph: Graph, threads: int, *, optimized: bool) -> Predict:
    """ONNX Runtime: the graph as it is written, or with all optimizations, which round biases and compute in 8 bits where they can."""
    settings = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    settings.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    session = ort.InferenceSession(graph.editable().SerializeToString(), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def score(
    model: Model, name: str, network: Network, way: str, method: str, finished: list[Any], options: Any
) -> dict[str, Any]:
    """Float, twin and ONNX Runtime on all images; and what the linter says."""
    target = get_target("tensorrt-10")
    predictors = ("float", "twin", "ort", "ort_optimized")
    counts, floating = Counts(predictors), twin_of(model.folded().graph)
    calibrated, used, findings, notes, classes = 0, "", {}, [], False
    for images, data in calibrations(model, name, network, method, finished, options):
        assert images.calibration is not None
        calibrated, used = len(images.calibration), images.method
        plain = way == "plain"
        measured = measure_ranges(model, images, "minmax" if plain else options.ranges)
        settings = EngineSettings(
            bits=options.bits,
            search=False,
            quantizer="implicit" if way == "implicit" else "auto",
            exact_scales=not (plain or options.free_scales),
            float_macs=0.0 if plain else None,
            bias_correction=not (plain or options.no_bias_correction),
            weight_method=options.weight_method,
        )
        with tempfile.TemporaryDirectory() as scratch:
            built = build_engine(model, images, measured, target, Path(scratch), settings, threads=options.threads)
            notes = list(built.notes)
            graph = Graph.load(built.engine.qdq_path)
            if way != "implicit":
                spared = tuple(built.engine.choices["spared_nodes"])
                findings = linted(model, measured.ranges, settings, spared)
                findings["10"] = len(lint(graph, target))  # the very graph that is scored
        calls = {
            "float": floating,
            "twin": twin_of(graph),
            "ort": session_of(graph, options.threads, optimized=False),
            "ort_optimized": session_of(graph, options.threads, optimized=True),
        }
        for feeds, labels, clean in scored_batches(model, network, data, options.assets):
            outputs = {which: call(feeds) for which, call in calls.items()}
            classes = next(iter(outputs["float"].values())).ndim == 2
            counts.add(outputs, labels, clean)
    return {
        **{which: counts.row(which, classes) for which in predictors},
        "images": counts.total,
        "calibration": f"{used} {calibrated}",
        "lint": findings,
        "activations": sum(not tensor.is_weight for tensor in read_qdq(graph)),
        "float_macs": built.engine.choices.get("spared", {}).get("macs_share", 0.0),
        "notes": notes,
    }


def linted(model: Model, ranges: Any, settings: EngineSettings, spared: tuple[str, ...] = ()) -> dict[str, int]:
    """Number of findings in the graph of each generation, with layers left in float."""
    graph = model.folded().graph
    found: dict[str, int] = {}
    for number in GENERATIONS:
        target = get_target(f"tensorrt-{number}")
        if settings.weight_only and number < 10:
            continue
        options = options_from(settings, target).with_(spared=spared)
        placed = (
            place_int4(graph, target, options) if settings.weight_only else place_qdq(graph, ranges, target, options)
        )
        found[str(number)] = len(lint(placed.graph, target))
    return found


# -- the table --


def markdown(results: Mapping[str, Any]) -> str:
    """The table, and which rows are further from float than :data:`MARGIN`."""
    lines = [
        "| network | way | calibration | float | twin | difference | agrees with float | SQNR | ONNX Runtime | = twin | optimized | = twin | lint |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    misses: list[str] = []
    for name, rows in results.items():
        for key, row in rows.items():
            way = key.split("/")[0]
            if "error" in row:
                lines.append(f"| {name} | {way} | - | failed: {row['error'][:80]} |" + " |" * 9)
                continue
            floating, twin, plain, fused = (row[which] for which in ("float", "twin", "ort", "ort_optimized"))
            gap = None if floating["accuracy"] is None else 100 * (twin["accuracy"] - floating["accuracy"])
            lints = "/".join(str(row["lint"].get(str(number), "-")) for number in GENERATIONS) if row["lint"] else "-"
            lines.append(
                f"| {name} | {way} | {row['calibration']} | {quality(floating)} | {quality(twin)} | "
                f"{'-' if gap is None else f'{gap:+.2f}'} | {share(twin['agreement'])} | {twin['sqnr_db']:.1f} dB | "
                f"{quality(plain)} | {share(plain['same_as_twin'])} | {quality(fused)} | {share(fused['same_as_twin'])} | {lints} |"
            )
            if way == "explicit" and key.endswith("/data-free") and gap is not None and gap < -MARGIN:
                misses.append(f"* {name}: {-gap:.2f} points below float.")
    return "\n".join([*lines, *(["", *misses] if misses else [])]) + "\n"


def quality(row: Mapping[str, Any]) -> str:
    """Accuracy in percent, or PSNR, or nothing."""
    if row["accuracy"] is not None:
        return f"{100 * row['accuracy']:.2f}"
    return f"{row['psnr_db']:.2f} dB" if row["psnr_db"] is not None else "-"


def share(value: float | None) -> str:
    """Percent, or nothing."""
    return "-" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
