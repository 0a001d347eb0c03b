"""Layers that are left in float because 8 bits lose too much there: few, and of little arithmetic.

TensorRT's signed 8 bits have 127 steps behind a Relu. In narrow networks the noise of a few tensors, as a rule those between the first
layers and what depthwise convolutions read, is most of what reaches the outputs. Where the reference is nearer to noise than
:data:`ENOUGH_DB`, the layers with the most noise for their arithmetic are left in float, until it has :data:`GOAL_DB` or the share of the
multiply-accumulates that may stay in float is used up.

The noise of a layer is measured alone: only its operands are rounded, the mean error of each of its channels is taken out (as the correction
of biases does), and what is left at the network's outputs counts. That single noises add up is an assumption for the order only; every
choice is measured with all layers together.

Leaving sensitive layers in float until a network is good enough is what NNCF calls accuracy control, and what the automatic search of
NVIDIA's TensorRT Model Optimizer does with a limit on the cost; here no labels and no real images are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.measured import quality
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import MAC_OPS, place_qdq, plan_nodes
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.macs import node_macs
from zsq_deploy.model.twin import Twin
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import BiasSite, bias_sites

__all__ = ["ENOUGH_DB", "GOAL_DB", "Spared", "layer_noise", "spare"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Ranges = Mapping[str, tuple[float, float]]

ENOUGH_DB = 20.0
"""From this signal-to-noise ratio on (noise a tenth of the signal) every layer stays in 8 bits."""

GOAL_DB = 25.0
"""Once layers have to be left in float: where that ends. The images are few and not real, so it is not aimed at the limit itself."""

_WORTH_DB = 1.0
"""What leaving layers in float has to gain at least."""

_LEAST = 0.01
"""Share of all noise below which a layer is not worth being left in float."""


@dataclass(frozen=True)
class Spared:
    """Layers that are left in float.

    Attributes:
        nodes: Their names, in graph order.
        share: Their share of the network's multiply-accumulates.
        before: Signal to noise in dB with all layers in 8 bits.
        after: The same with these layers in float.
    """

    nodes: tuple[str, ...]
    share: float
    before: float
    after: float

    def record(self) -> dict[str, Any]:
        """JSON values for the manifest."""
        return {
            "spared": {
                "nodes": list(self.nodes),
                "macs_share": self.share,
                "sqnr_db_without": self.before,
                "sqnr_db": self.after,
            }
        }

    def describe(self) -> str:
        """One sentence."""
        return (
            f"{len(self.nodes)} layers stay in float, {self.share:.1%} of the multiply-accumulates: {self.after:.1f} dB against "
            f"{self.before:.1f} dB with all in 8 bits, on synthetic images (--float-macs 0: none; --float-type float16: in 16 bits)"
        )


def spare(
    graph: Graph,
    ranges: Ranges,
    target: Target,
    options: BuildOptions,
    batches: Sequence[Sequence[Feeds]],
    *,
    before: float,
    measure: Callable[[BuildOptions], float],
    progress: Progress = SILENT,
) -> Spared | None:
    """Find the layers to leave in float.

    Args:
        graph: Float graph with batch normalization folded.
        ranges: Range of every activation of it.
        target: One of the ``tensorrt-...`` targets.
        options: What to quantize and how; ``float_macs`` limits the share of the multiply-accumulates.
        batches: Kinds of images, each a list of batches; every kind has the same weight.
        before: Signal to noise in dB of the reference with these options, biases corrected.
        measure: The same for other options.
        progress: Watches.

    Returns:
        The layers; ``None`` where none have to be left in float, or it would not help.
    """
    if options.float_macs <= 0.0 or before >= ENOUGH_DB:
        return None
    macs = node_macs(graph)
    whole = sum(macs.values())
    if not whole:
        return None
    shares = {name: count / whole for name, count in macs.items() if count}
    noise = layer_noise(graph, ranges, target, options, batches, progress=progress)
    order = sorted(
        (name for name in noise if name in shares), key=lambda name: noise[name] / shares[name], reverse=True
    )
    chosen: list[str] = []
    used, ratio, left = 0.0, before, 1.0
    best: Spared | None = None
    waiting = [name for name in order if noise[name] >= _LEAST]
    while waiting and ratio < GOAL_DB:
        # As many as the sum of single noises asks for, and at least one.
        expected, taken = ratio, False
        for name in list(waiting):
            waiting.remove(name)
            if used + shares[name] > options.float_macs:
                continue
            chosen.append(name)
            used, taken = used + shares[name], True
            expected += 10.0 * float(np.log10(left / max(left - noise[name], 1e-3)))
            left = max(left - noise[name], 1e-3)
            if expected >= GOAL_DB:
                break
        if not taken:
            break
        nodes = tuple(node.name for node in graph if node.name in chosen)
        ratio = measure(options.with_(spared=nodes))
        if best is None or ratio > best.after:
            best = Spared(nodes, used, before, ratio)
    return best if best is not None and best.after >= before + _WORTH_DB else None


def layer_noise(
    graph: Graph,
    ranges: Ranges,
    target: Target,
    options: BuildOptions,
    batches: Sequence[Sequence[Feeds]],
    *,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Share of each quantized layer in the noise at the outputs, its operands rounded alone; all of them sum to 1.

    Args:
        graph: As for :func:`spare`, and so are the others.
        ranges: Ranges.
        target: The target.
        options: The options.
        batches: Kinds of images.
        progress: Watches.
    """
    planned, _ = plan_nodes(graph, ranges, options)
    layers = [name for name in planned if graph.node(name).op_type in MAC_OPS]
    free = options.with_(exact_scales=False, biases={})
    sites = {site.node: site for site in bias_sites(graph)} if options.bias_correction else {}
    wanted = [sites[name] for name in layers if name in sites]
    floating = [_float_pass(graph, kind, wanted) for kind in batches]
    found = np.zeros((len(layers), len(batches)))
    with progress.task("noise of each layer", len(layers)) as task:
        for row, name in enumerate(layers):
            others = tuple(one for one in planned if one != name)
            alone = place_qdq(graph, ranges, target, free.with_(exclude=(*options.exclude, *others))).graph
            twin = Twin(alone, device="cpu")
            for column, (kind, (outputs, means)) in enumerate(zip(batches, floating, strict=True)):
                got = list(_corrected_pass(twin, kind, sites.get(name), means.get(name)))
                found[row, column] = 10.0 ** (-quality(got, outputs)[1] / 10.0)
            task.advance(step=name)
    total = np.maximum(found.sum(0, keepdims=True), 1e-300)
    shares = (found / total).mean(1)
    return dict(zip(layers, (float(share) for share in shares), strict=True))


