"""How long and how fast is learned: the published schedule, and a short one, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zsq_deploy.errors import UsageError

__all__ = ["PRESETS", "Preset", "Tuning"]


@dataclass(frozen=True)
class Tuning:
    """The schedule of the last stage, in which all layers are tuned together on the outputs.

    Attributes:
        steps: Steps.
        batch: Images a step.
        code_lr: Adam's step for weights, in steps of their scale; 0: codes stay.
        weight_scale_lr: Adam's step for weight scales, as a share of them; 0: they stay.
        activation_scale_lr: Adam's step for activation scales, as a share of them; 0: they stay.
        bias_lr: Adam's step for biases, as a share of the largest product of the layer; 0: they stay.
        shifts: How many shifted copies of every colour picture take part beside it.
    """

    steps: int = 300
    batch: int = 32
    code_lr: float = 2e-3
    weight_scale_lr: float = 1e-3
    activation_scale_lr: float = 1e-3
    bias_lr: float = 1e-3
    shifts: int = 2


@dataclass(frozen=True)
class Preset:
    """A schedule of block reconstruction.

    Attributes:
        name: Short name.
        steps: Steps a block.
        batch: Images a step.
        rounding_lr: Adam's step for the rounding logits.
        weight_scale_lr: Adam's step for weight scales; 0: they stay.
        activation_scale_lr: Adam's step for activation scales; 0: they stay.
        bias_lr: Adam's step for biases, relative to the scale of the layer's output; 0: they stay.
        relative: Steps of scales are shares of the initial scale instead of absolute numbers.
        cosine_rounding: Adam's step for the logits falls to zero along half a cosine, too (those of the scales always do).
        regulariser: Weight of the rounding regulariser.
        warmup: Share of the steps without it.
        beta: Its exponent at the end of the warm-up and at the end, linear in between.
        drop: Share of elements that QDrop leaves unrounded, in the block's input and in each activation.
        clip_power: Exponent of the error that initial weight scales minimize.
        clip_candidates: Clip ratios that are tried for it.
        mirror: Colour pictures take part as they are and as their mirror images.
        tuning: What follows when all blocks are learned; ``None``: nothing.
    """

    name: str
    steps: int
    batch: int = 32
    rounding_lr: float = 1e-3
    weight_scale_lr: float = 1e-4
    activation_scale_lr: float = 4e-5
    bias_lr: float = 0.0
    relative: bool = False
    cosine_rounding: bool = False
    regulariser: float = 1.0
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    drop: float = 0.5
    clip_power: float = 2.4
    clip_candidates: int = 100
    mirror: bool = False
    tuning: Tuning | None = None

    @classmethod
    def of(cls, word: str | Preset) -> Preset:
        """The preset of that name.

        Raises:
            UsageError: There is none.
        """
        if isinstance(word, Preset):
            return word
        if word not in PRESETS:
            raise UsageError(
                f"there is no preset {word!r}", where="preset", remedy=f"choose one of {', '.join(PRESETS)}"
            )
        return PRESETS[word]


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("full", steps=20_000),
        Preset(
            "fast",
            steps=500,
            batch=16,
            rounding_lr=4e-2,
            weight_scale_lr=1e-2,
            activation_scale_lr=3e-3,
            relative=True,
            mirror=True,
            tuning=Tuning(),
        ),
    )
}
"""By name: `full` is the schedule of Genie's released code; `fast` takes a fortieth of its steps and tunes afterwards."""
