"""Low bits in a target's own Q/DQ graph: its places and its 8-bit ranges stay, codes and scales of fewer bits are put in by name.

A backend decides where Q/DQ may stand and finds the ranges of 8-bit activations; that graph is taken apart (:func:`take_apart`), weights and
activations of fewer bits are found or learned on it, and the numbers go back into it. What the engine is built from is therefore exactly what was
learned. Scales are moved to numbers with which the engine computes what the graph says (:mod:`zsq_deploy.quant.reconstruct.exact`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch

from zsq_deploy.artifact import digest_bytes, digest_json
from zsq_deploy.errors import ModelError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.algebra.moments import LayerMoments, measured_moments, recode_by_moments
from zsq_deploy.quant.algebra.squant import squant
from zsq_deploy.quant.qdq import PlacementRules, raise_opset
from zsq_deploy.quant.reader import is_dequantize, read_qdq
from zsq_deploy.quant.reconstruct.cache import Cache
from zsq_deploy.quant.reconstruct.checkpoint import Checkpoints
from zsq_deploy.quant.reconstruct.exact import FINE, exact_activations, exact_weights, tying_sums
from zsq_deploy.quant.reconstruct.images import with_mirror_images
from zsq_deploy.quant.reconstruct.presets import Preset
from zsq_deploy.quant.reconstruct.protocol import Assignment, Bits, LayerBits, Protocol, assign
from zsq_deploy.quant.reconstruct.quantizers import weight_scales
from zsq_deploy.quant.reconstruct.state import Activation, State, Weight, activation_range, with_bits
from zsq_deploy.quant.reconstruct.template import Template, take_apart
from zsq_deploy.quant.reconstruct.work import BlockReport, Work
from zsq_deploy.quant.reconstruct.writing import write
from zsq_deploy.quant.scheme import Granularity, Scheme
from zsq_deploy.quant.statistics import collect
from zsq_deploy.quant.statistics_values import Statistics

__all__ = ["ROUNDINGS", "LowBits", "Numbers", "Places", "find_numbers", "pack_int4"]

Array = npt.NDArray[Any]

ROUNDINGS: tuple[str, ...] = ("nearest", "squant", "moments", "learned")
"""How weights find their codes."""

_MOMENT_IMAGES = 128
"""Images that moments are measured on: patches are many, and their moments settle quickly."""


@dataclass(frozen=True)
class LowBits:
    """What is asked for.

    Attributes:
        bits: Of weights and of what products read; for all layers, or layer by layer.
        protocol: What keeps 8 bits.
        rounding: One of :data:`ROUNDINGS`.
        preset: Schedule of learning; only read for ``learned``.
        seed: Of everything random.
        exact: Move scales to numbers with which engine and graph agree bit for bit.
        significands: Of activation scales, for that.
        tie_free_sums: Keep sums of two activations from being half-way between two codes, for runtimes that round such halves in another way.
        chosen: How bits that differ from layer to layer were chosen; said instead of a list of all layers.
    """

    bits: Bits | LayerBits
    protocol: Protocol
    rounding: str = "learned"
    preset: Preset = field(default_factory=lambda: Preset.of("fast"))
    seed: int = 0
    exact: bool = True
    significands: tuple[int, ...] = FINE
    chosen: str = ""
    tie_free_sums: bool = False

    @property
    def fewest(self) -> Bits:
        """The fewest bits that any weight and any activation gets."""
        if isinstance(self.bits, Bits):
            return self.bits
        every = (self.bits.others, *self.bits.layers.values())
        return Bits(min(one.weights for one in every), min(one.activations for one in every))

    @property
    def description(self) -> str:
        """One sentence for the report: bits, protocol, and how codes are found."""
        how = {
            "nearest": "weights rounded to nearest",
            "squant": "weights rounded by SQuant",
            "moments": "weights rounded for the smallest squared error of what their layers give",
            "learned": f"weights learned block by block, preset {self.preset.name}",
        }[self.rounding]
        return f"{self.chosen or self.protocol.describe(self.bits)}; {how}"


@dataclass(frozen=True, eq=False)
class Places:
    """A target's 8-bit Q/DQ graph, and what it was made from.

    Attributes:
        floating: The float graph with the same names of nodes and values; no two layers share a constant.
        qdq: The Q/DQ graph, weights as integers behind DequantizeLinear.
        activation: Scheme of the target's activations.
        weight: Scheme of its weights.
        rules: Which nodes move numbers or share a scale.
    """

    floating: Graph
    qdq: Graph
    activation: Scheme
    weight: Scheme
    rules: PlacementRules = field(default_factory=PlacementRules)

    def template(self) -> Template:
        """The graph taken apart."""
        return take_apart(self.floating, self.qdq, activation=self.activation, weight=self.weight, rules=self.rules)


@dataclass(frozen=True, eq=False)
class Numbers:
    """What was found or learned, by name.

    Attributes:
        asked: The request.
        assignment: Bits of every weight and of every group of activations.
        state: Codes, scales, zero points and biases.
        base: Biases of the float graph, from which those of `state` were learned.
        moments: Layer -> what it reads, as it was measured; only for ``moments``.
        tying: Groups of activations that round sums which may be half-way between two codes, where that matters.
        inexact: Layer -> number of channels whose requantization multiplier stays a long number (those with hardly any weight, as a rule).
        blocks: How learning went; empty without it.
    """

    asked: LowBits
    assignment: Assignment
    state: State
    base: Mapping[str, Array] = field(repr=False)
    inexact: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[BlockReport, ...] = ()
    tying: tuple[str, ...] = ()
    moments: Mapping[str, LayerMoments] = field(default_factory=dict, repr=False)

    def write(self, places: Places) -> Graph:
        """The target's Q/DQ graph with these numbers, in 8-bit integers.

        Args:
            places: The target's graph. Where its float graph has other biases than the one that was learned on (corrected ones), the
                learned ones are shifted by the difference.

        Raises:
            ModelError: It has other layers or activations than the graph that was learned on.
        """
        template = places.template()
        layers = {layer.node for layer in template.layers}
        if layers != set(self.state.weights) or set(template.groups()) != set(self.state.activations):
            odd = sorted(layers ^ set(self.state.weights)) or sorted(
                set(template.groups()) ^ set(self.state.activations)
            )
            raise ModelError(
                f"the numbers were learned on another graph: {', '.join(odd[:3])} is not in both",
                where="LowBits",
                remedy="learn on the graph that the engine is built from",
            )
        biases = {
            layer.node: np.asarray(
                np.asarray(self.state.biases.get(layer.node, 0.0), np.float64)
                + np.asarray(template.biases[layer.bias], np.float64)
                - np.asarray(self.base.get(layer.node, 0.0), np.float64),
                np.float32,
            )
            for layer in template.layers
            if layer.bias
        }
        return write(template, State(self.state.weights, self.state.activations, biases))

    def rounded(self, graph: Graph, floating: Graph) -> Graph:
        """The graph with its codes as SQuant or the moments round them, if that is what was asked for; its scales have to be the final ones.

        Args:
            graph: As :meth:`write` gave it, or with other scales.
            floating: The float graph.
        """
        if self.asked.rounding not in ("squant", "moments"):
            return graph
        grids = {name: (w.scheme.qmin, w.scheme.qmax) for name, w in self.state.weights.items()}
        if self.asked.rounding == "squant":
            return squant(graph, floating, grids=grids)
        return recode_by_moments(graph, floating, self.moments, grids=grids)

    def describe(self) -> dict[str, Any]:
        """JSON values for a manifest."""
        weights: dict[str, int] = {}
        for weight in self.state.weights.values():
            key = str(weight.scheme.bits)
            weights[key] = weights.get(key, 0) + 1
        activations: dict[str, int] = {}
        for activation in self.state.activations.values():
            key = str(activation.scheme.bits)
            activations[key] = activations.get(key, 0) + 1
        return {
            "bits": str(self.asked.bits),
            "protocol": self.asked.protocol.name,
            "rounding": self.asked.rounding,
            "preset": self.asked.preset.name if self.asked.rounding == "learned" else "",
            "description": self.asked.description,
            "weights_by_bits": dict(sorted(weights.items())),
            "activations_by_bits": dict(sorted(activations.items())),
            "share_of_weights_in_4_bits": self.share_in_4_bits,
            "inexact_layers": dict(self.inexact),
            "digest": self.digest,
        }

    @property
    def share_in_4_bits(self) -> float:
        """Share of the weights' numbers that are stored in 4 bits."""
        sizes = [(weight.codes.size, weight.scheme.bits) for weight in self.state.weights.values()]
        return sum(size for size, bits in sizes if bits <= 4) / sum(size for size, _ in sizes)

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers."""
        parts = [
            [name, digest_bytes(weight.codes.tobytes() + weight.scale.tobytes() + weight.zero_point.tobytes())]
            for name, weight in sorted(self.state.weights.items())
        ]
        parts += [[name, repr(one)] for name, one in sorted(self.state.activations.items())]
        parts += [[name, digest_bytes(array.tobytes())] for name, array in sorted(self.state.biases.items())]
        return digest_json(parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should read about these bits."""
        asked = self.asked
        found = [asked.description]
        fewest = asked.fewest
        if fewest.activations < 8:
            found.append(
                f"{fewest} is computed in 8-bit integers whose codes are cut to fewer bits: it saves space, not time"
            )
        elif fewest.weights < 8:
            found.append(
                f"weights of {fewest.weights} bits are computed with in 8-bit kernels: they save space, not time"
            )
        if self.tying:
            found.append(
                f"{len(self.tying)} sums may be half-way between two codes, which this runtime rounds in another way than the graph: "
                + ", ".join(self.tying[:3])
            )
        return tuple(found)


