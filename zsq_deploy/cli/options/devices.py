"""Options about devices, and about measuring there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_DEVICES = "On devices"

DevicesOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="ssh://user@host|NAME|local",
        help="Measure there instead, and write the result into the report (repeatable).",
        rich_help_panel=_DEVICES,
    ),
]
OneDeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME|ssh://...",
        help="Look at a device instead of this machine.",
        rich_help_panel=_DEVICES,
    ),
]
AcceptOpt = Annotated[
    bool,
    typer.Option(
        "--accept-new-host-key",
        help="Take and remember the host key of a device that is not known yet; a key that changed is never taken.",
        rich_help_panel=_DEVICES,
    ),
]
PythonOpt = Annotated[
    str | None,
    typer.Option(
        "--python",
        metavar="PATH",
        help="The device's interpreter, 3.9 or newer with numpy and the runtime (default: python3).",
        rich_help_panel=_DEVICES,
    ),
]
ThreadsOpt = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Threads on the device.", rich_help_panel=_DEVICES),
]
AffinityOpt = Annotated[
    str | None,
    typer.Option("--affinity", metavar="0-3", help="Cores of the device to run on.", rich_help_panel=_DEVICES),
]
SecondsOpt = Annotated[
    float,
    typer.Option("--seconds", metavar="S", min=0.01, help="How long runs are timed.", rich_help_panel=_DEVICES),
]
StreamsOpt = Annotated[
    int,
    typer.Option(
        "--streams",
        metavar="N",
        min=0,
        help="Also the throughput of so many engines at once.",
        rich_help_panel=_DEVICES,
    ),
]
AgentLimitOpt = Annotated[
    float,
    typer.Option(
        "--time-limit",
        metavar="S",
        min=0.01,
        help="Seconds after which an agent that stands still is ended.",
        rich_help_panel=_DEVICES,
    ),
]
SamplesOpt = Annotated[
    int,
    typer.Option("--samples", metavar="N", help="Inputs to prove the engine with.", rich_help_panel=_DEVICES),
]
BundlesOpt = Annotated[
    list[Path] | None,
    typer.Option(
        "--bundle",
        metavar="FILE",
        help="Use this bundle instead of making one (repeatable).",
        rich_help_panel=_DEVICES,
    ),
]
ResultOpt = Annotated[
    Path | None,
    typer.Option(
        "--result",
        metavar="FILE",
        help="Take the result.json that an agent wrote elsewhere; with --bundle, and --device NAME to call it by.",
        rich_help_panel=_DEVICES,
    ),
]
