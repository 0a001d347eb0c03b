"""The manifest of a calibration set: what the set is and where it comes from."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import pydantic

from zsq_deploy.artifact import digest_json, read_json
from zsq_deploy.errors import CalibrationError, StaleArtifactError, ZsqError
from zsq_deploy.model.graph import TensorSpec

__all__ = [
    "MANIFEST",
    "MARKER",
    "REMAKE",
    "CalibrationManifest",
    "InputStatistics",
    "ModelLike",
    "ShardRecord",
    "library_versions",
    "preprocess_fields",
    "read_manifest",
    "sealed",
]

MANIFEST = "manifest.json"
"""File of the manifest in a set's folder."""

MARKER = "unfinished.json"
"""File that a folder holds while a set is written into it."""

REMAKE = "make the set again with `zsq synth`"


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class InputStatistics(_Strict):
    """Mean, standard deviation, smallest and largest value per channel (axis 1 of inputs with spatial axes, else one channel)."""

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]


class ShardRecord(_Strict):
    """One file of a set on disk: its name, how many images it holds, and its SHA-256."""

    file: str
    images: int = pydantic.Field(gt=0)
    sha256: str = pydantic.Field(pattern=r"^[0-9a-f]{64}$")

    @pydantic.field_validator("file")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value != Path(value).name or value in ("", ".", ".."):
            raise ValueError("a shard is a plain file name inside the set's folder")
        return value


class CalibrationManifest(_Strict):
    """What a calibration set is and how it was made.

    The fields from `images` to `digest` are filled in by :class:`CalibrationWriter` and :meth:`CalibrationSet.from_arrays`;
    whoever makes a set gives the ones above (see :meth:`of`).

    Attributes:
        schema_version: Version of this format.
        model_digest: Digest of the network's graph; empty for a set that belongs to no network in particular.
        model_name: The network's short name.
        method: How the images were made, ``zeroq``, ``fractal``, ``real``.
        parameters: Every parameter of the method with its resolved value.
        seed: Seed of everything random.
        preprocess: How pixels become network inputs (``mean``, ``std``, ``raw_pixels``), as far as it was known.
        device: Where it was computed, ``cpu`` or ``cuda``.
        seconds: Wall time of making it.
        peak_rss_bytes: Largest resident memory of the process that made it, and of its workers together.
        peak_gpu_bytes: Most memory that torch held on one GPU; ``None`` on a CPU.
        versions: Versions of what computed it.
        notes: What a user should know (fall-backs, warnings), one sentence each.
        images: Number of images.
        inputs: Shape of one sample per input name, without the batch axis.
        dtypes: numpy type name per input name.
        statistics: Image statistics per input name.
        digest: SHA-256 over the content.
        shards: The files; empty in memory.
    """

    schema_version: Literal[1] = 1
    model_digest: str = ""
    model_name: str = ""
    method: str
    parameters: dict[str, Any] = pydantic.Field(default_factory=dict)
    seed: int = 0
    preprocess: dict[str, Any] = pydantic.Field(default_factory=dict)
    device: str = "cpu"
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int | None = None
    versions: dict[str, str] = pydantic.Field(default_factory=lambda: library_versions())
    notes: list[str] = pydantic.Field(default_factory=list)
    images: int = 0
    inputs: dict[str, list[int]] = pydantic.Field(default_factory=dict)
    dtypes: dict[str, str] = pydantic.Field(default_factory=dict)
    statistics: dict[str, InputStatistics] = pydantic.Field(default_factory=dict)
    digest: str = ""
    shards: list[ShardRecord] = pydantic.Field(default_factory=list)

    @classmethod
    def of(cls, model: ModelLike, *, method: str, **fields: Any) -> CalibrationManifest:
        """The manifest of a set that is made for `model`, its digest, name and preprocessing filled in."""
        return cls(
            model_digest=model.digest,
            model_name=model.name,
            preprocess=preprocess_fields(model.preprocess),
            method=method,
            **fields,
        )


class ModelLike(Protocol):
    """What this module needs of a :class:`zsq_deploy.model.Model`."""

    @property
    def name(self) -> str:
        """Short name."""

    @property
    def digest(self) -> str:
        """SHA-256 of what it computes."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Its inputs."""

    @property
    def preprocess(self) -> Any:
        """How images become its input."""


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a set depends on."""
    found = {"python": platform.python_version()}
    for name in ("zsq-deploy", "numpy", "torch", "onnx"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def preprocess_fields(preprocess: Any) -> dict[str, Any]:
    """The preprocessing as JSON values; empty when nothing is known about it."""
    mean, std = getattr(preprocess, "mean", None), getattr(preprocess, "std", None)
    raw = bool(getattr(preprocess, "raw_pixels", False))
    if mean is None and std is None and not raw:
        return {}
    return {
        "mean": None if mean is None else [float(value) for value in mean],
        "std": None if std is None else [float(value) for value in std],
        "raw_pixels": raw,
    }


def sealed(fields: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's fields, itself left out."""
    return digest_json({key: value for key, value in fields.items() if key != "manifest_sha256"})


def read_manifest(path: Path) -> CalibrationManifest:
    """Read and check a manifest.

    Raises:
        CalibrationError: It is missing, damaged or of another format.
        StaleArtifactError: It was changed after the set was made.
    """
    try:
        found = read_json(path)
    except ZsqError as error:
        raise CalibrationError(error.what, where=error.where, remedy=REMAKE) from error
    if not isinstance(found, dict):
        raise CalibrationError("the manifest is not a JSON object", where=str(path), remedy=REMAKE)
    seal = found.pop("manifest_sha256", None)
    version = found.get("schema_version")
    if version != 1:
        raise CalibrationError(
            f"the manifest has the format version {version!r}; this program reads version 1",
            where=str(path),
            remedy="use the version of zsq-deploy that made the set, or make it again with `zsq synth`",
        )
    try:
        manifest = CalibrationManifest.model_validate(found)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CalibrationError(
            f"the manifest is not one of a calibration set: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(path),
            remedy=REMAKE,
        ) from error
    if seal != sealed(found):
        raise StaleArtifactError(
            "the manifest was changed after the set was made (its SHA-256 does not fit)",
            where=str(path),
            remedy=REMAKE,
        )
    if not manifest.shards or sum(shard.images for shard in manifest.shards) != manifest.images:
        raise CalibrationError(
            f"the manifest speaks of {manifest.images} images, its shards of {sum(s.images for s in manifest.shards)}",
            where=str(path),
            remedy=REMAKE,
        )
    return manifest
