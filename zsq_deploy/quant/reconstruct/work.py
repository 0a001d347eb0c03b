"""All blocks one after the other: float targets, learning, quantized inputs of the next block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.progress import Progress, Task
from zsq_deploy.quant.reconstruct.blocks import Block, find_blocks
from zsq_deploy.quant.reconstruct.cache import Cache
from zsq_deploy.quant.reconstruct.checkpoint import Checkpoints
from zsq_deploy.quant.reconstruct.images import ImageSet, with_shifted_images
from zsq_deploy.quant.reconstruct.learn import BlockLearner, channel_axis, word
from zsq_deploy.quant.reconstruct.presets import Preset, Tuning
from zsq_deploy.quant.reconstruct.runner import Runner
from zsq_deploy.quant.reconstruct.state import State
from zsq_deploy.quant.reconstruct.template import Template
from zsq_deploy.quant.reconstruct.tuning import Tuner
from zsq_deploy.quant.statistics import micro_batches

__all__ = ["BlockReport", "Learn", "Work"]

Array = npt.NDArray[Any]
Learn = Callable[[BlockLearner, Cache, int, Task], float]

_MICRO = 32  # images that go through a block at a time where nothing is learned


@dataclass(frozen=True)
class BlockReport:
    """How a block went.

    Attributes:
        name: Of the block.
        layers: Nodes with weights in it.
        before: Loss on all images with the weights and scales that learning started from (inputs already quantized).
        after: Loss with what was learned, rounding decided.
        seconds: Wall time.
    """

    name: str
    layers: tuple[str, ...]
    before: float
    after: float
    seconds: float


class Work:
    """One reconstruction on its way.

    Args:
        template: The network.
        state: The numbers to start from.
        preset: The schedule.
        seed: Of everything random.
        device: Where to compute.
        cache: Empty, for as many images as will be given.
        checkpoints: Where to keep what was learned; ``None``: nowhere.
        progress: Where to report.
        learn: How a block learns; by default :meth:`BlockLearner.run`.
        fixed: Groups of sites whose scale is not learned.

    Attributes:
        state: The numbers so far.
    """

    def __init__(
        self,
        template: Template,
        state: State,
        preset: Preset,
        seed: int,
        device: torch.device,
        cache: Cache,
        checkpoints: Checkpoints | None,
        progress: Progress,
        learn: Learn = BlockLearner.run,
        fixed: frozenset[str] = frozenset(),
    ) -> None:
        self.template, self.state, self.preset, self.seed = template, state, preset, seed
        self.cache, self.checkpoints, self.progress = cache, checkpoints, progress
        self.runner = Runner(template, device)
        self.device = device
        self.axes: dict[str, int | None] = {}
        self.images = 0
        self._learn = learn
        self._fixed = fixed

    def run(self, images: ImageSet) -> list[BlockReport]:
        """All blocks, one after the other."""
        self.images = len(images)
        first = next(images.batches(1))
        self.axes = self.runner.batch_axes({name: array.shape[1:] for name, array in first.items()})
        uncut = {name for name, axis in self.axes.items() if axis is None}
        blocks = find_blocks(self.template.plain, uncut=uncut)
        last_reader = {name: number for number, block in enumerate(blocks) for name in block.inputs}
        self._put("q", images)
        reports: list[BlockReport] = []
        frozen = set(self._fixed)
        with self.progress.task("reconstruction", float(self.preset.steps * len(blocks))) as task:
            for number, block in enumerate(blocks):
                began = time.monotonic()
                learner, before = None, self._floats(block)
                layers = [layer.node for layer in self.runner.layers(block)]
                if self.checkpoints is not None and self.checkpoints.has(number):
                    self.state, _ = self.checkpoints.load(number, self.state)
                    task.advance(self.preset.steps)
                    groups = list(dict.fromkeys(site.group for site in self.runner.sites(block)))
                else:
                    learner = BlockLearner(
                        self.runner,
                        block,
                        self.state,
                        self.preset,
                        seed=word(self.seed, number),
                        frozen=frozenset(frozen),
                        axes=self.axes,
                    )
                    groups = learner.groups()
                    if layers:
                        loss = self._learn(learner, self.cache, self.images, task)
                        self.state = learner.learned()
                        if self.checkpoints is not None:
                            self.checkpoints.save(number, self.state, layers, groups, loss)
                    else:
                        task.advance(self.preset.steps)
                frozen.update(groups)
                after = self._quantize(block)
                reports.append(BlockReport(block.name, tuple(layers), before, after, time.monotonic() - began))
                for name in block.inputs:
                    if last_reader[name] == number:
                        self.cache.drop(f"q:{name}")
                        self.cache.drop(f"f:{name}")
                for name in block.outputs:
                    if name not in last_reader:
                        self.cache.drop(f"q:{name}")
                        self.cache.drop(f"f:{name}")
        return reports

    def tune(self, images: ImageSet, tuning: Tuning) -> None:
        """All layers together on the outputs, after :meth:`run`.

        Args:
            images: The same images.
            tuning: The schedule.
        """
        number = len(find_blocks(self.template.plain, uncut={name for name, axis in self.axes.items() if axis is None}))
        if self.checkpoints is not None and self.checkpoints.has(number):
            self.state, _ = self.checkpoints.load(number, self.state)
            return
        images = with_shifted_images(images, tuning.shifts, word(self.seed, number, 1))
        self.cache.resize(len(images))
        self._put("x", images)
        tuner = Tuner(self.runner, self.state, tuning, seed=word(self.seed, number), axes=self.axes, frozen=self._fixed)
        with self.progress.task("tuning", float(tuning.steps)) as task:
            loss = tuner.run(self.cache, len(images), task)
        self.state = tuner.learned()
        if self.checkpoints is not None:
            layers = [layer.node for layer in self.template.layers]
            self.checkpoints.save(number, self.state, layers, self.state.activations, loss)

    def _put(self, kind: str, images: ImageSet) -> None:
        """Put the images into the cache."""
        at = 0
        for batch in micro_batches(images.batches(64), _MICRO):
            for name, array in batch.items():
                self.cache.put(f"{kind}:{name}", at, torch.from_numpy(np.array(array)))
            at += len(next(iter(batch.values())))

    def _parts(self) -> Iterable[slice]:
        return (slice(at, min(at + _MICRO, self.images)) for at in range(0, self.images, _MICRO))

    def _floats(self, block: Block) -> float:
        """Compute a block's float outputs; returns the loss with the numbers to start from."""
        total = 0.0
        for part in self._parts():
            rounded = {name: self._take("q", name, part) for name in block.inputs}
            exact = {
                name: self._take("f", name, part) if f"f:{name}" in self.cache else rounded[name] for name in rounded
            }
            wanted = self.runner.floating(block, exact)
            for name, tensor in wanted.items():
                self.cache.put(f"f:{name}", part.start, tensor, self.axes.get(name) or 0)
            total += self._loss(self.runner.hard(block, rounded, self.state), wanted) * (part.stop - part.start)
        return total / self.images

    def _quantize(self, block: Block) -> float:
        """Compute a block's quantized outputs; returns the loss."""
        total = 0.0
        for part in self._parts():
            found = self.runner.hard(block, {name: self._take("q", name, part) for name in block.inputs}, self.state)
            wanted = {name: self._take("f", name, part) for name in block.outputs}
            total += self._loss(found, wanted) * (part.stop - part.start)
            for name, tensor in found.items():
                self.cache.put(f"q:{name}", part.start, tensor, self.axes.get(name) or 0)
        return total / self.images

    def _take(self, kind: str, name: str, part: slice) -> torch.Tensor:
        return self.cache.take(f"{kind}:{name}", part).to(self.device)

    def _loss(self, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
        total = 0.0
        for name, tensor in found.items():
            if tensor.is_floating_point():
                axis = channel_axis(tensor, self.axes.get(name) or 0)
                total += float((tensor - wanted[name]).square().sum(axis).mean())
        return total
