"""One executed node of the CPU plugin as a function: which of our kernels computes it, and with which numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.openvino.islands import Island
from zsq_deploy.backends.openvino.kernels.contraction import (
    CONTRACTIONS,
    FULLY_CONNECTED,
    accumulate,
    channel_axis,
    channels,
)
from zsq_deploy.backends.openvino.kernels.elementwise import ELEMENTWISE
from zsq_deploy.backends.openvino.kernels.fakequantize import Formula, quantization
from zsq_deploy.backends.openvino.kernels.float32 import fused_multiply_add, to_codes
from zsq_deploy.backends.openvino.kernels.movement import MOVEMENTS
from zsq_deploy.backends.openvino.kernels.pooling import average_pool, max_pool, reduce_mean, reduce_sum
from zsq_deploy.backends.openvino.kernels.postops import Composer, Stage
from zsq_deploy.backends.openvino.lowered import Group, Lowered, Op, Source
from zsq_deploy.errors import UnsupportedOpError

__all__ = ["Step", "Values", "bind"]

Array = npt.NDArray[Any]
Role = Literal["integer", "moving", "float", "shape"]

_CODES = ("u8", "i8")
_KINDS = {np.dtype(np.uint8): "u8", np.dtype(np.int8): "i8"}
_MERGED = ("Add", "Subtract", "Multiply", "Divide", "Clamp")
_POOLS = ("MaxPool", "AvgPool")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")


class Values:
    """The values of one execution; operators that no executed node claims (zero points) are evaluated when they are read.

    Args:
        lowered: The graph.
        config: Properties for operators that OpenVINO has to compute itself.
    """

    def __init__(self, lowered: Lowered, config: Mapping[str, Any]) -> None:
        self.lowered = lowered
        self._config = config
        self._made: dict[Source, Array] = {}
        self._islands: dict[str, Island] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._made.clear()

    def put(self, op: Op, arrays: Sequence[Array]) -> None:
        """Note the results of an operator."""
        for port, array in enumerate(arrays):
            self._made[Source(op.key, port)] = array

    def drop(self, source: Source) -> None:
        """Forget one value."""
        self._made.pop(source, None)

    def get(self, source: Source) -> Array:
        """A value."""
        if source in self._made:
            return self._made[source]
        source = self.lowered.seen(source)
        if source in self._made:
            return self._made[source]
        op = self.lowered.ops[source.op]
        if op.constant is not None:
            return op.constant
        self.put(op, self.evaluate(op))
        return self._made[source]

    def inputs(self, op: Op) -> list[Array | None]:
        """All inputs of an operator."""
        return [None if source is None else self.get(source) for source in op.inputs]

    def evaluate(self, op: Op) -> list[Array]:
        """One operator on its own."""
        if op.body:
            return self._subgraph(op)
        if op.type == "FakeQuantize":
            formula, axis, source = requantization(self.lowered, op)
            x = np.asarray(self.get(source), np.float32)
            return [to_codes(formula.alone().evaluate(x, axis), op.precisions[0])]
        inputs = self.inputs(op)
        if op.type in MOVEMENTS:
            try:
                return MOVEMENTS[op.type](op, inputs)
            except NotImplementedError:
                pass
        arrays = [array for array in inputs if array is not None]
        if op.type == "Subtract" and all(array.dtype.kind in "iu" for array in arrays):
            return [np.asarray(arrays[0].astype(np.int32) - arrays[1].astype(np.int32))]
        if op.type == "Subtract" and not self.lowered.claimed(op) and arrays[1].dtype in _KINDS:
            codes = to_codes(
                arrays[0], _KINDS[arrays[1].dtype]
            )  # a mean of codes: rounded on the way into an integer kernel
            return [np.asarray(codes.astype(np.int32) - arrays[1].astype(np.int32))]
        if op.type in ELEMENTWISE:
            try:
                return [ELEMENTWISE[op.type](op, arrays)]
            except NotImplementedError:
                pass
        if op.type == "MatMul" and all(array.dtype.kind in "iu" for array in arrays):
            return [accumulate(op, arrays[0], arrays[1]).astype(np.float32)]
        if op.type in _POOLS and (op.type == "MaxPool" or arrays[0].dtype.kind in "iu"):
            return [max_pool(op, arrays[0]) if op.type == "MaxPool" else average_pool(op, arrays[0])]
        if op.type in _REDUCTIONS and arrays[0].dtype.kind in "iu":
            return [_reduce(op, arrays)]
        return self.island(op)

    def _subgraph(self, op: Op) -> list[Array]:
        """Several operators in one kernel: one after the other, a multiplication and the addition behind it in one instruction."""
        for entry, source in zip(op.entries, op.inputs, strict=True):
            assert source is not None
            self.put(entry, [self.get(source)])
        readers = Counter(source.op for part in op.body for source in part.inputs if source is not None)
        readers.update(source.op for source in op.exits)
        for part in op.body:
            factor = next((s for s in part.inputs if part.type == "Add" and s is not None and readers[s.op] == 1), None)
            before = None if factor is None else self.lowered.ops[factor.op]
            if before is not None and before.type == "Multiply":
                self.put(part, multiply_add(self, before, part))
            else:
                self.put(part, self.evaluate(part))
        results = [self.get(source) for source in op.exits]
        for part in (*op.entries, *op.body):
            for port in range(len(part.outputs)):
                self.drop(Source(part.key, port))
        return results

    def island(self, op: Op) -> list[Array]:
        """One operator by OpenVINO's own kernel, in float32 if it computes with floating-point numbers."""
        if op.key not in self._islands:
            constants = {
                source.op: array
                for source in op.inputs
                if source is not None and (array := self.lowered.constant(source)) is not None
            }
            self._islands[op.key] = Island([op], constants, self._config)
        island = self._islands[op.key]
        floating = any(precision.startswith(("f", "bf")) for precision in op.precisions)
        arrays = [self.get(source) for source in island.variable]
        if floating:
            arrays = [np.asarray(a, np.float32) if a.dtype.kind in "iu" and a.itemsize == 1 else a for a in arrays]
        return island(arrays)


