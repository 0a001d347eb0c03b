"""POT's parameters in NNCF's words, and back; what the other side has no word for is named with the reason.

| POT | recipe, section ``nncf`` |
|---|---|
| DefaultQuantization / AccuracyAwareQuantization | ``accuracy_control`` false / true |
| preset | ``preset`` (``accuracy``, asymmetric weights, becomes ``mixed``, as POT does itself on CPU and GPU) |
| stat_subset_size | ``subset_size`` |
| target_device | ``target_device`` |
| model_type | ``model_type`` |
| use_fast_bias | ``fast_bias_correction`` |
| ignored.scope, ignored.operations | ``ignored_names``, ``ignored_types`` |
| saturation_fix: no, first_layer, all | ``overflow_fix``: disable, first_layer_only, enable |
| activations.range_estimator, weights.range_estimator | ``activations_range``, ``weights_range``, ``range_quantile`` |
| maximal_drop, drop_type | ``max_drop``, ``drop_type`` |
| max_iter_num, ranking_subset_size, tune_hyperparams | ``max_iterations``, ``ranking_subset_size``, ``tune_parameters`` |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsq_deploy.backends.openvino.pot.words import ACCURACY_AWARE, DEFAULT

__all__ = ["from_nncf", "to_nncf"]

_DIRECT = {
    "stat_subset_size": "subset_size",
    "use_fast_bias": "fast_bias_correction",
    "model_type": "model_type",
}
_ACCURACY = {
    "maximal_drop": "max_drop",
    "drop_type": "drop_type",
    "max_iter_num": "max_iterations",
    "ranking_subset_size": "ranking_subset_size",
    "tune_hyperparams": "tune_parameters",
}
_FIX = {"no": "disable", "first_layer": "first_layer_only", "all": "enable"}
_DEVICES = ("ANY", "CPU", "GPU", "NPU", "CPU_SPR")

_AGGREGATORS = {
    "min": "minmax",
    "max": "minmax",
    "mean": "mean_minmax",
    "median": "median_minmax",
    "mean_no_outliers": "mean_no_outliers_minmax",
}
_QUANTILES = ("quantile", "abs_quantile")
_EXTREMES = ("min", "max", "abs_max")

_NO_WORD = {
    "shuffle_data": "the images of a synthesized set have no order",
    "seed": "nothing random is left without shuffle_data",
    "stat_batch_size": "the batch has no influence on the result",
    "apply_for_all_nodes": "NNCF corrects the biases of quantized layers",
    "threshold": "NNCF has its own limit for bias corrections",
    "use_layerwise_tuning": "NNCF has no layer-wise tuning",
    "inplace_statistics": "NNCF decides where statistics are computed",
    "range_estimator": "it does not say whether weights or activations are meant",
    "metrics": "the metric is agreement with the float network, or accuracy on validation_data",
    "metric_subset_ratio": "all validation samples are used",
    "base_algorithm": "NNCF's accuracy control starts from its own quantization",
    "use_prev_if_drop_increase": "NNCF always goes back to the better model",
    "annotation_free": "without labels the metric is agreement with the float network anyway",
    "annotation_conf_threshold": "without labels the metric is agreement with the float network anyway",
    "convert_to_mixed_preset": "choose preset: mixed instead",
}

_TUNING = "it belongs to layer-wise tuning, which NNCF does not have"


def to_nncf(algorithm: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe's section ``nncf`` for one of POT's algorithms, and what was dropped and why.

    Args:
        algorithm: ``{"name": ..., "params": {...}}`` as :func:`~zsq_deploy.backends.openvino.pot.config.compression_of` gives it.
    """
    params = dict(algorithm["params"])
    dropped: dict[str, str] = {}
    preset = params.pop("preset", "performance")
    section: dict[str, Any] = {"preset": "mixed" if preset == "accuracy" else preset, "fast_bias_correction": True}
    if preset == "accuracy":
        dropped["preset: accuracy"] = (
            "NNCF has no asymmetric weights; mixed is nearest, and what POT takes for CPU and GPU"
        )
    for key, word in _DIRECT.items():
        if key in params:
            section[word] = params.pop(key)
    device = params.pop("target_device", "ANY")
    if device in _DEVICES:
        section["target_device"] = device
    else:
        dropped[f"target_device: {device}"] = f"OpenVINO no longer has it; NNCF knows {', '.join(_DEVICES)}"
    _ignored(params, section, dropped)
    fix = params.pop("saturation_fix", None)
    if fix in _FIX:
        section["overflow_fix"] = _FIX[fix]
    elif fix is not None:
        dropped["saturation_fix"] = f"{fix!r} is none of {', '.join(_FIX)}"
    if algorithm["name"] == ACCURACY_AWARE:
        section["accuracy_control"] = True
        section["max_drop"] = 0.01
        for key, word in _ACCURACY.items():
            if key in params:
                section[word] = params.pop(key)
    shared = params.get("range_estimator")
    if isinstance(shared, Mapping):
        params.pop("range_estimator")
    for kind in ("activations", "weights"):
        given = dict(params.pop(kind, None) or {})
        _tensor(kind, given, section, dropped)
        estimator = given.get("range_estimator", shared)
        if kind == "activations" or estimator:
            _range(kind, estimator or {}, section, dropped)
    for key in params:
        dropped[key] = _NO_WORD.get(key, _TUNING)
    return section, dropped


