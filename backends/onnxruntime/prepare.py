"""Exact rewrites of the float graph before it is quantized, so that ONNX Runtime finds the patterns that it has integer kernels for.

Every rewrite keeps the function (in real arithmetic) and says which of the old values has the same contents as a new one, so that
ranges measured on the original graph stay valid. The project does not depend on ``quant_pre_process``: it stops with an assertion on
graphs of real exporters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from zsq_deploy.backends.onnxruntime.editing import Editor
from zsq_deploy.backends.onnxruntime.transposed import conv_transpose_as_conv
from zsq_deploy.errors import ModelError
from zsq_deploy.model.graph import Graph, attributes

__all__ = ["Prepared", "prepare", "replace_initializers"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Prepared:
    """The graph to quantize.

    Attributes:
        graph: The rewritten graph.
        aliases: New value name -> name of the value of the original graph that holds the same numbers.
        rewrites: What was rewritten, one line each, for the manifest.
        ranges: Ranges of new values that follow from what they are.
    """

    graph: Graph
    aliases: Mapping[str, str]
    rewrites: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


Rewrite = Callable[[Editor], bool]


def _constants(edit: Editor) -> bool:
    """Constant nodes become initializers, because the quantizer recognizes weights only there."""
    found = [node for node in edit.graph if node.op_type == "Constant" and node.domain in ("", "ai.onnx")]
    for node in found:
        array = edit.graph.constant(node.output[0])
        if array is None:
            continue
        edit.proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), node.output[0]))
        edit.remove(node)
    return False  # nothing else can follow from it, and the log need not mention it


def _one_initializer_each(edit: Editor) -> bool:
    """A weight or bias that several nodes read is copied, so that each node can have its own scale."""
    changed = False
    weighted = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in edit.graph:
        if node.op_type in weighted:
            for slot in range(1, len(node.input)):
                if node.input[slot] in edit.graph.initializer_names:
                    readers.setdefault(node.input[slot], []).append((node, slot))
    for name, places in readers.items():
        array = edit.graph.constant(name)
        assert array is not None
        for node, slot in places[1:]:
            node.input[slot] = edit.add_initializer(f"{name}__{node.name}", array)
            changed = True
    if changed:
        edit.log.append("copied weights that several nodes share")
    return changed


def _pad_into_conv(edit: Editor) -> bool:
    """A constant zero Pad in front of a convolution becomes the convolution's own padding."""
    for pad in edit.graph:
        if pad.op_type != "Pad" or str(attributes(pad).get("mode", "constant")) != "constant":
            continue
        pads = edit.graph.constant(pad.input[1]) if len(pad.input) > 1 else None
        if pads is None or (len(pad.input) > 3 and pad.input[3]):
            continue
        if len(pad.input) > 2 and pad.input[2]:
            value = edit.graph.constant(pad.input[2])
            if value is None or float(np.asarray(value).reshape(-1)[0]) != 0:
                continue
        amounts = [int(v) for v in np.asarray(pads).reshape(-1)]
        rank = len(amounts) // 2
        begin, end = amounts[:rank], amounts[rank:]
        readers = edit.graph.consumers(pad.output[0])
        if edit.graph.is_output(pad.output[0]) or not readers or min(amounts) < 0 or any(begin[:2] + end[:2]):
            continue
        if any(reader.op_type != "Conv" or reader.input[0] != pad.output[0] for reader in readers):
            continue
        if any(str(attributes(reader).get("auto_pad", "NOTSET")) not in ("NOTSET", "VALID") for reader in readers):
            continue
        for conv in readers:
            old = [int(v) for v in attributes(conv).get("pads", [0] * (2 * (rank - 2)))]
            merged = [a + b for a, b in zip(old, begin[2:] + end[2:], strict=True)]
            kept = [a for a in conv.attribute if a.name not in ("pads", "auto_pad")]
            del conv.attribute[:]
            conv.attribute.extend([*kept, helper.make_attribute("pads", merged)])
            conv.input[0] = pad.input[0]
        edit.log.append(f"merged {pad.name} into the padding of {', '.join(reader.name for reader in readers)}")
        edit.remove(pad)
        return True
    return False


def _plain_pad(edit: Editor) -> bool:
    """Zero padding without saying zero: a constant that is said would be quantized as a tensor of its own."""
    for node in edit.graph:
        if node.op_type != "Pad" or len(node.input) < 3 or not node.input[2]:
            continue
        if str(attributes(node).get("mode", "constant")) != "constant":
            continue
        value = edit.graph.constant(node.input[2])
        if value is not None and not np.asarray(value).any():
            axes = node.input[3] if len(node.input) > 3 else ""
            del node.input[2:]
            if axes:
                node.input.extend(["", axes])
    return False


