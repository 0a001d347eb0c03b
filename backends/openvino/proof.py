"""What OpenVINO really executed: its runtime graph and profile, traced back to the network's nodes.

The runtime graph says of every executed layer which operators of the model it stands for, which primitive computed it and in which
precision; the profile says how long it took. How much arithmetic a layer is comes from the shapes of the operators in the model that
was compiled, so a convolution that the runtime graph does not account for is noticed, and counts as float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from zsq_deploy.backends.base import KernelRecord
from zsq_deploy.backends.openvino.reading import BARE
from zsq_deploy.errors import EngineError
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import is_dequantize, is_quantize

if TYPE_CHECKING:
    from zsq_deploy.backends.openvino.runner import OvRunner

__all__ = ["VALUES", "Layer", "kernels", "layers", "model_macs"]

Array = npt.NDArray[Any]

VALUES = " x values"
"""Appended to the name of an attention operator: its second product, of probabilities and values."""

_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_ABSORBED = ("Add", "Multiply", "Subtract", "Relu", "Clamp", "Gelu", "FakeQuantize", "Sigmoid", "Swish")
"""What a product's kernel can compute on its results."""

_FORMS = 3
_REPEATS = 16
_WARMUP = 5


@dataclass(frozen=True)
class Layer:
    """One executed layer of the runtime graph.

    Attributes:
        name: OpenVINO's name.
        kind: Its type: ``Convolution``, ``Subgraph``, ``Reorder``, ...
        primitive: The kernel that computed it, with its type of numbers at the end: ``brgconv_avx512_dw_I8``.
        precision: Precision of its arithmetic: ``u8``, ``f32``, ...
        outputs: Precisions of its outputs.
        originals: Names of the operators of the model that it stands for.
        microseconds: Time of one execution; ``None`` if it took less than the profile can tell.
    """

    name: str
    kind: str
    primitive: str
    precision: str
    outputs: tuple[str, ...]
    originals: tuple[str, ...]
    microseconds: float | None

    @property
    def is_view(self) -> bool:
        """Whether it only names the same memory anew: OpenVINO has no kernel for it.

        That it took no time says nothing: the profile counts whole microseconds and calls what is faster ``NOT_RUN``.
        """
        return self.primitive.startswith("unknown")

    @property
    def integer(self) -> bool:
        """Whether it multiplied (or moved) integers. What only turns integers into floats, or floats into integers, does not."""
        if not self.primitive.upper().endswith(("_I8", "_U8")):
            return False
        if self.kind in _PRODUCTS:
            return True  # these may write float: the last step of the kernel scales the sums
        return not any(one in ("f32", "f16", "bf16") for one in self.outputs)


def _text(info: Any, key: str) -> str:
    if key not in info:
        return ""
    value = info[key]
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def layers(compiled: Any, microseconds: Mapping[str, float] | None = None) -> list[Layer]:
    """The layers of a compiled model in order of execution, without constants, inputs and outputs.

    Args:
        compiled: The ``openvino.CompiledModel``.
        microseconds: Time of each layer by name; default: what the runtime graph says (of the last inference, with PERF_COUNT).
    """
    found: list[tuple[int, Layer]] = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind = _text(info, "layerType")
        if kind in ("Const", "Constant", "Input", "Parameter", "Output", "Result"):
            continue
        name = str(node.get_friendly_name())
        if microseconds is not None:
            time = microseconds.get(name)
        else:
            said = _text(info, "execTimeMcs")
            time = float(said) if said.isdigit() else None
        order = _text(info, "execOrder")
        found.append(
            (
                int(order) if order.isdigit() else len(found),
                Layer(
                    name=name,
                    kind=kind,
                    primitive=_text(info, "primitiveType"),
                    precision=_text(info, "runtimePrecision"),
                    outputs=_names(_text(info, "outputPrecisions")),
                    originals=_names(_text(info, "originalLayersNames")),
                    microseconds=time,
                ),
            )
        )
    return [layer for _, layer in sorted(found, key=lambda pair: pair[0])]


