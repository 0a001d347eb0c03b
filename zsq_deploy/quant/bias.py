"""Bias correction: the mean error that quantization makes in each output channel is taken out of the bias.

Rounded weights and clipped activations shift the mean of each channel; in depthwise convolutions, with few weights a channel, by a
good part of its spread (Nagel et al. 2019, *Data-Free Quantization*, section 4.2). Empirically, the shift is measured between the float
twin and the quantized twin on synthetic images. Analytically, it is ``(W_quantized - W) E[x]``, with ``E[x]`` from the batch
normalizations.

Only rounding is to be corrected. Synthetic images can drive activations beyond the ranges much more often than real ones do; the
shift that clipping them causes says nothing about real images. So the float pass saturates every activation where the Q/DQ graph
does (``saturate=False`` measures clipping too).

Where a Relu or Clip alone reads a layer, not the mean in front of it is corrected but the squared error behind it
(:mod:`zsq_deploy.quant.shifts` says why). Everywhere else the two are the same.

The empirical correction is sequential: when a layer is measured, all layers before it are corrected already. Both passes are one
forward each. The float pass only leaves means and some places of every channel behind. The quantized pass runs all images as one batch, measures
each layer as soon as it is computed, and corrects the value before anything reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.editing import Net, is_default
from zsq_deploy.model.fold import Folded
from zsq_deploy.model.graph import Graph, attributes
from zsq_deploy.model.model import Model
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.analytic import propagate_model
from zsq_deploy.quant.reader import dequantized_weight, read_qdq
from zsq_deploy.quant.shifts import bounds_behind, least_squares_shift, sampled
from zsq_deploy.quant.statistics import micro_batches

__all__ = ["BiasSite", "apply_biases", "bias_sites", "correct_bias", "correct_bias_analytically"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BiasSite:
    """A layer of the folded graph whose bias can be corrected.

    Attributes:
        node: Name of the Conv, ConvTranspose, Gemm or MatMul node.
        output: Value of the folded graph behind the bias.
        key: Where the corrected bias goes: the node's name, or (MatMul with an Add behind it) the name of the Add's constant.
        bias: The bias as it is, float32, in the shape in which it is stored (zeros ``[C]`` where the layer has none).
        axis: Channel axis of the output.
    """

    node: str
    output: str
    key: str
    bias: Array
    axis: int


def bias_sites(graph: Graph) -> list[BiasSite]:
    """All layers of a float graph whose bias can be corrected on its own, in graph order."""
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    found: list[BiasSite] = []
    for node in graph.nodes:
        if not is_default(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        weight = graph.constant(node.input[1])
        if weight is None:
            continue
        if node.op_type == "MatMul":
            site = _matmul_site(graph, node, weight, readers)
            if site is not None:
                found.append(site)
            continue
        attrs = attributes(node)
        if node.op_type == "Conv":
            channels = weight.shape[0]
        elif node.op_type == "ConvTranspose":
            channels = weight.shape[1] * int(attrs.get("group", 1))
        else:
            if attrs.get("beta", 1.0) != 1.0:
                continue
            channels = weight.shape[0] if attrs.get("transB", 0) else weight.shape[1]
        bias = np.zeros(channels, np.float32)
        if len(node.input) > 2 and node.input[2]:
            given = graph.constant(node.input[2])
            if given is None or given.size != channels or readers[node.input[2]] > 1:
                continue
            bias = given
        found.append(BiasSite(node.name, node.output[0], node.name, bias, 1))
    return found


def _matmul_site(graph: Graph, node: onnx.NodeProto, weight: Array, readers: Mapping[str, int]) -> BiasSite | None:
    consumers = graph.consumers(node.output[0])
    if (
        weight.ndim != 2
        or len(consumers) != 1
        or graph.is_output(node.output[0])
        or not is_default(consumers[0], "Add")
    ):
        return None
    add = consumers[0]
    other = next((name for name in add.input if name != node.output[0]), "")
    bias = graph.constant(other)
    if bias is None or bias.size != weight.shape[1] or bias.shape[-1] != weight.shape[1] or readers[other] > 1:
        return None
    if other not in graph.initializer_names:
        return None
    return BiasSite(node.name, add.output[0], other, bias, -1)


def _channel_mean(x: torch.Tensor, axis: int) -> torch.Tensor:
    channels = x.shape[axis]
    # Means of planes in float32, their mean in float64.
    if axis in (-1, x.ndim - 1):
        return x.reshape(-1, channels).mean(0, dtype=torch.float64)
    return x.reshape(x.shape[0], channels, -1).mean(2).to(torch.float64).mean(0)


def _chunks(arrays: Mapping[str, Array], size: int) -> Iterator[dict[str, Array]]:
    return micro_batches([arrays], size)


def correct_bias(
    folded: Folded | Graph,
    qdq: Graph,
    batches: Iterable[Mapping[str, Array]],
    *,
    saturate: bool = True,
    memory: int = 1 << 30,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Array]:
    """Corrected biases of all layers that the Q/DQ graph quantizes, measured on (synthetic) images.

    Args:
        folded: The float network with batch normalization folded.
        qdq: The Q/DQ graph made from it; layers are matched by node name.
        batches: Images by input name; all of them are used, unless `memory` does not allow it.
        saturate: Let the float pass saturate where the Q/DQ graph does, so that rounding alone is measured.
        memory: Bytes that the activations of the quantized pass may take; fewer images are used where they would take more.
        device: Where to compute.
        seed: Not used: the measurement draws nothing.
        progress: Where to report.

    Returns:
        Node name (or the name of the bias initializer behind a MatMul) to the corrected bias, float32, in the shape of the old one.

    Raises:
        CalibrationError: There are no images.
    """
    from zsq_deploy.model.twin import Twin

    del seed
    graph = folded.graph if isinstance(folded, Folded) else folded
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [dict(batch) for batch in batches]
    if not parts:
        raise CalibrationError(
            "bias correction needs images", where="correct_bias", remedy="hand in at least one batch"
        )
    images = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    sites = [site for site in bias_sites(graph) if site.node in qdq and _carries_bias(qdq, site)]
    if not sites:
        return {}
    count = len(next(iter(images.values())))
    floating = Twin(graph, dtype=torch.float32, device=place)

    def feed(batch: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(place) for name, array in batch.items()}

    largest = 1

    def measure_size(x: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, x.numel())

    with torch.no_grad(), progress.task("bias correction", 2.0 * len(sites)) as task:
        first = feed({name: array[:1] for name, array in images.items()})
        floating.run(first, fetch=(), taps=dict.fromkeys((site.output for site in sites), measure_size))
        # Input, accumulator, codes and rounded numbers of the widest layer, and as much again for what else is alive.
        count = max(1, min(count, memory // (largest * 4 * 8)))
        images = {name: array[:count] for name, array in images.items()}

        limits = _limits(graph, qdq) if saturate else {}
        bounds = {
            site.node: found
            for site in sites
            if site.axis == 1 and (found := bounds_behind(graph, site.output, limits)) is not None
        }
        means: dict[str, torch.Tensor] = {}
        places: dict[str, list[torch.Tensor]] = {}
        share, at, size = 1.0, 0, 0

        def remember(site: BiasSite) -> Any:
            def look(x: torch.Tensor) -> None:
                # weighed by images, not by axis 0: attention layers put the tokens there
                mean = _channel_mean(x, site.axis) * share
                means[site.node] = means[site.node] + mean if site.node in means else mean
                if site.node in bounds and x.dim() in (2, 3, 4) and len(x) == size:
                    places.setdefault(site.node, []).append(sampled(x, at, count).clamp(*bounds[site.node]))

            return look

        looks: dict[str, Any] = {site.output: remember(site) for site in sites}
        taps = _saturations(limits, looks)
        for batch in _chunks(images, 16):
            size = len(next(iter(batch.values())))
            share = size / float(count)
            floating.run(feed(batch), fetch=(), taps=taps)
            at += size
        task.advance(len(sites))

        corrections: dict[str, torch.Tensor] = {}

        def correct(site: BiasSite) -> Any:
            def change(x: torch.Tensor) -> torch.Tensor:
                axis = _qdq_axis(qdq, site, x)
                wanted = torch.cat(places.pop(site.node), 1) if site.node in places else None
                seen = sampled(x, 0, count) if wanted is not None and axis == 1 and len(x) == count else None
                if wanted is not None and seen is not None and seen.shape == wanted.shape:
                    shift = least_squares_shift(seen, wanted, *bounds[site.node])
                else:
                    shift = means[site.node] - _channel_mean(x, axis)
                corrections[site.node] = shift
                task.advance()
                form = [1] * x.ndim
                form[axis] = -1
                return x + shift.to(x.dtype).reshape(form)

            return change

        quantized = Twin(qdq, dtype=torch.float32, device=place)
        taps = {_qdq_output(qdq, site): correct(site) for site in sites}
        quantized.run(feed(images), fetch=(), taps=taps)
    return {
        site.key: np.asarray(
            site.bias.astype(np.float64) + corrections[site.node].cpu().numpy().reshape(site.bias.shape), np.float32
        )
        for site in sites
        if site.node in corrections
    }


def _limits(graph: Graph, qdq: Graph) -> dict[str, tuple[float, float]]:
    """Value of the float graph -> smallest and largest number that the Q/DQ graph can hold there."""
    known = {spec.name for spec in graph.inputs} | {name for node in graph.nodes for name in node.output}
    return {t.name: (t.low, t.high) for t in read_qdq(qdq) if not t.is_weight and t.name in known}


def _saturations(limits: Mapping[str, tuple[float, float]], looks: Mapping[str, Any]) -> dict[str, Any]:
    """Taps that keep the activations of the float graph inside what the Q/DQ graph can represent, after looking at them."""

    def tap(name: str) -> Any:
        low, high = limits[name]
        look = looks.get(name)

        def saturated(x: torch.Tensor) -> torch.Tensor:
            if look is not None:
                look(x)
            return x.clamp(low, high)

        return saturated

    return {**looks, **{name: tap(name) for name in limits}}


def _carries_bias(qdq: Graph, site: BiasSite) -> bool:
    """Whether the node of that name computes the same thing in the Q/DQ graph (a MatMul may have become a Gemm with its bias)."""
    node = qdq.node(site.node)
    return node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and (
        node.op_type != "MatMul" or bool(_qdq_output(qdq, site))
    )


def _qdq_output(qdq: Graph, site: BiasSite) -> str:
    """The value of the Q/DQ graph behind the bias."""
    node = qdq.node(site.node)
    if node.op_type != "MatMul":
        return str(node.output[0])
    value = node.output[0]
    while True:
        # The bias is added behind the product's own Q/DQ, if it has one.
        readers = qdq.consumers(value)
        if len(readers) != 1:
            return ""
        if readers[0].op_type in ("QuantizeLinear", "DequantizeLinear"):
            value = readers[0].output[0]
            continue
        return str(readers[0].output[0]) if readers[0].op_type == "Add" else ""


def _qdq_axis(qdq: Graph, site: BiasSite, x: torch.Tensor) -> int:
    return 1 if qdq.node(site.node).op_type in ("Conv", "ConvTranspose") else x.ndim - 1


def correct_bias_analytically(model: Model, qdq: Graph) -> dict[str, Array]:
    """Corrected biases from the network alone: ``b - (W_quantized - W) E[x]`` with ``E[x]`` from batch normalization.

    Only the rounding of weights is corrected, and only behind activations whose mean a batch normalization determines.

    Args:
        model: The network.
        qdq: The Q/DQ graph made from its folded form.
    """
    graph = model.folded().graph
    found = propagate_model(model).channels
    result: dict[str, Array] = {}
    for site in bias_sites(graph):
        if site.node not in qdq:
            continue
        node = graph.node(site.node)
        channels = found.get(node.input[0])
        weight, rounded = graph.constant(node.input[1]), dequantized_weight(qdq, qdq.node(site.node).input[1])
        if (
            channels is None
            or channels.kind == "interval"
            or weight is None
            or rounded is None
            or channels.axis is None
        ):
            continue
        if rounded.shape != weight.shape or node.op_type == "ConvTranspose":
            continue
        error = rounded.astype(np.float64) - weight.astype(np.float64)
        if node.op_type == "Conv":
            group = int(attributes(node).get("group", 1))
            error = error.reshape(*error.shape[:2], -1).sum(2)
            mean = np.repeat(channels.mean.reshape(group, -1), len(error) // group, axis=0)
        else:
            error = error if node.op_type == "Gemm" and attributes(node).get("transB", 0) else error.T
            mean = channels.mean[None, :]
        if mean.shape[1] != error.shape[1]:
            continue
        shift = -(error * mean).sum(1)
        result[site.key] = np.asarray(site.bias.astype(np.float64) + shift.reshape(site.bias.shape), np.float32)
    return result


def apply_biases(graph: Graph, biases: Mapping[str, Array]) -> Graph:
    """A float graph with other biases.

    Args:
        graph: The folded graph.
        biases: As :func:`correct_bias` gives them.
    """
    net = Net(graph.proto)
    by_name = {node.name: node for node in net.nodes}
    for key, values in biases.items():
        array = np.asarray(values, np.float32)
        if key in by_name:
            node = by_name[key]
            if len(node.input) > 2 and node.input[2]:
                old = net.constant(node.input[2])
                array = array.reshape(old.shape) if old is not None else array
                node.input[2] = net.add_constant(f"{node.input[2]}_corrected", array)
            else:
                while len(node.input) < 3:
                    node.input.append("")
                node.input[2] = net.add_constant(f"{key}_bias", array)
        else:
            net.add_constant(key, array, exact=True)
    net.touch()
    net.sweep()
    return Graph(net.proto())
