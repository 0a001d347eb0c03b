"""Graphs of one node for tests, and ONNX Runtime's answer to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin

Array = np.ndarray[Any, np.dtype[Any]]


def one_node(
    op_type: str,
    inputs: Sequence[Array | None],
    *,
    opset: int = 17,
    constants: Sequence[int] = (),
    outputs: int = 1,
    domain: str = "",
    **attributes: Any,
) -> tuple[Graph, dict[str, Array]]:
    """A graph of one node, and the feeds for its inputs ``i0, i1, ...``; its outputs are ``o0, o1, ...``."""
    names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
    given = {
        name: (index, np.asarray(array))
        for index, (name, array) in enumerate(zip(names, inputs, strict=True))
        if array is not None
    }
    feeds = {name: array for name, (index, array) in given.items() if index not in constants}
    node = helper.make_node(op_type, names, [f"o{index}" for index in range(outputs)], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in feeds.items()
        ],
        [helper.make_tensor_value_info(f"o{index}", onnx.TensorProto.UNDEFINED, None) for index in range(outputs)],
        [onnx.numpy_helper.from_array(array, name) for name, (index, array) in given.items() if index in constants],
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return Graph(model if domain else onnx.shape_inference.infer_shapes(model)), feeds


def by_runtime(graph: Graph, feeds: Mapping[str, Array], *, optimize: bool = True) -> dict[str, Array]:
    """ONNX Runtime's outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def by_twin(graph: Graph, feeds: Mapping[str, Array], **twin: Any) -> dict[str, Array]:
    """The twin's outputs."""
    with torch.no_grad():
        found = Twin(graph, device="cpu", **twin).run({name: torch.from_numpy(array) for name, array in feeds.items()})
    return {name: tensor.numpy() for name, tensor in found.items()}
