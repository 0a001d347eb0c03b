"""Simulated quantization: schemes, ranges, fake-quantization, Q/DQ reading and writing, bias correction.

The names below are loaded on first use, so that looking at a scheme does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zsq_deploy.quant.scheme import Granularity, Scheme

if TYPE_CHECKING:
    from zsq_deploy.quant.analytic import analytic_ranges, propagate_model
    from zsq_deploy.quant.bias import apply_biases, correct_bias, correct_bias_analytically
    from zsq_deploy.quant.coverage import implied_ranges, widen
    from zsq_deploy.quant.fakequant import QParams, fake_quant, onnx_type, qparams, storage_dtype, weight_qparams
    from zsq_deploy.quant.histogram import Histogram
    from zsq_deploy.quant.qdq import PlacementRules, insert_qdq
    from zsq_deploy.quant.ranges import Ranges
    from zsq_deploy.quant.reader import QuantizedTensor, dequantized_weight, read_qdq
    from zsq_deploy.quant.statistics import collect
    from zsq_deploy.quant.statistics_values import Statistics

_HOME = {
    "analytic": ("analytic_ranges", "propagate_model"),
    "bias": ("apply_biases", "correct_bias", "correct_bias_analytically"),
    "coverage": ("implied_ranges", "widen"),
    "fakequant": ("QParams", "fake_quant", "onnx_type", "qparams", "storage_dtype", "weight_qparams"),
    "histogram": ("Histogram",),
    "qdq": ("PlacementRules", "insert_qdq"),
    "ranges": ("Ranges",),
    "reader": ("QuantizedTensor", "dequantized_weight", "read_qdq"),
    "statistics": ("collect",),
    "statistics_values": ("Statistics",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Granularity",
    "Histogram",
    "PlacementRules",
    "QParams",
    "QuantizedTensor",
    "Ranges",
    "Scheme",
    "Statistics",
    "analytic_ranges",
    "apply_biases",
    "collect",
    "correct_bias",
    "correct_bias_analytically",
    "dequantized_weight",
    "fake_quant",
    "implied_ranges",
    "insert_qdq",
    "onnx_type",
    "propagate_model",
    "qparams",
    "read_qdq",
    "storage_dtype",
    "weight_qparams",
    "widen",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
