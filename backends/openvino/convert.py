"""From an ONNX graph to an OpenVINO IR on disk, and safely back.

The IR is never compressed to float16: OpenVINO's own default for saving would change scales and biases. Nodes without a name of their
own get numbers from a counter of the whole process; they are named after their place, so that equal builds give equal files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from zsq_deploy.artifact import atomic_path
from zsq_deploy.backends.openvino.reading import BARE, IR_VERSIONS, first_line, read, set_shapes, weights_of
from zsq_deploy.backends.openvino.runtime import ov, version
from zsq_deploy.errors import EngineError
from zsq_deploy.model.graph import Graph

__all__ = ["IR_VERSIONS", "convert", "first_line", "read", "save", "set_shapes", "weights_of"]


def convert(graph: Graph | Path | str, *, batch: int | None = None) -> Any:
    """An ONNX graph as an ``openvino.Model``, simplified, with the network's input, output and node names.

    Args:
        graph: The graph, or the file that holds it.
        batch: Fix an open batch to this number; ``None`` leaves it open.

    Raises:
        EngineError: OpenVINO cannot read the graph; the message names the operator.
    """
    if not isinstance(graph, Graph):
        graph = Graph.load(graph)
    with tempfile.TemporaryDirectory(prefix="zsq-openvino-") as scratch:
        path = Path(scratch) / "graph.onnx"
        path.write_bytes(graph.proto.SerializeToString(deterministic=True))
        try:
            model = ov.convert_model(str(path)).clone()  # the clone holds its constants in memory, not in the file
        except Exception as error:
            raise EngineError(
                f"OpenVINO {version()} cannot read this network: {first_line(error)}",
                where=f"network {graph.proto.graph.name!r}, operator set {graph.opset}",
                remedy="look for the operator that the message names; `zsq inspect` lists all of them",
            ) from error
    for port, spec in zip(model.outputs, graph.outputs, strict=True):
        port.get_tensor().set_names({spec.name})
    for port, spec in zip(model.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({spec.name})
    if batch is not None:
        set_shapes(model, {spec.name: (batch, *(size or 1 for size in spec.shape[1:])) for spec in graph.inputs})
    _name_by_place(model, graph)
    return model


def _name_by_place(model: Any, graph: Graph) -> None:
    """Name operators that the network has no name for after their place: OpenVINO numbers them with a counter of the process."""
    known = {spec.name for spec in graph.inputs} | set(graph.initializer_names)
    for node in graph.nodes:
        known.update((node.name, *node.output))
    for place, node in enumerate(model.get_ordered_ops()):
        name = str(node.get_friendly_name())
        if not {name, name.removesuffix(BARE), name.removesuffix("/sink_port_0")} & known:
            node.set_friendly_name(f"{node.get_type_name()}_of_place_{place}")


def save(model: Any, path: Path) -> None:
    """Write ``path`` (.xml) and the ``.bin`` beside it; a reader sees the old pair or the new pair.

    The weights are put in place first and the ``.xml``, which every reader opens, last.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        ov.save_model(model, str(made), compress_to_fp16=False)
        for source, target in ((weights_of(made), weights_of(path)), (made, path)):
            with atomic_path(target) as temporary:
                temporary.unlink()
                source.rename(temporary)
