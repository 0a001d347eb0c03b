"""A graph under change: nodes in a list, constants by name, and the few moves that every rewrite is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from zsq_deploy.model.graph import attributes
from zsq_deploy.model.shapes import Array

__all__ = ["Net", "is_default"]


def is_default(node: onnx.NodeProto, *op_types: str) -> bool:
    """Whether a node is one of these operators of the default domain."""
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


class Net:
    """The content of a model in a form that is quick to change; :meth:`proto` writes it back.

    Args:
        proto: The model; it is copied.

    Attributes:
        nodes: In topological order.
        inputs: Value infos of the inputs that are no initializers.
        outputs: Value infos of the outputs.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._model = onnx.ModelProto()
        self._model.ir_version = proto.ir_version
        self._model.opset_import.extend(proto.opset_import)
        self._model.producer_name = proto.producer_name
        self._model.producer_version = proto.producer_version
        self._model.graph.name = proto.graph.name or "graph"
        self._tensors: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._arrays: dict[str, Array] = {}
        self.nodes: list[onnx.NodeProto] = []
        for node in proto.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            self.nodes.append(copy)
        self.inputs = [_copy_value(value) for value in proto.graph.input if value.name not in self._tensors]
        self.outputs = [_copy_value(value) for value in proto.graph.output]
        self._values = {name for node in self.nodes for name in (*node.input, *node.output) if name}
        self._values |= set(self._tensors) | {value.name for value in (*self.inputs, *self.outputs)}
        self._names = {node.name for node in self.nodes}
        self._alive: set[int] | None = None
        self._readers: dict[str, list[onnx.NodeProto]] | None = None
        self._makers: dict[str, onnx.NodeProto] | None = None

    def copy(self) -> Net:
        """An independent copy."""
        return Net(self.proto())

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next((int(o.version) for o in self._model.opset_import if o.domain in ("", "ai.onnx")), 1)

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        return [value.name for value in self.outputs]

    @property
    def constants(self) -> Iterable[str]:
        """Names of all initializers."""
        return self._tensors.keys()

    def constant(self, name: str) -> Array | None:
        """The array behind an initializer, or ``None``."""
        if name not in self._arrays:
            if name not in self._tensors:
                return None
            self._arrays[name] = numpy_helper.to_array(self._tensors[name])
        return self._arrays[name]

    def arrays(self) -> dict[str, Array]:
        """All initializers as arrays."""
        return {name: value for name in self._tensors if (value := self.constant(name)) is not None}

    def touch(self) -> None:
        """Forget what is indexed; call it after changing nodes or the list directly."""
        self._alive = self._readers = self._makers = None

    def holds(self, node: onnx.NodeProto) -> bool:
        """Whether this very node is (still) in the list."""
        if self._alive is None:
            self._alive = {id(item) for item in self.nodes}
        return id(node) in self._alive

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node behind every computed value."""
        if self._makers is None:
            self._makers = {name: node for node in self.nodes for name in node.output if name}
        return self._makers

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each value, each once."""
        if self._readers is None:
            self._readers = {}
            for node in self.nodes:
                for name in dict.fromkeys(node.input):
                    if name:
                        self._readers.setdefault(name, []).append(node)
        return self._readers

    # -- changing -----------------------------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """A value name that is not taken: `name`, or `name` with a number."""
        candidate, number = name, 0
        while candidate in self._values:
            number += 1
            candidate = f"{name}_{number}"
        self._values.add(candidate)
        return candidate

    def fresh_node(self, name: str) -> str:
        """A node name that is not taken."""
        candidate, number = name, 0
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate

    def add_constant(self, name: str, value: Array, *, exact: bool = False) -> str:
        """Store an initializer and return its name.

        Args:
            name: Wanted name; a number is added when it is taken.
            value: Its content.
            exact: Take over the name although it is in use (the value that had it is replaced).
        """
        name = name if exact else self.fresh(name)
        self._values.add(name)
        self._tensors[name] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        self._arrays[name] = value
        return name

    def new_node(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attribute: Any
    ) -> onnx.NodeProto:
        """A node with a unique name; it is not yet in the list."""
        return helper.make_node(op_type, list(inputs), list(outputs), name=self.fresh_node(name), **attribute)

    def insert_before(self, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
        """Put nodes in front of another one."""
        index = next(i for i, item in enumerate(self.nodes) if item is node)
        self.nodes[index:index] = new
        self.touch()

    def remove(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Take nodes out of the list."""
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        self.touch()

    def splice(self, node: onnx.NodeProto, branch: onnx.GraphProto) -> None:
        """Put the content of a branch in the place of the node that owns it."""
        renamed: dict[str, str] = {}
        for inner in branch.node:
            for name in inner.output:
                if name:
                    renamed[name] = self.fresh(name)
        for tensor in branch.initializer:
            renamed[tensor.name] = self.add_constant(tensor.name, numpy_helper.to_array(tensor))
        new: list[onnx.NodeProto] = []
        for inner in branch.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(inner)
            copy.name = self.fresh_node(inner.name or f"{node.name}/{inner.op_type}")
            _rename(copy, renamed)
            new.append(copy)
        for value, target in zip(branch.output, node.output, strict=True):
            source = renamed.get(value.name, value.name)
            new.append(self.new_node("Identity", [source], [target], f"{node.name}/Identity"))
        index = next(i for i, item in enumerate(self.nodes) if item is node)
        self.nodes[index : index + 1] = new
        self.touch()

    def redirect(self, old: str, new: str) -> None:
        """Let all readers of one value read another."""
        for node in list(self.consumers().get(old, [])):
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
        self.touch()

    def bypass(self, node: onnx.NodeProto) -> bool:
        """Remove a node whose first output equals its first input; says whether that was possible.

        Output names of the graph stay. Where both ends are an input, a constant or an output of the graph, the node has to
        stay as well (as Identity).
        """
        source, target = node.input[0], node.output[0]
        if target not in self.output_names:
            self.redirect(target, source)
            self.remove([node])
            return True
        producer = self.producers().get(source)
        if producer is None or source in self.output_names:
            if node.op_type != "Identity":
                name = node.name
                node.CopyFrom(helper.make_node("Identity", [source], [target], name=name))
                self.touch()
                return True
            return False
        self.remove([node])
        self.redirect(source, target)
        producer.output[list(producer.output).index(source)] = target
        self.touch()
        return True

    def sweep(self) -> bool:
        """Remove nodes and initializers that no output needs; says whether there were any."""
        needed = set(self.output_names)
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output if name):
                kept.append(node)
                needed.update(name for name in node.input if name)
                for attribute in node.attribute:  # branches of control flow read values of the graph around them
                    for graph in (attribute.g, *attribute.graphs):
                        needed.update(name for inner in graph.node for name in inner.input)
        changed = len(kept) != len(self.nodes)
        self.nodes = kept[::-1]
        self.touch()
        for name in [name for name in self._tensors if name not in needed]:
            del self._tensors[name]
            self._arrays.pop(name, None)
            changed = True
        for node in self.nodes:
            fewest = _fewest_outputs(node, self.opset)
            while len(node.output) > fewest and node.output[-1] not in needed:
                del node.output[-1]
        return changed

    def skeleton(self) -> onnx.ModelProto:
        """The model without its initializers, which is cheap to make."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.node.extend(self.nodes)
        model.graph.input.extend(self.inputs)
        model.graph.output.extend(self.outputs)
        return model

    def proto(self, value_info: Iterable[onnx.ValueInfoProto] = ()) -> onnx.ModelProto:
        """The model as a new protobuf."""
        model = self.skeleton()
        model.graph.initializer.extend(self._tensors.values())
        model.graph.value_info.extend(value_info)
        used = {("" if node.domain == "ai.onnx" else node.domain) for node in self.nodes} | {""}
        imports = [o for o in model.opset_import if ("" if o.domain == "ai.onnx" else o.domain) in used]
        del model.opset_import[:]
        model.opset_import.extend(sorted(imports, key=lambda o: str(o.domain)))
        return model

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Attributes of a node as Python values."""
        return attributes(node)


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Rename the values of a node, in branches that it owns as well."""
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)
    for index, name in enumerate(node.output):
        node.output[index] = names.get(name, name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            own = {name for inner in graph.node for name in inner.output} | {t.name for t in graph.initializer}
            outer = {old: new for old, new in names.items() if old not in own}
            for inner in graph.node:
                _rename(inner, outer)


def _fewest_outputs(node: onnx.NodeProto, opset: int) -> int:
    """How many outputs the operator must have; all of them where that is not known."""
    if node.domain not in ("", "ai.onnx") or node.op_type == "Split":
        return len(node.output)
    try:
        return max(1, int(onnx.defs.get_schema(node.op_type, opset, "").min_output))
    except Exception:  # an operator that this version of the ONNX project does not know
        return len(node.output)


def _copy_value(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    return copy
