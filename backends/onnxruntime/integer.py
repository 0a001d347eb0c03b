"""The exact integer reference of an ONNX Runtime engine: what the runtime must compute, bit for bit.

The *structure* (which operators were fused, in which layout) is taken from the runtime: it writes down the graph that it made
of the engine file. The *arithmetic* is ours: every node that computes with 8-bit codes is evaluated by
:mod:`zsq_deploy.backends.onnxruntime.kernels`, in exact integer accumulation and with the runtime's own rounding. Nothing that
touches an 8-bit code is ever handed to the runtime; an unknown integer operator is an error.

What is left are *float islands* (layer normalization, float softmax, ...): integer arithmetic says nothing about them, so each
is computed by the runtime's own float kernel as a graph of one node, and listed in :attr:`IntegerReference.float_nodes`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from zsq_deploy.backends.base import Engine, Target
from zsq_deploy.backends.onnxruntime.grouping import group
from zsq_deploy.backends.onnxruntime.kernels import (
    KERNELS,
    Arithmetic,
    Kernel,
    NodeSpec,
    arithmetic_for,
    arithmetic_here,
)
from zsq_deploy.backends.onnxruntime.runner import open_session, session_options
from zsq_deploy.errors import DataError, EngineError, UnsupportedOpError, UsageError
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["Divergence", "IntegerReference", "ReferenceNode", "arithmetic_on", "optimized_graph"]

Array = npt.NDArray[Any]

_CODE_TYPES = ("tensor(uint8)", "tensor(int8)", "tensor(uint4)", "tensor(int4)", "tensor(uint2)", "tensor(int2)")
_FLOAT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)")


@dataclass(frozen=True)
class ReferenceNode:
    """How one node of the optimized graph is evaluated.

    Attributes:
        name: Node name.
        op: Operator with its domain, ``com.microsoft.QLinearAdd``.
        outputs: Names of its values.
    """

    name: str
    op: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Divergence:
    """The first value in which the runtime and the reference differ.

    Attributes:
        value: Name of the value.
        node: Node that makes it.
        op: Its operator.
        share: Share of elements that differ.
        largest: Largest difference (codes for integers).
    """

    value: str
    node: str
    op: str
    share: float
    largest: float


def _unfused(options: ort.SessionOptions) -> ort.SessionOptions:
    """The same options with the graph taken as it is: what was fused stays fused, nothing else changes."""
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def optimized_graph(engine_path: Path, target: Target) -> Graph:
    """The graph that the runtime really executes for an engine file.

    Raises:
        EngineError: The runtime does not load the file.
    """
    with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
        written = Path(folder) / "optimized.onnx"
        options = session_options(target)
        options.optimized_model_filepath = str(written)
        open_session(engine_path, options)
        return Graph(onnx.load(str(written)))


def _read(path: Path) -> Graph:
    try:
        return Graph(onnx.load(str(path)))
    except Exception as error:  # protobuf's own exceptions have no common base
        raise EngineError(
            f"this is not an ONNX file: {error}", where=str(path), remedy="build the engine again"
        ) from error


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


class _RuntimeNode:
    """One float or shape node, evaluated by the runtime as a graph of its own."""

    def __init__(self, node: onnx.NodeProto, graph: Graph, options: ort.SessionOptions) -> None:
        self._node = node
        self._graph = graph
        self._options = options
        self._variable = [
            name for name in dict.fromkeys(node.input) if name and name not in set(graph.initializer_names)
        ]
        self._sessions: dict[tuple[str, ...], ort.InferenceSession] = {}

    def _session(self, arrays: Sequence[Array]) -> ort.InferenceSession:
        key = tuple(f"{array.dtype}/{array.ndim}" for array in arrays)
        if key not in self._sessions:
            node = onnx.NodeProto()
            node.CopyFrom(self._node)
            constants = [
                tensor for tensor in self._graph.proto.graph.initializer if tensor.name in set(self._node.input)
            ]
            inputs = [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
                )
                for name, array in zip(self._variable, arrays, strict=True)
            ]
            outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
            one = onnx.helper.make_graph([node], "one", inputs, outputs, constants)
            model = onnx.helper.make_model(
                one, opset_imports=list(self._graph.proto.opset_import), ir_version=self._graph.proto.ir_version
            )
            self._sessions[key] = ort.InferenceSession(
                model.SerializeToString(), self._options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[key]

    def __call__(self, values: Mapping[str, Array]) -> list[Array]:
        arrays = [values[name] for name in self._variable]
        session = self._session(arrays)
        feeds = {
            name: np.ascontiguousarray(array) if array.ndim else array
            for name, array in zip(self._variable, arrays, strict=True)
        }
        return list(session.run(None, feeds))


class IntegerReference:
    """Evaluates an engine file in exact integer arithmetic.

    Args:
        engine: The engine, or the Q/DQ file that the runtime loads.
        target: What it was built for; its session options decide which fusions happen. Taken from `engine` by default.
        threads: Threads for our arithmetic and for the runtime's float kernels (results do not depend on it).
        structure: Where the fusions come from: ``runtime`` (the graph that it writes down) or ``file`` (our own reading of the Q/DQ
            graph, :func:`zsq_deploy.backends.onnxruntime.grouping.group`).
        arithmetic: Rounding rules. Default: those of this machine, so that the comparison is with the engine as it runs here;
            :func:`arithmetic_for` gives those of a target's CPU.

    Attributes:
        graph: The graph of fused kernels that is evaluated.
        integer_nodes: Nodes computed by our integer kernels (sums, products, rounding).
        moving_nodes: Nodes that only move, compare or describe values, evaluated by us.
        float_nodes: Float islands, computed by the runtime's float kernels one by one.
        shape_nodes: Other nodes without any 8-bit or float value (shape arithmetic), computed by the runtime.

    Raises:
        UnsupportedOpError: An operator on 8-bit codes is unknown; all of them are named.
        EngineError: The file cannot be loaded.
    """

    def __init__(
        self,
        engine: Path | str | Engine,
        target: Target | None = None,
        *,
        threads: int = 1,
        structure: Literal["runtime", "file"] = "runtime",
        arithmetic: Arithmetic | None = None,
    ) -> None:
        started = time.perf_counter()
        if target is None:
            if not isinstance(engine, Engine):
                raise UsageError(
                    "an engine file alone does not say what it was built for",
                    where=str(engine),
                    remedy="give the target as well",
                )
            target = engine.target
        self.path = engine.path if isinstance(engine, Engine) else Path(engine)
        self.target = target
        self.threads = threads
        self.arithmetic = arithmetic if arithmetic is not None else arithmetic_here(_runtime_version())
        self.graph = optimized_graph(self.path, target) if structure == "runtime" else group(_read(self.path))
        self.input_names: tuple[str, ...] = tuple(spec.name for spec in self.graph.inputs)
        self.output_names: tuple[str, ...] = tuple(spec.name for spec in self.graph.outputs)
        self._options = _unfused(session_options(target, threads=threads))
        self._constants: dict[str, Array] = {}
        for name in self.graph.initializer_names:
            array = self.graph.constant(name)
            assert array is not None
            self._constants[name] = array
        self._float_functions: dict[str, ort.InferenceSession] = {}
        self._steps: list[tuple[onnx.NodeProto, Kernel | _RuntimeNode]] = []
        kinds: dict[str, list[ReferenceNode]] = {"integer": [], "moving": [], "float": [], "shape": []}
        unknown: list[onnx.NodeProto] = []
        for node in self.graph:
            step, kind = self._bind(node)
            if step is None:
                unknown.append(node)
                continue
            self._steps.append((node, step))
            kinds[kind].append(ReferenceNode(node.name, _operator(node), tuple(node.output)))
        if unknown:
            named = sorted({f"{_operator(node)} ({node.name})" for node in unknown})
            raise UnsupportedOpError(
                f"the integer reference does not know {len(named)} operator(s) on 8-bit values: {', '.join(named)}",
                where=str(self.path),
                remedy="leave these layers out of quantization, or compare with the fake-quant reference only",
            )
        self.integer_nodes = tuple(kinds["integer"])
        self.moving_nodes = tuple(kinds["moving"])
        self.float_nodes = tuple(kinds["float"])
        self.shape_nodes = tuple(kinds["shape"])
        self._last_use = self._last_uses()
        self.load_ms = (time.perf_counter() - started) * 1000

    @cached_property
    def _exposed(self) -> ort.InferenceSession:
        """The optimized graph as it is, with every value as an output."""
        proto = self.graph.editable()
        present = {value.name for value in proto.graph.output}
        for node in proto.graph.node:
            for name in node.output:
                if name and name not in present:
                    proto.graph.output.append(onnx.ValueInfoProto(name=name))
                    present.add(name)
        return ort.InferenceSession(proto.SerializeToString(), self._options, providers=["CPUExecutionProvider"])

    @cached_property
    def _types(self) -> Mapping[str, str]:
        """The runtime's type of every computed value and input."""
        session = self._exposed
        return {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}

    def _type_of(self, name: str) -> str:
        if name in self._constants:
            tensor = next(t for t in self.graph.proto.graph.initializer if t.name == name)
            return f"tensor({onnx.TensorProto.DataType.Name(tensor.data_type).lower()})"
        return self._types.get(name, "")

    def _bind(self, node: onnx.NodeProto) -> tuple[Kernel | _RuntimeNode | None, str]:
        """The step that evaluates a node, and its kind; no step for an unknown operator on codes."""
        types = [self._type_of(name) for name in (*node.input, *node.output) if name]
        coded = any(kind in _CODE_TYPES for kind in types)
        domain = "" if node.domain == "ai.onnx" else node.domain
        cls = KERNELS.get((domain, node.op_type))
        if cls is not None and (coded or cls.any_type):
            spec = NodeSpec(
                node,
                attributes(node),
                tuple(self._constants.get(name) for name in node.input),
                self._float_function,
                self.graph.opset,
            )
            return cls(spec, self.arithmetic), "integer" if cls.arithmetic_kernel else "moving"
        if coded:
            return None, ""
        kind = "float" if any(kind in _FLOAT_TYPES for kind in types) else "shape"
        return _RuntimeNode(node, self.graph, self._options), kind

    def _float_function(self, op_type: str, values: Array) -> Array:
        """An elementwise float operator at given points, by the runtime's float kernel."""
        if op_type not in self._float_functions:
            node = onnx.helper.make_node(op_type, ["x"], ["y"])
            info = onnx.helper.make_tensor_value_info
            graph = onnx.helper.make_graph(
                [node],
                op_type,
                [info("x", onnx.TensorProto.FLOAT, [None])],
                [info("y", onnx.TensorProto.FLOAT, [None])],
            )
            model = onnx.helper.make_model(
                graph, opset_imports=[onnx.helper.make_opsetid("", self.graph.opset)], ir_version=8
            )
            self._float_functions[op_type] = ort.InferenceSession(
                model.SerializeToString(), self._options, providers=["CPUExecutionProvider"]
            )
        result: Array = self._float_functions[op_type].run(None, {"x": values})[0]
        return result

    def _last_uses(self) -> dict[str, int]:
        """For each computed value the index of the last step that reads it."""
        last: dict[str, int] = {}
        for index, (node, _) in enumerate(self._steps):
            for name in (*node.input, *node.output):
                if name and name not in self._constants:
                    last[name] = index
        return last

    def _check(self, feeds: Mapping[str, Array]) -> None:
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise DataError(
                f"no data for input(s) {', '.join(missing)}",
                where=str(self.path),
                remedy=f"feed {', '.join(self.input_names)}",
            )

    def run(self, feeds: Mapping[str, Array], fetch: Sequence[str] | None = None) -> dict[str, Array]:
        """Outputs for one batch.

        Args:
            feeds: One array an input, as the engine takes them.
            fetch: Values to return: outputs, or any value of :attr:`graph`. Default: all outputs.

        Returns:
            Arrays by name: float where the engine's value is float, codes where it is quantized.
        """
        self._check(feeds)
        wanted = list(self.output_names if fetch is None else fetch)
        keep = set(wanted)
        values: dict[str, Array] = {**self._constants, **{name: np.asarray(feeds[name]) for name in self.input_names}}
        unknown = [name for name in wanted if name not in values and name not in self._last_use]
        if unknown:
            raise EngineError(
                f"the optimized graph has no value(s) {', '.join(unknown)}",
                where=str(self.path),
                remedy="the runtime fused them away; ask for names of reference.graph",
            )
        with _torch_threads(self.threads):
            for index, (node, step) in enumerate(self._steps):
                if isinstance(step, _RuntimeNode):
                    results = step(values)
                    names = [name for name in node.output if name]
                else:
                    results = step([values[name] if name else None for name in node.input])
                    names = list(node.output)[: len(results)]
                values.update(zip(names, results, strict=True))
                for name in (*node.input, *node.output):
                    if name and name not in keep and self._last_use.get(name) == index:
                        values.pop(name, None)
        return {name: values[name] for name in wanted}

    def intermediates(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every computed value of the optimized graph for one batch, in topological order."""
        return self.run(feeds, [name for node, _ in self._steps for name in node.output if name])

    def engine_intermediates(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The same values as the runtime computes them, with the same fusions."""
        self._check(feeds)
        names = [value.name for value in self._exposed.get_outputs()]
        results = self._exposed.run(names, {name: feeds[name] for name in self.input_names})
        return dict(zip(names, results, strict=True))

    def first_divergence(self, feeds: Mapping[str, Array]) -> Divergence | None:
        """The first value in which the runtime and this reference differ, or ``None`` when all values are equal."""
        theirs = self.engine_intermediates(feeds)
        ours = self.intermediates(feeds)
        for node, _ in self._steps:
            for name in node.output:
                if not name or name not in theirs:
                    continue
                a, b = theirs[name], ours[name]
                if a.shape != b.shape or a.dtype != b.dtype:
                    return Divergence(name, node.name, _operator(node), 1.0, float("inf"))
                different = a != b
                if a.dtype.kind == "f":
                    different &= ~(np.isnan(a) & np.isnan(b))
                if np.any(different):
                    gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
                    return Divergence(name, node.name, _operator(node), float(different.mean()), float(np.nanmax(gap)))
        return None


def arithmetic_on(target: Target) -> Arithmetic:
    """The rules of a target's processor, in the version of the runtime that is installed here."""
    return replace(arithmetic_for(target), runtime=_runtime_version())


def _runtime_version() -> tuple[int, int]:
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
