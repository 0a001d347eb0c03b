"""The recipe: everything that one run of the main job is told, as a YAML file.

The words are those of the command line, grouped: ``--min-agreement`` is ``verification.gates.min_agreement``. An unknown word is
an error, with its line and the word that was probably meant. Relative paths count from the folder of the recipe file, so that a
recipe and its files can be moved together. A run writes ``recipe.resolved.yaml`` beside its results: the recipe with every
default filled in and every path absolute, which gives the same result when it is run again.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BeforeValidator, Field

from zsq_deploy.artifact import atomic_writer, digest_json
from zsq_deploy.errors import UsageError

__all__ = [
    "CalibrationSection",
    "FieldDescription",
    "GatesSection",
    "ModelSection",
    "NncfSection",
    "PotSection",
    "QuantizationSection",
    "Recipe",
    "RunSection",
    "VerificationSection",
    "describe",
    "parse_shape",
]


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape as the command line writes it, ``1x3x32x32``.

    Raises:
        ValueError: Not positive numbers joined by ``x``.
    """
    parts = re.split(r"[x×,]", text.strip().lower())
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no shape: write the sizes joined by x, for example 1x3x224x224")
    return tuple(int(part) for part in parts)


def _as_shape(value: Any) -> Any:
    """Shapes are written ``1x3x32x32`` or as a list; for several inputs as a mapping from the input's name."""
    if isinstance(value, str):
        return parse_shape(value)
    if isinstance(value, Mapping):
        return {name: _as_shape(shape) for name, shape in value.items()}
    return value


def _as_numbers(value: Any) -> Any:
    """Numbers are written as a list, or as on the command line: ``0.485,0.456,0.406``."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    return value


def _as_list(value: Any) -> Any:
    """A list of names; one name may stand alone."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


_Size = Annotated[int, Field(gt=0)]
_Shape = tuple[_Size, ...]
_Shapes = Annotated[_Shape | dict[str, _Shape], BeforeValidator(_as_shape)]
_Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_numbers)]
_Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """The network and how images become its input."""

    source: str = Field(
        min_length=1,
        description="The network: an .onnx file, an exported .pt2 file, module:callable, or timm:NAME.",
    )
    path: str | None = Field(default=None, description="Folder that module:callable is imported from.")
    weights: str | None = Field(
        default=None, description="Weights for module:callable: .safetensors, or .pt/.pth (never unpickled)."
    )
    input_shape: _Shapes | None = Field(
        default=None, description="Shape of the input, 1x3x32x32; with several inputs a mapping from name to shape."
    )
    mean: _Numbers | None = Field(default=None, description="Mean per channel of RGB (or gray) divided by 255.")
    std: _Numbers | None = Field(
        default=None, description="Standard deviation per channel of RGB (or gray) divided by 255."
    )
    raw_pixels: bool = Field(
        default=False, description="The network takes pixels 0..255 as they are; excludes mean and std."
    )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ModelSection:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        if self.raw_pixels and self.mean is not None:
            raise ValueError("raw_pixels excludes mean and std: the network takes either 0..255 or normalized values")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ValueError(f"mean has {len(self.mean)} values and std has {len(self.std)}")
            if min(self.std) <= 0:
                raise ValueError("every value of std must be above 0")
        return self


