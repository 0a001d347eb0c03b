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
from zsq_deploy.report.base import Amount, Count, Number, Share
from zsq_deploy.report.base import Section as _Section
from zsq_deploy.report.device_schema import DeviceSection
from zsq_deploy.report.quality_schema import Recommendation, SetQuality

__all__ = [
    "SCHEMA_VERSION",
    "AccuracyControl",
    "AccuracySection",
    "BaselineRow",
    "CalibrationSection",
    "Candidate",
    "DeviceSection",
    "DivergenceSection",
    "EngineSection",
    "EnvironmentSection",
    "EvaluationSection",
    "GateRow",
    "Histogram",
    "IntegerSection",
    "LatencyNumbers",
    "LatencySection",
    "LayerRange",
    "ModelSection",
    "ParityNumbers",
    "ParitySection",
    "Preview",
    "Report",
    "ReturnedLayer",
    "TargetSection",
    "Verdict",
    "json_schema",
    "load",
    "parse",
    "save",
]

SCHEMA_VERSION = 1


class Tool(_Section):
    """What wrote the report."""

    name: str = Field("zsq-deploy", description="Name of the program.")
    version: str = Field(description="Its version.")


class TensorInfo(_Section):
    """One input or output of the network."""

    name: str = Field(description="Name in the graph.")
    shape: list[int | None] = Field(description="Shape; `null` for a dynamic dimension.")
    dtype: str = Field("float32", description="Element type.")


class ModelSection(_Section):
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


class Preview(_Section):
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


class LayerRange(_Section):
    """The range of one tensor, as found on the calibration set."""

    name: str = Field(description="Value name in the graph.")
    op: str = Field("", description="Operator that makes it.")
    low: Number = Field(description="Low end that the quantizer was given.")
    high: Number = Field(description="High end that the quantizer was given.")
    seen_low: Number | None = Field(None, description="Smallest value that was seen.")
    seen_high: Number | None = Field(None, description="Largest value that was seen.")
    unexcited_channels: Count = Field(0, description="Channels whose activation never changed on the calibration set.")


class CalibrationSection(_Section):
    """The calibration set and the ranges found on it."""

    method: str = Field(description="Synthesis method, `zeroq`, `genie`, `gaussian`, ..., or `real`.")
    images: Count = Field(description="Number of images; 0 for a method without images (`bn-analytic`).")
    seconds: Amount = Field(description="Wall-clock seconds that making the set took.")
    peak_rss_bytes: Count | None = Field(None, description="Largest resident memory while the set was made.")
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


class EvaluationSection(_Section):
    """What the accuracy and parity figures were measured on."""

    kind: Literal["labelled", "unlabelled", "synthetic", "none"] = Field(
        description="`labelled`: the user's labelled data; `unlabelled`: the user's data without labels; `synthetic`: "
        "held-out synthetic images, so that the figures are estimates; `none`: nothing was evaluated."
    )
    estimate: bool = Field(description="The figures are estimates, because no labelled data were given.")
    images: Count = Field(0, description="Number of samples.")
    source: str = Field("", description="Where they came from, as the user said it.")
    note: str = Field("", description="A sentence for a reader.")


class Candidate(_Section):
    """One way to build the engine that was tried."""

    name: str = Field(description="What it is, in a few words.")
    chosen: bool = Field(False, description="This is the engine.")
    median_ms: Amount | None = Field(None, description="Median latency when it was tried.")
    sqnr_db: Number | None = Field(None, description="SQNR of its outputs against float on synthetic images.")
    agreement: Share | None = Field(None, description="Agreement with float on synthetic images.")
    macs_share: Share | None = Field(None, description="Share of multiply-accumulates in integer kernels.")
    bytes: Count | None = Field(None, description="File size.")
    reason: str = Field("", description="Why it was taken or left.")


class FileInfo(_Section):
    """A file beside the report."""

    path: str = Field(description="Path, relative to the report.")
    bytes: Count = Field(description="Size.")
    sha256: str = Field("", description="Digest of its content.")


class ReturnedLayer(_Section):
    """A layer that accuracy control returned to float."""

    node: str = Field(description="Its name in the network.")
    reason: str = Field(description="Why.")


class AccuracyControl(_Section):
    """What accuracy control measured, and what it returned to float."""

    metric: str = Field(description="What was measured, and on which images.")
    samples: Count | None = Field(None, description="Number of samples or batches.")
    max_drop: Amount | None = Field(None, description="Largest drop that was allowed.")
    drop_type: str = Field("absolute", description="How the drop counts: `absolute` or `relative`.")
    float_: Number | None = Field(None, alias="float", description="The metric of the float network.")
    quantized: Number | None = Field(None, description="The metric with everything quantized.")
    final: Number | None = Field(None, description="The metric in the end.")
    reached: bool | None = Field(None, description="The allowed drop is kept.")
    returned_to_float: list[ReturnedLayer] = Field(default_factory=list, description="Layers that went back to float.")


