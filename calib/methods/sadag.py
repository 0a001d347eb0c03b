"""SADAG's data generation (Dung et al., ICML 2024, arXiv 2510.07018, "Sharpness-Aware Data Generation for Zero-shot Quantization").

A quantized network ends in a flatter minimum when calibration images give the same gradient of its reconstruction loss as their neighbours do. Genie's images
calibrate a quantized student first. Then latents and generators are refined: batch-norm distance + (1 - the match of an image's gradient with that of the
image decoded a short way off, where it matches least) + how much an image's gradient agrees with that of the closest other image. Gradients are those of the last layer:
feature of the student times difference of the class scores of teacher and student.

Published values (the released code's script): Genie's 4,000 steps, a student by block reconstruction over 4,000 steps, then 500 steps with batches of 128: Adam,
step size 1e-5 on the latents (divided by 10 when the loss has not fallen for 100 steps, down to 1e-6) and 1e-4 on the generator, times 0.95 after each step; all
weights 1, radius 1; no swing convolution in the second part; finished batches stay among the "other images".

Deliberate deviations:

* the direction to the neighbour is the gradient of the product of un-normalised gradients, (f . f')(r . r'). The release normalises f and r first, and a unit vector's
  product with itself is 1 whatever the latents are: its gradient is 0 up to rounding errors, which the release then blows up to length `radius`;
* the student is rounded to the nearest (weights per channel, activations with the ranges of the first images, `student_weights` and `student_activations` bits; input and last
  layer's input 8 bits), not reconstructed: calibration images come before any reconstruction here, and rounding takes seconds;
* `steps` of the first part is Genie's default here (500), `refine_steps` is 100: after 100 steps the generator's step size is 0.6 % of what it was;
* images are clipped to valid pixels inside the loop (``clip``), as in :mod:`.genie`, whose other deviations hold as well;
* classes are not used, but class scores are: a network without them is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.methods import genie
from zsq_deploy.calib.parts.parametrisations import LatentImages, Start
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Exponential, Plateau
from zsq_deploy.calib.parts.student import quantized_student
from zsq_deploy.calib.parts.terms.diversity import GradientDiversity, remember_answers
from zsq_deploy.calib.parts.terms.match import NeighbourMatch

__all__ = ["DEFAULTS", "MEANINGS", "recipe"]

_PASSES = 4  # teacher and student, image and neighbour

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **genie.DEFAULTS,
        "refine_steps": 100,
        "refine_latent_rate": 1e-5,
        "refine_generator_rate": 1e-4,
        "radius": 1.0,
        "match_weight": 1.0,
        "diversity_weight": 1.0,
        "student_weights": 4,
        "student_activations": 4,
    }
)


#: What parameters of this method alone mean.
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "refine_steps": "steps of the second stage",
        "refine_latent_rate": "step size of the latents in it",
        "refine_generator_rate": "step size of the generator's weights in it",
        "radius": "how far off, in latents, the neighbour of an image is decoded",
        "match_weight": "weight of the mismatch between an image's gradient and its neighbour's",
        "diversity_weight": "weight of the agreement with the closest other image",
        "student_weights": "bits of the student's weights",
        "student_activations": "bits of the student's activations",
    }
)


def recipe(parameters: Mapping[str, Any]) -> tuple[Recipe, ...]:
    """SADAG's two stages with resolved `parameters` (see :data:`DEFAULTS`)."""

    def refined(start: Start) -> LatentImages:
        made = LatentImages(
            start.shape,
            start.generator,
            start.device,
            latent=parameters["latent"],
            upsamplings=parameters["upsamplings"],
        )
        prefix = "parameters."
        made.load({k.removeprefix(prefix): v for k, v in start.previous.items() if k.startswith(prefix)})
        return made

    first = replace(genie.recipe(parameters), passes=_PASSES)
    second = Recipe(
        loss=genie.LOSS,
        terms=(
            NeighbourMatch(parameters["match_weight"], parameters["radius"]),
            GradientDiversity(parameters["diversity_weight"]),
        ),
        parametrise=refined,
        groups={
            "latents": Group(parameters["refine_latent_rate"], schedule=Plateau(100, 0.1, 1e-6)),
            "generator": Group(parameters["refine_generator_rate"], schedule=Exponential(0.95, 1)),
        },
        steps=parameters["refine_steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
        prepare=quantized_student(parameters["student_weights"], parameters["student_activations"]),
        remember=remember_answers,
        follows=True,
    )
    return first, second
