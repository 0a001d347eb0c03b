"""Mistakes in a recipe, in the words of the person who wrote it: with the line, and with what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import pydantic

from zsq_deploy.errors import UsageError
from zsq_deploy.recipe.words import FieldDescription

__all__ = ["explained", "nearest"]


def explained(
    error: pydantic.ValidationError,
    words: Sequence[FieldDescription],
    sections: Sequence[str],
    where: str,
    lines: Mapping[str, int],
) -> UsageError:
    """What pydantic found, in the user's words, with lines and near misses.

    Args:
        error: What pydantic found.
        words: Every word that a recipe knows.
        sections: The dotted names of its sections.
        where: What to call the recipe.
        lines: The line of every word that was given, by its dotted name; may be empty.
    """
    problems: list[str] = []
    remedies: list[str] = []
    first_line: int | None = None
    known = [word.name for word in words]
    for item in error.errors():
        loc = [part for part in item["loc"] if isinstance(part, str)]
        while loc and item["type"] != "extra_forbidden" and ".".join(loc) not in (*known, *sections):
            loc.pop()  # pydantic adds names of union members; a user never wrote those
        dotted = ".".join(loc)
        line = lines.get(dotted)
        at = f" (line {line})" if line else ""
        first_line = first_line or line
        if item["type"] == "extra_forbidden":
            problems.append(f"a recipe has no {dotted!r}{at}")
            remedies.append(nearest(dotted, [*known, *sections]))
        elif item["type"] == "missing":
            problems.append(f"{dotted!r} is missing")
            remedies.append(f"add {dotted}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "string_pattern_mismatch":
                message = "this has the wrong form"
            given = "" if isinstance(item["input"], Mapping | pydantic.BaseModel) else f", not {item['input']!r}"
            problem = f"{dotted or 'recipe'}{at}: {message}{given}"
            if problem not in problems:
                problems.append(problem)
            described = next((word.description for word in words if word.name == dotted), "")
            remedies.append(f"{dotted}: {described}" if described else "")
    return UsageError(
        "; ".join(problems),
        where=where + (f", line {first_line}" if first_line else ""),
        remedy="\n         ".join(dict.fromkeys(remedy for remedy in remedies if remedy))
        or "`zsq run --words` lists every word",
    )


def nearest(dotted: str, known: Sequence[str]) -> str:
    """What was probably meant by an unknown word."""
    *section, key = dotted.split(".")
    prefix = ".".join(section)
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == prefix]
    spelled = key.replace("-", "_")
    close = difflib.get_close_matches(spelled, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {'.'.join([*section, close[0]])}?"
    elsewhere = [name for name in known if name.rpartition(".")[2] == spelled]
    if elsewhere:
        return f"it belongs to another section: {elsewhere[0]}"
    anywhere = difflib.get_close_matches(spelled, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.75)
    if anywhere:
        return f"did you mean {next(name for name in known if name.rpartition('.')[2] == anywhere[0])}?"
    return f"{prefix or 'a recipe'} knows {', '.join(siblings)}" if siblings else "`zsq run --words` lists every word"
