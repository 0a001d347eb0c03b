"""The engine against its references: parity, accuracy, integer proof, latency.

Nothing here knows a runtime: what is judged comes in as numpy arrays, as callables, or as the name of a factory.
"""

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
    "image_feeds",
    "layer_quality",
    "machine_info",
    "mcnemar",
    "measure",
    "peak_rss_bytes",
    "prove",
    "walk_tensors",
]
