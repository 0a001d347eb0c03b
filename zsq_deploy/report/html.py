"""``report.html``: one page, drawn from ``report.json`` and nothing else, that needs no network and no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from zsq_deploy.artifact import atomic_writer
from zsq_deploy.errors import ZsqError
from zsq_deploy.report import plots, quality, words
from zsq_deploy.report.cards import cards, sentence
from zsq_deploy.report.devices import device_rows, remarks
from zsq_deploy.report.parity_schema import AccuracySection, ParityNumbers
from zsq_deploy.report.schema import Report, TargetSection

__all__ = ["render", "write"]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zsq_deploy.report", "."),
        autoescape=True,  # every text of the report comes from a user's model or machine
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent,
        points=words.points,
        times=words.times,
        ms=words.milliseconds,
        seconds=words.seconds,
        bytes=words.bytes_text,
        count=words.count,
        short=words.short_count,
        lsb=words.lsb,
        db=words.decibel,
        quality=words.quality,
        value=_value,
    )
    return environment


def _value(value: Any) -> str:
    """A free value of the recipe, the parameters or the machine."""
    match value:
        case None:
            return words.NOTHING
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case list() | tuple():
            return ", ".join(_value(item) for item in value) or words.NOTHING
        case Mapping():
            return ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) or words.NOTHING
    return str(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows ``("a.b", "text")``."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            rows += _flat(item, f"{path}.")
        else:
            rows.append((path, _value(item)))
    return rows


def _slug(text: str, index: int) -> str:
    return f"t{index}-" + (re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "target")


def _intro(target: TargetSection) -> str:
    """What the target is and how numbers are stored on it."""
    parts = [target.summary.rstrip(".")] if target.summary else []
    if target.activation and target.weight:
        parts.append(f"Activations {target.activation}, weights {target.weight}")
    if target.runtime:
        parts.append(f"Runtime: {target.runtime} {target.runtime_version}".rstrip())
    return ". ".join(parts) + ("." if parts else "")


#: Calibration images that are computed without a look at the network.
PATTERNS = ("gaussian", "uniform", "ones", "fractal")


def _lead(report: Report) -> str:
    real = report.calibration.method == "real"
    images = words.count(report.calibration.images)
    if real:
        return f"It was calibrated with {images} real images."
    if not report.calibration.images:
        return (
            f"No image was used to quantize it: its ranges come from the network alone ({report.calibration.method})."
        )
    if report.calibration.method in PATTERNS:
        return f"No training data were used: it was calibrated with {images} computed patterns ({report.calibration.method})."
    return (
        f"No training data were used: its {images} calibration images were made from the network alone "
        f"({report.calibration.method})."
    )


#: The four references in plain words: key in the report, title, explanation.
REFERENCES = (
    (
        "integer",
        "Exact integer arithmetic",
        (
            "The same quantized network, computed in whole numbers with the runtime's own rounding. An engine that equals it bit for "
            "bit computes exactly what was specified."
        ),
    ),
    (
        "twin",
        "Fake-quant twin",
        (
            "The simulation of quantization in floating point that methods are developed on. It rounds in float, so a value that lies "
            "on the border between two codes may fall to the other side."
        ),
    ),
    (
        "unfused",
        "Runtime, fusion off",
        (
            "The same file in the same runtime without its optimizations. A difference here is what fusing layers into integer kernels "
            "changed."
        ),
    ),
    (
        "float",
        "Float network",
        "The network before quantization. This is the whole loss that quantization causes; the other three say where it comes from.",
    ),
)


def _references(target: TargetSection) -> list[dict[str, Any]]:
    parity = target.parity
    found: dict[str, ParityNumbers | None] = {
        "integer": parity.integer,
        "twin": parity if parity.elements is not None or parity.within_2_lsb is not None else None,
        "unfused": parity.unfused,
        "float": parity.float_,
    }
    rows = []
    for key, title, text in REFERENCES:
        path = "parity" if key == "twin" else f"parity.{key}"
        why = target.not_measured.get(path, "not measured")
        rows.append({"title": title, "text": text, "numbers": found[key], "why": why})
    return rows


def _kernels(target: TargetSection) -> list[dict[str, Any]]:
    integer = target.integer
    time = sum(kernel.microseconds for kernel in integer.kernels) or 1.0
    return [{"kernel": kernel, "share": kernel.microseconds / time} for kernel in integer.kernels]


def _accuracy_texts(accuracy: AccuracySection) -> list[str]:
    return [words.quality(value, accuracy.metric) for value in (accuracy.float_, accuracy.reference, accuracy.engine)]


def _files(target: TargetSection) -> list[tuple[str, str]]:
    """The engine's files."""
    engine = target.engine
    rows = [("File", engine.path), ("Size", words.bytes_text(engine.bytes)), ("SHA-256", engine.sha256)]
    if engine.weights is not None:
        rows.append(("Weights", f"{engine.weights.path}, {words.bytes_text(engine.weights.bytes)}"))
    if engine.quantizer:
        rows.append(("Quantized by", engine.quantizer))
    if engine.vendor is not None:
        rows.append(("As the vendor wrote it", engine.vendor.path))
    return rows


