"""The quality of a calibration set, read without real data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from zsq_deploy.calib.calibration_set import CalibrationSet
from zsq_deploy.calib.fractal import fractal
from zsq_deploy.calib.quality.agreement import Agreement, Runner, agreement
from zsq_deploy.calib.quality.batch_norm import BatchNormDistance, batch_norm_distance
from zsq_deploy.calib.quality.diversity import Diversity, diversity
from zsq_deploy.calib.quality.reach import SIGMAS, Reach, measure_reach
from zsq_deploy.calib.quality.real import RangeError, range_error
from zsq_deploy.model import Model
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.ranges import Ranges
from zsq_deploy.quant.statistics import collect
from zsq_deploy.quant.statistics_values import Statistics

__all__ = ["PICTURES", "Quality", "float_runner", "lines", "measure_quality", "pictures", "split"]

Array = npt.NDArray[Any]
Batches = Iterable[Mapping[str, Array]]

PICTURES = 32
"""Structured pictures among the witnesses of how far activations reach."""

_PICTURE_SEED = 20_001
_HELD_OUT = 64


@dataclass(frozen=True)
class Quality:
    """What can be said about a calibration set.

    Attributes:
        images: Number of images of the set.
        held_out: Number of images of the same kind that the set was held against; 0: there were none.
        pictures: Number of structured pictures that it was held against.
        reach: How far it excites the activations.
        batch_norm: Distance to the stored statistics; ``None`` without batch normalization.
        diversity: How different its images are.
        agreement: A quantized network against float; ``None`` if nobody gave one.
        real: Against real images; ``None`` without any.
        notes: What a reader should know, one sentence each.
    """

    images: int
    held_out: int
    pictures: int
    reach: Reach
    batch_norm: BatchNormDistance | None
    diversity: Diversity
    agreement: Agreement | None = None
    real: RangeError | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """``calibration.quality`` of the report."""
        reach, real = self.reach, self.real
        worst = reach.worst
        errors = {} if real is None else {tensor.name: tensor for tensor in real.tensors}
        norm = self.batch_norm
        return {
            "images": self.images,
            "held_out": self.held_out,
            "pictures": self.pictures,
            "coverage": {
                "summary": reach.coverage,
                "judged": len(reach.judged),
                "below_half": reach.below_half,
                "worst": None if worst is None else {"name": worst.name, "share": worst.share},
                "unexcited": reach.unexcited,
                "clipped": reach.clipped,
                "excess_bits": reach.excess,
                "sigmas": SIGMAS,
            },
            "batch_norm": None
            if norm is None
            else {
                "images": norm.images,
                "mean": norm.mean,
                "spread": norm.spread,
                "kl": norm.kl,
                "layers": [dataclasses.asdict(layer) for layer in norm.layers],
            },
            "diversity": dataclasses.asdict(self.diversity),
            "agreement": None if self.agreement is None else dataclasses.asdict(self.agreement),
            "real": None
            if real is None
            else {
                "images": real.images,
                "extent_bits": real.extent,
                "magnitude_bits": real.magnitude,
                "bias_bits": real.bias,
                "clipped": real.clipped,
                "worst": [{"name": row.name, "extent_bits": row.extent} for row in real.worst()],
            },
            "tensors": [
                {
                    "name": tensor.name,
                    "share_implied": tensor.share_implied,
                    "share_witnessed": tensor.share_witnessed,
                    "clipped": tensor.clipped,
                    "excess_bits": tensor.excess,
                    "channels": tensor.channels,
                    "unexcited": tensor.unexcited,
                    "real_extent_bits": errors[tensor.name].extent if tensor.name in errors else None,
                    "real_magnitude_bits": errors[tensor.name].magnitude if tensor.name in errors else None,
                    "real_clipped": errors[tensor.name].clipped if tensor.name in errors else None,
                }
                for tensor in reach.tensors
            ],
            "notes": list(self.notes),
        }


def split(images: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet | None]:
    """A set in two: what is judged, and its last quarter (at most 64 images) as a witness; sets below 4 images stay whole."""
    if len(images) < 4:
        return images, None
    kept = min(_HELD_OUT, len(images) // 4)
    return images.take(0, len(images) - kept), images.take(len(images) - kept)


def pictures(model: Model, count: int = PICTURES) -> dict[str, Array] | None:
    """Structured pictures for the network's only input, always the same; ``None`` where the input is no picture."""
    spec = model.inputs[0]
    if count < 1 or len(model.inputs) != 1 or len(spec.shape) != 4 or spec.shape[1] not in (1, 3):
        return None
    if spec.dtype.kind != "f" or None in spec.shape[2:]:
        return None
    return {spec.name: fractal(spec, count, seed=_PICTURE_SEED, preprocess=model.preprocess)}


