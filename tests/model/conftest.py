"""What the tests of the model share: ONNX Runtime as an independent judge, and inputs that fit a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from zsq_deploy.model.graph import Graph

Array = np.ndarray[Any, Any]


def _run(model: onnx.ModelProto | Graph | Path, feeds: Mapping[str, Array] | Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Fusions are off: a test of ours must not depend on theirs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(model, Graph):
        model = model.proto
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    if not isinstance(feeds, Mapping):
        feeds = {session.get_inputs()[0].name: feeds}
    return list(session.run(None, dict(feeds)))


def _error(found: Array, wanted: Array) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    largest = np.abs(wanted).max() if wanted.size else 1.0
    return float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max() / max(float(largest), 1e-30))


def _images(graph: Graph, batch: int, seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        spec.name: generator.standard_normal(
            tuple(batch if axis == 0 and size is None else int(size or 1) for axis, size in enumerate(spec.shape))
        ).astype(np.float32)
        for spec in graph.inputs
    }


@pytest.fixture(scope="session")
def ort_run() -> Callable[..., list[Array]]:
    """Run a model in ONNX Runtime, unfused, on one thread."""
    return _run


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Array, Array], float]:
    """Largest absolute difference over the largest absolute value."""
    return _error


@pytest.fixture(scope="session")
def images() -> Callable[..., dict[str, Array]]:
    """Standard normal inputs for a graph."""
    return _images
