"""What the report says of an engine on a device: written by the bundle's agent there, merged here.

Keys have the names and meanings that they have for the workstation, so that the two can stand side by side.
"""

from __future__ import annotations

from pydantic import Field

from zsq_deploy.report.base import Amount, Count, Number, Section, Share

__all__ = ["ClockNumbers", "DeviceLatency", "DeviceParity", "DeviceSection", "ThroughputNumbers"]


class DeviceParity(Section):
    """The engine's outputs on the device against those of one reference, on the inputs of the bundle."""

    images: Count = Field(description="Number of samples compared.")
    elements: Count = Field(description="Number of output elements compared.")
    equal_share: Share = Field(description="Share of elements that are equal bit for bit.")
    within_half_lsb: Share = Field(description="Share of elements within half an LSB.")
    within_1_lsb: Share = Field(description="Share of elements within 1 LSB.")
    within_2_lsb: Share = Field(description="Share of elements within 2 LSB.")
    max_lsb: Amount = Field(description="Largest difference in LSB.")
    mean_lsb: Amount = Field(description="Mean absolute difference in LSB.")
    sqnr_db: Number = Field(description="Signal to noise ratio; 320 where nothing differs.")
    non_finite: Count = Field(description="Elements that are NaN or infinite on one side only.")
    top1_agreement: Share | None = Field(None, description="Share of samples with the same largest class.")


class DeviceLatency(Section):
    """Times of single runs on the device, after warm-up, in one process."""

    median_ms: Amount = Field(description="Median.")
    p90_ms: Amount = Field(description="90th percentile.")
    p95_ms: Amount = Field(description="95th percentile.")
    p99_ms: Amount = Field(description="99th percentile.")
    iqr_ms: Amount | None = Field(
        None,
        description="Spread: 75th minus 25th percentile; the middle half of the runs lies within it. `null` of bundles made before it was measured.",
    )
    mean_ms: Amount = Field(description="Mean.")
    min_ms: Amount = Field(description="Fastest run.")
    first_ms: Amount = Field(description="First run after loading.")
    load_ms: Amount = Field(description="Loading the model.")
    runs: Count = Field(description="Number of timed runs.")
    threads: Count = Field(description="Threads.")
    batch: Count = Field(description="Samples in one run.")


class ThroughputNumbers(Section):
    """Several engines at the same time, each in a thread of its own."""

    streams: Count = Field(description="How many.")
    seconds: Amount = Field(description="For how long.")
    samples_per_second: Amount = Field(description="Samples of all of them in a second.")


class ClockNumbers(Section):
    """Clock and temperatures at one moment."""

    mhz: Amount | None = Field(None, description="Clock of the fastest core; `null` where the system does not tell.")
    governor: str | None = Field(None, description="The governor of the clock.")
    celsius: dict[str, Number] = Field(default_factory=dict, description="Temperatures by sensor.")


class DeviceSection(Section):
    """The engine on one device."""

    address: str = Field(description="Where it is: `local`, `ssh://...`, or `by hand`.")
    measured: str = Field(description="When, UTC, by the device's own clock.")
    seconds: Amount = Field(description="How long the agent worked.")
    machine: str = Field(description="Architecture, `aarch64`.")
    system: str = Field(description="Operating system and kernel.")
    cpu: str = Field(description="Model of the processor or board.")
    features: list[str] = Field(default_factory=list, description="Its features that integer kernels look at.")
    cores: Count | None = Field(None, description="Number of cores.")
    affinity: list[int] | None = Field(None, description="Cores that the agent could run on.")
    memory_bytes: Count | None = Field(None, description="Memory of the device.")
    emulated: bool = Field(
        False, description="The processor is emulated: parity is real, times and memory say nothing."
    )
    python: str = Field(description="Version of Python there.")
    numpy: str | None = Field(None, description="Version of numpy there.")
    runtime: str = Field(description="Runtime.")
    runtime_version: str = Field(description="Its version there.")
    built_with: str = Field(description="Its version on the workstation.")
    bundle_sha256: str = Field(description="Digest of the manifest of the bundle that ran.")
    engine_bytes: Count = Field(description="Size of the engine.")
    parity: dict[str, DeviceParity] = Field(
        description="By reference: `twin`, `integer` (exact integer arithmetic by the rules of the target's processor), `workstation` (the same engine there)."
    )
    latency: DeviceLatency = Field(description="Times.")
    throughput: ThroughputNumbers | None = Field(None, description="Throughput; `null` if it was not asked for.")
    peak_rss_bytes: Count | None = Field(None, description="Largest resident memory of the agent's process.")
    added_rss_bytes: int | None = Field(None, description="By how much loading and the first run raised it.")
    before: ClockNumbers = Field(description="Before the timed runs.")
    after: ClockNumbers = Field(description="After them.")
    drift: Amount = Field(description="Median of the last tenth of the runs / median of the first tenth.")
    throttled: bool | None = Field(None, description="The device slowed down while it was measured.")
    throttled_why: str = Field("", description="How that shows.")
    passed: bool = Field(description="The engine agrees with its reference as much as the bundle demands.")
    failed: list[str] = Field(default_factory=list, description="What of that does not hold.")
    notes: list[str] = Field(default_factory=list, description="What a reader should know, one sentence each.")