def _global_pool(edit: Editor) -> bool:
    """A mean over all of height and width becomes GlobalAveragePool, which has an integer kernel of its own scale."""
    for node in edit.graph:
        shape = edit.shape(node.input[0]) if node.input else None
        if shape is None or len(shape) < 3:
            continue
        spatial = list(range(2, len(shape)))
        if node.op_type == "ReduceMean":
            found = attributes(node)
            axes = found.get("axes")
            if axes is None and len(node.input) > 1 and node.input[1]:
                constant = edit.graph.constant(node.input[1])
                axes = None if constant is None else [int(v) for v in np.asarray(constant).reshape(-1)]
            if axes is None or sorted(int(a) % len(shape) for a in axes) != spatial:
                continue
            keep = bool(found.get("keepdims", 1))
        elif node.op_type == "AveragePool":
            found = attributes(node)
            if any(found.get("pads", [])) or str(found.get("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
                continue
            if [int(k) for k in found.get("kernel_shape", [])] != [shape[axis] for axis in spatial]:
                continue
            if any(d != 1 for d in found.get("dilations", [])):
                continue
            keep = True
        else:
            continue
        pooled = node.output[0] if keep else edit.fresh(f"{node.output[0]}__pooled")
        nodes = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name)]
        if not keep:
            edit.aliases[pooled] = edit.aliases.get(node.output[0], node.output[0])
            nodes.append(
                helper.make_node("Flatten", [pooled], [node.output[0]], name=edit.fresh(f"{node.name}__flat"), axis=1)
            )
        edit.log.append(f"{node.op_type} {node.name} over all of the plane became GlobalAveragePool")
        edit.replace(node, *nodes)
        return True
    return False


def _flattens(edit: Editor, node: onnx.NodeProto, channels: int) -> bool:
    """Whether a node turns N x C x 1 x 1 into N x C."""
    if node.op_type == "Flatten":
        return int(attributes(node).get("axis", 1)) == 1
    if node.op_type == "Squeeze":
        axes = edit.graph.constant(node.input[1]) if len(node.input) > 1 else None
        return axes is not None and sorted(int(a) % 4 for a in np.asarray(axes).reshape(-1)) == [2, 3]
    if node.op_type == "Reshape":
        shape = edit.graph.constant(node.input[1])
        wanted = [] if shape is None else [int(v) for v in np.asarray(shape).reshape(-1)]
        return len(wanted) == 2 and wanted[0] in (-1, 0) and wanted[1] in (channels, -1) and wanted != [-1, -1]
    return False


def _pointwise_head(edit: Editor) -> bool:
    """A 1x1 convolution of a 1x1 plane, flattened afterwards, becomes a matrix product: its integer kernel can give float out."""
    for conv in edit.graph:
        if conv.op_type != "Conv":
            continue
        weight = edit.graph.constant(conv.input[1])
        source = edit.shape(conv.input[0])
        if weight is None or source is None or len(source) != 4 or source[2:] != (1, 1) or weight.ndim != 4:
            continue
        found = attributes(conv)
        if weight.shape[2:] != (1, 1) or int(found.get("group", 1)) != 1 or any(found.get("pads", [])):
            continue
        flat = edit.sole_consumer(conv.output[0])
        if flat is None or not _flattens(edit, flat, weight.shape[0]):
            continue
        values = edit.fresh(f"{conv.input[0]}__flat")
        edit.aliases[values] = edit.aliases.get(conv.input[0], conv.input[0])
        matrix = edit.reshaped(conv.input[1], weight.reshape(weight.shape[:2]))
        bias = [conv.input[2]] if len(conv.input) > 2 and conv.input[2] else []
        edit.replace(
            conv,
            helper.make_node("Flatten", [conv.input[0]], [values], name=edit.fresh(f"{conv.name}__flat"), axis=1),
            helper.make_node("Gemm", [values, matrix, *bias], [flat.output[0]], name=conv.name, transB=1),
        )
        edit.remove(flat)
        edit.log.append(f"1x1 convolution {conv.name} of a 1x1 plane became a matrix product")
        return True
    return False


