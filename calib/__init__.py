"""Calibration sets, and where they come from."""
