"""What a user, a search or a recipe can choose when a TensorRT engine is prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from zsq_deploy.artifact import digest_json
from zsq_deploy.backends.base import BuildSettings, Target, digest_array
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.errors import UsageError

__all__ = ["BITS", "CALIBRATORS", "QUANTIZERS", "BuildOptions", "options_from"]

QUANTIZERS: tuple[str, ...] = ("auto",)
"""Who quantizes: our own placement of Q/DQ."""

CALIBRATORS: tuple[str, ...] = ()
"""TensorRT's calibrators run on the device, on a GPU; none of them is a range method here."""

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
        exact_scales: Settle scales and biases so that float32, float64 and integer arithmetic agree (:mod:`zsq_deploy.quant.settle`).
        bias_correction: Shift biases by the mean error that quantization causes, where that helps on the calibration images.
        biases: Corrected biases: name of a bias initializer, or of the layer -> float array.
        weights: Replaced weights: initializer name -> float array of the same shape.
        weight_scales: Learned weight scales per output channel: initializer name -> float array.
        bits: One of :data:`BITS`.
        block: Most weights that share a scale with ``w4a32``: 64 or 128.
        label: Short name in reports.
    """

    op_types: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    attention: bool = False
    weight_method: str = "minmax"
    exact_scales: bool = False
    bias_correction: bool = False
    biases: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    weights: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    weight_scales: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    bits: str = "w8a8"
    block: int = 128
    label: str = "qdq"

    def __post_init__(self) -> None:
        for value, allowed, where in (
            (self.bits.lower(), BITS, "--bits"),
            (self.weight_method, ("minmax", "mse"), "BuildOptions.weight_method"),
            (self.block, (64, 128), "BuildOptions.block"),
        ):
            if value not in allowed:
                raise UsageError(
                    f"the TensorRT backend does not build {value!r}",
                    where=where,
                    remedy=f"choose one of {', '.join(str(item) for item in allowed)}",
                )

    @property
    def weight_only(self) -> bool:
        """Only weights are stored in fewer bits."""
        return self.bits.lower() == "w4a32"

    def with_(self, **changes: Any) -> BuildOptions:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def describe(self) -> dict[str, Any]:
        """The options as JSON values; arrays are named by their digest."""
        return {
            "label": self.label,
            "quantizer": "qdq",
            "bits": self.bits,
            "block": self.block if self.weight_only else 0,
            "op_types": None if self.op_types is None else list(self.op_types),
            "exclude": list(self.exclude),
            "attention": self.attention,
            "weight_method": self.weight_method,
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
    if settings.bits.lower() == "w4a32" and generation(target) < 10:
        raise UsageError(
            f"{target.name} knows no 4-bit weights",
            where="--bits",
            remedy="choose w8a8, or a target from tensorrt-10 on",
        )
    return BuildOptions(
        op_types=settings.op_types,
        exclude=settings.exclude,
        weight_method=settings.weight_method,
        exact_scales=settings.exact_scales,
        bias_correction=bool(getattr(settings, "bias_correction", False)) and not settings.weight_only,
        bits=settings.bits,
    )
