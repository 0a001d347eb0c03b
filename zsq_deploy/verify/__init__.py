"""The engine against its references: parity, accuracy, integer proof, latency.

Nothing here knows a runtime: what is judged comes in as numpy arrays, as callables, or as the name of a factory.

The names below are loaded on first use: the process that holds a runner while it is measured imports this package, and its
memory is part of the result.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsq_deploy.verify.accuracy import Accuracy, Evaluation, Paired, evaluate, image_feeds, mcnemar
    from zsq_deploy.verify.divergence import (
        Divergence,
        FlipTrace,
        TensorDifference,
        TensorWalk,
        first_divergence,
        layer_quality,
        walk_tensors,
    )
    from zsq_deploy.verify.fused import fused_codes, walk_fused
    from zsq_deploy.verify.gates import GateResult, Gates, evaluate_gates
    from zsq_deploy.verify.latency import (
        WHAT_IS_TIMED,
        Comparison,
        Latency,
        RunnerSpec,
        Speedup,
        compare_latency,
        measure,
    )
    from zsq_deploy.verify.machine import machine_info, peak_rss_bytes
    from zsq_deploy.verify.parity import SQNR_LIMIT_DB, LsbHistogram, OutputParity, Parity, ParityAccumulator, compare
    from zsq_deploy.verify.proof import FloatIsland, IntegerProof, KernelGroup, prove

_HOME = {
    "accuracy": (
        "Accuracy",
        "Evaluation",
        "Paired",
        "evaluate",
        "image_feeds",
        "mcnemar",
    ),
    "divergence": (
        "Divergence",
        "FlipTrace",
        "TensorDifference",
        "TensorWalk",
        "first_divergence",
        "layer_quality",
        "walk_tensors",
    ),
    "fused": (
        "fused_codes",
        "walk_fused",
    ),
    "gates": (
        "GateResult",
        "Gates",
        "evaluate_gates",
    ),
    "latency": (
        "WHAT_IS_TIMED",
        "Comparison",
        "Latency",
        "RunnerSpec",
        "Speedup",
        "compare_latency",
        "measure",
    ),
    "machine": (
        "machine_info",
        "peak_rss_bytes",
    ),
    "parity": (
        "SQNR_LIMIT_DB",
        "LsbHistogram",
        "OutputParity",
        "Parity",
        "ParityAccumulator",
        "compare",
    ),
    "proof": (
        "FloatIsland",
        "IntegerProof",
        "KernelGroup",
        "prove",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "SQNR_LIMIT_DB",
    "WHAT_IS_TIMED",
    "Accuracy",
    "Comparison",
    "Divergence",
    "Evaluation",
    "FlipTrace",
    "FloatIsland",
    "GateResult",
    "Gates",
    "IntegerProof",
    "KernelGroup",
    "Latency",
    "LsbHistogram",
    "OutputParity",
    "Paired",
    "Parity",
    "ParityAccumulator",
    "RunnerSpec",
    "Speedup",
    "TensorDifference",
    "TensorWalk",
    "compare",
    "compare_latency",
    "evaluate",
    "evaluate_gates",
    "first_divergence",
    "fused_codes",
    "image_feeds",
    "layer_quality",
    "machine_info",
    "mcnemar",
    "measure",
    "peak_rss_bytes",
    "prove",
    "walk_fused",
    "walk_tensors",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
