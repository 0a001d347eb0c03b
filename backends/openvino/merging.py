"""Leaving out what OpenVINO leaves out: the rounding between a convolution and the residual sum that is computed inside it.

NNCF, POT and ONNX Runtime round what a convolution gives before it is added to the other branch. OpenVINO's CPU plugin computes the
sum in the convolution's kernel, on numbers that were never rounded (measured: 10.6 % of a ResNet-20's logits move by more than
2 steps between graph and engine). A graph without that pair says what the engine does.
"""

from __future__ import annotations

from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant.reader import read_qdq

__all__ = ["drop_merged_pairs"]


def drop_merged_pairs(qdq: Graph) -> tuple[Graph, tuple[str, ...]]:
    """Take away one Q/DQ pair between a convolution and every Add of two activations.

    If both operands come straight from convolutions, it is the pair of the second one: the plugin merges into that.

    Returns:
        The graph (`qdq` itself if nothing changes), and the names of the sums.
    """
    rounded = {
        tensor.output: tensor for tensor in read_qdq(qdq) if tensor.output and not tensor.is_weight and tensor.quantize
    }
    places: dict[str, tuple[int, str]] = {}
    for node in qdq:
        if node.op_type != "Add" or any(qdq.constant(value) is not None for value in node.input):
            continue
        for index in (1, 0):
            value = node.input[index]
            tensor = rounded.get(value)
            source = value if tensor is None else tensor.name
            maker = qdq.producer(source)
            alone = len(qdq.consumers(source)) == 1 and not qdq.is_output(source)
            if maker is None or maker.op_type not in ("Conv", "ConvTranspose") or not alone:
                continue
            if tensor is None:
                break  # nothing is rounded there
            if len(qdq.consumers(value)) == 1 and not qdq.is_output(value):
                places[node.name] = (index, source)
                break
    if not places:
        return qdq, ()
    net = Net(qdq.proto)
    for node in net.nodes:
        if node.name in places and node.op_type == "Add":
            index, source = places[node.name]
            node.input[index] = source
    net.touch()
    net.sweep()
    return Graph(net.proto()), tuple(places)
