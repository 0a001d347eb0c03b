"""A graph being rewritten: small tools that every rewrite of this backend uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from zsq_deploy.model.graph import Graph

__all__ = ["Editor"]

Array = npt.NDArray[Any]


class Editor:
    """One graph, changed in place and indexed anew after each change.

    Attributes:
        proto: The model that is changed.
        graph: Its index, as of the last :meth:`refresh`.
        aliases: New value name -> name of the original value with the same numbers.
        ranges: New value name -> range that follows from what it is.
        log: What was rewritten, one line each.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.aliases: dict[str, str] = {}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.log: list[str] = []
        self.graph = Graph(proto)

    def refresh(self) -> None:
        """Index the graph again."""
        self.graph = Graph(self.proto)

    def fresh(self, base: str) -> str:
        """A value or node name that is not taken."""
        taken = {node.name for node in self.proto.graph.node}
        taken.update(name for node in self.proto.graph.node for name in (*node.input, *node.output))
        taken.update(tensor.name for tensor in self.proto.graph.initializer)
        name, number = base, 1
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        return name

    def add_initializer(self, base: str, array: Array) -> str:
        """Add a constant; returns its name."""
        name = self.fresh(base)
        self.proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def index(self, node: onnx.NodeProto) -> int:
        """Where a node stands."""
        return next(i for i, one in enumerate(self.proto.graph.node) if one.name == node.name)

    def replace(self, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
        """Put nodes into the place of one."""
        at = self.index(node)
        kept = list(self.proto.graph.node)
        kept[at : at + 1] = list(new)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(kept)

    def remove(self, *nodes: onnx.NodeProto) -> None:
        """Take nodes out."""
        names = {node.name for node in nodes}
        kept = [node for node in self.proto.graph.node if node.name not in names]
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(kept)

    def reshaped(self, name: str, array: Array) -> str:
        """An initializer with new contents: under its old name where nobody else reads it."""
        if len(self.graph.consumers(name)) == 1 and name in self.graph.initializer_names:
            tensor = next(one for one in self.proto.graph.initializer if one.name == name)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
            return name
        return self.add_initializer(f"{name}__copy", array)

    def sole_consumer(self, value: str) -> onnx.NodeProto | None:
        """The one node that reads a value, unless the value is also an output."""
        readers = self.graph.consumers(value)
        if len(readers) != 1 or self.graph.is_output(value) or list(readers[0].input).count(value) != 1:
            return None
        return readers[0]

    def shape(self, value: str) -> tuple[int | None, ...] | None:
        """The shape of a value, as far as it is known."""
        return self.graph.shape(value)
