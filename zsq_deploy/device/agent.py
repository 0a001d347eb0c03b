#!/usr/bin/env python3
"""The agent of a bundle: one file that runs on a device and says whether the engine does there what it should, and how fast.

It needs Python 3.9 or newer, numpy and the bundle's runtime (onnxruntime or openvino), and nothing else; it imports nothing of zsq-deploy, opens no
network connection and writes one file. Run it where the bundle lies::

    python agent.py                          unpacked bundle, this file in it
    python agent.py --bundle net.zsq.tar     a bundle as it was made (it is unpacked into a folder of its own)
    python agent.py --probe                  what this device is, and which runtimes it has; nothing is measured

What happens: every file is compared with the digest that the bundle was made with; the engine is loaded and run on the bundle's inputs, and its
outputs are compared with those of the references (in units of the output's quantization step); latency, throughput and memory are measured, with
clocks and temperatures before and after; everything is written to ``result.json``.

Exit codes: 0 fine, 1 the engine does not agree with its reference, 2 wrong use, a changed bundle, or no runtime.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

Arrays = Mapping[str, Any]
"""Arrays by name; numpy is imported only once it is known to be there."""

Say = Callable[..., None]

AGENT = 1
"""Version of this file's output."""

MANIFEST = "bundle.json"
SEAL = "bundle.sha256"
SLACK = 4e-3  # of a step: two dequantized float32 values, one step apart, differ by a step give or take their rounding
LIMIT_DB = 320.0
GONE = 3
"""Exit code of an agent whose caller is gone (``--tether``)."""

SLOWER = 1.10  # the last tenth of the runs against the first: more than this is called throttling
COOLER = 0.90  # the clock after against the clock before


class RefusedError(Exception):
    """Something that the user has to mend."""


# ---------------------------------------------------------------------------------------------------------------------
# the bundle
# ---------------------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in blocks(file):
            found.update(block)
    return found.hexdigest()


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    """A file in pieces."""
    while True:
        block = file.read(1 << 20)
        if not block:
            return
        yield block


def header(name: str, size: int) -> tarfile.TarInfo:
    """The only tar header that a bundle has for a file of this name and size."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


def pack(folder: Path, names: Iterable[str], out: Any) -> None:
    """Write files of a folder as a tar archive whose every byte follows from names and contents."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            path = folder / name
            with path.open("rb") as file:
                archive.addfile(header(name, path.stat().st_size), file)


class Hashing(io.RawIOBase):
    """A file that keeps only the hash of what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Hash it."""
        self.hash.update(data)
        return len(data)


def safe(name: str) -> bool:
    """Whether a name of an archive stays inside the folder that it is unpacked to."""
    parts = name.split("/")
    return "\\" not in name and ":" not in name and all(part not in ("", ".", "..") for part in parts)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a bundle, and make sure that it is byte for byte the one that was made."""
    again = Hashing()
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            for member in members:
                source = tar.extractfile(member) if member.isfile() and safe(member.name) else None
                if source is None:
                    raise RefusedError(f"the bundle holds {member.name!r}, which is no plain file inside it: {archive}")
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as out:
                    for block in blocks(source):
                        out.write(block)
        pack(folder, [member.name for member in members], again)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise RefusedError(f"this is no bundle, or not a whole one ({error}): {archive}; copy it again") from error
    if again.hash.hexdigest() != sha256(archive):
        raise RefusedError(f"the bundle was changed after it was made: {archive}; copy it again")
    return folder


def read_bundle(folder: Path) -> dict[str, Any]:
    """The manifest of an unpacked bundle, once every file was found to be as it was."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        seal = (folder / SEAL).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"here is no bundle ({error}); give its folder or its .zsq.tar with --bundle") from error
    if hashlib.sha256(data).hexdigest() != seal:
        raise RefusedError(f"{path} was changed after the bundle was made; copy the bundle again")
    manifest: dict[str, Any] = json.loads(data.decode("utf-8"))
    if manifest.get("format") != "zsq-bundle" or manifest.get("schema_version") != 1:
        raise RefusedError(f"{path} is of another version; this agent reads version 1")
    for name, known in sorted(manifest["files"].items()):
        file = folder / name
        if not file.is_file():
            raise RefusedError(f"the bundle is not complete: {file} is missing; copy it again")
        if file.stat().st_size != known["bytes"] or sha256(file) != known["sha256"]:
            raise RefusedError(
                f"{file} was changed after the bundle was made (its SHA-256 does not fit); copy the bundle again"
            )
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# the runtimes
# ---------------------------------------------------------------------------------------------------------------------


