"""Learning one block: rounding, weight scales and activation scales, until the quantized block gives what the float block gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.progress import Task
from zsq_deploy.quant.reconstruct.blocks import Block
from zsq_deploy.quant.reconstruct.cache import Cache
from zsq_deploy.quant.reconstruct.fused import FusedRounding
from zsq_deploy.quant.reconstruct.native import kernels
from zsq_deploy.quant.reconstruct.presets import Preset
from zsq_deploy.quant.reconstruct.quantizers import (
    RoundedWeight,
    dropped,
    initial_logits,
    on_grid,
    round_activation,
)
from zsq_deploy.quant.reconstruct.runner import Runner
from zsq_deploy.quant.reconstruct.state import Activation, State, Weight
from zsq_deploy.quant.reconstruct.template import Layer, Site

__all__ = ["BlockLearner", "Stepper", "block_loss", "channel_axis", "draws", "mixed", "word"]


def word(*numbers: int) -> int:
    """32 bits that depend on all of the numbers (splitmix64 of their sum)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0xFFFFFFFF


def draws(images: int, batch: int, steps: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """Image numbers of each step: all images in random order, again and again."""
    rng = np.random.default_rng(seed)
    batch = min(batch, images)
    waiting = rng.permutation(images)
    for _ in range(steps):
        if len(waiting) < batch:
            waiting = np.concatenate([waiting, rng.permutation(images)])
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield np.sort(chosen)


def channel_axis(tensor: Tensor, batch_axis: int) -> int:
    """The axis that errors are summed over: the features, not the places."""
    return tensor.dim() - 1 if tensor.dim() == 3 or batch_axis != 0 else min(1, tensor.dim() - 1)


def block_loss(found: Tensor, wanted: Tensor, axis: int) -> Tensor:
    """Squared error, summed over channels, mean over images and places (BRECQ's released loss)."""
    return (found - wanted).square().sum(axis).mean()


def mixed(rounded: Tensor, floating: Tensor, share: float, key: int) -> Tensor:
    """QDrop at the entry of a block: `share` of the elements as the float network has them."""
    if share <= 0.0:
        return rounded
    native = kernels() if rounded.dtype == torch.float32 and rounded.device.type == "cpu" else None
    if native is not None and rounded.stride() == floating.stride():
        return native.choose(floating, rounded, share, key)
    mask = torch.from_numpy(dropped(rounded.numel(), key, share)).to(rounded.device)
    # positions count in the order of memory, whatever the order of the axes
    return torch.where(mask.as_strided(rounded.shape, rounded.stride()), floating, rounded)


_SHOWN = 50  # steps between two reports


@dataclass(eq=False)
class _Learned:
    """What is learned of a layer."""

    layer: Layer
    weight: Weight
    base: Tensor
    logits: Tensor
    unit: Tensor
    factor: Tensor  # scale = unit * factor
    bias: Tensor | None
    bias_unit: Tensor | None
    bias_shift: Tensor | None  # bias + bias_unit * bias_shift

    def limits(self) -> tuple[int, int]:
        zero = int(self.weight.zero_point.reshape(-1)[0])
        return self.weight.scheme.qmin - zero, self.weight.scheme.qmax - zero


class BlockLearner:
    """One block with its quantizers.

    Args:
        runner: Runs the network.
        block: The block.
        state: The numbers to start from.
        preset: The schedule.
        seed: Of everything random.
        frozen: Groups of sites whose scale is not learned any more.
        axes: Which axis of each value counts the images.
    """

    def __init__(
        self,
        runner: Runner,
        block: Block,
        state: State,
        preset: Preset,
        *,
        seed: int,
        frozen: frozenset[str] = frozenset(),
        axes: Mapping[str, int | None],
    ) -> None:
        self.runner, self.block, self.preset, self.seed, self.axes = runner, block, preset, seed, axes
        self.state = state
        self.sites: list[Site] = runner.sites(block)
        self.layers = [self._layer(layer) for layer in runner.layers(block)]
        self.learned_groups = [
            group for group in dict.fromkeys(site.group for site in self.sites) if group not in frozen
        ]
        self.units = {group: self._unit(state.activations[group].scale) for group in self.groups()}
        self.factors = {
            group: torch.tensor(
                state.activations[group].scale / self.units[group],
                device=runner.device,
                requires_grad=group in self.learned_groups and preset.activation_scale_lr > 0,
            )
            for group in self.groups()
        }

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.runner.device)

    def groups(self) -> list[str]:
        """Groups of the block's sites."""
        return list(dict.fromkeys(site.group for site in self.sites))

    def _unit(self, scale: float) -> float:
        return scale if self.preset.relative else 1.0

    def _layer(self, layer: Layer) -> _Learned:
        weight = self.state.weights[layer.node]
        w = self.runner.tensor(self.runner.template.weights[layer.weight])
        scale = self._tensor(weight.along(weight.scale))
        # The zero point may differ from channel to channel: codes are counted from it, and so are the limits.
        base, logits = initial_logits(w, scale)
        unit = scale.clone() if self.preset.relative else torch.ones_like(scale)
        bias = bias_unit = shift = None
        if layer.bias:
            bias = self._tensor(self.state.biases[layer.node])
            if self.preset.bias_lr > 0:
                shift = torch.zeros_like(bias, requires_grad=True)
                x = self.state.activations[layer.x].scale if layer.x else 1.0
                steps = x * weight.scheme.levels**0.5
                bias_unit = self._tensor(weight.scale * steps).reshape(-1)
                bias_unit = bias_unit.expand(bias.shape[-1]) if bias.dim() else bias_unit.reshape(())
        return _Learned(
            layer,
            weight,
            base,
            logits.requires_grad_(),
            unit,
            (scale / unit).requires_grad_(self.preset.weight_scale_lr > 0),
            bias,
            bias_unit,
            shift,
        )

    # -- one step --

    def fused(self) -> dict[str, FusedRounding]:
        """Layer -> its logits with Adam's state, where compiled loops update them."""
        found = {
            item.layer.node: FusedRounding.of(item.logits, item.base, item.factor, *self._limits(item))
            for item in self.layers
        }
        return {name: one for name, one in found.items() if one is not None}

    def constants(self, strength: float, beta: float, fused: Mapping[str, FusedRounding]) -> dict[str, Tensor]:
        """Soft weights and biases; those of `fused` layers update their logits when the gradient comes."""
        found: dict[str, Tensor] = {}
        for item in self.layers:
            low, high = self._limits(item)
            scale = item.factor * item.unit if self.preset.relative else item.factor
            if item.layer.node in fused:
                found[item.layer.weight] = fused[item.layer.node].weight(item.logits, scale, strength, beta)
            else:
                found[item.layer.weight] = RoundedWeight.apply(  # type: ignore[no-untyped-call]
                    item.logits, scale, item.base, low, high, strength, beta
                )
            if item.bias is not None:
                bias = item.bias
                if item.bias_shift is not None and item.bias_unit is not None:
                    bias = bias + item.bias_shift * item.bias_unit
                if item.layer.integer_bias:
                    bias = on_grid(bias, self._input_scale(item.layer.x) * scale.detach().reshape(-1))
                found[item.layer.bias] = bias
        return found

    def _input_scale(self, group: str) -> float | Tensor:
        """Scale of what a layer reads; it may have been learned by a block before."""
        if group in self.factors:
            return self.factors[group].detach() * self.units[group]
        return self.state.activations[group].scale

    def _limits(self, item: _Learned) -> tuple[Any, Any]:
        zero = item.weight.along(item.weight.zero_point)
        scheme = item.weight.scheme
        if (zero == zero.reshape(-1)[0]).all():
            return item.limits()
        low = self._tensor(np.asarray(scheme.qmin - zero, np.float32))
        return low, low + (scheme.qmax - scheme.qmin)

    def rounding(self, share: float, step: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """A quantizer for every site."""
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for number, site in enumerate(self.sites):
            limits = self.state.activations[site.group].limits(site.floor, site.ceiling)
            scale = self.factors[site.group] * self.units[site.group]
            key = word(self.seed, step, number)
            found[site.output] = _quantizer(scale, limits, share, key)
        return found

    def outputs(
        self,
        inputs: Mapping[str, Tensor],
        *,
        strength: float,
        beta: float,
        share: float,
        step: int,
        fused: Mapping[str, FusedRounding] | None = None,
    ) -> dict[str, Tensor]:
        """The block's outputs with soft weights."""
        constants = self.constants(strength, beta, fused or {})
        return self.runner.learning(self.block, inputs, constants, self.rounding(share, step))

    def batch(self, cache: Cache, key: str, chosen: np.ndarray[Any, Any]) -> Tensor:
        """Activations of some images, where the network is."""
        return cache.take(key, chosen).to(self.runner.device)

    def inputs(self, cache: Cache, chosen: np.ndarray[Any, Any], share: float, step: int) -> dict[str, Tensor]:
        """A batch of the block's inputs, some of the elements as the float network has them."""
        found: dict[str, Tensor] = {}
        for number, name in enumerate(self.block.inputs):
            rounded = self.batch(cache, f"q:{name}", chosen)
            if share > 0 and f"f:{name}" in cache and rounded.is_floating_point():
                rounded = mixed(
                    rounded, self.batch(cache, f"f:{name}", chosen), share, word(self.seed, step, 1000 + number)
                )
            found[name] = rounded
        return found

    # -- all steps --

    def stepper(self, cache: Cache) -> Stepper:
        """What takes single steps; `cache` holds ``q:`` and ``f:`` inputs and ``f:`` outputs."""
        return Stepper(self, cache)

    def run(self, cache: Cache, images: int, task: Task) -> float:
        """Learn.

        Args:
            cache: Holds ``q:`` and ``f:`` inputs and ``f:`` outputs.
            images: Number of images.
            task: Where to report each step.

        Returns:
            Mean loss without regulariser over the last tenth of the steps.
        """
        preset = self.preset
        stepper = self.stepper(cache)
        warm = int(preset.warmup * preset.steps)
        recent: list[float] = []
        for step, chosen in enumerate(draws(images, preset.batch, preset.steps, self.seed)):
            done = (step - warm) / max(preset.steps - warm, 1)
            shown = step % _SHOWN == _SHOWN - 1
            value = stepper.step(
                chosen,
                step,
                strength=preset.regulariser if step >= warm else 0.0,
                beta=preset.beta[1] + (preset.beta[0] - preset.beta[1]) * max(0.0, 1.0 - done),
                falling=0.5 * (1.0 + math.cos(math.pi * step / preset.steps)),
                report=shown or step >= 0.9 * preset.steps,
            )
            if step >= 0.9 * preset.steps:
                recent.append(value)
            if shown:
                task.advance(_SHOWN, loss=value)
        task.advance(preset.steps % _SHOWN)
        return float(np.mean(recent)) if recent else math.nan

    def parameters(self) -> tuple[list[dict[str, Any]], list[tuple[float, bool]]]:
        """Adam's groups, and for each its rate and whether it falls along a cosine."""
        preset = self.preset
        logits = [item.logits for item in self.layers]
        scales = [item.factor for item in self.layers if item.factor.requires_grad]
        activations = [factor for factor in self.factors.values() if factor.requires_grad]
        shifts = [item.bias_shift for item in self.layers if item.bias_shift is not None]
        groups: list[dict[str, Any]] = []
        rates: list[tuple[float, bool]] = []
        for parameters, rate, cosine in (
            (logits, preset.rounding_lr, preset.cosine_rounding),
            (scales, preset.weight_scale_lr, True),
            (activations, preset.activation_scale_lr, True),
            (shifts, preset.bias_lr, True),
        ):
            if parameters:
                groups.append({"params": parameters, "lr": rate})
                rates.append((rate, cosine))
        return groups, rates

    @torch.no_grad()
    def bound(self) -> None:
        """Scales stay positive, and a Clip that the codes enforce stays enforced."""
        for item in self.layers:
            if item.factor.requires_grad:
                item.factor.clamp_(min=1e-12)
        for site in self.sites:
            factor = self.factors[site.group]
            if factor.requires_grad:
                limits = self.state.activations[site.group].limits(site.floor, site.ceiling)
                largest = site.ceiling / limits.high / self.units[site.group] if limits.high > 0 else math.inf
                factor.clamp_(min=1e-12, max=max(largest, 1e-12))

    # -- the end --

    @torch.no_grad()
    def learned(self) -> State:
        """The state with what this block learned, rounding decided."""
        weights: dict[str, Weight] = {}
        biases: dict[str, Any] = {}
        for item in self.layers:
            low, high = self._limits(item)
            codes = (item.base + (item.logits >= 0)).clamp(low, high)
            old = item.weight
            scale = (item.factor * item.unit if self.preset.relative else item.factor).detach()
            integers = codes.cpu().contiguous().numpy().astype(np.int32) + old.along(old.zero_point)
            weights[item.layer.node] = Weight(
                np.ascontiguousarray(integers.astype(np.int32)),
                scale.reshape(old.scale.shape).cpu().numpy().astype(np.float32),
                old.zero_point,
                old.scheme,
                old.axis,
            )
            if item.bias is not None and item.bias_shift is not None and item.bias_unit is not None:
                biases[item.layer.node] = (
                    (item.bias + item.bias_shift * item.bias_unit).cpu().numpy().astype(np.float32)
                )
        activations = {}
        for group in self.learned_groups:
            old_one = self.state.activations[group]
            value = float((self.factors[group] * self.units[group]).to(torch.float32))
            activations[group] = Activation(value, old_one.zero_point, old_one.scheme)
        return self.state.updated(weights, activations, biases)


class Stepper:
    """Single steps of a block.

    Args:
        learner: The block.
        cache: Holds ``q:`` and ``f:`` inputs and ``f:`` outputs.
    """

    def __init__(self, learner: BlockLearner, cache: Cache) -> None:
        self._learner, self._cache = learner, cache
        groups, self._rates = learner.parameters()
        self._optimizer = torch.optim.Adam(groups, lr=1.0, fused=True) if groups else None
        self._fused = learner.fused()

    def step(
        self,
        chosen: np.ndarray[Any, Any],
        step: int,
        *,
        strength: float,
        beta: float,
        falling: float,
        report: bool = False,
    ) -> float:
        """Draw, forward, backward, update.

        Args:
            chosen: Numbers of the images.
            step: Number of the step; decides which elements are dropped.
            strength: Weight of the regulariser.
            beta: Its exponent.
            falling: Factor on the rates that fall.
            report: Whether the loss is wanted.

        Returns:
            The loss without regulariser, or NaN.
        """
        learner, optimizer = self._learner, self._optimizer
        if optimizer is None:
            return math.nan
        for group, (rate, falls) in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * (falling if falls else 1.0)
        for one in self._fused.values():
            one.rate = optimizer.param_groups[0]["lr"]  # the logits come first
        share = learner.preset.drop
        inputs = learner.inputs(self._cache, chosen, share, step)
        found = learner.outputs(inputs, strength=strength, beta=beta, share=share, step=step, fused=self._fused)
        ends: list[Tensor] = []
        gradients: list[Tensor] = []
        value = 0.0
        for name in learner.block.outputs:
            end = found[name]
            if not end.requires_grad:
                continue
            # the gradient of `block_loss`, without the passes over memory that the loss itself would take
            difference = end.detach() - learner.batch(self._cache, f"f:{name}", chosen)
            places = difference.numel() // difference.shape[channel_axis(end, learner.axes.get(name) or 0)]
            if report:
                value += float(difference.square().sum()) / places
            ends.append(end)
            gradients.append(difference.mul_(2.0 / places))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(ends, gradients)
        optimizer.step()
        learner.bound()
        return value if report else math.nan


def _quantizer(scale: Tensor, limits: Any, share: float, key: int) -> Callable[[Tensor], Tensor]:
    return lambda x: round_activation(x, scale, limits, share, key)