def _tensors(feeds: Feeds) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in feeds.items()}


def _mean(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Mean of each channel, broadcast against the tensor."""
    axis %= x.ndim
    return x.to(torch.float64).mean(tuple(place for place in range(x.ndim) if place != axis), keepdim=True)


def _float_pass(
    graph: Graph, kind: Sequence[Feeds], sites: Sequence[BiasSite]
) -> tuple[list[dict[str, Array]], dict[str, list[torch.Tensor]]]:
    """Outputs of the float network, and the channel means of its layers in each batch."""
    means: dict[str, list[torch.Tensor]] = {site.node: [] for site in sites}
    twin = Twin(graph, device="cpu")

    def look(site: BiasSite) -> Callable[[torch.Tensor], None]:
        return lambda x: means[site.node].append(_mean(x, site.axis))

    outputs = []
    with torch.no_grad():
        for feeds in kind:
            found = twin.run(_tensors(feeds), taps={site.output: look(site) for site in sites})
            outputs.append({name: value.numpy() for name, value in found.items()})
    return outputs, means


def _corrected_pass(
    twin: Twin, kind: Sequence[Feeds], site: BiasSite | None, means: Sequence[torch.Tensor] | None
) -> Iterator[dict[str, Array]]:
    """Outputs of a network in which one layer is rounded, that layer's channel means put right in each batch."""
    for number, feeds in enumerate(kind):
        taps: dict[str, Any] = {}
        if site is not None and means is not None:
            right, axis = means[number], site.axis

            def correct(x: torch.Tensor, right: torch.Tensor = right, axis: int = axis) -> torch.Tensor:
                return x + (right - _mean(x, axis)).to(x.dtype)

            taps[site.output] = correct
        with torch.no_grad():
            found = twin.run(_tensors(feeds), taps=taps)
        yield {name: value.numpy() for name, value in found.items()}
