"""What this runtime offers, under the names that every runtime uses (see :class:`zsq_deploy.backends.Backend`)."""

from __future__ import annotations

import importlib
from typing import Any

from zsq_deploy.backends.onnxruntime.calibrators import calibrate
from zsq_deploy.backends.onnxruntime.choose import Choice, candidates, choose
from zsq_deploy.backends.onnxruntime.lint import Finding, lint
from zsq_deploy.backends.onnxruntime.options import CALIBRATORS, QUANTIZERS, BuildOptions, check_options, options_from
from zsq_deploy.backends.onnxruntime.quantizer import build, places
from zsq_deploy.backends.onnxruntime.runner import device_facts, float_modes, missing_features, runner
from zsq_deploy.backends.onnxruntime.summary import summarize
from zsq_deploy.errors import UnsupportedOpError

__all__ = [
    "CALIBRATORS",
    "QUANTIZERS",
    "BuildOptions",
    "Choice",
    "Finding",
    "build",
    "calibrate",
    "candidates",
    "check_options",
    "choose",
    "device_facts",
    "float_modes",
    "integer_reference",
    "lint",
    "missing_features",
    "options_from",
    "places",
    "runner",
    "summarize",
]


def integer_reference(engine: Any, *, threads: int = 1, on_target: bool = False) -> Any:
    """The exact integer reference of an engine, by the rules of this machine's processor or of the target's.

    See :mod:`zsq_deploy.backends.onnxruntime.integer`.
    """
    if str(engine.choices.get("bits", "")).lower().endswith("a32"):
        raise UnsupportedOpError(
            "only weights are stored as integers: arithmetic is float32, and there are no integers to compare",
            where=str(engine.path),
            remedy="compare with the fake-quant reference",
        )
    module = importlib.import_module("zsq_deploy.backends.onnxruntime.integer")
    arithmetic = module.arithmetic_on(engine.target) if on_target else None
    return module.IntegerReference(engine, threads=threads, arithmetic=arithmetic)
