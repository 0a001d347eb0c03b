"""What this runtime offers, under the names that every runtime uses (see :class:`zsq_deploy.backends.Backend`)."""

from __future__ import annotations

import importlib
from typing import Any

from zsq_deploy.backends.openvino.choose import Choice, candidates, choose
from zsq_deploy.backends.openvino.early import check_options
from zsq_deploy.backends.openvino.lint import Finding, lint
from zsq_deploy.backends.openvino.options import CALIBRATORS, QUANTIZERS, BuildOptions, options_from
from zsq_deploy.backends.openvino.quantizer import build, places
from zsq_deploy.backends.openvino.runner import device_facts, float_modes, missing_features, runner
from zsq_deploy.backends.openvino.summary import summarize

__all__ = [
    "CALIBRATORS",
    "QUANTIZERS",
    "BuildOptions",
    "Choice",
    "Finding",
    "build",
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
    """The exact integer reference of an engine; its rules are the same everywhere (see :mod:`zsq_deploy.backends.openvino.integer`)."""
    del on_target
    module = importlib.import_module("zsq_deploy.backends.openvino.integer")
    return module.IntegerReference(engine, threads=threads)
