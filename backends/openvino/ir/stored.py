"""Constants of an IR with what is done to them before they are used: conversion, rescaling, rounding, reshaping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from zsq_deploy.backends.openvino.ir.registry import UnsupportedFormError
from zsq_deploy.backends.openvino.ir.rounding import Rounding

__all__ = ["Layout", "Stored", "constant_array", "layout"]

Array = npt.NDArray[Any]

_PACKED = {"i4": np.int8, "u4": np.uint8}


def constant_array(node: ov.Node) -> tuple[Array, str]:
    """Numbers of a Constant, with the name of their element type; 4-bit integers come unpacked.

    Raises:
        UnsupportedFormError: numpy has no such type.
    """
    kind = str(node.get_element_type().get_type_name())
    shape = [int(size) for size in node.get_output_shape(0)]
    try:
        if kind in _PACKED:
            packed = np.asarray(node.get_data() if hasattr(node, "get_data") else node.data)
            if packed.size == int(np.prod(shape)) and list(packed.shape) == shape:
                return packed.astype(_PACKED[kind]), kind
            return _unpacked(packed, kind, shape), kind
        if kind == "bf16":
            return np.asarray(node.get_data(dtype=np.float32)).reshape(shape), kind
        return np.array(node.data).reshape(shape), kind
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedFormError(f"a constant of element type {kind}") from error


def _unpacked(packed: Array, kind: str, shape: Sequence[int]) -> Array:
    """Two integers a byte, the first one in the low half (``openvino.helpers.unpack_data`` gives them in the other order)."""
    octets = packed.reshape(-1).view(np.uint8)
    pairs = np.stack([octets & 15, octets >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))]
    if kind == "i4":
        return np.asarray((pairs ^ 8).astype(np.int8) - np.int8(8)).reshape(shape)
    return pairs.reshape(shape)


@dataclass(frozen=True, eq=False)
class Layout:
    """Scale and zero point in the form that DequantizeLinear takes.

    Attributes:
        axis: Channel axis, or the axis that is cut into blocks; ``None`` for one scale.
        block: Block length; 0 without blocks.
        scale: ``()``, ``[C]``, or the shape of the tensor with the blocked axis shortened.
        zero: Shape of the scale.
    """

    axis: int | None
    block: int
    scale: Array = field(repr=False)
    zero: Array = field(repr=False)


def _varying(parameters: Sequence[Array], rank: int) -> list[int]:
    return [
        axis
        for axis in range(rank)
        if any(array.shape[axis] > 1 and (array != array.take([0], axis)).any() for array in parameters)
    ]


def layout(scale: Array, zero: Array, shape: Sequence[int]) -> Layout | None:
    """How DequantizeLinear says these parameters; ``None`` when it cannot.

    Args:
        scale: Broadcasts against `shape`.
        zero: The same.
        shape: Shape of the tensor.
    """
    rank = len(shape)
    if scale.size == 1 and zero.size == 1:
        return Layout(None, 0, scale.reshape(()), zero.reshape(()))
    scale, zero = (a.reshape((1,) * (rank - a.ndim) + a.shape) for a in (scale, zero))
    wide = np.broadcast_shapes(scale.shape, zero.shape)
    scale, zero = np.broadcast_to(scale, wide), np.broadcast_to(zero, wide)
    axes = [axis for axis in range(rank) if wide[axis] > 1]
    if len(axes) > 1:
        # a size above one does not mean that the numbers vary: what was reshaped comes in full size
        axes = _varying((scale, zero), rank) or axes[:1]
    if len(axes) <= 1:
        axis = axes[0] if axes else 0
        index = tuple(slice(None) if a == axis else 0 for a in range(rank))
        whole = (shape[axis],)
        return Layout(axis, 0, np.broadcast_to(scale[index], whole), np.broadcast_to(zero[index], whole))
    full_scale, full_zero = np.broadcast_to(scale, shape), np.broadcast_to(zero, shape)
    for axis in reversed(axes):
        block = _block(full_scale, full_zero, axis)
        if block > 1:
            places = np.arange(0, shape[axis], block)
            return Layout(axis, block, full_scale.take(places, axis), full_zero.take(places, axis))
    return None


def _block(scale: Array, zero: Array, axis: int) -> int:
    """Length of the equal runs along an axis; 1 when there are none."""
    changes = np.zeros(scale.shape[axis] - 1, bool)
    others = tuple(a for a in range(scale.ndim) if a != axis)
    for array in (scale, zero):
        changes |= (np.diff(array, axis=axis) != 0).any(axis=others)
    places = np.flatnonzero(changes) + 1
    if not len(places):
        return int(scale.shape[axis])
    return int(np.gcd.reduce(np.append(places, scale.shape[axis])))


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant as a node reads it.

    Attributes:
        values: The numbers as they are stored: floats, or integer codes.
        name: What the constant is called in the IR (may be a made-up name).
        rounding: How the stored numbers become those that are read; ``None``: they are read as they are.
        codes: With a rounding: `values` are codes already; otherwise they are floats that are still to be rounded.
    """

    values: Array = field(repr=False)
    name: str
    rounding: Rounding | None = None
    codes: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as it is read."""
        return tuple(int(size) for size in self.values.shape)

    def _moved(self, values: Array, parameters: tuple[Array, Array] | None) -> Stored:
        if self.rounding is None or parameters is None:
            return replace(self, values=values)
        return replace(self, values=values, rounding=replace(self.rounding, scale=parameters[0], zero=parameters[1]))

    def _full(self) -> tuple[Array, Array] | None:
        if self.rounding is None:
            return None
        if self.rounding.scale.size == 1:
            return None  # one for all: moving elements does not touch it
        shape = self.values.shape
        return np.broadcast_to(self.rounding.scale, shape), np.broadcast_to(self.rounding.zero, shape)

    def reshaped(self, shape: Sequence[int]) -> Stored:
        """In another shape."""
        full = self._full()
        moved = None if full is None else (full[0].reshape(shape), full[1].reshape(shape))
        if full is None and self.rounding is not None:
            moved = (self.rounding.scale.reshape(()), self.rounding.zero.reshape(()))
        return self._moved(self.values.reshape(shape), moved)

    def transposed(self, order: Sequence[int]) -> Stored:
        """With axes in another order."""
        full = self._full()
        moved = None if full is None else (full[0].transpose(order), full[1].transpose(order))
        if full is None and self.rounding is not None:
            moved = (self.rounding.scale.reshape(()), self.rounding.zero.reshape(()))
        return self._moved(np.ascontiguousarray(self.values.transpose(order)), moved)

    def read(self) -> Array:
        """The numbers that a node reads, float64 where they are rounded."""
        if self.rounding is None:
            return self.values
        r = self.rounding
        scale = r.scale.astype(np.float64)
        codes = (
            self.values.astype(np.int64)
            if self.codes
            else np.clip(np.rint(self.values.astype(np.float64) / scale) + r.zero, r.low, r.high)
        )
        return np.asarray((codes - r.zero) * scale)
