"""What a recipe says about quantization, with what the quantizers of vendors are told."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from zsq_deploy.recipe.values import Names, Section, Size

__all__ = ["NncfSection", "PotSection", "QuantizationSection"]

_Estimator = Literal["minmax", "mean_minmax", "median_minmax", "mean_no_outliers_minmax", "mean_quantile", "histogram"]


class NncfSection(Section):
    """What NNCF is told (OpenVINO targets); the words are NNCF's wherever it has one."""

    preset: Literal["performance", "mixed"] | None = Field(
        default="mixed",
        description="performance: everything symmetric; mixed: asymmetric activations; null: NNCF's default.",
    )
    model_type: Literal["transformer"] | None = Field(
        default=None, description="transformer changes what is quantized around attention and normalization."
    )
    fast_bias_correction: bool = Field(
        default=False, description="Fast bias correction, one pass; false: the full one, layer after layer."
    )
    bias_correction: bool = Field(default=True, description="false: NNCF leaves biases alone.")
    subset_size: Size | None = Field(
        default=None, description="Number of images to collect statistics from; null: the whole set."
    )
    ignored_names: Names = Field(default=(), description="Names of nodes that stay in float.")
    ignored_types: Names = Field(
        default=(), description="Operator types, as OpenVINO calls them (MatMul, Add), that stay in float."
    )
    ignored_patterns: Names = Field(default=(), description="Regular expressions of names of nodes that stay in float.")
    target_device: Literal["CPU", "GPU", "NPU", "ANY", "CPU_SPR"] | None = Field(
        default=None, description="Device that NNCF quantizes for: CPU, GPU, NPU, ANY, CPU_SPR; null: the target's."
    )
    overflow_fix: Literal["disable", "enable", "first_layer_only"] | None = Field(
        default=None,
        description="Half-range weights against saturation without VNNI: disable, enable, first_layer_only; null: NNCF's default.",
    )
    activations_range: _Estimator | None = Field(
        default="minmax",
        description="How the range of an activation is found: minmax, mean_minmax, median_minmax, mean_no_outliers_minmax, mean_quantile, "
        "histogram; null: NNCF's own mixture.",
    )
    weights_range: _Estimator | None = Field(default=None, description="The same for weights; null: NNCF's default.")
    range_quantile: float = Field(
        default=1e-4,
        gt=0,
        lt=0.5,
        description="Share of values that mean_quantile and mean_no_outliers_minmax leave out at each end.",
    )
    smooth_quant_alpha: float | None = Field(
        default=None, description="Strength of SmoothQuant in matrix products, -1: off; null: NNCF's default."
    )
    smooth_quant_convolution_alpha: float | None = Field(
        default=None, description="Strength of SmoothQuant in convolutions; null: NNCF's default, off."
    )
    accuracy_control: bool = Field(
        default=False, description="Return layers to float until the metric drops by no more than max_drop."
    )
    max_drop: float = Field(
        default=0.01, ge=0, description="Largest drop that accuracy control allows; 0.01 is one point."
    )
    drop_type: Literal["absolute", "relative"] = Field(
        default="absolute", description="How the drop counts: absolute or relative."
    )
    ranking_subset_size: Size | None = Field(
        default=None, description="Samples that rank the layers in accuracy control; null: all of them."
    )
    max_iterations: Size | None = Field(
        default=None, description="Most layers that accuracy control may return to float; null: no limit."
    )
    tune_parameters: bool = Field(
        default=False, description="Accuracy control searches the parameters of quantization before it returns layers."
    )
    per_channel_activations: bool = Field(
        default=False,
        description="One activation scale a channel before depthwise convolutions, as NNCF does by default; OpenVINO's CPU plugin "
        "then computes them in float.",
    )
    group_size: int | None = Field(
        default=None,
        ge=-1,
        description="Weights in 4 bits only: how many share a scale, -1: a channel; null: NNCF's choice.",
    )


class PotSection(Section):
    """What POT is told (OpenVINO targets, quantizer: pot); the words are POT's wherever it has one."""

    algorithm: Literal["DefaultQuantization", "AccuracyAwareQuantization"] = Field(
        default="DefaultQuantization",
        description="DefaultQuantization, or AccuracyAwareQuantization, which returns layers to float until the drop is small enough.",
    )
    preset: Literal["performance", "mixed", "accuracy"] = Field(
        default="mixed",
        description="performance: everything symmetric; mixed: asymmetric activations; accuracy: all asymmetric.",
    )
    stat_subset_size: Size | None = Field(
        default=None, description="Number of images to collect statistics from; null: the whole set."
    )
    use_fast_bias: bool = Field(default=True, description="Fast bias correction; false: the full one.")
    ignored: Names = Field(default=(), description="Names of nodes that stay in float.")
    ignored_types: Names = Field(default=(), description="Operator types that stay in float.")
    max_drop: float = Field(
        default=0.01, ge=0, description="Largest drop that AccuracyAwareQuantization allows; 0.01 is one point."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="More of POT's own keys for the parameters of the algorithm; they win."
    )
    config_path: str | None = Field(
        default=None,
        description="A POT configuration file that is run as it is; only its model and engine sections are replaced.",
    )


