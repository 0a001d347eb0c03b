"""The data-free half of the job: images from the network, and activation ranges from the images."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zsq_deploy.calib import CalibrationSet
from zsq_deploy.calib.fractal import fractal
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.synthesis import synthesize
from zsq_deploy.errors import CalibrationError, ModelError, StaleArtifactError, UsageError
from zsq_deploy.model import Model, load_model
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant import Ranges, Statistics, analytic_ranges, collect
from zsq_deploy.quant.coverage import implied_ranges, widen
from zsq_deploy.recipe import CalibrationSection
from zsq_deploy.report.words import bytes_text

__all__ = [
    "OWN_CALIBRATORS",
    "RANGE_METHODS",
    "Images",
    "MeasuredRanges",
    "images_in",
    "make_images",
    "measure_ranges",
    "other_networks",
]

RANGE_METHODS = ("auto", "minmax", "percentile", "entropy", "mse", "bn-analytic")
OWN_CALIBRATORS = (
    *("ort-minmax", "ort-entropy", "ort-percentile"),
    *("tensorrt-entropy2", "tensorrt-entropy", "tensorrt-minmax"),
)
"""The calibrators of the runtimes themselves; each runtime's ``CALIBRATORS`` says which are its own."""

COVERAGE_SIGMAS = 6.0
"""How far behind a batch norm activations are taken to reach, in its own standard deviations, when `auto` looks at coverage."""


PROBES = 32
"""Structured pictures that `auto` also looks at. Images that match statistics one by one are all alike in what a global pooling
gives, for instance; pictures that know nothing of the network are not."""


@dataclass(frozen=True)
class Images:
    """What synthesis gives: images that calibrate, and images kept back to estimate quality on.

    Attributes:
        calibration: The set for the quantizers; ``None`` for a method without images (``bn-analytic``).
        holdout: Images that no quantizer sees.
        method: The method that was really used.
        seconds: Wall-clock seconds of synthesis.
        notes: What a reader should know.
    """

    calibration: CalibrationSet | None
    holdout: CalibrationSet
    method: str
    seconds: float
    notes: tuple[str, ...] = ()


