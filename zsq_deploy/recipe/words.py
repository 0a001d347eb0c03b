"""The words of a recipe with their defaults and meanings, read from the sections themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pydantic

from zsq_deploy.recipe.values import Section

__all__ = ["FieldDescription", "sections_of", "words_of"]


@dataclass(frozen=True)
class FieldDescription:
    """One word of the recipe, for help and docs.

    Attributes:
        name: Dotted name, ``calibration.images``.
        default: Default as YAML text; empty when there is none, ``required`` when it must be given.
        description: One sentence.
    """

    name: str
    default: str
    description: str


def words_of(section: type[pydantic.BaseModel], prefix: str = "") -> Iterator[FieldDescription]:
    """Every word of a section and of the sections inside it, in the order of the file."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from words_of(kind, f"{prefix}{name}.")
            continue
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            if value is None or value in ((), {}):
                default = ""
            elif isinstance(value, tuple):
                default = ", ".join(map(str, value))
            else:
                default = str(value).lower() if isinstance(value, bool) else str(value)
        yield FieldDescription(prefix + name, default, field.description or "")


def sections_of(section: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of the sections inside a section."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield prefix + name
            yield from sections_of(kind, f"{prefix}{name}.")
