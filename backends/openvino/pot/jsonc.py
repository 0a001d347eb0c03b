"""JSON as POT's configurations are written: with ``//`` and ``/* */`` comments and commas behind the last item."""

from __future__ import annotations

import json
import re
from typing import Any

from zsq_deploy.errors import UsageError

__all__ = ["loads", "strip_comments"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[}\]])', re.DOTALL)


def strip_comments(text: str) -> str:
    """The same text with comments and last commas blanked out; lines stay where they are, and strings are left alone."""

    def blank(match: re.Match[str]) -> str:
        found = match.group(0)
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return _COMMA.sub(blank, _TOKEN.sub(blank, text))


def loads(text: str, *, where: str) -> Any:
    """Read JSON with comments.

    Raises:
        UsageError: It is not JSON; the message has the line.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UsageError(
                    f"the key {name!r} is there twice in one object", where=where, remedy="keep the one that is meant"
                )
            found[name] = value
        return found

    try:
        return json.loads(strip_comments(text.removeprefix("\ufeff")), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"this is not JSON: {error.msg} in line {error.lineno}, column {error.colno}",
            where=where,
            remedy="mend the line; comments (// and /* */) and a comma behind the last item are fine",
        ) from error
