"""Cross-layer equalization: output channels of one layer and input channels of the next get equal ranges.

Per-tensor weight scales are decided by the widest channel; a narrow one is left with few codes. Scaling channel ``i`` by
``s = sqrt(r1 r2) / r1`` in the first layer and by ``1 / s`` in the next gives both the range ``sqrt(r1 r2)``, which is optimal for the
product of the two precisions (Nagel et al. 2019, *Data-Free Quantization*, arXiv:1906.04721, section 4.1 and appendix A). Sites share
layers, so the pass is repeated until nothing moves.

Ranges are those of the deployed weights, with batch normalization folded; where it is kept, the factor goes into its gamma and beta, so its
statistics stay those of its input, and images synthesized from them stay valid.

Deviations from the paper: channels of a concatenation and of a layer with several readers are scaled too (``r2`` is the largest range of all
readers); dead channels (no weight on either side) are left alone, factors stay within 1e-4 .. 1e4, and where it is known how far channels reach,
none may take the range of the whole activation; with a Clip behind the layer nothing is scaled unless the caller says how (the paper replaces ReLU6 by Relu,
:func:`clips_to_relu`, which ruins networks whose activations use the bound).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import UsageError
from zsq_deploy.model.constants import own_constants
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.algebra.sites import Reader, Site, clip_bounds, find_sites
from zsq_deploy.quant.algebra.weights import LAYERS, Form, form_of

__all__ = ["Equalized", "clips_to_relu", "equalize"]

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

DEAD = 1e-6
"""A channel whose largest weight is below this share of the layer's is dead: weight decay has taken it away."""


@dataclass(frozen=True, eq=False)
class Equalized:
    """The outcome of :func:`equalize`.

    Attributes:
        graph: Same nodes, names and function; other numbers.
        factors: Layer -> what its output channels were multiplied with, ``[C]``.
        sites: What was found, in graph order.
        sweeps: How many passes it took.
        moved: Largest ``|log2 s|`` of the last pass: how far from done it is.
    """

    graph: Graph
    factors: Mapping[str, Vector] = field(repr=False)
    sites: tuple[Site, ...]
    sweeps: int
    moved: float


def clips_to_relu(graph: Graph) -> tuple[Graph, tuple[str, ...]]:
    """Replace every Clip between 0 and an upper bound by Relu, as the paper does with ReLU6.

    This changes the function where activations go beyond the bound: how much, only a comparison can say.

    Returns:
        The graph, and the names of the nodes that were replaced.
    """
    net = Net(graph.proto)
    done = []
    for node in net.nodes:
        if node.op_type != "Clip" or node.domain not in ("", "ai.onnx"):
            continue
        bounds = clip_bounds(graph, node)
        if bounds is None or bounds[0] != 0.0 or bounds[1] <= 0:
            continue
        del node.input[1:]
        del node.attribute[:]
        node.op_type = "Relu"
        done.append(node.name)
    net.touch()
    net.sweep()
    return (Graph(net.proto()) if done else graph), tuple(done)


class _Weights:
    """All weights as deployed (batch normalization folded), in float64, while channels are rescaled."""

    def __init__(self, graph: Graph, sites: Sequence[Site]) -> None:
        self.forms: dict[str, Form] = {}
        self.values: dict[str, Array] = {}
        for name in dict.fromkeys(name for site in sites for name in (site.layer, *(r.node for r in site.readers))):
            node = graph.node(name)
            form, weight = form_of(graph, node), graph.constant(node.input[1])
            assert form is not None
            assert weight is not None
            values = form.read(weight.astype(np.float64))
            gain = _norm_gain(graph, name)
            self.forms[name] = form
            self.values[name] = values * form.along_outputs(gain) if gain is not None else values.copy()

    def ranges(self, site: Site) -> tuple[Vector, Vector]:
        """``max |w|`` of every channel of a site, as its layer makes it and as its readers read it."""
        first: Vector = np.abs(self.values[site.layer]).max(axis=(2, 3)).reshape(-1)
        seen = [np.abs(self.values[reader.node]).max(axis=(1, 3)).reshape(-1) for reader in site.readers]
        parts = [r[reader.channels(site.channels)].max(axis=1) for r, reader in zip(seen, site.readers, strict=True)]
        second: Vector = np.max(parts, axis=0)
        return first, second

    def scale(self, site: Site, factors: Vector) -> None:
        form = self.forms[site.layer]
        self.values[site.layer] *= form.along_outputs(factors)
        for reader in site.readers:
            form = self.forms[reader.node]
            self.values[reader.node] *= form.along_inputs(_spread(reader, form, 1.0 / factors))


def _spread(reader: Reader, form: Form, factors: Vector) -> Vector:
    """Factors of the site's channels as factors of all input channels of a reader."""
    full = np.ones(form.inputs)
    full[reader.channels(len(factors))] = factors[:, None]
    return full


