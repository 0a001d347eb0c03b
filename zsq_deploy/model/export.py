"""torch to ONNX with batch normalization kept.

The dynamo exporter without its optimizer keeps BatchNormalization nodes (its optimizer folds them away, and with them the
statistics that synthesis lives on). A module that it cannot capture with a free batch size is exported for one sample, and
one that it cannot capture at all goes through the older tracing exporter; :mod:`zsq_deploy.model.clean` frees the batch size.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from zsq_deploy.errors import ModelError, UsageError

__all__ = ["export_module", "export_program", "quiet"]

#: The operator set that torch's dynamo exporter implements natively; others are conversions from it.
OPSET = 18

_LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch._dynamo",
    "torch.fx",
    "onnxscript",
    "onnx_ir",
    "torch._inductor",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters print, log and warn about; errors come as exceptions anyway."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _arguments(
    module: torch.nn.Module, shapes: Sequence[int] | Mapping[str, Sequence[int]], batch: int, where: str
) -> tuple[torch.Tensor, ...]:
    """Random example inputs in the order of the module's parameters."""
    generator = torch.Generator().manual_seed(0)

    def example(shape: Sequence[int]) -> torch.Tensor:
        return torch.rand((batch, *(int(size) for size in shape[1:])), generator=generator)

    if not isinstance(shapes, Mapping):
        return (example(shapes),)
    try:
        bound = inspect.signature(module.forward).bind(**{name: example(shape) for name, shape in shapes.items()})
    except TypeError as error:
        raise UsageError(
            f"the input names do not fit the network's forward(): {error}",
            where=where,
            remedy=f"its parameters are: {', '.join(inspect.signature(module.forward).parameters)}",
        ) from error
    return tuple(bound.args)


def export_module(
    module: torch.nn.Module, shapes: Sequence[int] | Mapping[str, Sequence[int]], *, where: str = ""
) -> onnx.ModelProto:
    """Export a module in evaluation mode.

    Args:
        module: On the CPU, float32, in evaluation mode.
        shapes: Shape of the input (the first size is the batch and does not matter), or shapes by parameter name.
        where: What to call the module in errors.

    Raises:
        ModelError: The module does not run on such an input, or no exporter can capture it.
        UsageError: Names in `shapes` are no parameters of ``forward``.
    """
    one = _arguments(module, shapes, 1, where)
    try:
        with torch.no_grad(), quiet():
            module(*one)
    except Exception as error:
        text = "x".join(str(size) for size in one[0].shape)
        raise ModelError(
            f"the network does not run on an input of {text}: {_first_line(error)}",
            where=where,
            remedy="check --input-shape",
        ) from error
    reasons: list[str] = []
    for attempt in (_dynamo_free, _dynamo_fixed, _traced):
        try:
            with torch.no_grad(), quiet():
                proto = attempt(module, shapes, where)
            return _named(proto)
        except Exception as error:  # exporters fail with anything
            reasons.append(_first_line(error))
    raise ModelError(
        f"torch cannot export the network to ONNX: {reasons[0]}",
        where=where,
        remedy="export it to ONNX yourself and give the .onnx file, or take data-dependent Python code out of forward()",
    )


def export_program(program: Any, *, where: str = "") -> onnx.ModelProto:
    """Export a ``torch.export.ExportedProgram``.

    Raises:
        ModelError: The exporter cannot translate it.
    """
    try:
        with torch.no_grad(), quiet():
            exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=OPSET)
            assert exported is not None
            return _named(exported.model_proto)
    except Exception as error:
        raise ModelError(
            f"torch cannot turn the exported program into ONNX: {_first_line(error)}",
            where=where,
            remedy="export the module in evaluation mode: torch.export.export(module.eval(), ...)",
        ) from error


def _dynamo_free(
    module: torch.nn.Module, shapes: Sequence[int] | Mapping[str, Sequence[int]], where: str
) -> onnx.ModelProto:
    arguments = _arguments(module, shapes, 2, where)
    batch = torch.export.Dim("N", min=1)
    program = torch.export.export(module, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments))
    return _translate(program)


def _dynamo_fixed(
    module: torch.nn.Module, shapes: Sequence[int] | Mapping[str, Sequence[int]], where: str
) -> onnx.ModelProto:
    return _translate(torch.export.export(module, _arguments(module, shapes, 1, where)))


def _translate(program: Any) -> onnx.ModelProto:
    exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=OPSET)
    assert exported is not None
    proto: onnx.ModelProto = exported.model_proto
    return proto


def _traced(
    module: torch.nn.Module, shapes: Sequence[int] | Mapping[str, Sequence[int]], where: str
) -> onnx.ModelProto:
    arguments = _arguments(module, shapes, 1, where)
    names = list(inspect.signature(module.forward).parameters)[: len(arguments)]
    with tempfile.TemporaryDirectory(prefix="zsq-export-") as folder:
        file = Path(folder) / "traced.onnx"
        torch.onnx.export(
            module,
            arguments,
            file,
            dynamo=False,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=names if len(names) == len(arguments) else None,
        )
        return onnx.load(str(file))


def _named(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Call the outputs ``output`` or ``output_0``, ``output_1``, ...: exporters name them after their last operator."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input}
    old = [value.name for value in proto.graph.output]
    if len(set(old)) != len(old) or set(old) & (constants | inputs):
        return proto
    new = ["output"] if len(old) == 1 else [f"output_{index}" for index in range(len(old))]
    taken = {name for node in proto.graph.node for name in (*node.input, *node.output)} | inputs | constants
    renamed = {a: b for a, b in zip(old, new, strict=True) if b not in taken}
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = renamed.get(name, name)
    for value in (*proto.graph.output, *proto.graph.value_info):
        value.name = renamed.get(value.name, value.name)
    return proto


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
