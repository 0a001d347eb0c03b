"""What a user, a search or a recipe can choose when an OpenVINO engine is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from zsq_deploy.artifact import digest_json
from zsq_deploy.backends.base import BuildSettings, Target, digest_array
from zsq_deploy.errors import UsageError

if TYPE_CHECKING:
    from zsq_deploy.quant.reconstruct.deployed import Numbers

__all__ = [
    "BITS",
    "CALIBRATORS",
    "QUANTIZERS",
    "RANGE_ESTIMATORS",
    "BuildOptions",
    "NncfOptions",
    "PotOptions",
    "Quantizer",
    "options_from",
]

Quantizer = Literal["auto", "qdq", "nncf", "pot"]

QUANTIZERS: tuple[str, ...] = ("auto", "qdq", "nncf", "pot")
"""Who decides what is quantized and how: our rules, NNCF, or POT; ``auto`` measures ours and NNCF's."""

CALIBRATORS: tuple[str, ...] = ()
"""The runtime's own calibrators, as range methods: none (NNCF and POT are quantizers, not calibrators)."""

BITS: tuple[str, ...] = ("w8a8", "w4a8", "w8a32", "w4a32")
"""Bits of weights and activations that can be asked for; ``w4a8`` stores 4-bit weights and computes in 8 bits, ``w8a32`` and ``w4a32``
compress weights only."""

_WEIGHT_ONLY = {"w8a32": "int8_sym", "w4a32": "int4_sym"}

RANGE_ESTIMATORS: tuple[str | None, ...] = (
    "minmax",
    "mean_minmax",
    "median_minmax",
    "mean_no_outliers_minmax",
    "mean_quantile",
    "histogram",
    None,
)
"""NNCF's range estimators, in lower case; ``None``: what it does by itself."""


def _one_of(value: Any, allowed: tuple[Any, ...], where: str) -> None:
    if value not in allowed:
        names = ", ".join(str(item) for item in allowed if item is not None)
        raise UsageError(f"there is no {value!r}", where=where, remedy=f"choose one of {names}")


def _positive(value: float | None, where: str, *, zero: bool = False) -> None:
    if value is not None and (not np.isfinite(value) or value < 0 or (value == 0 and not zero)):
        raise UsageError(f"{value} makes no sense here", where=where, remedy="give a positive number")


