"""How the networks of a folder are written: with the oldest IR version that the target reads."""

from __future__ import annotations

from pathlib import Path

from zsq_deploy.artifact import atomic_path
from zsq_deploy.backends.base import Target
from zsq_deploy.model.graph import Graph

__all__ = ["write_network"]


def write_network(graph: Graph, path: Path, target: Target) -> None:
    """Write a graph as an ONNX file, atomically; the same graph gives the same bytes.

    Args:
        graph: The graph.
        path: The file.
        target: Decides the IR version; operator sets from 19 and 21 on need IR 9 and 10 at least.
    """
    proto = graph.editable()
    proto.ir_version = max(target.ir_version, 10 if graph.opset >= 21 else 9 if graph.opset >= 19 else 0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
