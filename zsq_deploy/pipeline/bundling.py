"""From a finished engine in an output folder to a bundle for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zsq_deploy import __version__
from zsq_deploy.backends import get_backend
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.device.bundle import Contents, Sample, write_bundle
from zsq_deploy.errors import UsageError, ZsqError
from zsq_deploy.model import Graph
from zsq_deploy.pipeline.control import judged_images
from zsq_deploy.pipeline.deploy import evaluation_data, load_recipe_model
from zsq_deploy.pipeline.stages import open_engine, recipe_in
from zsq_deploy.pipeline.verification import Evidence, batch_for, output_steps, runtime_version, twin_predictor
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant import Ranges
from zsq_deploy.report.schema import load as load_report

__all__ = ["LIMITS", "bundle_target"]

LIMITS = {"twin": {"within_2_lsb": 0.995, "top1_agreement": 0.995}}
"""Least parity that an agent is to find: an engine that is further from its reference computes something else."""


def bundle_target(
    place: Path,
    output: Path,
    *,
    samples: int = 32,
    force: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Pack the engine in ``OUT/<target>`` with inputs and reference outputs (``zsq bundle``).

    Inputs are the labelled images that the recipe names, else the held-out synthetic ones.

    Args:
        place: A target's folder in an output folder of ``zsq deploy`` or ``zsq quantize``.
        output: The archive.
        samples: Number of inputs.
        force: Replace an archive that is there.
        progress: Where to report.

    Raises:
        ZsqError: There is no engine.
        UsageError: Its runtime is not one that the agent can run.
    """
    if samples < 1:
        raise UsageError(f"{samples} samples prove nothing", where="--samples", remedy="give 1 or more")
    root, name = place.resolve().parent, place.resolve().name
    recipe = recipe_in(root).resolved()
    engine = open_engine(root, name)
    model = load_recipe_model(recipe)
    holdout = CalibrationSet.open(root / "holdout")
    evidence = Evidence(evaluation_data(recipe, model), judged_images(recipe, holdout))
    graph = Graph.load(engine.qdq_path)
    backend = get_backend(engine.target)
    _, twin = twin_predictor(graph, dtype=torch.float64, device="cpu")
    here = backend.runner(engine.path, engine.target)
    try:
        integer: Any = backend.integer_reference(engine, on_target=True)
        integer.run(next(iter(evidence.batches(model, 1)))[0])
    except ZsqError:
        integer = None
    size, steps = batch_for(model), output_steps(model, graph, Ranges.load(root / "ranges.json"))

    def made() -> Iterator[Sample]:
        left = min(samples, evidence.images)
        with progress.task(f"reference outputs of {left} inputs", left) as task:
            for feeds, _ in evidence.batches(model, min(size, left)):
                part = {key: np.asarray(value)[:left] for key, value in feeds.items()} if model.dynamic_batch else feeds
                references = {"twin": _as_outputs(twin(part), steps), "workstation": _as_outputs(here.run(part), steps)}
                if integer is not None:
                    references["integer"] = _as_outputs(integer.run(part), steps)
                yield Sample(part, references)
                count = len(next(iter(part.values())))
                left -= count
                task.advance(count)
                if left <= 0:
                    return

    report = root / "report.json"
    expected: dict[str, Any] = {}
    if report.is_file():
        section = load_report(report).model_dump(mode="json", by_alias=True)["targets"].get(name, {})
        expected = {key: section.get(key) for key in ("parity", "latency", "device") if section.get(key)}
    contents = Contents(
        network=model.name,
        network_digest=model.digest,
        target=name,
        runtime=engine.target.runtime,
        runtime_version=runtime_version(engine.target.runtime),
        engine=engine.path,
        beside=(engine.weights_path,) if engine.weights_path is not None else (),
        session=engine.target.session,
        steps=steps,
        batch=1 if model.dynamic_batch else int(model.inputs[0].shape[0] or 1),
        limits=LIMITS,
        expected=expected,
        facts={
            "zsq_deploy": __version__,
            "inputs": evidence.section()["source"],
            "bits": str(engine.choices.get("bits", "")),
        },
    )
    return write_bundle(output, contents, made(), force=force)


def _as_outputs(outputs: Any, steps: Any) -> dict[str, Any]:
    """The outputs that have a step, in float32 where they are of another width, as engines give them."""
    return {
        name: np.asarray(outputs[name], np.float32) if np.asarray(outputs[name]).dtype == np.float64 else outputs[name]
        for name in steps
    }
