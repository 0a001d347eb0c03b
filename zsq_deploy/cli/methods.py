"""`zsq methods`: the ways to make calibration images, what they need, and each of them explained."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import asdict
from typing import Annotated, Any

import typer

from zsq_deploy.cli.options import common as o
from zsq_deploy.cli.printing import print_json

__all__ = ["app"]

app = typer.Typer(
    rich_markup_mode=None,
    help="The ways to make calibration images: what each needs, and how long it takes.\n\n\b\n"
    "zsq methods                  all of them\nzsq methods show genie       one of them explained",
)


@app.callback(invoke_without_command=True)
def list_all(context: typer.Context, as_json: o.JsonOpt = False) -> int:
    """The ways to make calibration images: what each needs, and how long it takes.

    \b
    zsq methods                  all of them
    zsq methods show genie       one of them explained
    """
    if context.invoked_subcommand is not None:
        return 0
    from zsq_deploy.calib.catalogue import facts
    from zsq_deploy.calib.methods import METHODS

    found = [facts(method) for method in METHODS.values()]
    if as_json:
        print_json([_plain(item) for item in found])
        return 0
    sys.stdout.write(f"{'method':16}{'needs':28}{'steps':8}measured\n")
    for item in found:
        steps, time = str(item.steps or "-"), _time(item.name)
        sys.stdout.write(f"{item.name:16}{', '.join(item.needs) or '-':28}{steps:8}{time}\n")
        sys.stdout.write(textwrap.fill(item.summary, 100, initial_indent="    ", subsequent_indent="    ") + "\n")
    sys.stdout.write(
        "\nsteps: at most, for each image. measured: time of 128 images on one processor core. `zsq methods show NAME` explains one.\n"
    )
    return 0


@app.command(short_help="Explain one of them.")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The method, as --method takes it.")],
    as_json: o.JsonOpt = False,
) -> int:
    """Explain a method: paper, what is optimised, parameters, deviations from the paper, what was measured.

    \b
    zsq methods show zeroq
    """
    from zsq_deploy.calib.catalogue import method_named

    found = method_named(name)
    if as_json:
        print_json(_plain(found))
        return 0
    out = [f"{found.name}: {found.summary}", "", f"paper      {found.paper}", f"what       {found.kind}"]
    out.append(f"needs      {', '.join(found.needs) or 'nothing of the network'}")
    if found.steps:
        several = f" in {found.stages} stages" if found.stages > 1 else ""
        out.append(f"steps      at most {found.steps} an image{several}, {found.batch_size} images together")
    if found.generator:
        out.append("generator  trains one for every batch")
    if found.fallback:
        out.append(f"otherwise  {found.fallback} is used where the network has no batch norm")
    out += ["", *_wrapped(found.explanation)]
    if found.parameters:
        out += ["", "parameters (--param NAME=VALUE):"]
        width = max(len(item.name) for item in found.parameters)
        size = max(len(str(item.default)) for item in found.parameters)
        out += [f"  {item.name:{width}}  {item.default!s:{size}}  {item.meaning}".rstrip() for item in found.parameters]
    rows = _measured(name)
    if rows:
        out += ["", "measured (docs/synthesis.md):"]
        out += [f"  {row['network']}: {row['text']}" for row in rows]
    sys.stdout.write("\n".join(out) + "\n")
    return 0


def _wrapped(text: str) -> list[str]:
    """Paragraphs and list items of a docstring, filled to the width of a terminal; tables stay as they are."""
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        if any(line.startswith(("===", "|")) for line in paragraph.splitlines()):
            found += [*paragraph.splitlines(), ""]
            continue
        items: list[str] = []
        for line in paragraph.splitlines():
            if line.startswith(("* ", "- ")) or not items:
                items.append(line)
            else:
                items[-1] += " " + line.strip()
        for item in items:
            found += textwrap.wrap(item, 100, subsequent_indent="  " if item.startswith(("* ", "- ")) else "") or [""]
        found.append("")
    return found[:-1]


def _measured(name: str) -> list[dict[str, Any]]:
    from zsq_deploy.calib.evidence import load_evidence

    return [
        {"network": row.network, "text": row.text(), **row.to_json()}
        for row in load_evidence().rows
        if row.method == name
    ]


def _time(name: str) -> str:
    """Seconds for 128 images on the networks of the table, the fastest and the slowest."""
    from zsq_deploy.calib.evidence import load_evidence
    from zsq_deploy.report.words import seconds

    found = sorted(128 * row.seconds / row.images for row in load_evidence().rows if row.method == name and row.seconds)
    if not found:
        return "-"
    return seconds(found[0]) if found[-1] < 2 * found[0] else f"{seconds(found[0])} to {seconds(found[-1])}"


def _plain(found: Any) -> dict[str, Any]:
    values = asdict(found)
    return {
        **values,
        "needs": list(found.needs),
        "deviations": list(found.deviations),
        "measured": _measured(found.name),
    }
