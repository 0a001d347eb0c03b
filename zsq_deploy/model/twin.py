"""The differentiable torch twin of an ONNX graph: the same nodes, the same value names.

A :class:`Twin` is built node for node from a :class:`~zsq_deploy.model.graph.Graph` with the op table in
:mod:`zsq_deploy.model.ops`. Any value can be fetched, watched or replaced by name, so that statistics, synthesis, range search
and reconstruction speak of the same tensors as the deployed engine.

How it runs: every node became a kernel (a plain function) when the twin was built. A run makes a list of the kernels that the
wanted values need, once for each combination of wanted and watched names, and drops every value after its last use.
Shape arithmetic (everything that follows from shapes and integer constants alone) is computed on the CPU, whatever the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from zsq_deploy.errors import ModelError, UsageError
from zsq_deploy.model.carried import carried_codes
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.ops.quantize import integer_type
from zsq_deploy.model.ops.registry import Kernel, Node, UnsupportedVariantError
from zsq_deploy.model.ops.support import build, check_supported, lookup
from zsq_deploy.model.ops.types import compute_type, tensor_from_numpy, torch_type

__all__ = ["Tap", "Twin"]

Tap = Callable[[Tensor], Tensor | None]

_ABSENT = 0  # the slot of inputs that are not given: always None
_SHAPE_TYPES = (torch.int64, torch.int32, torch.bool)
# operators that are never taken for shape arithmetic: quantizers belong to the data, sequences are no tensors
_DATA_ONLY = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "SplitToSequence",
    "SequenceConstruct",
    "SequenceAt",
    "SequenceLength",
    "ConcatFromSequence",
)


@dataclass(frozen=True)
class _Step:
    """One node, ready to run."""

    name: str
    op_type: str
    kernel: Kernel
    inputs: tuple[str, ...]  # value names, "" for absent ones
    outputs: tuple[str, ...]
    on_host: bool  # shape arithmetic: runs on the CPU
    moves: tuple[int, ...]  # inputs that come from shape arithmetic but are wanted where the data are


@dataclass(frozen=True)
class _Call:
    """A step inside one plan: slots in place of names, and what happens after it."""

    step: _Step
    kernel: Kernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    taps: tuple[tuple[str, int], ...]
    free: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """What a run does for one combination of fed, fetched and tapped names."""

    slots: int
    feeds: tuple[tuple[str, int], ...]
    constants: tuple[tuple[str, int], ...]  # parameters and buffers
    hosted: tuple[tuple[str, int], ...]  # constants of shape arithmetic
    first_taps: tuple[tuple[str, int], ...]
    calls: tuple[_Call, ...]
    fetch: tuple[tuple[str, int], ...]


class Twin(nn.Module):
    """A torch module that computes what an ONNX graph computes, with gradients to its inputs and parameters.

    Float initializers become parameters with ``requires_grad=False`` (:meth:`parameter_of` finds them by name), integer ones
    buffers; state-dict keys are the initializers' names with ``/`` for ``.``. Inputs that steer the computation rather than
    take part in it (shapes, axes, pads, constant clip bounds) are read when the twin is built.

    Args:
        graph: A graph of opset 13 to 21 with known operators.
        dtype: The float type that stands for the graph's float32. A float64 twin is the ideal arithmetic of the same numbers.
        device: Where the parameters live; ``None``: a GPU if there is one.

    Raises:
        UnsupportedOpError: Operators or the opset are not supported; names all of them.

    Attributes:
        graph: The graph.
        input_names: Names of its inputs, in order.
        output_names: Names of its outputs, in order.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        _shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_supported(graph)
        self.graph = graph
        self.input_names: tuple[str, ...] = tuple(spec.name for spec in graph.inputs)
        self.output_names: tuple[str, ...] = tuple(spec.name for spec in graph.outputs)
        self._float_inputs = frozenset(spec.name for spec in graph.inputs if spec.dtype == "float32")
        self._dtype = dtype
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._keys: dict[str, str] = {}  # initializer or constant -> key among parameters and buffers
        self._host: dict[str, Tensor] = {}  # constants of shape arithmetic, always on the CPU
        self._host_inputs: frozenset[str] = frozenset()  # inputs that only steer: they stay where they are
        self._steps: tuple[_Step, ...] = ()
        self._producer: dict[str, int] = {}
        self._codes: dict[str, torch.dtype] = {}
        self._plans: dict[tuple[frozenset[str], tuple[str, ...], frozenset[str]], _Plan] = {}
        self._build(_shared or {})

    # --- building ---------------------------------------------------------------------------------------------------

    def _constants(self) -> dict[str, Tensor]:
        """All initializers and Constant nodes as CPU tensors in the twin's types."""
        names = list(self.graph.initializer_names)
        names += [node.output[0] for node in self.graph if node.op_type == "Constant"]
        found = {}
        for name in names:
            array = self.graph.constant(name)
            tensor = None if array is None else tensor_from_numpy(array)
            if tensor is not None:
                found[name] = tensor.to(compute_type(tensor.dtype, self._dtype))
        return found

    def _build(self, shared: Mapping[str, Tensor]) -> None:
        constants = self._constants()
        carried = carried_codes(self.graph)
        kinds = {
            maker: integer_type(Node(self.graph, self.graph.node(maker), self._dtype))
            for maker in set(carried.values())
        }
        self._codes = {name: torch_type(kinds[maker]) or torch.int8 for name, maker in carried.items()}
        sized, folded = self._shape_arithmetic(constants, carried)
        constants.update(folded)

        steps: list[_Step] = []
        host_needs: set[str] = set()
        device_needs: set[str] = {spec.name for spec in self.graph.outputs}
        for proto in self.graph:
            if proto.op_type == "Constant" or all(name in folded for name in proto.output if name):
                continue
            row = lookup(proto.domain, proto.op_type)
            assert row is not None
            on_host = all(name in sized for name in proto.output if name)
            inputs = list(proto.input)
            while inputs and not inputs[-1]:
                inputs.pop()
            moves = []
            for index, name in enumerate(inputs):
                if on_host or index in row.host:
                    host_needs.add(name)
                else:
                    device_needs.add(name)
                    if name in sized and name not in constants:
                        moves.append(index)
            kernel = build(
                Node(self.graph, proto, self._dtype, codes=bool(proto.output) and proto.output[0] in carried)
            )
            steps.append(
                _Step(proto.name, proto.op_type, kernel, tuple(inputs), tuple(proto.output), on_host, tuple(moves))
            )
        self._steps = tuple(steps)
        self._producer = {name: index for index, step in enumerate(steps) for name in step.outputs if name}
        self._plans = {}

        self._host_inputs = frozenset(name for name in self.input_names if name in host_needs - device_needs)
        self._host = {name: constants[name] for name in host_needs if name in constants}
        for name, tensor in constants.items():
            if name in self._keys or (
                name in self._host and name not in device_needs and not tensor.is_floating_point()
            ):
                continue
            self._register(name, shared.get(name, tensor), derived=name in folded)

    def _shape_arithmetic(
        self, constants: Mapping[str, Tensor], carried: Mapping[str, str]
    ) -> tuple[set[str], dict[str, Tensor]]:
        """Values that follow from shapes and integer constants alone; and those of them that are constant, computed now."""
        sized = {name for name, tensor in constants.items() if tensor.dtype in _SHAPE_TYPES}
        scalars = {name for name, tensor in constants.items() if tensor.is_floating_point() and tensor.numel() == 1}
        folded: dict[str, Tensor] = {}
        for proto in self.graph:
            if proto.op_type == "Constant" or proto.op_type in _DATA_ONLY:
                continue
            inputs = [name for name in proto.input if name]
            outputs = [name for name in proto.output if name]
            if proto.op_type in ("Shape", "Size"):
                sized.update(outputs)
                continue
            if not inputs or not all(name in sized or name in scalars for name in inputs):
                continue
            if not any(name in sized for name in inputs) or any(name in carried for name in outputs):
                continue
            sized.update(outputs)
            if all(name in constants or name in folded for name in inputs):
                known = [None if not name else folded.get(name, constants.get(name)) for name in proto.input]
                try:
                    result = build(Node(self.graph, proto, self._dtype))(*known)
                except (UnsupportedVariantError, RuntimeError, ValueError, IndexError, TypeError):
                    continue  # the run will say what is wrong, should it come to that
                values = result if isinstance(result, (tuple, list)) else (result,)
                folded.update({name: value for name, value in zip(proto.output, values, strict=False) if name})
        return sized, folded

    def _register(self, name: str, tensor: Tensor, *, derived: bool) -> None:
        key = name.replace(".", "/") or "_"
        while key in self._parameters or key in self._buffers or hasattr(self, key):
            key += "_"
        self._keys[name] = key
        tensor = tensor if tensor.device == self._device else tensor.to(self._device)
        if derived:
            self.register_buffer(key, tensor, persistent=False)
        elif tensor.is_floating_point():
            self.register_parameter(key, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False))
        else:
            self.register_buffer(key, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Twin:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        probe = fn(torch.zeros((), dtype=self._dtype, device=self._device))
        self._device = probe.device
        if probe.dtype != self._dtype:
            self._dtype = probe.dtype
            for name in [name for name, key in self._keys.items() if key in self._non_persistent_buffers_set]:
                key = self._keys.pop(name)
                del self._buffers[key]
                self._non_persistent_buffers_set.discard(key)
            self._build({})
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        # the graph and the kernels never change: copies share them
        for part in (self.graph, self._steps, self._plans):
            memo[id(part)] = part if part is not self._plans else dict(self._plans)
        twin = Twin.__new__(Twin)
        memo[id(self)] = twin
        twin.__dict__ = {key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()}
        return twin

    # --- asking -----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The float type in which the twin computes."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the twin computes."""
        return self._device

    def parameter_of(self, name: str) -> nn.Parameter:
        """The parameter that holds a float initializer.

        Raises:
            UsageError: There is no such float initializer.
        """
        found = self._parameters.get(self._keys.get(name, ""))
        if found is None:
            raise UsageError(
                f"{name!r} is not a float initializer of this network",
                where=name,
                remedy="ask for one of graph.initializer_names of a float type",
            )
        return found

    def parameter_names(self) -> Mapping[str, str]:
        """Initializer name to state-dict key, for parameters and buffers."""
        return dict(self._keys)

    def _held(self) -> Iterable[tuple[str, Tensor | None]]:
        """Initializer name and the tensor that holds it now."""
        for name, key in self._keys.items():
            yield name, self._parameters[key] if key in self._parameters else self._buffers[key]

    # --- running ----------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The graph's outputs for its inputs in order; one output comes as a tensor, several as a tuple."""
        if len(inputs) != len(self.input_names):
            raise UsageError(
                f"{len(inputs)} input(s) given, the network has {len(self.input_names)}",
                remedy=f"give them in this order: {', '.join(self.input_names)}",
            )
        found = self.run(dict(zip(self.input_names, inputs, strict=True)))
        if len(self.output_names) == 1:
            return found[self.output_names[0]]
        return tuple(found[name] for name in self.output_names)

    def run(
        self,
        feeds: Mapping[str, Tensor],
        fetch: Sequence[str] | None = None,
        taps: Mapping[str, Tap] | None = None,
    ) -> dict[str, Tensor]:
        """Compute values by name.

        Only the nodes that `fetch` and `taps` need are executed. Any value may be fed, not only inputs: what lies before it
        is then not computed. (A fed initializer replaces the parameter for this run.)

        Args:
            feeds: Value name to tensor. Float inputs are converted to the twin's type and device.
            fetch: The values wanted; ``None``: the graph's outputs.
            taps: Value name to a function that is called as soon as the value exists; a tensor that it returns takes the
                value's place. Quantized values on their way to DequantizeLinear are seen as codes held in floats.

        Returns:
            The fetched values by name; quantized ones in their integer type.

        Raises:
            UsageError: A name is unknown, or an input that is needed is not fed.
            ModelError: A node failed; names the node and the shapes of what it was given.
        """
        taps = taps or {}
        wanted = self.output_names if fetch is None else tuple(fetch)
        key = (frozenset(feeds), wanted, frozenset(taps))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(*key)
        values: list[Any] = [None] * plan.slots
        for name, slot in plan.feeds:
            tensor = feeds[name]
            if tensor.is_floating_point() and name in self._float_inputs:
                tensor = tensor.to(device=self._device, dtype=self._dtype)
            elif tensor.device != self._device and name not in self._host_inputs:
                tensor = tensor.to(self._device)
            values[slot] = tensor
        for key_, slot in plan.constants:
            values[slot] = self._parameters[key_] if key_ in self._parameters else self._buffers[key_]
        for name, slot in plan.hosted:
            values[slot] = self._host[name]
        for name, slot in plan.first_taps:
            replaced = taps[name](values[slot])
            if replaced is not None:
                values[slot] = replaced
        elsewhere = self._device.type != "cpu"
        for call in plan.calls:
            given = [values[slot] for slot in call.inputs]
            if elsewhere and call.step.moves:
                for index in call.step.moves:
                    given[index] = given[index].to(self._device, non_blocking=True)
            try:
                result = call.kernel(*given)
            except torch.cuda.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError, AssertionError) as error:
                raise self._failure(call.step, given, error) from error
            if isinstance(result, (tuple, list)):
                for slot, value in zip(call.outputs, result, strict=False):
                    if slot != _ABSENT:
                        values[slot] = value
            else:
                values[call.outputs[0]] = result
            for name, slot in call.taps:
                replaced = taps[name](values[slot])
                if replaced is not None:
                    values[slot] = replaced
            for slot in call.free:
                values[slot] = None
        return {name: self._delivered(name, values[slot]) for name, slot in plan.fetch}

    def _delivered(self, name: str, value: Tensor) -> Tensor:
        kind = self._codes.get(name)
        return value.to(kind) if kind is not None and value.is_floating_point() else value

    @staticmethod
    def _failure(step: _Step, given: Iterable[Any], error: Exception) -> ModelError:
        shapes = ", ".join("-" if value is None else f"{tuple(value.shape)} {value.dtype}" for value in given)
        return ModelError(
            f"node {step.name!r} ({step.op_type}) cannot compute: {error}",
            where=f"{step.name}: inputs {', '.join(name or '-' for name in step.inputs)}: {shapes}",
            remedy="check that the inputs have the shapes and types that the network was made for",
        )

    def _plan(self, feeds: frozenset[str], fetch: tuple[str, ...], taps: frozenset[str]) -> _Plan:
        wanted = set(fetch) | taps
        needed_steps: set[int] = set()
        needed_values: set[str] = set()
        stack = list(wanted)
        while stack:
            name = stack.pop()
            if name in needed_values:
                continue
            needed_values.add(name)
            if name in feeds or name in self._keys or name in self._host:
                continue
            index = self._producer.get(name)
            if index is None:
                raise self._unknown(name)
            if index not in needed_steps:
                needed_steps.add(index)
                stack.extend(value for value in self._steps[index].inputs if value)
        for name in feeds:
            if not (name in self.input_names or name in self._producer or name in self._keys or name in self._host):
                raise self._unknown(name)

        slots: dict[tuple[str, bool], int] = {}
        constants: dict[str, int] = {}
        hosted: dict[str, int] = {}

        def slot_of(name: str, host: bool = False) -> int:
            """The place of a value; a constant of shape arithmetic has a second place, on the CPU."""
            if not name:
                return _ABSENT
            host = name not in feeds and name in self._host and (host or name not in self._keys)
            slot = slots.setdefault((name, host), len(slots) + 1)
            if name not in feeds:
                if host:
                    hosted[name] = slot
                elif name in self._keys:
                    constants[self._keys[name]] = slot
            return slot

        fed = tuple((name, slot_of(name)) for name in sorted(feeds & needed_values))
        order = sorted(needed_steps)
        first_taps = tuple(
            (name, slot_of(name)) for name in sorted(taps) if name in feeds or name not in self._producer
        )
        rows: list[tuple[_Step, tuple[int, ...], tuple[int, ...]]] = []
        last_use: dict[int, int] = {}
        for place, index in enumerate(order):
            step = self._steps[index]
            row = lookup(self.graph.node(step.name).domain, step.op_type)
            assert row is not None
            ins = tuple(slot_of(name, step.on_host or number in row.host) for number, name in enumerate(step.inputs))
            outs = tuple(slot_of(name) if name and name not in feeds else _ABSENT for name in step.outputs)
            rows.append((step, ins, outs))
            for slot in (*ins, *outs):
                last_use[slot] = place
        fetched = tuple((name, slot_of(name)) for name in fetch)
        keep = {slot for _, slot in fetched} | set(constants.values()) | set(hosted.values()) | {_ABSENT}
        free: dict[int, list[int]] = {}
        for slot, place in last_use.items():
            if slot not in keep:
                free.setdefault(place, []).append(slot)
        calls = tuple(
            _Call(
                step,
                step.kernel,
                ins,
                outs,
                tuple(
                    (name, slot)
                    for name, slot in zip(step.outputs, outs, strict=True)
                    if name in taps and slot != _ABSENT
                ),
                tuple(free.get(place, ())),
            )
            for place, (step, ins, outs) in enumerate(rows)
        )
        return _Plan(len(slots) + 1, fed, tuple(constants.items()), tuple(hosted.items()), first_taps, calls, fetched)

    def _unknown(self, name: str) -> UsageError:
        if name in self.input_names:
            return UsageError(
                f"input {name!r} is needed but was not given", where=name, remedy=f"feed {', '.join(self.input_names)}"
            )
        return UsageError(
            f"the network has no value called {name!r}", where=name, remedy="use the names of inputs and node outputs"
        )

    # --- cutting ----------------------------------------------------------------------------------------------------

    def slice(self, inputs: Sequence[str], outputs: Sequence[str]) -> Twin:
        """The part of the network between some values, as a twin of its own.

        The part shares its parameters with this twin (a deep copy has its own).

        Args:
            inputs: Values that are given from outside; nothing before them is part of it.
            outputs: Values that it computes.

        Raises:
            UsageError: A name is unknown, or an output depends on an input of the network that `inputs` do not cover.
        """
        part = Twin(
            _between(self, inputs, outputs),
            dtype=self._dtype,
            device=self._device,
            _shared={name: tensor for name, tensor in self._held() if tensor is not None},
        )
        part.train(self.training)
        return part


