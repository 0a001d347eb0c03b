"""What this runtime offers, under the names that every runtime uses (see :class:`zsq_deploy.backends.Backend`)."""

from __future__ import annotations

import importlib
from typing import Any

from zsq_deploy.backends.openvino.options import CALIBRATORS, QUANTIZERS, BuildOptions, options_from

__all__ = ["CALIBRATORS", "QUANTIZERS", "BuildOptions", "integer_reference", "options_from"]


def integer_reference(engine: Any, *, threads: int = 1) -> Any:
    """The exact integer reference of an engine (see :mod:`zsq_deploy.backends.openvino.integer`)."""
    module = importlib.import_module("zsq_deploy.backends.openvino.integer")
    return module.IntegerReference(engine, threads=threads)
