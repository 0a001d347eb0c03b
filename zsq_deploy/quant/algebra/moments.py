"""Rounding weights for what their layer reads: means and covariances of its inputs, from the network's parameters or from pictures.

SQuant (:mod:`~zsq_deploy.quant.algebra.squant`) takes all inputs of a layer to be alike. Batch normalization says more: mean and variance of every
channel, and by way of the weights in front how channels and places move together (:func:`analytic_moments`). Networks without it, and
whoever has pictures, can measure (:func:`measured_moments`). :func:`round_by_moments` finds scales and codes with a small squared error
``E (e' x)^2`` of the output.

The mean of that error is what bias correction takes out afterwards; it is counted with a share only, because means are not known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from zsq_deploy.errors import UsageError
from zsq_deploy.model.constants import own_constants, replace_constants
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant.algebra.covariance import Field, covariances
from zsq_deploy.quant.algebra.rounding import damped, round_weights, search_scales
from zsq_deploy.quant.algebra.squant import recoded
from zsq_deploy.quant.algebra.weights import LAYERS, Form, form_of
from zsq_deploy.quant.analytic import Channels, propagate_model
from zsq_deploy.quant.scheme import Scheme

__all__ = ["LayerMoments", "Rounded", "analytic_moments", "measured_moments", "recode_by_moments", "round_by_moments"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What a layer reads, in the order of its weight: input channels of a group, then kernel elements.

    Attributes:
        mean: ``[groups, K]``.
        cov: ``[groups, K, K]``.
    """

    mean: Vector
    cov: Vector

    def second(self, share: float) -> Vector:
        """Covariance, and `share` of the squared mean: ``[groups, K, K]``."""
        return self.cov + share * self.mean[:, :, None] * self.mean[:, None, :]


@dataclass(frozen=True, eq=False)
class Rounded:
    """The outcome of :func:`round_by_moments`.

    Attributes:
        graph: The float graph with weights on their grids.
        scales: Initializer name of each weight -> its scales, ``[outputs]``, as :func:`~zsq_deploy.quant.insert_qdq` takes them.
        layers: Layers that were rounded; others keep their weights.
    """

    graph: Graph
    scales: Mapping[str, Vector] = field(repr=False)
    layers: tuple[str, ...]


def _layers(graph: Graph) -> list[tuple[onnx.NodeProto, Form]]:
    """Layers whose inputs can be written as patches, with their forms (transposed convolutions cannot)."""
    found = [(node, form_of(graph, node)) for node in graph.nodes if node.op_type in LAYERS]
    return [
        (node, form)
        for node, form in found
        if form is not None and form.op != "ConvTranspose" and len(form.shape) in (2, 4)
    ]


def _places(node: onnx.NodeProto, form: Form) -> Array:
    """Where the kernel elements look, ``[elements, 2]``."""
    if form.op != "Conv":
        return np.zeros((1, 2), np.int64)
    rows, columns = attributes(node).get("dilations", (1, 1))
    return np.array([(y * rows, x * columns) for y in range(form.shape[2]) for x in range(form.shape[3])])


def analytic_moments(model: Model) -> dict[str, LayerMoments]:
    """Moments of what every layer reads, from the network's parameters alone.

    Args:
        model: The network with its batch normalizations.

    Returns:
        Layer name -> moments. Where channels cannot be followed together, they count as independent. Layers behind activations of which
        hard bounds only are known are left out.
    """
    marginals, fields = propagate_model(model).channels, covariances(model)
    found: dict[str, LayerMoments] = {}
    for node, form in _layers(model.graph):
        known = marginals.get(node.input[0])
        if known is None or known.kind == "interval" or len(known.mean) not in (1, form.inputs):
            continue
        found[node.name] = _analytic(node, form, known, fields.get(node.input[0]))
    return found


def _analytic(node: onnx.NodeProto, form: Form, known: Channels, together: Field | None) -> LayerMoments:
    places, inner = _places(node, form), form.inputs // form.groups
    mean, var = (np.broadcast_to(values, (form.inputs,)) for values in (known.mean, known.var))
    if together is not None and len(together.cov) == form.inputs:
        blocks = [slice(group * inner, (group + 1) * inner) for group in range(form.groups)]
        cov = np.stack([Field(together.cov[block, block]).patches(places) for block in blocks])
    else:
        spread = np.repeat(var, len(places)).reshape(form.groups, -1)
        cov = np.stack([np.diag(values) for values in spread])
    return LayerMoments(np.repeat(mean, len(places)).reshape(form.groups, -1), cov)


