"""Calibration sets, and where they come from."""

from zsq_deploy.calib.calibration_set import CalibrationManifest, CalibrationSet, CalibrationWriter

__all__ = ["CalibrationManifest", "CalibrationSet", "CalibrationWriter"]
