"""The whole job: a network in, engines and a report out."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zsq_deploy.artifact import OutputFolder
from zsq_deploy.backends import Engine, Target, ValidationData, get_target
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.evaldata import EvalData, load_eval_data
from zsq_deploy.model import Model, Preprocess, load_model, node_macs
from zsq_deploy.pipeline.auto import with_method
from zsq_deploy.pipeline.calibration import Images, MeasuredRanges, images_in, measure_ranges
from zsq_deploy.pipeline.checks import check_measurable, check_recipe
from zsq_deploy.pipeline.control import judged_images, validation_data
from zsq_deploy.pipeline.engines import Built, build_engine, settings_of
from zsq_deploy.pipeline.quality import quality_of
from zsq_deploy.pipeline.verification import Evidence, verify_engine
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.algebra import equalized_model
from zsq_deploy.recipe import Recipe
from zsq_deploy.report.build import environment_section, finish
from zsq_deploy.report.html import write as write_html
from zsq_deploy.report.preview import contact_sheet
from zsq_deploy.report.schema import Report
from zsq_deploy.report.schema import save as save_report
from zsq_deploy.verify import Gates

__all__ = [
    "LEARNED",
    "Outcome",
    "build_target",
    "classes_of",
    "deploy",
    "evaluation_data",
    "gates_of",
    "images_and_ranges",
    "load_recipe_model",
    "model_section",
    "owned",
    "pinned",
    "write_report",
]


LEARNED = ".learned"
"""Folder in the output folder with what was learned block by block, until the run is finished."""


@dataclass(frozen=True)
class Outcome:
    """What a run gives.

    Attributes:
        report: The report, checked against its schema.
        folder: The output folder.
        passed: Whether all demanded gates are kept (``True`` if none was demanded).
    """

    report: Report
    folder: Path
    passed: bool

    @property
    def exit_code(self) -> int:
        """0: fine; 1: a gate failed."""
        return 0 if self.passed else 1


def owned(recipe: Recipe) -> tuple[str, ...]:
    """Everything that a run writes into its output folder."""
    files = ("recipe.resolved.yaml", "ranges.json", "report.json", "report.html")
    return (*files, "calibration", "holdout", ".synthesis", LEARNED, *recipe.targets)


def load_recipe_model(recipe: Recipe) -> Model:
    """The network that a recipe names, with its preprocessing, and with equalized weights if the recipe asks for them."""
    spec = recipe.model
    shape = spec.input_shape
    model = load_model(
        spec.source,
        path=Path(spec.path) if spec.path else None,
        weights=Path(spec.weights) if spec.weights else None,
        input_shape=dict(shape) if isinstance(shape, dict) else shape or None,
        preprocess=Preprocess(
            mean=tuple(spec.mean) if spec.mean else None,
            std=tuple(spec.std) if spec.std else None,
            raw_pixels=spec.raw_pixels,
        ),
    )
    if not recipe.quantization.equalize:
        return model
    # Powers of two: the float network that everything is compared with stays the same to the last bit.
    changed, notes = equalized_model(model, powers_of_two=True)
    return replace(changed, notes=(*model.notes, *notes))


def gates_of(recipe: Recipe) -> Gates:
    """The demanded limits of a recipe."""
    return Gates(**{name: value for name, value in recipe.verification.gates.model_dump().items() if value is not None})


def evaluation_data(recipe: Recipe, model: Model) -> EvalData | None:
    """The labelled data that a recipe names, checked against the network."""
    spec = recipe.verification
    if not spec.eval_data:
        return None
    return load_eval_data(
        Path(spec.eval_data), model.inputs[0], classes=classes_of(model), resize=spec.resize, limit=spec.limit
    )


def classes_of(model: Model) -> int | None:
    """The number of classes of a classifier; ``None`` where the output does not say it."""
    shape = model.outputs[0].shape
    return int(shape[1]) if len(model.outputs) == 1 and len(shape) == 2 and shape[1] else None


def images_and_ranges(
    root: Path, model: Model, recipe: Recipe, *, resume: bool, progress: Progress
) -> tuple[Images, MeasuredRanges]:
    """The first half of a run in the output folder `root`: calibration images, and the ranges found on them."""
    images = images_in(root, model, recipe.calibration, resume=resume, progress=progress)
    measured = measure_ranges(
        model,
        images,
        recipe.quantization.ranges,
        percentile=recipe.quantization.percentile,
        device=recipe.calibration.device,
        progress=progress,
    )
    measured.observed.save(root / "ranges.json")
    return images, measured


def build_target(
    root: Path,
    model: Model,
    recipe: Recipe,
    target: Target,
    images: Images,
    measured: MeasuredRanges,
    *,
    validation: ValidationData | None = None,
    resume: bool,
    progress: Progress,
) -> Built:
    """The engine of one target in its folder under `root`; `validation` is what accuracy control looks at."""
    if resume:  # an engine that was not finished is built anew
        shutil.rmtree(root / target.name, ignore_errors=True)
    return build_engine(
        model,
        images,
        measured,
        target,
        root / target.name,
        settings_of(recipe),
        threads=recipe.run.threads or 1,
        seed=recipe.calibration.seed or 0,
        validation=validation,
        workdir=root / LEARNED / target.name,
        progress=progress,
    )


def deploy(
    recipe: Recipe,
    output: Path,
    *,
    force: bool = False,
    resume: bool = False,
    command: str = "",
    progress: Progress = SILENT,
) -> Outcome:
    """Run a recipe: load, synthesize, quantize for every target, verify, report.

    Args:
        recipe: What to do.
        output: The output folder (see :class:`~zsq_deploy.artifact.OutputFolder`).
        force: Replace the result of an earlier run.
        resume: Go on with an interrupted run.
        command: The command line, for the report.
        progress: Where to report progress.

    Returns:
        The outcome; its report and all files are in `output`.
    """
    started = time.monotonic()
    targets = [get_target(name) for name in recipe.targets]
    model = load_recipe_model(recipe)
    check_measurable(targets)
    recipe, advice = with_method(recipe, model, progress=progress)
    check_recipe(recipe, model, targets)
    data = evaluation_data(recipe, model)
    for note in model.notes:
        progress.say(note)
    with OutputFolder(output, force=force, resume=resume, owns=owned(recipe), identity=recipe.digest) as folder:
        root = folder.path
        recipe.dump(root / "recipe.resolved.yaml")
        images, measured = images_and_ranges(root, model, recipe, resume=resume, progress=progress)
        quality = set_quality(model, images, measured, recipe, data, progress=progress)
        validation = validation_data(recipe, model, images.holdout, classes=classes_of(model))
        evidence = Evidence(data, judged_images(recipe, images.holdout))
        sections: dict[str, Any] = {}
        for target in targets:
            built = build_target(
                root, model, recipe, target, images, measured, validation=validation, resume=resume, progress=progress
            )
            section = verify_engine(
                model,
                built.engine,
                evidence,
                measured.observed,
                root,
                threads=recipe.run.threads or 1,
                progress=progress,
            )
            section["engine"].update(candidates=built.candidates, seconds=built.seconds)
            section["notes"].extend(built.notes)
            sections[target.name] = section
            recipe = pinned(recipe, target.name, built.engine)
        report = finish(
            {
                "seconds": time.monotonic() - started,
                "model": model_section(model),
                "calibration": {
                    **calibration_section(model, images, measured, recipe),
                    "quality": quality,
                    "recommendation": advice.to_json() if advice is not None else None,
                },
                "evaluation": evidence.section(),
                "targets": sections,
                "environment": environment_section(threads=recipe.run.threads, command=command),
                "recipe": recipe.model_dump(mode="json"),
                "notes": list(model.notes),
            },
            gates_of(recipe),
        )
        write_report(report, root)
        recipe.dump(root / "recipe.resolved.yaml")  # now with what the search chose
        for name in (".synthesis", LEARNED):
            shutil.rmtree(root / name, ignore_errors=True)
        folder.finish()
    passed = all(gate.passed for gate in report.gates)
    return Outcome(report, output, passed)


def pinned(recipe: Recipe, target: str, engine: Engine) -> Recipe:
    """The recipe with what the search chose for a target, so that running it again gives the same engine.

    The search measures time, and no two measurements are equal; its choice is therefore part of the resolved recipe.
    """
    label = engine.choices.get("label")
    if not recipe.quantization.search or recipe.quantization.op_types is not None or not label:
        return recipe
    return recipe.replace({"quantization.choice": {**recipe.quantization.choice, target: str(label)}})


def write_report(report: Report, folder: Path) -> None:
    """``report.json``, and ``report.html`` drawn from it."""
    save_report(report, folder / "report.json")
    write_html(report, folder / "report.html")


def model_section(model: Model) -> dict[str, Any]:
    """``model`` of the report."""

    def info(spec: Any) -> dict[str, Any]:
        return {"name": spec.name, "shape": list(spec.shape), "dtype": str(spec.dtype)}

    folded = model.folded().graph
    return {
        "name": model.name,
        "source": model.source,
        "digest": model.digest,
        "inputs": [info(spec) for spec in model.inputs],
        "outputs": [info(spec) for spec in model.outputs],
        "nodes": len(model.graph.nodes),
        "parameters": sum(
            int(array.size)
            for name in model.graph.initializer_names
            if (array := model.graph.constant(name)) is not None and array.dtype.kind == "f"
        ),
        "macs": int(sum(node_macs(folded).values())),
        "batch_norms": len(model.batch_norms()),
        "operators": dict(Counter(node.op_type for node in model.graph).most_common()),
        "preprocess": {
            "mean": list(model.preprocess.mean) if model.preprocess.mean else None,
            "std": list(model.preprocess.std) if model.preprocess.std else None,
            "raw_pixels": model.preprocess.raw_pixels,
        },
    }


def calibration_section(model: Model, images: Images, measured: MeasuredRanges, recipe: Recipe) -> dict[str, Any]:
    """``calibration`` of the report."""
    shown = images.calibration if images.calibration is not None else None
    manifest = shown.manifest if shown is not None else None
    unexcited = {
        name: len(channels) for name, channels in (measured.statistics.unexcited() if measured.statistics else ())
    }
    ranges = measured.observed if isinstance(measured.ranges, str) else measured.ranges
    makers = {value: node.op_type for node in model.folded().graph for value in node.output}
    rows = []
    for name, (low, high) in ranges.items():
        seen = measured.observed.get(name)
        rows.append(
            {
                "name": name,
                "op": makers.get(name, "input"),
                "low": low,
                "high": high,
                "seen_low": seen[0] if seen and measured.statistics else None,
                "seen_high": seen[1] if seen and measured.statistics else None,
                "unexcited_channels": unexcited.get(name, 0),
            }
        )
    return {
        "method": images.method,
        "images": len(shown) if shown is not None else 0,
        "seconds": images.seconds,
        "peak_rss_bytes": (manifest.peak_rss_bytes or None) if manifest is not None else None,
        "peak_gpu_bytes": manifest.peak_gpu_bytes if manifest is not None else None,
        "device": manifest.device if manifest is not None and manifest.device else "cpu",
        "seed": recipe.calibration.seed,
        "digest": shown.digest if shown is not None else "",
        "parameters": dict(manifest.parameters) if manifest is not None else {},
        "preview": _preview(model, shown) if shown is not None else None,
        "range_method": measured.ranges if isinstance(measured.ranges, str) else measured.ranges.method,
        "ranges_seconds": measured.seconds,
        "ranges": rows,
        "notes": [*images.notes, *measured.notes],
    }


def set_quality(
    model: Model,
    images: Images,
    measured: MeasuredRanges,
    recipe: Recipe,
    real: EvalData | None,
    *,
    progress: Progress,
) -> dict[str, Any] | None:
    """``calibration.quality`` of the report; ``None`` for a method without images.

    `real` are the user's labelled images: ranges are compared with theirs, after everything about the ranges was decided.
    """
    if images.calibration is None:
        return None
    return quality_of(
        model,
        images.calibration,
        held_out=images.holdout,
        statistics=measured.statistics,
        real=real,
        device=recipe.calibration.device,
        progress=progress,
    ).to_json()


def _preview(model: Model, images: CalibrationSet) -> dict[str, Any] | None:
    first = next(images.take(0, min(24, len(images))).batches(24))[images.input_names[0]]
    if first.ndim != 4:
        return None
    space = model.preprocess
    return contact_sheet(first, total=len(images), mean=space.mean, std=space.std, raw_pixels=space.raw_pixels)
