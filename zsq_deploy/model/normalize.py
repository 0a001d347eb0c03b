"""First step after reading a file: one plain form, whatever exporter wrote it.

Local functions are inlined, constants become initializers, half and double precision become float32, training-mode batch
normalization becomes inference, every node gets a unique name. Nothing here looks at shapes.
"""

from __future__ import annotations

import ast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.errors import ModelError
from zsq_deploy.model.editing import Net, is_default
from zsq_deploy.model.graph import attributes

__all__ = ["inline_functions", "name_nodes", "normalize"]

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SCOPES = "pkg.torch.onnx.name_scopes"


def inline_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without local functions."""
    if not proto.functions:
        return proto
    from onnx import inliner  # not imported by onnx itself

    return inliner.inline_local_functions(proto)


def _scope(node: onnx.NodeProto) -> str | None:
    """The module path that torch's exporter noted on a node; ``None`` when there is no note."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
            except (SyntaxError, ValueError):
                return None
            if not isinstance(scopes, list) or len(scopes) < 2:
                return ""
            scope = str(scopes[-2])
            return "" if scope.startswith("_empty_nn_module") else scope
    return None


def name_nodes(proto: onnx.ModelProto) -> None:
    """Give every node a unique name, in place.

    Names that a file brings are kept. Where torch's exporter noted module paths, the node is called ``path/Operator`` and
    its values ``path/Operator_output_0``, because the exporter's own names (``conv2d_7``) say nothing to anybody.
    """
    taken: set[str] = set()
    boundary = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    boundary |= {tensor.name for tensor in proto.graph.initializer}
    renamed: dict[str, str] = {}
    for node in proto.graph.node:
        scope = _scope(node)
        base = node.name or node.op_type
        if scope is not None:
            base = f"{scope}/{node.op_type}" if scope else node.op_type
        name, number = base, 0
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        node.name = name
        for index, value in enumerate(node.input):
            node.input[index] = renamed.get(value, value)
        for index, value in enumerate(node.output):
            if scope is not None and value and value not in boundary:
                renamed[value] = f"{name}_output_{index}"
                node.output[index] = renamed[value]


def normalize(proto: onnx.ModelProto) -> tuple[Net, list[str]]:
    """Bring a model into the plain form that the other steps expect.

    Returns:
        The graph to work on, and notes for the user about what was changed in meaning.

    Raises:
        ModelError: The model holds sparse constants or sequences as inputs.
    """
    proto = inline_functions(proto)
    _refuse(proto)
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    name_nodes(copy)
    notes = _to_float32(copy)
    net = Net(copy)
    for node in list(net.nodes):
        del node.metadata_props[:]
        node.doc_string = ""
        if is_default(node, "Constant"):
            _constant_to_initializer(net, node)
        elif is_default(node, "BatchNormalization"):
            notes += _inference_batch_norm(node)
        elif is_default(node, "Dropout"):
            _inference_dropout(net, node)
    net.sweep()
    return net, notes


def _refuse(proto: onnx.ModelProto) -> None:
    if proto.graph.sparse_initializer:
        raise ModelError(
            "the network stores sparse constants",
            where=proto.graph.sparse_initializer[0].values.name,
            remedy="export it with dense weights",
        )
    for value in (*proto.graph.input, *proto.graph.output):
        if not value.type.HasField("tensor_type"):
            raise ModelError(
                f"{value.name!r} is not a tensor but a sequence, a map or an optional value",
                where=value.name,
                remedy="export the network so that its inputs and outputs are plain tensors",
            )


def _to_float32(proto: onnx.ModelProto) -> list[str]:
    """Turn half and double precision networks into float32, in place."""
    types = {tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims)}
    types |= {value.type.tensor_type.elem_type for value in proto.graph.input}
    replace = {kind for kind in _HALF if kind in types}
    if TensorProto.DOUBLE in {value.type.tensor_type.elem_type for value in proto.graph.input}:
        replace.add(TensorProto.DOUBLE)
    if not replace:
        return []

    def convert(tensor: onnx.TensorProto) -> None:
        if tensor.data_type in replace:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))

    for tensor in proto.graph.initializer:
        convert(tensor)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type in replace:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                convert(attribute.t)
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i in replace:
                attribute.i = TensorProto.FLOAT
    del proto.graph.value_info[:]
    names = ", ".join(sorted(TensorProto.DataType.Name(kind).lower() for kind in replace))
    return [f"the network came in {names}; it was converted to float32"]


def _constant_to_initializer(net: Net, node: onnx.NodeProto) -> None:
    found = attributes(node)
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if "value" in found:
        value = np.asarray(found["value"])
    elif name := next((name for name in kinds if name in found), None):
        value = np.asarray(found[name], kinds[name])
    else:
        raise ModelError(
            f"the constant {node.output[0]!r} is sparse or a string",
            where=node.name,
            remedy="export the network with dense numeric constants",
        )
    net.remove([node])
    target = node.output[0]
    if target in net.output_names:  # an output of the graph has to come out of a node
        source = net.add_constant(f"{target}.value", value)
        net.nodes.append(helper.make_node("Identity", [source], [target], name=node.name))
    else:
        net.add_constant(target, value, exact=True)


def _inference_batch_norm(node: onnx.NodeProto) -> list[str]:
    notes = []
    for attribute in list(node.attribute):
        if attribute.name == "training_mode":
            if attribute.i:
                notes.append(f"{node.name}: batch normalization was in training mode; its stored statistics are used")
            node.attribute.remove(attribute)
    del node.output[1:]
    return notes


def _inference_dropout(net: Net, node: onnx.NodeProto) -> None:
    if len(node.output) > 1 and node.output[1]:
        mask = node.output[1]
        if mask in net.output_names or mask in net.consumers():
            return  # somebody wants the mask: the operator stays and is reported as unsupported if it is
    del node.output[1:]
    node.CopyFrom(helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name))
