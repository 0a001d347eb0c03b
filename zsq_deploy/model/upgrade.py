"""Operator sets: files of any age are brought to a version that every other part understands (17 to 21)."""

from __future__ import annotations

import onnx
from onnx import version_converter

from zsq_deploy.errors import ModelError

__all__ = ["LOWEST", "NEWEST", "upgrade"]

#: Older files are converted up to this operator set.
LOWEST = 17
#: Newer files are converted down to this one.
NEWEST = 21

_IR_OF_OPSET = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}


def upgrade(proto: onnx.ModelProto, *, where: str = "") -> onnx.ModelProto:
    """The model in an operator set from 17 to 21; the same object when it is in one already.

    Raises:
        ModelError: The ONNX project's converter cannot convert the file.
    """
    version = max((int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if version == 0:
        raise ModelError(
            "the file does not say which ONNX operator set it uses",
            where=where,
            remedy="export the network again (any operator set from 9 on will do)",
        )
    target = LOWEST if version < LOWEST else NEWEST if version > NEWEST else version
    if target != version:
        proto = _convert(proto, version, target, where)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    result.ir_version = _IR_OF_OPSET[target]
    return result


def _convert(proto: onnx.ModelProto, version: int, target: int, where: str) -> onnx.ModelProto:
    prepared = onnx.ModelProto()
    prepared.CopyFrom(proto)
    del prepared.graph.value_info[:]
    # Before IR version 4 every initializer was an input as well; the converter takes both forms, the rest of us only one.
    prepared.ir_version = max(prepared.ir_version, 4)
    constants = {tensor.name for tensor in prepared.graph.initializer}
    inputs = [value for value in prepared.graph.input if value.name not in constants]
    del prepared.graph.input[:]
    prepared.graph.input.extend(inputs)
    try:
        return version_converter.convert_version(prepared, target)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        direction = "older than" if version < target else "newer than"
        raise ModelError(
            f"the file uses ONNX operator set {version}, {direction} what is supported, and cannot be converted: {reason}",
            where=where,
            remedy=f"export the network again with an operator set from {LOWEST} to {NEWEST}",
        ) from error
