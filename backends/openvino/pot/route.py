"""The route through POT: its last release quantizes the folded float graph in an interpreter of its own, fed by our calibration set.

The network goes over as an IR of the current OpenVINO, simplified as for NNCF, so that every layer has the name here that it has there.
What comes back is read into a Q/DQ graph: weights still float behind FakeQuantize, so that they are rounded once, at the scales that
the engine really gets. POT's finished model (weights stored as integers) is kept beside it.

What POT is told by default differs from its own defaults where a measurement says so: **one scale an activation** also in front of
depthwise convolutions (a scale per channel sends them to float kernels), ranges over **all** images instead of the mean of the
images' extremes, and **no halved weights** in the first layer on processors with VNNI, which cannot overflow. A configuration file of
POT's own is run as it is.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.base import Target, ValidationData
from zsq_deploy.backends.openvino.convert import save, weights_of
from zsq_deploy.backends.openvino.design import Design
from zsq_deploy.backends.openvino.ir import load_ir, read_ir
from zsq_deploy.backends.openvino.nncf_route import Samples, given_graph, prepare
from zsq_deploy.backends.openvino.nncf_scope import Ignored, ignored_operators, operators_of
from zsq_deploy.backends.openvino.options import BuildOptions, PotOptions
from zsq_deploy.backends.openvino.pot.config import compression_of, read_pot_config
from zsq_deploy.backends.openvino.pot.environment import Environment, check
from zsq_deploy.backends.openvino.pot.words import ACCURACY_AWARE
from zsq_deploy.backends.openvino.runtime import core, ov
from zsq_deploy.backends.openvino.targets import DEVICE
from zsq_deploy.errors import CalibrationError, EngineError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.progress import SILENT, Progress, Task

__all__ = ["design_pot"]

Array = npt.NDArray[Any]

_WORKER = Path(__file__).with_name("worker.py")
_SHARD_BYTES = 64 * 2**20
_PATIENCE = 5.0
_TOLERANCE = 1e-3
"""How far the float outputs of the two OpenVINO releases may be apart, relative to the largest output."""

_RANGE = {"min": {"aggregator": "min", "type": "min"}, "max": {"aggregator": "max", "type": "max"}}
"""Extremes over all images."""

_DEVICES = {"CPU": "CPU", "GPU": "GPU", "NPU": "NPU"}


def design_pot(
    model: Any,
    calibration: Any,
    target: Target,
    options: BuildOptions,
    folder: Path,
    *,
    progress: Progress = SILENT,
    validation: ValidationData | None = None,
    probes: Mapping[str, Array] | None = None,
) -> Design:
    """Have POT quantize a network.

    Args:
        model: The :class:`~zsq_deploy.model.Model`.
        calibration: The calibration set.
        target: What to quantize for.
        options: What is quantized; ``options.pot`` says what POT is told.
        folder: Where ``vendor.xml`` and ``vendor.bin`` go.
        progress: Watches.
        validation: What AccuracyAwareQuantization measures on; ``None``: the calibration set itself.
        probes: More images, appended to the set so that ranges are covered: input name -> array.

    Raises:
        EngineError: POT's environment is missing or broken, POT stopped, or nothing was quantized.
        StaleArtifactError: The environment is that of another version.
        CalibrationError: The set or the probes do not fit the network's inputs.
        UsageError: Something is to stay in float that does not exist, or a configuration file is wrong.
    """
    environment = check("pot")
    graph = given_graph(model.folded().graph, options)
    asked = _asked(options.pot)
    size = asked.params.pop("stat_subset_size", None)
    samples = Samples(graph.inputs, calibration, probes, size)
    batch = _fixed_batch(graph)
    if len(samples) < batch:
        raise CalibrationError(
            f"the network takes {batch} images at once and the set holds {len(samples)}",
            where="calibration",
            remedy="make more images, or export the network with an open batch",
        )
    ir = prepare(graph)
    ignored = ignored_operators(
        ir,
        graph,
        names=(*options.exclude, *asked.ignored),
        types=asked.ignored_types,
        op_types=options.op_types,
    )
    algorithm = _algorithm(asked, target, ignored)
    one_scale = not asked.own_file and "granularity" not in (asked.params.get("activations") or {})
    folder = Path(folder).absolute()  # the other interpreter works in a folder of its own
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pot-", dir=folder) as scratch:
        job = Path(scratch)
        save(ir, job / "float.xml")
        _expect(ir, samples, batch, job / "expected.npz")
        described: dict[str, Any] = {
            "model": "float.xml",
            "batch": batch,
            "calibration": _write_shards(job, "calibration", samples),
            "tolerance": _TOLERANCE,
            "algorithms": [algorithm],
            "target_device": algorithm["params"]["target_device"],
            "one_scale_before_depthwise": one_scale,
            "threads": _threads(),
            "seed": 0,
        }
        measured = ""
        if algorithm["name"] == ACCURACY_AWARE:
            measured, more = _validation(job, graph, validation, calibration)
            described.update(more)
        (job / "job.json").write_text(json.dumps(described), encoding="utf-8")
        run = _run(environment, job, algorithm["name"], progress)
        came_back = load_ir(job / "quantized.xml")
        _undo_halves(came_back)
        quantized = _count_quantized(came_back)
        reading = read_ir(came_back, like=graph)
        if not quantized:
            raise EngineError(
                "POT found nothing to quantize in this network",
                where="--quantizer pot",
                remedy="leave fewer operators in float; a network without convolutions and matrix products cannot be quantized",
            )
        vendor = folder / "vendor.xml"
        for name, place in (("compressed.bin", weights_of(vendor)), ("compressed.xml", vendor)):
            shutil.move(job / name, place)
    record: dict[str, Any] = {
        "quantizer": "pot",
        "version": environment.packages.get("openvino-dev", ""),
        "python": environment.version,
        "algorithm": algorithm["name"],
        "params": {key: value for key, value in algorithm["params"].items() if key != "ignored"},
        "images": len(samples) - samples.probes,
        "probes": samples.probes,
        "one_scale_before_depthwise": one_scale,
        "ignored": dict(ignored.asked),
        "layers_with_8_bit_weights": quantized,
        "seconds": run.seconds,
    }
    notes = [*reading.notes]
    if algorithm["name"] == ACCURACY_AWARE:
        control = _controlled(run.messages, measured, algorithm["params"], operators_of(ir, graph))
        record["accuracy_control"] = control
        notes.append(_sentence(control))
    return Design(reading.graph, vendor, True, record, tuple(notes))


# ---------------------------------------------------------------------------------------------------------------------
# what POT is told
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What the user wants of POT, whether from options or from a file of POT's own."""

    algorithm: str
    params: dict[str, Any]
    ignored: tuple[str, ...] = ()
    ignored_types: tuple[str, ...] = ()
    own_file: bool = False


