"""Reading what a Q/DQ graph says: every quantized tensor with scale, zero point and type, whoever wrote the graph.

Understood are the standard operators of all operator sets (per tensor, per channel, block-wise), those of the ``com.microsoft``
domain, weights stored as integers, weights with their own QuantizeLinear, and integers behind a Cast (4-bit storage).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsq_deploy.model.graph import Graph, attributes

__all__ = ["QuantizedTensor", "dequantized_weight", "is_dequantize", "is_quantize", "read_qdq"]

Array = npt.NDArray[Any]

_DOMAINS = ("", "ai.onnx", "com.microsoft")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One quantized tensor.

    Attributes:
        name: The float tensor: input of QuantizeLinear; for stored integers the initializer's name, without a ``_quantized``
            at its end.
        output: The float tensor with the rounded numbers: output of DequantizeLinear; empty if nobody dequantizes it.
        scale: ``()``, ``[C]``, or one value a block.
        zero_point: int64, shape of the scale.
        dtype: ``uint8``, ``int8``, ``int32``, ``int4``, ...; of stored integers, also where a Cast widens them.
        axis: Channel axis or blocked axis; ``None`` per tensor.
        block: Block length; 0 without blocks.
        is_weight: The numbers are constants of the graph (weights, biases, constant operands).
        quantize: Name of the QuantizeLinear node; ``None`` for stored integers.
        dequantize: Names of the DequantizeLinear nodes.
        codes: Name of the value that holds the integers.
    """

    name: str
    output: str
    scale: Array = field(repr=False)
    zero_point: Array = field(repr=False)
    dtype: str
    axis: int | None
    block: int
    is_weight: bool
    quantize: str | None
    dequantize: tuple[str, ...]
    codes: str

    @property
    def is_bias(self) -> bool:
        """Whether it is stored as 32-bit integers."""
        return self.dtype == "int32"

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code of the type."""
        signed, bits = not self.dtype.startswith("u"), int(self.dtype.lstrip("uint"))
        return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)

    @property
    def low(self) -> float:
        """Smallest representable number."""
        return float(np.min((self.limits[0] - self.zero_point.astype(np.float64)) * self.scale))

    @property
    def high(self) -> float:
        """Largest representable number."""
        return float(np.max((self.limits[1] - self.zero_point.astype(np.float64)) * self.scale))

    def dequantized(self, codes: Array) -> npt.NDArray[np.float32]:
        """float32 numbers of the codes, with this tensor's parameters."""
        offset = codes.astype(np.int64) - self._spread(self.zero_point, codes.shape)
        return np.asarray(
            offset.astype(np.float32) * self._spread(self.scale, codes.shape).astype(np.float32), np.float32
        )

    def _spread(self, parameter: Array, shape: tuple[int, ...]) -> Array:
        if parameter.size == 1 and not self.block:
            return parameter.reshape(())
        assert self.axis is not None
        axis = self.axis % len(shape)
        if self.block:
            return np.repeat(parameter, self.block, axis=axis).take(range(shape[axis]), axis=axis)
        form = [1] * len(shape)
        form[axis] = -1
        return parameter.reshape(form)


def is_quantize(node: onnx.NodeProto) -> bool:
    """Whether a node is QuantizeLinear."""
    return node.op_type == "QuantizeLinear" and node.domain in _DOMAINS


def is_dequantize(node: onnx.NodeProto) -> bool:
    """Whether a node is DequantizeLinear."""
    return node.op_type == "DequantizeLinear" and node.domain in _DOMAINS


def _is_constant(graph: Graph, value: str) -> bool:
    """Whether a value is made of initializers only."""
    while graph.constant(value) is None:
        node = graph.producer(value)
        if node is None or not node.input:
            return False
        if len([name for name in node.input if name]) > 1 and any(
            graph.constant(name) is None and graph.producer(name) is not None for name in node.input[1:] if name
        ):
            return False
        value = node.input[0]
    return True