def find_numbers(
    places: Places,
    images: Any,
    asked: LowBits,
    *,
    workdir: Path | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    memory: int = 1 << 29,
    progress: Progress = SILENT,
) -> Numbers:
    """Find codes and scales of few bits for a target's Q/DQ graph.

    Activations that keep 8 bits keep the range that the target's graph has. Those with fewer start at the smallest squared error.

    Args:
        places: The target's graph.
        images: Calibration images (:class:`zsq_deploy.calib.CalibrationSet`); only read for learning, for moments and for activations of fewer than 8 bits.
        asked: What is asked for.
        workdir: Folder for what was learned, a file a block; ``None``: nothing is kept.
        resume: Go on with what is there.
        device: Where to learn.
        memory: Bytes of activations that may stay in memory.
        progress: Where to report.

    Raises:
        ModelError: Nothing in the graph is quantized, or (for learning) the network takes one batch size only.
        StaleArtifactError: `workdir` holds another reconstruction.
    """
    template = places.template()
    assignment = assign(template, asked.bits, asked.protocol)
    if asked.rounding == "learned" and asked.preset.mirror:
        images = with_mirror_images(images)
    place = torch.device(device) if device is not None else _default_device()
    few = any(bits < 8 for bits in assignment.sites.values())
    statistics = None
    if few:
        statistics = collect(
            template.floating,
            images.batches(64),
            device=place,
            progress=progress,
            total=len(images),
            set_digest=images.digest,
        )
    power = asked.preset.clip_power if asked.rounding == "learned" else 2.0
    state = _start(template, assignment, statistics, power, asked.preset.clip_candidates)
    if asked.exact and few:
        state = exact_activations(template, state, significands=asked.significands, tie_free_sums=asked.tie_free_sums)
    blocks: tuple[BlockReport, ...] = ()
    learned: frozenset[str] = frozenset()
    if asked.rounding == "learned":
        state, blocks = _learn(template, state, images, asked, workdir, resume, place, memory, progress)
        learned = frozenset(state.weights)
    inexact: dict[str, int] = {}
    if asked.exact:
        floats = {layer.node: template.weights[layer.weight] for layer in template.layers if layer.node not in learned}
        state, inexact = exact_weights(template, state, floats=floats)
    base = {layer.node: template.biases[layer.bias] for layer in template.layers if layer.bias}
    tying = tying_sums(template, state) if asked.tie_free_sums else ()
    moments: Mapping[str, LayerMoments] = {}
    if asked.rounding == "moments":
        few_images = images.take(0, min(_MOMENT_IMAGES, len(images)))
        moments = measured_moments(template.floating, few_images.batches(16), seed=asked.seed)
    return Numbers(asked, assignment, state, base, inexact, blocks, tying, moments)


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _start(
    template: Template, assignment: Assignment, statistics: Statistics | None, power: float, candidates: int
) -> State:
    """The target's own numbers where 8 bits stay; elsewhere weights rounded to nearest, and ranges of the smallest squared error."""
    tensors = {tensor.name: tensor for tensor in read_qdq(template.qdq) if not tensor.is_weight}
    stored = {tensor.output: tensor for tensor in read_qdq(template.qdq) if tensor.is_weight}
    weights: dict[str, Weight] = {}
    for layer in template.layers:
        array = template.weights[layer.weight]
        scheme = with_bits(template.weight, assignment.weights[layer.node])
        if layer.axis is None:
            scheme = dataclasses.replace(scheme, granularity=Granularity.TENSOR)
        if scheme.bits == 8:
            tensor = stored[layer.weight]
            codes = template.qdq.constant(tensor.codes)
            assert codes is not None
            scale = np.asarray(tensor.scale, np.float32)
            zero = np.asarray(tensor.zero_point, np.int32)
            flat = () if layer.axis is None else (-1,)
            weights[layer.node] = Weight(
                codes.astype(np.int32), scale.reshape(flat), zero.reshape(flat), scheme, layer.axis
            )
            continue
        scale, zero = weight_scales(array, scheme, layer.axis, power=power, candidates=candidates)
        empty = Weight(np.zeros(array.shape, np.int32), scale, zero, scheme, layer.axis)
        codes = np.rint(array / empty.along(scale)) + empty.along(zero)
        weights[layer.node] = dataclasses.replace(
            empty, codes=np.clip(codes, scheme.qmin, scheme.qmax).astype(np.int32)
        )
    activations: dict[str, Activation] = {}
    for group, sites in template.groups().items():
        tensor = tensors[sites[0].name]
        scheme = dataclasses.replace(template.activation, signed=sites[0].signed)
        if sites[0].signed != template.activation.signed:  # a value that the target wants without a zero point
            scheme = dataclasses.replace(scheme, symmetric=True)
        scheme = with_bits(scheme, assignment.sites[group])
        if scheme.bits == 8:
            activations[group] = Activation(float(tensor.scale), int(tensor.zero_point), scheme)
        else:
            assert statistics is not None
            activations[group] = activation_range(sites, scheme, statistics)
    biases = {layer.node: template.biases[layer.bias] for layer in template.layers if layer.bias}
    return State(weights, activations, biases)


