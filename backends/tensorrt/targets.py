"""The deployment targets of TensorRT, as values: one for each generation of the library that devices have.

All of them take signed 8-bit numbers without a zero point: activations per tensor, weights per output channel. TensorRT 8 and 10 also
know implicit quantization (calibrators and their caches); TensorRT 11 knows explicit Q/DQ only, and takes types as the graph says them.
"""

from __future__ import annotations

from types import MappingProxyType

from zsq_deploy.backends.base import Target
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["ACTIVATION", "NEWEST_OPSET", "RUNTIME", "TARGETS", "WEIGHT", "generation"]

RUNTIME = "tensorrt"

ACTIVATION = Scheme(bits=8, signed=True, symmetric=True)
"""TensorRT's INT8 activations: -128..127, no zero point."""

WEIGHT = Scheme(bits=8, signed=True, symmetric=True, granularity=Granularity.CHANNEL, restricted=True)
"""TensorRT's INT8 weights: -127..127, no zero point."""

NEWEST_OPSET = MappingProxyType({8: 17, 10: 24, 11: 24})
"""Generation -> newest operator set that its parser reads: those of 8.6, 10.15 and 11.2 (`operators.md` of onnx-tensorrt). Older releases of
a generation read less, so the graphs written here stay at the operator set of the network (13 or later; 21 for 4-bit weights)."""

_GENERATION = "generation"
_ON_DEVICE = (
    "The Q/DQ graph and the scripts are made anywhere; the engine is built, run and measured on the device itself, because it fits one "
    "GPU and one version of TensorRT: by zsq deploy where it finds both, else by the folder's scripts."
)


def _target(number: int, summary: str, opset: int, ir_version: int, *notes: str) -> Target:
    return Target(
        name=f"tensorrt-{number}",
        runtime=RUNTIME,
        summary=summary,
        activation=ACTIVATION,
        weight=WEIGHT,
        opset=opset,
        ir_version=ir_version,
        session=MappingProxyType({_GENERATION: str(number)}),
        requires=(f"TensorRT {number}",),
        notes=(*notes, _ON_DEVICE),
    )


def generation(target: Target) -> int:
    """8, 10 or 11: the major version of TensorRT that a target is for."""
    return int(target.session[_GENERATION])


TARGETS: tuple[Target, ...] = (
    _target(
        8,
        "TensorRT 8: s8 activations, s8 weights per channel; explicit Q/DQ, or a calibration cache",
        13,
        8,
        "Jetson: JetPack 5.1 has TensorRT 8.5 (Xavier, Orin), JetPack 6.0 has 8.6 (Orin).",
        "Its parser takes no 8-bit constants, so weights are stored as float numbers on the grid and the file is four times as large.",
        "The DLA cores of Xavier and Orin take no Q/DQ graph: give them the float network and a calibration cache.",
    ),
    _target(
        10,
        "TensorRT 10: s8 activations, s8 weights per channel; explicit Q/DQ, or a calibration cache",
        17,
        9,
        "Jetson: JetPack 6.1 and 6.2 have TensorRT 10.3 (Orin), JetPack 7.0 has 10.13 (Thor).",
        "Calibrators and caches are deprecated since 10.1, and still work in all of 10.",
    ),
    _target(
        11,
        "TensorRT 11: s8 activations, s8 weights per channel; explicit Q/DQ only, strongly typed",
        17,
        9,
        "Jetson: 11.4.1 runs on JetPack 7.2.2 and later (AGX Orin, Thor); JetPack 5 and 6 stay on TensorRT 8 and 10.",
        "Layers outside of Q/DQ pairs are computed in the type of the graph, float32: nothing turns them into float16 on the way.",
    ),
)
