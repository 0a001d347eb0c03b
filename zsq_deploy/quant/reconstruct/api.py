"""The two public calls: round to nearest, and reconstruct."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.model import Model
from zsq_deploy.model.twin import Twin
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.quant.bias import correct_bias
from zsq_deploy.quant.qdq import PlacementRules
from zsq_deploy.quant.reconstruct.cache import Cache
from zsq_deploy.quant.reconstruct.checkpoint import Checkpoints
from zsq_deploy.quant.reconstruct.images import ImageSet, with_mirror_images
from zsq_deploy.quant.reconstruct.presets import Preset
from zsq_deploy.quant.reconstruct.protocol import Assignment, Bits, LayerBits, Protocol, assign, bits_of
from zsq_deploy.quant.reconstruct.state import State, initial_state
from zsq_deploy.quant.reconstruct.template import Template, make_template
from zsq_deploy.quant.reconstruct.work import BlockReport, Work
from zsq_deploy.quant.reconstruct.writing import write
from zsq_deploy.quant.scheme import Granularity, Scheme
from zsq_deploy.quant.statistics import collect

__all__ = [
    "ACTIVATION",
    "WEIGHT",
    "BlockReport",
    "ImageSet",
    "Reconstruction",
    "reconstruct",
    "round_to_nearest",
    "start",
]

Array = npt.NDArray[Any]
AnyBits = str | Bits | LayerBits | Mapping[str, str | Bits]

ACTIVATION = Scheme(8, signed=False, symmetric=False)
"""Activations as most x86 runtimes take them: unsigned, one scale and zero point a tensor."""

WEIGHT = Scheme(8, signed=True, symmetric=True, granularity=Granularity.CHANNEL, restricted=True)
"""Weights as most runtimes take them: signed, zero point 0, one scale an output channel."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A quantized network.

    Attributes:
        model: The float network that it was made from.
        graph: The Q/DQ graph; its twin is the fake-quant reference.
        template: The places of the quantizers.
        state: The numbers.
        assignment: Bits of every tensor.
        bits: As asked.
        protocol: What keeps 8 bits.
        preset: Schedule; empty for rounding to nearest.
        blocks: One report a block.
        seconds: Wall time of everything.
    """

    model: Model
    graph: Graph
    template: Template
    state: State
    assignment: Assignment
    bits: Bits | LayerBits
    protocol: Protocol
    preset: str
    blocks: tuple[BlockReport, ...]
    seconds: float

    @property
    def description(self) -> str:
        """The protocol in one sentence, to stand beside every number."""
        return self.protocol.describe(self.bits)

    def twin(self, *, device: str | torch.device | None = None) -> Twin:
        """The fake-quant reference."""
        return Twin(self.graph, device=device)

    def with_int4_weights(self) -> Graph:
        """The same Q/DQ graph with weights of up to 4 bits stored as INT4 (operator set 21)."""
        return write(self.template, self.state, int4_weights=True)


def start(
    model: Model,
    calibration_set: ImageSet,
    bits: AnyBits,
    protocol: str | Protocol,
    *,
    graph: Graph | None = None,
    rules: PlacementRules | None = None,
    activation: Scheme = ACTIVATION,
    weight: Scheme = WEIGHT,
    device: torch.device,
    progress: Progress = SILENT,
    power: float = 2.4,
    candidates: int = 100,
) -> tuple[Template, Assignment, State]:
    """Places of quantizers, their bits, and the numbers to start from: weights rounded to nearest, ranges of the smallest squared error.

    Args:
        model: The network.
        calibration_set: Images in network input space.
        bits: See :func:`reconstruct`, as everything that is not said here.
        protocol: What keeps 8 bits.
        graph: Instead of the model's folded graph.
        rules: Where Q/DQ may stand.
        activation: Scheme of 8-bit activations.
        weight: Scheme of 8-bit weights.
        device: Where to compute.
        progress: Where to report.
        power: Exponent of the error that weight scales minimize.
        candidates: Clip ratios that are tried for it.
    """
    if len(calibration_set) == 0:
        raise CalibrationError("there are no images to learn from", where="calibration_set", remedy="give some")
    folded = graph if graph is not None else model.folded().graph
    statistics = collect(
        folded,
        calibration_set.batches(64),
        device=device,
        progress=progress,
        total=len(calibration_set),
        set_digest=calibration_set.digest,
    )
    template = make_template(folded, statistics.ranges(), activation=activation, weight=weight, rules=rules)
    assignment = assign(template, bits_of(bits), Protocol.of(protocol))
    state = initial_state(template, assignment, statistics, power=power, candidates=candidates)
    return template, assignment, state


def _corrected(
    template: Template, state: State, calibration_set: ImageSet, device: torch.device, progress: Progress
) -> State:
    """The state with biases that take out the mean error of each channel."""
    biases = correct_bias(
        template.floating, write(template, state), calibration_set.batches(64), device=device, progress=progress
    )
    known = {layer.node for layer in template.layers if layer.bias}
    changed = {
        name: np.asarray(array, np.float32).reshape(np.shape(state.biases[name]))
        for name, array in biases.items()
        if name in known
    }
    return state.updated(biases=changed)


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def round_to_nearest(
    model: Model,
    calibration_set: ImageSet,
    bits: AnyBits = "w4a4",
    protocol: str | Protocol = "ends-8bit",
    *,
    graph: Graph | None = None,
    rules: PlacementRules | None = None,
    activation: Scheme = ACTIVATION,
    weight: Scheme = WEIGHT,
    bias_correction: bool = True,
    device: str | torch.device | None = None,
    progress: Progress = SILENT,
) -> Reconstruction:
    """Weights rounded to nearest, ranges of the smallest squared error, biases corrected: the cheap quantizer.

    Args:
        model: The network.
        calibration_set: Images in network input space (:class:`zsq_deploy.calib.CalibrationSet`, or a part of one).
        bits: ``w4a4`` and the like, 2 to 8 bits each; or a mapping of layer node to such a word (other layers have 8 bits).
        protocol: What keeps 8 bits (:data:`~zsq_deploy.quant.reconstruct.protocol.PROTOCOLS`).
        graph: Deployable float graph to use instead of the model's folded one (a backend may have prepared it).
        rules: Where Q/DQ may stand.
        activation: Scheme of 8-bit activations of the target; bits are reduced within it.
        weight: Scheme of 8-bit weights of the target.
        bias_correction: Take the mean error of each channel out of the biases.
        device: Where to compute.
        progress: Where to report.

    Raises:
        UsageError: Bits or protocol make no sense.
        CalibrationError: There are no images.
        ModelError: Nothing can be quantized.
    """
    started = time.monotonic()
    place = _device(device)
    chosen = Protocol.of(protocol)
    template, assignment, state = start(
        model,
        calibration_set,
        bits,
        chosen,
        graph=graph,
        rules=rules,
        activation=activation,
        weight=weight,
        device=place,
        progress=progress,
        power=2.0,
        candidates=100,
    )
    if bias_correction:
        state = _corrected(template, state, calibration_set, place, progress)
    return Reconstruction(
        model=model,
        graph=write(template, state),
        template=template,
        state=state,
        assignment=assignment,
        bits=bits_of(bits),
        protocol=chosen,
        preset="",
        blocks=(),
        seconds=time.monotonic() - started,
    )


def reconstruct(
    model: Model,
    calibration_set: ImageSet,
    bits: AnyBits = "w4a4",
    protocol: str | Protocol = "ends-8bit",
    preset: str | Preset = "fast",
    seed: int = 0,
    workdir: Path | str | None = None,
    resume: bool = False,
    progress: Progress = SILENT,
    *,
    graph: Graph | None = None,
    rules: PlacementRules | None = None,
    activation: Scheme = ACTIVATION,
    weight: Scheme = WEIGHT,
    memory: int = 1 << 29,
    device: str | torch.device | None = None,
) -> Reconstruction:
    """Learn low-bit weights and activations block by block.

    Args:
        model: The network.
        calibration_set: Images in network input space; 1,024 is what papers take.
        bits: ``w4a4`` and the like, 2 to 8 bits each; or a mapping of layer node to such a word (other layers have 8 bits).
        protocol: What keeps 8 bits (:data:`~zsq_deploy.quant.reconstruct.protocol.PROTOCOLS`).
        preset: ``full`` (20,000 steps a block) or ``fast`` (:data:`~zsq_deploy.quant.reconstruct.presets.PRESETS`).
        seed: Of everything random; the same seed gives the same network on the same machine.
        workdir: Folder for what was learned, a file a block, and for activations on their way; ``None``: nothing is kept.
        resume: Go on with what an interrupted run left in `workdir`.
        progress: Where to report.
        graph: Deployable float graph to use instead of the model's folded one (a backend may have prepared it).
        rules: Where Q/DQ may stand.
        activation: Scheme of 8-bit activations of the target; bits are reduced within it.
        weight: Scheme of 8-bit weights of the target.
        memory: Bytes of activations that may stay in memory; more go to files.
        device: Where to compute.

    Raises:
        UsageError: Bits, protocol or preset make no sense.
        CalibrationError: There are no images.
        ModelError: Nothing can be quantized.
        OutputExistsError: `workdir` holds a reconstruction, and `resume` was not asked for.
        StaleArtifactError: `workdir` holds another reconstruction.
    """
    started = time.monotonic()
    place = _device(device)
    chosen, schedule, wanted = Protocol.of(protocol), Preset.of(preset), bits_of(bits)
    images = with_mirror_images(calibration_set) if schedule.mirror and len(calibration_set) else calibration_set
    template, assignment, state = start(
        model,
        images,
        wanted,
        chosen,
        graph=graph,
        rules=rules,
        activation=activation,
        weight=weight,
        device=place,
        progress=progress,
        power=schedule.clip_power,
        candidates=schedule.clip_candidates,
    )
    folder = Path(workdir) if workdir is not None else None
    checkpoints = None
    if folder is not None:
        content = {
            "network": template.floating.digest,
            "images": images.digest,
            "bits": str(wanted),
            "protocol": dataclasses.asdict(chosen),
            "preset": dataclasses.asdict(schedule),
            "seed": seed,
            "activation": str(activation),
            "weight": str(weight),
            "rules": repr(rules),
        }
        checkpoints = Checkpoints(folder, content, resume=resume)
    with Cache(len(images), folder, memory=memory) as cache:
        work = Work(template, state, schedule, seed, place, cache, checkpoints, progress)
        reports = work.run(images)
        if schedule.tuning is not None:
            work.tune(images, schedule.tuning)
    return Reconstruction(
        model=model,
        graph=write(template, work.state),
        template=template,
        state=work.state,
        assignment=assignment,
        bits=wanted,
        protocol=chosen,
        preset=schedule.name,
        blocks=tuple(reports),
        seconds=time.monotonic() - started,
    )