def from_nncf(section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """POT's algorithm for a recipe's section ``nncf``, and what was dropped and why."""
    rest = {key: value for key, value in section.items() if value not in (None, (), [])}
    dropped: dict[str, str] = {}
    params: dict[str, Any] = {"preset": rest.pop("preset", "mixed")}
    for key, word in _DIRECT.items():
        if word in rest:
            params[key] = rest.pop(word)
    device = rest.pop("target_device", None)
    if device == "CPU_SPR":
        dropped["target_device: CPU_SPR"] = "POT's nearest is CPU"
        device = "CPU"
    if device:
        params["target_device"] = device
    ignored: dict[str, Any] = {}
    if "ignored_names" in rest:
        ignored["scope"] = list(rest.pop("ignored_names"))
    if "ignored_types" in rest:
        ignored["operations"] = [{"type": kind} for kind in rest.pop("ignored_types")]
    if ignored:
        params["ignored"] = ignored
    if "ignored_patterns" in rest:
        rest.pop("ignored_patterns")
        dropped["ignored_patterns"] = "POT takes names and types only"
    fix = rest.pop("overflow_fix", None)
    if fix:
        params["saturation_fix"] = {word: key for key, word in _FIX.items()}[fix]
    quantile = rest.pop("range_quantile", 1e-4)
    for kind in ("activations", "weights"):
        method = rest.pop(f"{kind}_range", None)
        if method is not None:
            estimator = _estimator(kind, method, quantile)
            if estimator is None:
                dropped[f"{kind}_range: {method}"] = "POT has no such estimator"
            else:
                params[kind] = {"range_estimator": estimator}
    name = ACCURACY_AWARE if rest.pop("accuracy_control", False) else DEFAULT
    for key, word in _ACCURACY.items():
        value = rest.pop(word, None)
        if value is not None and name == ACCURACY_AWARE:
            params[key] = value
    rest.pop("per_channel_activations", None)  # the route gives POT per-tensor activations as well
    if rest.pop("bias_correction", True) is False:
        dropped["bias_correction: false"] = f"{DEFAULT} always corrects biases"
    for word in rest:
        dropped[word] = "POT has no counterpart"
    return {"name": name, "params": params}, dropped


def _ignored(params: dict[str, Any], section: dict[str, Any], dropped: dict[str, str]) -> None:
    ignored = dict(params.pop("ignored", None) or {})
    if ignored.get("scope"):
        section["ignored_names"] = list(ignored["scope"])
    operations = ignored.get("operations") or ()
    if operations:
        section["ignored_types"] = list(dict.fromkeys(one["type"] for one in operations if set(one) == {"type"}))
        for one in operations:
            if set(one) != {"type"}:
                dropped[f"ignored.operations: {one['type']} with attributes"] = (
                    "NNCF ignores types whatever their attributes; name the nodes instead"
                )
    if ignored.get("skip_model"):
        dropped["ignored.skip_model"] = "a recipe is about one network"


def _tensor(kind: str, given: Mapping[str, Any], section: dict[str, Any], dropped: dict[str, str]) -> None:
    """Mode, granularity and bits: what the preset says anyway is fine, the rest has no word."""
    mode = given.get("mode")
    if mode is not None:
        if kind == "activations":
            section["preset"] = "performance" if mode == "symmetric" else "mixed"
        elif mode != "symmetric":
            dropped["weights.mode"] = (
                "weights are always symmetric: a zero point of weights costs time in every product"
            )
    if given.get("bits", 8) != 8:
        dropped[f"{kind}.bits"] = "engines have 8 bits; 4-bit weights are `bits: w4a8`"
    granularity = given.get("granularity")
    usual = {"activations": "pertensor", "weights": "perchannel"}[kind]
    if granularity == "perchannel" and kind == "activations":
        section["per_channel_activations"] = True
    elif granularity not in (None, usual):
        dropped[f"{kind}.granularity"] = f"{kind} are quantized {usual}"
    for key in ("level_low", "level_high"):
        if key in given:
            dropped[f"{kind}.{key}"] = "levels follow from the bits"


def _range(kind: str, estimator: Mapping[str, Any], section: dict[str, Any], dropped: dict[str, str]) -> None:
    """One estimator; POT's own defaults are those of NNCF too, which is what ``null`` means."""
    word = f"{kind}_range"
    section.setdefault(word, None)
    bounds = [estimator[key] for key in ("min", "max") if estimator.get(key)]
    if not bounds:
        if estimator.get("preset") == "quantile":
            section[word], section["range_quantile"] = "mean_quantile", 1e-4
        return
    found = set()
    for bound in bounds:
        form = bound.get("type", "max")
        aggregator = bound.get("aggregator", "mean" if kind == "activations" else "max")
        if form in _EXTREMES and aggregator in _AGGREGATORS:
            found.add(_AGGREGATORS[aggregator])
        elif form in _QUANTILES and aggregator in ("mean", "max", "min"):
            found.add("mean_quantile")
            section["range_quantile"] = bound.get("outlier_prob", 1e-4)
        else:
            found.add("")
        if "clipping_value" in bound:
            dropped[f"{kind}.range_estimator.clipping_value"] = "NNCF has no counterpart"
    if len(found) == 1 and "" not in found:
        section[word] = found.pop()
    else:
        section.pop("range_quantile", None)
        dropped[f"{kind}.range_estimator"] = "no range method is like it; NNCF's default was taken"


def _estimator(kind: str, method: str, quantile: float) -> dict[str, Any] | None:
    """POT's estimator for one of NNCF's; ``None`` if it has none."""
    if method == "mean_quantile":
        if kind == "weights":
            return {"max": {"type": "abs_quantile", "outlier_prob": quantile}}
        return {side: {"type": "quantile", "outlier_prob": quantile, "aggregator": "mean"} for side in ("min", "max")}
    aggregators = {"minmax": None, "mean_minmax": "mean", "median_minmax": "median"}
    aggregators["mean_no_outliers_minmax"] = "mean_no_outliers"
    if method not in aggregators:
        return None
    if kind == "weights":
        return {"max": {"type": "abs_max"}} if method == "minmax" else None
    chosen = aggregators[method]
    return {side: {"type": side, "aggregator": chosen or side} for side in ("min", "max")}