def _learn(
    template: Template,
    state: State,
    images: Any,
    asked: LowBits,
    workdir: Path | None,
    resume: bool,
    device: torch.device,
    memory: int,
    progress: Progress,
) -> tuple[State, tuple[BlockReport, ...]]:
    """Codes and weight scales, and (unless they have to be exact) scales of activations with fewer than 8 bits."""
    fixed = {name for name, one in state.activations.items() if asked.exact or one.scheme.bits == 8}
    checkpoints = None
    if workdir is not None:
        content = {
            "graph": template.qdq.digest,
            "images": images.digest,
            "bits": str(asked.bits),
            "protocol": dataclasses.asdict(asked.protocol),
            "preset": dataclasses.asdict(asked.preset),
            "seed": asked.seed,
            "fixed": sorted(fixed),
            "activations": sorted((name, repr(one)) for name, one in state.activations.items()),
        }
        checkpoints = Checkpoints(workdir, content, resume=resume)
    tuning = asked.preset.tuning
    if tuning is not None and (asked.exact or len(fixed) == len(state.activations)):
        tuning = dataclasses.replace(tuning, activation_scale_lr=0.0)
    with Cache(len(images), workdir, memory=memory) as cache:
        work = Work(
            template, state, asked.preset, asked.seed, device, cache, checkpoints, progress, fixed=frozenset(fixed)
        )
        reports = work.run(images)
        if tuning is not None:
            work.tune(images, tuning)
    return work.state, tuple(reports)