def _control(target: TargetSection) -> list[tuple[str, str]]:
    """What accuracy control measured."""
    control = target.engine.accuracy_control
    if control is None:
        return []
    rows = [
        ("Metric", control.metric),
        ("Samples", words.count(control.samples)),
        ("Largest drop allowed", f"{_value(control.max_drop)} ({control.drop_type})"),
        ("Float network", _value(control.float_)),
        ("Everything quantized", _value(control.quantized)),
        ("In the end", _value(control.final)),
    ]
    if control.reached is not None:
        rows.append(("Kept", "yes" if control.reached else "no: the allowed drop was not reached"))
    return rows


def _target(report: Report, name: str, target: TargetSection, index: int) -> dict[str, Any]:
    slug = _slug(name, index)
    accuracy = target.accuracy
    divergence = target.parity.divergence
    float_bytes = target.float_model.bytes if target.float_model else None
    texts = (words.bytes_text(target.engine.bytes), words.bytes_text(float_bytes))
    figures = {
        "latency": plots.latency_bars(target.latency, f"{slug}-latency"),
        "accuracy": plots.accuracy_bars(accuracy, f"{slug}-accuracy", _accuracy_texts(accuracy)) if accuracy else None,
        "size": plots.size_bars(float_bytes, target.engine.bytes, f"{slug}-size", texts),
        "lsb": plots.lsb_histogram(target.parity.histogram, f"{slug}-lsb") if target.parity.histogram else None,
        "layers": plots.layer_sqnr(target.layers, f"{slug}-layers"),
        "growth": plots.growth(divergence.tensors, f"{slug}-growth") if divergence else None,
    }
    latency = target.latency
    return {
        "name": name,
        "slug": slug,
        "data": target,
        "cards": cards(target),
        "intro": _intro(target),
        "sentence": sentence(report, name, target, first=index == 0),
        "figures": {key: markupsafe.Markup(svg) if svg else None for key, svg in figures.items()},  # noqa: S704 - drawn by us
        "references": _references(target),
        "kernels": _kernels(target),
        "choices": _flat(target.engine.choices),
        "files": _files(target),
        "device": _flat(target.device),
        "devices": device_rows(report, name) if target.devices else [],
        "device_remarks": remarks(report, name),
        "control": _control(target),
        "runners": [
            (label, numbers)
            for label, numbers in (
                ("engine", latency.engine),
                ("float, best mode", None if latency.float_best == latency.float32 else latency.float_best),
                ("float, fp32", latency.float32),
                *latency.others.items(),
            )
            if numbers is not None
        ],
        "weakest": sorted(
            (row for row in target.layers if row.sqnr_db is not None), key=lambda row: row.sqnr_db or 0.0
        )[:5],
    }


