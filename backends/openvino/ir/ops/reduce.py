"""Reductions, running sums and the k largest."""

from __future__ import annotations

import onnx

from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError, element_type, translates

__all__: list[str] = []

_REDUCE = {
    "ReduceMean": "ReduceMean", "ReduceSum": "ReduceSum", "ReduceMax": "ReduceMax", "ReduceMin": "ReduceMin",
    "ReduceProd": "ReduceProd", "ReduceL1": "ReduceL1", "ReduceL2": "ReduceL2",
}  # fmt: skip
_POOLS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


def _keep(op: Op) -> int:
    return int(bool(op.attrs.get("keep_dims", False)))


@translates(*_REDUCE)
def reduction(op: Op) -> None:
    """Reductions over axes; over all positions as the pool that the float graph has there."""
    like = op.writer.like_node(op.output())
    if like is not None and like.op_type == _POOLS.get(op.kind) and _keep(op):
        rank = op.rank(0)
        if sorted(axis % rank for axis in op.ints(1)) == list(range(2, rank)):
            op.emit(like.op_type, [op.input(0)])
            return
    axes = op.constant(1)
    if axes is not None and not axes.size:
        op.emit("Identity", [op.input(0)])
        return
    op.emit(_REDUCE[op.kind], [op.input(0), op.input_as(1, "i64")], keepdims=_keep(op))


@translates("ReduceLogicalAnd", "ReduceLogicalOr")
def logical(op: Op) -> None:
    """Whether all, or any, are true."""
    numbers = op.step("Cast", [op.input(0)], to=onnx.TensorProto.INT32)
    kind = "ReduceMin" if op.kind == "ReduceLogicalAnd" else "ReduceMax"
    found = op.step(kind, [numbers, op.input_as(1, "i64")], keepdims=_keep(op))
    op.emit("Cast", [found], to=onnx.TensorProto.BOOL)


@translates("CumSum")
def cumulative_sum(op: Op) -> None:
    """Running sum along an axis."""
    flags = {name: int(bool(op.attrs.get(name, False))) for name in ("exclusive", "reverse")}
    op.emit("CumSum", [op.input(0), op.input_as(1, "i64")], **flags)


@translates("TopK")
def top_k(op: Op) -> None:
    """The k largest or smallest along an axis with their positions."""
    if str(op.attrs.get("sort", "value")).lower() in ("index", "sort_indices"):
        raise UnsupportedFormError("order of positions")
    count = op.constant(1)
    k = (
        op.whole("k", [int(count.reshape(()))])
        if count is not None
        else op.step("Reshape", [op.input_as(1, "i64"), op.whole("one", [1])])
    )
    found = {"axis": int(op.attrs.get("axis", -1)), "largest": int(str(op.attrs.get("mode", "max")).lower() == "max")}
    kind = str(op.node.output(1).get_element_type().get_type_name())
    if kind == "i64":
        op.emit("TopK", [op.input(0), k], **found)
        return
    places = op.writer.fresh(f"{op.output(1)}_i64")
    op.writer.node("TopK", [op.input(0), k], [op.output(0), places], op.name, 2, **found)
    op.writer.node("Cast", [places], [op.output(1)], f"{op.name}/Cast", 1, to=element_type(kind))