def _between(twin: Twin, inputs: Sequence[str], outputs: Sequence[str]) -> Graph:
    """The sub-graph from `inputs` to `outputs` with the initializers that it needs."""
    graph = twin.graph
    given, nodes, values = set(inputs), set(), set()
    stack = list(outputs)
    for name in (*inputs, *outputs):
        if name not in twin.input_names and graph.producer(name) is None:
            raise UsageError(f"the network has no value called {name!r}", where=name)
    initializers = set(graph.initializer_names)
    while stack:
        name = stack.pop()
        if not name or name in values or name in given:
            continue
        values.add(name)
        if name in initializers:
            continue
        node = graph.producer(name)
        if node is None:
            raise UsageError(
                f"the part depends on {name!r}, which is not among its inputs",
                where=", ".join(outputs),
                remedy=f"add {name!r} to the inputs of the part",
            )
        nodes.add(node.name)
        stack.extend(node.input)

    def typed(name: str) -> onnx.ValueInfoProto:
        kind = graph.dtype(name)
        element = onnx.TensorProto.FLOAT if kind is None else onnx.helper.np_dtype_to_tensor_dtype(kind)
        shape = graph.shape(name)
        return onnx.helper.make_tensor_value_info(name, element, shape)

    proto = onnx.ModelProto()
    proto.ir_version = graph.proto.ir_version
    proto.opset_import.extend(graph.proto.opset_import)
    proto.graph.name = graph.proto.graph.name
    proto.graph.node.extend(node for node in graph if node.name in nodes)
    proto.graph.initializer.extend(t for t in graph.proto.graph.initializer if t.name in values)
    proto.graph.input.extend(typed(name) for name in dict.fromkeys(inputs))
    proto.graph.output.extend(typed(name) for name in dict.fromkeys(outputs))
    return Graph(proto)