def measured_moments(
    graph: Graph, batches: Iterable[Mapping[str, Array]], *, patches: int = 4096, seed: int = 0
) -> dict[str, LayerMoments]:
    """Moments of what every layer reads, measured on pictures.

    Args:
        graph: Float graph, batch normalization folded or kept.
        batches: Pictures by input name.
        patches: How many patches of a batch are looked at in one layer, drawn at random.
        seed: Of the draw.

    Raises:
        UsageError: There are no pictures.
    """
    layers: dict[str, list[tuple[onnx.NodeProto, Form]]] = {}
    for node, form in _layers(graph):
        layers.setdefault(node.input[0], []).append((node, form))
    sums: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)

    def look(value: str) -> Callable[[torch.Tensor], None]:
        def add(x: torch.Tensor) -> None:
            for node, form in layers[value]:
                rows = _read(x, node, form)
                if len(rows) > patches:
                    rows = rows[torch.randperm(len(rows), generator=generator)[:patches]]
                parts = rows.to(torch.float64).reshape(len(rows), form.groups, -1)
                count, first, second = sums.get(node.name, (0, torch.zeros(()), torch.zeros(())))
                products = torch.einsum("ngk,ngl->gkl", parts, parts)
                sums[node.name] = (count + len(parts), first + parts.sum(0), second + products)

        return add

    twin = Twin(graph, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for batch in batches:
            feeds = {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}
            twin.run(feeds, fetch=(), taps={value: look(value) for value in layers})
    if not sums:
        raise UsageError("there is nothing to measure", where="measured_moments", remedy="hand in at least one batch")
    found: dict[str, LayerMoments] = {}
    for name, (count, first, second) in sums.items():
        mean = (first / count).numpy()
        found[name] = LayerMoments(mean, second.numpy() / count - mean[:, :, None] * mean[:, None, :])
    return found


def _read(x: torch.Tensor, node: onnx.NodeProto, form: Form) -> torch.Tensor:
    """What a layer reads, one row an output position: ``[rows, inputs * elements]``."""
    if form.op != "Conv":
        return x.reshape(-1, x.shape[-1])
    attrs = attributes(node)
    top, left, bottom, right = attrs.get("pads", (0, 0, 0, 0))
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    columns = torch.nn.functional.unfold(
        padded,
        form.shape[2:],
        dilation=tuple(attrs.get("dilations", (1, 1))),
        stride=tuple(attrs.get("strides", (1, 1))),
    )
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def round_by_moments(
    graph: Graph,
    moments: Mapping[str, LayerMoments],
    scheme: Scheme,
    *,
    mean_share: float = 0.1,
    damping: float = 0.01,
    candidates: int = 12,
) -> Rounded:
    """Scales and codes of all weights, one scale an output channel, with a small squared error of what the layers give.

    Args:
        graph: Float graph, batch normalization folded.
        moments: Layer -> what it reads; layers that are missing keep their weights.
        scheme: Signed and symmetric.
        mean_share: How much of a shift of the output counts: 1 without bias correction behind it, 0 if that knew the means exactly.
        damping: Share of the mean variance that is added to all variances.
        candidates: How many scales are tried for each channel.

    Raises:
        UsageError: The scheme is not symmetric, or moments do not fit their layer.
    """
    if not (scheme.signed and scheme.symmetric):
        raise UsageError(
            f"{scheme} has a zero point", where="round_by_moments", remedy="give a signed, symmetric scheme"
        )
    graph = own_constants(graph, LAYERS)
    weights: dict[str, Array] = {}
    scales: dict[str, Vector] = {}
    done: list[str] = []
    for node, form in _layers(graph):
        stored = graph.constant(node.input[1])
        if node.name not in moments or stored is None:
            continue
        values = form.read(stored.astype(np.float64))
        groups, per = values.shape[:2]
        second = moments[node.name].second(mean_share)
        size = values[0, 0].size
        if second.shape != (groups, size, size):
            raise _misfit(node, second, groups, size)
        rounded, scale = np.empty_like(values), np.empty((groups, per))
        for group, rows in enumerate(values.reshape(groups, per, size)):
            hessian = damped(second[group], damping)
            found, codes = search_scales(rows, hessian, scheme.qmin, scheme.qmax, candidates=candidates)
            scale[group] = np.asarray(found, np.float32)
            rounded[group] = (codes * scale[group][:, None]).reshape(values[group].shape)
        weights[node.input[1]] = np.asarray(form.write(rounded), np.float32)
        scales[node.input[1]] = scale.reshape(-1)
        done.append(node.name)
    return Rounded(replace_constants(graph, weights), scales, tuple(done))


def recode_by_moments(
    qdq: Graph,
    floats: Graph,
    moments: Mapping[str, LayerMoments],
    *,
    mean_share: float = 0.1,
    damping: float = 0.01,
    grids: Mapping[str, tuple[int, int]] | None = None,
) -> Graph:
    """A Q/DQ graph with codes that make the squared error of each layer's output small, on the scales that are there.

    Args:
        qdq: As :func:`~zsq_deploy.quant.algebra.squant.squant` takes it.
        floats: The float graph that it was made from.
        moments: Layer -> what it reads; layers that are missing keep their codes.
        mean_share: See :func:`round_by_moments`.
        damping: See :func:`round_by_moments`.
        grids: Layer -> smallest and largest code.

    Raises:
        UsageError: A float weight or moments do not fit their layer.
    """

    def choose(node: onnx.NodeProto, steps: Vector, low: int, high: int) -> npt.NDArray[np.int64] | None:
        if node.name not in moments:
            return None
        groups, per, inner, elements = steps.shape
        second = moments[node.name].second(mean_share)
        if second.shape != (groups, inner * elements, inner * elements):
            raise _misfit(node, second, groups, inner * elements)
        rows = steps.reshape(groups, per, -1)
        found = [round_weights(rows[g], damped(second[g], damping), low, high) for g in range(groups)]
        return np.stack(found).reshape(steps.shape)

    return recoded(qdq, floats, choose, grids=grids)


def _misfit(node: onnx.NodeProto, second: Vector, groups: int, size: int) -> UsageError:
    return UsageError(
        f"moments of shape {second.shape} for {groups} groups of {size} inputs",
        where=node.name,
        remedy="give moments of this graph",
    )
