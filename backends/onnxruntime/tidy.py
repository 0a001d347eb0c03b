"""What is mended in the graph that ONNX Runtime's quantizer writes, before it is called an engine.

* **Float readers get the float value.** The quantizer routes *all* readers of a quantized tensor through the Q/DQ pair, also a float
  Sub that reads the network's input image. Where the float value exists anyway, such a reader is connected to it again.
* **The last matrix product gives float.** The Q/DQ pair behind it is taken out; its kernel then writes float (QGemm without an output
  scale, MatMulIntegerToFloat).
* **Zero padding in integers.** ``DQ -> Pad -> Q`` of one scale is the same as padding the codes with the zero point, for which ONNX
  Runtime has a kernel, but no fusion.
* **Stamps.** Operator sets that are used, and an IR version that the oldest supported runtime reads.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.onnxruntime.placement import Placement
from zsq_deploy.errors import EngineError
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["IR_OF_OPSET", "integer_pads", "tidy"]

IR_OF_OPSET = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
"""The IR version that came with an operator set: no runtime that knows the set refuses it."""


def tidy(
    proto: onnx.ModelProto,
    source: Graph,
    placement: Placement,
    target: Target,
    *,
    quantize_outputs: bool = False,
    float_readers: bool = True,
    pads: bool = True,
) -> onnx.ModelProto:
    """Mend a quantized graph (see the module).

    Args:
        proto: What ``quantize_static`` wrote. It is changed.
        source: The float graph that was quantized.
        placement: What was to be quantized.
        target: Gives operator set and IR version.
        quantize_outputs: Leave the pairs at the network's outputs.
        float_readers: Connect float operators to float values.
        pads: Move zero padding onto the integer side; without it every QuantizeLinear keeps its DequantizeLinear.

    Raises:
        EngineError: The result is not valid ONNX.
    """
    chosen = set(placement.nodes)
    if not quantize_outputs:
        _float_tails(proto, source, placement)
    if float_readers:
        _reconnect(proto, source, chosen)
    if pads:
        integer_pads(proto)
    _remove_dead(proto)
    _order(proto)
    _stamp(proto, target)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise EngineError(
            f"the quantized graph is not valid ONNX: {error}",
            where=f"target {target.name}",
            remedy="please report this with the model",
        ) from error
    return proto


def _pairs(proto: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """All activation pairs: QuantizeLinear and each DequantizeLinear that reads it."""
    made = {node.output[0]: node for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    return [
        (made[node.input[0]], node)
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in made
    ]


def _rename_input(proto: onnx.ModelProto, old: str, new: str, only: Iterable[str] | None = None) -> None:
    names = None if only is None else set(only)
    for node in proto.graph.node:
        if names is not None and node.name not in names:
            continue
        for slot, name in enumerate(node.input):
            if name == old:
                node.input[slot] = new


def _float_tails(proto: onnx.ModelProto, source: Graph, placement: Placement) -> None:
    """Take the pair out behind matrix products that feed nothing but float operators and outputs."""
    outputs = {value.name for value in proto.graph.output}
    makers = {name: node for node in proto.graph.node for name in node.output}
    for value in placement.tails:
        maker = source.producer(value)
        if maker is None or maker.op_type not in ("Gemm", "MatMul"):
            continue
        for quantize, dequantize in _pairs(proto):
            made_by = makers.get(quantize.input[0])
            if made_by is None or made_by.name != maker.name:
                continue
            if dequantize.output[0] in outputs:
                made_by.output[0] = dequantize.output[0]
            else:
                _rename_input(proto, dequantize.output[0], quantize.input[0])
            proto.graph.node.remove(dequantize)
            if not any(quantize.output[0] in node.input for node in proto.graph.node):
                proto.graph.node.remove(quantize)
            break


def _reconnect(proto: onnx.ModelProto, source: Graph, chosen: set[str]) -> None:
    """Let float operators read float values, where the value is made in float."""
    inputs = {value.name for value in proto.graph.input}
    makers = {name: node for node in proto.graph.node for name in node.output}
    for quantize, dequantize in _pairs(proto):
        value = quantize.input[0]
        maker = makers.get(value)
        made_in_float = value in inputs or (maker is not None and maker.name in source and maker.name not in chosen)
        if not made_in_float:
            continue
        readers = [
            node.name
            for node in proto.graph.node
            if dequantize.output[0] in node.input and node.name in source and node.name not in chosen
        ]
        if readers:
            _rename_input(proto, dequantize.output[0], value, readers)


def integer_pads(proto: onnx.ModelProto) -> None:
    """Pad codes with the zero point, where both sides of a zero Pad have one scale and zero point; the graph is changed."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}

    def same(a: str, b: str) -> bool:
        if a == b:
            return True
        if a not in constants or b not in constants:
            return False
        return bool(np.array_equal(numpy_helper.to_array(constants[a]), numpy_helper.to_array(constants[b])))

    makers = {name: node for node in proto.graph.node for name in node.output}
    outputs = {value.name for value in proto.graph.output}
    for pad in [node for node in proto.graph.node if node.op_type == "Pad"]:
        before = makers.get(pad.input[0])
        readers = [node for node in proto.graph.node if pad.output[0] in node.input]
        if (
            before is None
            or before.op_type != "DequantizeLinear"
            or len(readers) != 1
            or readers[0].op_type != "QuantizeLinear"
            or pad.output[0] in outputs
            or len(before.input) < 3
            or len(readers[0].input) < 3
        ):
            continue
        after = readers[0]
        if not (same(before.input[1], after.input[1]) and same(before.input[2], after.input[2])):
            continue
        if str(attributes(pad).get("mode", "constant")) == "constant":
            value = constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else None
            if len(pad.input) > 2 and pad.input[2] and (value is None or numpy_helper.to_array(value).any()):
                continue
            while len(pad.input) < 3:
                pad.input.append("")
            pad.input[2] = before.input[2]
        pad.input[0] = before.input[0]
        pad.output[0] = after.output[0]
        proto.graph.node.remove(after)


