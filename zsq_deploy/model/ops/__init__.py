"""The op table: what each ONNX operator means in torch.

One module a family of operators; :mod:`~zsq_deploy.model.ops.registry` says how to add one. The table covers opsets 13 to 21.
"""

from __future__ import annotations

from zsq_deploy.model.ops import (
    activations,
    arithmetic,
    constants,
    conv,
    detection,
    indexing,
    integer,
    linear,
    logic,
    loss,
    norm,
    pool,
    quantize,
    reduce,
    resize,
    sequence,
    shape,
)
from zsq_deploy.model.ops.registry import OPS, OPSETS, Kernel, Node, OpImpl, UnsupportedVariantError, op
from zsq_deploy.model.ops.support import UnsupportedUse, check_supported, lookup, unsupported

FAMILIES = (
    activations,
    arithmetic,
    constants,
    conv,
    detection,
    indexing,
    integer,
    linear,
    logic,
    loss,
    norm,
    pool,
    quantize,
    reduce,
    resize,
    sequence,
    shape,
)

__all__ = [
    "FAMILIES",
    "OPS",
    "OPSETS",
    "Kernel",
    "Node",
    "OpImpl",
    "UnsupportedUse",
    "UnsupportedVariantError",
    "check_supported",
    "lookup",
    "op",
    "unsupported",
]
