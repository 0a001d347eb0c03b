"""Engines for TensorRT: calibration caches and calibrators (up to version 10), explicit Q/DQ (every version).

Nothing in this folder needs TensorRT until an engine is built on a device: the library is imported inside the functions that use it.
"""