class EngineSection(FileInfo):
    """The engine file and how it was made."""

    path: str = Field(description="The file that the runtime loads, relative to the report.")
    bytes: Count = Field(description="Size of what is shipped: the file, and its weights where they are kept apart.")
    quantizer: str = Field("", description="Who quantized: `onnxruntime`, `qdq` (our Q/DQ graph), `nncf`, `pot`.")
    weights: FileInfo | None = Field(None, description="The file of the weights, where the runtime keeps them apart.")
    vendor: FileInfo | None = Field(
        None, description="The engine as the vendor's quantizer wrote it, kept beside ours."
    )
    accuracy_control: AccuracyControl | None = Field(
        None, description="Accuracy control, where a quantizer was asked for it."
    )
    qdq_path: str | None = Field(None, description="The Q/DQ graph that says what the engine computes.")
    choices: dict[str, Any] = Field(
        default_factory=dict,
        description="How it was built: quantized operators, exclusions, range method, bias correction.",
    )
    candidates: list[Candidate] = Field(default_factory=list, description="What was tried, the engine included.")
    seconds: Amount | None = Field(None, description="Seconds that building took.")


class Kernel(_Section):
    """All executed nodes of one kernel."""

    op: str = Field(description="Kernel name, as the runtime gives it.")
    integer: bool = Field(description="Its arithmetic is integer.")
    nodes: Count = Field(description="How many nodes were executed.")
    macs: Count = Field(description="Their multiply-accumulates at batch 1.")
    microseconds: Amount = Field(description="Their time together.")


class Island(_Section):
    """A node that ran in float arithmetic."""

    node: str = Field(description="The runtime's node name.")
    op: str = Field(description="Kernel name.")
    macs: Count = Field(description="Multiply-accumulates at batch 1.")
    microseconds: Amount = Field(description="Mean time of one execution.")
    reason: str = Field(description="Why it is not an integer kernel.")
    sources: list[str] = Field(default_factory=list, description="Nodes of the engine's graph that it stands for.")


class IntegerSection(_Section):
    """The share of the work that ran in integer kernels, from what the runtime executed."""

    macs_share: Share | None = Field(None, description="Share of multiply-accumulates in integer kernels.")
    time_share: Share | None = Field(None, description="Share of kernel time in integer kernels.")
    macs: Count | None = Field(None, description="Multiply-accumulates of one inference at batch 1.")
    integer_macs: Count | None = Field(None, description="Those in integer kernels.")
    microseconds: Amount | None = Field(None, description="Time of all kernels of one inference.")
    kernels: list[Kernel] = Field(default_factory=list, description="The work by kernel, longest time first.")
    float_islands: list[Island] = Field(default_factory=list, description="Nodes that ran in float, and why.")
    source: str = Field("", description="Where this is known from (the runtime's profile).")


class Histogram(_Section):
    """Signed differences, engine minus reference, in whole LSB."""

    lsb: list[int] = Field(description="Bin centres; bin 0 holds differences of at most half a step.")
    counts: list[Count] = Field(description="Output elements in each bin.")
    below: Count = Field(0, description="Elements below the first bin, or not comparable (NaN on one side).")
    above: Count = Field(0, description="Elements above the last bin.")


class ParityNumbers(_Section):
    """The engine's outputs against those of one reference.

    One LSB is the output's quantization step: its scale where it is quantized, its calibrated range / 255 where it is float.
    """

    images: Count | None = Field(None, description="Number of samples compared.")
    elements: Count | None = Field(None, description="Number of output elements compared.")
    step: Number | None = Field(
        None, description="One LSB in the output's unit; `null` in a summary of several outputs."
    )
    equal_share: Share | None = Field(None, description="Share of elements that are equal bit for bit.")
    within_half_lsb: Share | None = Field(None, description="Share of elements within half an LSB.")
    within_1_lsb: Share | None = Field(None, description="Share of elements within 1 LSB.")
    within_2_lsb: Share | None = Field(None, description="Share of elements within 2 LSB.")
    max_lsb: Amount | None = Field(None, description="Largest difference in LSB.")
    mean_lsb: Amount | None = Field(None, description="Mean absolute difference in LSB.")
    sqnr_db: Number | None = Field(
        None, description="Signal to quantization noise ratio; 320 where nothing differs; the worst of several outputs."
    )
    cosine: Number | None = Field(None, description="Cosine similarity; the worst of several outputs.")
    non_finite: Count | None = Field(None, description="Elements that are NaN or infinite on one side only.")
    histogram: Histogram | None = Field(None, description="Signed differences in LSB.")
    top1_agreement: Share | None = Field(
        None, description="Share of samples with the same largest class, ties held against the engine."
    )
    top1_agreement_but_ties: Share | None = Field(None, description="The same, ties not held against the engine.")
    near_ties: Count | None = Field(None, description="Samples whose two largest reference scores are within 1 LSB.")
    tie_disagreements: Count | None = Field(
        None, description="Samples with another class that is within 1 LSB of the largest in the reference."
    )
    disagreements: Count | None = Field(None, description="Samples with another class that is no such tie.")
    outputs: dict[str, ParityNumbers] = Field(default_factory=dict, description="Each output by name, same keys.")


