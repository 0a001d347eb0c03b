"""Accuracy of the data-free weight algebra, network by network: the tables of docs/data-free-algebra.md.

No image of anybody's reaches a network before it is scored: ranges come from batch normalization, or from fractal pictures where a
network has none. (What the rows are was not chosen blindly; the page says where real images were looked at.)

    python tools/compare_algebra.py --assets ../shared/assets --out algebra.json
    python tools/compare_algebra.py --out algebra.json --markdown

Results are written after every row; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _comparison import NETWORKS, Network, Tally, cell

from zsq_deploy.artifact import read_json, write_json
from zsq_deploy.calib import CalibrationSet, synthesize
from zsq_deploy.evaldata import EvalData, load_eval_data
from zsq_deploy.model import Graph, Model, load_model
from zsq_deploy.quant import (
    Granularity,
    Ranges,
    Scheme,
    analytic_ranges,
    apply_biases,
    collect,
    correct_bias_analytically,
    insert_qdq,
)
from zsq_deploy.quant.algebra import (
    Clips,
    Rounded,
    analytic_moments,
    dfq,
    measured_moments,
    round_by_moments,
    squant,
    udfc,
)

A8 = Scheme(8, signed=False, symmetric=False)
W4 = Scheme(4, granularity=Granularity.CHANNEL, restricted=True)
W8_TENSOR = Scheme(8, signed=False, symmetric=False)
PICTURES = 64


class Session:
    """A graph in ONNX Runtime, as the counting wants it."""

    def __init__(self, graph: Graph) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs."""
        return dict(zip(self._names, self._session.run(None, feeds), strict=True))


