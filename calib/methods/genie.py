"""Genie's data synthesis (Jeon et al., CVPR 2023, arXiv 2212.04780, section 3, GENIE-D).

For every batch a fresh generator and one latent per image are trained together until the batch-norm layers see, over the batch, the statistics
that they stored in training; strided convolutions swing (see :mod:`zsq_deploy.calib.parts.swing`). No labels.

Published values (the released code): batches of 128, latents of 256, 4,000 steps; Adam with step size 0.1 on the latents, divided by 10
when the loss has not fallen for 100 steps, and 0.01 on the generator, times 0.95 every 100 steps; distance = squared differences of mean
and of standard deviation (unbiased; epsilon 1e-6 under the stored root), per layer divided by its number of channels and summed over layers;
plus each image's mean against 0 and standard deviation against 1, summed over images and channels. The last iterate is kept. (In the release the names of the
two step sizes are swapped; these are the values as they act.)

Deliberate deviations:

* `steps` is 500 by default: on a CPU 4,000 take hours. On a CIFAR ResNet-20 the loss starts at 23 and is at 1.2 after 100 steps, 0.49 after 500, 0.35
  after 700. A batch also ends when its smoothed loss has not fallen by `stop_threshold` for `stop_patience` steps (0: never); the
  manifest says at which step;
* images are clipped to valid pixels inside the loop (``clip``), so that the loss is that of the images that come out;
* the epsilon under the observed root is the stored one's (the release has none, and its gradient is infinite for a constant channel);
* up to 64 pixels the generator is the published one, which starts from a map of a quarter of the image size. For larger images, where that
  generator would cost many times what the network does, it starts from at most 16 x 16 and doubles more often, with half the channels each time
  (``upsamplings=2``: the published generator at any size);
* sizes that are no multiple of 4 are generated rounded up and cut;
* "mean 0 and standard deviation 1" holds in the space where natural images have them (see :class:`~zsq_deploy.calib.parts.priors.InputSpace`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.parametrisations import LatentImages, Start
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import EarlyStop, Exponential, Plateau

__all__ = ["DEFAULTS", "LOSS", "recipe"]

#: Form B1d of the batch-norm-statistics loss.
LOSS = BNLoss(
    hook="bn_in",
    per_sample=False,
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
        "steps": 500,
        "latent_rate": 0.1,
        "generator_rate": 0.01,
        "patience": 100,
        "latent": 256,
        "upsamplings": 0,
        "swing": 1,
        "batch_size": 128,
        "stop_patience": 200,
        "stop_threshold": 0.02,
        "clip": True,
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """Genie with resolved `parameters` (see :data:`DEFAULTS`)."""

    def parametrise(start: Start) -> LatentImages:
        return LatentImages(
            start.shape,
            start.generator,
            start.device,
            latent=parameters["latent"],
            upsamplings=parameters["upsamplings"],
        )

    stop = EarlyStop(parameters["stop_patience"], parameters["stop_threshold"]) if parameters["stop_patience"] else None
    return Recipe(
        loss=LOSS,
        parametrise=parametrise,
        groups={
            "latents": Group(parameters["latent_rate"], schedule=Plateau(parameters["patience"], 0.1, 1e-4)),
            "generator": Group(parameters["generator_rate"], schedule=Exponential(0.95, 100)),
        },
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        stop=stop,
        clip=parameters["clip"],
        swing=parameters["swing"],
    )
