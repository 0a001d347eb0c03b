"""ZeroQ's distilled data (Cai et al., CVPR 2020, arXiv 2001.00281, section 3.1 and equation 3).

Start from Gaussian noise and move the pixels until every batch-norm layer sees, in each image alone, the mean and the
standard deviation that it stored in training. No labels, no image augmentation.

Published values: Adam, 500 steps, step size 0.5 (the first release; a later one has 0.1) divided by 10 when the loss has not
fallen for 100 steps, down to 1e-4; 32 or 64 images in one batch; distance = squared differences of mean and of standard deviation (unbiased,
epsilon 1e-6 under both roots), per layer divided by its number of channels and summed over images and layers; plus the same
for the input image against mean 0 and standard deviation 1, divided by the number of images.

Deliberate deviations:

* statistics are taken at the input of each batch norm. The release pairs the n-th convolution with the n-th batch norm, which goes wrong
  for a convolution without one (``first_order_pairing`` has no counterpart here). Where every convolution has its batch norm, both agree.
  A batch norm without a convolution in front (after a concatenation) is matched as well;
* pixels are clipped to valid values after each step (``clip``): an image that no camera can deliver would widen the input's range;
* the step size falls after 20 steps without progress and a batch has at most 200 steps (``patience=100, steps=500``: as published). At a step
  size of 0.5 the loss only swings after some 60 steps: on a CIFAR ResNet-20 the published schedule ends at 0.43 per image, this one at 0.27, in less than half
  of the time;
* the release stops when the loss falls below 5 per layer, summed over the batch, a number that depends on the batch size and the network. Here a batch ends when its
  smoothed loss has not fallen by `stop_threshold` for `stop_patience` steps (0: never), and the manifest says at which step;
* as many batches as are asked for instead of one;
* "mean 0 and standard deviation 1" holds in the space where natural images have them, so that networks fed with 0..1 or 0..255 are
  treated like those with normalised input.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.parametrisations import pixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import EarlyStop, Plateau

__all__ = ["DEFAULTS", "LOSS", "recipe"]

#: Form B1a of the batch-norm-statistics loss.
LOSS = BNLoss(
    hook="bn_in",
    per_sample=True,
    moment="std",
    unbiased=True,
    norm="l2sq",
    divide_by="channels",
    eps=1e-6,
    reduce="sum",
    input_prior=True,
)

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 200,
        "rate": 0.5,
        "patience": 20,
        "batch_size": 64,
        "stop_patience": 50,
        "stop_threshold": 0.02,
        "clip": True,
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """ZeroQ with resolved `parameters` (see :data:`DEFAULTS`)."""
    stop = EarlyStop(parameters["stop_patience"], parameters["stop_threshold"]) if parameters["stop_patience"] else None
    return Recipe(
        loss=LOSS,
        parametrise=pixels,
        groups={"images": Group(parameters["rate"], schedule=Plateau(parameters["patience"], 0.1, 1e-4))},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        stop=stop,
        clip=parameters["clip"],
    )