def _asked(told: PotOptions) -> _Asked:
    if told.config_path is not None:
        algorithm = compression_of(read_pot_config(told.config_path), where=str(told.config_path))
        name, params = algorithm["name"], dict(algorithm["params"])
    else:
        name = told.algorithm
        params = {"preset": told.preset, "use_fast_bias": told.use_fast_bias}
        if told.stat_subset_size is not None:
            params["stat_subset_size"] = told.stat_subset_size
        if name == ACCURACY_AWARE:
            params["maximal_drop"] = told.max_drop
    own = dict(params.pop("ignored", None) or {})
    names, types = [*told.ignored, *(own.pop("scope", None) or ())], list(told.ignored_types)
    params.update({key: value for key, value in told.config.items() if key != "ignored"})
    given = dict(told.config.get("ignored", None) or {})
    names += given.pop("scope", None) or ()
    for one in (*(own.pop("operations", None) or ()), *(given.pop("operations", None) or ())):
        if set(one) != {"type"}:
            raise UsageError(
                f"operators of type {one['type']} are ignored by their attributes, and this reaches POT by names only",
                where="pot.ignored.operations",
                remedy="name the nodes (`zsq inspect` lists them), or leave the attributes out",
            )
        types.append(one["type"])
    return _Asked(name, params, tuple(names), tuple(types), told.config_path is not None)