def _parameters(graph: Graph, node: onnx.NodeProto) -> tuple[Array, Array, str, int | None, int] | None:
    """Scale, zero point, type, axis and block of a Q or DQ node; ``None`` when the scale is computed at run time."""
    scale = graph.constant(node.input[1])
    if scale is None:
        return None
    found: Mapping[str, Any] = attributes(node)
    zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero is not None:
        kind = zero.dtype.name
    elif is_quantize(node):
        declared = int(found.get("output_dtype", 0))
        kind = onnx.helper.tensor_dtype_to_np_dtype(declared).name if declared else "uint8"
    else:
        codes = graph.constant(node.input[0])
        inferred = codes.dtype if codes is not None else graph.dtype(node.input[0])
        kind = inferred.name if inferred is not None else "uint8"
    block = int(found.get("block_size", 0))
    per_tensor = scale.size == 1 and not block
    axis = None if per_tensor else int(found.get("axis", 1))
    scale = scale.reshape(()) if per_tensor else scale
    offset = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64).reshape(scale.shape)
    return scale.astype(np.float32), offset, kind, axis, block


def _stored(graph: Graph, value: str) -> str:
    """The initializer whose integers a Cast widens in front of DequantizeLinear (4-bit storage), or the value itself."""
    maker = graph.producer(value)
    if maker is None or maker.op_type != "Cast":
        return value
    source = graph.constant(maker.input[0])
    return str(maker.input[0]) if source is not None and "int" in source.dtype.name else value


def _stem(name: str) -> str:
    return name.removesuffix("_quantized")


def read_qdq(graph: Graph) -> list[QuantizedTensor]:
    """Every quantized tensor of a Q/DQ graph, in order of execution.

    One entry is one QuantizeLinear with the DequantizeLinear nodes behind it, or one stored integer tensor with its
    DequantizeLinear nodes; nodes whose scale is not a constant are left out.
    """
    found: list[QuantizedTensor] = []
    done: set[str] = set()
    for node in graph.nodes:
        if is_quantize(node):
            readers: Iterable[onnx.NodeProto] = [n for n in graph.consumers(node.output[0]) if is_dequantize(n)]
            name, quantize, codes = node.input[0], node.name, node.output[0]
        elif is_dequantize(node) and node.name not in done:
            maker = graph.producer(node.input[0])
            if maker is not None and is_quantize(maker):
                continue
            readers = [n for n in graph.consumers(node.input[0]) if is_dequantize(n) and n.input[1:] == node.input[1:]]
            stored = _stored(graph, node.input[0])
            name, quantize, codes = _stem(stored), None, stored
        else:
            continue
        parameters = _parameters(graph, node)
        done.update(reader.name for reader in readers)
        if parameters is None:
            continue
        scale, zero, kind, axis, block = parameters
        if quantize is None and codes != node.input[0]:
            narrow = graph.constant(codes)
            assert narrow is not None
            kind = narrow.dtype.name  # what is stored, not what it is widened to
        found.append(
            QuantizedTensor(
                name=name,
                output=next((reader.output[0] for reader in readers), ""),
                scale=scale,
                zero_point=zero,
                dtype=kind,
                axis=axis,
                block=block,
                is_weight=_is_constant(graph, node.input[0]),
                quantize=quantize,
                dequantize=tuple(reader.name for reader in readers),
                codes=codes,
            )
        )
    return found


def dequantized_weight(graph: Graph, value: str) -> npt.NDArray[np.float32] | None:
    """The float numbers of a weight as the Q/DQ graph computes with them; ``None`` when the value is no constant.

    Args:
        graph: A Q/DQ graph.
        value: The weight input of a node: an initializer, or the output of DequantizeLinear.
    """
    plain = graph.constant(value)
    if plain is not None:
        return plain.astype(np.float32)
    node = graph.producer(value)
    if node is None or not is_dequantize(node):
        return None
    parameters = _parameters(graph, node)
    if parameters is None:
        return None
    scale, zero, kind, axis, block = parameters
    tensor = QuantizedTensor(value, value, scale, zero, kind, axis, block, True, None, (node.name,), node.input[0])
    codes = graph.constant(node.input[0])
    if codes is None:
        maker = graph.producer(node.input[0])
        source = graph.constant(maker.input[0]) if maker is not None and len(maker.input) else None
        if maker is None or source is None:
            return None
        if maker.op_type == "Cast":
            codes = source
        elif is_quantize(maker):
            step, offset = tensor._spread(scale, source.shape), tensor._spread(zero, source.shape)
            codes = np.clip(np.rint(source / step) + offset, *tensor.limits).astype(np.int64)
        else:
            return None
    return tensor.dequantized(codes)
