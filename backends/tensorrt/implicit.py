"""The files of the implicit way: the calibration cache, the table of ONNX Runtime's provider, and the graph that the cache means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from zsq_deploy.backends.base import Target
from zsq_deploy.backends.tensorrt.cache import CacheBinding, CalibrationCache, binding_path, write_cache
from zsq_deploy.backends.tensorrt.ort_table import FILES, write_table
from zsq_deploy.backends.tensorrt.reference import CacheReference, reference_of_cache
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model.graph import Graph

__all__ = ["CACHE", "CACHE_VERSION", "REFERENCE", "TABLE_FOLDER", "Implicit", "cache_of", "write_implicit"]

CACHE = "calibration.cache"
"""File name of the cache."""

REFERENCE = "implicit.onnx"
"""File name of the graph that the cache means."""

CACHE_VERSION = MappingProxyType({8: "8.6.2", 10: "10.3.0"})
"""Generation -> version that the cache is written for: those of JetPack 6.0, and of 6.1 and 6.2. For any other the first line is rewritten."""

TABLE_FOLDER = "onnxruntime"
"""Folder of ONNX Runtime's table, whose third file is called ``calibration.cache`` too."""


@dataclass(frozen=True)
class Implicit:
    """What was written for an engine from the float network.

    Attributes:
        cache: The cache.
        reference: What it means; ``None`` if no layer of the network computes in 8 bits with it.
        files: The other files that belong to the folder, by their path in it.
        notes: What a reader should know, one sentence each.
    """

    cache: Path
    reference: CacheReference | None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def cache_of(graph: Graph, ranges: Mapping[str, tuple[float, float]], target: Target) -> CalibrationCache:
    """The cache that ranges mean for a network: of its own tensors only, and of names that a cache can hold.

    Args:
        graph: The float network, batch normalization folded.
        ranges: Range of its activations.
        target: ``tensorrt-8`` or ``tensorrt-10``: decides the version in the first line.
    """
    known = {name for node in graph for name in node.output} | {spec.name for spec in graph.inputs}
    # Names with a line break do not fit in a cache; no exporter writes them.
    names = [name for name in ranges if name in known and not {"\n", "\r"} & set(name)]
    return CalibrationCache.from_ranges(ranges, version=CACHE_VERSION[generation(target)], names=names)


def write_implicit(
    folder: Path,
    network: Graph,
    ranges: Mapping[str, tuple[float, float]],
    target: Target,
    *,
    set_digest: str = "",
    floats: tuple[str, ...] = (),
) -> Implicit | None:
    """Write the ranges for those who give TensorRT the float network: its own cache, and the table of ONNX Runtime's provider.

    Args:
        folder: Where; made already.
        network: The network that the engine is built from.
        ranges: Range of its activations.
        target: ``tensorrt-8`` or ``tensorrt-10``.
        set_digest: Of the calibration set that the ranges come from.
        floats: Nodes that the user's builder keeps in float.

    Returns:
        What was written; ``None``: no tensor has a range, and nothing was.
    """
    cache = cache_of(network, ranges, target)
    if not len(cache):
        return None
    path = folder / CACHE
    method = str(getattr(ranges, "method", "") or "ranges")
    write_cache(path, cache, CacheBinding(network.digest, set_digest, method))
    write_table(folder / TABLE_FOLDER, {name: ranges[name] for name in (*cache.scales, *cache.left_out)})
    files = [binding_path(path).name, *(f"{TABLE_FOLDER}/{name}" for name in FILES)]
    notes: list[str] = []
    if cache.left_out:
        left = ", ".join(cache.left_out[:5])
        notes.append(f"zero on every image, so without a scale in the calibration cache: {left}")
    reference = None
    try:
        reference = reference_of_cache(network, cache, floats=floats)
    except CalibrationError as error:
        notes.append(f"the calibration cache stands for a float engine: {error.what}")
    return Implicit(path, reference, tuple(files), tuple(notes))
