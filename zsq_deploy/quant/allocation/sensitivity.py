"""How much each layer minds few bits: what the network's output loses when that layer alone is quantized.

Cai et al. 2020 (ZeroQ, section 3.3): the Kullback-Leibler divergence between the outputs of the float network and of the network with one layer
quantized, on synthetic images. Weights are rounded to nearest, ranges those of the smallest squared error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.errors import CalibrationError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.macs import node_macs
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Tap
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.qdq import PlacementRules
from zsq_deploy.quant.reconstruct.api import ACTIVATION, WEIGHT
from zsq_deploy.quant.reconstruct.images import ImageSet
from zsq_deploy.quant.reconstruct.protocol import Bits, LayerBits, Protocol, assign
from zsq_deploy.quant.reconstruct.quantizers import round_activation
from zsq_deploy.quant.reconstruct.runner import Runner
from zsq_deploy.quant.reconstruct.state import State, initial_state
from zsq_deploy.quant.reconstruct.template import Site, make_template
from zsq_deploy.quant.scheme import Scheme
from zsq_deploy.quant.statistics import collect, micro_batches

__all__ = ["LayerSensitivity", "Prober", "Sensitivities", "divergence"]

_MICRO = 32  # images that go through the network at a time
_ALL = Protocol("all-layers", ends_8bit=False)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        node: Its name.
        weights: Number of weights.
        macs: Multiply-accumulates for one image.
        losses: Bits -> divergence of the outputs with this layer alone quantized.
    """

    node: str
    weights: int
    macs: int
    losses: Mapping[Bits, float]


@dataclass(frozen=True)
class Sensitivities:
    """All layers.

    Attributes:
        layers: In order of execution.
        images: Number of images they were measured on.
        set_digest: Digest of the set.
    """

    layers: tuple[LayerSensitivity, ...]
    images: int
    set_digest: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "images": self.images,
            "set_digest": self.set_digest,
            "layers": [
                {
                    "node": layer.node,
                    "weights": layer.weights,
                    "macs": layer.macs,
                    "losses": {str(bits): loss for bits, loss in layer.losses.items()},
                }
                for layer in self.layers
            ],
        }


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """How far an output is from the float one, image by image.

    Scores of classes (``[N, C]``, C > 1; before softmax or behind it) are compared as probabilities by their Kullback-Leibler divergence in nats,
    anything else by the squared error as a share of the float output's variance.

    Args:
        found: Of the quantized network, ``[N, ...]``.
        wanted: Of the float network.

    Returns:
        ``[N]``, not negative.
    """
    if wanted.dim() == 2 and wanted.shape[1] > 1:
        given = bool((wanted >= 0).all()) and bool(((wanted.sum(1) - 1).abs() < 1e-3).all())
        if given:
            p, q = wanted.clamp_min(1e-12), found.clamp_min(1e-12)
            p, q = (each / each.sum(1, keepdim=True) for each in (p, q))
            return (p * (p.log() - q.log())).sum(1).clamp_min(0.0)
        a, b = F.log_softmax(wanted.double(), 1), F.log_softmax(found.double(), 1)
        return (a.exp() * (a - b)).sum(1).clamp_min(0.0)
    spread = wanted.double().var().clamp_min(1e-12)
    return (found - wanted).double().square().flatten(1).mean(1) / spread


