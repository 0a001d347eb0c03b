"""POT's own configuration files, read into recipes for POT or for NNCF, and written from them.

A POT configuration has three sections. ``compression`` says how to quantize and is what a recipe is made of. ``model`` and ``engine``
name files and a source of images, which a recipe says in its own way: they are dropped, and the import says so. A key that POT does
not know is an error here as it is there, with the key that was probably meant.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from zsq_deploy.backends.openvino.pot import jsonc
from zsq_deploy.backends.openvino.pot.words import (
    ACCURACY_AWARE,
    ALGORITHMS,
    COMPRESSION_KEYS,
    DEFAULT,
    MODEL_KEYS,
    NOT_OFFERED,
    TOP_KEYS,
    parameter_tree,
)
from zsq_deploy.errors import UsageError

__all__ = ["PotExport", "PotImport", "compression_of", "export_pot_config", "import_pot_config", "read_pot_config"]

_PRESETS = {"symmetric": "performance", "asymmetric": "accuracy"}
"""Old names of presets that POT still takes."""

_STAGES = ("ActivationChannelAlignment", "MinMaxQuantization", ("FastBiasCorrection", "BiasCorrection"))
"""What DefaultQuantization consists of; configurations of old releases list the parts."""


@dataclass(frozen=True)
class PotImport:
    """A POT configuration as a part of a recipe.

    Attributes:
        quantization: The recipe's section ``quantization``: ``quantizer`` and ``pot`` or ``nncf``.
        model: The network's file that the configuration names, if it names one.
        dropped: Key of the configuration -> why it is not in the recipe.
        notes: What else the user should know, one sentence each.
    """

    quantization: dict[str, Any]
    model: str | None
    dropped: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PotExport:
    """A recipe's quantization as a POT configuration.

    Attributes:
        config: The configuration.
        dropped: Word of the recipe -> why POT's configuration does not have it.
    """

    config: dict[str, Any]
    dropped: dict[str, str]

    @property
    def text(self) -> str:
        """The configuration as a file."""
        return json.dumps(self.config, indent=4, ensure_ascii=False, allow_nan=False) + "\n"


def read_pot_config(path: Path | str) -> dict[str, Any]:
    """A POT configuration file, checked: every key is one that POT knows, every algorithm one that it has.

    Raises:
        UsageError: The file is missing or not JSON, a key or algorithm is unknown, or a value has the wrong form.
    """
    path = Path(path)
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError("the POT configuration does not exist", where=where, remedy="check the path") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError(
            "this is not a POT configuration but a folder or a binary file", where=where, remedy="name the JSON file"
        ) from error
    if path.suffix.lower() in (".yaml", ".yml"):
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"this is not YAML: {error}", where=where, remedy="mend the file") from error
    else:
        config = jsonc.loads(text, where=where)
    _check_config(config, where)
    found: dict[str, Any] = config
    return found


def import_pot_config(path: Path | str, *, quantizer: Literal["pot", "nncf"] = "pot") -> PotImport:
    """Turn a POT configuration into the ``quantization`` section of a recipe.

    Args:
        path: The configuration: JSON with comments, or YAML.
        quantizer: Who is to quantize: POT itself, or NNCF, which came after it.

    Raises:
        UsageError: The file cannot be read, a key or algorithm is unknown (the nearest known one is named), or the algorithm is one
            that cannot be had here.
    """
    config = read_pot_config(path)
    where = str(path)
    dropped = dict(_dropped_sections(config))
    compression = compression_of(config, where=where)
    model = config.get("model", {}).get("model") or None
    if quantizer == "nncf":
        from zsq_deploy.backends.openvino.pot.nncf_words import to_nncf

        section, more = to_nncf(compression)
        return PotImport({"quantizer": "nncf", "nncf": section}, model, {**dropped, **more}, _notes(config))
    return PotImport({"quantizer": "pot", "pot": _to_section(compression)}, model, dropped, _notes(config))


def compression_of(config: Mapping[str, Any], *, where: str = "POT configuration") -> dict[str, Any]:
    """The one algorithm of a checked configuration, as ``{"name": ..., "params": {...}}``.

    ``target_device``, ``model_type`` and ``inplace_statistics``, which POT copies into every algorithm's parameters, are in them.

    Raises:
        UsageError: None, or several that are not the parts of DefaultQuantization, or one that cannot be had here.
    """
    compression = config["compression"]
    algorithms = compression["algorithms"]
    common = {
        key: value
        for key, value in compression.items()
        if key in ("target_device", "model_type", "inplace_statistics") and value not in (None, "None")
    }
    names = [one["name"] for one in algorithms]
    for name in names:
        if name in NOT_OFFERED:
            raise UsageError(
                f"POT's {name} cannot be had here: {NOT_OFFERED[name][0]}", where=where, remedy=NOT_OFFERED[name][1]
            )
    if len(names) == 1 and names[0] in (DEFAULT, ACCURACY_AWARE):
        return {"name": names[0], "params": {**common, **_normal(algorithms[0].get("params", {}))}}
    if _are_stages(names):
        params: dict[str, Any] = {}
        for one in algorithms:
            params.update(_normal(one.get("params", {})))
        params["use_fast_bias"] = names[-1] == "FastBiasCorrection"
        return {"name": DEFAULT, "params": {**common, **params}}
    raise UsageError(
        f"the configuration lists the algorithms {', '.join(names) or 'none'}, and one of {DEFAULT} and {ACCURACY_AWARE} is needed",
        where=where,
        remedy=f"keep one of them; {', '.join(_flat(_STAGES))} together are {DEFAULT}",
    )


def export_pot_config(quantization: Mapping[str, Any], *, model: str = "network.xml", name: str = "") -> PotExport:
    """Write the ``quantization`` section of a recipe as a POT configuration.

    Args:
        quantization: The section; its quantizer is ``pot`` or ``nncf``.
        model: The IR (``.xml``) that the configuration shall name.
        name: The network's name; by default the file's.

    Raises:
        UsageError: The quantizer is another one.
    """
    quantizer = quantization.get("quantizer", "auto")
    dropped: dict[str, str] = {}
    if quantizer == "nncf":
        from zsq_deploy.backends.openvino.pot.nncf_words import from_nncf

        algorithm, dropped = from_nncf(quantization.get("nncf", {}))
    elif quantizer == "pot":
        algorithm = _from_section(quantization.get("pot", {}))
    else:
        raise UsageError(
            f"the quantizer {quantizer!r} has no POT configuration",
            where="quantization.quantizer",
            remedy="choose pot or nncf",
        )
    params = algorithm["params"]
    compression: dict[str, Any] = {"target_device": params.pop("target_device", "ANY")}
    for key in ("model_type", "inplace_statistics"):
        if key in params:
            compression[key] = params.pop(key)
    compression["algorithms"] = [algorithm]
    path = Path(model)
    config = {
        "model": {
            "model_name": name or path.stem,
            "model": str(path.with_suffix(".xml")),
            "weights": str(path.with_suffix(".bin")),
        },
        "engine": {"type": "simplified", "data_source": "images"},
        "compression": compression,
    }
    return PotExport(config, dropped)


# ---------------------------------------------------------------------------------------------------------------------
# the recipe's section for POT
# ---------------------------------------------------------------------------------------------------------------------


def _to_section(algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section ``pot``; what it has no word for stays under POT's own key in ``config``."""
    params = dict(algorithm["params"])
    section: dict[str, Any] = {
        "algorithm": algorithm["name"],
        "preset": params.pop("preset", "performance"),
        "stat_subset_size": params.pop("stat_subset_size", None),
        "use_fast_bias": params.pop("use_fast_bias", True),
    }
    if algorithm["name"] == ACCURACY_AWARE:
        section["max_drop"] = params.pop("maximal_drop", 0.01)
    ignored = dict(params.pop("ignored", {}))
    section["ignored"] = list(ignored.pop("scope", None) or ())
    operations = ignored.pop("operations", None) or ()
    section["ignored_types"] = [one["type"] for one in operations if set(one) == {"type"}]
    special = [one for one in operations if set(one) != {"type"}]
    if special:
        ignored["operations"] = special
    if ignored:
        params["ignored"] = ignored
    section["config"] = params
    return section


