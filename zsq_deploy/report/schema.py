"""The report as data: ``report.json``, schema version 1.

Everything that the HTML page and the terminal show is drawn from here, so whoever reads the file with a program sees what a
person sees. Conventions:

* Shares are 0 to 1. Units are in the names: ``_ms``, ``_bytes``, ``_db``, ``_lsb``, ``seconds``.
* ``null`` means "not measured"; why stands under ``not_measured`` of the target, by the path of the key.
* Keys are only added within a schema version, never renamed and never removed.

The page ``docs/report.md`` and the JSON schema are written from the descriptions here (``python -m
zsq_deploy.report.describe``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from zsq_deploy.artifact import read_json, write_json
from zsq_deploy.errors import StaleArtifactError, ZsqError
from zsq_deploy.report.base import Amount, Count, Number, Section, Share
from zsq_deploy.report.device_schema import DeviceSection
from zsq_deploy.report.engine_schema import EngineSection, FileInfo, IntegerSection
from zsq_deploy.report.parity_schema import AccuracySection, ParitySection, TensorRow
from zsq_deploy.report.quality_schema import Recommendation, SetQuality

__all__ = [
    "SCHEMA_VERSION",
    "BaselineRow",
    "CalibrationSection",
    "EnvironmentSection",
    "EvaluationSection",
    "GateRow",
    "LatencyNumbers",
    "LatencySection",
    "LayerRange",
    "ModelSection",
    "Preview",
    "Report",
    "TargetSection",
    "Verdict",
    "json_schema",
    "load",
    "parse",
    "save",
]

SCHEMA_VERSION = 1


class Tool(Section):
    """What wrote the report."""

    name: str = Field("zsq-deploy", description="Name of the program.")
    version: str = Field(description="Its version.")


class TensorInfo(Section):
    """One input or output of the network."""

    name: str = Field(description="Name in the graph.")
    shape: list[int | None] = Field(description="Shape; `null` for a dynamic dimension.")
    dtype: str = Field("float32", description="Element type.")


class ModelSection(Section):
    """The network that was deployed."""

    name: str = Field(description="Short name.")
    source: str = Field("", description="Where it came from, as the user said it.")
    digest: str = Field("", description="SHA-256 of the cleaned graph.")
    inputs: list[TensorInfo] = Field(default_factory=list, description="Graph inputs.")
    outputs: list[TensorInfo] = Field(default_factory=list, description="Graph outputs.")
    nodes: Count | None = Field(None, description="Number of nodes of the cleaned graph.")
    parameters: Count | None = Field(None, description="Number of trained parameters.")
    macs: Count | None = Field(None, description="Multiply-accumulates of one inference at batch 1.")
    batch_norms: Count | None = Field(None, description="Number of batch-norm layers with statistics.")
    operators: dict[str, int] = Field(default_factory=dict, description="Number of nodes by operator.")
    preprocess: dict[str, Any] = Field(default_factory=dict, description="Image to input: `mean`, `std`, `raw_pixels`.")


class Preview(Section):
    """A picture of calibration images."""

    data_uri: str | None = Field(
        None,
        description="The picture itself, as a `data:image/png;base64,` URI.",
        pattern=r"^data:image/(png|jpeg);base64,",
    )
    file: str | None = Field(None, description="Or its file, relative to the report.")
    images: Count = Field(description="How many images it shows.")
    columns: Count = Field(1, description="How many stand in one row.")
    caption: str = Field("", description="What is shown.")


class LayerRange(Section):
    """The range of one tensor, as found on the calibration set."""

    name: str = Field(description="Value name in the graph.")
    op: str = Field("", description="Operator that makes it.")
    low: Number = Field(description="Low end that the quantizer was given.")
    high: Number = Field(description="High end that the quantizer was given.")
    seen_low: Number | None = Field(None, description="Smallest value that was seen.")
    seen_high: Number | None = Field(None, description="Largest value that was seen.")
    unexcited_channels: Count = Field(0, description="Channels whose activation never changed on the calibration set.")


class CalibrationSection(Section):
    """The calibration set and the ranges found on it."""

    method: str = Field(description="Synthesis method, `zeroq`, `genie`, `gaussian`, ..., or `real`.")
    images: Count = Field(description="Number of images; 0 for a method without images (`bn-analytic`).")
    seconds: Amount = Field(description="Wall-clock seconds that making the set took.")
    peak_rss_bytes: Count | None = Field(
        None, description="Largest resident memory while the set was made, that of all worker processes together."
    )
    peak_gpu_bytes: Count | None = Field(
        None, description="Most memory that was held on one GPU meanwhile; `null` on a CPU."
    )
    device: str = Field("", description="Where it was made, `cpu` or `cuda`.")
    seed: int | None = Field(None, description="Seed; the same seed on the same device gives the same set.")
    digest: str = Field("", description="Digest of the set.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="All parameters of the method.")
    preview: Preview | None = Field(None, description="A picture of some of the images.")
    range_method: str = Field("", description="How ranges were chosen: `minmax`, `percentile`, `entropy`, `mse`, ...")
    ranges_seconds: Amount | None = Field(None, description="Seconds that collecting the ranges took.")
    ranges: list[LayerRange] = Field(default_factory=list, description="Ranges in topological order.")
    quality: SetQuality | None = Field(
        None, description="How good the set is, read without real data; `null` for a method without images."
    )
    recommendation: Recommendation | None = Field(
        None, description="Why `auto` chose this method; `null` where the user chose it."
    )
    notes: list[str] = Field(default_factory=list, description="What a reader should know, one sentence each.")


class EvaluationSection(Section):
    """What the accuracy and parity figures were measured on."""

    kind: Literal["labelled", "unlabelled", "synthetic", "none"] = Field(
        description="`labelled`: the user's labelled data; `unlabelled`: the user's data without labels; `synthetic`: "
        "held-out synthetic images, so that the figures are estimates; `none`: nothing was evaluated."
    )
    estimate: bool = Field(description="The figures are estimates, because no labelled data were given.")
    images: Count = Field(0, description="Number of samples.")
    source: str = Field("", description="Where they came from, as the user said it.")
    note: str = Field("", description="A sentence for a reader.")


class LatencyNumbers(Section):
    """Times of one runner."""

    median_ms: Amount | None = Field(None, description="Median.")
    p90_ms: Amount | None = Field(None, description="90th percentile.")
    p95_ms: Amount | None = Field(None, description="95th percentile.")
    p99_ms: Amount | None = Field(None, description="99th percentile.")
    iqr_ms: Amount | None = Field(
        None, description="Spread: 75th minus 25th percentile; the middle half of the runs lies within it."
    )
    mean_ms: Amount | None = Field(None, description="Mean.")
    min_ms: Amount | None = Field(None, description="Fastest run.")
    first_ms: Amount | None = Field(None, description="First run after loading, in a fresh process.")
    load_ms: Amount | None = Field(None, description="Loading the model, in a fresh process.")
    runs: Count | None = Field(None, description="Number of timed runs.")
    threads: Count | None = Field(None, description="Threads.")
    batch: Count | None = Field(None, description="Samples in one run.")
    peak_rss_bytes: Count | None = Field(
        None, description="Largest resident memory of the process, interpreter included."
    )
    added_rss_bytes: int | None = Field(None, description="By how much loading and the first run raised that peak.")
    mode: str = Field("", description="What was run, in words.")
    device_median_ms: Amount | None = Field(
        None,
        description="Median of the time that the accelerator alone worked, without copies and without Python, where the runtime tells it.",
    )
    device_p90_ms: Amount | None = Field(None, description="90th percentile of that time.")
    device_p99_ms: Amount | None = Field(None, description="99th percentile of that time.")


class LatencySection(Section):
    """The engine and its float baselines, measured side by side in interleaved rounds."""

    engine: LatencyNumbers | None = Field(None, description="The engine.")
    float32: LatencyNumbers | None = Field(None, description="The float network, fp32 forced.")
    float_best: LatencyNumbers | None = Field(None, description="The float network in the device's fastest float mode.")
    speedup: Amount | None = Field(None, description="Median of float32 / median of engine.")
    speedup_low: Amount | None = Field(None, description="10th percentile of that ratio over the rounds.")
    speedup_high: Amount | None = Field(None, description="90th percentile of that ratio over the rounds.")
    speedup_over_best: Amount | None = Field(None, description="Median of float_best / median of engine.")
    rounds: Count | None = Field(None, description="Interleaved rounds.")
    others: dict[str, LatencyNumbers] = Field(default_factory=dict, description="Further runners, by name.")
    what: str = Field("", description="What one timed run contains.")


class GateRow(Section):
    """One limit that was demanded."""

    name: str = Field(description="Name of the gate, `min_agreement`.")
    target: str = Field("", description="Target that it was checked on.")
    limit: Number = Field(description="What was demanded.")
    value: Number | None = Field(
        None, description="What was measured; `null` if it was not, and then the gate has failed."
    )
    passed: bool = Field(description="Whether it is kept.")
    text: str = Field("", description="One sentence.")


class TargetSection(Section):
    """One deployment target."""

    runtime: str = Field("", description="Runtime, `onnxruntime`.")
    runtime_version: str = Field("", description="Its version.")
    summary: str = Field("", description="What the target is.")
    activation: str = Field("", description="Scheme of activations.")
    weight: str = Field("", description="Scheme of weights.")
    device: dict[str, Any] = Field(
        default_factory=dict,
        description="What the runtime says of the device that it was measured on: name, precisions, properties of the session.",
    )
    engine: EngineSection = Field(description="The engine file.")
    float_model: FileInfo | None = Field(None, description="The float network as a file, batch norm folded.")
    integer: IntegerSection = Field(
        default_factory=lambda: IntegerSection.model_validate({}), description="Integer kernels."
    )
    parity: ParitySection = Field(
        default_factory=lambda: ParitySection.model_validate({}), description="The engine against its references."
    )
    accuracy: AccuracySection | None = Field(None, description="Quality on the evaluation data.")
    latency: LatencySection = Field(
        default_factory=lambda: LatencySection.model_validate({}), description="Times, side by side with float."
    )
    layers: list[TensorRow] = Field(
        default_factory=list, description="SQNR of every tensor of the quantized twin against the float twin."
    )
    devices: dict[str, DeviceSection] = Field(
        default_factory=dict, description="The engine on devices, by their names (`zsq bench --device`)."
    )
    not_measured: dict[str, str] = Field(
        default_factory=dict, description="Why a figure is `null`, by its path within the target, `parity.integer`."
    )
    notes: list[str] = Field(default_factory=list, description="What a reader should know, one sentence each.")


class BaselineRow(Section):
    """The same job with another calibration set, measured in the same way."""

    method: str = Field(description="Calibration method.")
    target: str = Field("", description="Deployment target.")
    images: Count | None = Field(None, description="Number of calibration images.")
    seconds: Amount | None = Field(None, description="Seconds that making the set took.")
    metric: str = Field("top1", description="As in `accuracy.metric`.")
    engine: Number | None = Field(None, description="Quality of the engine.")
    agreement: Share | None = Field(None, description="Agreement of the engine with float.")
    sqnr_db: Number | None = Field(None, description="SQNR of the engine's outputs against float.")
    note: str = Field("", description="What a reader should know.")


class EnvironmentSection(Section):
    """Where the figures were measured."""

    machine: dict[str, Any] = Field(
        default_factory=dict, description="CPU, its flags, cores, governor, load average, memory, operating system."
    )
    python: str = Field("", description="Version of Python.")
    versions: dict[str, str] = Field(default_factory=dict, description="Versions of the libraries that took part.")
    threads: Count | None = Field(None, description="Threads that the runners were given.")
    command: str = Field("", description="The command that made the report.")


class Verdict(Section):
    """What the gates say together."""

    passed: bool | None = Field(None, description="All gates are kept; `null` if none was demanded.")
    text: str = Field("", description="One sentence.")


class Report(Section):
    """``report.json``."""

    schema_version: Literal[1] = Field(1, description="Version of this schema.")
    tool: Tool = Field(description="What wrote the report.")
    created: str = Field("", description="When, ISO 8601 with time zone.")
    seconds: Amount | None = Field(None, description="Wall-clock seconds of the whole run.")
    model: ModelSection = Field(description="The network.")
    calibration: CalibrationSection = Field(description="The calibration set and the ranges found on it.")
    evaluation: EvaluationSection = Field(
        default_factory=lambda: EvaluationSection.model_validate({"kind": "none", "estimate": False}),
        description="What was evaluated on.",
    )
    targets: dict[str, TargetSection] = Field(description="The deployment targets, by name.")
    baselines: list[BaselineRow] = Field(default_factory=list, description="Other calibration sets beside this one.")
    gates: list[GateRow] = Field(default_factory=list, description="Demanded limits and whether they are kept.")
    verdict: Verdict = Field(default_factory=lambda: Verdict.model_validate({}), description="The gates together.")
    environment: EnvironmentSection = Field(
        default_factory=lambda: EnvironmentSection.model_validate({}), description="Where it was measured."
    )
    recipe: dict[str, Any] = Field(default_factory=dict, description="The resolved recipe that repeats the run.")
    notes: list[str] = Field(default_factory=list, description="What a reader should know, one sentence each.")

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value, with the keys of the schema."""
        value: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return value


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of ``report.json``."""
    schema = Report.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def parse(value: Any, *, where: str = "report") -> Report:
    """A JSON value as a report.

    Raises:
        StaleArtifactError: The schema version is not one that this program reads.
        ZsqError: The value is no report.
    """
    if not isinstance(value, Mapping) or "schema_version" not in value:
        raise ZsqError(
            "this is not a report: it has no schema_version",
            where=where,
            remedy="give the report.json that 'zsq deploy' or 'zsq verify' wrote",
        )
    version = value["schema_version"]
    if version != SCHEMA_VERSION:
        raise StaleArtifactError(
            f"the report has schema version {version!r}, and this program reads version {SCHEMA_VERSION}",
            where=where,
            remedy="make the report again with this version of zsq, or read it with the one that wrote it",
        )
    try:
        return Report.model_validate(value)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
        shown = [f"{'.'.join(str(part) for part in p['loc'])}: {p['msg']}" for p in problems[:5]]
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ZsqError(
            "the report does not follow its schema: " + "; ".join(shown) + more,
            where=where,
            remedy="make the report again; a report that was edited by hand has to keep to docs/report.md",
        ) from error


def load(path: Path | str) -> Report:
    """Read and check a ``report.json``.

    Raises:
        ZsqError: The file is missing, is no JSON, or is no report of a known version.
    """
    path = Path(path)
    return parse(read_json(path), where=str(path))


def save(report: Report, path: Path | str) -> None:
    """Write ``report.json``, atomically."""
    write_json(Path(path), report.to_json())