class TensorRow(_Section):
    """One tensor compared in two executions."""

    name: str = Field(description="Value name in the graph.")
    index: Count = Field(0, description="Place in topological order, from 0.")
    elements: Count | None = Field(None, description="Compared numbers.")
    samples_differing: Count | None = Field(None, description="Samples with at least one differing element.")
    differing_share: Share | None = Field(None, description="Share of elements whose codes differ.")
    max_lsb: Amount | None = Field(None, description="Largest difference in the tensor's own steps.")
    mean_lsb: Amount | None = Field(None, description="Mean absolute difference in the tensor's own steps.")
    max_abs: Amount | None = Field(None, description="Largest difference in the tensor's unit.")
    sqnr_db: Number | None = Field(None, description="Signal to noise ratio; 320 where nothing differs.")


class Flip(_Section):
    """One sample followed from its first differing tensor to the output."""

    sample: Count = Field(description="Number of the sample.")
    start: str = Field(description="Where it first differs.")
    names: list[str] = Field(description="Tensors from there on.")
    differing: list[Count] = Field(description="Differing elements in each.")
    elements: list[Count] = Field(description="Elements of each.")
    max_lsb: list[Number | None] = Field(default_factory=list, description="Largest difference in each, in its steps.")


class DivergenceSection(_Section):
    """Where the engine and a reference part, tensor by tensor."""

    against: str = Field("reference", description="Which reference: `reference`, `integer` or `unfused`.")
    images: Count | None = Field(None, description="Number of samples.")
    first: str | None = Field(None, description="First differing tensor; `null` if none differs.")
    tensors: list[TensorRow] = Field(default_factory=list, description="All tensors in topological order.")
    flip: Flip | None = Field(None, description="How one rounding flip grew.")


class ParitySection(ParityNumbers):
    """The engine against its four references; the keys at the top are those against the fake-quant twin."""

    integer: ParityNumbers | None = Field(None, description="Against exact integer arithmetic.")
    unfused: ParityNumbers | None = Field(None, description="Against the same file with the runtime's fusion off.")
    float_: ParityNumbers | None = Field(None, alias="float", description="Against the float network.")
    divergence: DivergenceSection | None = Field(None, description="Where the engine and a reference part.")


class PairedRow(_Section):
    """Float and one quantized form on the same labelled samples."""

    difference: Number = Field(description="Accuracy of the form minus that of float, a share; negative: worse.")
    standard_error: Amount = Field(description="Of that difference, from the paired samples.")
    lost: Count = Field(description="Samples that float gets right and the form wrong.")
    gained: Count = Field(description="Samples that float gets wrong and the form right.")
    p_value: Share = Field(description="McNemar's exact two-sided test.")


class AccuracySection(_Section):
    """Quality on the evaluation data."""

    metric: Literal["top1", "agreement_with_float", "psnr_db", "sqnr_db"] = Field(
        "top1",
        description="`top1`: share of right classes on labelled data. `agreement_with_float`: share of samples with the class "
        "that float gives, an estimate without labels. `psnr_db`: mean PSNR against targets. `sqnr_db`: SQNR against float.",
    )
    float_: Number | None = Field(None, alias="float", description="The float network.")
    reference: Number | None = Field(None, description="The fake-quant twin.")
    engine: Number | None = Field(None, description="The engine.")
    others: dict[str, Number] = Field(default_factory=dict, description="Further forms by name.")
    images: Count = Field(description="Number of samples.")
    estimate: bool = Field(False, description="No labels were given: an estimate.")
    standard_error: Amount | None = Field(None, description="Standard error of the float accuracy.")
    agreement_with_float: dict[str, Share] = Field(
        default_factory=dict, description="Share of samples on which a form decides as float does, by form."
    )
    paired: dict[str, PairedRow] = Field(default_factory=dict, description="Paired comparison with float, by form.")


class LatencyNumbers(_Section):
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


class LatencySection(_Section):
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


class GateRow(_Section):
    """One limit that was demanded."""

    name: str = Field(description="Name of the gate, `min_agreement`.")
    target: str = Field("", description="Target that it was checked on.")
    limit: Number = Field(description="What was demanded.")
    value: Number | None = Field(
        None, description="What was measured; `null` if it was not, and then the gate has failed."
    )
    passed: bool = Field(description="Whether it is kept.")
    text: str = Field("", description="One sentence.")


class TargetSection(_Section):
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


class BaselineRow(_Section):
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


class EnvironmentSection(_Section):
    """Where the figures were measured."""

    machine: dict[str, Any] = Field(
        default_factory=dict, description="CPU, its flags, cores, governor, load average, memory, operating system."
    )
    python: str = Field("", description="Version of Python.")
    versions: dict[str, str] = Field(default_factory=dict, description="Versions of the libraries that took part.")
    threads: Count | None = Field(None, description="Threads that the runners were given.")
    command: str = Field("", description="The command that made the report.")


class Verdict(_Section):
    """What the gates say together."""

    passed: bool | None = Field(None, description="All gates are kept; `null` if none was demanded.")
    text: str = Field("", description="One sentence.")


class Report(_Section):
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
