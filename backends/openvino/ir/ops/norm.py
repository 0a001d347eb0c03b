"""Normalization."""

from __future__ import annotations

import numpy as np

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, translates

__all__: list[str] = []


@translates("BatchNormInference")
def batch_norm(op: Op) -> None:
    """Per-channel normalization with stored statistics."""
    order = (2, 0, 1, 3, 4) if op.version == "opset1" else (0, 1, 2, 3, 4)
    op.emit(
        "BatchNormalization",
        [op.input(index) for index in order],
        epsilon=float(op.attrs.get("epsilon", op.attrs.get("eps", 1e-5))),
    )


@translates("MVN")
def mean_variance(op: Op) -> None:
    """``(x - mean) / sqrt(var + eps)``; over the last axes as LayerNormalization without scale."""
    rank = op.rank(0)
    if op.has(1):
        axes = sorted(axis % rank for axis in op.ints(1))
    else:
        across = bool(op.attrs.get("across_channels", False))
        axes = list(range(1 if across else 2, rank))
    epsilon = float(op.attrs.get("eps", 1e-9))
    inside = str(op.attrs.get("eps_mode", "inside_sqrt")).lower() == "inside_sqrt" and op.version != "opset2"
    variance = bool(op.attrs.get("normalize_variance", True))
    shape = op.shape(0)
    tail = [shape[axis] for axis in axes]
    known = [size for size in tail if size is not None]
    if variance and inside and axes == list(range(rank - len(axes), rank)) and len(known) == len(tail):
        ones = op.number("scale", np.ones(known))
        op.emit("LayerNormalization", [op.input(0), ones], axis=axes[0] - rank, epsilon=epsilon)
        return
    along = op.whole("axes", axes)
    value = op.input(0)
    mean = op.step("ReduceMean", [value, along], keepdims=1)
    if not variance:
        op.emit("Sub", [value, mean])
        return
    centred = op.step("Sub", [value, mean])
    spread = op.step("ReduceMean", [op.step("Mul", [centred, centred]), along], keepdims=1)
    small = op.number("epsilon", epsilon)
    if inside:
        length = op.step("Sqrt", [op.step("Add", [spread, small])])
    else:
        length = op.step("Add", [op.step("Sqrt", [spread]), small])
    op.emit("Div", [centred, length])


@translates("NormalizeL2")
def normalize_l2(op: Op) -> None:
    """``x / sqrt(sum(x^2) + eps)``, or with the larger of the two."""
    value = op.input(0)
    axes = op.constant(1)
    if axes is not None and not axes.size:
        total = op.step("Mul", [value, value])
    else:
        total = op.step("ReduceSumSquare", [value, op.input_as(1, "i64")], keepdims=1)
    small = op.number("epsilon", float(op.attrs.get("eps", 0.0)))
    how = "Max" if str(op.attrs.get("eps_mode", "add")).lower() == "max" else "Add"
    op.emit("Div", [value, op.step("Sqrt", [op.step(how, [total, small])])])


@translates("LRN")
def local_response(op: Op) -> None:
    """Division by a power of the squared sum over neighbouring channels."""
    if [axis % op.rank(0) for axis in op.ints(1)] != [1]:
        raise UnsupportedFormError("neighbours that are not channels")
    found = {name: float(op.attrs[name]) for name in ("alpha", "beta", "bias")}
    op.emit("LRN", [op.input(0)], size=int(op.attrs["size"]), **found)


@translates("GroupNormalization")
def group_norm(op: Op) -> None:
    """Normalization over groups of channels; scale and bias per channel."""
    op.emit(
        "GroupNormalization",
        [op.input(index) for index in range(3)],
        num_groups=int(op.attrs["num_groups"]),
        epsilon=float(op.attrs["epsilon"]),
    )


@translates("RMS", "RMSNorm")
def rms_norm(op: Op) -> None:
    """``x / sqrt(mean(x^2) + eps)`` over given axes, times a scale."""
    value = op.input(0)
    axes = op.input_as(1, "i64") if op.kind == "RMSNorm" else op.whole("axes", [-1])
    total = op.step("ReduceMean", [op.step("Mul", [value, value]), axes], keepdims=1)
    length = op.step("Sqrt", [op.step("Add", [total, op.number("epsilon", float(op.attrs["epsilon"]))])])
    place = 2 if op.kind == "RMSNorm" else 1
    if op.has(place):
        op.emit("Mul", [op.step("Div", [value, length]), op.input(place)])
    else:
        op.emit("Div", [value, length])
