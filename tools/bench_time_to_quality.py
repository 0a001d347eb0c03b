"""Accuracy after block reconstruction, and the seconds that its images took: a fast method beside Genie's full schedule, side by side in one run.

One quantizer (W4A4, first and last layer in 8 bits, block reconstruction) learns from each set and is scored on all evaluation images at its last
step; nothing is chosen by accuracy. For the set that another tool made (``--set``, Genie's released code at 4,000 steps) the quantizer runs once a
seed; a method of ours makes a set of its own for every seed. Seconds are processor seconds of one thread (`time.process_time`), so that other work on
the machine counts as little as possible. Those of the given set are what its schedule takes here: its steps times its images, over the image-steps
a processor second of the plain eager formulation (see tools/bench_synthesis.py), which is run before every set of ours so that both sides meet the
same machine. It leaves swing convolution out, which makes Genie's time a little too short.

    python tools/bench_time_to_quality.py --set ../shared/assets/peers/genie_resnet20_cifar10_128.npy --methods fast,fractal --out quality.jsonl
    python tools/bench_time_to_quality.py --out quality.jsonl --markdown

Every finished part is a line of --out; the same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _comparison import NETWORKS, Network
from _method_results import Line, Results
from bench_synthesis import Plain

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.recipe import Recipe
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.evaldata import EvalData, load_eval_data
from zsq_deploy.model import Model, Twin, load_model
from zsq_deploy.quant.reconstruct import reconstruct

GIVEN = "given set"
_PLAIN_STEPS = 4


class Bench:
    """One network, its evaluation data, and what was measured so far."""

    def __init__(self, options: Any, results: Results) -> None:
        self.options, self.results = options, results
        self.network: Network = NETWORKS[options.network]
        models = options.assets / "models"
        self.model: Model = load_model(models / self.network.file, preprocess=self.network.preprocess)
        data = options.assets / "data" / self.network.data
        self.data: EvalData = load_eval_data(data, self.model.inputs[0], limit=options.limit)
        self.protocol = (
            f"{options.images} images, {options.bits}, ends-8bit, reconstruction preset {options.preset}, {len(self.data)} scored, "
            f"{options.threads} thread"
        )
        self._plain: Plain | None = None
        self._wanted: np.ndarray | None = None

    def key(self, method: str, seed: int, part: str) -> dict[str, Any]:
        """What names a line of the results."""
        return {
            "network": self.options.network,
            "method": method,
            "seed": seed,
            "protocol": self.protocol,
            "part": part,
        }

    def run(self) -> None:
        """Whatever is not there yet, the sides in turn, seed by seed."""
        for seed in self.options.seeds:
            for method in self.options.methods:
                self.one(method, seed)
            if self.options.set is not None:
                self.one(GIVEN, seed)

    def one(self, method: str, seed: int) -> None:
        """One side and seed: the set, then the quantizer on it."""
        found = self.results.get(**self.key(method, seed, "set"))
        images, line = self.given(found) if method == GIVEN else self.made(method, seed, found)
        if found is None:
            self.say({**self.key(method, seed, "set"), **line})
        key = self.key(method, seed, self.options.bits)
        if self.results.get(**key) is None:
            self.say({**key, **self.score(images, seed)})

    def say(self, line: Line) -> None:
        """Keep a line and show it."""
        self.results.add(line)
        print(json.dumps(line), flush=True)

    def given(self, found: Line | None) -> tuple[CalibrationSet, Line]:
        """The set of the other tool, and the seconds that its schedule takes here."""
        array = np.load(self.options.set, allow_pickle=False)
        manifest = CalibrationManifest.of(self.model, method=GIVEN)
        images = CalibrationSet.from_arrays({self.model.inputs[0].name: array}, manifest)
        if found is not None:
            return images, found
        rate = self.plain_rate()
        work = len(array) * self.options.set_steps
        return images, {"images": len(array), "seconds": work / rate, "image_steps_per_s": rate, "estimated": True}

    def made(self, method: str, seed: int, found: Line | None) -> tuple[CalibrationSet, Line]:
        """A set of ours, made now or before."""
        folder = self.options.out.with_suffix(".sets") / f"{self.options.network}-{method}-{seed}-{self.options.images}"
        if found is not None and (folder / "manifest.json").is_file():
            return CalibrationSet.open(folder), found
        clock, wall = time.process_time(), time.perf_counter()
        images = synthesize(self.model, method=method, images=self.options.images, seed=seed)
        line = {
            "images": len(images),
            "seconds": time.process_time() - clock,
            "wall_seconds": time.perf_counter() - wall,
            "estimated": False,
        }
        return images.save(folder, force=True), line

    def plain_rate(self) -> float:
        """Image-steps a processor second of Genie's loop as one writes it down."""
        shape = (self.options.images, *(int(size or 1) for size in self.model.inputs[0].shape[1:]))
        if self._plain is None:
            from safetensors.torch import load_file

            folder = self.options.assets / "models"
            sys.path.insert(0, str(folder))
            name, maker = self.options.module.split(":")
            module = getattr(__import__(name), maker)()
            module.load_state_dict(load_file(folder / f"{self.options.network}.safetensors"))
            module.eval().requires_grad_(requires_grad=False)
            genie = METHODS["genie"]
            assert genie.run is not None
            recipe = genie.run({**genie.defaults, "swing": 0})
            assert isinstance(recipe, Recipe)
            given = {"classes": None, "soft": None, "memory": {}, "slack": None, "options": {}}
            self._plain = Plain("genie", module, shape, recipe, given)
        self._plain.step()  # the first one pays for memory
        clock = time.process_time()
        for _ in range(_PLAIN_STEPS):
            self._plain.step()
        return _PLAIN_STEPS * shape[0] / (time.process_time() - clock)

    def score(self, images: CalibrationSet, seed: int) -> Line:
        """The quantizer, and how many evaluation images are right."""
        clock = time.process_time()
        made = reconstruct(self.model, images, self.options.bits, "ends-8bit", preset=self.options.preset, seed=seed)
        seconds = time.process_time() - clock
        if self._wanted is None:
            self._wanted = self.answers(self.model.twin())
        wanted, got = self._wanted, self.answers(Twin(made.graph, dtype=torch.float32))
        return {
            "float": float((wanted == self.data.labels).mean()),
            "accuracy": float((got == self.data.labels).mean()),
            "agreement": float((got == wanted).mean()),
            "quantizer_seconds": seconds,
        }

    def answers(self, twin: Twin) -> np.ndarray:
        """Classes of all evaluation images."""
        name, found = self.model.inputs[0].name, []
        with torch.no_grad():
            for pixels, _ in self.data.batches(64):
                feeds = {name: torch.from_numpy(self.model.preprocess.apply(pixels))}
                found.append(next(iter(twin.run(feeds).values())).argmax(1).numpy())
        return np.concatenate(found)


