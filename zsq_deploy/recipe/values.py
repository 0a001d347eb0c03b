"""The kinds of values that a recipe holds, and what a person may write for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field

__all__ = ["Names", "Numbers", "Section", "Shape", "Shapes", "Share", "Size", "parse_shape"]


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape as the command line writes it, ``1x3x32x32``.

    Raises:
        ValueError: Not positive numbers joined by ``x``.
    """
    parts = re.split(r"[x×,]", text.strip().lower())
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no shape: write the sizes joined by x, for example 1x3x224x224")
    return tuple(int(part) for part in parts)


def _as_shape(value: Any) -> Any:
    """Shapes are written ``1x3x32x32`` or as a list; for several inputs as a mapping from the input's name."""
    if isinstance(value, str):
        return parse_shape(value)
    if isinstance(value, Mapping):
        return {name: _as_shape(shape) for name, shape in value.items()}
    return value


def _as_numbers(value: Any) -> Any:
    """Numbers are written as a list, or as on the command line: ``0.485,0.456,0.406``."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    return value


def _as_list(value: Any) -> Any:
    """A list of names; one name may stand alone."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Size = Annotated[int, Field(gt=0)]
Shape = tuple[Size, ...]
Shapes = Annotated[Shape | dict[str, Shape], BeforeValidator(_as_shape)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_numbers)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(pydantic.BaseModel):
    """A part of a recipe: unknown words, NaN and later changes are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
