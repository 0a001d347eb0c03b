"""Optimising one batch of images against one network, step by step, from and to an exact state.

All arithmetic is float32 unless the user asks for mixed precision, which is meant for GPUs: then convolutions and matrix products read bfloat16, and statistics,
losses, gradients in the pixels and the optimiser stay float32. On a processor with AVX512-BF16 there was nothing to gain for the precision lost: at these sizes
bfloat16 convolutions reached 80 to 100 GFLOP/s a core, float32 ones 140 to 170.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.calib.parts.all_images import MomentTable
from zsq_deploy.calib.parts.augment import Plan
from zsq_deploy.calib.parts.bn_loss import SLACK, BNLayer, BNMatcher, Observed
from zsq_deploy.calib.parts.compiled import CompiledNetwork, not_compiled
from zsq_deploy.calib.parts.labels import Targets, uniform
from zsq_deploy.calib.parts.moments import watch
from zsq_deploy.calib.parts.network import SynthesisNetwork
from zsq_deploy.calib.parts.parametrisations import Finishing, Parametrisation, Renewing, Start
from zsq_deploy.calib.parts.precision import Precision, mixed
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Finished, Group, Recipe
from zsq_deploy.calib.parts.schedules import ScheduleState
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.swing import swing_taps
from zsq_deploy.calib.parts.terms.base import Context, Look
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import TensorSpec

__all__ = ["BatchRun", "Objective", "Parts", "Scene", "deterministic"]

_NOTHING = 1e-30
_INPUT = "the network's input in standard space"


@contextlib.contextmanager
def deterministic(device: torch.device | None = None) -> Iterator[None]:
    """Only kernels that give the same bits every time, and true float32 on GPUs, inside the block."""
    cudnn = torch.backends.cudnn
    on_gpu = device is not None and device.type == "cuda"
    mode = torch.get_deterministic_debug_mode()
    with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
        if on_gpu:  # CPU kernels are deterministic anyway
            torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            if on_gpu:
                torch.set_deterministic_debug_mode(mode)


@dataclass(frozen=True)
class Scene:
    """The choices of one step, the same for every piece of the batch.

    Attributes:
        batch: Images in the whole batch.
        number: Steps done before.
        swing: Source of the shifts of swing convolution; ``None``: no shifts.
        plans: The choices of each augmentation.
        targets: What the images are asked to be.
        memory: What earlier batches left.
        source: What the images come from.
        table: The moments of each piece, for a recipe that works in pieces beside them.
    """

    batch: int
    number: int = 0
    swing: torch.Generator | None = None
    plans: Sequence[Plan] = ()
    targets: Targets | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    source: Parametrisation | None = None
    table: MomentTable | None = None


@dataclass(frozen=True)
class Parts:
    """A loss and what it is made of; all are scalars that carry gradients."""

    total: Tensor
    parts: Mapping[str, Tensor]

    def values(self) -> dict[str, float]:
        """Plain numbers, for a progress line: ``loss``, and each part with its weight."""
        return {
            "loss": float(self.total.detach()),
            **{name: float(part.detach()) for name, part in self.parts.items()},
        }


@dataclass(frozen=True)
class _Seen:
    """What the network made of some images."""

    images: Tensor
    seen: Tensor
    values: Mapping[str, Tensor]
    store: Mapping[str, Observed]
    inputs: Observed | None


class Objective:
    """The loss of a batch of images, bound to a network and a device.

    Args:
        recipe: The method, or one stage of it.
        network: The prepared network.
        spec: Its input.
        space: Where the input's pixels live.
        device: Where it is computed.
        dtype: In what precision.
        piece: Images that are worked through at a time where the loss allows it; ``None``: all at once.
        context: What the recipe's terms are bound to; not needed without terms.
        precision: What the network's convolutions and matrix products read.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: SynthesisNetwork,
        spec: TensorSpec,
        space: InputSpace,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        piece: int | None = None,
        context: Context | None = None,
        precision: Precision = "float32",
    ) -> None:
        from zsq_deploy.model import Twin

        self.recipe, self.network, self.space = recipe, network, space
        self.device, self.dtype, self.context, self.precision = device, dtype, context, precision
        self.twin = Twin(network.graph, dtype=dtype, device=device)
        for parameter in self.twin.parameters():
            # Weight decay can leave the weights of dead channels as denormal numbers, and arithmetic with those is a hundred
            # times slower; below 1e-30 they are nothing.
            parameter.data = torch.where(parameter.abs() < _NOTHING, torch.zeros_like(parameter), parameter)
            if parameter.dim() == 4:  # convolutions on channels-last maps want their weights in the same order
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._input = spec.name
        self.matcher: BNMatcher | None = None
        channels = spec.shape[1] if len(spec.shape) > 1 and spec.shape[1] else 1
        self._prior = BNLayer(_INPUT, _INPUT, np.zeros(channels), np.ones(channels), 0.0)
        if recipe.loss is not None:
            self.matcher = BNMatcher(
                recipe.loss,
                (self._prior, *network.layers) if recipe.loss.input_layer else network.layers,
                device=device,
                dtype=dtype,
                affine=network.affine,
                bounds=network.bounds,
                joins=network.joins,
                owned=network.owned,
            )
            if recipe.loss.norm == "hinge" and context is not None and SLACK in context.prepared:
                self.matcher.slack = context.prepared[SLACK]
        if recipe.terms and context is None:
            raise ValueError("a recipe with terms needs a context to bind them to")
        self.terms = [(term, term.bind(context)) for term in recipe.terms if context is not None]
        self.fetch = tuple(dict.fromkeys(name for _, bound in self.terms for name in bound.fetch))
        self.piece = piece if recipe.separable or recipe.piece else None
        self._has_prior = recipe.loss is not None and recipe.loss.input_prior and len(spec.shape) > 2

    def losses(self, images: Tensor, scene: Scene, *, first: int = 0) -> Parts:
        """The loss of images in standard space.

        Args:
            images: [n, C, ...].
            scene: The choices of this step.
            first: Index of the first of them in the batch, of which they may be a piece.
        """
        recipe, count = self.recipe, len(images)
        what = self._see(images, scene, first)
        images, store, inputs = what.images, what.store, what.inputs
        observed: Mapping[str, Observed] = store
        if scene.table is not None and count < scene.batch:
            piece = first // (self.piece or count)
            observed = scene.table.whole(piece, store)
            scene.table.keep(piece, store)
        parts: dict[str, Tensor] = {}
        if self.matcher is not None and recipe.loss_weight:
            found = self.matcher(
                observed, batch=scene.batch, first=first, inputs=inputs, input_layer=self._prior if inputs else None
            )
            weight = recipe.loss_weight
            named = {"mean": found.mean, "spread": found.spread, "input": found.input}
            if scene.table is not None:  # each piece computes the loss of the whole; what is reported is their mean
                share = count / scene.batch
                named = {name: part + (share - 1) * part.detach() for name, part in named.items()}
            parts.update(named if weight == 1 else {name: weight * part for name, part in named.items()})
        if self.terms:
            look = Look(
                images=images,
                seen=what.seen,
                values=what.values,
                observed=observed,
                targets=None if scene.targets is None else scene.targets.rows(first, count),
                number=scene.number,
                steps=recipe.steps,
                batch=scene.batch,
                first=first,
                memory=scene.memory,
                source=scene.source,
            )
            parts.update({term.name: term.weight * bound(look) for term, bound in self.terms})
        total = sum(parts.values(), torch.zeros((), dtype=self.dtype, device=self.device))
        return Parts(total, parts)

    def _see(self, images: Tensor, scene: Scene, first: int) -> _Seen:
        """Show images to the network."""
        recipe, store, inputs, count = self.recipe, dict[str, Observed](), None, len(images)
        taps = {} if self.matcher is None else dict(self.matcher.taps(store))
        taps.pop(_INPUT, None)  # not a value of the graph
        if recipe.swing and scene.swing is not None:
            taps.update(swing_taps(self.network.edges, scene.swing, recipe.swing))
        if recipe.clip and images.grad_fn is not None:
            images = self.space.clip(images)
        seen = images
        for augment, plan in zip(recipe.augment, scene.plans, strict=True):
            seen = augment.apply(seen, {name: rows[first : first + count] for name, rows in plan.items()})
        if recipe.clip_seen:  # the gradient goes through as if nothing had been cut
            seen = seen + (self.space.clip(seen) - seen).detach()
        if self._has_prior and recipe.loss is not None:
            seen, mean, var = watch(seen, per_sample=True, unbiased=recipe.loss.unbiased)
            inputs = Observed(mean, var)
        if recipe.loss is not None and recipe.loss.input_layer:
            each = recipe.loss.per_sample
            seen, mean, var = watch(seen, per_sample=each, unbiased=recipe.loss.unbiased)
            store[_INPUT] = Observed(mean, var)
        fed = self.space.to_network(seen)
        with mixed(self.precision, self.device):
            if self._compiled is not None and torch.is_grad_enabled():
                values = self._compiled.run(fed, store)
            else:
                values = self.twin.run({self._input: fed}, fetch=self.fetch, taps=taps)
        if self.precision != "float32":  # terms count in full precision
            values = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in values.items()}
        return _Seen(images, seen, values, store, inputs)

    def compile(self, shape: tuple[int, ...]) -> None:
        """Compile the network's forward pass, for images of this shape first; not for a stage with swing convolution.

        Raises:
            CalibrationError: It cannot be compiled.
        """
        if self.recipe.swing:
            raise ValueError("swing convolution is another program in every step")
        self._compiled = CompiledNetwork(self.twin, self._input, self.fetch, self.matcher)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            self.losses(images.requires_grad_(), self.rehearsal(shape)).total.backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever a compiler and what it starts may raise
            self._compiled = None
            raise not_compiled(error) from error

    def rehearsal(self, shape: tuple[int, ...]) -> Scene:
        """Choices for a first look at images of this shape, from a fixed seed."""
        recipe, random = self.recipe, torch.Generator().manual_seed(0)
        labels = self.context.labels if self.context is not None else None
        targets = None
        if recipe.needs_labels and labels is not None:  # where the parameters choose the classes, any will do
            targets = (recipe.targets or uniform)(shape[0], labels.classes, random).to(self.device)
        plans = [augment.draw(shape, random, 0, recipe.steps) for augment in recipe.augment]
        return Scene(shape[0], swing=random, plans=plans, targets=self.mixed(targets, plans))

    def mixed(self, targets: Targets | None, plans: Sequence[Plan]) -> Targets | None:
        """What images are asked to be after augmentations that put one image into another."""
        labels = self.context.labels if self.context is not None else None
        if targets is None or labels is None:
            return targets
        for augment, plan in zip(self.recipe.augment, plans, strict=True):
            mix = getattr(augment, "mix", None)
            if mix is not None:
                targets = mix(targets, plan, labels.classes)
        return targets

    @torch.no_grad()
    def survey(self, images: Tensor, scene: Scene) -> None:
        """Fill the scene's table with the moments of every piece, before the first step."""
        assert scene.table is not None
        piece = self.piece or len(images)
        state = scene.swing.get_state() if scene.swing is not None else None
        looking = replace(scene, table=None)
        for number, first in enumerate(range(0, len(images), piece)):
            if scene.swing is not None and state is not None:
                scene.swing.set_state(state)
            scene.table.keep(number, self._see(images.detach()[first : first + piece], looking, first).store)
        if scene.swing is not None and state is not None:
            scene.swing.set_state(state)

    def backward(self, images: Tensor, scene: Scene | None = None) -> dict[str, float]:
        """Losses of a batch; their gradient goes to whatever `images` comes from.

        A loss that is a sum over images is worked through in pieces that fit the processor's caches, and so is one on the statistics of all images
        beside a table of the pieces' moments.
        """
        count = len(images)
        scene = scene or Scene(count)
        piece = self.piece or count
        if piece >= count or not images.is_leaf:
            losses = self.losses(images, scene)
            losses.total.backward()  # type: ignore[no-untyped-call]
            return losses.values()
        values: dict[str, float] = {}
        gradient = torch.empty_like(images)
        state = scene.swing.get_state() if scene.swing is not None else None
        for first in range(0, count, piece):
            if scene.swing is not None and state is not None:
                scene.swing.set_state(state)  # every piece of a step sees the same shifts
            part = images.detach()[first : first + piece].requires_grad_()
            losses = self.losses(part, scene, first=first)
            losses.total.backward()  # type: ignore[no-untyped-call]
            assert part.grad is not None
            gradient[first : first + piece] = part.grad
            for name, value in losses.values().items():
                values[name] = values.get(name, 0.0) + value
        images.grad = gradient
        return values

    @torch.no_grad()
    def values(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Values of the network, batch norms included, for images in its input space, on the device."""
        from zsq_deploy.model import Twin

        assert self.context is not None
        if self._plain is None:  # the graph that synthesis runs has lost the values that were fused
            self._plain = Twin(self.context.model.graph, dtype=self.dtype, device=self.device)
        pieces = [
            self._plain.run({self._input: part.to(self.device)}, fetch=tuple(names))
            for part in torch.split(images, self.piece or len(images))
        ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in names}

    _plain: Any = None
    _compiled: CompiledNetwork | None = None


@dataclass
class BatchRun:
    """One batch on its way: parameters, optimisers, schedules, random state, and how far it is.

    Attributes:
        objective: The loss.
        shape: Of the images [N, C, ...].
        seed: The run's seed.
        index: The batch's number in the run.
        step: Steps done.
        finished: Whether it ended.
        values: The latest losses.
        memory: What earlier batches left.
        previous: What the same batch left in the stage before.
        stage: Distinguishes the random numbers of several stages; empty for the first.
        offset: Images in the batches before this one.
    """

    objective: Objective
    shape: tuple[int, ...]
    seed: int
    index: int
    step: int = 0
    finished: bool = False
    values: dict[str, float] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    previous: Mapping[str, Tensor] = field(default_factory=dict)
    stage: str = ""
    offset: int = 0

    def __post_init__(self) -> None:
        objective, recipe = self.objective, self.objective.recipe
        context = objective.context
        labels = context.labels if context is not None else None
        self.targets: Targets | None = None
        if recipe.targets is not None:
            assert labels is not None
            self.targets = recipe.targets(self.shape[0], labels.classes, self._random("labels")).to(objective.device)
        start = Start(
            self.shape,
            self._random("images"),
            objective.device,
            targets=self.targets,
            labels=labels,
            prepared=context.prepared if context is not None else {},
            previous=self.previous,
            offset=self.offset,
        )
        self.parametrisation = recipe.parametrise(start)
        self._swing, self._augment = self._random("swing"), self._random("augment")
        self._groups = self.parametrisation.groups()
        if set(self._groups) != set(recipe.groups):
            raise ValueError(
                f"the recipe has settings for {set(recipe.groups)}, the parameters are {set(self._groups)}"
            )
        self._optimisers = {name: _optimiser(recipe.groups[name], tensors) for name, tensors in self._groups.items()}
        self._schedules = {name: ScheduleState() for name in self._groups}
        self._stop = ScheduleState()
        self.finished = recipe.steps == 0
        self._table: MomentTable | None = None
        if recipe.piece:
            piece = objective.piece or self.shape[0]
            sizes = tuple(min(piece, self.shape[0] - first) for first in range(0, self.shape[0], piece))
            self._table = MomentTable(sizes, objective.device, objective.dtype)

    def _random(self, purpose: str) -> torch.Generator:
        return batch_generator(self.seed, f"{self.stage}{purpose}", self.index)

    def scene(self) -> Scene:
        """The choices of the step that comes."""
        recipe = self.objective.recipe
        plans = [augment.draw(self.shape, self._augment, self.step, recipe.steps) for augment in recipe.augment]
        targets = getattr(self.parametrisation, "targets", None) or self.targets
        return Scene(
            self.shape[0],
            self.step,
            swing=self._swing,
            plans=plans,
            targets=self.objective.mixed(targets, plans),
            memory=self.memory,
            source=self.parametrisation,
            table=self._table,
        )

    def advance(self) -> dict[str, float]:
        """One step.

        Raises:
            CalibrationError: The loss is no longer a number.
        """
        recipe = self.objective.recipe
        for optimiser in self._optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        if isinstance(self.parametrisation, Renewing):
            self.parametrisation.renew()
        images, scene = self.parametrisation.images(), self.scene()
        if self._table is not None and not self._table.filled:
            self.objective.survey(images, scene)
        values = self.objective.backward(images, scene)
        loss = values["loss"]
        if not np.isfinite(loss):
            raise CalibrationError(
                f"the loss became {loss} at step {self.step + 1} of batch {self.index + 1}",
                where=self.objective.network.graph.inputs[0].name,
                remedy="the network may overflow on noise: check its weights for NaN or infinity, and that --mean/--std are "
                "those it was trained with; a smaller step size (parameter `rate`) may help",
            )
        for optimiser in self._optimisers.values():
            optimiser.step()
        self.step += 1
        for name, optimiser in self._optimisers.items():
            group = recipe.groups[name]
            optimiser.param_groups[0]["lr"] = group.schedule.after(self.step, loss, group.rate, self._schedules[name])
        if recipe.clip and images.is_leaf:
            self.objective.space.clip_(images.detach())
        stopped = recipe.stop is not None and recipe.stop.done(loss, self._stop)
        self.finished = stopped or self.step >= recipe.steps
        self.values = values
        return values

    @torch.no_grad()
    def images(self) -> Tensor:
        """The batch as it is now, in the network's input space, on the CPU, plain layout."""
        recipe, space, made = self.objective.recipe, self.objective.space, self.parametrisation
        standard = made.finished() if isinstance(made, Finishing) else made.images()
        images = space.to_network(standard.detach())
        if recipe.clip or recipe.clip_seen:
            images = space.bounded(images)
        return images.to("cpu", torch.float32).contiguous()

    def left_behind(self) -> dict[str, Tensor]:
        """What the finished batch leaves to later ones, on the CPU: the memory as it is from here on."""
        recipe = self.objective.recipe
        if recipe.remember is None:
            return dict(self.memory)
        images = self.images().to(self.objective.device)
        context = self.objective.context
        assert context is not None
        finished = Finished(
            images, self.targets, self.memory, lambda names: self.objective.values(images, names), context
        )
        return {name: value.detach().cpu() for name, value in recipe.remember(finished).items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that :meth:`load` needs to go on exactly here: tensors, and plain values."""
        tensors = {f"parameters.{name}": value for name, value in self.parametrisation.state().items()}
        for name, optimiser in self._optimisers.items():
            for number, tensor in enumerate(self._groups[name]):
                for key, value in optimiser.state.get(tensor, {}).items():
                    tensors[f"adam.{name}.{number}.{key}"] = torch.as_tensor(value)
        if self._table is not None:
            tensors.update({f"moments.{name}": value for name, value in self._table.state().items()})
        tensors["random.swing"] = self._swing.get_state()
        tensors["random.augment"] = self._augment.get_state()
        plain = {
            "index": self.index,
            "step": self.step,
            "finished": self.finished,
            "values": self.values,
            "rates": {name: optimiser.param_groups[0]["lr"] for name, optimiser in self._optimisers.items()},
            "schedules": {name: state.pack() for name, state in self._schedules.items()},
            "stop": self._stop.pack(),
        }
        return tensors, plain

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go back to a state."""
        prefix = "parameters."
        self.parametrisation.load({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, optimiser in self._optimisers.items():
            optimiser.param_groups[0]["lr"] = plain["rates"][name]
            for number, tensor in enumerate(self._groups[name]):
                start = f"adam.{name}.{number}."
                found = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                if found:
                    optimiser.state[tensor] = {key: _like(value, tensor) for key, value in found.items()}
        if self._table is not None:
            start = "moments."
            self._table.load(
                {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            )
        self._swing.set_state(tensors["random.swing"])
        self._augment.set_state(tensors["random.augment"])
        self._schedules = {name: ScheduleState.unpack(numbers) for name, numbers in plain["schedules"].items()}
        self._stop = ScheduleState.unpack(plain["stop"])
        self.step, self.finished, self.values = plain["step"], plain["finished"], dict(plain["values"])


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """A loaded optimiser tensor with the device and memory layout that it had."""
    if value.shape == tensor.shape:
        return torch.empty_like(tensor).copy_(value)
    return value.clone() if tensor.device.type == "cpu" else value.to(tensor.device)


def _optimiser(group: Group, tensors: list[Tensor]) -> torch.optim.Optimizer:
    rate = group.schedule.after(0, -math.inf, group.rate, ScheduleState())
    if group.optimiser == "radam":
        return torch.optim.RAdam(tensors, lr=rate, betas=group.betas)
    return torch.optim.Adam(tensors, lr=rate, betas=group.betas, fused=_fused(tensors))


def _fused(tensors: list[Tensor]) -> bool:
    return all(tensor.device.type in ("cpu", "cuda") and tensor.is_floating_point() for tensor in tensors)
