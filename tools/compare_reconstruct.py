"""Low-bit accuracy: networks x bits x protocols x images, over seeds: the tables of docs/low-bits.md.

    python tools/compare_reconstruct.py --networks resnet20_cifar10 --methods deepinversion,real --images 512 --seeds 0,1,2 --out low-bits.jsonl
    python tools/compare_reconstruct.py --out low-bits.jsonl --markdown

A row is learned from images of one method (``zeroq+hast`` is both, in equal parts) or from real images, which is the ceiling: those come in two halves, and each half
is scored by the network that was learned from the other one. What counts is what the last step leaves; nothing is chosen by
accuracy. Every finished part is a line of --out, and a killed run goes on there (and in the middle of a synthesis) when the same command is given again. Sets
are kept beside it (OUT.sets, named like those of compare_methods.py); --images-seed takes the same images for all seeds, --set NETWORK:NAME=PATH those of a folder. ``--bits mixed-w3a4`` gives each layer 2, 3 or 4 bits in the space of W3A4.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _comparison import NETWORKS
from _method_results import Line, Results
from compare_methods import DRAWN, Comparison

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.evaldata import EvalData
from zsq_deploy.model import Graph
from zsq_deploy.quant.allocation import Prober, choose, cost_of
from zsq_deploy.quant.reconstruct import PRESETS, PROTOCOLS, Bits, LayerBits, reconstruct, round_to_nearest

BITS = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4")
NEAREST, MIXED = "nearest", "mixed-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; or print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--out", type=Path, default=Path("low-bits.jsonl"), help="results; also what is gone on with")
    parser.add_argument("--networks", type=words, default=list(NETWORKS), help="some of: " + ", ".join(NETWORKS))
    parser.add_argument("--methods", type=words, default=["deepinversion", "real"], help="methods, method+method, real")
    parser.add_argument("--seeds", type=words, default=["0", "1", "2"])
    parser.add_argument("--images", type=int, default=512, help="size of every set")
    parser.add_argument("--images-seed", type=int, help="the same images for every seed: those of this one")
    parser.add_argument("--bits", type=words, default=list(BITS))
    parser.add_argument("--protocols", type=words, default=["ends-8bit", "all-layers"])
    parser.add_argument("--presets", type=words, default=["fast"], help=f"some of: {', '.join([*PRESETS, NEAREST])}")
    parser.add_argument("--limit", type=int, help="score on at most so many images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NETWORK:NAME=PATH", help="a set made before")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.networks if name not in NETWORKS]
    unknown += [each for name in options.methods for each in name.split("+") if each not in (*DRAWN, "real")]
    unknown += [name for name in options.protocols if name not in PROTOCOLS]
    unknown += [name for name in options.presets if name not in (*PRESETS, NEAREST)]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    results = Results(options.out)
    if not options.markdown:
        torch.set_num_threads(options.threads)
        foreign = dict(each.split("=", 1) for each in options.set)
        for name in options.networks:
            given = {key.split(":", 1)[1]: Path(path) for key, path in foreign.items() if key.split(":", 1)[0] == name}
            LowBits(name, options, results).run(given)
    sys.stdout.write(markdown(results.lines.values()))
    return 0


class LowBits(Comparison):
    """All rows of one network."""

    def __init__(self, name: str, options: Any, results: Results) -> None:
        options.steps_scale, options.quantizer = 1.0, "fast"
        super().__init__(name, options, results)
        same = "" if options.images_seed is None else f", the same for all seeds (seed {options.images_seed})"
        self.protocol = f"{options.images} images{same}, {len(self.data)} scored"
        self.parts = [
            f"{bits} {protocol} {preset}"
            for protocol in options.protocols
            for bits in options.bits
            for preset in options.presets
        ]
        self.trace: dict[str, Any] = {}

    def run(self, foreign: dict[str, Path]) -> None:
        """Whatever is not there yet: the first seed of everything, then the next one."""
        for seed in self.options.seeds:
            for method, path in foreign.items():
                self.one(method, int(seed), path)
            for method in self.options.methods:
                self.one(method, int(seed), None)

    def one(self, method: str, seed: int, path: Path | None) -> None:
        """One kind of images and one seed: every part."""
        halves: list[tuple[CalibrationSet, EvalData]] = []
        for part in self.parts:
            key = {"network": self.name, "method": method, "seed": seed, "protocol": self.protocol, "part": part}
            known = self.results.get(**key)
            if known is not None and "error" not in known:
                continue
            try:
                halves = halves or list(self.sets(method, seed, path))
                self.trace = {}
                line = {**key, **self.score(halves, part, seed), **self.trace, "images": len(halves[0][0])}
            except Exception as error:  # a part that fails is a result too, and must not take the others with it
                line = {**key, "error": f"{type(error).__name__}: {error}"}
            self.results.add(line)
            print(json.dumps(line), flush=True)

    def made(self, method: str, seed: int) -> CalibrationSet:
        """The set of a method, or of several in equal parts."""
        if self.options.images_seed is not None:
            seed = self.options.images_seed
        names = method.split("+")
        if len(names) == 1:
            return super().made(method, seed)
        whole, self.options.images = self.options.images, self.options.images // len(names)
        try:
            parts = [super(LowBits, self).made(name, seed).arrays() for name in names]
        finally:
            self.options.images = whole
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return CalibrationSet.from_arrays(joined, CalibrationManifest.of(self.model, method=method, seed=seed))

    def quantized(self, images: CalibrationSet, bits: str, seed: int) -> Graph:
        """The Q/DQ graph of a part."""
        word, protocol, preset = bits.split()
        started = time.process_time()
        asked: str | LayerBits = word
        if word.startswith(MIXED):
            asked = self.mixed(images, Bits.of(word.removeprefix(MIXED)), protocol)
        if preset == NEAREST:
            result = round_to_nearest(self.model, images, asked, protocol)
        else:
            result = reconstruct(self.model, images, asked, protocol, preset=preset, seed=seed)
        spent = self.trace.get("processor_seconds", 0.0) + time.process_time() - started
        self.trace |= {"description": result.description, "processor_seconds": spent}
        return result.graph

    def mixed(self, images: CalibrationSet, bits: Bits, protocol: str) -> LayerBits:
        """Weights of one bit less, as many, or one more, layer by layer, in the space that `bits` take in all layers."""
        around = [
            Bits(width, bits.activations) for width in range(bits.weights - 1, bits.weights + 2) if 2 <= width <= 8
        ]
        prober = Prober(self.model, images.take(0, min(len(images), 128)), around)
        found = prober.sensitivities(protocol)
        space = sum(
            cost_of(layer, bits if bits in layer.losses else next(iter(layer.losses)), "packed-bytes")
            for layer in found.layers
        )
        allocation = choose(found, space, unit="packed-bytes")
        self.trace["allocation"] = allocation.description
        return allocation.bits


def _share(values: Sequence[float], form: str) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{form}}{spread}"


def markdown(lines: Iterable[Line]) -> str:
    """One table a network and protocol of the tool; mean and standard deviation over seeds."""
    tables: dict[tuple[str, str], dict[tuple[str, str], list[Line]]] = {}
    for line in lines:
        rows = tables.setdefault((line["network"], line["protocol"]), {})
        rows.setdefault((line["part"], line["method"]), []).append(line)
    text: list[str] = []
    for (network, protocol), rows in tables.items():
        good = [line for found in rows.values() for line in found if "error" not in line]
        floats = [line["float"] for line in good if line["float"] is not None]
        accuracy = f", float {100 * floats[0]:.2f} %" if floats else ""
        text += ["", f"**{network}**{accuracy} ({protocol})", ""]
        text += [
            "| bits | protocol | preset | images of | seeds | accuracy % | against float | agreement % | signal to noise dB | processor s |"
        ]
        text += ["|---" * 10 + "|"]
        order = {word: number for number, word in enumerate(BITS)}
        for (part, method), found in sorted(
            rows.items(), key=lambda row: (row[0][0].split()[1], order.get(row[0][0].split()[0], 9), row[0])
        ):
            kept = [line for line in found if "error" not in line]
            cells = [*part.split(), method, str(len(kept))]
            if not kept:
                cells += ["failed", "-", "-", "-", "-"]
            else:
                labelled = kept[0]["accuracy"] is not None
                cells += [_share([line["accuracy"] for line in kept], ".2f") if labelled else "-"]
                cells += [_share([line["accuracy"] - line["float"] for line in kept], "+.2f") if labelled else "-"]
                classes = kept[0]["agreement"] is not None
                cells += [_share([line["agreement"] for line in kept], ".1f") if classes else "-"]
                cells += [f"{statistics.fmean(line['sqnr_db'] for line in kept):.1f}"]
                cells += [f"{statistics.fmean(line['processor_seconds'] for line in kept):.0f}"]
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text).lstrip() + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
