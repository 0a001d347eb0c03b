"""Reading YAML together with the line of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zsq_deploy.errors import UsageError

__all__ = ["read_yaml"]


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of every key by its dotted name."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError("there is no such recipe", where=str(path), remedy="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the recipe cannot be read ({error})", where=str(path), remedy="give a YAML text file"
        ) from error
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _note_lines(node, "", lines, str(path))
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UsageError(
            f"this is not YAML: {getattr(error, 'problem', None) or error}",
            where=f"{path}{place}",
            remedy="mind indentation (spaces, no tabs), a space behind each colon, and closing quotes and brackets",
        ) from error
    if not isinstance(values, dict):
        raise UsageError(
            "the recipe is empty" if values is None else "the recipe is no mapping of words to values",
            where=str(path),
            remedy="start with:\nmodel:\n  source: network.onnx",
        )
    return values, lines


def _note_lines(node: yaml.Node, prefix: str, lines: dict[str, int], where: str, depth: int = 0) -> None:
    if not isinstance(node, yaml.MappingNode) or depth > 20:
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            raise UsageError(
                f"{name} is given twice",
                where=f"{where}, lines {lines[name]} and {key.start_mark.line + 1}",
                remedy="keep one of them",
            )
        lines[name] = key.start_mark.line + 1
        _note_lines(value, name + ".", lines, where, depth + 1)
