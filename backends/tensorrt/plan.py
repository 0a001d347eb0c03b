"""Engine files ("plans") and what is written beside them: of which network, for which GPU and which TensorRT, with which settings.

A plan runs on the GPU model and the version of TensorRT that built it and nowhere else, and the file does not say so in words: TensorRT
answers with an error deep inside, or with nothing. So every plan that is built here has ``<name>.plan.json`` beside it, and
:func:`check_plan` holds it against the machine before TensorRT sees the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsq_deploy.artifact import digest_file, read_json, write_json
from zsq_deploy.backends.tensorrt.cuda import Gpu
from zsq_deploy.errors import EngineError, StaleArtifactError, UsageError

__all__ = ["FLOATS", "PlanRecord", "PlanSettings", "check_plan", "layers_path", "log_path", "read_plan", "record_path"]

FLOATS = ("float32", "tf32", "float16", "bfloat16")
"""What layers without 8 bits may compute in: exactly float32, or what the GPU has for it beside."""

_MODES = ("explicit", "implicit", "float")
_SCHEMA = 1
_AGAIN = "build it here: remove this file and the .json beside it, and run zsq verify or zsq deploy again"


@dataclass(frozen=True)
class PlanSettings:
    """How an engine is built.

    Attributes:
        mode: ``explicit``: a Q/DQ graph. ``implicit``: a float network with a calibration cache (TensorRT 8 and 10). ``float``: no 8 bits.
        floats: One of :data:`FLOATS`. Of an explicit engine only ``float32`` and ``tf32``, unless types are weak (TensorRT 8 and 10).
        batch: The largest batch of a network with an open batch, and the one that kernels are chosen for; smaller ones run too.
        workspace_mib: Most device memory for the scratch of one layer; ``None``: TensorRT's own limit, all of the device.
        effort: TensorRT's builder optimization level, 0 to 5 (8.6 and later); ``None``: its default.
    """

    mode: str = "explicit"
    floats: str = "float32"
    batch: int = 1
    workspace_mib: int | None = None
    effort: int | None = None

    def __post_init__(self) -> None:
        for value, allowed, where in (
            (self.mode, _MODES, "PlanSettings.mode"),
            (self.floats, FLOATS, "PlanSettings.floats"),
            (self.effort, (None, *range(6)), "PlanSettings.effort"),
        ):
            if value not in allowed:
                raise UsageError(
                    f"TensorRT builds no engine with {value!r}",
                    where=where,
                    remedy=f"choose one of {', '.join(str(item) for item in allowed)}",
                )
        for number, where in ((self.batch, "PlanSettings.batch"), (self.workspace_mib, "PlanSettings.workspace_mib")):
            if number is not None and number < 1:
                raise UsageError(f"{number} is too small", where=where, remedy="give 1 or more")

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class PlanRecord:
    """What stands beside a plan.

    Attributes:
        network: Name of the ONNX file that it was built from, in the same folder.
        network_sha256: Its digest.
        cache_sha256: Digest of the calibration cache, for an implicit engine.
        settings: As of :class:`PlanSettings`.
        tensorrt: Version of TensorRT.
        gpu: Name of the GPU.
        capability: Its compute capability, ``8.7``.
        cuda: Version of the CUDA runtime, for the record.
        plan_sha256: Digest of the plan.
        bytes: Its size.
        seconds: What building took.
        layers: Layers of the engine.
        warnings: What TensorRT warned of while it built, each once.
    """

    network: str
    network_sha256: str
    settings: Mapping[str, Any]
    tensorrt: str
    gpu: str
    capability: str
    cuda: str
    plan_sha256: str
    bytes: int
    seconds: float
    cache_sha256: str = ""
    layers: int = 0
    warnings: tuple[str, ...] = field(default=())

    def write(self, plan: Path) -> None:
        """Write it beside a plan."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        write_json(
            record_path(plan),
            {**fields, "schema_version": _SCHEMA, "settings": dict(self.settings), "warnings": list(self.warnings)},
        )


def record_path(plan: Path) -> Path:
    """The file beside a plan that says what it is: ``engine.plan.json``."""
    return plan.with_name(f"{plan.name}.json")


def layers_path(plan: Path) -> Path:
    """The file beside a plan with what TensorRT's inspector says of its layers: ``engine.layers.json``."""
    return plan.with_name(f"{plan.stem}.layers.json")


def log_path(plan: Path) -> Path:
    """The file beside a plan with what TensorRT said while it built: ``engine.build.log``."""
    return plan.with_name(f"{plan.stem}.build.log")


def read_plan(plan: Path) -> PlanRecord:
    """What stands beside a plan.

    Raises:
        EngineError: The plan or its record is missing or is not what this program writes.
    """
    if not plan.is_file():
        raise EngineError("there is no such engine", where=str(plan), remedy="build it with zsq deploy or zsq verify")
    place = record_path(plan)
    if not place.is_file():
        raise EngineError(
            "this engine does not say for which GPU and which TensorRT it was built: it was not built by zsq",
            where=str(plan),
            remedy="name the Q/DQ graph instead; a plan of trtexec is timed with trtexec --loadEngine",
        )
    found = read_json(place)
    try:
        values = {name: found[name] for name in PlanRecord.__dataclass_fields__ if name not in ("settings", "warnings")}
        record = PlanRecord(
            **values, settings=dict(found["settings"]), warnings=tuple(str(item) for item in found["warnings"])
        )
        PlanSettings(**record.settings)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise EngineError(
            f"what stands beside this engine cannot be understood ({error})", where=str(place), remedy=_AGAIN
        ) from error
    return record


def check_plan(plan: Path, *, version: str, gpu: Gpu, network: Path | None = None) -> PlanRecord:
    """Read what stands beside a plan, and hold it against this machine and against the network.

    Args:
        plan: The plan.
        version: The version of the TensorRT that is to run it.
        gpu: The GPU that is to run it.
        network: The ONNX file that it must have been built from; ``None``: any.

    Raises:
        EngineError: The plan or its record is missing or damaged.
        StaleArtifactError: It was built for another GPU, by another TensorRT or from another network, or was changed.
    """
    record = read_plan(plan)
    here = f"{gpu.capability[0]}.{gpu.capability[1]}"
    problem, remedy = "", _AGAIN
    if record.tensorrt != version:
        problem = f"this engine was built by TensorRT {record.tensorrt}, and this is TensorRT {version}"
    elif (record.gpu, record.capability) != (gpu.name, here):
        problem = f"this engine was built for {record.gpu} (compute capability {record.capability}), and the GPU here is {gpu}"
    elif network is not None and (network.name, digest_file(network)) != (record.network, record.network_sha256):
        problem = f"this engine was built from another network than {network.name} is now"
    elif digest_file(plan) != record.plan_sha256:
        problem = "this engine is damaged, or was changed after it was built"
    if problem:
        raise StaleArtifactError(problem, where=str(plan), remedy=remedy)
    return record
