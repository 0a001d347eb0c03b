"""Optimising one batch of images against one network, step by step, from and to an exact state.

All arithmetic is float32. bfloat16 convolutions were tried on a processor with AVX512-BF16: at these sizes they reached 80 to 100
GFLOP/s a core, float32 ones 140 to 170, so there was nothing to gain for the precision lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.calib.parts.bn_loss import BNLayer, BNMatcher, Losses, Observed
from zsq_deploy.calib.parts.moments import watch
from zsq_deploy.calib.parts.network import SynthesisNetwork
from zsq_deploy.calib.parts.priors import InputSpace, total_variation
from zsq_deploy.calib.parts.recipe import Recipe
from zsq_deploy.calib.parts.schedules import ScheduleState
from zsq_deploy.calib.parts.seeds import batch_generator
from zsq_deploy.calib.parts.swing import swing_taps
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import TensorSpec

__all__ = ["BatchRun", "Objective", "deterministic"]

_NOTHING = 1e-30


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


class Objective:
    """The loss of a batch of images, bound to a network and a device.

    Args:
        recipe: The method.
        network: The prepared network.
        spec: Its input.
        space: Where the input's pixels live.
        device: Where it is computed.
        dtype: In what precision.
        piece: Images that are worked through at a time where the loss allows it; ``None``: all at once.
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
    ) -> None:
        from zsq_deploy.model import Twin

        self.recipe, self.network, self.space = recipe, network, space
        self.device, self.dtype = device, dtype
        self.twin = Twin(network.graph, dtype=dtype, device=device)
        for parameter in self.twin.parameters():
            # Weight decay can leave the weights of dead channels as denormal numbers, and arithmetic with those is a hundred
            # times slower; below 1e-30 they are nothing.
            parameter.data = torch.where(parameter.abs() < _NOTHING, torch.zeros_like(parameter), parameter)
            if parameter.dim() == 4:  # convolutions on channels-last maps want their weights in the same order
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._input = spec.name
        self.matcher = BNMatcher(
            recipe.loss,
            network.layers,
            device=device,
            dtype=dtype,
            affine=network.affine,
            bounds=network.bounds,
            joins=network.joins,
            owned=network.owned,
        )
        self.piece = piece if recipe.loss.separable and recipe.total_variation == 0 else None
        channels = spec.shape[1] if len(spec.shape) > 1 and spec.shape[1] else 1
        self._prior = BNLayer("input", spec.name, np.zeros(channels), np.ones(channels), 0.0)
        self._has_prior = recipe.loss.input_prior and len(spec.shape) > 2

    def losses(self, images: Tensor, swing: torch.Generator | None = None, *, batch: int = 0, first: int = 0) -> Losses:
        """The loss of images in standard space.

        Args:
            images: [n, C, ...].
            swing: Source of the random shifts.
            batch: Images in the whole batch, of which these may be a piece; 0: these are all.
            first: Index of the first of them in the batch.
        """
        recipe, store, inputs = self.recipe, dict[str, Observed](), None
        taps = dict(self.matcher.taps(store))
        if recipe.swing and swing is not None:
            taps.update(swing_taps(self.network.edges, swing, recipe.swing))
        if recipe.clip:
            images = self.space.clip(images) if images.grad_fn is not None else images
        if self._has_prior:
            images, mean, var = watch(images, per_sample=True, unbiased=recipe.loss.unbiased)
            inputs = Observed(mean, var)
        self.twin.run({self._input: self.space.to_network(images)}, fetch=(), taps=taps)
        return self.matcher(
            store, batch=batch or len(images), first=first, inputs=inputs, input_layer=self._prior if inputs else None
        )

    def backward(self, images: Tensor, swing: torch.Generator | None = None) -> dict[str, float]:
        """Losses of a batch; their gradient goes to whatever `images` comes from.

        A loss that is a sum over images is worked through in pieces that fit the processor's caches.
        """
        count = len(images)
        piece = self.piece or count
        values: dict[str, float] = {}
        if piece >= count or not images.is_leaf:
            losses = self.losses(images, swing)
            total = losses.total
            values = losses.values()
            if self.recipe.total_variation:
                smooth = self.recipe.total_variation * total_variation(images)
                total, values["smooth"] = total + smooth, float(smooth)
                values["loss"] += values["smooth"]
            total.backward()  # type: ignore[no-untyped-call]
            return values
        gradient = torch.empty_like(images)
        state = swing.get_state() if swing is not None else None
        for first in range(0, count, piece):
            if swing is not None and state is not None:
                swing.set_state(state)  # every piece of a step sees the same shifts
            part = images.detach()[first : first + piece].requires_grad_()
            losses = self.losses(part, swing, batch=count, first=first)
            losses.total.backward()  # type: ignore[no-untyped-call]
            assert part.grad is not None
            gradient[first : first + piece] = part.grad
            for name, value in losses.values().items():
                values[name] = values.get(name, 0.0) + value
        images.grad = gradient
        return values


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
    """

    objective: Objective
    shape: tuple[int, ...]
    seed: int
    index: int
    step: int = 0
    finished: bool = False
    values: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe = self.objective.recipe
        start = batch_generator(self.seed, "images", self.index)
        self.parametrisation = recipe.parametrise(self.shape, start, self.objective.device)
        self._swing = batch_generator(self.seed, "swing", self.index)
        self._groups = self.parametrisation.groups()
        if set(self._groups) != set(recipe.groups):
            raise ValueError(
                f"the recipe has settings for {set(recipe.groups)}, the parameters are {set(self._groups)}"
            )
        self._optimisers = {
            name: torch.optim.Adam(
                tensors, lr=recipe.groups[name].rate, betas=recipe.groups[name].betas, fused=_fused(tensors)
            )
            for name, tensors in self._groups.items()
        }
        self._schedules = {name: ScheduleState() for name in self._groups}
        self._stop = ScheduleState()

    def advance(self) -> dict[str, float]:
        """One step.

        Raises:
            CalibrationError: The loss is no longer a number.
        """
        recipe = self.objective.recipe
        for optimiser in self._optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        images = self.parametrisation.images()
        values = self.objective.backward(images, self._swing)
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
        recipe, space = self.objective.recipe, self.objective.space
        images = space.to_network(self.parametrisation.images().detach())
        if recipe.clip:
            images = space.bounded(images)
        return images.to("cpu", torch.float32).contiguous()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that :meth:`load` needs to go on exactly here: tensors, and plain values."""
        tensors = {f"parameters.{name}": value for name, value in self.parametrisation.state().items()}
        for name, optimiser in self._optimisers.items():
            for number, tensor in enumerate(self._groups[name]):
                for key, value in optimiser.state.get(tensor, {}).items():
                    tensors[f"adam.{name}.{number}.{key}"] = torch.as_tensor(value)
        tensors["random.swing"] = self._swing.get_state()
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
        self._swing.set_state(tensors["random.swing"])
        self._schedules = {name: ScheduleState.unpack(numbers) for name, numbers in plain["schedules"].items()}
        self._stop = ScheduleState.unpack(plain["stop"])
        self.step, self.finished, self.values = plain["step"], plain["finished"], dict(plain["values"])


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """A loaded optimiser tensor with the device and memory layout that it had."""
    if value.shape == tensor.shape:
        return torch.empty_like(tensor).copy_(value)
    return value.clone() if tensor.device.type == "cpu" else value.to(tensor.device)


def _fused(tensors: list[Tensor]) -> bool:
    return all(tensor.device.type in ("cpu", "cuda") and tensor.is_floating_point() for tensor in tensors)