@dataclass(frozen=True)
class NncfOptions:
    """What ``nncf.quantize`` can be told; the names are NNCF's wherever it has one.

    Attributes:
        preset: ``performance`` (everything symmetric), ``mixed`` (asymmetric activations) or ``None``: NNCF's default.
        model_type: ``transformer`` changes what NNCF quantizes around attention and normalization.
        fast_bias_correction: Correct biases in one pass; ``False``: layer after layer, each behind corrected ones. NNCF's own default is
            the fast one; what the full one wins is measured in ``docs/openvino-nncf.md``.
        bias_correction: ``False``: NNCF leaves the biases alone.
        subset_size: Number of images to collect statistics from; ``None``: the whole set.
        ignored_names: Names of nodes that stay in float.
        ignored_types: Types of operators (as OpenVINO calls them) that stay in float.
        ignored_patterns: Regular expressions of names of nodes that stay in float.
        target_device: ``CPU``, ``GPU``, ``NPU``, ``ANY``, ``CPU_SPR``; ``None``: the target's.
        overflow_fix: ``disable``, ``enable`` or ``first_layer_only``: half-range weights, for processors without VNNI; ``None``:
            ``disable`` where the target has VNNI (NNCF's own default halves the first layer's weights everywhere).
        activations_range: How the range of an activation is found, by NNCF's names: ``minmax`` over all images, or ``mean_minmax``,
            ``median_minmax``, ``mean_no_outliers_minmax``, ``mean_quantile``, ``histogram``; ``None``: NNCF's own mixture.
        weights_range: The same for weights; ``None``: NNCF's default (largest magnitude).
        range_quantile: Share of values that ``mean_quantile`` and ``mean_no_outliers_minmax`` leave out at each end.
        smooth_quant_alpha: Strength of SmoothQuant in matrix products (-1: off); ``None``: NNCF's default. It works with
            ``model_type="transformer"``.
        smooth_quant_convolution_alpha: The same in convolutions; NNCF's default is off.
        accuracy_control: Return layers to float until the metric drops by no more than `max_drop`.
        max_drop: Largest drop of the metric that accuracy control allows (share of 1, so 0.01 is one point).
        drop_type: ``absolute`` or ``relative`` drop.
        ranking_subset_size: Number of samples that rank the layers in accuracy control; ``None``: all of them.
        max_iterations: Most layers that accuracy control may return to float; ``None``: no limit.
        tune_parameters: Accuracy control also searches quantization parameters first.
        per_channel_activations: Let NNCF give depthwise convolutions one activation scale a channel, as it does by default; OpenVINO's
            CPU plugin then computes them in float.
        group_size: Weight-only compression to 4 bits: how many numbers share a scale (-1: one scale a channel); ``None``: NNCF's choice.
    """

    preset: Literal["performance", "mixed"] | None = "mixed"
    model_type: Literal["transformer"] | None = None
    fast_bias_correction: bool = False
    bias_correction: bool = True
    subset_size: int | None = None
    ignored_names: tuple[str, ...] = ()
    ignored_types: tuple[str, ...] = ()
    ignored_patterns: tuple[str, ...] = ()
    target_device: str | None = None
    overflow_fix: str | None = None
    activations_range: str | None = "minmax"
    weights_range: str | None = None
    range_quantile: float = 1e-4
    smooth_quant_alpha: float | None = None
    smooth_quant_convolution_alpha: float | None = None
    accuracy_control: bool = False
    max_drop: float = 0.01
    drop_type: Literal["absolute", "relative"] = "absolute"
    ranking_subset_size: int | None = None
    max_iterations: int | None = None
    tune_parameters: bool = False
    per_channel_activations: bool = False
    group_size: int | None = None

    def __post_init__(self) -> None:
        _one_of(self.preset, ("performance", "mixed", None), "nncf.preset")
        _one_of(self.model_type, ("transformer", None), "nncf.model_type")
        _one_of(self.target_device, ("CPU", "GPU", "NPU", "ANY", "CPU_SPR", None), "nncf.target_device")
        _one_of(self.overflow_fix, ("disable", "enable", "first_layer_only", None), "nncf.overflow_fix")
        _one_of(self.drop_type, ("absolute", "relative"), "nncf.drop_type")
        if self.group_size != -1:
            _positive(self.group_size, "nncf.group_size")
        _one_of(self.activations_range, RANGE_ESTIMATORS, "nncf.activations_range")
        _one_of(self.weights_range, RANGE_ESTIMATORS, "nncf.weights_range")
        if not 0.0 < self.range_quantile < 0.5:
            raise UsageError(
                f"{self.range_quantile} is no share of values to leave out at each end",
                where="nncf.range_quantile",
                remedy="give a number between 0 and 0.5, such as 0.0001",
            )
        for name in ("subset_size", "ranking_subset_size", "max_iterations"):
            _positive(getattr(self, name), f"nncf.{name}")
        _positive(self.max_drop, "nncf.max_drop", zero=True)