def _sizes(shape: Any) -> list[int] | None:
    return [size.get_length() for size in shape] if shape.is_static else None


def model_macs(model: Any) -> dict[str, int]:
    """Multiply-accumulates of every convolution and product of a model with fixed shapes: operator name -> count of one batch.

    The two products of an attention operator are counted apart: ``NAME`` (queries and keys) and ``NAME`` + :data:`VALUES`.
    """
    found: dict[str, int] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "ScaledDotProductAttention":
            query, key, value = (_sizes(node.input(place).get_partial_shape()) for place in range(3))
            if query and key and value:
                pairs = math.prod(query[:-1]) * key[-2]
                found[str(node.get_friendly_name())] = pairs * query[-1]
                found[f"{node.get_friendly_name()}{VALUES}"] = pairs * value[-1]
            continue
        if kind not in (*_CONVOLUTIONS, "MatMul"):
            continue
        source, weight = (_sizes(node.input(place).get_partial_shape()) for place in (0, 1))
        output = _sizes(node.output(0).get_partial_shape())
        if source is None or weight is None or output is None:
            count = 0
        elif kind == "Convolution":  # [O, I, kernel]
            count = math.prod(output) * math.prod(weight[1:])
        elif kind == "GroupConvolution":  # [G, O/G, I/G, kernel]
            count = math.prod(output) * math.prod(weight[2:])
        elif kind == "ConvolutionBackpropData":  # [I, O, kernel]: every input value reaches all of it
            count = math.prod(source) * math.prod(weight[1:])
        elif kind == "GroupConvolutionBackpropData":
            count = math.prod(source) * math.prod(weight[2:])
        else:
            turned = bool(node.get_attributes().get("transpose_a", False)) and len(source) > 1
            count = math.prod(output) * source[-2 if turned else -1]
        found[str(node.get_friendly_name())] = count
    return found


def _measured(compiled: Any, inputs: Sequence[Array]) -> dict[str, float]:
    """Mean microseconds of every executed layer, without the first runs.

    OpenVINO's profile is the mean over all runs since compiling; the first ones, which make kernels, are taken out of it.
    """
    request = compiled.create_infer_request()
    means: list[dict[str, float]] = []
    for runs in (_WARMUP, _REPEATS):
        for _ in range(runs):
            request.infer(list(inputs), share_inputs=True)
        means.append(
            {
                str(entry.node_name): entry.real_time.total_seconds() * 1e6
                for entry in request.profiling_info
                if "NOT_RUN" not in str(entry.status)
            }
        )
    first, whole = means
    every = _WARMUP + _REPEATS
    return {name: max(0.0, (mean * every - first.get(name, mean) * _WARMUP) / _REPEATS) for name, mean in whole.items()}


def _profile(loaded: OvRunner, feeds: Mapping[str, Array]) -> tuple[Any, Any, dict[str, float]]:
    """The model, one compiled form, and microseconds of every layer: the median of a few compiled forms.

    A mean that another program disturbed is one of several then.
    """
    inputs = [feeds[name] for name in loaded.input_names]
    times: list[dict[str, float]] = []
    for _ in range(_FORMS):
        model, compiled = loaded.compiled(feeds, PERF_COUNT=True)
        times.append(_measured(compiled, inputs))
    names = set().union(*times)
    return model, compiled, {name: median(found.get(name, 0.0) for found in times) for name in names}


