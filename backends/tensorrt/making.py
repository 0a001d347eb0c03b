"""A network on its way to TensorRT: Q/DQ or a cache, biases corrected, and what is decided by measuring the reference.

Everything is decided without labels and without real images: on the end of the calibration set, and on structured pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.measured import quality
from zsq_deploy.backends.tensorrt.centring import centre
from zsq_deploy.backends.tensorrt.halves import to_half
from zsq_deploy.backends.tensorrt.implicit import cache_of
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import Placed, floats_of, place_int4, place_qdq
from zsq_deploy.backends.tensorrt.reference import reference_of_cache
from zsq_deploy.backends.tensorrt.sparing import ENOUGH_DB, Spared, spare
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import apply_biases, correct_bias
from zsq_deploy.quant.ranges import Ranges
from zsq_deploy.quant.statistics import collect

__all__ = ["Job", "Made", "outputs_of", "quality_of"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_BIAS_IMAGES = 64

_JUDGE_IMAGES = 16

_TOLERANCE_DB = 0.3
"""How much SQNR a bias correction may cost before it is rejected: less is noise."""

_EXACT_DB = 0.5
"""How much SQNR exact scales may cost before they are left free. TensorRT's steps are twice as long behind a Relu as those of other
runtimes, and how its kernels round is not known: there is less to win, and more to lose."""

_SEARCH_DB = 0.3
"""How much better a reference has to be for its narrower ranges, or its centred Clips, to be taken."""


@dataclass(frozen=True)
class Made:
    """A network for TensorRT.

    Attributes:
        network: What TensorRT builds from.
        reference: The Q/DQ graph that says what the engine computes.
        options: With the biases that were kept.
        record: How it came about, for the manifest.
        notes: What a reader should know.
    """

    network: Graph
    reference: Graph
    options: BuildOptions
    record: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A model, ranges and images on their way to a target.

    Attributes:
        model: The model.
        ranges: Ranges of the folded network; not read with 4-bit weights.
        target: One of the ``tensorrt-...`` targets.
        calibration: The calibration set, or ``None``.
        probes: Structured pictures (input name -> array), or ``None``.
        progress: Watches.
        network: Another form of the folded network, which computes the same; `ranges` belong to it then.
    """

    model: Any
    ranges: Any
    target: Target
    calibration: Any
    probes: Mapping[str, Array] | None
    progress: Progress
    network: Graph | None = None

    @property
    def folded(self) -> Graph:
        """The float network, batch normalization folded."""
        if self.network is not None:
            return self.network
        graph: Graph = self.model.folded().graph
        return graph

    @property
    def size(self) -> int:
        """Images that go through a network at a time."""
        return 8 if self.model.dynamic_batch else 1

    def has_cache(self, options: BuildOptions) -> bool:
        """Whether a calibration cache can be written."""
        return isinstance(self.ranges, Mapping) and generation(self.target) < 11 and not options.weight_only

    def searched(self, options: BuildOptions) -> tuple[Job, tuple[str, ...]]:
        """The job with narrower ranges, if those that cost the least rounding and clipping together make a better reference.

        The search is done where structured pictures are given (``--ranges auto``), on the magnitudes of images and pictures together,
        for steps of signed 8 bits; no range gets wider. A range that holds every number ever seen is long, and TensorRT's steps
        have to reach as far below zero as above it.
        """
        if (
            self.probes is None
            or self.calibration is None
            or options.weight_only
            or not isinstance(self.ranges, Ranges)
        ):
            return self, ()
        batches = [*self.calibration.batches(16), dict(self.probes)]
        micro = 16 if self.model.dynamic_batch else 1
        statistics = collect(self.folded, batches, micro_batch=micro, progress=SILENT)
        best = statistics.ranges("mse", scheme=self.target.activation)
        narrower = {
            name: (max(low, best[name][0]), min(high, best[name][1]))
            for name, (low, high) in self.ranges.items()
            if name in best and max(low, best[name][0]) < min(high, best[name][1])
        }
        other = replace(self, ranges=self.ranges.updated(narrower, method=f"{self.ranges.method} + search"))
        plain = options.with_(exact_scales=False)
        before, after = (
            job.judged(job.implicit(plain).reference if options.implicit else job.corrected(plain)[0].graph)["sqnr_db"]
            for job in (self, other)
        )
        if after < before + _SEARCH_DB:
            return self, ()
        return other, (f"ranges narrowed by search: {after:.1f} dB against {before:.1f} dB, on synthetic images",)

    def explicit(self, options: BuildOptions) -> Made:
        """The Q/DQ graph."""
        if options.weight_only:
            placed = place_int4(self.folded, self.target, options)
            return self._finished(placed, options, placed.notes)
        job, moved = self.centred(options)
        placed, settled, notes = job.settled(options)
        spared = job.spared(placed, options.with_(exact_scales=settled.exact_scales))
        if spared is not None:
            placed, settled, notes = job.settled(options.with_(spared=spared.nodes))
            spared = replace(spared, after=job.judged(placed.graph)["sqnr_db"])
            notes = (*notes, spared.describe())
        made = job._finished(placed, settled, (*moved, *notes))
        return made if spared is None else replace(made, record={**made.record, **spared.record()})

    def settled(self, options: BuildOptions) -> tuple[Placed, BuildOptions, tuple[str, ...]]:
        """The Q/DQ graph with exact scales if they were asked for and cost little; what was kept of the options, and what to say."""
        placed, kept, notes = self.corrected(options)
        if not options.exact_scales or self.calibration is None:
            return placed, kept, notes
        free, changed, said = self.corrected(options.with_(exact_scales=False))
        exact_db, free_db = (self.judged(graph)["sqnr_db"] for graph in (placed.graph, free.graph))
        if exact_db >= free_db - _EXACT_DB:
            return placed, kept, notes
        words = f"exact scales would cost {free_db - exact_db:.1f} dB on synthetic images: they are left free"
        return free, changed, (*said, words)

    def centred(self, options: BuildOptions) -> tuple[Job, tuple[str, ...]]:
        """The job with Clips in the middle of the signed range, if there are any and that makes a better reference.

        As with the search for ranges, it is tried where structured pictures are given. Biases and weights that were given belong to the
        network as it is, so nothing is moved then.
        """
        if self.probes is None or self.calibration is None or not isinstance(self.ranges, Ranges):
            return self, ()
        if options.biases or options.weights:
            return self, ()
        found = centre(self.folded, self.ranges)
        if not found.moved:
            return self, ()
        other = replace(self, network=found.graph, ranges=self.ranges.updated(found.ranges))
        plain = options.with_(exact_scales=False)
        before, after = (job.judged(job.corrected(plain)[0].graph)["sqnr_db"] for job in (self, other))
        if after < before + _SEARCH_DB:
            return self, ()
        words = f"{len(found.moved)} Clips centred, constants alone changed: {after:.1f} dB against {before:.1f} dB"
        return other, (f"{words}, on synthetic images",)

    def spared(self, placed: Placed, options: BuildOptions) -> Spared | None:
        """The layers to leave in float where the reference is too far from the float network; needs a set."""
        if self.calibration is None or options.float_macs <= 0.0:
            return None
        before = self.judged(placed.graph)["sqnr_db"]
        if before >= ENOUGH_DB:
            return None

        def measure(changed: BuildOptions) -> float:
            return self.judged(self.corrected(changed)[0].graph)["sqnr_db"]

        kinds = [list(kind) for kind in self._judges()]
        return spare(
            self.folded,
            self.ranges,
            self.target,
            options,
            kinds,
            before=before,
            measure=measure,
            progress=self.progress,
        )

    def corrected(self, options: BuildOptions) -> tuple[Placed, BuildOptions, tuple[str, ...]]:
        """The Q/DQ graph, with corrected biases if they were asked for and help; and what to say of it."""
        placed = place_qdq(self.folded, self.ranges, self.target, options)
        if not options.bias_correction or options.biases or self.calibration is None:
            return placed, options, placed.notes
        changed = options.with_(biases=self._biases(placed.graph))
        second = place_qdq(self.folded, self.ranges, self.target, changed)
        kept, said = self._judge(placed.graph, second.graph)
        return (second, changed, (*second.notes, said)) if kept else (placed, options, (*placed.notes, said))

    def _finished(self, placed: Placed, options: BuildOptions, notes: tuple[str, ...]) -> Made:
        record = placed.record()
        if options.float_type == "float32":
            return Made(placed.graph, placed.graph, options, record, notes)
        floats = {} if options.weight_only else floats_of(self.folded, options)
        half = to_half(placed.graph, options.float_type, ranges=self.ranges or {}, weights=floats)
        return Made(half.graph, half.graph, options, {**record, **half.record()}, (*notes, *half.notes))

    def implicit(self, options: BuildOptions) -> Made:
        """The float network, and what its cache means."""
        network = apply_biases(self.folded, options.biases)
        cache = cache_of(self.folded, self.ranges, self.target)
        found = reference_of_cache(network, cache, floats=options.exclude)
        notes: tuple[str, ...] = ()
        if options.bias_correction and not options.biases and self.calibration is not None:
            changed = options.with_(biases=self._biases(found.graph))
            corrected = apply_biases(self.folded, changed.biases)
            second = reference_of_cache(corrected, cache, floats=options.exclude)
            kept, said = self._judge(found.graph, second.graph)
            notes = (said,)
            network, found, options = (corrected, second, changed) if kept else (network, found, options)
        record = {"placement": "implicit: TensorRT's own, from a calibration cache", "float_nodes": dict(found.floats)}
        return Made(network, found.graph, options, {**record, "nodes_quantized": len(found.layers)}, notes)

    def _biases(self, reference: Graph) -> dict[str, Array]:
        looked_at = self.calibration.take(0, min(_BIAS_IMAGES, len(self.calibration))).batches(self.size)
        return correct_bias(self.folded, reference, looked_at, progress=self.progress)

    def _judge(self, before: Graph, after: Graph) -> tuple[bool, str]:
        """Whether corrected biases help on images at the other end of the set, and what to say of it."""
        old, new = (self.judged(graph)["sqnr_db"] for graph in (before, after))
        words = f"biases corrected: {new:.1f} dB against {old:.1f} dB without, on synthetic images"
        kept = new >= old - _TOLERANCE_DB
        return kept, words if kept else f"{words}: rejected"

    def judged(self, graph: Graph) -> dict[str, float]:
        """Agreement and SQNR of a reference against the float network; nothing without a set.

        Both are the mean over the end of the calibration set and the structured pictures, if there are any: images that match the
        statistics of batch norm are far from real ones in what they do to rounding, and pictures are far in another way.
        """
        if self.calibration is None:
            return {}
        agreement, ratio = np.mean([quality_of(self.model, graph, kind) for kind in self._judges()], axis=0)
        return {"agreement": float(agreement), "sqnr_db": float(ratio)}

    def _judges(self) -> Iterator[Iterable[Feeds]]:
        """The images that decide, one kind after the other."""
        yield self.calibration.take(max(0, len(self.calibration) - _JUDGE_IMAGES)).batches(self.size)
        if self.probes is not None:
            yield self._pictures()

    def _pictures(self) -> Iterator[dict[str, Array]]:
        assert self.probes is not None
        count = min(len(next(iter(self.probes.values()))), _JUDGE_IMAGES)
        for start in range(0, count - count % self.size, self.size):
            yield {name: value[start : start + self.size] for name, value in self.probes.items()}


def quality_of(model: Any, graph: Graph, batches: Iterable[Feeds]) -> tuple[float, float]:
    """Top-1 agreement and SQNR in dB of a Q/DQ graph's twin against the float network."""
    held = list(batches)
    return quality(list(outputs_of(graph, held)), list(outputs_of(model.folded().graph, held)))


def outputs_of(graph: Graph, batches: Iterable[Feeds]) -> Iterable[dict[str, Array]]:
    """The outputs of a graph's twin, batch by batch."""
    twin = Twin(graph, device="cpu")
    with torch.no_grad():
        for feeds in batches:
            found = twin.run({name: torch.from_numpy(np.array(value)) for name, value in feeds.items()})
            yield {name: value.numpy() for name, value in found.items()}