class Once:
    """The float network's outputs on the scored images, computed once for all rows."""

    def __init__(self, session: Session) -> None:
        self._session, self._known, self._next = session, [], 0  # type: ignore[var-annotated]

    def again(self) -> Once:
        """From the first image on."""
        self._next = 0
        return self

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The next batch, which is the same for every row."""
        if self._next == len(self._known):
            self._known.append(self._session.run(feeds))
        self._next += 1
        return self._known[self._next - 1]  # type: ignore[no-any-return]


class Case:
    """One network and the ways to quantize it."""

    def __init__(self, model: Model) -> None:
        self.model, self.graph = model, model.folded().graph

    @cached_property
    def ranges(self) -> Ranges:
        """From batch normalization, or from fractal pictures."""
        if self.model.batch_norms():
            return analytic_ranges(self.model)
        pictures = self.pictures
        return collect(self.graph, pictures.batches(8), micro_batch=8, set_digest=pictures.digest).ranges("minmax")

    @cached_property
    def pictures(self) -> CalibrationSet:
        """Fractal pictures, which know nothing of the network."""
        return synthesize(self.model, method="fractal", images=PICTURES, seed=0)

    def w4a8(
        self, scales: Literal["minmax", "mse"], flips: bool, corrected: bool = False, graph: Graph | None = None
    ) -> Graph:
        """4-bit weights per channel, 8-bit activations per tensor, all layers."""
        source = graph or self.graph

        def written(floats: Graph) -> Graph:
            qdq = insert_qdq(floats, self.ranges, activation=A8, weight=W4, weight_method=scales)
            return squant(qdq, source) if flips else qdq

        qdq = written(source)
        if corrected:
            qdq = written(apply_biases(source, correct_bias_analytically(self.model, qdq)))
        return qdq

    def moments(self, source: Literal["analytic", "pictures"]) -> Graph:
        """4-bit weights per channel rounded for what their layers read, biases corrected where the means are known."""
        found = (
            analytic_moments(self.model)
            if source == "analytic"
            else measured_moments(self.graph, self.pictures.batches(8))
        )
        done: Rounded = round_by_moments(self.graph, found, W4)

        def written(floats: Graph) -> Graph:
            return insert_qdq(floats, self.ranges, activation=A8, weight=W4, weight_scales=done.scales)

        if not self.model.batch_norms():
            return written(done.graph)
        biases = correct_bias_analytically(self.model, written(done.graph))
        return written(apply_biases(done.graph, biases))

    def per_tensor(self, corrected: bool) -> Graph:
        """8-bit weights with one scale a tensor, nothing equalized."""
        qdq = insert_qdq(self.graph, self.ranges, activation=A8, weight=W8_TENSOR)
        if not corrected:
            return qdq
        biases = correct_bias_analytically(self.model, qdq)
        return insert_qdq(apply_biases(self.graph, biases), self.ranges, activation=A8, weight=W8_TENSOR)

    def equalized(self, clips: Clips, rounding: Literal["nearest", "squant", "moments"] = "nearest") -> Graph:
        """All of DFQ, 8 bits per tensor."""
        return dfq(self.model, weight=W8_TENSOR, clips=clips, rounding=rounding).qdq


def rows_of(case: Case) -> dict[str, Callable[[], Graph]]:
    """Name of a row -> how its graph is made."""
    norms = bool(case.model.batch_norms())
    rows: dict[str, Callable[[], Graph]] = {
        "w4a8 nearest": lambda: case.w4a8("minmax", False),
        "w4a8 squant": lambda: case.w4a8("minmax", True),
        "w4a8 squant mse": lambda: case.w4a8("mse", True),
        "w4a8 udfc": lambda: case.w4a8("minmax", False, graph=udfc(case.graph, W4).graph),
    }
    if norms:
        rows["w4a8 nearest corrected"] = lambda: case.w4a8("minmax", False, True)
        rows["w4a8 squant corrected"] = lambda: case.w4a8("minmax", True, True)
        rows["w4a8 squant mse corrected"] = lambda: case.w4a8("mse", True, True)
        rows["w4a8 moments corrected"] = lambda: case.moments("analytic")
    rows["w4a8 moments of pictures corrected" if norms else "w4a8 moments of pictures"] = lambda: case.moments(
        "pictures"
    )
    depthwise = any(attribute.i > 1 for node in case.graph for attribute in node.attribute if attribute.name == "group")
    if depthwise and norms:
        clipped = any(node.op_type == "Clip" for node in case.graph)
        rows["w8a8 tensor"] = lambda: case.per_tensor(False)
        rows["w8a8 tensor corrected"] = lambda: case.per_tensor(True)
        for clips in ("cap", "within", "relu") if clipped else ("keep",):
            rows[f"w8a8 dfq {clips}"] = lambda clips=clips: case.equalized(clips)  # type: ignore[misc]
        first = "cap" if clipped else "keep"
        rows[f"w8a8 dfq {first} squant"] = lambda: case.equalized(first, "squant")  # type: ignore[arg-type]
        rows[f"w8a8 dfq {first} moments"] = lambda: case.equalized(first, "moments")  # type: ignore[arg-type]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, or print the table of an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--out", type=Path, default=Path("algebra.json"), help="results; also what is gone on with")
    parser.add_argument("--network", action="append", choices=sorted(NETWORKS), help="only these")
    parser.add_argument("--row", action="append", help="only these rows")
    parser.add_argument("--limit", type=int, help="score on at most so many images (for a first look)")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out and stop")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.out) if options.out.is_file() else {}
    if not options.markdown:
        torch.set_num_threads(1)
        for name in options.network or NETWORKS:
            network = NETWORKS[name]
            model = load_model(
                options.assets / "models" / network.file, preprocess=network.preprocess, input_shape=network.input_shape
            )
            data = load_eval_data(
                options.assets / "data" / network.data, model.inputs[0], resize=network.resize, limit=options.limit
            )
            score(Case(model), network, data, results, options, name)
    sys.stdout.write(markdown(results))
    return 0


def score(
    case: Case, network: Network, data: EvalData, results: dict[str, Any], options: argparse.Namespace, key: str
) -> None:
    """Fill in the rows that are missing, and write after each."""
    rows = results.setdefault(key, {})
    floating = Once(Session(case.graph))
    for name, make in rows_of(case).items():
        if name in rows or (options.row and name not in options.row):
            continue
        started = time.monotonic()
        graph = make()
        seconds = time.monotonic() - started
        tally = Tally()
        tally.add(case.model, Session(graph), floating.again(), data)
        rows[name] = {**tally.row(network.labelled), "seconds": seconds}
        write_json(options.out, results)
        print(case.model.name, name, rows[name], file=sys.stderr, flush=True)


def markdown(results: dict[str, Any]) -> str:
    """One line a row: accuracy % (agreement with float %), and the loss in points."""
    lines = ["| network | images | float | row | top-1 % (agrees with float %) | loss |", "|---|---|---|---|---|---|"]
    for name, rows in results.items():
        for row, found in rows.items():
            known = found["float"] is not None
            floating = f"{100 * found['float']:.2f}" if known else "-"
            loss = f"{100 * (found['float'] - found['engine']):.2f}" if known else "-"
            lines.append(f"| {name} | {found['images']} | {floating} | {row} | {cell([found])} | {loss} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
