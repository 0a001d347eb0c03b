"""Options about the network, the calibration images and the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_NETWORK, _IMAGES, _RUN = "The network", "Calibration images", "The run"

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
CompileOpt = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Make one program of the network with torch.compile while images are made (needs a C++ compiler, on a GPU Triton).",
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
SeedOpt = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.", rich_help_panel=_RUN)]
ThreadsOpt = Annotated[
    int,
    typer.Option(
        "--threads", metavar="N", min=1, help="Threads of the engine when it is measured.", rich_help_panel=_RUN
    ),
]
OutArg = Annotated[Path, typer.Argument(metavar="OUT", help="The output folder of `zsq deploy` or `zsq quantize`.")]
OnlyTargetOpt = Annotated[
    list[str] | None, typer.Option("--target", metavar="NAME", help="Only this target (repeatable).")
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
ReplaceOpt = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.", rich_help_panel=_RUN)]
ResumeOpt = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run (same options as before).", rich_help_panel=_RUN)
]
JsonOpt = Annotated[
    bool, typer.Option("--json", help="Print JSON for machines on standard output.", rich_help_panel=_RUN)
]
QuietOpt = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.", rich_help_panel=_RUN)]