def _matmul_bias(edit: Editor) -> bool:
    """MatMul with a constant matrix, followed by a constant bias, becomes Gemm: the bias is then exact to int32 instead of 8 bits."""
    for matmul in edit.graph:
        if matmul.op_type != "MatMul":
            continue
        weight = edit.graph.constant(matmul.input[1])
        source = edit.shape(matmul.input[0])
        add = edit.sole_consumer(matmul.output[0])
        if (
            weight is None
            or weight.ndim != 2
            or source is None
            or len(source) < 2
            or add is None
            or add.op_type != "Add"
        ):
            continue
        leading = list(source[:-1])
        if leading.count(None) > 1:
            continue  # a Reshape can work out one size
        back_shape = [-1 if size is None else size for size in leading]
        if None not in leading:
            back_shape[0] = -1  # the batch stays free where it was written down as a number
        other = next(name for name in add.input if name != matmul.output[0])
        bias = edit.graph.constant(other)
        if bias is None or bias.size != weight.shape[1] or bias.shape[-1] != weight.shape[1]:
            continue
        rows, product = matmul.input[0], add.output[0]
        nodes: list[onnx.NodeProto] = []
        if len(source) > 2:
            rows = edit.fresh(f"{matmul.input[0]}__rows")
            product = edit.fresh(f"{add.output[0]}__rows")
            edit.aliases[rows] = edit.aliases.get(matmul.input[0], matmul.input[0])
            edit.aliases[product] = edit.aliases.get(add.output[0], add.output[0])
            to_rows = edit.add_initializer(f"{matmul.name}__rows_shape", np.array([-1, weight.shape[0]], np.int64))
            back = edit.add_initializer(
                f"{matmul.name}__back_shape", np.array([*back_shape, weight.shape[1]], np.int64)
            )
            nodes.append(
                helper.make_node("Reshape", [matmul.input[0], to_rows], [rows], name=edit.fresh(f"{matmul.name}__rows"))
            )
        vector = other if bias.ndim == 1 else edit.reshaped(other, bias.reshape(-1))
        nodes.append(helper.make_node("Gemm", [rows, matmul.input[1], vector], [product], name=matmul.name))
        if len(source) > 2:
            nodes.append(
                helper.make_node("Reshape", [product, back], [add.output[0]], name=edit.fresh(f"{matmul.name}__back"))
            )
        at_add = edit.index(add)
        # The product stands where the Add stood: everything that the Add waited for is ready there.
        kept = list(edit.proto.graph.node)
        kept[at_add : at_add + 1] = nodes
        del edit.proto.graph.node[:]
        edit.proto.graph.node.extend(node for node in kept if node is not matmul and node.output[0] != matmul.output[0])
        edit.log.append(f"MatMul {matmul.name} and its bias {add.name} became Gemm")
        return True
    return False


def _last_products(graph: Graph) -> set[str]:
    """Names of convolutions and matrix products that no other one follows."""
    macs = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    followed: dict[str, bool] = {}
    for node in reversed(graph.nodes):
        readers = [reader for name in node.output for reader in graph.consumers(name)]
        followed[node.name] = any(reader.op_type in macs or followed[reader.name] for reader in readers)
    return {node.name for node in graph if node.op_type in macs and not followed[node.name]}


def _float_heads(edit: Editor) -> bool:
    """A last 1x1 convolution becomes a matrix product over pixels, because that one's integer kernel can give float out."""
    last = _last_products(edit.graph)
    for conv in edit.graph:
        if conv.op_type != "Conv" or conv.name not in last:
            continue
        weight, shape = edit.graph.constant(conv.input[1]), edit.shape(conv.input[0])
        found = attributes(conv)
        if weight is None or weight.ndim != 4 or weight.shape[2:] != (1, 1) or shape is None or None in shape[1:]:
            continue
        if (
            int(found.get("group", 1)) != 1
            or any(found.get("pads", []))
            or any(v != 1 for v in found.get("strides", []))
        ):
            continue
        if len(conv.input) > 2 and conv.input[2] and edit.graph.constant(conv.input[2]) is None:
            continue
        source, final = conv.input[0], conv.output[0]
        _, _, height, width = shape
        outputs, inputs = weight.shape[:2]
        last_in, rows = edit.fresh(f"{source}__last"), edit.fresh(f"{source}__rows")
        product, last_out = edit.fresh(f"{final}__rows"), edit.fresh(f"{final}__last")
        edit.aliases.update({name: edit.aliases.get(source, source) for name in (last_in, rows)})
        edit.aliases.update({name: edit.aliases.get(final, final) for name in (product, last_out)})
        to_rows = edit.add_initializer(f"{conv.name}__rows_shape", np.array([-1, inputs], np.int64))
        back = edit.add_initializer(f"{conv.name}__back_shape", np.array([-1, height, width, outputs], np.int64))
        matrix = edit.reshaped(conv.input[1], weight.reshape(outputs, inputs))
        bias = [conv.input[2]] if len(conv.input) > 2 and conv.input[2] else []
        title = conv.name
        edit.replace(
            conv,
            helper.make_node("Transpose", [source], [last_in], name=edit.fresh(f"{title}__last_in"), perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [last_in, to_rows], [rows], name=edit.fresh(f"{title}__rows")),
            helper.make_node("Gemm", [rows, matrix, *bias], [product], name=edit.fresh(f"{title}__product"), transB=1),
            helper.make_node("Reshape", [product, back], [last_out], name=edit.fresh(f"{title}__back")),
            helper.make_node("Transpose", [last_out], [final], name=edit.fresh(f"{title}__first"), perm=[0, 3, 1, 2]),
        )
        edit.log.append(f"last 1x1 convolution {title} became a matrix product over pixels, with float output")
        return True
    return False


