"""The exact accumulators of convolutions and products: which codes are multiplied, and the sums of the products."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.lowered import Op
from zsq_deploy.quant.integer import accumulate_conv, accumulate_conv_transpose, accumulate_matmul

__all__ = ["CONTRACTIONS", "FULLY_CONNECTED", "accumulate", "channel_axis", "channels"]

Array = npt.NDArray[Any]

FULLY_CONNECTED = (
    "FullyConnected",
    "FullyConnectedQuantized",
    "FullyConnectedQuantizedLegacy",
    "FullyConnectedCompressed",
)
CONTRACTIONS = (
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "MatMul",
    *FULLY_CONNECTED,
)


def _attributes(op: Op, group: int) -> dict[str, Any]:
    mode = op.attrs.get("auto_pad", "explicit").lower()
    attrs: dict[str, Any] = {
        "strides": list(op.ints("strides")),
        "dilations": list(op.ints("dilations")),
        "group": group,
    }
    if mode == "explicit" or mode == "notset":
        attrs["pads"] = [*op.ints("pads_begin"), *op.ints("pads_end")]
    else:
        attrs["auto_pad"] = {"same_upper": "SAME_UPPER", "same_lower": "SAME_LOWER", "valid": "VALID"}[mode]
    return attrs


def accumulate(op: Op, x: Array, w: Array) -> Array:
    """The int64 accumulator of an operator.

    Args:
        op: One of :data:`CONTRACTIONS`.
        x: Integers of the activation, zero point taken off.
        w: Integers of the second operand, zero point taken off, in the layout of the operator.
    """
    if op.type == "Convolution":
        return accumulate_conv(x, 0, w, 0, _attributes(op, 1))
    if op.type == "GroupConvolution":
        return accumulate_conv(x, 0, w.reshape(-1, *w.shape[2:]), 0, _attributes(op, w.shape[0]))
    if op.type in ("ConvolutionBackpropData", "GroupConvolutionBackpropData"):
        group = w.shape[0] if op.type.startswith("Group") else 1
        attrs = _attributes(op, group)
        attrs["output_padding"] = list(op.ints("output_padding")) or [0] * (x.ndim - 2)
        return accumulate_conv_transpose(x, 0, w.reshape(-1, *w.shape[2:]) if group > 1 else w, 0, attrs)
    if op.type in FULLY_CONNECTED:
        return accumulate_matmul(x, 0, np.swapaxes(w, -1, -2), 0)
    a = np.swapaxes(x, -1, -2) if op.flag("transpose_a") else x
    b = np.swapaxes(w, -1, -2) if op.flag("transpose_b") else w
    return accumulate_matmul(a, 0, b, 0)


def channel_axis(op: Op, rank: int) -> int:
    """The axis of an operator's result along which scales and biases run."""
    return 1 if "Convolution" in op.type else rank - 1


def channels(op: Op, w: Array) -> int:
    """How many output channels an operator has."""
    if op.type == "Convolution":
        return int(w.shape[0])
    if op.type == "GroupConvolution":
        return int(w.shape[0] * w.shape[1])
    if op.type == "ConvolutionBackpropData":
        return int(w.shape[1])
    if op.type == "GroupConvolutionBackpropData":
        return int(w.shape[0] * w.shape[2])
    if op.type in FULLY_CONNECTED:
        return int(w.shape[-2])
    return int(w.shape[-2] if op.flag("transpose_b") else w.shape[-1])
