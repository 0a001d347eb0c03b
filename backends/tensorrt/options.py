"""What a user, a search or a recipe can choose when a TensorRT engine is prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from zsq_deploy.artifact import digest_json
from zsq_deploy.backends.base import BuildSettings, Target, digest_array
from zsq_deploy.backends.tensorrt.ranges import METHODS
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.errors import UsageError

__all__ = ["BITS", "CALIBRATORS", "FLOATS", "FLOAT_MACS", "QUANTIZERS", "BuildOptions", "options_from"]

QUANTIZERS: tuple[str, ...] = ("auto", "qdq", "implicit")
"""Who quantizes: we, with our own placement of Q/DQ (``auto``, ``qdq``); or TensorRT itself, from the float network and a calibration
cache (``implicit``, up to TensorRT 10)."""

CALIBRATORS: tuple[str, ...] = tuple(f"tensorrt-{method}" for method in METHODS)
"""TensorRT's calibrators whose search is published, computed here; its own classes run on the device
(:mod:`zsq_deploy.backends.tensorrt.calibrators`)."""

FLOATS: tuple[str, ...] = ("float32", "float16", "bfloat16")
"""Types of what is computed outside of Q/DQ pairs."""

FLOAT_MACS = 0.125
"""Share of the multiply-accumulates that may stay in float where 8 bits lose too much, unless the user says otherwise: an eighth. In the
narrowest MobileNetV1 the depthwise convolutions are a tenth."""

BITS: tuple[str, ...] = ("w8a8", "w4a32")
"""Bits of weights and activations; ``w4a32`` stores the weights of matrix products in 4 bits, in blocks, and computes in float."""


@dataclass(frozen=True)
class BuildOptions:
    """How a graph for TensorRT is made. Two builds with equal options, ranges and models give equal files.

    Attributes:
        op_types: ONNX operator types to quantize; ``None``: all that :data:`~zsq_deploy.backends.tensorrt.placement.OPS` names.
        exclude: Names of nodes (of the folded graph) that stay in float.
        attention: Also quantize products of two computed matrices. TensorRT has fused kernels for attention in float16, and the
            softmax loses much in signed 8 bits, so they stay in float by default.
        weight_method: How weight scales are found: ``minmax`` or ``mse``.
        rounding: How weights are rounded: to ``nearest``, or by ``squant`` (:mod:`zsq_deploy.quant.algebra.squant`).
        exact_scales: Settle scales and biases so that float32, float64 and integer arithmetic agree (:mod:`zsq_deploy.quant.settle`).
        bias_correction: Shift biases by the mean error that quantization causes, where that helps on the calibration images.
        biases: Corrected biases: name of a bias initializer, or of the layer -> float array.
        weights: Replaced weights: initializer name -> float array of the same shape.
        weight_scales: Learned weight scales per output channel: initializer name -> float array.
        bits: One of :data:`BITS`.
        block: Most weights that share a scale with ``w4a32``: 64 or 128.
        quantizer: ``qdq``, or ``implicit``: the float network and a calibration cache.
        float_type: One of :data:`FLOATS`: the type that the graph itself gives to what is computed in float.
        float_macs: Share of the multiply-accumulates that layers left in float may have, where 8 bits lose too much
            (:mod:`zsq_deploy.backends.tensorrt.sparing`); 0: none is left in float.
        spared: Names of the nodes that are left in float for that reason.
        label: Short name in reports.
    """

    op_types: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    attention: bool = False
    weight_method: str = "minmax"
    rounding: str = "nearest"
    exact_scales: bool = False
    bias_correction: bool = False
    biases: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    weights: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    weight_scales: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    bits: str = "w8a8"
    block: int = 128
    quantizer: str = "qdq"
    float_type: str = "float32"
    float_macs: float = 0.0
    spared: tuple[str, ...] = ()
    label: str = "qdq"

    def __post_init__(self) -> None:
        for value, allowed, where in (
            (self.bits.lower(), BITS, "--bits"),
            (self.weight_method, ("minmax", "mse"), "BuildOptions.weight_method"),
            (self.block, (64, 128), "BuildOptions.block"),
            (self.quantizer, QUANTIZERS[1:], "--quantizer"),
            (self.float_type, FLOATS, "--float-type"),
        ):
            if value not in allowed:
                raise UsageError(
                    f"the TensorRT backend does not build {value!r}",
                    where=where,
                    remedy=f"choose one of {', '.join(str(item) for item in allowed)}",
                )
        if not 0.0 <= self.float_macs < 1.0:
            raise UsageError(
                f"{self.float_macs} is no share of the multiply-accumulates that may stay in float",
                where="--float-macs",
                remedy=f"give a number from 0 (none) to below 1, or leave it out ({FLOAT_MACS})",
            )

    @property
    def weight_only(self) -> bool:
        """Only weights are stored in fewer bits."""
        return self.bits.lower() == "w4a32"

    @property
    def implicit(self) -> bool:
        """The engine is made from the float network and a calibration cache."""
        return self.quantizer == "implicit"

    def with_(self, **changes: Any) -> BuildOptions:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def describe(self) -> dict[str, Any]:
        """The options as JSON values; arrays are named by their digest."""
        return {
            "label": self.label,
            "quantizer": self.quantizer,
            "float_type": self.float_type,
            "bits": self.bits,
            "block": self.block if self.weight_only else 0,
            "op_types": None if self.op_types is None else list(self.op_types),
            "exclude": list(self.exclude),
            "float_macs": self.float_macs,
            "spared_nodes": list(self.spared),
            "attention": self.attention,
            "weight_method": self.weight_method,
            "rounding": self.rounding,
            "exact_scales": self.exact_scales,
            "bias_correction": self.bias_correction,
            "corrected_biases": {name: digest_array(array) for name, array in sorted(self.biases.items())},
            "replaced_weights": {name: digest_array(array) for name, array in sorted(self.weights.items())},
            "learned_scales": {name: digest_array(array) for name, array in sorted(self.weight_scales.items())},
        }

    @property
    def digest(self) -> str:
        """SHA-256 of everything chosen."""
        return digest_json(self.describe())


def options_from(settings: BuildSettings, target: Target) -> BuildOptions:
    """The build options for what a user asked for (see :meth:`zsq_deploy.backends.Backend.options_from`).

    Raises:
        UsageError: TensorRT, or this generation of it, cannot do it.
    """
    if settings.quantizer not in QUANTIZERS:
        raise UsageError(
            f"{settings.quantizer!r} does not quantize for TensorRT",
            where="--quantizer",
            remedy=f"choose {', '.join(QUANTIZERS)}; a Q/DQ graph of another tool can be checked: zsq lint FILE --target {target.name}",
        )
    if settings.compress_weights is not None:
        raise UsageError(
            "weights are compressed by NNCF for OpenVINO only",
            where="--compress-weights",
            remedy="ask for --bits w4a32: matrix products with 4-bit weights in blocks",
        )
    if settings.quantize_outputs:
        raise UsageError(
            "the outputs of a network for TensorRT stay in float",
            where="quantize_outputs",
            remedy="leave it out: a rounding behind the last layer would be a kernel of its own",
        )
    number = generation(target)
    if settings.bits.lower() == "w4a32" and number < 10:
        raise UsageError(
            f"{target.name} knows no 4-bit weights",
            where="--bits",
            remedy="choose w8a8, or a target from tensorrt-10 on",
        )
    implicit = settings.quantizer == "implicit"
    if implicit and number >= 11:
        raise UsageError(
            "TensorRT 11 has neither calibrators nor calibration caches",
            where="--quantizer",
            remedy="leave --quantizer out, or choose tensorrt-10",
        )
    if implicit and (settings.weight_only or settings.op_types is not None):
        raise UsageError(
            "a calibration cache cannot say which operators are quantized, nor in how many bits",
            where="--quantizer",
            remedy="leave --bits and the operator types out, or choose --quantizer qdq",
        )
    if settings.float_type != "float32" and (implicit or number < 10):
        raise UsageError(
            f"types other than float32 stand in graphs with Q/DQ, for TensorRT 10 and 11, not in those of {target.name}"
            + (" with --quantizer implicit" if implicit else ""),
            where="--float-type",
            remedy="leave --float-type out, and build with HALF=1 on the device",
        )
    if settings.rounding in ("moments", "learned"):
        raise UsageError(
            "rounding is not learned for TensorRT, nor done by moments",
            where="--rounding",
            remedy="choose --rounding squant, or deploy ONNX Runtime and OpenVINO targets in a run of their own",
        )
    if settings.rounding != "nearest" and (implicit or settings.weight_only):
        raise UsageError(
            "TensorRT rounds the weights itself" if implicit else "weights in blocks are rounded to nearest",
            where="--rounding",
            remedy="leave it out, or ask for --quantizer qdq with --bits w8a8",
        )
    if settings.float_macs is not None and (implicit or settings.weight_only):
        raise UsageError(
            "TensorRT decides itself what computes in float"
            if implicit
            else "with 4-bit weights everything computes in float",
            where="--float-macs",
            remedy="leave it out, or ask for --quantizer qdq with --bits w8a8",
        )
    given = FLOAT_MACS if settings.float_macs is None else settings.float_macs
    name = "implicit" if implicit else "qdq"
    return BuildOptions(
        op_types=settings.op_types,
        exclude=settings.exclude,
        weight_method=settings.weight_method,
        rounding=settings.rounding,
        exact_scales=settings.exact_scales and not implicit,
        bias_correction=bool(getattr(settings, "bias_correction", False)) and not settings.weight_only,
        bits=settings.bits,
        quantizer=name,
        float_type=settings.float_type,
        float_macs=0.0 if implicit or settings.weight_only else given,
        label=name,
    )
