"""A graph of quantizers, made ready for many forward and backward passes: what a quantizer and its inverse do in one pass over memory.

Node by node, QuantizeLinear and DequantizeLinear are six passes over an activation forward and four backward, and the codes of the weights are
turned into values anew at every run. :func:`fused` takes the pairs out of the graph and gives the taps that do their work
(:class:`Rounding`), and computes the weights once. Values are the same bits; gradients are the straight-through ones of
:mod:`zsq_deploy.model.ops.quantize`, without multiplying with the scale and dividing by it again.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zsq_deploy.calib.parts import native
from zsq_deploy.model import Graph, Twin
from zsq_deploy.model.graph import attributes
from zsq_deploy.model.ops.quantize import integer_type
from zsq_deploy.model.ops.registry import Node
from zsq_deploy.model.ops.types import INTEGER_RANGE
from zsq_deploy.quant.loops import compile_loops

__all__ = ["Rounding", "fused", "rounded_twin"]

_SOURCE = r"""
#include <math.h>
#include <stddef.h>

void round_forward(const float *restrict x, float *restrict out, float scale, float zero, float low, float high, float least,
                   ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        float code = rintf((x[i] > least ? x[i] : least) / scale) + zero;
        code = code < low ? low : code;
        code = code > high ? high : code;
        out[i] = (code - zero) * scale;
    }
}

void round_backward(const float *restrict gradient, const float *restrict x, float *restrict out, float scale, float zero,
                    float low, float high, float least, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        float code = rintf(x[i] / scale) + zero;
        out[i] = (code >= low) & (code <= high) & (x[i] > least) ? gradient[i] : 0.0f;
    }
}
"""


@dataclass(frozen=True)
class Rounding:
    """A tensor's way to codes and back: ``(clamp(rint(max(x, least) / scale) + zero, low, high) - zero) * scale``.

    Attributes:
        scale: Distance of two codes.
        zero: The code of 0.
        low: Least code.
        high: Greatest code.
        least: What a rectifier in front leaves at least: 0, or minus infinity without one.
    """

    scale: float
    zero: float
    low: float
    high: float
    least: float = -math.inf

    def __call__(self, x: Tensor) -> Tensor:
        """The values that the codes of `x` stand for; the gradient goes through where nothing is cut off."""
        made: Tensor = _Round.apply(x, self)  # type: ignore[no-untyped-call]
        return made


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rounding) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rule = rule
        out = torch.empty_like(x)
        if _native(x):
            _shared_out("round_forward", (x, out), rule)
            return out
        torch.clamp(x, min=rule.least, out=out)
        code = out.div_(x.new_tensor(rule.scale)).round_().add_(rule.zero).clamp_(rule.low, rule.high)
        return code.sub_(rule.zero).mul_(rule.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        rule: Rounding = ctx.rule
        if _native(x):
            out = torch.empty_like(x)
            same = gradient.stride() == x.stride() and gradient.dtype == x.dtype
            _shared_out("round_backward", (gradient if same else torch.empty_like(x).copy_(gradient), x, out), rule)
            return out, None
        code = torch.div(x, x.new_tensor(rule.scale)).round_().add_(rule.zero)
        return torch.where((code >= rule.low) & (code <= rule.high) & (x > rule.least), gradient, 0.0), None


def _native(x: Tensor) -> bool:
    """Whether the loops can run over the tensor's memory from end to end."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.device.type == "cpu" and x.dtype is torch.float32 and dense and _loops() is not None


@functools.cache
def _loops() -> ctypes.CDLL | None:
    library = compile_loops(_SOURCE, ("-O3", "-fno-math-errno", "-fno-trapping-math"))
    if library is not None:
        pointer, real = ctypes.c_void_p, ctypes.c_float
        library.round_forward.argtypes = [pointer] * 2 + [real] * 5 + [ctypes.c_ssize_t]
        library.round_backward.argtypes = [pointer] * 3 + [real] * 5 + [ctypes.c_ssize_t]
        library.round_forward.restype = library.round_backward.restype = None
    return library


