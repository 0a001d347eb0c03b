"""A synthesis as a run: stages, batches, checkpoints, interruptions.

Work goes batch by batch. A batch depends only on the network, the method's parameters, the seed, its own number and its size (and, for methods
that learn from finished batches, on the batches before it), so runs can be cut anywhere: a finished batch is kept, the current one is checkpointed
now and then and when the user interrupts, and a resumed run gives bit for bit the images that an undisturbed one would have given.

Only one batch is in memory at a time if there is a folder to keep the finished ones in.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.calib.fitting import advice
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts import native
from zsq_deploy.calib.parts.checkpoint import Checkpoint
from zsq_deploy.calib.parts.engine import BatchRun, Objective, deterministic
from zsq_deploy.calib.parts.labels import LabelSpace, find_labels
from zsq_deploy.calib.parts.memory import Peak, steady_memory
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.precision import Precision
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Preparation, Recipe, describe, stages
from zsq_deploy.calib.parts.sizing import batch_sizes, largest_batch
from zsq_deploy.calib.parts.terms.base import Context
from zsq_deploy.errors import CalibrationError, InterruptedRunError
from zsq_deploy.model import Model
from zsq_deploy.progress import Progress, Task

__all__ = ["Interrupts", "Run", "Stage", "Stop", "interrupted", "one_batch"]

# How often the current batch is checkpointed, in seconds.
_SAVE_EVERY = 30.0


@dataclass(frozen=True)
class Run:
    """One synthesis by optimisation, all of its stages.

    Attributes:
        method: Name of the method.
        model: The network.
        others: Further networks that the images are to fit.
        parameters: The method's parameters, resolved.
        images: Images asked for.
        seed: Source of everything random.
        device: Where it is computed.
        batch_size: Most images that are made together; ``None``: the method's own.
        workdir: Folder for checkpoints, the work folder itself for the first stage and folders in it for the later ones.
        resume: Go on from what is there.
        workers: Processes that make batches at the same time; 1: this one.
        threads: Threads of each.
        progress: Where to report.
        notes: What a reader of the result should know; lines are added.
        precision: What the network's convolutions and matrix products read.
        compiled: Compile the network's forward pass.
    """

    method: str
    model: Model
    others: tuple[Model, ...]
    parameters: Mapping[str, Any]
    images: int
    seed: int
    device: torch.device
    batch_size: int | None
    workdir: Path | None
    resume: bool
    workers: int
    threads: int
    progress: Progress
    notes: list[str]
    precision: Precision = "float32"
    compiled: bool = False

    def recipes(self) -> tuple[Recipe, ...]:
        """The stages of the method."""
        make = METHODS[self.method].run
        assert make is not None
        return stages(make(self.parameters))

    def optimise(self) -> tuple[Stage, dict[str, Any], float, Peak]:
        """Make all batches.

        Returns:
            The last stage, whose batches are the images; what is to be said of the run in a manifest; seconds of computing; and the most memory that
            workers held beside this process.
        """
        recipes = self.recipes()
        self.labels(recipes)
        loops = self.device.type == "cpu" and native.kernels() is not None
        if self.device.type == "cpu" and not loops:
            self.progress.say(
                "no C compiler (cc, gcc, clang) was found: synthesis works, but takes up to twice as long"
            )
        outcomes, seconds, before, peak = list[dict[str, Any]](), 0.0, None, Peak()
        with deterministic(self.device), steady_memory(), Interrupts() as interrupts:
            for number in range(len(recipes)):
                stage = Stage(self, number, before)
                outcomes.append(stage.run(interrupts))
                seconds += sum(plain["seconds"] for plain in stage.plains)
                peak = peak.or_later(stage.workers)
                before = stage
        assert before is not None
        if len(outcomes) == 1:
            return before, outcomes[0], seconds, peak
        return before, {**outcomes[-1], "earlier_stages": outcomes[:-1]}, seconds, peak

    def labels(self, recipes: Sequence[Recipe]) -> LabelSpace | None:
        """The network's classes.

        Raises:
            CalibrationError: It has none, and the method needs them.
        """
        labels = find_labels(self.model.graph, self.model.outputs)
        if labels is None and any(recipe.needs_labels for recipe in recipes):
            raise CalibrationError(
                f"method {self.method!r} asks the network to see classes, and this network gives no class scores "
                f"(outputs: {', '.join(f'{spec.name} {list(spec.shape)}' for spec in self.model.outputs)})",
                where=self.model.name,
                remedy=advice(self.model),
            )
        return labels


class _Batches(Sequence[Mapping[str, Tensor]]):
    """The finished batches of a stage, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, count: int) -> None:
        self._checkpoint, self._count = checkpoint, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._count))]
        found = self._checkpoint.load_batch(range(self._count)[index])
        assert found is not None
        return found[0]


class Stop(Protocol):
    """Says whether the user wants to stop."""

    @property
    def asked(self) -> bool:
        """Whether they do."""


