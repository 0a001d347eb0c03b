"""Handing our ranges to ONNX Runtime's quantizer, and making sure that they belong to the model at hand.

``quantize_static(calibration_cache_path=...)`` reads tensor ranges from a JSON file and then needs no calibration pass. The file names
neither the model nor the data, so a stale one would be used without a word. Every cache written here has a second file beside it
(``<name>.binding.json``) with the digests of the cache, the model, the ranges and the calibration set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData, save_tensors_data

from zsq_deploy.artifact import atomic_path, digest_file, digest_json, read_json, write_json
from zsq_deploy.backends.onnxruntime.options import BuildOptions
from zsq_deploy.backends.onnxruntime.placement import Placement, clip_bounds, float_activation
from zsq_deploy.errors import CalibrationError, StaleArtifactError
from zsq_deploy.model.graph import Graph

__all__ = ["binding_path", "check_cache", "needed_values", "tensor_ranges", "write_cache"]

_SCHEMA = 1


def needed_values(graph: Graph, placement: Placement) -> list[str]:
    """The computed float tensors that nodes to be quantized read or write, in graph order."""
    chosen = set(placement.nodes)
    names = dict.fromkeys(
        name
        for node in graph
        if node.name in chosen
        for name in (*node.input, *node.output)
        if float_activation(graph, name)
    )
    return list(names)


def tensor_ranges(
    graph: Graph,
    placement: Placement,
    ranges: Mapping[str, tuple[float, float]],
    aliases: Mapping[str, str],
    options: BuildOptions,
) -> dict[str, tuple[float, float]]:
    """The range of every tensor that the quantizer asks for.

    Ranges behind a Relu or Clip are cut to what the activation lets through: the quantizer removes such a node and leaves the
    clipping to the integer type, which is right only if the range ends where the activation does. The inputs of a concatenation
    take its output's range (if nobody else reads them), because they are rounded to it anyway.

    Raises:
        CalibrationError: A tensor has no range, or one that is not finite or upside down; all of them are named.
    """
    found: dict[str, tuple[float, float]] = {}
    missing, broken = [], []
    for name in needed_values(graph, placement):
        source = name if name in ranges else aliases.get(name, name)
        if source not in ranges:
            missing.append(name)
            continue
        low, high = (float(v) for v in ranges[source])
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            broken.append(f"{name} [{low}, {high}]")
            continue
        found[name] = (low, high)
    if missing or broken:
        parts = []
        if missing:
            parts.append(
                f"{len(missing)} tensors have no range ({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''})"
            )
        if broken:
            parts.append(f"{len(broken)} ranges make no sense ({', '.join(broken[:5])})")
        raise CalibrationError(
            "the ranges do not cover what is to be quantized: " + "; ".join(parts),
            where=", ".join((missing or broken)[:1]),
            remedy="collect ranges of the same model with model.folded().graph; look for NaN or infinite activations",
        )
    for node in graph:
        if node.op_type in ("Relu", "Clip") and node.output[0] in found and node.name in placement.nodes:
            bounds = clip_bounds(graph, node)
            if bounds is not None:
                low, high = found[node.output[0]]
                low, high = (min(max(v, bounds[0]), bounds[1]) for v in (low, high))
                found[node.output[0]] = (low, high)
    if options.share_concat:
        for node in reversed(graph.nodes):  # from the last to the first, so that nested concatenations share one range
            if node.op_type == "Concat" and node.name in placement.nodes and node.output[0] in found:
                for name in node.input:
                    if name in found and len(graph.consumers(name)) == 1 and not graph.is_output(name):
                        maker = graph.producer(name)
                        if maker is not None and maker.name in placement.nodes:
                            found[name] = found[node.output[0]]
    return found


def binding_path(cache: Path) -> Path:
    """Where the digests of a cache are kept."""
    return cache.with_name(cache.stem + ".binding.json")


def _binding(graph: Graph, found: Mapping[str, tuple[float, float]], ranges: Any, model_digest: str) -> dict[str, Any]:
    return {
        "schema_version": _SCHEMA,
        "model_digest": model_digest,
        "graph_digest": graph.digest,
        "ranges_digest": digest_json({name: list(pair) for name, pair in found.items()}),
        "ranges_method": str(getattr(ranges, "method", "given")),
        "set_digest": str(getattr(ranges, "set_digest", "") or ""),
    }


def check_cache(cache: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a cache that belongs to something else.

    Args:
        cache: The cache file.
        expected: The binding that it must have.

    Raises:
        StaleArtifactError: The binding is missing, differs, or the cache was changed after it was written.
    """
    remedy = "remove the folder (or use --force), so that the ranges are written anew"
    beside = binding_path(cache)
    if not beside.is_file():
        raise StaleArtifactError(
            "this calibration cache does not say which model and data it belongs to", where=str(cache), remedy=remedy
        )
    stored = read_json(beside)
    for key, title in (
        ("model_digest", "another network"),
        ("graph_digest", "a network that was prepared in another way"),
        ("set_digest", "another calibration set"),
        ("ranges_method", "ranges found by another method"),
        ("ranges_digest", "other ranges"),
    ):
        if stored.get(key) != expected.get(key):
            raise StaleArtifactError(
                f"this calibration cache belongs to {title} ({key} differs)", where=str(cache), remedy=remedy
            )
    if stored.get("cache_sha256") != digest_file(cache):
        raise StaleArtifactError(
            "this calibration cache was changed after it was written", where=str(cache), remedy=remedy
        )


def write_cache(
    cache: Path,
    graph: Graph,
    found: Mapping[str, tuple[float, float]],
    ranges: Any,
    model_digest: str,
) -> dict[str, Any]:
    """Write the cache that ``quantize_static`` reads, and its binding; a cache that is there already must be the same one.

    Args:
        cache: Where to write it.
        graph: The graph to be quantized.
        found: Ranges by tensor name, from :func:`tensor_ranges`.
        ranges: The ranges as they were given (their ``method`` and ``set_digest`` go into the binding).
        model_digest: Digest of the user's model.

    Returns:
        The binding.

    Raises:
        StaleArtifactError: A cache of another model, set or method stands there.
    """
    binding = _binding(graph, found, ranges, model_digest)
    if cache.exists():
        check_cache(cache, binding)
    data = TensorsData(
        CalibrationMethod.MinMax,
        {
            name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
            for name, (low, high) in _ordered(found.items())
        },
    )
    with atomic_path(cache) as temporary:
        save_tensors_data(data, temporary)
    binding["cache_sha256"] = digest_file(cache)
    write_json(binding_path(cache), binding)
    return binding


def _ordered(items: Iterable[tuple[str, tuple[float, float]]]) -> list[tuple[str, tuple[float, float]]]:
    return sorted(items)
