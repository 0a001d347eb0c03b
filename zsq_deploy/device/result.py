"""What comes back from a device, checked: a result is taken only if it is whole and belongs to the bundle that was sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from zsq_deploy.errors import DeviceError

__all__ = ["LIMIT", "Probe", "Result", "parse_probe", "parse_result"]

LIMIT = 8 << 20
"""Bytes that a result may have; a usual one has some thousands."""

_Share = Annotated[float, Field(ge=0, le=1)]
_Amount = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=0)]


def _clean(value: Any) -> Any:
    """Texts of a device without what could confuse a terminal, and of bounded length."""
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else " " for letter in value)[:600]
    if isinstance(value, dict):
        return {_clean(key): _clean(inner) for key, inner in list(value.items())[:1000]}
    if isinstance(value, list):
        return [_clean(inner) for inner in value[:10000]]
    return value


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)


class Cpu(_Part):
    """The processor."""

    model: str
    features: list[str] = []
    cores: _Count | None = None


class Machine(_Part):
    """The device, as its agent saw it."""

    machine: str
    system: str
    kernel: str = ""
    python: str
    numpy: str | None = None
    cpu: Cpu
    memory_bytes: _Count | None = None
    affinity: list[int] | None = None
    emulated: bool = False


class Runtime(_Part):
    """The runtime that ran."""

    name: str
    version: str
    built_with: str


class Parity(_Part):
    """The engine against one reference; keys as in the report's ``parity``."""

    images: _Count
    elements: _Count
    equal_share: _Share
    within_half_lsb: _Share
    within_1_lsb: _Share
    within_2_lsb: _Share
    max_lsb: _Amount
    mean_lsb: _Amount
    sqnr_db: float
    non_finite: _Count
    top1_agreement: _Share | None


class Latency(_Part):
    """Times; keys as in the report's ``latency``."""

    runs: _Count
    median_ms: _Amount
    p90_ms: _Amount
    p95_ms: _Amount
    p99_ms: _Amount
    iqr_ms: _Amount | None = None  # agents of earlier bundles do not tell it
    min_ms: _Amount
    mean_ms: _Amount
    first_ms: _Amount
    load_ms: _Amount
    threads: _Count
    batch: _Count


class Throughput(_Part):
    """Several engines at once."""

    streams: _Count
    seconds: _Amount
    samples_per_second: _Amount


class Memory(_Part):
    """Resident memory of the agent."""

    peak_bytes: _Count | None
    added_by_loading_bytes: int | None


class Clocks(_Part):
    """Clock, governor and temperatures at one moment."""

    mhz: _Amount | None
    governor: str | None = None
    celsius: dict[str, float] = {}


class Thermal(_Part):
    """Before and after the timed runs."""

    before: Clocks
    after: Clocks
    drift: _Amount
    throttled: bool | None
    why: str = ""


class Judgement(_Part):
    """Whether the engine does what it should."""

    passed: bool
    failed: list[str]


class Result(_Part):
    """``result.json`` of the agent."""

    format: Literal["zsq-result"]
    schema_version: Literal[1]
    network: str
    target: str
    bundle_sha256: str
    engine_bytes: _Count
    started: str
    device: Machine
    runtime: Runtime
    threads: _Count
    parity: dict[str, Parity]
    latency: Latency
    throughput: Throughput | None = None
    thermal: Thermal
    memory: Memory
    verdict: Judgement
    notes: list[str] = []
    seconds: _Amount


class Found(_Part):
    """One runtime, as a probe found it."""

    version: str | None
    missing: str = ""
    providers: list[str] = []
    devices: list[str] = []


class Probe(_Part):
    """What a device is and has."""

    agent: int
    device: Machine
    runtimes: dict[str, Found]
    clocks: Clocks


def parse_probe(value: Mapping[str, Any], *, where: str) -> Probe:
    """What ``agent.py --probe`` said.

    Raises:
        DeviceError: It is not what an agent says.
    """
    try:
        return Probe.model_validate(_clean(dict(value)))
    except pydantic.ValidationError as error:
        raise DeviceError(
            f"the device's answer is not that of an agent ({_first(error)})", where=where, remedy="try again"
        ) from error


def parse_result(data: bytes, *, manifest_sha256: str, target: str, where: str) -> Result:
    """A ``result.json`` that belongs to a bundle.

    Args:
        data: The file.
        manifest_sha256: Digest of the bundle's ``bundle.json``.
        target: The bundle's target.
        where: Whose result, for errors.

    Raises:
        DeviceError: It is not whole, no result, or one of another bundle.
    """
    remedy = "run the bundle's own agent again, and take the file as it is"
    if len(data) > LIMIT:
        raise DeviceError("the result is far too large for one", where=where, remedy=remedy)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        result = Result.model_validate(_clean(value))
    except pydantic.ValidationError as error:
        raise DeviceError(f"this is no result of an agent ({_first(error)})", where=where, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"the result is not whole ({error})", where=where, remedy=remedy) from error
    if result.bundle_sha256 != manifest_sha256 or result.target != target:
        raise DeviceError(
            f"the result belongs to another bundle: {result.target} of {result.network}, bundle {result.bundle_sha256[:16]}; "
            f"this one is {target}, bundle {manifest_sha256[:16]}",
            where=where,
            remedy="give the bundle that ran on the device, or run this one there",
        )
    return result


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number in JSON")


def _first(error: pydantic.ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc']) or 'the whole'}: {problem['msg']}"
