"""Calibration images from a network alone: one entry point for all methods.

Work goes batch by batch. A batch depends only on the network, the method's parameters, the seed, its own number and its size, so
runs can be cut anywhere: a finished batch is kept, the current one is checkpointed now and then and when the user interrupts, and
a resumed run gives bit for bit the set that an undisturbed one would have given.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.calib.calibration_set import CalibrationManifest, CalibrationSet
from zsq_deploy.calib.methods import METHODS, Method
from zsq_deploy.calib.parts import native
from zsq_deploy.calib.parts.checkpoint import Checkpoint
from zsq_deploy.calib.parts.engine import BatchRun, Objective, deterministic
from zsq_deploy.calib.parts.labels import LabelSpace, find_labels
from zsq_deploy.calib.parts.memory import steady_memory
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Preparation, Recipe, describe, resolve, stages
from zsq_deploy.calib.parts.sizing import batch_sizes, largest_batch
from zsq_deploy.calib.parts.terms.base import Context
from zsq_deploy.errors import CalibrationError, InterruptedRunError, UsageError
from zsq_deploy.model import Model
from zsq_deploy.model.graph import TensorSpec
from zsq_deploy.progress import SILENT, Progress, Task

__all__ = ["synthesize"]

# How often the current batch is checkpointed, in seconds.
_SAVE_EVERY = 30.0


def synthesize(
    model: Model,
    *,
    method: str = "zeroq",
    images: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    workdir: Path | None = None,
    resume: bool = False,
    progress: Progress = SILENT,
    parameters: Mapping[str, Any] | None = None,
    others: Sequence[Model] = (),
) -> CalibrationSet:
    """Make a calibration set for a network without any data.

    Args:
        model: The network, batch norms in place.
        method: A name in :data:`~zsq_deploy.calib.methods.METHODS` that makes images.
        images: How many.
        seed: Source of everything random, 0 or more. Same seed, device and thread count: the same set, bit for bit.
        device: Where it is computed; ``None``: ``cuda`` when there is one, else ``cpu``.
        batch_size: Images that are made together; ``None``: the method's own, or less where memory demands it.
        workdir: Folder for checkpoints; ``None``: an interrupted run cannot be resumed.
        resume: Go on from what an interrupted run left in `workdir`.
        progress: Where to report.
        parameters: The method's parameters, where they differ from its defaults.
        others: Further networks with the same input that the images are to fit as well, for methods that can use them (MixMix).

    Returns:
        The set, in memory, float32 in the network's input space, with a manifest that says how it was made. Its ``parameters`` hold the
        resolved recipe and, under ``outcome``, steps and losses of each batch.

    Raises:
        UsageError: The method or one of its parameters is unknown, or numbers make no sense.
        CalibrationError: The method cannot be applied to this network.
        InterruptedRunError: The user interrupted; the state is kept in `workdir`.
        StaleArtifactError: `resume` with a `workdir` of another run.
    """
    if method not in METHODS:
        raise UsageError(
            f"there is no synthesis method {method!r}", where="--method", remedy=f"choose one of {', '.join(METHODS)}"
        )
    chosen = METHODS[method]
    if images < 1:
        raise UsageError(f"{images} images were asked for", where="--images", remedy="ask for 1 or more")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"a batch of {batch_size} images makes no sense", where="batch_size", remedy="give 1 or more")
    if seed < 0:
        raise UsageError(f"the seed {seed} is negative", where="--seed", remedy="give 0 or more")
    if not chosen.images:
        raise CalibrationError(
            f"method {method!r} makes no images: {chosen.summary}",
            where="--method",
            remedy="hand your own images over as a calibration set"
            if method == "real"
            else "use its ranges directly (`zsq quantize`), or choose a method that makes images",
        )
    resolved = resolve(method, chosen.defaults, parameters)
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, notes = time.monotonic(), list[str]()
    requested: str | None = None
    if chosen.needs_bn:
        if model.batch_norms():
            _single_image_input(model, method)
        elif chosen.fallback is not None:
            note = (
                f"the network holds no batch-norm statistics (it never had any, or they were folded into the convolutions "
                f"before export), and {method!r} has nothing else to learn from. Used instead: {chosen.fallback!r} "
                f"({METHODS[chosen.fallback].summary}), because structured pictures excite filters more like "
                f"photographs do than noise does. If the network was trained with batch norm, export it with batch norm kept"
            )
            progress.say(note)
            notes.append(note)
            requested, chosen, resolved = method, METHODS[chosen.fallback], {}
    if chosen.run is None:
        arrays = _draw(chosen, model, images, seed, progress)
        outcome: dict[str, Any] = {} if requested is None else {"requested_method": requested}
        seconds = time.monotonic() - started
    else:
        if others and not chosen.several_networks:
            raise UsageError(
                f"method {method!r} looks at one network",
                where="others",
                remedy="leave them away, or use --method mixmix",
            )
        run = _Run(
            chosen, model, tuple(others), resolved, images, seed, place, batch_size, workdir, resume, progress, notes
        )
        arrays, outcome, seconds = run.optimise()
    manifest = CalibrationManifest.of(
        model,
        method=chosen.name,
        parameters={**resolved, **outcome},
        seed=seed,
        device=place.type if chosen.run is not None else "cpu",
        seconds=seconds,
        peak_rss_bytes=_peak_rss(),
        notes=notes,
    )
    return CalibrationSet.from_arrays(arrays, manifest)


def _single_image_input(model: Model, method: str) -> TensorSpec:
    if len(model.inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in model.inputs)
        raise CalibrationError(
            f"the network has {len(model.inputs)} inputs ({names}); method {method!r} optimises one, because batch-norm "
            "statistics do not say which input should account for what",
            where=model.name,
            remedy="use a method that draws each input by itself (gaussian, uniform), or hand over inputs of your own",
        )
    spec = model.inputs[0]
    if spec.dtype.kind != "f":
        raise CalibrationError(
            f"input {spec.name!r} takes {spec.dtype} values, which cannot be optimised by gradients",
            where=spec.name,
            remedy="hand over inputs of your own as a calibration set",
        )
    if method == "genie" and len(spec.shape) != 4:
        raise CalibrationError(
            f"input {spec.name!r} of shape {spec.shape} is no image; Genie's generator makes images",
            where=spec.name,
            remedy="use --method zeroq, which takes inputs of any shape",
        )
    return spec


def _draw(method: Method, model: Model, images: int, seed: int, progress: Progress) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of a method that does not look at the network."""
    assert method.baseline is not None
    pieces: dict[str, list[np.ndarray[Any, Any]]] = {spec.name: [] for spec in model.inputs}
    with progress.task(f"{method.name} images", images) as task:
        for offset in range(0, images, 16):
            count = min(16, images - offset)
            for stream, spec in enumerate(model.inputs):
                pieces[spec.name].append(
                    method.baseline(spec, count, seed=seed, preprocess=model.preprocess, offset=offset, stream=stream)
                )
            task.advance(count)
    return {name: np.concatenate(parts) for name, parts in pieces.items()}