def pack_int4(graph: Graph, *, through: Literal["int8", ""] = "") -> Graph:
    """The graph with integer weights whose codes fit 4 bits stored as INT4, two in a byte (operator set 21); no number changes.

    Args:
        graph: Weights as INT8 constants behind DequantizeLinear.
        through: ``int8``: a Cast widens them in front of DequantizeLinear (what OpenVINO needs to see an 8-bit weight).
    """
    graph = raise_opset(graph, 21)
    net = Net(graph.proto)
    for node in list(net.nodes):
        if not is_dequantize(node):
            continue
        name = str(node.input[0])
        codes = graph.constant(name)
        if codes is None or codes.dtype != np.int8 or codes.ndim < 2 or len(graph.consumers(name)) != 1:
            continue
        if not codes.size or codes.min() < -8 or codes.max() > 7:
            continue
        narrow = net.add_constant(name, codes.astype(ml_dtypes.int4), exact=True)
        if through == "int8":
            wide = net.fresh(f"{name}_int8")
            net.insert_before(node, net.new_node("Cast", [narrow], [wide], f"{name}_Cast", to=onnx.TensorProto.INT8))
            node.input[0] = wide
        elif len(node.input) > 2 and node.input[2]:
            zero = graph.constant(node.input[2])
            assert zero is not None
            node.input[2] = net.add_constant(f"{node.input[2]}_int4", zero.astype(ml_dtypes.int4))
    net.touch()
    net.sweep()
    return Graph(net.proto())
