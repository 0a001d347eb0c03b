"""The words of POT 2023.3: its algorithms, and the keys that their parameters have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "ACCURACY_AWARE",
    "ALGORITHMS",
    "COMPRESSION_KEYS",
    "DEFAULT",
    "MODEL_KEYS",
    "NOT_OFFERED",
    "TOP_KEYS",
    "parameter_tree",
]

DEFAULT = "DefaultQuantization"
ACCURACY_AWARE = "AccuracyAwareQuantization"

_NOT_HERE = ("it is experimental or a part of another one", f"use {DEFAULT} or {ACCURACY_AWARE}")
_SPARSE = ("it makes weights sparse and does not quantize", f"use {DEFAULT} or {ACCURACY_AWARE}")

NOT_OFFERED: Mapping[str, tuple[str, str]] = {
    "DataFreeQuantization": (
        "in its last release it stops with an error (CompressedModel has no get_op_nodes)",
        "ranges from the statistics of batch normalization, its idea, are `ranges: bn-analytic` with `quantizer: qdq`",
    ),
    "AccuracyAwareCommon": _NOT_HERE,
    "AccuracyAwareGNA": ("it is for GNA devices, which OpenVINO no longer has", f"use {ACCURACY_AWARE}"),
    "INT4MixedQuantization": _NOT_HERE,
    "OutlierChannelSplitting": _NOT_HERE,
    "OverflowCorrection": ("it is for GNA devices, which OpenVINO no longer has", f"use {DEFAULT}"),
    "ParamsGridSearchAlgorithm": ("it is a part of AccuracyAwareQuantization", 'use it with "tune_hyperparams": true'),
    "QuantNoiseEstimator": _NOT_HERE,
    "RangeOptimization": _NOT_HERE,
    "RangeSupervision": _NOT_HERE,
    "TunableQuantization": _NOT_HERE,
    "WeightBiasCorrection": _NOT_HERE,
    "WeightSparsity": _SPARSE,
    "MagnitudeSparsity": _SPARSE,
    "BaseWeightSparsity": _SPARSE,
}
"""Algorithms that POT has and that cannot be had here -> why, and what to do."""

ALGORITHMS: tuple[str, ...] = (
    DEFAULT,
    ACCURACY_AWARE,
    "ActivationChannelAlignment",
    "MinMaxQuantization",
    "FastBiasCorrection",
    "BiasCorrection",
    *NOT_OFFERED,
)
"""Every algorithm of POT."""

TOP_KEYS = ("model", "engine", "compression", "optimizer")
MODEL_KEYS = (
    "model_name",
    "model",
    "weights",
    "cascade",
    "output_dir",
    "direct_dump",
    "keep_uncompressed_weights",
    "quantization_info",
)
COMPRESSION_KEYS = ("target_device", "algorithms", "model_type", "inplace_statistics", "dump_intermediate_model")

_BOUND = {"type": None, "outlier_prob": None, "granularity": None, "clipping_value": None}
_AGGREGATED = {**_BOUND, "aggregator": None}
_TENSOR = {"bits": None, "mode": None, "level_low": None, "level_high": None, "granularity": None}
_WEIGHTS = {**_TENSOR, "range_estimator": {"preset": None, "min": _BOUND, "max": _BOUND}}
_ACTIVATIONS = {**_TENSOR, "range_estimator": {"preset": None, "min": _AGGREGATED, "max": _AGGREGATED}}

_COMMON: dict[str, Any] = {"ignored": {"skip_model": None, "scope": None, "operations": None}}
_SAMPLING: dict[str, Any] = {"stat_subset_size": None, "shuffle_data": None, "seed": None}
_MINMAX: dict[str, Any] = {
    "preset": None,
    "range_estimator": {"preset": None, "min": _AGGREGATED, "max": _AGGREGATED},
    "weights": _WEIGHTS,
    "activations": _ACTIVATIONS,
    "saturation_fix": None,
}
_BIAS: dict[str, Any] = {**_SAMPLING, "apply_for_all_nodes": None, "threshold": None}
_TUNING: dict[str, Any] = dict.fromkeys(
    (
        "num_samples_for_tuning",
        "batch_size",
        "optimizer",
        "loss",
        "tuning_iterations",
        "random_seed",
        "use_ranking_subset",
        "calibration_indices_pool",
        "calculate_grads_on_loss_increase_only",
        "weight_decay",
    )
)
_DEFAULT: dict[str, Any] = {
    **_COMMON,
    **_SAMPLING,
    **_MINMAX,
    **_BIAS,
    **_TUNING,
    "use_fast_bias": None,
    "use_layerwise_tuning": None,
    "stat_batch_size": None,
}
_ACCURACY: dict[str, Any] = dict.fromkeys(
    (
        "metric_subset_ratio",
        "ranking_subset_size",
        "max_iter_num",
        "maximal_drop",
        "drop_type",
        "use_prev_if_drop_increase",
        "metrics",
        "base_algorithm",
        "annotation_free",
        "tune_hyperparams",
        "annotation_conf_threshold",
        "convert_to_mixed_preset",
    )
)

_TREES: Mapping[str, dict[str, Any]] = {
    DEFAULT: _DEFAULT,
    ACCURACY_AWARE: {**_DEFAULT, **_ACCURACY},
    "ActivationChannelAlignment": {**_COMMON, **_SAMPLING},
    "MinMaxQuantization": {**_COMMON, **_SAMPLING, **_MINMAX},
    "FastBiasCorrection": {**_COMMON, **_BIAS},
    "BiasCorrection": {**_COMMON, **_BIAS},
}


def parameter_tree(algorithm: str) -> Mapping[str, Any] | None:
    """The keys that an algorithm's parameters may have, nested as they are; ``None``: not known here."""
    return _TREES.get(algorithm)