def table(results: Results) -> str:
    """Results as Markdown, a table for each network and protocol; the given set's row is what the others are held against."""
    groups: dict[tuple[str, str], dict[str, dict[str, list[Line]]]] = {}
    for line in results.lines.values():
        rows = groups.setdefault((line["network"], line["protocol"]), {})
        part = "set" if line["part"] == "set" else "score"
        rows.setdefault(line["method"], {"set": [], "score": []})[part].append(line)
    text: list[str] = []
    for (network, protocol), rows in groups.items():
        scores = {method: [100 * line["accuracy"] for line in row["score"]] for method, row in rows.items()}
        seconds = {method: [line["seconds"] for line in row["set"]] for method, row in rows.items()}
        reference = rows.get(GIVEN)
        text += [f"**{network}** ({protocol})", ""]
        text += [
            "| set | seeds | processor seconds | times as fast | accuracy % | against the given set | agreement % |"
        ]
        text += ["|---|---|---|---|---|---|---|"]
        for method in sorted(rows, key=lambda name: -statistics.fmean(seconds[name] or [0.0])):
            if not scores[method] or not seconds[method]:
                continue
            spread = f" ± {statistics.stdev(scores[method]):.2f}" if len(scores[method]) > 1 else ""
            mean, took = statistics.fmean(scores[method]), statistics.fmean(seconds[method])
            known = reference is not None and bool(reference["set"]) and bool(reference["score"])
            ratio = f"{statistics.fmean(seconds[GIVEN]) / took:.0f}" if known and took else "-"
            gap = f"{mean - statistics.fmean(scores[GIVEN]):+.2f}" if known else "-"
            alike = 100 * statistics.fmean([line["agreement"] for line in rows[method]["score"]])
            text.append(
                f"| {method} | {len(scores[method])} | {took:.1f} | {ratio} | {mean:.2f}{spread} | {gap} | {alike:.2f} |"
            )
        text.append("")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--network", default="resnet20_cifar10", choices=list(NETWORKS))
    parser.add_argument("--module", default="cifar_resnet:resnet20", help="the same network in torch, in the assets")
    parser.add_argument("--set", type=Path, help="images that Genie's full schedule made, .npy in the network's input")
    parser.add_argument("--set-steps", type=int, default=4000, help="steps that it took")
    parser.add_argument("--methods", type=lambda text: [word for word in text.split(",") if word], default=["fast"])
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",") if word], default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--preset", default="fast", help="of block reconstruction")
    parser.add_argument("--limit", type=int, help="score on at most so many images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("time_to_quality.jsonl"))
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods if name not in METHODS or not METHODS[name].images]
    if unknown:
        parser.error(f"no methods that make images: {', '.join(unknown)}")
    results = Results(options.out)
    if not options.markdown:
        torch.set_num_threads(options.threads)
        Bench(options, results).run()
    sys.stdout.write(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