class CalibrationSection(_Section):
    """Where the calibration images come from."""

    method: str = Field(
        default="zeroq",
        min_length=1,
        description="How images are made: zeroq, fast, genie, fractal, ... (`zsq methods` lists them all); auto chooses from measured evidence; "
        "bn-analytic makes none.",
    )
    time_limit: float | None = Field(
        default=None,
        gt=0,
        description="With method auto: seconds that making the images may take, on one processor core.",
    )
    images: int = Field(default=256, gt=0, description="Number of images.")
    seed: int | None = Field(default=None, ge=0, description="Seed of the images; run.seed if it is not given.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of the method that differ from its published defaults."
    )
    device: str | None = Field(
        default=None, description="Where images are made: cpu, cuda, cuda:1; by default cuda where there is one."
    )
    also: list[str] = Field(
        default_factory=list,
        description="Further networks with the same input and classes that the images are to fit as well, for methods that look at "
        "several (mixmix): files or names as in model.source, with the same preprocessing.",
    )
    workers: int = Field(
        default=1, ge=1, description="Processes that make images at the same time, each with a share of the threads."
    )
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description="What convolutions read while images are made; bfloat16 is meant for GPUs, auto takes it where there is one.",
    )
    holdout: int = Field(
        default=64,
        ge=0,
        description="Further images that nothing is calibrated on, for an estimate of agreement where there are no labelled data.",
    )
    set: str | None = Field(
        default=None,
        description="Folder of a finished calibration set to use instead of making one; its last part is held out.",
    )


_Estimator = Literal["minmax", "mean_minmax", "median_minmax", "mean_no_outliers_minmax", "mean_quantile", "histogram"]