def _algorithm(asked: _Asked, target: Target, ignored: Ignored) -> dict[str, Any]:
    """POT's algorithm with everything that its command line would fill in, and our defaults where the user says nothing."""
    params = dict(asked.params)
    device = str(target.session.get(DEVICE, "ANY"))
    params.setdefault("target_device", _DEVICES.get(device, "ANY"))
    preset = {"symmetric": "performance", "asymmetric": "accuracy"}.get(params.get("preset", ""), params.get("preset"))
    # POT's command line does the same: these devices have no asymmetric weights.
    params["preset"] = "mixed" if preset == "accuracy" and params["target_device"] != "NPU" else preset or "performance"
    params.setdefault("model_type", None)
    params.setdefault("inplace_statistics", True)
    params.setdefault("dump_intermediate_model", False)
    if not asked.own_file:
        activations = dict(params.get("activations") or {})
        if "range_estimator" not in params:
            activations.setdefault("range_estimator", _RANGE)
        params["activations"] = activations
        if any("vnni" in feature for feature in target.requires):
            params.setdefault("saturation_fix", "no")
    if ignored.operators:
        params["ignored"] = {"scope": list(ignored.operators)}
    return {"name": asked.algorithm, "params": params}


# ---------------------------------------------------------------------------------------------------------------------
# the job folder
# ---------------------------------------------------------------------------------------------------------------------


def _fixed_batch(graph: Graph) -> int:
    sizes = {spec.shape[0] for spec in graph.inputs if spec.shape}
    return max((size for size in sizes if size), default=1)


def _threads() -> int:
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) > 0 else len(os.sched_getaffinity(0))


def _expect(ir: Any, samples: Any, batch: int, path: Path) -> None:
    """What the float network gives for the first images here, so that the other interpreter can see that it computes the same."""
    rows = list(itertools.islice(iter(samples), batch))
    feeds = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    compiled = core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(feeds)
    np.savez(path, *(np.array(results[port]) for port in compiled.outputs))


def _write_shards(job: Path, stem: str, samples: Any) -> list[str]:
    """Samples as ``.npz`` files of about 64 MiB; their names."""
    names: list[str] = []
    waiting: list[Mapping[str, Array]] = []
    size = 0

    def write() -> None:
        nonlocal size
        arrays = {name: np.concatenate([item[name] for item in waiting]) for name in waiting[0]}
        names.append(f"{stem}-{len(names):05d}.npz")
        np.savez(job / names[-1], **arrays)  # type: ignore[arg-type]  # numpy's stubs take every name for an option
        waiting.clear()
        size = 0

    for feeds in samples:
        waiting.append(feeds)
        size += sum(value.nbytes for value in feeds.values())
        if size >= _SHARD_BYTES:
            write()
    if waiting:
        write()
    return names


def _validation(
    job: Path, graph: Graph, validation: ValidationData | None, calibration: Any
) -> tuple[str, dict[str, Any]]:
    """The metric in words, and what the job says about it."""
    if validation is None:
        method = str(calibration.manifest.method)
        kind = "the real images" if method == "real" else f"the synthetic images ({method})"
        validation = ValidationData(list(calibration.batches(64)), None, f"{kind} that also calibrated")
    if not validation.batches:
        raise CalibrationError(
            "accuracy control has no samples to measure on",
            where="validation",
            remedy="hold some images out (--holdout), or give labelled images",
        )
    more: dict[str, Any] = {"validation": _write_shards(job, "validation", validation.batches)}
    source = validation.source or "the given images"
    images = sum(len(next(iter(batch.values()))) for batch in validation.batches)
    if validation.labels is not None:
        labels = np.concatenate([np.asarray(part).reshape(-1) for part in validation.labels]).astype(np.int64)
        if len(labels) != images:
            raise CalibrationError(
                f"{len(labels)} labels do not fit {images} samples",
                where="validation",
                remedy="give one class number for every image",
            )
        np.save(job / "labels.npy", labels)
        return f"top-1 accuracy on {source}", {**more, "metric": "accuracy", "samples": images}
    classes = len(graph.outputs) == 1 and len(graph.outputs[0].shape) == 2 and graph.outputs[0].shape[1] != 1
    if classes:
        return f"top-1 agreement with the float network on {source}", {**more, "metric": "agreement"}
    return (
        f"share of the float outputs' energy that quantization leaves undisturbed, on {source}",
        {**more, "metric": "similarity"},
    )