def _reduce(op: Op, arrays: Sequence[Array]) -> Array:
    axes = [int(axis) % arrays[0].ndim for axis in np.asarray(arrays[1]).reshape(-1)]
    keep = op.flag("keep_dims")
    if op.type == "ReduceMean":
        return reduce_mean(arrays[0], axes, keep)
    if op.type == "ReduceSum":
        return reduce_sum(arrays[0], axes, keep)
    return np.asarray((np.max if op.type == "ReduceMax" else np.min)(arrays[0], tuple(axes), keepdims=keep))


@dataclass(frozen=True, eq=False)
class Step:
    """How one executed node is evaluated.

    Attributes:
        group: The node.
        role: Who computes it: ``integer`` (our exact kernels), ``moving`` (ours, nothing is rounded), ``float`` (OpenVINO's own float
            kernel, alone), ``shape`` (no codes and no numbers of the network).
        run: Evaluates it.
    """

    group: Group
    role: Role
    run: Callable[[Values], None]


def formula_of(lowered: Lowered, op: Op) -> tuple[Formula, int]:
    """The numbers of a FakeQuantize operator and the axis along which they run.

    Raises:
        UnsupportedOpError: Its limits are not constants, or run along several axes.
    """
    limits = [lowered.constant(source) for source in op.inputs[1:5]]
    known = [limit for limit in limits if limit is not None]
    axes = {axis for limit in known for axis in range(limit.ndim) if limit.shape[axis] > 1}
    if len(known) < 4 or len(axes) > 1:
        raise UnsupportedOpError(
            f"the limits of the requantization {op.name!r} are not constants of one axis",
            where=op.name,
            remedy="compare with the fake-quant reference only",
        )
    size = max(limit.size for limit in known)
    axis = axes.pop() if axes else 1
    rank = max(limit.ndim for limit in known)
    flat = [np.broadcast_to(np.asarray(limit, np.float32).reshape(-1), (size,)) for limit in known]
    if all(np.all(limit == limit[0]) for limit in flat):
        flat = [limit[:1] for limit in flat]
    return quantization(flat[0], flat[1], flat[2], flat[3], int(op.number("levels", 256))), axis if rank else 1


