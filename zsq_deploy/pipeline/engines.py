"""From ranges to an engine: what to quantize is measured, scales are exact, biases are corrected, all on synthetic images."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from zsq_deploy.backends import BuildSettings, Engine, Target, ValidationData, get_backend
from zsq_deploy.backends.measured import move
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model import Model
from zsq_deploy.pipeline.calibration import Images, MeasuredRanges
from zsq_deploy.pipeline.correction import Correction
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.allocation import allocate
from zsq_deploy.quant.reconstruct import Bits, LayerBits, Preset, Protocol
from zsq_deploy.quant.reconstruct.deployed import LowBits, Numbers, Places, find_numbers
from zsq_deploy.recipe import Recipe

__all__ = ["Built", "EngineSettings", "build_engine", "settings_of"]

JUDGE_IMAGES = 32
"""Images that decide between engines."""

_SENSITIVITY_IMAGES = 128
"""Images that say which layers mind few bits."""

TOLERANCE_DB = 0.2
"""How much SQNR a bias correction may cost (mean of two kinds of images) before it is rejected: less is noise. Of learned codes it may cost nothing."""


@dataclass(frozen=True)
class EngineSettings(BuildSettings):
    """What a recipe can say about an engine; the words of :class:`~zsq_deploy.backends.BuildSettings`, and how it is searched for.

    Attributes:
        bias_correction: Shift every bias by the mean error that quantization causes, layer by layer. An engine that is what NNCF or
            POT wrote, with biases that they corrected, is left alone.
        search: Measure candidates for what to quantize and take the best; ``False``: the default placement.
        choice: Target name -> what an earlier search chose for it; nothing is measured then.
        protocol: With fewer than 8 bits: what keeps 8 (:data:`zsq_deploy.quant.reconstruct.PROTOCOLS`).
        reconstruct_preset: For learned rounding: how long is learned (:data:`zsq_deploy.quant.reconstruct.PRESETS`).
        size_budget: With fewer than 8 bits: share of the bytes that the weights take in 8 bits; within it layers keep 8 bits where that helps most.
            ``None``: all layers have the bits that were asked for.
        device: Where is learned; ``None``: where there is a CUDA device, there.
    """

    bias_correction: bool = True
    search: bool = True
    choice: Mapping[str, str] = field(default_factory=dict)
    protocol: str = "ends-8bit"
    reconstruct_preset: str = "fast"
    size_budget: float | None = None
    device: str | None = None

    @property
    def low_bits(self) -> bool:
        """Codes are found on a finished 8-bit graph, by name: for fewer than 8 bits, and where they are learned."""
        vendor = self.quantizer not in ("auto", "qdq")
        return not (self.weight_only or vendor) and (
            self.bits.lower() != "w8a8" or self.rounding in ("moments", "learned")
        )


def settings_of(recipe: Recipe) -> EngineSettings:
    """The engine settings of a recipe."""
    spec = recipe.quantization
    return EngineSettings(
        bits=spec.bits,
        quantizer=spec.quantizer,
        op_types=tuple(spec.op_types) if spec.op_types else None,
        exclude=tuple(spec.exclude or ()),
        rounding=spec.rounding,
        exact_scales=spec.exact_scales,
        float_type=spec.float_type,
        float_macs=spec.float_macs,
        compress_weights=spec.compress_weights,
        vendor=spec.vendor,
        bias_correction=spec.bias_correction,
        search=spec.search,
        choice=dict(spec.choice),
        protocol=spec.protocol,
        reconstruct_preset=spec.reconstruct_preset,
        size_budget=spec.size_budget,
        device=recipe.calibration.device,
    )


@dataclass(frozen=True)
class Built:
    """An engine, what else was tried, and how long it took."""

    engine: Engine
    candidates: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def build_engine(
    model: Model,
    images: Images,
    measured: MeasuredRanges,
    target: Target,
    folder: Path,
    settings: EngineSettings | None = None,
    *,
    threads: int = 1,
    seed: int = 0,
    validation: ValidationData | None = None,
    workdir: Path | None = None,
    progress: Progress = SILENT,
) -> Built:
    """Quantize a network for one target into `folder`.

    The placement is chosen first (by measurement, if `settings.search`). With fewer than 8 bits, or learned rounding, codes are then found
    on the Q/DQ graph of the choice. Then biases are corrected on the engine's own Q/DQ graph, and the engine is built once more with them.

    Args:
        model: The network.
        images: Calibration images, and those held out.
        measured: Activation ranges.
        target: The target.
        folder: Where the engine goes.
        settings: What the user asked for.
        threads: Threads of the engines that are measured.
        seed: Source of what is random in bias correction.
        validation: What accuracy control looks at, where a quantizer was asked for it.
        workdir: Folder for what was learned block by block, so that an interrupted run goes on there; ``None``: nothing is kept.
        progress: Where to report.
    """
    settings = settings or EngineSettings()
    started = time.monotonic()
    trial = folder / "trial"
    backend: Any = get_backend(target)
    if isinstance(measured.ranges, str) and images.calibration is None:
        raise CalibrationError(
            f"{measured.ranges} reads images, and the method {images.method!r} makes none",
            where="--ranges",
            remedy="choose another range method, or a synthesis method that makes images",
        )
    options = wanted = backend.options_from(settings, target)
    if settings.low_bits:  # the way to quantize is chosen among 8-bit engines
        options = options.with_(bits="w8a8")
    several = len(backend.QUANTIZERS) > 1
    shown: dict[str, Any] = {"calibration": images.calibration}
    if several:
        shown.update(validation=validation, probes=measured.probes)
    looked_at = images.calibration if images.calibration is not None else images.holdout
    correction = None
    if settings.bias_correction and not settings.weight_only:
        build = partial(backend.build, model, measured.ranges, target, progress=progress, **shown)
        # Learned codes give the right means already, as far as the images tell: a correction has to be better than that.
        tolerance = 0.0 if settings.rounding == "learned" else TOLERANCE_DB
        correction = Correction(model, looked_at, backend, build, threads, seed, tolerance, progress)
    candidates: list[dict[str, Any]] = []
    notes: list[str] = []
    pinned = settings.choice.get(target.name)
    if pinned is not None:
        options = _chosen_before(backend.candidates(model.folded().graph, target, options), pinned, target)
    if settings.search and settings.op_types is None and pinned is None:
        # All are compared after their biases were corrected, by whomever. One image more or less decides nothing.
        more: dict[str, Any] = {"tolerance_agreement": 1.5 / JUDGE_IMAGES} if several else {}
        if several and not settings.low_bits:
            more["refine"] = correction
        choice = backend.choose(
            model,
            measured.ranges,
            target,
            trial,
            images=list(looked_at.take(0, min(JUDGE_IMAGES, len(looked_at))).batches(8 if model.dynamic_batch else 1)),
            options=options,
            threads=threads,
            progress=progress,
            **shown,
            **more,
        )
        options, engine = choice.chosen.options, choice.engine
        candidates = [_candidate(item, item is choice.chosen) for item in choice.measured]
        if choice.mixed is not None:
            left = list(choice.mixed.options.exclude)
            row = _candidate(choice.mixed, False)
            candidates.append({**row, "reason": f"--exclude {' --exclude '.join(left)}: {len(left)} layers in float"})
        notes.extend(choice.notes)
    elif not settings.low_bits:
        engine = backend.build(model, measured.ranges, target, trial, options=options, progress=progress, **shown)
    if settings.low_bits:
        shutil.rmtree(trial, ignore_errors=True)
        numbers = _numbers(backend, model, measured, target, options, settings, images, seed, workdir, progress)
        options = options.with_(bits=wanted.bits, numbers=numbers)
        engine = backend.build(model, measured.ranges, target, trial, options=options, progress=progress, **shown)
        notes.extend(numbers.notes)
    if correction is not None:
        if not correction.rows and not engine.choices.get("corrects_biases"):
            engine, options = correction(engine, options)
        for row in correction.rows:
            row["chosen"] = bool(options.biases) and row["name"].startswith(f"{options.label},")
            for before in (
                candidates if row["chosen"] else ()
            ):  # the engine is the corrected one, not what it was made from
                before["chosen"] = False
        candidates.extend(correction.rows)
        notes.extend(correction.notes)
    engine = move(engine, folder)
    shutil.rmtree(trial, ignore_errors=True)
    if validation is not None and several:
        notes.append(f"accuracy control looked at: {validation.source}")
    notes.extend(str(note) for note in engine.choices.get("notes", ()))
    return Built(engine, candidates, time.monotonic() - started, tuple(dict.fromkeys(notes)))


def _numbers(
    backend: Any,
    model: Model,
    measured: MeasuredRanges,
    target: Target,
    options: Any,
    settings: EngineSettings,
    images: Images,
    seed: int,
    workdir: Path | None,
    progress: Progress,
) -> Numbers:
    """Codes and scales, found on the 8-bit Q/DQ graph of the target."""
    asked = LowBits(
        Bits.of(settings.bits),
        Protocol.of(settings.protocol),
        settings.rounding,
        Preset.of(settings.reconstruct_preset),
        seed=seed,
        exact=settings.exact_scales,
        tie_free_sums=target.tie_free_sums and settings.exact_scales,
    )
    looked_at = images.calibration
    mixed = settings.size_budget is not None
    if looked_at is None and (mixed or settings.rounding in ("moments", "learned") or asked.fewest.activations < 8):
        raise CalibrationError(
            f"there are no images to find {settings.bits} on: the method {images.method!r} makes none",
            where="--method",
            remedy="choose a synthesis method that makes images",
        )
    places = backend.places(
        model, measured.ranges, target, options=options, calibration=images.calibration, progress=progress
    )
    if settings.size_budget is not None and looked_at is not None:
        asked = _mixed(asked, settings.size_budget, model, places, looked_at, settings.device, progress)
    # The choice of what to quantize is measured, and may differ when a run goes on: what was learned belongs to one graph.
    folder = workdir / places.qdq.digest[:12] if workdir is not None else None
    return find_numbers(
        places, looked_at, asked, workdir=folder, resume=True, device=settings.device, progress=progress
    )


def _mixed(
    asked: LowBits,
    budget: float,
    model: Model,
    places: Places,
    images: CalibrationSet,
    device: str | None,
    progress: Progress,
) -> LowBits:
    """The same, but layers keep 8 bits where that helps most, within a share of the bytes of 8 bits."""
    try:
        found = allocate(
            model,
            images.take(0, min(_SENSITIVITY_IMAGES, len(images))),
            budget,
            ("w8a8", asked.fewest),
            asked.protocol,
            graph=places.floating,
            rules=places.rules,
            activation=places.activation,
            weight=places.weight,
            device=device,
            progress=progress,
        )
    except UsageError as error:
        raise UsageError(error.what, where="--size-budget", remedy=error.remedy) from error
    quantized = {layer.node for layer in places.template().layers}
    bits = LayerBits({node: bits for node, bits in found.bits.layers.items() if node in quantized})
    return dataclasses.replace(asked, bits=bits, chosen=f"{found.description}; ends as in {asked.protocol.name}")


def _chosen_before(candidates: Sequence[Any], label: str, target: Target) -> Any:
    for options in candidates:
        if options.label == label:
            return options
    raise UsageError(
        f"there is no way {label!r} to quantize this network for {target.name}",
        where="quantization.choice",
        remedy=f"choose one of {', '.join(options.label for options in candidates)}, or leave it out to have it measured",
    )


def _candidate(item: Any, chosen: bool) -> dict[str, Any]:
    return {
        "name": item.options.label,
        "chosen": chosen,
        "median_ms": item.median_ms,
        "sqnr_db": item.sqnr_db,
        "agreement": item.agreement,
        "bytes": item.bytes,
    }
