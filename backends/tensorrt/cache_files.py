"""Calibration caches as files: written atomically, and bound to the network and the images that they belong to.

A cache says neither which network nor which images it is of, and TensorRT takes any. So every cache that is written here gets a second
file beside it, ``<name>.binding.json``, with the digests of the network, of the calibration set and of the cache itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zsq_deploy.artifact import atomic_writer, digest_file, read_json, write_json
from zsq_deploy.backends.tensorrt.cache_format import CalibrationCache
from zsq_deploy.errors import CalibrationError, StaleArtifactError, UsageError

__all__ = ["CacheBinding", "binding_path", "check_binding", "read_cache", "write_binding", "write_cache"]

_SCHEMA = 1


@dataclass(frozen=True)
class CacheBinding:
    """What a cache belongs to.

    Attributes:
        model_digest: Digest of the network.
        set_digest: Digest of the calibration set; empty for ranges without images.
        method: How the ranges were found (``minmax``, ``tensorrt-entropy-2``, ...).
        source: Who computed the scales: ``zsq``, or ``TensorRT 10.3.0``.
    """

    model_digest: str
    set_digest: str
    method: str
    source: str = "zsq"

    def __post_init__(self) -> None:
        if not self.model_digest:
            raise UsageError(
                "a calibration cache has to be bound to a network, and its digest is empty",
                where="CacheBinding",
                remedy="give the digest of the model",
            )


def binding_path(cache: Path) -> Path:
    """Where the digests of a cache are kept: ``<name>.binding.json`` beside it."""
    return cache.with_name(cache.name + ".binding.json")


def write_binding(cache: Path, binding: CacheBinding) -> None:
    """Say what the cache in a file belongs to."""
    write_json(
        binding_path(cache),
        {
            "schema_version": _SCHEMA,
            "model_digest": binding.model_digest,
            "set_digest": binding.set_digest,
            "method": binding.method,
            "source": binding.source,
            "cache_sha256": digest_file(cache),
        },
    )


def check_binding(cache: Path, *, model_digest: str, set_digest: str | None = None) -> CacheBinding:
    """Refuse a cache that belongs to something else.

    Args:
        cache: The cache file.
        model_digest: The network that it is wanted for.
        set_digest: The calibration set that it must come from; ``None`` accepts any.

    Returns:
        What the cache belongs to.

    Raises:
        StaleArtifactError: There is no binding, it names another network or set, or the cache was changed after it was written.
    """
    remedy = "remove the cache and its binding, so that it is made anew"
    beside = binding_path(cache)
    if not beside.is_file():
        raise StaleArtifactError(
            "this calibration cache does not say which network and images it belongs to",
            where=str(cache),
            remedy=f"{remedy}; a cache that you trust can be bound with zsq_deploy.backends.tensorrt.cache.write_binding",
        )
    stored = read_json(beside)
    if not isinstance(stored, dict) or stored.get("schema_version") != _SCHEMA:
        raise StaleArtifactError(
            "the binding of this calibration cache is damaged or of another version", where=str(beside), remedy=remedy
        )
    for key, wanted, what in (
        ("model_digest", model_digest, "network"),
        ("set_digest", set_digest, "calibration set"),
    ):
        if wanted is not None and stored.get(key) != wanted:
            raise StaleArtifactError(
                f"this calibration cache belongs to another {what}: {str(stored.get(key))[:12]}, wanted is {wanted[:12]}",
                where=str(cache),
                remedy=remedy,
            )
    if stored.get("cache_sha256") != digest_file(cache):
        raise StaleArtifactError(
            "this calibration cache was changed after it was written", where=str(cache), remedy=remedy
        )
    return CacheBinding(
        str(stored["model_digest"]),
        str(stored.get("set_digest", "")),
        str(stored.get("method", "")),
        str(stored.get("source", "")),
    )


def write_cache(path: Path, cache: CalibrationCache | bytes, binding: CacheBinding) -> None:
    """Write a cache and its binding, each atomically; a reader between the two writes finds that they do not fit.

    Args:
        path: The cache file.
        cache: The cache, or the bytes that TensorRT handed over.
        binding: What it belongs to.
    """
    data = cache if isinstance(cache, bytes) else cache.to_bytes()
    with atomic_writer(Path(path)) as file:
        file.write(data)
    write_binding(Path(path), binding)


def read_cache(path: Path, *, zeros: bool = False) -> CalibrationCache:
    """Read a cache from a file, whoever made it; see :meth:`CalibrationCache.parse` for what is refused.

    Raises:
        CalibrationError: There is no such file, or it is no usable cache.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError("there is no such calibration cache", where=str(path), remedy="check the path")
    return CalibrationCache.parse(path.read_bytes(), where=str(path), zeros=zeros)