class OnnxRuntime:
    """The engine in ONNX Runtime."""

    def __init__(self, path: Path, session: Mapping[str, str], threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        for key, value in session.items():
            options.add_session_config_entry(key, value)
        started = time.perf_counter()
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.outputs = [value.name for value in self.session.get_outputs()]

    @staticmethod
    def version() -> str:
        """Version of the runtime."""
        import onnxruntime as ort

        return str(ort.__version__)

    @staticmethod
    def facts() -> dict[str, Any]:
        """What else there is to know of it."""
        import onnxruntime as ort

        return {"providers": [str(name) for name in ort.get_available_providers()]}

    def run(self, feeds: Arrays) -> dict[str, Any]:
        """All outputs."""
        return dict(zip(self.outputs, self.session.run(None, dict(feeds))))  # noqa: B905 - Python 3.9


class OpenVino:
    """The engine in OpenVINO."""

    def __init__(self, path: Path, session: Mapping[str, str], threads: int) -> None:
        os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
        import openvino as ov

        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        device = session.get("device", "CPU")
        if device == "CPU":
            properties.update(INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1, ENABLE_CPU_PINNING=False)
        properties.update({key: value for key, value in session.items() if key != "device"})
        started = time.perf_counter()
        core = ov.Core()
        model = core.read_model(str(path))
        shapes = {}
        for port in model.inputs:
            if port.partial_shape.is_dynamic:
                sizes = [1 if place == 0 else size for place, size in enumerate(port.partial_shape)]
                shapes[port] = ov.PartialShape(sizes)
        self.single = bool(shapes)
        if shapes:
            model.reshape(shapes)
        self.compiled = core.compile_model(model, device, properties)
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.outputs = [_name(port) for port in self.compiled.outputs]
        self.inputs = [_name(port) for port in self.compiled.inputs]
        self.local = threading.local()

    @staticmethod
    def version() -> str:
        """Version of the runtime."""
        import openvino as ov

        return str(ov.__version__).partition("-")[0]

    @staticmethod
    def facts() -> dict[str, Any]:
        """What else there is to know of it."""
        import openvino as ov

        return {"devices": [str(name) for name in ov.Core().available_devices]}

    def run(self, feeds: Arrays) -> dict[str, Any]:
        """All outputs; an engine that takes any batch was compiled for one sample, and gets them one by one."""
        count = len(next(iter(feeds.values())))
        if not self.single or count == 1:
            return self._infer(feeds)
        import numpy as np

        rows = [self._infer({name: value[row : row + 1] for name, value in feeds.items()}) for row in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in self.outputs}

    def _infer(self, feeds: Arrays) -> dict[str, Any]:
        request = getattr(self.local, "request", None)
        if request is None:
            request = self.local.request = self.compiled.create_infer_request()
        found = request.infer([feeds[name] for name in self.inputs], share_outputs=False)
        return {name: found[place] for place, name in enumerate(self.outputs)}


def _name(port: Any) -> str:
    return str(sorted(port.names)[0] if port.names else port.node.friendly_name)


RUNTIMES: dict[str, Any] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


def runtime_of(manifest: Mapping[str, Any]) -> Any:
    """The class that runs this bundle's engine."""
    name = manifest["runtime"]["name"]
    if name not in RUNTIMES:
        raise RefusedError("this agent cannot run engines of {}; it knows {}".format(name, ", ".join(RUNTIMES)))
    try:
        RUNTIMES[name].version()
    except ImportError as error:
        raise RefusedError(
            f"{name} is not installed here ({error}): python -m pip install {name}=={manifest['runtime']['version']}"
        ) from error
    return RUNTIMES[name]


# ---------------------------------------------------------------------------------------------------------------------
# parity
# ---------------------------------------------------------------------------------------------------------------------


def parity(pairs: Iterable[tuple[Arrays, Arrays]], steps: Mapping[str, float]) -> dict[str, Any]:
    """How far outputs are from a reference, in steps; the same words and rules as on the workstation.

    pairs: for every batch (outputs, reference), each a dictionary by output name; steps: one step of each output.
    """
    import numpy as np

    count = dict.fromkeys(("elements", "equal", "half", "one", "two", "broken", "samples", "same", "decided"), 0)
    sums = dict.fromkeys(("lsb", "signal", "noise"), 0.0)
    largest = 0.0
    for got, wanted in pairs:
        for name, step in steps.items():
            if got[name].shape != wanted[name].shape:
                raise RefusedError(
                    f"output {name!r} has the shape {got[name].shape} here and {wanted[name].shape} in the bundle"
                )
            a, b = np.asarray(got[name], np.float64), np.asarray(wanted[name], np.float64)
            equal = (got[name] == wanted[name]) | (np.isnan(a) & np.isnan(b))
            finite = np.isfinite(a) & np.isfinite(b)
            broken = ~finite & ~equal
            error = np.where(finite, a, 0) - np.where(finite, b, 0)
            lsb = np.abs(error) / step
            count["elements"] += a.size
            count["equal"] += int(equal.sum())
            count["broken"] += int(broken.sum())
            for key, limit in (("half", 0.5), ("one", 1.0), ("two", 2.0)):
                count[key] += int(((lsb <= limit + SLACK) & ~broken).sum())
            largest = max(largest, float(lsb.max()) if lsb.size else 0.0)
            sums["lsb"] += float(lsb.sum())
            sums["signal"] += float((np.where(finite, b, 0) ** 2).sum())
            sums["noise"] += float((error**2).sum())
            rows = b.reshape(len(b), -1) if b.ndim > 1 and b.size == b.shape[0] * b.shape[1] else None
            if rows is not None and rows.shape[1] > 1:
                choice = a.reshape(rows.shape).argmax(1)
                count["same"] += int((choice == rows.argmax(1)).sum())
                count["decided"] += len(rows)
        count["samples"] += len(next(iter(wanted.values())))
    n = max(1, count["elements"])
    return {
        "images": count["samples"],
        "elements": count["elements"],
        "equal_share": count["equal"] / n,
        "within_half_lsb": count["half"] / n,
        "within_1_lsb": count["one"] / n,
        "within_2_lsb": count["two"] / n,
        "max_lsb": largest,
        "mean_lsb": sums["lsb"] / n,
        "sqnr_db": sqnr(sums["signal"], sums["noise"]) if not count["broken"] else -LIMIT_DB,
        "non_finite": count["broken"],
        "top1_agreement": count["same"] / count["decided"] if count["decided"] else None,
    }


def sqnr(signal: float, noise: float) -> float:
    """Signal to noise in dB, held within plus or minus 320."""
    if noise <= 0:
        return LIMIT_DB
    if signal <= 0:
        return -LIMIT_DB
    return max(-LIMIT_DB, min(LIMIT_DB, 10 * (math.log10(signal) - math.log10(noise))))


def read_samples(
    folder: Path, manifest: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Every batch of the bundle: (feeds, {reference: outputs})."""
    import numpy as np

    for name in manifest["samples"]:
        with np.load(folder / name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        feeds = {key.split("::", 1)[1]: value for key, value in arrays.items() if key.startswith("input::")}
        references: dict[str, dict[str, Any]] = {}
        for key, value in arrays.items():
            kind, _, output = key.partition("::")
            if kind != "input":
                references.setdefault(kind, {})[output] = value
        yield feeds, references


def check_parity(engine: Any, folder: Path, manifest: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The engine against every reference of the bundle."""
    steps = manifest["steps"]
    found: dict[str, list[tuple[Arrays, Arrays]]] = {}
    for place, (feeds, references) in enumerate(read_samples(folder, manifest)):
        outputs = engine.run(feeds)
        for kind, wanted in references.items():
            found.setdefault(kind, []).append((outputs, wanted))
        say("parity", done=place + 1, total=len(manifest["samples"]))
    return {kind: parity(pairs, steps) for kind, pairs in found.items()}


def judge(found: Mapping[str, Any], limits: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What of the expected parity does not hold, in words."""
    failed = []
    for kind, wanted in sorted(limits.items()):
        for key, least in sorted(wanted.items()):
            value = found.get(kind, {}).get(key)
            if value is not None and value < least:
                failed.append(f"{key} against the {kind} reference is {value:.6g}, expected at least {least:.6g}")
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# time
# ---------------------------------------------------------------------------------------------------------------------


def time_runs(engine: Any, feeds: Arrays, seconds: float, warmup: int, least: int) -> list[float]:
    """Milliseconds of single runs, after warm-up, for `seconds` and at least `least` runs."""
    for _ in range(warmup):
        engine.run(feeds)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        started = time.perf_counter()
        engine.run(feeds)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """Percentiles of times in milliseconds."""
    import numpy as np

    array = np.asarray(times)
    tenth = max(1, len(times) // 10)
    return {
        "runs": len(times),
        "median_ms": float(np.median(array)),
        "p90_ms": float(np.percentile(array, 90)),
        "p95_ms": float(np.percentile(array, 95)),
        "p99_ms": float(np.percentile(array, 99)),
        "iqr_ms": float(np.percentile(array, 75) - np.percentile(array, 25)),
        "min_ms": float(array.min()),
        "mean_ms": float(array.mean()),
        "drift": float(np.median(array[-tenth:]) / np.median(array[:tenth])),
    }


def throughput(make: Callable[[], Any], feeds: Arrays, streams: int, seconds: float) -> dict[str, Any]:
    """Samples a second of `streams` engines that run at the same time, each in a thread of its own."""
    engines = [make() for _ in range(streams)]
    for engine in engines:
        engine.run(feeds)
    counts, go = [0] * streams, threading.Event()
    errors: list[Exception] = []
    end = [0.0]

    def work(place: int) -> None:
        go.wait()
        try:
            while time.perf_counter() < end[0]:
                engines[place].run(feeds)
                counts[place] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(streams)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    end[0] = started + seconds
    go.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    passed = time.perf_counter() - started
    batch = len(next(iter(feeds.values())))
    return {"streams": streams, "seconds": passed, "samples_per_second": sum(counts) * batch / passed}


# ---------------------------------------------------------------------------------------------------------------------
# the device
# ---------------------------------------------------------------------------------------------------------------------


def read_text(path: str) -> str | None:
    """A small file's text, or ``None``."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return None


ARM = ("aarch64", "arm64", "armv8l")


def foreign() -> bool:
    """Whether this is an Arm program on another processor: the system tells of one that cannot run it."""
    text = read_text("/proc/cpuinfo") or ""
    return platform.machine().lower() in ARM and "vendor_id" in text and "CPU implementer" not in text


def cpu() -> dict[str, Any]:
    """Model and features of the processor, as far as the system says."""
    text = read_text("/proc/cpuinfo") or ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, found, value = line.partition(":")
        if found:
            fields.setdefault(key.strip().lower(), value.strip())
    # An emulator for one program shows the cpuinfo of the machine below, so only the words of this architecture count.
    arm = platform.machine().lower() in ARM
    features = (fields.get("features" if arm else "flags") or "").split()
    if arm and "asimd" not in features:
        features.append("asimd")  # every 64-bit Arm processor has it
    telling = (
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "amx_int8",
        "asimd",
        "neon",
        "asimddp",
        "i8mm",
        "sve",
        "sve2",
        "fphp",
        "asimdhp",
    )
    names = ("hardware", "model name") if arm and not foreign() else () if arm else ("model name",)
    model = read_text("/proc/device-tree/model") if not foreign() else None
    model = model or next((fields[name] for name in names if name in fields), None) or platform.processor()
    return {
        "model": model or platform.machine(),
        "features": [name for name in telling if name in features],
        "cores": os.cpu_count(),
    }


def memory_total() -> int | None:
    """Bytes of memory, or ``None``."""
    for line in (read_text("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes, or ``None``."""
    for line in (read_text("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except (ImportError, ValueError, OSError):
        return None


def clocks() -> dict[str, Any]:
    """Clocks in MHz and temperatures in degrees Celsius that the system tells of."""
    frequencies: list[float] = []
    root = "/sys/devices/system/cpu"
    for core in range(os.cpu_count() or 1):
        text = read_text(f"{root}/cpu{core}/cpufreq/scaling_cur_freq")
        if text and text.isdigit():
            frequencies.append(int(text) / 1000)
    temperatures = {}
    for zone in range(64):
        text = read_text(f"/sys/class/thermal/thermal_zone{zone}/temp")
        if text is None:
            break
        kind = read_text(f"/sys/class/thermal/thermal_zone{zone}/type") or f"zone{zone}"
        try:
            temperatures[f"{zone} {kind}"] = int(text) / 1000
        except ValueError:
            continue
    return {
        "mhz": max(frequencies) if frequencies else None,
        "governor": read_text(f"{root}/cpu0/cpufreq/scaling_governor"),
        "celsius": temperatures,
    }


def throttled(before: Mapping[str, Any], after: Mapping[str, Any], drift: float | None) -> tuple[bool | None, str]:
    """Whether the device slowed down, and how that shows; (None, "") if it tells nothing."""
    if before["mhz"] and after["mhz"] and after["mhz"] < COOLER * before["mhz"]:
        return True, "the clock fell from {:.0f} to {:.0f} MHz".format(before["mhz"], after["mhz"])
    if drift is not None and drift > SLOWER:
        return True, f"the last tenth of the runs took {drift:.2f} times as long as the first"
    return (False, "") if drift is not None else (None, "")


def numpy_version() -> str | None:
    """Version of numpy, or ``None`` where there is none."""
    try:
        import numpy as np
    except ImportError:
        return None
    return str(np.__version__)


def probe() -> dict[str, Any]:
    """What this device is and has, for whoever chooses what is run on it."""
    runtimes: dict[str, Any] = {}
    for name, kind in RUNTIMES.items():
        try:
            runtimes[name] = {"version": kind.version(), **kind.facts()}
        except Exception as error:  # a broken installation says so in many ways
            lines = str(error).strip().splitlines() or [type(error).__name__]
            runtimes[name] = {"version": None, "missing": lines[0][:400]}
    return {"agent": AGENT, "device": device(), "runtimes": runtimes, "clocks": clocks()}


def device() -> dict[str, Any]:
    """What this machine is."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    emulated = foreign() or "qemu" in (read_text("/proc/cpuinfo") or "").lower() or "QEMU_CPU" in os.environ
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": numpy_version(),
        "cpu": cpu(),
        "memory_bytes": memory_total(),
        "affinity": affinity,
        "emulated": emulated,
    }


# ---------------------------------------------------------------------------------------------------------------------
# the run
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def told(manifest: Mapping[str, Any], kind: Any, what: str) -> Iterator[None]:
    """Say in one line what the runtime could not do."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        name = manifest["runtime"]["name"]
        raise RefusedError(f"{name} {kind.version()} cannot {what} the engine: {' '.join(lines)[:400]}") from error


def run(folder: Path, options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Check, compare and measure; the result."""
    started = time.time()
    say("digests")
    manifest = read_bundle(folder)
    kind = runtime_of(manifest)
    path = folder / manifest["engine"]
    session = manifest["session"]
    result: dict[str, Any] = {
        "format": "zsq-result",
        "schema_version": AGENT,
        "network": manifest["network"],
        "target": manifest["target"],
        "bundle_sha256": sha256(folder / MANIFEST),
        "engine_bytes": manifest["engine_bytes"],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "device": device(),
        "runtime": {
            "name": manifest["runtime"]["name"],
            "version": kind.version(),
            "built_with": manifest["runtime"]["version"],
        },
        "threads": options.threads,
        "notes": [],
    }
    if result["device"]["emulated"]:
        result["notes"].append("this processor is emulated: times say nothing, parity does")
    before_loading = peak_memory()
    say("loading")
    with told(manifest, kind, "load"):
        engine = kind(path, session, options.threads)
    feeds = next(read_samples(folder, manifest))[0]
    one = {name: value[: manifest["batch"]] for name, value in feeds.items()}
    clock = time.perf_counter()
    with told(manifest, kind, "run"):
        engine.run(one)
    first_ms = (time.perf_counter() - clock) * 1e3
    loaded = peak_memory()
    with told(manifest, kind, "run"):
        result["parity"] = check_parity(engine, folder, manifest, say)
    failed = judge(result["parity"], manifest["limits"])
    before = clocks()
    say("latency", seconds=options.seconds)
    times = time_runs(engine, one, options.seconds, options.warmup, options.runs)
    latency = summary(times)
    drift = latency.pop("drift")
    latency.update(first_ms=first_ms, load_ms=engine.load_ms, threads=options.threads, batch=manifest["batch"])
    result["latency"] = latency
    if options.streams:
        say("throughput", seconds=options.seconds)
        make = lambda: kind(path, session, max(1, options.threads // options.streams))  # noqa: E731
        result["throughput"] = throughput(make, one, options.streams, options.seconds)
    after = clocks()
    slow, why = throttled(before, after, drift)
    result["thermal"] = {"before": before, "after": after, "drift": drift, "throttled": slow, "why": why}
    if slow:
        result["notes"].append("the device was throttled while it was measured: " + why)
    peak = peak_memory()
    result["memory"] = {
        "peak_bytes": peak,
        "added_by_loading_bytes": loaded - before_loading
        if loaded is not None and before_loading is not None
        else None,
    }
    result["verdict"] = {"passed": not failed, "failed": failed}
    result["seconds"] = time.time() - started
    return result


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result under a temporary name, and rename it."""
    handle, temporary = tempfile.mkstemp(prefix=".result-", dir=path.resolve().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2, sort_keys=True)
            file.write("\n")
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise


def number(text: str) -> int:
    """A whole number above zero, for the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="exit codes: 0 fine, 1 parity failed, 2 refused"
    )
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--bundle",
        type=Path,
        default=here,
        help="folder of an unpacked bundle, or a .zsq.tar (default: where this file lies)",
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=None, help="the result (default: result.json beside the bundle)"
    )
    parser.add_argument("--threads", type=number, default=1, help="threads inside an operator (default: 1)")
    parser.add_argument("--affinity", default=None, help="cores to run on, such as 0,1 or 4-7 (default: any)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long runs are timed (default: 5)")
    parser.add_argument("--runs", type=number, default=20, help="and how many at least (default: 20)")
    parser.add_argument("--warmup", type=number, default=5, help="runs before that (default: 5)")
    parser.add_argument(
        "--streams", type=int, default=0, help="also measure throughput with so many engines at once (default: 0, not)"
    )
    parser.add_argument("--events", action="store_true", help="progress as JSON lines, for programs")
    parser.add_argument("--probe", action="store_true", help="only say what this device is and has, as JSON")
    parser.add_argument(
        "--work", type=Path, default=None, help="where a .zsq.tar is unpacked (default: the system's temporary folder)"
    )
    parser.add_argument(
        "--tether",
        action="store_true",
        help="end as soon as standard input is closed, for programs that start this one",
    )
    return parser.parse_args(argv)


def cores(text: str) -> set[int]:
    """``0,2-3`` as {0, 2, 3}."""
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.partition("-")
        found.update(range(int(low), int(high if dash else low) + 1))
    return found


def tether() -> None:
    """End this program when whoever started it is gone: nothing goes on measuring for nobody."""

    def watch() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        os._exit(GONE)

    threading.Thread(target=watch, daemon=True).start()


def claim(out: Path, say: Say) -> tuple[Any, bool]:
    """Wait until no other agent works on this result: (what holds the claim, whether there was another).

    After a broken connection the first agent may still be at work, and two that measure at once would disturb each other.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        return None, False
    file = out.with_name(out.name + ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file, False
    except OSError:
        say("waiting")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file, True


def main(argv: list[str] | None = None) -> int:
    """Run the agent; the exit code."""
    options = arguments(argv)
    if options.tether:
        tether()
    if options.probe:
        print(json.dumps(dict(event="probe", **probe())), flush=True)
        return 0

    def say(what: str, **more: Any) -> None:
        if options.events:
            print(json.dumps(dict(event=what, **more)), flush=True)
        elif "done" not in more or more["done"] == more["total"]:
            print(f"{what:10} ...", flush=True)

    try:
        if options.affinity is not None:
            try:
                os.sched_setaffinity(0, cores(options.affinity))
            except (AttributeError, ValueError, OSError) as error:
                raise RefusedError(f"--affinity {options.affinity} cannot be set here: {error}") from error
        folder = beside = options.bundle
        if folder.is_file():
            beside = folder.resolve().parent
        out = options.out or beside / "result.json"
        held, others = claim(out, say) if options.tether else (None, False)
        if others and out.is_file():
            result = json.loads(out.read_text(encoding="utf-8"))  # the other one finished it
        else:
            with tempfile.TemporaryDirectory(prefix="zsq-agent-", dir=options.work) as temporary:
                if folder.is_file():
                    folder = unpack(folder, Path(temporary))
                result = run(folder, options, say)
            write(out, result)
        del held
    except RefusedError as error:
        if options.events:
            print(json.dumps({"event": "refused", "message": str(error)}), flush=True)
        print(f"refused: {error}", file=sys.stderr)
        return 2
    if options.events:
        print(json.dumps({"event": "done", "out": str(out.resolve())}), flush=True)
    else:
        tell(result, out)
    return 0 if result["verdict"]["passed"] else 1


def tell(result: Mapping[str, Any], out: Path) -> None:
    """The result in a few lines."""
    runtime, latency = result["runtime"], result["latency"]
    print(f"{result['network']} on {result['device']['cpu']['model']}, {runtime['name']} {runtime['version']}")
    for kind, found in sorted(result["parity"].items()):
        top = "" if found["top1_agreement"] is None else f", top-1 {found['top1_agreement']:.2%}"
        print(
            f"  against {kind:12} equal {found['equal_share']:.2%}, within 2 LSB {found['within_2_lsb']:.2%}, "
            f"at most {found['max_lsb']:.1f} LSB{top}"
        )
    print(
        f"  latency      median {latency['median_ms']:.3f} ms, spread {latency['iqr_ms']:.3f}, p90 {latency['p90_ms']:.3f}, "
        f"p95 {latency['p95_ms']:.3f}, p99 {latency['p99_ms']:.3f} "
        f"(first {latency['first_ms']:.1f}, load {latency['load_ms']:.0f}), {latency['threads']} thread(s)"
    )
    if "throughput" in result:
        found = result["throughput"]
        print(f"  throughput   {found['samples_per_second']:.1f} samples/s with {found['streams']} streams")
    for line in result["notes"] + result["verdict"]["failed"]:
        print(f"  ! {line}")
    print(f"  {'passed' if result['verdict']['passed'] else 'FAILED'} -> {out}")


if __name__ == "__main__":
    sys.exit(main())
