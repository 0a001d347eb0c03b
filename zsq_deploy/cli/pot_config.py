"""`zsq import pot-config` and `zsq export pot-config`: POT's JSON configurations and our recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from zsq_deploy.cli.options import common as o
from zsq_deploy.cli.printing import print_json
from zsq_deploy.errors import OutputExistsError, UsageError

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
    ] = "pot",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="The network, as for `zsq deploy` (default: what the file names)."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", metavar="NAME", help="Deployment target of the recipe.")
    ] = "openvino-cpu",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.yaml", help="The recipe (default: standard output).")
    ] = None,
    force: o.ReplaceOpt = False,
    as_json: o.JsonOpt = False,
) -> int:
    """Turn a POT configuration into a recipe; every key that has no counterpart is named.

    \b
    zsq import pot-config resnet.json -o recipe.yaml
    zsq import pot-config resnet.json --as nncf --model resnet.onnx -o recipe.yaml
    """
    from zsq_deploy.backends.openvino.pot.config import import_pot_config as imported
    from zsq_deploy.recipe import Recipe

    found = imported(file, quantizer=_quantizer(quantizer))
    named = found.model if found.model and Path(found.model).suffix in (".onnx", ".pt2") else None
    recipe = Recipe.of(
        {
            "model": {"source": model or named or "network.onnx"},
            "quantization": found.quantization,
            "targets": [target],
        },
        where=str(file),
    )
    notes = [*(note for note in found.notes if not model)]
    if not (model or named):
        notes.append("model.source is to be filled in: it says network.onnx now")
    _write(output, recipe.to_yaml(), force=force)
    _tell(
        {"recipe": recipe.model_dump(mode="json"), "dropped": found.dropped, "notes": notes},
        output,
        recipe.to_yaml(),
        as_json,
    )
    return 0


@exporting.command("pot-config", short_help="A recipe as a POT configuration.")
def export_pot_config(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe, quantizer pot or nncf.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="The file (default: standard output).")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="FILE.xml", help="The IR that the configuration is to name.")
    ] = "network.xml",
    force: o.ReplaceOpt = False,
    as_json: o.JsonOpt = False,
) -> int:
    """Write what a recipe says of POT (or NNCF) as a POT configuration; what POT has no word for is named.

    \b
    zsq export pot-config recipe.yaml -o pot.json
    """
    from zsq_deploy.backends.openvino.pot.config import export_pot_config as exported
    from zsq_deploy.recipe import Recipe

    found = exported(Recipe.load(recipe).quantization.model_dump(mode="json"), model=model)
    _write(output, found.text, force=force)
    _tell({"config": found.config, "dropped": found.dropped, "notes": []}, output, found.text, as_json)
    return 0


def _write(output: Path | None, text: str, *, force: bool) -> None:
    from zsq_deploy.artifact import atomic_writer

    if output is None:
        return
    if output.exists() and not force:
        raise OutputExistsError(
            "the file is there already", where=str(output), remedy="choose another name, or add --force to replace it"
        )
    with atomic_writer(output) as file:
        file.write(text.encode())


def _tell(found: dict[str, Any], output: Path | None, text: str, as_json: bool) -> None:
    """The result on standard output (or where it was written), and what was left out on standard error."""
    if as_json:
        print_json(found)
        return
    sys.stdout.write(text if output is None else f"{output}\n")
    for key, why in found["dropped"].items():
        sys.stderr.write(f"left out: {key}: {why}\n")
    for note in found["notes"]:
        sys.stderr.write(f"note: {note}\n")


def _quantizer(name: str) -> Literal["nncf", "pot"]:
    if name == "nncf":
        return "nncf"
    if name == "pot":
        return "pot"
    raise UsageError(f"a POT configuration cannot become one of {name!r}", where="--as", remedy="choose nncf or pot")
