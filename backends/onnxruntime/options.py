"""What a user, a search or a recipe can choose when an ONNX Runtime engine is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from zsq_deploy.artifact import digest_json
from zsq_deploy.backends.base import BuildSettings, Target, digest_array
from zsq_deploy.errors import UsageError

if TYPE_CHECKING:  # the options are read with the targets, and those load neither onnx nor torch
    from zsq_deploy.model.graph import Graph
    from zsq_deploy.quant.reconstruct.deployed import Numbers

__all__ = [
    "CALIBRATORS",
    "LOSSY_OPS",
    "MAC_OPS",
    "QUANTIZERS",
    "WIDE_OPS",
    "BuildOptions",
    "check_options",
    "options_from",
]

CALIBRATORS: tuple[str, ...] = ("ort-minmax", "ort-entropy", "ort-percentile")
"""The runtime's own calibrators, as range methods."""

QUANTIZERS: tuple[str, ...] = ("auto",)
"""Who can quantize: ONNX Runtime's own quantizer."""

MAC_OPS: tuple[str, ...] = ("Conv", "Gemm", "MatMul")
"""Operators that multiply and accumulate, and that have an integer kernel."""

WIDE_OPS: tuple[str, ...] = (
    *MAC_OPS,
    "Add",
    "Mul",
    "Concat",
    "Relu",
    "Clip",
    "LeakyRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Resize",
    "Pad",
    "Slice",
    "Split",
    "Gather",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
)
"""Operators whose integer kernel (or movement of 8-bit values) neither costs accuracy out of proportion nor time."""