def make_images(
    model: Model,
    *,
    method: str,
    images: int,
    holdout: int,
    seed: int,
    device: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    workdir: Path | None = None,
    resume: bool = False,
    given: CalibrationSet | None = None,
    others: Sequence[Model] = (),
    workers: int = 1,
    precision: str = "float32",
    compiled: bool = False,
    progress: Progress = SILENT,
) -> Images:
    """Synthesize `images` + `holdout` inputs, or split a set that the user hands over.

    Args:
        model: The network, batch norms in place.
        method: A method of :data:`zsq_deploy.calib.METHODS`.
        images: Size of the calibration set.
        holdout: Number of images kept back.
        seed: Source of everything random.
        device: Where to compute; ``None``: ``cuda`` when there is one.
        parameters: The method's parameters.
        workdir: Folder for checkpoints and, in it, the finished set, which then never sits in memory; the caller removes it.
        resume: Go on with an interrupted synthesis.
        given: A finished set (``zsq deploy --calibration``); its last quarter, at most `holdout` images, is kept back.
        others: Further networks that the images are to fit, see :func:`other_networks`.
        workers: Processes that make images at the same time.
        precision: What the network's convolutions read meanwhile: ``float32``, ``bfloat16``, ``auto``.
        compiled: Compile its forward pass.
        progress: Where to report.
    """
    started = time.monotonic()
    if given is not None:
        given.check_fits(model)
        kept = max(1, min(holdout, len(given) // 4))
        if len(given) < 2:
            raise UsageError(
                "the calibration set holds one input only", where=str(given.folder), remedy="give 2 or more"
            )
        cut = len(given) - kept
        return Images(given.take(0, cut), given.take(cut), given.manifest.method, float(given.manifest.seconds or 0.0))
    known = METHODS.get(method)
    if known is not None and not known.images:
        if method == "real":
            raise UsageError(
                "method 'real' needs images of your own",
                where="--method",
                remedy="give a calibration set with --calibration",
            )
        # No images calibrate, but something has to be looked at to estimate the quality.
        kept_set = synthesize(model, method="fractal", images=holdout, seed=seed + 1, device=device, progress=progress)
        return Images(None, kept_set, method, time.monotonic() - started, _notes_without_images())
    if workdir is not None:
        _check_room(model, images, holdout, workdir)
    whole = synthesize(
        model,
        method=method,
        images=images + holdout,
        seed=seed,
        device=device,
        workdir=workdir,
        resume=resume,
        progress=progress,
        parameters=parameters,
        others=others,
        workers=workers,
        precision=precision,
        compiled=compiled,
        output=None if workdir is None else workdir / "set",
    )
    return Images(
        whole.take(0, images),
        whole.take(images) if holdout else whole,
        whole.manifest.method,
        time.monotonic() - started,
        tuple(whole.manifest.notes),
    )


def _check_room(model: Model, images: int, holdout: int, workdir: Path) -> None:
    """Refuse a set that the disk cannot hold before it is made: the finished images and, beside them, the set that is kept.

    Raises:
        UsageError: There is not enough room.
    """
    place = next(folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.is_dir())
    each = sum(math.prod(spec.with_batch(1)) * spec.dtype.itemsize for spec in model.inputs)
    needed, free = 2 * (images + holdout) * each, shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"{images} images{f' and {holdout} that are kept back' if holdout else ''} need {bytes_text(needed)} on disk while they are made, "
            f"and {bytes_text(free)} are free",
            where=str(place),
            remedy=f"ask for fewer (--images; at most {max(0, free // (2 * each) - holdout)} fit), or choose a folder on a larger disk (-o)",
        )


def other_networks(spec: CalibrationSection, model: Model) -> tuple[Model, ...]:
    """The further networks that a recipe names, read with the first one's input shape and preprocessing.

    Raises:
        UsageError: The method looks at one network only.
        ModelError: One of them cannot be read so.
    """
    known = METHODS.get(spec.method)
    if spec.also and known is not None and not known.several_networks:
        raise UsageError(
            f"method {spec.method!r} looks at one network",
            where="--also",
            remedy="leave it away, or use --method mixmix",
        )
    shapes = {item.name: item.with_batch(1) for item in model.inputs}
    shape = next(iter(shapes.values())) if len(shapes) == 1 else shapes
    found = []
    for source in spec.also:
        try:
            found.append(load_model(source, input_shape=shape, preprocess=model.preprocess))
        except (ModelError, UsageError) as error:
            raise ModelError(
                f"this network cannot share images with {model.name!r}: {error.what}",
                where=f"--also {source}",
                remedy=f"give one that takes the same input, {'x'.join(map(str, model.inputs[0].with_batch(1)))}, or leave it away",
            ) from error
    return tuple(found)


def images_in(
    root: Path,
    model: Model,
    spec: CalibrationSection,
    *,
    resume: bool = False,
    progress: Progress = SILENT,
) -> Images:
    """The images of a run, kept in its output folder as ``calibration/`` and ``holdout/``.

    With `resume`, sets that the interrupted run had finished are used again; an unfinished synthesis goes on where it stopped.
    The caller makes sure that the folder is the rest of the same recipe.

    Args:
        root: The output folder.
        model: The network.
        spec: How images are made.
        resume: Use what is there.
        progress: Where to report.
    """
    if resume:
        found = _finished_images(root, model, spec)
        if found is not None:
            progress.say("the images are there already: they are used again")
            return found
    images = make_images(
        model,
        method=spec.method,
        images=spec.images,
        holdout=spec.holdout,
        seed=spec.seed or 0,
        device=spec.device,
        parameters=spec.parameters,
        workdir=root / ".synthesis",
        resume=resume,
        given=CalibrationSet.open(Path(spec.set)) if spec.set else None,
        others=other_networks(spec, model),
        workers=spec.workers,
        precision=spec.precision,
        compiled=spec.compile,
        progress=progress,
    )
    calibration = images.calibration
    if calibration is not None:
        calibration = calibration.save(root / "calibration", force=True)
    # Written last: where it is complete, the other one is.
    holdout = images.holdout.save(root / "holdout", force=True)
    shutil.rmtree(root / ".synthesis", ignore_errors=True)
    return replace(images, calibration=calibration, holdout=holdout)


def _finished_images(root: Path, model: Model, spec: CalibrationSection) -> Images | None:
    """The images of an interrupted run, if it had finished them; an unreadable set counts as unfinished."""
    if spec.set:
        return None  # they are the user's: cut out again, at no cost
    known = METHODS.get(spec.method)
    try:
        holdout = CalibrationSet.open(root / "holdout")
        holdout.check_fits(model)
        if known is not None and not known.images:
            return Images(None, holdout, spec.method, 0.0, _notes_without_images())
        calibration = CalibrationSet.open(root / "calibration")
        calibration.check_fits(model)
    except (CalibrationError, StaleArtifactError):
        return None
    if len(calibration) != spec.images or len(holdout) != spec.holdout:
        return None
    manifest = calibration.manifest
    return Images(calibration, holdout, manifest.method, float(manifest.seconds or 0.0), tuple(manifest.notes))


def _notes_without_images() -> tuple[str, ...]:
    return ("ranges come from batch-norm parameters alone; fractal images serve to estimate the quality",)


def probe_images(model: Model, count: int, *, seed: int = 20_001) -> dict[str, Any] | None:
    """Structured pictures for the network's only input; ``None`` where the input is no picture."""
    spec = model.inputs[0]
    if len(model.inputs) != 1 or len(spec.shape) != 4 or spec.shape[1] not in (1, 3) or spec.dtype.kind != "f":
        return None
    return {spec.name: fractal(spec, count, seed=seed, preprocess=model.preprocess)}


@dataclass(frozen=True)
class MeasuredRanges:
    """Ranges of all activations, and what they were found from.

    Attributes:
        ranges: What the quantizers get; or the name of a runtime's own calibrator.
        observed: Plain minimum and maximum on the calibration images (for reports and output steps).
        statistics: The streaming statistics; ``None`` without images.
        coverage: Value name -> observed reach / reach that batch norm implies, where it is known.
        seconds: Time that it took.
        notes: What a reader should know.
        probes: The structured pictures that were looked at beside the images: input name -> array.
    """

    ranges: Ranges | str
    observed: Ranges
    statistics: Statistics | None
    coverage: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    notes: Sequence[str] = ()
    probes: Mapping[str, Any] | None = None


def measure_ranges(
    model: Model,
    images: Images,
    method: str,
    *,
    percentile: float = 99.999,
    device: str | None = None,
    progress: Progress = SILENT,
) -> MeasuredRanges:
    """Find the range of every activation of the folded network.

    ``auto`` takes minimum and maximum of the images, and then looks at coverage: where the network's own batch norms say that
    activations reach further than the images excited them, the range is widened to what they say.

    Raises:
        UsageError: Unknown method, or a method that needs images and there are none.
    """
    started = time.monotonic()
    if method not in (*RANGE_METHODS, *OWN_CALIBRATORS):
        raise UsageError(
            f"there is no range method {method!r}",
            where="--ranges",
            remedy=f"choose one of {', '.join((*RANGE_METHODS, *OWN_CALIBRATORS))}",
        )
    notes: list[str] = []
    if images.calibration is None or method == "bn-analytic":
        ranges = analytic_ranges(model)
        return MeasuredRanges(
            ranges, ranges, None, {}, time.monotonic() - started, ["ranges computed from batch-norm parameters"]
        )
    folded = model.folded()
    calibration = images.calibration
    statistics = collect(
        folded.graph,
        calibration.batches(16),
        micro_batch=16 if model.dynamic_batch else 1,
        device=device,
        progress=progress,
        total=len(calibration),
        set_digest=calibration.digest,
    )
    observed = statistics.ranges("minmax")
    unexcited = statistics.unexcited()
    if unexcited:
        worst = max(unexcited, key=lambda item: len(item[1]))
        notes.append(
            f"{sum(len(channels) for _, channels in unexcited)} channels of {len(unexcited)} activations never changed on the "
            f"calibration set (most in {worst[0]!r}: {len(worst[1])})"
        )
    coverage: dict[str, float] = {}
    probes: dict[str, Any] | None = None
    chosen: Ranges | str
    if method in OWN_CALIBRATORS:
        chosen = method
    elif method == "auto":
        reached = observed
        probes = probe_images(model, PROBES)
        if probes is not None:
            seen = collect(
                folded.graph,
                [probes],
                micro_batch=16 if model.dynamic_batch else 1,
                device=device,
                progress=progress,
                total=PROBES,
                title="ranges of structured pictures",
            ).ranges("minmax")
            wider = {
                name: (min(low, seen[name][0]), max(high, seen[name][1]))
                for name, (low, high) in observed.items()
                if name in seen
            }
            grown = sum(wider[name] != observed[name] for name in wider)
            reached = observed.updated(wider, method="minmax + pictures")
            notes.append(
                f"{PROBES} structured pictures reached further than the images in {grown} of {len(wider)} activations"
            )
        implied = implied_ranges(model, sigmas=COVERAGE_SIGMAS)
        chosen, coverage = widen(reached, implied)
        if coverage:
            low = [name for name, share in coverage.items() if share < 1.0]
            notes.append(
                f"what was seen reaches what batch norm implies ({COVERAGE_SIGMAS:g} sigma) in {len(coverage) - len(low)} of "
                f"{len(coverage)} activations; the ranges of the other {len(low)} were widened"
            )
    else:
        chosen = statistics.ranges(method, percentile=percentile)
    return MeasuredRanges(chosen, observed, statistics, coverage, time.monotonic() - started, notes, probes)
