"""The documentation of ``report.json``, written from the schema itself: ``python -m zsq_deploy.report.describe FOLDER``."""

from __future__ import annotations

import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zsq_deploy.artifact import atomic_writer
from zsq_deploy.report.schema import Report, json_schema

__all__ = ["markdown", "write"]

_HEAD = """# `report.json`

This page is written from the schema (`python -m zsq_deploy.report.describe zsq_deploy/docs`); do not edit it by hand.
A machine-readable form is `report.schema.json`.

* The schema version is 1. Within a version keys are added, never renamed and never removed.
* Shares are 0 to 1 (`0.995` is 99.5 %). Units are in the names: `_ms`, `_bytes`, `_db`, `_lsb`, `seconds`.
* `null` means "not measured". Why stands in `targets.<T>.not_measured`, by the path of the key.
* One *LSB* is the quantization step of an output: its scale where the output is quantized, its calibrated range / 255 where
  it stays in float.
* An engine is compared with four references: the fake-quant twin (`parity.*`), exact integer arithmetic (`parity.integer`),
  the same file with the runtime's fusion off (`parity.unfused`), and the float network (`parity.float`).
* Read it in Python with `zsq_deploy.report.load(path)`, which checks it.
"""

_PLACES = {"targets": "targets.<T>"}


def _parts(annotation: Any) -> list[Any]:
    """The types inside an annotation, flattened."""
    arguments = typing.get_args(annotation)
    return [annotation, *(inner for argument in arguments for inner in _parts(argument))]


def _section(annotation: Any) -> type[BaseModel] | None:
    for part in _parts(annotation):
        if isinstance(part, type) and not typing.get_origin(part) and issubclass(part, BaseModel):
            return part
    return None


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join("`null`" if a is type(None) else _kind(a) for a in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(a)}`" for a in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"object, {_kind(arguments[1])} by name" if arguments[1] is not Any else "object"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(annotation, "any value")


def _place(prefix: str, key: str, field: FieldInfo) -> str:
    origins = [typing.get_origin(part) for part in _parts(field.annotation)]
    name = _PLACES.get(key, key)
    if list in origins:
        name += "[]"
    elif dict in origins and name == key:
        name += ".<name>"
    return f"{prefix}.{name}" if prefix else name


def _describe(model: type[BaseModel], prefix: str, known: dict[type[BaseModel], str]) -> list[str]:
    known[model] = prefix
    title = f"`{prefix}`" if prefix else "Top level"
    text = " ".join((model.__doc__ or "").split()).replace("``", "`")
    lines = [f"## {title}", "", text, "", "| key | type | meaning |", "|---|---|---|"]
    nested: list[str] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        meaning = (field.description or "").replace("|", "\\|")
        section = _section(field.annotation)
        if section is not None and section in known:
            # A part that comes up again is described once.
            meaning += f" Keys as in `{known[section] or 'the top level'}`."
        elif section is not None:
            nested += ["", *_describe(section, _place(prefix, key, field), known)]
        kind = _kind(field.annotation).replace("|", "\\|")
        lines.append(f"| `{key}` | {kind} | {meaning} |")
    return [*lines, *nested]


def markdown() -> str:
    """The documentation page."""
    return _HEAD + "\n" + "\n".join(_describe(Report, "", {})) + "\n"


def schema_text() -> str:
    """The JSON schema as text."""
    return json.dumps(json_schema(), indent=1, sort_keys=True) + "\n"


def write(folder: Path) -> None:
    """Write ``report.md`` and ``report.schema.json``."""
    for name, text in (("report.md", markdown()), ("report.schema.json", schema_text())):
        with atomic_writer(folder / name) as file:
            file.write(text.encode())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
