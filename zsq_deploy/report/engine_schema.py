"""What the report says of an engine: its files, how it was made, and which of its arithmetic is integer."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from zsq_deploy.report.base import Amount, Count, Number, Section, Share

__all__ = [
    "AccuracyControl",
    "Candidate",
    "EngineSection",
    "FileInfo",
    "IntegerSection",
    "Island",
    "Kernel",
    "ReturnedLayer",
]


class Candidate(Section):
    """One way to build the engine that was tried."""

    name: str = Field(description="What it is, in a few words.")
    chosen: bool = Field(False, description="This is the engine.")
    median_ms: Amount | None = Field(None, description="Median latency when it was tried.")
    sqnr_db: Number | None = Field(None, description="SQNR of its outputs against float on synthetic images.")
    agreement: Share | None = Field(None, description="Agreement with float on synthetic images.")
    macs_share: Share | None = Field(None, description="Share of multiply-accumulates in integer kernels.")
    bytes: Count | None = Field(None, description="File size.")
    reason: str = Field("", description="Why it was taken or left.")


class FileInfo(Section):
    """A file beside the report."""

    path: str = Field(description="Path, relative to the report.")
    bytes: Count = Field(description="Size.")
    sha256: str = Field("", description="Digest of its content.")


class ReturnedLayer(Section):
    """A layer that accuracy control returned to float."""

    node: str = Field(description="Its name in the network.")
    reason: str = Field(description="Why.")


class AccuracyControl(Section):
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


class Kernel(Section):
    """All executed nodes of one kernel."""

    op: str = Field(description="Kernel name, as the runtime gives it.")
    integer: bool = Field(description="Its arithmetic is integer.")
    nodes: Count = Field(description="How many nodes were executed.")
    macs: Count = Field(description="Their multiply-accumulates at batch 1.")
    microseconds: Amount = Field(description="Their time together.")


class Island(Section):
    """A node that ran in float arithmetic."""

    node: str = Field(description="The runtime's node name.")
    op: str = Field(description="Kernel name.")
    macs: Count = Field(description="Multiply-accumulates at batch 1.")
    microseconds: Amount = Field(description="Mean time of one execution.")
    reason: str = Field(description="Why it is not an integer kernel.")
    sources: list[str] = Field(default_factory=list, description="Nodes of the engine's graph that it stands for.")


class IntegerSection(Section):
    """The share of the work that ran in integer kernels, from what the runtime executed."""

    macs_share: Share | None = Field(None, description="Share of multiply-accumulates in integer kernels.")
    time_share: Share | None = Field(None, description="Share of kernel time in integer kernels.")
    macs: Count | None = Field(None, description="Multiply-accumulates of one inference at batch 1.")
    integer_macs: Count | None = Field(None, description="Those in integer kernels.")
    microseconds: Amount | None = Field(None, description="Time of all kernels of one inference.")
    kernels: list[Kernel] = Field(default_factory=list, description="The work by kernel, longest time first.")
    float_islands: list[Island] = Field(default_factory=list, description="Nodes that ran in float, and why.")
    source: str = Field("", description="Where this is known from (the runtime's profile).")