def float_runner(model: Model, device: str | torch.device | None = None) -> Runner:
    """The float network as a function of arrays."""
    twin = model.twin(device=torch.device(device or "cpu"))

    def run(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.no_grad():
            found = twin.run({name: torch.tensor(array) for name, array in feeds.items()})
        return {name: value.cpu().numpy() for name, value in found.items()}

    return run


def measure_quality(
    model: Model,
    images: CalibrationSet,
    *,
    held_out: CalibrationSet | None = None,
    statistics: Statistics | None = None,
    real: Batches | None = None,
    quantize: Callable[[Ranges], Runner] | None = None,
    picture_count: int = PICTURES,
    device: str | torch.device | None = None,
    progress: Progress = SILENT,
) -> Quality:
    """Measure a calibration set: reach, distance to batch-norm statistics, variety, and what else is asked for.

    The images go through the network in one stream; memory does not grow with their number, and nothing depends on how they are stored.

    Args:
        model: The network, batch normalizations in place.
        images: The set that calibrates.
        held_out: Images of the same kind that it does not hold; ``None``: its last quarter serves, and reach is that of the rest.
        statistics: Of the folded network on `images`, if they are there already; only with `held_out`.
        real: Real images by input name, to compare ranges with.
        quantize: Makes the quantized network from plain min-max ranges, to compare it with float on images that those ranges have not seen
            (on the set itself, where it is too small to hold anything out).
        picture_count: Number of structured pictures among the witnesses.
        device: Where to compute.
        progress: Where to report.
    """
    micro_batch = 16 if model.dynamic_batch else 1
    graph, notes = model.folded().graph, list[str]()
    judged, whole = images, held_out is not None
    if held_out is None:
        (judged, held_out), statistics = split(images), None
        if held_out is not None:
            notes.append(
                f"nothing was held out: reach is that of the first {len(judged)} images, and the last {len(held_out)} are witnesses"
            )

    def look(batches: Batches, total: int | None, what: str) -> Statistics:
        return collect(
            graph,
            batches,
            micro_batch=micro_batch,
            device=device,
            progress=progress,
            total=total,
            title=f"quality: reach of {what}",
        )

    seen = statistics if statistics is not None else look(judged.batches(64), len(judged), "the images")
    structured = pictures(model, picture_count)
    others = None if held_out is None else look(held_out.batches(64), len(held_out), "held-out images")
    full = seen if whole or others is None else seen.merge(others)
    if structured is not None:
        shown = look([structured], picture_count, "structured pictures")
        others = shown if others is None else others.merge(shown)
    reach = measure_reach(model, seen, others)
    witness = held_out if held_out is not None else images
    norm = batch_norm_distance(model, witness.batches(64), micro_batch=micro_batch, device=device, progress=progress)
    variety = diversity(
        model, images.batches(64), micro_batch=micro_batch, device=device, progress=progress, total=len(images)
    )
    alike = None
    if quantize is not None:
        quantized = quantize(seen.ranges("minmax"))
        alike = agreement(float_runner(model, device), quantized, witness.batches(64), micro_batch=micro_batch)
    error = None if real is None else range_error(full.ranges("minmax"), look(real, None, "real images"))
    return Quality(
        len(images),
        0 if held_out is None else len(held_out),
        0 if structured is None else picture_count,
        reach,
        norm,
        variety,
        alike,
        error,
        tuple(notes),
    )


def lines(quality: Quality) -> list[str]:
    """The quality in a few lines of text."""
    reach, found = quality.reach, list[str]()
    if reach.coverage is not None and reach.worst is not None:
        found.append(
            f"coverage {reach.coverage:.3f}: activations reach that share of what batch norm and other images show, on average "
            f"over {len(reach.judged)} tensors; {reach.below_half} reach less than half; worst {reach.worst.name} {reach.worst.share:.3f}"
        )
    else:
        found.append("coverage: nothing to hold the set against (no batch norm, no other images)")
    rest = [f"{reach.unexcited:.2%} of all channels never change"]
    if reach.clipped is not None:
        rest.append(f"{reach.clipped:.3%} of the numbers of other images would be clipped")
    if reach.excess is not None:
        rest.append(f"ranges {reach.excess:.2f} bits wider than batch norm implies")
    found.append("; ".join(rest))
    norm = quality.batch_norm
    if norm is not None:
        found.append(
            f"batch-norm distance over {norm.images} images: means {norm.mean:.3f}, spreads {norm.spread:.3f} stored standard deviations, "
            f"KL {norm.kl:.3f}"
        )
    variety, parts = quality.diversity, list[str]()
    if variety.effective_images is not None:
        parts.append(f"like {variety.effective_images:.1f} of {variety.images} wholly different images")
        if variety.effective_directions is not None:
            parts.append(f"{variety.effective_directions:.1f} directions")
        if variety.mean_cosine is not None:
            parts.append(f"mean cosine {variety.mean_cosine:.2f}")
    if variety.classes is not None and variety.effective_classes is not None and variety.confidence is not None:
        parts.append(
            f"{variety.classes_seen} of {variety.classes} classes (like {variety.effective_classes:.1f}), confidence "
            f"{variety.confidence:.2f}"
        )
    if parts:
        found.append("variety: " + "; ".join(parts))
    if quality.agreement is not None:
        top = (
            ""
            if quality.agreement.top1 is None
            else f"{quality.agreement.top1:.2%} of {quality.agreement.images} images, "
        )
        found.append(f"quantized network like float: {top}{quality.agreement.sqnr_db:.1f} dB")
    real = quality.real
    if real is not None:
        side = "too narrow" if real.bias < 0 else "too wide"
        off = ", ".join(f"{row.name} {row.extent:+.2f}" for row in real.worst(3))
        found.append(
            f"against {real.images} real images: ranges off by {real.extent:.2f} bits ({abs(real.bias):.2f} {side} on average), "
            f"{real.clipped:.3%} of real numbers outside; worst {off}"
        )
    return found
