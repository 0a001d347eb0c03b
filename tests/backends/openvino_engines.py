"""Engines for the tests of the OpenVINO backend."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from zsq_deploy.backends.base import Engine
from zsq_deploy.model import Twin
from zsq_deploy.model.graph import Graph

__all__ = ["noise", "twin_outputs"]


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def twin_outputs(engine: Engine | Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the Q/DQ graph says, in float64."""
    graph = Graph.load(engine.qdq_path) if isinstance(engine, Engine) else engine
    twin = Twin(graph, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        given = {name: torch.tensor(value, dtype=torch.float64) for name, value in feeds.items()}
        return {name: value.numpy() for name, value in twin.run(given).items()}
