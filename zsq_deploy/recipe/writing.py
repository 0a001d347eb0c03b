"""Writing a recipe as YAML, without what says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

__all__ = ["yaml_text"]

_FREE = ("parameters", "config")
"""Mappings whose words are not ours."""


def yaml_text(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A recipe as YAML text, one paragraph a section.

    Args:
        values: The values of a recipe, in the order of the file, as JSON knows them.
        defaults: Those of a recipe that says nothing.
    """
    return "\n".join(
        yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=100)
        for name, value in _without_none(values, defaults).items()
    )


def _without_none(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says nothing: nulls and empty sections, unless that differs from the default."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        # a method's own parameters are the user's: null means something there
        section = isinstance(value, dict) and isinstance(default, dict) and key not in _FREE
        inner = _without_none(value, default or {}) if section else value
        if inner == {} or (inner is None and default is None):
            continue
        found[key] = inner
    return found
