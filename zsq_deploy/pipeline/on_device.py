"""Engines on devices: choose what a device can run, send it there, take the result into the report."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zsq_deploy.artifact import OutputFolder, digest_file
from zsq_deploy.backends import TARGETS, Target, get_target
from zsq_deploy.device import agent
from zsq_deploy.device.address import Device
from zsq_deploy.device.bundle import open_bundle
from zsq_deploy.device.result import LIMIT, Probe, Result, parse_result
from zsq_deploy.device.session import visit
from zsq_deploy.device.work import Job, Measure
from zsq_deploy.errors import InterruptedRunError, StaleArtifactError, UsageError, ZsqError
from zsq_deploy.pipeline.bundling import bundle_target
from zsq_deploy.pipeline.deploy import write_report
from zsq_deploy.pipeline.stages import open_engine, recipe_in
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.report.schema import Report, parse
from zsq_deploy.report.schema import load as load_report

__all__ = ["BY_HAND", "Benched", "bench_on_devices", "lacks", "probe_device", "section_of", "take_result"]

BY_HAND = "by hand"
"""The address of a device that nobody connected to."""


@dataclass
class Benched:
    """What came of a tour.

    Attributes:
        results: By target, by device.
        skipped: (device, target, why).
        failures: What went wrong, by device; the results of others stand.
        report: The report with the results in it; ``None`` if there is none.
    """

    results: dict[str, dict[str, Result]] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    failures: dict[str, ZsqError] = field(default_factory=dict)
    report: Report | None = None

    @property
    def exit_code(self) -> int:
        """2: a device could not be measured; 1: an engine does not agree with its reference; 0: fine."""
        if self.failures or not self.results:
            return 2
        return 0 if all(one.verdict.passed for row in self.results.values() for one in row.values()) else 1


def lacks(target: Target, probe: Probe) -> list[str]:
    """What a device is missing to run engines of a target; empty: it can."""
    if target.runtime not in agent.RUNTIMES:
        return [f"the agent cannot run {target.runtime}: take the target's folder of scripts to the device"]
    runtime = probe.runtimes.get(target.runtime)
    if runtime is None or runtime.version is None:
        return [f"{target.runtime} is not installed" + (f" ({runtime.missing})" if runtime and runtime.missing else "")]
    have = set(probe.device.cpu.features)
    missing = [f"CPU feature {want}" for want in target.requires if not have.intersection(want.split("|"))]
    place = target.session.get("device", "CPU")
    if target.runtime == "openvino" and not any(one.split(".")[0] == place for one in runtime.devices):
        missing.append(f"OpenVINO finds no {place}")
    return missing


def probe_device(
    device: Device,
    *,
    accept_new: bool = False,
    passwords: dict[str, str] | None = None,
    progress: Progress = SILENT,
) -> Probe:
    """Look at a device: connect, run the agent's probe, clean up.

    Raises:
        DeviceError: It cannot be reached, or the agent cannot run there.
    """

    async def look() -> Probe:
        async with visit(device, accept_new=accept_new, passwords=passwords, progress=progress) as session:
            return await session.probe()

    return asyncio.run(look())


def bench_on_devices(
    folder: Path,
    devices: Sequence[Device],
    *,
    targets: Sequence[str] | None = None,
    bundles: Sequence[Path] = (),
    samples: int = 32,
    measure: Measure | None = None,
    accept_new: bool = False,
    progress: Progress = SILENT,
) -> Benched:
    """Prove and measure the engines of an output folder on devices, one after the other, and write the results into its report.

    A device that cannot be reached does not keep the others from being measured; its error is in `failures`. Every result is written as soon as it is
    there, and nothing else is: an interrupted tour leaves the report as the last whole result made it.

    Args:
        folder: Output folder of ``zsq deploy`` or ``zsq verify`` (it holds a report).
        devices: The devices; names must differ.
        targets: Only these, on every device, also where the device lacks a feature that the target asks for; ``None``: on each device those that
            it can run.
        bundles: Bundles that were made before; others are made here.
        samples: Inputs of the bundles that are made.
        measure: What the agent is told; a device's own threads and cores go before.
        accept_new: Take the host keys of devices that are not known.
        progress: Where to report.

    Raises:
        ZsqError: The folder holds no report or engine, or a bundle is not of its engines.
    """
    twice = sorted({one.name for one in devices if sum(other.name == one.name for other in devices) > 1})
    if twice:
        raise UsageError(f"the device {twice[0]} is named twice", where="--device", remedy="name each device once")
    done = Benched()
    with OutputFolder.reopen(folder), tempfile.TemporaryDirectory(prefix="zsq-bundles-") as temporary:
        store = _Bundles(folder, Path(temporary), samples, progress)
        _ = load_reported(folder)
        for bundle in bundles:
            store.take(bundle)
        names = list(targets or recipe_in(folder).targets)
        for name in targets or ():
            open_engine(folder, name)
        for device in devices:
            try:
                _tour(folder, device, names, bool(targets), store, measure or Measure(), accept_new, progress, done)
            except InterruptedRunError:
                raise
            except ZsqError as error:
                done.failures[device.name] = error
    return done


def _tour(
    folder: Path,
    device: Device,
    names: Sequence[str],
    insist: bool,
    store: _Bundles,
    measure: Measure,
    accept_new: bool,
    progress: Progress,
    done: Benched,
) -> None:
    """One device: look at it, make the bundles that it can run, and measure them."""
    passwords: dict[str, str] = {}  # typed once for both visits
    probe = probe_device(device, accept_new=accept_new, passwords=passwords, progress=progress)
    jobs = []
    for name in names:
        missing = lacks(get_target(name), probe)
        installed = probe.runtimes.get(get_target(name).runtime)
        if missing and (not insist or installed is None or installed.version is None):
            done.skipped.append((device.name, name, "; ".join(missing)))
            continue
        jobs.append((store.job(name), missing))
    if not jobs:
        raise UsageError(
            f"{device.name} can run none of the engines ({', '.join(names)})",
            where=device.address,
            remedy=f"zsq doctor --device {device.name} shows what it can run; build such an engine with zsq deploy --target",
        )
    measure = replace(measure, threads=device.threads or measure.threads, affinity=device.affinity or measure.affinity)

    async def work() -> None:
        async with visit(device, accept_new=accept_new, passwords=passwords, progress=progress) as session:
            for job, missing in jobs:
                result = await session.run(job, measure)
                notes = [f"the device lacks what {job.target} is made for: {item}" for item in missing]
                done.report = merge(folder, job.target, device.name, section_of(result, device.address, notes))
                done.results.setdefault(job.target, {})[device.name] = result

    asyncio.run(work())


class _Bundles:
    """The bundles of a tour, each made once."""

    def __init__(self, folder: Path, temporary: Path, samples: int, progress: Progress) -> None:
        self._folder = folder
        self._temporary = temporary
        self._samples = samples
        self._progress = progress
        self._jobs: dict[str, Job] = {}

    def take(self, bundle: Path) -> None:
        """Use a bundle that is there."""
        job = checked_bundle(self._folder, bundle)
        self._jobs[job.target] = job

    def job(self, target: str) -> Job:
        """The bundle of a target."""
        if target not in self._jobs:
            made = bundle_target(
                self._folder / target,
                self._temporary / f"{target}.zsq.tar",
                samples=self._samples,
                progress=self._progress,
            )
            self.take(made)
        return self._jobs[target]


def checked_bundle(folder: Path, bundle: Path) -> Job:
    """A bundle, whole and of the engine that the folder holds.

    Raises:
        ZsqError: It is no bundle, or was changed.
        StaleArtifactError: Its engine is another one than that of the folder.
    """
    if not bundle.is_file():
        raise UsageError("there is no such bundle", where=str(bundle), remedy="make it with zsq bundle")
    with tempfile.TemporaryDirectory(prefix="zsq-open-") as temporary:
        manifest = open_bundle(bundle, Path(temporary))
        sealed = digest_file(Path(temporary) / agent.MANIFEST)
    target = str(manifest["target"])
    engine = open_engine(folder, target)
    for file in (engine.path, engine.weights_path):
        if file is not None and manifest["files"].get(f"engine/{file.name}", {}).get("sha256") != digest_file(file):
            raise StaleArtifactError(
                f"the bundle holds another engine for {target} than this folder",
                where=str(bundle),
                remedy="make it again with zsq bundle, or name the folder that it was made of",
            )
    return Job(bundle, target, sealed)


def take_result(folder: Path, file: Path, bundle: Path, name: str) -> Benched:
    """Write a result that somebody brought from a device into the report (``zsq bench OUT --result FILE --bundle FILE``).

    Raises:
        ZsqError: The result is not whole, not of this bundle, or the bundle not of this folder.
    """
    with OutputFolder.reopen(folder):
        load_reported(folder)
        job = checked_bundle(folder, bundle)
        try:
            with file.open("rb") as source:
                data = source.read(LIMIT + 1)
        except FileNotFoundError as error:
            raise UsageError(
                "there is no such result", where=str(file), remedy="copy result.json from the device"
            ) from error
        result = parse_result(data, manifest_sha256=job.manifest_sha256, target=job.target, where=str(file))
        report = merge(folder, job.target, name, section_of(result, BY_HAND))
    return Benched({job.target: {name: result}}, report=report)


def load_reported(folder: Path) -> Report:
    """The report that results are written into.

    Raises:
        ZsqError: There is none.
    """
    file = folder / "report.json"
    if not file.is_file():
        raise ZsqError(
            "the folder holds no report that results of devices could be written into",
            where=str(folder),
            remedy="measure the engines here first: zsq verify",
        )
    return load_report(file)


def merge(folder: Path, target: str, device: str, section: Mapping[str, Any]) -> Report:
    """Write ``targets.<target>.devices.<device>`` of the report, and the page anew; an earlier result of the device gives way.

    Raises:
        StaleArtifactError: The report is about another engine.
    """
    value = load_reported(folder).to_json()
    place = value["targets"].get(target)
    engine = open_engine(folder, target)
    if place is None or (place["engine"]["sha256"] and place["engine"]["sha256"] != digest_file(engine.path)):
        raise StaleArtifactError(
            f"the report does not speak of this engine for {target}",
            where=str(folder / "report.json"),
            remedy="measure the engine here first: zsq verify",
        )
    place["devices"][device] = dict(section)
    report = parse(value, where=str(folder / "report.json"))
    write_report(report, folder)
    return report


def section_of(result: Result, address: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """A result as ``targets.<T>.devices.<D>`` of the report."""
    machine, thermal = result.device, result.thermal
    system = f"{machine.system} {machine.kernel}".strip()
    versions = (
        []
        if result.runtime.version == result.runtime.built_with
        else [
            f"{result.runtime.name} {result.runtime.version} ran an engine that was built and verified with {result.runtime.built_with}"
        ]
    )
    return {
        "address": address,
        "measured": result.started,
        "seconds": result.seconds,
        "machine": machine.machine,
        "system": system,
        "cpu": machine.cpu.model,
        "features": machine.cpu.features,
        "cores": machine.cpu.cores,
        "affinity": machine.affinity,
        "memory_bytes": machine.memory_bytes,
        "emulated": machine.emulated,
        "python": machine.python,
        "numpy": machine.numpy,
        "runtime": result.runtime.name,
        "runtime_version": result.runtime.version,
        "built_with": result.runtime.built_with,
        "bundle_sha256": result.bundle_sha256,
        "engine_bytes": result.engine_bytes,
        "parity": {kind: numbers.model_dump() for kind, numbers in result.parity.items()},
        "latency": result.latency.model_dump(),
        "throughput": result.throughput.model_dump() if result.throughput else None,
        "peak_rss_bytes": result.memory.peak_bytes,
        "added_rss_bytes": result.memory.added_by_loading_bytes,
        "before": thermal.before.model_dump(),
        "after": thermal.after.model_dump(),
        "drift": thermal.drift,
        "throttled": thermal.throttled,
        "throttled_why": thermal.why,
        "passed": result.verdict.passed,
        "failed": result.verdict.failed,
        "notes": [*result.notes, *versions, *notes],
    }


def runnable(probe: Probe) -> dict[str, list[str]]:
    """Every target, and what the device lacks for it."""
    return {name: lacks(target, probe) for name, target in TARGETS.items()}