def kernels(loaded: OvRunner, feeds: Mapping[str, Array]) -> list[KernelRecord]:
    """Profile a loaded model on one batch and describe every layer that was executed.

    Returns:
        One record for each executed layer, in order of execution. MACs are those of batch 1.

    Raises:
        EngineError: The inputs do not fit, or the runtime graph names nothing.
    """
    model, compiled, times = _profile(loaded, feeds)
    executed = layers(compiled, times)
    if not executed:
        raise EngineError(
            "OpenVINO's runtime graph names no layer",
            where=str(loaded.path),
            remedy="please report this with the version",
        )
    batch = max(1, int(next(iter(feeds.values())).shape[0])) if feeds else 1
    macs = model_macs(model)
    operators = {str(node.get_friendly_name()): node for node in model.get_ordered_ops()}
    known = _network_nodes(loaded.path)
    behind = _names_behind(operators, macs)
    left = dict(macs)
    records = []
    for layer in executed:
        stands_for = [name for name in _candidates(layer) if name in left]
        if not stands_for and layer.kind in _PRODUCTS:  # it goes by the name of the bias or factor that it took in
            stands_for = [behind[name] for name in _candidates(layer) if behind.get(name) in left][:1]
        products = [
            (left.pop(name), operators[name.removesuffix(VALUES)], name)
            for main in stands_for
            for name in (main, f"{main}{VALUES}")
            if name in left
        ]
        count = sum(macs for macs, _, _ in products)
        if layer.is_view and not count:
            continue
        record = KernelRecord(
            node=layer.name,
            op=f"{layer.kind} {layer.primitive}" if layer.primitive else layer.kind,
            integer=layer.integer,
            microseconds=layer.microseconds or 0.0,
            sources=_sources(layer, known),
            macs=count // batch,
        )
        if layer.kind == "Subgraph" and products:
            records.extend(_mixed(record, layer, products, batch, loaded.mode))
            continue
        if not layer.integer:
            product = operators[stands_for[0]] if stands_for else None
            record = replace(record, reason=_mode_reason(loaded.mode) or _reason(layer, product))
        records.append(record)
    records.extend(
        KernelRecord(
            node=name,
            op=str(operators[name.removesuffix(VALUES)].get_type_name()),
            integer=False,
            microseconds=0.0,
            sources=_sources(Layer(name, "", "", "", (), (name,), None), known),
            macs=count // batch,
            reason="OpenVINO's runtime graph does not say which layer computed it",
        )
        for name, count in left.items()
        if count
    )
    return records


