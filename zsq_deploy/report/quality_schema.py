"""``calibration.quality`` and ``calibration.recommendation`` of the report: how good the calibration set is, and why it was made so."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from zsq_deploy.report.base import Amount, Count, Number, Section, Share

__all__ = ["Recommendation", "SetQuality"]


class WorstTensor(Section):
    """The tensor that is reached least."""

    name: str = Field(description="Value name.")
    share: Share = Field(description="Its share.")


class Coverage(Section):
    """How far the set excites the activations, against what the network and other images say (`docs/synthesis.md`)."""

    summary: Share | None = Field(
        None,
        description="Geometric mean over tensors of the reach of the set over the reach that the evidence shows, each at most 1.",
    )
    judged: Count = Field(0, description="Tensors that there is evidence for.")
    below_half: Count = Field(0, description="Tensors that are reached to less than a half.")
    worst: WorstTensor | None = Field(None, description="The tensor that is reached least.")
    unexcited: Share = Field(
        0.0,
        description="Share of all channels that never changed, without those that are constant by the network's own word.",
    )
    clipped: Share | None = Field(
        None, description="Share of the numbers of other images outside of the set's range, averaged over tensors."
    )
    excess_bits: Amount | None = Field(
        None, description="Bits by which ranges are wider than batch norm implies, averaged over tensors."
    )
    sigmas: Amount = Field(6.0, description="Reach that batch norm implies, in its standard deviations.")


class LayerDistance(Section):
    """One batch normalization."""

    name: str = Field(description="Node name.")
    channels: Count = Field(description="Number of channels.")
    mean: Amount = Field(description="Root mean square gap of the means, in stored standard deviations.")
    spread: Amount = Field(description="The same for standard deviations.")
    kl: Amount = Field(description="Kullback-Leibler divergence, mean over channels, in nats.")


class BatchNormDistance(Section):
    """Distance to the stored statistics, averaged over layers."""

    images: Count = Field(description="Number of images that were looked at.")
    mean: Amount = Field(description="Gap of the means, in stored standard deviations.")
    spread: Amount = Field(description="Gap of the standard deviations, in stored standard deviations.")
    kl: Amount = Field(description="Kullback-Leibler divergence in nats a channel.")
    layers: list[LayerDistance] = Field(default_factory=list, description="Layer by layer, in graph order.")


class Diversity(Section):
    """How different the images are, as the network sees them."""

    images: Count = Field(description="Number of images that were looked at.")
    feature: str = Field("", description="The value that was looked at: what enters the last layer with weights.")
    effective_images: Amount | None = Field(
        None, description="So many wholly different images would be as varied (Vendi score, cosine kernel)."
    )
    effective_directions: Amount | None = Field(
        None, description="Participation ratio of the covariance of the features."
    )
    mean_cosine: Number | None = Field(None, description="Mean cosine of two images.")
    classes: Count | None = Field(None, description="Classes of the network; `null` where it does not classify.")
    classes_seen: Count | None = Field(None, description="Classes that the float network gives to some image.")
    effective_classes: Amount | None = Field(None, description="Exponential of the entropy of the classes.")
    confidence: Share | None = Field(None, description="Mean probability of the class that float gives.")


class SetAgreement(Section):
    """The network in 8 bits with plain min-max ranges of this set, simulated, against float: an estimate."""

    images: Count = Field(description="Number of images: held-out synthetic ones.")
    top1: Share | None = Field(None, description="Share with the same class.")
    sqnr_db: Number = Field(description="Signal to quantization noise of the outputs.")


class WorstRange(Section):
    """A range that is far from that of real images."""

    name: str = Field(description="Value name.")
    extent_bits: Number = Field(description="log2 of its extent over the real one.")


class RealRanges(Section):
    """The set's ranges against real images. Only compared: nothing was chosen by it."""

    images: Count = Field(description="Number of real images.")
    extent_bits: Amount = Field(description="Mean absolute error of the extents in bits.")
    magnitude_bits: Amount = Field(description="Mean absolute error of the largest magnitudes in bits.")
    bias_bits: Number = Field(description="Mean error of the extents in bits; below 0: too narrow.")
    clipped: Share = Field(description="Share of real numbers outside of the set's ranges, averaged over tensors.")
    worst: list[WorstRange] = Field(default_factory=list, description="The ranges that are farthest off.")


class TensorQuality(Section):
    """One activation of the folded network."""

    name: str = Field(description="Value name.")
    share_implied: Amount | None = Field(None, description="Reach of the set over the reach that batch norm implies.")
    share_witnessed: Amount | None = Field(None, description="Reach of the set over that of other images.")
    clipped: Share | None = Field(None, description="Share of the numbers of other images outside of the set's range.")
    excess_bits: Amount | None = Field(None, description="Bits by which the range is wider than batch norm implies.")
    channels: Count = Field(description="Number of channels.")
    unexcited: Count = Field(0, description="Channels that never changed without being constant by the network's word.")
    real_extent_bits: Number | None = Field(None, description="log2 of the extent over that on real images.")
    real_magnitude_bits: Number | None = Field(None, description="log2 of the largest magnitude over the real one.")
    real_clipped: Share | None = Field(None, description="Share of real numbers outside of the set's range.")


class SetQuality(Section):
    """How good the calibration set is, as far as that can be read without real data."""

    images: Count = Field(description="Number of images of the set.")
    held_out: Count = Field(0, description="Images of the same kind that it was held against.")
    pictures: Count = Field(0, description="Structured pictures that it was held against.")
    coverage: Coverage = Field(description="Coverage of the activation ranges.")
    batch_norm: BatchNormDistance | None = Field(
        None, description="Distance to the batch-norm statistics; `null` without any."
    )
    diversity: Diversity = Field(description="Variety of the images.")
    agreement: SetAgreement | None = Field(None, description="Simulated 8-bit network against float.")
    real: RealRanges | None = Field(None, description="Against real images; `null` where none were given.")
    tensors: list[TensorQuality] = Field(default_factory=list, description="Tensor by tensor, in order of execution.")
    notes: list[str] = Field(default_factory=list, description="What a reader should know, one sentence each.")


class Recommendation(Section):
    """Why `--method auto` chose what it chose."""

    method: str = Field(description="The method.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters that differ from its defaults.")
    images: Count = Field(description="Number of images.")
    expected_seconds: Amount | None = Field(None, description="Expected time, scaled from the measured evidence.")
    reasons: list[str] = Field(default_factory=list, description="One sentence each.")
    candidates: list[dict[str, Any]] = Field(
        default_factory=list, description="The methods that were weighed, with the evidence for each."
    )
