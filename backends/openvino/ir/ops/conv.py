"""Convolutions and matrix products; a constant that is added to their channels is their bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, translates
from zsq_deploy.backends.openvino.ir.stored import Stored

__all__ = ["BIASED", "bias_of"]

#: Operations that an added constant may belong to.
BIASED = frozenset(
    {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"}
)


def bias_of(op: Op) -> Op | None:
    """The Add behind an operation that only adds its bias."""
    return op.writer.bias_adds.get(op.writer.key(op.node.output(0)))


def _deliver(op: Op, op_type: str, inputs: list[str], attributes: dict[str, Any]) -> None:
    """Write the node, with the bias behind it if there is one; the node then makes the sum."""
    last = bias_of(op)
    if last is None:
        op.emit(op_type, inputs, **attributes)
        return
    like = op.writer.like_node(last.output())
    name = ""
    if like is not None and len(like.input) > 2:
        name = like.input[2]
    side = 1 if op.writer.key(last.source(0)) == op.writer.key(op.node.output(0)) else 0
    bias = last.writer.stored(last.source(side))
    assert bias is not None
    flat = bias.reshaped([int(np.prod(bias.shape))])
    if flat.shape == (1,):
        channels = op.node.get_output_partial_shape(0)[-1 if op.kind == "MatMul" else 1].get_length()
        flat = Stored(np.repeat(flat.read().astype(np.float32), channels), flat.name)
    value = op.writer.write_stored(flat, name or flat.name)
    op.writer.node(op_type, [*inputs, value], [last.output()], last.name, 1, **attributes)


def _weight(op: Op, shape: Sequence[int] | None, order: Sequence[int] | None = None) -> str | None:
    """Write a constant weight in the layout of ONNX, under the name that the float graph has for it."""
    stored = op.writer.stored(op.source(1))
    if stored is None:
        return None
    last = bias_of(op)
    like = op.writer.like_node((last or op).output())
    name = stored.name
    if like is not None and len(like.input) > 1 and op.writer.like is not None:
        known = op.writer.like.constant(like.input[1])
        target = tuple(shape) if shape is not None else stored.shape
        if known is not None and known.size == stored.values.size and (order is None or known.shape == target):
            name = like.input[1]
    key = ("weight", op.writer.key(op.source(1)), tuple(shape or ()), tuple(order or ()))
    if key not in op.writer.written:
        if order is not None:
            stored = stored.transposed(order)
        if shape is not None:
            stored = stored.reshaped(shape)
        whole = shape is None and order is None
        named = op.writer.names[op.writer.key(op.source(1))] if whole else None
        op.writer.written[key] = op.writer.write_stored(stored, name, read_as=named)
    return op.writer.written[key]


def _window(op: Op, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "strides": [int(value) for value in op.attrs["strides"]],
        "dilations": [int(value) for value in op.attrs["dilations"]],
    }
    how = str(op.attrs.get("auto_pad", "explicit")).lower()
    if how in ("same_upper", "same_lower"):
        found["auto_pad"] = how.upper()
    elif how == "valid":
        found["auto_pad"] = "VALID"
    else:
        begin, end = (list(op.attrs.get(name) or [0] * rank) for name in ("pads_begin", "pads_end"))
        found["pads"] = [int(value) for value in (*begin, *end)]
    return found


def _filters(op: Op, grouped: bool, transposed: bool) -> tuple[str, int, list[int]]:
    """The weight in ONNX layout, the number of groups, and the kernel's sizes."""
    shape = op.shape(1)
    if not grouped:
        weight = _weight(op, None) or op.input(1)
        return weight, 1, [int(size) for size in shape[2:] if size is not None]
    if None in shape:
        raise UnsupportedFormError("weights of unknown shape")
    sizes = [int(size) for size in shape if size is not None]
    flat = [sizes[0] * sizes[1], *sizes[2:]]
    written = _weight(op, flat)
    if written is None:
        written = op.step("Reshape", [op.input(1), op.whole("weight_shape", flat)])
    del transposed  # both layouts join their first two axes
    return written, sizes[0], sizes[3:]


@translates("Convolution", "GroupConvolution")
def convolution(op: Op) -> None:
    """Convolution; grouped weights ``[G, O/G, I/G, ...]`` become ``[O, I/G, ...]``."""
    weight, groups, kernel = _filters(op, op.kind.startswith("Group"), False)
    found = _window(op, op.rank(0) - 2)
    if len(kernel) == op.rank(0) - 2:
        found["kernel_shape"] = kernel
    _deliver(op, "Conv", [op.input(0), weight], {**found, "group": groups})


@translates("ConvolutionBackpropData", "GroupConvolutionBackpropData")
def transposed_convolution(op: Op) -> None:
    """Transposed convolution; a given output shape says how much is cut away."""
    weight, groups, kernel = _filters(op, op.kind.startswith("Group"), True)
    rank = op.rank(0) - 2
    found = _window(op, rank)
    extra = [int(value) for value in op.attrs.get("output_padding") or [0] * rank]
    if op.has(2):
        found.pop("auto_pad", None)
        found["pads"], extra = _cut_to(op, op.ints(2), kernel, extra)
    if any(extra):
        found["output_padding"] = extra
    if len(kernel) == rank:
        found["kernel_shape"] = kernel
    _deliver(op, "ConvTranspose", [op.input(0), weight], {**found, "group": groups})