def _mixed(
    record: KernelRecord, layer: Layer, products: Sequence[tuple[int, Any, str]], batch: int, mode: str
) -> list[KernelRecord]:
    """The products that one compiled piece of code holds (attention), by whether they multiply integers.

    The primitive's name only tells the type of its first input. The time of the layer, softmax included, goes to the float part if
    there is one.
    """
    whole = [
        (macs, layer.integer and _multiplies_integers(product, name.endswith(VALUES), layer))
        for macs, product, name in products
    ]
    integers = sum(macs for macs, integer in whole if integer)
    floats = sum(macs for macs, integer in whole if not integer)
    found = []
    if integers:
        found.append(
            replace(record, integer=True, macs=integers // batch, microseconds=0.0 if floats else record.microseconds)
        )
    if floats:
        reason = _mode_reason(mode) or "attention: not both of its factors are quantized"
        name = f"{record.node} (float part)" if integers else record.node
        found.append(replace(record, node=name, integer=False, macs=floats // batch, reason=reason))
    return found


def _multiplies_integers(product: Any, values: bool, layer: Layer) -> bool:
    """Whether both factors of a product inside a piece of compiled code are integers."""
    if product.get_type_name() != "ScaledDotProductAttention":
        return all(_is_rounded(product.input_value(place).get_node()) for place in (0, 1))
    # OpenVINO takes the operator apart only now; the names say what became of it
    wanted = "Softmax" if values else "MatMul"
    return any(wanted in name and "Dequantization" in name for name in layer.originals)


def _is_rounded(node: Any) -> bool:
    node = _through(node)
    return node.get_type_name() == "FakeQuantize" or (
        node.get_type_name() in ("Multiply", "Subtract")
        and _through(node.input_value(0).get_node()).get_type_name() == "Constant"
    )


def _names_behind(operators: Mapping[str, Any], macs: Mapping[str, int]) -> dict[str, str]:
    """Name of an operator that can be computed within the product in front of it -> name of that product."""
    found: dict[str, str] = {}
    for name in macs:
        node = operators.get(name)
        while node is not None:
            readers = [port.get_node() for port in node.output(0).get_target_inputs()]
            node = readers[0] if len(readers) == 1 and readers[0].get_type_name() in _ABSORBED else None
            if node is not None:
                found.setdefault(str(node.get_friendly_name()), name)
    return found


def _candidates(layer: Layer) -> list[str]:
    """Names that a layer may have in the model; OpenVINO appends what a transformation did: ``fc/DequantizationMultiply``."""
    names = [layer.name, *layer.originals]
    if layer.kind in _PRODUCTS:
        names.extend(name.rpartition("/")[0] for name in list(names) if "/" in name)
    return list(dict.fromkeys(names))


def _network_nodes(path: Path) -> dict[str, str] | None:
    """Name of a node or of its first value -> the node, from the ONNX file that was loaded or the Q/DQ graph beside an engine.

    OpenVINO calls an operator by its node's name, or by the output of the network that it makes.
    """
    beside = path if path.suffix == ".onnx" else path.with_name("qdq.onnx")
    if not beside.is_file():
        return None
    nodes = [node for node in Graph.load(beside) if not (is_quantize(node) or is_dequantize(node))]
    values = {node.output[0]: node.name for node in nodes if node.output}
    return {**values, **{node.name: node.name for node in nodes}}


def _sources(layer: Layer, known: Mapping[str, str] | None) -> tuple[str, ...]:
    """The nodes of the network that a layer stands for, the one that gave it its name first."""
    names = (name.removesuffix(BARE) for name in _candidates(layer))
    if known is None:
        return tuple(dict.fromkeys(names))
    return tuple(dict.fromkeys(known[name] for name in names if name in known))


def _mode_reason(mode: str) -> str:
    return {"float": "float model", "unfused": "low-precision transformations are off"}.get(mode, "")


def _reason(layer: Layer, product: Any) -> str:
    """Why a layer of an engine was not computed in integers."""
    if product is not None:
        return explain(product)
    kinds = " ".join((layer.name, *layer.originals))
    if layer.primitive.upper().endswith(("_I8", "_U8")):
        return "conversion from integers to float"
    if any(one in ("u8", "i8") for one in layer.outputs):
        return "conversion from float to integers"
    if layer.kind == "Reorder":
        return "float values in another memory layout"
    if layer.kind in ("Convert", "FakeQuantize") or "QuantizeLinear" in kinds:
        return "rounding between float operators"
    return f"OpenVINO computes {layer.kind} in float here: its inputs are not quantized, or it has no integer kernel"


def _through(node: Any) -> Any:
    """The operator behind copies and reshapes that leave numbers as they are."""
    while node.get_type_name() in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Convert", "MaxPool", "Concat"):
        node = node.input_value(0).get_node()
    return node


def explain(product: Any) -> str:
    """Why a convolution or product of an engine's model is computed in float.

    Args:
        product: The operator in the model.
    """
    kind = "depthwise convolution" if _is_depthwise(product) else str(product.get_type_name())
    source = _through(product.input_value(0).get_node())
    weight = _through(product.input_value(1).get_node())
    if source.get_type_name() == "FakeQuantize":
        widths = [math.prod(source.input(place).get_shape()) for place in range(1, 5)]
        if max(widths) > 1:
            return f"{kind}: its input has a scale for each channel, which OpenVINO computes in float"
    elif source.get_type_name() not in ("Multiply", "Subtract"):
        return f"{kind}: its input is not quantized"
    if weight.get_type_name() == "Constant":
        return f"{kind}: its weights are not quantized"
    return f"{kind}: OpenVINO has no integer kernel for this form on this device"


def _is_depthwise(product: Any) -> bool:
    if product.get_type_name() not in ("GroupConvolution", "GroupConvolutionBackpropData"):
        return False
    shape = product.input(1).get_partial_shape()
    return bool(shape.is_static and shape[1].get_length() == 1 and shape[2].get_length() == 1)
