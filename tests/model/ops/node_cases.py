"""The ONNX project's own node tests, as far as they lie inside the op table: which are run, and why the others are not.

The cases are stamped with the newest opset. A case is run when every operator of its graph is in the table and the graph is valid
at opset 21, the newest one that the table covers: later versions of most operators only admit more element types, and
``onnx.checker`` with full type inference refuses the graphs that need them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from zsq_deploy.model.graph import Graph
from zsq_deploy.model.ops import OPSETS, unsupported
from zsq_deploy.model.ops.types import torch_type

Array = np.ndarray[Any, np.dtype[Any]]

__all__ = ["EXCLUDED", "NodeCase", "Selection", "select"]

_ALIGN = (
    "divides by the broken output length scale * size - 1; the specification says length_resized, which is whole, and so do "
    "torch and ONNX Runtime"
)

#: Cases that are valid and whose operators are in the table, and yet are not run: prefix of the name, and the reason.
EXCLUDED: Mapping[str, str] = {
    "test_resize_downsample_scales_linear_align_corners": _ALIGN,
    "test_resize_downsample_scales_cubic_align_corners": _ALIGN,
}


@dataclass(frozen=True)
class NodeCase:
    """A case that is run."""

    name: str
    graph: Graph
    data: tuple[tuple[tuple[Array, ...], tuple[Array, ...]], ...]  # inputs and expected outputs of every data set

    @property
    def operators(self) -> frozenset[str]:
        return frozenset(node.op_type for node in self.graph)


@dataclass(frozen=True)
class Selection:
    """What is run, and why the rest is not: case name to reason."""

    cases: tuple[NodeCase, ...]
    left_out: Mapping[str, str]


def _version(model: onnx.ModelProto) -> int:
    return next((int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def _stamped(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The model with another version of the default operator set."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for item in copy.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = version
    return copy


def _changed(model: onnx.ModelProto, target: int) -> bool:
    """Whether an operator of a model got a new version on the way up to the target opset."""

    def since(op_type: str, version: int) -> int | None:
        try:
            schema = onnx.defs.get_schema(op_type, version, "")
        except onnx.defs.SchemaError:
            return None
        return None if schema.deprecated else int(schema.since_version)

    version = _version(model)
    return any(since(node.op_type, version) != since(node.op_type, target) for node in model.graph.node)


def _holdable(value: onnx.ValueInfoProto) -> bool:
    return torch_type(value.type.tensor_type.elem_type) is not None


def _reason(case: TestCase, model: onnx.ModelProto) -> str | None:
    values = [*model.graph.input, *model.graph.output]
    if any(not value.type.HasField("tensor_type") for value in values):
        return "sequences and optional values"
    if not all(_holdable(value) for value in values):
        return "element types that torch does not have: strings, 2-bit integers, floats of 8 bits and less"
    if _version(case.model) < OPSETS.start and _changed(case.model, _version(model)):
        return f"an operator version older than opset {OPSETS.start}"
    uses = unsupported(Graph(model))
    if uses:
        return "; ".join(f"{use.op_type}: {use.reason}" for use in uses)
    try:
        # type inference of the function body of MeanVarianceNormalization fails in some versions of onnx
        onnx.checker.check_model(model, full_check=case.name != "test_mvn")
    except Exception:
        return f"not valid at opset {OPSETS.stop - 1}: needs a newer form or element type of its operator"
    return next((reason for prefix, reason in EXCLUDED.items() if case.name.startswith(prefix)), None)


def _arrays(values: Iterable[Any]) -> tuple[Array, ...]:
    return tuple(
        numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value) for value in values
    )


@lru_cache(maxsize=1)
def select() -> Selection:
    """Sort all node cases of the installed onnx package."""
    cases, left_out = [], {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        loaded = load_model_tests(kind="node")
    for case in loaded:
        model = _stamped(case.model, min(max(_version(case.model), OPSETS.start), OPSETS.stop - 1))
        reason = _reason(case, model)
        if reason is None:
            data = tuple((_arrays(ins), _arrays(outs)) for ins, outs in case.data_sets)
            cases.append(NodeCase(case.name, Graph(model), data))
        else:
            left_out[case.name] = reason
    return Selection(tuple(cases), left_out)