@dataclass(frozen=True)
class PotOptions:
    """What POT can be told; the names are POT's wherever it has one.

    Attributes:
        algorithm: ``DefaultQuantization`` or ``AccuracyAwareQuantization``.
        preset: ``performance``, ``mixed`` or ``accuracy``.
        stat_subset_size: Number of images to collect statistics from; ``None``: the whole set.
        use_fast_bias: Fast bias correction; ``False``: the full one.
        ignored: Names of nodes that stay in float (POT's ``ignored.scope``).
        ignored_types: Types of operators that stay in float (POT's ``ignored.operations``).
        max_drop: Largest drop of the metric that AccuracyAwareQuantization allows (``maximal_drop``, share of 1).
        config: More of POT's own keys for ``compression.algorithms[0].params``, handed over as they are; they win.
        config_path: A POT configuration file of the user's that is run as it is (its model and engine sections are replaced).
    """

    algorithm: Literal["DefaultQuantization", "AccuracyAwareQuantization"] = "DefaultQuantization"
    preset: Literal["performance", "mixed", "accuracy"] = "mixed"
    stat_subset_size: int | None = None
    use_fast_bias: bool = True
    ignored: tuple[str, ...] = ()
    ignored_types: tuple[str, ...] = ()
    max_drop: float = 0.01
    config: Mapping[str, Any] = field(default_factory=dict)
    config_path: Path | None = None

    def __post_init__(self) -> None:
        _one_of(self.algorithm, ("DefaultQuantization", "AccuracyAwareQuantization"), "pot.algorithm")
        _one_of(self.preset, ("performance", "mixed", "accuracy"), "pot.preset")
        _positive(self.stat_subset_size, "pot.stat_subset_size")
        _positive(self.max_drop, "pot.max_drop", zero=True)


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is made. Two builds with equal options, ranges, images and models give equal files.

    Attributes:
        quantizer: Who decides: ``qdq`` (our placement and ranges), ``nncf``, ``pot``; ``auto``: measured, and ``qdq`` where nothing
            is measured.
        op_types: ONNX operator types to quantize; ``None``: the quantizer's choice.
        exclude: Names of nodes (of the folded graph) that stay in float, whoever quantizes.
        quantize_outputs: Also quantize the network's outputs (our Q/DQ graph only).
        weight_method: How weight scales are found in our Q/DQ graph: ``minmax`` or ``mse``.
        rounding: How weights of our Q/DQ graph are rounded: to ``nearest``, or by ``squant`` (:mod:`zsq_deploy.quant.algebra.squant`).
        exact_scales: Settle scales and biases so that the engine, its Q/DQ graph and exact arithmetic agree
            (:mod:`zsq_deploy.quant.settle`). ``False`` with NNCF or POT: the IR that they wrote is the engine as it is.
        biases: Corrected biases: name of a bias initializer, or of the convolution or matrix product -> float array.
        weights: Replaced weights (equalized, rounded, ...): initializer name -> float array of the same shape.
        weight_scales: Learned weight scales per output channel: initializer name -> float array (our Q/DQ graph only).
        bits: ``w8a8``; ``w4a8``: weights stored in 4 bits, computed in 8; with `numbers` 2 to 8 bits each; ``w8a32``, ``w4a32``: NNCF compresses the weights, arithmetic is
            float32 and `quantizer` does not matter.
        compress_weights: Instead of quantization: compress the weights with ``nncf.compress_weights`` in this mode (``int8_sym``,
            ``int8_asym``, ``int4_sym``, ``int4_asym``); ``None``: what `bits` says.
        numbers: Codes and scales that were found on the network's places; they replace those of our Q/DQ graph.
        nncf: What NNCF is told.
        pot: What POT is told.
        label: Short name in reports.
    """

    quantizer: Quantizer = "auto"
    op_types: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    quantize_outputs: bool = False
    weight_method: str = "minmax"
    rounding: str = "nearest"
    exact_scales: bool = False
    biases: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    weights: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    weight_scales: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    bits: str = "w8a8"
    compress_weights: str | None = None
    numbers: Numbers | None = None
    nncf: NncfOptions = field(default_factory=NncfOptions)
    pot: PotOptions = field(default_factory=PotOptions)
    label: str = "qdq"

    def __post_init__(self) -> None:
        _one_of(self.quantizer, QUANTIZERS, "--quantizer")
        _one_of(self.weight_method, ("minmax", "mse"), "BuildOptions.weight_method")
        if self.bits.lower() not in BITS and re.fullmatch(r"w[2-8]a[2-8]", self.bits.lower()) is None:
            raise UsageError(
                f"the OpenVINO backend does not build {self.bits!r}",
                where="--bits",
                remedy=f"choose one of {', '.join(BITS)}, or other bits from 2 to 8 (w4a4)",
            )
        if self.numbers is not None and self.quantizer not in ("auto", "qdq"):
            raise UsageError(
                f"{self.quantizer.upper()} finds its own numbers", where="--quantizer", remedy="choose --quantizer qdq"
            )
        _one_of(
            self.compress_weights,
            ("int8_sym", "int8_asym", "int4_sym", "int4_asym", None),
            "BuildOptions.compress_weights",
        )

    @property
    def weight_only(self) -> str | None:
        """The mode in which weights are compressed while activations stay float; ``None``: the network is quantized."""
        return self.compress_weights or _WEIGHT_ONLY.get(self.bits.lower())

    @property
    def stores_int4(self) -> bool:
        """Weights of up to 4 bits are stored as INT4."""
        return self.bits.lower()[:2] in ("w2", "w3", "w4") and self.weight_only is None

    def with_(self, **changes: Any) -> BuildOptions:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def describe(self) -> dict[str, Any]:
        """The options as JSON values; arrays are named by their digest, and only the chosen quantizer's own options are listed."""
        told: dict[str, Any] = {}
        if self.quantizer == "nncf":
            told["nncf"] = asdict(self.nncf)
        if self.quantizer == "pot":
            told["pot"] = {
                **{name: value for name, value in asdict(self.pot).items() if name != "config_path"},
                "config_path": None if self.pot.config_path is None else str(self.pot.config_path),
            }
        return {
            "label": self.label,
            "quantizer": self.quantizer,
            "bits": self.bits,
            "op_types": None if self.op_types is None else list(self.op_types),
            "exclude": list(self.exclude),
            "quantize_outputs": self.quantize_outputs,
            "weight_method": self.weight_method,
            "rounding": self.rounding,
            "exact_scales": self.exact_scales,
            "compress_weights": self.compress_weights,
            "corrected_biases": {name: digest_array(array) for name, array in sorted(self.biases.items())},
            "replaced_weights": {name: digest_array(array) for name, array in sorted(self.weights.items())},
            "learned_scales": {name: digest_array(array) for name, array in sorted(self.weight_scales.items())},
            **({"low_bits": self.numbers.describe()} if self.numbers is not None else {}),
            **told,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of everything chosen."""
        return digest_json(self.describe())


def options_from(settings: BuildSettings, target: Target) -> BuildOptions:
    """The build options for what a user asked for (see :meth:`zsq_deploy.backends.Backend.options_from`).

    Raises:
        UsageError: There is no such quantizer, or it knows no such word or value.
    """
    quantizer = settings.quantizer
    if settings.rounding != "nearest":
        if quantizer not in ("auto", "qdq") or settings.weight_only:
            raise UsageError(
                "NNCF and POT round weights themselves",
                where="--rounding",
                remedy="leave it out, or choose --quantizer qdq and bits of weights and activations",
            )
        quantizer = "qdq"
    if settings.bits.lower() not in BITS and not settings.weight_only and quantizer in ("nncf", "pot"):
        raise UsageError(
            f"{quantizer.upper()} does not build {settings.bits!r}",
            where="--bits",
            remedy="leave --quantizer out, or choose w8a8 or w4a8",
        )
    if quantizer == "auto" and not settings.weight_only and settings.bits.lower() != "w8a8":
        quantizer = "qdq"
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
    vendor = {name: dict(words) for name, words in settings.vendor.items()}
    pot = vendor.get("pot", {})
    if pot.get("config_path") is not None:
        pot["config_path"] = Path(pot["config_path"])
    return BuildOptions(
        bits=settings.bits,
        quantizer=cast("Quantizer", quantizer),
        op_types=settings.op_types,
        exclude=settings.exclude,
        quantize_outputs=settings.quantize_outputs,
        weight_method=settings.weight_method,
        rounding=settings.rounding if settings.rounding == "squant" else "nearest",  # other codes come as numbers
        exact_scales=settings.exact_scales,
        compress_weights=settings.compress_weights,
        nncf=NncfOptions(**vendor.get("nncf", {})),
        pot=PotOptions(**pot),
    )
