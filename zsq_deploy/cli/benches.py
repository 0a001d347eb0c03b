"""`zsq bench`: how fast engines are, on this machine and on devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from zsq_deploy.cli.options import common as o
from zsq_deploy.cli.options import devices as d
from zsq_deploy.cli.printing import print_json, progress_for
from zsq_deploy.errors import UsageError

__all__ = ["bench"]


def bench(
    folder: o.OutArg,
    target: o.OnlyTargetOpt = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", min=1, help="Threads of every runner (default: what `zsq devices` says, or 1)."
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            metavar="N",
            min=1,
            help="Interleaved rounds of engine and float baselines.",
            rich_help_panel="On this machine",
        ),
    ] = 10,
    device: d.DevicesOpt = None,
    python: d.PythonOpt = None,
    seconds: d.SecondsOpt = 5.0,
    streams: d.StreamsOpt = 0,
    time_limit: d.AgentLimitOpt = 3600.0,
    affinity: d.AffinityOpt = None,
    samples: d.SamplesOpt = 32,
    bundle: d.BundlesOpt = None,
    accept_new_host_key: d.AcceptOpt = False,
    result: d.ResultOpt = None,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """Latency of finished engines: here beside fp32 and the best float mode, or on devices, with parity, into the report.

    \b
    zsq bench out                                        this machine; nothing is written
    zsq bench out --device ssh://pi@pi4.local            copy, prove, measure, fetch, clean up
    zsq bench out --device pi4 --device jetson           devices of `zsq devices`
    zsq bench out --bundle net.zsq.tar --result result.json --device board7     brought by hand
    """
    progress = progress_for(quiet, as_json)
    if not device and result is None:
        given = [
            name
            for name, value in {
                "--python": python,
                "--affinity": affinity,
                "--bundle": bundle,
                "--accept-new-host-key": accept_new_host_key,
                "--streams": streams,
            }.items()
            if value
        ]
        if given:
            raise UsageError(f"{given[0]} is about devices", where=given[0], remedy="name one with --device")
        return _here(folder, target, threads or 1, rounds, progress, as_json)

    from zsq_deploy.device.inventory import Inventory
    from zsq_deploy.device.work import Measure
    from zsq_deploy.pipeline import on_device

    if result is not None:
        if not bundle or len(bundle) != 1 or not device or len(device) != 1:
            raise UsageError(
                "a result needs its bundle, and a name for its device",
                where="--result",
                remedy="zsq bench OUT --bundle net.zsq.tar --result result.json --device NAME",
            )
        done = on_device.take_result(folder, result, bundle[0], device[0])
    else:
        inventory = Inventory()
        # What is said here goes before what the list of devices says.
        words = {"python": python, "threads": threads, "affinity": affinity}
        said: dict[str, Any] = {word: value for word, value in words.items() if value is not None}
        devices = [replace(inventory.find(text), **said) for text in device or ()]
        done = on_device.bench_on_devices(
            folder,
            devices,
            targets=target,
            bundles=bundle or (),
            samples=samples,
            measure=Measure(seconds=seconds, streams=streams, limit=time_limit),
            accept_new=accept_new_host_key,
            progress=progress,
        )
    if as_json:
        print_json(
            {
                "results": {
                    name: {one: done.report.targets[name].devices[one].model_dump(mode="json") for one in row}
                    for name, row in done.results.items()
                    if done.report is not None
                },
                "skipped": [dict(zip(("device", "target", "why"), row, strict=True)) for row in done.skipped],
                "failures": {name: str(error) for name, error in done.failures.items()},
            }
        )
    else:
        _show(done, folder)
    return done.exit_code


def _show(done: Any, folder: Path) -> None:
    from zsq_deploy.report.devices import device_tables

    console, errors = Console(), Console(stderr=True, highlight=False, soft_wrap=True)
    if done.report is not None:
        for name in done.results:
            console.print(device_tables(done.report, name), highlight=False)
    for device, target, why in done.skipped:
        errors.print(f"{device}: {target} was left out: {why}", markup=False, style="yellow")
    for name, error in done.failures.items():
        errors.print(f"error: {name}: {error}", markup=False, style="red")
    if done.report is not None:
        console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _here(folder: Path, target: list[str] | None, threads: int, rounds: int, progress: Any, as_json: bool) -> int:
    """This machine, without the agent."""
    from zsq_deploy.pipeline.stages import bench_folder

    found = bench_folder(folder, targets=target, threads=threads, rounds=rounds, progress=progress)
    if as_json:
        print_json(found)
        return 0
    table = Table(  # narrow enough for 80 columns
        title=f"batch 1, {threads} thread{'s' if threads > 1 else ''}, milliseconds (spread: 75th - 25th percentile)",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in ("target", "runs as", "median", "spread", "p95", "p99", "first", "load", "speed"):
        table.add_column(column, justify="left" if column in ("target", "runs as") else "right")
    for name, section in found.items():
        for form in ("engine", "float32", "float_best"):
            row = section.get(form)
            if row:
                figures = [row[f"{key}_ms"] for key in ("median", "iqr", "p95", "p99", "first", "load")]
                speed = f"{section['speedup']:.2f}x" if form == "engine" and section.get("speedup") else ""
                table.add_row(name, form, *(f"{v:.3f}" if v is not None else "-" for v in figures), speed)
    Console().print(table)
    return 0