def requantization(lowered: Lowered, op: Op) -> tuple[Formula, int, Source]:
    """The numbers of a FakeQuantize operator as it is executed, their axis, and the value that it reads.

    The plugin merges a multiplication or addition of constants in front of it, and a Clamp, into its numbers. Such an operator belongs to no
    executed node.
    """
    formula, axis = formula_of(lowered, op)
    source = op.inputs[0]
    assert source is not None
    merged: list[Op] = []
    before = lowered.ops[source.op]
    while before.type in _MERGED and not lowered.claimed(before):
        merged.append(before)
        source = next((s for s in before.inputs if s is not None and lowered.constant(s) is None), None)
        if source is None:
            raise UnsupportedOpError(f"what is merged into the requantization {op.name!r} has no input", where=op.name)
        before = lowered.ops[source.op]
    scale, shift = np.ones(1, np.float32), np.zeros(1, np.float32)
    for part in reversed(merged):
        if part.type == "Clamp":
            low = np.maximum(formula.low, np.float32(part.number("min")))
            formula = replace(formula, low=low, high=np.minimum(formula.high, np.float32(part.number("max"))))
            continue
        constant = next(array for s in part.inputs if (array := lowered.constant(s)) is not None)
        wide = [place - constant.ndim for place in range(constant.ndim) if constant.shape[place] > 1]
        vector = np.asarray(constant, np.float32).reshape(-1)
        if wide:
            axis = wide[0]
        if part.type == "Multiply":
            scale = vector
        elif part.type == "Divide":
            scale = np.asarray(np.float32(1) / vector)
        else:
            shift = vector if part.type == "Add" else -vector
    return formula.after(scale, shift), axis, source


def _other(op: Op, before: Op) -> Source | None:
    """The input of an operator that is not the result of the one before it."""
    return next((s for s in op.inputs if s is not None and s.op != before.key), None)


def _vector(lowered: Lowered, source: Source | None, size: int) -> Array | None:
    """A constant that is one value, or one a channel, flat; ``None`` for anything else."""
    array = lowered.constant(source)
    if array is None or array.dtype.kind not in "fiu" or array.size not in (1, size):
        return None
    return np.asarray(array, np.float32).reshape(-1)


def bind(lowered: Lowered, group: Group) -> Step:
    """The step that evaluates an executed node.

    Raises:
        UnsupportedOpError: An operator on codes is not known.
    """
    head = group.ops[0]
    if head.type in CONTRACTIONS and group.computes in _CODES:
        return _contraction(lowered, group)
    return _chain(lowered, group)


def _is_code(lowered: Lowered, source: Source) -> bool:
    """Whether a value holds 8-bit codes, or codes minus a zero point."""
    op = lowered.ops[source.op]
    if op.precisions and op.precisions[source.port] in _CODES:
        return True
    return op.type in ("Subtract", "Convert", "Reshape", "Transpose") and all(
        s is None or _is_code(lowered, s) or ((array := lowered.constant(s)) is not None and array.dtype.kind in "iu")
        for s in op.inputs
    )


def _contraction(lowered: Lowered, group: Group) -> Step:
    head, *rest = group.ops
    sources = [source for source in head.inputs[:2] if source is not None]
    size = _channels(lowered, head)
    scale: Array | None = None
    bias: Array | None = None
    before = head
    if head.type in FULLY_CONNECTED and len(head.inputs) > 3:
        scale = lowered.constant(head.inputs[3])
        bias = lowered.constant(head.inputs[2])
    elif rest and rest[0].type == "Multiply":
        scale = _vector(lowered, _other(rest[0], before), size)
        before = rest.pop(0) if scale is not None else before
    if bias is None and rest and rest[0].type == "Add":
        bias = _vector(lowered, _other(rest[0], before), size)
        if bias is not None and bias.size not in (size,):
            bias = None
        before = rest.pop(0) if bias is not None else before
    last = group.ops[-1]

    def compose(values: Values, rank: int) -> Composer:
        place = channel_axis(head, rank)
        composer = Composer(scale, bias, group.precision, place)
        previous = before
        for number, op in enumerate(rest):
            rounding = number > 0 or not _drops_rounding(lowered, rest)
            _append(composer, lowered, values, op, previous, size, number == len(rest) - 1, rounding)
            previous = op
        return composer

    def run(values: Values) -> None:
        x, w = (values.get(source) for source in sources)
        x = to_codes(x, group.computes) if x.dtype.kind == "f" else x
        total = accumulate(head, x, w)
        values.put(last, [compose(values, total.ndim).evaluate(total)])

    return Step(group, "integer", run)


def _drops_rounding(lowered: Lowered, ops: Sequence[Op]) -> bool:
    """Whether the plugin leaves out the rounding of a requantization right behind a sum of products.

    It does so where a residual sum and another requantization follow in the same kernel: the network then computes something else
    than its graph says.
    """
    if not ops or ops[0].type != "FakeQuantize":
        return False
    later = list(itertools.pairwise(ops))
    sums = any(
        op.type == "Add" and (source := _other(op, before)) is not None and lowered.constant(source) is None
        for before, op in later
    )
    return sums and any(op.type == "FakeQuantize" for _, op in later)


