"""From an OpenVINO IR to an ONNX graph, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import openvino as ov
from onnx import helper

from zsq_deploy.backends.openvino.ir.load import load_ir
from zsq_deploy.backends.openvino.ir.ops import conv
from zsq_deploy.backends.openvino.ir.registry import TRANSLATORS, Op, UnsupportedFormError, element_type
from zsq_deploy.backends.openvino.ir.writer import Writer
from zsq_deploy.errors import ModelError, UnsupportedOpError
from zsq_deploy.model.graph import Graph

__all__ = ["IrReading", "ir_to_qdq", "read_ir"]

_SHOWN = 8


@dataclass(frozen=True)
class IrReading:
    """What was read from an IR.

    Attributes:
        graph: The Q/DQ graph.
        notes: What could not be said with QuantizeLinear and DequantizeLinear alone, one sentence each.
    """

    graph: Graph
    notes: tuple[str, ...]


def ir_to_qdq(ir: ov.Model | Path | str, *, like: Graph | None = None) -> Graph:
    """An IR as an ONNX Q/DQ graph; see :func:`read_ir`, which also says what was noticed."""
    return read_ir(ir, like=like).graph


def read_ir(ir: ov.Model | Path | str, *, like: Graph | None = None) -> IrReading:
    """Read an IR, written by NNCF, by POT or by OpenVINO's own front ends, back into an ONNX graph.

    Every operation becomes the ONNX nodes that compute the same. FakeQuantize becomes QuantizeLinear and DequantizeLinear, compressed
    constants become integer initializers behind DequantizeLinear, weights that are still float behind FakeQuantize become a float
    initializer behind QuantizeLinear and DequantizeLinear. A constant added to the channels of a convolution is its bias.

    Args:
        ir: The model, or the path of its ``.xml``.
        like: The float graph that the IR was made from. Values that both have keep the names that they have there; inputs and
            outputs stand in its order, under its names.

    Returns:
        A graph of opset 21, and notes.

    Raises:
        ModelError: The file cannot be read, or does not belong to `like`.
        UnsupportedOpError: The IR holds operations that have no translation; all of them are named.
    """
    where = "" if isinstance(ir, ov.Model) else str(ir)
    model = ir if isinstance(ir, ov.Model) else load_ir(Path(ir))
    ops = list(model.get_ordered_ops())
    writer = Writer(ops, like)
    inputs = _inputs(model, writer, like, where)
    _find_biases(ops, writer)
    _translate(ops, writer, where)
    outputs = _outputs(model, writer, like, where)
    proto = writer.proto(inputs, outputs, model.get_friendly_name())
    return IrReading(Graph(proto), tuple(writer.notes))


def _value_info(name: str, output: ov.Output, like: onnx.ValueInfoProto | None) -> onnx.ValueInfoProto:
    """The typed value; open sizes are called as in the float graph."""
    kind = element_type(str(output.get_element_type().get_type_name()))
    partial = output.get_partial_shape()
    if partial.rank.is_dynamic:
        return helper.make_tensor_value_info(name, kind, None)
    shape: list[int | str | None] = []
    known = list(like.type.tensor_type.shape.dim) if like is not None else []
    for axis, size in enumerate(partial):
        if size.is_static:
            shape.append(int(size.get_length()))
        elif len(known) == len(partial) and known[axis].dim_param:
            shape.append(str(known[axis].dim_param))
        else:
            shape.append("batch" if axis == 0 else None)
    return helper.make_tensor_value_info(name, kind, shape)


def _inputs(model: ov.Model, writer: Writer, like: Graph | None, where: str) -> list[onnx.ValueInfoProto]:
    parameters = list(model.inputs)
    if like is None:
        return [_value_info(writer.names[writer.key(output)], output, None) for output in parameters]
    if len(parameters) != len(like.inputs):
        raise ModelError(
            f"the IR has {len(parameters)} input(s), the float network {len(like.inputs)}",
            where=where or None,
            remedy="give the network that this IR was made from",
        )
    wanted = {spec.name: index for index, spec in enumerate(like.inputs)}
    infos = {value.name: value for value in like.proto.graph.input}
    found = [writer.names[writer.key(output)] for output in parameters]
    if not set(found) <= set(wanted):
        for output, spec in zip(parameters, like.inputs, strict=True):
            writer.rename(writer.key(output), spec.name)
    pairs = sorted(
        ((wanted[writer.names[writer.key(output)]], output) for output in parameters), key=lambda pair: pair[0]
    )
    return [_value_info(like.inputs[index].name, output, infos.get(like.inputs[index].name)) for index, output in pairs]


def _outputs(model: ov.Model, writer: Writer, like: Graph | None, where: str) -> list[onnx.ValueInfoProto]:
    results = list(model.outputs)
    if like is not None and len(results) != len(like.outputs):
        raise ModelError(
            f"the IR has {len(results)} output(s), the float network {len(like.outputs)}",
            where=where or None,
            remedy="give the network that this IR was made from",
        )
    infos = {} if like is None else {value.name: value for value in like.proto.graph.output}
    wanted = [spec.name for spec in like.outputs] if like is not None else []
    names: list[str] = []
    for output in results:
        given = sorted(output.get_names())
        source = output.get_node().input(0).get_source_output()
        value = writer.value(source)
        if like is not None:
            matching = [name for name in (value, *given) if name in wanted and name not in names]
            name = matching[0] if matching else ""
        else:
            name = value if value not in names else (given[0] if given and given[0] not in names else f"{value}_again")
        names.append(name)
    if like is not None and "" in names:
        names = list(wanted)  # no names to go by: the order has to do
    made: list[tuple[str, onnx.ValueInfoProto]] = []
    fixed = {writer.names[writer.key(output)] for output in model.inputs}
    for name, output in zip(names, results, strict=True):
        value = writer.value(output.get_node().input(0).get_source_output())
        writer.deliver(value, name, fixed | {name for name, _ in made})
        made.append((name, _value_info(name, output, infos.get(name))))
    if like is not None:
        made.sort(key=lambda pair: wanted.index(pair[0]))
    return [info for _, info in made]


def _find_biases(ops: Sequence[ov.Node], writer: Writer) -> None:
    """Constants that are added to the channels of a convolution or a matrix product, and to nothing else."""
    for node in ops:
        if node.get_type_name() not in conv.BIASED:
            continue
        output = node.output(0)
        readers = list(output.get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
            continue
        add = readers[0].get_node()
        other = add.input(1 - readers[0].get_index()).get_source_output()
        stored = writer.stored(other)
        name = writer.names[writer.key(output)]
        if stored is None or (writer.like is not None and writer.like.producer(name) is not None):
            continue
        shape = output.get_partial_shape()
        if shape.rank.is_dynamic or add.output(0).get_partial_shape().rank != shape.rank:
            continue
        rank = shape.rank.get_length()
        if node.get_type_name() == "MatMul":
            if rank != 2 or any(node.get_input_partial_shape(index).rank != shape.rank for index in (0, 1)):
                continue
            axis = rank - 1
        else:
            axis = 1
        sizes = (1,) * (rank - len(stored.shape)) + stored.shape
        channels = shape[axis]
        if channels.is_dynamic or any(size != 1 for place, size in enumerate(sizes) if place != axis):
            continue
        if sizes[axis] not in (1, channels.get_length()):
            continue
        if stored.rounding is not None and (not stored.codes or sizes[axis] == 1):
            continue
        writer.bias_adds[writer.key(output)] = Op(add, writer)


def _translate(ops: Sequence[ov.Node], writer: Writer, where: str) -> None:
    problems: dict[tuple[str, str], list[str]] = {}
    fused = {writer.key(add.node.output(0)) for add in writer.bias_adds.values()}
    for node in ops:
        kind = node.get_type_name()
        if kind in ("Parameter", "Result", "Constant"):
            continue
        if writer.key(node.output(0)) in fused or writer.stored(node.output(0)) is not None:
            continue
        translate = TRANSLATORS.get(kind)
        if translate is None:
            problems.setdefault((kind, "no translation"), []).append(node.get_friendly_name())
            continue
        try:
            translate(Op(node, writer))
        except UnsupportedFormError as error:
            problems.setdefault((kind, str(error)), []).append(node.get_friendly_name())
    if not problems:
        return
    lines = [f"file: {where}"] if where else []
    for (kind, reason), places in problems.items():
        more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        lines.append(f"{kind} ({reason}): {', '.join(places[:_SHOWN])}{more}")
    raise UnsupportedOpError(
        f"{len(problems)} form(s) of operations in {sum(map(len, problems.values()))} place(s) of the IR have no ONNX counterpart here",
        where="\n         ".join(lines),
        remedy=(
            "cut the network in front of them (post-processing left out of the graph), or add the operation: one decorated function "
            "in backends/openvino/ir/ops"
        ),
    )