def _from_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """POT's algorithm; the inverse of :func:`_to_section`."""
    params: dict[str, Any] = {}
    name = section.get("algorithm", DEFAULT)
    params["preset"] = section.get("preset", "mixed")
    if section.get("stat_subset_size") is not None:
        params["stat_subset_size"] = section["stat_subset_size"]
    params["use_fast_bias"] = section.get("use_fast_bias", True)
    if name == ACCURACY_AWARE:
        params["maximal_drop"] = section.get("max_drop", 0.01)
    more = dict(section.get("config", {}))
    ignored = dict(more.pop("ignored", {}))
    if section.get("ignored"):
        ignored["scope"] = [*section["ignored"], *ignored.get("scope", ())]
    if section.get("ignored_types"):
        ignored["operations"] = [
            *({"type": kind} for kind in section["ignored_types"]),
            *ignored.get("operations", ()),
        ]
    if ignored:
        params["ignored"] = ignored
    params.update(more)
    return {"name": name, "params": params}


# ---------------------------------------------------------------------------------------------------------------------
# checking
# ---------------------------------------------------------------------------------------------------------------------


def _check_config(config: Any, where: str) -> None:
    if not isinstance(config, dict):
        raise UsageError("a POT configuration is a JSON object", where=where, remedy="see POT's templates")
    _known(config, TOP_KEYS, where, "the configuration")
    for section in ("model", "engine", "compression"):
        if not isinstance(config.get(section, {}), dict):
            raise UsageError(f"{section!r} is a JSON object", where=where, remedy=f'write "{section}": {{...}}')
    _known(config.get("model", {}), MODEL_KEYS, where, "model")
    if "compression" not in config:
        what = "the configuration has no section 'compression'"
        if "optimizer" in config:
            what += ": a search over parameters ('optimizer') cannot be had here"
        raise UsageError(what, where=where, remedy='write "compression": {"algorithms": [...]}')
    compression = config["compression"]
    _known(compression, COMPRESSION_KEYS, where, "compression")
    algorithms = compression.get("algorithms")
    if not isinstance(algorithms, list) or not algorithms or not all(isinstance(one, dict) for one in algorithms):
        raise UsageError(
            "compression.algorithms is a list of objects with name and params",
            where=where,
            remedy=f'for example [{{"name": "{DEFAULT}", "params": {{"preset": "mixed"}}}}]',
        )
    for one in algorithms:
        _known(one, ("name", "params"), where, "an algorithm")
        name = one.get("name")
        if not isinstance(name, str) or name not in ALGORITHMS:
            close = difflib.get_close_matches(str(name), ALGORITHMS, n=1, cutoff=0.4)
            raise UsageError(
                f"POT has no algorithm {name!r}",
                where=where,
                remedy=f"did you mean {close[0]!r}?" if close else f"choose {DEFAULT} or {ACCURACY_AWARE}",
            )
        params = one.get("params", {})
        if not isinstance(params, dict):
            raise UsageError(f"the params of {name} are a JSON object", where=where, remedy='write "params": {...}')
        tree = parameter_tree(name)
        if tree is not None:
            unknown = list(_unknown(params, tree, ""))
            if unknown:
                raise UsageError(
                    f"{name} does not know {', '.join(key for key, _ in unknown)}",
                    where=where,
                    remedy="; ".join(hint for _, hint in unknown if hint)
                    or "leave it out; POT would refuse the file too",
                )
        _check_values(name, params, where)


