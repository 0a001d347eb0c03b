"""Options about what is built, and who quantizes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_QUANTIZE, _VENDOR = "Quantization", "NNCF and POT (OpenVINO targets)"

BitsOpt = Annotated[
    str,
    typer.Option(
        "--bits",
        metavar="w8a8",
        help="Bits of weights (w) and activations (a), 2 to 8 each: w8a8; w4a8 (4-bit weights on disk); w4a4, ... (space, not time); "
        "w8a32, w4a32 (weights only).",
        rich_help_panel=_QUANTIZE,
    ),
]
ProtocolOpt = Annotated[
    str,
    typer.Option(
        "--protocol",
        metavar="NAME",
        help="Fewer than 8 bits: what keeps 8: ends-8bit (first and last layer), ends-8bit+second-input, all-layers.",
        rich_help_panel=_QUANTIZE,
    ),
]
RangesOpt = Annotated[
    str,
    typer.Option(
        "--ranges",
        metavar="NAME",
        help="How activation ranges are found: auto (min-max that looks at coverage), minmax, percentile, entropy, mse, bn-analytic; "
        "or ONNX Runtime's own calibrators: ort-minmax, ort-entropy, ort-percentile; "
        "or TensorRT's: tensorrt-entropy2, tensorrt-entropy, tensorrt-minmax.",
        rich_help_panel=_QUANTIZE,
    ),
]
BiasOpt = Annotated[
    bool,
    typer.Option(
        "--bias-correction/--no-bias-correction",
        help="Shift biases so that quantization changes no channel's mean.",
        rich_help_panel=_QUANTIZE,
    ),
]
RoundingOpt = Annotated[
    str,
    typer.Option(
        "--rounding",
        metavar="NAME",
        help="How weights are rounded: nearest; squant: so that errors cancel in each output channel; moments: for the smallest error of what each layer gives; learned: block by block on the images.",
        rich_help_panel=_QUANTIZE,
    ),
]
ReconstructOpt = Annotated[
    str,
    typer.Option(
        "--reconstruct-preset",
        metavar="NAME",
        help="With --rounding learned: how long is learned, fast or full.",
        rich_help_panel=_QUANTIZE,
    ),
]
SizeBudgetOpt = Annotated[
    float | None,
    typer.Option(
        "--size-budget",
        metavar="SHARE",
        help="With fewer than 8 bits: the layers that mind most keep 8, within this share of the bytes that weights take in 8 bits.",
        rich_help_panel=_QUANTIZE,
    ),
]
EqualizeOpt = Annotated[
    bool,
    typer.Option(
        "--equalize",
        help="Equalize the weight ranges of neighbouring layers; the float network stays the same.",
        rich_help_panel=_QUANTIZE,
    ),
]
ExactOpt = Annotated[
    bool,
    typer.Option(
        "--exact-scales/--free-scales",
        help="Round scales so that engine and reference agree bit for bit.",
        rich_help_panel=_QUANTIZE,
    ),
]
FloatTypeOpt = Annotated[
    str,
    typer.Option(
        "--float-type",
        metavar="TYPE",
        help="TensorRT 10 and 11: type of what is computed outside of Q/DQ pairs: float32, float16, bfloat16.",
        rich_help_panel=_QUANTIZE,
    ),
]
FloatMacsOpt = Annotated[
    float | None,
    typer.Option(
        "--float-macs",
        metavar="SHARE",
        help="TensorRT: how much of the arithmetic may stay in float where 8 bits lose too much (default 0.125; 0: nothing).",
        rich_help_panel=_QUANTIZE,
    ),
]
SearchOpt = Annotated[
    bool,
    typer.Option(
        "--search/--no-search",
        help="Build several engines, measure them and keep the best; or take the default choice.",
        rich_help_panel=_QUANTIZE,
    ),
]
ExcludeOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="NODE", help="A node that stays in float (repeatable).", rich_help_panel=_QUANTIZE
    ),
]
TargetOpt = Annotated[
    list[str],
    typer.Option(
        "--target",
        metavar="NAME",
        help="Deployment target (repeatable); `zsq doctor` lists them.",
        rich_help_panel=_QUANTIZE,
    ),
]
QuantizerOpt = Annotated[
    str,
    typer.Option(
        "--quantizer",
        metavar="NAME",
        help="Who quantizes for OpenVINO: qdq (our Q/DQ graph), nncf, pot; auto measures qdq and nncf and keeps the better.",
        rich_help_panel=_VENDOR,
    ),
]
PresetOpt = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="performance (all symmetric) or mixed; POT also accuracy.",
        rich_help_panel=_VENDOR,
    ),
]
ModelTypeOpt = Annotated[
    str | None,
    typer.Option(
        "--model-type",
        metavar="transformer",
        help="Quantize attention and normalization with care.",
        rich_help_panel=_VENDOR,
    ),
]
FastBiasOpt = Annotated[
    bool | None,
    typer.Option(
        "--fast-bias/--full-bias",
        help="The vendor's bias correction: one pass, or layer by layer.",
        rich_help_panel=_VENDOR,
    ),
]
SubsetOpt = Annotated[
    int | None,
    typer.Option(
        "--subset-size",
        metavar="N",
        help="Images that the vendor's statistics come from (default: all).",
        rich_help_panel=_VENDOR,
    ),
]
IgnoreNameOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-name",
        metavar="NODE",
        help="A node that the vendor leaves in float (repeatable).",
        rich_help_panel=_VENDOR,
    ),
]
IgnoreTypeOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-type",
        metavar="TYPE",
        help="A type of operators left in float, as OpenVINO calls it (repeatable).",
        rich_help_panel=_VENDOR,
    ),
]
IgnorePatternOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-pattern",
        metavar="REGEX",
        help="Nodes left in float, by regular expression; NNCF only (repeatable).",
        rich_help_panel=_VENDOR,
    ),
]
AccuracyControlOpt = Annotated[
    bool,
    typer.Option(
        "--accuracy-control",
        help="Return layers to float until a metric is kept: agreement with float on synthetic images, or accuracy on --validation-data.",
        rich_help_panel=_VENDOR,
    ),
]
MaxLossOpt = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="SHARE",
        help="Largest drop that accuracy control allows; 0.01 is one point.",
        rich_help_panel=_VENDOR,
    ),
]
ValidationOpt = Annotated[
    Path | None,
    typer.Option(
        "--validation-data",
        metavar="FILE|DIR",
        help="Labelled images that accuracy control may look at; never taken from --eval-data.",
        rich_help_panel=_VENDOR,
    ),
]
PotConfigOpt = Annotated[
    Path | None,
    typer.Option(
        "--pot-config",
        metavar="FILE.json",
        help="A POT configuration to run as it is (--quantizer pot).",
        rich_help_panel=_VENDOR,
    ),
]
CompressOpt = Annotated[
    str | None,
    typer.Option(
        "--compress-weights",
        metavar="NAME",
        help="OpenVINO: instead of quantization, compress weights with NNCF: int8_sym, int8_asym, int4_sym, int4_asym.",
        rich_help_panel=_VENDOR,
    ),
]
