"""Calibration sets, and where they come from."""

from typing import Any

from zsq_deploy.calib.calibration_set import CalibrationSet
from zsq_deploy.calib.manifest import CalibrationManifest
from zsq_deploy.calib.writer import CalibrationWriter

__all__ = ["METHODS", "CalibrationManifest", "CalibrationSet", "CalibrationWriter", "Method", "synthesize"]


def __getattr__(name: str) -> Any:
    """Synthesis is imported when it is asked for: it imports the modules of this package itself."""
    if name == "synthesize":
        from zsq_deploy.calib.synthesis import synthesize

        return synthesize
    if name in ("METHODS", "Method"):
        from zsq_deploy.calib import methods

        return getattr(methods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
