"""Bits for each layer within a budget: the frontier of loss against size or work, and the point on it that a budget buys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from zsq_deploy.errors import UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.model import Model
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.allocation.frontier import Point, best_within, pareto
from zsq_deploy.quant.allocation.sensitivity import LayerSensitivity, Prober, Sensitivities
from zsq_deploy.quant.qdq import PlacementRules
from zsq_deploy.quant.reconstruct.api import ACTIVATION, WEIGHT
from zsq_deploy.quant.reconstruct.images import ImageSet
from zsq_deploy.quant.reconstruct.protocol import Bits, LayerBits, Protocol
from zsq_deploy.quant.scheme import Scheme

__all__ = ["Allocation", "Separability", "allocate", "choose", "cost_of", "separability"]

Unit = Literal["bytes", "packed-bytes", "bit-operations"]


def cost_of(layer: LayerSensitivity, bits: Bits, unit: Unit) -> int:
    """What a layer costs.

    Args:
        layer: The layer.
        bits: Its bits.
        unit: ``bytes`` of its weights as Q/DQ graphs store them (INT4 up to 4 bits, INT8 above), ``packed-bytes`` with every bit counted (no runtime
            here stores 3 bits in 3 bits), or ``bit-operations``: multiply-accumulates times bits of weight and input.
    """
    if unit == "bit-operations":
        return layer.macs * bits.weights * bits.activations
    stored = bits.weights if unit == "packed-bytes" else (4 if bits.weights <= 4 else 8)
    return math.ceil(layer.weights * stored / 8)


@dataclass(frozen=True)
class Allocation:
    """Bits for each layer.

    Attributes:
        sensitivities: What each layer alone loses.
        unit: What costs are counted in.
        budget: What was asked for.
        frontier: All choices that no other one beats, from the cheapest on.
        point: The one that was taken.
        bits: The same as ``reconstruct`` and ``round_to_nearest`` take it.
    """

    sensitivities: Sensitivities
    unit: Unit
    budget: int
    frontier: tuple[Point, ...]
    point: Point
    bits: LayerBits

    @property
    def description(self) -> str:
        """One sentence."""
        counts: dict[str, int] = {}
        for one in self.bits.layers.values():
            counts[str(one)] = counts.get(str(one), 0) + 1
        shares = ", ".join(f"{number} of {name}" for name, number in sorted(counts.items(), reverse=True))
        return (
            f"mixed bits ({shares}): {self.point.cost:,} of at most {self.budget:,} {self.unit}, "
            f"sum of sensitivities {self.point.loss:.3g} on {self.sensitivities.images} images"
        )

    def bits_at(self, point: Point) -> LayerBits:
        """The bits of another point of the frontier."""
        return _layer_bits(self.sensitivities, point)

    def to_json(self) -> dict[str, Any]:
        """JSON values: sensitivities, frontier and choice."""
        return {
            "unit": self.unit,
            "budget": self.budget,
            "cost": self.point.cost,
            "loss": self.point.loss,
            "bits": {node: str(bits) for node, bits in self.bits.layers.items()},
            "frontier": [{"cost": point.cost, "loss": point.loss} for point in self.frontier],
            "sensitivities": self.sensitivities.to_json(),
        }


def _layer_bits(sensitivities: Sensitivities, point: Point) -> LayerBits:
    return LayerBits(
        {
            layer.node: list(layer.losses)[number]
            for layer, number in zip(sensitivities.layers, point.choice, strict=True)
        }
    )


def choose(sensitivities: Sensitivities, budget: int, *, unit: Unit = "bytes") -> Allocation:
    """The bits with the smallest sum of sensitivities within a budget.

    Args:
        sensitivities: From :meth:`Prober.sensitivities`.
        budget: For the weights of all layers together (or their bit operations for one image).
        unit: See :func:`cost_of`.

    Raises:
        UsageError: The budget cannot be kept.
    """
    options = [
        [(cost_of(layer, bits, unit), loss) for bits, loss in layer.losses.items()] for layer in sensitivities.layers
    ]
    frontier = tuple(pareto(options))
    point = best_within(frontier, budget)
    return Allocation(sensitivities, unit, budget, frontier, point, _layer_bits(sensitivities, point))


def allocate(
    model: Model,
    images: ImageSet,
    budget: float,
    choices: Iterable[str | Bits] = ("w8a8", "w4a8"),
    protocol: str | Protocol = "all-layers",
    *,
    unit: Unit = "bytes",
    graph: Graph | None = None,
    rules: PlacementRules | None = None,
    activation: Scheme = ACTIVATION,
    weight: Scheme = WEIGHT,
    device: str | torch.device | None = None,
    progress: Progress = SILENT,
) -> Allocation:
    """Measure how much each layer minds few bits, and give bits to layers within a budget.

    Args:
        model: The network.
        images: Synthetic images; 32 to 128 are enough.
        budget: In `unit`; up to 1.0 it is a share of what all layers cost at 8 bits.
        choices: Bits that a layer may get. The default is what integer engines gain from: weights of 4 or 8 bits.
        protocol: Whether first and last layers keep 8 bits.
        unit: See :func:`cost_of`.
        graph: Instead of the model's folded graph.
        rules: Where Q/DQ may stand.
        activation: Scheme of 8-bit activations of the target.
        weight: Scheme of 8-bit weights of the target.
        device: Where to compute.
        progress: Where to report.

    Raises:
        UsageError: The budget cannot be kept, or there are no choices.
        CalibrationError: There are no images.
        ModelError: Nothing can be quantized.
    """
    if not budget > 0:
        raise UsageError(
            f"a budget of {budget} buys nothing", where="budget", remedy="give bytes, or a share up to 1.0"
        )
    prober = Prober(
        model,
        images,
        choices,
        graph=graph,
        rules=rules,
        activation=activation,
        weight=weight,
        device=device,
        progress=progress,
    )
    found = prober.sensitivities(protocol)
    whole = sum(cost_of(layer, Bits(8, 8), unit) for layer in found.layers)
    least = sum(min(cost_of(layer, bits, unit) for bits in layer.losses) for layer in found.layers)
    if budget <= 1.0 and least > whole * budget:
        raise UsageError(
            f"a budget of {budget:g} of what 8 bits take cannot be kept: the cheapest choice takes {least / whole:.3g}",
            where="budget",
            remedy=f"allow at least {math.ceil(1000 * least / whole) / 1000:g}, or offer fewer bits",
        )
    return choose(found, math.floor(whole * budget) if budget <= 1.0 else math.floor(budget), unit=unit)


@dataclass(frozen=True)
class Separability:
    """Whether losses of layers add up: predictions beside what was measured with all layers quantized together.

    Attributes:
        predicted: Sums of sensitivities.
        measured: Divergence of the outputs.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def rank_correlation(self) -> float:
        """Spearman's: 1 where the sums put the choices into the right order, which is all that a frontier needs."""
        a, b = (np.argsort(np.argsort(values)).astype(np.float64) for values in (self.predicted, self.measured))
        return float(np.corrcoef(a, b)[0, 1])

    @property
    def ratio(self) -> float:
        """Median of measured by predicted: 1 where losses add up, more where errors of layers make each other worse."""
        pairs = zip(self.measured, self.predicted, strict=True)
        return float(np.median([measured / max(predicted, 1e-12) for measured, predicted in pairs]))


def separability(prober: Prober, sensitivities: Sensitivities, points: Sequence[Point]) -> Separability:
    """Measure some points with all their layers quantized together.

    Args:
        prober: What measured the sensitivities.
        sensitivities: What it found.
        points: Of a frontier, or any other choices; two or more.
    """
    measured = tuple(prober.joint(_layer_bits(sensitivities, point)) for point in points)
    return Separability(tuple(point.loss for point in points), measured)
