"""What the report says of an engine's outputs: against its references, tensor by tensor, and their quality on the evaluation data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from zsq_deploy.report.base import Amount, Count, Number, Section, Share

__all__ = [
    "AccuracySection",
    "DivergenceSection",
    "Flip",
    "Histogram",
    "PairedRow",
    "ParityNumbers",
    "ParitySection",
    "TensorRow",
]


class Histogram(Section):
    """Signed differences, engine minus reference, in whole LSB."""

    lsb: list[int] = Field(description="Bin centres; bin 0 holds differences of at most half a step.")
    counts: list[Count] = Field(description="Output elements in each bin.")
    below: Count = Field(0, description="Elements below the first bin, or not comparable (NaN on one side).")
    above: Count = Field(0, description="Elements above the last bin.")


class ParityNumbers(Section):
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


class TensorRow(Section):
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


class Flip(Section):
    """One sample followed from its first differing tensor to the output."""

    sample: Count = Field(description="Number of the sample.")
    start: str = Field(description="Where it first differs.")
    names: list[str] = Field(description="Tensors from there on.")
    differing: list[Count] = Field(description="Differing elements in each.")
    elements: list[Count] = Field(description="Elements of each.")
    max_lsb: list[Number | None] = Field(default_factory=list, description="Largest difference in each, in its steps.")


class DivergenceSection(Section):
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


class PairedRow(Section):
    """Float and one quantized form on the same labelled samples."""

    difference: Number = Field(description="Accuracy of the form minus that of float, a share; negative: worse.")
    standard_error: Amount = Field(description="Of that difference, from the paired samples.")
    lost: Count = Field(description="Samples that float gets right and the form wrong.")
    gained: Count = Field(description="Samples that float gets wrong and the form right.")
    p_value: Share = Field(description="McNemar's exact two-sided test.")


class AccuracySection(Section):
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