def _unknown(params: Mapping[str, Any], tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in params.items():
        if key not in tree:
            close = difflib.get_close_matches(key, tree, n=1, cutoff=0.5)
            yield f"{prefix}{key}", f"instead of {prefix}{key}: {prefix}{close[0]}" if close else ""
        elif isinstance(value, dict) and isinstance(tree[key], Mapping):
            yield from _unknown(value, tree[key], f"{prefix}{key}.")


def _check_values(name: str, params: Mapping[str, Any], where: str) -> None:
    def wrong(key: str, form: str) -> UsageError:
        return UsageError(
            f"{name}.{key} is {form}, and here it is {params[key]!r}", where=where, remedy="mend the value"
        )

    presets = ("performance", "mixed", "accuracy", *_PRESETS)
    if "preset" in params and params["preset"] not in presets:
        raise wrong("preset", f"one of {', '.join(presets)}")
    size = params.get("stat_subset_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise wrong("stat_subset_size", "a number of images")
    drop = params.get("maximal_drop")
    if drop is not None and (isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop < 1e6):
        raise wrong("maximal_drop", "a number")
    if not isinstance(params.get("use_fast_bias", True), bool):
        raise wrong("use_fast_bias", "true or false")
    ignored = params.get("ignored", {})
    scope = ignored.get("scope") or [] if isinstance(ignored, dict) else None
    operations = ignored.get("operations") or [] if isinstance(ignored, dict) else None
    if (
        not isinstance(scope, list)
        or not isinstance(operations, list)
        or not all(isinstance(item, str) for item in scope)
        or not all(isinstance(item, dict) and isinstance(item.get("type"), str) for item in operations)
    ):
        raise wrong("ignored", '{"scope": [names], "operations": [{"type": type}]}')


def _known(section: Mapping[str, Any], keys: tuple[str, ...], where: str, what: str) -> None:
    unknown = [key for key in section if key not in keys]
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0], keys, n=1, cutoff=0.5)
    raise UsageError(
        f"{what} has no key {', '.join(repr(key) for key in unknown)}",
        where=where,
        remedy=f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(keys)}",
    )


def _normal(params: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(params)
    if "preset" in found:
        found["preset"] = _PRESETS.get(found["preset"], found["preset"])
    return found


def _are_stages(names: list[str]) -> bool:
    return len(names) == len(_STAGES) and all(
        name in stage if isinstance(stage, tuple) else name == stage for name, stage in zip(names, _STAGES, strict=True)
    )


def _flat(stages: tuple[Any, ...]) -> list[str]:
    return [" or ".join(stage) if isinstance(stage, tuple) else stage for stage in stages]


def _dropped_sections(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if config.get("engine"):
        yield "engine", "images come from the recipe's calibration set, and accuracy is measured by verification"
    for key in config.get("model", {}):
        if key == "weights":
            yield "model.weights", "the network is read from one file"
        elif key == "model_name":
            yield "model.model_name", "a network is named after its file"
        elif key != "model":
            yield f"model.{key}", "a recipe has no counterpart: one network, one output folder (-o)"
    if "optimizer" in config:
        yield "optimizer", "there is no search over POT's parameters"
    if config.get("compression", {}).get("dump_intermediate_model"):
        yield "compression.dump_intermediate_model", "only finished models are kept"


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    model = str(config.get("model", {}).get("model") or "")
    if model.endswith(".xml"):
        note = f"the configuration names the IR {model}; a recipe starts from the network that it was made from: name it with --model"
        return (note,)
    return ()
