"""The options of the commands as annotated types, each said once. The words are those of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_NETWORK, _IMAGES, _QUANTIZE, _VERIFY, _RUN = (
    "The network",
    "Calibration images",
    "Quantization",
    "Verification",
    "The run",
)

ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The network: FILE.onnx, an exported FILE.pt2, module:callable (with --path and --weights), or timm:NAME.",
    ),
]
PathOpt = Annotated[
    Path | None,
    typer.Option(
        "--path", metavar="DIR", help="Folder that module:callable is imported from.", rich_help_panel=_NETWORK
    ),
]
WeightsOpt = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights for module:callable: .safetensors, .pt or .pth (never unpickled).",
        rich_help_panel=_NETWORK,
    ),
]
ShapeOpt = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        metavar="1x3x32x32",
        help="Shape of the input, where the network leaves it open.",
        rich_help_panel=_NETWORK,
    ),
]
MeanOpt = Annotated[
    str | None,
    typer.Option(
        "--mean", metavar="A,B,C", help="Mean per channel of RGB (or gray) divided by 255.", rich_help_panel=_NETWORK
    ),
]
StdOpt = Annotated[
    str | None,
    typer.Option(
        "--std",
        metavar="A,B,C",
        help="Standard deviation per channel of RGB (or gray) divided by 255.",
        rich_help_panel=_NETWORK,
    ),
]
RawOpt = Annotated[
    bool,
    typer.Option("--raw-pixels", help="The network takes pixels 0..255 as they are.", rich_help_panel=_NETWORK),
]
MethodOpt = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help="How images are made: zeroq, genie, fast, fractal, ... (`zsq methods` lists them all); auto chooses from what was measured.",
        rich_help_panel=_IMAGES,
    ),
]
TimeLimitOpt = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        metavar="SECONDS",
        help="With --method auto: how long making the images may take, on one processor core.",
        rich_help_panel=_IMAGES,
    ),
]
ImagesOpt = Annotated[
    int, typer.Option("--images", metavar="N", help="Number of calibration images.", rich_help_panel=_IMAGES)
]
ParamOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="NAME=VALUE",
        help="A parameter of the method, e.g. --param steps=200 (repeatable).",
        rich_help_panel=_IMAGES,
    ),
]
AlsoOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        metavar="MODEL",
        help="A further network with the same input, preprocessing and classes that the images are to fit (--method mixmix; repeatable).",
        rich_help_panel=_IMAGES,
    ),
]
WorkersOpt = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        help="Processes that make images at the same time, each with a share of the threads; on several GPUs one each in turn.",
        rich_help_panel=_IMAGES,
    ),
]
ImagePrecisionOpt = Annotated[
    str,
    typer.Option(
        "--image-precision",
        metavar="NAME",
        help="What convolutions read while images are made: float32, bfloat16 (meant for GPUs), auto (bfloat16 where there is one).",
        rich_help_panel=_IMAGES,
    ),
]
DeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where images are made: cpu, cuda, cuda:1; by default cuda where there is one.",
        rich_help_panel=_IMAGES,
    ),
]
RealDataOpt = Annotated[
    Path | None,
    typer.Option(
        "--real-data",
        metavar="FILE|DIR",
        help="Real images, labelled or not, to compare the set's ranges with in the end. Nothing is chosen by them.",
        rich_help_panel=_IMAGES,
    ),
]
SetOpt = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="DIR",
        help="Use a finished calibration set (of zsq synth) instead of making one.",
        rich_help_panel=_IMAGES,
    ),
]
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
        help="How weights are rounded: nearest; squant: so that errors cancel in each output channel; learned: block by block on the images.",
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
_VENDOR = "NNCF and POT (OpenVINO targets)"
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
EvalOpt = Annotated[
    Path | None,
    typer.Option(
        "--eval-data",
        metavar="FILE|DIR",
        help="Labelled images, to evaluate and for nothing else: .npz with x (uint8 NHWC) and y, or an image folder.",
        rich_help_panel=_VERIFY,
    ),
]
LimitOpt = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", help="Evaluate on at most this many images, spread evenly.", rich_help_panel=_VERIFY
    ),
]
ResizeOpt = Annotated[
    bool,
    typer.Option(
        "--resize", help="Scale evaluation images of another size to the network's input.", rich_help_panel=_VERIFY
    ),
]
_GATE = "Gates (a missed one: exit code 1)"
MinAgreementOpt = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        metavar="SHARE",
        help="Least top-1 agreement of the engine with the fake-quant reference, for example 0.995.",
        rich_help_panel=_GATE,
    ),
]
MinFloatAgreementOpt = Annotated[
    float | None,
    typer.Option(
        "--min-float-agreement",
        metavar="SHARE",
        help="Least top-1 agreement with the float network.",
        rich_help_panel=_GATE,
    ),
]
MaxDropOpt = Annotated[
    float | None,
    typer.Option(
        "--max-accuracy-drop",
        metavar="SHARE",
        help="Largest loss of accuracy against float on --eval-data; 0.01 is one point.",
        rich_help_panel=_GATE,
    ),
]
MinSpeedupOpt = Annotated[
    float | None,
    typer.Option(
        "--min-speedup", metavar="FACTOR", help="Least speed-up over fp32; 2 is twice as fast.", rich_help_panel=_GATE
    ),
]
MinLsbOpt = Annotated[
    float | None,
    typer.Option(
        "--min-within-2-lsb",
        metavar="SHARE",
        help="Least share of outputs within 2 LSB of the reference.",
        rich_help_panel=_GATE,
    ),
]
MinMacsOpt = Annotated[
    float | None,
    typer.Option(
        "--min-integer-macs",
        metavar="SHARE",
        help="Least share of multiply-accumulates in integer kernels.",
        rich_help_panel=_GATE,
    ),
]
MinEqualOpt = Annotated[
    float | None,
    typer.Option(
        "--min-integer-equal",
        metavar="SHARE",
        help="Least share of outputs equal to exact integer arithmetic.",
        rich_help_panel=_GATE,
    ),
]
MaxLatencyOpt = Annotated[
    float | None,
    typer.Option(
        "--max-latency-ms",
        metavar="MS",
        help="Largest median latency at batch 1, in milliseconds.",
        rich_help_panel=_GATE,
    ),
]
SeedOpt = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.", rich_help_panel=_RUN)]
ThreadsOpt = Annotated[
    int, typer.Option("--threads", metavar="N", help="Threads of the engine when it is measured.", rich_help_panel=_RUN)
]
OutputOpt = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="Output folder; it is made. An earlier result is never overwritten without --force.",
        rich_help_panel=_RUN,
    ),
]
ForceOpt = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace the result of an earlier run; files that no run wrote stay.", rich_help_panel=_RUN
    ),
]
ResumeOpt = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run (same options as before).", rich_help_panel=_RUN)
]
JsonOpt = Annotated[
    bool, typer.Option("--json", help="Print JSON for machines on standard output.", rich_help_panel=_RUN)
]
QuietOpt = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.", rich_help_panel=_RUN)]
