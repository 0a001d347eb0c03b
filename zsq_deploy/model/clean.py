"""From an exporter's graph to the network: shape arithmetic computed, noise removed, the batch size left open.

Exporters spell out how they found every size (Shape, Gather, Concat, ConstantOfShape, Slice, Cast, ...). Here the graph is
walked with several batch sizes (:mod:`zsq_deploy.model.shapes`); what is the same in all walks becomes a constant, what is a
multiple of the batch size is written in its shortest form, and nobody needs the rest. Batch normalization stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from zsq_deploy.errors import ModelError, UsageError
from zsq_deploy.model.batch import PROBED, scales_for, unfix_batch
from zsq_deploy.model.editing import Net, is_default
from zsq_deploy.model.normalize import normalize
from zsq_deploy.model.shapes import Array, Evaluator, Probe, opsets, probe
from zsq_deploy.model.simplify import View, simplify
from zsq_deploy.model.unpack import unpack_sequences

__all__ = ["Cleaned", "clean"]

Sizes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Cleaned:
    """A cleaned model.

    Attributes:
        proto: The model.
        dynamic_batch: Whether it takes any batch size.
        notes: What the user should know.
        check: The same model with the batch size that it was exported with, when the batch size was made free here: the
            caller can run both and compare.
    """

    proto: onnx.ModelProto
    dynamic_batch: bool
    notes: tuple[str, ...] = ()
    check: Cleaned | None = None


def clean(
    proto: onnx.ModelProto, input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None, *, where: str = ""
) -> Cleaned:
    """Clean a model (opset 17 to 21).

    Args:
        proto: The model; it is not changed.
        input_shape: Sizes for inputs whose sizes are open: one shape for a network with one input, or one by input name.
            The first size is the batch; it only counts where the file leaves everything else open.
        where: File or module, for error messages.

    Raises:
        ModelError: Control flow that depends on the data, or a graph that contradicts itself.
        UsageError: A size other than the batch is open and `input_shape` does not say it, or contradicts the file.
    """
    net, notes = normalize(proto)
    shapes, batch = _input_shapes(net, input_shape, where)
    if batch is None:
        return _finish(_reduce(net, shapes, PROBED, where), shapes, PROBED, notes, where)
    exported = _finish(_reduce(net.copy(), shapes, (batch,), where), shapes, (batch,), notes, where)
    carries = any(-1 in shape for shape in shapes.values())
    free = _freed(net, exported, shapes, batch, notes, where) if carries else None
    if free is not None:
        return free
    note = f"the batch size is fixed at {batch} in this file and could not be freed; everything runs with batches of {batch}"
    return Cleaned(exported.proto, dynamic_batch=False, notes=(*exported.notes, note))


def _freed(net: Net, exported: Cleaned, shapes: Sizes, batch: int, notes: list[str], where: str) -> Cleaned | None:
    """The model with a free batch size, if one of two ways leads there: as it is, or with its constants rewritten."""
    rewritten = Net(exported.proto)
    unfix_batch(rewritten, _sized(shapes, batch), batch)
    sizes = tuple(batch * factor for factor in PROBED)
    for candidate in (net, rewritten):
        try:
            reduced = _reduce(candidate.copy(), shapes, sizes, where)
            result = _finish(reduced, shapes, sizes, notes, where)
        except ModelError:
            continue
        walks = [_walk(reduced, _sized(shapes, size)) for size in (batch, *sizes)]
        if not any(walk.conflicts for walk in walks) and _scales(reduced, walks, batch):
            return Cleaned(result.proto, dynamic_batch=True, notes=result.notes, check=exported)
    return None


def _scales(net: Net, walks: Sequence[Probe], batch: int) -> bool:
    """Whether the first size of every output grows with the batch and all others stay."""
    for name in net.output_names:
        shapes = [walk.known(name) for walk in walks]
        first = shapes[0]
        if first is None or not first or first[0] % batch:
            return False
        for factor, shape in zip((1, *PROBED), shapes, strict=True):
            if shape != (first[0] * factor, *first[1:]):
                return False
    return True


# -- sizes of the inputs --------------------------------------------------------------------------------------------------


def _input_shapes(
    net: Net, wanted: Sequence[int] | Mapping[str, Sequence[int]] | None, where: str
) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Concrete input shapes (first size: a placeholder where the batch is free) and the batch size if the file fixes it."""
    if not net.inputs:
        raise ModelError("the network has no input", where=where, remedy="give the file of a network that reads images")
    given: dict[str, Sequence[int]] = {}
    if isinstance(wanted, Mapping):
        given = dict(wanted)
    elif wanted is not None:
        if len(net.inputs) > 1:
            names = ", ".join(value.name for value in net.inputs)
            raise UsageError(
                f"the network has {len(net.inputs)} inputs, so one --input-shape is not enough",
                where=where,
                remedy=f"give one for each of: {names} (NAME=1x3x224x224)",
            )
        given = {net.inputs[0].name: wanted}
    unknown = sorted(set(given) - {value.name for value in net.inputs})
    if unknown:
        raise UsageError(
            f"the network has no input called {', '.join(unknown)}",
            where=where,
            remedy=f"its inputs are: {', '.join(value.name for value in net.inputs)}",
        )
    found = {value.name: _input_shape(value, given.get(value.name), where) for value in net.inputs}
    batches = {shape[0] for shape in found.values() if shape}
    fixed = {size for size in batches if size is not None}
    if None in batches:  # inputs with a fixed first size beside inputs with a free one do not carry the batch
        return {name: tuple(-1 if size is None else size for size in shape) for name, shape in found.items()}, None
    if len(fixed) != 1:
        return {name: tuple(size or 0 for size in shape) for name, shape in found.items()}, min(fixed, default=1)
    return {
        name: (-1, *(size or 0 for size in shape[1:])) if shape else () for name, shape in found.items()
    }, fixed.pop()


