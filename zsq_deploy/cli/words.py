"""From what the command line says to a recipe, and mistakes told in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsq_deploy.errors import UsageError
from zsq_deploy.recipe import Recipe, parse_shape

__all__ = ["parameters", "recipe_from", "vendor_words"]

_VENDOR_WORDS: dict[str, dict[str, str]] = {
    "preset": {"nncf": "preset", "pot": "preset"},
    "model_type": {"nncf": "model_type", "pot": "config.model_type"},
    "fast_bias": {"nncf": "fast_bias_correction", "pot": "use_fast_bias"},
    "subset_size": {"nncf": "subset_size", "pot": "stat_subset_size"},
    "ignore_name": {"nncf": "ignored_names", "pot": "ignored"},
    "ignore_type": {"nncf": "ignored_types", "pot": "ignored_types"},
    "ignore_pattern": {"nncf": "ignored_patterns"},
    "accuracy_control": {"nncf": "accuracy_control", "pot": "algorithm"},
    "max_drop": {"nncf": "max_drop", "pot": "max_drop"},
    "pot_config": {"pot": "config_path"},
}
"""Option of the command line -> quantizer -> its word in that quantizer's section of the recipe."""


def vendor_words(quantizer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What NNCF or POT is told, as dotted words of the recipe.

    Args:
        quantizer: The chosen one; with ``auto`` the options are NNCF's.
        given: Name of the option -> value; ``None``, ``False`` for `accuracy_control` and empty lists say nothing.

    Raises:
        UsageError: The quantizer knows no such option, or `max_drop` without accuracy control.
    """
    told = {
        name: value
        for name, value in given.items()
        if value is not None and value != [] and not (name == "accuracy_control" and not value)
    }
    section = {"auto": "nncf"}.get(quantizer, quantizer)
    for name in told:
        if section not in _VENDOR_WORDS[name]:
            readers = " or ".join(_VENDOR_WORDS[name])
            raise UsageError(
                f"the quantizer {quantizer!r} does not know it",
                where=f"--{name.replace('_', '-')}",
                remedy=f"leave it out, or choose --quantizer {readers}",
            )
    if "max_drop" in told and "accuracy_control" not in told and "pot_config" not in told:
        raise UsageError(
            "nothing looks at the drop: accuracy control is off",
            where="--max-drop",
            remedy="add --accuracy-control, or leave it out",
        )
    if section == "pot" and "accuracy_control" in told:
        told["accuracy_control"] = "AccuracyAwareQuantization"
    return {f"quantization.{section}.{_VENDOR_WORDS[name][section]}": value for name, value in told.items()}


def parameters(pairs: list[str] | None) -> dict[str, Any]:
    """``["steps=200"]`` as ``{"steps": 200}``; values are read as YAML.

    Raises:
        UsageError: A pair without ``=``.
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(
                f"{pair!r} is no NAME=VALUE", where="--param", remedy="write for example --param steps=200"
            )
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(
                f"the value of {pair!r} cannot be read",
                where="--param",
                remedy="write a number, a word, true or false, or a list like [1, 2]; quote what holds special characters",
            ) from error
    return found


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A recipe from what the command line said; ``None`` values are left to the recipe's defaults.

    Args:
        values: By dotted names: ``{"model.source": "net.onnx", "calibration.images": 256}``; ``calibration.parameters`` as a list of
            ``NAME=VALUE``, and under ``quantization.vendor`` what :func:`vendor_words` reads.
    """
    vendor = "quantization.vendor."
    said = {word: value for word, value in values.items() if not word.startswith(vendor)}
    told = {word.removeprefix(vendor): value for word, value in values.items() if word.startswith(vendor)}
    said |= vendor_words(str(values.get("quantization.quantizer", "auto")), told)
    if "calibration.parameters" in said:
        said["calibration.parameters"] = parameters(said["calibration.parameters"])
    nested: dict[str, Any] = {}
    for dotted, value in said.items():
        if value is None:
            continue
        *sections, key = dotted.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = str(value) if isinstance(value, Path) else value
    shape = nested.get("model", {}).get("input_shape")
    if isinstance(shape, str):
        try:
            nested["model"]["input_shape"] = parse_shape(shape)
        except ValueError as error:
            raise UsageError(str(error), where="--input-shape", remedy="write it like 1x3x224x224") from error
    try:
        return Recipe.of(nested, where="the command line").resolved()
    except UsageError as error:
        raise UsageError(
            _as_options(error.what), where=error.where, remedy=_as_options(error.remedy or "see the command's `--help`")
        ) from error


_OPTION_OF = {
    "model.source": "MODEL",
    "calibration.set": "--calibration",
    "calibration.parameters": "--param",
    "calibration.precision": "--image-precision",
    **{
        f"quantization.{quantizer}.{word}": "--" + option.replace("_", "-")
        for option, places in _VENDOR_WORDS.items()
        for quantizer, word in places.items()
    },
}


def _as_options(text: str) -> str:
    """Words of a recipe as the command line spells them: ``calibration.images`` is ``--images``."""

    def option(match: re.Match[str]) -> str:
        return _OPTION_OF.get(match[0], "--" + match[0].rpartition(".")[2].replace("_", "-"))

    text = re.sub(
        r"\b(?:model|calibration|quantization\.(?:nncf|pot)|quantization|verification\.gates|verification|run)\.[a-z0-9_]+\b",
        option,
        text,
    )
    text = re.sub(r"^(?:model|recipe): ", "", text).replace("`zsq run --words`", "`--help`")
    for words in ("mean and std", "raw_pixels"):
        text = text.replace(
            words, words.replace("mean", "--mean").replace("std", "--std").replace("raw_pixels", "--raw-pixels")
        )
    return text.replace("lists every word", "explains every option")
