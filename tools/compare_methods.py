"""Every synthesis method on every network of the assets, side by side: the tables of docs/synthesis.md.

For each network, method and seed: time and image-steps per second, distance to the batch-norm statistics, coverage, variety, range error against real
images; and the accuracy of one fixed quantizer at W8A8, W4A8 and W4A4. What counts is what the last optimisation step leaves; nothing is
chosen by accuracy. The baselines (noise, ones, fractals, real images) stand beside; real images calibrate in two halves, and each half is scored
by the engine that the other one calibrated.

    python tools/compare_methods.py --networks resnet20_cifar10 --methods zeroq,genie --seeds 0,1,2 --out methods.jsonl
    python tools/compare_methods.py --out methods.jsonl --markdown
    python tools/compare_methods.py --out methods.jsonl --evidence calib/evidence.json

Every finished part is a line of --out; a killed run goes on where it was when the same command is given again, in the middle of a synthesis too.
Sets are kept beside it (OUT.sets), so further bits or quantizers need no further synthesis. A set that another tool made takes part with
--set NETWORK:NAME=PATH (a calibration folder, or an .npy array in the network's input space).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _comparison import NETWORKS, SIGNALS, Network, open_data, real_halves
from _method_results import Line, Results, markdown, to_evidence

from zsq_deploy.artifact import digest_json
from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.calib.evidence import kind_of
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import InterruptedRunError, StaleArtifactError
from zsq_deploy.evaldata import EvalData
from zsq_deploy.model import Graph, Model, load_model
from zsq_deploy.model.twin import Twin
from zsq_deploy.pipeline.quality import quality_of
from zsq_deploy.quant import collect
from zsq_deploy.quant.qdq import insert_qdq
from zsq_deploy.quant.reconstruct import reconstruct, round_to_nearest
from zsq_deploy.quant.scheme import Granularity, Scheme

Outputs = dict[str, np.ndarray]

BITS = ("w8a8", "w4a8", "w4a4")
EVERY = {**NETWORKS, **SIGNALS}
DRAWN = tuple(name for name, method in METHODS.items() if method.images)
QUANTIZERS = {
    "minmax": "min-max ranges, weights rounded to nearest per channel, all layers, nothing corrected",
    "nearest": "weights rounded to nearest, ranges of least squared error, bias correction, first and last layer in 8 bits",
    "fast": "block reconstruction, preset fast, first and last layer in 8 bits",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; or print the table, or write the evidence, of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--out", type=Path, default=Path("methods.jsonl"), help="results; also what is gone on with")
    parser.add_argument("--networks", type=words, default=list(EVERY), help="some of: " + ", ".join(EVERY))
    parser.add_argument(
        "--methods", type=words, default=[*DRAWN, "real"], help="some of: " + ", ".join([*DRAWN, "real"])
    )
    parser.add_argument("--seeds", type=words, default=["0"])
    parser.add_argument("--images", type=int, default=64, help="size of every set")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of every method's default steps")
    parser.add_argument("--bits", type=words, default=list(BITS))
    parser.add_argument("--quantizer", choices=sorted(QUANTIZERS), default="nearest")
    parser.add_argument("--limit", type=int, help="score on at most so many images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NETWORK:NAME=PATH", help="a set of another tool")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    parser.add_argument("--evidence", type=Path, help="write the results of --out into this table and stop")
    parser.add_argument(
        "--no-times", action="store_true", help="with --evidence: the machine was busy, leave times out"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.networks if name not in EVERY]
    unknown += [name for name in options.methods if name not in (*DRAWN, "real")]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    results = Results(options.out)
    if options.evidence:
        names = {line["protocol"]: line["protocol"] for line in results.lines.values()}
        others = [name for name in {line["method"] for line in results.lines.values()} if name not in METHODS]
        kept = {"leave_out": ["real", *others], "times": not options.no_times}
        written = to_evidence(results.lines.values(), names, options.evidence, **kept)
        print(f"{written} rows written to {options.evidence}")
        return 0
    if not options.markdown:
        torch.set_num_threads(options.threads)
        foreign = dict(each.split("=", 1) for each in options.set)
        for name in options.networks:
            given = {key.split(":", 1)[1]: Path(path) for key, path in foreign.items() if key.split(":", 1)[0] == name}
            Comparison(name, options, results).run(given)
    sys.stdout.write(markdown(results.lines.values(), options.bits))
    return 0


class Comparison:
    """All methods on one network."""

    def __init__(self, name: str, options: Any, results: Results) -> None:
        self.name, self.options, self.results = name, options, results
        self.network: Network = EVERY[name]
        self.model: Model = load_model(
            options.assets / "models" / self.network.file,
            preprocess=self.network.preprocess,
            input_shape=self.network.input_shape,
        )
        self.data = open_data(self.network, self.model, options.assets, options.limit)
        self.float_outputs: dict[str, Outputs] = {}
        # What the figures depend on beside network, method and seed.
        self.protocol = f"{options.images} images, steps x{options.steps_scale:g}, {len(self.data)} scored; {options.quantizer}: {QUANTIZERS[options.quantizer]}"

    def run(self, foreign: dict[str, Path]) -> None:
        """Whatever is not there yet."""
        for method, path in foreign.items():
            self.one(method, 0, path)
        for seed in self.options.seeds:
            for method in self.options.methods:
                self.one(method, int(seed), None)

    def one(self, method: str, seed: int, path: Path | None) -> None:
        """One method and seed: the set, then every choice of bits."""
        parts = {
            part: {"network": self.name, "method": method, "seed": seed, "protocol": self.protocol, "part": part}
            for part in ("set", *self.options.bits)
        }
        if all((line := self.results.get(**key)) is not None and "error" not in line for key in parts.values()):
            return
        halves: list[tuple[CalibrationSet, EvalData]] = []
        for part, key in parts.items():
            found = self.results.get(**key)
            if found is not None and "error" not in found:
                continue
            try:
                halves = halves or list(self.sets(method, seed, path))
                more = self.describe(*halves[0]) if part == "set" else self.score(halves, part, seed)
            except InterruptedRunError as error:  # the state is kept: the same command goes on
                raise SystemExit(str(error)) from error
            except Exception as error:  # a part that fails is a result too, and must not take the others with it
                more = {"error": f"{type(error).__name__}: {error}"}
            self.results.add({**key, **more})
            print(json.dumps({**key, **{k: v for k, v in more.items() if k != "quality"}}), flush=True)
            if "error" in more and part == "set":
                return

    def sets(self, method: str, seed: int, path: Path | None) -> Iterator[tuple[CalibrationSet, EvalData]]:
        """The set of a method, and what is scored with it; for real images both halves."""
        if path is not None:
            yield self.read(path, method), self.data
        elif method == "real":
            yield from real_halves(self.model, self.data, self.options.images, seed)
        else:
            yield self.made(method, seed), self.data

    def read(self, path: Path, method: str) -> CalibrationSet:
        """A set of another tool."""
        if path.is_dir():
            return CalibrationSet.open(path)
        array = np.load(path, allow_pickle=False)
        return CalibrationSet.from_arrays(
            {self.model.inputs[0].name: array}, CalibrationManifest.of(self.model, method=method)
        )

    def made(self, method: str, seed: int) -> CalibrationSet:
        """The set of a method, made now or before."""
        parameters = dict(self.network.parameters.get(method, {}))
        steps = parameters.get("steps", METHODS[method].defaults.get("steps"))
        if steps is not None and self.options.steps_scale != 1.0:
            parameters["steps"] = max(1, round(steps * self.options.steps_scale))
        identity = digest_json({"parameters": parameters, "images": self.options.images, "model": self.model.digest})[
            :12
        ]
        folder = self.options.out.with_suffix(".sets") / f"{self.name}-{method}-{seed}-{identity}"
        if (folder / "manifest.json").is_file():
            return CalibrationSet.open(folder)
        work = folder.with_name(folder.name + ".work")

        def make(resume: bool) -> CalibrationSet:
            return synthesize(
                self.model,
                method=method,
                images=self.options.images,
                seed=seed,
                parameters=parameters,
                workdir=work,
                resume=resume,
            )

        try:
            found = make(resume=work.is_dir())
        except StaleArtifactError:  # what a killed run left was made with other threads or another torch
            found = make(resume=False)
        saved = found.save(folder, force=True)
        shutil.rmtree(work, ignore_errors=True)
        return saved

    def describe(self, images: CalibrationSet, scored: EvalData) -> Line:
        """Time and quality of a set; its ranges against real images that it does not hold."""
        manifest = images.manifest
        stages = [manifest.parameters, *manifest.parameters.get("earlier_stages", [])]
        outcomes = [stage["outcome"] for stage in stages if "outcome" in stage]
        work = sum(steps * size for one in outcomes for steps, size in zip(one["steps"], one["batches"], strict=True))
        seconds = float(manifest.seconds or 0.0)
        defaults = METHODS[manifest.method].defaults if manifest.method in METHODS else {}
        given = manifest.parameters
        quality = quality_of(self.model, images, real=scored).to_json()
        del quality["tensors"]
        if quality["batch_norm"] is not None:
            del quality["batch_norm"]["layers"]
        return {
            "images": len(images),
            "seconds": seconds,
            "image_steps_per_s": work / seconds if work and seconds else None,
            "kind": asdict(kind_of(self.model)),
            "parameters": {name: given[name] for name in defaults if name in given and given[name] != defaults[name]},
            "method_used": manifest.method,
            "quality": quality,
            "threads": self.options.threads,
        }

    def quantized(self, images: CalibrationSet, bits: str, seed: int) -> Graph:
        """The Q/DQ graph of the fixed quantizer."""
        if self.options.quantizer == "nearest":
            return round_to_nearest(self.model, images, bits, "ends-8bit").graph
        if self.options.quantizer == "fast":
            return reconstruct(self.model, images, bits, "ends-8bit", preset="fast", seed=seed).graph
        graph, (weight, activation) = self.model.folded().graph, (int(bits[1]), int(bits[3]))
        ranges = collect(graph, images.batches(64), micro_batch=16 if self.model.dynamic_batch else 1).ranges("minmax")
        kept = Scheme(weight, granularity=Granularity.CHANNEL, restricted=True)
        return insert_qdq(graph, ranges, activation=Scheme(activation, signed=False, symmetric=False), weight=kept)

    def score(self, halves: list[tuple[CalibrationSet, EvalData]], bits: str, seed: int) -> Line:
        """Accuracy of float and quantized network, their agreement, and signal to noise (of the worst output), over all halves."""
        started, right, right_float, same, total = time.monotonic(), 0, 0, 0, 0
        signal: dict[str, float] = {}
        noise: dict[str, float] = {}
        for images, scored in halves:
            wanted = self.wanted(scored)
            got = _outputs(Twin(self.quantized(images, bits, seed), dtype=torch.float32), self.model, scored)
            for name, value in wanted.items():
                signal[name] = signal.get(name, 0.0) + float(np.square(value, dtype=np.float64).sum())
                gone = float(np.square(got[name] - value.astype(np.float64)).sum())
                noise[name] = noise.get(name, 0.0) + gone
            total += len(scored)
            if self.network.classes:
                answers, float_answers = (next(iter(each.values())).argmax(1) for each in (got, wanted))
                right += int((answers == scored.labels).sum())
                right_float += int((float_answers == scored.labels).sum())
                same += int((answers == float_answers).sum())
        labelled = self.network.labelled
        return {
            "float": right_float / total if labelled else None,
            "accuracy": right / total if labelled else None,
            "agreement": same / total if self.network.classes else None,
            "sqnr_db": min(10 * float(np.log10(signal[name] / max(noise[name], 1e-30))) for name in signal),
            "scored": total,
            "seconds": time.monotonic() - started,
        }

    def wanted(self, data: EvalData) -> Outputs:
        """The float network's outputs, computed once."""
        if data.digest not in self.float_outputs:
            self.float_outputs[data.digest] = _outputs(self.model.twin(), self.model, data)
        return self.float_outputs[data.digest]


def _outputs(twin: Twin, model: Model, data: EvalData) -> Outputs:
    found: dict[str, list[np.ndarray]] = {}
    size = 32 if model.dynamic_batch else 1
    with torch.no_grad():
        for pixels, _ in data.batches(size):
            feeds = {model.inputs[0].name: torch.from_numpy(model.preprocess.apply(pixels))}
            for name, value in twin.run(feeds).items():
                found.setdefault(name, []).append(value.numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


if __name__ == "__main__":
    raise SystemExit(main())
