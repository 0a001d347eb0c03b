"""`zsq devices`: the user's devices by name; and `zsq doctor --device`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from zsq_deploy.cli.options import common as o
from zsq_deploy.cli.options import devices as d
from zsq_deploy.cli.printing import print_json, progress_for
from zsq_deploy.device.address import Device, parse_address
from zsq_deploy.device.inventory import Inventory
from zsq_deploy.errors import InterruptedRunError, UsageError, ZsqError

__all__ = ["app", "examine_device"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Your devices by name, for `zsq bench --device NAME` and `zsq doctor --device NAME`.",
)

_NamesArg = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of devices.")]


@app.command(short_help="Write a device into the list.")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
    address: Annotated[str, typer.Argument(metavar="ssh://user@host[:port][/folder]", help="Where it is.")],
    python: d.PythonOpt = None,
    threads: d.ThreadsOpt = None,
    affinity: d.AffinityOpt = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="What to remember of it.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the device of that name.")] = False,
    as_json: o.JsonOpt = False,
) -> int:
    """Write a device into the list. Nothing is connected to; `zsq devices check` does that.

    \b
    zsq devices add pi4 ssh://pi@pi4.local --python '~/venv/bin/python' --threads 4
    """
    inventory = Inventory()
    device = replace(parse_address(address, name=name), python=python, threads=threads, affinity=affinity, note=note)
    inventory.add(device, force=force)
    if as_json:
        print_json({name: {"address": device.address, **asdict(device)}})
    else:
        Console().print(f"{name}: {device.address} ({inventory.file})", highlight=False, soft_wrap=True, markup=False)
    return 0


@app.command("list", short_help="Show the list.")
def list_(as_json: o.JsonOpt = False) -> int:
    """Show all devices of the list.

    \b
    zsq devices list
    """
    inventory = Inventory()
    devices = inventory.devices()
    if as_json:
        print_json({name: {"address": one.address, **asdict(one)} for name, one in devices.items()})
        return 0
    console = Console()
    if not devices:
        console.print("no devices yet; add one: zsq devices add NAME ssh://user@host", highlight=False, soft_wrap=True)
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("device", "address", "python", "threads", "cores", "note"):
        table.add_column(column, overflow="fold")
    for name, one in devices.items():
        table.add_row(name, one.address, one.python or "python3", str(one.threads or ""), one.affinity or "", one.note)
    console.print(table, highlight=False, markup=False)
    return 0


@app.command(short_help="Take devices out of the list.")
def remove(names: _NamesArg, as_json: o.JsonOpt = False) -> int:
    """Take devices out of the list; the devices themselves are not touched.

    \b
    zsq devices remove pi4
    """
    Inventory().remove(names)
    if as_json:
        print_json({"removed": list(names)})
    return 0


@app.command(short_help="Connect, and see whether engines can run there.")
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Names or addresses (default: the whole list).")
    ] = None,
    accept_new_host_key: d.AcceptOpt = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """Connect to devices and see whether engines can run there. Exit code 0: on all of them; 1: not on all.

    \b
    zsq devices check pi4 ssh://root@10.0.0.7
    """
    inventory = Inventory()
    devices = [inventory.find(name) for name in names] if names else list(inventory.devices().values())
    if not devices:
        raise UsageError(
            "there are no devices to check", where=str(inventory.file), remedy="zsq devices add NAME ssh://user@host"
        )
    rows: dict[str, dict[str, Any]] = {}
    for device in devices:
        try:
            rows[device.name] = _look(device, accept_new_host_key, quiet, as_json)
        except InterruptedRunError:
            raise
        except ZsqError as error:
            rows[device.name] = {"ok": False, "error": str(error), "targets": {}}
    if as_json:
        print_json(rows)
    else:
        console = Console(highlight=False, soft_wrap=True)
        for name, row in rows.items():
            console.print(f"{name}: {_verdict(row)}", markup=False, style="" if row["ok"] else "red")
    return 0 if all(row["ok"] for row in rows.values()) else 1


def _verdict(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    can = [target for target, missing in row["targets"].items() if not missing]
    runtimes = [f"{name} {found['version']}" for name, found in row["runtimes"].items() if found["version"]]
    machine = row["device"]
    what = f"{machine['cpu']['model']} ({machine['machine']}), Python {machine['python']}, {', '.join(runtimes) or 'no runtime'}"
    return f"{what}; runs {', '.join(can) or 'none of the targets'}"


def _look(device: Device, accept_new: bool, quiet: bool, as_json: bool) -> dict[str, Any]:
    from zsq_deploy.pipeline.on_device import probe_device, runnable

    probe = probe_device(device, accept_new=accept_new, progress=progress_for(quiet, as_json))
    targets = runnable(probe)
    return {
        "ok": any(not missing for missing in targets.values()),
        "address": device.address,
        **probe.model_dump(mode="json"),
        "targets": targets,
    }


def examine_device(text: str, *, python: str | None, accept_new: bool, as_json: bool) -> int:
    """What a device has and lacks (``zsq doctor --device``)."""
    device = Inventory().find(text)
    device = replace(device, python=python or device.python)
    row = _look(device, accept_new, quiet=False, as_json=as_json)
    if as_json:
        print_json(row)
        return 0
    console = Console(highlight=False, soft_wrap=True, markup=False)
    machine, cpu = row["device"], row["device"]["cpu"]
    console.print(f"{device.name}: {device.address}")
    console.print(
        f"CPU: {cpu['model']} ({machine['machine']}), {cpu['cores']} cores, "
        + (", ".join(cpu["features"]) or "no features that integer kernels look at")
    )
    if machine["emulated"]:
        console.print("the processor is emulated: parity is real there, times say nothing")
    memory = "unknown" if machine["memory_bytes"] is None else f"{machine['memory_bytes'] / 2**30:.1f} GiB"
    console.print(f"memory: {memory}; {machine['system']} {machine['kernel']}")
    console.print(f"Python {machine['python']}, numpy {machine['numpy'] or 'not installed'}")
    clocks = row["clocks"]
    heat = ", ".join(f"{name}: {value:.0f} °C" for name, value in clocks["celsius"].items())
    console.print(
        f"clock: {clocks['mhz'] or 'not told'}{' MHz' if clocks['mhz'] else ''}"
        + (f", governor {clocks['governor']}" if clocks["governor"] else "")
        + (f"; {heat}" if heat else "")
    )
    for name, found in row["runtimes"].items():
        more = ", ".join(found["providers"] or found["devices"])
        console.print(
            f"{name}: {found['version']} ({more})" if found["version"] else f"{name}: not there: {found['missing']}"
        )
    console.print()
    for name, missing in row["targets"].items():
        console.print(f"{name:16} {'runs' if not missing else 'no: ' + '; '.join(missing)}")
    if not row["ok"]:
        console.print(
            "\nnothing can run there yet: install a runtime for that Python, such as: "
            f"{device.python or 'python3'} -m pip install onnxruntime"
        )
    return 0
