"""DeepInversion (Yin et al., CVPR 2020, arXiv 1912.08795, section 3.2).

Pixels are optimised until the network sees the class that it is asked for, in smooth images whose batch statistics are the stored ones.

Published values (the released code, CIFAR setting): batches of 256, 2,000 steps, Adam with step size 0.1 (0.25 on ImageNet), betas 0.5 and 0.9, which
rises for 100 steps and then falls along a cosine; loss = cross entropy of uniformly drawn classes + 10 times the batch-norm distance (plain norms of the
gaps of mean and of biased variance, summed over layers, the first layer ten times; 0.01 in the ImageNet example) + 2.5e-5 (1e-4)
times total variation + 1e-5 times the norm of the images; images are rolled by up to 30 pixels of 224 and mirrored with probability 0.5 before each
step, and clipped to valid pixels after it.

Deliberate deviations:

* the roll is an eighth of the shorter side at any size (30 pixels of 224 are that);
* `bn_weight` is 10 at any size, because labels would lead everywhere else;
* ImageNet's first phase at half resolution is left out: it needs a network that takes images of half the size;
* `steps` is 500, not 2,000, with the schedule scaled to it;
* the competition term against a student (Adaptive DeepInversion) is left out: nothing is distilled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.augment import Flip, Jitter
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.labels import uniform
from zsq_deploy.calib.parts.parametrisations import pixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Cosine
from zsq_deploy.calib.parts.terms import CrossEntropy, PixelNorm, TotalVariation

__all__ = ["DEFAULTS", "LOSS", "recipe"]

#: Form B1c of the batch-norm-statistics loss.
LOSS = BNLoss(moment="var", norm="l2", layer_weight="first_x10")

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 500,
        "rate": 0.1,
        "warmup": 25,
        "batch_size": 128,
        "bn_weight": 10.0,
        "label_weight": 1.0,
        "smooth_weight": 2.5e-5,
        "size_weight": 1e-5,
        "jitter": 0.125,
        "clip": True,
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """DeepInversion with resolved `parameters` (see :data:`DEFAULTS`)."""
    schedule = Cosine(parameters["steps"], parameters["warmup"])
    return Recipe(
        loss=LOSS,
        loss_weight=parameters["bn_weight"],
        terms=(
            CrossEntropy(parameters["label_weight"]),
            TotalVariation(parameters["smooth_weight"]),
            PixelNorm(parameters["size_weight"]),
        ),
        augment=(Jitter(parameters["jitter"]), Flip(0.5)),
        targets=uniform,
        parametrise=pixels,
        groups={"images": Group(parameters["rate"], betas=(0.5, 0.9), schedule=schedule)},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
    )
