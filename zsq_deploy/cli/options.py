"""Options that several commands share, said once. The words are those of a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from zsq_deploy.errors import UsageError
from zsq_deploy.recipe import Recipe, parse_shape

__all__ = ["recipe_from"]

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
        help="How images are made: zeroq, genie, fractal, gaussian, uniform, ones; bn-analytic makes none.",
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
DeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where images are made: cpu, cuda, cuda:1; by default cuda where there is one.",
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
    typer.Option("--bits", metavar="w8a8", help="Bits of weights (w) and activations (a).", rich_help_panel=_QUANTIZE),
]
RangesOpt = Annotated[
    str,
    typer.Option(
        "--ranges",
        metavar="NAME",
        help="How activation ranges are found: auto (min-max that looks at coverage), minmax, percentile, entropy, mse, bn-analytic; "
        "or ONNX Runtime's own calibrators: ort-minmax, ort-entropy, ort-percentile.",
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
ExactOpt = Annotated[
    bool,
    typer.Option(
        "--exact-scales/--free-scales",
        help="Round scales so that engine and reference agree bit for bit.",
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


def parameters(pairs: list[str] | None) -> dict[str, Any]:
    """``["steps=200"]`` as ``{"steps": 200}``; values are read as YAML.

    Raises:
        UsageError: A pair without ``=``.
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(
                f"{pair!r} is no NAME=VALUE", where="--param", remedy="write for example --param steps=200"
            )
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(
                f"the value of {pair!r} cannot be read",
                where="--param",
                remedy="write a number, a word, true or false, or a list like [1, 2]; quote what holds special characters",
            ) from error
    return found


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A recipe from what the command line said; ``None`` values are left to the recipe's defaults.

    Args:
        values: By dotted names: ``{"model.source": "net.onnx", "calibration.images": 256}``.
    """
    nested: dict[str, Any] = {}
    for dotted, value in values.items():
        if value is None:
            continue
        *sections, key = dotted.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = str(value) if isinstance(value, Path) else value
    shape = nested.get("model", {}).get("input_shape")
    if isinstance(shape, str):
        try:
            nested["model"]["input_shape"] = parse_shape(shape)
        except ValueError as error:
            raise UsageError(str(error), where="--input-shape", remedy="write it like 1x3x224x224") from error
    try:
        return Recipe.of(nested, where="the command line").resolved()
    except UsageError as error:
        raise UsageError(
            _as_options(error.what), where=error.where, remedy=_as_options(error.remedy or "`zsq deploy --help`")
        ) from error


_OPTION_OF = {"model.source": "MODEL", "calibration.set": "--calibration", "calibration.parameters": "--param"}


def _as_options(text: str) -> str:
    """Words of a recipe as the command line spells them: ``calibration.images`` is ``--images``."""

    def option(match: re.Match[str]) -> str:
        return _OPTION_OF.get(match[0], "--" + match[0].rpartition(".")[2].replace("_", "-"))

    text = re.sub(
        r"\b(?:model|calibration|quantization|verification\.gates|verification|run)\.[a-z0-9_]+\b", option, text
    )
    text = re.sub(r"^(?:model|recipe): ", "", text).replace("`zsq run --words`", "`zsq deploy --help`")
    for words in ("mean and std", "raw_pixels"):
        text = text.replace(
            words, words.replace("mean", "--mean").replace("std", "--std").replace("raw_pixels", "--raw-pixels")
        )
    return text.replace("lists every word", "explains every option")