def _cut_to(op: Op, wanted: list[int], kernel: list[int], extra: list[int]) -> tuple[list[int], list[int]]:
    """Pads and output padding of a transposed convolution whose output size is given; OpenVINO worked out the pads in front."""
    sizes = op.shape(0)[2:]
    begin = [int(value) for value in op.attrs["pads_begin"]]
    end, more = [], []
    for axis, size in enumerate(sizes):
        if size is None or not begin:
            raise UnsupportedFormError("a given output shape for an input size that is open")
        stride, dilation = int(op.attrs["strides"][axis]), int(op.attrs["dilations"][axis])
        rest = stride * (size - 1) + (kernel[axis] - 1) * dilation + 1 + extra[axis] - wanted[axis] - begin[axis]
        end.append(max(rest, 0))
        more.append(extra[axis] + max(-rest, 0))
    return [*begin, *end], more


def _swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


@translates("MatMul")
def matmul(op: Op) -> None:
    """Matrix product; as Gemm where a bias belongs to it or the float graph has one there."""
    ranks = op.rank(0), op.rank(1)
    flips = [
        bool(op.attrs.get(name)) and rank > 1 for name, rank in zip(("transpose_a", "transpose_b"), ranks, strict=True)
    ]
    last = bias_of(op)
    like = op.writer.like_node((last or op).output())
    if last is not None or (like is not None and like.op_type == "Gemm" and ranks == (2, 2)):
        _gemm(op, flips, like)
        return
    operands = []
    for index, (rank, flip) in enumerate(zip(ranks, flips, strict=True)):
        value = None
        if index == 1:
            stored = op.writer.stored(op.source(1))
            if stored is not None and flip:
                shape = stored.shape
                value = _weight(op, [*shape[:-2], shape[-1], shape[-2]], _swapped(rank))
            else:
                value = _weight(op, None)
        if value is None:
            value = op.input(index)
            value = op.step("Transpose", [value], perm=_swapped(rank)) if flip else value
        operands.append(value)
    op.emit("MatMul", operands)


def _gemm(op: Op, flips: list[bool], like: Any) -> None:
    stored = op.writer.stored(op.source(1))
    wanted = flips[1]
    if stored is not None and like is not None and like.op_type == "Gemm" and op.writer.like is not None:
        known = op.writer.like.constant(like.input[1])
        from_like = next((bool(a.i) for a in like.attribute if a.name == "transB"), False)
        if known is not None and wanted != from_like and known.shape == stored.shape[::-1]:
            wanted = from_like
    if stored is not None and wanted != flips[1]:
        weight = _weight(op, stored.shape[::-1], [1, 0])
    else:
        weight = _weight(op, None) or op.input(1)
    assert weight is not None
    found = {key: 1 for key, flag in (("transA", flips[0]), ("transB", wanted)) if flag}
    _deliver(op, "Gemm", [op.input(0), weight], found)


@translates("Einsum")
def einsum(op: Op) -> None:
    """Sum of products by an equation."""
    op.emit("Einsum", [op.input(index) for index in range(op.inputs)], equation=str(op.attrs["equation"]))


@translates("ScaledDotProductAttention")
def attention(op: Op) -> None:
    """``softmax(q k' scale + mask) v``: written as matrix products and a Softmax."""
    query, key, value = (op.input(index) for index in range(3))
    width = op.shape(0)[-1]
    if op.has(4):
        scale = op.input(4)
    elif width is not None:
        scale = op.number("scale", np.float32(1.0 / np.sqrt(width)))
    else:
        raise UnsupportedFormError("heads of unknown width")
    rank = op.rank(1)
    flipped = op.step("Transpose", [key], perm=_swapped(rank))
    scores = op.step("MatMul", [op.step("Mul", [query, scale]), flipped])
    if op.attrs.get("causal"):
        rows, columns = op.shape(0)[-2], op.shape(1)[-2]
        if rows is None or columns is None:
            raise UnsupportedFormError("a causal mask of unknown size")
        mask = np.where(np.tril(np.ones((rows, columns), bool)), 0.0, -np.inf)
        scores = op.step("Add", [scores, op.number("mask", mask)])
    elif op.has(3) and not (op.constant(3) is not None and not np.any(op.numbers(3)) and op.type(3) != "boolean"):
        mask_value = op.input(3)
        if op.type(3) == "boolean":
            zero, least = op.number("zero", 0.0), op.number("least", -np.inf)
            mask_value = op.step("Where", [mask_value, zero, least])
        scores = op.step("Add", [scores, mask_value])
    op.emit("MatMul", [op.step("Softmax", [scores], axis=-1), value])
