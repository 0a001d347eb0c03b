"""The short way to a good set, composed of what held up among the other methods and measured for quality a second. No paper.

* **Start**: structured pictures (see :mod:`zsq_deploy.calib.fractal`), which are far nearer to the stored statistics than noise: on a CIFAR ResNet-20 the same 80
  steps end at less than half the distance. `pictures` below 1 lets the other images start as noise;
* **Target**: mean and standard deviation over *all* images of a batch (as Sony's data generation does, :mod:`.dgh`), so that each of them is free to differ, and
  the image itself as one more layer; gaps in units of each layer's spread (``relative``), so that one step size serves networks of any input scale;
* **Steps**: few, with Adam's memory of past gradients kept short (betas 0.5 and 0.9), a short rise and half a cosine down to zero: the last steps
  settle instead of swinging (both from DeepInversion's released code);
* **Free variety**: what the network sees is rolled by up to an eighth of the shorter side, and mirrored in half of the steps;
* pieces beside remembered moments (:mod:`zsq_deploy.calib.parts.all_images`), so that memory is that of a piece at any batch size.

No labels: any network with batch norm will do. What was tried and left out, and the figures, stand in docs/synthesis.md ("The preset fast").
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.augment import Flip, Jitter
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.parametrisations import Start
from zsq_deploy.calib.parts.pictured import PicturedPixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Cosine

__all__ = ["DEFAULTS", "LOSS", "MEANINGS", "recipe"]

#: Standard deviations over all images in units of each layer's spread, the image itself a layer.
LOSS = BNLoss(moment="std", norm="l2sq", divide_by="channels", eps=1e-6, reduce="mean", input_layer=True, relative=True)

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 80,
        "rate": 0.1,
        "warmup": 4,
        "pictures": 1.0,
        "jitter": 0.125,
        "mirror": 0.5,
        "piece": 32,
        "batch_size": 128,
        "clip": True,
    }
)

#: What parameters of this method alone mean.
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "pictures": "share of the images that start as structured pictures instead of noise",
        "mirror": "probability that the images of a step are mirrored in front of the network",
        "piece": "images that go through the network at a time",
        "batch_size": "most images that share their statistics",
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """The method with resolved `parameters` (see :data:`DEFAULTS`)."""

    def pictured(start: Start) -> PicturedPixels:
        return PicturedPixels(start, parameters["pictures"])

    schedule = Cosine(parameters["steps"], parameters["warmup"])
    return Recipe(
        loss=LOSS,
        augment=(Jitter(parameters["jitter"]), Flip(parameters["mirror"])),
        parametrise=pictured,
        groups={"images": Group(parameters["rate"], betas=(0.5, 0.9), schedule=schedule)},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
        piece=parameters["piece"],
    )
