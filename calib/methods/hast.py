"""HAST's images, "hard sample synthesizing" (Li et al., CVPR 2023, arXiv 2303.13826, section 3.2).

A quantized network learns most from images that the float network finds hard. Matching batch-norm statistics over the batch, the cross entropy of each
image's class is multiplied with (1 - p)^focus, so that images which are recognised already are left alone and stay in doubt.

Published values (the released code): IntraQ's loop (batches of 256, N(0, 1) noise, 1,000 steps of Adam with step size 0.5, divided by 10 when the loss has
not fallen for 50 steps, down to 1e-4); loss = mean over layers and channels of the squared gaps of mean and of biased
variance + beta times the mean of (1 - p)^gamma times cross entropy, with the gradient through both factors. CIFAR: beta 10, gamma 2, no augmentation.
ImageNet: beta 0.1, gamma 0.5, and with probability 0.5 all images of a step are cropped at random (each elsewhere, torchvision's rule) and each is mirrored
with probability 0.5; a crop has 0.4 to 1 of the area. The set has 4 groups of 1,280 images.

Deliberate deviations:

* CIFAR's values for every network, because a network does not say what it was trained on (ImageNet's: `label_weight=0.1, focus=0.5, crop=0.5`).
  With crops, 200 steps on a CIFAR ResNet-20 end four to eight times farther from the stored statistics;
* `steps` is 300, not 1,000, the step size is 0.1, not 0.5, which takes longer than that to settle, and falls after 30 steps without progress;
* aspect ratios of crops are relative to the image's own, for networks whose input is not square;
* `relative=True` measures gaps in units of each layer's spread, for networks that take 0..255, where the published squares of the first layer drown the label;
* pixels are clipped to valid values after each step (``clip``); the release does not clip;
* the other half of HAST (perturbed images and feature alignment while fine-tuning) is no synthesis and is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.augment import RandomResizedCrop
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.labels import uniform
from zsq_deploy.calib.parts.parametrisations import pixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Plateau
from zsq_deploy.calib.parts.terms import CrossEntropy

__all__ = ["DEFAULTS", "LOSS", "recipe"]

#: Form B1b of the batch-norm-statistics loss.
LOSS = BNLoss(moment="var", norm="mse", reduce="mean")

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 300,
        "rate": 0.1,
        "patience": 30,
        "batch_size": 128,
        "label_weight": 10.0,
        "focus": 2.0,
        "crop": 0.0,
        "crop_area": 0.4,
        "relative": False,
        "clip": True,
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """HAST's image synthesis with resolved `parameters` (see :data:`DEFAULTS`)."""
    return Recipe(
        loss=replace(LOSS, relative=parameters["relative"]),
        terms=(CrossEntropy(parameters["label_weight"], parameters["focus"]),),
        augment=(RandomResizedCrop((parameters["crop_area"], 1.0), share=parameters["crop"]),),
        targets=uniform,
        parametrise=pixels,
        groups={"images": Group(parameters["rate"], schedule=Plateau(parameters["patience"], 0.1, 1e-4))},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
    )