class Prober:
    """Outputs of a network some of whose layers are quantized.

    Args:
        model: The network.
        images: Images in network input space; all are used, 32 to 128 are enough.
        choices: Bits that a layer may get.
        graph: Instead of the model's folded graph.
        rules: Where Q/DQ may stand.
        activation: Scheme of 8-bit activations of the target.
        weight: Scheme of 8-bit weights of the target.
        device: Where to compute.
        progress: Where to report.

    Raises:
        CalibrationError: There are no images.
        UsageError: There are no choices.
        ModelError: Nothing can be quantized.

    Attributes:
        template: Places of the quantizers.
        choices: As given, without repetition.
    """

    def __init__(
        self,
        model: Model,
        images: ImageSet,
        choices: Iterable[str | Bits],
        *,
        graph: Graph | None = None,
        rules: PlacementRules | None = None,
        activation: Scheme = ACTIVATION,
        weight: Scheme = WEIGHT,
        device: torch.device | str | None = None,
        progress: Progress = SILENT,
    ) -> None:
        if len(images) == 0:
            raise CalibrationError("there are no images to measure with", where="images", remedy="give some")
        self.choices = tuple(dict.fromkeys(Bits.of(each) for each in choices))
        if not self.choices:
            raise UsageError("there are no bits to choose from", where="choices", remedy="give w8a8 and w4a8, say")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folded = graph if graph is not None else model.folded().graph
        statistics = collect(
            folded,
            images.batches(64),
            device=place,
            progress=progress,
            total=len(images),
            set_digest=images.digest,
        )
        self.template = make_template(folded, statistics.ranges(), activation=activation, weight=weight, rules=rules)
        self.ends = assign(self.template, Bits(8, 8), _ALL)
        self._states: dict[Bits, State] = {
            bits: initial_state(self.template, assign(self.template, bits, _ALL), statistics)
            for bits in dict.fromkeys((*self.choices, Bits(8, 8)))
        }
        self._progress, self._images, self._digest = progress, len(images), images.digest
        self._runner = Runner(self.template, place)
        self._inputs = [
            {name: torch.from_numpy(np.array(array)).to(place) for name, array in batch.items()}
            for batch in micro_batches(images.batches(64), _MICRO)
        ]
        self._macs = node_macs(folded)
        self._outputs = tuple(spec.name for spec in self.template.plain.outputs)
        self._wanted = [self._run(inputs, {}, {}) for inputs in self._inputs]

    @torch.no_grad()
    def _run(
        self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], rounding: Mapping[str, Tap]
    ) -> dict[str, Tensor]:
        taps: dict[str, Tap] = {
            site.output: _bounded(site)
            for site in self.template.sites
            if site.floor > -float("inf") or site.ceiling < float("inf")
        }
        return self._runner.twin.run({**inputs, **weights}, fetch=self._outputs, taps={**taps, **rounding})

    def loss(self, layers: Mapping[str, Bits]) -> float:
        """Mean divergence of the outputs, summed over outputs, with these layers quantized and all others in float.

        Args:
            layers: Layer node -> bits, each one of the choices (or ``w8a8``). An activation that several of them read gets the fewest bits that
                one of them asks for.
        """
        by_node = {layer.node: layer for layer in self.template.layers}
        weights: dict[str, Tensor] = {}
        sources: dict[str, Bits] = {}
        for node, bits in layers.items():
            layer = by_node[node]
            weights[layer.weight] = self._runner.tensor(self._states[bits].weights[node].numbers())
            known = sources.get(layer.x)
            if layer.x and (known is None or bits.activations < known.activations):
                sources[layer.x] = bits
        rounding: dict[str, Tap] = {
            site.output: self._rounding(site, self._states[sources[site.group]])
            for site in self.template.sites
            if site.group in sources and not site.repeats
        }
        total, count = 0.0, 0
        for inputs, wanted in zip(self._inputs, self._wanted, strict=True):
            found = self._run(inputs, weights, rounding)
            size = len(next(iter(inputs.values())))
            for name, tensor in found.items():
                if tensor.is_floating_point():
                    total += float(divergence(tensor, wanted[name]).double().mean()) * size
            count += size
        return total / count

    def _rounding(self, site: Site, state: State) -> Tap:
        activation = state.activations[site.group]
        limits = activation.limits(site.floor, site.ceiling)
        scale = torch.tensor(activation.scale, device=self._runner.device)
        return lambda x: round_activation(x, scale, limits)

    def sensitivities(self, protocol: str | Protocol = "all-layers") -> Sensitivities:
        """Every layer alone, with each of its choices.

        Args:
            protocol: Where first and last layers keep 8 bits, that is their only choice.
        """
        chosen = Protocol.of(protocol)
        at_end = self.ends.first | self.ends.last if chosen.ends_8bit else frozenset()
        found: list[LayerSensitivity] = []
        with self._progress.task("sensitivity", float(len(self.template.layers))) as task:
            for layer in self.template.layers:
                choices: Sequence[Bits] = (Bits(8, 8),) if layer.node in at_end else self.choices
                losses = {bits: self.loss({layer.node: bits}) for bits in choices}
                count = int(self.template.weights[layer.weight].size)
                found.append(LayerSensitivity(layer.node, count, self._macs.get(layer.node, 0), losses))
                task.advance(1)
        return Sensitivities(tuple(found), self._images, self._digest)

    def joint(self, bits: LayerBits) -> float:
        """Divergence with all of the layers quantized together."""
        return self.loss(bits.layers)


def _bounded(site: Site) -> Tap:
    return lambda x: x.clamp(site.floor, site.ceiling)