def _shared_out(name: str, tensors: tuple[Tensor, ...], rule: Rounding) -> None:
    """One of the loops over tensors of the same layout; every number is computed by itself, so threads change nothing."""
    function, starts = getattr(_loops(), name), [tensor.data_ptr() for tensor in tensors]

    def call(_thread: int, first: int, count: int) -> None:
        function(
            *(start + 4 * first for start in starts), rule.scale, rule.zero, rule.low, rule.high, rule.least, count
        )

    watch = native.kernels()
    if watch is None:
        call(0, 0, tensors[0].numel())
    else:
        watch.share_out(tensors[0].numel(), call)


def fused(graph: Graph) -> tuple[Graph, dict[str, Rounding], tuple[str, ...]]:
    """Take the pairs of quantizers with one constant scale out of a Q/DQ graph, and name what is computed of constants alone.

    Returns:
        The graph, in which an Identity stands for each pair, and for a Relu that it alone reads; the rounding of each Identity's output; and the values that dequantize constants.
    """
    roundings: dict[str, Rounding] = {}
    pairs: dict[str, tuple[str, Rounding]] = {}  # codes -> what stands for them, and what its rounding is
    fixed: list[str] = []
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear" and (rule := _rounding(graph, node)) is not None:
            source, maker = node.input[0], graph.producer(node.input[0])
            if maker is not None and maker.op_type == "Relu" and _alone(graph, source):
                nodes = [other for other in nodes if other.name != maker.name]
                source, rule = maker.input[0], replace(rule, least=0.0)
            pairs[node.output[0]] = source, rule
            continue
        if node.op_type == "DequantizeLinear":
            if all(graph.constant(name) is not None for name in node.input if name):
                fixed.append(node.output[0])
            elif node.input[0] in pairs:
                (source, rule), result = pairs[node.input[0]], node.output[0]
                nodes.append(onnx.helper.make_node("Identity", [source], [result], name=f"{node.name}::rounded"))
                if source not in roundings:  # a second reader of the codes reads the values of the first
                    roundings[result] = rule
                    pairs[node.input[0]] = result, rule
                continue
        nodes.append(node)
    proto = graph.editable()
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return Graph(proto), roundings, tuple(fixed)


def _alone(graph: Graph, value: str) -> bool:
    """Whether one node reads a value, and nobody else."""
    return len(graph.consumers(value)) == 1 and not graph.is_output(value)


def _rounding(graph: Graph, quantize: onnx.NodeProto) -> Rounding | None:
    """What a quantizer and all readers of its codes do to each number; ``None``: not the same to all, not known yet, or codes are wanted."""
    codes = quantize.output[0]
    readers = graph.consumers(codes)
    if not readers or graph.is_output(codes) or any(reader.op_type != "DequantizeLinear" for reader in readers):
        return None
    found = set()
    for node in (quantize, *readers):
        scale = graph.constant(node.input[1])
        zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
        if scale is None or zero is None or scale.size != 1 or zero.size != 1 or attributes(node).get("block_size", 0):
            return None
        found.add((float(scale.reshape(())), float(zero.reshape(()))))
    kind = integer_type(Node(graph, quantize, torch.float32))
    if len(found) > 1 or kind not in INTEGER_RANGE:
        return None
    low, high = INTEGER_RANGE[kind]
    return Rounding(*found.pop(), low, high)


def rounded_twin(graph: Graph, dtype: torch.dtype, device: torch.device) -> tuple[Twin, Mapping[str, Rounding]]:
    """The twin of a Q/DQ graph, its weights computed, and the taps that round its activations (for ``run(taps=...)``)."""
    lean, roundings, fixed = fused(graph)
    values = Twin(graph, dtype=dtype, device=device).run({}, fetch=fixed) if fixed else {}
    proto = lean.editable()
    kept = [node for node in proto.graph.node if node.output[0] not in values]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    for name, value in values.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.float().cpu().numpy(), name))
    twin = Twin(Graph(proto), dtype=dtype, device=device)
    for (
        name,
        value,
    ) in values.items():  # in the precision asked for, and as convolutions on channels-last maps want them
        four = value.dim() == 4
        twin.parameter_of(name).data = value.contiguous(memory_format=torch.channels_last) if four else value
    return twin, roundings
