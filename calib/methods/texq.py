"""TexQ's data synthesis (Chen et al., NeurIPS 2023, "Zero-shot Network Quantization with Texture Feature Distribution Calibration").

Three stages. One calibration image of every class is optimised towards its class, towards batch-norm statistics that are relaxed in shallow layers and
tightened in deep ones, and towards a calibrated distribution of Laws' texture energies: the statistics these images leave together are the
calibration centre. Then a conditional generator learns to make images of any class with the statistics stored in training, and in deep layers with those of
the centre. Last, the images are drawn from it.

The authors' repository is a promise without code, and the paper's text could not be read. Second-hand facts (summaries, SynQ's paper and SynQ's released
re-implementation of the centres): one image a class, 1,500 steps, constant step size 0.05; cross entropy times 5, squared gaps of
mean and biased variance, mean over channels and layers, times 0.2 in the shallow half and 1.1 in the deep one; nine Laws filters with thresholds 0.3, 0.5 and
0.015; generator of GDFQ's family, Adam with step size 1e-3 (betas 0.5 and 0.999), a tenth after each quarter of 80,000 steps.

Deliberate deviations:

* the formula of the texture loss is ours (see :class:`~zsq_deploy.calib.parts.terms.texture.TextureShares`); its three thresholds are the published ones, and so
  understood the project's fractal pictures fulfil them on average;
* at most `centres` (100) classes get a calibration image: with 1,000 classes the centre would cost more than the set;
* all centres count together, as in SynQ's code, not class by class;
* weights of the generator's loss (stored statistics, centre, classes: 1 each, as in AdaDFQ for the first and last) are ours;
* the generator conditions by product up to 100 classes and by batch norms beyond, as GDFQ does for CIFAR and ImageNet; from 64 pixels on it starts
  from at most 16 x 16 and doubles more often;
* `centre_steps` is 300 and `generator_steps` 800 with the step size falling after a half and three quarters: a CPU's patience. The published 80,000 steps of 16 to
  200 images are the reason why generator methods take GPU hours, and so few steps do not teach a generator classes: after 300 steps of 32 images (step size 0.004)
  on a CIFAR ResNet-20 the loss is down from 27 to 5.0, of which classes still make 3.6, and 8 of 20 drawn images are of theirs (a label weight of 10: 3 of 20);
* `relative=True` measures gaps in units of each layer's spread, for networks that take 0..255, where the published squares drown the label;
* mixup while distilling is no synthesis and is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.centres import ClassPixels, centre_statistics, one_each
from zsq_deploy.calib.parts.generators import DrawnImages, GeneratorForm, TrainedGenerator, keep_generator
from zsq_deploy.calib.parts.parametrisations import Start
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Constant, Milestones
from zsq_deploy.calib.parts.terms import CrossEntropy
from zsq_deploy.calib.parts.terms.centres import CentreStatistics
from zsq_deploy.calib.parts.terms.texture import TextureShares

__all__ = ["CENTRE_LOSS", "DEFAULTS", "LOSS", "MEANINGS", "recipe"]

#: Form B1g of the batch-norm-statistics loss: for the centres.
CENTRE_LOSS = BNLoss(moment="var", norm="mse", reduce="mean", layer_weight="shallow_0.2_deep_1.1")
#: Form B1b: for the generator.
LOSS = BNLoss(moment="var", norm="mse", reduce="mean")

_BY_PRODUCT = 100  # most classes for which the generator multiplies latents with embeddings
_SMALL = 64  # most pixels at which the generator has its published shape

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "centres": 100,
        "centre_steps": 300,
        "centre_rate": 0.05,
        "centre_label_weight": 5.0,
        "texture_weight": 1.0,
        "generator_steps": 800,
        "generator_rate": 1e-3,
        "generator_batch": 64,
        "bn_weight": 1.0,
        "centre_weight": 1.0,
        "label_weight": 1.0,
        "relative": False,
        "latent": 100,
        "batch_size": 128,
        "clip": True,
    }
)


#: What parameters of this method alone mean.
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "centres": "most classes that get an image of the centre, evenly spaced among all",
        "centre_steps": "optimisation steps of the images whose statistics are the centre",
        "centre_rate": "their step size",
        "centre_label_weight": "weight of the label loss for them",
        "texture_weight": "weight of their texture loss",
        "generator_steps": "steps of the generator's training",
        "generator_batch": "images of each of them",
        "centre_weight": "weight of the distance from the centre's statistics",
    }
)


def recipe(parameters: Mapping[str, Any]) -> tuple[Recipe, ...]:
    """TexQ's stages with resolved `parameters` (see :data:`DEFAULTS`)."""

    def form(start: Start) -> GeneratorForm:
        assert start.labels is not None
        return GeneratorForm(
            latent=parameters["latent"],
            conditioning="product" if start.labels.classes <= _BY_PRODUCT else "norms",
            upsamplings=2 if max(start.shape[2:]) <= _SMALL else 0,
        )

    def trained(start: Start) -> TrainedGenerator:
        return TrainedGenerator(start, form(start))

    def drawn(start: Start) -> DrawnImages:
        return DrawnImages(start, form(start))

    steps, relative = parameters["generator_steps"], parameters["relative"]
    centres = Recipe(
        loss=replace(CENTRE_LOSS, relative=relative),
        terms=(CrossEntropy(parameters["centre_label_weight"]), TextureShares(parameters["texture_weight"])),
        parametrise=lambda start: ClassPixels(start, parameters["centres"]),
        groups={"images": Group(parameters["centre_rate"], schedule=Constant())},
        steps=parameters["centre_steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
        images=one_each(parameters["centres"]),
    )
    training = Recipe(
        loss=replace(LOSS, relative=relative),
        loss_weight=parameters["bn_weight"],
        terms=(
            CrossEntropy(parameters["label_weight"]),
            CentreStatistics(parameters["centre_weight"], relative=relative),
        ),
        parametrise=trained,
        groups={
            "generator": Group(
                parameters["generator_rate"],
                betas=(0.5, 0.999),
                schedule=Milestones((steps // 2, steps * 3 // 4)),
            )
        },
        steps=steps,
        batch_size=parameters["generator_batch"],
        clip=parameters["clip"],
        prepare=centre_statistics,
        single=True,
    )
    drawing = Recipe(
        loss=None,
        parametrise=drawn,
        groups={},
        steps=0,
        batch_size=parameters["generator_batch"],
        clip=parameters["clip"],
        prepare=keep_generator,
    )
    return centres, training, drawing
