"""Resize of codes: nearest neighbours (moving only)."""

from __future__ import annotations

import numpy as np

from zsq_deploy.backends.onnxruntime.kernels.base import Array, Inputs, Kernel, kernel, need
from zsq_deploy.errors import EngineError

__all__ = ["Resize"]

F32 = np.float32


@kernel("Resize", "Upsample")
class Resize(Kernel):
    """Nearest-neighbour resizing; interpolation is refused, because the runtime's order of rounding is not known.

    Source coordinates are formed in float32, as the runtime forms them.
    """

    arithmetic_kernel = False
    any_type = False

    def _run(self, inputs: Inputs) -> list[Array]:
        node = self.node
        attrs = node.attrs
        x = need(inputs, 0, node)
        mode = str(attrs.get("mode", "nearest"))
        transform = str(attrs.get("coordinate_transformation_mode", "half_pixel"))
        if node.proto.op_type == "Upsample":
            transform = "asymmetric"
        known = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        if mode != "nearest" or transform not in known or attrs.get("antialias", 0):
            raise EngineError(
                f"{node.name} interpolates codes ({mode}, {transform})",
                where=node.proto.name,
                remedy="leave this layer out of quantization, or use nearest-neighbour resizing",
            )
        scales_at = 1 if node.proto.op_type == "Upsample" else 2
        given = inputs[scales_at] if len(inputs) > scales_at else None
        sizes = inputs[3] if len(inputs) > 3 else None
        axes = [int(a) % x.ndim for a in attrs.get("axes", range(x.ndim))]
        rounding = str(attrs.get("nearest_mode", "round_prefer_floor" if scales_at == 2 else "floor"))
        for position, axis in enumerate(axes):
            old = x.shape[axis]
            if sizes is not None and sizes.size:
                new = int(sizes[position])
                scale = F32(new) / F32(old)
            else:
                assert given is not None
                scale = F32(given[position])
                new = int(np.floor(F32(old) * scale))
            if new == old and scale == 1:
                continue
            x = np.take(x, self._sources(old, new, scale, transform, rounding), axis=axis)
        return [np.ascontiguousarray(x)]

    @staticmethod
    def _sources(old: int, new: int, scale: np.float32, transform: str, rounding: str) -> Array:
        out = np.arange(new, dtype=F32)
        if transform == "asymmetric":
            at = out / scale
        elif transform == "align_corners":
            at = np.zeros_like(out) if new == 1 else out * F32(old - 1) / F32(new - 1)
        elif transform == "pytorch_half_pixel" and new == 1:
            at = np.zeros_like(out)
        else:
            at = (out + F32(0.5)) / scale - F32(0.5)
        if rounding == "floor":
            index = np.floor(at)
        elif rounding == "ceil":
            index = np.ceil(at)
        elif rounding == "round_prefer_ceil":
            index = np.floor(at + F32(0.5))
        else:
            index = np.ceil(at - F32(0.5))
        return np.asarray(np.clip(index.astype(np.int64), 0, old - 1))
