"""What this runtime offers, under the names that every runtime uses (see :class:`zsq_deploy.backends.Backend`).

It builds: a Q/DQ graph by NVIDIA's rules, checked, in a folder with scripts for the device. Where TensorRT and a GPU are, it also makes the
engine of it (:func:`prepare`), runs and measures it; elsewhere :func:`check_runs` says what to do instead.
"""

from __future__ import annotations

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.measured import Choice
from zsq_deploy.backends.tensorrt.bundle import Bundle, write_bundle
from zsq_deploy.backends.tensorrt.fusion import describe_fusion, expect_fusion
from zsq_deploy.backends.tensorrt.lint import Finding, lint
from zsq_deploy.backends.tensorrt.options import CALIBRATORS, QUANTIZERS, BuildOptions, options_from
from zsq_deploy.backends.tensorrt.quantizer import build, candidates, choose
from zsq_deploy.backends.tensorrt.runner import (
    check_runs,
    device_facts,
    float_modes,
    integer_reference,
    missing_features,
    prepare,
    runner,
)
from zsq_deploy.model.graph import Graph

__all__ = [
    "CALIBRATORS",
    "MEASURED_ELSEWHERE",
    "QUANTIZERS",
    "BuildOptions",
    "Bundle",
    "Choice",
    "Finding",
    "build",
    "candidates",
    "check_options",
    "check_runs",
    "choose",
    "describe_fusion",
    "device_facts",
    "expect_fusion",
    "float_modes",
    "integer_reference",
    "lint",
    "missing_features",
    "options_from",
    "prepare",
    "runner",
    "write_bundle",
]


MEASURED_ELSEWHERE = "the folder for the device is made here (zsq quantize); its scripts build and time the engine there, and compare it with the reference"
"""What ``zsq doctor`` says where engines cannot be run."""


def check_options(graph: Graph, target: Target, options: BuildOptions) -> None:
    """Nothing more can be refused before images are made: what does not fit a target is refused with the options."""
    del graph, target, options
