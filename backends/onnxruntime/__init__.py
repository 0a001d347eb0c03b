"""Engines for ONNX Runtime's CPU provider: built by its own static quantizer, run by its integer kernels, and proved to be so.

Looking at the targets does not load the runtime; :mod:`zsq_deploy.backends.onnxruntime.backend` does, and offers everything.
"""

from __future__ import annotations

from zsq_deploy.backends.onnxruntime.options import BuildOptions

__all__ = ["BuildOptions"]