def _input_shape(value: onnx.ValueInfoProto, given: Sequence[int] | None, where: str) -> tuple[int | None, ...]:
    """One input's shape: only the batch may stay open."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        if given is None:
            raise _open_sizes(value.name, "unknown", "1x3x224x224", where)
        return (None, *(int(size) for size in given[1:]))
    dims = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim]
    text = "x".join("?" if size is None else str(size) for size in dims)
    if given is not None:
        if len(given) != len(dims):
            raise UsageError(
                f"input {value.name!r} has {len(dims)} dimensions ({text}), --input-shape has {len(given)}",
                where=where,
                remedy="give the whole shape with the batch, for example 1x3x224x224",
            )
        for axis, (own, size) in enumerate(zip(dims, given, strict=True)):
            if size <= 0:
                raise UsageError(
                    f"--input-shape has the size {size}", where=where, remedy="sizes are positive whole numbers"
                )
            if axis and own is not None and own != size:
                raise UsageError(
                    f"input {value.name!r} is fixed at {text} in the file, --input-shape says {'x'.join(map(str, given))}",
                    where=where,
                    remedy="leave --input-shape out, or export the network again with the size that you want",
                )
        dims = [
            own if axis == 0 or own is not None else int(size)
            for axis, (own, size) in enumerate(zip(dims, given, strict=True))
        ]
    if any(size is None for size in dims[1:]):
        example = "x".join(
            str(size) if size is not None else "1" if axis == 0 else "64" for axis, size in enumerate(dims)
        )
        raise _open_sizes(value.name, text, example, where)
    return tuple(dims)


def _open_sizes(name: str, shape: str, example: str, where: str) -> UsageError:
    return UsageError(
        f"input {name!r} has sizes that the file leaves open ({shape})",
        where=where,
        remedy=f"say them with --input-shape, for example --input-shape {example}",
    )


def _sized(shapes: Sizes, batch: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(batch if size == -1 else size for size in shape) for name, shape in shapes.items()}


def _walk(net: Net, sizes: Sizes, evaluator: Evaluator | None = None) -> Probe:
    return probe(net.skeleton(), sizes, evaluator=evaluator, arrays=net.arrays())


# -- the reduction --------------------------------------------------------------------------------------------------------


def _reduce(net: Net, shapes: Sizes, batches: Sequence[int], where: str) -> Net:
    """Compute what can be computed, in place."""
    evaluator = Evaluator(opsets(net.skeleton()))

    def look(current: Net) -> View:
        return View([_walk(current, _sized(shapes, batch), evaluator) for batch in batches])

    while True:
        view = look(net)
        if not _splice_branch(net, view) and not unpack_sequences(net, view):
            break
    _refuse_control_flow(net, where)
    batch_input = next((name for name, shape in shapes.items() if shape and shape[0] == -1), None)
    _Folding(net, look(net), batches, batch_input).run()
    simplify(net, look)
    return net


def _splice_branch(net: Net, view: View) -> bool:
    """Replace one If whose condition is known by the branch that is taken."""
    for node in net.nodes:
        if not is_default(node, "If"):
            continue
        conditions = {bool(walk.data[node.input[0]].item()) for walk in view.probes if node.input[0] in walk.data}
        if len(conditions) != 1 or any(node.input[0] not in walk.data for walk in view.probes):
            continue
        wanted = "then_branch" if conditions.pop() else "else_branch"
        branch = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
        net.splice(node, branch)
        return True
    return False


def _refuse_control_flow(net: Net, where: str) -> None:
    found = [node for node in net.nodes if any(a.HasField("g") or a.graphs for a in node.attribute)]
    if found:
        places = ", ".join(f"{node.name} ({node.op_type})" for node in found[:5])
        raise ModelError(
            f"the network has control flow that depends on the data: {places}"
            + (f" and {len(found) - 5} more" if len(found) > 5 else ""),
            where=where,
            remedy="integer engines run a fixed sequence of layers: export the network without loops and branches "
            "(post-processing such as box selection can stay outside the engine)",
        )


class _Folding:
    """Replaces everything that does not depend on the data, from the outputs upwards."""

    def __init__(self, net: Net, view: View, batches: Sequence[int], batch_input: str | None) -> None:
        self._net = net
        self._view = view
        self._batches = batches
        self._batch_input = batch_input
        self._size: str | None = None
        self._scalar: str | None = None

    def run(self) -> None:
        """Do it, in place."""
        net = self._net
        needed = set(net.output_names)
        kept: list[onnx.NodeProto] = []
        for node in reversed(net.nodes):
            wanted = [name for name in node.output if name in needed]
            if not wanted:
                continue
            made = self._instead(node, wanted)
            if made is None:
                self._open_shape(node)
                made = [node]
            kept += reversed(made)
            needed.update(name for item in made for name in item.input if name)
        if self._size is not None and self._batch_input is not None:
            if self._scalar is not None:
                kept.append(net.new_node("Squeeze", [self._size], [self._scalar], "batch_size/Squeeze"))
            kept.append(net.new_node("Shape", [self._batch_input], [self._size], "batch_size", start=0, end=1))
        net.nodes = kept[::-1]
        net.touch()
        net.sweep()

    def _values(self, name: str) -> list[Array] | None:
        found = [walk.data.get(name) for walk in self._view.probes]
        return None if any(item is None for item in found) else [item for item in found if item is not None]

    def _instead(self, node: onnx.NodeProto, wanted: Sequence[str]) -> list[onnx.NodeProto] | None:
        """The nodes (often none) that stand in for a node that does not depend on the data; ``None``: it stays."""
        made: list[onnx.NodeProto] = []
        constants: list[tuple[str, Array]] = []
        for name in wanted:
            values = self._values(name)
            if values is None:
                return None
            if all(np.array_equal(values[0], item, equal_nan=values[0].dtype.kind == "f") for item in values[1:]):
                constants.append((name, values[0]))
                continue
            nodes = self._rebuilt(name, values)
            if nodes is None:
                return None
            made += nodes
        for name, value in constants:
            if name in self._net.output_names:
                source = self._net.add_constant(f"{name}.value", value)
                made.append(self._net.new_node("Identity", [source], [name], f"{node.name}/Identity"))
            else:
                self._net.add_constant(name, value, exact=True)
        return made

    def _rebuilt(self, name: str, values: Sequence[Array]) -> list[onnx.NodeProto] | None:
        """A value that changes with the batch size only, in its shortest form; ``None`` if there is none."""
        if self._batch_input is None:
            return None
        if values[0].dtype == np.int64 and values[0].ndim == 0:
            factor = self._factor([int(item) for item in values])
            if factor is None:
                return None
            return self._scaled(self._scalar_size(), factor, name, ())
        if values[0].dtype == np.int64 and values[0].ndim == 1 and len({item.shape for item in values}) == 1:
            return self._vector(name, np.stack(values))
        return self._expanded(name, values)

    def _factor(self, values: Sequence[int]) -> int | None:
        """`k` where the values are `k` times the batch sizes."""
        factor, rest = divmod(values[0], self._batches[0])
        if rest or not factor or any(v != factor * b for v, b in zip(values, self._batches, strict=True)):
            return None
        return factor

    def _batch_size(self) -> str:
        self._size = self._size or self._net.fresh("batch_size")
        return self._size

    def _scalar_size(self) -> str:
        self._batch_size()
        self._scalar = self._scalar or self._net.fresh("batch_size.scalar")
        return self._scalar

    def _scaled(self, source: str, factor: int, name: str, shape: tuple[int, ...]) -> list[onnx.NodeProto]:
        if factor == 1:
            return [self._net.new_node("Identity", [source], [name], f"{name}/batch")]
        constant = self._net.add_constant(f"{name}.factor", np.full(shape, factor, np.int64))
        return [self._net.new_node("Mul", [source, constant], [name], f"{name}/batch")]

    def _vector(self, name: str, values: Array) -> list[onnx.NodeProto] | None:
        """A shape vector: constants, and multiples of the batch size."""
        made: list[onnx.NodeProto] = []
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                parts.append(self._net.add_constant(f"{name}.fixed", np.asarray(run, np.int64)))
                run.clear()

        for column in values.T:
            if np.all(column == column[0]):
                run.append(int(column[0]))
                continue
            factor = self._factor([int(item) for item in column])
            if factor is None:
                return None
            flush()
            if factor == 1:
                parts.append(self._batch_size())
            else:
                part = self._net.fresh(f"{name}.part")
                made += self._scaled(self._batch_size(), factor, part, (1,))
                parts.append(part)
        flush()
        if len(parts) == 1:
            return [*made, self._net.new_node("Identity", parts, [name], f"{name}/Identity")]
        return [*made, self._net.new_node("Concat", parts, [name], f"{name}/Concat", axis=0)]

    def _expanded(self, name: str, values: Sequence[Array]) -> list[onnx.NodeProto] | None:
        """A tensor that repeats the same content for every sample."""
        shapes = [item.shape for item in values]
        if len({len(shape) for shape in shapes}) != 1 or not shapes[0]:
            return None
        axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
        if len(axes) != 1 or 0 in shapes[0]:
            return None
        row = np.take(values[0], [0], axis=axes[0])
        if not all(np.array_equal(np.broadcast_to(row, item.shape), item) for item in values):
            return None
        shape = self._net.fresh(f"{name}.shape")
        vector = self._vector(shape, np.asarray(shapes, np.int64))
        if vector is None:
            return None
        source = self._net.add_constant(f"{name}.row", row)
        return [*vector, self._net.new_node("Expand", [source, shape], [name], f"{name}/Expand")]

    def _open_shape(self, node: onnx.NodeProto) -> None:
        """Give Reshape and Resize constants that hold for every batch size, in place of computed sizes."""
        if is_default(node, "Reshape") and node.input[1] not in self._net.constants:
            target = self._view.reshape_target(node.output[0])
            if target is not None:
                node.input[1] = self._net.add_constant(f"{node.name}.shape", target)
                kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
                del node.attribute[:]
                node.attribute.extend(kept)
        elif is_default(node, "Resize") and len(node.input) > 3 and node.input[3] not in self._net.constants:
            source, target_shapes = self._view.shapes(node.input[0]), self._view.shapes(node.output[0])
            if source is None or target_shapes is None or any(attribute.name == "axes" for attribute in node.attribute):
                return
            scales = scales_for(source, target_shapes)
            if scales is not None:
                node.input[2] = self._net.add_constant(f"{node.name}.scales", scales)
                del node.input[3:]


# -- writing back ---------------------------------------------------------------------------------------------------------


def _finish(net: Net, shapes: Sizes, batches: Sequence[int], notes: Sequence[str], where: str) -> Cleaned:
    """The model with sizes written on inputs, outputs and values."""
    proto = net.proto()
    walks = [_walk(net, _sized(shapes, batch)) for batch in batches]
    if all(walk.conflicts for walk in walks):
        node, message = walks[0].conflicts[0]
        raise ModelError(
            f"the sizes in the network do not fit together: {message or 'shape inference failed'}",
            where=f"{where}, node {node}" if where else f"node {node}",
            remedy="check --input-shape, or export the network again",
        )
    view = View(walks)
    dynamic = len(batches) > 1
    for value in proto.graph.input:
        dims = tuple("N" if size == -1 else size for size in shapes[value.name])
        _set_type(value, value.type.tensor_type.elem_type, dims if dynamic else _sized(shapes, batches[0])[value.name])
    for value in proto.graph.output:
        kinds = {walk.types.get(value.name) for walk in walks}
        kind = kinds.pop() if len(kinds) == 1 else None
        _set_type(value, kind or value.type.tensor_type.elem_type, _symbolic(view, value.name, batches))
    boundary = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    for node in proto.graph.node:
        for name in node.output:
            kind = walks[0].types.get(name)
            if not name or name in boundary or kind is None:
                continue
            sizes = _symbolic(view, name, batches)
            if sizes is not None:
                proto.graph.value_info.append(helper.make_tensor_value_info(name, kind, sizes))
    return Cleaned(proto, dynamic_batch=dynamic, notes=tuple(notes))


def _symbolic(view: View, name: str, batches: Sequence[int]) -> tuple[int | str | None, ...] | None:
    """Sizes of a value: numbers, ``N`` for the batch, ``None`` for what is not known."""
    shapes = [walk.shapes.get(name) for walk in view.probes]
    if any(shape is None for shape in shapes) or len({len(shape) for shape in shapes if shape is not None}) != 1:
        return None
    result: list[int | str | None] = []
    for sizes in zip(*(shape for shape in shapes if shape is not None), strict=True):
        if None in sizes:
            result.append(None)
        elif len(set(sizes)) == 1:
            result.append(sizes[0])
        else:
            result.append("N" if tuple(sizes) == tuple(batches) else None)
    return tuple(result)


def _set_type(value: onnx.ValueInfoProto, kind: int, sizes: Sequence[int | str | None] | None) -> None:
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind or onnx.TensorProto.FLOAT, sizes))
