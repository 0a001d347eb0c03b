"""FakeQuantize of computed tensors."""

from __future__ import annotations

import numpy as np

from zsq_deploy.backends.openvino.ir.registry import Array, Op, UnsupportedFormError, translates
from zsq_deploy.backends.openvino.ir.rounding import read_ranges

__all__: list[str] = []


@translates("FakeQuantize")
def fake_quantize(op: Op) -> None:
    """QuantizeLinear and DequantizeLinear, with a scale and a shift in front or behind where input and output range differ.

    Where neither range has an integer zero point, the definition itself is written in float operations, and noted.
    """
    bounds = [op.numbers(index) for index in range(1, 5)]
    levels = int(op.attrs["levels"])
    found = read_ranges(bounds, levels)
    rank = op.source(0).get_partial_shape().rank
    known = None if rank.is_dynamic else int(rank.get_length())
    value = op.input(0)
    if found is None:
        _as_scaled(op, value, bounds, levels, known)
        return
    rounding, behind = found
    if behind is None:
        op.writer.round_pair(value, rounding, known, op.output())
        return
    rounded = op.writer.fresh(f"{value}_DequantizeLinear_Output")
    op.writer.round_pair(value, rounding, known, rounded)
    scaled = op.step("Mul", [rounded, op.number("factor", _plain(behind.factor))])
    op.emit("Add", [scaled, op.number("shift", _plain(behind.shift))])


def _plain(array: Array) -> Array:
    return array.reshape(()) if array.size == 1 else array


def _as_scaled(op: Op, value: str, bounds: list[Array], levels: int, rank: int | None) -> None:
    """A scale and a shift that OpenVINO moved from in front of the rounding into its input range, put back in front."""
    low, high, out_low, out_high = (np.asarray(bound, np.float64) for bound in bounds)
    outer = read_ranges([out_low, out_high, out_low, out_high], levels)
    if outer is None or not (high > low).all():
        _as_floats(op, value, bounds, levels)
        return
    factor = (out_high - out_low) / (high - low)
    shift = out_low - low * factor
    if np.any(factor != 1.0):
        value = op.step("Mul", [value, op.number("factor", _plain(factor))])
    value = op.step("Add", [value, op.number("shift", _plain(shift))])
    op.writer.round_pair(value, outer[0], rank, op.output())


def _as_floats(op: Op, value: str, bounds: list[Array], levels: int) -> None:
    """The definition itself, in float operations."""
    low, high, out_low, out_high = np.broadcast_arrays(*(np.asarray(bound, np.float64) for bound in bounds))
    if not (high > low).all():
        raise UnsupportedFormError("an empty input range")
    op.writer.notes.append(
        f"{op.name!r} rounds to {levels} levels between {float(low.min()):.6g} and {float(high.max()):.6g}: its zero point is no "
        "integer, so it is written as float operations"
    )
    low_name, high_name = op.number("low", _plain(low)), op.number("high", _plain(high))
    if low.size == 1:
        cut = op.step("Clip", [value, low_name, high_name])
    else:
        cut = op.step("Min", [op.step("Max", [value, low_name]), high_name])
    factor = op.number("inverse_step", _plain((levels - 1) / (high - low)))
    places = op.step("Round", [op.step("Mul", [op.step("Sub", [cut, low_name]), factor])])
    scaled = op.step("Mul", [places, op.number("step", _plain((out_high - out_low) / (levels - 1)))])
    op.emit("Add", [scaled, op.number("out_low", _plain(out_low))])
