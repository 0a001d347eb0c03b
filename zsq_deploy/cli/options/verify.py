"""Options about what an engine is judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_VERIFY, _GATE = "Verification", "Gates (a missed one: exit code 1)"

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