# ---------------------------------------------------------------------------------------------------------------------
# running
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Outcome:
    """What a run of the worker said."""

    messages: list[str] = field(default_factory=list)
    record: dict[str, Any] | None = None
    error: tuple[str, str] | None = None

    @property
    def seconds(self) -> float:
        return round(float((self.record or {}).get("seconds", 0.0)), 2)


_PHASES = {"import": "POT starts", "convert": "read the network", "quantize": "quantize", "write": "write"}


class _Bar:
    """POT counts samples looked at; its total is a guess, so the bar never runs backwards nor past its end."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._total, self._done, self._shown = 1.0, 0.0, 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "phase":
            self._show({"convert": 3, "quantize": 5, "write": 96}.get(str(event["name"]), 0))
            self._task.advance(0, step=_PHASES.get(str(event["name"]), str(event["name"])))
        elif kind == "total":
            self._total, self._done = max(float(event["count"]), 1.0), 0.0
        elif kind == "step":
            self._done += float(event["count"])
            self._show(5 + 91 * min(self._done / self._total, 1.0))
        elif kind == "sample":
            self._task.advance(0, step=f"sample {event['number']} of {event['count']}")

    def finish(self) -> None:
        self._show(100)

    def _show(self, percent: float) -> None:
        if percent > self._shown:
            self._task.advance(round(percent - self._shown, 2))
            self._shown = percent


def _run(environment: Environment, job: Path, algorithm: str, progress: Progress) -> _Outcome:
    """Run the worker and watch it.

    Raises:
        EngineError: It stopped; with POT's own last words.
    """
    outcome = _Outcome()
    log = job / "pot.log"
    with progress.task(f"POT {algorithm}", 100) as task, log.open("wb") as stderr:
        bar = _Bar(task)
        with _worker(environment, job, stderr) as process:
            assert process.stdout is not None
            for line in process.stdout:
                event = _event(line)
                bar.take(event)
                if event.get("event") == "log":
                    outcome.messages.append(str(event["message"]))
                elif event.get("event") == "done":
                    outcome.record = dict(event["record"])
                elif event.get("event") == "error":
                    outcome.error = (str(event["kind"]), str(event["message"]))
            code = process.wait()
        if outcome.record is None:
            raise _explain(outcome, code, log, environment)
        bar.finish()
    return outcome


@contextlib.contextmanager
def _worker(environment: Environment, job: Path, stderr: Any) -> Iterator[subprocess.Popen[str]]:
    """The running worker; it never outlives the block. In a session of its own, so that Ctrl-C reaches only us, who then stop it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_PRELOAD"))}
    process = subprocess.Popen(
        [str(environment.python), "-I", str(_WORKER), str(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
        env=kept,
        cwd=job,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _event(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _explain(outcome: _Outcome, code: int, log: Path, environment: Environment) -> EngineError:
    if outcome.error is not None and outcome.error[0] == "import":
        return EngineError(
            f"POT's environment is broken: {outcome.error[1]}",
            where=str(environment.folder),
            remedy=f"make it again: zsq env create {environment.name} --force",
        )
    doing = f" (its last message before: {outcome.messages[-1]!r})" if outcome.messages else ""
    if outcome.error is not None:
        return EngineError(
            f"POT stopped: {outcome.error[1]}{doing}",
            where="--quantizer pot",
            remedy="keep the layer that the message names in float (--exclude), or take --quantizer nncf or qdq",
        )
    if code < 0:
        return EngineError(
            f"POT was ended by signal {-code}{doing}",
            where="--quantizer pot",
            remedy="signal 9 is mostly a lack of memory: use fewer images, or close other programs"
            if code == -9
            else "take --quantizer nncf or qdq, and report this with the network",
        )
    lines = [text for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    said = lines[-1].strip()[:300] if lines else f"exit code {code}"
    return EngineError(
        f"POT stopped without a result: {said}{doing}",
        where=str(environment.python),
        remedy=f"look whether the environment works: zsq env check {environment.name}",
    )


# ---------------------------------------------------------------------------------------------------------------------
# what came out
# ---------------------------------------------------------------------------------------------------------------------


def _undo_halves(ir: Any) -> None:
    """Write weights that POT halved against saturation (and doubled behind their FakeQuantize) as they are, in place.

    ``FakeQuantize(w / 2, -r / 2, r / 2, -r, r)`` is ``FakeQuantize(w, -r, r, -r, r)`` with the same codes.
    """
    for op in ir.get_ops():
        if op.get_type_name() != "FakeQuantize":
            continue
        parts = [op.input(index).get_source_output().get_node() for index in range(5)]
        if any(part.get_type_name() != "Constant" for part in parts):
            continue
        weight, low, high, out_low, out_high = (np.array(part.data) for part in parts)
        if np.array_equal(low, out_low) and np.array_equal(high, out_high):
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = out_high / high
        if not (np.isfinite(factor).all() and np.allclose(out_low, low * factor, rtol=1e-6)):
            continue
        for index, values in ((0, weight * factor), (1, out_low), (2, out_high)):
            constant = ov.op.Constant(np.ascontiguousarray(values.astype(np.float32)))
            constant.set_friendly_name(parts[index].get_friendly_name())
            op.input(index).replace_source_output(constant.output(0))


def _count_quantized(ir: Any) -> int:
    """Operators whose weights are behind a FakeQuantize."""
    found = set()
    for op in ir.get_ops():
        if op.get_type_name() != "FakeQuantize":
            continue
        if op.input(0).get_source_output().get_node().get_type_name() == "Constant":
            found |= {port.get_node().get_friendly_name() for port in op.output(0).get_target_inputs()}
    return len(found)


_REVERTED = re.compile(r"Reverted (\d+) layers? to the [\w-]+ precision: (.*)")
_FINAL = re.compile(r"(\d+) out of (\d+) layers have been reverted back to the [\w-]+ precision: (.*)")
_VALUES = re.compile(r"(Baseline metrics|Fully quantized metrics|Accuracy drop[^{]*?):? ?(?:is )?(\{.*\})")


def _controlled(
    messages: Sequence[str], metric: str, params: Mapping[str, Any], parts: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """What AccuracyAwareQuantization did, as JSON, from what POT said."""
    nodes = {operator: node for node, operators in parts.items() for operator in operators}
    baseline = quantized = drop = None
    layers: dict[str, str] = {}
    pending: list[str] = []
    final: set[str] | None = None
    for text in messages:
        if (match := _REVERTED.search(text)) is not None:
            pending = [name.strip() for name in match[2].split(",") if name.strip()]
        elif (match := _FINAL.search(text)) is not None:
            final = {name.strip() for name in match[3].split(",") if name.strip()}
        elif (match := _VALUES.search(text)) is not None:
            value = _first_number(match[2])
            if match[1].startswith("Baseline"):
                baseline = value
            elif match[1].startswith("Fully"):
                quantized = value
            else:
                for name in pending:
                    layers[name] = (
                        f"the metric was {_number(drop)} below the float network's before it went back, {_number(value)} after"
                    )
                pending, drop = [], value
    if final is not None:
        layers = {name: layers.get(name, "reads what went back to float") for name in sorted(final)}
    return {
        "metric": metric,
        "max_drop": params.get("maximal_drop", 0.01),
        "drop_type": params.get("drop_type", "absolute"),
        "float": baseline,
        "quantized": quantized,
        "final": None if baseline is None or drop is None else baseline - drop,
        "reached": not any("could not achieve" in text for text in messages),
        "returned_to_float": {nodes.get(name, name): reason for name, reason in layers.items()},
    }


def _first_number(text: str) -> float | None:
    found = re.search(r":\s*(?:np\.float64\()?(-?[\d.]+(?:e-?\d+)?)", text)
    with contextlib.suppress(ValueError, SyntaxError):
        values = ast.literal_eval(text)
        return float(next(iter(values.values())))
    return float(found[1]) if found else None


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _sentence(control: Mapping[str, Any]) -> str:
    layers = control["returned_to_float"]
    what = f"{len(layers)} layers went back to float" if layers else "no layer had to go back to float"
    missed = "" if control["reached"] else f"; the allowed drop of {control['max_drop']:g} was not reached"
    return f"accuracy control ({control['metric']}): {what}{missed}"