def _norm_gain(graph: Graph, layer: str) -> Vector | None:
    """What a batch normalization behind a layer multiplies its channels with."""
    readers = graph.consumers(graph.node(layer).output[0])
    if len(readers) != 1 or readers[0].op_type != "BatchNormalization":
        return None
    parts = [graph.constant(name) for name in readers[0].input[1:5]]
    if any(part is None for part in parts):
        return None
    gamma, _, _, var = (np.asarray(part, np.float64) for part in parts)
    eps = next((a.f for a in readers[0].attribute if a.name == "epsilon"), 1e-5)
    found: Vector = gamma / np.sqrt(var + eps)
    return found


def equalize(
    graph: Graph,
    *,
    clips: Literal["keep", "within", "cap"] = "keep",
    reach: Mapping[str, tuple[Vector, Vector]] | None = None,
    spread: float = 1.0,
    limit: float = 1e4,
    tolerance: float = 1e-3,
    sweeps: int = 100,
    powers_of_two: bool = False,
) -> Equalized:
    """Equalize the weight ranges of all sites of a float graph.

    Args:
        graph: Float graph, batch normalization folded or kept.
        clips: What becomes of sites with a Clip between 0 and a bound (ReLU6). ``keep``: they are left alone. ``cap``: the Clip becomes Min with
            one bound a channel and Relu (which keeps its name and output); exact, but runtimes compute such a Min in float. ``within``:
            the Clip stays; channels that `reach` the bound are not scaled, the others not so far that they reach it; exact only as far
            as `reach` is.
        reach: Layer -> how far each of its channels reaches downwards and upwards in front of the activation, two times ``[C]``.
        spread: Where the reach is known, no channel is scaled to more than this many times the reach of the median channel: equal weights are
            bought with the precision of the activations, and a channel that hardly varies could take their whole range. Downwards counts
            too, although Relu cuts it off: a dead channel's bias could leave the range of int32.
        limit: Largest factor, and its inverse the smallest.
        tolerance: Stop when no factor of a pass is further from 1 than this, in log2.
        sweeps: Largest number of passes.
        powers_of_two: Round the factors to powers of two: the function then stays the same to the last bit, and ranges become equal up
            to a factor of two.

    Returns:
        The graph with the same function (to float32 rounding), and what was done. The geometric mean of the factors of a site is 1
        where no bound holds any of them: a factor that all channels have in common changes nothing that matters.

    Raises:
        UsageError: `limit` or `spread` is below 1, or ``within`` without a reach.
    """
    for name, value in (("limit", limit), ("spread", spread)):
        if not value >= 1.0:
            raise UsageError(f"a {name} of {value:g} makes no sense", where=name, remedy="give a number of at least 1")
    if clips == "within" and reach is None:
        raise UsageError(
            "it has to be known how far channels reach", where="clips", remedy="give the reach, or cap clips"
        )
    graph = own_constants(graph, (*LAYERS, "BatchNormalization"))
    reach = reach or {}
    sites = [site for site in find_sites(graph, clips=clips != "keep") if _scalable(graph, site, clips, reach)]
    weights = _Weights(graph, sites)
    totals = {site.layer: np.ones(site.channels) for site in sites}
    bounds = {site.layer: _bounds(site, clips, reach.get(site.layer), limit) for site in sites}
    alive = {site.layer: _alive(weights, site) for site in sites}
    count, moved = 0, 0.0
    while count < sweeps and sites:
        count, moved = count + 1, 0.0
        for site in sites:
            makes, reads = alive[site.layer]
            both = makes & reads
            if not both.any():
                continue
            first, second = weights.ranges(site)
            known = reach.get(site.layer)
            # A channel that is not read may always shrink; one that nothing varies may grow only where its reach is known.
            moves = makes | reads if known is not None else makes
            least1, least2 = DEAD * first.max(), DEAD * second.max()
            wanted = np.where(moves, np.sqrt(np.maximum(second, least2) / np.maximum(first, least1)), 1.0)
            total = totals[site.layer] * np.clip(wanted, 1.0 / limit, limit)
            if not (site.clips and clips == "within"):
                total = np.where(moves, total / np.exp(np.log(total[both]).mean()), 1.0)
            if known is not None:
                total = _held(total, _far(*known, site.limit), both, spread)
            total = np.clip(total, *bounds[site.layer])
            step = total / totals[site.layer]
            weights.scale(site, step)
            totals[site.layer] = total
            moved = max(moved, float(np.abs(np.log2(step)).max()))
        if moved <= tolerance:
            break
    if powers_of_two:
        totals = {name: _power_of_two(factors, *bounds[name]) for name, factors in totals.items()}
    net = Net(graph.proto)
    for site in sites:
        _rescale(net, graph, site, totals[site.layer])
        if site.clips and clips == "cap":
            _cap(net, graph, site, totals[site.layer])
    return Equalized(Graph(net.proto()), totals, tuple(sites), count, moved)