def _picture(report: Report, folder: Path | None) -> str | None:
    preview = report.calibration.preview
    if preview is None:
        return None
    if preview.data_uri:
        return preview.data_uri
    if not preview.file or folder is None:
        return None
    path = (folder / preview.file).resolve()
    # A report may come from elsewhere: only pictures beside it are taken into the page.
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    kind = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
    for start, name in kind.items():
        if content.startswith(start):
            return f"data:image/{name};base64," + base64.b64encode(content).decode()
    raise ZsqError(
        "the picture of the calibration images is neither PNG nor JPEG", where=str(path), remedy="make the report again"
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    model = report.model
    rows = [("Source", model.source), ("Parameters", words.short_count(model.parameters))]
    rows += [("Multiply-accumulates", words.short_count(model.macs)), ("Graph nodes", words.count(model.nodes))]
    rows += [("Batch-norm layers", words.count(model.batch_norms))]
    rows += [
        (f"{kind} {tensor.name}", "×".join("N" if size is None else str(size) for size in tensor.shape))
        for kind, tensors in (("Input", model.inputs), ("Output", model.outputs))
        for tensor in tensors
    ]
    if model.preprocess:
        rows.append(("Preprocessing", _value(model.preprocess)))
    rows.append(("Digest", model.digest[:16]))
    return [(key, text) for key, text in rows if text and text != words.NOTHING]


def _calibration_facts(report: Report) -> list[tuple[str, str]]:
    calibration = report.calibration
    rows = [
        ("Method", calibration.method),
        ("Images", words.count(calibration.images)),
        ("Time", words.seconds(calibration.seconds)),
        ("Peak memory", words.bytes_text(calibration.peak_rss_bytes)),
        ("Peak memory of the GPU", words.bytes_text(calibration.peak_gpu_bytes)),
        ("Device", calibration.device),
        ("Seed", _value(calibration.seed)),
        ("Ranges", calibration.range_method),
        ("Time for ranges", words.seconds(calibration.ranges_seconds)),
    ]
    return [(key, text) for key, text in rows if text and text != words.NOTHING]


def _quality(report: Report) -> dict[str, Any] | None:
    """What the page shows of the quality of the set."""
    found = report.calibration.quality
    if found is None:
        return None
    figures = {
        "coverage": quality.coverage_figure(found, "coverage"),
        "distance": quality.distance_figure(found, "distance"),
        "real": quality.real_figure(found, "real"),
    }
    return {
        "cards": quality.cards(found),
        "facts": quality.facts(found),
        "figures": {key: markupsafe.Markup(svg) if svg else None for key, svg in figures.items()},  # noqa: S704 - drawn by us
        "notes": found.notes,
    }


def _machine(report: Report) -> list[tuple[str, str]]:
    machine = dict(report.environment.machine)
    if isinstance(machine.get("memory_bytes"), int | float):
        machine["memory"] = words.bytes_text(machine.pop("memory_bytes"))
    rows = [(key.replace("_", " "), _value(value)) for key, value in machine.items()]
    rows.append(("threads", _value(report.environment.threads)))
    rows.append(("python", report.environment.python))
    rows += sorted(report.environment.versions.items())
    return [(key, text) for key, text in rows if text and text != words.NOTHING]


def render(report: Report, *, folder: Path | None = None) -> str:
    """The page as text.

    Args:
        report: What to show.
        folder: Where the report lies, for a picture that it names by its file.
    """
    environment = _environment()
    style = jinja2.PackageLoader("zsq_deploy.report", ".").get_source(environment, "report.css")[0]
    ranges = plots.range_bars(report.calibration.ranges, "ranges")
    return environment.get_template("report.html.j2").render(
        report=report,
        style=markupsafe.Markup(style),  # noqa: S704 - our own style sheet
        targets=[_target(report, name, target, index) for index, (name, target) in enumerate(report.targets.items())],
        lead=_lead(report),
        patterns=PATTERNS,
        facts=_facts(report),
        calibration_facts=_calibration_facts(report),
        parameters=_flat(report.calibration.parameters),
        picture=_picture(report, folder),
        quality=_quality(report),
        ranges=markupsafe.Markup(ranges) if ranges else None,  # noqa: S704 - drawn by us
        references=REFERENCES,
        machine=_machine(report),
        recipe=_flat(report.recipe),
    )


def write(report: Report, path: Path | str) -> None:
    """Write ``report.html``, atomically."""
    path = Path(path)
    text = render(report, folder=path.parent)
    with atomic_writer(path) as file:
        file.write(text.encode())
