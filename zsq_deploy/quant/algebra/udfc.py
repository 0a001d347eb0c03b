"""UDFC: what quantization takes from a channel is given back by the next layer, in closed form.

Bai et al. 2023, *Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning* (ICCV 2023, arXiv:2308.07209, section 3),
assume that a damaged channel is nearly a linear combination of the channels that are there, so that the next layer can make up for the damage
by other weights on its inputs. With ``w_i`` the deployed weight of channel ``i`` (batch normalization folded, so its parameters are in it),
``b_i`` its bias, and a hat on what is left after quantization, the combination ``t_i`` of channel ``i`` minimizes

    || w_i - sum_j t_ij w^_j ||^2  +  alpha1 (b_i - sum_j t_ij b^_j)^2  +  alpha2 || t_i - e_i ||^2

which is a ridge regression with the solution ``t_i = (G + alpha2 I)^-1 (c_i + alpha2 e_i)``, ``G = W^ W^' + alpha1 b^ b^'``, ``c_i = W^ w_i +
alpha1 b^ b_i``. The next layer with weight ``V`` then reads ``V T``. A depthwise reader mixes no channels: there ``t_ii`` alone is free.

What is ours: the paper was at hand in second-hand descriptions only, which fix the assumption, a convex closed form with two constants (0.01 and
0.008) and the use of batch-norm parameters. Its terms are written here for weights with batch normalization folded, the second constant
pulls towards the identity, and the squares are relative to the mean square of a channel's weight, so that the constants mean the same in
every layer. The combination is exact for linear channels; a Relu in between makes it an approximation, which the pull keeps small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.model.constants import own_constants, replace_constants
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.algebra.sites import Reader, Site, find_sites
from zsq_deploy.quant.algebra.weights import LAYERS, Form, form_of
from zsq_deploy.quant.fakequant import weight_qparams
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["ALPHA_BIAS", "ALPHA_IDENTITY", "Compensated", "combine", "udfc"]

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

ALPHA_BIAS = 0.01
"""Weight of the bias term."""

ALPHA_IDENTITY = 0.008
"""Weight of the pull towards leaving channels as they are."""


@dataclass(frozen=True, eq=False)
class Compensated:
    """The outcome of :func:`udfc`.

    Attributes:
        graph: The folded float graph with compensated weights; quantize it with the scheme that was given.
        damage: Layer -> squared error of its weights that quantization causes.
        left: Layer -> what of it is left behind the combination.
    """

    graph: Graph
    damage: Mapping[str, float] = field(repr=False)
    left: Mapping[str, float] = field(repr=False)


def combine(
    weight: Doubles,
    bias: Doubles,
    damaged: Doubles,
    damaged_bias: Doubles,
    *,
    alpha_bias: float = ALPHA_BIAS,
    alpha_identity: float = ALPHA_IDENTITY,
    diagonal: bool = False,
) -> Doubles:
    """The combinations of damaged channels that stand for the whole ones.

    Args:
        weight: ``[C, N]``, one row a channel.
        bias: ``[C]``.
        damaged: ``[C, N]``.
        damaged_bias: ``[C]``.
        alpha_bias: Weight of the bias term, against a mean square weight of 1.
        alpha_identity: Weight of the pull towards the identity; must be above 0 where channels depend on each other.
        diagonal: Every channel may only be scaled.

    Returns:
        ``T [C, C]``: channel ``i`` is nearly ``sum_j T[i, j]`` damaged channel ``j``.
    """
    size = float(np.square(weight).sum(axis=1).mean()) or 1.0
    left = np.concatenate([damaged, np.sqrt(alpha_bias) * damaged_bias[:, None]], axis=1) / np.sqrt(size)
    right = np.concatenate([weight, np.sqrt(alpha_bias) * bias[:, None]], axis=1) / np.sqrt(size)
    if diagonal:
        gains = ((left * right).sum(axis=1) + alpha_identity) / (np.square(left).sum(axis=1) + alpha_identity)
        return np.diag(gains)
    eye = np.eye(len(weight))
    found: Doubles = np.linalg.solve(left @ left.T + alpha_identity * eye, left @ right.T + alpha_identity * eye).T
    return found


def udfc(
    graph: Graph,
    weight: Scheme,
    *,
    alpha_bias: float = ALPHA_BIAS,
    alpha_identity: float = ALPHA_IDENTITY,
    exclude: frozenset[str] = frozenset(),
) -> Compensated:
    """Compensate the rounding of each layer's weights in the layers that read it, from the first to the last.

    Args:
        graph: Folded float graph.
        weight: How the weights are going to be rounded (to nearest, on min-max scales).
        alpha_bias: See :func:`combine`.
        alpha_identity: See :func:`combine`.
        exclude: Layers whose weights are not rounded.

    Returns:
        A float graph whose weights, rounded with `weight`, are those of the method.
    """
    graph = own_constants(graph, LAYERS)
    current: dict[str, Array] = {}
    damage: dict[str, float] = {}
    left: dict[str, float] = {}
    for site in find_sites(graph, clips=True):
        if site.layer in exclude or site.norm or len(site.shifts) > 1:
            continue
        forms = {name: form_of(graph, graph.node(name)) for name in (site.layer, *(r.node for r in site.readers))}
        first = forms[site.layer]
        assert first is not None
        whole = first.read(_weight(graph, site.layer, current))
        rounded = first.read(_rounded(_weight(graph, site.layer, current), weight, first))
        rows, hat = (values.reshape(first.outputs, -1) for values in (whole, rounded))
        if first.groups > 1:  # channels of other groups read other inputs
            rows, hat = (_apart(values, first) for values in (whole, rounded))
        bias = _bias(graph, site)
        error = float(np.square(rows - hat).sum())
        least = error
        for reader in site.readers:
            form = forms[reader.node]
            assert form is not None
            alone = form.groups > 1
            mixing = combine(
                rows, bias, hat, bias, alpha_bias=alpha_bias, alpha_identity=alpha_identity, diagonal=alone
            )
            values = form.read(_weight(graph, reader.node, current).astype(np.float64))
            current[reader.node] = form.write(_mixed(values, form, reader, mixing))
            least = float(np.square(rows - mixing @ hat).sum())
        damage[site.layer], left[site.layer] = error, least
    names = {graph.node(layer).input[1]: values for layer, values in current.items()}
    return Compensated(replace_constants(graph, names), damage, left)


def _weight(graph: Graph, layer: str, current: Mapping[str, Array]) -> Array:
    if layer in current:
        return current[layer]
    weight = graph.constant(graph.node(layer).input[1])
    assert weight is not None
    return weight.astype(np.float64)


def _rounded(weight: Array, scheme: Scheme, form: Form) -> Doubles:
    grouped = form.op == "ConvTranspose" and form.groups > 1
    if scheme.granularity is Granularity.CHANNEL and grouped:
        scheme = Scheme(
            scheme.bits, scheme.signed, scheme.symmetric, Granularity.TENSOR, scheme.restricted, scheme.reduced
        )
    axis = {Granularity.CHANNEL: form.output_axis, Granularity.BLOCK: 1 - form.output_axis}.get(scheme.granularity)
    parameters = weight_qparams(weight.astype(np.float32), scheme, axis)
    return parameters.dequantize(parameters.quantize(weight)).astype(np.float64)


def _apart(values: Array, form: Form) -> Doubles:
    """Rows ``[outputs, groups * inputs / groups * elements]`` with zeros where a channel reads nothing."""
    groups, outputs, inputs, elements = values.shape
    full = np.zeros((groups, outputs, groups, inputs * elements))
    for group in range(groups):
        full[group, :, group] = values[group].reshape(outputs, -1)
    return full.reshape(form.outputs, -1)


def _bias(graph: Graph, site: Site) -> Doubles:
    node = graph.node(site.layer)
    names = [*node.input[2:3], *site.shifts.values()]
    total = np.zeros(site.channels)
    for bias in (graph.constant(name) for name in names if name):
        assert bias is not None
        total += bias.astype(np.float64).reshape(-1)
    return total


def _mixed(values: Doubles, form: Form, reader: Reader, mixing: Doubles) -> Doubles:
    """Weights of a reader ``[groups, outputs, inputs, elements]`` on combined channels."""
    result = values.copy()
    places = reader.channels(len(mixing))
    if form.groups > 1:
        gains = np.ones(form.inputs)
        gains[places] = np.diag(mixing)[:, None]
        return result * form.along_inputs(gains)
    # V' [o, j] = sum_i V[o, i] T[i, j], at every place that a channel is repeated to.
    taken = values[0][:, places]
    result[0][:, places] = np.einsum("oirk,ij->ojrk", taken, mixing)
    return result