LOSSY_OPS: tuple[str, ...] = ("Sigmoid", "Softmax", "Where")
"""Operators with an integer kernel whose 8-bit output is often too coarse; only a measurement should add them."""


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is made. Two builds with equal options, ranges and models give equal files.

    Attributes:
        op_types: Operator types to quantize; ``None`` takes :data:`WIDE_OPS`.
        exclude: Names of nodes (of the folded graph) that stay in float.
        mac_outputs: Quantize what matrix products (Gemm, MatMul) give out. ``False`` keeps it in float unless the next
            quantized operator reads it: more accurate where float operators follow, as in transformers.
        quantize_outputs: Also quantize the network's outputs. The default leaves them in float: no Q/DQ behind the last
            matrix product, so that 8-bit logits cannot tie.
        share_concat: Give all inputs of a concatenation its output's range, so that they are rounded once and not twice.
        float_readers: Connect float operators to float values where those exist (a residual that reads the input image).
            ``False`` lets them read the rounded value, as the integer operators do; a denoiser that subtracts the noise from its
            own input is better off so.
        float_heads: Turn last 1x1 convolutions into matrix products, whose integer kernel gives float out; otherwise their outputs
            are 8-bit.
        gates: Rewrite HardSwish and HardSigmoid into operators with integer kernels; otherwise they stay in float.
        widen: Add zero channels where the integer kernels want round numbers of channels; exact, and often faster.
        weight_method: How weight scales are found: ``minmax`` or ``mse``.
        rounding: How weights are rounded: to ``nearest``, or by ``squant`` (:mod:`zsq_deploy.quant.algebra.squant`); with `numbers` they are
            rounded there.
        exact_scales: Move activation and weight scales to the nearby grid on which this runtime's requantization, the Q/DQ graph and
            exact integer arithmetic agree code for code (:mod:`zsq_deploy.quant.exact_scales`).
        biases: Corrected biases: name of a bias initializer, or of the convolution or matrix product -> float array.
        weights: Replaced weights (equalized, rounded, ...): initializer name -> float array of the same shape.
        weight_scales: Learned weight scales per output channel: initializer name -> float array.
        bits: ``w8a8``, or 2 to 8 bits each; fewer than 8 need `numbers`. ``w4a32``, ``w8a32``: only weights of matrix products, in blocks.
        numbers: Codes and scales that were found on the network's places; they replace the quantizer's.
        label: Short name in reports.
    """

    op_types: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    mac_outputs: bool = True
    quantize_outputs: bool = False
    share_concat: bool = True
    float_readers: bool = True
    float_heads: bool = False
    gates: bool = False
    widen: bool = False
    weight_method: str = "minmax"
    rounding: str = "nearest"
    exact_scales: bool = False
    biases: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    weights: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    weight_scales: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    bits: str = "w8a8"
    numbers: Numbers | None = None
    label: str = "wide"

    def __post_init__(self) -> None:
        if re.fullmatch(r"w[2-8]a[2-8]|w[48]a32", self.bits.lower()) is None:
            raise UsageError(
                f"the ONNX Runtime backend does not build {self.bits!r}",
                where="--bits",
                remedy="choose w8a8, w4a8, w4a4 or other bits from 2 to 8; or w4a32, w8a32: weights only",
            )
        if self.weight_method not in ("minmax", "mse"):
            raise UsageError(
                f"unknown method for weight scales: {self.weight_method!r}",
                where="BuildOptions.weight_method",
                remedy="choose minmax or mse",
            )

    def with_(self, **changes: Any) -> BuildOptions:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def low_bits(self) -> bool:
        """Whether weights or activations have fewer than 8 bits, and activations are integers."""
        return self.bits.lower() != "w8a8" and not self.weight_only

    @property
    def weight_only(self) -> bool:
        """Only weights are stored in fewer bits; everything computes in float32."""
        return self.bits.lower().endswith("a32")

    @property
    def ops(self) -> tuple[str, ...]:
        """The operator types to quantize."""
        return WIDE_OPS if self.op_types is None else self.op_types

    def describe(self) -> dict[str, Any]:
        """The options as JSON values; arrays are named by their digest."""
        return {
            "label": self.label,
            "bits": self.bits,
            "op_types": list(self.ops),
            "exclude": list(self.exclude),
            "mac_outputs": self.mac_outputs,
            "quantize_outputs": self.quantize_outputs,
            "share_concat": self.share_concat,
            "float_readers": self.float_readers,
            "float_heads": self.float_heads,
            "gates": self.gates,
            "widen": self.widen,
            "weight_method": self.weight_method,
            "rounding": self.rounding,
            "exact_scales": self.exact_scales,
            "corrected_biases": {name: digest_array(array) for name, array in sorted(self.biases.items())},
            "replaced_weights": {name: digest_array(array) for name, array in sorted(self.weights.items())},
            "learned_scales": {name: digest_array(array) for name, array in sorted(self.weight_scales.items())},
            **({"low_bits": self.numbers.describe()} if self.numbers is not None else {}),
        }

    @property
    def digest(self) -> str:
        """SHA-256 of everything chosen."""
        return digest_json(self.describe())


def options_from(settings: BuildSettings, target: Target) -> BuildOptions:
    """The build options for what a user asked for (see :meth:`zsq_deploy.backends.Backend.options_from`).

    Raises:
        UsageError: It was asked for another runtime's quantizer, or for bits that this one does not build.
    """
    if settings.quantizer != "auto":
        raise UsageError(
            f"the quantizer {settings.quantizer!r} is another runtime's; target {target.name!r} has ONNX Runtime's own only",
            where="--quantizer",
            remedy="leave it at auto, or deploy the other targets in a run of their own",
        )
    if settings.compress_weights is not None:
        raise UsageError(
            f"target {target.name!r} does not compress weights without quantizing",
            where="--compress-weights",
            remedy="leave it out, or deploy the OpenVINO targets in a run of their own",
        )
    if settings.float_type != "float32":
        raise UsageError(
            f"target {target.name!r} computes in float32 what it does not quantize",
            where="--float-type",
            remedy="leave it out, or deploy the TensorRT targets in a run of their own",
        )
    if settings.float_macs is not None:
        raise UsageError(
            f"for target {target.name!r} a search decides which layers stay in float, not a limit",
            where="--float-macs",
            remedy="name them with --exclude, or deploy the TensorRT targets in a run of their own",
        )
    if settings.weight_only and settings.rounding != "nearest":
        raise UsageError(
            "weights in blocks are rounded to nearest",
            where="--rounding",
            remedy="leave it out, or ask for bits of weights and activations (w4a8)",
        )
    return BuildOptions(
        bits=settings.bits,
        op_types=settings.op_types,
        exclude=settings.exclude,
        quantize_outputs=settings.quantize_outputs,
        weight_method=settings.weight_method,
        rounding=settings.rounding if settings.rounding == "squant" else "nearest",  # other codes come as numbers
        exact_scales=settings.exact_scales,
    )


def check_options(graph: Graph, target: Target, options: BuildOptions) -> None:
    """Nothing of these options can fail for a reason that the network tells before images are made."""
    del graph, target, options
