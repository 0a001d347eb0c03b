"""The last stage: all layers together, until the quantized network's outputs are those of the float network.

Blocks are learned one after the other, each for itself; what their errors do together shows at the outputs only. Here codes, scales and
biases of the whole network go on from where the blocks left them, with the gradient of the outputs' error: LSQ for all scales (Esser et
al. 2020), straight through the rounding for the codes. Every code starts in its cell on the side where the float weight lies, so a code changes only
where many steps agree. The float network is the teacher; no label is needed (as in the distillation of GDFQ and its successors, but with a few hundred
steps instead of epochs).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.progress import Task
from zsq_deploy.quant.reconstruct.blocks import Block
from zsq_deploy.quant.reconstruct.cache import Cache
from zsq_deploy.quant.reconstruct.learn import draws
from zsq_deploy.quant.reconstruct.presets import Tuning
from zsq_deploy.quant.reconstruct.quantizers import on_grid, round_activation
from zsq_deploy.quant.reconstruct.runner import Runner
from zsq_deploy.quant.reconstruct.state import Activation, State, Weight
from zsq_deploy.quant.reconstruct.template import Layer

__all__ = ["SteppedWeight", "Tuner", "output_error"]

_TAUGHT = 16  # images that go through the float network at a time
_SHOWN = 20  # steps between two reports
_HELD = 1 << 28  # bytes of all values of the network, for as many images as go through it together
_INSIDE = 0.45  # how far from the middle of its cell a code may start, in steps


class SteppedWeight(torch.autograd.Function):
    """``clamp(rint(u), low, high) * scale``, straight through the rounding.

    Inputs: u (weights in steps of their scale, counted from the zero point), scale (broadcasts), low, high. The gradient of the scale is that of
    a scale whose codes stay.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
        """The weight."""
        rounded = torch.round(u)
        codes = rounded.clamp(low, high)
        ctx.save_for_backward(codes, codes == rounded, scale)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of u and scale."""
        codes, inside, scale = ctx.saved_tensors
        g = grads[0]
        d_scale = (g * codes).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        # steps of different channels have different sizes; without the scale here Adam would still see only their signs
        return g * scale * inside, d_scale, None, None


def output_error(found: Tensor, wanted: Tensor, unit: float) -> Tensor:
    """Mean squared error in units of the float output's spread; for scores the common shift of an image's scores does not count.

    Args:
        found: Of the quantized network.
        wanted: Of the float network.
        unit: Variance of the float output over all images.
    """
    difference = found - wanted
    if difference.dim() == 2 and difference.shape[1] > 1:
        difference = difference - difference.mean(1, keepdim=True)
    return difference.square().mean() / max(unit, 1e-12)


@dataclass(eq=False)
class _Part:
    """What is tuned of a layer."""

    layer: Layer
    weight: Weight
    steps: Tensor
    unit: Tensor
    factor: Tensor  # scale = unit * factor
    low: Any
    high: Any
    bias: Tensor | None
    bias_unit: Tensor | None
    bias_shift: Tensor | None  # bias + bias_unit * bias_shift


class Tuner:
    """The whole network with its quantizers.

    Args:
        runner: Runs the network.
        state: The numbers to start from.
        tuning: The schedule.
        seed: Of everything random.
        axes: Which axis of each value counts the images.
        frozen: Groups of sites whose scale stays.
    """

    def __init__(
        self,
        runner: Runner,
        state: State,
        tuning: Tuning,
        *,
        seed: int,
        axes: Mapping[str, int | None],
        frozen: Collection[str] = (),
    ) -> None:
        self.runner, self.state, self.tuning, self.seed, self.axes = runner, state, tuning, seed, axes
        plain = runner.template.plain
        self.block = Block(
            "outputs",
            tuple(node.name for node in plain.nodes),
            (),
            tuple(spec.name for spec in plain.inputs),
            tuple(spec.name for spec in plain.outputs),
        )
        self.sites = runner.sites(self.block)
        self.parts = [self._part(layer) for layer in runner.layers(self.block)]
        groups = dict.fromkeys(site.group for site in self.sites)
        moves = tuning.activation_scale_lr > 0
        self.factors = {
            group: torch.ones((), device=runner.device, requires_grad=moves and group not in frozen) for group in groups
        }
        self.units: dict[str, float] = {}

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.runner.device)

    def _part(self, layer: Layer) -> _Part:
        weight = self.state.weights[layer.node]
        scale = weight.along(weight.scale)
        zero = weight.along(weight.zero_point)
        codes = (weight.codes - zero).astype(np.float32)
        exact = self.runner.template.weights[layer.weight] / scale
        steps = codes + np.clip(exact - codes, -_INSIDE, _INSIDE).astype(np.float32)
        low, high = (np.asarray(bound - zero, np.float32) for bound in (weight.scheme.qmin, weight.scheme.qmax))
        bias = bias_unit = shift = None
        if layer.bias:
            bias = self._tensor(self.state.biases[layer.node])
            shift = torch.zeros_like(bias, requires_grad=True)
            # of the size of one product: the largest weight times the largest input
            x = self.state.activations[layer.x] if layer.x else None
            largest = weight.scale * 2.0 ** (weight.scheme.bits - 1)
            largest = largest * (x.scale * 2.0 ** (x.scheme.bits - 1) if x is not None else 1.0)
            bias_unit = self._tensor(np.asarray(largest, np.float32)).reshape(-1)
            bias_unit = bias_unit.expand(bias.shape[-1]) if bias.dim() else bias_unit.reshape(())
        unit = self._tensor(scale)
        return _Part(
            layer,
            weight,
            self.runner.tensor(steps).requires_grad_(),
            unit,
            torch.ones_like(unit, requires_grad=True),
            self._tensor(low),
            self._tensor(high),
            bias,
            bias_unit,
            shift,
        )

    def constants(self) -> dict[str, Tensor]:
        """Weights and biases on their grids, differentiable."""
        constants: dict[str, Tensor] = {}
        for part in self.parts:
            constants[part.layer.weight] = SteppedWeight.apply(  # type: ignore[no-untyped-call]
                part.steps, part.factor * part.unit, part.low, part.high
            )
            if part.bias is not None and part.bias_unit is not None and part.bias_shift is not None:
                bias = part.bias + part.bias_shift * part.bias_unit
                constants[part.layer.bias] = on_grid(bias, self._bias_step(part)) if part.layer.integer_bias else bias
        return constants

    def outputs(self, inputs: Mapping[str, Tensor], constants: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The quantized network's outputs, differentiable.

        Args:
            inputs: Images.
            constants: Weights and biases; by default :meth:`constants`.
        """
        rounding = {}
        for site in self.sites:
            activation = self.state.activations[site.group]
            scale = self.factors[site.group] * activation.scale
            limits = activation.limits(site.floor, site.ceiling)
            rounding[site.output] = lambda x, scale=scale, limits=limits: round_activation(x, scale, limits)
        return self.runner.learning(self.block, inputs, self.constants() if constants is None else constants, rounding)

    def accumulate(self, cache: Cache, chosen: np.ndarray[Any, Any], piece: int) -> float:
        """Add the gradients of a batch's loss to those of everything that is tuned.

        Activations of a whole network take much memory; those of a few images at a time do not, and the gradients of weights and biases
        are added up before they go on to codes and scales.

        Args:
            cache: Holds the images as ``x:`` inputs and the float network's outputs.
            chosen: Numbers of the images.
            piece: Images at a time.

        Returns:
            The loss.
        """
        constants = self.constants()
        held = {name: tensor.detach().requires_grad_() for name, tensor in constants.items()}
        value = 0.0
        for first in range(0, len(chosen), piece):
            part = chosen[first : first + piece]
            inputs = {name: cache.take(f"x:{name}", part).to(self.runner.device) for name in self.block.inputs}
            found = self.outputs(inputs, held)
            loss = torch.zeros((), device=self.runner.device)
            for name, unit in self.units.items():
                wanted = cache.take(f"t:{name}", part).to(self.runner.device)
                loss = loss + output_error(found[name], wanted, unit)
            loss = loss * (len(part) / len(chosen))
            loss.backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach())
        moved = [name for name, tensor in held.items() if tensor.grad is not None and constants[name].requires_grad]
        torch.autograd.backward([constants[name] for name in moved], [held[name].grad for name in moved])
        return value

    def piece(self, cache: Cache) -> int:
        """How many images may go through the network at a time, so that their activations take about 256 MiB."""
        inputs = {name: cache.take(f"x:{name}", np.arange(1)).to(self.runner.device) for name in self.block.inputs}
        total = self.runner.activation_bytes(inputs)
        return max(1, min(self.tuning.batch, _HELD // max(total, 1)))

    def _bias_step(self, part: _Part) -> Tensor:
        """What an integer bias is a multiple of: scale of the input times scales of the weight."""
        x = self.factors[part.layer.x].detach() * self.state.activations[part.layer.x].scale
        return x * (part.factor.detach() * part.unit).reshape(-1)

    def _teach(self, cache: Cache, images: int) -> None:
        """The float network's outputs of all images, and their variance."""
        total: dict[str, np.ndarray[Any, Any]] = {}
        for first in range(0, images, _TAUGHT):
            part = slice(first, min(first + _TAUGHT, images))
            inputs = {name: cache.take(f"x:{name}", part).to(self.runner.device) for name in self.block.inputs}
            for name, tensor in self.runner.floating(self.block, inputs).items():
                if not tensor.is_floating_point():
                    continue
                cache.put(f"t:{name}", first, tensor, self.axes.get(name) or 0)
                wide = tensor.double()
                sums = np.asarray([wide.numel(), float(wide.sum()), float(wide.square().sum())])
                total[name] = total.get(name, 0.0) + sums
        for name, (count, first_moment, second_moment) in total.items():
            self.units[name] = float(second_moment / count - (first_moment / count) ** 2)

    def run(self, cache: Cache, images: int, task: Task) -> float:
        """Tune.

        Args:
            cache: Holds the images as ``x:`` inputs.
            images: Number of images.
            task: Where to report each step.

        Returns:
            Mean loss of the last tenth of the steps.
        """
        tuning = self.tuning
        self._teach(cache, images)
        shifts = [part.bias_shift for part in self.parts if part.bias_shift is not None]
        rates = [
            ([part.steps for part in self.parts], tuning.code_lr),
            ([part.factor for part in self.parts], tuning.weight_scale_lr),
            ([factor for factor in self.factors.values() if factor.requires_grad], tuning.activation_scale_lr),
            (shifts, tuning.bias_lr),
        ]
        rates = [(found, rate) for found, rate in rates if found and rate > 0]
        optimizer = torch.optim.Adam([{"params": found, "lr": rate} for found, rate in rates], lr=1.0, fused=True)
        piece = self.piece(cache)
        recent: list[float] = []
        for step, chosen in enumerate(draws(images, tuning.batch, tuning.steps, self.seed)):
            falling = 0.5 * (1.0 + math.cos(math.pi * step / tuning.steps))
            for group, (_, rate) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * falling
            optimizer.zero_grad(set_to_none=True)
            value = self.accumulate(cache, chosen, piece)
            optimizer.step()
            self._bound()
            if step >= 0.9 * tuning.steps:
                recent.append(value)
            task.advance(1, **({"loss": value} if step % _SHOWN == _SHOWN - 1 else {}))
        return float(np.mean(recent)) if recent else math.nan

    @torch.no_grad()
    def _bound(self) -> None:
        """Scales stay positive, and a Clip that the codes enforce stays enforced."""
        for part in self.parts:
            part.factor.clamp_(min=1e-3)
        for site in self.sites:
            if not self.factors[site.group].requires_grad:
                continue
            activation = self.state.activations[site.group]
            high = activation.limits(site.floor, site.ceiling).high
            largest = site.ceiling / high / activation.scale if high > 0 else math.inf
            self.factors[site.group].clamp_(min=1e-3, max=max(largest, 1e-3))

    @torch.no_grad()
    def learned(self) -> State:
        """The state with what was tuned."""
        weights: dict[str, Weight] = {}
        biases: dict[str, Any] = {}
        for part in self.parts:
            old = part.weight
            codes = torch.round(part.steps).clamp(part.low, part.high).cpu().contiguous().numpy()
            weights[part.layer.node] = Weight(
                np.ascontiguousarray(codes.astype(np.int32) + old.along(old.zero_point).astype(np.int32)),
                (part.factor * part.unit).reshape(old.scale.shape).cpu().numpy().astype(np.float32),
                old.zero_point,
                old.scheme,
                old.axis,
            )
            if part.bias is not None and part.bias_unit is not None and part.bias_shift is not None:
                biases[part.layer.node] = (part.bias + part.bias_shift * part.bias_unit).cpu().numpy()
        activations = {
            group: Activation(
                float((factor * self.state.activations[group].scale).to(torch.float32)),
                self.state.activations[group].zero_point,
                self.state.activations[group].scheme,
            )
            for group, factor in self.factors.items()
            if factor.requires_grad
        }
        return self.state.updated(weights, activations, biases)
