"""The deployment targets of OpenVINO, as values.

OpenVINO's low-precision transformations want unsigned activations with signed weights (its CPU kernels multiply u8 by s8, and so does
its GPU plugin); NNCF's presets for these devices choose the same. Weights are symmetric per output channel: a zero point of weights
costs a correction term in every product, and the compiler of the NPU refuses it for convolutions.
"""

from __future__ import annotations

from types import MappingProxyType

from zsq_deploy.backends.base import Target
from zsq_deploy.quant.scheme import Granularity, Scheme

__all__ = ["DEVICE", "RUNTIME", "TARGETS"]

RUNTIME = "openvino"

DEVICE = "device"
"""The key of ``Target.session`` that names the device; the other keys are OpenVINO's own properties."""

_WEIGHT = Scheme(bits=8, signed=True, symmetric=True, granularity=Granularity.CHANNEL, restricted=True)
_ACTIVATION = Scheme(bits=8, signed=False, symmetric=False)

_ELSEWHERE = "The engine is built here; it runs, and is measured, only where OpenVINO finds such a device."


def _target(device: str, summary: str, *, requires: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Target:
    return Target(
        name=f"openvino-{device.lower()}",
        runtime=RUNTIME,
        summary=summary,
        activation=_ACTIVATION,
        weight=_WEIGHT,
        opset=21,
        ir_version=10,
        # float32 in what is not quantized: the plugin's default is bfloat16 on some processors and float16 on other devices.
        session=MappingProxyType({DEVICE: device, "INFERENCE_PRECISION_HINT": "f32" if device == "CPU" else "f16"}),
        requires=requires,
        notes=notes,
    )


TARGETS: tuple[Target, ...] = (
    _target(
        "CPU",
        "OpenVINO on x86 CPUs: u8 activations, s8 weights per channel; what stays in float is float32",
        requires=("avx512_vnni|avx_vnni",),
    ),
    _target(
        "GPU",
        "OpenVINO on Intel GPUs: u8 activations, s8 weights per channel; what stays in float is float16",
        notes=(_ELSEWHERE,),
    ),
    _target(
        "NPU",
        "OpenVINO on Intel NPUs: u8 activations, s8 weights per channel; what stays in float is float16, shapes are static",
        notes=(_ELSEWHERE, "The NPU's compiler wants static shapes: the engine's batch is fixed to 1."),
    ),
)
