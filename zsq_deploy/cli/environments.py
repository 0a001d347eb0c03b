"""`zsq env`: interpreters of their own for tools that cannot live beside current libraries (POT)."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from zsq_deploy.cli.options import common as o
from zsq_deploy.cli.printing import print_json, progress_for

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Environments for tools that need an interpreter of their own: POT needs Python 3.8 to 3.11 and an old NumPy.\n\n"
    "They are made once, in the cache folder (ZSQ_ENV_DIR names another one), from pinned versions.",
)

_NameArg = Annotated[str, typer.Argument(metavar="NAME", help="The environment: pot.")]


@app.command(short_help="Make an environment, once.")
def create(
    name: _NameArg,
    python: Annotated[
        str | None,
        typer.Option(
            "--python", metavar="PATH", help="The interpreter to make it from (default: this one, or one on the PATH)."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again, even if it is there.")] = False,
    as_json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> int:
    """Make an environment, unless it is there already. It takes about a minute and 0.6 GB.

    \b
    zsq env create pot
    zsq env create pot --python /usr/bin/python3.11
    """
    from zsq_deploy.backends.openvino.pot import environment

    made = environment.create(name, python=python, force=force, progress=progress_for(quiet, as_json))
    _tell(asdict(made), as_json, f"{made.name}: {made.folder} (Python {made.version})")
    return 0


@app.command(short_help="Look whether an environment works.")
def check(name: _NameArg, as_json: o.JsonOpt = False) -> int:
    """Import the tool in its environment; an error says what to do.

    \b
    zsq env check pot
    """
    from zsq_deploy.backends.openvino.pot import environment

    found = environment.check(name, deep=True)
    _tell(asdict(found), as_json, f"{found.name}: fine: {found.folder} (Python {found.version})")
    return 0


@app.command("list", short_help="List all environments and their state.")
def list_all(as_json: o.JsonOpt = False) -> int:
    """List all environments: where they are, and whether they are ready.

    \b
    zsq env list
    """
    from zsq_deploy.backends.openvino.pot import environment
    from zsq_deploy.report.words import bytes_text

    found = environment.list_environments()
    if as_json:
        print_json([_plain(asdict(item)) for item in found])
        return 0
    table = Table()
    for column in ("environment", "state", "size", "folder", "what"):
        table.add_column(column, overflow="fold")
    for item in found:
        size = bytes_text(item.bytes) if item.bytes else ""
        detail = f"{item.summary}. {item.detail}".rstrip(". ") + "."
        table.add_row(item.name, item.state, size, str(item.folder), detail)
    Console().print(table, markup=False)
    return 0


@app.command(short_help="Remove an environment.")
def remove(name: _NameArg, as_json: o.JsonOpt = False) -> int:
    """Remove an environment from the disk.

    \b
    zsq env remove pot
    """
    from zsq_deploy.backends.openvino.pot import environment

    removed = environment.remove(name)
    _tell({"name": name, "removed": removed}, as_json, f"{name}: {'removed' if removed else 'there is none'}")
    return 0


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, int | dict) else str(value) for key, value in values.items()}


def _tell(values: dict[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        print_json(_plain(values))
    else:
        sys.stdout.write(text + "\n")