class NncfSection(_Section):
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
    subset_size: _Size | None = Field(
        default=None, description="Number of images to collect statistics from; null: the whole set."
    )
    ignored_names: _Names = Field(default=(), description="Names of nodes that stay in float.")
    ignored_types: _Names = Field(
        default=(), description="Operator types, as OpenVINO calls them (MatMul, Add), that stay in float."
    )
    ignored_patterns: _Names = Field(
        default=(), description="Regular expressions of names of nodes that stay in float."
    )
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
    ranking_subset_size: _Size | None = Field(
        default=None, description="Samples that rank the layers in accuracy control; null: all of them."
    )
    max_iterations: _Size | None = Field(
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


class PotSection(_Section):
    """What POT is told (OpenVINO targets, quantizer: pot); the words are POT's wherever it has one."""

    algorithm: Literal["DefaultQuantization", "AccuracyAwareQuantization"] = Field(
        default="DefaultQuantization",
        description="DefaultQuantization, or AccuracyAwareQuantization, which returns layers to float until the drop is small enough.",
    )
    preset: Literal["performance", "mixed", "accuracy"] = Field(
        default="mixed",
        description="performance: everything symmetric; mixed: asymmetric activations; accuracy: all asymmetric.",
    )
    stat_subset_size: _Size | None = Field(
        default=None, description="Number of images to collect statistics from; null: the whole set."
    )
    use_fast_bias: bool = Field(default=True, description="Fast bias correction; false: the full one.")
    ignored: _Names = Field(default=(), description="Names of nodes that stay in float.")
    ignored_types: _Names = Field(default=(), description="Operator types that stay in float.")
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


class QuantizationSection(_Section):
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
    rounding: Literal["nearest", "squant", "learned"] = Field(
        default="nearest",
        description="How weights are rounded in our Q/DQ graphs: nearest; squant: so that errors cancel in each output channel (worth it below "
        "8 bits); learned: block by block on the images, so that each block gives what it gave in float (minutes to hours).",
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
    exclude: _Names = Field(default=(), description="Names of nodes that stay in float.")
    op_types: _Names | None = Field(
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


class GatesSection(_Section):
    """Limits that the engine has to keep; the exit code is 1 when one of them is missed. Shares are written 0 to 1."""

    min_agreement: _Share | None = Field(
        default=None, description="Least top-1 agreement with the fake-quant reference, 0.995."
    )
    min_float_agreement: _Share | None = Field(
        default=None, description="Least top-1 agreement with the float network."
    )
    max_accuracy_drop: _Share | None = Field(
        default=None, description="Largest loss of accuracy on labelled data; 0.01 is one point."
    )
    min_speedup: float | None = Field(default=None, gt=0, description="Least speed-up over fp32; 2 is twice as fast.")
    min_within_2_lsb: _Share | None = Field(
        default=None, description="Least share of outputs within 2 LSB of the fake-quant reference."
    )
    min_integer_macs: _Share | None = Field(
        default=None, description="Least share of multiply-accumulates in integer kernels."
    )
    min_integer_equal: _Share | None = Field(
        default=None, description="Least share of outputs that equal exact integer arithmetic."
    )
    min_sqnr_db: float | None = Field(default=None, description="Least SQNR of the outputs against float, in dB.")
    max_latency_ms: float | None = Field(
        default=None, gt=0, description="Largest median latency at batch 1, in milliseconds."
    )
    max_engine_bytes: int | None = Field(default=None, gt=0, description="Largest size of the engine file, in bytes.")


class VerificationSection(_Section):
    """What the engine is measured on, and what it has to reach."""

    eval_data: str | None = Field(
        default=None,
        description="Labelled images: an .npz file with x and y, or an image folder. Used to evaluate, for nothing else.",
    )
    limit: int | None = Field(default=None, gt=0, description="Evaluate on at most this many images, spread evenly.")
    resize: bool = Field(default=False, description="Scale evaluation images of another size to the network's input.")
    gates: GatesSection = Field(default=GatesSection(), description="Limits that decide the exit code.")


class RunSection(_Section):
    """Things that are about the run and not about the result."""

    threads: int | None = Field(
        default=None, gt=0, description="Threads of the engine that is measured; 1 if it is not given."
    )
    seed: int = Field(default=0, ge=0, description="Seed of everything random.")
    output: str | None = Field(default=None, description="Output folder.")


class Recipe(_Section):
    """One run of the main job: a network in, verified engines out."""

    model: ModelSection
    calibration: CalibrationSection = CalibrationSection()
    quantization: QuantizationSection = QuantizationSection()
    targets: Annotated[_Names, Field(min_length=1)] = Field(
        ("ort-x86-vnni",), validate_default=True, description="Deployment targets; `zsq doctor` lists them."
    )
    verification: VerificationSection = VerificationSection()
    run: RunSection = RunSection()

    @pydantic.model_validator(mode="after")
    def _targets_once(self) -> Recipe:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("a target is named twice")
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], *, where: str = "recipe", _lines: Mapping[str, int] | None = None) -> Recipe:
        """A recipe from nested mappings.

        Args:
            values: ``{"model": {"source": ...}, ...}``.
            where: What to call it in messages.

        Raises:
            UsageError: An unknown word, a missing one, or a value that makes no sense.
        """
        try:
            return cls.model_validate(dict(values))
        except pydantic.ValidationError as error:
            raise _explained(error, where, _lines or {}) from error

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe; relative paths in it count from its folder.

        Raises:
            UsageError: No such file, no YAML, an unknown word, or a value that makes no sense; with the line.
        """
        file = Path(path)
        values, lines = _read_yaml(file)
        return cls.of(values, where=str(file), _lines=lines)._with_paths(
            lambda p: p if p.is_absolute() else file.parent / p
        )

    def dump(self, path: Path | str) -> None:
        """Write the recipe as YAML, each word with what it means as a comment. What was never given stays out.

        Paths are written as they are; use :meth:`resolved` first when the file goes to another folder.
        """
        with atomic_writer(Path(path)) as out:
            out.write(self.to_yaml().encode())

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        text: list[str] = []
        defaults = Recipe.of({"model": {"source": "-"}}).model_dump(mode="json")
        for name, value in self.model_dump(mode="json").items():
            if isinstance(value, dict):
                if name == "quantization":  # what no quantizer reads is not written
                    value = {key: item for key, item in value.items() if key not in self.quantization.unread}
                section = _without_none(value, defaults[name])
                if not section:
                    continue
                value = section
            text.append(yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=100))
        return "\n".join(text)

    def replace(self, changes: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """A recipe with some values changed, checked again.

        Args:
            changes: ``{"calibration.method": "genie", "targets": ["ort-arm64"]}``.
            where: What to call it in messages.

        Raises:
            UsageError: No such word, or a value that makes no sense.
        """
        values = self.model_dump()
        for dotted, value in changes.items():
            *sections, key = dotted.split(".")
            place: Any = values
            for section in sections:
                place = place.get(section) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise UsageError(
                    f"a recipe has no {dotted!r}", where=where, remedy=_nearest(dotted, [f.name for f in describe()])
                )
            place[key] = value
        return Recipe.of(values, where=where)

    def resolved(self) -> Recipe:
        """The recipe with every default that depends on something else filled in, and with absolute paths."""
        seed = self.run.seed if self.calibration.seed is None else self.calibration.seed
        threads = 1 if self.run.threads is None else self.run.threads
        filled = self.replace({"calibration.seed": seed, "run.threads": threads})
        return filled._with_paths(lambda p: Path(os.path.abspath(p)))  # noqa: PTH100 -- links stay as the user wrote them

    @property
    def digest(self) -> str:
        """SHA-256 over everything that the result depends on: not over the output folder and the threads."""
        values = self.model_dump(mode="json")
        values["run"] = {"seed": self.run.seed}
        values["calibration"]["seed"] = self.run.seed if self.calibration.seed is None else self.calibration.seed
        return digest_json(values)

    def _with_paths(self, change: Any) -> Recipe:
        def changed(text: str | None) -> str | None:
            return None if text is None else str(change(Path(text).expanduser()))

        model: dict[str, Any] = {"path": changed(self.model.path), "weights": changed(self.model.weights)}
        if _is_file_source(self.model.source):
            model["source"] = changed(self.model.source)
        quantization = self.quantization
        return self.model_copy(
            update={
                "quantization": quantization.model_copy(
                    update={
                        "validation_data": changed(quantization.validation_data),
                        "pot": quantization.pot.model_copy(
                            update={"config_path": changed(quantization.pot.config_path)}
                        ),
                    }
                ),
                "calibration": self.calibration.model_copy(update={"set": changed(self.calibration.set)}),
                "model": self.model.model_copy(update=model),
                "verification": self.verification.model_copy(
                    update={"eval_data": changed(self.verification.eval_data)}
                ),
                "run": self.run.model_copy(update={"output": changed(self.run.output)}),
            }
        )


def _is_file_source(source: str) -> bool:
    """Whether a model source is a file, rather than ``module:callable`` or ``timm:NAME``."""
    return Path(source).suffix.lower() in (".onnx", ".pt2") or ":" not in source


_FREE = ("parameters", "config")
"""Mappings whose words are not ours."""


def _without_none(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says nothing: nulls and empty sections, unless that differs from the default."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        # a method's own parameters are the user's: null means something there
        section = isinstance(value, dict) and isinstance(default, dict) and key not in _FREE
        inner = _without_none(value, default or {}) if section else value
        if inner == {} or (inner is None and default is None):
            continue
        found[key] = inner
    return found


# ---------------------------------------------------------------------------------------------------------------------
# reading, with lines
# ---------------------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of every key by its dotted name."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError("there is no such recipe", where=str(path), remedy="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the recipe cannot be read ({error})", where=str(path), remedy="give a YAML text file"
        ) from error
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _note_lines(node, "", lines, str(path))
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UsageError(
            f"this is not YAML: {getattr(error, 'problem', None) or error}",
            where=f"{path}{place}",
            remedy="mind indentation (spaces, no tabs), a space behind each colon, and closing quotes and brackets",
        ) from error
    if not isinstance(values, dict):
        raise UsageError(
            "the recipe is empty" if values is None else "the recipe is no mapping of words to values",
            where=str(path),
            remedy="start with:\nmodel:\n  source: network.onnx",
        )
    return values, lines


def _note_lines(node: yaml.Node, prefix: str, lines: dict[str, int], where: str, depth: int = 0) -> None:
    if not isinstance(node, yaml.MappingNode) or depth > 20:
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            raise UsageError(
                f"{name} is given twice",
                where=f"{where}, lines {lines[name]} and {key.start_mark.line + 1}",
                remedy="keep one of them",
            )
        lines[name] = key.start_mark.line + 1
        _note_lines(value, name + ".", lines, where, depth + 1)


def _explained(error: pydantic.ValidationError, where: str, lines: Mapping[str, int]) -> UsageError:
    """What pydantic found, in the user's words, with lines and near misses."""
    problems: list[str] = []
    remedies: list[str] = []
    first_line: int | None = None
    for item in error.errors():
        loc = [part for part in item["loc"] if isinstance(part, str)]
        known = [f.name for f in describe()]
        while (
            loc and item["type"] != "extra_forbidden" and ".".join(loc) not in known and ".".join(loc) not in _SECTIONS
        ):
            loc.pop()  # pydantic adds names of union members; a user never wrote those
        dotted = ".".join(loc)
        line = lines.get(dotted)
        at = f" (line {line})" if line else ""
        first_line = first_line or line
        if item["type"] == "extra_forbidden":
            problems.append(f"a recipe has no {dotted!r}{at}")
            remedies.append(_nearest(dotted, [*known, *_SECTIONS]))
        elif item["type"] == "missing":
            problems.append(f"{dotted!r} is missing")
            remedies.append(f"add {dotted}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "string_pattern_mismatch":
                message = "this has the wrong form"
            given = "" if isinstance(item["input"], Mapping | pydantic.BaseModel) else f", not {item['input']!r}"
            problem = f"{dotted or 'recipe'}{at}: {message}{given}"
            if problem not in problems:
                problems.append(problem)
            described = next((f.description for f in describe() if f.name == dotted), "")
            remedies.append(f"{dotted}: {described}" if described else "")
    return UsageError(
        "; ".join(problems),
        where=where + (f", line {first_line}" if first_line else ""),
        remedy="\n         ".join(dict.fromkeys(remedy for remedy in remedies if remedy))
        or "`zsq run --words` lists every word",
    )


def _nearest(dotted: str, known: list[str]) -> str:
    """What was probably meant by an unknown word."""
    *section, key = dotted.split(".")
    prefix = ".".join(section)
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == prefix]
    spelled = key.replace("-", "_")
    close = difflib.get_close_matches(spelled, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {'.'.join([*section, close[0]])}?"
    elsewhere = [name for name in known if name.rpartition(".")[2] == spelled]
    if elsewhere:
        return f"it belongs to another section: {elsewhere[0]}"
    anywhere = difflib.get_close_matches(spelled, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.75)
    if anywhere:
        return f"did you mean {next(name for name in known if name.rpartition('.')[2] == anywhere[0])}?"
    return f"{prefix or 'a recipe'} knows {', '.join(siblings)}" if siblings else "`zsq run --words` lists every word"


# ---------------------------------------------------------------------------------------------------------------------
# describing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldDescription:
    """One word of the recipe, for help and docs.

    Attributes:
        name: Dotted name, ``calibration.images``.
        default: Default as YAML text; empty when there is none, ``required`` when it must be given.
        description: One sentence.
    """

    name: str
    default: str
    description: str


def describe() -> list[FieldDescription]:
    """Every word of a recipe in the order of the file."""
    return list(_describe(Recipe, ""))


def _describe(section: type[pydantic.BaseModel], prefix: str) -> Iterator[FieldDescription]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Section):
            yield from _describe(kind, f"{prefix}{name}.")
            continue
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            if value is None or value in ((), {}):
                default = ""
            elif isinstance(value, tuple):
                default = ", ".join(map(str, value))
            else:
                default = str(value).lower() if isinstance(value, bool) else str(value)
        yield FieldDescription(prefix + name, default, field.description or "")


def _sections(section: type[pydantic.BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Section):
            yield prefix + name
            yield from _sections(kind, f"{prefix}{name}.")


_SECTIONS = tuple(_sections(Recipe, ""))
