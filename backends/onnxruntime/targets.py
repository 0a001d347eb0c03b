"""The deployment targets of ONNX Runtime's CPU provider, as values.

What each processor wants (ONNX Runtime's own guidance, confirmed by measurements):

* x86 with VNNI multiplies unsigned activations with signed weights (``vpdpbusd``) and sums in int32: u8 x s8, full range.
* x86 without VNNI sums pairs of products in int16 (``vpmaddubsw``), which saturates when both factors are large. Weights within
  -64..64 cannot saturate: 2 * 255 * 64 = 32,640 < 32,767.
* Arm has signed dot products (``sdot``): s8 x s8.

Activations are asymmetric everywhere, because a rectified activation uses only one side of zero; a symmetric type would waste one of
eight bits on it. Weights are symmetric, because the integer kernels of ONNX Runtime want one zero point (0) for all channels.
"""

from __future__ import annotations

from types import MappingProxyType

from zsq_deploy.backends.base import Target
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["RUNTIME", "TARGETS", "weight_limit"]

RUNTIME = "onnxruntime"

_S8_WEIGHT = Scheme(bits=8, signed=True, symmetric=True, granularity=Granularity.CHANNEL, restricted=True)
_U8_ACTIVATION = Scheme(bits=8, signed=False, symmetric=False)
_S8_ACTIVATION = Scheme(bits=8, signed=True, symmetric=False)

TARGETS: tuple[Target, ...] = (
    Target(
        name="ort-x86-vnni",
        runtime=RUNTIME,
        summary="ONNX Runtime on x86 with AVX512-VNNI or AVX-VNNI: u8 activations, s8 weights per channel",
        activation=_U8_ACTIVATION,
        weight=_S8_WEIGHT,
        opset=17,
        ir_version=8,
        requires=("avx512_vnni|avx_vnni",),
    ),
    Target(
        name="ort-x86-avx2",
        runtime=RUNTIME,
        summary="ONNX Runtime on x86 without VNNI: u8 activations, s8 weights per channel within -64..64",
        activation=_U8_ACTIVATION,
        weight=Scheme(bits=8, signed=True, symmetric=True, granularity=Granularity.CHANNEL, reduced=True),
        opset=17,
        ir_version=8,
        requires=("avx2",),
        notes=(
            "Weights stay within -64..64, because the int16 sums of vpmaddubsw saturate with full-range weights.",
            "The engine computes the same on a machine with VNNI, but its latency there is not that of a machine without it.",
        ),
    ),
    Target(
        name="ort-arm64",
        runtime=RUNTIME,
        summary="ONNX Runtime on 64-bit Arm: s8 activations, s8 weights per channel",
        activation=_S8_ACTIVATION,
        weight=_S8_WEIGHT,
        opset=17,
        ir_version=8,
        # The default on Arm; set so that the same integer kernels run when the engine is checked on another processor.
        session=MappingProxyType({"session.qdqisint8allowed": "1"}),
        requires=("asimd",),
        notes=(
            "On an x86 machine the engine runs in integer kernels as well and can be checked there.",
            "Signed activations are slow on x86: a latency measured there says nothing about Arm.",
        ),
        tie_free_sums=True,  # QLinearAdd on Arm is fixed-point and rounds halves away from zero
    ),
)


def weight_limit(target: Target) -> int:
    """The largest magnitude of a weight code: 127, or 64 with the reduced range (ONNX Runtime's -64..64)."""
    return 64 if target.weight.reduced else 127
