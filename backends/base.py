"""What every runtime offers: targets as values, an engine on disk, a runner that executes it.

A runtime is one folder beside this file with `targets.py`, `quantizer.py` and `runner.py`. It never imports another runtime,
and nothing outside its folder imports the runtime's library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsq_deploy.artifact import digest_bytes
from zsq_deploy.quant.scheme import Scheme

__all__ = ["BuildSettings", "Engine", "Finding", "KernelRecord", "Runner", "Target", "ValidationData", "digest_array"]

Array = npt.NDArray[Any]


def digest_array(array: Array) -> str:
    """SHA-256 of an array's type, shape and numbers: how manifests name corrected biases and replaced weights."""
    data = np.ascontiguousarray(array)
    return digest_bytes(f"{data.dtype.str}{data.shape}".encode() + data.tobytes())


@dataclass(frozen=True)
class Target:
    """What one deployment target wants. A value: adding a target is adding one of these and its tests.

    Attributes:
        name: As on the command line, ``ort-x86-vnni``.
        runtime: Folder under ``backends/`` that builds and runs it, ``onnxruntime``.
        summary: One sentence for ``zsq doctor`` and the help.
        activation: Scheme of activations.
        weight: Scheme of weights.
        opset: Operator set of the engine's graph.
        ir_version: IR version stamped on the engine (what the oldest supported runtime reads).
        session: Options of the runtime's session, by the runtime's own keys.
        requires: CPU features without which the target is built, but not measured, here (``avx512_vnni``).
        notes: What a user should know (saturation, fallbacks), one sentence each.
        tie_free_sums: The runtime rounds sums that are half-way between two codes in another way than the graph does, so scales are chosen
            with which none is (:mod:`zsq_deploy.quant.significands`).
    """

    name: str
    runtime: str
    summary: str
    activation: Scheme
    weight: Scheme
    opset: int
    ir_version: int
    session: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tie_free_sums: bool = False


@dataclass(frozen=True)
class BuildSettings:
    """What a user can say about how an engine is built, in words that fit every runtime.

    A runtime turns them into its own options with ``options_from``, and refuses what it cannot do.

    Attributes:
        bits: ``w8a8``.
        quantizer: Who quantizes: ``auto`` (the runtime's own choice), or one of the runtime's quantizers by name.
        op_types: Operator types to quantize; ``None``: the target's choice.
        exclude: Nodes that stay in float.
        quantize_outputs: Quantize the network's outputs too.
        weight_method: ``minmax`` or ``mse``.
        rounding: ``nearest``, or ``squant``: rounding errors cancel in each output channel (:mod:`zsq_deploy.quant.algebra.squant`).
        exact_scales: Scales on which engine and reference agree exactly (:mod:`zsq_deploy.quant.exact_scales`).
        float_type: Type of what is computed in float: ``float32``, ``float16`` or ``bfloat16``, written into the graph itself.
        float_macs: Share of the multiply-accumulates that may stay in float where 8 bits lose too much; ``None``: the runtime's own choice.
        compress_weights: Compress weights in this way (``int8_sym``, ...) instead of quantizing; ``None``: quantize.
        vendor: What one quantizer is told in its own words: quantizer -> word -> value; only what differs from its defaults.
    """

    bits: str = "w8a8"
    quantizer: str = "auto"
    op_types: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    quantize_outputs: bool = False
    weight_method: str = "minmax"
    rounding: str = "nearest"
    exact_scales: bool = True
    float_type: str = "float32"
    float_macs: float | None = None
    compress_weights: str | None = None
    vendor: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def weight_only(self) -> bool:
        """Only weights are stored in fewer bits; activations stay in float."""
        return self.compress_weights is not None or self.bits.lower().endswith("a32")


@dataclass(frozen=True)
class ValidationData:
    """Samples on which accuracy control measures a quantized network.

    Attributes:
        batches: Feeds by input name, one mapping a batch.
        labels: Class numbers of each batch; ``None``: the metric is agreement with the float network on these (synthetic) images.
        source: Where the images come from, for the report.
    """

    batches: Sequence[Mapping[str, Array]]
    labels: Sequence[Array] | None = None
    source: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine on disk.

    Attributes:
        path: The file that the runtime loads.
        qdq_path: The Q/DQ graph that says what the engine computes (for ONNX Runtime the same file).
        target: What it was built for.
        float_path: The float model that it was made from, as an ONNX file (batch norm folded), for the float baseline.
        choices: How it was made: op types quantized, exclusions, range method, bias correction, ..., for the manifest.
        weights_path: The file beside `path` that holds the weights, where the runtime keeps them apart (``engine.bin``).
        vendor_path: The engine as a vendor's quantizer wrote it, kept beside ours (``vendor.xml``).
    """

    path: Path
    qdq_path: Path
    target: Target
    float_path: Path
    choices: Mapping[str, Any] = field(default_factory=dict)
    weights_path: Path | None = None
    vendor_path: Path | None = None

    @property
    def bytes(self) -> int:
        """Size of what has to be shipped: the file that the runtime loads, and its weights."""
        return self.path.stat().st_size + (self.weights_path.stat().st_size if self.weights_path is not None else 0)


@dataclass(frozen=True)
class KernelRecord:
    """One node that the runtime really executed.

    Attributes:
        node: The runtime's node name.
        op: Kernel (operator) name, ``QLinearConv``.
        integer: Whether its arithmetic was integer.
        microseconds: Mean time of one execution.
        sources: Names of the nodes of the engine's graph that it stands for, as far as they can be traced.
        macs: Multiply-accumulates of one execution at batch 1 (0 for anything but convolutions and matrix products).
        reason: For a float kernel: why it is not an integer one, as far as it is known.
    """

    node: str
    op: str
    integer: bool
    microseconds: float
    sources: tuple[str, ...] = ()
    macs: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """One broken rule of a target.

    Attributes:
        node: The node it is about; empty for the whole file.
        rule: Short name of the rule.
        message: What is wrong.
        remedy: What to do.
        severity: ``error`` where the result would be wrong or refused, ``warning`` where it would be float or slow.
    """

    node: str
    rule: str
    message: str
    remedy: str
    severity: str = "warning"


class Runner(Protocol):
    """A loaded model of one runtime."""

    input_names: Sequence[str]
    output_names: Sequence[str]
    load_ms: float

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for one batch; inputs and outputs are numpy arrays in host memory."""

    def kernels(self, feeds: Mapping[str, Array]) -> Sequence[KernelRecord]:
        """What was executed for one batch, with times, from the runtime's own profile."""