@dataclass(frozen=True)
class _Run:
    """One synthesis by optimisation, all of its stages."""

    method: Method
    model: Model
    others: tuple[Model, ...]
    parameters: Mapping[str, Any]
    images: int
    seed: int
    device: torch.device
    batch_size: int | None
    workdir: Path | None
    resume: bool
    progress: Progress
    notes: list[str]

    def optimise(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any], float]:
        """Images by input name, the outcome for the manifest, and seconds."""
        assert self.method.run is not None
        recipes = stages(self.method.run(self.parameters))
        labels = self._labels(recipes)
        loops = self.device.type == "cpu" and native.kernels() is not None
        if self.device.type == "cpu" and not loops:
            self.progress.say(
                "no C compiler (cc, gcc, clang) was found: synthesis works, but takes up to twice as long"
            )
        outcomes, done, seconds = list[dict[str, Any]](), list[_Batch](), 0.0
        kept: list[Checkpoint] = []
        with deterministic(self.device), steady_memory(), _Interrupts() as interrupts:
            for number, recipe in enumerate(recipes):
                stage = _Stage(self, recipe, number, number + 1 == len(recipes), labels, loops, done)
                kept.append(stage.checkpoint)
                done, outcome = stage.run(interrupts)
                outcomes.append(outcome)
                seconds += sum(batch.plain["seconds"] for batch in done)
            for checkpoint in reversed(kept):  # the later ones lie in the first one's folder
                checkpoint.remove()
        spec = self.model.inputs[0]
        made = (
            torch.cat([batch.tensors["images"] for batch in done])[: self.images].numpy().astype(spec.dtype, copy=False)
        )
        if len(outcomes) == 1:
            return {spec.name: made}, outcomes[0], seconds
        return {spec.name: made}, {**outcomes[-1], "earlier_stages": outcomes[:-1]}, seconds

    def _labels(self, recipes: Sequence[Recipe]) -> LabelSpace | None:
        labels = find_labels(self.model.graph, self.model.outputs)
        if labels is None and any(recipe.needs_labels for recipe in recipes):
            raise CalibrationError(
                f"method {self.method.name!r} asks the network to see classes, and this network gives no class scores "
                f"(outputs: {', '.join(f'{spec.name} {list(spec.shape)}' for spec in self.model.outputs)})",
                where=self.model.name,
                remedy="use a method without labels: zeroq, genie",
            )
        return labels

    def checkpoint(self, stage: int, run: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint of one stage: the work folder itself for the first, folders in it for the later ones."""
        folder = self.workdir if self.workdir is None or stage == 0 else self.workdir / f"stage-{stage}"
        return Checkpoint(folder, run, resume=self.resume)


@dataclass(frozen=True)
class _Batch:
    """A finished batch: its tensors, and its numbers."""

    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]


class _Stage:
    """One stage of a run: one recipe, batch after batch."""

    def __init__(
        self,
        run: _Run,
        recipe: Recipe,
        number: int,
        last: bool,
        labels: LabelSpace | None,
        loops: bool,
        before: Sequence[_Batch],
    ) -> None:
        self.whole, self.recipe, self.number, self.last, self.before = run, recipe, number, last, before
        model = run.model
        spec = model.inputs[0]
        self.shape = spec.with_batch(1)[1:]
        space = InputSpace.of(spec, model.preprocess, run.device)
        hook = recipe.loss.hook if recipe.loss is not None else "bn_in"
        network = prepare(model, hook=hook, swing=bool(recipe.swing), fast=recipe.loss is not None)
        self.context = Context(
            model=model,
            network=network,
            spec=spec,
            space=space,
            labels=labels,
            device=run.device,
            dtype=torch.float32,
            seed=run.seed,
            others=run.others,
        )
        fixed = None if model.dynamic_batch else int(spec.shape[0] or 1)
        count = recipe.images(run.images, labels) if recipe.images is not None else run.images
        wanted = run.batch_size or recipe.batch_size
        # What is prepared may need the network, but not the sizes of batches; the sizes need the terms, which need what is prepared.
        record = {
            "model": model.digest,
            "method": run.method.name,
            "parameters": dict(run.parameters),
            "preprocess": {key: _plain(getattr(model.preprocess, key, None)) for key in ("mean", "std", "raw_pixels")},
            "seed": run.seed,
            "images": run.images,
            "batch_size": wanted,
            "device": run.device.type,
            "threads": torch.get_num_threads(),
            "native_loops": loops,
            "torch": torch.__version__,
        }
        if number:
            record["stage"] = number
        if run.others:
            record["others"] = [other.digest for other in run.others]
        self.checkpoint = run.checkpoint(number, record)
        if recipe.prepare is not None:
            prepared = self.checkpoint.load_prepared()
            if prepared is None:
                previous = [batch.tensors for batch in before]
                prepared = dict(recipe.prepare(Preparation(self.context, run.images, wanted, previous, run.progress)))
                self.checkpoint.save_prepared(prepared)
            self.context = replace(
                self.context, prepared={name: value.to(run.device) for name, value in prepared.items()}
            )
        self.objective = Objective(recipe, network, spec, space, device=run.device, context=self.context)
        largest, piece, note = largest_batch(self.objective, self.shape, wanted, run.device, fixed)
        if note:
            run.notes.append(note)
            run.progress.say(note)
        self.objective.piece = piece
        self.sizes = batch_sizes(count, largest, fixed or 1)
        self.loops = loops

    def run(self, interrupts: _Interrupts) -> tuple[list[_Batch], dict[str, Any]]:
        """All batches, finished, and what is to be said of them."""
        recipe, whole = self.recipe, self.whole
        title = f"{whole.method.name}: {sum(self.sizes)} images"
        if self.number or not self.last:
            title += f", stage {self.number + 1}"
        finished: list[_Batch] = []
        memory: Mapping[str, Tensor] = {}
        with whole.progress.task(title, len(self.sizes) * recipe.steps) as task:
            for index, size in enumerate(self.sizes):
                found = self.checkpoint.load_batch(index)
                if found is None:
                    found = self._batch(index, size, memory, interrupts, task)
                else:
                    task.advance(recipe.steps)
                prefix = "memory."
                memory = {
                    name.removeprefix(prefix): value.to(whole.device)
                    for name, value in found[0].items()
                    if name.startswith(prefix)
                }
                finished.append(_Batch(*found))
            if interrupts.asked:  # after the last step: all batches are kept
                raise _interrupted("after the last batch", self.checkpoint)
        plains = [batch.plain for batch in finished]
        outcome = {
            "recipe": describe(recipe),
            "outcome": {
                "batches": self.sizes,
                "piece": self.objective.piece,
                "steps": [plain["step"] for plain in plains],
                "first": [plain["first"] for plain in plains],
                "last": [plain["values"] for plain in plains],
                "batch_norms": len(self.context.network.layers),
                "threads": torch.get_num_threads(),
                "native_loops": self.loops,
            },
        }
        targets = [plain["targets"] for plain in plains if "targets" in plain]
        if targets:
            outcome["outcome"]["targets"] = targets
        whole.notes.append(_summary(recipe, plains))
        return finished, outcome

    def _batch(
        self, index: int, size: int, memory: Mapping[str, Tensor], interrupts: _Interrupts, task: Task
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        matching = len(self.before) > index and len(self.before[index].tensors["images"]) == size
        batch = BatchRun(
            self.objective,
            (size, *self.shape),
            self.whole.seed,
            index,
            memory=memory,
            previous=self.before[index].tensors if matching else {},
            stage=f"stage {self.number}/" if self.number else "",
        )
        return _one_batch(
            batch, self.checkpoint, interrupts, task, f"{index + 1}/{len(self.sizes)}", keep_parameters=not self.last
        )


def _one_batch(
    batch: BatchRun,
    checkpoint: Checkpoint,
    interrupts: _Interrupts,
    task: Task,
    title: str,
    *,
    keep_parameters: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Bring one batch to its end, from where a checkpoint left it."""
    steps = batch.objective.recipe.steps
    before, first = 0.0, dict[str, float]()
    state = checkpoint.load_current(batch.index)
    if state is not None:
        batch.load(*state)
        before, first = state[1]["seconds"], state[1]["first"]
        task.advance(batch.step)
    started = saved = time.monotonic()
    whole = True

    def record() -> dict[str, Any]:
        return {"seconds": before + time.monotonic() - started, "first": first}

    def keep() -> None:
        tensors, plain = batch.state()
        checkpoint.save_current(tensors, {**plain, **record()})

    try:
        while not batch.finished:
            whole = False
            values = batch.advance()
            first = first or values
            whole = True
            task.advance(1, batch=title, **values)
            if interrupts.asked:
                raise KeyboardInterrupt
            if checkpoint.folder is not None and time.monotonic() - saved > _SAVE_EVERY:
                keep()
                saved = time.monotonic()
    except KeyboardInterrupt as interrupt:
        if whole:  # in the middle of a step the state is torn; the latest checkpoint stands
            keep()
        raise _interrupted(f"in batch {title} at step {batch.step} of {steps}", checkpoint) from interrupt
    task.advance(steps - batch.step)
    tensors, plain = batch.state()
    kept = {"images": batch.images()}
    kept.update({f"memory.{name}": value for name, value in batch.left_behind().items()})
    if keep_parameters:
        kept.update({name: value.cpu() for name, value in tensors.items() if name.startswith("parameters.")})
    said = {"targets": batch.targets.classes.tolist()} if batch.targets is not None else {}
    found = kept, {**plain, **said, **record()}
    checkpoint.save_batch(batch.index, *found)
    return found


def _interrupted(when: str, checkpoint: Checkpoint) -> InterruptedRunError:
    if checkpoint.folder is None:
        return InterruptedRunError(
            f"interrupted {when}", remedy="start again (there was no folder to keep the state in)"
        )
    return InterruptedRunError(
        f"interrupted {when}; what was done is kept",
        where=str(checkpoint.folder),
        remedy="run the same command with --resume to go on; the result will be the same as without the interruption",
    )


def _summary(recipe: Recipe, batches: Sequence[Mapping[str, Any]]) -> str:
    steps = [batch["step"] for batch in batches]
    early = sum(count < recipe.steps for count in steps)
    first = float(np.mean([batch["first"].get("loss", math.nan) for batch in batches]))
    last = float(np.mean([batch["values"].get("loss", math.nan) for batch in batches]))
    text = f"{'batch-norm distance' if not recipe.terms else 'loss'} (mean over {len(batches)} batches) {first:.4g} at the first step, {last:.4g} at the last"
    if early and recipe.stop is not None:
        text += (
            f"; {early} of {len(batches)} batches ended early, after {min(steps)} to {max(steps)} of at most {recipe.steps} "
            f"steps, when the loss had not fallen by {recipe.stop.threshold:.1%} for {recipe.stop.patience} steps"
        )
    return text


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, np.ndarray)) else value


class _Interrupts:
    """Ctrl-C is noted and answered between two steps, where the state is whole; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