class Stage:
    """One stage of a run: one recipe, batch after batch.

    Args:
        run: The run.
        number: Of the stage, from 0.
        before: The stage before, finished.

    Attributes:
        sizes: Images in each batch.
        plains: The numbers of each finished batch.
        workers: The most memory that workers held.
    """

    def __init__(self, run: Run, number: int, before: Stage | None) -> None:
        recipes = run.recipes()
        self.whole, self.number, self.before = run, number, before
        self.recipe = recipe = recipes[number]
        self.last = number + 1 == len(recipes)
        self.plains: list[Mapping[str, Any]] = []
        self.workers = Peak()
        model, spec = run.model, run.model.inputs[0]
        self.shape = spec.with_batch(1)[1:]
        labels = run.labels(recipes)
        space = InputSpace.of(spec, model.preprocess, run.device)
        hook = recipe.loss.hook if recipe.loss is not None else "bn_in"
        network = prepare(model, hook=hook, swing=bool(recipe.swing), fast=recipe.loss is not None)
        context = Context(
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
        wanted = recipe.batch_size if recipe.single else run.batch_size or recipe.batch_size
        self.loops = run.device.type == "cpu" and native.kernels() is not None
        self.checkpoint = Checkpoint(self._folder(), self._record(wanted), resume=run.resume)
        if recipe.prepare is not None:
            prepared = self.checkpoint.load_prepared()
            if prepared is None:
                previous = () if before is None else before.batches
                made = recipe.prepare(Preparation(context, run.images, wanted, previous, run.progress))
                # As it comes back from a file: the layout of memory decides the order of sums.
                prepared = {name: value.detach().contiguous() for name, value in made.items()}
                self.checkpoint.save_prepared(prepared)
            context = replace(context, prepared={name: value.to(run.device) for name, value in prepared.items()})
        self.context = context
        self.objective = Objective(
            recipe, network, spec, space, device=run.device, context=context, precision=run.precision
        )
        fixed = None if model.dynamic_batch else int(spec.shape[0] or 1)
        largest, piece, note = largest_batch(
            self.objective, self.shape, wanted, run.device, fixed, share=1 / run.workers
        )
        if note:
            run.notes.append(note)
            run.progress.say(note)
        self.objective.piece = piece
        count = recipe.images(run.images, labels) if recipe.images is not None else run.images
        self.sizes = batch_sizes(count, largest, fixed or 1)
        if recipe.single:
            self.sizes = [largest]
        elif recipe.follows and before is not None:
            self.sizes = list(before.sizes)
        if run.compiled and recipe.steps:
            self._compile()

    def _compile(self) -> None:
        """Compile the network's forward pass for this stage, or say why not."""
        run = self.whole
        if self.recipe.swing:
            note = f"{run.method}: swing convolution moves maps by other amounts in every step, so this stage is not compiled (--param swing=0 is)"
            run.notes.append(note)
            run.progress.say(note)
            return
        self.objective.compile((min(self.objective.piece or self.sizes[0], self.sizes[0]), *self.shape))

    def _folder(self) -> Path | None:
        folder = self.whole.workdir
        return folder if folder is None or self.number == 0 else folder / f"stage-{self.number}"

    def _record(self, batch_size: int) -> dict[str, Any]:
        """What the run is; a checkpoint of another one is refused."""
        run = self.whole
        preprocess = run.model.preprocess
        record = {
            "model": run.model.digest,
            "method": run.method,
            "parameters": dict(run.parameters),
            "preprocess": {key: _plain(getattr(preprocess, key, None)) for key in ("mean", "std", "raw_pixels")},
            "seed": run.seed,
            "images": run.images,
            "batch_size": batch_size,
            "device": run.device.type,
            "threads": run.threads,
            "workers": run.workers,
            "native_loops": self.loops,
            "torch": torch.__version__,
        }
        if run.precision != "float32":
            record["precision"] = run.precision
        if run.compiled:
            record["compiled"] = True
        if self.number:
            record["stage"] = self.number
        if run.others:
            record["others"] = [other.digest for other in run.others]
        return record

    @property
    def batches(self) -> Sequence[Mapping[str, Tensor]]:
        """The finished batches: ``images`` in the network's input space, and ``parameters.*`` where a later stage needs them."""
        return _Batches(self.checkpoint, len(self.sizes))

    def run(self, interrupts: Stop) -> dict[str, Any]:
        """Make all batches; what is to be said of them."""
        run, recipe = self.whole, self.recipe
        title = f"{run.method}: {sum(self.sizes)} images"
        if self.number or not self.last:
            title += f", stage {self.number + 1}"
        left = [index for index in range(len(self.sizes)) if not self.checkpoint.has_batch(index)]
        with run.progress.task(title, len(self.sizes) * recipe.steps) as task:
            task.advance((len(self.sizes) - len(left)) * recipe.steps)
            if run.workers > 1 and recipe.remember is None and len(left) > 1:
                from zsq_deploy.calib.workers import make_batches

                self.workers = make_batches(self, left, interrupts, task)
            else:
                if run.workers > 1 and recipe.remember is not None:
                    run.notes.append(f"{run.method} learns from finished batches, so one process made them all")
                for index in left:
                    self.make(index, interrupts, task)
            if interrupts.asked:  # after the last step: all batches are kept
                raise interrupted("after the last batch", self.checkpoint)
        for index in range(len(self.sizes)):
            found = self.checkpoint.load_batch(index)
            assert found is not None
            self.plains.append(found[1])
        outcome: dict[str, Any] = {
            "batches": self.sizes,
            "piece": self.objective.piece,
            "steps": [plain["step"] for plain in self.plains],
            "first": [plain["first"] for plain in self.plains],
            "last": [plain["values"] for plain in self.plains],
            "batch_norms": len(self.context.network.layers),
            "threads": run.threads,
            "native_loops": self.loops,
            "precision": run.precision,
            "compiled": run.compiled and not recipe.swing and recipe.steps > 0,
        }
        targets = [plain["targets"] for plain in self.plains if "targets" in plain]
        if targets:
            outcome["targets"] = targets
        run.notes.append(_summary(recipe, self.plains))
        return {"recipe": describe(recipe), "outcome": outcome}

    def make(self, index: int, interrupts: Stop, task: Task) -> None:
        """Make one batch and keep it."""
        size, previous = self.sizes[index], dict[str, Tensor]()
        if self.before is not None and len(self.before.sizes) > index and self.before.sizes[index] == size:
            previous = dict(self.before.batches[index])
        batch = BatchRun(
            self.objective,
            (size, *self.shape),
            self.whole.seed,
            index,
            memory=self._memory(index),
            previous=previous,
            stage=f"stage {self.number}/" if self.number else "",
            offset=sum(self.sizes[:index]),
        )
        title = f"{index + 1}/{len(self.sizes)}"
        one_batch(batch, self.checkpoint, interrupts, task, title, keep_parameters=not self.last)

    def _memory(self, index: int) -> dict[str, Tensor]:
        """What the batches before `index` left."""
        if self.recipe.remember is None or index == 0:
            return {}
        prefix = "memory."
        return {
            name.removeprefix(prefix): value.to(self.whole.device)
            for name, value in self.batches[index - 1].items()
            if name.startswith(prefix)
        }

    def images(self) -> Iterator[np.ndarray[Any, Any]]:
        """The images asked for, batch after batch, in the network's input space and type."""
        left, dtype = self.whole.images, self.whole.model.inputs[0].dtype
        for batch in self.batches:
            part = batch["images"][:left].numpy().astype(dtype, copy=False)
            left -= len(part)
            if len(part):
                yield part

    def forget(self) -> None:
        """Remove the checkpoints of this stage and those before it."""
        self.checkpoint.remove()
        if self.before is not None:
            self.before.forget()


def one_batch(
    batch: BatchRun,
    checkpoint: Checkpoint,
    interrupts: Stop,
    task: Task,
    title: str,
    *,
    keep_parameters: bool = False,
) -> None:
    """Bring one batch to its end, from where a checkpoint left it, and keep it.

    Raises:
        InterruptedRunError: The user wants to stop; the state is kept.
    """
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
        checkpoint.save_current(batch.index, tensors, {**plain, **record()})

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
        raise interrupted(f"in batch {title} at step {batch.step} of {steps}", checkpoint) from interrupt
    task.advance(steps - batch.step)
    tensors, plain = batch.state()
    kept = {"images": batch.images()}
    kept.update({f"memory.{name}": value for name, value in batch.left_behind().items()})
    if keep_parameters:
        kept.update({name: value.cpu() for name, value in tensors.items() if name.startswith("parameters.")})
    said = {"targets": batch.targets.classes.tolist()} if batch.targets is not None else {}
    checkpoint.save_batch(batch.index, kept, {**plain, **said, **record()})


def interrupted(when: str, checkpoint: Checkpoint) -> InterruptedRunError:
    """The error that says how to go on."""
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
    if recipe.steps == 0:
        return f"drawn in {len(batches)} batches from what the stage before learnt"
    steps = [batch["step"] for batch in batches]
    early = sum(count < recipe.steps for count in steps)
    first = float(np.mean([batch["first"].get("loss", math.nan) for batch in batches]))
    last = float(np.mean([batch["values"].get("loss", math.nan) for batch in batches]))
    what = "loss" if recipe.terms else "batch-norm distance"
    text = f"{what} (mean over {len(batches)} batches) {first:.4g} at the first step, {last:.4g} at the last"
    if early and recipe.stop is not None:
        text += (
            f"; {early} of {len(batches)} batches ended early, after {min(steps)} to {max(steps)} of at most {recipe.steps} "
            f"steps, when the loss had not fallen by {recipe.stop.threshold:.1%} for {recipe.stop.patience} steps"
        )
    return text


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, np.ndarray)) else value


class Interrupts:
    """Ctrl-C is noted and answered between two steps, where the state is whole; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
