"""The numbers of a quantized network: integer weights, scales, zero points, biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.quant.fakequant import qparams
from zsq_deploy.quant.reconstruct.protocol import Assignment
from zsq_deploy.quant.reconstruct.quantizers import Range, weight_scales
from zsq_deploy.quant.reconstruct.template import Layer, Site, Template
from zsq_deploy.quant.scheme import Granularity, Scheme
from zsq_deploy.quant.search import mse
from zsq_deploy.quant.statistics_values import Statistics

__all__ = ["Activation", "State", "Weight", "activation_range", "initial_state", "with_bits"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Weight:
    """An integer weight.

    Attributes:
        codes: int32, shape of the weight; counted from zero of the integer type.
        scale: float32, ``[C]`` along `axis` or ``()``.
        zero_point: int32, shape of the scale.
        scheme: Of the codes.
        axis: Channel axis; ``None`` with one scale for all.
    """

    codes: Array = field(repr=False)
    scale: Array = field(repr=False)
    zero_point: Array = field(repr=False)
    scheme: Scheme
    axis: int | None

    def along(self, parameter: Array) -> Array:
        """Scale or zero point in a form that broadcasts against the weight."""
        if self.axis is None:
            return parameter.reshape(())
        form = [1] * self.codes.ndim
        form[self.axis] = -1
        return parameter.reshape(form)

    def numbers(self) -> npt.NDArray[np.float32]:
        """float32 numbers, as DequantizeLinear computes them."""
        offset = (self.codes - self.along(self.zero_point)).astype(np.float32)
        return np.asarray(offset * self.along(self.scale), np.float32)


@dataclass(frozen=True)
class Activation:
    """Scale and zero point of a group of sites.

    Attributes:
        scale: Exact in float32.
        zero_point: A code.
        scheme: Of the codes.
    """

    scale: float
    zero_point: int
    scheme: Scheme

    def limits(self, floor: float, ceiling: float) -> Range:
        """Limits of the codes counted from the zero point, with the bounds of the activation in front."""
        return Range(self.scheme.qmin - self.zero_point, self.scheme.qmax - self.zero_point, floor, ceiling)


@dataclass(frozen=True, eq=False)
class State:
    """All numbers of a quantized network.

    Attributes:
        weights: Layer node -> integer weight.
        activations: Group of sites -> scale and zero point.
        biases: Layer node -> float bias in the shape in which it is stored.
    """

    weights: Mapping[str, Weight]
    activations: Mapping[str, Activation]
    biases: Mapping[str, Array] = field(repr=False)

    def updated(
        self,
        weights: Mapping[str, Weight] | None = None,
        activations: Mapping[str, Activation] | None = None,
        biases: Mapping[str, Array] | None = None,
    ) -> State:
        """A copy with some numbers replaced."""
        return State(
            {**self.weights, **(weights or {})},
            {**self.activations, **(activations or {})},
            {**self.biases, **(biases or {})},
        )

    def bias_codes(self, layer: Layer) -> tuple[Array, Array] | None:
        """int32 codes of a layer's bias and their scales; ``None`` where the bias is stored in float."""
        if not layer.integer_bias:
            return None
        weight = self.weights[layer.node]
        scale = np.asarray(np.float32(self.activations[layer.x].scale) * weight.scale, np.float32)
        bias = np.asarray(self.biases[layer.node], np.float64).reshape(-1)
        codes = np.clip(np.rint(bias / scale.astype(np.float64)), -(2**31), 2**31 - 1)
        return codes.astype(np.int32), scale

    def bias_numbers(self, layer: Layer) -> npt.NDArray[np.float32]:
        """The bias as the Q/DQ graph computes with it."""
        stored = self.bias_codes(layer)
        if stored is None:
            return np.asarray(self.biases[layer.node], np.float32)
        codes, scale = stored
        return np.asarray(codes.astype(np.float32) * scale, np.float32)


def with_bits(scheme: Scheme, bits: int) -> Scheme:
    """The scheme with other bits; below 8 bits every code of a symmetric type is used, also the most negative one."""
    narrow = bits < scheme.bits
    return dataclasses.replace(
        scheme, bits=bits, restricted=scheme.restricted and not narrow, reduced=scheme.reduced and not narrow
    )


def initial_state(
    template: Template,
    assignment: Assignment,
    statistics: Statistics,
    *,
    power: float = 2.4,
    candidates: int = 100,
) -> State:
    """Round-to-nearest weights and ranges of the smallest squared error.

    Args:
        template: The network.
        assignment: Bits of every tensor.
        statistics: Of the float network's activations.
        power: Exponent of the error that weight scales minimize.
        candidates: Clip ratios that are tried for it.
    """
    weights, biases = {}, {}
    for layer in template.layers:
        array = template.weights[layer.weight]
        scheme = with_bits(template.weight, assignment.weights[layer.node])
        if layer.axis is None:
            scheme = dataclasses.replace(scheme, granularity=Granularity.TENSOR)
        scale, zero = weight_scales(array, scheme, layer.axis, power=power, candidates=candidates)
        empty = Weight(np.zeros(array.shape, np.int32), scale, zero, scheme, layer.axis)
        codes = np.rint(array / empty.along(scale)) + empty.along(zero)
        clipped = np.clip(codes, scheme.qmin, scheme.qmax).astype(np.int32)
        weights[layer.node] = dataclasses.replace(empty, codes=clipped)
        if layer.bias:
            biases[layer.node] = template.biases[layer.bias]
    activations = {}
    for group, sites in template.groups().items():
        scheme = with_bits(template.activation, assignment.sites[group])
        activations[group] = activation_range(sites, scheme, statistics)
    return State(weights, activations, biases)


def activation_range(sites: list[Site], scheme: Scheme, statistics: Statistics) -> Activation:
    """The range with the smallest squared error that covers all sites of a group."""
    low = high = 0.0
    for site in [site for site in sites if not site.repeats] or sites:
        found = mse(statistics[site.source].histogram, scheme)
        low, high = min(low, found[0], 0.0), max(high, found[1], 0.0)
    parameters = qparams(low, high, scheme)
    return Activation(float(parameters.scale), int(parameters.zero_point), scheme)
