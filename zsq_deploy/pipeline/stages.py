"""The job in pieces: make a set, build engines, measure finished engines again, and the embedded example."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq_deploy.artifact import OutputFolder, digest_file, read_json, write_json
from zsq_deploy.backends import Engine, get_target
from zsq_deploy.calib import CalibrationSet, exporters
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.quality import Quality
from zsq_deploy.calib.recommend import Recommendation
from zsq_deploy.demo import DEMO_MEAN, DEMO_STD, train_demo
from zsq_deploy.errors import StaleArtifactError, UsageError, ZsqError
from zsq_deploy.pipeline.auto import with_method
from zsq_deploy.pipeline.calibration import make_images, other_networks
from zsq_deploy.pipeline.checks import check_device, check_method, check_recipe
from zsq_deploy.pipeline.control import judged_images, validation_data
from zsq_deploy.pipeline.deploy import (
    LEARNED,
    Outcome,
    build_target,
    classes_of,
    deploy,
    evaluation_data,
    gates_of,
    images_and_ranges,
    load_recipe_model,
    model_section,
    owned,
    pinned,
    write_report,
)
from zsq_deploy.pipeline.quality import quality_of, real_images
from zsq_deploy.pipeline.verification import Evidence, measure_latency, verify_engine
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant import Ranges
from zsq_deploy.recipe import Recipe
from zsq_deploy.report.build import environment_section, finish
from zsq_deploy.report.schema import load as load_report

__all__ = [
    "EXPORTS",
    "MadeSet",
    "bench_folder",
    "open_engine",
    "quantize_only",
    "recipe_in",
    "run_demo",
    "synthesize_set",
    "verify_folder",
]

EXPORTS = {"test-data": "test_data", "polygraphy": "inputs.json", "npy": "npy"}
"""Formats for other tools, and what they are called in the output folder."""


@dataclass(frozen=True)
class MadeSet:
    """What ``zsq synth`` gives.

    Attributes:
        images: The set, in its folder.
        quality: How good it is.
        recommendation: Why its method was chosen, if it was.
    """

    images: CalibrationSet
    quality: Quality
    recommendation: Recommendation | None = None


def synthesize_set(
    recipe: Recipe,
    output: Path,
    *,
    export: str | None = None,
    real_data: Path | None = None,
    resize: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
) -> MadeSet:
    """Make a calibration set in `output` and measure it (``zsq synth``).

    Args:
        recipe: What to make.
        output: The output folder.
        export: Also write it for another tool, in a folder beside the shards.
        real_data: Images of the user to compare the set's ranges with, once it is made.
        resize: Scale those images to the network's input.
        force: Replace an earlier result.
        resume: Go on with an interrupted run.
        progress: Where to report.
    """
    if export is not None and export not in EXPORTS:
        raise UsageError(
            f"there is no export {export!r}", where="--export", remedy=f"choose one of {', '.join(EXPORTS)}"
        )
    check_method(recipe)
    check_device(recipe.calibration.device)
    model = load_recipe_model(recipe)
    recipe, recommendation = with_method(recipe, model, progress=progress)
    chosen = recipe.calibration.method
    if not METHODS[chosen].images:
        raise UsageError(
            f"method {chosen!r} makes no images",
            where="--method",
            remedy="give your images to zsq deploy or zsq quantize as a calibration set (--calibration)"
            if chosen == "real"
            else "use it with zsq deploy or zsq quantize, or choose a method that makes images",
        )
    real = real_images(real_data, model, resize=resize) if real_data is not None else None
    owns = ("calibration", "quality.json", ".synthesis", *EXPORTS.values())
    with OutputFolder(output, force=force, resume=resume, owns=owns, identity=recipe.digest) as folder:
        work = folder.path / ".synthesis"
        images = make_images(
            model,
            method=recipe.calibration.method,
            images=recipe.calibration.images,
            holdout=0,
            seed=recipe.calibration.seed or 0,
            device=recipe.calibration.device,
            parameters=recipe.calibration.parameters,
            workdir=work,
            resume=resume,
            others=other_networks(recipe.calibration, model),
            workers=recipe.calibration.workers,
            precision=recipe.calibration.precision,
            compiled=recipe.calibration.compile,
            progress=progress,
        )
        assert images.calibration is not None
        saved = images.calibration.save(folder.path / "calibration", force=True)
        if export is not None:
            exporters.export(saved, export, folder.path / EXPORTS[export])
        quality = quality_of(model, saved, real=real, device=recipe.calibration.device, progress=progress)
        write_json(folder.path / "quality.json", quality.to_json())
        shutil.rmtree(work, ignore_errors=True)
        folder.finish()
    return MadeSet(saved, quality, recommendation)


def quantize_only(
    recipe: Recipe, output: Path, *, force: bool = False, resume: bool = False, progress: Progress = SILENT
) -> dict[str, Engine]:
    """Build the engines of a recipe without measuring them (``zsq quantize``)."""
    targets = [get_target(name) for name in recipe.targets]
    model = load_recipe_model(recipe)
    recipe, _ = with_method(recipe, model, progress=progress)
    check_recipe(recipe, model, targets)
    built: dict[str, Engine] = {}
    with OutputFolder(output, force=force, resume=resume, owns=owned(recipe), identity=recipe.digest) as folder:
        root = folder.path
        recipe.dump(root / "recipe.resolved.yaml")
        images, measured = images_and_ranges(root, model, recipe, resume=resume, progress=progress)
        validation = validation_data(recipe, model, images.holdout, classes=classes_of(model))
        for target in targets:
            done = build_target(
                root, model, recipe, target, images, measured, validation=validation, resume=resume, progress=progress
            )
            built[target.name] = done.engine
            recipe = pinned(recipe, target.name, built[target.name])
        recipe.dump(root / "recipe.resolved.yaml")  # now with what the search chose
        for name in (".synthesis", LEARNED):
            shutil.rmtree(root / name, ignore_errors=True)
        folder.finish()
    return built


_PARTS = ("engine", "weights", "qdq", "float", "vendor", "vendor_weights")
"""The files that a manifest can name; each with its digest."""


def open_engine(folder: Path, name: str) -> Engine:
    """A finished engine of an output folder, checked against its manifest.

    Raises:
        ZsqError: There is none.
        StaleArtifactError: A file was changed since it was written.
    """
    place = folder / name
    if not (place / "manifest.json").is_file():
        raise ZsqError(
            f"the folder holds no engine for {name!r}",
            where=str(folder),
            remedy="name the output folder of zsq deploy or zsq quantize, and a target that was built there",
        )
    manifest = read_json(place / "manifest.json")
    for part in _PARTS:
        if part not in manifest:
            continue
        file = place / manifest[part]["file"]
        if not file.is_file() or digest_file(file) != manifest[part]["sha256"]:
            raise StaleArtifactError(
                "the file is missing or was changed after it was written",
                where=str(file),
                remedy="build it again with zsq deploy or zsq quantize",
            )
    files = {part: place / manifest[part]["file"] for part in _PARTS if part in manifest}
    return Engine(
        path=files["engine"],
        qdq_path=files.get("qdq", files["engine"]),
        target=get_target(name),
        float_path=files["float"],
        choices=manifest.get("choices", {}),
        weights_path=files.get("weights"),
        vendor_path=files.get("vendor"),
    )


def recipe_in(folder: Path) -> Recipe:
    """The resolved recipe of an output folder.

    Raises:
        ZsqError: It is no output folder.
    """
    file = folder / "recipe.resolved.yaml"
    if not file.is_file():
        raise ZsqError(
            "this is no output folder: it holds no recipe.resolved.yaml",
            where=str(folder),
            remedy="name the output folder of zsq deploy or zsq quantize",
        )
    return Recipe.load(file)


def verify_folder(
    folder: Path,
    *,
    targets: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    command: str = "",
    progress: Progress = SILENT,
) -> Outcome:
    """Measure the engines of an output folder again and write its report anew (``zsq verify``).

    Args:
        folder: Output folder of ``zsq deploy`` or ``zsq quantize``.
        targets: Only these; ``None``: all of the recipe.
        changes: Changes to the recipe, by dotted names (evaluation data, gates, threads).
        command: The command line, for the report.
        progress: Where to report progress.
    """
    with OutputFolder.reopen(folder):
        return _verify_finished(folder, targets, changes, command, progress)


def _verify_finished(
    folder: Path,
    targets: Sequence[str] | None,
    changes: Mapping[str, Any] | None,
    command: str,
    progress: Progress,
) -> Outcome:
    started = time.monotonic()
    recipe = recipe_in(folder).replace(dict(changes or {})).resolved()
    names = list(targets or recipe.targets)
    engines = {name: open_engine(folder, name) for name in names}
    model = load_recipe_model(recipe)
    data = evaluation_data(recipe, model)
    holdout = CalibrationSet.open(folder / "holdout")
    observed = Ranges.load(folder / "ranges.json")
    evidence = Evidence(data, judged_images(recipe, holdout))
    sections = {}
    for name, engine in engines.items():
        sections[name] = verify_engine(
            model, engine, evidence, observed, folder, threads=recipe.run.threads or 1, progress=progress
        )
    old = folder / "report.json"
    calibration: dict[str, Any] = {
        "method": holdout.manifest.method,
        "images": 0,
        "seconds": holdout.manifest.seconds or 0.0,
        "notes": ["the engines were verified later than they were built"],
    }
    if old.is_file():
        earlier = load_report(old).model_dump(mode="json", by_alias=True)
        calibration = earlier["calibration"]
        for name, section in sections.items():
            before = earlier["targets"].get(name, {})
            section["engine"].update(candidates=before.get("engine", {}).get("candidates", []))
            if before.get("engine", {}).get("sha256") == section["engine"]["sha256"]:
                section["devices"] = before.get("devices", {})  # the same engine: what devices said of it still holds
        sections = {**{k: v for k, v in earlier["targets"].items() if k not in sections}, **sections}
    elif (folder / "calibration").is_dir():
        made = CalibrationSet.open(folder / "calibration")
        calibration.update(method=made.manifest.method, images=len(made), seconds=made.manifest.seconds or 0.0)
    report = finish(
        {
            "seconds": time.monotonic() - started,
            "model": model_section(model),
            "calibration": calibration,
            "evaluation": evidence.section(),
            "targets": sections,
            "environment": environment_section(threads=recipe.run.threads, command=command),
            "recipe": recipe.model_dump(mode="json"),
            "notes": list(model.notes),
        },
        gates_of(recipe),
    )
    write_report(report, folder)
    return Outcome(report, folder, all(gate.passed for gate in report.gates))


def bench_folder(
    folder: Path,
    *,
    targets: Sequence[str] | None = None,
    threads: int = 1,
    rounds: int = 10,
    progress: Progress = SILENT,
) -> dict[str, dict[str, Any]]:
    """Latency of the engines of an output folder: ``targets.<T>.latency`` by target (``zsq bench``)."""
    recipe = recipe_in(folder)
    sample = next(CalibrationSet.open(folder / "holdout").batches(1))
    return {
        name: measure_latency(open_engine(folder, name), sample, threads=threads, rounds=rounds, progress=progress)
        for name in (targets or recipe.targets)
    }


def run_demo(
    output: Path,
    *,
    method: str = "zeroq",
    images: int = 48,
    targets: Sequence[str] = ("ort-x86-vnni",),
    seed: int = 0,
    threads: int = 1,
    force: bool = False,
    command: str = "",
    progress: Progress = SILENT,
) -> Outcome:
    """Train the embedded example beside `output` and deploy it.

    The weights and the held-out digits go to ``<output>-network/``: they are inputs of the run, not results of it.
    """
    network = output.with_name(output.name + "-network")
    with OutputFolder(network, force=force, owns=("digits.safetensors", "digits_heldout.npz")) as place:
        trained = train_demo(place.path, seed=seed, progress=progress)
        place.finish()
    recipe = Recipe.of(
        {
            "model": {
                "source": "zsq_deploy.demo:digits_network",
                "weights": str(trained.weights),
                "input_shape": (1, 1, 32, 32),
                "mean": DEMO_MEAN,
                "std": DEMO_STD,
            },
            "calibration": {
                "method": method,
                "images": images,
                "holdout": 16,
                # A small network learns its statistics quickly; the example is to end within three minutes anywhere.
                "parameters": {"steps": 100} if method == "zeroq" else {},
            },
            "targets": list(targets),
            "verification": {"eval_data": str(trained.eval_data)},
            "run": {"seed": seed, "threads": threads},
        }
    ).resolved()
    return deploy(recipe, output, force=force, command=command, progress=progress)