def _channels(lowered: Lowered, head: Op) -> int:
    source = head.inputs[1]
    assert source is not None
    array = lowered.constant(source)
    while array is None:
        op = lowered.ops[source.op]
        inner = op.inputs[0] if op.inputs else None
        if inner is None or op.type not in ("Subtract", "Convert"):
            return 0
        source = inner
        array = lowered.constant(source)
    return channels(head, array)


def _append(
    composer: Composer,
    lowered: Lowered,
    values: Values,
    op: Op,
    before: Op,
    size: int,
    last: bool,
    rounding: bool,
) -> None:
    """Hand one fused operator to the composer of a kernel."""
    if op.type == "FakeQuantize":
        formula, _, _ = requantization(lowered, op)
        composer.add_quantization(formula, last, rounding)
        return
    if op.type == "PowerStatic" and op.number("power", 1) == 1:
        scale, shift = (np.full(1, op.number(name, default), np.float32) for name, default in _LINEAR)
        if scale[0] != 1 and shift[0] != 0:
            composer.add_linear(scale, shift, last)
        elif scale[0] != 1:
            composer.add_scale(scale, last)
        else:
            composer.add_shift(shift)
        return
    if op.type in ("Relu", "ReLU"):
        composer.stages.append(Stage("relu"))
        return
    if op.type == "Clamp":
        low, high = (np.full(1, op.number(name), np.float32) for name in ("min", "max"))
        composer.stages.append(Stage("clip", low, high))
        return
    source = _other(op, before)
    vector = _vector(lowered, source, size)
    if vector is not None and op.type in ("Add", "Subtract", "Multiply", "Divide"):
        if op.type == "Multiply":
            composer.add_scale(vector, last)
        elif op.type == "Divide":
            composer.add_scale(np.asarray(np.float32(1) / vector), last)
        else:
            composer.add_shift(vector if op.type == "Add" else -vector)
        return
    if op.type == "Add" and source is not None and lowered.constant(source) is None:
        other = values.get(source)
        composer.stages.append(Stage("sum", function=lambda _: other))
        return

    def alone(x: Array) -> Array:
        values.put(before, [x])
        (result,) = values.evaluate(op)
        return result

    composer.stages.append(Stage("function", function=alone))


_LINEAR = (("scale", 1.0), ("shift", 0.0))


def _fuses(lowered: Lowered, before: Op, op: Op) -> bool:
    """Whether a multiplication and an addition of constants are one instruction."""
    return (
        before.type == "Multiply"
        and op.type == "Add"
        and any(s is not None and s.op == before.key for s in op.inputs)
        and all(any(lowered.constant(s) is not None for s in part.inputs) for part in (before, op))
    )


def multiply_add(values: Values, before: Op, op: Op) -> list[Array]:
    factors = [values.get(source) for source in before.inputs if source is not None]
    addends = [values.get(source) for source in op.inputs if source is not None and source.op != before.key]
    return [fused_multiply_add(factors[0], factors[1], addends[0])]


def _chain(lowered: Lowered, group: Group) -> Step:
    """A node without sums of products: its operators one after the other, results in float32 until the last."""
    ops = group.ops
    exact = True
    parts = [part for op in ops for part in (op.body or (op,))]
    moving = all(op.type in (*MOVEMENTS, "MaxPool", "Convert") for op in parts)
    for op in parts:
        known = op.type in MOVEMENTS or op.type in ELEMENTWISE or op.type in ("FakeQuantize", "MaxPool", "MatMul")
        reads = any(_is_code(lowered, s) for s in op.inputs[:1] if s is not None)
        if not known and not (op.type in ("AvgPool", *_REDUCTIONS) and reads):
            exact = False
    codes = group.precision in _CODES or any(s is not None and _is_code(lowered, s) for op in ops for s in op.inputs)
    role: Role = "moving" if moving else "integer" if exact else "float"
    if not codes and not any(p.startswith("f") for op in parts for p in op.precisions):
        role = "shape"

    def run(values: Values) -> None:
        for before, op in zip((None, *ops), ops, strict=False):
            if before is not None and _fuses(lowered, before, op):
                results = multiply_add(values, before, op)
            else:
                results = values.evaluate(op)
            if op is not ops[-1]:
                results = [np.asarray(r, np.float32) if r.dtype.kind == "f" else r for r in results]
            values.put(op, results)
        for op in ops[:-1]:
            for port in range(len(op.outputs)):
                values.drop(Source(op.key, port))
        last = ops[-1]
        if group.precision in (*_CODES, "f32") and not last.body:
            values.put(
                last,
                [to_codes(values.get(Source(last.key, port)), group.precision) for port in range(len(last.outputs))],
            )

    return Step(group, role, run)
