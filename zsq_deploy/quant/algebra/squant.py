"""SQuant: rounding of weights by flips, so that rounding errors cancel in every kernel and every output channel.

Round-to-nearest makes every single error small, but the errors of a channel add up, and inputs with a mean (behind Relu all have one) turn
their sum into a shift of the output. SQuant (Guo et al. 2022, *SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian
Approximation*, arXiv:2202.07471, sections 3.2 and 3.3, algorithms 1 to 4) starts from round-to-nearest and moves single codes by one step:

1. in every kernel (one output channel, one input channel) as many as bring its sum of errors within half a step, those first whose
   fraction is nearest to one half;
2. then, over all kernels of an output channel, at most one more in each kernel, until the channel's sum is within half a step, those kernels
   first whose own sum gains most.

No error reaches a whole step and no code leaves the grid. After the second pass a kernel's sum may lie between half a step and one
step, where the channel needed it. Among all ways to round up or down, the result is the best in the order: sum of the channel, squares
of the sums of the kernels, squares of the errors (up to ties).

It needs neither data nor gradients, and works on the scales that are there. Kernels of one element (1x1 convolutions, matrix products)
have the second pass only.

Deviation from the released code: a kernel whose sum rounds to zero flips has no candidate there (an index of -1); here it takes
part in the second pass with its first useful element. Codes that the grid clips count with their whole error, and never flip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.errors import UsageError
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.algebra.weights import LAYERS, form_for
from zsq_deploy.quant.reader import QuantizedTensor, is_quantize, read_qdq

__all__ = ["flip", "float_weights_of", "recoded", "squant"]

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


def flip(steps: Doubles, low: int, high: int) -> Codes:
    """Codes whose rounding errors cancel.

    Args:
        steps: Weights in steps, ``w / scale + zero_point``: ``[outputs, kernels, elements]``.
        low: Smallest code of the grid.
        high: Largest code.

    Returns:
        Codes ``[outputs, kernels, elements]`` within ``low .. high``, each less than a step from its weight (unless the grid clips it).
    """
    codes = np.clip(np.rint(steps), low, high).astype(np.int64)
    error = codes - steps
    outputs, kernels, elements = steps.shape
    # In every kernel.
    total = error.sum(axis=2)
    wanted = np.rint(np.abs(total)).astype(np.int64)
    # An error of the sum's sign shrinks the sum when its code moves the other way, and stays below one step.
    sign = np.sign(total)[:, :, None]
    useful = _may_move(codes, error, sign, low, high)
    gain = np.where(useful, np.abs(error), -1.0)
    order = np.argsort(-gain, axis=2, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(elements), order.shape), axis=2)
    available = useful.sum(axis=2)
    count = np.minimum(wanted, available)
    first = rank < count[:, :, None]
    codes -= (first * sign).astype(np.int64)
    # One candidate in every kernel for the whole channel: the last one flipped where the sum went past zero, else the next.
    left = (codes - steps).sum(axis=2)
    past = (np.sign(left) == -np.sign(total)) & (count > 0)
    place = np.where(past, count - 1, count)
    exists = (left != 0) & (past | (count < available))
    index = np.take_along_axis(order, np.minimum(place, elements - 1)[:, :, None], axis=2)[:, :, 0]
    # Over every channel.
    total = left.sum(axis=1)
    sign = np.sign(total)[:, None]
    useful = exists & (np.sign(left) == sign) & (sign != 0)
    gain = np.where(useful, np.abs(left), -1.0)
    order = np.argsort(-gain, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(kernels), order.shape), axis=1)
    count = np.minimum(np.rint(np.abs(total)).astype(np.int64), useful.sum(axis=1))
    chosen = rank < count[:, None]
    move = np.where(chosen, -sign, 0.0).astype(np.int64)
    rows, columns = np.indices((outputs, kernels))
    codes[rows, columns, index] += move
    return codes


def _may_move(codes: Codes, error: Doubles, sign: Doubles, low: int, high: int) -> npt.NDArray[np.bool_]:
    """Which codes may move against the sign of their sum."""
    inside = np.where(sign > 0, codes > low, codes < high)
    found: npt.NDArray[np.bool_] = (np.sign(error) == sign) & (sign != 0) & inside & (np.abs(error) < 1.0)
    return found


def float_weights_of(graph: Graph) -> dict[str, Array]:
    """Layer name -> its float weight, of all layers of a float graph with a constant weight."""
    found: dict[str, Array] = {}
    for node in graph.nodes:
        if node.op_type in LAYERS and node.domain in ("", "ai.onnx") and len(node.input) > 1:
            weight = graph.constant(node.input[1])
            if weight is not None:
                found[node.name] = weight
    return found


def squant(
    qdq: Graph, floats: Graph | Mapping[str, Array], *, grids: Mapping[str, tuple[int, int]] | None = None
) -> Graph:
    """A Q/DQ graph with the weights of its layers rounded by SQuant; scales, zero points, biases and activations stay.

    Args:
        qdq: Any Q/DQ graph: weights as integers behind DequantizeLinear (4-bit ones also behind Cast), or as floats behind QuantizeLinear
            and DequantizeLinear.
        floats: The float graph that it was made from, or layer name -> float weight in the stored shape.
        grids: Layer name -> smallest and largest code that may be used, for codes of few bits in wider integers; otherwise it is taken from the
            outermost codes that the weight has.

    Returns:
        The graph with other codes. Weights with several readers, with blocks, or with scales along another axis than the output channels
        stay as they are, and so do layers that `floats` does not know.

    Raises:
        UsageError: The float weight of a layer has another shape than its codes.
    """

    def choose(node: onnx.NodeProto, steps: Doubles, low: int, high: int) -> Codes:
        del node
        return flip(steps.reshape(-1, *steps.shape[2:]), low, high).reshape(steps.shape)

    return recoded(qdq, floats, choose, grids=grids)


def recoded(
    qdq: Graph,
    floats: Graph | Mapping[str, Array],
    choose: Callable[[onnx.NodeProto, Doubles, int, int], Codes | None],
    *,
    grids: Mapping[str, tuple[int, int]] | None = None,
) -> Graph:
    """A Q/DQ graph with other codes for the weights of its layers; scales, zero points, biases and activations stay.

    Args:
        qdq: As :func:`squant` takes it.
        floats: As :func:`squant` takes it.
        choose: Layer, weights in steps ``[groups, outputs / groups, inputs / groups, elements]``, smallest and largest code -> codes of that
            shape, or ``None`` to leave the layer alone.
        grids: As :func:`squant` takes it.

    Raises:
        UsageError: The float weight of a layer has another shape than its codes.
    """
    given = float_weights_of(floats) if isinstance(floats, Graph) else floats
    tensors = {name: tensor for tensor in read_qdq(qdq) if tensor.is_weight for name in _outputs(qdq, tensor)}
    net = Net(qdq.proto)
    for node in qdq.nodes:
        if node.op_type not in LAYERS or node.domain not in ("", "ai.onnx") or node.name not in given:
            continue
        tensor = tensors.get(node.input[1])
        if tensor is None or len(qdq.consumers(node.input[1])) != 1:
            continue
        weight = np.asarray(given[node.name], np.float64)
        _round(net, qdq, node, tensor, weight, (grids or {}).get(node.name), choose)
    return Graph(net.proto())


def _outputs(qdq: Graph, tensor: QuantizedTensor) -> list[str]:
    return [str(qdq.node(name).output[0]) for name in tensor.dequantize]


def _round(
    net: Net,
    qdq: Graph,
    node: onnx.NodeProto,
    tensor: QuantizedTensor,
    weight: Doubles,
    grid: tuple[int, int] | None,
    choose: Callable[[onnx.NodeProto, Doubles, int, int], Codes | None],
) -> None:
    name = _stored(qdq, tensor)
    stored = None if name is None else qdq.constant(name)
    if name is None or stored is None or tensor.block or len(qdq.consumers(name)) != 1:
        return
    form = form_for(node, stored.shape)
    if form is None:
        return
    if weight.shape != stored.shape:
        raise UsageError(
            f"the float weight has shape {weight.shape}, the quantized one {stored.shape}",
            where=node.name,
            remedy="give the float graph that this Q/DQ graph was made from",
        )
    axis = tensor.axis
    grouped = form.op == "ConvTranspose" and form.groups > 1
    if tensor.scale.size > 1 and (grouped or axis is None or axis % stored.ndim != form.output_axis):
        return
    scale, zero = (np.broadcast_to(p, stored.shape) for p in _spread(tensor, stored.ndim))
    old = stored.astype(np.int64) if stored.dtype.kind != "f" else _nearest(stored, scale, zero, tensor.limits)
    low, high = _grid(old, tensor) if grid is None else grid
    steps = weight / scale + zero
    chosen = choose(node, form.read(steps), low, high)
    if chosen is None:
        return
    codes = form.write(chosen).astype(np.int64)
    if stored.dtype.kind == "f":
        new: Array = np.asarray((codes - zero).astype(np.float32) * scale.astype(np.float32), stored.dtype)
    else:
        new = codes.astype(np.int32).astype(stored.dtype)
    net.add_constant(name, new, exact=True)


def _spread(tensor: QuantizedTensor, rank: int) -> tuple[Doubles, Doubles]:
    form = [1] * rank
    if tensor.scale.size > 1:
        assert tensor.axis is not None
        form[tensor.axis % rank] = -1
    return tensor.scale.astype(np.float64).reshape(form), tensor.zero_point.astype(np.float64).reshape(form)


def _nearest(stored: Array, scale: Doubles, zero: Doubles, limits: tuple[int, int]) -> Codes:
    return np.clip(np.rint(stored.astype(np.float64) / scale) + zero, *limits).astype(np.int64)


def _grid(codes: Codes, tensor: QuantizedTensor) -> tuple[int, int]:
    """The codes that may be used: those between the outermost that the weight has, so no restricted or narrow grid is left."""
    low, high = int(codes.min()), int(codes.max())
    if not tensor.dtype.startswith("u") and not np.any(tensor.zero_point):
        largest = min(max(-low, high), tensor.limits[1])
        return min(low, -largest), max(high, largest)
    return low, high


def _stored(qdq: Graph, tensor: QuantizedTensor) -> str | None:
    """The initializer behind a quantized weight."""
    name = tensor.codes
    while qdq.constant(name) is None:
        maker = qdq.producer(name)
        if maker is None or not (is_quantize(maker) or maker.op_type == "Cast"):
            return None
        name = str(maker.input[0])
    return name if name in qdq.initializer_names else None