def _remove_dead(proto: onnx.ModelProto) -> None:
    """Take out nodes and initializers that nothing reads."""
    while True:
        used = {name for node in proto.graph.node for name in node.input}
        used.update(value.name for value in proto.graph.output)
        dead = [node for node in proto.graph.node if not any(name in used for name in node.output)]
        if not dead:
            break
        for node in dead:
            proto.graph.node.remove(node)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def _order(proto: onnx.ModelProto) -> None:
    """Put nodes into topological order (the quantizer appends its nodes at the end)."""
    ready = {value.name for value in proto.graph.input} | {tensor.name for tensor in proto.graph.initializer} | {""}
    waiting = list(proto.graph.node)
    ordered: list[onnx.NodeProto] = []
    readers: dict[str, list[int]] = {}
    missing: list[int] = []
    for index, node in enumerate(waiting):
        wanted = {name for name in node.input if name not in ready}
        missing.append(len(wanted))
        for name in wanted:
            readers.setdefault(name, []).append(index)
    queue = [index for index, count in enumerate(missing) if count == 0]
    while queue:
        index = queue.pop(0)
        ordered.append(waiting[index])
        for name in waiting[index].output:
            for reader in readers.get(name, []):
                missing[reader] -= 1
                if missing[reader] == 0:
                    queue.append(reader)
    if len(ordered) != len(waiting):
        raise EngineError(
            "the quantized graph has a cycle or a value that nothing makes",
            where=", ".join(node.name for node in waiting if node not in ordered)[:200],
            remedy="please report this with the model",
        )
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)


def _stamp(proto: onnx.ModelProto, target: Target) -> None:
    """Operator sets, IR version and producer, on purpose."""
    used = {node.domain for node in proto.graph.node}
    opset = next((int(one.version) for one in proto.opset_import if one.domain in ("", "ai.onnx")), target.opset)
    others = [one for one in proto.opset_import if one.domain not in ("", "ai.onnx") and one.domain in used]
    kept = [helper.make_opsetid("", opset), *(helper.make_opsetid(one.domain, one.version) for one in others)]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    proto.ir_version = max(target.ir_version, IR_OF_OPSET.get(opset, target.ir_version))
    proto.producer_name = "zsq-deploy"
    proto.producer_version = ""
    del proto.metadata_props[:]
    del proto.graph.value_info[:]
