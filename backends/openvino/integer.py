"""The exact integer reference of an OpenVINO engine: what the CPU plugin must compute, bit for bit.

The *structure* (which operators were fused, with which constants) is read from the plugin itself
(:mod:`zsq_deploy.backends.openvino.lowered`). The *arithmetic* is ours: sums of products of 8-bit codes are exact integers
(:mod:`zsq_deploy.quant.integer`), and what follows them is done in the plugin's own order of float32 roundings
(:mod:`zsq_deploy.backends.openvino.kernels`; described in ``docs/openvino-arithmetic.md``).

What computes with floating-point numbers only (layer normalization, softmax, activation functions) is a *float island*: each such operator
is computed by the plugin's own float kernel, as a model of its own, and listed in :attr:`IntegerReference.float_nodes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper

from zsq_deploy.backends.base import Engine
from zsq_deploy.backends.openvino.lowered import Lowered, Op, Source, lower, properties
from zsq_deploy.backends.openvino.steps import Step, Values, bind
from zsq_deploy.errors import DataError, EngineError, UnsupportedOpError
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import read_qdq

__all__ = ["IntegerReference", "ReferenceNode"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ReferenceNode:
    """How one executed node is evaluated.

    Attributes:
        name: Its name.
        op: Its type in the plugin with the operators fused into it, ``Convolution+Multiply+Add+FakeQuantize``.
        outputs: Names of its values.
    """

    name: str
    op: str
    outputs: tuple[str, ...]


class IntegerReference:
    """Evaluates an engine in exact integer arithmetic.

    Args:
        engine: The engine, or the file that OpenVINO loads (IR or Q/DQ ONNX), which is then run with the target's defaults.
        threads: Threads for our arithmetic and for the plugin's float kernels (results do not depend on it).
        qdq: The Q/DQ graph; its tensors are found again by name. Default: that of the engine.

    Attributes:
        graph: One node an executed node of the plugin, its values named as in the Q/DQ graph where they hold a tensor of it.
        integer_nodes: Nodes computed by our kernels.
        moving_nodes: Nodes that only move or compare values, evaluated by us.
        float_nodes: Float islands, computed by the plugin's float kernels one by one.
        shape_nodes: Nodes that compute shapes.

    Raises:
        UnsupportedOpError: An operator on 8-bit codes is unknown; all of them are named.
        EngineError: The file cannot be loaded.
    """

    def __init__(self, engine: Engine | Path | str, *, threads: int = 1, qdq: Path | Graph | None = None) -> None:
        started = time.perf_counter()
        if isinstance(engine, Engine):
            self.path, session = engine.path, engine.target.session
            qdq = engine.qdq_path if qdq is None else qdq
        else:
            self.path, session = Path(engine), {}
        self.threads = threads
        config = properties(session, threads)
        self.lowered: Lowered = lower(self.path, config)
        self._values = Values(self.lowered, config)
        self._steps: list[Step] = []
        unknown: list[str] = []
        for group in self.lowered.groups:
            try:
                self._steps.append(bind(self.lowered, group))
            except UnsupportedOpError as error:
                unknown.append(error.what)
        if unknown:
            raise UnsupportedOpError(
                f"the integer reference does not know {len(unknown)} operator(s) on 8-bit values: {'; '.join(unknown)}",
                where=str(self.path),
                remedy="leave these layers out of quantization, or compare with the fake-quant reference only",
            )
        self.input_names = tuple(self.lowered.inputs)
        self.output_names = tuple(self.lowered.outputs)
        found = Graph.load(qdq) if isinstance(qdq, Path | str) else qdq
        self._names, self._shifts = self._named(found)
        self.graph = self._drawn()
        by_role: dict[str, list[ReferenceNode]] = {"integer": [], "moving": [], "float": [], "shape": []}
        for step in self._steps:
            last = step.group.ops[-1]
            names = tuple(self._names[Source(last.key, port)] for port in range(len(last.outputs)))
            by_role[step.role].append(ReferenceNode(step.group.name, _title(step), names))
        self.integer_nodes = tuple(by_role["integer"])
        self.moving_nodes = tuple(by_role["moving"])
        self.float_nodes = tuple(by_role["float"])
        self.shape_nodes = tuple(by_role["shape"])
        self.load_ms = (time.perf_counter() - started) * 1000

    def _named(self, qdq: Graph | None) -> tuple[dict[Source, str], dict[str, int]]:
        """A name for every value of an executed node; and for codes of the Q/DQ graph what is to be added to the plugin's."""
        tensors = (
            {} if qdq is None else {t.codes: t for t in read_qdq(qdq) if t.quantize is not None and not t.is_weight}
        )
        by_node = {tensor.quantize: codes for codes, tensor in tensors.items()}
        names: dict[Source, str] = {}
        shifts: dict[str, int] = {}
        used: set[str] = set()
        for step in self._steps:
            last = step.group.ops[-1]
            for port, given in enumerate(last.outputs):
                codes = [name for name in (*given, by_node.get(last.name, "")) if name in tensors]
                exact = step.group.precision in ("u8", "i8")
                choices = [*(codes if exact else []), *(n for n in given if n not in tensors), last.name]
                name = next((c for c in choices if c and c not in used), f"{last.name}.{last.key}.{port}")
                used.add(name)
                names[Source(last.key, port)] = name
                if name in tensors:
                    smallest = tensors[name].limits[0]
                    shifts[name] = smallest - (-128 if step.group.precision == "i8" else 0)
        return names, shifts

    def _drawn(self) -> Graph:
        """The executed nodes as a graph: a drawing for walking along values, not a file that any runtime loads."""
        nodes = []
        for step in self._steps:
            sources = dict.fromkeys(s for op in step.group.ops for s in op.inputs if s is not None)
            last = step.group.ops[-1]
            inputs = [self._names[r] for s in sources for r in self._behind(s) if r in self._names and r.op != last.key]
            outputs = [self._names[Source(last.key, port)] for port in range(len(last.outputs))]
            nodes.append(helper.make_node(step.group.kind, inputs, outputs, step.group.name, domain="openvino"))
        info = helper.make_tensor_value_info
        inputs = [info(name, onnx.TensorProto.FLOAT, None) for name in self.input_names]
        outputs = [info(name, onnx.TensorProto.FLOAT, None) for name in self.output_names]
        graph = helper.make_graph(nodes, "executed", inputs, outputs)
        return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("openvino", 1)], ir_version=8))

    def run(self, feeds: Mapping[str, Array], fetch: Sequence[str] | None = None) -> dict[str, Array]:
        """Outputs for one batch.

        Args:
            feeds: One array an input, as the engine takes them.
            fetch: Values to return: outputs, or any value of :attr:`graph`. Default: all outputs.

        Returns:
            Arrays by name: float where the engine's value is float, codes (of the Q/DQ graph's type) where it is quantized.
        """
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise DataError(
                f"no data for input(s) {', '.join(missing)}",
                where=str(self.path),
                remedy=f"feed {', '.join(self.input_names)}",
            )
        places = {name: source for source, name in self._names.items()}
        places.update({name: Source(op.key, 0) for name, op in self.lowered.inputs.items()})
        places.update({name: self.lowered.seen(source) for name, source in self.lowered.outputs.items()})
        wanted = list(self.output_names if fetch is None else fetch)
        unknown = [name for name in wanted if name not in places]
        if unknown:
            raise EngineError(
                f"the executed graph has no value(s) {', '.join(unknown)}",
                where=str(self.path),
                remedy="the plugin fused them away; ask for names of reference.graph",
            )
        self._values.clear()
        for name, op in self.lowered.inputs.items():
            self._values.put(op, [_fed(op, np.asarray(feeds[name]))])
        keep = {places[name] for name in wanted}
        try:
            with _torch_threads(self.threads):
                for step, dead in zip(self._steps, self._last_uses, strict=True):
                    step.run(self._values)
                    for source in dead:
                        if source not in keep:
                            self._values.drop(source)
                return {name: self._shown(name, self._values.get(places[name])) for name in wanted}
        finally:
            self._values.clear()

    def _shown(self, name: str, array: Array) -> Array:
        shift = self._shifts.get(name, 0)
        if shift == 0 or array.dtype.kind not in "iu":
            return array
        moved = array.astype(np.int16) + shift
        return moved.astype(np.int8 if shift < 0 else np.uint8)

    @property
    def _last_uses(self) -> list[list[Source]]:
        """For each step the values of executed nodes that nothing after it reads."""
        if not hasattr(self, "_dead"):
            last: dict[Source, int] = {}
            for index, step in enumerate(self._steps):
                for op in step.group.ops:
                    for port in range(len(op.outputs)):
                        last[Source(op.key, port)] = index
                    for source in op.inputs:
                        if source is not None:
                            for read in self._behind(source):
                                last[read] = index
            shown = {read for source in self.lowered.outputs.values() for read in self._behind(source)}
            self._dead: list[list[Source]] = [[] for _ in self._steps]
            for source, index in last.items():
                if source not in shown:
                    self._dead[index].append(source)
        return self._dead

    def _behind(self, source: Source) -> Iterator[Source]:
        """A value, and those from which it is made when no executed node makes it."""
        source = self.lowered.seen(source)
        yield source
        op = self.lowered.ops[source.op]
        if op.constant is None and op.type != "Parameter" and source not in self._names:
            for inner in op.inputs:
                if inner is not None:
                    yield from self._behind(inner)

    def intermediates(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every value of an executed node for one batch, in order of execution."""
        return self.run(feeds, list(self._names.values()))


def _title(step: Step) -> str:
    return "+".join([step.group.kind, *(op.type for op in step.group.ops[1:])])


def _fed(op: Op, array: Array) -> Array:
    return np.asarray(array, np.float32) if op.precisions[0] == "f32" else array


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
