"""Engines for OpenVINO: from our Q/DQ graph, from NNCF or from POT; run by its int8 kernels, and proved to be so.

Looking at the targets does not load the runtime; :mod:`zsq_deploy.backends.openvino.backend` does, and offers everything.
"""

from __future__ import annotations

from zsq_deploy.backends.openvino.options import BuildOptions, NncfOptions, PotOptions
from zsq_deploy.backends.openvino.quiet import forbid_telemetry

__all__ = ["BuildOptions", "NncfOptions", "PotOptions"]

forbid_telemetry()  # before any module of this folder imports OpenVINO or NNCF
