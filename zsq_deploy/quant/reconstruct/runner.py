"""Running parts of a network in float, with hard quantizers, or with quantizers that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq_deploy.errors import ModelError
from zsq_deploy.model.twin import Tap, Twin
from zsq_deploy.quant.reconstruct.blocks import Block
from zsq_deploy.quant.reconstruct.quantizers import round_activation
from zsq_deploy.quant.reconstruct.state import State
from zsq_deploy.quant.reconstruct.template import Layer, Site, Template

__all__ = ["Runner"]


class Runner:
    """The plain graph's twin, with numbers fed and quantizers tapped in.

    Args:
        template: The network.
        device: Where to compute.
    """

    def __init__(self, template: Template, device: torch.device) -> None:
        self.template = template
        self.device = device
        self.twin = Twin(template.plain, device=device)
        self._sites = {site.output: site for site in template.sites}
        self._layers = {layer.node: layer for layer in template.layers}

    def layers(self, block: Block) -> list[Layer]:
        """Layers of a block in order of execution."""
        return [self._layers[name] for name in block.nodes if name in self._layers]

    def sites(self, block: Block) -> list[Site]:
        """Sites of a block in order of execution, without those that repeat a rounding."""
        own = set(block.nodes)
        return [
            site
            for site in self.template.sites
            if not site.repeats and (maker := self.template.plain.producer(site.output)) and maker.name in own
        ]

    def batch_axes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
        """Which axis of every floating-point value counts the images; ``None`` where no single axis does.

        Args:
            shapes: Network input -> shape of one image.

        Raises:
            ModelError: The network takes one batch size only.
        """
        seen: list[dict[str, tuple[int, ...]]] = []
        data = [name for node in self.template.plain.nodes for name in node.output if name]
        for batch in (2, 3):
            found: dict[str, tuple[int, ...]] = {}
            feeds = {name: torch.zeros((batch, *shape)) for name, shape in shapes.items()}
            taps: dict[str, Tap] = {name: _note(name, found) for name in data if name in self.twin._producer}
            try:
                with torch.no_grad():
                    self.twin.run(feeds, fetch=(), taps=taps)
            except ModelError as error:
                raise ModelError(
                    "this network takes one batch size only, so it cannot be learned from batches",
                    where=error.where,
                    remedy="export it with a free batch axis",
                ) from error
            seen.append(found)
        axes: dict[str, int | None] = dict.fromkeys(shapes, 0)
        for name, small in seen[0].items():
            large = seen[1].get(name, ())
            different = [axis for axis, (a, b) in enumerate(zip(small, large, strict=False)) if (a, b) == (2, 3)]
            same = sum(a == b for a, b in zip(small, large, strict=False))
            axes[name] = different[0] if len(different) == 1 and same == len(small) - 1 else None
        return axes

    def activation_bytes(self, inputs: Mapping[str, Tensor]) -> int:
        """Bytes of all values that the network computes from some images.

        Args:
            inputs: Images by input name.
        """
        total = 0

        def add(x: Tensor) -> None:
            nonlocal total
            if isinstance(x, Tensor):
                total += x.numel() * x.element_size()

        data = [name for node in self.template.plain.nodes for name in node.output if name in self.twin._producer]
        with torch.no_grad():
            self.twin.run(inputs, fetch=(), taps=dict.fromkeys(data, add))
        return total

    def _run(self, feeds: Mapping[str, Tensor], fetch: Sequence[str], taps: Mapping[str, Tap]) -> dict[str, Tensor]:
        return self.twin.run(feeds, fetch=tuple(fetch), taps=taps)

    @torch.no_grad()
    def floating(self, block: Block, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block's outputs in float."""
        taps: dict[str, Tap] = {
            site.output: _bounded(site)
            for site in self.sites(block)
            if site.floor > -float("inf") or site.ceiling < float("inf")
        }
        return self._run(inputs, block.outputs, taps)

    @torch.no_grad()
    def hard(
        self, block: Block, inputs: Mapping[str, Tensor], state: State, watch: Mapping[str, Tap] | None = None
    ) -> dict[str, Tensor]:
        """A block's outputs with the numbers of a state.

        Args:
            block: The block.
            inputs: Its inputs.
            state: The numbers.
            watch: More taps.
        """
        feeds = {**inputs, **self.constants(block, state)}
        taps: dict[str, Tap] = {site.output: self._rounding(site, state) for site in self.sites(block)}
        return self._run(feeds, block.outputs, {**taps, **(watch or {})})

    def constants(self, block: Block, state: State) -> dict[str, Tensor]:
        """Weights and biases of a block as they are with the numbers of a state."""
        found: dict[str, Tensor] = {}
        for layer in self.layers(block):
            found[layer.weight] = self.tensor(state.weights[layer.node].numbers())
            if layer.bias:
                found[layer.bias] = self.tensor(state.bias_numbers(layer))
        return found

    def tensor(self, array: Any) -> Tensor:
        """An array on the device; weights of convolutions with channels innermost."""
        tensor = torch.from_numpy(np.array(array, order="C")).to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    def _rounding(self, site: Site, state: State) -> Tap:
        activation = state.activations[site.group]
        limits = activation.limits(site.floor, site.ceiling)
        scale = torch.tensor(activation.scale, device=self.device)
        return lambda x: round_activation(x, scale, limits)

    def learning(
        self,
        block: Block,
        inputs: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        rounding: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> dict[str, Tensor]:
        """A block's outputs with weights and quantizers of the caller."""
        return self._run({**inputs, **constants}, block.outputs, rounding)


def _note(name: str, found: dict[str, tuple[int, ...]]) -> Tap:
    def look(x: Tensor) -> None:
        if isinstance(x, Tensor) and x.is_floating_point():
            found[name] = tuple(x.shape)

    return look


def _bounded(site: Site) -> Tap:
    return lambda x: x.clamp(site.floor, site.ceiling)