def _alive(weights: _Weights, site: Site) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which channels a layer makes with weights that are not negligible, and which ones the readers read with such."""
    first, second = weights.ranges(site)
    return first > DEAD * first.max(), second > DEAD * second.max()


def _scalable(graph: Graph, site: Site, clips: str, reach: Mapping[str, tuple[Vector, Vector]]) -> bool:
    if not site.clips:
        return True
    return _capped(graph, site) if clips == "cap" else site.layer in reach


def _far(low: Vector, high: Vector, limit: float) -> Vector:
    """How far each channel reaches in either direction; upwards up to the bound of a Clip."""
    found: Vector = np.maximum(np.minimum(high, limit), -low)
    return np.maximum(found, 0.0)


def _held(factors: Vector, reach: Vector, alive: npt.NDArray[np.bool_], spread: float) -> Vector:
    """Factors with which no channel reaches further than `spread` times the median channel."""
    far = factors * reach
    usual = far[alive & (far > 0)]
    if not usual.size:
        return factors
    most = spread * float(np.median(usual))
    held: Vector = np.where(far > most, most / np.maximum(reach, 1e-30), factors)
    return held


def _bounds(site: Site, clips: str, reach: tuple[Vector, Vector] | None, limit: float) -> tuple[Vector, Vector]:
    """Smallest and largest factor of every channel."""
    low, high = np.full(site.channels, 1.0 / limit), np.full(site.channels, limit)
    if site.clips and clips == "within" and reach is not None:
        free = reach[1] < site.limit
        high = np.where(free, np.minimum(high, site.limit / np.maximum(reach[1], 1e-30)), 1.0)
        low = np.where(free, low, 1.0)
    return low, high


def _power_of_two(factors: Vector, low: Vector, high: Vector) -> Vector:
    """The nearest powers of two that keep to the bounds."""
    found = np.exp2(np.rint(np.log2(factors)))
    found = np.where(found > high, np.exp2(np.floor(np.log2(high))), found)
    result: Vector = np.where(found < low, np.exp2(np.ceil(np.log2(low))), found)
    return result


def _capped(graph: Graph, site: Site) -> bool:
    """Whether the site's Clip can have one bound a channel: one Clip directly behind the layer, on a feature map."""
    behind = graph.node(site.norm or site.layer).output[0]
    if len(site.clips) != 1 or site.shifts or [node.name for node in graph.consumers(behind)] != list(site.clips):
        return False
    bounds = clip_bounds(graph, graph.node(site.clips[0]))
    return bounds is not None and bounds[0] == 0.0 and len(graph.shape(behind) or ()) >= 3


def _cap(net: Net, graph: Graph, site: Site, factors: Vector) -> None:
    """Give the Clip of a site one bound a channel."""
    if np.all(factors == 1.0):
        return
    for name in site.clips:
        node = next(node for node in net.nodes if node.name == name)
        value = node.input[0]
        rank = len(graph.shape(value) or ())
        bounds = np.asarray(site.limit * factors, np.float32).reshape(1, -1, *[1] * (rank - 2))
        capped = net.fresh(f"{value}_capped")
        bound = net.add_constant(f"{name}.bounds", bounds)
        net.insert_before(node, net.new_node("Min", [value, bound], [capped], f"{name}/Min"))
        del node.input[:]
        del node.attribute[:]
        node.op_type = "Relu"
        node.input.append(capped)
    net.touch()


def _rescale(net: Net, graph: Graph, site: Site, factors: Vector) -> None:
    """Multiply the channels of a site with factors and divide what its readers multiply them with, in place.

    Args:
        net: The graph under change.
        graph: The graph that the site was found in; its nodes and constants have the same names.
        site: The site.
        factors: Positive, ``[C]``.
    """
    if site.norm:
        norm = graph.node(site.norm)
        for name in norm.input[1:3]:
            _multiply(net, name, factors)
    else:
        node = graph.node(site.layer)
        form = form_of(graph, node)
        assert form is not None
        _scale_weight(net, node.input[1], form, form.along_outputs(factors))
        if len(node.input) > 2 and node.input[2]:
            _multiply(net, node.input[2], factors)
    for name in site.shifts.values():
        _multiply(net, name, factors)
    for reader in site.readers:
        node = graph.node(reader.node)
        form = form_of(graph, node)
        assert form is not None
        _scale_weight(net, node.input[1], form, form.along_inputs(_spread(reader, form, 1.0 / factors)))


def _multiply(net: Net, name: str, factors: Vector) -> None:
    old = net.constant(name)
    assert old is not None
    values = np.broadcast_to(old.astype(np.float64).reshape(-1), factors.shape) * factors
    shape = old.shape if old.size == values.size else values.shape
    net.add_constant(name, np.asarray(values, old.dtype).reshape(shape), exact=True)


def _scale_weight(net: Net, name: str, form: Form, factors: Array) -> None:
    old = net.constant(name)
    assert old is not None
    values = form.write(form.read(old.astype(np.float64)) * factors)
    net.add_constant(name, np.asarray(values, old.dtype), exact=True)
