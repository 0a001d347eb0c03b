"""The ONNX graph under construction: names of values, constants, nodes, and the Q/DQ pairs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import openvino as ov
from onnx import helper, numpy_helper

from zsq_deploy.backends.openvino.ir.constants import Constants, Key, is_unit, key_of, plain
from zsq_deploy.backends.openvino.ir.registry import Op, UnsupportedFormError
from zsq_deploy.backends.openvino.ir.rounding import Rounding
from zsq_deploy.backends.openvino.ir.stored import Stored, layout
from zsq_deploy.model.graph import Graph

__all__ = ["IR_VERSION", "OPSET", "Writer"]

OPSET = 21
IR_VERSION = 10

Array = npt.NDArray[Any]

_DQ = "_DequantizeLinear_Output"


class Writer:
    """Collects the nodes and constants of one graph.

    Args:
        ops: All operations of the IR in topological order.
        like: The float graph whose value names are wanted.

    Attributes:
        names: ONNX value name of every output of the IR.
        nodes: Nodes so far.
        notes: What could not be said with QuantizeLinear and DequantizeLinear alone, one sentence each.
        like: As given.
    """

    def __init__(self, ops: Sequence[ov.Node], like: Graph | None) -> None:
        self.like = like
        self.nodes: list[onnx.NodeProto] = []
        self.notes: list[str] = []
        self.names: dict[Key, str] = {}
        self.bias_adds: dict[Key, Op] = {}
        self.tensors: dict[str, onnx.TensorProto] = {}
        self._taken: set[str] = set()
        self._made: set[str] = set()  # outputs of the nodes so far
        self._node_names: set[str] = set()
        self.written: dict[tuple[Any, ...], str] = {}
        self._name_values(ops)
        self._constants = Constants(self.names)

    # -- names --------------------------------------------------------------------------------------------------------

    key = staticmethod(key_of)

    def _known(self) -> tuple[set[str], set[str]]:
        """Names of the float graph: inputs and outputs, and all values."""
        if self.like is None:
            return set(), set()
        ends = {spec.name for spec in (*self.like.inputs, *self.like.outputs)}
        every = ends | {name for node in self.like.nodes for name in node.output if name}
        return ends, every | set(self.like.initializer_names)

    def _name_values(self, ops: Sequence[ov.Node]) -> None:
        ends, known = self._known()
        waiting: list[tuple[Key, ov.Node]] = []
        for node in ops:
            if node.get_type_name() == "Result":
                continue
            for output in node.outputs():
                given = sorted(output.get_names(), key=lambda name: (name not in ends, name not in known, name))
                chosen = next((name for name in given if name not in self._taken), None)
                if chosen is not None:
                    self.names[self.key(output)] = chosen
                    self._taken.add(chosen)
                    continue
                waiting.append((self.key(output), node))
        self._taken |= ends | known
        for key, node in waiting:
            wanted = node.get_friendly_name()
            if node.get_type_name() == "FakeQuantize":
                source = self.names[self.key(node.input(0).get_source_output())]
                wanted = f"{source.removesuffix('_quantized')}{_DQ}"
            elif node.get_output_size() > 1:
                wanted = f"{wanted}:{key[1]}"
            self.names[key] = self.fresh(wanted)
        self._given = set(self.names.values())

    def rename(self, key: Key, name: str) -> None:
        """Call an input of the graph as the float graph calls it."""
        holder = next((other for other, taken in self.names.items() if taken == name and other != key), None)
        if holder is not None:
            self.names[holder] = self.fresh(name)
        self._taken.add(name)
        self.names[key] = name
        self._given = set(self.names.values())

    def deliver(self, value: str, name: str, fixed: Collection[str]) -> None:
        """Give a value the name that an output of the graph has to have.

        Args:
            value: The value.
            name: The name.
            fixed: Names that stay as they are: inputs and outputs of the graph.
        """
        if value == name:
            return
        if name in self._made or name in self.tensors:
            self._rename_everywhere(name, self.fresh(f"{name}_inner"))
        known = self.like is not None and self.like.producer(value) is not None
        if value in self._made and value not in fixed and not known:
            self._rename_everywhere(value, name)
        else:
            self.node("Identity", [value], [name], f"{name}_Identity", 1)

    def _rename_everywhere(self, old: str, new: str) -> None:
        for node in self.nodes:
            for field in (node.input, node.output):
                for place, value in enumerate(field):
                    if value == old:
                        field[place] = new
        for table in (self.names, self.written):
            for key, value in table.items():
                if value == old:
                    table[key] = new
        if old in self.tensors:
            self.tensors[new] = self.tensors.pop(old)
            self.tensors[new].name = new
        self._made.discard(old)
        self._made.add(new)

    def fresh(self, name: str) -> str:
        """A value name that is not taken: `name`, or `name` with a number."""
        candidate, number = name, 0
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def claim(self, name: str) -> str:
        """`name` itself when nothing written bears it yet (it may be a name of the float graph), else a fresh one."""
        if name in self.tensors or name in self._made or name in self._given:
            return self.fresh(name)
        self._taken.add(name)
        return name

    def like_node(self, value: str) -> onnx.NodeProto | None:
        """The node of the float graph that makes the value of that name."""
        return None if self.like is None else self.like.producer(value)

    # -- constants ----------------------------------------------------------------------------------------------------

    def stored(self, output: ov.Output) -> Stored | None:
        """The constant behind an output, with what is done to it on the way; ``None`` when the output is computed."""
        return self._constants.stored(output)

    def plain(self, output: ov.Output) -> Stored | None:
        """The plain numbers behind an output; ``None`` when it is computed, or rounded on the way."""
        return plain(self.stored(output))

    def constant(self, name: str, values: Array, *, share: bool = False) -> str:
        """Store an initializer; returns the name that it got.

        Args:
            name: Wanted name.
            values: Its content.
            share: Give back the earlier constant of this name when it holds the same numbers.
        """
        if share:
            key = ("constant", name, str(values.dtype), values.shape, values.tobytes())
            if key not in self.written:
                self.written[key] = self._store(name, values)
            return self.written[key]
        return self._store(name, values)

    def _store(self, name: str, values: Array) -> str:
        name = self.claim(name)
        self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
        return name

    # -- values and nodes ---------------------------------------------------------------------------------------------

    def value(self, output: ov.Output) -> str:
        """The ONNX value of an output; constants are written on first use."""
        key = self.key(output)
        stored = self.stored(output)
        if stored is None:
            return self.names[key]
        if ("stored", key) not in self.written:
            self.written["stored", key] = self.write_stored(stored, stored.name, read_as=self.names[key])
        return self.written["stored", key]

    def write_stored(self, stored: Stored, name: str, *, read_as: str | None = None) -> str:
        """Write a constant with its Q/DQ; returns the value that a node reads.

        Args:
            stored: The constant.
            name: What the float numbers are called.
            read_as: What the rounded numbers are called, where the IR has a name for them.
        """
        if stored.rounding is None:
            return self._store_named(name, stored.values)
        name = name.removesuffix("_quantized").removesuffix(_DQ)
        r = stored.rounding
        form = layout(r.scale, r.zero, stored.shape)
        if form is None or (r.dtype == "int32" and np.any(form.zero)):
            self.notes.append(
                f"the scales of the constant {name!r} vary in more than one direction: its numbers are written as float32"
            )
            return self._store_named(name, np.asarray(stored.read(), np.float32))
        if stored.codes:
            if is_unit(stored) and not np.any(r.zero):
                return self._store_named(name, stored.values.astype(np.float32))
            codes = self._store_named(f"{name}_quantized", self._typed(stored.values, r.dtype))
        else:
            values = np.asarray(stored.values, np.float32)
            if r.narrow:
                # the type has more codes than the IR uses: what lies beyond them is cut here
                values = np.clip(values, r.bottom, r.top)
            source = self._store_named(name, values)
            name = source
            codes = ""
        scale, zero = self._parameters(name, form.scale, form.zero, r.dtype)
        extra = {} if form.axis is None else {"axis": form.axis}
        if form.block:
            extra["block_size"] = form.block
        if not codes:
            codes = self.claim(f"{name}_QuantizeLinear_Output")
            self.node("QuantizeLinear", [name, scale, zero], [codes], f"{name}_QuantizeLinear", 1, **extra)
        made = self.claim(f"{name}{_DQ}") if read_as is None or not read_as.endswith(_DQ) else read_as
        self.node("DequantizeLinear", [codes, scale, zero], [made], f"{name}_DequantizeLinear", 1, **extra)
        return made

    def _store_named(self, name: str, values: Array) -> str:
        if name in self._given and name not in self.tensors and name not in self._made:
            # the constant's own name, reserved for it
            self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
            return name
        return self._store(name, values)

    @staticmethod
    def _typed(values: Array, kind: str) -> Array:
        if kind in ("int4", "uint4"):
            wanted = onnx.TensorProto.INT4 if kind == "int4" else onnx.TensorProto.UINT4
            return np.asarray(values.astype(helper.tensor_dtype_to_np_dtype(wanted)))
        return np.asarray(values.astype(kind))

    def _parameters(self, name: str, scale: Array, zero: Array, kind: str) -> tuple[str, str]:
        return (
            self._store(f"{name}_scale", np.asarray(scale, np.float32)),
            self._store(f"{name}_zero_point", self._typed(np.asarray(zero), kind)),
        )

    def round_pair(self, value: str, rounding: Rounding, rank: int | None, made: str) -> None:
        """Write QuantizeLinear and DequantizeLinear behind a computed value.

        Args:
            value: The float value.
            rounding: How it is rounded; at most one axis varies.
            rank: Its rank, where the scale has one number a channel.
            made: Name of the rounded value.
        """
        extra: dict[str, Any] = {}
        scale, zero = rounding.scale, rounding.zero
        if scale.size > 1:
            if rank is None:
                raise UnsupportedFormError("ranges of a channel for a tensor of unknown rank")
            shape = (1,) * (rank - scale.ndim) + scale.shape
            form = layout(scale.reshape(shape), zero.reshape(shape), shape)
            if form is None or form.block:
                raise UnsupportedFormError("ranges that vary in more than one direction")
            if form.axis is not None:
                extra["axis"] = form.axis
            scale, zero = form.scale, form.zero
        else:
            scale, zero = scale.reshape(()), zero.reshape(())
        if rounding.narrow:
            value = self._cut(value, rounding, rank)
        scale_name, zero_name = self._parameters(value, scale, zero, rounding.dtype)
        codes = self.fresh(f"{value}_QuantizeLinear_Output")
        self.node("QuantizeLinear", [value, scale_name, zero_name], [codes], f"{value}_QuantizeLinear", 1, **extra)
        self.node("DequantizeLinear", [codes, scale_name, zero_name], [made], f"{value}_DequantizeLinear", 1, **extra)

    def _cut(self, value: str, rounding: Rounding, rank: int | None) -> str:
        """Keep a value inside the codes that are used, where the type has more."""
        bottom, top = rounding.bottom, rounding.top
        if bottom.size == 1:
            low = self._store(f"{value}_lowest", bottom.reshape(()))
            high = self._store(f"{value}_highest", top.reshape(()))
            return self.node("Clip", [value, low, high], None, f"{value}_Clip", 1)[0]
        assert rank is not None
        shape = (1,) * (rank - bottom.ndim) + bottom.shape
        low = self._store(f"{value}_lowest", bottom.reshape(shape))
        high = self._store(f"{value}_highest", top.reshape(shape))
        raised = self.node("Max", [value, low], None, f"{value}_Max", 1)[0]
        return self.node("Min", [raised, high], None, f"{value}_Min", 1)[0]

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None,
        name: str,
        count: int,
        **attributes: Any,
    ) -> list[str]:
        """Write a node; returns the names of its outputs (made up where none are given)."""
        unique, number = name, 0
        while unique in self._node_names:
            number += 1
            unique = f"{name}_{number}"
        self._node_names.add(unique)
        if outputs is None:
            outputs = [
                self.fresh(f"{unique}_output_{index}" if count > 1 else f"{unique}_output") for index in range(count)
            ]
        self._made.update(outputs)
        self.nodes.append(helper.make_node(op_type, list(inputs), list(outputs), unique, **attributes))
        return list(outputs)

    # -- the end ------------------------------------------------------------------------------------------------------

    def proto(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], title: str
    ) -> onnx.ModelProto:
        """The model, with the constants that are used."""
        used = {name for node in self.nodes for name in node.input} | {value.name for value in outputs}
        graph = helper.make_graph(
            self.nodes,
            title or "graph",
            list(inputs),
            list(outputs),
            [tensor for name, tensor in self.tensors.items() if name in used],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="zsq-deploy")
        model.ir_version = IR_VERSION
        return model