def _norm_as_conv(edit: Editor) -> bool:
    """A batch normalization that stands alone becomes a 1x1 depthwise convolution, which has an integer kernel."""
    for node in edit.graph:
        if node.op_type != "BatchNormalization" or len(node.output) > 1:
            continue
        shape = edit.shape(node.input[0])
        found = [edit.graph.constant(name) for name in node.input[1:5]]
        if shape is None or len(shape) != 4 or any(one is None for one in found):
            continue
        gamma, beta, mean, var = (np.asarray(one, np.float64) for one in found if one is not None)
        scale = gamma / np.sqrt(var + float(attributes(node).get("epsilon", 1e-5)))
        weight = edit.add_initializer(f"{node.name}__scale", scale.astype(np.float32).reshape(-1, 1, 1, 1))
        bias = edit.add_initializer(f"{node.name}__shift", (beta - mean * scale).astype(np.float32))
        edit.replace(
            node,
            helper.make_node(
                "Conv",
                [node.input[0], weight, bias],
                [node.output[0]],
                name=node.name,
                group=int(scale.size),
                kernel_shape=[1, 1],
            ),
        )
        edit.log.append(f"batch normalization {node.name} became a 1x1 depthwise convolution")
        return True
    return False


def _plain_gemm(edit: Editor) -> bool:
    """Factors alpha and beta of a Gemm are folded into its constants: the integer kernel wants both to be 1."""
    changed = False
    for node in edit.graph:
        if node.op_type != "Gemm":
            continue
        found = attributes(node)
        alpha, beta = float(found.get("alpha", 1.0)), float(found.get("beta", 1.0))
        weight = edit.graph.constant(node.input[1])
        bias = edit.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if (alpha == 1 and beta == 1) or weight is None or (bias is None and len(node.input) > 2 and node.input[2]):
            continue
        if alpha != 1:
            node.input[1] = edit.reshaped(node.input[1], (weight * np.float32(alpha)).astype(weight.dtype))
        if beta != 1 and bias is not None:
            node.input[2] = edit.reshaped(node.input[2], (bias * np.float32(beta)).astype(bias.dtype))
        kept = [attribute for attribute in node.attribute if attribute.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)
        edit.log.append(f"folded alpha and beta of {node.name} into its constants")
        changed = True
    return changed


def _hard_gates(edit: Editor) -> bool:
    """HardSwish and HardSigmoid become a 1x1 depthwise convolution and a Clip, which have integer kernels (HardSwish: and a Mul)."""
    for node in edit.graph:
        if node.op_type not in ("HardSwish", "HardSigmoid"):
            continue
        shape = edit.shape(node.input[0])
        if shape is None or len(shape) != 4 or shape[1] is None:
            continue
        found = attributes(node)
        swish = node.op_type == "HardSwish"
        alpha = 1 / 6 if swish else float(found.get("alpha", 0.2))
        beta = 0.5 if swish else float(found.get("beta", 0.5))
        channels = int(shape[1])
        weight = edit.add_initializer(f"{node.name}__slope", np.full((channels, 1, 1, 1), alpha, np.float32))
        bias = edit.add_initializer(f"{node.name}__offset", np.full(channels, beta, np.float32))
        low = edit.add_initializer(f"{node.name}__low", np.array(0, np.float32))
        high = edit.add_initializer(f"{node.name}__high", np.array(1, np.float32))
        line = edit.fresh(f"{node.output[0]}__line")
        gate = edit.fresh(f"{node.output[0]}__gate") if swish else node.output[0]
        nodes = [
            helper.make_node(
                "Conv",
                [node.input[0], weight, bias],
                [line],
                name=edit.fresh(f"{node.name}__line"),
                group=channels,
                kernel_shape=[1, 1],
            ),
            helper.make_node("Clip", [line, low, high], [gate], name=edit.fresh(f"{node.name}__clip")),
        ]
        edit.ranges[line] = (0.0, 1.0)  # the Clip takes the rest
        if swish:
            edit.ranges[gate] = (0.0, 1.0)
            nodes.append(helper.make_node("Mul", [node.input[0], gate], [node.output[0]], name=node.name))
        edit.log.append(f"{node.op_type} {node.name} became a convolution and a Clip")
        edit.replace(node, *nodes)
        return True
    return False