class QuantizationSection(Section):
    """How the network becomes an integer one."""

    quantizer: Literal["auto", "qdq", "nncf", "pot", "implicit"] = Field(
        default="auto",
        description="Who quantizes for OpenVINO: qdq (our Q/DQ graph), nncf, pot; auto measures qdq and nncf and keeps the better. "
        "For TensorRT: qdq (auto), or implicit: TensorRT itself, from the float network and a calibration cache (8 and 10). "
        "ONNX Runtime targets know auto only.",
    )

    bits: str = Field(
        default="w8a8",
        pattern=r"^[wW]\d{1,2}[aA]\d{1,2}$",
        description="Bits of weights and of what products read, 2 to 8 each: w8a8; w4a8 (weights stored in 4 bits, computed in 8); w4a4, "
        "w3a3, ... (cut codes in 8-bit kernels: saves space, not time); w8a32 and w4a32 (weights only).",
    )
    protocol: str = Field(
        default="ends-8bit",
        min_length=1,
        description="With fewer than 8 bits: which tensors keep 8: ends-8bit (first and last layer), ends-8bit+second-input, all-layers.",
    )
    ranges: str = Field(
        default="auto",
        min_length=1,
        description="How activation ranges are found: auto, minmax, percentile, entropy, mse, bn-analytic; ort-minmax, ort-entropy, ort-percentile; "
        "tensorrt-entropy2, tensorrt-entropy, tensorrt-minmax.",
    )
    percentile: float = Field(default=99.999, gt=50, le=100, description="For ranges: percentile.")
    exact_scales: bool = Field(
        default=True, description="Choose scales on which engine and reference agree bit for bit (short significands)."
    )
    float_type: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        description="TensorRT 10 and 11: the type that the graph gives to what is computed outside of Q/DQ pairs.",
    )
    float_macs: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="TensorRT: share of the multiply-accumulates that layers left in float may have, where 8 bits lose too much on synthetic "
        "images (default 0.125; 0: all stay in 8 bits).",
    )
    rounding: Literal["nearest", "squant", "moments", "learned"] = Field(
        default="nearest",
        description="How weights are rounded in our Q/DQ graphs: nearest; squant: so that errors cancel in each output channel (worth it below "
        "8 bits); moments: for the smallest squared error of what each layer gives, on the images; learned: block by block on the images, so that each block gives what it gave in float (minutes to hours).",
    )
    reconstruct_preset: str = Field(
        default="fast", min_length=1, description="For rounding: learned: how long is learned, fast or full."
    )
    size_budget: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="With fewer than 8 bits: let the layers that mind most keep 8, as far as the weights then take at most this share of the bytes "
        "that they take in 8 bits. Chosen on the calibration images; by default all layers of the protocol have the bits that were asked for.",
    )
    equalize: bool = Field(
        default=False,
        description="Equalize the weight ranges of layers that follow each other, by factors that leave the float network as it is.",
    )
    bias_correction: bool = Field(
        default=True, description="Shift biases so that every layer's mean output is that of the float network."
    )
    exclude: Names = Field(default=(), description="Names of nodes that stay in float.")
    op_types: Names | None = Field(
        default=None, description="Operator types to quantize; by default what the target does best."
    )
    search: bool = Field(
        default=True, description="Build the promising choices of what to quantize and keep the best measured engine."
    )
    choice: dict[str, str] = Field(
        default_factory=dict,
        description="What the search chose, by target; a finished run writes it here, so that running its recipe again measures "
        "nothing and gives the same engine.",
    )
    compress_weights: Literal["int8_sym", "int8_asym", "int4_sym", "int4_asym"] | None = Field(
        default=None,
        description="OpenVINO: instead of quantization, compress the weights with NNCF: int8_sym, int8_asym, int4_sym, int4_asym.",
    )
    validation_data: str | None = Field(
        default=None,
        description="Labelled images that accuracy control may look at (.npz or folder). Without them its metric is agreement with the "
        "float network on synthetic images.",
    )
    nncf: NncfSection = Field(default=NncfSection(), description="What NNCF is told.")
    pot: PotSection = Field(default=PotSection(), description="What POT is told.")

    @property
    def accuracy_control(self) -> bool:
        """Whether the chosen quantizer is to return layers to float until a metric is kept."""
        if self.quantizer == "pot":
            return self.pot.algorithm == "AccuracyAwareQuantization"
        return self.quantizer in ("auto", "nncf") and self.nncf.accuracy_control

    @property
    def unread(self) -> tuple[str, ...]:
        """The sections that the chosen quantizer does not read."""
        readers = {"nncf": ("auto", "nncf"), "pot": ("pot",)}
        return tuple(name for name, quantizers in readers.items() if self.quantizer not in quantizers)

    @property
    def vendor(self) -> dict[str, dict[str, Any]]:
        """What each vendor's quantizer is told: quantizer -> word -> value; only those that are told something."""
        return {
            name: section.model_dump()
            for name, section in (("nncf", self.nncf), ("pot", self.pot))
            if section != type(section)()
        }

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> QuantizationSection:
        for name in set(self.unread) & set(self.vendor):
            raise ValueError(f"the section {name} says something, and quantizer {self.quantizer} does not read it")
        if self.validation_data is not None and not self.accuracy_control:
            raise ValueError(
                "validation_data is for accuracy control, which is off: set nncf.accuracy_control, or "
                "pot.algorithm to AccuracyAwareQuantization"
            )
        if self.ranges != "auto" and self.quantizer in ("nncf", "pot"):
            raise ValueError(f"ranges: {self.ranges} has no effect on {self.quantizer}, which finds ranges itself")
        return self
