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
from collections import OrderedDict
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

from zsq_deploy.backends.base import Engine, Target
from zsq_deploy.backends.openvino.lowered import Lowered, Source, lower
from zsq_deploy.backends.openvino.reading import read
from zsq_deploy.backends.openvino.runner import OvRunner, properties
from zsq_deploy.backends.openvino.steps import Step, Values, bind
from zsq_deploy.backends.openvino.targets import TARGETS
from zsq_deploy.errors import DataError, EngineError, UnsupportedOpError
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import QuantizedTensor, read_qdq

__all__ = ["IntegerReference", "ReferenceNode"]

Array = npt.NDArray[Any]

_KEPT = 3
"""Looks at an engine (one a shape of the inputs) that a reference keeps."""


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


class _Plan:
    """The executed nodes for inputs of one shape, bound to our kernels.

    Args:
        runner: The engine as OpenVINO runs it.
        feeds: Inputs of the shape.
        qdq: The Q/DQ graph, for the names of its tensors.
    """

    def __init__(self, runner: OvRunner, feeds: Mapping[str, Array], qdq: Graph | None) -> None:
        self.lowered: Lowered = lower(runner, feeds)
        self._values = Values(self.lowered, properties(runner.target, threads=runner.threads, session=runner.session))
        self.steps: list[Step] = []
        unknown: list[str] = []
        for group in self.lowered.groups:
            try:
                self.steps.append(bind(self.lowered, group))
            except UnsupportedOpError as error:
                unknown.append(error.what)
        if unknown:
            raise UnsupportedOpError(
                f"the integer reference does not know {len(unknown)} operator(s) on 8-bit values: {'; '.join(unknown)}",
                where=str(runner.path),
                remedy="leave these layers out of quantization, or compare with the fake-quant reference only",
            )
        self.names, self._shifts = self._named(qdq)
        self._last = self._last_uses()
        self.places = {name: source for source, name in self.names.items()}
        self.places.update({name: Source(op.key, 0) for name, op in self.lowered.inputs.items()})
        self.places.update({name: self.lowered.seen(source) for name, source in self.lowered.outputs.items()})

    def outputs_of(self, step: Step) -> list[str]:
        """Names of the values of an executed node."""
        last = step.group.ops[-1]
        return [self.names[Source(last.key, port)] for port in range(len(last.outputs))]

    def inputs_of(self, step: Step) -> list[str]:
        """Names of the values of executed nodes that an executed node reads."""
        own = step.group.ops[-1].key
        read = dict.fromkeys(
            inner
            for op in step.group.ops
            for source in op.inputs
            if source is not None
            for inner in self._behind(source)
        )
        return [self.names[source] for source in read if source in self.names and source.op != own]

    def _named(self, qdq: Graph | None) -> tuple[dict[Source, str], dict[str, int]]:
        """A name for every value of an executed node; and for codes of the Q/DQ graph what is to be added to the plugin's."""
        tensors: dict[str, QuantizedTensor] = {}
        if qdq is not None:
            tensors = {t.codes: t for t in read_qdq(qdq) if t.quantize is not None and not t.is_weight}
        by_node = {
            node: codes
            for codes, tensor in tensors.items()
            for node in (tensor.output, *tensor.dequantize, tensor.quantize)
            if node
        }
        names: dict[Source, str] = {}
        shifts: dict[str, int] = {}
        used: set[str] = set()
        for step in self.steps:
            last = step.group.ops[-1]
            for port, shown in enumerate(last.outputs):
                exit_ = last.exits[port] if last.body else None
                given = shown if exit_ is None else (*shown, *self.lowered.ops[exit_.op].outputs[exit_.port])
                codes = [name for name in (*given, by_node.get(last.name, "")) if name in tensors]
                exact = step.group.precision in ("u8", "i8")
                choices = [*(codes if exact else []), *(n for n in given if n not in tensors), last.name]
                name = next((c for c in choices if c and c not in used), f"{last.name}.{last.key}.{port}")
                used.add(name)
                names[Source(last.key, port)] = name
                if name in tensors:
                    shifts[name] = tensors[name].limits[0] - (-128 if step.group.precision == "i8" else 0)
        return names, shifts

    def _behind(self, source: Source) -> Iterator[Source]:
        """A value, and those from which it is made when no executed node makes it."""
        source = self.lowered.seen(source)
        yield source
        op = self.lowered.ops[source.op]
        if op.constant is None and op.type != "Parameter" and source not in self.names:
            for inner in op.inputs:
                if inner is not None:
                    yield from self._behind(inner)

    def _last_uses(self) -> list[list[Source]]:
        """For each step the values that nothing after it reads."""
        last: dict[Source, int] = {}
        for index, step in enumerate(self.steps):
            for op in step.group.ops:
                for port in range(len(op.outputs)):
                    last[Source(op.key, port)] = index
                for source in op.inputs:
                    if source is not None:
                        last.update(dict.fromkeys(self._behind(source), index))
        shown = {inner for source in self.lowered.outputs.values() for inner in self._behind(source)}
        dead: list[list[Source]] = [[] for _ in self.steps]
        for source, index in last.items():
            if source not in shown:
                dead[index].append(source)
        return dead

    def run(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
        """The named values for one batch."""
        self._values.clear()
        for name, op in self.lowered.inputs.items():
            self._values.put(op, [np.asarray(feeds[name])])
        keep = {self.places[name] for name in wanted}
        try:
            for step, dead in zip(self.steps, self._last, strict=True):
                step.run(self._values)
                for source in dead:
                    if source not in keep:
                        self._values.drop(source)
            return {name: self._shown(name, self._values.get(self.places[name])) for name in wanted}
        finally:
            self._values.clear()

    def _shown(self, name: str, array: Array) -> Array:
        if name in self.lowered.types:
            return np.asarray(array, self.lowered.types[name])
        shift = self._shifts.get(name, 0)
        if shift == 0 or array.dtype.kind not in "iu":
            return array
        moved = array.astype(np.int16) + shift
        return moved.astype(np.int8 if shift < 0 else np.uint8)


class IntegerReference:
    """Evaluates an engine in exact integer arithmetic.

    Like the runner, it looks at the engine once for every shape of the inputs: the plugin may fuse other things for another batch size.

    Args:
        engine: The engine, or the file that OpenVINO loads (IR or Q/DQ ONNX).
        threads: Threads for our arithmetic and for the plugin's float kernels (results do not depend on it).
        target: Whose properties to run it with. Default: the engine's; ``openvino-cpu`` for a file.
        qdq: The Q/DQ graph; its tensors are found again by name. Default: that of the engine; none for a file.

    Attributes:
        graph: One node an executed node of the plugin, its values named as in the Q/DQ graph where they hold a tensor of it (for batch 1;
            a drawing for walking along values, no file that any runtime loads).
        integer_nodes: Nodes computed by our kernels.
        moving_nodes: Nodes that only move or compare values, evaluated by us.
        float_nodes: Float islands, computed by the plugin's float kernels one by one.
        shape_nodes: Nodes that compute shapes.

    Raises:
        UnsupportedOpError: An operator on 8-bit codes is unknown; all of them are named.
        EngineError: The file cannot be loaded, or not on a CPU.
    """

    def __init__(
        self,
        engine: Engine | Path | str,
        *,
        threads: int = 1,
        target: Target | None = None,
        qdq: Path | Graph | None = None,
    ) -> None:
        started = time.perf_counter()
        if isinstance(engine, Engine):
            self.path, target = engine.path, target or engine.target
            qdq = engine.qdq_path if qdq is None else qdq
        else:
            self.path, target = Path(engine), target or TARGETS[0]
        self.target = target
        self.threads = threads
        self._runner = OvRunner(self.path, target, threads=threads)
        self._qdq = Graph.load(qdq) if isinstance(qdq, Path) else qdq
        self._plans: OrderedDict[tuple[tuple[int, ...], ...], _Plan] = OrderedDict()
        self.input_names = tuple(self._runner.input_names)
        self.output_names = tuple(self._runner.output_names)
        first = self._plan(self._first_feeds())
        self.graph = self._drawn(first)
        by_role: dict[str, list[ReferenceNode]] = {"integer": [], "moving": [], "float": [], "shape": []}
        for step in first.steps:
            title = "+".join([step.group.kind, *(op.type for op in step.group.ops[1:])])
            by_role[step.role].append(ReferenceNode(step.group.name, title, tuple(first.outputs_of(step))))
        self.integer_nodes = tuple(by_role["integer"])
        self.moving_nodes = tuple(by_role["moving"])
        self.float_nodes = tuple(by_role["float"])
        self.shape_nodes = tuple(by_role["shape"])
        self.load_ms = (time.perf_counter() - started) * 1000

    def _first_feeds(self) -> dict[str, Array]:
        """Zeros in the shapes of the inputs with batch 1 (and 64 for other sizes that are open)."""
        feeds: dict[str, Array] = {}
        for name, port in zip(self.input_names, read(self.path).inputs, strict=True):
            sizes = [size.get_length() if size.is_static else None for size in port.partial_shape]
            shape = [(64 if place else 1) if size is None else int(size) for place, size in enumerate(sizes)]
            feeds[name] = np.zeros(shape, np.dtype(port.element_type.to_dtype()))
        return feeds

    def _plan(self, feeds: Mapping[str, Array]) -> _Plan:
        key = tuple(tuple(np.shape(feeds[name])) for name in self.input_names)
        if key not in self._plans:
            self._plans[key] = _Plan(self._runner, feeds, self._qdq)
            while len(self._plans) > _KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _drawn(self, plan: _Plan) -> Graph:
        nodes = [
            helper.make_node(
                step.group.kind, plan.inputs_of(step), plan.outputs_of(step), step.group.name, domain="openvino"
            )
            for step in plan.steps
        ]
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

        Raises:
            DataError: An input is missing.
            EngineError: There is no value of that name.
        """
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise DataError(
                f"no data for input(s) {', '.join(missing)}",
                where=str(self.path),
                remedy=f"feed {', '.join(self.input_names)}",
            )
        count = self._runner.samples_apart(feeds)
        if count > 1:  # the file insists on a batch of 1
            parts = [
                self.run({name: value[at : at + 1] for name, value in feeds.items()}, fetch) for at in range(count)
            ]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        plan = self._plan(feeds)
        wanted = list(self.output_names if fetch is None else fetch)
        unknown = [name for name in wanted if name not in plan.places]
        if unknown:
            raise EngineError(
                f"the executed graph has no value(s) {', '.join(unknown)}",
                where=str(self.path),
                remedy="the plugin fused them away; ask for names of reference.graph",
            )
        with _torch_threads(self.threads):
            return plan.run(feeds, wanted)

    def intermediates(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every value of an executed node for one batch, in order of execution."""
        one = {name: value[:1] for name, value in feeds.items()} if self._runner.samples_apart(feeds) > 1 else feeds
        return self.run(feeds, list(self._plan(one).names.values()))


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