_REWRITES: tuple[Rewrite, ...] = (
    _constants,
    _pad_into_conv,
    _plain_pad,
    _global_pool,
    _pointwise_head,
    _matmul_bias,
    _plain_gemm,
    _norm_as_conv,
    conv_transpose_as_conv,
    _one_initializer_each,
)


def _drop_unused(proto: onnx.ModelProto) -> None:
    """Take out initializers that nobody reads and stale shape annotations."""
    used = {name for node in proto.graph.node for name in node.input}
    used.update(value.name for value in proto.graph.output)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    names = {tensor.name for tensor in kept}
    inputs = [value for value in proto.graph.input if value.name not in names or value.name not in used]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    del proto.graph.value_info[:]


def prepare(graph: Graph, *, gates: bool = False, float_heads: bool = False) -> Prepared:
    """Rewrite a float graph (batch norm folded) into the form that ONNX Runtime quantizes best.

    Args:
        graph: The graph.
        gates: Also rewrite HardSwish and HardSigmoid into operators with integer kernels.
        float_heads: Also turn last 1x1 convolutions into matrix products, whose integer kernel gives float.

    Raises:
        ModelError: The rewritten graph is not a valid ONNX model (a bug of this module; the message says where).
    """
    edit = Editor(graph.editable())
    chosen = (*((_hard_gates,) if gates else ()), *_REWRITES, *((_float_heads,) if float_heads else ()))
    for rewrite in chosen:
        while rewrite(edit):
            edit.refresh()
        edit.refresh()
    _drop_unused(edit.proto)
    try:
        onnx.checker.check_model(edit.proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"the graph is not valid ONNX after it was prepared for quantization: {error}",
            where="; ".join(edit.log) or "the graph as it was loaded",
            remedy="check the model with onnx.checker; if it is valid, please report this",
        ) from error
    return Prepared(Graph(edit.proto), dict(edit.aliases), tuple(edit.log), dict(edit.ranges))


def replace_initializers(graph: Graph, biases: Mapping[str, Array], weights: Mapping[str, Array]) -> Graph:
    """A graph with corrected biases and replaced weights.

    Args:
        graph: Float graph with batch norm folded.
        biases: Name of a bias initializer, or of a Conv, ConvTranspose or Gemm node (which gets a bias if it has none) -> values.
        weights: Initializer name -> values of the same shape.

    Raises:
        ModelError: A name is not known, or a shape does not fit.
    """
    if not biases and not weights:
        return graph
    proto = graph.editable()
    place = {tensor.name: tensor for tensor in proto.graph.initializer}

    def put(name: str, array: Array) -> None:
        old = numpy_helper.to_array(place[name])
        if old.shape != array.shape:
            raise ModelError(
                f"the new values of {name!r} have shape {array.shape}, the old ones {old.shape}",
                where=name,
                remedy="give one value for each old one",
            )
        place[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, old.dtype), name))

    for name, array in weights.items():
        if name not in place:
            raise ModelError(f"no initializer is called {name!r}", where=name, remedy="check the names in the graph")
        put(name, np.asarray(array))
    nodes = {node.name: node for node in proto.graph.node}
    for name, array in biases.items():
        values = np.asarray(array, np.float32)
        if name in place:
            put(name, values)
        elif name in nodes and nodes[name].op_type in ("Conv", "ConvTranspose", "Gemm"):
            node = nodes[name]
            if len(node.input) > 2 and node.input[2] in place:
                put(node.input[2], values.reshape(numpy_helper.to_array(place[node.input[2]]).shape))
            else:
                fresh = f"{name}__bias"
                proto.graph.initializer.append(numpy_helper.from_array(values.reshape(-1), fresh))
                while len(node.input) < 3:
                    node.input.append("")
                node.input[2] = fresh
        else:
            raise ModelError(
                f"{name!r} is neither a bias nor a convolution or matrix product",
                where=name,
                remedy="correct biases of the same folded graph that is deployed",
            )
    return Graph(proto)
