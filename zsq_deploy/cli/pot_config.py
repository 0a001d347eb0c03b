"""`zsq import pot-config` and `zsq export pot-config`: POT's JSON configurations and our recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from zsq_deploy.cli import options as o
from zsq_deploy.cli.printing import print_json
from zsq_deploy.errors import UsageError

__all__ = ["exporting", "importing"]

importing = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Turn another tool's configuration into a recipe."
)
exporting = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Write a recipe as another tool's configuration."
)


@importing.callback()
def _importing() -> None:
    """Turn another tool's configuration into a recipe."""


@exporting.callback()
def _exporting() -> None:
    """Write a recipe as another tool's configuration."""


@importing.command("pot-config", short_help="A POT configuration as a recipe.")
def import_pot_config(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A POT configuration; comments are allowed.")],
    quantizer: Annotated[
        str, typer.Option("--as", metavar="NAME", help="Who is to quantize: pot, or nncf, POT's successor.")
    ] = "nncf",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="The network, as for `zsq deploy` (default: what the file names)."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.yaml", help="The recipe (default: standard output).")
    ] = None,
    as_json: o.JsonOpt = False,
) -> int:
    """Turn a POT configuration into a recipe; every key that has no counterpart is named.

    \b
    zsq import pot-config resnet.json -o recipe.yaml
    zsq import pot-config resnet.json --as pot -o recipe.yaml
    """
    from zsq_deploy.pipeline.pot_config import recipe_from_pot

    recipe, notes = recipe_from_pot(file, quantizer=_quantizer(quantizer), model=model)
    if output is not None:
        recipe.dump(output)
    if as_json:
        print_json({"recipe": recipe.model_dump(mode="json"), "notes": list(notes)})
        return 0
    if output is None:
        sys.stdout.write(recipe.to_yaml())
    else:
        sys.stdout.write(f"{output}\n")
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    return 0


@exporting.command("pot-config", short_help="A recipe as a POT configuration.")
def export_pot_config(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe, quantizer pot or nncf.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="The file (default: standard output).")
    ] = None,
    as_json: o.JsonOpt = False,
) -> int:
    """Write what a recipe says of POT (or NNCF) as a POT configuration; what POT has no word for is named.

    \b
    zsq export pot-config recipe.yaml -o pot.json
    """
    from zsq_deploy.artifact import write_json
    from zsq_deploy.pipeline.pot_config import pot_from_recipe
    from zsq_deploy.recipe import Recipe

    config, notes = pot_from_recipe(Recipe.load(recipe))
    if output is not None:
        write_json(output, config)
    if as_json:
        print_json({"config": config, "notes": list(notes)})
        return 0
    if output is None:
        print_json(config)
    else:
        sys.stdout.write(f"{output}\n")
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    return 0


def _quantizer(name: str) -> Literal["nncf", "pot"]:
    if name == "nncf":
        return "nncf"
    if name == "pot":
        return "pot"
    raise UsageError(f"a POT configuration cannot become one of {name!r}", where="--as", remedy="choose nncf or pot")
