"""What each operation of an IR means in ONNX: one module a family."""

from __future__ import annotations

import importlib

FAMILIES = tuple(
    importlib.import_module(f"{__name__}.{name}")
    for name in (
        "activation",
        "conv",
        "elementwise",
        "indexing",
        "norm",
        "pool",
        "quantize",
        "reduce",
        "resize",
        "shape",
    )
)

__all__ = ["FAMILIES"]
