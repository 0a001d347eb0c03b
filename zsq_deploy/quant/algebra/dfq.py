"""DFQ: equalized weights, absorbed biases, ranges and bias correction from batch normalization; no image is looked at.

Nagel et al. 2019, *Data-Free Quantization through Weight Equalization and Bias Correction* (ICCV 2019, arXiv:1906.04721). The parts:
batch normalization is kept in the model, and folded where weights are looked at; Clip between 0 and a bound becomes Relu
(:func:`~zsq_deploy.quant.algebra.equalize.clips_to_relu`) if the caller wants that; :func:`~zsq_deploy.quant.algebra.equalize.equalize`;
:func:`~zsq_deploy.quant.algebra.absorb.absorb`; ranges of activations from batch normalization
(:func:`~zsq_deploy.quant.analytic.analytic_ranges`, 6 standard deviations); and the mean error that rounding of weights causes taken out of
the biases (:func:`~zsq_deploy.quant.bias.correct_bias_analytically`), which stay 32 bits wide: with 8-bit biases the correction does harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.model import Model
from zsq_deploy.quant.algebra.absorb import absorb
from zsq_deploy.quant.algebra.equalize import clips_to_relu, equalize
from zsq_deploy.quant.algebra.moments import analytic_moments, recode_by_moments
from zsq_deploy.quant.algebra.squant import squant
from zsq_deploy.quant.analytic import analytic_ranges
from zsq_deploy.quant.bias import apply_biases, correct_bias_analytically
from zsq_deploy.quant.qdq import PlacementRules, insert_qdq
from zsq_deploy.quant.ranges import Ranges
from zsq_deploy.quant.scheme import Scheme

__all__ = ["Clips", "Dfq", "dfq", "equalized_model"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]
Clips = Literal["keep", "within", "cap", "relu"]
"""What becomes of Clip nodes with an upper bound (ReLU6): ``keep``: their channels are not scaled; ``within``: scaled as far as
channels that stay below the bound keep doing so; ``cap``: replaced by Min with one bound a channel and Relu; ``relu``: replaced by
Relu, as the paper does."""


@dataclass(frozen=True, eq=False)
class Dfq:
    """The outcome of :func:`dfq`.

    Attributes:
        model: The equalized network, batch normalization kept.
        ranges: Ranges of its activations.
        biases: Corrected biases of its folded graph, as :func:`~zsq_deploy.quant.bias.apply_biases` takes them.
        qdq: The quantized graph with those biases.
        notes: What was done; one line each.
    """

    model: Model
    ranges: Ranges
    biases: Mapping[str, Array] = field(repr=False)
    qdq: Graph = field(repr=False)
    notes: tuple[str, ...] = ()


def equalized_model(
    model: Model,
    *,
    clips: Clips = "keep",
    absorb_biases: bool = False,
    sigmas: float = 6.0,
    spread: float = 1.0,
    powers_of_two: bool = False,
) -> tuple[Model, tuple[str, ...]]:
    """The network with equalized weights, and notes on what was done.

    Args:
        model: The network, batch normalization kept.
        clips: See :data:`Clips`. Only ``keep`` leaves the function alone on all inputs.
        absorb_biases: Also move the constant part of rectified channels into the next layers, which changes the function on
            the rare inputs where such a channel is below it.
        sigmas: Standard deviations that a channel with batch normalization is taken to reach.
        spread: See :func:`~zsq_deploy.quant.algebra.equalize.equalize`.
        powers_of_two: Factors are powers of two, so that the float function stays the same to the last bit.
    """
    if clips not in ("keep", "within", "cap", "relu"):
        raise UsageError(f"there is no {clips!r}", where="clips", remedy="choose keep, within, cap or relu")
    graph, notes = model.graph, []
    if clips == "relu":
        graph, replaced = clips_to_relu(graph)
        if replaced:
            notes.append(
                f"{len(replaced)} Clip nodes became Relu: the float function is another one beyond their bounds"
            )
    done = equalize(
        graph,
        clips="keep" if clips == "relu" else clips,
        reach=_reach(model, sigmas),
        spread=spread,
        powers_of_two=powers_of_two,
    )
    graph = done.graph
    layers = f"{len(done.sites)} layers" if done.sites else "no layer"
    notes.append(f"weights of {layers} equalized with the layers behind them, in {done.sweeps} passes")
    if absorb_biases:
        absorbed = absorb(graph)
        graph = absorbed.graph
        notes.append(f"biases of {len(absorbed.shifts)} layers absorbed")
    return replace(model, graph=graph, origin=model.origin or model.digest), tuple(notes)


def _reach(model: Model, sigmas: float) -> dict[str, tuple[Vector, Vector]]:
    """Layer -> how far its channels reach downwards and upwards, from the batch normalization behind it."""
    found: dict[str, tuple[Vector, Vector]] = {}
    for norm in model.batch_norms():
        if norm.conv is not None:
            deviation = sigmas * np.abs(norm.gamma)
            found[norm.conv] = norm.beta - deviation, norm.beta + deviation
    return found


def dfq(
    model: Model,
    *,
    activation: Scheme | None = None,
    weight: Scheme | None = None,
    clips: Clips = "relu",
    absorb_biases: bool = True,
    correct_biases: bool = True,
    rounding: Literal["nearest", "squant", "moments"] = "nearest",
    sigmas: float = 6.0,
    spread: float = 1.0,
) -> Dfq:
    """Quantize a network with its parameters alone.

    Args:
        model: The network, batch normalization kept.
        activation: Scheme of activations; by default 8 bits, asymmetric, per tensor.
        weight: Scheme of weights; by default 8 bits, asymmetric, per tensor, as in the paper.
        clips: See :data:`Clips`.
        absorb_biases: Absorb biases.
        correct_biases: Correct biases, for the weights as they were rounded.
        rounding: ``nearest`` as in the paper, ``squant``, or ``moments`` (:func:`~zsq_deploy.quant.algebra.moments.recode_by_moments`).
        sigmas: Standard deviations that activations reach.
        spread: See :func:`~zsq_deploy.quant.algebra.equalize.equalize`.
    """
    activation = activation or Scheme(8, signed=False, symmetric=False)
    weight = weight or Scheme(8, signed=False, symmetric=False)
    equalized, notes = equalized_model(model, clips=clips, absorb_biases=absorb_biases, sigmas=sigmas, spread=spread)
    ranges = analytic_ranges(equalized, sigmas)
    folded = equalized.folded().graph
    # What only a Min or Relu reads is not rounded in between.
    rules = PlacementRules(round_outputs="read") if clips == "cap" else PlacementRules()

    moments = analytic_moments(equalized) if rounding == "moments" else {}

    def quantized(graph: Graph) -> Graph:
        written = insert_qdq(graph, ranges, activation=activation, weight=weight, rules=rules)
        if rounding == "moments":
            return recode_by_moments(written, folded, moments)
        return squant(written, folded) if rounding == "squant" else written

    qdq = quantized(folded)
    biases: Mapping[str, Array] = {}
    if correct_biases:
        biases = correct_bias_analytically(equalized, qdq)
        qdq = quantized(apply_biases(folded, biases))
    return Dfq(equalized, ranges, biases, qdq, (*notes, *ranges.notes))
