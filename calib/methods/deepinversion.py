"""DeepInversion (Yin et al., CVPR 2020, arXiv 1912.08795, section 3.2).

Pixels are optimised until the network sees the class that it is asked for, in smooth images whose batch statistics are the stored ones.

Published values (the released code has two programs): loss = cross entropy of uniformly drawn classes + r times the batch-norm distance (plain norms of the gaps of
mean and of biased variance, summed over layers) + total variation (sum of four plain norms over the batch) + the size of the images, on images that are rolled
at random before each step.

* ImageNet: r 0.01 in the example of its manual, 0.05 by default; the first layer ten times; total variation 1e-4, mean plain norm of an image 1e-5; Adam with step size
  0.25 (0.2 by default), betas 0.5 and 0.9, which rises for 100 steps and falls along a cosine; rolled by up to 30 pixels of 224, the whole batch
  mirrored with probability 0.5, clipped to valid pixels; 2,000 steps at half resolution and 1,000 at full, or 2,000 at full, or 20,000 (betas 0.9
  and 0.999, no clipping); batches of 84 in the example.
* CIFAR: r 10 in its manual ("parameters from the paper"; 100 by default); no layer counts more; total variation 2.5e-5 (better pictures at 1e-3), size 0; Adam with
  step size 0.05 (0.1 for better pictures), default betas, constant; rolled by up to 2 pixels of 32; no mirroring, no clipping; 2,000 steps, batches of 256.
* Both keep the step with the smallest loss.

Deliberate deviations:

* one set of values at any size, ImageNet's except for the ones below and the step size 0.1;
* gaps are measured in units of each layer's spread (``relative``), because the published norms grow with the network's activations: one r reaches the classes on one
  network and drowns them on another (r 10: 56 % of the classes after 200 steps on a CIFAR ResNet-20, r 1: all; r 10: none of 8 after 60 steps on a network that takes
  0..255). In these units `bn_weight` 0.1 reaches all classes within 100 steps on both and on a MobileNet at 224 x 224. `relative=False` with the r
  above is the published loss;
* the roll is an eighth of the shorter side (30 pixels of 224 are that);
* ImageNet's first phase at half resolution is left out: it needs a network that takes images of half the size;
* `steps` is 500 with the schedule scaled to it, and the last step is kept;
* the competition term against a student (Adaptive DeepInversion) is left out: nothing is distilled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.augment import Flip, Jitter
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.labels import uniform
from zsq_deploy.calib.parts.parametrisations import pixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Cosine
from zsq_deploy.calib.parts.terms import CrossEntropy, PixelNorm, TotalVariation

__all__ = ["DEFAULTS", "LOSS", "RELATIVE_LOSS", "recipe"]

#: Form B1c of the batch-norm-statistics loss.
LOSS = BNLoss(moment="var", norm="l2", layer_weight="first_x10")

#: The same in units of each layer's spread.
RELATIVE_LOSS = replace(LOSS, relative=True)

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 500,
        "rate": 0.1,
        "warmup": 25,
        "batch_size": 128,
        "bn_weight": 0.1,
        "relative": True,
        "label_weight": 1.0,
        "smooth_weight": 1e-4,
        "size_weight": 1e-5,
        "jitter": 0.125,
        "clip": True,
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """DeepInversion with resolved `parameters` (see :data:`DEFAULTS`)."""
    schedule = Cosine(parameters["steps"], parameters["warmup"])
    return Recipe(
        loss=RELATIVE_LOSS if parameters["relative"] else LOSS,
        loss_weight=parameters["bn_weight"],
        terms=(
            CrossEntropy(parameters["label_weight"]),
            TotalVariation(parameters["smooth_weight"]),
            PixelNorm(parameters["size_weight"], of="image"),
        ),
        augment=(Jitter(parameters["jitter"]), Flip(0.5)),
        targets=uniform,
        parametrise=pixels,
        groups={"images": Group(parameters["rate"], betas=(0.5, 0.9), schedule=schedule)},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
    )
