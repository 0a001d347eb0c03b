"""IntraQ's images (Zhong et al., CVPR 2022, arXiv 2111.09136, section 3).

Images of one class are to differ from each other as photographs do. Three means on top of matching batch-norm statistics over the
batch: objects at random places and sizes (crops inside the loop), features that keep a distance from their class's centre ("marginal distance
constraint"), and labels that not every image has to reach fully ("soft inception loss").

Published values (the released code): four groups of five batches of 256; N(0, 1) noise; 1,000 steps of Adam with step size 0.5, divided by 10 when the loss
has not fallen for 50 steps, down to 1e-4. Loss = mean over layers and channels of the squared gaps of mean and of biased variance, plus
the squared difference of the class's probability to what is asked for, plus hinges on one minus the cosine between the features in front of the last
layer and the class's centre. With probability 0.5 all images of a step are cropped (each elsewhere, 0.5 to 1 of the area, torchvision's rule) and each is
mirrored with probability 0.5. Half of the images are asked for a probability drawn from `soft` to 1, the others for 1. The
centre is the mean over the finished images of earlier batches and groups. `soft`, `lower` and `upper` are 0.95, 0.05, 0.8
(CIFAR-10), 0.6, 0.02, 1.0 (CIFAR-100) and 1, 0, 2 (ImageNet, which switches both off: only the crops are left there).

Deliberate deviations:

* `soft`, `lower` and `upper` are CIFAR-10's for every network, because ImageNet's are none;
* `steps` is 300, not 1,000, the step size is 0.1, not 0.5, which takes longer than that to settle, and falls after 30 steps without progress;
* aspect ratios of crops are relative to the image's own, for networks whose input is not square;
* centres need images of a class from earlier batches. The release makes 20 batches; small sets have one or two, so `batch_size` is 64;
* the release sums weights 1 for all parts, and so does this by default (`label_weight`, `margin_weight`);
* `relative=True` measures gaps in units of each layer's spread, for networks that take 0..255, where the published squares of the first layer drown the label;
* not changed, but good to know: a squared probability has hardly a slope where the probability is near 0, so with many classes labels come late (on a
  MobileNet with 1,000 classes none of 8 after 60 steps, where HAST's cross entropy reached all);
* pixels are clipped to valid values after each step (``clip``); the release does not clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.augment import RandomResizedCrop
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.labels import Softened
from zsq_deploy.calib.parts.parametrisations import pixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Plateau
from zsq_deploy.calib.parts.terms import OwnProbability
from zsq_deploy.calib.parts.terms.feature import ClassMargins, remember_class_features

__all__ = ["DEFAULTS", "LOSS", "recipe"]

#: Form B1b of the batch-norm-statistics loss.
LOSS = BNLoss(moment="var", norm="mse", reduce="mean")

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 300,
        "rate": 0.1,
        "patience": 30,
        "batch_size": 64,
        "soft": 0.95,
        "lower": 0.05,
        "upper": 0.8,
        "label_weight": 1.0,
        "margin_weight": 1.0,
        "crop": 0.5,
        "crop_area": 0.5,
        "relative": False,
        "clip": True,
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """IntraQ with resolved `parameters` (see :data:`DEFAULTS`)."""
    return Recipe(
        loss=replace(LOSS, relative=parameters["relative"]),
        terms=(
            OwnProbability(parameters["label_weight"]),
            ClassMargins(parameters["margin_weight"], parameters["lower"], parameters["upper"]),
        ),
        augment=(RandomResizedCrop((parameters["crop_area"], 1.0), share=parameters["crop"]),),
        targets=Softened(parameters["soft"]),
        remember=remember_class_features,
        parametrise=pixels,
        groups={"images": Group(parameters["rate"], schedule=Plateau(parameters["patience"], 0.1, 1e-4))},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
    )
